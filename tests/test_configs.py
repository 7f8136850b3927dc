"""Every configuration: builds, has the paper's size and recipe, and trains."""

import re
import time
from decimal import ROUND_HALF_UP, Decimal
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, PARAM_SCHEDULERS, DefaultScope

from convmlp_mm import SafeCheckpointHook

CONFIGS = Path(__file__).parents[1] / 'configs'
ALL = sorted(
    p.relative_to(CONFIGS).with_suffix('').as_posix()
    for p in CONFIGS.rglob('*.py')
    if '_base_' not in p.parts
)
BASELINES = [name for name in ALL if name.startswith('baselines/')]
CONVMLP = [name for name in ALL if name not in BASELINES]
HEADLINES = [name for name in CONVMLP if '/' not in name]
TRANSFER = [name for name in ALL if name.startswith('transfer/')]
WITH_WEIGHTS = [n for n in HEADLINES if not n.endswith('imagenet')] + TRANSFER

# In millions, as the paper prints them (Tables 2, 3, 5, 6, 7), sizes in the order S, M,
# L or 18, 50, 101. It counts what is trained, and has sometimes rounded the two digits
# that the toolkits print once more: 37.048 becomes 37.05, then 37.1. The rows
# of Table 2 with an earlier conv stage and Table 4, which has no such column, are
# counted by hand.
PARAMETERS = {
    'convmlp_{}_imagenet': ('9.02', '17.4', '42.7'),
    'transfer/convmlp_{}_cifar10': ('8.515', '16.903', '41.967'),
    'transfer/convmlp_{}_cifar100': ('8.561', '16.949', '42.036'),
    'transfer/convmlp_{}_flowers102': ('8.562', '16.950', '42.038'),
    'retinanet_convmlp_{}': ('18.7', '27.1', '52.9'),
    'mask_rcnn_convmlp_{}': ('28.7', '37.1', '62.2'),
    'semantic_fpn_convmlp_{}': ('12.8', '21.1', '46.3'),
    'baselines/retinanet_resnet{}': ('21.3', '37.7', '56.7'),
    'baselines/mask_rcnn_resnet{}': ('31.2', '44.2', '63.2'),
    'baselines/semantic_fpn_resnet{}': ('15.5', '28.5', '47.5'),
    'ablation/pure_mlp_100e': ('7.88',),
    'ablation/conv_stage_100e': ('8.18',),
    'ablation/conv_stage_conv_downsample_100e': ('9.00',),
    'ablation/conv_stage_depthwise_conv_100e': ('8.21',),
    'ablation/convmlp_s_100e': ('9.02',),
    'quickstart/retinanet_convmlp_s_shapes': ('9.21',),
}
IMAGENET = {
    'default_scope': 'mmpretrain',
    'optim_wrapper.type': 'AmpOptimWrapper',
    'optim_wrapper.clip_grad': None,
    'optim_wrapper.optimizer.type': 'AdamW',
    'optim_wrapper.optimizer.lr': 5e-4,
    'optim_wrapper.optimizer.betas': (0.9, 0.999),
    'optim_wrapper.optimizer.eps': 1e-8,
    'optim_wrapper.optimizer.weight_decay': 0.05,
    'train_cfg.max_epochs': 300,
    'train_dataloader.batch_size': 128,
    'auto_scale_lr.base_batch_size': 1024,
    'custom_hooks.EMAHook.momentum': 1 - 0.99996,
    'custom_hooks.EMAHook.update_buffers': True,
    'model.backbone.arch': 's',
    'model.backbone.final_norm': True,
    'model.head.loss.label_smooth_val': 0.1,
    'model.train_cfg.augments.Mixup.alpha': 0.8,
    'model.train_cfg.augments.CutMix.alpha': 1.0,
    'data_preprocessor.mean': [123.675, 116.28, 103.53],
    'data_preprocessor.std': [58.395, 57.12, 57.375],
    'data_preprocessor.to_rgb': True,
    'train_dataloader.collate_fn.type': 'default_collate',
    'train_dataloader.dataset.pipeline.RandomResizedCrop.scale': 224,
    'train_dataloader.dataset.pipeline.RandomResizedCrop.interpolation': 'bicubic',
    'train_dataloader.dataset.pipeline.RandomFlip.prob': 0.5,
    'train_dataloader.dataset.pipeline.RandAugment.policies': 'timm_increasing',
    'train_dataloader.dataset.pipeline.RandAugment.num_policies': 2,
    'train_dataloader.dataset.pipeline.RandAugment.magnitude_level': 9,
    'train_dataloader.dataset.pipeline.RandAugment.magnitude_std': 0.5,
    'train_dataloader.dataset.pipeline.RandomErasing.erase_prob': 0.25,
    'train_dataloader.dataset.pipeline.RandomErasing.mode': 'rand',
    'test_dataloader.dataset.pipeline.ResizeEdge.scale': 248,
    'test_dataloader.dataset.pipeline.ResizeEdge.interpolation': 'bicubic',
    'test_dataloader.dataset.pipeline.CenterCrop.crop_size': 224,
    'randomness.seed': 42,
}
ABLATION = {
    **IMAGENET,
    'optim_wrapper.optimizer.lr': 1e-3,
    'train_cfg.max_epochs': 100,
    # On 4 GPUs.
    'train_dataloader.batch_size': 256,
}
CIFAR10 = {
    **{k: v for k, v in IMAGENET.items() if 'EMAHook' not in k},
    'optim_wrapper.optimizer.lr': 3e-4,
    # 50 and 10 to cool down.
    'train_cfg.max_epochs': 60,
    'custom_hooks.EMAHook': None,
    'model.backbone.init_cfg.type': 'Pretrained',
    'data_preprocessor.mean': [125.307, 122.961, 113.8575],
    'data_preprocessor.std': [62.985, 62.0925, 66.708],
    'train_dataloader.dataset.type': 'CIFAR10',
    'train_dataloader.dataset.pipeline.RandomResizedCrop.crop_ratio_range': (0.8, 1.0),
    'train_dataloader.dataset.pipeline.RandAugment.hparams.pad_val': [114, 123, 125],
    'test_dataloader.dataset.pipeline.ResizeEdge.scale': 224,
}
CIFAR100 = {
    **CIFAR10,
    'data_preprocessor.mean': [129.3105, 124.1085, 112.404],
    'data_preprocessor.std': [68.2125, 65.4075, 70.4055],
    'train_dataloader.dataset.type': 'CIFAR100',
    'train_dataloader.dataset.pipeline.RandAugment.hparams.pad_val': [112, 124, 129],
}
FLOWERS102 = {
    **CIFAR10,
    'data_preprocessor.mean': [111.0015, 96.2115, 73.236],
    'data_preprocessor.std': [75.633, 62.6025, 68.799],
    'train_dataloader.dataset.type': 'Flowers102',
    'train_dataloader.dataset.split': 'trainval',
    'train_dataloader.dataset.pipeline.RandAugment.hparams.pad_val': [73, 96, 111],
    'train_dataloader.batch_size': 96,
    'auto_scale_lr.base_batch_size': 768,
}
COCO = {
    'default_scope': 'mmdet',
    'optim_wrapper.type': 'OptimWrapper',
    'optim_wrapper.clip_grad': None,
    'optim_wrapper.optimizer.type': 'AdamW',
    'optim_wrapper.optimizer.lr': 1e-4,
    'optim_wrapper.optimizer.weight_decay': 1e-4,
    'optim_wrapper.optimizer.momentum': None,
    'param_scheduler.LinearLR.start_factor': 0.001,
    'param_scheduler.LinearLR.end': 500,
    'param_scheduler.LinearLR.by_epoch': False,
    'param_scheduler.MultiStepLR.milestones': [8, 11],
    'param_scheduler.MultiStepLR.gamma': 0.1,
    'train_cfg.max_epochs': 12,
    'train_dataloader.batch_size': 2,
    'train_dataloader.persistent_workers': True,
    'val_dataloader.persistent_workers': True,
    'auto_scale_lr.base_batch_size': 16,
    'train_dataloader.dataset.pipeline.Resize.scale': (1333, 800),
    'train_dataloader.dataset.pipeline.RandomFlip.prob': 0.5,
    'model.backbone.frozen_stages': None,
    'model.backbone.init_cfg.type': 'Pretrained',
    'model.neck.out_channels': 256,
    'model.neck.num_outs': 5,
    'randomness.seed': 42,
}
RETINANET = {
    **COCO,
    'model.neck.start_level': 1,
    'model.neck.add_extra_convs': 'on_input',
}
ADE20K = {
    'default_scope': 'mmseg',
    'optim_wrapper.type': 'OptimWrapper',
    'optim_wrapper.clip_grad': None,
    'optim_wrapper.optimizer.type': 'AdamW',
    'optim_wrapper.optimizer.lr': 2e-4,
    'optim_wrapper.optimizer.weight_decay': 1e-4,
    'optim_wrapper.optimizer.momentum': None,
    'param_scheduler.PolyLR.power': 0.9,
    'param_scheduler.PolyLR.eta_min': 0.0,
    'param_scheduler.PolyLR.end': 40000,
    'param_scheduler.PolyLR.by_epoch': False,
    'train_cfg.type': 'IterBasedTrainLoop',
    'train_cfg.max_iters': 40000,
    'train_cfg.val_interval': 4000,
    'default_hooks.checkpoint.interval': 4000,
    'train_dataloader.batch_size': 2,
    'train_dataloader.persistent_workers': True,
    'auto_scale_lr.base_batch_size': 16,
    'train_dataloader.dataset.pipeline.RandomResize.scale': (2048, 512),
    'train_dataloader.dataset.pipeline.RandomResize.ratio_range': (0.5, 2.0),
    'train_dataloader.dataset.pipeline.RandomCrop.crop_size': (512, 512),
    'train_dataloader.dataset.pipeline.RandomCrop.cat_max_ratio': 0.75,
    'train_dataloader.dataset.pipeline.RandomFlip.prob': 0.5,
    'train_dataloader.dataset.pipeline.PhotoMetricDistortion': {},
    'model.pretrained': None,
    'model.backbone.init_cfg.type': 'Pretrained',
    'model.neck.out_channels': 256,
    'model.neck.num_outs': 4,
    'model.decode_head.channels': 128,
    'model.decode_head.dropout_ratio': 0.1,
    'model.decode_head.norm_cfg.type': 'SyncBN',
    'randomness.seed': 42,
}
RECIPES = {
    r'convmlp_._imagenet': IMAGENET,
    r'ablation/.*': ABLATION,
    r'transfer/convmlp_[sm]_cifar10': CIFAR10,
    r'transfer/convmlp_[sm]_cifar100': CIFAR100,
    r'transfer/convmlp_[sm]_flowers102': FLOWERS102,
    r'retinanet_convmlp_.': RETINANET,
    r'mask_rcnn_convmlp_.': COCO,
    r'semantic_fpn_convmlp_.': ADE20K,
}
L_BATCH = {'train_dataloader.batch_size': 64, 'auto_scale_lr.base_batch_size': 512}
RECIPES.update(
    {
        f'transfer/convmlp_l_{data}': {**recipe, **L_BATCH}
        for data, recipe in (
            ('cifar10', CIFAR10),
            ('cifar100', CIFAR100),
            ('flowers102', FLOWERS102),
        )
    }
)


def load(name):
    return Config.fromfile(str(CONFIGS / f'{name}.py'))


def field(cfg, key):
    """Follow dotted names; in a list, a name is the type of an element."""
    for part in key.split('.'):
        if isinstance(cfg, list):
            found = [item for item in cfg if item['type'] == part]
            assert len(found) <= 1
            cfg = found[0] if found else None
            if cfg is not None:
                cfg = {k: v for k, v in cfg.items() if k != 'type'}
        elif cfg is not None:
            cfg = cfg.get(part)
    return cfg


def recipe_of(name):
    (recipe,) = [r for pattern, r in RECIPES.items() if re.fullmatch(pattern, name)]
    return recipe


def size_of(name):
    match = re.search(r'(?<=convmlp_)[sml](?=_|$)', name)
    return match.group() if match else 's'


def build(cfg):
    """Build the model as its toolkit does, with random weights."""
    scope = cfg.default_scope
    import_module(f'{scope}.utils').register_all_modules(False)
    cfg.model.backbone.init_cfg = None
    cfg.model.setdefault('data_preprocessor', cfg.get('data_preprocessor'))
    with DefaultScope.overwrite_default_scope(scope):
        return import_module(f'{scope}.registry').MODELS.build(cfg.model)


def batch_of(cfg):
    """Two small images with labels as the toolkit's data loader gives them."""
    torch.manual_seed(0)
    if cfg.default_scope == 'mmdet':
        from mmdet.testing import demo_mm_inputs

        return demo_mm_inputs(
            2,
            [[3, 64, 96], [3, 96, 64]],
            num_items=[2, 3],
            num_classes=cfg.num_classes,
            with_mask=True,
        )
    images = [torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8) for _ in range(2)]
    if cfg.default_scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        samples = [DataSample().set_gt_label(i) for i in range(2)]
        return dict(inputs=torch.stack(images), data_samples=samples)
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    samples = []
    for image in images:
        labels = torch.randint(0, cfg.num_classes, (1, *image.shape[1:]))
        meta = dict(img_shape=image.shape[1:], ori_shape=image.shape[1:])
        sample = SegDataSample(metainfo=meta)
        sample.gt_sem_seg = PixelData(data=labels)
        samples.append(sample)
    return dict(inputs=images, data_samples=samples)


def once(digits):
    """The paper's figures as pairs of configuration and figure."""
    for pattern, figures in digits.items():
        sizes = ('18', '50', '101') if 'resnet' in pattern else 'sml'
        yield from ((pattern.format(s), f) for s, f in zip(sizes, figures))


def test_every_configuration_is_in_the_tables():
    assert sorted(name for name, _ in once(PARAMETERS)) == ALL
    for name in CONVMLP:
        if not name.startswith('quickstart/'):
            assert recipe_of(name)


@pytest.mark.parametrize(('name', 'figure'), once(PARAMETERS))
def test_parameter_count_is_that_of_the_paper(name, figure):
    model = build(load(name))
    count = Decimal(sum(p.numel() for p in model.parameters() if p.requires_grad))
    count /= 1000000
    digits = Decimal(figure)
    printed = count.quantize(Decimal('0.01'), ROUND_HALF_UP)
    assert digits in [c.quantize(digits, ROUND_HALF_UP) for c in (count, printed)]


@pytest.mark.parametrize('name', [n for n in CONVMLP if 'quickstart' not in n])
def test_recipe_is_that_of_the_paper(name):
    cfg = load(name)
    for key, value in recipe_of(name).items():
        if key == 'model.backbone.arch':
            value = size_of(name)
        found = field(cfg, key)
        if isinstance(value, float):
            value = pytest.approx(value, rel=1e-9)
        elif isinstance(value, list):
            value = pytest.approx(value)
        assert found == value, key


@pytest.mark.parametrize('name', WITH_WEIGHTS)
def test_training_starts_from_the_weights_of_its_size(name):
    backbone = load(name).model.backbone
    assert backbone.arch == size_of(name)
    assert backbone.init_cfg.checkpoint == (
        'https://shi-labs.com/projects/convmlp/checkpoints/'
        f'convmlp_{size_of(name)}_imagenet.pth'
    )


@pytest.mark.parametrize('name', ALL)
def test_package_is_imported_and_buffers_are_shared(name):
    cfg = load(name)
    assert cfg.custom_imports == dict(
        imports=['convmlp_mm'], allow_failed_imports=False
    )
    assert field(cfg, 'custom_hooks.SyncStatisticsHook') == {}
    assert cfg.auto_scale_lr.base_batch_size


@pytest.mark.parametrize('name', ALL)
def test_checkpoints_are_saved_as_often_as_in_the_toolkit_and_whole(name):
    cfg = load(name)
    hook = HOOKS.build(dict(cfg.default_hooks.checkpoint))
    assert type(hook) is SafeCheckpointHook
    assert hook.by_epoch == (cfg.default_scope != 'mmseg')
    interval = 8 if 'quickstart' in name else 1
    if not hook.by_epoch:
        interval = 16000 if name in BASELINES else 4000
    assert hook.interval == interval


@pytest.mark.parametrize('name', CONVMLP)
def test_channels_agree_with_those_the_backbone_publishes(name):
    cfg = load(name)
    backbone = build(cfg).backbone
    if cfg.default_scope == 'mmpretrain':
        assert (cfg.model.head.in_channels,) == backbone.out_channels
    else:
        assert tuple(cfg.model.neck.in_channels) == backbone.out_channels


def heads(cfg, found):
    """All values of num_classes in a nested dict."""
    for key, value in cfg.items():
        if key == 'num_classes':
            found.append(value)
        elif isinstance(value, dict):
            heads(value, found)
    return found


@pytest.mark.parametrize('name', ALL)
def test_num_classes_stands_at_the_top_and_in_every_head(name):
    cfg = load(name)
    own = heads(dict(model=cfg.model, d=cfg.get('data_preprocessor') or {}), [])
    assert set(own) == {cfg.num_classes}
    expected = {'mmpretrain': 2, 'mmseg': 1, 'mmdet': 2 if 'mask' in name else 1}
    assert len(own) == expected[cfg.default_scope]


@pytest.mark.parametrize('name', [n for n in HEADLINES if size_of(n) == 's'])
def test_configuration_loads_in_well_under_a_second(name):
    def seconds():
        start = time.perf_counter()
        load(name)
        return time.perf_counter() - start

    # The best of three: the first fills caches, and the machine has other work.
    assert min(seconds() for _ in range(3)) < 0.7


@pytest.mark.parametrize('name', ALL)
def test_every_trainable_parameter_gets_a_gradient(name):
    cfg = load(name)
    model = build(cfg).train()
    if cfg.default_scope == 'mmseg':
        # It would pad to the crop of the recipe.
        model.data_preprocessor.size = (64, 64)
    data = model.data_preprocessor(batch_of(cfg), True)
    losses = model(**data, mode='loss')
    loss = model.parse_losses(losses)[0]
    loss.backward()
    assert torch.isfinite(loss)
    missing = [
        name
        for name, p in model.named_parameters()
        if p.requires_grad and p.grad is None
    ]
    assert not missing


@pytest.mark.parametrize('name', ['convmlp_s_imagenet', 'transfer/convmlp_s_cifar10'])
def test_norms_and_biases_do_not_decay(name):
    cfg = load(name)
    model = build(cfg)
    # AMP needs a GPU, and does not change the groups.
    optim = build_optim_wrapper(model, dict(cfg.optim_wrapper, type='OptimWrapper'))
    decays = {
        id(p): group['weight_decay']
        for group in optim.param_groups
        for p in group['params']
    }
    for key, p in model.named_parameters():
        assert decays[id(p)] == (0.05 if p.ndim > 1 else 0.0), key


def learning_rates(cfg, epoch_length=4):
    """Learning rate of every iteration, by mmengine's own schedulers."""
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=cfg.optim_wrapper.optimizer.lr)
    schedulers = []
    for kwargs in cfg.param_scheduler:
        kwargs = dict(kwargs, optimizer=optimizer)
        cls = PARAM_SCHEDULERS.get(kwargs.pop('type'))
        # What the Runner fills in.
        kwargs.setdefault('end', cfg.train_cfg.max_epochs)
        if kwargs.pop('convert_to_iter_based', False):
            kwargs['epoch_length'] = epoch_length
            schedulers.append(cls.build_iter_from_epoch(**kwargs))
        else:
            schedulers.append(cls(**kwargs))
    rates = []
    for i in range(cfg.train_cfg.max_epochs * epoch_length):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (i + 1) % epoch_length == 0:
                scheduler.step()
    return rates


@pytest.mark.parametrize(
    ('name', 'first', 'peak', 'warm_up', 'last', 'cool_down'),
    [
        ('convmlp_s_imagenet', 1e-4, 5e-4, 5, 1e-5, 0),
        ('ablation/pure_mlp_100e', 1e-4, 1e-3, 5, 1e-5, 0),
        ('transfer/convmlp_s_cifar10', 1e-6, 3e-4, 10, 1e-5, 10),
        ('transfer/convmlp_l_cifar100', 1e-6, 3e-4, 10, 1e-5, 10),
        ('transfer/convmlp_m_flowers102', 1e-6, 3e-4, 10, 1e-8, 10),
    ],
)
def test_learning_rate_warms_up_and_falls_to_its_minimum(
    name, first, peak, warm_up, last, cool_down
):
    rates = learning_rates(load(name))
    epochs = len(rates) // 4
    assert rates[0] == pytest.approx(first)
    assert max(rates) == pytest.approx(peak)
    assert rates[warm_up * 4] == pytest.approx(peak, rel=0.01)
    assert rates[warm_up * 2] == pytest.approx((first + peak) / 2, rel=0.1)
    # A cosine is half-way down in the middle; in the last epoch it is nearly there.
    middle = (warm_up + epochs - cool_down) * 2
    assert rates[middle] == pytest.approx((peak + last) / 2, rel=0.02)
    assert rates[-1] == pytest.approx(last, rel=0.05 if cool_down == 0 else 1e-6)
    flat = rates[len(rates) - cool_down * 4 :]
    assert flat == pytest.approx([last] * len(flat))


def build_transform(cfg):
    """Build a transform of mmpretrain, whichever toolkit was in use before."""
    from mmpretrain.registry import TRANSFORMS
    from mmpretrain.utils import register_all_modules

    register_all_modules(False)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return TRANSFORMS.build(cfg)


@pytest.mark.parametrize('split', ['train', 'test'])
@pytest.mark.parametrize(
    ('name', 'loads'),
    [
        ('convmlp_s_imagenet', True),
        ('transfer/convmlp_s_cifar10', False),
        ('transfer/convmlp_s_cifar100', False),
        ('transfer/convmlp_s_flowers102', True),
    ],
)
def test_classification_pipelines_make_pictures_of_224(name, loads, split):
    pipeline = load(name)[f'{split}_dataloader'].dataset.pipeline
    assert (pipeline[0].type == 'LoadImageFromFile') == loads
    # What the loading leaves, or CIFAR's data set gives.
    data = dict(img=np.full((32, 40, 3), 128, np.uint8), gt_label=1)
    data.update(img_shape=(32, 40), ori_shape=(32, 40))
    for transform in pipeline[loads:]:
        data = build_transform(transform)(data)
    assert data['inputs'].shape == (3, 224, 224)
    assert data['inputs'].dtype == torch.uint8


def test_crop_of_imagenet_has_the_usual_scale_and_ratio():
    pipeline = load('convmlp_s_imagenet').train_dataloader.dataset.pipeline
    crop = build_transform([t for t in pipeline if t.type == 'RandomResizedCrop'][0])
    assert crop.crop_ratio_range == (0.08, 1.0)
    assert crop.aspect_ratio_range == pytest.approx((3 / 4, 4 / 3))


def test_baselines_keep_the_recipe_of_their_toolkit():
    for name in BASELINES:
        cfg = load(name)
        assert cfg.optim_wrapper.optimizer.type == 'SGD'
        depth = int(name.rpartition('resnet')[2])
        assert cfg.model.backbone.depth == depth
        assert f'resnet{depth}' in cfg.model.backbone.init_cfg.checkpoint


def test_hooks_of_the_runtime_stand_in_one_file():
    cfg = Config.fromfile(str(CONFIGS / '_base_' / 'default_runtime.py'))
    hooks = [*cfg.runtime_hooks, *cfg.runtime_default_hooks.values()]
    for path in CONFIGS.rglob('*.py'):
        if path.name != 'default_runtime.py':
            text = path.read_text()
            assert not [hook.type for hook in hooks if hook.type in text], path


@pytest.mark.parametrize('name', [n for n in CONVMLP if size_of(n) in 'ml'])
def test_leaf_holds_only_what_differs(name):
    text = (CONFIGS / f'{name}.py').read_text()
    assert len(text.splitlines()) < 20
    base, cfg = load(re.sub('convmlp_.', 'convmlp_s', name)), load(name)
    batch = {'train_dataloader', 'auto_scale_lr'} if 'transfer' in name else set()
    assert {key for key in base if cfg[key] != base[key]} <= {'model'} | batch
