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
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator

import torch
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner, checkpoint

from .checkpoint_io import read_checkpoint
from .config_checks import check_optimizer, check_settings, read_config
from .data_checks import check_while_reading
from .engine.latest import find_latest_checkpoint
from .launch import MISTAKE, keep_memory

__all__ = [
    'add_cfg_options',
    'add_common_arguments',
    'build_runner',
    'check_data',
    'checkpoint_of_restart',
    'closing_group',
    'final_mistakes',
    'load_config',
    'merge_options',
    'one_line_errors',
    'plain_optim_wrapper',
    'read_weights_only',
]

# Of the names of checkpoints; S3 as mmengine spells it.
SCHEMES = ('', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')
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
        sys.exit(MISTAKE)


# They come again however often one tries, unlike those of memory, disks and networks.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    FileNotFoundError,
    ImportError,
    LookupError,
    NameError,
    PermissionError,
    TypeError,
    ValueError,
)


@contextlib.contextmanager
def final_mistakes() -> Iterator[None]:
    """Tell a launcher that restarts not to do so after a mistake of the user's.

    The stack trace stays. Without such a launcher nothing changes.
    """
    try:
        yield
    except MISTAKES:
        if 'TORCHELASTIC_RESTART_COUNT' not in os.environ:
            raise
        traceback.print_exc()
        sys.exit(MISTAKE)


@contextlib.contextmanager
def closing_group() -> Iterator[None]:
    """Close the group of the processes when a run has ended.

    torch leaves its threads to the end of the interpreter, where one that drops the
    tensors of the last collective may abort the process, with an exit code that is not
    the run's. After an error the group stays: to close it could wait for the others.
    """
    try:
        yield
    except SystemExit:
        _close_group()
        raise
    _close_group()


def _close_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        # To drop a tensor of Python, a thread needs the interpreter's lock. It is given
        # here to those that wait for it: the models that hold the group keep them.
        time.sleep(0.1)


class _CfgOptions(DictAction):
    """mmengine's action, which takes the spaces out of every value, paths too."""

    @staticmethod
    def _parse_iterable(val: str) -> object:
        if ' ' in val and not set('[](),') & set(val):
            return val
        return DictAction._parse_iterable(val)


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``, whose value :func:`merge_options` takes.

    Args:
        parser (ArgumentParser): It is changed.
    """
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
    add_cfg_options(parser)
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
        ValueError: If there are more processes than GPUs, or if a ``strategy`` goes
            with the moving average of EMAHook.
    """
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    check_gpus()
    if not osp.isfile(args.config):
        raise FileNotFoundError(f'configuration {args.config!r} does not exist')
    cfg = read_config(args.config)
    merge_options(cfg, args.cfg_options or {})
    hooks = cfg.get('custom_hooks') or []
    if cfg.get('strategy') and any(h.get('type') == 'EMAHook' for h in hooks):
        raise ValueError(
            'strategy does not go with EMAHook in custom_hooks, which needs the whole '
            'model in each process'
        )
    cfg.launcher = args.launcher
    if args.work_dir is not None:
        cfg.work_dir = args.work_dir
    elif cfg.get('work_dir') is None:
        name = osp.splitext(osp.basename(args.config))[0]
        cfg.work_dir = osp.join('work_dirs', name)
    return cfg


def merge_options(cfg: Config, options: dict) -> None:
    """Override settings of a configuration.

    Args:
        cfg (Config): It is changed.
        options (dict): Values by dotted keys. ``data_root`` and
            ``num_classes`` reach the places that they were copied to.
    """
    if 'data_root' in options and cfg.get('data_root'):
        _move_data_root(cfg, cfg.data_root, options['data_root'])
    if 'num_classes' in options and cfg.get('num_classes'):
        _set_num_classes(cfg, cfg.num_classes, options['num_classes'])
    cfg.merge_from_dict(dict(options))


def _map_leaves(function: Callable, value: object, key: object = None) -> object:
    """Copy nested dicts and lists with ``function(key, leaf)`` at each leaf.

    The items of a list have the key of the list.
    """
    if isinstance(value, dict):
        return {k: _map_leaves(function, v, k) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map_leaves(function, v, key) for v in value)
    return function(key, value)


def _map_config(cfg: Config, keys: Iterable[str], function: Callable) -> None:
    """Replace some top-level values of a configuration by :func:`_map_leaves`."""
    for key in keys:
        if cfg.get(key) is not None:
            setattr(cfg, key, _map_leaves(function, cfg.get(key)))


def _move_data_root(cfg: Config, old: str, new: str) -> None:
    """Put ``new`` for a leading ``old`` in the paths of data sets and metrics.

    ``data_root`` in a configuration is only a variable: by the time that an
    option overrides it, its value has been copied into them.
    """
    root = old if old.endswith('/') else old + '/'

    def moved(key, value):
        if isinstance(value, str) and (value == old or value.startswith(root)):
            return osp.join(new, value[len(root) :])
        return value

    splits = ('train', 'val', 'test')
    parts = ('dataloader', 'evaluator')
    _map_config(cfg, [f'{s}_{p}' for s in splits for p in parts], moved)


def _set_num_classes(cfg: Config, old: int, new: int) -> None:
    """Put ``new`` for ``old`` wherever the model states ``num_classes``.

    As ``data_root``, it is only a variable that has been copied.
    """

    def changed(key, value):
        return new if key == 'num_classes' and value == old else value

    _map_config(cfg, ('model', 'data_preprocessor'), changed)


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check the settings, and that what the data sets and metrics name is there.

    Args:
        cfg (Config): The configuration.
        splits (tuple[str]): Of ``'train'``, ``'val'`` and ``'test'``, those
            that will be used.

    Raises:
        FileNotFoundError: If a folder or file is not; the message names it and
            the key of the configuration.
        IsADirectoryError: If a file is a folder.
        NotADirectoryError: If a folder is a file.
        ValueError: See :func:`convmlp_mm.config_checks.check_settings`.
    """
    check_settings(cfg, splits)
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
    if '://' in path:
        return
    found, named = osp.expanduser(path), f'(named by {key} in the configuration)'
    if not osp.exists(found):
        raise FileNotFoundError(f'{what} {path!r} does not exist {named}')
    if what == 'annotation file' and osp.isdir(found):
        raise IsADirectoryError(f'{what} {path!r} is a folder {named}')
    if what == 'data folder' and not osp.isdir(found):
        raise NotADirectoryError(f'{what} {path!r} is a file {named}')


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


def checkpoint_of_restart(work_dir: str, resume: str | None) -> str | None:
    """Return where to go on when torchrun has started the processes again.

    Args:
        work_dir (str): The folder of the run.
        resume (str, optional): The value of ``--resume``: with ``'auto'``, any
            checkpoint in the folder counts, otherwise only one that was saved since
            the launch, of which tools/dist_run.sh notes the time.

    Returns:
        str, optional: Its path; None in the first attempt, and if there is none.
    """
    attempt = 'CONVMLP_MM_ATTEMPT', 'TORCHELASTIC_RESTART_COUNT'
    if not any(int(os.environ.get(name, 0)) for name in attempt):
        return None
    since = float(os.environ.get('CONVMLP_MM_LAUNCH_TIME', 'inf'))
    return find_latest_checkpoint(work_dir, None if resume == 'auto' else since)


def build_runner(cfg: Config) -> Runner:
    """Build the Runner of a configuration, where there is no GPU for the CPU.

    mmengine's mixed precision and torch's SyncBN between processes do not run
    on a CPU; there, a recipe that has them is trained in single precision (with
    ``dtype='bfloat16'`` in that) and with BN, and says so. With GPUs the
    configuration is taken as it is.

    Args:
        cfg (Config): It is changed on the CPU, and where it has a ``strategy``,
            which only the FlexibleRunner knows.

    Returns:
        Runner: Of the type ``runner_type``, if the configuration has it.
    """
    read_weights_only()
    if cfg.launcher == 'slurm':
        read_slurm()
    check_while_reading(cfg.get('default_scope'))
    if cfg.get('strategy') is not None:
        _fit_strategy(cfg)
    if get_device() == 'cpu':
        keep_memory()
        _fit_to_cpu(cfg)
        if cfg.launcher in ('pytorch', 'slurm'):
            _prepare_gloo(cfg)
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    check_optimizer(cfg)
    return runner


def _fit_strategy(cfg: Config) -> None:
    """Let a strategy be the one option that it takes."""
    if cfg.launcher == 'none':
        # One process has nobody to share with, and loads the whole model.
        cfg.pop('strategy')
        cfg.pop('runner_type', None)
        print('one process: the plain Runner, without a strategy', file=sys.stderr)
        return
    cfg.setdefault('runner_type', 'FlexibleRunner')


def read_weights_only() -> None:
    """Let mmengine read every checkpoint as :func:`read_checkpoint` does.

    Not at import: only the tools of this package decide for the whole process.
    """
    CheckpointLoader.register_scheme(SCHEMES, load_from_weights_only, force=True)
    # The loaders of torchvision://, open-mmlab:// and mmcls:// turn a name into a URL
    # and call this, so that they are safe with it, and whole files enter the cache.
    checkpoint.load_from_http = load_from_weights_only


def load_from_weights_only(filename: str, map_location: object = None) -> dict:
    """Read for mmengine, which takes the name of this function into its log."""
    return read_checkpoint(filename, map_location or 'cpu')


def _fit_to_cpu(cfg: Config) -> None:
    """Replace what only accelerators run.

    For a single process, mmengine itself turns SyncBN into BN.
    """
    replaced = []
    wrapper = cfg.get('optim_wrapper') or {}
    bfloat16 = wrapper.get('dtype') == 'bfloat16'
    if plain_optim_wrapper(wrapper):
        if bfloat16:
            wrapper['type'] = 'BFloat16OptimWrapper'
        replaced.append(f'{wrapper["type"]} instead of AmpOptimWrapper')

    def local_norm(key, value):
        if key == 'type' and value == 'SyncBN':
            replaced.append('BN instead of SyncBN')
            return 'BN'
        return value

    if cfg.launcher != 'none':
        _map_config(cfg, ['model'], local_norm)
    if replaced and os.environ.get('RANK', '0') == '0':
        changes = ' and '.join(dict.fromkeys(replaced))
        print(f'on the CPU, with {changes}', file=sys.stderr)


def plain_optim_wrapper(wrapper: dict) -> bool:
    """Turn mixed precision into single precision.

    Args:
        wrapper (dict): ``optim_wrapper`` of a configuration; it is changed.

    Returns:
        bool: Whether it was mixed.
    """
    if wrapper.get('type') != 'AmpOptimWrapper':
        return False
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)
    wrapper['type'] = 'OptimWrapper'
    return True


def read_slurm() -> None:
    """Put what srun tells a process into the variables that torchrun would set.

    What is set already stays. mmengine does the same where there are GPUs, but with
    port 29500, at which two jobs on a machine meet; here it depends on the job.

    Raises:
        ValueError: If srun has not started this process, or the address of the first
            machine cannot be found.
    """
    env = os.environ
    missing = [k for k in ('SLURM_PROCID', 'SLURM_NTASKS') if k not in env]
    if missing:
        raise ValueError(
            f'--launcher slurm is for processes that srun has started, but '
            f'{" and ".join(missing)} are not in the environment'
        )
    env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
    env['LOCAL_RANK'] = env.get('SLURM_LOCALID', '0')
    env.setdefault('MASTER_PORT', str(15000 + int(env.get('SLURM_JOB_ID', 0)) % 10000))
    if 'MASTER_ADDR' not in env:
        nodes = env.get('SLURM_STEP_NODELIST') or env.get('SLURM_NODELIST', '')
        try:
            names = subprocess.check_output(
                ['scontrol', 'show', 'hostnames', nodes], text=True
            )
            env['MASTER_ADDR'] = names.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            raise ValueError(
                f'scontrol does not tell the first host of {nodes!r}; set MASTER_ADDR'
            ) from None


def _prepare_gloo(cfg: Config) -> None:
    """Let the launchers' processes talk by gloo.

    mmengine selects a GPU for each process and hands DDP its number, neither
    of which exists on a CPU.
    """
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo')
    strategy = cfg.get('strategy') or {}
    if strategy.get('type') == 'DDPStrategy':
        strategy.setdefault('model_wrapper', dict(broadcast_buffers=False))
        strategy.model_wrapper.setdefault('device_ids', None)
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.model_wrapper_cfg.get('type', '').endswith('DistributedDataParallel'):
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
