"""Options that tools share, and how they change a configuration."""

import argparse
import difflib
import inspect
import os
import os.path as osp
import sys
from collections.abc import Callable
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from ..checkpoint import write_file
from ..convmlp import ConvMLP
from ..swap import swap_backbone
from ..swap.child import child_config
from ..zoo import (
    WORKER_KEYS,
    find_config,
    map_config,
    map_leaves,
    read_config,
    read_leaf,
)
from .checks import RANK, check_gpus, is_first_process

SPLITS = ('train', 'val', 'test')
# What the Runner reads of a configuration, if it is there.
READ = {*inspect.signature(Runner).parameters, 'compile', 'find_unused_parameters'}
READ |= {'model_wrapper_cfg', 'runner_type', 'strategy', 'sync_bn'}


class _CfgOptions(DictAction):
    """mmengine's action, which takes the spaces out of every value, paths too."""

    @staticmethod
    def _parse_iterable(val: str) -> object:
        if ' ' in val and not set('[](),') & set(val):
            return val
        return DictAction._parse_iterable(val)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, whose value :func:`merge_options` takes."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_CfgOptions,
        metavar='KEY=VALUE',
        help='override settings of the configuration, for instance '
        'optim_wrapper.optimizer.lr=2e-4; lists as key="[a,b]". data_root '
        'moves the data of all data sets and metrics that lie below it; '
        'num_classes sets all heads that have the number of the configuration',
    )


def add_backbone(parser: argparse.ArgumentParser) -> None:
    """Add ``--backbone`` and ``--dump``, which :func:`read_model` obeys."""
    choices = [f'convmlp_{arch}' for arch in ConvMLP.arch_settings]
    text = 'put this one in place of the backbone of the configuration'
    parser.add_argument('--backbone', choices=choices, help=text)
    text = (
        'with --backbone, also write what is changed as a configuration that inherits'
    )
    path = dict(type=osp.expanduser, metavar='FILE')
    parser.add_argument('--dump', **path, help=text)


def read_model(args: argparse.Namespace, find: Callable = find_config) -> Config:
    """Find a configuration, replace its backbone if asked to, and merge options."""
    old = cfg = find(args.config)
    if getattr(args, 'backbone', None):
        # The processes of our launchers come after a check, which has said it.
        first = is_first_process(getattr(args, 'launcher', 'none'))
        say = first and 'CONVMLP_MM_ATTEMPT' not in os.environ
        say = say or getattr(args, 'check', False)
        cfg = swap_backbone(cfg, args.backbone.rpartition('_')[2], verbose=say)
    if getattr(args, 'dump', None):
        _dump(old, cfg, args)
    merge_options(cfg, getattr(args, 'cfg_options', None) or {})
    return cfg


def _dump(old: Config, new: Config, args: argparse.Namespace) -> None:
    """Write a child of the configuration, unless this very one is there."""
    if not args.dump.endswith('.py') or not args.backbone:
        raise ValueError('--dump FILE.py writes a configuration with --backbone')
    base = args.config
    if '::' not in base:
        base = osp.relpath(old.filename, osp.dirname(args.dump) or '.')
    text = child_config(old, new, base)
    # Each process of a launcher comes here.
    if not (osp.isfile(args.dump) and Path(args.dump).read_text('utf-8') == text):
        write_file(args.dump, text)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, named as in mmdet."""
    add = parser.add_argument
    text = (
        'folder for logs and checkpoints; by default work_dir of the configuration, '
        'else work_dirs/ and the name of the configuration'
    )
    add('--work-dir', type=osp.expanduser, help=text)
    add_backbone(parser)
    add_cfg_options(parser)
    text = 'what has started this process among others'
    add('--launcher', choices=['none', *RANK], default='none', help=text)
    text = (
        'only check that the configuration and the data are there; the launchers do so '
        'before they start any process'
    )
    add('--check', action='store_true', help=text)
    # torch.distributed.launch passes it; torchrun sets the variable itself.
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the configuration, merge the common options and set ``work_dir``.

    Args:
        args: Parsed options of :func:`add_common_arguments` and ``config``.

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If there are more processes than GPUs, or if the configuration has a
            ``strategy``.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    check_gpus()
    is_named = '::' in args.config
    if not is_named and not osp.isfile(osp.expanduser(args.config)):
        raise FileNotFoundError(f'configuration {args.config!r} does not exist')
    cfg = read_model(args, find_config if is_named else read_config)
    if cfg.get('strategy') or cfg.get('runner_type') == 'FlexibleRunner':
        # These would train beside the hooks that make runs whole and exact.
        raise ValueError('the tools train with DDP only, without strategy')
    cfg.launcher = args.launcher
    if args.work_dir == '':
        # Of a variable of the shell that is not set.
        raise ValueError('--work-dir must name a folder, but is empty')
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        backbone = getattr(args, 'backbone', None)
        # Not where the recipe has been trained with its own.
        name = f'{name}_{backbone}' if backbone else name
        cfg.work_dir = osp.join('work_dirs', name)
    for loader in (cfg.get(f'{split}_dataloader') or {} for split in SPLITS):
        # torch refuses these options of workers where there are none.
        for key in WORKER_KEYS if not loader.get('num_workers') else ():
            loader.pop(key, None)
    if not getattr(args, 'check', False) and is_first_process(cfg.launcher):
        _name_dropped_hooks(cfg)
    return cfg


def _name_dropped_hooks(cfg: Config) -> None:
    """Tell what a configuration that replaces ``custom_hooks`` does not run."""
    kept = {str(hook.get('type')) for hook in cfg.get('custom_hooks') or []}
    wanted = [hook['type'] for hook in cfg.get('runtime_hooks') or []]
    dropped = ', '.join(kind for kind in wanted if kind not in kept)
    if dropped:
        text = f'custom_hooks of the configuration leaves out {dropped}'
        print(f'{text}; [*_base_.custom_hooks, ...] adds to them', file=sys.stderr)


def merge_options(cfg: Config, options: dict) -> None:
    """Override settings of a configuration by values under dotted keys.

    ``data_root`` and ``num_classes`` reach the places that they were copied to.

    Raises:
        ValueError: If nothing reads a key.
    """
    options = map_leaves(read_leaf, dict(options))
    for key in options:
        first = key.partition('.')[0]
        if first not in cfg and first not in READ:
            near = difflib.get_close_matches(first, [*cfg, *READ], 1)
            hint = f'; is it {near[0]}?' if near else ''
            raise ValueError(
                f'--cfg-options {key} reaches nothing, since the configuration has no '
                f'{first!r}{hint}'
            )
    old, classes = cfg.get('data_root'), cfg.get('num_classes')

    def moved(key, value):
        root = osp.join(old, '')
        if isinstance(value, str) and (value == old or value.startswith(root)):
            return osp.join(options['data_root'], value[len(root) :])
        return value

    def counted(key, value):
        is_number = key == 'num_classes' and value == classes
        return options['num_classes'] if is_number else value

    if 'data_root' in options and old:
        parts = ('dataloader', 'evaluator')
        map_config(cfg, [f'{s}_{p}' for s in SPLITS for p in parts], moved)
    if 'num_classes' in options and classes:
        map_config(cfg, ('model', 'data_preprocessor'), counted)
    cfg.merge_from_dict(options)
