"""Checks of configurations, before anything is built from them."""

from __future__ import annotations

import os
import os.path as osp
from collections.abc import Callable
from numbers import Real

from mmengine.config import Config
from mmengine.registry import OPTIMIZERS

__all__ = ['check_optimizer', 'check_settings']


def _is_count(least: int, whole: bool = False) -> Callable:
    """Make a check of integers, with ``whole`` also of 12.0, as the loops take it."""

    def check(value: object) -> bool:
        # True is 1, but nobody means that.
        right = type(value) is int or (
            whole and type(value) is float and value.is_integer()
        )
        return right and value >= least

    return check


def _is_rate(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and value >= 0


CHECKS = {
    'batch_size': (_is_count(1), 'a whole number of at least 1'),
    'num_workers': (_is_count(0), 'a whole number of at least 0'),
    'max_epochs': (_is_count(1, whole=True), 'a whole number of at least 1'),
    'max_iters': (_is_count(1, whole=True), 'a whole number of at least 1'),
    'val_interval': (_is_count(1, whole=True), 'a whole number of at least 1'),
    'accumulative_counts': (_is_count(1), 'a whole number of at least 1'),
    'lr': (_is_rate, 'a number of at least 0'),
    'weight_decay': (_is_rate, 'a number of at least 0'),
}


def check_settings(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check numbers whose errors would not name them, and ``work_dir``.

    Args:
        cfg (Config): The configuration.
        splits (tuple[str]): Of ``'train'``, ``'val'`` and ``'test'``, those that
            will be used.

    Raises:
        NotADirectoryError: If a part of ``work_dir`` is a file.
        PermissionError: If ``work_dir`` cannot be written.
        ValueError: If a number is none, or out of its range.
    """
    sections = [f'{split}_dataloader' for split in splits]
    if 'train' in splits:
        sections += ['train_cfg', 'optim_wrapper', 'optim_wrapper.optimizer']
    for section in sections:
        values = cfg
        for key in section.split('.'):
            values = (values or {}).get(key)
        for key, (is_right, allowed) in CHECKS.items():
            value = values.get(key) if isinstance(values, dict) else None
            if value is not None and not is_right(value):
                raise ValueError(f'{section}.{key} must be {allowed}, but is {value!r}')
    folder = cfg.get('work_dir')
    if not folder:
        return
    folder = osp.abspath(osp.expanduser(folder))
    while not osp.isdir(folder):
        if osp.lexists(folder):
            raise NotADirectoryError(
                f'work_dir {cfg.work_dir!r} cannot be made: {folder!r} is a file'
            )
        folder = osp.dirname(folder)
    # Permissions, and file systems that are mounted for reading only.
    effective = os.access in os.supports_effective_ids
    if not os.access(folder, os.W_OK, effective_ids=effective):
        raise PermissionError(
            f'work_dir {cfg.work_dir!r} cannot be written: {folder!r} is not writable'
        )


def check_optimizer(cfg: Config) -> None:
    """Check the type of the optimizer, where mmengine calls None.

    Args:
        cfg (Config): The configuration, whose scope must be open.

    Raises:
        KeyError: If there is no such optimizer.
    """
    kind = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    if not isinstance(kind, str):
        return
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        if registry.get(kind) is None:
            known = ', '.join(sorted({*OPTIMIZERS.module_dict, *registry.module_dict}))
            raise KeyError(
                f'optim_wrapper.optimizer.type is {kind!r}, which is not in the '
                f'registry of optimizers; known are {known}'
            )
