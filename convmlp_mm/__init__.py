"""ConvMLP backbones for OpenMMLab.

Importing the package registers :class:`ConvMLP` in mmengine's root registry,
where mmpretrain, mmdet and mmseg find it. No toolkit is imported.
"""

from .convmlp import ConvMLP

__version__ = '0.1.0'
__all__ = ['ConvMLP', '__version__']
