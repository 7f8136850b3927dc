#!/usr/bin/env python
"""Count again the efficiency columns of the paper's tables.

Writes ``efficiency.md`` (Tables 2, 3, 5, 6 and 7: the paper's figures, from
tools/paper_tables.yml, beside what this package, mmpretrain, mmdet and timm build)
and ``efficiency.png`` and ``.svg`` (top-1 accuracy against MACs and parameters).
Accuracies are the paper's: nothing is trained or evaluated.
"""

import argparse
import contextlib
import importlib
import io
import sys
from pathlib import Path

import yaml
from mmengine.config import Config

from convmlp_mm.analysis.complexity import Complexity, measure_complexity
from convmlp_mm.analysis.output import format_table
from convmlp_mm.analysis.tradeoff import draw_tradeoff
from convmlp_mm.config_files import find_config
from convmlp_mm.files import write_file
from convmlp_mm.launch import one_line_errors

ROOT = Path(__file__).resolve().parents[1]
PAPER = Path(__file__).with_suffix('.yml')
LIBRARIES = ('torch', 'mmengine', 'mmpretrain', 'mmdet', 'mmseg', 'timm')
GROUPS = dict(
    small='Small models (5 M to 15 M parameters)',
    medium='Medium-sized models (16 M to 30 M)',
    large='Large models (more than 30 M)',
)
SYSTEMS = dict(
    table_5=('Table 5: RetinaNet on COCO', 'RetinaNet backbone'),
    table_6=('Table 6: Mask R-CNN on COCO', 'Mask R-CNN backbone'),
    table_7=('Table 7: Semantic FPN on ADE20K', 'Semantic FPN backbone'),
)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        '--out-dir',
        type=Path,
        default=ROOT / 'docs',
        help='folder to write to; by default docs/ of this checkout',
    )
    return parser.parse_args(argv)


def read_paper() -> dict[str, list[dict]]:
    """Read what the paper's tables say: rows by table."""
    return yaml.safe_load(PAPER.read_text(encoding='utf-8'))


def count(row: dict) -> Complexity | None:
    """Count what builds a row of the paper."""
    if row['config'] is None:
        return None
    cfg = find_config(row['config'])
    if row.get('part') == 'backbone':
        importlib.import_module('mmdet.models')
        backbone = dict(cfg.model.backbone, _scope_=cfg.default_scope)
        model = dict(type='ImageClassifier', backbone=backbone)
        cfg = Config(dict(default_scope='mmpretrain', model=model))
    shape = (row['size'], row['size']) if 'size' in row else None
    return measure_complexity(cfg, shape, row['config'])


def beside(value: float | None, paper: float, digits: int) -> str:
    """Format a count with its difference to the paper's figure."""
    if value is None:
        return '-'
    # + 0.0 takes the sign of a zero away.
    difference = round(value - paper, digits) + 0.0
    return f'{value:.{digits}f} ({difference:+.{digits}f})'


def table_3(rows: list[dict], costs: list[Complexity | None]) -> str:
    """Format the comparison of classifiers."""
    header = ['model', 'kind', 'params (M)', 'counted', 'GMACs', 'counted', 'top-1']
    header += ['Acc/GMACs', 'counted', 'Acc/MParams', 'counted', 'counted is']
    parts, notes, missing = [], [], []
    for group, title in GROUPS.items():
        lines = []
        for row, cost in zip(rows, costs):
            if row['group'] != group:
                continue
            mark = ''
            note = row.get('differs') or row.get('note')
            if note:
                notes.append(f'{len(notes) + 1}. {row["name"]}: {note}')
                mark = f' [{len(notes)}]'
            if cost is None:
                missing.append(f'- {row["name"]}: {row["missing"]}')
            lines.append(classifier(row, cost, mark))
        parts.append(f'{title}:\n\n{format_table(header, lines, "markdown", (0, 1))}')
    parts.append('Notes:\n\n' + '\n'.join(notes) + '\n')
    parts.append(
        'Rows that none of these libraries can build, so that nothing was counted:\n\n'
        + '\n'.join(missing)
        + '\n'
    )
    odd = odd_ratios(rows)
    parts.append(
        'Ratios of the paper that do not follow from its own accuracy, GMACs and '
        f'parameters, however these were rounded: {odd}.\n'
    )
    return '\n'.join(parts)


def classifier(row: dict, cost: Complexity | None, mark: str) -> list[str]:
    """Format one row of Table 3."""
    params = gmacs = per_gmac = per_mparam = None
    if cost is not None:
        params, gmacs = cost.params / 1e6, cost.macs / 1e9
        if 'differs' not in row:
            per_gmac, per_mparam = row['top1'] / gmacs, row['top1'] / params
    name = row['name'] + (' at 380 x 380' if row['size'] == 380 else '')
    return [
        name + mark,
        row['kind'],
        f'{row["params"]:.1f}',
        beside(params, row['params'], 2),
        f'{row["gmacs"]:.1f}',
        beside(gmacs, row['gmacs'], 2),
        f'{row["top1"]:.1f}',
        f'{row["acc_per_gmac"]:.1f}',
        beside(per_gmac, row['acc_per_gmac'], 1),
        f'{row["acc_per_mparam"]:.1f}',
        beside(per_mparam, row['acc_per_mparam'], 1),
        f'`{row["config"]}`' if cost is not None else '-',
    ]


def odd_ratios(rows: list[dict]) -> str:
    """List the ratios that no figures which round to the printed ones can have."""
    found = []
    half = 0.05
    for row in rows:
        for key, of in (('acc_per_gmac', 'gmacs'), ('acc_per_mparam', 'params')):
            least = (row['top1'] - half) / (row[of] + half) - half
            most = (row['top1'] + half) / (row[of] - half) + half
            if not least <= row[key] <= most:
                found.append(
                    f'{row["name"]}, {row["top1"]} / {row[of]} is '
                    f'{row["top1"] / row[of]:.2f}, printed {row[key]}'
                )
    return '; '.join(found) or 'none'


def table_2(rows: list[dict], costs: list[Complexity]) -> str:
    """Format the ablation."""
    header = ['switched on', 'epochs', 'params (M)', 'counted', 'GMACs', 'counted']
    lines = [
        [
            row['name'],
            str(row['epochs']),
            f'{row["params"]:.2f}',
            beside(cost.params / 1e6, row['params'], 2),
            f'{row["gmacs"]:.2f}',
            beside(cost.macs / 1e9, row['gmacs'], 2),
            f'{row["top1"]:.2f}',
            f'`{row["config"]}`',
        ]
        for row, cost in zip(rows, costs)
    ]
    return format_table([*header, 'top-1', 'counted is'], lines, 'markdown')


def system_table(name: str, rows: list[dict], costs: list[Complexity]) -> str:
    """Format the parameters of detectors or segmentors."""
    title, column = SYSTEMS[name]
    header = [column, 'params (M)', 'all', 'trainable', 'GMACs', 'counted is']
    lines = [
        [
            row['name'],
            f'{row["params"]:.1f}',
            beside(cost.params / 1e6, row['params'], 2),
            beside(cost.trainable / 1e6, row['params'], 2),
            f'{cost.macs / 1e9:.2f}',
            f'`{row["config"]}`',
        ]
        for row, cost in zip(rows, costs)
    ]
    size = '{} x {}'.format(*costs[0].shape)
    return (
        f'### {title}\n\nGMACs at {size}, which the paper does not give.\n\n'
        + format_table(header, lines, 'markdown')
    )


def document(paper: dict, costs: dict) -> str:
    """Write the whole page."""
    # Without what torch adds on the build for a GPU, which counts nothing.
    versions = ', '.join(
        f'{name} {importlib.import_module(name).__version__.partition("+")[0]}'
        for name in LIBRARIES
    )
    systems = '\n'.join(
        system_table(name, paper[name], costs[name]) for name in SYSTEMS
    )
    return PAGE.format(
        versions=versions,
        table_3=table_3(paper['table_3'], costs['table_3']),
        table_2=table_2(paper['table_2'], costs['table_2']),
        systems=systems,
    )


PAGE = """# Efficiency: the paper's figures, counted again

<!-- Written by the command below: do not edit. -->

```shell
python tools/paper_tables.py
```

with {versions}.

![Top-1 accuracy against multiply-accumulates and
parameters](efficiency.png)

*The paper's Table 3 as a picture: further up and to the left is better. All figures
in it are the paper's.*

**Accuracies are the paper's own throughout; nothing was trained or evaluated for this
page.** "Counted" is what the configuration in the last column has, with the difference
to the paper in brackets: all parameters, and the multiply-accumulates of convolutions
and matrix products, attention included, as `tools/complexity.py` prints them. Ratios
that are counted divide the paper's accuracy by these; the paper divides by its rounded
figures, which shows most where these are small.

## Table 3: classifiers on ImageNet-1k

At 224 x 224 except where the name says another size.

{table_3}
## Table 2: ablation of ConvMLP-S

The paper does not describe the conv stage of its rows 2 to 6; the configurations have
the released one, that of row 7. So they have about 0.3 M parameters and 0.7 GMACs more
than these rows, and row 6, which differs from row 7 by the conv stage only, is counted
as row 7. Rows 1 and 7 are what the paper has, and the steps between rows 2 to 5 (what
downsampling and depth-wise convolutions add) are the paper's.

{table_2}
## Tables 5, 6 and 7: detectors and segmentors

The paper's parameters of the ResNet detectors are those that are trained: the
toolkit's recipe freezes the stem and the first stage, 0.16 M in ResNet-18 and 0.23 M in
the others. In ConvMLP and in Semantic FPN nothing is frozen.

{systems}"""


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    with one_line_errors(), contextlib.redirect_stdout(sys.stderr):
        if not args.out_dir.is_dir():
            raise FileNotFoundError(f'folder {str(args.out_dir)!r} does not exist')
        paper = read_paper()
        costs = {name: [count(row) for row in rows] for name, rows in paper.items()}
    write_file(args.out_dir / 'efficiency.md', document(paper, costs), True)
    figure = draw_tradeoff(paper['table_3'])
    for ending, metadata in (('png', {'Software': None}), ('svg', {'Date': None})):
        stream = io.BytesIO()
        figure.savefig(stream, format=ending, dpi=110, metadata=metadata)
        write_file(args.out_dir / f'efficiency.{ending}', stream.getvalue(), True)


if __name__ == '__main__':
    main()
