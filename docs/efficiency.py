#!/usr/bin/env python
"""Count again the efficiency columns of the paper's Tables 2, 3, 5, 6 and 7.

Writes the marked tables of efficiency.md (the paper's figures, from efficiency.yml,
beside what this package, mmpretrain, mmdet and timm build) and efficiency.png (top-1
accuracy against MACs and parameters). Accuracies are the paper's: nothing is trained or
evaluated.
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path

from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.fileio import load

from convmlp_mm.checkpoint import write_file
from convmlp_mm.launch.tables import format_table
from convmlp_mm.zoo import find_config

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent / 'tools'), str(FOLDER.parent / 'tools' / 'analysis')]
import common  # noqa: E402
import complexity  # noqa: E402

PAPER, PAGE = FOLDER / 'efficiency.yml', FOLDER / 'efficiency.md'
LABELS = dict(name='model', kind='kind', epochs='epochs', top1='top-1')
FIGURES = dict(params='params (M)', trainable='trainable (M)', gmacs='GMACs')
FIGURES |= dict(acc_per_gmac='Acc/GMACs', acc_per_mparam='Acc/MParams')
# Dark enough for small words on white; the markers tell the kinds apart too.
STYLES = {
    'Convolution': dict(color='#0072B2', marker='s'),
    'Transformer': dict(color='#007A5A', marker='^'),
    'MLP': dict(color='#A3458F', marker='o'),
    'ConvMLP': dict(color='#D55E00', marker='*', ms=15, ls='-', zorder=3),
}


def count(row: dict) -> complexity.Complexity | None:
    """Count the configuration of a row of the paper, or its backbone."""
    if row['config'] is None:
        return None
    cfg = find_config(row['config'])
    if row.get('part') == 'backbone':
        backbone = dict(cfg.model.backbone, _scope_=cfg.default_scope)
        model = dict(type='ImageClassifier', backbone=backbone)
        cfg = Config(dict(default_scope='mmpretrain', model=model))
    shape = (row['size'], row['size']) if 'size' in row else None
    return complexity.measure_complexity(cfg, shape, row['config'])


def figures(row: dict, cost: complexity.Complexity | None) -> dict[str, float]:
    """Return what is counted, in the units of the paper."""
    if cost is None:
        return {}
    found = dict(params=cost.params / 1e6, gmacs=cost.macs / 1e9)
    if 'top1' not in row:
        found['trainable'] = cost.trainable / 1e6
    elif 'acc_per_gmac' in row and 'differs' not in row:
        found['acc_per_gmac'] = row['top1'] / found['gmacs']
        found['acc_per_mparam'] = row['top1'] / found['params']
    return found


def format_rows(rows: list[tuple[dict, complexity.Complexity | None]]) -> str:
    """Format what the paper has and, after a stroke, what is counted."""
    rows = [(row, figures(row, cost)) for row, cost in rows]
    known = {key for row, found in rows for key in (*row, *found)}
    labels = [key for key in LABELS if key in known]
    columns = [key for key in FIGURES if key in known]
    lines = []
    for row, found in rows:
        cells = [str(row[key]) for key in labels]
        for key in columns:
            counted = f'{found[key]:.2f}' if key in found else '-'
            cells.append(f'{row[key]} / {counted}' if key in row else counted)
        lines.append([*cells, f'`{row["config"]}`' if found else '-'])
    header = [(LABELS | FIGURES)[key] for key in (*labels, *columns)]
    left = (0, 1) if 'kind' in labels else (0,)
    return format_table([*header, 'counted is'], lines, 'markdown', left)


def fill_page(paper: dict, costs: dict) -> str:
    """Put the tables between the marks of the page."""
    page = PAGE.read_text(encoding='utf-8')
    for table, rows in paper.items():
        pairs = zip(rows, costs[table])
        for name, group in groupby(pairs, lambda pair: pair[0].get('group')):
            head, mark, rest = page.partition(f'<!-- {name or table} -->\n')
            end = rest.index('<!-- end -->')
            page = f'{head}{mark}\n{format_rows(list(group))}\n{rest[end:]}'
    return page


def draw_tradeoff(rows: list[dict]) -> Figure:
    """Draw top-1 accuracy against multiply-accumulates and against parameters."""
    figure = Figure((12, 6.6), dpi=110, layout='constrained')
    axes = figure.subplots(1, 2, sharey=True)
    axes[0].set(xlabel='multiply-accumulates (1e9)', xscale='log', xlim=(0.15, 60))
    axes[0].set(ylabel='ImageNet-1k top-1 accuracy (%)')
    axes[1].set(xlabel='parameters (millions)', xscale='log', xlim=(3.8, 270))
    ticks = (0.2, 0.5, 1, 2, 5, 10, 20, 50), (5, 10, 20, 50, 100, 200)
    for panel, (ax, key) in enumerate(zip(axes, ('gmacs', 'params'))):
        ax.set_xticks(ticks[panel], map(str, ticks[panel]))
        ax.minorticks_off()
        ax.grid(alpha=0.25)
        for kind, style in STYLES.items():
            points = [(row[key], row['top1']) for row in rows if row['kind'] == kind]
            ax.plot(*zip(*points), label=kind, **{'ms': 6, 'ls': 'none', **style})
        for row in rows:
            x, y = row.get('label', ((8, 0), (8, 0)))[panel]
            look = dict(color=STYLES[row['kind']]['color'], fontsize=8)
            if row['kind'] == 'ConvMLP':
                look.update(fontsize=11, weight='bold')
            if abs(x) + abs(y) > 12:
                # The name is no neighbour of its marker.
                look['arrowprops'] = dict(arrowstyle='-', color='0.6', lw=0.6)
            look['ha'] = 'left' if x > 0 else 'right' if x else 'center'
            look['va'] = 'bottom' if y > 0 else 'top' if y else 'center'
            place = dict(xytext=(x, y), textcoords='offset points')
            ax.annotate(row['name'], (row[key], row['top1']), **place, **look)
    axes[1].legend(loc='lower right', title='figures: paper, Table 3')
    return figure


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    paper = load(PAPER)
    costs = {name: [count(row) for row in rows] for name, rows in paper.items()}
    write_file(PAGE, fill_page(paper, costs), True)
    figure = draw_tradeoff(paper['table_3'])
    common.save_figure(PAGE.with_suffix('.png'), figure, True)


if __name__ == '__main__':
    main()
