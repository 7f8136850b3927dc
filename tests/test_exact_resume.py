"""A run that is stopped and resumed ends as one that was not."""

import copy
import errno
import itertools
import random

import numpy as np
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import EarlyStoppingHook, EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import Dataset

from convmlp_mm import (
    AgreementHook,
    ConvMLP,
    ExactResumeHook,
    SafeCheckpointHook,
    SummaryHook,
)
from convmlp_mm.checkpoint import read_checkpoint
from convmlp_mm.hooks.resume import get_random_state, set_random_state

TINY = dict(
    tokenizer_channels=4,
    conv_blocks=1,
    channels=(4, 6),
    depths=(1, 2),
    mlp_ratios=(1, 1),
)


class Classifier(BaseModel):
    """All that draws random numbers: dropout, stochastic depth, BN by batches."""

    def __init__(self):
        super().__init__()
        self.backbone = ConvMLP(
            TINY, out_indices=(2,), drop_rate=0.2, drop_path_rate=0.3
        )
        self.head = nn.Linear(self.backbone.out_channels[-1], 3)

    def forward(self, inputs, index, mode='tensor'):
        logits = self.head(self.backbone(torch.stack(list(inputs)))[-1].mean((2, 3)))
        if mode == 'loss':
            label = torch.as_tensor(index) % 3
            return dict(loss=nn.functional.cross_entropy(logits, label))
        return logits


class Pictures(Dataset):
    """Augmented by all three sources of random numbers."""

    def __init__(self, seen=None):
        self.seen = [] if seen is None else seen

    def __len__(self):
        return 10

    def __getitem__(self, i):
        self.seen.append(i)
        generator = torch.Generator().manual_seed(i)
        picture = torch.rand(3, 32, 32, generator=generator)
        noise = random.random() + np.random.rand() + torch.rand(3, 1, 1)
        return dict(inputs=picture * noise, index=i)


class Loss(BaseMetric):
    """Draws random numbers of its own, as validation may."""

    def process(self, data_batch, data_samples):
        self.results.append(float(torch.stack(list(data_samples)).mean()))

    def compute_metrics(self, results):
        return dict(mean=float(np.mean(results)) + random.random())


class Stop(Exception):
    pass


class StopAt(Hook):
    """As a kill would, between the save and the next batch, or elsewhere."""

    priority = 'LOWEST'

    def __init__(self, iteration, where='after_train_iter'):
        def stop(runner, *args, **kwargs):
            if runner.iter + (where == 'after_train_iter') == iteration:
                raise Stop

        setattr(self, where, stop)


class Record(Hook):
    """What the hooks of a run are told."""

    def __init__(self):
        self.calls = []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        index = [int(i) for i in data_batch['index']]
        lr = runner.optim_wrapper.get_lr()['lr'][0]
        self.calls.append((runner.epoch, runner.iter, batch_idx, index, lr))


# The logger of a name stays in the process.
NUMBER = itertools.count()
EPOCHS = dict(by_epoch=True, max_epochs=4, val_interval=1)
ITERATIONS = dict(by_epoch=False, max_iters=14, val_interval=4)


def run(folder, *hooks, resume=False, seed=None, train=EPOCHS, sampler=None, **extra):
    """Train, or go on, and return the calls of the hooks and the runner."""
    record = Record()
    by_epoch = train['by_epoch']
    sampler = sampler or ('DefaultSampler' if by_epoch else 'InfiniteSampler')
    saving = extra.pop('saving', {})
    loader = dict(
        batch_size=2,
        num_workers=extra.pop('workers', 0),
        sampler=dict(type=sampler, shuffle=True),
    )
    val = dict(loader, sampler=dict(type='DefaultSampler', shuffle=True))
    wrapper = dict(optimizer=dict(type='AdamW', lr=1e-2), **extra.pop('wrapper', {}))
    end = 20 if by_epoch else 14
    settings = dict(
        work_dir=str(folder),
        train_dataloader=dict(loader, dataset=Pictures()),
        val_dataloader=dict(val, num_workers=0, dataset=Pictures()),
        val_evaluator=dict(type=Loss),
        train_cfg=train,
        val_cfg=dict(),
        optim_wrapper=wrapper,
        param_scheduler=extra.pop(
            'param_scheduler',
            dict(type='CosineAnnealingLR', T_max=end, by_epoch=False),
        ),
        default_hooks=dict(
            checkpoint=dict(
                type=SafeCheckpointHook,
                **{'by_epoch': by_epoch, 'interval': 1 if by_epoch else 4, **saving},
            ),
            logger=None,
        ),
        custom_hooks=[record, AgreementHook(), ExactResumeHook(), *hooks],
        default_scope='mmengine',
        randomness=dict(seed=seed),
        resume=resume,
        experiment_name=f'run_{next(NUMBER)}',
        **extra,
    )
    runner = Runner(dict(type=Classifier), **settings)
    try:
        runner.train()
    except Stop:
        # Whatever comes in between.
        random.seed(99), np.random.seed(99), torch.manual_seed(99)
    return record.calls, runner


def content(folder, name):
    checkpoint = read_checkpoint(str(folder / name))
    checkpoint['meta'] = {
        k: v for k, v in checkpoint['meta'].items() if k in ('epoch', 'iter', 'seed')
    }
    hub = checkpoint['message_hub']['runtime_info']
    checkpoint['message_hub'] = {
        k: hub[k] for k in ('best_score', 'iter', 'epoch') if k in hub
    }
    return checkpoint


def assert_equal(a, b, at=''):
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert list(a) == list(b), at
        for key in a:
            assert_equal(a[key], b[key], f'{at}.{key}')
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b)):
            assert_equal(x, y, f'{at}[{i}]')
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), at
    else:
        assert a == b, at


@OPTIM_WRAPPERS.register_module()
class CpuAmpOptimWrapper(AmpOptimWrapper):
    """mmengine's with the scaler of the CPU, which its own constructor refuses."""

    def __init__(self, **kwargs):
        OptimWrapper.__init__(self, **kwargs)
        self.cast_dtype = self._scale_update_param = None
        self.loss_scaler = torch.amp.GradScaler('cpu', growth_interval=3)


EMA = dict(type=EMAHook)
BY_ITERATION = dict(saving=dict(by_epoch=False, interval=3))
ACCUMULATE = dict(wrapper=dict(accumulative_counts=3))
CASES = {
    'in an epoch': (13, dict()),
    'after the last iteration of an epoch': (10, dict()),
    'saved in an epoch': (14, BY_ITERATION),
    'saved at the last iteration of an epoch': (
        17,
        dict(saving=dict(by_epoch=False, interval=5)),
    ),
    'stops twice in the same epoch': ((13, 14), BY_ITERATION),
    'best checkpoints': (18, dict(saving=dict(save_best='mean', rule='less'))),
    'in a validation': ((10, 'before_val_iter'), dict()),
    'in the last validation': ((20, 'before_val_iter'), dict()),
    'in the validation of iterations': (
        (8, 'before_val_iter'),
        dict(train=ITERATIONS, saving=dict(interval=4)),
    ),
    'average of weights': (13, dict(hooks=[EMA])),
    'accumulation over the end of an epoch': (13, ACCUMULATE),
    'accumulation in an epoch': (14, {**ACCUMULATE, **BY_ITERATION}),
    'iterations': (9, dict(train=ITERATIONS, saving=dict(interval=4))),
    'iterations, accumulation and average of weights': (
        9,
        dict(train=ITERATIONS, saving=dict(interval=4), hooks=[EMA], **ACCUMULATE),
    ),
}


def final(train):
    return 'epoch_4.pth' if train['by_epoch'] else 'iter_14.pth'


def stop_and_resume(folder, stops, hooks, **settings):
    calls = []
    stops = stops if isinstance(stops, tuple) else (stops,)
    stops = [(stops[0], stops[1])] if isinstance(stops[-1], str) else stops
    for i, stop in enumerate(stops):
        stop = StopAt(*stop) if isinstance(stop, tuple) else StopAt(stop)
        part, _ = run(
            folder,
            stop,
            *map(build, hooks),
            resume=bool(i),
            # The seed is restored too.
            seed=None if i else 0,
            **copy.deepcopy(settings),
        )
        calls.append(part)
    part, runner = run(folder, *map(build, hooks), resume=True, **settings)
    return [*calls, part], runner


def build(hook):
    hook = dict(hook)
    return hook.pop('type')(**hook)


@pytest.mark.parametrize('name', CASES)
def test_resumed_run_ends_bit_identically(tmp_path, name):
    stop, settings = CASES[name]
    settings = dict(settings)
    hooks = settings.pop('hooks', [])
    train = settings.get('train', EPOCHS)
    last = settings.get('saving', {}).get('by_epoch', train['by_epoch'])
    last = final(train) if last == train['by_epoch'] else 'iter_20.pth'
    whole, _ = run(tmp_path / 'a', *map(build, hooks), seed=0, **settings)
    parts, _ = stop_and_resume(tmp_path / 'b', stop, hooks, **settings)
    assert parts[0] == whole[: len(parts[0])]
    # What was done again, or for the first time, is what the whole run did.
    assert parts[-1] == (whole[-len(parts[-1]) :] if parts[-1] else [])
    assert_equal(content(tmp_path / 'a', last), content(tmp_path / 'b', last))


def test_without_the_hook_the_weights_are_others(tmp_path, monkeypatch):
    """What the tests above compare is not equal anyway."""
    run(tmp_path / 'a', seed=0)
    monkeypatch.setattr(ExactResumeHook, '_restore', lambda *args: None)
    stop_and_resume(tmp_path / 'b', 13, [])
    a, b = (content(tmp_path / x, 'epoch_4.pth')['state_dict'] for x in 'ab')
    assert any(not torch.equal(a[key], b[key]) for key in a)


def test_finite_sampler_of_iterations_goes_on_in_its_next_round(tmp_path, monkeypatch):
    # The loop waits between the rounds.
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    settings = dict(train=ITERATIONS, sampler='DefaultSampler')
    settings['saving'] = dict(interval=5)
    whole, _ = run(tmp_path / 'a', seed=0, **settings)
    for stop in (8, 12):
        parts, _ = stop_and_resume(tmp_path / f'b{stop}', stop, [], **settings)
        assert parts[-1] == whole[-len(parts[-1]) :] and len(parts[-1]) < 14
        a = content(tmp_path / 'a', 'iter_14.pth')
        assert_equal(a, content(tmp_path / f'b{stop}', 'iter_14.pth'))


@pytest.mark.skipif(
    not hasattr(torch.amp, 'GradScaler'), reason='torch 2.2 has no scaler of the CPU'
)
def test_scaler_of_mixed_precision_goes_on(tmp_path):
    settings = dict(wrapper=dict(type='CpuAmpOptimWrapper'), **BY_ITERATION)
    run(tmp_path / 'a', seed=0, **settings)
    _, runner = stop_and_resume(tmp_path / 'b', 14, [], **settings)
    a, b = (content(tmp_path / x, 'iter_20.pth') for x in 'ab')
    assert a['optimizer']['loss_scaler']['scale'] > 2**16
    assert_equal(a, b)


@pytest.mark.parametrize('train', [EPOCHS, ITERATIONS], ids=['epochs', 'iterations'])
def test_order_of_samples_goes_on_with_workers(tmp_path, train):
    settings = dict(workers=1, train=train, saving=dict(by_epoch=False, interval=6))
    whole, _ = run(tmp_path / 'a', seed=0, **settings)
    parts, _ = stop_and_resume(tmp_path / 'b', 8, [], **settings)
    assert parts[-1] == whole[6:]


def test_batches_that_were_trained_are_not_loaded_again(tmp_path):
    settings = dict(train=ITERATIONS, saving=dict(interval=4))
    _, runner = stop_and_resume(tmp_path, 9, [], **settings)
    assert len(runner.train_dataloader.dataset.seen) == 2 * (14 - 8)


def test_validation_leaves_the_random_numbers_alone(tmp_path):
    seldom = {**EPOCHS, 'val_interval': 4}
    often, _ = run(tmp_path / 'a', seed=0)
    assert often == run(tmp_path / 'b', seed=0, train=seldom)[0]
    a, b = (content(tmp_path / x, 'epoch_4.pth')['state_dict'] for x in 'ab')
    assert_equal(a, b)


def test_best_checkpoint_of_an_interrupted_validation_is_made_up_for(tmp_path):
    settings = dict(saving=dict(save_best='mean', rule='less'))
    stop = StopAt(5, 'before_val_iter')
    run(tmp_path, stop, seed=0, **settings)
    assert not list(tmp_path.glob('best_*'))
    run(tmp_path, StopAt(6), resume=True, **settings)
    assert [path.name for path in tmp_path.glob('best_*')] == ['best_mean_epoch_1.pth']
    # And the next resumption knows it.
    _, runner = run(tmp_path, StopAt(6), resume=True, **settings)
    assert runner.message_hub.get_info('best_ckpt').endswith('best_mean_epoch_1.pth')
    hook = next(h for h in runner.hooks if isinstance(h, ExactResumeHook))
    assert hook._validated_at is None, 'validated again'


def test_second_stop_after_a_validation_that_was_made_up_for(tmp_path):
    best = dict(saving=dict(save_best='mean', rule='less'))
    run(tmp_path / 'whole', seed=0, **best)
    run(tmp_path / 'b', StopAt(5, 'before_val_iter'), seed=0, **best)
    # It is the best, so that the checkpoint is saved again.
    run(tmp_path / 'b', StopAt(6), resume=True, **best)
    run(tmp_path / 'b', resume=True, **best)
    ends = [content(tmp_path / d, 'epoch_4.pth')['state_dict'] for d in ('whole', 'b')]
    assert_equal(*ends)


def test_sampler_that_skips_for_itself_goes_on(tmp_path):
    by_sampler = dict(ITERATIONS, fast_forward_on_resume=True)
    try:
        whole, _ = run(tmp_path / 'whole', seed=0, train=by_sampler)
    except TypeError:
        pytest.skip('this mmengine has no such loop')
    run(tmp_path / 'b', StopAt(6), seed=0, train=by_sampler)
    calls, _ = run(tmp_path / 'b', resume=True, train=by_sampler)
    assert calls == whole[4:]


class FullDisk(Hook):
    priority = 'VERY_HIGH'

    def __init__(self, is_full):
        self.is_full = is_full

    def before_save_checkpoint(self, runner, checkpoint):
        if self.is_full(runner, checkpoint):
            raise OSError(errno.ENOSPC, 'No space left on device')


def test_latest_that_cannot_be_saved_again_with_the_best_ends_the_run(tmp_path):
    full = FullDisk(lambda run, saved: 'optimizer' in saved and run.epoch == 1)
    saving = dict(save_best='mean', rule='less')
    with pytest.raises(OSError, match=r'cannot save .*epoch_1\.pth: No space left'):
        run(tmp_path, full, seed=0, saving=saving)


def test_checkpoint_of_another_tool_is_resumed_with_a_warning(tmp_path):
    run(tmp_path, StopAt(6), seed=0)
    path = tmp_path / 'epoch_1.pth'
    checkpoint = torch.load(path, weights_only=False)
    del checkpoint['exact_resume']
    torch.save(checkpoint, path)
    calls, runner = run(tmp_path, resume=True)
    assert [call[1] for call in calls] == list(range(5, 20))
    log = next(tmp_path.glob(f'{runner.timestamp}/*.log')).read_text()
    assert 'cannot be continued exactly, since it has the state of 0 processes' in log


def test_random_numbers_go_on_from_a_state():
    state = get_random_state()
    draw = [random.random(), np.random.randn(), torch.rand(1).item()]
    np.random.randn(), random.gauss(0, 1)
    set_random_state(state)
    assert draw == [random.random(), np.random.randn(), torch.rand(1).item()]


# The size of the steps


def change(folder, batch_size, **settings):
    sampler = dict(type='DefaultSampler', shuffle=True)
    loader = dict(batch_size=batch_size, num_workers=0, sampler=sampler)
    runner_settings = dict(loader, dataset=Pictures())
    original = Runner.build_dataloader

    def build_dataloader(dataloader, *args, **kwargs):
        if isinstance(dataloader, dict) and dataloader.get('batch_size') == 2:
            dataloader = {**dataloader, 'batch_size': runner_settings['batch_size']}
        return original(dataloader, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Runner, 'build_dataloader', staticmethod(build_dataloader))
        return run(folder, resume=True, **settings)


def test_steps_of_another_size_are_refused(tmp_path):
    run(tmp_path, StopAt(12), seed=0)
    before = {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')}
    with pytest.raises(ValueError) as info:
        change(tmp_path, 5)
    assert str(info.value).startswith(
        'the run cannot be resumed with another recipe (batch size 2 before and 5 now)'
    )
    assert 'epoch_2.pth' in str(info.value)
    assert before == {path.name: path.read_bytes() for path in tmp_path.glob('*.pth')}


def test_another_number_of_processes_is_refused(tmp_path):
    run(tmp_path, StopAt(12), seed=0)
    path = tmp_path / 'epoch_2.pth'
    checkpoint = torch.load(path, weights_only=False)
    checkpoint['meta']['recipe']['processes'] = 8
    torch.save(checkpoint, path)
    with pytest.raises(ValueError, match=r'\(processes 8 before and 1 now\)'):
        run(tmp_path, resume=True)


def test_processes_that_start_from_other_weights_are_refused(tmp_path, monkeypatch):
    module = 'convmlp_mm.hooks.agreement'
    monkeypatch.setattr(f'{module}.get_world_size', lambda: 3)
    others = ['elsewhere', 'elsewhere']
    monkeypatch.setattr(f'{module}.all_gather_object', lambda place: [place, *others])
    found = r'rank 0: epoch 0, iteration 0, weights [0-9a-f]{8}; rank 1, 2: elsewhere'
    with pytest.raises(RuntimeError, match=found):
        run(tmp_path, seed=0)


@pytest.mark.parametrize('stop', [(7,), (15, 'before_val_iter'), (18,)])
def test_early_stopping_counts_on(tmp_path, stop):
    def train(folder, *hooks, resume=False):
        hooks += Early(), SummaryHook()
        # The seed is of the validation's order, too, which decides its values here.
        settings = dict(saving=dict(save_best='mean', rule='less'), seed=0)
        settings['train'] = dict(EPOCHS, max_epochs=8)
        return run(tmp_path / folder, *hooks, resume=resume, **settings)

    _, runner = train('a')
    end, best = runner.epoch, next((tmp_path / 'a').glob('best_*')).name
    assert 4 < end < 8
    train('b', StopAt(*stop))
    _, runner = train('b', resume=True)
    assert runner.epoch == end
    last = f'epoch_{end}.pth'
    assert (tmp_path / 'b' / best).exists()
    assert_equal(content(tmp_path / 'a', last), content(tmp_path / 'b', last))
    # Once it has ended, it does not train on.
    calls, runner = train('b', resume=True)
    assert calls == [] and runner.train_loop.stop_training
    assert not (tmp_path / 'b' / f'epoch_{end + 1}.pth').exists()


class Early(EarlyStoppingHook):
    def __init__(self):
        super().__init__('mean', rule='less', patience=3, min_delta=0)


def test_longer_run_keeps_the_schedule_and_says_so(tmp_path):
    run(tmp_path, seed=0)
    calls, runner = run(tmp_path, resume=True, train=dict(EPOCHS, max_epochs=5))
    assert [call[1] for call in calls] == list(range(20, 25))
    assert len({call[4] for call in calls}) == 1
    log = next(tmp_path.glob(f'{runner.timestamp}/*.log')).read_text()
    assert 'goes on (param_scheduler.0.end 20 before and 25 now)' in log


def test_another_schedule_is_refused(tmp_path):
    run(tmp_path, StopAt(12), seed=0)
    schedule = dict(type='CosineAnnealingLR', T_max=40, by_epoch=False)
    with pytest.raises(ValueError, match=r'scheduler\.0\.T_max 20 before and 40 now\)'):
        run(tmp_path, resume=True, param_scheduler=schedule)


def test_momentum_that_is_scheduled_is_not_taken_for_another_recipe(tmp_path):
    schedule = [
        dict(type='LinearLR', end=8, by_epoch=False),
        dict(type='CosineAnnealingMomentum', T_max=20, by_epoch=False),
    ]
    whole, _ = run(tmp_path / 'a', seed=0, param_scheduler=schedule)
    parts, _ = stop_and_resume(tmp_path / 'b', 13, [], param_scheduler=schedule)
    assert parts[-1] == whole[10:]


def test_run_that_was_saved_in_an_epoch_validates_only_at_its_end(tmp_path):
    order = Hook()
    calls = order.calls = []
    order.before_val = lambda runner: calls.append('val')
    order.before_train_iter = lambda *args, **kwargs: calls.append('train')
    settings = dict(saving=dict(by_epoch=False, interval=7))
    run(tmp_path, StopAt(8), seed=0, **settings)
    run(tmp_path, order, StopAt(11), resume=True, **settings)
    # After the third and the fourth iteration of the second epoch.
    assert calls == ['train'] * 3 + ['val', 'train']
