"""Trainings on a GPU by the command lines: they learn, survive, and cost little."""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from results import ROOT, Results

QUICKSTART = ROOT / 'configs' / 'quickstart' / 'retinanet_convmlp_s_shapes.py'
WITH_EMA = """
_base_ = {base!r}
custom_hooks = [*_base_.runtime_hooks, dict(type='EMAHook', momentum=0.01)]
"""
ON_CIFAR = """
_base_ = {base!r}
data = dict(_delete_=True, type='CustomDataset', data_root={data!r})
load = dict(type='LoadImageFromFile')
# So few images and epochs want neither another start nor mixed images.
model = dict(backbone=dict(init_cfg=None, drop_path_rate=0.0), train_cfg=None)
train_dataloader = dict(
    num_workers={workers},
    dataset=dict(data, data_prefix='train', pipeline=[load, *_base_.train_pipeline]),
)
val_dataloader = dict(
    num_workers={workers},
    dataset=dict(data, data_prefix='val', pipeline=[load, *_base_.test_pipeline]),
)
test_dataloader = val_dataloader
train_cfg = dict(max_epochs={epochs}, val_interval=10)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', T_max={epochs}, convert_to_iter_based=True),
]
optim_wrapper = dict(optimizer=dict(lr=2e-4))
"""


class Launch:
    """A command line of this project that runs beside others.

    Args:
        args (Namespace): Options of this script.
        name (str): Of its log in OUT.
        command (list): The command; a ``.sh`` or ``.py`` of ``tools`` first.
        env (dict): Variables to set.
    """

    ports = iter(range(29600, 29900))

    def __init__(self, args: argparse.Namespace, name: str, *command, **env) -> None:
        self.log = args.out / f'{name}.log'
        script = str(ROOT / 'tools' / command[0])
        run = ['bash'] if script.endswith('.sh') else [sys.executable]
        variables = dict(os.environ, PORT=str(next(self.ports)), MAX_RESTARTS='0')
        variables['PATH'] = f'{Path(sys.executable).parent}:{variables["PATH"]}'
        self.started = time.perf_counter()
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                [*run, script, *map(str, command[1:])],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**variables, **env},
            )

    def wait(self, limit: float | None = None) -> tuple[int | None, str, float]:
        """Return the exit code (None: too late), what was printed, and the seconds."""
        try:
            code = self.process.wait(limit)
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = None
        seconds = time.perf_counter() - self.started
        return code, self.log.read_text(errors='replace'), round(seconds, 1)


def scalars(folder: Path) -> list[dict]:
    """Read what a run has logged."""
    files = sorted(folder.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in files[-1].read_text().splitlines()]


def train(args: argparse.Namespace, results: Results) -> None:
    """Train by the launcher: the quick start in six ways, and CIFAR-10, all at once."""
    out = args.out / 'train'
    out.mkdir(exist_ok=True)
    shapes = out / 'shapes'
    Launch(args, 'shapes', 'data/make_shapes_dataset.py', shapes).wait()
    ema = out / 'ema.py'
    ema.write_text(WITH_EMA.format(base=str(QUICKSTART)))
    settings = dict(x.split('=', 1) for x in args.settings)
    settings['data_root'] = shapes / 'coco'
    runs = {
        'float32 on the CPU': (
            [],
            {'train_cfg.max_epochs': args.cpu_epochs, 'train_cfg.val_interval': 8},
            dict(CUDA_VISIBLE_DEVICES=''),
        ),
        'float32': ([], {}, {}),
        'fp16, SyncBN': (['--amp'], dict(sync_bn='torch'), {}),
        'bf16': (['--amp'], {'optim_wrapper.dtype': 'bfloat16'}, {}),
        'fp16, EMA, accumulation': (
            ['--amp'],
            {'optim_wrapper.accumulative_counts': 2},
            {},
        ),
        'fp16, a loss that explodes': (
            ['--amp'],
            {'optim_wrapper.optimizer.lr': 1e6, 'optim_wrapper.clip_grad': None},
            {},
        ),
    }
    if args.device == 'cpu':
        runs = {k: v for k, v in runs.items() if 'fp16' not in k and k != 'bf16'}
    launches = {}
    for i, (name, (options, changes, env)) in enumerate(runs.items()):
        config = ema if 'EMA' in name else QUICKSTART
        pairs = [f'{k}={v}' for k, v in {**settings, **changes}.items()]
        command = ['dist_train.sh', config, 1, '--work-dir', out / f'run{i}', *options]
        launches[name] = Launch(
            args, f'train{i}', *command, '--cfg-options', *pairs, **env
        )
    if args.data is not None:
        config = out / 'cifar.py'
        base = str(ROOT / 'configs' / 'transfer' / 'convmlp_s_cifar10.py')
        data, workers = str(args.data / 'cifar10_small'), min(8, os.cpu_count() // 2)
        numbers = dict(workers=workers, epochs=args.epochs)
        config.write_text(ON_CIFAR.format(base=base, data=data, **numbers))
        options = ['--work-dir', out / 'cifar', *['--amp'] * (args.device == 'cuda')]
        cifar = Launch(args, 'cifar', 'dist_train.sh', config, 1, *options)
    curves = {}
    for i, (name, launch) in enumerate(launches.items()):
        with results.checking(name):
            code, text, seconds = launch.wait()
            if 'explodes' in name:
                said = [line for line in text.splitlines() if 'not finite' in line]
                results.add(name, code != 0 and bool(said), code=code, said=said[-1:])
                continue
            lines = scalars(out / f'run{i}')
            curves[name] = [line['loss'] for line in lines if 'loss' in line]
            ap = [x['coco/bbox_mAP_50'] for x in lines if 'coco/bbox_mAP_50' in x]
            step = statistics.median(x['time'] for x in lines if 'loss' in x)
            ap = ap or [0.0]  # mmdet notes none where nothing is found
            values = dict(ap50=ap[-1], seconds=seconds, loss=curves[name][-1])
            values.update(step=step, curve=curves[name])
            passed = code == 0 and (ap[-1] > args.ap50 or 'CPU' in name)
            results.add(name, passed, **values)
    first, second = curves['float32 on the CPU'], curves['float32']
    drift = [abs(b / a - 1) for a, b in zip(first, second)]
    results.add(
        'curve beside the CPU', drift[0] < 1e-3, first=drift[0], worst=max(drift)
    )
    if args.data is not None:
        with results.checking('CIFAR-10 from scratch'):
            code, _, seconds = cifar.wait()
            lines = scalars(out / 'cifar')
            top = [x['accuracy/top1'] for x in lines if 'accuracy/top1' in x]
            values = dict(top1=top, epochs=args.epochs, seconds=seconds)
            results.add('CIFAR-10 from scratch', code == 0 and top[-1] > 20, **values)


def survive(args: argparse.Namespace, results: Results) -> None:
    """Kill trainings and resume them; train by two processes on one card."""
    chaos = ROOT / 'tests' / 'cluster' / 'chaos.py'
    exact = dict(CUBLAS_WORKSPACE_CONFIG=':4096:8')
    common = ['--slow', '0.3', '--latest', args.latest]
    kinds = {
        'KILL, deterministic': (3, True, exact),
        'TERM, deterministic': (2, True, exact),
        'KILL, not deterministic': (2, False, {}),
    }
    launches = {}
    for name, (kills, deterministic, env) in kinds.items():
        folder = name.replace(', ', '_').replace(' ', '_')
        command = [os.path.relpath(chaos, ROOT / 'tools')]
        command.append(args.out / 'survive' / folder)
        options = ['--kills', kills, '--signal', name.split(',')[0], *common]
        options += ['--cfg-options', f'randomness.deterministic={deterministic}']
        launches[name] = Launch(args, folder, *command, *options, **env)
    name = 'two processes on one card, gloo'
    with results.checking(name):
        two_on_one(args, results)
    for name, launch in launches.items():
        with results.checking(name):
            code, text, seconds = launch.wait()
            last = text.strip().splitlines()[-3:]
            passed = code == 0 if 'not' not in name else None
            results.add(name, passed, code=code, seconds=seconds, said=last)


def two_on_one(args: argparse.Namespace, results: Results) -> None:
    """Train by two processes on one card, which NCCL refuses and gloo does not."""
    out = args.out / 'survive'
    out.mkdir(exist_ok=True)
    shapes = out / 'shapes'
    Launch(args, 'shapes2', 'data/make_shapes_dataset.py', shapes, '--train', 64).wait()
    options = [f'data_root={shapes / "coco"}', 'env_cfg.dist_cfg.backend=gloo']
    options += ['train_cfg.max_epochs=2', 'train_cfg.val_interval=2']
    options += ['sync_bn=torch'] * (args.device == 'cuda')
    meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT='29500', WORLD_SIZE='2')
    command = ['train.py', QUICKSTART, '--launcher', 'pytorch']
    command += ['--work-dir', out / 'two', '--cfg-options', *options]
    both = [
        Launch(args, f'two{i}', *command, RANK=str(i), LOCAL_RANK='0', **meeting)
        for i in range(2)
    ]
    codes = [launch.wait(150)[0] for launch in both]
    losses = [x['loss'] for x in scalars(out / 'two') if 'loss' in x]
    passed = codes == [0, 0] and losses[-1] < losses[0]
    values = dict(codes=codes, first=losses[0], last=losses[-1])
    results.add('two processes on one card, gloo', passed, **values)


def hooks(args: argparse.Namespace, results: Results) -> None:
    """Train in turn with all hooks and without those that only guard."""
    out = args.out / 'hooks'
    out.mkdir(exist_ok=True)
    shapes = out / 'shapes'
    maker = ['data/make_shapes_dataset.py', shapes, '--train', 800]
    Launch(args, 'shapes3', *maker).wait()
    few = out / 'few.py'
    kept = "[x for x in _base_.runtime_hooks if x.type == 'ChannelsLastHook']"
    few.write_text(f'_base_ = {str(QUICKSTART)!r}\ncustom_hooks = {kept}\n')
    options = [f'data_root={shapes / "coco"}', 'train_cfg.max_epochs=2']
    options += ['train_cfg.val_interval=9', 'train_dataloader.num_workers=4']
    options += ['default_hooks.logger.interval=1']
    found = dict(all=[], few=[])
    for i in range(3):
        for name, config in (('all', QUICKSTART), ('few', few)):
            folder = out / f'{name}{i}'
            command = ['train.py', config, '--work-dir', folder, '--cfg-options']
            launch = Launch(args, f'hooks_{name}{i}', *command, *options)
            with results.checking(f'run {i} with {name}'):
                if launch.wait()[0]:
                    raise RuntimeError(f'it failed, see {launch.log}')
                steps = [x['time'] - x['data_time'] for x in scalars(folder)[50:]]
                found[name].append(statistics.median(steps))
    cost = min(found['all']) / min(found['few']) - 1
    results.add('hooks', cost < 0.01, cost=cost, **found)
