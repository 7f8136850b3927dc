"""The figure of the feature maps of several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import mmcv
import numpy as np
from matplotlib.figure import Figure

from .feature_maps import ModelMaps
from .images import DPI

if TYPE_CHECKING:
    pass

__all__ = ['draw_feature_maps']

RULE = (
    'Shown are the {} channels of each stage whose values vary most over the picture '
    '(largest standard deviation, largest first; numbers are channel indices), each '
    'scaled from its own 1st to 99th percentile. Squares are positions of the map.'
)
PERCENTILES = (1, 99)
# In pixels of the sheet.
TILE, GAP, MARGIN, HEADER, TITLE, FOOTER = 104, 2, 16, 40, 22, 34


def _tile(values: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Scale a map to 0..1 and to pixels of the sheet, its positions as blocks."""
    low, high = np.percentile(values, PERCENTILES)
    scaled = np.clip((values - low) / max(high - low, np.finfo(np.float32).tiny), 0, 1)
    larger = values.shape[0] > shape[0] or values.shape[1] > shape[1]
    return mmcv.imresize(
        scaled.astype(np.float32),
        shape[::-1],
        interpolation='area' if larger else 'nearest',
    )


def _montage(maps: np.ndarray, columns: int, shape: tuple[int, int]) -> np.ndarray:
    """Put tiles into a grid; what is between them is NaN."""
    height, width = shape[0] + GAP, shape[1] + GAP
    sheet = np.full((columns * height - GAP, columns * width - GAP), np.nan, np.float32)
    for k, values in enumerate(maps):
        y, x = k // columns * height, k % columns * width
        sheet[y : y + shape[0], x : x + shape[1]] = _tile(values, shape)
    return sheet


def draw_feature_maps(rows: Sequence[ModelMaps], number: int = 9) -> Figure:
    """Draw the sheet: a row for each model, a column for each stage.

    Args:
        rows (Sequence[ModelMaps]): One for each model.
        number (int): Channels that were asked for, which the sheet states.
            Defaults to 9.

    Returns:
        Figure: To be saved with :func:`~convmlp_mm.analysis.images.save_sheet`.
    """
    columns = int(np.ceil(number**0.5))
    shapes = []
    for row in rows:
        height, width = row.image.shape[:2]
        scale = max(TILE * 3 / columns, 24) / max(height, width)
        shapes.append((max(round(height * scale), 8), max(round(width * scale), 8)))
    cell = max(columns * (shape[1] + GAP) for shape in shapes) + MARGIN
    heights = [HEADER + TITLE + columns * (shape[0] + GAP) for shape in shapes]
    total_w = MARGIN + cell * (1 + max(len(row.stages) for row in rows))
    total_h = sum(heights) + FOOTER + MARGIN
    figure = Figure(figsize=(total_w / DPI, total_h / DPI), dpi=DPI)

    def axes_at(x, y, picture, **kwargs):
        height, width = picture.shape[:2]
        axes = figure.add_axes(
            (x / total_w, 1 - (y + height) / total_h, width / total_w, height / total_h)
        )
        axes.imshow(picture, interpolation='nearest', aspect='auto', **kwargs)
        axes.set_axis_off()

    def text_at(x, y, text, **kwargs):
        figure.text(x / total_w, 1 - y / total_h, text, **kwargs)

    top = 0
    for row, shape, height in zip(rows, shapes, heights):
        size = f'at {row.image.shape[0]} x {row.image.shape[1]}'
        y = top + HEADER - 12
        text_at(MARGIN, y, row.source.name, fontsize=13, weight='bold')
        text_at(MARGIN + cell, y, size, fontsize=11)
        text_at(
            MARGIN + 2 * cell, y, row.source.weights, fontsize=11,
            color=row.source.colour,
        )  # fmt: skip
        y = top + HEADER + TITLE
        side = [columns * (length + GAP) - GAP for length in shape]
        seen = mmcv.imresize(row.image, side[::-1], interpolation='area')
        text_at(MARGIN, y - 6, 'input', fontsize=9)
        axes_at(MARGIN, y, seen)
        for j, stage in enumerate(row.stages):
            x = MARGIN + (j + 1) * cell
            h, w = stage.maps.shape[1:]
            title = (
                f'{stage.name}: stride {stage.stride}, {h} x {w}, '
                f'{stage.num_channels} channels'
            )
            text_at(x, y - 6, title, fontsize=9)
            sheet = _montage(stage.maps, columns, shape)
            axes_at(x, y, sheet, cmap='viridis', vmin=0, vmax=1)
            for k, channel in enumerate(stage.channels):
                text_at(
                    x + k % columns * (shape[1] + GAP) + 4,
                    y + k // columns * (shape[0] + GAP) + 4,
                    str(channel), fontsize=6, color='white', va='top',
                    bbox=dict(facecolor='black', alpha=0.55, lw=0, pad=1),
                )  # fmt: skip
        top += height
    text_at(MARGIN, total_h - MARGIN, RULE.format(number), fontsize=9)
    return figure
