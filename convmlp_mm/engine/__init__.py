"""What mmengine's Runner lacks: hooks that a configuration lists and can drop."""

from .model_hooks import ChannelsLastHook, CheckWeightsHook, CompileBackboneHook

__all__ = ['ChannelsLastHook', 'CheckWeightsHook', 'CompileBackboneHook']
