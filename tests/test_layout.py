"""The layout of maps in memory changes no value, in any system as it is configured.

mmcv's operators take every map for contiguous. Each configuration, with what its hooks
do to the model, is therefore held against the same model with every tensor contiguous
between any two modules, and torchvision's RoIAlign in place of mmcv's.
"""

import copy
import re
import runpy
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmcv.ops import RoIAlign
from mmdet.models.roi_heads.mask_heads import fcn_mask_head
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MMLogger
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import HOOKS
from torch import nn
from torch.utils._pytree import tree_map
from torchvision.ops import roi_align

from convmlp_mm.apis import build_model, switch_to_deploy
from convmlp_mm.hooks.model import needs_contiguous, use_channels_last
from convmlp_mm.launch import build_runner, merge_options
from convmlp_mm.zoo import find_config

ROOT = Path(__file__).resolve().parents[1]
BENCHMARK = runpy.run_path(str(ROOT / 'tools' / 'analysis' / 'benchmark.py'))
CONFIGS = sorted(
    path.relative_to(ROOT / 'configs').as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if path.parent.name != '_base_'
)
# Height and width of the images.
SIZE = 48, 64
EXAMPLE = re.compile(r'```python\n# (my_\w+\.py)\n(.*?)```', re.DOTALL)
EXAMPLES = {
    name: text
    for page in ('README.md', 'docs/data.md')
    for name, text in EXAMPLE.findall((ROOT / page).read_text(encoding='utf-8'))
}
# The hooks leave ResNets alone, whose larger ones would show no more.
NAMES = [
    pytest.param(name, marks=() if 'convmlp_s' in name else pytest.mark.slow)
    for name in (*CONFIGS, *EXAMPLES)
    if 'baselines' not in name or 'resnet18' in name
]
# M and L round as S does.
ROUNDED = [x for x in NAMES if not re.search('_[ml][_.]|resnet', x.values[0])]


def read(name, folder):
    if name not in EXAMPLES:
        return Config.fromfile(ROOT / 'configs' / name)
    (folder / name).write_text(EXAMPLES[name])
    return Config.fromfile(folder / name)


def few_boxes(cfg):
    """Two-stage detectors on so few pixels need not look at a thousand boxes."""
    if 'roi_head' in cfg.model:
        cfg.model.train_cfg.rcnn.sampler.num = 16
        cfg.model.train_cfg.rpn_proposal.max_per_img = 50
        cfg.model.test_cfg.rpn.max_per_img = 50
    if 'rcnn' in (cfg.model.get('test_cfg') or {}):
        # Random weights are sure of nothing.
        cfg.model.test_cfg.rcnn.update(score_thr=0.0, max_per_img=10)


def build(cfg):
    few_boxes(cfg)
    torch.manual_seed(0)
    model = revert_sync_batchnorm(build_model(cfg)).double()
    for name, buffer in model.named_buffers():
        if 'running' in name:
            buffer.uniform_(0.5, 1.5)
    return model


def contiguous(value):
    return tree_map(
        lambda x: x.contiguous() if isinstance(x, torch.Tensor) else x, value
    )


def contiguous_twin(model):
    return make_contiguous(copy.deepcopy(model))


def make_contiguous(model):
    """Let all tensors of a model be contiguous, and leave out mmcv's RoIAlign."""
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    for module in model.modules():
        module.register_forward_pre_hook(lambda _, inputs: contiguous(inputs))
        module.register_forward_hook(lambda _, inputs, output: contiguous(output))
        if isinstance(module, RoIAlign):
            module.forward = torchvisions(module)
    return model


def torchvisions(layer):
    def forward(maps, rois):
        return roi_align(
            maps,
            rois,
            layer.output_size,
            layer.spatial_scale,
            layer.sampling_ratio,
            layer.aligned,
        )

    return forward


def run_hooks(model, cfg):
    """Do to a model what the hooks of its configuration do before a run."""
    logger = MMLogger.get_current_instance()
    runner = SimpleNamespace(model=model, cfg=cfg, logger=logger)
    for hook in cfg.get('custom_hooks') or []:
        if hook.type in ('ChannelsLastHook', 'CompileBackboneHook'):
            HOOKS.build(hook).before_run(runner)
    return runner.model


def batch_of(model, dtype=torch.float64):
    torch.manual_seed(1)
    batch = BENCHMARK['draw_batch'](model, 2, SIZE)
    model.data_preprocessor.float()
    if model.cfg.default_scope == 'mmseg':
        model.data_preprocessor.size = SIZE
        model.data_preprocessor.size_divisor = None
    batch = model.data_preprocessor(batch, False)
    return batch['inputs'].to(dtype), batch['data_samples']


def train_step(model, dtype=torch.float64):
    """Return the terms of the loss and the gradients of all parameters."""
    model.train()
    inputs, samples = batch_of(model, dtype)
    torch.manual_seed(2)
    terms = model(inputs, samples, mode='loss')
    loss, terms = model.parse_losses(terms)
    loss.backward()
    found = {name: torch.as_tensor(value).detach() for name, value in terms.items()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            found[f'gradient of {name}'] = parameter.grad
    model.zero_grad()
    return found


def predict(model, dtype=torch.float64):
    """Return the tensors of the predictions for both images."""
    model.eval()
    inputs, samples = batch_of(model, dtype)
    with torch.no_grad():
        samples = model(inputs, samples, mode='predict')
    found = {}
    for i, sample in enumerate(samples):
        for part, value in sample.items():
            for name, x in value.items() if hasattr(value, 'items') else [('', value)]:
                if part.startswith(('pred', 'seg_logits')):
                    found[f'{part} {name} of image {i}'] = torch.as_tensor(x)
    assert any(x.numel() for x in found.values())
    return found


def assert_equal(found, expected, tolerance=1e-5):
    """Compare with the largest value of each tensor."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        if value.dtype == torch.bool:
            assert torch.equal(found[name], value), name
        elif value.numel():
            difference = (found[name] - value).abs().max()
            # A gradient that is zero but for rounding has no scale of its own.
            scale = value.abs().max().clamp(min=1e-9)
            assert difference <= tolerance * scale, name


@contextmanager
def in_double():
    """Let detectors run in float64, for which NMS and pasting of masks are not made."""
    nms = sys.modules['mmcv.ops.nms']
    select, paste = nms.ext_module.nms, fcn_mask_head._do_paste_mask
    single = SimpleNamespace(
        nms=lambda boxes, scores, **more: select(boxes.float(), scores.float(), **more)
    )
    before = torch.get_default_dtype()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, 'ext_module', single)
        patch.setattr(
            fcn_mask_head,
            '_do_paste_mask',
            lambda masks, boxes, *more, **kwargs: paste(
                masks, boxes.float(), *more, **kwargs
            ),
        )
        torch.set_default_dtype(torch.float64)
        yield
    torch.set_default_dtype(before)


@pytest.fixture
def double():
    with in_double():
        yield


@pytest.mark.parametrize('name', NAMES)
def test_every_system_computes_what_it_does_from_contiguous_maps(
    name, tmp_path, double
):
    cfg = read(name, tmp_path)
    model = build(cfg)
    twin = contiguous_twin(model)
    model = run_hooks(model, cfg)
    trained, predicted = train_step(twin), predict(twin)
    assert_equal(train_step(model), trained)
    assert_equal(predict(model), predicted)
    switch_to_deploy(model)
    assert_equal(predict(model), predicted)


@pytest.mark.parametrize('name', ROUNDED)
def test_layout_adds_no_more_error_than_autocast_itself(name, tmp_path):
    """Rounding to bfloat16 differs where sums are taken in another order."""
    cfg = read(name, tmp_path)
    model = build(cfg).float().eval()
    twin = contiguous_twin(model)
    model = run_hooks(model, cfg)
    images, _ = batch_of(model, torch.float32)
    with torch.no_grad():
        exact = twin.extract_feat(images)
        with torch.autocast('cpu', torch.bfloat16):
            expected, found = twin.extract_feat(images), model.extract_feat(images)
    for x, right, whole in zip(found, expected, exact):
        rounding = (right - whole).abs().max()
        assert (x - right).abs().max() <= 2 * rounding
        assert rounding <= 0.05 * whole.abs().max()
    if not hasattr(model, 'roi_head'):
        with torch.autocast('cpu', torch.bfloat16):
            assert_equal(losses(model), losses(twin), 0.02)
        return
    # On a CPU, RoIAlign takes no bfloat16; the conversion keeps the layout.
    maps = [x.float() for x in found]
    regions = torch.tensor([[0, 3.0, 3, 50, 40], [1, 10, 5, 60, 45]])
    extractor = model.roi_head.bbox_roi_extractor
    found = extractor(maps[: extractor.num_inputs], regions)
    layer = extractor.roi_layers[0]
    expected = torchvisions(layer)(maps[0], regions)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


CONVMLP = dict(_delete_=True, type='ConvMLP', arch='s')
MAPS = [64, 128, 256, 512]


def heads(**channels):
    return {f'model.{head}.in_channels': number for head, number in channels.items()}


@pytest.mark.parametrize(
    ('name', 'changes'),
    [
        # Deformable convolution refuses any layout but the contiguous one.
        ('mmdet::vfnet/vfnet_r50_fpn_1x_coco.py', {'model.neck.in_channels': MAPS}),
        # Modulated deformable convolution takes every map for contiguous.
        (
            'mmdet::nas_fcos/nas-fcos_r50-caffe_fpn_nashead-gn-head_4xb4-1x_coco.py',
            {'model.neck.in_channels': MAPS},
        ),
        # The others call view, in the head or in mmcv's operator.
        (
            'mmdet::centernet/centernet_r18_8xb16-crop512-140e_coco.py',
            {'model.backbone.out_indices': (3,)},
        ),
        (
            'mmseg::dmnet/dmnet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
            heads(decode_head=512, auxiliary_head=256),
        ),
        (
            'mmseg::psanet/psanet_r50-d8_4xb2-40k_cityscapes-512x1024.py',
            heads(decode_head=512, auxiliary_head=256),
        ),
    ],
)
@pytest.mark.slow
def test_heads_that_need_contiguous_maps_get_them(name, changes):
    cfg = find_config(name)
    if cfg.default_scope == 'mmseg':
        cfg.model.pretrained = None
    cfg.merge_from_dict({'model.backbone': CONVMLP, **changes})
    cfg.custom_hooks = [dict(type='ChannelsLastHook')]
    # Some of their losses exist in float32 only.
    model = build(cfg).float()
    expected = losses(contiguous_twin(model))
    model = run_hooks(model, cfg)
    assert_equal(losses(model), expected, 1e-4)
    switch_to_deploy(model)
    predict(model, torch.float32)


def losses(model):
    found = train_step(model, torch.float32)
    return {name: x for name, x in found.items() if 'loss' in name}


def test_a_neck_or_head_of_another_package_gets_contiguous_maps():
    """It may have the name of a known one and call view all the same."""
    model = build_model(find_config('retinanet_convmlp_s'))
    assert needs_contiguous(model) is None

    class FPN(type(model.neck)):
        pass

    model.neck.__class__ = FPN
    assert needs_contiguous(model) == f'{__name__}.FPN'
    assert not use_channels_last(model)
    assert all(
        map_.is_contiguous() for map_ in model.backbone(torch.rand(1, 3, 64, 64))
    )


def test_an_operator_inside_of_a_known_neck_gets_contiguous_maps():
    cfg = find_config('retinanet_convmlp_s')
    cfg.model.neck.conv_cfg = dict(type='DCNv2')
    model = build_model(cfg)
    assert needs_contiguous(model) == 'mmcv.ModulatedDeformConv2dPack'


@pytest.mark.parametrize('name', ['retinanet_convmlp_s', 'semantic_fpn_convmlp_s'])
def test_maps_stay_channels_last_where_that_is_right(name):
    """Weights and maps of neck and head are not brought into another layout."""
    model = revert_sync_batchnorm(build_model(find_config(name)))
    switch_to_deploy(model)
    others = []

    def check(module, inputs, output):
        for x in (inputs[0], output, module.weight):
            if not x.is_contiguous(memory_format=torch.channels_last):
                others.append(module)

    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not key.startswith('backbone'):
            module.register_forward_hook(check)
    with torch.no_grad():
        model(torch.rand(1, 3, 96, 96))
    assert not others


@HOOKS.register_module()
class KeepLosses(Hook):
    """Keep what the Runner trains on; make the model contiguous first if asked to."""

    def __init__(self, twin=False):
        self.twin, self.losses = twin, []

    def before_train(self, runner):
        if self.twin:
            make_contiguous(runner.model)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.losses.append({name: float(value) for name, value in outputs.items()})


@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask_rcnn_convmlp_s.py'])
def test_the_runner_trains_on_the_losses_of_contiguous_maps(name, tmp_path, tool):
    shapes = tmp_path / 'shapes'
    assert not tool(
        'data/make_shapes_dataset.py', shapes, '--train', 4, '--val', 2
    ).returncode
    found = []
    for twin in (False, True):
        cfg = read(name, tmp_path)
        merge_options(cfg, dict(data_root=f'{shapes}/coco/', num_classes=6))
        few_boxes(cfg)
        cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
        classes = ('circle', 'square', 'triangle', 'star', 'ring', 'cross')
        cfg.train_dataloader.update(num_workers=0, persistent_workers=False)
        cfg.train_dataloader.dataset.metainfo = dict(classes=classes)
        cfg.train_dataloader.dataset.pipeline[2].scale = (128, 128)
        for part in ('dataloader', 'evaluator', 'cfg'):
            cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=2)
        cfg.work_dir, cfg.launcher = str(tmp_path / str(twin)), 'none'
        cfg.experiment_name = f'{tmp_path.name} {twin}'
        cfg.optim_wrapper.optimizer.lr = 1e-6
        # Random numbers are drawn in the order of memory.
        cfg.load_from = str(tmp_path / 'start.pth')
        if not twin:
            torch.save(build_model(cfg).state_dict(), cfg.load_from)
        # With the hooks of the configuration on one side, and without on the other.
        hooks = [] if twin else cfg.custom_hooks
        cfg.custom_hooks = [*hooks, dict(type='KeepLosses', twin=twin)]
        runner = build_runner(cfg)
        runner.train()
        found += [hook.losses for hook in runner.hooks if isinstance(hook, KeepLosses)]
    for ours, expected in zip(*found):
        assert ours == pytest.approx(expected, rel=1e-4)
    assert len(found[0]) == 2
