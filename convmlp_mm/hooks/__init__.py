"""What mmengine's Runner lacks: hooks that a configuration lists and can drop.

``configs/_base_/default_runtime.py`` lists them in the order in which they run, which
is that of ``priority`` of each class.
"""

from .agreement import AgreementHook
from .checkpoint import SafeCheckpointHook, find_latest_checkpoint
from .data import CheckDataHook
from .model import (
    BFloat16OptimWrapper,
    ChannelsLastHook,
    CheckWeightsHook,
    CompileBackboneHook,
)
from .resume import ExactResumeHook
from .statistics import SyncStatisticsHook
from .stop import FiniteLossHook, PreemptionHook
from .summary import MainProcessLoggerHook, SummaryHook

__all__ = [
    'AgreementHook',
    'BFloat16OptimWrapper',
    'ChannelsLastHook',
    'CheckDataHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'MainProcessLoggerHook',
    'PreemptionHook',
    'SafeCheckpointHook',
    'SummaryHook',
    'SyncStatisticsHook',
    'find_latest_checkpoint',
]
