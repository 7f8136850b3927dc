"""Tables and charts of what was measured, beside what is published."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.fileio import load

from ..analysis.complexity import measure_complexity
from ..analysis.output import format_table
from ..analysis.tradeoff import OTHERS, OURS, STYLES, place_labels
from ..zoo import TOOLKITS, carried_folder, mim_folder
from .rounds import Measurement
from .steps import MATMUL, MATMUL_SIZE, Job, spec_config

__all__ = ['count_macs', 'draw_chart', 'find_top1', 'results_table']

DATASET = 'ImageNet-1k'
# What mmpretrain appends to the name of a model: GPUs, batch size, data.
RECIPE = re.compile(r'_\d+xb\d+.*$')
HEADER = ('model', 'batch', 'shape', 'ms', 'q1', 'q3', 'images/s', 'ratio', 'GMACs')
HEADER += ('GFLOP/s', 'MiB', 'top-1', 'top-1 from')


def find_top1(name: str) -> tuple[float, str] | None:
    """Look up the published accuracy of a classifier.

    Args:
        name (str): See :func:`convmlp_mm.zoo.find_config`.

    Returns:
        tuple[float, str], optional: Top-1 accuracy on ImageNet-1k in percent, and
        who says so: ``'paper'``, which is Table 3 of the ConvMLP paper, else the
        toolkit in its metafile. None if neither has the model.
    """
    name = name.removeprefix('convmlp_mm::').removesuffix('.py')
    for row in load(carried_folder() / 'tools' / 'paper_tables.yml')['table_3']:
        if row['config'] == name and row.get('part') is None and 'differs' not in row:
            return row['top1'], 'paper'
    scope, _, rest = name.rpartition('::')
    if scope not in TOOLKITS:
        return None
    path = mim_folder(scope) / 'configs' / Path(rest).parent / 'metafile.yml'
    entries = load(path)['Models'] if path.is_file() else []
    entries = [e for e in entries if e.get('Config') == f'configs/{rest}.py']
    # Weights that were trained on more pictures name the same configuration.
    entries = [e for e in entries if e['Name'] == Path(rest).name] or entries
    for result in (entries[0].get('Results') or []) if len(entries) == 1 else []:
        top1 = result['Metrics'].get('Top 1 Accuracy')
        if result.get('Dataset') == DATASET and top1 is not None:
            return float(top1), scope
    return None


def count_macs(job: Job) -> int | None:
    """Count the multiply-accumulates of one picture.

    Args:
        job (Job): What is measured.

    Returns:
        int, optional: Those of the forward pass; None if they cannot be counted, or
        if the model predicts, of which post-processing is a part.
    """
    if job.predict:
        return None
    try:
        return measure_complexity(spec_config(job.spec.name), job.shape).macs
    except ValueError:
        return None


def results_table(
    found: Sequence[Measurement],
    macs: Sequence[int | None],
    top1: Sequence[tuple[float, str] | None],
    style: str = 'text',
) -> str:
    """Format what was measured.

    Milliseconds are those of one step: median and quartiles of the rounds. The ratio
    is that of the images per second to the first row's, see
    :meth:`Measurement.ratio`. Columns that no model has something for are left out.

    Args:
        found (Sequence[Measurement]): Of the models.
        macs (Sequence[int | None]): See :func:`count_macs`.
        top1 (Sequence[tuple[float, str] | None]): See :func:`find_top1`.
        style (str): See :func:`format_table`. Defaults to ``'text'``.

    Returns:
        str: The table.
    """
    rows = [
        _row(*columns, first=found[0], exact=style == 'csv')
        for columns in zip(found, macs, top1)
    ]
    kept = [i for i in range(len(HEADER)) if any(row[i] != '-' for row in rows)]
    rows = [[row[i] for i in kept] for row in rows]
    return format_table([HEADER[i] for i in kept], rows, style)


def _row(
    found: Measurement,
    macs: int | None,
    top1: tuple[float, str] | None,
    first: Measurement,
    exact: bool,
) -> list[str]:
    def figure(value: float, digits: int) -> str:
        return f'{value:.{6 if exact else digits}f}'

    job = found.job
    low, median, high = found.quartiles
    times = [figure(1e3 * n, 2 if median < 0.1 else 1) for n in (median, low, high)]
    if job.spec.name == MATMUL:
        rate = figure(2 * MATMUL_SIZE**3 / median / 1e9, 1)
        size = f'{MATMUL_SIZE}x{MATMUL_SIZE}'
        return [job.spec.text, '-', size, *times, *'---', rate, *'---']
    rate = '-'
    if macs is not None and job.mode == 'infer':
        rate = figure(2 * macs * job.batch_size / median / 1e9, 1)
    return [
        job.spec.text,
        str(job.batch_size),
        '{}x{}'.format(*job.shape),
        *times,
        figure(job.batch_size / median, 1),
        figure(found.ratio(first), 3),
        '-' if macs is None else figure(macs / 1e9, 3),
        rate,
        figure(found.memory / 2**20, 0),
        '-' if top1 is None else str(float(top1[0])),
        '-' if top1 is None else top1[1],
    ]


def draw_chart(
    found: Sequence[Measurement],
    top1: Sequence[tuple[float, str] | None],
    title: str,
) -> Figure:
    """Draw what was measured.

    Where each model has a published accuracy and none comes twice, accuracy against
    images per second, else bars of the milliseconds; both with quartiles.

    Args:
        found (Sequence[Measurement]): Of the models.
        top1 (Sequence[tuple[float, str] | None]): See :func:`find_top1`.
        title (str): How it was measured.

    Returns:
        Figure: The chart.
    """
    pairs = [(m, t) for m, t in zip(found, top1) if m.job.spec.name != MATMUL]
    names = {m.job.spec.name for m, _ in pairs}
    scatter = 1 < len(pairs) == len(names) and all(t for _, t in pairs)
    height = 5.6 if scatter else 1.4 + 0.42 * len(found)
    # As place_labels needs it.
    figure = Figure(figsize=(9, height), dpi=72, layout='constrained')
    figure.suptitle(textwrap.fill(title, 120), fontsize=9)
    if scatter:
        _draw_points(figure, pairs)
    else:
        _draw_bars(figure, found)
    return figure


def _draw_points(figure: Figure, pairs: list) -> None:
    rows = []
    for measurement, (accuracy, source) in pairs:
        job = measurement.job
        low, median, high = measurement.quartiles
        rates = [job.batch_size / n for n in (high, median, low)]
        backbone = spec_config(job.spec.name).model.get('backbone') or {}
        rows.append(
            dict(
                name=_short_name(job.spec.text),
                kind=OURS if backbone.get('type') == 'ConvMLP' else 'others',
                top1=accuracy,
                rate=rates[1],
                spread=(rates[1] - rates[0], rates[2] - rates[1]),
                source=source,
            )
        )
    ax = figure.subplots()
    for kind, style in ((OURS, STYLES[OURS]), ('others', OTHERS)):
        points = [row for row in rows if row['kind'] == kind]
        if points:
            ax.errorbar(
                [row['rate'] for row in points],
                [row['top1'] for row in points],
                xerr=list(zip(*(row['spread'] for row in points))),
                linestyle='none',
                markersize=14 if kind == OURS else 6,
                capsize=2,
                label=kind,
                **style,
            )
    ax.set_xscale('log')
    _set_ticks(ax, [row['rate'] for row in rows])
    sources = sorted({row['source'] for row in rows})
    said = ' and '.join(
        'Table 3 of the ConvMLP paper' if s == 'paper' else f'metafiles of {s}'
        for s in sources
    )
    ax.set_xlabel('images per second (median and quartiles)')
    ax.set_ylabel(f'{DATASET} top-1 accuracy (%), as published')
    ax.set_title(f'accuracies: {said}', fontsize=9)
    ax.margins(0.15, 0.12)
    ax.grid(alpha=0.25)
    figure.draw_without_rendering()
    whiskers = []
    for row in rows:
        rate, (below, above) = row['rate'], row['spread']
        ends = [(rate - below, row['top1']), (rate + above, row['top1'])]
        corners = ax.transData.transform(ends) + ((-3, -4), (3, 4))
        whiskers.append(corners.ravel())
    place_labels(ax, rows, 'rate', whiskers)


def _set_ticks(ax: object, values: list[float]) -> None:
    """Label 1, 2 and 5 of each power of ten around the values."""
    ticks = [m * 10.0**e for e in range(-4, 7) for m in (1, 2, 5)]
    low, high = min(values), max(values)
    inside = [n for n in ticks if low / 2 <= n <= high * 2]
    ax.set_xlim(low / 1.4, high * 1.4)
    ax.set_xticks(inside, [f'{n:g}' for n in inside])
    ax.minorticks_off()
    ax.set_xlim(low / 1.4, high * 1.4)


def _short_name(text: str) -> str:
    name, at, options = text.partition('@')
    name = name.rpartition('::')[2].rpartition('/')[2].removesuffix('.py')
    return RECIPE.sub('', name).removesuffix('_imagenet') + at + options


def _draw_bars(figure: Figure, found: Sequence[Measurement]) -> None:
    quartiles = [[1e3 * n for n in m.quartiles] for m in found]
    medians = [median for _, median, _ in quartiles]
    spread = [(m - low, high - m) for low, m, high in quartiles]
    labels = [m.job.spec.text for m in found]
    ax = figure.subplots()
    ax.barh(range(len(found)), medians, color='#0072B2', alpha=0.75, height=0.62)
    ax.errorbar(
        medians,
        range(len(found)),
        xerr=list(zip(*spread)),
        linestyle='none',
        color='#202020',
        capsize=3,
    )
    for i, (median, (_, above)) in enumerate(zip(medians, spread)):
        text = f'{median:.3g}' if median < 1000 else f'{median:.0f}'
        ax.annotate(
            text,
            (median + above, i),
            xytext=(5, 0),
            textcoords='offset points',
            va='center',
            fontsize=9,
        )
    ax.set_yticks(range(len(found)), labels)
    ax.invert_yaxis()
    ax.set_xlim(0, 1.12 * max(high for _, _, high in quartiles))
    ax.set_xlabel('milliseconds of a step (median and quartiles)')
    ax.grid(axis='x', alpha=0.25)
    for side in ('top', 'right'):
        ax.spines[side].set_visible(False)
