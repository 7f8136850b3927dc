"""The process that runs one model: ``python -m convmlp_mm.benchmark.worker``.

Lines of JSON: the job comes first and is answered when the model is warm; after that
``{"do": "repeat"}`` is answered with the seconds of a step, and ``{"do": "end"}`` with
the peak memory, after which the process ends. An error is answered once, as
``{"error": ...}``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from typing import TextIO

import torch

from ..launch.process import keep_memory
from .steps import Job, build_step

__all__ = ['Memory', 'Timer', 'main']

STATUS = '/proc/self/status'


class Timer:
    """Time repetitions of a step, on the CPU or by events on a GPU.

    Args:
        step (Callable): What is timed.
        device (torch.device): Where it computes.
    """

    def __init__(self, step: Callable[[], object], device: torch.device) -> None:
        self.step = step
        self.cuda = device.type == 'cuda'

    def measure(self, steps: int) -> float:
        """Run some steps.

        Args:
            steps (int): How many.

        Returns:
            float: Seconds of one, on average.
        """
        if not self.cuda:
            start = time.perf_counter()
            for _ in range(steps):
                self.step()
            return (time.perf_counter() - start) / steps
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            self.step()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3 / steps


class Memory:
    """Peak memory above what is there when the object is made.

    Resident memory of the process, or tensors on the GPU.

    Args:
        device (torch.device): Which of the two.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == 'cuda'
        # Else the first step would fill what building the model has left, unseen.
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if trim is not None:
            trim(0)
        try:
            with open('/proc/self/clear_refs', 'w') as stream:
                stream.write('5')
        except OSError:
            # The peak of building counts too.
            pass
        self.before = self._status('VmRSS') or self._peak()

    def above(self) -> int:
        """Return the peak so far, in bytes."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        return max(0, self._peak() - self.before)

    def _peak(self) -> int:
        unit = 1 if sys.platform == 'darwin' else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return self._status('VmHWM') or peak

    @staticmethod
    def _status(key: str) -> int:
        if not os.path.exists(STATUS):
            return 0
        with open(STATUS) as stream:
            lines = dict(line.split(':', 1) for line in stream)
        return int(lines[key].split()[0]) * 1024


def _serve(requests: TextIO, answer: Callable[[dict], None]) -> None:
    job = Job.from_dict(json.loads(requests.readline()))
    if job.spec.threads is not None:
        torch.set_num_threads(job.spec.threads)
    if job.spec.malloc:
        keep_memory()
    device = torch.device(job.device)
    if device.type == 'cuda':
        torch.cuda.set_device(device.index or 0)
    timer = Timer(build_step(job), device)
    memory = Memory(device)
    for _ in range(job.warmup):
        seconds = timer.measure(1)
    steps = max(1, math.ceil(job.min_time / max(seconds, 1e-9)))
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else 'CPU'
    answer(dict(threads=torch.get_num_threads(), device=name, steps=steps))
    for line in requests:
        if json.loads(line)['do'] == 'end':
            answer(dict(memory=memory.above()))
            return
        answer(dict(seconds=timer.measure(steps)))


def main() -> None:
    """Answer on what has been the standard output; prints go to the error stream."""
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)

    def answer(message: dict) -> None:
        print(json.dumps(message), file=answers, flush=True)

    try:
        _serve(sys.stdin, answer)
    except Exception as error:
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        answer(dict(error=': '.join([type(error).__name__, *lines[-1:]])))
        sys.exit(1)


if __name__ == '__main__':
    main()
