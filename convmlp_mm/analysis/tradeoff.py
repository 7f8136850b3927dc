"""Draw accuracy against cost, the message of the paper's Figure 1 and Table 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ['draw_tradeoff', 'place_labels']

# Dark enough for small words on white; the markers tell the kinds apart too.
STYLES = {
    'Convolution': dict(color='#0072B2', marker='s'),
    'Transformer': dict(color='#007A5A', marker='^'),
    'MLP': dict(color='#A3458F', marker='o'),
    'ConvMLP': dict(color='#D55E00', marker='*'),
}
OTHERS = dict(color='#404040', marker='o')
OURS = 'ConvMLP'
# Where a label may stand: how far from its point, and in which direction.
RADII = np.repeat((8, 14, 20, 28, 38, 50, 64), 24)
ANGLES = np.radians(np.tile(np.arange(0, 360, 15), 7))
DIRECTIONS = np.stack((np.cos(ANGLES), np.sin(ANGLES)), axis=1)


def draw_tradeoff(rows: list[dict]) -> Figure:
    """Draw top-1 accuracy against multiply-accumulates and against parameters.

    Args:
        rows (list[dict]): Models with ``name``, ``kind`` (a key of ``STYLES``),
            ``gmacs`` (1e9), ``params`` (millions) and ``top1`` (percent).

    Returns:
        Figure: Two panels with the accuracy in common. Saved as SVG with
        ``metadata=dict(Date=None)``, the same rows give the same file.
    """
    matplotlib.rcParams['svg.hashsalt'] = 'convmlp_mm'
    # At 72 a pixel is a point, so that labels stay where they are put at any other.
    figure = Figure(figsize=(12, 6.6), dpi=72, layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    panels = (
        ('gmacs', 'multiply-accumulates (1e9)', (0.2, 0.5, 1, 2, 5, 10, 20)),
        ('params', 'parameters (millions)', (5, 10, 20, 50, 100)),
    )
    for ax, (key, label, ticks) in zip(axes, panels):
        _draw_panel(ax, rows, key)
        ax.set_xlabel(label)
        ax.set_xticks(ticks, [f'{n:g}' for n in ticks])
        ax.minorticks_off()
        # Room for the words at the right.
        least, most = (f(row[key] for row in rows) for f in (min, max))
        ax.set_xlim(right=most * (most / least) ** 0.2)
    axes[0].set_ylabel('ImageNet-1k top-1 accuracy (%)')
    axes[1].legend(loc='lower right', title='figures: paper, Table 3')
    # Labels need to know where the points have come to lie.
    figure.draw_without_rendering()
    for ax, (key, _, _) in zip(axes, panels):
        place_labels(ax, rows, key)
    return figure


def _draw_panel(ax: Axes, rows: list[dict], key: str) -> None:
    ax.set_xscale('log')
    for kind, style in STYLES.items():
        points = [(row[key], row['top1']) for row in rows if row['kind'] == kind]
        ours = kind == OURS
        ax.plot(
            *zip(*points),
            linestyle='-' if ours else 'none',
            markersize=15 if ours else 6,
            zorder=3 if ours else 2,
            label=kind,
            **style,
        )
    ax.margins(0.1, 0.06)
    ax.grid(alpha=0.25)


def place_labels(
    ax: Axes, rows: list[dict], key: str, covered: Sequence[np.ndarray] = ()
) -> None:
    """Put each name where it covers least, the nearest place first.

    Args:
        ax (Axes): With the points, on a figure of 72 pixels per inch that has been
            laid out.
        rows (list[dict]): Points with ``name``, ``kind`` (grey, unless a key of
            ``STYLES``), ``top1`` and ``key``.
        key (str): What of them is along the x axis.
        covered (Sequence[ndarray]): What else must stay free: left, bottom, right
            and top of boxes, in pixels. Defaults to none.
    """
    points = ax.transData.transform([(row[key], row['top1']) for row in rows])
    ours = [row['kind'] == OURS for row in rows]
    line = points[ours]
    steps = np.linspace(line[:-1], line[1:], 20).reshape(-1, 2)
    # What must not be covered: left, bottom, right and top, in pixels.
    taken = [*_boxes(points - 6, (12, 12)), *_boxes(steps - 2, (4, 4)), *covered]
    if ax.get_legend() is not None:
        taken.append(ax.get_legend().get_window_extent().extents)
    # Ours first, then the crowded ones, which have the fewest places.
    near = np.linalg.norm(points[:, None] - points, axis=2) < 60
    for i in np.lexsort((-near.sum(1), np.logical_not(ours))):
        row = rows[i]
        label = ax.annotate(
            row['name'],
            (row[key], row['top1']),
            xytext=(0, 0),
            textcoords='offset points',
            fontsize=11 if ours[i] else 8,
            fontweight='bold' if ours[i] else 'normal',
            color=STYLES.get(row['kind'], OTHERS)['color'],
            arrowprops=dict(arrowstyle='-', color='0.6', lw=0.6, shrinkA=0, shrinkB=2),
        )
        label.set_in_layout(False)
        # The words alone, without the line to the point.
        size = np.array(Text.get_window_extent(label).size)
        # So far from the point is the edge of the words that faces it.
        offsets = RADII[:, None] * DIRECTIONS + (DIRECTIONS - 1) / 2 * size
        boxes = _boxes(points[i] + offsets, size)
        gaps = _distances(boxes, points)
        astray = np.delete(gaps, i, axis=1).min(axis=1) <= gaps[:, i]
        costs = RADII + _covered(boxes, np.array(taken), ax.bbox.extents) + 30 * astray
        best = int(costs.argmin())
        label.set_position(boxes[best, :2] - points[i])
        label.arrow_patch.set_visible(bool(RADII[best] > 8 or astray[best]))
        taken.append(boxes[best] + (-3, -1, 3, 1))


def _boxes(corners: np.ndarray, size: tuple[float, float]) -> np.ndarray:
    """Give boxes of one size their upper right corners."""
    return np.concatenate((corners, corners + size), axis=1)


def _covered(boxes: np.ndarray, taken: np.ndarray, panel: np.ndarray) -> np.ndarray:
    """Return how much each box would cover, and leave the panel, in pixels."""

    def common(others: np.ndarray) -> np.ndarray:
        low = np.maximum(boxes[:, None, :2], others[:, :2])
        high = np.minimum(boxes[:, None, 2:], others[:, 2:])
        return (high - low).clip(0).prod(axis=2)

    shared = common(taken)
    outside = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1) - common(panel[None])[:, 0]
    return (shared + 10 * (shared > 0)).sum(axis=1) + 10 * outside


def _distances(boxes: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Return how far each point is from each box: (boxes, points), in pixels."""
    gaps = np.maximum(boxes[:, None, :2] - points, points - boxes[:, None, 2:])
    return np.linalg.norm(gaps.clip(0), axis=2)
