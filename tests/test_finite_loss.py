"""A training whose loss is no number any more."""

import math
import os
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn
from torch.utils.data import Dataset
from toy import free_port

from convmlp_mm import FiniteLossHook
from convmlp_mm.launch import closing_group


class Numbers(Dataset):
    """Four numbers, which stand for images."""

    def __init__(self, bad=None, value=math.nan):
        self.values = [value if i == bad else float(i) for i in range(4)]

    def __len__(self):
        return 4

    def __getitem__(self, index):
        sample = BaseDataElement(metainfo=dict(img_path=f'images/{index}.jpg'))
        return dict(inputs=torch.tensor([self.values[index]]), data_samples=sample)


class Line(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        values = self.layer(torch.stack(list(inputs)))
        return dict(loss_line=values.mean(), loss_other=values.sum() * 0 + 1, acc=NAN)


# What is no loss may be NaN: here, an accuracy of nothing.
NAN = torch.tensor(math.nan)


def make_runner(work_dir, data, hook=None, **changes):
    cfg = dict(
        model=Line(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=data,
            batch_size=2,
            sampler=dict(type='DefaultSampler', shuffle=False),
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.0)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)
        ),
        custom_hooks=[dict(type='FiniteLossHook'), *([hook] if hook else [])],
        experiment_name=os.fspath(work_dir),
        log_level='ERROR',
    )
    return Runner(**{**cfg, **changes})


def saved(work_dir):
    return sorted(path.name for path in work_dir.glob('*.pth'))


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_run_stops_at_the_loss_and_keeps_the_checkpoint_before_it(tmp_path, value):
    runner = make_runner(tmp_path, Numbers(2, value))
    with pytest.raises(FloatingPointError) as stop:
        runner.train()
    # -Inf for a negative weight.
    assert re.fullmatch(
        r'iteration 2: loss is (nan|-?inf), loss_line is (nan|-?inf), loss_other is '
        r'nan; the images are images/2\.jpg, images/3\.jpg; the last checkpoint '
        rf'before it is {tmp_path}/iter_1\.pth',
        str(stop.value),
    )
    assert saved(tmp_path) == ['iter_1.pth']


def test_finite_losses_train_to_the_end(tmp_path):
    make_runner(tmp_path, Numbers()).train()
    assert saved(tmp_path) == [f'iter_{i}.pth' for i in (1, 2, 3, 4)]


def test_first_iteration_has_no_checkpoint_before_it(tmp_path):
    with pytest.raises(FloatingPointError, match=r'iteration 1: .* none yet$'):
        make_runner(tmp_path, Numbers(0)).train()
    assert not saved(tmp_path)


class SpoilWeights(Hook):
    def after_train_iter(self, runner, **kwargs):
        if runner.iter == 1:
            runner.model.layer.bias.data.fill_(math.nan)


def test_weights_that_are_spoilt_after_the_loss_are_not_saved(tmp_path):
    runner = make_runner(tmp_path, Numbers(), SpoilWeights())
    with pytest.raises(FloatingPointError) as stop:
        runner.train()
    assert str(stop.value) == (
        'iteration 2: NaN or Inf in layer.bias; nothing is saved, and the last '
        f'checkpoint before it is {tmp_path}/iter_1.pth'
    )
    assert saved(tmp_path) == ['iter_1.pth']


def scaled(tmp_path, enabled=True):
    """A runner as far as the hook needs one, with a GradScaler."""
    wrapper = object.__new__(AmpOptimWrapper)
    wrapper.loss_scaler = SimpleNamespace(is_enabled=lambda: enabled)
    return SimpleNamespace(optim_wrapper=wrapper, iter=6, work_dir=str(tmp_path))


def look(runner, *values, batch=None, hook=None):
    """Let a hook look at losses, one after the other."""
    hook = hook or FiniteLossHook()
    runner.hooks = [hook]
    for value in values:
        outputs = value if isinstance(value, dict) else dict(loss=torch.tensor(value))
        hook.after_train_iter(runner, 0, batch, outputs)


def test_scaler_allows_one_infinite_loss_but_not_two_in_a_row(tmp_path):
    inf, nan = math.inf, math.nan
    look(scaled(tmp_path), inf, 1.0, inf)
    with pytest.raises(FloatingPointError, match='iteration 7: loss is inf; the'):
        look(scaled(tmp_path), 1.0, inf, inf)
    with pytest.raises(FloatingPointError, match='loss is nan'):
        look(scaled(tmp_path), nan)
    with pytest.raises(FloatingPointError, match='loss is inf'):
        look(scaled(tmp_path, enabled=False), inf)


@pytest.mark.parametrize(
    ('batch', 'names'),
    [
        (dict(data_samples=[dict(img_path='a'), dict(img_id=4)]), 'a, one without'),
        (
            dict(
                data_samples=dict(sup=[dict(img_path='a')], free=[dict(img_path='b')])
            ),
            'a, b;',
        ),
        ((torch.zeros(2), torch.zeros(2)), 'unknown'),
    ],
)
def test_images_are_named_as_far_as_the_batch_does(tmp_path, batch, names):
    def element(value):
        if isinstance(value, list):
            return [BaseDataElement(metainfo=part) for part in value]
        if isinstance(value, dict):
            return {key: element(part) for key, part in value.items()}
        return value

    with pytest.raises(FloatingPointError, match=f'the images are {names}'):
        look(scaled(tmp_path), math.nan, batch=element(batch))


def test_outputs_of_other_training_steps_pass(tmp_path):
    runner, hook = scaled(tmp_path), FiniteLossHook()
    terms = dict(loss_a=torch.ones(()), losses=[1, 2], loss_b=None)
    outputs = dict(loss=torch.ones(2), **terms)
    look(runner, outputs, hook=hook)
    for given in ([torch.ones(1)], None):
        hook.after_train_iter(runner, 0, None, given)
    with pytest.raises(FloatingPointError, match='loss_a is nan'):
        look(runner, {**outputs, 'loss_a': NAN})


@closing_group()
def in_process(rank, work_dir, port):
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), WORLD_SIZE='2')
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group('gloo')
    wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
    # The samplers give rank 1 the images 1 and 3.
    runner = make_runner(
        work_dir, Numbers(3), launcher='pytorch', cfg=dict(model_wrapper_cfg=wrapper)
    )
    runner.train_dataloader.batch_sampler.batch_size = 1
    try:
        runner.train()
        message = 'trained'
    except FloatingPointError as error:
        message = str(error)
    (work_dir / f'{rank}.txt').write_text(message)


@pytest.mark.slow
def test_all_processes_stop_and_none_saves(tmp_path):
    torch.multiprocessing.spawn(in_process, (tmp_path, free_port()), nprocs=2)
    first, second = ((tmp_path / f'{rank}.txt').read_text() for rank in range(2))
    assert first == 'iteration 2: the loss of another process is NaN or Inf'
    assert second.startswith('iteration 2: loss is nan, loss_line is nan')
    assert 'the images are images/3.jpg; the' in second
    assert saved(tmp_path) == ['iter_1.pth']
