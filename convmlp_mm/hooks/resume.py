"""Make a resumed run the run that it would have been."""

from __future__ import annotations

import bisect
import logging
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import numpy as np
import torch
from mmengine.device import get_device
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ._mmengine import is_resumed, is_training, train_loader_settings
from .agreement import steps_of

__all__ = ['ExactResumeHook', 'check_state', 'get_random_state', 'set_random_state']

# The key of a checkpoint.
KEY = 'exact_resume'


# Random numbers


def _accelerator():
    """Return torch.cuda or what stands for it on this machine; None on a CPU."""
    module = getattr(torch, get_device(), None)
    return module if hasattr(module, 'get_rng_state') else None


def get_random_state() -> dict:
    """Read the states of Python, numpy, torch and the process's own device.

    Returns:
        dict: Tensors and numbers, which :func:`torch.load` reads without unpickling
        anything else.
    """
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    keys = torch.from_numpy(keys.astype(np.int64))
    state = dict(
        python=(version, torch.tensor(words), gauss),
        numpy=(kind, keys, int(position), int(has_gauss), float(cached)),
        torch=torch.get_rng_state(),
    )
    accelerator = _accelerator()
    if accelerator is not None:
        state['device'] = accelerator.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Set what :func:`get_random_state` has read.

    Args:
        state (dict): Its result; the state of a device is left out where there is none.
    """
    version, words, gauss = state['python']
    random.setstate((version, tuple(words.tolist()), gauss))
    kind, keys, *rest = state['numpy']
    np.random.set_state((kind, keys.cpu().numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state['torch'].cpu())
    accelerator = _accelerator()
    if accelerator is not None and 'device' in state:
        accelerator.set_rng_state(state['device'].cpu())


# The position in the data


def _build_loader_again(runner: Runner, loop: BaseLoop, seed: int) -> None:
    """Give the samplers the seed of the first start, and none of its batches.

    A loader that the caller has built stays: the caller knows the seed.
    """
    settings = train_loader_settings(runner)
    if isinstance(settings, dict):
        randomness = runner.cfg.get('randomness', {})
        loop.dataloader = runner.build_dataloader(
            {**settings, 'dataset': loop.dataloader.dataset},
            seed=seed,
            diff_rank_seed=randomness.get('diff_rank_seed', False),
        )


class ResumedBatchSampler:
    """A batch sampler whose first round is what is left of one.

    Args:
        loader (DataLoader): One that has not been used. It gets this sampler.
        rest (Callable): Returns the batches that are left.
        begin (Callable): Called before the first batch, once the loader has drawn
            the random number that it begins with.
    """

    def __init__(
        self,
        loader: DataLoader,
        rest: Callable[[], Iterator],
        begin: Callable[[], None],
    ) -> None:
        self.batch_sampler = loader.batch_sampler
        self.first = (rest, begin)
        # torch forbids the assignment, lest a sampler change under a loader in use.
        vars(loader)['batch_sampler'] = self

    def __iter__(self) -> Iterator:
        batches = self.batch_sampler
        if self.first is not None:
            (rest, begin), self.first = self.first, None
            batches = rest()
            begin()
        yield from batches

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> object:
        if name == 'batch_sampler':
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def _skip_in_epoch(
    loop: EpochBasedTrainLoop, count: int, begin: Callable[[], None]
) -> None:
    """Let the first epoch of a loop begin behind some of its batches.

    Its hooks see the index of a batch in the whole epoch.
    """
    whole = loop.dataloader.batch_sampler
    run_iter, run_epoch = loop.run_iter, loop.run_epoch
    # The sampler hears of the epoch only when it begins.
    ResumedBatchSampler(loop.dataloader, lambda: islice(whole, count, None), begin)

    def run_shifted(idx: int, data_batch: object) -> None:
        run_iter(idx + count, data_batch)

    def run_first_epoch() -> None:
        try:
            run_epoch()
        finally:
            del loop.run_iter, loop.run_epoch

    loop.run_iter, loop.run_epoch = run_shifted, run_first_epoch


class ResumedIterator:
    """The endless iterator of an iteration-based loop, already where it belongs.

    The loop advances it by as many batches as have been trained, or has it do so by
    ``skip_iter`` in newer versions; none of them is loaded.

    Args:
        loop (IterBasedTrainLoop): It has a loader that has not been used.
        count (int): How many batches have been trained.
        begin (Callable): See :class:`ResumedBatchSampler`.
    """

    def __init__(
        self, loop: IterBasedTrainLoop, count: int, begin: Callable[[], None]
    ) -> None:
        # A loop that leaves its position alone asks for none.
        by_sampler = getattr(loop, 'fast_forward_on_resume', False)
        self.to_skip = 0 if by_sampler else loop.iter
        self.loader, self.passes = loop.dataloader, 0
        whole = self.loader.batch_sampler
        batches = iter(whole)
        for _ in range(count):
            if next(batches, None) is None:
                self._begin_pass()
                batches = iter(whole)
                next(batches)
        ResumedBatchSampler(self.loader, lambda: batches, begin)
        self.batches = self._generate()

    def _begin_pass(self) -> None:
        self.passes += 1
        batch_sampler = self.loader.batch_sampler
        for sampler in (self.loader.sampler, getattr(batch_sampler, 'sampler', None)):
            if hasattr(sampler, 'set_epoch'):
                sampler.set_epoch(self.passes)
                return

    def _generate(self) -> Iterator:
        while True:
            yield from self.loader
            self._begin_pass()

    def skip_iter(self, num_iters: int) -> None:
        """Skip nothing more."""
        self.to_skip = 0

    def __iter__(self) -> ResumedIterator:
        return self

    def __next__(self) -> object:
        if self.to_skip:
            self.to_skip -= 1
            return None
        return next(self.batches)


# The hook


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Save and restore what the Runner forgets when it resumes.

    Each checkpoint from which a run can be resumed also gets, for every process, the
    states of the random numbers, open gradients (of an accumulation that the
    checkpoint interrupts) and buffers (BN statistics), and for all of them the seed
    of the samplers and the position in the data. A run that is resumed

    - goes on in the middle of an epoch where it was, by indices, without loading
      what it has had, and with the samplers' seed of the first start;
    - draws the random numbers that it would have drawn: on a CPU and without workers
      the weights at the end are equal bit for bit; with workers, the order of samples
      and the schedule are, while each worker starts its augmentation anew;
    - makes up for a validation that was due at the checkpoint, unless it was saved
      after that.

    Validation leaves the random numbers of the training alone, so that it does not
    matter how often it runs.

    With several processes, the state of all is gathered where the hook that saves
    calls ``before_gather_state`` on each of them, as ``SafeCheckpointHook`` does.
    """

    # The other hooks draw random numbers when they prepare the training.
    priority = 'LOWEST'

    def __init__(self) -> None:
        self._gathered: list[dict] | None = None
        self._state: dict | None = None
        self._epoch_start = 0
        self._skipped = 0
        self._validated_at: int | None = None
        self._before_val: dict | None = None

    # Saving

    def before_gather_state(self, runner: Runner) -> None:
        """Collect the state of all processes; each of them calls this."""
        self._gathered = gather_object(self._process_state(runner)) or []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state; not to the best checkpoints, which have no optimizer."""
        gathered, self._gathered = self._gathered, None
        if 'optimizer' not in checkpoint:
            return
        if gathered is None:
            # A hook that does not ask the other processes.
            gathered = [self._process_state(runner)] if get_world_size() == 1 else []
        meta = checkpoint['meta']
        batches = meta['iter']
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            # After the end of an epoch, the start of the next is not noted yet.
            over = meta['epoch'] > runner.epoch
            batches = 0 if over else batches - self._epoch_start
        checkpoint[KEY] = dict(
            seed=runner.seed,
            steps=steps_of(runner),
            batches=batches,
            validated=self._validated_at == meta['iter'],
            processes=gathered,
        )

    def _process_state(self, runner: Runner) -> dict:
        """Return what differs between processes."""
        grads = [p.grad for p in runner.model.parameters()]
        # A best checkpoint has the latest saved again while it is validated.
        random = self._before_val or get_random_state()
        state = dict(random=random, grads=None, buffers=None)
        if any(grad is not None for grad in grads):
            state['grads'] = [None if g is None else g.detach().cpu() for g in grads]
        if get_world_size() > 1:
            state['buffers'] = [b.detach().cpu() for b in runner.model.buffers()]
        return state

    # Resuming

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the state out of a checkpoint that is resumed."""
        state = checkpoint.pop(KEY, None)
        if is_resumed(runner):
            self._state = state or {}

    def before_train(self, runner: Runner) -> None:
        """Restore the state, once the runner has loaded the checkpoint.

        Raises:
            ValueError: If the tensors in it are not of this model.
        """
        self._epoch_start = runner.iter
        state, self._state = self._state, None
        first = next(hook for hook in runner.hooks if isinstance(hook, type(self)))
        if state is None or first is not self:
            return
        loop = runner.train_loop
        processes = state.get('processes', [])
        if not isinstance(loop, (EpochBasedTrainLoop, IterBasedTrainLoop)):
            _warn(f'{type(loop).__name__} is not one of mmengine')
        elif len(processes) != get_world_size():
            of = f'that of {len(processes)}' if processes else 'no'
            _warn(f'it has {of} state of processes, but there are {get_world_size()}')
        elif state['steps'] != steps_of(runner):
            _warn('the size of its steps was another')
        else:
            self._restore(runner, loop, state, processes[get_rank()])

    def _restore(
        self, runner: Runner, loop: BaseLoop, state: dict, process: dict
    ) -> None:
        restore_rng = partial(set_random_state, process['random'])
        _restore_tensors(runner.model, process)
        self._restore_position(runner, loop, state, restore_rng)
        restore_rng()
        if not state['validated']:
            # It puts the random numbers back when it ends.
            _validate_if_due(runner, loop)

    def _restore_position(
        self,
        runner: Runner,
        loop: BaseLoop,
        state: dict,
        restore_rng: Callable[[], None],
    ) -> None:
        _build_loader_again(runner, loop, state['seed'])
        count = state['batches']
        if isinstance(loop, IterBasedTrainLoop):
            loop.dataloader_iterator = ResumedIterator(loop, count, restore_rng)
            return
        self._skipped, self._epoch_start = count, runner.iter - count
        # The numbers of an epoch that begins are those before its loader does.
        if count:
            _skip_in_epoch(loop, count, restore_rng)

    # Positions

    def before_train_epoch(self, runner: Runner) -> None:
        """Note where the epoch has begun."""
        self._epoch_start = runner.iter - self._skipped
        self._skipped = 0

    def after_train_epoch(self, runner: Runner) -> None:
        """Note where the next epoch begins, for a checkpoint after validation."""
        self._epoch_start = runner.iter

    def before_val(self, runner: Runner) -> None:
        """Put the random numbers of the training aside."""
        self._before_val = get_random_state()
        if is_training(runner):
            self._validated_at = runner.iter

    def after_val(self, runner: Runner) -> None:
        """Go on with the random numbers of the training."""
        set_random_state(self._before_val)
        self._before_val = None


def check_state(state: object, checkpoint: dict) -> None:
    """Check that what :class:`ExactResumeHook` has saved can be restored.

    Args:
        state (object): What stands under its key.
        checkpoint (dict): The rest, of which ``meta`` and ``state_dict`` are right.

    Raises:
        ValueError: If it cannot.
    """
    before = get_random_state()
    try:
        processes, batches = state['processes'], state['batches']
        right = type(state['seed']) is int and type(state['validated']) is bool
        right &= isinstance(state['steps'], dict) and isinstance(processes, list)
        right &= type(batches) is int and 0 <= batches <= checkpoint['meta']['iter']
        for process in processes:
            set_random_state(process['random'])
            tensors = [t for k in ('grads', 'buffers') for t in process[k] or []]
            right &= all(t is None or isinstance(t, torch.Tensor) for t in tensors)
            # Parameters stand in the state dict in their order.
            shapes = iter([value.shape for value in checkpoint['state_dict'].values()])
            grads = [grad for grad in process['grads'] or [] if grad is not None]
            right &= all(any(grad.shape == s for s in shapes) for grad in grads)
    except Exception as error:
        raise ValueError(f'{KEY} is damaged: {type(error).__name__}') from error
    finally:
        set_random_state(before)
    if not right:
        raise ValueError(f'{KEY} is damaged')


def _warn(reason: str) -> None:
    print_log(
        'The run is resumed with other random numbers, at the beginning of an epoch: '
        f'the checkpoint cannot be continued exactly, since {reason}.',
        'current',
        logging.WARNING,
    )


def _restore_tensors(model: torch.nn.Module, process: dict) -> None:
    for key, tensors in (('grads', model.parameters()), ('buffers', model.buffers())):
        shapes = [t.shape for t in tensors]
        saved = shapes if process[key] is None else process[key]
        same = (a is None or getattr(a, 'shape', a) == b for a, b in zip(saved, shapes))
        if len(saved) != len(shapes) or not all(same):
            raise ValueError(f'{key} of {KEY} in the checkpoint are not of this model')
    if process['grads'] is not None:
        for param, grad in zip(model.parameters(), process['grads']):
            # torch wants them in the layout that backward gives them.
            param.grad = None if grad is None else torch.empty_like(param).copy_(grad)
    if process['buffers'] is not None:
        for buffer, saved in zip(model.buffers(), process['buffers']):
            buffer.copy_(saved)


def _validate_if_due(runner: Runner, loop: BaseLoop) -> None:
    """Run the validation that the run was stopped in or before."""
    done, end = runner.iter, runner.max_iters
    if isinstance(loop, EpochBasedTrainLoop):
        if runner.iter != runner.epoch * len(loop.dataloader):
            return
        done, end = runner.epoch, runner.max_epochs
    # The loop looks up its interval only when it has trained.
    stage = bisect.bisect(loop.dynamic_milestones, done + 1) - 1
    interval = loop.dynamic_intervals[stage]
    due = done >= loop.val_begin and (done % interval == 0 or done == end)
    if runner.val_loop is None or not done or not due:
        return
    runner.logger.info('The validation that was due at the checkpoint comes first.')
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook):
            # The best value that it finds enters the latest checkpoint.
            hook.last_ckpt = runner.message_hub.get_info('last_ckpt')
    runner.val_loop.run()
