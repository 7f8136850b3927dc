"""Loading checkpoints: all of the backbone, or an error that says why not."""

import copy
import hashlib
import os
import threading
from collections import Counter, OrderedDict
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from mmengine.model import PretrainedInit
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import CheckpointLoader, checkpoint
from reference import (
    assert_summary_equal,
    draw,
    draw_checkpoint,
    draw_image,
    published_outputs,
)
from safetensors.torch import save_file
from torch import nn

from convmlp_mm import ConvMLP, get_model
from convmlp_mm.checkpoint import (
    ROOT,
    fit_checkpoint,
    read_checkpoint,
    to_mm_layout,
    to_published_layout,
)
from convmlp_mm.launch import read_weights_only

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
    if 'backbone' in prefix:
        state[prefix.replace('backbone', 'neck') + 'conv.weight'] = torch.rand(3)
    model = build(save({key: state} if key else state), prefix if given else None)
    model.init_weights()
    assert_loaded(model, published)


def test_prefix_that_matches_nothing_raises(published, save):
    with pytest.raises(
        ValueError, match=r'the 0 in the file, 81 missing: tokenizer\.block\.0'
    ):
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
    with pytest.raises(ValueError, match='of another shape: tokenizer'):
        build(save(published), arch='s').init_weights()
    medium = {f'backbone.{k}': v for k, v in ConvMLP('m').state_dict().items()}
    for arch, said in (('l', 'ConvMLP-L'), (TINY, 'a custom ConvMLP')):
        message = f'The file is ConvMLP-M; the configuration says {said}$'
        with pytest.raises(ValueError, match=message):
            build(save(dict(state_dict=medium)), arch=arch).init_weights()


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
    assert read_checkpoint(save(dict(log=Reach()))) == dict(log=None)


def test_truncated_file_is_refused(published, save):
    path = save(published)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r'weights\.pth.*cut short'):
        read_checkpoint(path)


def test_safetensors_are_read(published, tmp_path):
    path = tmp_path / 'weights.safetensors'
    save_file({k: v.contiguous() for k, v in published.items()}, path)
    model = build(path)
    model.init_weights()
    assert_loaded(model, published)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match='is not a file of plain weights'):
        read_checkpoint(path)


def test_file_that_holds_no_dict_is_refused(save):
    with pytest.raises(ValueError, match='must hold a dict, but holds a Tensor'):
        read_checkpoint(save(torch.rand(2)))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """URL of an empty folder, the folder, and the cache of downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    folder = tmp_path / 'served'
    folder.mkdir()
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    server = ThreadingHTTPServer(('127.0.0.1', 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    cache = tmp_path / 'home' / 'hub' / 'checkpoints'
    yield f'http://127.0.0.1:{server.server_port}', folder, cache
    server.shutdown()
    server.server_close()


def test_url_is_fetched_once_into_the_cache(published, save, served):
    url, folder, cache = served
    path = save(published).rename(folder / 'weights.pth')
    model = build(f'{url}/weights.pth')
    model.init_weights()
    assert_loaded(model, published)
    path.unlink()
    assert read_checkpoint(f'{url}/weights.pth').keys() == published.keys()
    (cached,) = cache.iterdir()
    assert cached.name.endswith('-weights.pth')


def damage(path, how, tmp_path):
    if how == 'cut short':
        path.write_bytes(path.read_bytes()[:-1000])
    elif how == 'code':
        torch.save({'x': Malicious(tmp_path / 'ran')}, path)
    elif how == 'missing':
        path.unlink()


@pytest.mark.parametrize(
    'how, error, fragment',
    [
        ('cut short', ValueError, 'is cut short'),
        ('code', ValueError, 'objects that are not allowed'),
        ('missing', OSError, 'cannot fetch http.*weights.pth.*404'),
    ],
)
def test_broken_download_leaves_nothing_behind(
    published, save, served, tmp_path, how, error, fragment
):
    url, folder, cache = served
    path = save(published).rename(folder / 'weights.pth')
    damage(path, how, tmp_path)
    with pytest.raises(error, match=fragment):
        read_checkpoint(f'{url}/weights.pth')
    assert list(cache.iterdir()) == []
    assert not (tmp_path / 'ran').exists()


def test_download_is_checked_against_the_hash_in_its_name(published, save, served):
    url, folder, cache = served
    path = save(published)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    names = {True: f'w-{digest[:8]}.pth', False: 'w-0badc0de.pth'}
    for name in names.values():
        (folder / name).write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=f'SHA-256 {digest}, but 0badc0de is expected'):
        read_checkpoint(f'{url}/{names[False]}')
    assert read_checkpoint(f'{url}/{names[True]}').keys() == published.keys()
    (cached,) = cache.iterdir()
    # Somebody else may have written to the cache.
    cached.write_bytes(b'else')
    with pytest.raises(ValueError, match='damaged or another file'):
        read_checkpoint(f'{url}/{names[True]}')


@pytest.mark.parametrize(
    'name, table',
    [
        ('torchvision://resnet18', 'get_torchvision_models'),
        ('open-mmlab://resnet18', 'get_external_models'),
        ('mmcls://resnet18', 'get_mmcls_models'),
        ('', None),
    ],
)
def test_named_weights_are_read_safely_by_the_tools(
    served, tmp_path, monkeypatch, name, table
):
    url, folder, cache = served
    monkeypatch.setattr(CheckpointLoader, '_schemes', dict(CheckpointLoader._schemes))
    monkeypatch.setattr(checkpoint, 'load_from_http', checkpoint.load_from_http)
    read_weights_only()
    path = folder / 'resnet18.pth'
    if table:
        models = {'resnet18': f'{url}/resnet18.pth'}
        monkeypatch.setattr(checkpoint, table, lambda: models)
    torch.save({'x': Malicious(tmp_path / 'ran')}, path)
    with pytest.raises(ValueError, match='objects that are not allowed'):
        CheckpointLoader.load_checkpoint(name or f'{url}/resnet18.pth')
    assert not (tmp_path / 'ran').exists() and list(cache.iterdir()) == []
    torch.save({'state_dict': {'backbone.x': torch.ones(2)}}, path)
    found = CheckpointLoader.load_checkpoint(name or f'{url}/resnet18.pth')
    assert torch.equal(*[*found['state_dict'].values(), torch.ones(2)])


def test_date_at_the_end_of_a_name_is_no_hash(published, save, served):
    url, folder, _ = served
    save(published).rename(folder / 'retinanet_coco-20210909.pth')
    assert read_checkpoint(f'{url}/retinanet_coco-20210909.pth').keys() == (
        published.keys()
    )


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
    missing = tmp_path / 'detection' / 'other.pth'
    with pytest.raises(FileNotFoundError, match=f"'{missing}' does not exist"):
        read_checkpoint(f'{ROOT}detection/other.pth')


MODELS_OF_2X = {
    'retinanet_convmlp_s': dict(mmdet_version='2.14.0', classes=80),
    'mask_rcnn_convmlp_s': dict(mmdet_version='2.14.0', classes=80),
    'semantic_fpn_convmlp_s': dict(mmseg_version='0.17.0', classes=150),
}


@pytest.fixture(scope='module', params=MODELS_OF_2X)
def published_dense(request, tmp_path_factory):
    """Name, file and content of a detector or segmentor as the authors saved it."""
    name = request.param
    state = OrderedDict(
        (key, draw(key.removeprefix('backbone.'), value.shape).to(value.dtype))
        for key, value in get_model(name).state_dict().items()
    )
    # As torch's state_dict() has it and torch.save keeps it.
    state._metadata = OrderedDict({'': dict(version=1)})
    meta = dict(MODELS_OF_2X[name], epoch=12, config='model = dict()', hook_msgs={})
    classes = meta.pop('classes')
    meta['CLASSES'] = tuple(f'class {i}' for i in range(classes))
    if classes == 150:
        meta['PALETTE'] = [[i, i, i] for i in range(classes)]
    content = dict(meta=meta, state_dict=state, optimizer=dict(state={}))
    path = tmp_path_factory.mktemp('dense') / f'{name}.pth'
    torch.save(content, path)
    return name, path, content


def test_published_detectors_and_segmentors_load_as_they_are(published_dense):
    name, path, content = published_dense
    model = get_model(name, str(path)).double()
    for key, value in model.state_dict().items():
        assert torch.equal(value, content['state_dict'][key].to(value.dtype)), key
    # The drawn weights went through float32 here.
    expected = published_outputs()[0]
    assert (expected['arch'], expected['seed']) == ('s', 0)
    keys = ('height', 'width', 'seed', 'batch')
    with torch.no_grad():
        maps = model.backbone(draw_image(*(expected[key] for key in keys)))
    for found, summary in zip(maps, expected['features'], strict=True):
        assert_summary_equal(found, summary, rtol=1e-4)


def same(a, b):
    """Whether two checkpoints are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    return type(a) is type(b) and a == b


def test_conversion_of_detectors_changes_no_bit(published_dense):
    _, _, content = published_dense
    there = to_mm_layout(content)
    assert there.keys() == {'state_dict', 'meta'}
    assert there['meta']['dataset_meta']['classes'] == content['meta']['CLASSES']
    assert same(there['state_dict'], dict(content['state_dict']))
    assert same(to_mm_layout(there), there)
    with pytest.raises(ValueError, match='only classifiers have other names'):
        to_published_layout(there)


@pytest.mark.parametrize('arch', 'sml')
def test_conversion_of_classifiers_there_and_back_changes_no_bit(arch):
    published = {k: v.float() for k, v in draw_checkpoint(arch).items()}
    there = to_mm_layout(published)
    model = get_model(f'convmlp_{arch}_imagenet')
    assert there['state_dict'].keys() == model.state_dict().keys()
    back = to_published_layout(there)
    assert same(back, published)
    assert same(to_published_layout(back), published)


def test_conversion_of_files_refuses_to_overwrite(published, save, tool, tmp_path):
    path = save(published)
    converted, back = tmp_path / 'mm.pth', tmp_path / 'back.pth'
    done = tool('convert_weights.py', path, converted)
    assert done.returncode == 0
    assert done.stdout == f"wrote {converted}: {len(published)} tensors, layout 'mm'\n"
    assert tool('convert_weights.py', converted, back, '--to', 'published').stdout
    assert same(torch.load(back, weights_only=True), dict(published))
    again = tool('convert_weights.py', path, back)
    assert again.returncode == 2
    assert again.stderr == (
        f'convert_weights.py: error: {str(back)!r} is already there\n'
    )
    assert same(torch.load(back, weights_only=True), dict(published))
    assert not tool('convert_weights.py', path, back, '--overwrite').returncode
    assert torch.load(back, weights_only=True).keys() == {'state_dict', 'meta'}
    assert len(list(tmp_path.iterdir())) == 3


def test_conversion_of_other_models_is_refused(save, tool, tmp_path):
    path = save({'fc.weight': torch.zeros(3, 2)})
    done = tool('convert_weights.py', path, tmp_path / 'out.pth')
    assert done.returncode == 2
    assert 'no ConvMLP among the tensors, which are fc.weight' in done.stderr
    assert not (tmp_path / 'out.pth').exists()
