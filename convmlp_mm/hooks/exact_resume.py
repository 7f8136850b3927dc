"""Make a resumed run the run that it would have been."""

from __future__ import annotations

import logging

import torch
from mmengine.dist import gather_object, get_rank, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from ._mmengine import decide_val_interval, is_resumed, is_training
from .agreement import steps_of
from .data_position import (
    AdvancedIterator,
    Remainder,
    build_loader_again,
    shift_batch_index,
)
from .random_state import get_random_state, set_random_state
from .saving import checkpoint_hooks, is_first

__all__ = ['ExactResumeHook', 'check_state']

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
    for hook in checkpoint_hooks(runner):
        # So that what it finds to be the best enters the latest checkpoint.
        hook.last_ckpt = runner.message_hub.get_info('last_ckpt')
    runner.val_loop.run()
