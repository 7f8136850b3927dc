"""Write files so that nobody ever finds half of one."""

from __future__ import annotations

import contextlib
import os
import os.path as osp
import re
import tempfile

__all__ = ['check_output', 'remove_leftovers', 'write_file']

# What mkstemp makes of the prefix and suffix below.
LEFTOVER = re.compile(r'\..+\.[a-z0-9_]{8}\.tmp')


def check_output(path: str | os.PathLike, overwrite: bool = False) -> None:
    """Check that a file can be written, before the work for it is done.

    Args:
        path (str | PathLike): The file.
        overwrite (bool): Whether it may be there already. Defaults to False.

    Raises:
        FileNotFoundError: If its folder does not exist.
        FileExistsError: If it is there and must not be.
        IsADirectoryError: If it is a folder.
    """
    folder = osp.dirname(path) or '.'
    if not osp.isdir(folder):
        raise FileNotFoundError(f'folder {folder!r} does not exist')
    if osp.isdir(path):
        raise IsADirectoryError(f'{os.fspath(path)!r} is a folder')
    if osp.exists(path) and not overwrite:
        raise FileExistsError(f'{os.fspath(path)!r} is already there')


def write_file(
    path: str | os.PathLike, content: bytes | str, overwrite: bool = False
) -> None:
    """Write all of a file or nothing.

    Args:
        path (str | PathLike): The file.
        content (bytes | str): What it will hold; text becomes UTF-8.
        overwrite (bool): Whether to replace a file that is there. Defaults to
            False.

    Raises:
        OSError: See :func:`check_output`; and if the disk is full. A file
            that was there before is then as it was.
    """
    check_output(path, overwrite)
    if isinstance(content, str):
        content = content.encode()
    # In the same folder: only there can it be renamed at once.
    folder, name = osp.split(os.fspath(path))
    file, temporary = tempfile.mkstemp('.tmp', f'.{name}.', folder or '.')
    try:
        with os.fdopen(file, 'wb') as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp lets nobody else read.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    _flush_folder(folder or '.')


def _flush_folder(folder: str) -> None:
    """Let the new name of a file survive a loss of power, where that can be asked."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_leftovers(folder: str | os.PathLike) -> list[str]:
    """Remove what :func:`write_file` had not finished when its process was killed.

    Args:
        folder (str | PathLike): Nobody must be writing into it.

    Returns:
        list[str]: The names of the files.

    Raises:
        OSError: If the folder cannot be read or written.
    """
    names = sorted(name for name in os.listdir(folder) if LEFTOVER.fullmatch(name))
    for name in names:
        os.unlink(osp.join(folder, name))
    return names
