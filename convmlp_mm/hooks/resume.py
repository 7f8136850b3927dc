"""Make a resumed run the run that it would have been."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
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

from ._mmengine import (
    decide_val_interval,
    endless_iterator,
    is_resumed,
    is_training,
    train_loader_settings,
)
from .agreement import steps_of

__all__ = ['ExactResumeHook', 'check_state', 'get_random_state', 'set_random_state']


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
    state = dict(
        python=(version, torch.tensor(words), gauss),
        numpy=(
            kind,
            torch.from_numpy(keys.astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ),
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
    kind, keys, position, has_gauss, cached = state['numpy']
    keys = keys.cpu().numpy().astype(np.uint32)
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(state['torch'].cpu())
    accelerator = _accelerator()
    if accelerator is not None and 'device' in state:
        accelerator.set_rng_state(state['device'].cpu())


def build_loader_again(runner: Runner, loop: BaseLoop, seed: int) -> None:
    """Give the samplers the seed of the first start, and none of its batches.

    Args:
        runner (Runner): The runner.
        loop (BaseLoop): Its training; it gets another ``dataloader`` with the same
            data set, unless the caller has built the loader.
        seed (int): The seed.
    """
    settings = train_loader_settings(runner)
    if not isinstance(settings, dict):
        # Built by the caller, who knows the seed.
        return
    settings = dict(settings)
    settings['dataset'] = loop.dataloader.dataset
    diff_rank_seed = runner.cfg.get('randomness', {}).get('diff_rank_seed', False)
    loop.dataloader = runner.build_dataloader(
        settings, seed=seed, diff_rank_seed=diff_rank_seed
    )


def shift_batch_index(loop: EpochBasedTrainLoop, batches: int) -> None:
    """Let the hooks of this epoch see the index of the batch in the whole epoch.

    Args:
        loop (EpochBasedTrainLoop): It is changed until the epoch ends.
        batches (int): How many batches the epoch has had.
    """
    run_iter, run_epoch = loop.run_iter, loop.run_epoch

    def run_shifted(idx: int, data_batch: object) -> None:
        run_iter(idx + batches, data_batch)

    def run_first_epoch() -> None:
        try:
            run_epoch()
        finally:
            del loop.run_iter, loop.run_epoch

    loop.run_iter, loop.run_epoch = run_shifted, run_first_epoch


class Remainder:
    """A batch sampler whose first round is what is left of one.

    Args:
        loader (DataLoader): One that has not been used. It gets the new sampler.
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

    @classmethod
    def of_epoch(
        cls, loader: DataLoader, count: int, begin: Callable[[], None]
    ) -> None:
        """Skip batches of the first epoch, of which the sampler hears later.

        Args:
            loader (DataLoader): It is changed.
            count (int): How many to skip.
            begin (Callable): See above.
        """
        whole = loader.batch_sampler
        cls(loader, lambda: islice(iter(whole), count, None), begin)

    @classmethod
    def of_passes(
        cls, loader: DataLoader, count: int, begin: Callable[[], None]
    ) -> int:
        """Skip batches of a loader that is begun again whenever it ends.

        Args:
            loader (DataLoader): It is changed.
            count (int): How many to skip.
            begin (Callable): See above.

        Returns:
            int: How often it has ended.
        """
        whole, passes = loader.batch_sampler, 0
        batches = iter(whole)
        for _ in range(count):
            if next(batches, None) is None:
                passes += 1
                _set_epoch(loader, passes)
                batches = iter(whole)
                next(batches)
        cls(loader, lambda: batches, begin)
        return passes

    def __iter__(self) -> Iterator:
        if self.first is None:
            yield from self.batch_sampler
            return
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


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            return


class AdvancedIterator:
    """The endless iterator of an iteration-based loop, already where it belongs.

    The loop advances it by as many batches as have been trained; of those, none is
    loaded.
    """

    def __init__(self, loop: IterBasedTrainLoop, passes: int) -> None:
        # What the loop has made for itself, for another loader.
        self.batches = endless_iterator(loop, passes)
        # A loop that skips by the sampler asks for none.
        by_sampler = getattr(loop, 'fast_forward_on_resume', False)
        self.to_skip = 0 if by_sampler else loop.iter

    def skip_iter(self, num_iters: int) -> None:
        """Do what the loop of newer versions asks for: nothing is left to skip."""
        self.to_skip = 0

    def __iter__(self) -> AdvancedIterator:
        return self

    def __next__(self) -> object:
        if self.to_skip:
            self.to_skip -= 1
            return None
        return next(self.batches)

    def __getattr__(self, name: str) -> object:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)


def is_first(runner: Runner, hook: Hook) -> bool:
    """Tell whether a hook is the first of its class, if it is listed twice.

    Args:
        runner (Runner): The runner.
        hook (Hook): One of its hooks.

    Returns:
        bool: Whether it is.
    """
    return hook is next(other for other in runner.hooks if type(other) is type(hook))


# Of the checkpoint.
KEY = 'exact_resume'


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

    # After the others have prepared the training, and changed the numbers by it.
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
        """Collect the state of all processes; each of them calls this.

        Args:
            runner (Runner): The runner.
        """
        self._gathered = gather_object(self._process_state(runner)) or []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state; not to the best checkpoints, which have no optimizer.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): It gets the key ``'exact_resume'``.
        """
        gathered, self._gathered = self._gathered, None
        if 'optimizer' not in checkpoint:
            return
        if gathered is None:
            # A hook that does not ask the other processes.
            gathered = [self._process_state(runner)] if get_world_size() == 1 else []
        meta = checkpoint['meta']
        batches = meta['iter']
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            # Of an epoch that is over, the start of the next has not been noted yet.
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
        """Take the state out of a checkpoint that is resumed.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What the file holds.
        """
        state = checkpoint.pop(KEY, None)
        if is_resumed(runner):
            self._state = state or {}

    def before_train(self, runner: Runner) -> None:
        """Restore the state.

        Args:
            runner (Runner): The runner, which has loaded the checkpoint.
        """
        self._epoch_start = runner.iter
        state, self._state = self._state, None
        if state is None or not is_first(runner, self):
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
        _restore_tensors(runner.model, process)

        def restore_numbers() -> None:
            set_random_state(process['random'])

        build_loader_again(runner, loop, state['seed'])
        by_epoch = isinstance(loop, EpochBasedTrainLoop)
        if by_epoch:
            self._skipped = state['batches']
            self._epoch_start = runner.iter - self._skipped
            if self._skipped:
                Remainder.of_epoch(loop.dataloader, self._skipped, restore_numbers)
                shift_batch_index(loop, self._skipped)
        else:
            passes = Remainder.of_passes(
                loop.dataloader, state['batches'], restore_numbers
            )
            loop.dataloader_iterator = AdvancedIterator(loop, passes)
        # Validation may draw some, and save them.
        restore_numbers()
        if not state['validated']:
            _validate_if_due(runner, loop, by_epoch)
        # The numbers of an epoch that begins are those before its loader does.
        restore_numbers()

    # Positions

    def before_train_epoch(self, runner: Runner) -> None:
        """Note where the epoch has begun.

        Args:
            runner (Runner): The runner.
        """
        self._epoch_start = runner.iter - self._skipped
        self._skipped = 0

    def after_train_epoch(self, runner: Runner) -> None:
        """Note where the next epoch begins, for a checkpoint after validation.

        Args:
            runner (Runner): The runner.
        """
        self._epoch_start = runner.iter

    def before_val(self, runner: Runner) -> None:
        """Put the random numbers of the training aside.

        Args:
            runner (Runner): The runner.
        """
        self._before_val = get_random_state()
        if is_training(runner):
            self._validated_at = runner.iter

    def after_val(self, runner: Runner) -> None:
        """Go on with the random numbers of the training.

        Args:
            runner (Runner): The runner.
        """
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


def _validate_if_due(runner: Runner, loop: BaseLoop, by_epoch: bool) -> None:
    """Run the validation that the run was stopped in or before."""
    decide_val_interval(loop)
    done, end = runner.iter, runner.max_iters
    if by_epoch:
        if runner.iter != runner.epoch * len(loop.dataloader):
            return
        done, end = runner.epoch, runner.max_epochs
    due = done >= loop.val_begin and (done % loop.val_interval == 0 or done == end)
    if runner.val_loop is None or not done or not due:
        return
    runner.logger.info('The validation that was due at the checkpoint comes first.')
    for hook in (h for h in runner.hooks if isinstance(h, CheckpointHook)):
        # So that what it finds to be the best enters the latest checkpoint.
        hook.last_ckpt = runner.message_hub.get_info('last_ckpt')
    runner.val_loop.run()
