"""CheckpointHook that survives kills and full disks, and resumes what is whole."""

from __future__ import annotations

import os.path as osp

from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..files import remove_leftovers, write_file
from ..storage import atomic_local_files
from ._mmengine import is_loaded, is_resumed, is_training, load_from, set_start
from .latest import NOTE, find_latest_checkpoint, named_checkpoint
from .saving import (
    OUTDATED,
    NotSavedError,
    SavingRunner,
    reason_of,
    remove_checkpoint,
    restore,
    together,
)

__all__ = ['SafeCheckpointHook']


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
