#!/usr/bin/env python
"""Kill a training again and again, and see whether it ends as if nothing had happened.

A RetinaNet with ConvMLP-S is trained on generated pictures by tools/train.py, once
undisturbed and once with SIGKILL (with --signal TERM: SIGTERM, on which it saves and
stops) at random moments, after each of which it is started again with --resume. Saving
is slowed down, so that some of the kills hit it. At the end the weights, the optimizer
and the random numbers of both have to be equal bit for bit.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SLOW_SAVES = """
import os, time

fsync = os.fsync


def slow_fsync(descriptor):
    time.sleep({seconds})
    fsync(descriptor)


os.fsync = slow_fsync
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('out', type=Path, help='folder to work in; it must not exist')
    parser.add_argument('--kills', type=int, default=20)
    parser.add_argument('--seed', type=int, default=0, help='of the moments')
    parser.add_argument(
        '--latest', type=float, default=12, help='seconds of training before a kill'
    )
    parser.add_argument('--slow', type=float, default=0.7, help='seconds of a save')
    parser.add_argument(
        '--processes', type=int, default=1, help='of the training; all are killed'
    )
    parser.add_argument('--signal', choices=('KILL', 'TERM'), default='KILL')
    parser.add_argument(
        '--epochs', type=int, default=12, help='of about seven iterations each'
    )
    parser.add_argument(
        '--cfg-options', nargs='+', default=[], metavar='KEY=VALUE', help='further ones'
    )
    return parser.parse_args()


class Training:
    """One training, started as often as need be.

    Args:
        args (Namespace): Options of this script.
        name (str): Of its folder.
    """

    def __init__(self, args: argparse.Namespace, name: str) -> None:
        self.folder = args.out / name
        config = ROOT / 'configs' / 'quickstart' / 'retinanet_convmlp_s_shapes.py'
        self.command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(config)]
        if args.processes > 1:
            script = str(ROOT / 'tools' / 'dist_train.sh')
            self.command = ['bash', script, str(config), str(args.processes)]
        self.command += ['--resume', '--work-dir', str(self.folder), '--cfg-options']
        self.command += [
            f'data_root={args.out / "data" / "coco"}',
            f'train_cfg.max_epochs={args.epochs}',
            'train_cfg.val_interval=3',
            'train_dataloader.num_workers=0',
            'train_dataloader.persistent_workers=False',
            'val_dataloader.num_workers=0',
            'val_dataloader.persistent_workers=False',
            'model.backbone.drop_path_rate=0.1',
            'optim_wrapper.accumulative_counts=2',
            # In the middle of epochs, and of accumulations.
            'default_hooks.checkpoint.by_epoch=False',
            'default_hooks.checkpoint.interval=3',
            'default_hooks.checkpoint.max_keep_ckpts=2',
            'default_hooks.checkpoint.save_best=coco/bbox_mAP',
            'randomness.seed=1',
            *args.cfg_options,
        ]
        self.env = {
            **os.environ,
            'PYTHONPATH': os.pathsep.join([str(args.out / 'slow'), str(ROOT)]),
            'OMP_NUM_THREADS': '1',
            # Else the launcher would start it again by itself.
            'MAX_RESTARTS': '0',
        }

    def start(self) -> subprocess.Popen:
        """Start it in a process group of its own."""
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / 'output.txt', 'a') as output:
            return subprocess.Popen(
                self.command,
                env=self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_for_training(self, process: subprocess.Popen) -> bool:
        """Wait for the first line about an iteration, or for the end."""
        seen = (self.folder / 'output.txt').stat().st_size
        while process.poll() is None:
            with open(self.folder / 'output.txt') as output:
                output.seek(seen)
                text = output.read()
            if 'Checkpoints will be saved to' in text:
                return True
            time.sleep(0.05)
        return False

    def is_saving(self) -> bool:
        """Tell whether a file is being written that is not whole yet."""
        return any(self.folder.glob('.*.tmp'))


def kill(process: subprocess.Popen, name: str) -> None:
    """Send a signal to a process, if KILL then to all that it has started, too."""
    if name == 'KILL':
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.terminate()
    process.wait()


def disturb(training: Training, args: argparse.Namespace) -> tuple[int, int]:
    """Kill a training at random moments, then let it end.

    Returns:
        tuple[int, int]: Number of kills, and of those while a file was being written.
    """
    moments = random.Random(args.seed)
    kills = in_saves = 0
    while kills < args.kills:
        process = training.start()
        if not training.wait_for_training(process):
            break
        try:
            process.wait(moments.uniform(0, args.latest))
            break
        except subprocess.TimeoutExpired:
            kill(process, args.signal)
        kills += 1
        saving = training.is_saving()
        in_saves += saving
        state = 'in a save' if saving else 'elsewhere'
        last = training.folder / 'last_checkpoint'
        last = Path(last.read_text()).name if last.exists() else 'no checkpoint'
        print(f'kill {kills}: {state}, {last}', flush=True)
    else:
        process = training.start()
    if process.wait():
        raise SystemExit(f'the training failed, see {training.folder / "output.txt"}')
    return kills, in_saves


def differences(a: object, b: object, at: str = '') -> list[str]:
    """List where two checkpoints differ; times do."""
    if isinstance(a, dict) and isinstance(b, dict):
        skipped = ('meta', 'message_hub')
        keys = [k for k in {**a, **b} if k not in skipped or at]
        return [
            text
            for key in keys
            for text in differences(a.get(key), b.get(key), f'{at}/{key}')
        ]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        if len(a) != len(b):
            return [f'{at}: {len(a)} and {len(b)} items']
        pairs = enumerate(zip(a, b))
        return [text for i, (x, y) in pairs for text in differences(x, y, f'{at}/{i}')]
    if isinstance(a, torch.Tensor):
        if torch.equal(a, b):
            return []
        largest = (a.double() - b.double()).abs().max() / a.double().abs().max()
        return [f'{at} by {float(largest):.1e}']
    return [] if a == b else [at]


def main() -> None:
    args = parse_args()
    args.out = args.out.absolute()
    args.out.mkdir(parents=True)
    (args.out / 'slow').mkdir()
    slow = SLOW_SAVES.format(seconds=args.slow)
    (args.out / 'slow' / 'sitecustomize.py').write_text(slow)
    script = str(ROOT / 'tools' / 'data' / 'make_shapes_dataset.py')
    sizes = ['--train', '26', '--val', '4', '--size', '96']
    subprocess.run([sys.executable, script, str(args.out / 'data'), *sizes], check=True)

    undisturbed = Training(args, 'undisturbed')
    if undisturbed.start().wait():
        raise SystemExit(f'it failed, see {undisturbed.folder / "output.txt"}')
    started = time.perf_counter()
    training = Training(args, 'disturbed')
    kills, in_saves = disturb(training, args)
    minutes = (time.perf_counter() - started) / 60

    files = [
        Path((t.folder / 'last_checkpoint').read_text())
        for t in (undisturbed, training)
    ]
    checkpoints = [torch.load(f, weights_only=False) for f in files]
    found = differences(*checkpoints)
    print(f'{kills} kills in {minutes:.1f} minutes, {in_saves} of them in a save')
    if kills < args.kills:
        print(f'the training ended before {args.kills} kills: give it more --epochs')
    if found or files[0].name != files[1].name:
        shown = ', '.join(found[:5])
        raise SystemExit(f'{files[0]} and {files[1]} differ in {len(found)}: {shown}')
    print(f'{files[0].name} of both runs is equal bit for bit')
    if kills < args.kills:
        raise SystemExit(1)


if __name__ == '__main__':
    main()
