"""What the command lines share: read a configuration, check it, start gloo.

The three toolkits each have a train and a test script that differ in a few
lines. These functions are the part that they have in common, with the checks
that users otherwise meet as a stack trace from every process.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import os.path as osp
import sys
from collections.abc import Iterator

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device

__all__ = [
    'add_common_arguments',
    'check_data',
    'load_config',
    'one_line_errors',
    'prepare_processes',
]

# Data sets that fetch themselves.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn what a user can get wrong into one line and exit code 2.

    To be put around the preparation only: an error in the middle of a run
    keeps its stack trace.
    """
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        # str() of a KeyError is the repr of its message.
        message = error.args[0] if isinstance(error, KeyError) else error
        program = osp.basename(sys.argv[0])
        print(f'{program}: error: {message}', file=sys.stderr)
        sys.exit(2)


class _CfgOptions(DictAction):
    """mmengine's action, which takes the spaces out of every value, paths too."""

    @staticmethod
    def _parse_iterable(val: str) -> object:
        if ' ' in val and not set('[](),') & set(val):
            return val
        return DictAction._parse_iterable(val)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing share, named as in mmdet.

    Args:
        parser (ArgumentParser): It is changed.
    """
    parser.add_argument(
        '--work-dir',
        help='folder for logs and checkpoints; by default work_dir of the '
        'configuration, else work_dirs/ and the name of the configuration',
    )
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_CfgOptions,
        metavar='KEY=VALUE',
        help='override settings of the configuration, for instance '
        'optim_wrapper.optimizer.lr=2e-4; lists as key="[a,b]". data_root '
        'moves the data of all data sets and metrics that lie below it',
    )
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='what has started this process among others',
    )
    parser.add_argument(
        '--check',
        action='store_true',
        help='only check that the configuration and the data are there; the '
        'launchers do so before they start any process',
    )
    # torch.distributed.launch passes it; torchrun sets the variable itself.
    parser.add_argument(
        '--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS
    )


def load_config(args: argparse.Namespace) -> Config:
    """Read the configuration and merge the common options into it.

    Args:
        args (Namespace): Parsed options of :func:`add_common_arguments` and
            ``config``.

    Returns:
        Config: With ``work_dir`` and ``launcher`` set.

    Raises:
        FileNotFoundError: If the configuration does not exist.
        ValueError: If there are more processes than GPUs.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    check_gpus()
    if not osp.isfile(args.config):
        raise FileNotFoundError(f'configuration {args.config!r} does not exist')
    cfg = Config.fromfile(args.config)
    options = dict(args.cfg_options or {})
    if 'data_root' in options and cfg.get('data_root'):
        _move_data_root(cfg, cfg.data_root, options['data_root'])
    cfg.merge_from_dict(options)
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('work_dirs', name)
    return cfg


def _move_data_root(cfg: Config, old: str, new: str) -> None:
    """Put ``new`` for a leading ``old`` in the paths of data sets and metrics.

    ``data_root`` in a configuration is only a variable: by the time that an
    option overrides it, its value has been copied into them.
    """

    def moved(value):
        if isinstance(value, dict):
            return {k: moved(v) for k, v in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(moved(v) for v in value)
        if isinstance(value, str) and (value == old or value.startswith(root)):
            return osp.join(new, value[len(root) :])
        return value

    root = old if old.endswith('/') else old + '/'
    for split in ('train', 'val', 'test'):
        for part in ('dataloader', 'evaluator'):
            key = f'{split}_{part}'
            if cfg.get(key) is not None:
                setattr(cfg, key, moved(cfg.get(key)))


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check that the files that the data sets and metrics name are there.

    Args:
        cfg (Config): The configuration.
        splits (tuple[str]): Of ``'train'``, ``'val'`` and ``'test'``, those
            that will be used.

    Raises:
        FileNotFoundError: If a folder or file is not; the message names it and
            the key of the configuration.
    """
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            _check_dataset(loader['dataset'], f'{split}_dataloader.dataset')
        evaluators = cfg.get(f'{split}_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        for evaluator in evaluators:
            path = evaluator.get('ann_file')
            if path:
                _check_path(path, f'{split}_evaluator.ann_file', 'annotation file')


def _check_dataset(dataset: ConfigDict, key: str) -> None:
    """Walk wrappers such as RepeatDataset down to the data sets with files."""
    if 'dataset' in dataset:
        _check_dataset(dataset['dataset'], f'{key}.dataset')
        return
    if 'datasets' in dataset:
        for i, part in enumerate(dataset['datasets']):
            _check_dataset(part, f'{key}.datasets.{i}')
        return
    if str(dataset.get('type', '')).rpartition('.')[2] in DOWNLOADED:
        return
    root = dataset.get('data_root') or ''
    if root:
        _check_path(root, f'{key}.data_root', 'data folder')
    if dataset.get('ann_file'):
        path = osp.join(root, dataset['ann_file'])
        _check_path(path, f'{key}.ann_file', 'annotation file')
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    for name, prefix in prefixes.items():
        if prefix:
            name = f'{key}.data_prefix.{name}'.rstrip('.')
            _check_path(osp.join(root, prefix), name, 'data folder')


def _check_path(path: str, key: str, what: str) -> None:
    """Let remote paths pass: only the run can tell."""
    if '://' in path or osp.exists(osp.expanduser(path)):
        return
    raise FileNotFoundError(
        f'{what} {path!r} does not exist (named by {key} in the configuration)'
    )


def check_gpus() -> None:
    """Check that each process of this machine has a GPU of its own.

    Raises:
        ValueError: If there are more processes than visible GPUs.
    """
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f'{processes} processes need as many GPUs, but '
            f'{torch.cuda.device_count()} are visible (CUDA_VISIBLE_DEVICES is '
            f'{os.environ.get("CUDA_VISIBLE_DEVICES", "not set")})'
        )


def prepare_processes(cfg: Config) -> None:
    """Let the launchers' processes talk by gloo where there is no accelerator.

    mmengine selects a GPU for each process and hands DDP its number, neither
    of which exists on a CPU; where a GPU is, this changes nothing.

    Args:
        cfg (Config): On the CPU its ``model_wrapper_cfg`` is changed.
    """
    if cfg.launcher != 'pytorch' or get_device() != 'cpu':
        return
    torch.distributed.init_process_group('gloo')
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.model_wrapper_cfg.get('type', '').endswith('DistributedDataParallel'):
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
