"""Every configuration: builds, has the paper's size and recipe, and trains."""

from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.registry import init_default_scope

mmdet_registry = pytest.importorskip('mmdet.registry')

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(
    str(p.relative_to(CONFIGS))
    for p in CONFIGS.rglob('*.py')
    if '_base_' not in p.parts
)
# Paper Table 5, in millions.
PARAMETERS = {
    'retinanet_convmlp_s.py': 18.7,
    'retinanet_convmlp_m.py': 27.1,
    'retinanet_convmlp_l.py': 52.9,
}
DETECTION = sorted(PARAMETERS)


def load(name):
    return Config.fromfile(str(CONFIGS / name))


def build(cfg):
    init_default_scope(cfg.default_scope)
    cfg.model.backbone.init_cfg = None
    return mmdet_registry.MODELS.build(cfg.model)


@pytest.mark.parametrize('name', ALL)
def test_neck_agrees_with_published_channels_of_backbone(name):
    cfg = load(name)
    backbone = build(cfg).backbone
    assert tuple(cfg.model.neck.in_channels) == backbone.out_channels


@pytest.mark.parametrize('name', DETECTION)
def test_parameter_count_is_that_of_the_paper(name):
    params = sum(p.numel() for p in build(load(name)).parameters())
    assert round(params / 1e6, 1) == PARAMETERS[name]


@pytest.mark.parametrize('name', DETECTION)
def test_recipe_is_that_of_the_paper(name):
    cfg = load(name)
    size = name.removesuffix('.py')[-1]
    weights = cfg.model.backbone.init_cfg
    assert weights.type == 'Pretrained'
    assert weights.checkpoint.endswith(f'/convmlp_{size}_imagenet.pth')
    assert cfg.model.backbone.arch == size
    assert cfg.model.backbone.get('frozen_stages', -1) == -1
    assert cfg.optim_wrapper.optimizer == dict(type='AdamW', lr=1e-4, weight_decay=1e-4)
    assert 'clip_grad' not in cfg.optim_wrapper
    warmup, steps = cfg.param_scheduler
    assert (warmup.type, warmup.start_factor, warmup.end) == ('LinearLR', 0.001, 500)
    assert (steps.type, steps.milestones) == ('MultiStepLR', [8, 11])
    assert cfg.train_cfg.max_epochs == 12
    # 8 GPUs x 2 images.
    assert cfg.train_dataloader.batch_size == 2
    assert cfg.auto_scale_lr.base_batch_size == 16
    assert cfg.train_dataloader.persistent_workers
    assert cfg.val_dataloader.persistent_workers
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert tuple(pipeline['Resize'].scale) == (1333, 800)
    assert pipeline['RandomFlip'].prob == 0.5
    neck = cfg.model.neck
    assert (neck.out_channels, neck.num_outs, neck.start_level) == (256, 5, 1)
    assert neck.add_extra_convs == 'on_input'
    assert cfg.randomness.seed is not None
    assert cfg.custom_imports.imports == ['convmlp_mm']
    assert not cfg.custom_imports.allow_failed_imports


@pytest.mark.parametrize('name', ALL)
def test_every_trainable_parameter_gets_a_gradient(name):
    from mmdet.testing import demo_mm_inputs

    model = build(load(name)).train()
    num_classes = model.bbox_head.num_classes
    data = demo_mm_inputs(
        2, [[3, 64, 96], [3, 96, 64]], num_items=[2, 3], num_classes=num_classes
    )
    data = model.data_preprocessor(data, True)
    losses = model(**data, mode='loss')
    model.parse_losses(losses)[0].backward()
    missing = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    assert not missing


def test_leaf_holds_only_what_differs():
    for size in ('m', 'l'):
        text = (CONFIGS / f'retinanet_convmlp_{size}.py').read_text()
        assert len(text.splitlines()) < 20
    base = load('retinanet_convmlp_s.py')
    for size in ('m', 'l'):
        cfg = load(f'retinanet_convmlp_{size}.py')
        for key in base:
            if key != 'model':
                assert cfg[key] == base[key]
