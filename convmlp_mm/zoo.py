"""Names of models and configurations, and what they stand for.

What is known about a model stands in ``configs/metafile_*.yml`` and nowhere else;
``model-index.yml`` lists these files. Both travel with the package in
``convmlp_mm/.mim``, where mim and mmengine look for them.
"""

from __future__ import annotations

import copy
import fnmatch
import functools
import math
import os.path as osp
from collections.abc import Callable, Iterable
from importlib import util
from pathlib import Path

import mmengine.registry
from mmengine.config import Config
from mmengine.fileio import load
from mmengine.registry import Registry
from mmengine.runner import CheckpointLoader
from mmengine.utils import get_object_from_string

from .checkpoint import ROOT, name_as_model, read_checkpoint
from .toolkits import TOOLKITS

SCOPE = __package__
# Settings of data loaders that torch refuses where there are no workers.
WORKER_KEYS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')


def carried_folder() -> Path:
    """Return the folder of the configurations, metafiles and tools.

    Raises:
        FileNotFoundError: If the package was copied without them.
    """
    package = Path(__file__).parent
    # The second is a checkout on PYTHONPATH, which nothing has installed.
    for folder in (package / '.mim', package.parent):
        if (folder / 'model-index.yml').is_file():
            return folder
    raise FileNotFoundError(
        f'{SCOPE} has no configurations: neither {package / ".mim"} nor '
        f'{package.parent} holds model-index.yml; install it with pip'
    )


def mim_folder(scope: str) -> Path:
    """Return the folder ``.mim`` of a toolkit, with its configurations and metafiles.

    mmengine's own way asks for the distribution of the original stack.

    Raises:
        ImportError: If the toolkit is not installed.
    """
    spec = util.find_spec(scope)
    if spec is None:
        raise ImportError(f'{scope} is not installed')
    return Path(spec.origin).parent / '.mim'


@functools.lru_cache(maxsize=1)
def _entries() -> dict[str, dict]:
    """Read the metafiles: entries by name, in their order."""
    mim = carried_folder()
    metafiles = [load(mim / path) for path in load(mim / 'model-index.yml')['Import']]
    return {model['Name']: model for file in metafiles for model in file['Models']}


def list_models(pattern: str | None = None) -> list[str]:
    """List the models of the zoo, in the order of the metafiles.

    Args:
        pattern: Wildcards that a name must match, for instance ``'retinanet*'``.
    """
    return fnmatch.filter(_entries(), pattern or '*')


def config_path(name: str) -> str:
    """Return the absolute path of a configuration that this package carries.

    Args:
        name: A name of :func:`list_models`, or a path in the folder ``configs``, with
            ``.py`` or without: ``'retinanet_convmlp_s'``,
            ``'ablation/pure_mlp_100e.py'``.

    Raises:
        ValueError: If there is none.
    """
    configs = carried_folder() / 'configs'
    if name in _entries():
        path = carried_folder() / _entries()[name]['Config']
    else:
        path = configs / f'{name.removesuffix(".py")}.py'
    if '..' in Path(name).parts or not path.is_file():
        files = sorted(str(p.relative_to(configs)) for p in configs.rglob('*.py'))
        raise ValueError(
            f'{SCOPE} has no configuration {name!r}; there are '
            + ', '.join(file for file in files if not file.startswith('_base_'))
        )
    return str(path)


def published_weights(name: str) -> str:
    """Return the URL of the weights that the authors publish for a model.

    Raises:
        ValueError: If there are none.
    """
    weights = _entries().get(name, {}).get('Weights')
    if weights is None:
        raise ValueError(
            f'{name!r} has no published weights; the models that have are '
            + ', '.join(n for n, entry in _entries().items() if 'Weights' in entry)
        )
    return weights


def register_classifiers() -> None:
    """Add the classifiers to the hub of mmpretrain.

    After it, ``mmpretrain.list_models()``, ``mmpretrain.get_model()`` and the
    inferencers of mmpretrain know them by name. Calling it again changes nothing.

    Raises:
        ImportError: If mmpretrain is not installed.
    """
    from mmpretrain.apis.model import ModelHub

    if not ModelHub.has('convmlp_s_imagenet'):
        folder = carried_folder()
        metafile = folder / 'configs' / 'metafile_classification.yml'
        ModelHub.register_model_index(metafile, config_prefix=folder)


@CheckpointLoader.register_scheme(ROOT)
def load_from_convmlp_zoo(filename: str, map_location: object = None) -> dict:
    """Read the authors' files for mmengine and mmpretrain, safely, as theirs."""
    checkpoint = read_checkpoint(filename, map_location or 'cpu')
    meta = checkpoint.get('meta', {})
    return dict(state_dict=name_as_model(checkpoint), meta=meta)


# Reading configurations: of this package, of the toolkits, and classifiers of timm.


def find_config(name: str | Config) -> Config:
    """Read a configuration as :func:`read_config` does, named in any usual way.

    Args:
        name: The path of a file; a name that :func:`config_path` knows, with
            ``convmlp_mm::`` before it or not; a file that a toolkit carries, such as
            ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``; or a classifier of
            timm, such as ``'timm::resmlp_24_224'``. A configuration that has been
            read already is copied.

    Raises:
        ValueError: If there is none of this name, or if it has no model.
        ImportError: If the toolkit or timm is not installed.
    """
    if isinstance(name, Config):
        cfg = copy.deepcopy(name)
        name_types(cfg)
        return cfg
    scope, colons, rest = name.rpartition('::')
    if scope == 'timm':
        cfg = _timm_config(rest)
    elif scope in TOOLKITS:
        cfg = read_config(_toolkit_config(scope, rest))
        # Files of a backbone alone do not inherit it.
        cfg.setdefault('default_scope', scope)
    elif colons and scope != SCOPE:
        known = ', '.join(f'{s}::' for s in (SCOPE, *TOOLKITS, 'timm'))
        raise ValueError(f'no package {scope!r} in {name!r}; known are {known}')
    else:
        # A folder may be called like a model.
        is_file = not colons and osp.isfile(osp.expanduser(name))
        cfg = read_config(name if is_file else config_path(rest))
    if cfg.get('model') is None:
        raise ValueError(f'the configuration {name!r} has no model')
    return cfg


def read_config(path: str) -> Config:
    """Read a configuration, and name it where Python's own message does not.

    It has home folders in place of ``~`` and names in place of classes, see
    :func:`name_types`.

    Raises:
        OSError: If it, or one that it inherits, cannot be read.
        ValueError: If it is not Python.
    """
    try:
        cfg = Config.fromfile(osp.expanduser(path))
    except (SyntaxError, NameError, AttributeError, RuntimeError) as error:
        kind = type(error).__name__
        raise ValueError(f'configuration {path!r}: {kind}: {error}') from error
    map_config(cfg, cfg, without_tilde)
    name_types(cfg)
    return cfg


def _toolkit_config(scope: str, name: str) -> str:
    """Find a configuration of a toolkit."""
    configs = mim_folder(scope) / 'configs'
    path = configs / f'{name.removesuffix(".py")}.py'
    if not path.is_file():
        folder = configs / Path(name).parent
        there = ', '.join(sorted(p.name for p in folder.glob('*.py')))
        folders = ', '.join(sorted(p.name for p in configs.iterdir()))
        raise ValueError(
            f'{scope} has no configuration {name!r}; '
            + (f'{folder} has {there}' if there else f'{configs} has {folders}')
        )
    return str(path)


def _timm_config(name: str) -> Config:
    """Describe a classifier of timm for mmpretrain, with timm's preprocessing."""
    import timm

    if not timm.is_model(name):
        similar = ', '.join(timm.list_models(f'{name.partition("_")[0]}*'))
        raise ValueError(
            f'timm has no model {name!r}' + (f'; it has {similar}' if similar else '')
        )
    given = timm.get_pretrained_cfg(name)
    size, classes = given.input_size[-1], given.num_classes or 1000
    resize = dict(type='ResizeEdge', edge='short', backend='pillow')
    resize['scale'] = math.floor(size / (given.crop_pct or 1))
    resize['interpolation'] = given.interpolation or 'bicubic'
    steps = [resize, dict(type='CenterCrop', crop_size=size)]
    dataset = dict(
        type='ImageNet' if classes == 1000 else 'CustomDataset',
        pipeline=[dict(type='LoadImageFromFile'), *steps, dict(type='PackInputs')],
    )
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
            test_dataloader=dict(dataset=dataset),
        )
    )


# Changing configurations that have been read.


def map_leaves(function: Callable, value: object, key: object = None) -> object:
    """Copy nested dicts and lists with ``function(key, leaf)`` at each leaf.

    The items of a list have the key of the list.
    """
    if isinstance(value, dict):
        return {k: map_leaves(function, v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(function, v, key) for v in value)
    return function(key, value)


def map_config(cfg: Config, keys: Iterable[str], function: Callable) -> None:
    """Change the top-level values under ``keys`` that are there by ``map_leaves``."""
    for key in list(keys):
        if cfg.get(key) is not None:
            # A key that is called like a method of dicts cannot be set as an attribute.
            cfg[key] = map_leaves(function, cfg.get(key), key)


def without_tilde(key: object, value: object) -> object:
    """Put the home folder for a leading ``~``, for :func:`map_leaves`.

    Some places in the toolkits expand it and others make a folder of this name.
    """
    is_path = isinstance(value, str) and value.startswith('~')
    return osp.expanduser(value) if is_path else value


def give_visualizer(cfg: Config) -> None:
    """Name the visualizer of the toolkit where a configuration names none.

    mmengine's own, which a Runner takes then, draws nothing.
    """
    toolkit = TOOLKITS.get(cfg.get('default_scope'))
    if toolkit and not cfg.get('visualizer'):
        # The Runner and the inferencers give it a name of its own.
        backends = [dict(type='LocalVisBackend')]
        cfg.visualizer = dict(type=toolkit.visualizer, vis_backends=backends)


def name_types(cfg: Config) -> None:
    """Put names for the classes and functions that are a ``type``.

    Configurations that import them have them as objects, and what a Runner writes of
    such a configuration as ``package.module.Class``. The toolkits compare some with
    names, and so does this package. What no registry of the configuration's
    ``default_scope`` knows stays.
    """
    names = {}

    def name(key, value):
        if key != 'type' or not (callable(value) or '.' in str(value)):
            return value
        if not names:
            names.update(_registered_names(cfg.get('default_scope')))
        kind = get_object_from_string(value) if isinstance(value, str) else value
        return names.get(kind, value) if callable(kind) else value

    map_config(cfg, cfg, name)


def _registered_names(scope: str | None) -> dict[object, str]:
    """Return the names that a toolkit finds classes and functions by."""
    if scope in TOOLKITS:
        TOOLKITS[scope].register()
    names = {}
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry):
            # A toolkit's own class stands before another of the same name.
            of_scope = getattr(registry.children.get(scope), 'module_dict', {})
            for name, kind in {**registry.module_dict, **of_scope}.items():
                names.setdefault(kind, name)
    return names
