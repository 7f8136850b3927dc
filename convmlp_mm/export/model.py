"""Write a model that has been compared with the toolkit."""

from __future__ import annotations

import copy
import os
import os.path as osp
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
from torch import nn

from ..analysis.images import MIN_SIZE, fit_image
from ..apis import switch_to_deploy
from ..checkpoint import write_file
from .check import OPSETS, ExportError, channel_order, check_request, make_graph
from .compare import TOLERANCE, compare, to_input, toolkit_results
from .detections import compare_detections
from .formats import describe, load_onnx, load_torch, to_onnx, to_torch
from .graphs import DetectorGraph, map_sizes

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = ['ExportReport', 'draw_images', 'export_model']

ROUNDS = 7


@dataclass(frozen=True)
class ExportReport:
    """What was exported and measured.

    Attributes:
        differences (tuple[tuple[tuple[int, int, int], dict[str, float]], ...]): Of
            each check the batch, height and width, and for each output the largest
            ``|exported - PyTorch| / max(1, |PyTorch|)``. For the labels of a
            segmentor it is how far the logit of the exported class lies below the
            highest one; for those of a detector how many detections are missing or
            must not be there. Boxes are taken relative to their farthest edge.
        compared (int): Number of pictures in the checks.
        detections (int | None): Number of detections in them.
        rounded (int): Those of them that mmdet has not, since of boxes with the same
            score, but for rounding, it has kept another.
        seconds (tuple[float, float]): Median time of one batch at the given shape:
            of the toolkit (its ``test_step`` with BN folded) and of the exported
            graph.
        threads (int): With which both were timed.
        size (int): Of the file, in bytes.
    """

    differences: tuple[tuple[tuple[int, int, int], dict[str, float]], ...]
    compared: int
    detections: int | None
    rounded: int
    seconds: tuple[float, float]
    threads: int
    size: int


def export_model(
    model: BaseModel,
    path: str | os.PathLike,
    shape: tuple[int, int],
    part: str = 'model',
    form: str = 'onnx',
    batch_size: int = 1,
    images: Sequence[np.ndarray] | None = None,
    opset: int = OPSETS[-1],
    overwrite: bool = False,
    notes: Mapping[str, str] | None = None,
) -> ExportReport:
    """Write a model, if what was exported computes the same as the toolkit.

    The graph takes ``images`` of shape (N, 3, H, W), float32 from 0 to 255, with the
    colours in the order that ``channel_order`` in the file says; N is open, and so
    are H and W. It gives

    - of a classifier ``scores``, (N, classes), which add up to 1;
    - of a segmentor ``labels``, (N, H, W), int64, and ``logits``, (N, classes, H, W);
    - of a detector ``boxes``, (N, K, 4), as left, top, right, bottom in pixels,
      ``scores`` and ``labels``, (N, K), in the order of the scores. K is
      ``test_cfg.max_per_img``; where a picture has fewer, the label is -1 and the
      rest 0;
    - of a backbone ``feature_0`` and so on, (N, channels, height, width).

    It is compared with ``test_step`` of the toolkit, whose BN is not folded: at the
    given shape and batch, at another size, and with one picture more.

    Args:
        model (BaseModel): Of :func:`convmlp_mm.apis.get_model`, on the CPU; it is not
            changed.
        path (str | PathLike): The file, ``.onnx`` or ``.pt2``.
        shape (tuple[int, int]): Height and width in pixels of the check and of the
            timing.
        part (str): ``'model'`` or ``'backbone'``. Defaults to ``'model'``.
        form (str): ``'onnx'`` or ``'torch'``. Defaults to ``'onnx'``.
        batch_size (int): Pictures at once in the check and in the timing. Defaults
            to 1.
        images (Sequence[ndarray], optional): Pictures to compare on, (H, W, 3), uint8,
            blue first, all of which are used, cut and resized to the shape. Defaults
            to drawn ones.
        opset (int): Of the ONNX file. Defaults to 17.
        overwrite (bool): Whether to replace a file. Defaults to False.
        notes (Mapping[str, str], optional): What to add to the properties that the
            file holds (mean, std, classes and others, as JSON).

    Returns:
        ExportReport: What was compared and timed.

    Raises:
        ExportError: If the model cannot be exported, or if the largest difference is
            above ``TOLERANCE``. No file is written then.
        ValueError: See :func:`check_request`; and for the shape and the batch.
        ImportError: See :func:`check_request`.
        OSError: See :func:`check_request`.
    """
    check_request(model.cfg, path, part, form, opset, overwrite)
    deployed = copy.deepcopy(model)
    switch_to_deploy(deployed)
    deployed.requires_grad_(False)
    graph = make_graph(deployed, part)
    smallest = smallest_side(graph, deployed, form)
    if min(shape) < smallest:
        raise ValueError(
            f'the shape must be at least {smallest} {smallest} for format {form!r}, '
            f'but got {shape[0]} {shape[1]}'
        )
    if batch_size < 1:
        raise ValueError(f'the batch size must be at least 1, but got {batch_size}')
    order = channel_order(model)
    images = list(images) if images is not None else draw_images(3, shape)

    properties = describe(model, graph, part, order, notes or {})
    # torch.export takes a batch of 1 for one that is always 1.
    example = torch.zeros(max(2, batch_size), 3, *shape)
    kind = type(model).__name__
    try:
        with warnings.catch_warnings(), torch.no_grad():
            # Of the shapes that Python compares, where the check will tell.
            warnings.simplefilter('ignore')
            if form == 'onnx':
                content = to_onnx(graph, example, opset, properties)
            else:
                content = to_torch(graph, example, properties)
            load = load_onnx if form == 'onnx' else load_torch
            run = load(content, graph.outputs)
    # Each exporter fails in its own way.
    except Exception as error:
        line = str(error).strip().partition('\n')[0]
        raise ExportError(
            f'{kind} cannot be exported to {form}: {type(error).__name__}: {line}'
        ) from error
    detector = isinstance(graph, DetectorGraph)
    differences, compared, detections, rounded = [], 0, 0, 0
    other = tuple(max(smallest, int(n * s) | 1) for n, s in zip(shape, (0.8, 0.7)))
    for pictures, size in _plan_checks(images, batch_size, shape, other):
        batch = [fit_image(picture, size) for picture in pictures]
        found = dict(zip(graph.outputs, run(to_input(batch, order))))
        if detector:
            result, *numbers = compare_detections(graph, model, batch, found)
            detections, rounded = detections + numbers[0], rounded + numbers[1]
        else:
            result = compare(graph, toolkit_results(model, batch, part), found)
        differences.append(((len(batch), *size), result))
        compared += len(batch)
        # Not a number is no agreement either; max() of Python would pass over it.
        worst = float(np.max(list(result.values())))
        if not worst <= TOLERANCE:
            raise ExportError(
                f'the exported {kind} differs from PyTorch by {worst:.1e} (more than '
                f'{TOLERANCE:.0e}) at batch {len(batch)}, {size[0]} x {size[1]} '
                f'pixels: {_spell(result)}'
            )

    batch = [fit_image(images[i % len(images)], shape) for i in range(batch_size)]
    given = to_input(batch, order)
    seconds = _time_both(
        lambda: toolkit_results(deployed, batch, part), lambda: run(given)
    )
    write_file(path, content, overwrite)
    return ExportReport(
        differences=_merge_checks(differences),
        compared=compared,
        detections=detections if detector else None,
        rounded=rounded,
        seconds=seconds,
        threads=torch.get_num_threads(),
        size=osp.getsize(path),
    )


def smallest_side(graph: nn.Module, model: BaseModel, form: str) -> int:
    """Return the fewest pixels of a side.

    torch.export takes a map of one position for one that always has one.
    """
    if form == 'onnx':
        return MIN_SIZE
    if isinstance(graph, DetectorGraph):
        strides = model.bbox_head.prior_generator.strides
        return max(max(stride) for stride in strides) + 1
    return max(MIN_SIZE, 128 // min(map_sizes(model))) + 1


def draw_images(number: int, shape: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Draw pictures with coarse and fine structure, the same for the same arguments.

    Args:
        number (int): How many.
        shape (tuple[int, int]): Height and width in pixels.
        seed (int): Defaults to 0.

    Returns:
        list[ndarray]: Of shape (H, W, 3), uint8.
    """
    rng = np.random.default_rng(seed)
    height, width = shape
    pictures = []
    for _ in range(number):
        total = np.full((height, width, 3), 128, np.float32)
        for cells in (3, 8, 24, 64):
            grid = rng.standard_normal((cells, cells, 3), np.float32)
            total += 35 * cv2.resize(
                grid, (width, height), interpolation=cv2.INTER_CUBIC
            )
        pictures.append(total.clip(0, 255).astype(np.uint8))
    return pictures


def _plan_checks(
    images: Sequence[np.ndarray],
    batch_size: int,
    shape: tuple[int, int],
    other: tuple[int, int],
) -> list[tuple[list[np.ndarray], tuple[int, int]]]:
    """Group all pictures into batches, and some once more in two other ways."""

    def take(start: int, number: int) -> list[np.ndarray]:
        return [images[i % len(images)] for i in range(start, start + number)]

    starts = range(0, len(images), batch_size)
    return [
        *((take(start, batch_size), shape) for start in starts),
        (take(0, batch_size), other),
        (take(0, batch_size + 1), shape),
    ]


def _merge_checks(
    checks: Sequence[tuple[tuple[int, int, int], dict[str, float]]],
) -> tuple[tuple[tuple[int, int, int], dict[str, float]], ...]:
    """Put the checks of one shape together, the largest difference of each output."""
    merged = {}
    for shape, result in checks:
        before = merged.get(shape, result)
        merged[shape] = {name: max(before[name], result[name]) for name in result}
    return tuple(merged.items())


def _spell(result: Mapping[str, float]) -> str:
    return ', '.join(f'{name} {value:.1e}' for name, value in result.items())


def _time_both(
    first: Callable[[], object], second: Callable[[], object]
) -> tuple[float, float]:
    """Return the median seconds of two calls that take turns."""
    times = ([], [])
    for _ in range(ROUNDS + 1):
        for call, taken in zip((first, second), times):
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
    # The first call of each is to warm up.
    return tuple(statistics.median(taken[1:]) for taken in times)
