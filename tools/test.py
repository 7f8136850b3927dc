#!/usr/bin/env python
"""Evaluate a checkpoint of any configuration of mmpretrain, mmdet or mmseg."""

import argparse
import os
import os.path as osp

# As in train.py.
if 'OMP_WAIT_POLICY' not in os.environ:
    os.environ.setdefault('GOMP_SPINCOUNT', '1000')

from mmengine.config import Config, ConfigDict
from mmengine.evaluator import DumpResults

from convmlp_mm.launch import (
    add_common_arguments,
    build_runner,
    check_checkpoint,
    check_data,
    closing_group,
    final_mistakes,
    load_config,
    one_line_errors,
)
from convmlp_mm.launch.process import end_with_launcher
from convmlp_mm.zoo import give_visualizer


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='configuration file')
    parser.add_argument(
        'checkpoint', type=osp.expanduser, help='checkpoint file or URL'
    )
    parser.add_argument(
        '--out',
        metavar='PKL',
        type=osp.expanduser,
        help='dump the predictions here, as a pickle: open only those that you trust',
    )
    parser.add_argument(
        '--show-dir',
        type=osp.expanduser,
        help='draw predictions beside the ground truth into this folder',
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation by tta_model and tta_pipeline of the '
        'configuration',
    )
    add_common_arguments(parser)
    return parser.parse_args()


def draw_to(cfg: Config, folder: str) -> None:
    """Turn on the visualisation hook, whose options differ by toolkit."""
    hook = (cfg.get('default_hooks') or {}).get('visualization')
    kind = hook and getattr(hook.type, '__name__', hook.type).rpartition('.')[2]
    give_visualizer(cfg)
    if kind == 'DetVisualizationHook':
        hook.update(draw=True, test_out_dir=folder)
    elif kind == 'SegVisualizationHook':
        hook.draw = True
        cfg.visualizer.save_dir = folder
    elif kind == 'VisualizationHook':
        hook.update(enable=True, out_dir=folder)
    else:
        raise ValueError(
            '--show-dir needs default_hooks.visualization to be the hook of '
            f'mmdet, mmseg or mmpretrain, but the configuration has {kind}'
        )


def prepare(args: argparse.Namespace) -> Config:
    """Merge the options of testing into the configuration and check it."""
    cfg = load_config(args)
    check_checkpoint(args.checkpoint)
    if args.out and not args.out.endswith(('.pkl', '.pickle')):
        raise ValueError(f'--out must end with .pkl or .pickle, but got {args.out!r}')
    cfg.load_from = args.checkpoint
    if args.show_dir:
        draw_to(cfg, args.show_dir)
    if args.tta:
        missing = {'tta_model', 'tta_pipeline'} - set(cfg)
        if missing:
            raise KeyError(
                f'--tta needs {" and ".join(sorted(missing))} in the '
                'configuration, which has none'
            )
        cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    check_data(cfg, ('test',))
    return cfg


def main() -> None:
    end_with_launcher()
    args = parse_args()
    with one_line_errors():
        cfg = prepare(args)
    if args.check:
        return
    with final_mistakes(), closing_group():
        runner = build_runner(cfg)
        if args.out:
            dump = DumpResults(out_file_path=args.out)
            runner.test_evaluator.metrics.append(dump)
        runner.test()


if __name__ == '__main__':
    main()
