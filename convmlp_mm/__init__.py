"""ConvMLP backbones for OpenMMLab.

Importing the package registers :class:`ConvMLP` in mmengine's root registry,
where mmpretrain, mmdet and mmseg find it, and opens the configuration scope
``convmlp_mm::``. No toolkit is imported.
"""

from mmengine.config.utils import MODULE2PACKAGE

from .convmlp import ConvMLP

__version__ = '0.1.0'
__all__ = ['ConvMLP', '__version__']

# Lets `_base_ = 'convmlp_mm::...'` find the configurations of this package.
MODULE2PACKAGE.setdefault('convmlp_mm', 'convmlp_mm')
