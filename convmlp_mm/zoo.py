"""Names of models and configurations, and what they stand for.

What is known about a model stands in ``configs/metafile_*.yml`` and nowhere else;
``model-index.yml`` lists these files. Both travel with the package in
``convmlp_mm/.mim``, where mim and mmengine look for them.
"""

import copy
import fnmatch
import math
import os.path as osp
from collections.abc import Callable, Iterable
from functools import cache
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

# Settings of data loaders that torch refuses where there are no workers.
WORKER_KEYS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')


def mim_folder(scope: str = __package__) -> Path:
    """Return the folder with the configurations and metafiles of a package.

    mmengine's own way asks for the distribution of the original stack.
    """
    spec = util.find_spec(scope)
    if spec is None:
        raise ImportError(f'{scope} is not installed')
    package = Path(spec.origin).parent
    # Nothing has installed a checkout on PYTHONPATH.
    return package / '.mim' if (package / '.mim').exists() else package.parent


@cache
def _entries() -> dict[str, dict]:
    """Read the metafiles: entries by name, in their order."""
    mim = mim_folder()
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
            ``.py`` or without: ``'retinanet_convmlp_s'``, ``'ablation/pure_mlp_100e'``.

    Raises:
        ValueError: If there is none.
    """
    file = f'configs/{name.removesuffix(".py")}.py'
    path = mim_folder() / _entries().get(name, {}).get('Config', file)
    if '..' in path.parts or not path.is_file():
        raise ValueError(
            f'{__package__} has no configuration {name!r}; there are the models '
            f'{", ".join(list_models())} and the files in {mim_folder() / "configs"}'
        )
    return str(path)


def published_weights(name: str) -> str:
    """Return the URL of the weights that the authors publish for a model.

    Raises:
        ValueError: If there are none.
    """
    weights = _entries().get(name, {}).get('Weights')
    if weights is None:
        raise ValueError(f'{name!r} has no published weights')
    return weights


def register_classifiers() -> None:
    """Tell mmpretrain the names of the classifiers; again, it changes nothing.

    Then its ``list_models()``, ``get_model()`` and inferencers take them.
    """
    from mmpretrain.apis.model import ModelHub

    if not ModelHub.has('convmlp_s_imagenet'):
        metafile = mim_folder() / 'configs' / 'metafile_classification.yml'
        ModelHub.register_model_index(metafile, config_prefix=mim_folder())


@CheckpointLoader.register_scheme(ROOT)
def load_from_convmlp_zoo(filename: str, map_location: object = None) -> dict:
    """Read the authors' files for mmengine and mmpretrain, safely, as theirs."""
    checkpoint = read_checkpoint(filename, map_location or 'cpu')
    return dict(state_dict=name_as_model(checkpoint), meta=checkpoint.get('meta', {}))


# Reading configurations: of this package, of the toolkits, and classifiers of timm.


def find_config(name: str | Config) -> Config:
    """Read a configuration as :func:`read_config` does, named in any usual way.

    Args:
        name: The path of a file; a name that :func:`config_path` knows; a file of a
            toolkit, as ``'mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'``; or a
            classifier of timm, as ``'timm::resmlp_24_224'``. What has been read already
            is copied.

    Raises:
        ValueError: If there is none of this name, or if it has no model.
        ImportError: If the toolkit or timm is not installed.
    """
    if isinstance(name, Config):
        cfg = copy.deepcopy(name)
        name_types(cfg)
        return cfg
    scope, _, rest = name.rpartition('::')
    if scope == 'timm':
        cfg = _timm_config(rest)
    elif scope in TOOLKITS:
        configs = mim_folder(scope) / 'configs'
        path = configs / f'{rest.removesuffix(".py")}.py'
        if not path.is_file():
            raise ValueError(f'{scope} has no configuration {rest!r} in {configs}')
        cfg = read_config(str(path))
        # Files of a backbone alone do not inherit it.
        cfg.setdefault('default_scope', scope)
    else:
        # A folder may be called like a model.
        is_file = osp.isfile(osp.expanduser(name))
        cfg = read_config(name if is_file else config_path(name))
    if cfg.get('model') is None:
        raise ValueError(f'the configuration {name!r} has no model')
    return cfg


def read_config(path: str) -> Config:
    """Read a configuration, and name it where Python's own message does not.

    It has names in place of types that are classes, see :func:`name_types` and
    :func:`read_leaf`.

    Raises:
        OSError: If it, or one that it inherits, cannot be read.
        ValueError: If it is not Python.
    """
    try:
        cfg = Config.fromfile(osp.expanduser(path))
    except (SyntaxError, NameError, AttributeError, RuntimeError) as error:
        kind = type(error).__name__
        raise ValueError(f'configuration {path!r}: {kind}: {error}') from error
    map_config(cfg, cfg, read_leaf)
    name_types(cfg)
    return cfg


def _timm_config(name: str) -> Config:
    """Describe a classifier of timm for mmpretrain, with timm's preprocessing."""
    import timm

    if not timm.is_model(name):
        raise ValueError(f'timm has no model {name!r}')
    given = timm.get_pretrained_cfg(name)
    size, classes = given.input_size[-1], given.num_classes or 1000
    resize = dict(type='ResizeEdge', edge='short', backend='pillow')
    resize['scale'] = math.floor(size / (given.crop_pct or 1))
    resize['interpolation'] = given.interpolation or 'bicubic'
    crop = dict(type='CenterCrop', crop_size=size)
    pipeline = [dict(type='LoadImageFromFile'), resize, crop, dict(type='PackInputs')]
    kind = 'ImageNet' if classes == 1000 else 'CustomDataset'
    preprocessor = dict(
        num_classes=classes,
        mean=[255 * value for value in given.mean],
        std=[255 * value for value in given.std],
        to_rgb=True,
    )
    cfg = dict(
        default_scope='mmpretrain',
        model=dict(type='TimmClassifier', model_name=name),
        data_preprocessor=preprocessor,
        test_dataloader=dict(dataset=dict(type=kind, pipeline=pipeline)),
    )
    return Config(cfg)


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


def read_leaf(key: object, value: object) -> object:
    """Read what some places in the toolkits read and others not, for map_leaves().

    That is a leading ``~``, which others make a folder of, and the file that
    ``classes`` may name, which others take for the names themselves.
    """
    value = osp.expanduser(value) if isinstance(value, str) else value
    is_names = str(key).rpartition('.')[2] == 'classes'
    if is_names and isinstance(value, str) and osp.isfile(value):
        # Editors put a mark before the first name, and an empty line at the end.
        lines = Path(value).read_text('utf-8-sig').splitlines()
        return tuple(line for line in lines if line)
    return value


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
    """Put names, which the toolkits compare, for classes that are a ``type``.

    Configurations that import them have them as objects, and what a Runner writes of
    such a configuration as ``package.module.Class``. What no registry of
    ``default_scope`` knows stays.
    """
    scope = cfg.get('default_scope')

    def name(key, value):
        if key != 'type' or not (callable(value) or '.' in str(value)):
            return value
        kind = get_object_from_string(value) if isinstance(value, str) else value
        return _registered_names(scope).get(kind, value) if callable(kind) else value

    map_config(cfg, cfg, name)


@cache
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
