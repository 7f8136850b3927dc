"""Local files of mmengine, written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import os.path as osp
from collections.abc import Iterator

from mmengine.fileio import LocalBackend, register_backend

from .files import write_file

__all__ = ['AtomicLocalBackend', 'atomic_local_files']


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, which replaces files at once.

    The one that it is made of writes in place: who is killed, or finds the disk
    full, leaves half a file where a whole one was. ``backend_args`` name this one
    as ``dict(backend='atomic_local')``.
    """

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes, and folders that are missing.

        Args:
            obj (bytes): What the file will hold.
            filepath (str | PathLike): The file.

        Raises:
            OSError: If it cannot be written; what was there is as it was.
        """
        os.makedirs(osp.dirname(filepath) or '.', exist_ok=True)
        write_file(filepath, obj, overwrite=True)

    def put_text(
        self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8'
    ) -> None:
        """Write text as :meth:`put` does bytes.

        Args:
            obj (str): What the file will hold.
            filepath (str | PathLike): The file.
            encoding (str): How. Defaults to ``'utf-8'``.
        """
        self.put(obj.encode(encoding), filepath)

    def copyfile_from_local(
        self, src: str | os.PathLike, dst: str | os.PathLike
    ) -> str | os.PathLike:
        """Copy a file as :meth:`put` writes one.

        Args:
            src (str | PathLike): The file.
            dst (str | PathLike): Its new path, or an existing folder.

        Returns:
            str | PathLike: The new path.
        """
        if osp.isdir(dst):
            dst = osp.join(dst, osp.basename(src))
        self.put(self.get(src), dst)
        return dst


register_backend('atomic_local', AtomicLocalBackend, force=True)


@contextlib.contextmanager
def atomic_local_files() -> Iterator[None]:
    """Let mmengine write local files through :class:`AtomicLocalBackend`.

    ``backend_args`` would reach ``Runner.save_checkpoint`` only: what publishes a
    checkpoint ignores them. Other backends stay what they are.
    """
    register_backend('local', AtomicLocalBackend, force=True, prefixes='')
    try:
        yield
    finally:
        register_backend('local', LocalBackend, force=True, prefixes='')
