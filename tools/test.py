#!/usr/bin/env python
"""Evaluate a checkpoint of any configuration of mmpretrain, mmdet or mmseg."""

import argparse
import os
import os.path as osp

# This is the same setting as in train.py.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from convmlp_mm import launch
from convmlp_mm.zoo import give_visualizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('config', help='configuration file')
    add('checkpoint', type=osp.expanduser, help='checkpoint file or URL')
    text = 'dump the predictions here, as a pickle: open only those that you trust'
    add('--out', metavar='PKL', type=osp.expanduser, help=text)
    text = 'draw predictions beside the ground truth into this folder'
    add('--show-dir', type=osp.expanduser, help=text)
    text = 'test-time augmentation by tta_model and tta_pipeline of the configuration'
    add('--tta', action='store_true', help=text)
    launch.add_common_arguments(parser)
    return parser.parse_args()


def draw_to(cfg: Config, folder: str) -> None:
    """Turn on the visualisation hook, whose options differ by toolkit."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    kind = hook and getattr(hook.type, '__name__', hook.type).rpartition('.')[2]
    give_visualizer(cfg)
    if kind == 'VisualizationHook':
        hook.enable, hook.out_dir = True, folder
    elif kind == 'DetVisualizationHook':
        hook.draw, hook.test_out_dir = True, folder
    elif kind == 'SegVisualizationHook':
        hook.draw, cfg.visualizer.save_dir = True, folder
    else:
        raise ValueError(
            '--show-dir needs default_hooks.visualization to be the hook of '
            f'mmdet, mmseg or mmpretrain, but the configuration has {kind}'
        )


def prepare(args: argparse.Namespace) -> Config:
    """Merge the options of testing into the configuration and check it."""
    cfg = launch.load_config(args)
    launch.check_checkpoint(args.checkpoint)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end with .pkl or .pickle, but got {args.out!r}')
    cfg.load_from = args.checkpoint
    if args.show_dir:
        draw_to(cfg, args.show_dir)
    if args.tta:
        missing = ' and '.join(k for k in ('tta_model', 'tta_pipeline') if k not in cfg)
        if missing:
            raise KeyError(f'--tta needs {missing}, which the configuration has not')
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    launch.check_data(cfg, ('test',))
    return cfg


def main() -> None:
    launch.end_with_launcher()
    args = parse_args()
    with launch.one_line_errors():
        cfg = prepare(args)
        if args.check:
            return
        os.makedirs(cfg.work_dir, exist_ok=True)
    with launch.final_mistakes(), launch.closing_group(), launch.naming_data():
        runner = launch.build_runner(cfg)
        if args.out:
            dump = DumpResults(out_file_path=args.out)
            runner.test_evaluator.metrics.append(dump)
        runner.test()


if __name__ == '__main__':
    main()
