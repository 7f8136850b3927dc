#!/usr/bin/env python
"""Qualify a machine with a GPU: are the results right, do runs survive, how fast is it?

Each stage is a process of its own, ends within --limit seconds, and writes what it
found to OUT/STAGE.json check by check, so that what was seen before a failure stays:

  build    mmcv's operators, compiled for the card if need be, against the CPU
  right    the backbones against the published model, the systems against the CPU
  train    the quick start and CIFAR-10 by tools/dist_train.sh, in float32 and float16
  survive  SIGKILL, SIGTERM, resume; two processes on one card
  infer    images a second of classifiers
  steps    training steps of classifiers, and their memory
  systems  those of detectors and segmentors at the sizes of their recipes
  compiled compiled backbones beside eager ones
  hooks    what the hooks of this package add to a step
  feed     images a second of the loaders, by the number of workers

`report` prints the tables of all stages in OUT.
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Backbones of about the size of ConvMLP-M, as mmpretrain builds them.
OTHERS = (
    'mmpretrain::resnet/resnet50_8xb32_in1k.py@channels-last,',
    'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py@',
    'mmpretrain::convnext/convnext-tiny_32xb128_in1k.py@channels-last,',
)
ON_PHOTOS = """
_base_ = {root!r} + '/configs/convmlp_s_imagenet.py'
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='CustomDataset',
        data_root={data!r},
        data_prefix='photos',
        pipeline=_base_.train_pipeline,
    )
)
"""
# Images of each GPU, their size, and where their data is in DATA.
SYSTEMS = {
    'retinanet_convmlp_s': (2, (800, 1333), 'coco'),
    'mask_rcnn_convmlp_s': (2, (800, 1333), 'coco'),
    'semantic_fpn_convmlp_s': (4, (512, 512), 'ade/ADEChallengeData2016'),
}
# The modules in tests/gpu with their functions; the others are benchmarks.
STAGES = dict(build='equality', right='equality', train='runs', survive='runs')
STAGES |= dict.fromkeys(('infer', 'steps', 'systems', 'compiled'))
STAGES |= dict(hooks='runs', feed=None)


def pair(name: str, mode: str, *options: str) -> list[str]:
    """Name the published structure and ours, with the same options."""
    options = [option for option in options if option != 'float32']
    ours = [*options, *['deploy'] * (mode == 'infer')]
    found = [f'published::{name}@{",".join(options)}', f'{name}@{",".join(ours)}']
    return [text.removesuffix('@') for text in found]


def classifiers(mode: str, archs: str, precisions: list[str], *options) -> list[str]:
    """Name classifiers in both structures, each in all precisions."""
    names = [f'convmlp_{arch}_imagenet' for arch in archs]
    jobs = [(name, mode, p, *options) for p in precisions for name in names]
    return [text for job in jobs for text in pair(*job)]


def benchmarks(args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Return, by stage and name, the command lines of tools/analysis/benchmark.py."""
    gpu = args.device == 'cuda'
    lower = ['tf32', 'bf16', 'fp16'] * gpu
    every, two = ['float32', *lower], lower[:2] or ['float32']
    others = [f'{name}{p}' for p in lower[:2] for name in OTHERS]
    graphs = [f'convmlp_{a}_imagenet@{p},deploy,graph' for p in lower for a in 'sml']
    saving = [f'convmlp_{arch}_imagenet@bf16,cp' for arch in 'sml' * gpu]

    def models(mode, names, batch, *more):
        size = ['--batch-size', batch, '--rounds', args.rounds, '--device', args.device]
        return [mode, *names, *size, *more]

    profile, batch = '--profile', args.batch
    names = [*classifiers('infer', 'sml', every), *others]
    infer = dict(infer_64=models('infer', names, batch, profile))
    names = [*classifiers('infer', 'sml', two), *graphs, *others]
    infer['infer_1'] = models('infer', names, 1)
    names = [*classifiers('train', 'sml', every), *others, *saving]
    steps = dict(steps_64=models('train', names, batch, profile))
    if gpu:
        names = classifiers('infer', 'sml', lower)
        infer['infer_256'] = models('infer', names, 256, profile)
        names = classifiers('train', 'sml', lower[1:])
        steps['steps_256'] = models('train', names, 256)
    compiled, systems = {}, {}
    for mode in ('infer', 'train'):
        for precision in two:
            names = classifiers(mode, args.archs, [precision], 'compile')
            names += classifiers(mode, args.archs, [precision])
            compiled[f'{mode}_{precision}'] = models(mode, names, batch, profile)
    for name, (images, size, _) in SYSTEMS.items():
        names = []
        for precision in ['tf32', 'fp16'] if gpu else ['float32']:
            baseline = f'baselines/{name.replace("convmlp_s", "resnet50")}@{precision}'
            names += pair(name, 'train', precision)
            names.append(baseline.removesuffix('@float32'))
        shape = ['--shape', *(args.size or size)]
        systems[name] = models('train', names, images, profile, *shape)
    found = dict(infer=infer, steps=steps, compiled=compiled, systems=systems)
    if args.data is not None:
        # ImageNet's loader, of a folder of photographs.
        photos = args.out / 'photos.py'
        photos.write_text(ON_PHOTOS.format(root=str(ROOT), data=str(args.data)))
        workers = [n for n in (1, 2, 4, 8, 16) if n <= os.cpu_count()]
        folders = {name: folder for name, (_, _, folder) in SYSTEMS.items()}
        found['feed'] = {}
        for name, folder in {**folders, str(photos): ''}.items():
            command = ['data', name, '--workers', *workers, '--batches', 40]
            command += ['--cfg-options', f'data_root={args.data / folder}/']
            found['feed'][Path(name).stem] = command
    return found


def run_benchmarks(args: argparse.Namespace, results, stage: str) -> None:
    """Run all benchmarks of a stage and note their rows."""
    from runs import Launch

    for name, command in benchmarks(args)[stage].items():
        file = args.out / f'{stage}_{name}.json'
        with results.checking(name):
            options = ['--out', file, '--overwrite']
            launch = Launch(args, name, 'analysis/benchmark.py', *command, *options)
            code, text, seconds = launch.wait()
            if code:
                raise RuntimeError(text.strip().rpartition('\n')[2])
            found = json.loads(file.read_text())
            found = {k: found[k] for k in ('models', 'loading') if k in found}
            results.add(name, None, took=seconds, **found)


def report(args: argparse.Namespace) -> None:
    """Print what all stages have found, as tables."""
    from results import state

    from convmlp_mm.launch.tables import format_table

    for stage in STAGES:
        path = args.out / f'{stage}.json'
        if not path.is_file():
            continue
        found = json.loads(path.read_text())
        print(f'\n## {stage}\n\n{state(found["machine"])}, {found["seconds"]:.0f} s\n')
        words = {True: 'passed', False: 'failed', None: ''}
        checks = found['checks']
        rows = [[x['name'], words[x['passed']], state(x)] for x in checks]
        print(format_table(['check', '', 'found'], rows, 'markdown', (0, 1, 2)))
        for check in checks:
            if 'models' in check:
                header = ['model', 'ms', 'images/s', 'ratio', 'MiB']
                rows = compare(check['models'])
            elif 'loading' in check:
                header = ['workers', 'images/s']
                speeds = check['loading'].items()
                rows = [[n, f'{x["images_per_second"]:.0f}'] for n, x in speeds]
            else:
                continue
            print(f'### {check["name"]}\n\n{format_table(header, rows, "markdown")}')


def compare(models: list[dict]) -> list[list[str]]:
    """Format models; the ratio is to the published structure with the same options."""
    medians = {row['model']: row['median'] for row in models}
    rows = []
    for row in models:
        name, _, options = row['model'].partition('@')
        shared = [x for x in options.split(',') if x not in ('deploy', 'graph')]
        twin = f'published::{name}@{",".join(shared)}'.removesuffix('@')
        ratio = f'{medians[twin] / row["median"]:.2f}' if twin in medians else ''
        memory = '' if row['memory'] is None else f'{row["memory"] / 2**20:.0f}'
        speed = [f'{1e3 * row["median"]:.2f}', f'{row["images_per_second"]:.0f}']
        rows.append([row['model'], *speed, ratio, memory])
    return rows


def run_stage(args: argparse.Namespace) -> int:
    """Run the only stage in this process; return 1 if a check failed."""
    from results import Results

    (stage,) = args.stages
    results = Results(args, stage)
    if STAGES[stage] is None:
        run_benchmarks(args, results, stage)
    else:
        getattr(importlib.import_module(STAGES[stage]), stage)(args, results)
    return int(any(check['passed'] is False for check in results.found['checks']))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('out', type=Path, help='folder of the results')
    add('stages', nargs='*', metavar='STAGE', help='all by default; or report')
    add('--data', type=Path, help='folder with coco, ade, cifar10_small, photos')
    add('--device', choices=('cuda', 'cpu'), default='cuda', help='cpu: try it out')
    add('--limit', type=int, default=600, help='seconds for each stage')
    add('--epochs', type=int, default=60, help='of CIFAR-10')
    add('--cpu-epochs', type=int, default=2, help='of the curve from the CPU')
    add('--batch', type=int, default=64, help='of the larger comparisons')
    add('--archs', default='sml', help='that are compiled')
    add('--rounds', type=int, default=5, help='of the benchmarks')
    add('--size', type=int, nargs=2, help='of detection and segmentation')
    add('--latest', default='8', help='seconds until a kill at most')
    add('--ap50', type=float, default=0.5, help='what the quick start has to reach')
    add('--settings', nargs='+', default=[], help='KEY=VALUE of the quick start')
    add('--inside', action='store_true', help=argparse.SUPPRESS)
    args = parser.parse_args()
    known = [*STAGES, 'report']
    for stage in args.stages:
        if stage not in known:
            parser.error(f'unknown stage {stage!r}; there are {", ".join(known)}')
    if 'feed' in args.stages and args.data is None:
        parser.error('feed needs --data, with coco, ade and photos in it')
    if not args.stages:
        args.stages = list(STAGES)[: None if args.data else -1]
    args.out = args.out.absolute()
    args.data = args.data and args.data.absolute()
    return args


def main() -> None:
    args = parse_args()
    sys.path[:0] = [str(ROOT / 'tests' / 'gpu'), str(ROOT)]
    if args.inside:
        raise SystemExit(run_stage(args))
    args.out.mkdir(parents=True, exist_ok=True)
    if args.stages == ['report']:
        return report(args)
    os.environ['PYTHONPATH'] = f'{ROOT}:{os.environ.get("PYTHONPATH", "")}'
    failed, given = [], [x for x in sys.argv[1:] if x not in STAGES]
    for stage in args.stages:
        command = [sys.executable, __file__, given[0], stage, *given[1:], '--inside']
        process = subprocess.Popen(command, start_new_session=True)
        try:
            code = process.wait(args.limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            code = f'more than {args.limit} s'
        if code:
            failed.append(f'{stage} ({code})')
    if failed:
        raise SystemExit(f'not everything passed: {", ".join(failed)}')


if __name__ == '__main__':
    main()
