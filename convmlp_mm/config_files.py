"""Find configurations: of this package, of the toolkits, and of classifiers of timm."""

from __future__ import annotations

import copy
import math
import os.path as osp
from importlib import util
from pathlib import Path

from mmengine.config import Config

from .config_checks import TOOLKITS, name_types, read_config
from .zoo import SCOPE, config_path

__all__ = ['TOOLKITS', 'find_config', 'mim_folder']


def find_config(name: str | Config) -> Config:
    """Read a configuration that is named in any of the usual ways.

    Args:
        name (str | Config): The path of a file; a name that :func:`config_path` knows,
            with ``convmlp_mm::`` before it or not; a file that a toolkit
            carries, such as ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``;
            or a classifier of timm, such as ``'timm::resmlp_24_224'``. Of a
            configuration that has been read already, a copy is returned.

    Returns:
        Config: The configuration, see :func:`convmlp_mm.config_checks.read_config`.

    Raises:
        ValueError: If there is none of this name, or if it has no model.
        ImportError: If the toolkit or timm is not installed.
    """
    if isinstance(name, Config):
        cfg = copy.deepcopy(name)
        name_types(cfg)
        return cfg
    cfg = _read_config(name)
    if cfg.get('model') is None:
        raise ValueError(f'the configuration {name!r} has no model')
    return cfg


def _read_config(name: str) -> Config:
    scope, colons, rest = name.rpartition('::')
    if colons and scope == 'timm':
        return _timm_config(rest)
    if colons and scope in TOOLKITS:
        cfg = read_config(_toolkit_config(scope, rest))
        # Files of a backbone alone do not inherit it.
        cfg.setdefault('default_scope', scope)
        return cfg
    if colons and scope != SCOPE:
        known = ', '.join(f'{s}::' for s in (SCOPE, *TOOLKITS, 'timm'))
        raise ValueError(f'no package {scope!r} in {name!r}; known are {known}')
    # A folder may be called like a model.
    if not colons and osp.isfile(osp.expanduser(name)):
        return read_config(name)
    return read_config(config_path(rest))


def mim_folder(scope: str) -> Path:
    """Find the configurations and metafiles that a toolkit carries.

    mmengine's own way asks for the distribution of the original stack.

    Args:
        scope (str): The toolkit.

    Returns:
        Path: The folder ``.mim`` in the package.

    Raises:
        ImportError: If it is not installed.
    """
    spec = util.find_spec(scope)
    if spec is None:
        raise ImportError(f'{scope} is not installed')
    return Path(spec.origin).parent / '.mim'


def _toolkit_config(scope: str, name: str) -> str:
    """Find a configuration of a toolkit."""
    configs = mim_folder(scope) / 'configs'
    path = configs / f'{name.removesuffix(".py")}.py'
    if not path.is_file():
        folder = configs / Path(name).parent
        there = sorted(p.name for p in folder.glob('*.py'))
        raise ValueError(
            f'{scope} has no configuration {name!r}; '
            + (
                f'{folder} has {", ".join(there)}'
                if there
                else f'the folders in {configs} are '
                + ', '.join(sorted(p.name for p in configs.iterdir()))
            )
        )
    return str(path)


def _timm_config(name: str) -> Config:
    """Describe a classifier of timm for mmpretrain, with timm's preprocessing."""
    import timm

    if not timm.is_model(name):
        similar = timm.list_models(f'{name.partition("_")[0]}*')
        raise ValueError(
            f'timm has no model {name!r}'
            + (f'; it has {", ".join(similar)}' if similar else '')
        )
    given = timm.get_pretrained_cfg(name)
    size = given.input_size[-1]
    pipeline = [
        dict(type='LoadImageFromFile'),
        dict(
            type='ResizeEdge',
            scale=math.floor(size / (given.crop_pct or 1)),
            edge='short',
            backend='pillow',
            interpolation=given.interpolation or 'bicubic',
        ),
        dict(type='CenterCrop', crop_size=size),
        dict(type='PackInputs'),
    ]
    classes = given.num_classes or 1000
    dataset = dict(type='ImageNet' if classes == 1000 else 'CustomDataset')
    return Config(
        dict(
            default_scope='mmpretrain',
            model=dict(type='TimmClassifier', model_name=name),
            data_preprocessor=dict(
                num_classes=classes,
                mean=[255 * value for value in given.mean],
                std=[255 * value for value in given.std],
                to_rgb=True,
            ),
            test_dataloader=dict(dataset=dict(pipeline=pipeline, **dataset)),
        )
    )
