"""Measure several models in turn, each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

import numpy as np

from .steps import Job

__all__ = ['Measurement', 'WorkerError', 'run_interleaved']


class WorkerError(RuntimeError):
    """A worker failed; the message names the model."""


@dataclass
class Measurement:
    """What one worker measured.

    Attributes:
        job (Job): What was measured.
        seconds (list[float]): Of one step, in each round.
        threads (int): As many there were.
        device (str): Name of the device.
        memory (int): Peak above what the process had before the first step, in
            bytes.
    """

    job: Job
    seconds: list[float] = field(default_factory=list)
    threads: int = 0
    device: str = ''
    memory: int = 0

    @property
    def quartiles(self) -> tuple[float, float, float]:
        """Lower quartile, median and upper quartile of ``seconds``."""
        return tuple(float(n) for n in np.percentile(self.seconds, (25, 50, 75)))

    def ratio(self, first: Measurement) -> float:
        """Tell how many times as many images per second as another it has.

        Args:
            first (Measurement): Of the same rounds.

        Returns:
            float: The median over the rounds of the ratio in each, which slow
            changes of the machine do not move.
        """
        scale = self.job.batch_size / first.job.batch_size
        ratios = np.divide(first.seconds, self.seconds) * scale
        return float(np.median(ratios))


class _Worker:
    """The process of one job."""

    def __init__(self, job: Job, errors: TextIO) -> None:
        self.job = job
        self.errors = errors
        # The allocator is the job's to choose.
        env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
        # From a checkout too, wherever the tool is called.
        root = str(Path(__file__).parents[2])
        paths = [root, env.get('PYTHONPATH')]
        env['PYTHONPATH'] = os.pathsep.join(path for path in paths if path)
        if job.spec.threads is not None:
            env['OMP_NUM_THREADS'] = env['MKL_NUM_THREADS'] = str(job.spec.threads)
        self.process = subprocess.Popen(
            [sys.executable, '-m', f'{__package__}.worker'],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )

    def ask(self, message: dict) -> dict:
        """Send a line and wait for the answer."""
        try:
            self.process.stdin.write(json.dumps(message) + '\n')
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended; why, is said below
        line = self.process.stdout.readline()
        answer = json.loads(line) if line else dict(error=self._last_words())
        if 'error' in answer:
            raise WorkerError(f'{self.job.spec.text}: {answer["error"]}')
        return answer

    def _last_words(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().strip().splitlines()
        ended = f'killed by signal {-code}' if code < 0 else f'exit code {code}'
        return ': '.join([f'the process ended ({ended})', *lines[-1:]])

    def close(self) -> None:
        """End the process, at once if it has not ended."""
        self.process.kill()
        self.process.wait()
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def run_interleaved(
    jobs: Sequence[Job],
    rounds: int,
    seed: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> list[Measurement]:
    """Measure each job once in every round, the order drawn for each round.

    Only one process computes at a time; all of them keep their memory.

    Args:
        jobs (Sequence[Job]): What to measure.
        rounds (int): Number of rounds, from 1 on.
        seed (int): Of the orders. Defaults to 0.
        report (Callable): Called with lines on the progress. Defaults to nothing.

    Returns:
        list[Measurement]: For each job, in their order.

    Raises:
        WorkerError: If one fails; the others are ended.
    """
    found = [Measurement(job) for job in jobs]
    order = random.Random(seed)
    with ExitStack() as stack:
        workers = []
        for i, (job, measurement) in enumerate(zip(jobs, found)):
            report(f'[{i + 1}/{len(jobs)}] preparing {job.spec.text}')
            errors = stack.enter_context(tempfile.TemporaryFile('w+', errors='replace'))
            worker = _Worker(job, errors)
            stack.callback(worker.close)
            ready = worker.ask(job.to_dict())
            measurement.threads = ready['threads']
            measurement.device = ready['device']
            workers.append(worker)
        turns = list(range(len(jobs)))
        for i in range(rounds):
            report(f'round {i + 1}/{rounds}')
            order.shuffle(turns)
            for turn in turns:
                seconds = workers[turn].ask(dict(do='repeat'))['seconds']
                found[turn].seconds.append(seconds)
        for worker, measurement in zip(workers, found):
            measurement.memory = worker.ask(dict(do='end'))['memory']
    return found
