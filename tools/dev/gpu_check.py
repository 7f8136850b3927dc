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

`report` prints the tables of all stages in OUT. On a machine without a network,
--wheels is a folder with what is not installed, and --mmcv the source of mmcv.
"""

import argparse
import glob
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Where the checks of each stage stand in tests/gpu; those without are of speed.
STAGES = dict.fromkeys(('build', 'right'), 'equality')
STAGES |= dict.fromkeys(('train', 'survive'), 'runs')
STAGES |= dict.fromkeys(('infer', 'steps', 'systems', 'compiled'))
STAGES |= dict(hooks='runs', feed=None)
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
# Images of a step, their size, and the folder in --data.
SYSTEMS = {
    'retinanet_convmlp_s': (2, (800, 1333), 'coco'),
    'mask_rcnn_convmlp_s': (2, (800, 1333), 'coco'),
    'semantic_fpn_convmlp_s': (4, (512, 512), 'ade/ADEChallengeData2016'),
}


def install(args: argparse.Namespace) -> None:
    """Install the wheels into OUT/site, and compile mmcv if none of them is mmcv."""
    site = args.out / 'site'
    if args.wheels is None or site.is_dir():
        return
    pip = [sys.executable, '-m', 'pip']
    offline = ['--no-index', '--no-deps', '--no-build-isolation']
    # A folder that is there only when it is whole.
    partial = site.with_suffix('.partial')
    target = [*pip, 'install', '-q', *offline, '--no-compile', '--target', str(partial)]
    files = [str(path) for path in sorted(args.wheels.absolute().glob('*.whl'))]
    subprocess.run([*target, *files, str(ROOT)], check=True)
    if not any('mmcv' in Path(name).name for name in files):
        started = time.perf_counter()
        env = dict(os.environ, MMCV_WITH_OPS='1', PYTHONPATH=str(partial))
        # The toolkit of a machine may lack headers that torch brings.
        brought = glob.glob(f'{sys.prefix}/lib/python*/site-packages/nvidia/*/include')
        env['CPATH'] = os.pathsep.join([*brought, os.environ.get('CPATH', '')])
        env.setdefault('MAX_JOBS', str(os.cpu_count()))
        command = [*pip, 'wheel', '-v', *offline, '-w', str(args.out / 'built')]
        with open(args.out / 'mmcv.log', 'w') as log:
            output = dict(stdout=log, stderr=subprocess.STDOUT)
            subprocess.run([*command, args.mmcv], env=env, check=True, **output)
        (built,) = (args.out / 'built').glob('*mmcv*.whl')
        subprocess.run([*target, str(built)], check=True)
        print(f'mmcv was compiled in {time.perf_counter() - started:.0f} s', flush=True)
    partial.rename(site)


def pair(name: str, mode: str, *options: str) -> list[str]:
    """Name the published structure and ours, with the same options."""
    options = [option for option in options if option != 'float32']
    ours = [*options, *['deploy'] * (mode == 'infer')]
    found = [f'published::{name}@{",".join(options)}', f'{name}@{",".join(ours)}']
    return [text.removesuffix('@') for text in found]


def classifiers(mode: str, archs: str, precisions: list[str], *options) -> list[str]:
    """Name classifiers in both structures, each in all precisions."""
    names = [f'convmlp_{arch}_imagenet' for arch in archs]
    pairs = (pair(name, mode, p, *options) for p in precisions for name in names)
    return [text for both in pairs for text in both]


def benchmarks(args: argparse.Namespace) -> dict[str, dict[str, list]]:
    """Return, by stage and name, the command lines of tools/analysis/benchmark.py."""
    gpu = args.device == 'cuda'
    lower = ['tf32', 'bf16', 'fp16'] * gpu
    two = lower[:2] or ['float32']
    others = [f'{name}{p}' for p in lower[:2] for name in OTHERS]
    graphs = [f'convmlp_{a}_imagenet@{p},deploy,graph' for p in lower for a in 'sml']
    saving = [f'convmlp_{arch}_imagenet@bf16,cp' for arch in 'sml' * gpu]

    def models(mode, names, batch, *more):
        size = ['--batch-size', batch, '--rounds', args.rounds, '--device', args.device]
        return [mode, *names, *size, *more]

    profile, every, batch = '--profile', ['float32', *lower], args.batch
    names = [*classifiers('infer', 'sml', every), *others]
    found = dict(infer=dict(infer_64=models('infer', names, batch, profile)))
    names = [*classifiers('infer', 'sml', two), *graphs, *others]
    found['infer']['infer_1'] = models('infer', names, 1)
    names = [*classifiers('train', 'sml', every), *others, *saving]
    found['steps'] = dict(steps_64=models('train', names, batch, profile))
    if gpu:
        names = classifiers('infer', 'sml', lower)
        found['infer']['infer_256'] = models('infer', names, 256, profile)
        names = classifiers('train', 'sml', lower[1:])
        found['steps']['steps_256'] = models('train', names, 256)
    found.update(compiled={}, systems={})
    for mode, precision in itertools.product(('infer', 'train'), two):
        names = classifiers(mode, args.archs, [precision], 'compile')
        names += classifiers(mode, args.archs, [precision])
        command = models(mode, names, batch, profile)
        found['compiled'][f'{mode}_{precision}'] = command
    for name, (images, size, _) in SYSTEMS.items():
        names = []
        for precision in ['tf32', 'fp16'] if gpu else ['float32']:
            baseline = f'baselines/{name.replace("convmlp_s", "resnet50")}@{precision}'
            names += [*pair(name, 'train', precision)]
            names += [baseline.removesuffix('@float32')]
        shape = ['--shape', *(args.size or size)]
        found['systems'][name] = models('train', names, images, profile, *shape)
    if args.data is not None:
        # ImageNet's loader, of a folder of photographs.
        photos = args.out / 'photos.py'
        photos.write_text(ON_PHOTOS.format(root=str(ROOT), data=str(args.data)))
        workers = [n for n in (1, 2, 4, 8, 16) if n <= os.cpu_count()]
        options = ['--workers', *workers, '--batches', 40, '--cfg-options']
        roots = {name: root for name, (_, _, root) in SYSTEMS.items()}
        found['feed'] = {
            Path(name).stem: ['data', name, *options, f'data_root={args.data / root}/']
            for name, root in {**roots, str(photos): ''}.items()
        }
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
            keys = ('models', 'loading', 'ceilings')
            found = {k: v for k, v in json.loads(file.read_text()).items() if k in keys}
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
        rows = [[c['name'], words[c['passed']], state(c)] for c in found['checks']]
        print(format_table(['check', '', 'found'], rows, 'markdown', (0, 1, 2)))
        for check in found['checks']:
            rows = [row_of(row, check['models']) for row in check.get('models', ())]
            header = ['model', 'ms', 'images/s', 'ratio', 'MiB', 'rate %', 'copy %']
            if 'loading' in check:
                header = ['workers', 'images/s']
                speeds = check['loading'].items()
                rows = [[n, f'{x["images_per_second"]:.0f}'] for n, x in speeds]
            if rows:
                print(f'### {check["name"]}\n')
                print(format_table(header, rows, 'markdown'))


def row_of(row: dict, others: list[dict]) -> list[str]:
    """Format a model; the ratio is to the published structure with its options."""
    name, _, options = row['model'].partition('@')
    kept = [x for x in options.split(',') if x not in ('deploy', 'graph')]
    twin = f'published::{name}@{",".join(kept)}'.removesuffix('@')
    medians = {other['model']: other['median'] for other in others}
    ratio = f'{medians[twin] / row["median"]:.2f}' if twin in medians else ''
    memory = '' if row['memory'] is None else f'{row["memory"] / 2**20:.0f}'
    shares = [f'{100 * row[key]:.0f}' for key in ('rate_share', 'copy_share')]
    speed = [f'{1e3 * row["median"]:.2f}', f'{row["images_per_second"]:.0f}']
    return [row['model'], *speed, ratio, memory, *shares]


def run_stage(args: argparse.Namespace) -> int:
    """Run the only stage in this process; return 1 if a check failed."""
    from results import Results

    (stage,) = args.stages
    results = Results(args, stage)
    if STAGES[stage]:
        getattr(importlib.import_module(STAGES[stage]), stage)(args, results)
    else:
        run_benchmarks(args, results, stage)
    return int(any(check['passed'] is False for check in results.found['checks']))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add('out', type=Path, help='folder of the results')
    add('stages', nargs='*', metavar='STAGE', help='all by default; or report')
    add('--wheels', type=Path, help='folder of wheels to install into OUT')
    add('--mmcv', help='source of mmcv, compiled if no wheel of it is there')
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
    for stage in args.stages:
        if stage not in (*STAGES, 'report'):
            known = ', '.join((*STAGES, 'report'))
            parser.error(f'unknown stage {stage!r}; there are {known}')
    if 'feed' in args.stages and args.data is None:
        parser.error('feed needs --data, with coco, ade and photos in it')
    if not args.stages:
        args.stages = [name for name in STAGES if args.data or name != 'feed']
    args.out = args.out.absolute()
    args.data = args.data and args.data.absolute()
    return args


def main() -> None:
    args = parse_args()
    sys.path[:0] = [str(ROOT / 'tests' / 'gpu'), str(ROOT), str(args.out / 'site')]
    if args.inside:
        raise SystemExit(run_stage(args))
    args.out.mkdir(parents=True, exist_ok=True)
    install(args)
    if args.stages == ['report']:
        return report(args)
    paths = [str(ROOT), str(args.out / 'site'), os.environ.get('PYTHONPATH', '')]
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
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
