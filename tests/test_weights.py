"""Loading checkpoints: all of the backbone, or an error that says why not."""

import copy
import os
import threading
from collections import Counter
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from convmlp_mm import ConvMLP
from convmlp_mm.weights import (
    ROOT,
    describe_arch,
    fit_checkpoint,
    read_checkpoint,
)

TINY = dict(
    tokenizer_channels=8,
    conv_blocks=1,
    channels=(8, 16, 24),
    depths=(1, 1, 1),
    mlp_ratios=(2, 2, 2),
)


def build(checkpoint, prefix=None, **kwargs):
    init_cfg = dict(type='Pretrained', checkpoint=str(checkpoint))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    cfg = dict(type='ConvMLP', arch=TINY, init_cfg=init_cfg)
    return MODELS.build({**cfg, **kwargs})


@pytest.fixture
def published():
    """A state dict in the layout of the published classifiers."""
    torch.manual_seed(7)
    model = ConvMLP(TINY, final_norm=True)
    for param in model.parameters():
        nn.init.normal_(param)
    state = dict(model.state_dict())
    state['head.weight'], state['head.bias'] = torch.rand(10, 24), torch.rand(10)
    return state


@pytest.fixture
def save(tmp_path):
    def save_as(obj):
        torch.save(obj, tmp_path / 'weights.pth')
        return tmp_path / 'weights.pth'

    return save_as


def assert_loaded(model, state):
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def test_published_file_loads_without_renaming_and_head_is_skipped(published, save):
    model = build(save(published))
    model.init_weights()
    assert_loaded(model, published)
    assert model.is_init


def test_final_norm_is_loaded_when_the_model_has_one(published, save):
    model = build(save(published), final_norm=True)
    model.init_weights()
    assert torch.equal(model.norm.weight, published['norm.weight'])


@pytest.mark.parametrize('out_indices', [(0,), (1,), (0, 2)])
def test_stages_that_are_not_built_are_skipped(published, save, out_indices):
    model = build(save(published), out_indices=out_indices)
    model.init_weights()
    assert_loaded(model, published)


@pytest.mark.parametrize('prefix', ['module.', 'backbone.', 'module.backbone.'])
@pytest.mark.parametrize('given', [False, True])
@pytest.mark.parametrize('key', [None, 'state_dict', 'model'])
def test_prefix_and_nesting_are_found(published, save, prefix, given, key):
    state = {prefix + k: v for k, v in published.items()}
    state['neck.lateral_convs.0.conv.weight'] = torch.rand(3)
    model = build(save({key: state} if key else state), prefix if given else None)
    model.init_weights()
    assert_loaded(model, published)


def test_prefix_that_matches_nothing_raises(published, save):
    with pytest.raises(ValueError, match=r"prefix 'encoder\.'.*tokenizer\.block\.0"):
        build(save(published), 'encoder').init_weights()


def test_checkpoint_of_the_runner_loads(published, save, monkeypatch):
    buffer = HistoryBuffer([1.0, 2.0], [1, 1])
    checkpoint = dict(
        meta=dict(epoch=1, iter=2, seed=0),
        state_dict={f'backbone.{k}': v for k, v in published.items()},
        message_hub=dict(log_scalars={'train/loss': buffer}),
        param_schedulers=[dict(milestones=Counter([8, 11]), last_step=1)],
    )
    path = save(checkpoint)
    # As in a new process: they are registered with the first buffer.
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    model = build(path)
    model.init_weights()
    assert_loaded(model, published)


def test_missing_tensors_are_named_and_nothing_is_loaded(published, save):
    del published['stages.1.blocks.0.norm1.weight']
    model = build(save(published))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'1 missing: stages\.1\.blocks\.0\.norm1'):
        model.init_weights()
    assert_loaded(model, before)
    assert not model.is_init


def test_other_shapes_are_named_with_both(published, save):
    published['conv_stages.downsample.bias'] = torch.rand(9)
    model = build(save(published))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r'downsample\.bias \(\(9,\) in the file, \(8'):
        model.init_weights()
    assert_loaded(model, before)


def test_unknown_tensors_are_named(published, save):
    published['stages.0.blocks.0.extra'] = torch.rand(1)
    with pytest.raises(ValueError, match=r'1 unknown: stages\.0\.blocks\.0\.extra'):
        build(save(published)).init_weights()


def test_file_of_another_arch_is_refused_and_named(published, save):
    custom = r"The file is a custom ConvMLP \({'tokenizer_channels': 8.*"
    with pytest.raises(ValueError, match=custom + 'configuration says ConvMLP-S$'):
        build(save(published), arch='s').init_weights()
    medium = {f'backbone.{k}': v for k, v in ConvMLP('m').state_dict().items()}
    message = 'The file is ConvMLP-M; the configuration says ConvMLP-L$'
    with pytest.raises(ValueError, match=message):
        build(save(dict(state_dict=medium)), arch='l').init_weights()


@pytest.mark.parametrize('arch', ['s', 'm', 'l', TINY])
def test_architecture_is_read_off_the_tensors(arch):
    model = ConvMLP(arch)
    assert describe_arch(model.state_dict()) == model.arch
    assert describe_arch({'layer1.weight': torch.rand(1)}) is None


def test_missing_counters_of_old_files_are_no_error(published, save):
    state = {k: v for k, v in published.items() if 'num_batches' not in k}
    build(save(state)).init_weights()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='none.pth'):
        build(tmp_path / 'none.pth').init_weights()


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickled_code_does_not_run(published, save, tmp_path):
    published['backdoor'] = Malicious(str(tmp_path / 'opened'))
    with pytest.raises(ValueError, match='objects that are not allowed: .*mkdir'):
        read_checkpoint(save(published))
    assert not (tmp_path / 'opened').exists()


class Reach:
    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


def test_getattr_of_runner_logs_reaches_nothing_else(save):
    with pytest.raises(ValueError, match='not allowed'):
        read_checkpoint(save(dict(state_dict={}, log=Reach())))


def test_truncated_file_is_refused(published, save):
    path = save(published)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'weights\.pth.*cut short'):
        read_checkpoint(path)


def test_file_that_holds_no_dict_is_refused(save):
    with pytest.raises(ValueError, match='must hold a dict, but holds a Tensor'):
        read_checkpoint(save(torch.rand(2)))


def test_url_is_fetched_once_into_the_cache(published, save, tmp_path, monkeypatch):
    path = save(published)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    handler = partial(SimpleHTTPRequestHandler, directory=str(tmp_path))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f'http://127.0.0.1:{server.server_port}/weights.pth'
    try:
        model = build(url)
        model.init_weights()
        assert_loaded(model, published)
        path.unlink()
        assert read_checkpoint(url).keys() == published.keys()
    finally:
        server.shutdown()
        server.server_close()
    assert [p.name for p in (tmp_path / 'cache').rglob('*.*')] == ['weights.pth']


def test_pretrained_by_class_is_strict_too(published, save):
    del published['tokenizer.block.0.weight']
    init_cfg = dict(type=PretrainedInit, checkpoint=str(save(published)))
    with pytest.raises(ValueError, match='1 missing'):
        ConvMLP(TINY, init_cfg=init_cfg).init_weights()


def test_other_initialisers_beside_pretrained_give_way(published, save):
    init_cfg = [
        dict(type='Constant', layer='Linear', val=9.0),
        dict(type='Pretrained', checkpoint=str(save(published))),
    ]
    model = MODELS.build(dict(type='ConvMLP', arch=TINY, init_cfg=init_cfg))
    model.init_weights()
    assert_loaded(model, published)


def test_detector_stops_on_a_backbone_file_that_does_not_fit(published, save):
    from mmdet.utils import register_all_modules

    register_all_modules(False)
    del published['tokenizer.block.0.weight']
    neck = dict(type='FPN', in_channels=[8, 8, 16, 24], out_channels=8, num_outs=5)
    cfg = dict(
        type='SingleStageDetector',
        backbone=dict(
            type='ConvMLP',
            arch=TINY,
            init_cfg=dict(type='Pretrained', checkpoint=str(save(published))),
        ),
        neck=neck,
        bbox_head=dict(type='RetinaHead', num_classes=2, in_channels=8),
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg)
    with pytest.raises(ValueError, match='1 missing: tokenizer'):
        model.init_weights()


def detector(**head):
    """A tiny RetinaNet."""
    from mmdet.utils import register_all_modules

    register_all_modules(False)
    cfg = dict(
        type='SingleStageDetector',
        backbone=dict(type='ConvMLP', arch=TINY),
        neck=dict(type='FPN', in_channels=[8, 8, 16, 24], out_channels=8, num_outs=5),
        bbox_head=dict(type='RetinaHead', in_channels=8, feat_channels=8, **head),
    )
    with DefaultScope.overwrite_default_scope('mmdet'):
        return MODELS.build(cfg)


@pytest.mark.parametrize('nested', [False, True])
def test_published_classifier_starts_a_detector(published, nested):
    model = detector(num_classes=2)
    checkpoint = dict(state_dict=published) if nested else published
    loaded, message = fit_checkpoint(model, checkpoint, 'a.pth', partial=True)
    assert {f'backbone.{k}' for k in model.backbone.state_dict()} == set(loaded)
    name = 'stages.0.blocks.0.norm1.weight'
    assert torch.equal(loaded[f'backbone.{name}'], published[name])
    assert 'loaded' in message and 'not in the file neck.' in message
    assert 'skipped backbone.norm.weight, backbone.norm.bias, head.fc.weight' in message
    with pytest.raises(ValueError, match=r'missing: neck\.'):
        fit_checkpoint(model, checkpoint, 'a.pth')


@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_head_with_other_classes_is_skipped_with_a_line(prefix):
    model, other = detector(num_classes=2), detector(num_classes=7)
    checkpoint = {prefix + k: v for k, v in other.state_dict().items()}
    loaded, message = fit_checkpoint(model, checkpoint, 'a.pth')
    heads = {'bbox_head.retina_cls.weight', 'bbox_head.retina_cls.bias'}
    assert set(model.state_dict()) - set(loaded) == heads
    assert message.endswith(
        'for another number of classes ' + ', '.join(sorted(heads, reverse=True))
    )


def test_other_misfits_of_a_detector_are_errors(published):
    model = detector(num_classes=2)
    state = dict(model.state_dict())
    state['neck.lateral_convs.0.conv.weight'] = torch.rand(4, 8, 1, 1)
    with pytest.raises(ValueError, match=r'another shape: neck\.lateral'):
        fit_checkpoint(model, state, 'a.pth', partial=True)
    state = {k: v for k, v in model.state_dict().items() if 'tokenizer' not in k}
    with pytest.raises(ValueError, match=r'missing: backbone\.tokenizer'):
        fit_checkpoint(model, state, 'a.pth', partial=True)
    with pytest.raises(ValueError, match=r'missing: backbone\.tokenizer'):
        fit_checkpoint(model, {'layer1.weight': torch.rand(1)}, 'a.pth', partial=True)


def test_mirror_stands_in_for_the_server(published, save, monkeypatch, tmp_path):
    save(published)
    monkeypatch.setenv('CONVMLP_WEIGHTS', str(tmp_path))
    model = build(f'{ROOT}weights.pth')
    model.init_weights()
    assert_loaded(model, published)
    with pytest.raises(FileNotFoundError, match='other.pth.*CONVMLP_WEIGHTS is set'):
        read_checkpoint(f'{ROOT}detection/other.pth')
