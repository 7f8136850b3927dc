"""ConvMLP backbones for OpenMMLab.

Importing the package registers :class:`ConvMLP` in mmengine's root registry,
where mmpretrain, mmdet and mmseg find it, and makes its configurations known
by name as ``convmlp_mm::NAME.py``. No toolkit is imported.
"""

from importlib import import_module

from mmengine.registry import HOOKS, MODELS, OPTIM_WRAPPERS

from . import storage  # noqa: F401, registers the backend
from .lazy import register_lazily
from .zoo import config_path, list_models, open_scope

__version__ = '0.1.0'
# They need torch, the import of which is put off until one of them is wanted.
_LATER = {
    'AgreementHook': '.engine',
    'BFloat16OptimWrapper': '.engine',
    'ChannelsLastHook': '.engine',
    'CheckDataHook': '.engine',
    'CheckWeightsHook': '.engine',
    'CompileBackboneHook': '.engine',
    'ConvMLP': '.convmlp',
    'ExactResumeHook': '.engine',
    'FiniteLossHook': '.engine',
    'OneMetricsFileHook': '.engine',
    'PreemptionHook': '.engine',
    'SafeCheckpointHook': '.engine',
    'SafeLogHook': '.engine',
    'SummaryHook': '.engine',
    'SyncStatisticsHook': '.engine',
    'TensorBoardHook': '.engine',
    'get_inferencer': '.apis',
    'get_model': '.apis',
}
__all__ = ['__version__', 'config_path', 'list_models', *_LATER]

register_lazily(MODELS, 'ConvMLP', _LATER['ConvMLP'])
for _name, _module in _LATER.items():
    if _name.endswith('Hook'):
        register_lazily(HOOKS, _name, _module)
register_lazily(OPTIM_WRAPPERS, 'BFloat16OptimWrapper', '.engine')
open_scope()


def __getattr__(name: str) -> object:
    if name not in _LATER:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(_LATER[name], __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})
