"""What the checks of a GPU share: a file of results, and how values are compared."""

import argparse
import contextlib
import json
import os
import platform
import subprocess
import time
import traceback
from pathlib import Path

import torch

from convmlp_mm.checkpoint import write_file

ROOT = Path(__file__).resolve().parents[2]


class Results:
    """What a stage finds, written to its file after each check."""

    def __init__(self, args: argparse.Namespace, stage: str) -> None:
        self.path = args.out / f'{stage}.json'
        self.found = dict(stage=stage, machine=describe_machine(args), checks=[])
        self.started = time.perf_counter()

    def add(self, name: str, passed: bool | None, **values) -> None:
        """Note a check, or with ``passed=None`` something measured."""
        self.found['checks'].append(dict(name=name, passed=passed, **values))
        self.found['seconds'] = round(time.perf_counter() - self.started, 1)
        text = json.dumps(self.found, indent=1, default=str)
        write_file(self.path, text, overwrite=True)
        word = {True: 'passed', False: 'FAILED', None: 'measured'}[passed]
        line = f'{word}: {name}: {state(values)}'
        print(f'{self.found["seconds"]:6.1f} s {line}', flush=True)

    @contextlib.contextmanager
    def checking(self, name: str):
        """Note an exception as a check that failed, and go on."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            self.add(name, False, error=f'{type(error).__name__}: {error}'[:500])


def state(values: dict) -> str:
    """Say the values of a check in a line, without tables and curves."""
    found = []
    for key, value in values.items():
        if key not in ('name', 'passed', 'models', 'loading', 'curve'):
            text = f'{value:.3g}' if isinstance(value, float) else str(value)
            found.append(f'{key.replace("_", " ")} {text}')
    return ', '.join(found)


def describe_machine(args: argparse.Namespace) -> dict:
    """Name the card, its driver and the versions of everything."""
    commit = ['git', '-C', str(ROOT), 'rev-parse', '--short', 'HEAD']
    found = dict(
        device=args.device,
        cores=os.cpu_count(),
        python=platform.python_version(),
        torch=torch.__version__,
        commit=subprocess.run(commit, capture_output=True, text=True).stdout.strip(),
        date=time.strftime('%Y-%m-%d'),
    )
    if args.device == 'cuda':
        query = ['nvidia-smi', '--query-gpu=name,driver_version']
        query.append('--format=csv,noheader')
        card = subprocess.run(query, capture_output=True, text=True).stdout.strip()
        found.update(card=card, cudnn=torch.backends.cudnn.version())
    return found


def relative(found, expected) -> float:
    """Largest difference over the largest value; infinite if there is NaN."""
    expected = expected.detach().double().cpu()
    scale = expected.abs().max().clamp(min=1e-300)
    difference = (found.detach().double().cpu() - expected).abs().max() / scale
    # max() of several differences would pass over NaN.
    return float(difference.nan_to_num(nan=torch.inf, posinf=torch.inf))


def set_tf32(on: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
