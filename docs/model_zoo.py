#!/usr/bin/env python
"""Write the model-zoo tables of the README, which come from the metafiles."""

import argparse
import itertools
import sys
from pathlib import Path

import modelindex

from convmlp_mm.checkpoint import write_file
from convmlp_mm.launch.tables import format_table

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / 'README.md'
BEGIN = '<!-- model zoo: written by docs/model_zoo.py -->\n'
END = '<!-- end of model zoo -->\n'


def format_models(name: str, models: list) -> str:
    """Format the models of one collection as Markdown."""
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
    return f'### {name}\n\nMetrics: {source}.\n\n{lines}\n'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    text = 'change nothing; exit with 1 if the tables are not up to date'
    parser.add_argument('--check', action='store_true', help=text)
    args = parser.parse_args()
    index = modelindex.load(str(ROOT / 'model-index.yml'))
    index.build_models_with_collections()
    groups = itertools.groupby(index.models, lambda model: model.in_collection)
    tables = ''.join(format_models(name, list(models)) for name, models in groups)
    old = README.read_text(encoding='utf-8')
    if old.count(BEGIN) != 1 or old.count(END) != 1:
        sys.exit(f'{README} must have the lines {BEGIN}and {END}once')
    head, rest = old.split(BEGIN)
    new = f'{head}{BEGIN}\n{tables}{END}{rest.split(END)[1]}'
    if new != old and args.check:
        sys.exit('README.md: run docs/model_zoo.py')
    write_file(README, new, overwrite=True)


if __name__ == '__main__':
    main()
