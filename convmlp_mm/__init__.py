"""ConvMLP backbones for OpenMMLab.

Importing the package registers :class:`ConvMLP` in mmengine's root registry,
where mmpretrain, mmdet and mmseg find it, and makes its configurations known
by name as ``convmlp_mm::NAME.py``. No toolkit is imported.
"""

from .apis import get_inferencer, get_model
from .convmlp import ConvMLP
from .engine import CheckWeightsHook
from .zoo import config_path, list_models, open_scope

__version__ = '0.1.0'
__all__ = [
    'CheckWeightsHook',
    'ConvMLP',
    '__version__',
    'config_path',
    'get_inferencer',
    'get_model',
    'list_models',
]

open_scope()
