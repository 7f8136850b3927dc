"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .agreement import AgreementHook
from .check_data import CheckDataHook
from .checkpoint import SafeCheckpointHook
from .exact_resume import ExactResumeHook
from .finite_loss import FiniteLossHook
from .latest import find_latest_checkpoint
from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook
from .preemption import PreemptionHook

__all__ = [
    'AgreementHook',
    'ChannelsLastHook',
    'CheckDataHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'ExactResumeHook',
    'FiniteLossHook',
    'PreemptionHook',
    'SafeCheckpointHook',
    'find_latest_checkpoint',
]
