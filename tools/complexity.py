#!/usr/bin/env python
"""Count parameters, multiply-accumulates and activations of configurations.

The models have no values, only shapes; the few that need values, as the operators of
mmcv do, are run on the CPU. Parameters are in millions, multiply-accumulates (MACs)
of convolutions and matrix products in 1e9, activations (elements of their outputs) in
millions; CSV has the whole numbers.

Of a tracker the detector is run, of teacher and student the teacher, of a
self-supervised model the backbone. Not counted are models that want something when they
are built (a package that is not installed, a file of weights), and of the toolkits'
own Mask2Former for videos, SparK and CLRNet, whose forward wants more than a picture.
"""

import argparse
import contextlib
import os.path as osp
import sys

from convmlp_mm.analysis.complexity import (
    Complexity,
    default_shape,
    measure_complexity,
)
from convmlp_mm.analysis.output import FORMATS, format_table
from convmlp_mm.config_files import find_config
from convmlp_mm.files import check_output, write_file
from convmlp_mm.launch import one_line_errors


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        'models',
        nargs='+',
        help='names of the zoo, files, or mmdet::..., mmseg::..., mmpretrain::..., '
        'timm::NAME',
    )
    parser.add_argument(
        '--shape',
        nargs='+',
        type=int,
        metavar='PIXELS',
        help='height and width, or one number for both; by default the size that '
        'each configuration is tested at (detectors: 800x1280)',
    )
    parser.add_argument('--format', choices=FORMATS, default='text')
    parser.add_argument(
        '--out',
        type=osp.expanduser,
        help='file to write; by default the terminal',
    )
    parser.add_argument(
        '--overwrite', action='store_true', help='replace the file of --out'
    )
    return parser.parse_args(argv)


def row(cost: Complexity, exact: bool) -> list[str]:
    """Format one line of the table."""
    counts = (cost.params, cost.macs, cost.activations)
    if exact:
        figures = [str(n) for n in counts]
    else:
        figures = [f'{n / unit:.2f}' for n, unit in zip(counts, (1e6, 1e9, 1e6))]
    levels = [' '.join(map(str, n)) or '-' for n in (cost.strides, cost.channels)]
    return [cost.name, '{}x{}'.format(*cost.shape), *figures, *levels]


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    exact = args.format == 'csv'
    units = ('', '', '') if exact else (' (M)', ' (G)', ' (M)')
    counts = [n + u for n, u in zip(('params', 'MACs', 'activations'), units)]
    header = ['model', 'shape', *counts, 'strides', 'channels']
    # What the toolkits print does not belong into the table.
    with one_line_errors(), contextlib.redirect_stdout(sys.stderr):
        if args.shape is not None and len(args.shape) > 2:
            raise ValueError(
                f'--shape takes height and width, but got {len(args.shape)} numbers'
            )
        if args.out is not None:
            check_output(args.out, args.overwrite)
        shape = args.shape and (args.shape[0], args.shape[-1])
        # All of them before the first is counted.
        jobs = [(name, find_config(name)) for name in args.models]
        jobs = [(name, cfg, shape or default_shape(cfg)) for name, cfg in jobs]
        costs = [measure_complexity(cfg, shape, name) for name, cfg, shape in jobs]
    table = format_table(header, [row(cost, exact) for cost in costs], args.format)
    if args.out is None:
        sys.stdout.write(table)
    else:
        write_file(args.out, table, args.overwrite)


if __name__ == '__main__':
    main()
