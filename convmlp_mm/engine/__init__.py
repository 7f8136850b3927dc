"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .check_data import CheckDataHook
from .finite_loss import FiniteLossHook
from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook

__all__ = [
    'ChannelsLastHook',
    'CheckDataHook',
    'CheckWeightsHook',
    'CompileBackboneHook',
    'FiniteLossHook',
]
