"""Write tables."""

from __future__ import annotations

import csv
import io
from collections.abc import Collection, Sequence

__all__ = ['FORMATS', 'format_table']

FORMATS = ('text', 'markdown', 'csv')


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: str = 'text',
    left: Collection[int] = (0,),
) -> str:
    """Format a table.

    Args:
        header (Sequence[str]): Names of the columns.
        rows (Sequence[Sequence[str]]): Cells, as many in each row as in the header.
        style (str): ``'text'`` (columns of one width), ``'markdown'`` or
            ``'csv'``. Defaults to ``'text'``.
        left (Collection[int]): Columns of words, which stand to the left; figures
            stand to the right. Defaults to ``(0,)``.

    Returns:
        str: Lines, each with its end.

    Raises:
        ValueError: If there is no such style.
    """
    if style not in FORMATS:
        raise ValueError(f'format must be one of {FORMATS}, but got {style!r}')
    if style == 'csv':
        stream = io.StringIO()
        csv.writer(stream, lineterminator='\n').writerows([header, *rows])
        return stream.getvalue()
    if style == 'markdown':
        rule = ['---' if i in left else '---:' for i in range(len(header))]
        return ''.join(f'| {" | ".join(row)} |\n' for row in [header, rule, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        '  '.join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [header, *rows]
    ]
    return '\n'.join(lines) + '\n'
