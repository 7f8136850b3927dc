"""ConvMLP backbones for OpenMMLab.

Importing the package registers :class:`ConvMLP` in mmengine's root registry, where
mmpretrain, mmdet and mmseg find it, and the hooks of its configurations beside those of
mmengine. It changes nothing else, and imports no toolkit.
"""

from .apis import get_inferencer, get_model
from .convmlp import ConvMLP
from .hooks import *  # noqa: F403
from .hooks import __all__ as _hooks
from .zoo import config_path, list_models, register_classifiers

__version__ = '0.1.0'
__all__ = [
    'ConvMLP',
    '__version__',
    'config_path',
    'get_inferencer',
    'get_model',
    'list_models',
    'register_classifiers',
    *_hooks,
]
