"""CheckpointHook that survives kills and full disks, and resumes what is whole."""

import contextlib
import glob
import logging
import os
import os.path as osp
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import (
    HASH_IN_NAME,
    find_not_finite,
    read_checkpoint,
    remove_leftovers,
    write_file,
)
from ._mmengine import is_resumed, is_training, load_from, set_start
from .resume import KEY, check_state
from .work_dir import KEY as LAUNCH

# The file in which the Runner notes its last checkpoint.
NOTE = 'last_checkpoint'
# The key of the message hub under which a checkpoint names what a preempted run has
# saved in the middle of an epoch.
PREEMPTED_FILE = 'preempted_ckpt'


class NotSavedError(OSError):
    """A file of the run could not be written; the message is a whole sentence."""

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, for a CheckpointHook that loses none.

    ``backend_args`` name it as ``dict(backend='atomic_local')``.
    """

    def __init__(self) -> None:
        # The names of files that are to be removed.
        self.replaced: list[str] = []

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write a file whole, and folders that are missing.

        mmengine's own writes in place: a process that is killed, or finds the disk
        full, leaves half a file where a whole one was.

        Raises:
            OSError: If it cannot be written, with the file as ``filename``; what was
                there is as it was.
        """
        try:
            os.makedirs(osp.dirname(filepath) or '.', exist_ok=True)
            write_file(filepath, obj, overwrite=True)
        except OSError as error:
            raise OSError(error.errno, reason_of(error), os.fspath(filepath)) from error

    def remove(self, filepath: str) -> None:
        """Note a file: CheckpointHook removes before it saves what takes its place."""
        self.replaced.append(osp.basename(filepath))

    def rmtree(self, dir_path: str) -> None:
        """Leave a folder: no checkpoint here is one."""


register_backend('atomic_local', AtomicLocalBackend, force=True)


def reason_of(error: Exception) -> str:
    """Say in one line what is wrong; paths of temporary files help nobody."""
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return text.splitlines()[0]


# The files of a run


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    """List the hooks of a runner that save, in the order of their priority."""
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def _is_own_file(hook: CheckpointHook, folder: str, name: str) -> bool:
    """Whether there is a file with a name that the hook gives, or PreemptionHook."""
    template = r'\d+'.join(map(re.escape, re.split(r'\{.*?\}', hook.filename_tmpl)))
    pattern = rf'(best_[^/\\]+_)?{template}|iter_\d+\.pth'
    return bool(re.fullmatch(pattern, name)) and osp.isfile(osp.join(folder, name))


@master_only
def remove_checkpoint(hook: CheckpointHook, path: str) -> None:
    """Delete at once, in the main process, a file that this run has saved.

    Of ``path`` the name counts: the hook knows the folder. What is not its own stays.
    """
    name = osp.basename(path)
    if _is_own_file(hook, hook.out_dir, name):
        LocalBackend().remove(osp.join(hook.out_dir, name))


def keep_own_files(runner: Runner, info: dict, resumed: str) -> None:
    """Forget the files that a checkpoint names, unless the run has saved them.

    The hooks remove and replace what stands there. A run has saved a file that lies in
    its work dir, under one of its names, if the checkpoint lies there too.

    Args:
        runner: The runner, before its training.
        info: ``runtime_info`` in the message hub; it is changed.
        resumed: The checkpoint.
    """
    hooks, folder = checkpoint_hooks(runner), runner.work_dir
    in_place = osp.realpath(osp.dirname(resumed)) == osp.realpath(folder)
    # mmengine's own hook can save elsewhere.
    in_place = in_place and hooks and hooks[0].out_dir in (None, folder)

    def is_own(name: str) -> bool:
        return bool(in_place) and _is_own_file(hooks[0], folder, name)

    for key, value in list(info.items()):
        if key == 'keep_ckpt_ids':
            steps = [n for n in value if type(n) is int] if in_place else []
            info[key] = [n for n in steps if is_own(hooks[0].filename_tmpl.format(n))]
        elif key in ('last_ckpt', PREEMPTED_FILE) or str(key).startswith('best_ckpt'):
            name = osp.basename(str(value))
            if is_own(name):
                # The run may have been moved.
                info[key] = osp.join(folder, name)
            else:
                info.pop(key)


# What a run can be resumed from


def named_checkpoint(work_dir: str | os.PathLike) -> str | None:
    """Return the path of the checkpoint that ``last_checkpoint`` names, if it is there.

    The one in the folder comes first: the run may have been moved, or copied.
    """
    note = osp.join(work_dir, NOTE)
    try:
        # Anything but a file may keep a reader waiting.
        named = Path(note).read_text('utf-8').strip() if osp.isfile(note) else ''
    except (OSError, UnicodeDecodeError):
        return None
    paths = osp.join(work_dir, osp.basename(named)), named
    return next(filter(osp.isfile, paths), None)


def check_resumable(checkpoint: dict) -> None:
    """Raise a ValueError if the Runner cannot go on from what a checkpoint holds.

    Something is missing then, or is not what the Runner writes. The logs in it are made
    again from their numbers.
    """
    meta, hub = checkpoint.get('meta') or {}, checkpoint.get('message_hub') or {}
    missing = [key for key in ('state_dict', 'message_hub') if not checkpoint.get(key)]
    missing += [f'meta.{key}' for key in ('epoch', 'iter') if key not in meta]
    if missing:
        raise ValueError(f'it has no {", ".join(missing)}')
    for key in ('epoch', 'iter'):
        if type(meta[key]) is not int or meta[key] < 0:
            raise ValueError(f'meta.{key} is {meta[key]!r}')
    for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
        if not isinstance(hub.get(key), dict):
            raise ValueError(f'message_hub.{key} is no dict')
    for key, buffer in hub['log_scalars'].items():
        if isinstance(buffer, HistoryBuffer):
            try:
                numbers = [np.array(numbers, float) for numbers in buffer.data]
                hub['log_scalars'][key] = HistoryBuffer(*numbers)
            except (AssertionError, AttributeError, TypeError, ValueError):
                raise ValueError(f'message_hub.log_scalars.{key} is no log') from None
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
    that has the most iterations. The best ones (``best_*``) and published ones have no
    state of the optimizer and are passed over. Those that do not open, or lack what it
    takes, are reported in one warning each.

    Args:
        work_dir: The folder of the run, which may have been moved.
        launch: The only launch whose checkpoints count, see
            :class:`convmlp_mm.hooks.work_dir.LaunchHook`. Defaults to None: any.

    Returns:
        A path, or None if there is no such checkpoint.

    Raises:
        ValueError: If there are checkpoints and none can be resumed from: to start
            from the beginning would write over them.
    """
    work_dir, named = os.fspath(work_dir), named_checkpoint(work_dir)
    paths = [named] if named else []
    for path in glob.glob(osp.join(glob.escape(work_dir), '*.pth')):
        name = osp.basename(path)
        other = name.startswith('best_') or HASH_IN_NAME.search(name)
        if path != named and not other and osp.isfile(path):
            paths.append(path)
    found, failed = [], []
    for path in paths:
        try:
            content = read_checkpoint(path)
            check_resumable(content)
            if 'optimizer' not in content:
                raise ValueError('it has no optimizer')
        # Unpickling makes any exception there is of damaged bytes.
        except Exception as error:
            failed.append(repr(path))
            print_log(
                f'checkpoint {path!r} cannot be resumed from: {reason_of(error)}',
                logger='current',
                level=logging.WARNING,
            )
            continue
        meta = content['meta']
        is_of_launch = launch in (None, meta.get(LAUNCH))
        if path == named:
            # Each save writes the note, so that a launch has none beside it.
            return named if is_of_launch else None
        if is_of_launch:
            found.append((meta['iter'], osp.getmtime(path), path))
    if found:
        return max(found)[-1]
    if failed:
        more = f' and {len(failed) - 1} more' if failed[1:] else ''
        raise ValueError(
            f'no checkpoint in {work_dir!r} can be resumed from, not even {failed[0]}'
            f'{more}, as said above; move them away to start from the beginning, which '
            'would write over them'
        )
    if launch is None and osp.isfile(osp.join(work_dir, NOTE)):
        raise ValueError(
            f'{NOTE} in {work_dir!r} names no checkpoint that is there: name it by '
            f'--resume CHECKPOINT, or remove {NOTE} to start from the beginning'
        )
    return None


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Save whole files, in an order in which a good one always remains.

    All of mmengine's CheckpointHook, and:

    - Files are written beside the old ones and then take their names, so that a kill
      or a full disk leaves what was there.
    - What ``max_keep_ckpts`` and ``save_best`` replace is removed after the new file
      is there.
    - A file that cannot be saved ends the run with :class:`NotSavedError`, which
      names it and the checkpoint that is still good; the old files stay.
    - With ``resume=True`` in the runner and no ``load_from``, training goes on from
      the newest checkpoint that opens.

    Other hooks can have a method ``before_gather_state(runner)``. It is called in all
    processes before each checkpoint that a run can be resumed from,
    ``before_save_checkpoint`` before any, in the first process only.

    Args:
        kwargs: Those of CheckpointHook but for ``out_dir``, ``backend_args`` and
            ``published_keys``: checkpoints are saved in the work dir, and
            ``tools/publish_model.py`` publishes them.
    """

    def __init__(self, **kwargs) -> None:
        for key in ('out_dir', 'published_keys'):
            if kwargs.get(key) is not None:
                raise ValueError(
                    f'{key} is not for SafeCheckpointHook: it saves in the work dir, '
                    'and tools/publish_model.py publishes a checkpoint'
                )
        super().__init__(backend_args=dict(backend='atomic_local'), **kwargs)

    def before_run(self, runner: Runner) -> None:
        """Choose what the runner resumes from, if none is named."""
        if is_training(runner) and is_resumed(runner) and load_from(runner) is None:
            newest = find_latest_checkpoint(runner.work_dir)
            set_start(runner, newest is not None, newest)
            if newest is None:
                runner.logger.info(f'There is nothing to resume in {runner.work_dir}.')

    def before_train(self, runner: Runner) -> None:
        """Tidy up after a run that was killed."""
        super().before_train(runner)
        if is_main_process():
            for name in remove_leftovers(runner.work_dir):
                runner.logger.info(f'Removed {name}, of a run that was killed.')

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoints, and then remove the former ones."""
        # ``runner.val()`` alone has nothing to save.
        if is_training(runner):
            with self._saving(runner):
                super().after_val_epoch(runner, metrics)

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save the latest checkpoint and note it, and remove then what it replaces."""
        runner.call_hook('before_gather_state')
        with self._saving(runner):
            super()._save_checkpoint_with_step(runner, step, meta)
            if is_main_process():
                # The parent has written it in place, where a kill leaves an empty file.
                note = osp.join(runner.work_dir, NOTE)
                self.file_backend.put(self.last_ckpt.encode(), note)

    @contextlib.contextmanager
    def _saving(self, runner: Runner) -> Iterator[None]:
        """Remove what has been replaced, once the new files are there.

        If one cannot be saved, say in one sentence which, and what is still good.
        """
        good = self.last_ckpt or (load_from(runner) if is_resumed(runner) else None)
        good = f'the last good checkpoint is {good}' if good else 'there is none yet'
        try:
            yield
        except NotSavedError:
            raise
        except OSError as error:
            path, reason = error.filename or self.last_ckpt, reason_of(error)
            message = f'cannot save {path}: {reason}; {good}'
            raise NotSavedError(message, error.errno) from error
        # A run that goes on from an earlier checkpoint uses names again.
        values = runner.message_hub.runtime_info.values()
        in_use = {osp.basename(value) for value in values if isinstance(value, str)}
        for name in self.file_backend.replaced:
            try:
                if name not in in_use:
                    remove_checkpoint(self, name)
            except OSError as error:
                runner.logger.warning(f'Cannot remove {name}: {reason_of(error)}')
        self.file_backend.replaced.clear()
