"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .agreement import AgreementHook
from .checkpoint import SafeCheckpointHook
from .data import CheckDataHook
from .distributed import OneMetricsFileHook, SyncStatisticsHook
from .exact_resume import ExactResumeHook
from .finite_loss import FiniteLossHook
from .latest import find_latest_checkpoint
from .mixed_precision import BFloat16OptimWrapper
from .model import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook
from .preemption import PreemptionHook
from .summary import SummaryHook
from .tracking import SafeLogHook, TensorBoardHook

__all__ = [
    'AgreementHook',
    'BFloat16OptimWrapper',
    'ChannelsLastHook',
    'CheckDataHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'OneMetricsFileHook',
    'PreemptionHook',
    'SafeCheckpointHook',
    'SafeLogHook',
    'SummaryHook',
    'SyncStatisticsHook',
    'TensorBoardHook',
    'find_latest_checkpoint',
]
