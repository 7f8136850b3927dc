"""Count what a configuration costs.

Models are run without values, see :mod:`convmlp_mm.analysis.dry_run`: the same numbers
everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmengine.config import Config
from torch.utils._pytree import tree_flatten

from ..config_files import find_config
from .dry_run import Costs, build_for_dry_run, dry_run

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = ['Complexity', 'default_shape', 'measure_complexity']

# Steps of a test pipeline that decide the size.
CROPS = ('Resize', 'CenterCrop', 'EfficientNetCenterCrop')
# Those of a training pipeline.
TRAINING_CROPS = (
    'RandomCrop',
    'RandomResizedCrop',
    'EfficientNetRandomCrop',
    'RandomResizedCropAndInterpolationWithTwoPic',
)


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
    Mask R-CNN sees 100. Models whose head has no such pass are run in the mode
    ``'predict'``. Of a tracker, the detector is run.

    Args:
        cfg (Config): Of mmpretrain (also with a classifier of timm), mmdet or
            mmseg; see :func:`convmlp_mm.config_files.find_config`. It is not changed.
        shape (tuple[int, int], optional): Height and width in pixels. Defaults
            to :func:`default_shape`.
        name (str, optional): What to call the model. Defaults to the file's name.

    Returns:
        Complexity: The counts.

    Raises:
        ValueError: If the shape is not two positive numbers, if the model does
            not take this shape, or if it cannot be built or run.

    Examples:
        ``measure_complexity(find_config('convmlp_s_imagenet')).macs`` is 2385327104.
    """
    cfg = find_config(cfg)
    name = name or _name(cfg)
    shape = default_shape(cfg) if shape is None else tuple(shape)
    if len(shape) != 2 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ValueError(
            f'the shape must be height and width in pixels, both above 0, but got '
            f'{shape}'
        )
    try:
        model = build_for_dry_run(cfg)
    except Exception as error:  # each model fails in its own way
        raise ValueError(f'{name} cannot be built: {_first_line(error)}') from error
    costs = _run(model, cfg, name, shape)
    strides, channels = _describe(model, costs.maps, shape)
    return Complexity(
        name=name,
        shape=shape,
        params=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        macs=costs.macs,
        activations=costs.activations,
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
        (detection); the crop of the training (segmentation). Where nothing is
        tested, the largest crop of the training, then the ``img_size`` of the
        backbone, then 224.
    """
    scope = cfg.get('default_scope')
    if scope == 'mmseg':
        preprocessor = cfg.get('data_preprocessor') or cfg.model.get(
            'data_preprocessor'
        )
        size = (preprocessor or {}).get('size') or cfg.get('crop_size')
        if size:
            return _pair(size)
    sizes = list(_sizes(_pipeline(cfg, 'test_dataloader'), CROPS))
    if scope == 'mmdet':
        # Resize of mmdet has the width first.
        size = sizes[-1][::-1] if sizes else (800, 1333)
        return (800, 1280) if size == (800, 1333) else size
    if sizes:
        return sizes[-1]
    sizes = list(_sizes(_pipeline(cfg, 'train_dataloader'), TRAINING_CROPS))
    backbone = cfg.model.get('backbone') or {}
    return max(sizes, default=_pair(backbone.get('img_size') or 224))


def _pipeline(cfg: Config, dataloader: str) -> list:
    dataset = (cfg.get(dataloader) or {}).get('dataset') or {}
    while 'pipeline' not in dataset and 'dataset' in dataset:
        dataset = dataset['dataset']
    return dataset.get('pipeline') or []


def _sizes(node: object, kinds: tuple[str, ...]) -> Iterator[tuple[int, int]]:
    """Find the sizes that the steps of a pipeline make, those of views too."""
    if isinstance(node, dict):
        kind = str(node.get('type')).rpartition('.')[2]
        given = [node[k] for k in ('size', 'crop_size', 'scale') if k in node]
        if kind in kinds and given:
            yield _pair(given[0])
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            yield from _sizes(child, kinds)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _name(cfg: Config) -> str:
    file = Path(cfg.filename).stem if cfg.filename else None
    return file or cfg.model.get('model_name') or str(cfg.model.type)


def _run(model: BaseModel, cfg: Config, name: str, shape: tuple[int, int]) -> Costs:
    """Run a model in the first way that it supports, or say why there is none."""
    first = real = None
    for predict in (False, True):
        for device in ('meta', 'cpu'):
            try:
                if device == 'meta':
                    return dry_run(model, shape, predict)
                # Operators of mmcv, and code that reads values.
                real = real or build_for_dry_run(cfg, 'cpu')
                return dry_run(real, shape, predict)
            except Exception as error:  # each model fails in its own way
                first = first or error
    raise ValueError(_explain(model, cfg, name, shape, first)) from first


def _describe(
    model: BaseModel, maps: list, shape: tuple[int, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return strides and channels of what the backbone hands on."""
    if not maps:
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
    usual = default_shape(cfg)
    height, width = shape
    if usual != shape:
        try:
            dry_run(model, usual)
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
