"""Write files so that nobody ever finds half of one."""

from __future__ import annotations

import os
import os.path as osp
import tempfile

__all__ = ['check_output', 'write_file']


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
    file, temporary = tempfile.mkstemp(dir=osp.dirname(path) or '.', prefix='.')
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
