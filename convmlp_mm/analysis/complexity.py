"""Count what a configuration costs.

Models are built and run on torch's meta device, where tensors have shapes and no
values: seconds at any size, on any machine, and the same numbers everywhere. The few
that need values, as the operators of mmcv do, are run on the CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from mmengine.config import Config
from torch.utils._pytree import tree_flatten
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..apis import build_model

if TYPE_CHECKING:
    from mmengine.model import BaseModel
    from torch import Tensor

__all__ = ['Complexity', 'default_shape', 'measure_complexity']

# Steps of a test pipeline that decide the size.
CROPS = ('Resize', 'CenterCrop', 'EfficientNetCenterCrop')


@dataclass(frozen=True)
class Complexity:
    """Costs of a model for one picture.

    Attributes:
        name (str): Of the model, for tables and messages.
        shape (tuple[int, int]): Height and width of the picture, in pixels.
        params (int): Number of trainable and frozen parameters, auxiliary heads
            included; buffers, such as the statistics of BN, are not.
        trainable (int): Those of them that the configuration does not freeze.
        macs (int): Multiply-accumulates of convolutions and matrix products,
            those of attention included. Norms, activation functions, pooling and
            biases do not count.
        activations (int): Number of elements in the outputs of the same
            operators, after "Designing Network Design Spaces" (Radosavovic et
            al., CVPR 2020, Sec. 3.1), which has convolutions only. The weights of
            attention count as the matrix product that they are.
        strides (tuple[int, ...]): Of the maps that the backbone hands on, in
            pixels of the picture. Empty where these are no maps.
        channels (tuple[int, ...]): Of the same maps.
    """

    name: str
    shape: tuple[int, int]
    params: int
    trainable: int
    macs: int
    activations: int
    strides: tuple[int, ...]
    channels: tuple[int, ...]


def measure_complexity(
    cfg: Config, shape: tuple[int, int] | None = None, name: str | None = None
) -> Complexity:
    """Count parameters, multiply-accumulates and activations of a model.

    What is run is the forward pass that the toolkit calls ``'tensor'``: without
    auxiliary heads and post-processing. The proposals of two-stage detectors
    depend on the picture; as in mmdet's own ``get_flops``, there are as many as
    ``test_cfg.rpn.max_per_img`` keeps (1000), of which the mask head of
    Mask R-CNN sees 100.

    Args:
        cfg (Config): Of mmpretrain (also with a classifier of timm), mmdet or
            mmseg; see :func:`convmlp_mm.apis.find_config`. It is not changed.
        shape (tuple[int, int], optional): Height and width in pixels. Defaults
            to :func:`default_shape`.
        name (str, optional): What to call the model. Defaults to the file's name.

    Returns:
        Complexity: The counts.

    Raises:
        ValueError: If the shape is not two positive numbers, if the model does
            not take this shape, or if it cannot be run.

    Examples:
        ``measure_complexity(find_config('convmlp_s_imagenet')).macs`` is 2385327104.
    """
    name = name or _name(cfg)
    shape = default_shape(cfg) if shape is None else tuple(shape)
    if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f'the shape must be height and width in pixels, both above 0, but got '
            f'{shape}'
        )
    model = _build_on_meta(cfg)
    try:
        macs, activations, maps = _run(model, shape)
    except Exception as error:  # each model fails in its own way
        try:
            # Operators of mmcv, and code that reads values, need real tensors.
            real = build_model(cfg).requires_grad_(False)
            macs, activations, maps = _run(real, shape, 'cpu')
        except Exception:
            raise ValueError(_explain(model, cfg, name, shape, error)) from error
    strides, channels = _describe(model, maps, shape)
    return Complexity(
        name=name,
        shape=shape,
        params=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=macs,
        activations=activations,
        strides=strides,
        channels=channels,
    )


def default_shape(cfg: Config) -> tuple[int, int]:
    """Return the size at which a configuration is tested.

    Args:
        cfg (Config): Of mmpretrain, mmdet or mmseg.

    Returns:
        tuple[int, int]: Height and width in pixels: the crop of the test pipeline
        (classification); 800x1280 for what is resized to 1333x800, as in the
        tables of mmdet, else the size that the test pipeline resizes to
        (detection); the crop of the training (segmentation).

    Raises:
        ValueError: If the configuration does not say.
    """
    shape = _usual_shape(cfg)
    if shape is None:
        raise ValueError(
            f'the configuration of {_name(cfg)} does not say which size it is tested '
            'at; give the shape'
        )
    return shape


def _usual_shape(cfg: Config) -> tuple[int, int] | None:
    scope = cfg.get('default_scope')
    preprocessor = cfg.get('data_preprocessor') or cfg.model.get('data_preprocessor')
    if scope == 'mmseg':
        size = (preprocessor or {}).get('size') or cfg.get('crop_size')
        return size and _pair(size)
    dataset = (cfg.get('test_dataloader') or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    sizes = [
        # Resize of mmdet has the width first.
        _pair(step['scale'])[::-1]
        if scope == 'mmdet'
        else _pair(step['scale'])
        if 'scale' in step
        else _pair(step['crop_size'])
        for step in dataset.get('pipeline') or []
        if step['type'].rpartition('.')[2] in CROPS
        and ('scale' in step or 'crop_size' in step)
    ]
    if scope == 'mmdet' and (not sizes or sizes[-1] == (800, 1333)):
        return 800, 1280
    return sizes[-1] if sizes else None


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _name(cfg: Config) -> str:
    file = Path(cfg.filename).stem if cfg.filename else None
    return file or cfg.model.get('model_name') or cfg.model.type


def _build_on_meta(cfg: Config) -> BaseModel:
    try:
        with torch.device('meta'):
            # Again, since the old constructor torch.Tensor ignores the device.
            return build_model(cfg).to('meta')
    except (NotImplementedError, RuntimeError):
        # Some read values while they are built, such as rates of stochastic depth.
        return build_model(cfg).to('meta')


def _run(
    model: BaseModel, shape: tuple[int, int], device: str = 'meta'
) -> tuple[int, int, object]:
    """Return MACs, activations and what the backbone has handed on."""
    from mmcv.ops import DeformConv2d, ModulatedDeformConv2d

    maps, deformed = [], []

    def deform(module, args, output):
        deformed.append((output.numel(), output.numel() * module.weight[0].numel()))

    hooks = [
        # torch's counter does not know mmcv's operators.
        module.register_forward_hook(deform)
        for module in model.modules()
        if isinstance(module, (DeformConv2d, ModulatedDeformConv2d))
    ]
    if getattr(model, 'backbone', None) is not None:
        hooks.append(
            model.backbone.register_forward_hook(
                lambda module, args, output: maps.append(output)
            )
        )
    x = torch.zeros(1, 3, *shape, device=device)

    # The counter's own table of operators, with their outputs for their work.
    # mmengine's count of activations traces the model, which needs values.
    def outputs(*args: object, out_shape: object = None, **kwargs: object) -> int:
        return math.prod(out_shape)

    numels = FlopCounterMode(
        display=False, custom_mapping=dict.fromkeys(flop_registry, outputs)
    )
    flops = FlopCounterMode(display=False)
    try:
        with torch.no_grad(), numels, flops:
            if model.cfg.default_scope == 'mmdet':
                with _proposals_without_values(model):
                    model(x, _data_samples(shape, device), mode='tensor')
            else:
                model(x)
    finally:
        for hook in hooks:
            hook.remove()
    macs = flops.get_total_flops() // 2 + sum(n for _, n in deformed)
    activations = numels.get_total_flops() + sum(n for n, _ in deformed)
    return macs, activations, maps


def _data_samples(shape: tuple[int, int], device: str) -> list:
    from mmdet.structures import DetDataSample
    from mmengine.structures import InstanceData

    keys = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    meta = dict.fromkeys(keys, shape)
    sample = DetDataSample(metainfo=dict(scale_factor=(1.0, 1.0), **meta))
    # Some ask for objects outside of training too.
    sample.gt_instances = InstanceData(
        bboxes=torch.zeros(0, 4, device=device),
        labels=torch.zeros(0, dtype=torch.long, device=device),
    )
    return [sample]


@contextmanager
def _proposals_without_values(model: BaseModel) -> Iterator[None]:
    """Let a two-stage detector propose boxes, and cut them out, as shapes only."""
    from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
    from mmengine.structures import InstanceData

    replaced = [m for m in model.modules() if isinstance(m, SingleRoIExtractor)]
    for extractor in replaced:
        extractor.forward = partial(_extract_nothing, extractor)
    rpn = getattr(model, 'rpn_head', None)
    settings = (model.test_cfg or {}).get('rpn') if replaced else None
    # Where queries stand in the place of an RPN, they have no such settings.
    if rpn is not None and settings:

        def predict(feats: tuple[Tensor], *args: object, **kwargs: object) -> list:
            rpn(feats)
            boxes = feats[0].new_zeros(settings.max_per_img, 4)
            return [InstanceData(bboxes=boxes)]

        rpn.predict = predict
        replaced.append(rpn)
    try:
        yield
    finally:
        for module in replaced:
            module.__dict__.pop('forward', None)
            module.__dict__.pop('predict', None)


def _extract_nothing(
    extractor: object,
    feats: tuple[Tensor],
    rois: Tensor,
    *args: object,
    **kwargs: object,
) -> Tensor:
    """Stand in for RoIAlign, which only interpolates."""
    size = _pair(extractor.roi_layers[0].output_size)
    return feats[0].new_zeros(len(rois), extractor.out_channels, *size)


def _describe(
    model: BaseModel, maps: list, shape: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return strides and channels of what the backbone hands on."""
    if not hasattr(model, 'backbone'):
        # timm tells of every level; the last is what its classifier sees.
        levels = getattr(getattr(model, 'model', None), 'feature_info', None) or []
        levels = [level for level in levels if 'reduction' in level][-1:]
        return tuple(n['reduction'] for n in levels), tuple(
            n['num_chs'] for n in levels
        )
    maps = [m for m in tree_flatten(maps)[0] if getattr(m, 'ndim', 0) == 4]
    strides = tuple(_stride(shape, tuple(m.shape[-2:])) for m in maps)
    return strides, tuple(m.shape[1] for m in maps)


def _stride(picture: tuple[int, int], size: tuple[int, int]) -> int:
    """Tell the stride of a map, which odd sizes have rounded up at each layer."""
    side, cells = max(zip(picture, size))
    low = 2 ** math.floor(math.log2(side / cells))
    for stride in (low, 2 * low):
        if math.ceil(side / stride) == cells:
            return stride
    # One with patches of, say, 14 pixels.
    return round(side / cells)


def _explain(
    model: BaseModel,
    cfg: Config,
    name: str,
    shape: tuple[int, int],
    error: Exception,
) -> str:
    """Tell a size that a model does not take from a model that cannot be counted."""
    usual = _usual_shape(cfg)
    height, width = shape
    if usual is not None and usual != shape:
        try:
            _run(model, usual)
        except Exception as other:
            error = other
        else:
            return (
                f'{name} does not take pictures of {height} x {width} pixels (height '
                f'x width); it takes {usual[0]} x {usual[1]} '
                f'({_first_line(error)})'
            )
    return (
        f'{name} cannot be counted at {height} x {width} pixels (height x width): '
        f'{_first_line(error)}'
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0] or type(error).__name__
