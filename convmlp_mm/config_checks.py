"""Checks of configurations, before anything is built from them."""

from __future__ import annotations

import os.path as osp
from collections.abc import Callable, Iterable
from importlib import import_module

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import Registry
from mmengine.utils import get_object_from_string

__all__ = [
    'TOOLKITS',
    'WORKER_KEYS',
    'give_visualizer',
    'map_config',
    'map_leaves',
    'name_types',
    'read_config',
    'without_tilde',
]

# Of data loaders: torch refuses them where there are no workers.
WORKER_KEYS = ('persistent_workers', 'prefetch_factor', 'multiprocessing_context')
TOOLKITS = ('mmdet', 'mmseg', 'mmpretrain')


def read_config(path: str) -> Config:
    """Read a configuration, and name it where Python's own message does not.

    Args:
        path (str): The file.

    Returns:
        Config: What it says, with what it inherits; with home folders in place of
        ``~`` and names in place of classes, see :func:`name_types`.

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


def map_leaves(function: Callable, value: object, key: object = None) -> object:
    """Copy nested dicts and lists with ``function(key, leaf)`` at each leaf.

    Args:
        function (Callable): It returns the new leaf. The items of a list have the key
            of the list.
        value (object): The dict, list or leaf.
        key (object): Its key. Defaults to None.

    Returns:
        object: The copy.
    """
    if isinstance(value, dict):
        return {k: map_leaves(function, v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map_leaves(function, v, key) for v in value)
    return function(key, value)


def map_config(cfg: Config, keys: Iterable[str], function: Callable) -> None:
    """Change some top-level values of a configuration, leaf by leaf.

    Args:
        cfg (Config): It is changed.
        keys (Iterable[str]): Of the values; those that it does not have are left out.
        function (Callable): See :func:`map_leaves`.
    """
    for key in list(keys):
        if cfg.get(key) is not None:
            # As an attribute, a key called like a method of dicts could not be set.
            cfg[key] = map_leaves(function, cfg.get(key), key)


def without_tilde(key: object, value: object) -> object:
    """Put the home folder for a leading ``~``, for :func:`map_leaves`.

    Of the toolkits, some places expand it and others make a folder of this name.
    """
    is_path = isinstance(value, str) and value.startswith('~')
    return osp.expanduser(value) if is_path else value


def give_visualizer(cfg: Config) -> None:
    """Name the visualizer of the toolkit where a configuration names none.

    mmengine's own, which a Runner takes then, draws nothing.

    Args:
        cfg (Config): It is changed.
    """
    kinds = dict(
        mmdet='DetLocalVisualizer',
        mmseg='SegLocalVisualizer',
        mmpretrain='UniversalVisualizer',
    )
    kind = kinds.get(cfg.get('default_scope'))
    if kind and not cfg.get('visualizer'):
        # The Runner and the inferencers give it a name of its own.
        cfg.visualizer = dict(type=kind, vis_backends=[dict(type='LocalVisBackend')])


def name_types(cfg: Config) -> None:
    """Put names for the classes and functions that are a ``type``.

    Configurations that import them have them as objects, and what a Runner writes of
    such a configuration as ``package.module.Class``. The toolkits compare some with
    names, and so does this package.

    Args:
        cfg (Config): It is changed. What no registry of its ``default_scope`` knows
            stays.
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
        import_module(f'{scope}.utils').register_all_modules(False)
    names = {}
    for registry in vars(mmengine.registry).values():
        if isinstance(registry, Registry):
            # A toolkit's own class stands before another of the same name.
            of_scope = getattr(registry.children.get(scope), 'module_dict', {})
            for name, kind in {**registry.module_dict, **of_scope}.items():
                names.setdefault(kind, name)
    return names
