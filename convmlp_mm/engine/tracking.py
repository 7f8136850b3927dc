"""Experiment tracking that is there by default."""

from __future__ import annotations

import os.path as osp
from importlib.util import find_spec

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, VISBACKENDS
from mmengine.runner import Runner

__all__ = ['TensorBoardHook']


@HOOKS.register_module(force=True)
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
