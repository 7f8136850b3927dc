"""Names and metafiles of the model zoo, through every door that leads to them."""

import subprocess
import sys
from pathlib import Path

import modelindex
import pytest
import torch
from complexity import measure_complexity
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from PIL import Image
from reference import draw, draw_checkpoint, draw_image, published_forward
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

import convmlp_mm
from convmlp_mm.apis import build_model, switch_to_deploy
from convmlp_mm.zoo import find_config

ROOT = Path(__file__).resolve().parents[1]
NAMES = convmlp_mm.list_models()
CLASSIFIERS = [name for name in NAMES if name.startswith('convmlp')]


@pytest.fixture(scope='module')
def index():
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    return index


def test_metafiles_are_valid_for_modelindex(index):
    assert index.check(silent=True) in (None, [])
    assert [model.name for model in index.models] == NAMES
    for model in index.models:
        assert model.full_model.paper['URL'] == 'https://arxiv.org/abs/2109.04454'
        assert model.full_model.metadata.training_resources
        assert model.full_model.metadata.data['Training Data']
        assert model.data['Reported By'].startswith('paper, Table ')


def test_every_headline_and_transfer_configuration_has_an_entry(index):
    configs = {model.config for model in index.models}
    folder = ROOT / 'configs'
    files = [*folder.glob('*.py'), *(folder / 'transfer').glob('*.py')]
    assert configs == {path.relative_to(ROOT).as_posix() for path in files}
    for model in index.models:
        assert Path(model.config).stem == model.name


def test_results_are_those_of_the_paper(index):
    paper = {
        # Tables 3 and 4: ImageNet-1k, CIFAR-10, CIFAR-100, Flowers-102.
        'convmlp_{}_imagenet': ((76.8,), (79.0,), (80.2,)),
        'convmlp_{}_cifar10': ((98.0,), (98.6,), (98.6,)),
        'convmlp_{}_cifar100': ((87.4,), (89.1,), (88.6,)),
        'convmlp_{}_flowers102': ((99.5,), (99.5,), (99.5,)),
        # Tables 5, 6 and 7.
        'retinanet_convmlp_{}': (
            (37.2, 56.4, 39.8, 20.1, 40.7, 50.4),
            (39.4, 58.7, 42.0, 21.5, 43.2, 52.5),
            (40.2, 59.3, 43.3, 23.5, 43.8, 53.3),
        ),
        'mask_rcnn_convmlp_{}': (
            (38.4, 59.8, 41.8, 35.7, 56.7, 38.2),
            (40.6, 61.7, 44.5, 37.2, 58.8, 39.8),
            (41.7, 62.8, 45.5, 38.2, 59.9, 41.1),
        ),
        'semantic_fpn_convmlp_{}': ((35.8,), (38.6,), (40.0,)),
    }
    expected = {
        pattern.format(size): values
        for pattern, rows in paper.items()
        for size, values in zip('sml', rows)
    }
    found = {
        model.name: tuple(v for r in model.results for v in r.metrics.values())
        for model in index.models
    }
    assert found == expected


@pytest.mark.parametrize('name', NAMES)
def test_parameters_flops_and_recipe_of_the_metafile_are_those_of_the_model(
    index, name
):
    (entry,) = [model for model in index.models if model.name == name]
    data = entry.metadata.data
    cfg = find_config(name)
    cost = measure_complexity(cfg)
    assert cost.params == data['Parameters']
    assert '{} x {}'.format(*cost.shape) == data['Input Size']
    assert cost.macs == data['FLOPs']
    assert cfg.auto_scale_lr.base_batch_size == data['Batch Size']
    length = cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))
    assert data.get('Epochs', data.get('Iterations')) == length


def test_readme_tables_are_up_to_date():
    tool = ROOT / 'docs' / 'model_zoo.py'
    command = [sys.executable, str(tool), '--check']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_models_are_listed_by_wildcard():
    assert convmlp_mm.list_models('retinanet*') == [
        f'retinanet_convmlp_{size}' for size in 'sml'
    ]
    assert convmlp_mm.list_models('nothing*') == []


@pytest.mark.parametrize(
    'name', ['retinanet_convmlp_s', 'ablation/pure_mlp_100e', 'convmlp_m_cifar10']
)
def test_configuration_is_found_by_name_or_path(name):
    path = Path(convmlp_mm.config_path(name))
    assert path.is_absolute() and path.is_file()
    assert path.stem == name.rpartition('/')[2]


@pytest.mark.parametrize('name', ['retinet_s', '../setup', '_base_', ''])
def test_unknown_configuration_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match='no configuration .*retinanet_convmlp_s'):
        convmlp_mm.config_path(name)


def test_base_in_other_projects_keeps_the_scope_of_each_toolkit(tmp_path):
    path = tmp_path / 'theirs.py'
    path.write_text(
        "_base_ = __import__('convmlp_mm').config_path('mask_rcnn_convmlp_s')\n"
        'mine = _base_.model.backbone\n'
        'theirs = _base_.train_pipeline[0]\n'
        'train_cfg = dict(max_epochs=3)\n'
    )
    cfg = Config.fromfile(str(path))
    assert cfg.train_cfg.max_epochs == 3 and cfg.num_classes == 80
    assert cfg.mine == Config.fromfile(path).model.backbone
    assert cfg.theirs._scope_ == 'mmdet'
    path.write_text("_base_ = __import__('convmlp_mm').config_path('retinanet')\n")
    with pytest.raises(ValueError, match="no configuration 'retinanet'"):
        Config.fromfile(str(path))


def test_mmpretrain_knows_the_classifiers():
    import mmpretrain

    convmlp_mm.register_classifiers()
    convmlp_mm.register_classifiers()
    assert mmpretrain.list_models('convmlp*') == sorted(CLASSIFIERS)
    model = mmpretrain.get_model('convmlp_s_imagenet')
    assert sum(p.numel() for p in model.parameters()) == 9022920
    maps = mmpretrain.get_model(
        'convmlp_s_cifar10', backbone=dict(out_indices=(0, 1, 2, 3), final_norm=False)
    ).extract_feat(torch.rand(1, 3, 64, 64), stage='backbone')
    assert [m.shape[1] for m in maps] == [64, 128, 256, 512]


@pytest.fixture(scope='module')
def published(tmp_path_factory):
    """A classifier's checkpoint in the published layout."""
    checkpoint = draw_checkpoint('s')
    path = tmp_path_factory.mktemp('weights') / 'convmlp_s.pth'
    torch.save(checkpoint, path)
    return path, checkpoint


def test_published_classifier_gives_the_published_logits(published):
    path, checkpoint = published
    x = draw_image(64, 96)
    model = convmlp_mm.get_model('convmlp_s_imagenet', str(path)).double()
    # Reading keeps the precision of the model; give it that of the file.
    for key, value in model.state_dict().items():
        name = key.removeprefix('backbone.').replace('head.fc.', 'head.')
        value.copy_(checkpoint[name])
    with torch.no_grad():
        expected = published_forward(checkpoint, x)[1]
        torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def test_weights_by_name_are_fetched_from_the_zoo(published, monkeypatch, tmp_path):
    path, checkpoint = published
    fetched = []

    def fetch(request, timeout):
        fetched.append(request.full_url)
        return path.open('rb')

    monkeypatch.setattr('urllib.request.urlopen', fetch)
    monkeypatch.setattr('torch.hub.get_dir', lambda: str(tmp_path))
    model = convmlp_mm.get_model('convmlp_s_imagenet', pretrained=True)
    root = 'https://shi-labs.com/projects/convmlp/checkpoints'
    assert fetched == [f'{root}/convmlp_s_imagenet.pth']
    assert torch.equal(model.head.fc.bias, checkpoint['head.bias'].float())
    assert not model.training and model._is_init
    with pytest.raises(ValueError, match="'ablation/pure_mlp_100e' has no published"):
        convmlp_mm.get_model('ablation/pure_mlp_100e', pretrained=True)


def test_weights_that_do_not_fit_are_refused(published):
    with pytest.raises(ValueError, match=r'missing: backbone.conv_stages.*blocks.2'):
        convmlp_mm.get_model('convmlp_m_imagenet', pretrained=str(published[0]))


def test_head_of_another_data_set_stays_random(published):
    path, checkpoint = published
    model = convmlp_mm.get_model('convmlp_s_cifar10', pretrained=str(path))
    assert model.head.fc.weight.shape == (10, 512)
    assert torch.equal(model.backbone.norm.bias, checkpoint['norm.bias'].float())


def test_changes_are_merged_into_the_model():
    model = convmlp_mm.get_model('retinanet_convmlp_s', backbone=dict(frozen_stages=1))
    assert model.backbone.frozen_stages == 1
    assert model.cfg.model.backbone.arch == 's'
    assert len(model.dataset_meta['classes']) == 80


def test_mmpretrain_loads_published_weights_by_name(published, monkeypatch):
    import mmpretrain

    convmlp_mm.register_classifiers()
    path, checkpoint = published
    monkeypatch.setenv('CONVMLP_WEIGHTS', str(path.parent))
    if not (path.parent / 'convmlp_s_imagenet.pth').exists():
        path.with_name('convmlp_s_imagenet.pth').symlink_to(path)
    model = mmpretrain.get_model('convmlp_s_imagenet', pretrained=True)
    for key, value in model.state_dict().items():
        name = key.removeprefix('backbone.').replace('head.fc.', 'head.')
        assert torch.equal(value, checkpoint[name].to(value.dtype)), name


@pytest.fixture(scope='module')
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp('images') / 'an image.png'
    Image.effect_noise((96, 64), 64).convert('RGB').save(path)
    return str(path)


@pytest.mark.parametrize(
    ('name', 'classes'),
    [
        ('convmlp_s_cifar10', 10),
        ('retinanet_convmlp_s', 80),
        ('mask_rcnn_convmlp_s', 80),
        ('semantic_fpn_convmlp_s', 150),
    ],
)
def test_inferencer_predicts_with_the_weights_given(name, classes, image, tmp_path):
    torch.manual_seed(0)
    state = convmlp_mm.get_model(name).state_dict()
    torch.save(dict(state_dict=state, meta={}), tmp_path / 'weights.pth')
    inferencer = convmlp_mm.get_inferencer(name, str(tmp_path / 'weights.pth'), 'cpu')
    loaded = inferencer.model.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    assert len(inferencer.model.dataset_meta['classes']) == classes
    if name.startswith('convmlp'):
        (result,) = inferencer(image)
        assert result['pred_class'] in inferencer.classes
        assert result['pred_scores'].shape == (classes,)
    elif name.startswith('semantic'):
        labels = inferencer(image)['predictions']
        assert labels.shape == (64, 96) and labels.max() < classes
    else:
        (result,) = inferencer(image, no_save_vis=True)['predictions']
        assert set(result) >= {'labels', 'scores', 'bboxes'}
        assert ('masks' in result) == name.startswith('mask')


def test_inferencer_takes_collate_fn_as_the_runner_does(image):
    cfg = find_config('semantic_fpn_convmlp_s')
    cfg.test_dataloader.collate_fn = dict(type='pseudo_collate')
    inferencer = convmlp_mm.get_inferencer(cfg, False, 'cpu')
    assert inferencer(image)['predictions'].shape == (64, 96)
    assert cfg.test_dataloader.collate_fn == dict(type='pseudo_collate')


@pytest.mark.parametrize(
    'name, params, classes',
    [
        (str(ROOT / 'configs' / 'convmlp_s_imagenet.py'), 9022920, 1000),
        ('ablation/pure_mlp_100e.py', 7877960, 1000),
        ('mmseg::sem_fpn/fpn_r50_4xb4-160k_ade20k-512x512', 28514806, 150),
        ('mmdet::retinanet/retinanet_r18_fpn_1x_coco.py', 21410100, 80),
        ('timm::resmlp_12_224', 15350872, 1000),
    ],
)
def test_models_are_built_from_files_names_and_other_packages(name, params, classes):
    model = build_model(find_config(name))
    assert sum(p.numel() for p in model.parameters()) == params
    assert len(model.dataset_meta['classes']) == classes
    assert not model.training


@pytest.mark.parametrize(
    'name, words',
    [
        ('mmdet::retinanet/r18', "mmdet has no configuration 'retinanet/r18' in "),
        ('timm::resmlp_1', "timm has no model 'resmlp_1'"),
        ('keras::resnet', "no configuration 'keras::resnet'; there are the models"),
    ],
)
def test_unknown_names_of_other_packages_are_refused(name, words):
    with pytest.raises(ValueError, match=words):
        find_config(name)


def test_weights_of_other_models_are_loaded_as_strictly(tmp_path):
    model = convmlp_mm.get_model('timm::resmlp_12_224')
    state = {f'module.{key}': value + 1 for key, value in model.state_dict().items()}
    torch.save(dict(state_dict=state), tmp_path / 'r.pth')
    found = convmlp_mm.get_model('timm::resmlp_12_224', str(tmp_path / 'r.pth'))
    for key, value in found.state_dict().items():
        assert torch.equal(value, state[f'module.{key}'])
    del state['module.blocks.3.ls1']
    torch.save(dict(state_dict=state), tmp_path / 'r.pth')
    with pytest.raises(ValueError, match=r'1 missing: blocks\.3\.ls1'):
        convmlp_mm.get_model('timm::resmlp_12_224', str(tmp_path / 'r.pth'))


def test_import_changes_nothing_of_other_packages_and_needs_no_toolkit():
    code = """
import sys
import mmcv.cnn, mmengine.hub, mmengine.runner, mmengine.visualization

def attributes():
    found = {}
    for name, module in list(sys.modules.items()):
        if name.partition('.')[0] in ('mmengine', 'mmcv'):
            for key, value in vars(module).items():
                found[name, key] = value
                if isinstance(value, type) and value.__module__.startswith('mm'):
                    found |= {(name, key, k): v for k, v in vars(value).items()}
    return found

before = attributes()
import convmlp_mm
after = attributes()
changed = [key for key in before if after[key] is not before[key]]
# The registry of addresses is a new dict with one more.
allowed = '_schemes', '_abc', '__'
assert not [key for key in changed if not key[-1].startswith(allowed)], changed
assert not {'mmdet', 'mmseg', 'mmpretrain'} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ('name', 'kept'),
    [
        ('semantic_fpn_convmlp_s', 0),
        # One convolution is followed by a norm of its own at each of five levels.
        ('mmdet::rtmdet/rtmdet_tiny_8xb32-300e_coco.py', 12),
    ],
)
def test_a_model_is_folded_where_each_norm_has_its_own_convolution(name, kept):
    model = revert_sync_batchnorm(build_model(find_config(name))).eval()
    for key, buffer in model.named_buffers():
        if 'running' in key:
            buffer.copy_(draw(key, buffer.shape))
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        before = tree_flatten(model(x))[0]
        switch_to_deploy(model)
        after = tree_flatten(model(x))[0]
    assert sum(isinstance(m, _BatchNorm) for m in model.modules()) == kept
    for a, b in zip(before, after):
        scale = max(1, b.abs().max())
        assert (a - b).abs().max() <= 1e-5 * scale
        assert not torch.equal(a, b)
