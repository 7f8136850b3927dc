"""Running statistics of BN that are those of all processes."""

from mmengine.dist import is_distributed
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch import Tensor
from torch.nn import SyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from .stop import StepHook


@HOOKS.register_module()
class SyncStatisticsHook(StepHook):
    """Average the running statistics of BN over the processes in each iteration.

    Each process normalises its own images by BN and has running statistics of its
    own, of which a checkpoint takes those of the first process. mmengine's
    ``SyncBuffersHook`` averages them at the end of an epoch or before a validation:
    too late for checkpoints of iteration-based training, and never in the copy that
    ``EMAHook`` keeps and saves. As the statistics are linear in those of the
    batches, the average is the same whenever it is taken.

    They are two numbers for each channel in the vector of :class:`StepHook`. BN layers
    that are in evaluation mode, and SyncBN, which has nothing to average, take no part.
    """

    def numbers(self, runner: Runner, outputs: object) -> list[Tensor]:
        """Return the statistics of the model; none in a single process."""
        if not is_distributed():
            return []
        return [
            buffer
            for module in runner.model.modules()
            if isinstance(module, _BatchNorm)
            and not isinstance(module, SyncBatchNorm)
            and module.training
            and module.track_running_stats
            for buffer in (module.running_mean, module.running_var)
        ]
