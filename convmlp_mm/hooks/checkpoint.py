"""CheckpointHook that survives kills and full disks, and resumes what is whole."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import io
import logging
import os
import os.path as osp
import re
from collections import defaultdict
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import is_main_process, master_only
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner

from ..checkpoint import (
    HASH_IN_NAME,
    find_not_finite,
    read_checkpoint,
    remove_leftovers,
    write_file,
)
from ._mmengine import is_loaded, is_resumed, is_training, load_from, set_start
from .resume import KEY, check_state
from .work_dir import KEY as LAUNCH

__all__ = [
    'AtomicLocalBackend',
    'DeferredRemovals',
    'NotSavedError',
    'SafeCheckpointHook',
    'check_resumable',
    'checkpoint_hooks',
    'find_latest_checkpoint',
    'keep_own_files',
    'named_checkpoint',
    'reason_of',
    'remove_checkpoint',
]

# The file in which the Runner notes its last checkpoint.
NOTE = 'last_checkpoint'
# Keys of the message hub in a checkpoint. The names of the files that the checkpoint
# replaces: a run that is killed before it removes them finds them there.
OUTDATED = 'outdated_ckpts'
# The name of what a preempted run has saved in the middle of an epoch.
PREEMPTED_FILE = 'preempted_ckpt'


# Files


class NotSavedError(OSError):
    """A file of the run could not be written.

    Args:
        message (str): The whole sentence.
        number (int, optional): ``errno`` of what has happened. Defaults to None.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class AtomicLocalBackend(LocalBackend):
    """mmengine's backend for local files, which replaces files at once.

    The one that it is made of writes in place: a process that is killed, or finds the
    disk full, leaves half a file where a whole one was. ``backend_args`` name this one
    as ``dict(backend='atomic_local')``.
    """

    def put(self, obj: bytes, filepath: str | os.PathLike) -> None:
        """Write bytes, and folders that are missing.

        Args:
            obj (bytes): What the file will hold.
            filepath (str | PathLike): The file.

        Raises:
            OSError: If it cannot be written; its ``filename`` is that of the file,
                and what was there is as it was.
        """
        try:
            os.makedirs(osp.dirname(filepath) or '.', exist_ok=True)
            write_file(filepath, obj, overwrite=True)
        except OSError as error:
            raise OSError(error.errno, reason_of(error), os.fspath(filepath)) from error

    def put_text(
        self, obj: str, filepath: str | os.PathLike, encoding: str = 'utf-8'
    ) -> None:
        """Write text as :meth:`put` does bytes."""
        self.put(obj.encode(encoding), filepath)


register_backend('atomic_local', AtomicLocalBackend, force=True)


class DeferredRemovals:
    """A file backend that only notes which files are to be removed.

    CheckpointHook removes what a checkpoint replaces before it saves it.

    Args:
        backend (BaseStorageBackend): It does everything else.
        names (list[str]): The names of the files are added to it.
    """

    def __init__(self, backend: object, names: list[str]) -> None:
        self.backend, self.names = backend, names

    def remove(self, filepath: str) -> None:
        """Note the name of a file."""
        self.names.append(osp.basename(filepath))

    def rmtree(self, dir_path: str) -> None:
        """Leave a folder: no checkpoint here is one."""

    def __getattr__(self, name: str) -> object:
        return getattr(self.backend, name)


def reason_of(error: Exception) -> str:
    """Say in one line what is wrong; paths of temporary files help nobody."""
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return text.splitlines()[0]


# The files of a run


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    """List the hooks of a runner that save, in the order of their priority."""
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def _is_own_name(hook: CheckpointHook, name: object) -> bool:
    """Whether a name is one that the hook gives to a file, or PreemptionHook does."""
    template = r'\d+'.join(map(re.escape, re.split(r'\{.*?\}', hook.filename_tmpl)))
    pattern = rf'(best_[^/\\]+_)?{template}|iter_\d+\.pth'
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def remove_checkpoint(hook: CheckpointHook, name: str) -> None:
    """Delete at once a file that this run has saved, if it is there.

    Args:
        hook (CheckpointHook): Of the main process; it knows the place.
        name (str): Name of the file. Others than the hook's own, and folders, stay.

    Raises:
        OSError: If it cannot be deleted.
    """
    backend = getattr(hook.file_backend, 'backend', hook.file_backend)
    path = backend.join_path(hook.out_dir, name)
    if _is_own_name(hook, name) and backend.isfile(path):
        backend.remove(path)


def keep_own_files(runner: Runner, info: dict, resumed: str) -> None:
    """Forget the files that a checkpoint names, unless the run has saved them.

    The hooks remove, publish and replace what stands there. A run has saved what lies
    where it saves, under one of its names, if the checkpoint lies there too.

    Args:
        runner (Runner): The runner, before its training.
        info (dict): ``runtime_info`` in the message hub of the checkpoint; it is
            changed.
        resumed (str): The checkpoint.
    """
    hook = next(iter(checkpoint_hooks(runner)), None)
    folder = runner.work_dir
    if hook is not None and hook.out_dir not in (None, folder):
        # CheckpointHook will do the same.
        folder = osp.join(hook.out_dir, osp.basename(folder.rstrip('/')))

    def place(path: str) -> str:
        return path if '://' in path else osp.realpath(osp.expanduser(path))

    template = getattr(hook, 'filename_tmpl', '')
    own = hook is not None and place(osp.dirname(resumed)) == place(folder)

    def is_own(name: object) -> bool:
        named = own and _is_own_name(hook, name)
        return named and not osp.isdir(osp.join(folder, name))

    for key, value in list(info.items()):
        if key == 'keep_ckpt_ids':
            steps = [n for n in value if type(n) is int] if type(value) is list else []
            info[key] = [n for n in steps if is_own(template.format(n))]
        elif key == OUTDATED:
            info[key] = list(filter(is_own, value)) if type(value) is list else []
        elif key == 'last_ckpt' or str(key).startswith('best_ckpt'):
            # The run may have been moved.
            info[key] = osp.join(folder, osp.basename(str(value)))
            if not is_own(osp.basename(info[key])):
                info.pop(key)
        elif key == PREEMPTED_FILE and not is_own(value):
            info.pop(key)


# What a run can be resumed from


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
        # Anything but a file may keep a reader waiting.
        named = Path(note).read_text('utf-8').strip() if osp.isfile(note) else ''
    except (OSError, UnicodeDecodeError):
        named = ''
    if '://' in named:
        return named, [named]
    paths = [osp.join(work_dir, osp.basename(named)), named]
    paths = [path for path in paths if osp.isfile(path)]
    if len(paths) == 2 and osp.samefile(*paths):
        paths.pop()
    return named, paths


def _others(work_dir: str, named: list[str]) -> list[list[str]]:
    """List further checkpoints of the run: by their kind of name, the latest first."""
    # The folder of what is named is where out_dir of CheckpointHook may be.
    folders = [osp.dirname(path) for path in named if '://' not in path]
    files = defaultdict(list)
    for folder in {osp.realpath(f): f for f in (*folders, work_dir)}.values():
        for path in glob.glob(osp.join(glob.escape(folder), '*.pth')):
            name = osp.basename(path)
            other = name.startswith('best_') or HASH_IN_NAME.search(name)
            if osp.isfile(path) and not other and path not in named:
                numbers = [int(n) for n in re.findall(r'\d+', name)]
                key = numbers, os.stat(path).st_mtime_ns, path
                files[folder, re.sub(r'\d+', '', name)].append(key)
    return [[k[-1] for k in sorted(keys, reverse=True)] for keys in files.values()]


def check_resumable(checkpoint: dict) -> None:
    """Check that the Runner can go on from a checkpoint.

    Args:
        checkpoint (dict): What the file holds, after
            :func:`~convmlp_mm.checkpoint.check_content`. Its logs are made again
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
    kinds = Real, torch.Tensor, np.generic
    for key, value in hub['runtime_info'].items():
        if str(key).startswith('best_score') and not isinstance(value, kinds):
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
        work_dir (str | PathLike): The folder of the run, which may have been moved.
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
        # Unpickling makes any exception there is of damaged bytes.
        except Exception as error:
            failed.append(repr(path))
            print_log(
                f'checkpoint {path!r} cannot be resumed from: {reason_of(error)}',
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
    if osp.isfile(osp.join(work_dir, NOTE)) and not note:
        # A run that was killed while it wrote the note, and that saves elsewhere.
        raise ValueError(
            f'{NOTE} in {work_dir!r} names no checkpoint any more: name it by --resume '
            f'CHECKPOINT, or remove {NOTE} to start from the beginning'
        )
    return None


def _configured_start(runner: Runner) -> str | None:
    """Read ``load_from`` from the file of the configuration.

    The train scripts of mmdet and mmpretrain drop it when they are asked to resume,
    and put what the user has named there.
    """
    filename = runner.cfg.filename
    if filename is None or not osp.isfile(filename):
        return None
    start = Config.fromfile(filename, import_custom_modules=False).get('load_from')
    # The tools have read it in the same way.
    return start and osp.expanduser(start)


# The hook


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Save whole files, in an order in which a good one always remains.

    All of mmengine's CheckpointHook, and:

    - Local files are written beside the old ones and then take their names, so that
      a kill or a full disk leaves what was there.
    - What ``max_keep_ckpts`` and ``save_best`` replace is removed after the new file
      is there.
    - A file that cannot be saved ends the run with :class:`NotSavedError`, which
      names it and the checkpoint that is still good; the old files stay.
    - With ``resume=True`` in the runner, training goes on from the newest checkpoint
      that opens, and if there is none starts from ``load_from`` of the configuration
      file. A checkpoint that the user has named elsewhere (``--resume`` of a train
      script, ``--cfg-options``) is resumed from, as ever.

    Other hooks can have a method ``before_gather_state(runner)``. It is called in all
    processes before each checkpoint that a run can be resumed from,
    ``before_save_checkpoint`` before any, in the first process only.

    Args:
        *args: Of CheckpointHook.
        **kwargs: Of CheckpointHook.
    """

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        # Whether the tool that built the runner has chosen what it resumes.
        self.start_is_chosen = False
        self._replaced: list[str] = []

    def before_run(self, runner: Runner) -> None:
        """Choose what the runner resumes from, or else starts from."""
        if not is_training(runner) or not is_resumed(runner) or is_loaded(runner):
            return
        if self.start_is_chosen:
            return
        start = _configured_start(runner)
        if load_from(runner) not in (None, start):
            return
        newest = find_latest_checkpoint(runner.work_dir)
        set_start(runner, newest is not None, newest or start)
        if newest is None:
            runner.logger.info(
                f'There is nothing to resume in {runner.work_dir}; training starts '
                + (f'from {start}.' if start else 'from the beginning.')
            )

    def before_train(self, runner: Runner) -> None:
        """Choose how files are written, and tidy up after a run that was killed."""
        super().before_train(runner)
        backend = self.file_backend
        if type(backend) is LocalBackend:
            self.backend_args = dict(backend='atomic_local')
            backend = AtomicLocalBackend()
        self._replaced = runner.message_hub.pop_info(OUTDATED, [])
        self.file_backend = DeferredRemovals(backend, self._replaced)
        if not is_main_process():
            return
        self._remove_outdated(runner)
        folders = {osp.realpath(runner.work_dir)}
        if '://' not in self.out_dir:
            folders.add(osp.realpath(self.out_dir))
        try:
            for folder in filter(osp.isdir, sorted(folders)):
                for name in remove_leftovers(folder):
                    runner.logger.info(f'Removed {name}, of a run that was killed.')
        except OSError as error:
            runner.logger.warning(f'Cannot remove old files: {error}')

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note in the checkpoint what it replaces."""
        info = checkpoint['message_hub']['runtime_info']
        info[OUTDATED] = info.get(OUTDATED, []) + self._outdated()

    def after_val_epoch(self, runner: Runner, metrics: dict) -> None:
        """Save the best checkpoints, and then remove the former ones.

        Args:
            runner (Runner): The runner.
            metrics (dict): The results of the validation.

        Raises:
            NotSavedError: If one cannot be saved.
        """
        with self._ending_the_run(runner):
            super().after_val_epoch(runner, metrics)
        self._remove_outdated(runner)

    def after_train(self, runner: Runner) -> None:
        """Publish, and try once more to remove what could not be removed.

        Raises:
            NotSavedError: If a checkpoint cannot be published.
        """
        self._remove_outdated(runner)
        with self._ending_the_run(runner):
            super().after_train(runner)

    @master_only
    def _publish_model(self, runner: Runner, ckpt_path: str | None) -> None:
        """Do as the parent does, which ignores ``backend_args``."""
        if ckpt_path is None:
            return
        checkpoint = CheckpointLoader.load_checkpoint(ckpt_path, 'cpu')
        kept = {k: v for k, v in checkpoint.items() if k in self.published_keys}
        buffer = io.BytesIO()
        torch.save(kept, buffer)
        sha = hashlib.sha256(buffer.getvalue()).hexdigest()
        path = f'{osp.splitext(ckpt_path)[0]}-{sha[:8]}.pth'
        self.file_backend.put(buffer.getvalue(), path)
        runner.logger.info(f'{ckpt_path} is published as {path}.')

    def _save_checkpoint_with_step(self, runner: Runner, step: int, meta: dict) -> None:
        """Save the latest checkpoint and note it, and remove then what it replaces."""
        runner.call_hook('before_gather_state')
        with self._ending_the_run(runner):
            super()._save_checkpoint_with_step(runner, step, meta)
            if is_main_process():
                # The parent has written it in place, where a kill leaves an empty file.
                note = osp.join(runner.work_dir, NOTE)
                AtomicLocalBackend().put_text(self.last_ckpt, note)
        self._remove_outdated(runner)

    @contextlib.contextmanager
    def _ending_the_run(self, runner: Runner) -> Iterator[None]:
        """Say in one sentence what cannot be saved, and what is still good."""
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

    def _outdated(self) -> list[str]:
        """Return the names of files that are to be removed and not in use again.

        A run that goes on from an earlier checkpoint uses the same names.
        """
        used = [self.last_ckpt, getattr(self, 'best_ckpt_path', None)]
        used += getattr(self, 'best_ckpt_path_dict', {}).values()
        used += map(self.filename_tmpl.format, getattr(self, 'keep_ckpt_ids', ()))
        used = {osp.basename(path) for path in used if path}
        return [name for name in self._replaced if name not in used]

    @master_only
    def _remove_outdated(self, runner: Runner) -> None:
        """Remove what has been replaced; what cannot be is tried again."""
        outdated = self._outdated()
        self._replaced.clear()
        for name in outdated:
            try:
                remove_checkpoint(self, name)
            except OSError as error:
                path = self.file_backend.join_path(self.out_dir, name)
                runner.logger.warning(f'Cannot remove {path}: {reason_of(error)}')
                self._replaced.append(name)
