"""Write tables and files."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

__all__ = ['FORMATS', 'check_folder', 'format_table', 'write_file']

FORMATS = ('text', 'markdown', 'csv')


def format_table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    style: str = 'text',
    left: int = 1,
) -> str:
    """Format a table.

    Args:
        header (Sequence[str]): Names of the columns.
        rows (Sequence[Sequence[str]]): Cells, as many in each row as in the header.
        style (str): ``'text'`` (columns of one width), ``'markdown'`` or
            ``'csv'``. Defaults to ``'text'``.
        left (int): How many columns are words, which stand to the left; figures
            stand to the right. Defaults to 1.

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
        rule = ['---' if i < left else '---:' for i in range(len(header))]
        return ''.join(f'| {" | ".join(row)} |\n' for row in [header, rule, *rows])
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = [
        '  '.join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in [header, *rows]
    ]
    return '\n'.join(lines) + '\n'


def check_folder(path: str | Path) -> None:
    """Check that the folder of a file to write is there, before any work.

    Args:
        path (str | Path): The file.

    Raises:
        FileNotFoundError: If its folder does not exist.
    """
    folder = Path(path).parent
    if not folder.is_dir():
        raise FileNotFoundError(f'folder {str(folder)!r} does not exist')


def write_file(path: str | Path, content: str | bytes) -> None:
    """Write all of a file or nothing; what was there before is replaced.

    Args:
        path (str | Path): The file.
        content (str | bytes): Text is written as UTF-8.
    """
    check_folder(path)
    if isinstance(content, str):
        content = content.encode()
    file, temporary = tempfile.mkstemp(dir=Path(path).parent)
    try:
        with os.fdopen(file, 'wb') as stream:
            stream.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
