#!/usr/bin/env python
"""Write the model-zoo tables of the README, which come from the metafiles."""

import argparse
import sys
from pathlib import Path

import modelindex

from convmlp_mm.cli.tables import format_table
from convmlp_mm.files import write_file

ROOT = Path(__file__).resolve().parents[1]
BEGIN = '<!-- model zoo: written by tools/update_model_zoo.py -->\n'
END = '<!-- end of model zoo -->\n'


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        '--check',
        action='store_true',
        help='change nothing; exit with 1 if the tables are not up to date',
    )
    return parser.parse_args()


def zoo_tables() -> str:
    """Format the metafiles as Markdown, one table for each collection."""
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    collections = {}
    for model in index.models:
        collections.setdefault(model.in_collection, []).append(model)
    return '\n'.join(table(name, models) for name, models in collections.items())


def table(name: str, models: list) -> str:
    """Format the models of one collection."""
    rows = []
    for model in models:
        data = model.metadata.data
        row = {
            'model': f'`{model.name}`',
            'data': model.results[0].dataset,
            'params (M)': f'{data["Parameters"] / 1e6:.2f}',
            f'GMACs at {data["Input Size"]}': f'{data["FLOPs"] / 1e9:.2f}',
        }
        for result in model.results:
            row.update({key: f'{value:.1f}' for key, value in result.metrics.items()})
        row['files'] = f'[config]({model.config}), [weights]({model.weights})'
        rows.append(row)
    header = list(rows[0])
    left = [i for i, key in enumerate(header) if key in ('model', 'data', 'files')]
    lines = format_table(header, [list(row.values()) for row in rows], 'markdown', left)
    source = models[0].data['Reported By']
    return f'### {name}\n\nMetrics: {source}.\n\n{lines}'


def main() -> int:
    args = parse_args()
    readme = ROOT / 'README.md'
    text = readme.read_text(encoding='utf-8')
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        print(f'{readme} lacks the line {BEGIN if not begin else END}', file=sys.stderr)
        return 2
    new = f'{head}{BEGIN}\n{zoo_tables()}\n{END}{tail}'
    if new == text:
        return 0
    if args.check:
        print('README.md: run tools/update_model_zoo.py', file=sys.stderr)
        return 1
    write_file(readme, new, overwrite=True)
    return 0


if __name__ == '__main__':
    sys.exit(main())
