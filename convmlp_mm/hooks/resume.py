"""Make a resumed run the run that it would have been."""

import bisect
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice, repeat

import numpy as np
import torch
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ._mmengine import is_resumed, is_training, train_loader_settings

# The key of a checkpoint.
KEY = 'exact_resume'


def get_random_state() -> dict:
    """Read the states of Python, numpy, torch and the process's own GPU."""
    kind, keys, *rest = np.random.get_state()
    state = dict(
        python=random.getstate(),
        # An array would have to be unpickled.
        numpy=(kind, keys.tolist(), *rest),
        torch=torch.get_rng_state(),
    )
    if torch.cuda.is_available():
        state['device'] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: dict) -> None:
    """Set what :func:`get_random_state` has read, where there is a GPU for its own."""
    random.setstate(state['python'])
    np.random.set_state(state['numpy'])
    torch.set_rng_state(state['torch'].cpu())
    if torch.cuda.is_available() and 'device' in state:
        torch.cuda.set_rng_state(state['device'].cpu())


class ResumedBatchSampler:
    """A batch sampler whose first round is what is left of one.

    Args:
        loader: One that has not been used. It gets this sampler.
        rest: Returns the batches that are left.
        begin: Called before the first batch, once the loader has drawn the random
            number that it begins with.
    """

    def __init__(self, loader: DataLoader, rest: Callable, begin: Callable) -> None:
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
        return getattr(self.batch_sampler, name)


def _skip_in_epoch(loop: EpochBasedTrainLoop, count: int, begin: Callable) -> None:
    """Let the first epoch of a loop begin behind some of its batches.

    Its hooks see the index of a batch in the whole epoch.
    """
    whole, run_iter, first = loop.dataloader.batch_sampler, loop.run_iter, loop.epoch
    # The sampler hears of the epoch only when it begins.
    ResumedBatchSampler(loop.dataloader, lambda: islice(whole, count, None), begin)

    def run_shifted(idx: int, data_batch: object) -> None:
        run_iter(idx + count if loop.epoch == first else idx, data_batch)

    loop.run_iter = run_shifted


class ResumedIterator:
    """The endless iterator of an iteration-based loop, already where it belongs.

    Args:
        loop: It has a loader that has not been used.
        begin: See :class:`ResumedBatchSampler`.
    """

    def __init__(self, loop: IterBasedTrainLoop, begin: Callable) -> None:
        self.loader, self.passes = loop.dataloader, 0
        whole = self.loader.batch_sampler
        batches = iter(whole)
        for _ in range(loop.iter):
            if next(batches, None) is None:
                self._begin_pass()
                batches = iter(whole)
                next(batches)
        ResumedBatchSampler(self.loader, lambda: batches, begin)
        # The loop advances by what has been trained: up to mmengine 0.10.7 batch by
        # batch, since then by skip_iter.
        to_skip = 0 if hasattr(loop, 'fast_forward_on_resume') else loop.iter
        self.batches = self._generate(to_skip)

    def _begin_pass(self) -> None:
        self.passes += 1
        sampler = getattr(self.loader.batch_sampler, 'sampler', None)
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(self.passes)

    def _generate(self, to_skip: int) -> Iterator:
        yield from repeat(None, to_skip)
        while True:
            yield from self.loader
            self._begin_pass()

    def skip_iter(self, num_iters: int) -> None:
        """Skip nothing more."""

    def __next__(self) -> object:
        return next(self.batches)


@HOOKS.register_module()
class ExactResumeHook(Hook):
    """Save and restore what the Runner forgets when it resumes.

    Each checkpoint from which a run can be resumed also gets, for every process, the
    states of the random numbers, open gradients (of an accumulation that the
    checkpoint interrupts) and buffers (BN statistics), and for all of them the seed
    of the samplers and the position in the data. A run that is resumed

    - goes on in the middle of an epoch where it was, by indices, without loading
      what it has had, with the samplers' seed of the first start;
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
        self._validated_at: int | None = None
        self._before_val: dict | None = None

    def before_gather_state(self, runner: Runner) -> None:
        """Collect the state of all processes; each of them calls this."""
        self._gathered = gather_object(self._process_state(runner)) or []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Add the state; not to the best checkpoints, which have no optimizer."""
        gathered, self._gathered = self._gathered, None
        if 'optimizer' not in checkpoint:
            return
        if gathered is None and get_world_size() == 1:
            # A hook that does not ask the processes.
            gathered = [self._process_state(runner)]
        meta = checkpoint['meta']
        # After the end of an epoch, the start of the next is not noted yet.
        over = meta['epoch'] > runner.epoch
        checkpoint[KEY] = dict(
            seed=runner.seed,
            batches=0 if over else meta['iter'] - self._epoch_start,
            validated=self._validated_at == meta['iter'],
            processes=gathered or [],
        )

    def _process_state(self, runner: Runner) -> dict:
        """Return what differs between processes."""
        model = runner.model
        grads = {name: param.grad for name, param in model.named_parameters()}
        buffers = dict(model.named_buffers()) if get_world_size() > 1 else {}
        return dict(
            # A best checkpoint has the latest saved again while it is validated.
            random=self._before_val or get_random_state(),
            grads={k: g.detach().cpu() for k, g in grads.items() if g is not None},
            buffers={k: b.detach().cpu() for k, b in buffers.items()},
        )

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the state out of a checkpoint that is resumed."""
        state = checkpoint.pop(KEY, None)
        if is_resumed(runner):
            self._state = state or {}

    def before_train(self, runner: Runner) -> None:
        """Restore the state, once the runner has loaded the checkpoint."""
        self._epoch_start = runner.iter
        state, self._state = self._state, None
        if state is None:
            return
        processes = state.get('processes', [])
        if len(processes) == get_world_size():
            self._restore(runner, state, processes[get_rank()])
        else:
            runner.logger.warning(
                'The run is resumed with other random numbers, at the beginning of an '
                'epoch: the checkpoint cannot be continued exactly, since it has the '
                f'state of {len(processes)} processes, and not of {get_world_size()}.'
            )

    def _restore(self, runner: Runner, state: dict, process: dict) -> None:
        model, loop, count = runner.model, runner.train_loop, state['batches']
        params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        for name, grad in process['grads'].items():
            # torch wants them in the layout that backward gives them.
            params[name].grad = torch.empty_like(params[name]).copy_(grad)
        for name, buffer in process['buffers'].items():
            buffers[name].copy_(buffer)
        settings = train_loader_settings(runner)
        # Of a loader that the caller has built, the caller knows the seed. Otherwise
        # the samplers get that of the first start, and have given no batches yet.
        if isinstance(settings, dict):
            randomness = runner.cfg.get('randomness', {})
            loop.dataloader = runner.build_dataloader(
                {**settings, 'dataset': loop.dataloader.dataset},
                seed=state['seed'],
                diff_rank_seed=randomness.get('diff_rank_seed', False),
            )
        restore_rng = partial(set_random_state, process['random'])
        self._epoch_start = runner.iter - count
        by_epoch = not isinstance(loop, IterBasedTrainLoop)
        if not by_epoch:
            loop.dataloader_iterator = ResumedIterator(loop, restore_rng)
        elif count:
            _skip_in_epoch(loop, count, restore_rng)
        # The numbers of an epoch that begins are those before its loader does.
        restore_rng()
        if not state['validated'] and not (by_epoch and count):
            # It puts the random numbers back when it ends.
            _validate_if_due(runner, by_epoch)

    def after_train_epoch(self, runner: Runner) -> None:
        """Note where the next epoch begins."""
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
    """Raise a ValueError if what stands under :data:`KEY` cannot be restored.

    ``checkpoint`` is all of the file, of which ``meta`` is right.
    """
    before = get_random_state()
    try:
        seed, batches = state['seed'], state['batches']
        are_numbers = type(seed) is type(batches) is int
        if not are_numbers or not 0 <= batches <= checkpoint['meta']['iter']:
            raise ValueError
        for process in state['processes']:
            set_random_state(process['random'])
    except Exception as error:
        raise ValueError(f'{KEY} is damaged: {type(error).__name__}') from error
    finally:
        set_random_state(before)


def _validate_if_due(runner: Runner, by_epoch: bool) -> None:
    """Run the validation that the run was stopped in or before."""
    loop, done, end = runner.train_loop, runner.iter, runner.max_iters
    if by_epoch:
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
