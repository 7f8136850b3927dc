"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .distributed import OneMetricsFileHook, SyncStatisticsHook
from .mixed_precision import BFloat16OptimWrapper
from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook
from .summary import SummaryHook
from .tracking import TensorBoardHook

__all__ = [
    'BFloat16OptimWrapper',
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'OneMetricsFileHook',
    'SummaryHook',
    'SyncStatisticsHook',
    'TensorBoardHook',
]
