"""What the hooks take from mmengine beside its public names, named when it moves."""

import inspect

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.runner import Runner
from torch import nn

from convmlp_mm.hooks import _mmengine


def assigned(function):
    """Return the attributes that a method sets on self."""
    return {
        line.split('self.')[1].split('=')[0].split(':')[0].strip()
        for line in inspect.getsource(function).splitlines()
        if line.strip().startswith('self.') and '=' in line
    }


def test_runner_keeps_what_it_is_given_under_the_names_that_are_used():
    names = {'_resume', '_load_from', '_train_loop', '_train_dataloader'}
    assert names - assigned(Runner.__init__) == set()


@pytest.mark.parametrize('method', ['load_or_resume', 'train'])
def test_runner_reads_them_where_they_are_set_before(method):
    # Hooks choose the start in before_run, which comes before the runner loads.
    text = inspect.getsource(getattr(Runner, method))
    if method == 'train':
        assert text.index("call_hook('before_run')") < text.index('load_or_resume()')
    else:
        for name in ('_resume', '_load_from'):
            assert f'self.{name}' in text, name


@pytest.mark.parametrize('wrapper', [OptimWrapper, AmpOptimWrapper])
def test_wrapper_of_the_optimizer_counts_batches(wrapper):
    assert '_accumulative_counts' in assigned(OptimWrapper.__init__)
    model = nn.Linear(1, 1)

    class Owner:
        optim_wrapper = OptimWrapper(
            torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=3
        )

    assert _mmengine.accumulative_counts(Owner) == 3


def test_checkpoint_hook_saves_when_it_is_told_to():
    parameters = inspect.signature(CheckpointHook._save_checkpoint_with_step).parameters
    assert list(parameters) == ['self', 'runner', 'step', 'meta']


def test_checkpoint_hook_calls_what_ours_replaces():
    calls = inspect.getsource(CheckpointHook._save_checkpoint)
    assert 'self._save_checkpoint_with_step(' in calls
