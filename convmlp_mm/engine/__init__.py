"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .agreement import AgreementHook
from .checkpoint import SafeCheckpointHook
from .exact_resume import ExactResumeHook
from .latest import find_latest_checkpoint
from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook
from .preemption import PreemptionHook

__all__ = [
    'AgreementHook',
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'ExactResumeHook',
    'PreemptionHook',
    'SafeCheckpointHook',
    'find_latest_checkpoint',
]
