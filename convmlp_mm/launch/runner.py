"""The Runner of a configuration, where it is started and by whom."""

import os
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import init_dist
from mmengine.registry import RUNNERS
from mmengine.runner import CheckpointLoader, Runner, checkpoint

from ..checkpoint import read_checkpoint
from ..hooks.checkpoint import find_latest_checkpoint
from ..hooks.model import CheckWeightsHook
from ..hooks.work_dir import LaunchHook, work_dir_lock
from ..zoo import map_config
from .checks import check_optimizer, is_first_process
from .process import keep_memory

# Prefixes of names of checkpoints, S3 as mmengine spells it.
SCHEMES = ('', 'http://', 'https://', r'(\S+\:)?s3://', r'(\S+\:)?petrel://')


def lock_of_training(cfg: Config) -> AbstractContextManager:
    """Return the lock of ``cfg.work_dir``, which only the first process takes."""
    first = is_first_process(cfg.launcher)
    return work_dir_lock(cfg.work_dir) if first else nullcontext()


def checkpoint_of_restart(work_dir: str, resume: str | None) -> str | None:
    """Return where to go on when a launcher has started the processes again.

    Args:
        work_dir: The folder of the run.
        resume: The value of ``--resume``: with ``'auto'``, any checkpoint in the folder
            counts, otherwise only one of this launch, ``CONVMLP_MM_LAUNCH_ID``.

    Returns:
        Its path; None in the first attempt, and if there is none. The errors are those
        of :func:`find_latest_checkpoint`.
    """
    attempts = 'CONVMLP_MM_ATTEMPT', 'TORCHELASTIC_RESTART_COUNT'
    if all(os.environ.get(name, '0') == '0' for name in attempts):
        return None
    if resume == 'auto':
        return find_latest_checkpoint(work_dir)
    launch = os.environ.get('CONVMLP_MM_LAUNCH_ID')
    saved = find_latest_checkpoint(work_dir, launch) if launch else None
    if saved is None:
        text = f'started again: this launch has saved nothing in {work_dir!r} yet'
        print(f'{text}, so that it begins as at first', file=sys.stderr)
    return saved


def build_runner(cfg: Config) -> Runner:
    """Build the Runner of a configuration, which is changed on a CPU.

    mmengine's mixed precision and torch's SyncBN do not run there: a recipe that has
    them is trained in single precision (or in bfloat16, if its ``dtype`` is that) and
    with BN, and says so.
    """
    read_weights_only()
    if cfg.launcher == 'slurm':
        read_slurm()
    if get_device() == 'cpu':
        keep_memory()
        _fit_to_cpu(cfg)
        if cfg.launcher in ('pytorch', 'slurm'):
            _prepare_gloo(cfg)
    elif cfg.launcher == 'pytorch' and _meeting_place():
        options = (cfg.get('env_cfg') or {}).get('dist_cfg') or {}
        init_dist('pytorch', **options, **_meeting_place())
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    runner.register_hook(LaunchHook())
    if not any(isinstance(hook, CheckWeightsHook) for hook in runner.hooks):
        # A checkpoint is data for every configuration.
        runner.register_hook(CheckWeightsHook())
    check_optimizer(cfg)
    return runner


def read_weights_only() -> None:
    """Let mmengine read every checkpoint as :func:`read_checkpoint` does."""
    CheckpointLoader.register_scheme(SCHEMES, load_from_weights_only, force=True)
    # The loaders of torchvision://, open-mmlab:// and mmcls:// turn a name into a URL
    # and call this, so that they are safe with it, and whole files enter the cache.
    checkpoint.load_from_http = load_from_weights_only


def load_from_weights_only(filename: str, map_location: object = None) -> dict:
    """Read for mmengine, which takes the name of this function into its log."""
    return read_checkpoint(filename, map_location or 'cpu')


def _fit_to_cpu(cfg: Config) -> None:
    """Replace what only accelerators run."""
    replaced = set()
    wrapper = cfg.get('optim_wrapper') or {}
    bfloat16 = wrapper.get('dtype') == 'bfloat16'
    if plain_optim_wrapper(wrapper):
        if bfloat16:
            wrapper['type'] = 'BFloat16OptimWrapper'
        replaced.add(f'{wrapper["type"]} instead of AmpOptimWrapper')

    def local_norm(key, value):
        if key == 'type' and value in ('SyncBN', torch.nn.SyncBatchNorm):
            replaced.add('BN instead of SyncBN')
            return 'BN'
        return value

    # For a single process, mmengine itself turns SyncBN into BN.
    if cfg.launcher != 'none':
        map_config(cfg, ['model'], local_norm)
    if replaced and is_first_process(cfg.launcher):
        print('on the CPU, with', ' and '.join(sorted(replaced)), file=sys.stderr)


def plain_optim_wrapper(wrapper: dict) -> bool:
    """Make a mixed ``optim_wrapper`` one of single precision; tell whether it was."""
    if wrapper.get('type') != 'AmpOptimWrapper':
        return False
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)
    wrapper['type'] = 'OptimWrapper'
    return True


def read_slurm() -> None:
    """Put what srun tells a process into the variables that torchrun would set.

    mmengine does the same where there are GPUs, but with port 29500, at which two jobs
    on a machine meet; here it depends on the job.

    Raises:
        ValueError: If srun has not started this process.
    """
    env = os.environ
    if 'SLURM_PROCID' not in env:
        raise ValueError('--launcher slurm is for srun, but SLURM_PROCID is not set')
    env['RANK'], env['WORLD_SIZE'] = env['SLURM_PROCID'], env['SLURM_NTASKS']
    env['LOCAL_RANK'] = env.get('SLURM_LOCALID', '0')
    env.setdefault('MASTER_PORT', str(15000 + int(env.get('SLURM_JOB_ID', 0)) % 10000))
    if 'MASTER_ADDR' not in env:
        nodes = env.get('SLURM_STEP_NODELIST') or env['SLURM_NODELIST']
        command = ['scontrol', 'show', 'hostnames', nodes]
        env['MASTER_ADDR'] = subprocess.check_output(command, text=True).split()[0]


def _meeting_place() -> dict:
    """Return the file in which the processes of one machine meet, if there is one."""
    # Unlike a port, others neither see nor reach it.
    store = os.environ.get('CONVMLP_MM_STORE')
    if store is None:
        return {}
    rank, world_size = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
    return dict(init_method=f'file://{store}', rank=rank, world_size=world_size)


def _prepare_gloo(cfg: Config) -> None:
    """Let the processes talk by gloo, and DDP work without the number of a GPU."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group('gloo', **_meeting_place())
    if cfg.get('model_wrapper_cfg') is None:
        cfg.model_wrapper_cfg = dict(
            type='MMDistributedDataParallel',
            broadcast_buffers=False,
            find_unused_parameters=cfg.get('find_unused_parameters', False),
        )
    if cfg.model_wrapper_cfg.get('type', '').endswith('DistributedDataParallel'):
        cfg.model_wrapper_cfg.setdefault('device_ids', None)
