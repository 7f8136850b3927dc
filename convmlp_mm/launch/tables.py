"""Tables that the tools print."""

import csv
import io
from collections.abc import Collection, Sequence

FORMATS = ('text', 'markdown', 'csv')


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: str = 'text',
    left: Collection[int] = (0,),
) -> str:
    """Format a table in one of ``FORMATS``, with the columns ``left`` flush left."""
    table = [header, *rows]
    if style == 'csv':
        stream = io.StringIO()
        csv.writer(stream, lineterminator='\n').writerows(table)
        return stream.getvalue()
    if style == 'markdown':
        table.insert(1, ['---' if i in left else '---:' for i in range(len(header))])
        return ''.join(f'| {" | ".join(row)} |\n' for row in table)
    widths = [max(map(len, column)) for column in zip(*table)]
    sides = ['<' if i in left else '>' for i in range(len(header))]
    lines = ['  '.join(map('{:{}{}}'.format, row, sides, widths)) for row in table]
    return ''.join(f'{line.rstrip()}\n' for line in lines)
