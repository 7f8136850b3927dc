#!/usr/bin/env python
"""Train any configuration of mmpretrain, mmdet or mmseg through its Runner."""

import argparse
import contextlib
import os
import os.path as osp

# A thread that waits soon leaves its core to other processes. libgomp, which torch
# brings, reads this once.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from mmengine.config import Config
from mmengine.device import get_device

from convmlp_mm import launch
from convmlp_mm.hooks import find_latest_checkpoint
from convmlp_mm.hooks.model import has_bfloat16


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='configuration file')
    text = (
        'go on from this checkpoint, or without a value from the newest in the work '
        'dir that opens; if there is none, start as without the option'
    )
    path = dict(type=osp.expanduser, metavar='CHECKPOINT')
    add('--resume', nargs='?', const='auto', **path, help=text)
    text = (
        'train in automatic mixed precision: float16, or what optim_wrapper.dtype '
        'says; on a CPU that computes in it, bfloat16'
    )
    add('--amp', action='store_true', help=text)
    text = 'scale the learning rate by batch size over auto_scale_lr.base_batch_size'
    add('--auto-scale-lr', action='store_true', help=text)
    launch.add_common_arguments(parser)
    return parser.parse_args()


def prepare(args: argparse.Namespace) -> Config:
    """Merge the options of training into the configuration and check them."""
    cfg = launch.load_config(args)
    if args.amp:
        wrapper, on_cpu = cfg.optim_wrapper, get_device() == 'cpu'
        if on_cpu and has_bfloat16():
            wrapper.setdefault('dtype', 'bfloat16')
        dtype = wrapper.get('dtype')
        if on_cpu and dtype != 'bfloat16':
            raise ValueError(
                '--amp on the CPU trains in bfloat16, but optim_wrapper.dtype is '
                f'{dtype}; bfloat16 is slow where the processor has it not'
            )
        kind = wrapper.get('type', 'OptimWrapper')
        if kind not in ('OptimWrapper', 'AmpOptimWrapper'):
            raise ValueError(f'--amp needs optim_wrapper.type=OptimWrapper, not {kind}')
        wrapper.type = 'AmpOptimWrapper'
        wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise KeyError('--auto-scale-lr needs auto_scale_lr.base_batch_size')
        cfg.auto_scale_lr.enable = True
    return cfg


def choose_start(cfg: Config, resume: str | None) -> None:
    """Put into the configuration which checkpoint the training goes on from."""
    saved = launch.checkpoint_of_restart(cfg.work_dir, resume)
    if saved is not None:
        cfg.resume, cfg.load_from = True, saved
    elif resume == 'auto':
        newest = find_latest_checkpoint(cfg.work_dir)
        cfg.resume = newest is not None
        # If there is nothing to resume, load_from of the configuration stays.
        cfg.load_from = newest or cfg.get('load_from')
    elif resume is not None:
        launch.check_checkpoint(resume)
        cfg.resume, cfg.load_from = True, resume


def main() -> None:
    launch.end_with_launcher()
    args = parse_args()
    with contextlib.ExitStack() as stack:
        with launch.one_line_errors():
            cfg = prepare(args)
            is_there = osp.isdir(cfg.work_dir)
            if is_there:
                stack.enter_context(launch.lock_of_training(cfg))
            choose_start(cfg, args.resume)
            # An empty val_cfg validates, too.
            splits = ('train',) if cfg.get('val_cfg') is None else ('train', 'val')
            launch.check_data(cfg, splits)
            # Neither a mistake nor a check makes a folder.
            if not is_there and not args.check:
                stack.enter_context(launch.lock_of_training(cfg))
        if args.check:
            return
        stack.enter_context(launch.final_mistakes())
        stack.enter_context(launch.closing_group())
        stack.enter_context(launch.naming_data())
        runner = launch.build_runner(cfg)
        runner.train()


if __name__ == '__main__':
    main()
