#!/usr/bin/env python
"""Measure speed and memory of models against each other, and of loading data.

``infer`` and ``train`` take models as NAME[@OPTION,...]. NAME is a name of the zoo, a
file, mmdet::..., mmseg::..., mmpretrain::..., timm::NAME, or arch:s, arch:m, arch:l for
the backbone alone. Each model has a process of its own, and all of them are asked in
turn, round by round, for one measurement; weights are random and pictures are noise.
``data`` times the training loader of a configuration, without a model.
"""

import argparse
import contextlib
import io
import sys

import torch

from convmlp_mm.analysis.output import format_table
from convmlp_mm.benchmark.arguments import make_jobs, make_parser
from convmlp_mm.benchmark.data import (
    build_loader,
    describe_need,
    time_loading,
    time_pipeline,
)
from convmlp_mm.benchmark.report import (
    count_macs,
    draw_chart,
    find_top1,
    results_table,
)
from convmlp_mm.benchmark.rounds import Measurement, WorkerError, run_interleaved
from convmlp_mm.benchmark.steps import MATMUL
from convmlp_mm.config_files import find_config
from convmlp_mm.files import check_output, write_file
from convmlp_mm.launch import check_data, merge_options, one_line_errors

PNG_DPI = 110


def describe(args: argparse.Namespace, found: list[Measurement]) -> str:
    """Say how it was measured."""
    threads = '/'.join(str(n) for n in sorted({m.threads for m in found}))
    steps = '1 step' if args.warmup == 1 else f'{args.warmup} steps'
    predict = ' up to predictions' if getattr(args, 'predict', False) else ''
    return (
        f'{args.mode}{predict}, batch of {args.batch_size}: median and quartiles of a '
        f'step in {args.rounds} interleaved rounds (seed {args.seed}, {steps} to warm '
        f'up); torch {torch.__version__}, {found[0].device}, {threads} '
        f'{"thread" if threads == "1" else "threads"}.'
    )


def explain(args: argparse.Namespace) -> str:
    """Say what the columns are that do not explain themselves."""
    text = (
        " ratio: images/s over the first row's, median over the rounds; MiB: peak "
        'memory above what the process has with the model and the pictures.'
    )
    if args.top1:
        text += (
            ' top-1: as published, on ImageNet-1k, in Table 3 of the ConvMLP paper '
            "(paper) or the toolkit's metafile."
        )
    return text


def measure_models(args: argparse.Namespace) -> str:
    """Return the table; the chart is written if asked for."""
    with one_line_errors():
        jobs = make_jobs(args)
        macs = [None if j.spec.name == MATMUL else count_macs(j) for j in jobs]
        top1 = [find_top1(job.spec.name) if args.top1 else None for job in jobs]
    try:
        found = run_interleaved(jobs, args.rounds, args.seed, report=print)
    except WorkerError as error:
        print(f'benchmark.py: error: {error}', file=sys.stderr)
        sys.exit(1)
    note = describe(args, found)
    if args.plot is not None:
        stream = io.BytesIO()
        figure = draw_chart(found, top1, note)
        figure.savefig(stream, format='png', dpi=PNG_DPI)
        write_file(args.plot, stream.getvalue(), args.overwrite)
    table = results_table(found, macs, top1, args.format)
    return table if args.format == 'csv' else f'{table}\n{note}{explain(args)}\n'


def measure_data(args: argparse.Namespace) -> str:
    """Return the tables of the loader and of its pipeline."""
    with one_line_errors():
        if args.out is not None:
            check_output(args.out, args.overwrite)
        cfg = find_config(args.config)
        merge_options(cfg, args.cfg_options or {})
        check_data(cfg, ('train',))
        loader = build_loader(cfg, 0, args.batch_size)
    times = []
    for workers in dict.fromkeys(args.workers):
        print(f'{workers} processes')
        with_workers = build_loader(cfg, workers, args.batch_size)
        times.append(time_loading(with_workers, args.batches))
    print('the steps of the pipeline')
    steps = time_pipeline(loader, args.samples)
    total = sum(seconds for _, seconds in steps)
    rows = [
        [str(t.workers), f'{t.first:.2f}', f'{1e3 * t.batch:.1f}', f'{t.images:.1f}']
        for t in times
    ]
    header = ['workers', 'first batch (s)', 'batch (ms)', 'images/s']
    parts = [format_table(header, rows, args.format)]
    rows = [
        [name, f'{1e3 * seconds:.3f}', f'{100 * seconds / total:.1f}']
        for name, seconds in steps
    ]
    header = ['step of the pipeline', 'image (ms)', 'share (%)']
    parts.append(format_table(header, rows, args.format))
    if args.format != 'csv':
        size = len(next(iter(loader))['inputs'])
        if args.step is not None:
            parts.append(describe_need(times, args.step, size) + '\n')
        parts.append(
            f'{args.batches} batches of {size} for each number of workers; '
            f'{args.samples} pictures for the steps, in one process.\n'
        )
    return '\n'.join(parts)


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__).parse_args(argv)
    # What the toolkits print does not belong into the table.
    with contextlib.redirect_stdout(sys.stderr):
        table = (measure_data if args.mode == 'data' else measure_models)(args)
    if args.out is None:
        sys.stdout.write(table)
    else:
        write_file(args.out, table, args.overwrite)


if __name__ == '__main__':
    main()
