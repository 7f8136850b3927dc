"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .checkpoint import SafeCheckpointHook
from .latest import find_latest_checkpoint
from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook

__all__ = [
    'ChannelsLastHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'SafeCheckpointHook',
    'find_latest_checkpoint',
]
