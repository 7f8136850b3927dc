"""A tiny training of mmengine's Runner, for tests of how it starts and stops.

``write_config`` writes a configuration that imports this module.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmengine.dist import get_rank
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from torch.utils.data import Dataset

# Iterations of an epoch in one process.
LENGTH = 4
CONFIG = """
import sys
sys.path.insert(0, {folder!r})
custom_imports = dict(imports=['convmlp_mm', 'toy'], allow_failed_imports=False)
model = dict(type='Toy')
sampler = dict(type='{sampler}', shuffle=True)
train_dataloader = dict(
    dataset=dict(type='Numbers', length={length}), batch_size=2, num_workers=0,
    sampler=sampler, drop_last=True, collate_fn=dict(type='default_collate'))
test_dataloader = train_dataloader
test_evaluator = dict(type='Count')
test_cfg = dict()
train_cfg = {train_cfg!r}
optim_wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9))
default_hooks = dict(
    checkpoint=dict(type='CheckpointHook', **{checkpoint!r}),
    logger=dict(type='LoggerHook', interval=1))
custom_hooks = {hooks!r}
randomness = dict(seed=1)
default_scope = 'mmengine'
"""


@MODELS.register_module(force=True)
class Toy(BaseModel):
    def __init__(self, size=1):
        super().__init__()
        self.linear = torch.nn.Linear(3, size)

    def forward(self, inputs, mode='tensor'):
        outputs = self.linear(inputs).square()
        if mode == 'predict':
            return [dict(output=output) for output in outputs]
        return dict(loss=outputs.mean())


@METRICS.register_module(force=True)
class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.extend(data_samples)

    def compute_metrics(self, results):
        return dict(count=len(results))


@DATASETS.register_module(force=True)
class Numbers(Dataset):
    metainfo = dict()

    def __init__(self, length):
        generator = torch.Generator().manual_seed(0)
        self.data = torch.rand(length, 3, generator=generator)

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return dict(inputs=self.data[index])


@HOOKS.register_module(force=True)
class SignalOnce(Hook):
    """Send a signal to this process in an iteration, if ``marker`` is not there.

    ``group`` sends it to the whole process group. Each iteration takes ``every``
    seconds more.
    """

    def __init__(self, marker, name, iteration, rank=0, group=False, every=0.0):
        self.marker = Path(marker)
        self.signal = signal.Signals[name]
        self.iteration, self.rank, self.group = iteration, rank, group
        self.every = every

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 == self.iteration and get_rank() == self.rank:
            self._send()
        time.sleep(self.every)

    def _send(self):
        if self.marker.exists():
            return
        self.marker.write_text('')
        if self.group:
            # From outside: a worker obeys its parent.
            code = f'import os; os.killpg({os.getpgid(0)}, {int(self.signal)})'
            command = [sys.executable, '-c', code]
            subprocess.run(command, start_new_session=True, check=True)
        else:
            os.kill(os.getpid(), self.signal)


def write_config(
    path, hooks=(), epochs=2, iters=None, world_size=1, checkpoint=None, **changes
):
    """Write a configuration of LENGTH iterations an epoch, or of ``iters``."""
    if iters is None:
        train_cfg = dict(by_epoch=True, max_epochs=epochs)
    else:
        train_cfg = dict(by_epoch=False, max_iters=iters)
    text = CONFIG.format(
        folder=str(Path(__file__).parent),
        sampler='DefaultSampler' if iters is None else 'InfiniteSampler',
        length=2 * LENGTH * world_size,
        train_cfg=train_cfg,
        checkpoint=checkpoint or dict(interval=1, by_epoch=iters is None),
        hooks=[dict(type='PreemptionHook'), *hooks],
    )
    for key, value in changes.items():
        text += f'{key} = {value!r}\n'
    Path(path).write_text(text)
    return path


def free_port():
    with socket.socket() as server:
        server.bind(('127.0.0.1', 0))
        return server.getsockname()[1]
