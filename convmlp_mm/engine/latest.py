"""Which checkpoint a run can be resumed from."""

from __future__ import annotations

import logging
import math
import os
import os.path as osp
from collections.abc import Iterator
from numbers import Real

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from ..checkpoint_io import HASH_IN_NAME, read_checkpoint
from ..weights import find_not_finite
from .exact_resume import KEY, check_state

__all__ = ['check_resumable', 'find_latest_checkpoint', 'named_checkpoint']

# The file in which the Runner notes its last checkpoint.
NOTE = 'last_checkpoint'


def named_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """Find the checkpoint that ``last_checkpoint`` names.

    Args:
        work_dir (str | PathLike): The folder of the run, which may have been
            moved since.

    Returns:
        str | None: A path or URL, or None if there is none.
    """
    try:
        with open(osp.join(work_dir, NOTE), encoding='utf-8') as file:
            named = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return None
    if not named or '://' in named:
        return named or None
    # First where the run is now: of a copy, the old place may still be there. Of a run
    # that saves elsewhere, a former one may have left such a name here.
    paths = (osp.join(work_dir, osp.basename(named)), named)
    paths = [path for path in paths if osp.exists(path)]
    noted = osp.getmtime(osp.join(work_dir, NOTE))
    return max(paths, key=lambda path: _before(noted, path), default=None)


def _before(noted: float, path: str) -> float:
    """Return when a file was written, in seconds, the lowest if after its note."""
    written = osp.getmtime(path)
    # The resolution of some file systems.
    return written if written <= noted + 2 else -math.inf


def _candidates(work_dir: str) -> Iterator[str]:
    """List what may be checkpoints of the run, the likeliest first."""
    named = named_checkpoint(work_dir)
    if named is not None:
        yield named
    folders = [work_dir]
    if named is not None and '://' not in named:
        # Where out_dir of CheckpointHook is.
        folders.append(osp.dirname(named))
    files = {}
    for folder in filter(osp.isdir, folders):
        with os.scandir(folder) as entries:
            for entry in entries:
                if (
                    entry.name.endswith('.pth')
                    and not entry.name.startswith(('best_', '.'))
                    and not HASH_IN_NAME.search(entry.name)
                    and entry.is_file()
                ):
                    files[osp.realpath(entry.path)] = entry
    if named is not None:
        files.pop(osp.realpath(named), None)
    for entry in sorted(
        files.values(), key=lambda e: e.stat().st_mtime_ns, reverse=True
    ):
        yield entry.path


def check_resumable(checkpoint: dict) -> None:
    """Check that the Runner can go on from a checkpoint.

    Args:
        checkpoint (dict): What the file holds, after
            :func:`~convmlp_mm.checkpoint_io.check_content`. Its logs are made again
            from their numbers.

    Raises:
        ValueError: If something is missing, or is not what the Runner writes.
    """
    parts = ('state_dict', 'message_hub')
    missing = [key for key in parts if not checkpoint.get(key)]
    meta, hub = checkpoint.get('meta') or {}, checkpoint.get('message_hub') or {}
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
    if missing:
        raise ValueError(f'it has no {", ".join(missing)}')
    numbers = dict(epoch=meta['epoch'], iter=meta['iter'], seed=meta.get('seed') or 0)
    for key, number in numbers.items():
        if type(number) is not int or number < 0:
            raise ValueError(f'meta.{key} is {number!r}')
    for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not isinstance(hub.get(key), dict):
            raise ValueError(f'message_hub.{key} is no dict')
    for key, value in hub['runtime_info'].items():
        if str(key).startswith('best_score') and not isinstance(
            value, (Real, torch.Tensor, np.generic)
        ):
            raise ValueError(f'message_hub.runtime_info.{key} is {value!r}')
    for key, buffer in hub['log_scalars'].items():
        if isinstance(buffer, HistoryBuffer):
            try:
                numbers = [np.array(numbers, float) for numbers in buffer.data]
                hub['log_scalars'][key] = HistoryBuffer(*numbers)
            except (AssertionError, AttributeError, TypeError, ValueError):
                raise ValueError(f'message_hub.log_scalars.{key} is no log') from None
    for key, kinds in (('optimizer', dict), ('param_schedulers', (dict, list))):
        if not isinstance(checkpoint.get(key, {}), kinds):
            raise ValueError(f'its {key} is a {type(checkpoint[key]).__name__}')
    for key in ('state_dict', 'ema_state_dict', 'optimizer'):
        spoilt = next(find_not_finite(checkpoint.get(key), key), None)
        if spoilt is not None:
            raise ValueError(f'there is NaN or Inf in {spoilt}')
    if KEY in checkpoint:
        check_state(checkpoint[KEY], checkpoint)


def find_latest_checkpoint(
    work_dir: str | os.PathLike, since: float | None = None
) -> str | None:
    """Find the newest checkpoint of a run that the run can go on from.

    It is the one that ``last_checkpoint`` names, or else the ``*.pth`` of the
    folder that was written last; each is read as :func:`read_checkpoint` does.
    The best ones (``best_*``) and published ones have no state of the optimizer
    and are passed over. Those that do not open, or lack what it takes, are
    reported in one warning each.

    Args:
        work_dir (str | PathLike): The folder of the run. It may have been moved:
            what ``last_checkpoint`` names is looked for here first.
        since (float, optional): Pass over files that were last changed before
            this time, in seconds since the epoch; remote files have none. Defaults
            to None, which means no limit.

    Returns:
        str | None: A path or URL, or None if there is no such checkpoint. A
        folder, which DeepSpeed writes, is not opened.
    """
    for path in _candidates(os.fspath(work_dir)):
        try:
            if '://' not in path:
                if since is not None and os.stat(path).st_mtime < since:
                    continue
                if osp.isdir(path):
                    return path
            checkpoint = read_checkpoint(path)
            check_resumable(checkpoint)
            if 'optimizer' not in checkpoint:
                raise ValueError('it has no optimizer')
        # Of damaged bytes, unpickling makes any exception there is.
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            print_log(
                f'checkpoint {path!r} cannot be resumed from: {lines[0]}',
                logger='current',
                level=logging.WARNING,
            )
        else:
            return path
    return None
