"""Hooks for what several processes must share, and for what only one may do."""

from __future__ import annotations

from mmengine.dist import all_reduce_params, is_distributed, is_main_process
from mmengine.hooks import Hook, LoggerHook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ['OneMetricsFileHook', 'SyncStatisticsHook']


@HOOKS.register_module()
class SyncStatisticsHook(Hook):
    """Average the running statistics of BN over the processes in each iteration.

    Each process normalises its own images by BN and has running statistics of its
    own, of which a checkpoint takes those of the first process. mmengine's
    ``SyncBuffersHook`` averages them at the end of an epoch or before a validation:
    too late for checkpoints of iteration-based training, and never in the copy that
    ``EMAHook`` keeps and saves. As the statistics are linear in those of the
    batches, the average is the same whenever it is taken.

    It costs one all-reduce of two numbers for each channel. BN layers that are in
    evaluation mode, and SyncBN, which has nothing to average, take no part.
    """

    # Before EMAHook copies the statistics, and CheckpointHook saves them.
    priority = 'VERY_HIGH'

    def after_train_iter(self, runner: Runner, **kwargs) -> None:
        """Average in place.

        Args:
            runner (Runner): The runner.
            **kwargs: What else hooks are told; not used.
        """
        if not is_distributed():
            return
        statistics = [
            buffer
            for module in runner.model.modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, SyncBatchNorm)
            and module.training
            and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
        ]
        if statistics:
            all_reduce_params(statistics, op='mean')


@HOOKS.register_module()
class OneMetricsFileHook(Hook):
    """Let the first process alone write the metrics of a test.

    In mmengine's ``LoggerHook`` each process writes them to the same file, with its
    own ``time`` in them: if two do so at once, the file may be no JSON.
    """

    def before_test(self, runner: Runner) -> None:
        """Silence the logger hooks of the other processes.

        Args:
            runner (Runner): The runner.
        """
        if is_main_process():
            return
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                # They log nothing either: their level is ERROR.
                hook.after_test_epoch = lambda runner, metrics=None: None
