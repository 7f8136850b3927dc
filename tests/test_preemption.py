"""A run that a signal stops saves, exits with the agreed code and can go on."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.utils.data import DataLoader
from toy import LENGTH, Numbers, write_config

from convmlp_mm import PreemptionHook
from convmlp_mm.hooks.stop import SIGNALS
from convmlp_mm.launch.process import PREEMPTED

ROOT = Path(__file__).resolve().parents[1]


def stopping(tmp_path, iteration, name='SIGTERM', **changes):
    marker = str(tmp_path / 'marker')
    return dict(
        type='SignalOnce', marker=marker, name=name, iteration=iteration, **changes
    )


def train(tmp_path, hooks=(), resume=False, **changes):
    """Train in this process; returns the exit code and the runner."""
    cfg = Config.fromfile(write_config(tmp_path / 'toy.py', hooks, **changes))
    cfg.work_dir, cfg.resume = str(tmp_path / 'work'), resume
    cfg.experiment_name = f'{tmp_path.name}{resume}'
    runner = Runner.from_cfg(cfg)
    try:
        runner.train()
    except SystemExit as stop:
        return stop.code, runner
    return 0, runner


@pytest.fixture(autouse=True)
def handlers():
    names = (signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(name) for name in names]
    yield
    for name, handler in zip(names, before):
        signal.signal(name, handler)


def files(tmp_path):
    return sorted(path.name for path in (tmp_path / 'work').glob('*.pth'))


def last(tmp_path):
    return Path((tmp_path / 'work' / 'last_checkpoint').read_text()).name


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
def test_stop_in_an_epoch_saves_beside_the_counted_files(tmp_path, name):
    checkpoint = dict(interval=1, by_epoch=True, max_keep_ckpts=1)
    hooks = [stopping(tmp_path, LENGTH + 2, name)]
    code, runner = train(tmp_path, hooks, checkpoint=checkpoint)
    assert code == PREEMPTED
    assert files(tmp_path) == ['epoch_1.pth', f'iter_{LENGTH + 2}.pth']
    assert last(tmp_path) == f'iter_{LENGTH + 2}.pth'
    saved = torch.load(tmp_path / 'work' / last(tmp_path), weights_only=False)
    assert saved['meta']['epoch'] == 1
    assert saved['meta']['iter'] == LENGTH + 2
    assert saved['optimizer']['state']
    for key, value in runner.model.state_dict().items():
        assert torch.equal(saved['state_dict'][key], value)
    (hook,) = (h for h in runner.hooks if isinstance(h, CheckpointHook))
    assert list(hook.keep_ckpt_ids) == [1]

    # A later regular checkpoint takes its place.
    code, _ = train(tmp_path, hooks, checkpoint=checkpoint, resume=True)
    assert code == 0
    assert files(tmp_path) == ['epoch_2.pth']


@HOOKS.register_module(force=True)
class InValidation(Hook):
    """A kill in the first validation of a run, or a signal in it."""

    def __init__(self, kill):
        self.kill = kill

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if self.kill:
            raise KeyboardInterrupt
        os.kill(os.getpid(), signal.SIGTERM)


def test_signal_in_a_validation_that_is_made_up_for_takes_effect_after_it(tmp_path):
    loader = dict(
        dataset=dict(type='Numbers', length=4),
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    changes = dict(val_dataloader=loader, val_evaluator=dict(type='Count'), val_cfg={})

    def hooks(kill):
        names = 'ExactResumeHook', 'PreemptionHook'
        return [*(dict(type=n) for n in names), dict(type='InValidation', kill=kill)]

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, custom_hooks=hooks(True), **changes)
    assert files(tmp_path) == ['epoch_1.pth']
    code, _ = train(tmp_path, resume=True, custom_hooks=hooks(False), **changes)
    assert code == PREEMPTED
    assert last(tmp_path) == f'iter_{LENGTH + 1}.pth'


def test_second_stop_replaces_the_file_of_the_first(tmp_path):
    checkpoint = dict(interval=3, by_epoch=True)
    train(tmp_path, [stopping(tmp_path, 2)], checkpoint=checkpoint)
    assert files(tmp_path) == ['iter_2.pth']
    (tmp_path / 'marker').unlink()
    hooks = [stopping(tmp_path, 3)]
    code, _ = train(tmp_path, hooks, checkpoint=checkpoint, resume=True)
    assert code == PREEMPTED
    assert files(tmp_path) == ['iter_3.pth'] and last(tmp_path) == 'iter_3.pth'


@pytest.mark.parametrize(
    ('interval', 'expected'), [(1, ['epoch_1.pth']), (5, [f'iter_{LENGTH}.pth'])]
)
def test_stop_at_the_end_of_an_epoch_saves_once(tmp_path, interval, expected):
    checkpoint = dict(interval=interval, by_epoch=True)
    code, _ = train(tmp_path, [stopping(tmp_path, LENGTH)], checkpoint=checkpoint)
    assert code == PREEMPTED
    assert files(tmp_path) == expected
    meta = torch.load(tmp_path / 'work' / expected[0], weights_only=False)['meta']
    assert (meta['epoch'], meta['iter']) == (1, LENGTH)


@pytest.mark.parametrize(('at', 'expected'), [(3, ['iter_3.pth']), (4, ['iter_4.pth'])])
def test_iteration_based_run_stops_and_goes_on(tmp_path, at, expected):
    options = dict(iters=6, checkpoint=dict(interval=4, by_epoch=False))
    hooks = [stopping(tmp_path, at)]
    assert train(tmp_path, hooks, **options)[0] == PREEMPTED
    assert files(tmp_path) == expected
    code, runner = train(tmp_path, hooks, resume=True, **options)
    assert code == 0 and runner.iter == 6
    assert files(tmp_path) == ['iter_4.pth', 'iter_6.pth']


def test_finished_run_ends_as_it_would(tmp_path):
    code, _ = train(tmp_path, [stopping(tmp_path, LENGTH)], epochs=1)
    assert code == 0 and files(tmp_path) == ['epoch_1.pth']


def test_signals_are_given_back(tmp_path):
    assert train(tmp_path, epochs=1)[0] == 0
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.fixture
def taken(tmp_path):
    """A hook that has taken over the signals, as in a training."""
    hook = PreemptionHook()
    hook._take_signals()
    yield hook
    hook.after_train(None)


@pytest.mark.parametrize('name', ['SIGTERM', 'SIGUSR1'])
@pytest.mark.parametrize('pause', [0, 0.1])
def test_processes_that_are_forked_end_by_a_signal(taken, name, pause):
    # As those of mmdet's evaluation for Pascal VOC, whose pool ends them so.
    fork, number = multiprocessing.get_context('fork'), signal.Signals[name]
    children = []

    def start():
        for _ in range(10):
            child = fork.Process(target=time.sleep, args=[20])
            child.start()
            time.sleep(pause)
            os.kill(child.pid, number)
            children.append(child)

    # A pool replaces its processes in a thread.
    thread = threading.Thread(target=start)
    thread.start()
    thread.join()
    for child in children:
        child.join(5)
    codes = {child.exitcode for child in children}
    for child in children:
        child.kill()
    assert codes == {-number}
    assert not taken._asked and signal.getsignal(number) == taken._note
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_worker_of_a_data_loader_obeys_its_parent_alone(taken):
    loader = DataLoader(Numbers(4), num_workers=1, persistent_workers=True)
    taken._protect(type('Loop', (), dict(dataloader=loader)))
    batches = iter(loader)
    next(batches)
    (worker,) = batches._workers
    for number in SIGNALS:
        subprocess.run(['kill', f'-{int(number)}', str(worker.pid)], check=True)
    # A signal that comes while the same one is pending is lost.
    status = Path(f'/proc/{worker.pid}/status')
    while 'ShdPnd:\t0000000000000000' not in status.read_text():
        time.sleep(0.01)
    # Another one, after the signals.
    assert len(next(batches)) == 1 and worker.is_alive()
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


@pytest.mark.slow
def test_workers_of_the_data_loader_survive_a_signal_to_the_group(tmp_path):
    loader = 'train_dataloader.update(num_workers=1, persistent_workers=True)'
    # Time for the end of a worker to be noticed.
    hooks = [stopping(tmp_path, 2, group=True, every=0.5)]
    path = write_config(tmp_path / 'toy.py', hooks)
    path.write_text(f'{path.read_text()}\n{loader}\n')
    command = [sys.executable, str(ROOT / 'tools' / 'train.py'), str(path)]
    command += ['--work-dir', str(tmp_path / 'work')]
    # A process group of its own.
    done = subprocess.run(command, start_new_session=True)
    assert done.returncode == PREEMPTED
    assert files(tmp_path) == ['iter_2.pth']
