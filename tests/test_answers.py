"""docs/answers.md: no message stands there that a test does not provoke."""

import ast
import importlib
import inspect
import re
import runpy
import socket
import sys
from functools import partial, reduce
from importlib import metadata
from pathlib import Path

import mmcv
import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer, MMLogger
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import distributed, nn
from torch.autograd.graph import saved_tensors_hooks

import convmlp_mm
from convmlp_mm.launch import merge_options

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / 'docs' / 'answers.md').read_text(encoding='utf-8')
SECTION = re.compile(r'^### `([^`\n]+)`\n(.*?)(?=^##)', re.DOTALL | re.MULTILINE)
ANSWERS = dict(SECTION.findall(PAGE))
PROVOKED = {}
# Its distributions have other names, and it has no upper bounds.
MAINTAINED = any('onedl' in name for name in metadata.packages_distributions()['mmdet'])


def provokes(message):
    """Register the test of a message; it returns what was raised or logged."""

    def register(function):
        PROVOKED[message] = function
        return function

    return register


def python_of(answer):
    return re.search(r'```python\n(.*?)```', answer, re.DOTALL).group(1)


def options_of(answer):
    """The settings after ``--cfg-options`` of a command."""
    command = re.search(r'```shell\n(.*?)```', answer, re.DOTALL).group(1)
    settings = command.partition('--cfg-options')[2].replace('\\\n', ' ').split()
    return [setting.replace('"', '') for setting in settings]


def settings_of(answer):
    pairs = [option.partition('=') for option in options_of(answer)]
    # A name is no literal.
    return {
        key: value if value.isalpha() and value != 'True' else ast.literal_eval(value)
        for key, _, value in pairs
    }


@pytest.fixture
def detector(tmp_path, monkeypatch):
    """A configuration of a detector with data, in the working directory."""
    monkeypatch.chdir(tmp_path)
    # They only enter the log, and take most of the time.
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    tiny.write_data(tmp_path / 'data')
    tiny.write_config('my_detector.py', 'detector', tmp_path / 'data')
    with open('my_detector.py', 'a') as file:
        file.write(f'num_classes = 2\nexperiment_name = {tmp_path.name!r}\n')
    init_default_scope('mmdet')
    return Config.fromfile('my_detector.py')


def recipes(answer, name):
    """A configuration before and after the answer's settings."""
    before, after = (Config.fromfile(convmlp_mm.config_path(name)) for _ in 'ab')
    merge_options(after, settings_of(answer))
    return before, after


def failure(function, *args, **kwargs):
    with pytest.raises(Exception) as raised:
        function(*args, **kwargs)
    return str(raised.value)


def build(kind, cfg):
    return getattr(importlib.import_module('mmdet.registry'), kind).build(cfg)


@provokes('ConvMLP is not in the mmdet::model registry')
def not_registered(answer, detector, monkeypatch):
    with monkeypatch.context() as patch:
        patch.delitem(MODELS.module_dict, 'ConvMLP')
        message = failure(build, 'MODELS', detector.model)
    cured = Config.fromstring(python_of(answer), '.py')
    assert cured.custom_imports.imports == ['convmlp_mm']
    build('MODELS', detector.model)
    return message


@provokes("No module named 'mmcv._ext'")
def no_operators(answer, monkeypatch):
    from mmcv.utils import ext_loader

    monkeypatch.setattr(mmcv, '__path__', [])
    monkeypatch.delitem(sys.modules, 'mmcv._ext', raising=False)
    assert len(convmlp_mm.ConvMLP(arch=tiny.ARCH)(torch.rand(1, 3, 32, 32))) == 4
    return failure(ext_loader.load_ext, '_ext', ['nms'])


@provokes('NoneType takes no arguments')
def new_transformers(answer, monkeypatch):
    # What release 5 has no more is missing in the same way without the package.
    monkeypatch.setitem(sys.modules, 'transformers', None)
    models = Path(importlib.import_module('mmpretrain').__file__).parent / 'models'
    (requirement,) = (x for x in answer.split("'") if x.startswith('transformers'))
    assert '<5' in requirement
    file = models / 'multimodal' / 'blip' / 'language_model.py'
    return failure(runpy.run_path, str(file))


@provokes('MMCV==2.2.0 is used but incompatible')
def too_new(answer, monkeypatch):
    mmdet = importlib.import_module('mmdet')
    if MAINTAINED:
        pytest.skip('the maintained stack has no such bound')
    monkeypatch.setattr(mmcv, '__version__', '2.2.0')
    return failure(importlib.reload, mmdet)


@provokes('mmsegmentation is not installed')
def other_distribution(answer, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(python_of(answer))
    assert Config.fromfile(path).default_scope == 'mmseg'
    if not MAINTAINED:
        pytest.skip('the original stack has this distribution')
    path.write_text("_base_ = 'mmseg::_base_/default_runtime.py'")
    return failure(Config.fromfile, path)


@provokes('Duplicate key is not allowed among bases')
def two_bases(answer, tmp_path):
    path = tmp_path / 'mine.py'
    path.write_text(python_of(answer))
    assert Config.fromfile(path).log_level == 'WARNING'
    base = convmlp_mm.config_path('retinanet_convmlp_s')
    (tmp_path / 'runtime.py').write_text("log_level = 'WARNING'")
    path.write_text(f'_base_ = [{base!r}, "runtime.py"]')
    return failure(Config.fromfile, path)


@provokes('need at least one array to concatenate')
def other_classes(answer, detector, tool):
    data = detector.train_dataloader.dataset
    data.update(metainfo=dict(classes=['dog']), filter_cfg=dict(filter_empty_gt=True))
    message = failure(build, 'DATASETS', data)
    merge_options(detector, settings_of(answer))
    assert len(build('DATASETS', detector.train_dataloader.dataset)) == 4
    command = ['train.py', 'my_detector.py', '--work-dir', 'work', '--cfg-options']
    dogs = 'train_dataloader.dataset.metainfo.classes=[dog]'
    ours = tool(*command, 'model.bbox_head.num_classes=1', dogs).stderr
    assert 'has no category for 1 of the 1 names in metainfo.classes' in ours
    return message


@provokes('The testing results of the whole dataset is empty')
def no_boxes(answer, detector, monkeypatch):
    lines = []
    monkeypatch.setattr(MMLogger, 'error', lambda logger, line: lines.append(line))
    metric = build('METRICS', detector.val_evaluator)
    metric.dataset_meta = dict(classes=tiny.CLASSES)
    found = dict(img_id=1, bboxes=np.zeros((0, 4)), scores=[], labels=[])
    metric.compute_metrics([(dict(img_id=1, height=48, width=64), found)])
    before, after = recipes(answer, 'retinanet_convmlp_s')
    assert before.model.test_cfg.score_thr > after.model.test_cfg.score_thr == 0
    return lines[0]


@provokes('loss is nan')
def not_finite(answer, detector):
    detector.work_dir = 'work'
    merge_options(detector, settings_of(answer))
    detector.model.bbox_head.loss_cls.loss_weight = float('nan')
    runner = Runner.from_cfg(detector)
    message = failure(runner.train)
    assert runner.optim_wrapper.clip_grad_kwargs == dict(max_norm=1.0)
    return message


@provokes('size mismatch for bbox_head')
def other_head(answer, detector):
    two = build('MODELS', detector.model)
    detector.model.bbox_head.num_classes = 3
    three = build('MODELS', detector.model)
    message = failure(two.load_state_dict, three.state_dict())
    torch.save(three.state_dict(), 'epoch_12.pth')
    convmlp_mm.get_model('my_detector.py', 'epoch_12.pth')
    ours = failure(convmlp_mm.get_inferencer, 'my_detector.py', 'epoch_12.pth')
    assert 'of another shape' in ours
    cfg = Config.fromfile('my_detector.py')
    merge_options(cfg, settings_of(answer))
    convmlp_mm.get_inferencer(cfg, 'epoch_12.pth')
    return message


@provokes('Weights only load failed')
def own_records(answer, tmp_path, monkeypatch):
    # As torch 2.6 and later have it.
    monkeypatch.setattr(torch, 'load', partial(torch.load, weights_only=True))
    loss, path = HistoryBuffer(), str(tmp_path / 'epoch_1.pth')
    loss.update(1.0)
    torch.save(dict(state_dict={}, message_hub=dict(log_scalars=dict(loss=loss))), path)
    message = failure(torch.load, path)
    exec(python_of(answer), {})
    read = CheckpointLoader.load_checkpoint(path)
    assert read['message_hub']['log_scalars']['loss'].current() == 1.0
    return message


@provokes('SyncBatchNorm expected input tensor to be on GPU')
def norm_without_gpu(answer):
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        message = failure(nn.SyncBatchNorm(2), torch.rand(4, 2))
    finally:
        distributed.destroy_process_group()
    before, after = recipes(answer, 'semantic_fpn_convmlp_s')
    kinds = [cfg.model.decode_head.norm_cfg.type for cfg in (before, after)]
    assert kinds == ['SyncBN', 'BN']
    return message


@provokes('address already in use')
def busy_port(answer, tool):
    with socket.create_server(('', 0)) as server:
        port = server.getsockname()[1]
        message = failure(distributed.TCPStore, '127.0.0.1', port, is_master=True)
        command = ['--rdzv_endpoint', f'127.0.0.1:{port}', 'train.py']
        ours = tool('convmlp_mm.launch.elastic', *command).stderr
    assert f'port {port} of this machine cannot be used' in ours and 'PORT' in ours
    return message


@provokes('CUDA out of memory')
def too_large(answer):
    images, kept = torch.rand(1, 3, 64, 64), []
    for with_cp in (False, True):
        model = convmlp_mm.ConvMLP(arch=tiny.ARCH, with_cp=with_cp)
        tensors = []
        with saved_tensors_hooks(lambda x: tensors.append(x) or x, lambda x: x):  # noqa: B023
            model(images)
        kept.append(sum({x.data_ptr(): x.nbytes for x in tensors}.values()))
    assert kept[1] < kept[0] / 2
    before, after = recipes(answer, 'retinanet_convmlp_s')
    steps, batch = (
        after.optim_wrapper.accumulative_counts,
        after.train_dataloader.batch_size,
    )
    assert steps * batch == before.train_dataloader.batch_size
    assert after.model.backbone.with_cp
    if not torch.cuda.is_available():
        pytest.skip('there is no GPU whose memory could be filled')
    return failure(torch.empty, 2**50, device='cuda')


@pytest.mark.parametrize('message', ANSWERS)
def test_message_is_provoked_and_its_answer_helps(message, request):
    function = PROVOKED[message]
    _, *fixtures = inspect.signature(function).parameters
    said = function(ANSWERS[message], *map(request.getfixturevalue, fixtures))
    # torch 2.2 has the words of the system, which begin otherwise.
    assert message.lower() in said.lower()


def test_page_has_these_messages_and_files():
    assert list(ANSWERS) == list(PROVOKED)
    for path in re.findall(r'(?<![\w/])(?:tools|configs)/[\w/]+\.(?:py|sh)', PAGE):
        assert (ROOT / path).is_file(), path
    for link in re.findall(r'\]\(([^)#]+)', PAGE):
        assert '://' in link or (ROOT / 'docs' / link).exists()


COMING = PAGE.partition('## Coming from')[2].partition('\n## ')[0]
OURS = [
    word
    for row in re.findall(r'^\| .*\|$', COMING, re.MULTILINE)
    for cell in re.split(r' \| ', row)[1:]
    for word in re.findall(r'`(.+?)`', cell)
]


@pytest.fixture(scope='module')
def settings():
    """What a classifier's configuration sets, with the defaults of its backbone."""
    cfg = Config.fromfile(convmlp_mm.config_path('transfer/convmlp_s_cifar10'))
    imagenet = Config.fromfile(convmlp_mm.config_path('convmlp_s_imagenet'))
    cfg.model.head.loss = imagenet.model.head.loss
    for name, parameter in inspect.signature(convmlp_mm.ConvMLP).parameters.items():
        cfg.model.backbone.setdefault(name, parameter.default)
    return cfg


@pytest.mark.parametrize('word', dict.fromkeys(OURS))
def test_names_for_those_of_the_authors_exist(word, settings):
    if re.search(r'\.(py|sh)\b', word):
        assert re.match('configs|tools', word)
    elif word.startswith('convmlp_mm.ConvMLP('):
        assert len(eval(word, dict(convmlp_mm=convmlp_mm)).out_channels) == 4
    elif word.startswith('convmlp_mm.get_model('):
        given = ast.parse(word, mode='eval').body
        name, options = given.args[0].value, {k.arg: k.value for k in given.keywords}
        assert name in convmlp_mm.list_models()
        inspect.signature(convmlp_mm.get_model).bind(name, **options)
    elif word.startswith('type='):
        assert MODELS.build(eval(f'dict({word})')).arch
    elif '.' in word:
        assert (
            reduce(lambda node, key: node[key], word.split('.'), settings) is not None
        )
    else:
        assert word in convmlp_mm.list_models()


def test_layer_of_the_activation_map_has_its_channels_first():
    model, shapes = convmlp_mm.ConvMLP(final_norm=True, out_indices=3).eval(), {}
    layer = re.search(r'--target-layers (\S+)', PAGE).group(1)
    for name, module in nn.Module.named_modules(model, prefix='backbone'):
        if name in (layer, 'backbone.norm'):
            module.register_forward_hook(
                lambda *a, name=name: shapes.update({name: tuple(a[2].shape)})
            )
    model(torch.rand(1, 3, 64, 96))
    assert shapes == {layer: (1, 512, 2, 3), 'backbone.norm': (1, 2, 3, 512)}
