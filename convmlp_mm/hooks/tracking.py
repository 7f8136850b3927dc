"""Experiment tracking that is there by default, and never ends a run."""

from __future__ import annotations

import contextlib
import functools
import glob
import logging
import os
import os.path as osp
import sys
from collections.abc import Callable
from importlib.util import find_spec

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner
from mmengine.visualization.vis_backend import BaseVisBackend

from .saving import reason_of

__all__ = ['SafeLogHook', 'TensorBoardHook']

# What a visualizer has its backends write while a model is trained.
WRITING = ('add_scalar', 'add_scalars', 'add_image', 'close')


@HOOKS.register_module()
class TensorBoardHook(Hook):
    """Write the scalars of training for TensorBoard too, where it is installed.

    A ``TensorboardVisBackend`` in the configuration fails where TensorBoard is
    missing; this hook then does nothing. The events are beside the scalars of
    ``LocalVisBackend``, in ``vis_data`` of the folder of logs. A configuration that
    has the backend already keeps its own.
    """

    # Before the first scalar.
    priority = 'VERY_HIGH'

    def before_train(self, runner: Runner) -> None:
        """Add the backend to the visualizer.

        Args:
            runner (Runner): The runner.
        """
        backends = runner.visualizer._vis_backends
        if (
            not is_main_process()
            or find_spec('tensorboard') is None
            or any('Tensorboard' in type(b).__name__ for b in backends.values())
        ):
            return
        folder = osp.join(runner.log_dir, 'vis_data')
        backend = VISBACKENDS.build(dict(type='TensorboardVisBackend', save_dir=folder))
        try:
            # The import of TensorBoard is here.
            backend.add_config(runner.cfg)
        except ImportError as error:
            runner.logger.warning(f'TensorBoard is installed but fails: {error}')
            return
        # Visualizer takes backends in its constructor only.
        backends['TensorboardVisBackend'] = backend


@HOOKS.register_module()
class SafeLogHook(Hook):
    """Let a training go on whose log cannot be written, as on a full disk.

    mmengine's ``LocalVisBackend`` ends the run then, between two checkpoints. Here one
    warning says what is not written: the log, or the scalars of a backend, and of these
    again after they could be written in between. Of JSON, no half lines remain. Errors
    that are no OSError, as those of networks mostly are, stay what they are.
    """

    # After TensorBoardHook, before the first scalar.
    priority = 'HIGH'

    def __init__(self) -> None:
        self._failing: set[str] = set()

    def before_train(self, runner: Runner) -> None:
        """Take over the errors of the visualizer's backends and of the log file.

        Args:
            runner (Runner): The runner.
        """
        for backend in runner.visualizer._vis_backends.values():
            for name in WRITING:
                # A visualizer may have been used by another runner.
                method = getattr(backend, name)
                method = getattr(method, 'forgiven', method)
                setattr(backend, name, self._forgiving(runner, backend, method))
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = functools.partial(
                    self._forgive_line, runner, handler
                )

    def _forgiving(
        self, runner: Runner, backend: BaseVisBackend, method: Callable
    ) -> Callable:
        name = type(backend).__name__

        @functools.wraps(method)
        def write(*args, **kwargs):
            before = _sizes(backend)
            try:
                method(*args, **kwargs)
            except OSError as error:
                for path, size in before.items():
                    # On a disk that is read-only now, it is as it was.
                    with contextlib.suppress(OSError):
                        os.truncate(path, size)
                self._report(runner, name, error)
            else:
                self._failing.discard(name)

        write.forgiven = method
        return write

    def _forgive_line(
        self, runner: Runner, handler: logging.FileHandler, record: logging.LogRecord
    ) -> None:
        """Do as ``logging`` would, but for each line that is lost."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self._report(runner, handler.baseFilename, error)
        else:
            logging.FileHandler.handleError(handler, record)

    def _report(self, runner: Runner, name: str, error: OSError) -> None:
        if name not in self._failing:
            # First: the line itself may fail.
            self._failing.add(name)
            runner.logger.warning(
                f'{name} cannot write: {reason_of(error)}; training goes on'
            )


def _sizes(backend: BaseVisBackend) -> dict[str, int]:
    """Return the sizes of a local backend's files of scalars, in bytes."""
    if not hasattr(backend, '_scalar_save_file'):
        return {}
    folder = glob.escape(osp.dirname(backend._scalar_save_file))
    return {path: osp.getsize(path) for path in glob.glob(osp.join(folder, '*.json'))}
