"""Feature maps of several backbones, stage by stage (paper Sec. 4.7, Figure 4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .common import StatedModel
from .images import fit_image, fixed_size, preprocess

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = [
    'ModelMaps',
    'StageMaps',
    'choose_channels',
    'collect_arrays',
    'extract_stages',
    'map_models',
]

NUM_DEPTHS = 4


@dataclass
class StageMaps:
    """Some channels of the output of one stage.

    Attributes:
        name (str): Module whose output it is, by its name in the backbone.
        stride (int): Input pixels to one position.
        num_channels (int): Channels that the stage has.
        channels (ndarray): Indices of those chosen, of shape (K,).
        maps (ndarray): Their values, of shape (K, h, w), float32.
    """

    name: str
    stride: int
    num_channels: int
    channels: np.ndarray
    maps: np.ndarray


@dataclass
class ModelMaps:
    """What one model sees.

    Attributes:
        source (StatedModel): The model and the statement of its weights.
        image (ndarray): The input before normalisation, (H, W, 3), uint8, red
            first.
        stages (list[StageMaps]): First stage first.
    """

    source: StatedModel
    image: np.ndarray
    stages: list[StageMaps]


def choose_channels(maps: Tensor, number: int) -> Tensor:
    """Choose the channels that vary most over the picture.

    Args:
        maps (Tensor): Of shape (C, h, w).
        number (int): How many, all if there are fewer.

    Returns:
        Tensor: Indices in the order of decreasing standard deviation.
    """
    spread = maps.flatten(1).std(dim=1, correction=0)
    # Stable, so that equal ones come in the order of their indices.
    order = torch.sort(spread, descending=True, stable=True).indices
    return order[:number]


def _find_stages(model: BaseModel) -> Iterator[tuple[str, nn.Module, int | None]]:
    """Name the stages: modules whose outputs are shown, and strides if known.

    They are watched rather than asked for by ``out_indices``: the configured
    model stays as it is, so that its weights fit, and mmpretrain's MlpMixer
    refuses indices that are not negative.
    """
    backbone = getattr(model, 'backbone', None)
    if backbone is None:
        # A classifier of timm.
        backbone = model.model
    strides = {}
    if hasattr(backbone, 'feature_points'):
        strides = {p.name: p.stride for p in backbone.feature_points}
        names = list(strides)
    elif hasattr(backbone, 'res_layers'):
        names = list(backbone.res_layers)
    elif getattr(backbone, 'feature_info', None):
        names = [info['module'] for info in backbone.feature_info]
    else:
        lists = [a for a in ('stages', 'layers', 'blocks') if hasattr(backbone, a)]
        if not lists or not isinstance(getattr(backbone, lists[0]), nn.ModuleList):
            raise ValueError(
                f'{type(backbone).__name__} does not say what its stages are: known '
                'are ConvMLP, backbones with res_layers as ResNet, with a ModuleList '
                'stages, layers or blocks, and classifiers of timm with feature_info'
            )
        names = [f'{lists[0]}.{i}' for i in range(len(getattr(backbone, lists[0])))]
    if len(names) > NUM_DEPTHS + 1:
        # No stages but a row of equal blocks: after 3, 6, 9 and 12 of 12.
        n = len(names)
        names = [names[(i + 1) * n // NUM_DEPTHS - 1] for i in range(NUM_DEPTHS)]
    modules = dict(backbone.named_modules())
    for name in names:
        if name in modules:
            yield name, modules[name], strides.get(name)


def _as_map(output: object, size: tuple[int, int], name: str) -> Tensor:
    """Bring the output of a stage to shape (C, h, w)."""
    while isinstance(output, (tuple, list)):
        # Swin of mmpretrain and mmdet adds the shape.
        output = output[0]
    if isinstance(output, Tensor) and output.dim() == 4:
        return output[0]
    if not isinstance(output, Tensor) or output.dim() != 3:
        raise ValueError(f'the output of {name} is neither a map nor a row of tokens')
    tokens = output[0]
    for extra in (0, 1):  # a class token before them
        n = len(tokens) - extra
        height = round((n * size[0] / size[1]) ** 0.5)
        if height and n % height == 0 and n // height == round(n / height):
            width = n // height
            if abs(height * size[1] - width * size[0]) < max(size):
                return tokens[extra:].T.unflatten(1, (height, width))
    raise ValueError(f'{len(tokens)} tokens of {name} make no grid of {size}')


def extract_stages(model: BaseModel, inputs: Tensor, number: int) -> list[StageMaps]:
    """Compute the feature maps of all stages of a backbone.

    The maps are what the stages hand to each other; a norm that a classifier
    has after its last stage is not applied. ConvMLP has its feature points,
    ResNet its four layers; of a row of equal blocks, as of MLP-Mixer, four depths
    are taken, evenly spread up to the last, and tokens are put back on their grid.

    Args:
        model (BaseModel): Classifier, detector or segmentor.
        inputs (Tensor): One normalised image, of shape (1, 3, H, W).
        number (int): Channels of each stage to keep, see
            :func:`choose_channels`.

    Returns:
        list[StageMaps]: First stage first.

    Raises:
        ValueError: If the backbone does not say what its stages are, or does
            not take this size.
    """
    size = tuple(inputs.shape[-2:])
    stages = []

    def keep(name, stride, output):
        maps = _as_map(output, size, name).detach().float()
        chosen = choose_channels(maps, number)
        stride = stride or round(max(size[0] / maps.shape[1], size[1] / maps.shape[2]))
        # Indexing copies: a later layer may work in place.
        kept = maps[chosen].cpu().numpy()
        stages.append(StageMaps(name, stride, len(maps), chosen.cpu().numpy(), kept))

    hooks = [
        module.register_forward_hook(
            lambda _, __, output, name=name, stride=stride: keep(name, stride, output)
        )
        for name, module, stride in _find_stages(model)
    ]
    backbone = getattr(model, 'backbone', None) or model.model
    try:
        with torch.no_grad():
            backbone(inputs)
    except (AssertionError, RuntimeError) as error:
        raise ValueError(
            f'{type(backbone).__name__} does not take {size[0]} x {size[1]} pixels: '
            f'{error}'
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return stages


def map_models(
    models: Sequence[StatedModel],
    image: np.ndarray,
    size: tuple[int, int] = (224, 224),
    number: int = 9,
) -> list[ModelMaps]:
    """Compute the feature maps of several models for one picture.

    Args:
        models (Sequence[StatedModel]): See
            :func:`~convmlp_mm.analysis.common.load_models`.
        image (ndarray): Of shape (H, W, 3), uint8, blue first.
        size (tuple[int, int]): Height and width that they see, in pixels; the
            picture is cut to it by
            :func:`~convmlp_mm.analysis.images.fit_image`. A model that takes
            one size only keeps its own. Defaults to (224, 224).
        number (int): Channels of each stage. Defaults to 9.

    Returns:
        list[ModelMaps]: One for each model.

    Raises:
        ValueError: See :func:`extract_stages`.
    """
    rows = []
    for source in models:
        seen = fit_image(image, fixed_size(source.model) or size)
        inputs = preprocess(source.model, seen)
        try:
            stages = extract_stages(source.model, inputs, number)
        except ValueError as error:
            raise ValueError(f'{source.name}: {error}') from error
        rows.append(ModelMaps(source, np.ascontiguousarray(seen[..., ::-1]), stages))
    return rows


def collect_arrays(rows: Sequence[ModelMaps]) -> dict[str, np.ndarray]:
    """Lay out what a sheet shows for ``numpy.savez``.

    Args:
        rows (Sequence[ModelMaps]): One for each model.

    Returns:
        dict[str, ndarray]: ``models`` and ``weights`` (statements), for model i
        ``<i>/image`` (H, W, 3) red first and ``<i>/stages`` (names), and for its
        stage j ``<i>/<j>/maps`` (K, h, w), ``<i>/<j>/channels`` (K,),
        ``<i>/<j>/num_channels`` and ``<i>/<j>/stride``.
    """
    arrays = dict(
        models=np.array([row.source.name for row in rows]),
        weights=np.array([row.source.weights for row in rows]),
    )
    for i, row in enumerate(rows):
        arrays[f'{i}/image'] = row.image
        arrays[f'{i}/stages'] = np.array([stage.name for stage in row.stages])
        for j, stage in enumerate(row.stages):
            arrays[f'{i}/{j}/maps'] = stage.maps
            arrays[f'{i}/{j}/channels'] = stage.channels
            arrays[f'{i}/{j}/num_channels'] = np.array(stage.num_channels)
            arrays[f'{i}/{j}/stride'] = np.array(stage.stride)
    return arrays
