"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook
from .preemption import PreemptionHook

__all__ = [
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'PreemptionHook',
]
