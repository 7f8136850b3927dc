"""What the processes share after each step is one vector, in one all-reduce."""

import contextlib
import json
import os
import signal
from itertools import combinations

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import distributed, nn
from toy import free_port

from convmlp_mm import SyncStatisticsHook
from convmlp_mm.hooks.stop import average
from convmlp_mm.launch import closing_group

# They share what has been trained.
pytestmark = pytest.mark.xdist_group('step')
NAMES = 'SyncStatisticsHook', 'FiniteLossHook', 'PreemptionHook'
HOOKS = [hooks for n in (1, 2, 3) for hooks in combinations(NAMES, n)]
ITERATIONS, STOP = 6, 3
COLLECTIVES = 'all_reduce', 'all_gather', 'broadcast', 'reduce', 'gather', 'barrier'


class Normed(BaseModel):
    def __init__(self):
        super().__init__()
        self.norms = nn.ModuleList([nn.BatchNorm1d(3), nn.BatchNorm1d(3).double()])
        self.norms.append(nn.BatchNorm1d(3).half())

    def forward(self, inputs, mode='loss'):
        x = self.norms[0](inputs)
        return dict(loss=x.square().mean() + self.norms[1](inputs.double()).mean())


class Count(Hook):
    """Count the collectives of each iteration, and ask the second process to stop."""

    priority = 'HIGHEST'

    def __init__(self, stop):
        self.stop, self.calls, self.counts = stop, [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.counts.append(len(self.calls))
        self.calls.clear()
        if self.stop and runner.iter + 1 == STOP and distributed.get_rank():
            os.kill(os.getpid(), signal.SIGUSR1)

    def watch(self, name):
        collective = getattr(distributed, name)

        def counted(*args, **kwargs):
            self.calls.append(name)
            return collective(*args, **kwargs)

        setattr(distributed, name, counted)
        return collective


def train(work_dir, names):
    """Return the collectives of each step, where it ended, and the statistics."""
    count, ema = Count('PreemptionHook' in names), EMAHook(update_buffers=True)
    originals = {name: count.watch(name) for name in COLLECTIVES}
    wrapper = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=True,
    )
    runner = Runner(
        Normed(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[dict(inputs=torch.arange(3.0) * i * i) for i in range(24)],
            batch_size=2,
            sampler=dict(type='InfiniteSampler', shuffle=False),
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=ITERATIONS),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(checkpoint=None),
        custom_hooks=[ema, count, *(dict(type=name) for name in names)],
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
        experiment_name=work_dir.name,
        log_level='ERROR',
    )
    try:
        with contextlib.suppress(SystemExit):
            runner.train()
    finally:
        for name, original in originals.items():
            setattr(distributed, name, original)
    means = [norm.running_mean.tolist() for norm in runner.model.module.norms[:2]]
    means += [norm.running_mean.tolist() for norm in ema.ema_model.module.norms[:2]]
    return dict(counts=count.counts[1:], end=runner.iter, means=means)


@closing_group()
def in_process(rank, work_dir, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    distributed.init_process_group('gloo')
    results = {' '.join(names): train(work_dir / names[0], names) for names in HOOKS}
    mixed = [torch.full((2, 1), 3.0 * rank), torch.tensor(1.0 + rank).double()]
    average(mixed)
    results['average'] = [tensor.tolist() for tensor in mixed]
    (work_dir / f'{rank}.json').write_text(json.dumps(results))


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp('step')
    torch.multiprocessing.spawn(in_process, (folder, free_port()), nprocs=2)
    return [json.loads((folder / f'{rank}.json').read_text()) for rank in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('names', HOOKS, ids=' '.join)
def test_a_step_has_one_collective_whichever_hooks_there_are(results, names):
    first, second = (result[' '.join(names)] for result in results)
    assert first['counts'] == second['counts']
    assert set(first['counts']) == {1}
    # The signal of the second process stops both after the same iteration.
    end = STOP - 1 if 'PreemptionHook' in names else ITERATIONS
    assert first['end'] == second['end'] == end
    assert (first['means'] == second['means']) == (SyncStatisticsHook.__name__ in names)


@pytest.mark.slow
def test_tensors_of_several_shapes_and_precisions_are_averaged(results):
    assert results[0]['average'] == results[1]['average'] == [[[1.5], [1.5]], 1.5]
