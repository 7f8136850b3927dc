"""CheckpointHook that survives kills and full disks, and resumes what is whole."""

from __future__ import annotations

import contextlib
import logging
import os
import os.path as osp
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from numbers import Real

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dist import all_gather_object, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import CheckpointHook
from mmengine.logging import HistoryBuffer, MessageHub, print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint_io import HASH_IN_NAME, read_checkpoint
from ..files import remove_leftovers, write_file
from ..weights import find_not_finite
from ._mmengine import is_loaded, is_resumed, is_training, load_from, set_start
from .resume import KEY, check_state
from .work_dir import KEY as LAUNCH

__all__ = [
    'AtomicLocalBackend',
    'NotSavedError',
    'SafeCheckpointHook',
    'atomic_local_files',
    'check_resumable',
    'checkpoint_hooks',
    'find_latest_checkpoint',
    'keep_own_files',
    'named_checkpoint',
    'reason_of',
    'remove_checkpoint',
]


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


# Keys of the message hub, and so of each checkpoint. What a checkpoint that is being
# saved replaces: who is killed before that is removed finds it there.
OUTDATED = 'outdated_ckpts'
# What a preempted run has saved in the middle of an epoch.
PREEMPTED_FILE = 'preempted_ckpt'


class NotSavedError(OSError):
    """A file could not be written, in any of the processes.

    Args:
        message (str): What has happened.
        number (int, optional): ``errno`` of what has happened. Defaults to None.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class SavingRunner:
    """A runner with another way to save; what else is asked, it passes on.

    Args:
        runner (Runner): The runner.
        save (Callable): In place of its ``save_checkpoint``.
    """

    def __init__(self, runner: Runner, save: Callable) -> None:
        self.wrapped, self.save_checkpoint = runner, save

    def __getattr__(self, name: str) -> object:
        return getattr(self.wrapped, name)


def together(work: Callable[[], None]) -> None:
    """Fail in all processes if one has failed: they must not part ways.

    Args:
        work (Callable): It is called in each of them.

    Raises:
        NotSavedError: If it was by an OSError.
        Exception: If it was by any other.
    """
    failure, found = None, None
    try:
        work()
    except Exception as error:
        failure = error
        disk = isinstance(error, OSError)
        found = (disk, reason_of(error), error.errno if disk else None)
    all_found = [item for item in all_gather_object(found) if item is not None]
    if failure is not None and not found[0]:
        raise failure
    if all_found:
        disk, text, number = min(all_found, key=lambda item: item[:2])
        if not disk:
            raise RuntimeError(f'another process cannot save: {text}')
        raise NotSavedError(text, number) from failure


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    """List the hooks of a runner that save, of mmengine's class or of one below it.

    Args:
        runner (Runner): The runner.

    Returns:
        list[CheckpointHook]: In the order of their priority.
    """
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def _is_own_name(hook: CheckpointHook, name: object) -> bool:
    """Whether a name is one that the hook gives to a file, or PreemptionHook does."""
    template = r'\d+'.join(map(re.escape, re.split(r'\{.*?\}', hook.filename_tmpl)))
    pattern = rf'(best_[^/\\]+_)?{template}|iter_\d+\.pth'
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def remove_checkpoint(hook: CheckpointHook, name: str) -> None:
    """Delete a file that this run has saved, if it is there.

    Args:
        hook (CheckpointHook): Of the main process; it knows the place.
        name (str): Name of the file. Others than the hook's own, and folders, stay.

    Raises:
        OSError: If it cannot be deleted.
    """
    path = hook.file_backend.join_path(hook.out_dir, name)
    if _is_own_name(hook, name) and hook.file_backend.isfile(path):
        hook.file_backend.remove(path)


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
        # As CheckpointHook will do.
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


def restore(hub: MessageHub, keys: list[str], before: dict) -> None:
    """Give the message hub what it held, or did not hold, before.

    Args:
        hub (MessageHub): It is changed.
        keys (list[str]): Of its information.
        before (dict): What it held under them.
    """
    for key in keys:
        if key in before:
            hub.update_info(key, before[key])
        else:
            hub.pop_info(key)


def reason_of(error: Exception) -> str:
    """Say in one line what is wrong; paths of temporary files help nobody.

    Args:
        error (Exception): What was raised.

    Returns:
        str: Its first line.
    """
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return text.splitlines()[0]


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


def _configured_start(runner: Runner) -> str | None:
    """Read ``load_from`` from the file of the configuration.

    The train scripts of mmdet and mmpretrain drop it when they are asked to resume,
    and put what the user has named there.
    """
    filename = runner.cfg.filename
    if filename is None or not osp.isfile(filename):
        return None
    start = Config.fromfile(filename, import_custom_modules=False).get('load_from')
    # As the tools have read it.
    return start and osp.expanduser(start)


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """Save whole files, in an order in which a good one always remains.

    All of mmengine's CheckpointHook, and:

    - Local files are written beside the old ones and then take their names, so that
      a kill or a full disk leaves what was there, ``last_checkpoint`` too.
    - What ``max_keep_ckpts`` and ``save_best`` replace is removed after the new file
      is there.
    - What cannot be saved is reported, with the checkpoint that is still good, and
      the old files stay.
    - With ``resume=True`` in the runner, training goes on from the newest checkpoint
      that opens, and if there is none starts from ``load_from`` of the configuration
      file. A checkpoint that the user has named elsewhere (``--resume`` of a train
      script, ``--cfg-options``) is resumed from, as ever.

    Other hooks can have a method ``before_gather_state(runner)``. It is called in all
    processes before each save, ``before_save_checkpoint`` in the first one only.

    Args:
        *args: Of CheckpointHook.
        on_save_error (str): Whether to ``'continue'`` when a checkpoint cannot be
            saved, and to try it again after the next interval and at the end of the
            training; or to ``'stop'`` with the error. Defaults to ``'continue'``.
        **kwargs: Of CheckpointHook.

    Raises:
        ValueError: If ``on_save_error`` is something else.
    """

    def __init__(self, *args, on_save_error: str = 'continue', **kwargs) -> None:
        if on_save_error not in ('continue', 'stop'):
            raise ValueError(
                f"on_save_error must be 'continue' or 'stop', but got {on_save_error!r}"
            )
        super().__init__(*args, **kwargs)
        self.on_save_error = on_save_error
        # Whether the tool that built the runner has chosen what it resumes.
        self.start_is_chosen = False
        # Names in out_dir; whether the last save has failed.
        self._outdated: list[str] = []
        self._unsaved = False
        self._noted = True

    def before_run(self, runner: Runner) -> None:
        """Choose what the runner resumes from, or else starts from.

        Args:
            runner (Runner): What it loads is changed.
        """
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
        """Tidy up after a run that was killed.

        Args:
            runner (Runner): The runner.
        """
        super().before_train(runner)
        if not is_main_process():
            return
        folders = {osp.realpath(runner.work_dir)}
        if '://' not in self.out_dir:
            folders.add(osp.realpath(self.out_dir))
        try:
            for folder in filter(osp.isdir, sorted(folders)):
                for name in remove_leftovers(folder):
                    runner.logger.info(f'Removed {name}, of a run that was killed.')
            if is_resumed(runner):
                self._outdated = list(runner.message_hub.get_info(OUTDATED, []))
        except OSError as error:
            runner.logger.warning(f'Cannot remove old files: {error}')
        self._remove_outdated(runner)

    def after_train(self, runner: Runner) -> None:
        """Save what could not be saved, and publish.

        Args:
            runner (Runner): The runner.

        Raises:
            OSError: If the last checkpoint still cannot be saved.
        """
        if self._unsaved:
            # As the run is now: it may have gone on since.
            step = runner.epoch if self.by_epoch else runner.iter
            meta = dict(epoch=runner.epoch, iter=runner.iter)
            self._save_checkpoint_with_step(runner, step, meta, final=True)
        # What a best one has replaced that no later save has followed.
        if self._noted:
            self._remove_outdated(runner)
        super().after_train(runner)

    def _publish_model(self, runner: Runner, ckpt_path: str) -> None:
        try:
            with atomic_local_files():
                super()._publish_model(runner, ckpt_path)
        except OSError as error:
            self._report(runner, error, ckpt_path, 'publish')

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict, final: bool = False
    ) -> None:
        runner = getattr(runner, 'wrapped', runner)
        hub = runner.message_hub
        name = self.filename_tmpl.format(step)
        path = self.file_backend.join_path(self.out_dir, name)
        keys = ('keep_ckpt_ids', 'last_ckpt')
        before = {key: hub.get_info(key) for key in keys if key in hub.runtime_info}
        last, outdated = self.last_ckpt, list(self._outdated)
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []

        # The file holds the state that there is once it is saved.
        if self.max_keep_ckpts > 0 and step not in kept:
            if len(kept) == self.max_keep_ckpts:
                oldest = self.keep_ckpt_ids.popleft()
                self._outdated.append(self.filename_tmpl.format(oldest))
            self.keep_ckpt_ids.append(step)
            hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))
        # A name that is used again, after a return to an earlier checkpoint.
        self._outdated = [old for old in self._outdated if old != name]
        hub.update_info(OUTDATED, list(self._outdated))
        self.last_ckpt = path
        hub.update_info('last_ckpt', path)
        try:
            self._save(
                runner,
                self.out_dir,
                name,
                self.file_client_args,
                save_optimizer=self.save_optimizer,
                save_param_scheduler=self.save_param_scheduler,
                # It is filled in, and may be needed again.
                meta=dict(meta),
                by_epoch=self.by_epoch,
                backend_args=self.backend_args,
                **self.args,
            )
        except NotSavedError as error:
            self.last_ckpt, self._outdated = last, outdated
            if self.max_keep_ckpts > 0:
                self.keep_ckpt_ids.clear()
                self.keep_ckpt_ids.extend(kept)
            restore(hub, keys, before)
            hub.update_info(OUTDATED, outdated)
            self._unsaved = True
            self._report(runner, error, path, final=final)
            return
        self._unsaved = False

        note, self._noted = osp.join(runner.work_dir, NOTE), False
        try:
            together(lambda: _note(note, path))
        except NotSavedError as error:
            self._report(runner, error, note, final=final)
            return
        self._noted = True
        self._remove_outdated(runner)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        """Have the parent save, but remove the former best ones afterwards."""
        if not self.save_best:
            return
        single = len(self.key_indicators) == 1
        # With save_best='auto' the name is not known yet.
        keys = [''] if single else [f'_{key}' for key in self.key_indicators]
        hub = runner.message_hub
        names = [f'best_{what}{key}' for key in keys for what in ('score', 'ckpt')]
        before = {k: hub.get_info(k) for k in names if k in hub.runtime_info}

        def paths() -> dict[str, str | None]:
            if single:
                return {'': self.best_ckpt_path}
            return {f'_{key}': path for key, path in self.best_ckpt_path_dict.items()}

        def set_path(key: str, path: str | None) -> None:
            if single:
                self.best_ckpt_path = path
            else:
                self.best_ckpt_path_dict[key[1:]] = path

        former, saved, failed = paths(), set(), []

        def save(out_dir: str, filename: str, **kwargs) -> None:
            (key,) = [k for k, p in paths().items() if p and k not in saved]
            try:
                self._save(runner, out_dir, filename, **kwargs)
            except NotSavedError:
                failed.append((key, paths()[key]))
                raise
            saved.add(key)
            self._outdated = [old for old in self._outdated if old != filename]
            if former[key] and osp.basename(former[key]) != filename:
                self._outdated.append(osp.basename(former[key]))

        # The parent removes what it finds here before it saves.
        for key in former:
            set_path(key, None)
        try:
            super()._save_best_checkpoint(SavingRunner(runner, save), metrics)
        except NotSavedError as error:
            if not failed:
                # Of the latest checkpoint, which the parent saves once more.
                raise
            ((key, path),) = failed
            restore(hub, [f'best_{what}{key}' for what in ('score', 'ckpt')], before)
            self._report(runner, error, path)
        finally:
            for key in former.keys() - saved:
                set_path(key, former[key])

    def _save(self, runner: Runner, *args, **kwargs) -> None:
        """Save by the runner, in files that are whole."""
        runner.call_hook('before_gather_state')

        def save() -> None:
            with atomic_local_files():
                runner.save_checkpoint(*args, **kwargs)

        together(save)

    def _report(
        self,
        runner: Runner,
        error: OSError,
        path: str,
        what: str = 'save',
        final: bool = False,
    ) -> None:
        """Say it in one line, and stop if that is wanted or all is over."""
        good = self.last_ckpt or named_checkpoint(runner.work_dir)
        good = f'the last good checkpoint is {good}' if good else 'there is none yet'
        stop = final or self.on_save_error == 'stop'
        then = 'training ends' if stop else 'training goes on'
        message = f'cannot {what} {path}: {reason_of(error)}; {good}; {then}'
        runner.logger.error(message)
        if stop:
            raise NotSavedError(message, error.errno) from error

    def _remove_outdated(self, runner: Runner) -> None:
        """Remove what has been replaced; what cannot be is tried again."""
        outdated, self._outdated = self._outdated, []
        if not is_main_process():
            return
        for name in outdated:
            try:
                remove_checkpoint(self, name)
            except OSError as error:
                path = self.file_backend.join_path(self.out_dir, name)
                runner.logger.warning(f'Cannot remove {path}: {reason_of(error)}')
                self._outdated.append(name)


def _note(note: str, path: str) -> None:
    """Write ``last_checkpoint``, in the first process."""
    if is_main_process():
        write_file(note, path, overwrite=True)
