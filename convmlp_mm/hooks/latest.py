"""Which checkpoint a run can be resumed from."""

from __future__ import annotations

import logging
import os
import os.path as osp
import re
from collections import defaultdict
from numbers import Real

import numpy as np
import torch
from mmengine.logging import HistoryBuffer, print_log

from ..checkpoint_io import HASH_IN_NAME, read_checkpoint
from ..weights import find_not_finite
from .exact_resume import KEY, check_state
from .work_dir import KEY as LAUNCH

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
    *_, named = None, *_named(os.fspath(work_dir))[1]
    return named


def _named(work_dir: str) -> tuple[str, list[str]]:
    """Return what ``last_checkpoint`` says, and the files that it may mean.

    The one in the folder comes first: the run may have been moved, or copied.
    """
    note = osp.join(work_dir, NOTE)
    try:
        # Anything else may keep a reader waiting.
        if not osp.isfile(note):
            return '', []
        with open(note, encoding='utf-8') as file:
            named = file.read().strip()
    except (OSError, UnicodeDecodeError):
        return '', []
    if '://' in named:
        return named, [named]
    paths = [osp.join(work_dir, osp.basename(named)), named]
    paths = [path for path in paths if osp.isfile(path)]
    if len(paths) == 2 and osp.samefile(*paths):
        paths.pop()
    return named, paths


def _others(work_dir: str, named: list[str]) -> list[list[str]]:
    """List further checkpoints of the run: by their kind of name, the latest first."""
    folders = {osp.realpath(work_dir): work_dir}
    for path in named:
        # This is where out_dir of CheckpointHook may be.
        if '://' not in path:
            folders.setdefault(osp.realpath(osp.dirname(path)), osp.dirname(path))
    files = defaultdict(list)
    for folder in filter(osp.isdir, folders.values()):
        with os.scandir(folder) as entries:
            for entry in entries:
                if (
                    entry.name.endswith('.pth')
                    and not entry.name.startswith(('best_', '.'))
                    and not HASH_IN_NAME.search(entry.name)
                    and entry.is_file()
                    and entry.path not in named
                ):
                    numbers = [int(n) for n in re.findall(r'\d+', entry.name)]
                    key = numbers, entry.stat().st_mtime_ns, entry.path
                    files[folder, re.sub(r'\d+', '', entry.name)].append(key)
    return [[k[-1] for k in sorted(keys, reverse=True)] for keys in files.values()]


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
    work_dir: str | os.PathLike, launch: str | None = None
) -> str | None:
    """Find the newest checkpoint of a run that the run can go on from.

    It is the one that ``last_checkpoint`` names, or else the ``*.pth`` of the folder
    that has the most iterations; of files whose names differ in their number alone,
    the first that opens counts. Each is read as :func:`read_checkpoint` does. The best
    ones (``best_*``) and published ones have no state of the optimizer and are passed
    over. Those that do not open, or lack what it takes, are reported in one warning
    each.

    Args:
        work_dir (str | PathLike): The folder of the run. It may have been moved:
            what ``last_checkpoint`` names is looked for here first.
        launch (str, optional): Pass over checkpoints that another launch has saved,
            see :class:`convmlp_mm.hooks.work_dir.LaunchHook`. Defaults to None, which
            means any.

    Returns:
        str | None: A path or URL, or None if there is no such checkpoint.

    Raises:
        ValueError: If there are checkpoints and none can be resumed from: to start
            from the beginning would write over them.
    """
    work_dir, failed = os.fspath(work_dir), []

    def read(path: str) -> tuple[int, str | None, str | None] | None:
        """Return the iteration, the launch, and where the file was saved."""
        try:
            content = read_checkpoint(path)
            check_resumable(content)
            if 'optimizer' not in content:
                raise ValueError('it has no optimizer')
            meta, info = content['meta'], content['message_hub']['runtime_info']
            return meta['iter'], meta.get(LAUNCH), info.get('last_ckpt')
        # Of damaged bytes, unpickling makes any exception there is.
        except Exception as error:
            lines = str(error).splitlines() or [type(error).__name__]
            failed.append(repr(path))
            print_log(
                f'checkpoint {path!r} cannot be resumed from: {lines[0]}',
                logger='current',
                level=logging.WARNING,
            )

    note, named = _named(work_dir)
    for path in named:
        if (content := read(path)) is None:
            continue
        _, its_launch, saved_at = content
        # A file of this name in the work dir may be of a former run, when the one of
        # the note saves elsewhere.
        if path == named[-1] or saved_at in (None, note):
            # Each save writes the note, so that a launch has none beside it.
            return path if launch in (None, its_launch) else None
    found = []
    for paths in _others(work_dir, named):
        for path in paths:
            content = read(path)
            if content is not None and launch in (None, content[1]):
                found.append((content[0], osp.getmtime(path), path))
                break
    if found:
        return max(found)[-1]
    if failed:
        more = f' and {len(failed) - 1} more' if failed[1:] else ''
        raise ValueError(
            f'no checkpoint in {work_dir!r} can be resumed from, not even {failed[0]}'
            f'{more}, as said above; move them away to start from the beginning, which '
            'would write over them'
        )
    return None
