#!/usr/bin/env python
"""Count again the efficiency columns of the paper's Tables 2, 3, 5, 6 and 7.

Writes the marked tables of docs/efficiency.md (the paper's figures, from
paper_tables.yml, beside what this package, mmpretrain, mmdet and timm build) and
efficiency.png (top-1 accuracy against MACs and parameters). Accuracies are the paper's:
nothing is trained or evaluated.
"""

import argparse
import contextlib
import importlib
import re
import sys
from pathlib import Path

import common
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.fileio import load

from convmlp_mm.checkpoint import write_file
from convmlp_mm.launch import one_line_errors
from convmlp_mm.launch.tables import format_table
from convmlp_mm.zoo import find_config

ROOT = Path(__file__).resolve().parents[2]
# Where complexity.py stands.
sys.path.insert(0, str(ROOT / 'tools'))
complexity = importlib.import_module('complexity')

PAPER = Path(__file__).with_suffix('.yml')
PAGE = ROOT / 'docs' / 'efficiency.md'
LIBRARIES = ('torch', 'mmengine', 'mmpretrain', 'mmdet', 'mmseg', 'timm')
SYSTEMS = dict(table_5='RetinaNet', table_6='Mask R-CNN', table_7='Semantic FPN')
# Dark enough for small words on white; the markers tell the kinds apart too.
STYLES = {
    'Convolution': dict(color='#0072B2', marker='s'),
    'Transformer': dict(color='#007A5A', marker='^'),
    'MLP': dict(color='#A3458F', marker='o'),
    'ConvMLP': dict(color='#D55E00', marker='*'),
}
# Points from a marker to its label, which is on the other side of them.
PLACES = {'right': (8, 0), 'left': (-8, 0), 'above': (0, 6), 'below': (0, -6)}
PLACES |= {'above right': (2, 5), 'above left': (-3, 5), 'below right': (4, -5)}


def count(row: dict) -> complexity.Complexity | None:
    """Count the configuration of a row of the paper, or its backbone."""
    if row['config'] is None:
        return None
    cfg = find_config(row['config'])
    if row.get('part') == 'backbone':
        importlib.import_module('mmdet.models')
        backbone = dict(cfg.model.backbone, _scope_=cfg.default_scope)
        model = dict(type='ImageClassifier', backbone=backbone)
        cfg = Config(dict(default_scope='mmpretrain', model=model))
    shape = (row['size'], row['size']) if 'size' in row else None
    return complexity.measure_complexity(cfg, shape, row['config'])


def beside(value: float | None, paper: float, printed: int, digits: int) -> list[str]:
    """Format a figure of the paper, and a count with its difference to that."""
    if value is None:
        return [f'{paper:.{printed}f}', '-']
    # + 0.0 takes the sign of a zero away.
    difference = round(value - paper, digits) + 0.0
    return [f'{paper:.{printed}f}', f'{value:.{digits}f} ({difference:+.{digits}f})']


def classifiers(paper: list[dict], costs: list) -> dict[str, str]:
    """Format Table 3: a table for each group, notes, and what nobody builds."""
    header = ['model', 'kind', 'params (M)', 'counted', 'GMACs', 'counted', 'top-1']
    header += ['Acc/GMACs', 'counted', 'Acc/MParams', 'counted', 'counted is']
    groups, notes, missing = {}, [], []
    for row, cost in zip(paper, costs):
        name = row['name'] + (' at 380 x 380' if row['size'] == 380 else '')
        note = row.get('differs') or row.get('note')
        if note:
            notes.append(f'{len(notes) + 1}. {row["name"]}: {note}\n')
            name += f' [{len(notes)}]'
        cells = [name, row['kind']]
        counted = (cost.params / 1e6, cost.macs / 1e9) if cost else (None, None)
        for key, value in zip(('params', 'gmacs'), counted):
            cells += beside(value, row[key], 1, 2)
        cells.append(f'{row["top1"]:.1f}')
        for key, value in zip(('acc_per_gmac', 'acc_per_mparam'), counted[::-1]):
            ratio = row['top1'] / value if cost and 'differs' not in row else None
            cells += beside(ratio, row[key], 1, 1)
        if cost is None:
            missing.append(f'- {row["name"]}: {row["missing"]}\n')
        cells.append(f'`{row["config"]}`' if cost else '-')
        groups.setdefault(row['group'], []).append(cells)
    tables = {k: format_table(header, v, 'markdown', (0, 1)) for k, v in groups.items()}
    return dict(tables, notes=''.join(notes), missing=''.join(missing))


def ablation(paper: list[dict], costs: list) -> str:
    """Format Table 2."""
    header = ['switched on', 'epochs', 'params (M)', 'counted', 'GMACs', 'counted']
    lines = []
    for row, cost in zip(paper, costs):
        cells = [row['name'], str(row['epochs'])]
        cells += beside(cost.params / 1e6, row['params'], 2, 2)
        cells += beside(cost.macs / 1e9, row['gmacs'], 2, 2)
        lines.append([*cells, f'{row["top1"]:.2f}', f'`{row["config"]}`'])
    return format_table([*header, 'top-1', 'counted is'], lines, 'markdown')


def systems(title: str, paper: list[dict], costs: list) -> str:
    """Format the parameters of detectors or segmentors."""
    header = [f'{title} backbone', 'params (M)', 'all', 'trainable', 'GMACs']
    lines = []
    for row, cost in zip(paper, costs):
        cells = [row['name'], *beside(cost.params / 1e6, row['params'], 1, 2)]
        cells += beside(cost.trainable / 1e6, row['params'], 1, 2)[1:]
        lines.append([*cells, f'{cost.macs / 1e9:.2f}', f'`{row["config"]}`'])
    return format_table([*header, 'counted is'], lines, 'markdown')


def fill_page(paper: dict, costs: dict) -> str:
    """Put the tables between the marks of the page."""
    # The build for a GPU, which torch adds to its version, counts nothing.
    found = [
        f'{name} {importlib.import_module(name).__version__.partition("+")[0]}'
        for name in LIBRARIES
    ]
    blocks = classifiers(paper['table_3'], costs['table_3'])
    blocks['versions'] = f'with {", ".join(found)}.\n'
    blocks['table_2'] = ablation(paper['table_2'], costs['table_2'])
    for table, title in SYSTEMS.items():
        blocks[table] = systems(title, paper[table], costs[table])
    page = PAGE.read_text(encoding='utf-8')
    for name, block in blocks.items():
        mark = re.compile(f'(?<=<!-- {name} -->\n).*?(?=<!-- end -->)', re.DOTALL)
        page = mark.sub(lambda _, block=block: f'\n{block}\n', page)
    return page


def draw_tradeoff(rows: list[dict]) -> Figure:
    """Draw top-1 accuracy against multiply-accumulates and against parameters.

    ``label`` of a row has, for each panel, a key of ``PLACES`` or the points from the
    marker to the middle of the label.
    """
    figure = Figure(figsize=(12, 6.6), layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set(xlabel='multiply-accumulates (1e9)', xscale='log', xlim=(0.15, 60))
    axes[1].set(xlabel='parameters (millions)', xscale='log', xlim=(3.8, 270))
    axes[0].set(ylabel='ImageNet-1k top-1 accuracy (%)')
    ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50), (5, 10, 20, 50, 100, 200)
    for panel, (ax, key) in enumerate(zip(axes, ('gmacs', 'params'))):
        ax.set_xticks(ticks[panel], map(str, ticks[panel]))
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        for kind, style in STYLES.items():
            ours = kind == 'ConvMLP'
            line = '-' if ours else 'none'
            points = [(row[key], row['top1']) for row in rows if row['kind'] == kind]
            look = dict(markersize=15 if ours else 6, linestyle=line, zorder=2 + ours)
            ax.plot(*zip(*points), label=kind, **look, **style)
        for row in rows:
            place = row.get('label', ('right', 'right'))[panel]
            far = not isinstance(place, str)
            x, y = offset = place if far else PLACES[place]
            look = dict(color=STYLES[row['kind']]['color'], fontsize=8)
            if row['kind'] == 'ConvMLP':
                look.update(fontsize=11, weight='bold')
            if far:
                line = dict(arrowstyle='-', color='0.6', lw=0.6, shrinkB=2)
                look.update(arrowprops=line, ha='center', va='center')
            else:
                look['ha'] = 'left' if x > 0 else 'right' if x else 'center'
                look['va'] = 'bottom' if y > 0 else 'top' if y else 'center'
            style = dict(xytext=offset, textcoords='offset points', **look)
            ax.annotate(row['name'], (row[key], row['top1']), **style)
    axes[1].legend(loc='lower right', title='figures: paper, Table 3')
    return figure


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = 'folder to write to; default: docs/ of this checkout'
    parser.add_argument('--out-dir', type=Path, default=PAGE.parent, help=text)
    args = parser.parse_args(argv)
    with one_line_errors(), contextlib.redirect_stdout(sys.stderr):
        if not args.out_dir.is_dir():
            raise FileNotFoundError(f'folder {str(args.out_dir)!r} does not exist')
        paper = load(PAPER)
        costs = {name: [count(row) for row in rows] for name, rows in paper.items()}
    write_file(args.out_dir / PAGE.name, fill_page(paper, costs), True)
    content = common.to_png(draw_tradeoff(paper['table_3']), 110)
    write_file(args.out_dir / 'efficiency.png', content, True)


if __name__ == '__main__':
    main()
