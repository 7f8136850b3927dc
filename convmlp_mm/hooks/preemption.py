"""Save and stop when the scheduler wants the machine back."""

from __future__ import annotations

import contextlib
import os
import os.path as osp
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial
from types import FrameType

import torch
from mmengine import dist
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ._mmengine import is_training
from .saving import PREEMPTED_FILE as KEY
from .saving import checkpoint_hooks, remove_checkpoint
from .work_dir import work_dir_lock

__all__ = ['PREEMPTED', 'PreemptionHook']

# The exit code of a run that was saved and stopped, to go on in another allocation.
# tools/slurm_run.sh knows it.
PREEMPTED = 85

# What schedulers send: SLURM and Kubernetes SIGTERM, ``--signal`` of SLURM any.
SIGNALS = ('SIGTERM', 'SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGINT')


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Stop at the end of an iteration when a signal asks for it.

    The signal may reach one process or all of them, in different iterations. After
    each ``interval`` iterations the processes agree, so that all of them stop at the
    same one. Then a checkpoint is saved, from which ``--resume`` goes on, and the
    processes exit with :data:`PREEMPTED`, on which
    ``tools/slurm_train.sh`` has the job queued again.

    In the middle of an epoch the checkpoint says that ``epoch`` epochs and ``iter``
    iterations are finished. It is named ``iter_{iter}.pth``, is not among those that
    ``max_keep_ckpts`` counts, and is deleted when the resumed run has saved a regular
    one. At an iteration or epoch whose checkpoint is saved anyway, there is no other.
    After the last iteration the run goes on to its end.

    To agree costs one all-reduce of a number, which waits for the slowest process as
    the gradients' has just done, and on a GPU one synchronisation, which mmengine
    makes in each iteration too when it logs the losses. A single process does not
    communicate. During validation nobody looks: the processes may have different
    numbers of batches.

    A signal to the whole process group or job step, as SLURM sends it, would also end
    the workers of the data loaders, and with them the run. Those of the training and
    validation that start after ``before_run`` therefore ignore the signals. In
    mmengine up to 0.10.7, ``IterBasedTrainLoop`` starts its workers before any hook.
    Other processes that are forked, such as the pool of a metric, treat the signals
    as they would without this hook.

    While it trains, the first process holds the lock of the work dir, see
    :func:`convmlp_mm.hooks.work_dir.work_dir_lock`.

    Args:
        signals (Sequence[str]): Names of the signals, of ``'SIGTERM'``,
            ``'SIGUSR1'``, ``'SIGUSR2'``, ``'SIGHUP'`` and ``'SIGINT'``.
            Defaults to ``('SIGTERM', 'SIGUSR1')``.
        interval (int): Number of iterations between agreements. The end of an epoch
            is always one. Defaults to 1.

    Raises:
        ValueError: If an argument is none of these.
    """

    # After CheckpointHook, to see what it has saved.
    priority = 'LOWEST'

    def __init__(
        self, signals: Sequence[str] = ('SIGTERM', 'SIGUSR1'), interval: int = 1
    ) -> None:
        if (
            isinstance(signals, str)
            or not isinstance(signals, Sequence)
            or not signals
            or any(name not in SIGNALS for name in signals)
        ):
            raise ValueError(
                'signals of PreemptionHook must be a list of some of '
                f'{", ".join(SIGNALS)}, but got {signals!r}'
            )
        if not isinstance(interval, int) or isinstance(interval, bool) or interval < 1:
            raise ValueError(
                'interval of PreemptionHook must be an integer of 1 or more, but got '
                f'{interval!r}'
            )
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.interval = interval
        self._asked = False
        self._agreed = False
        self._previous: dict = {}
        self._lock = contextlib.ExitStack()

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self._asked = True

    def before_run(self, runner: Runner) -> None:
        """Take over the signals, before a resumed run makes up for a validation.

        Args:
            runner (Runner): The runner.

        Raises:
            BlockingIOError: If another run trains in the work dir.
        """
        self._asked = self._agreed = False
        if not is_training(runner):
            return
        if dist.is_main_process():
            self._lock.enter_context(work_dir_lock(runner.work_dir))
        if threading.current_thread() is not threading.main_thread():
            runner.logger.warning(
                'PreemptionHook: signals are handled in the main thread only, and '
                'this is another; nothing will be saved on a signal.'
            )
            return
        for number in self.signals:
            self._previous[number] = signal.signal(number, self._note)
        self._protect(runner.val_loop)

    def before_train(self, runner: Runner) -> None:
        """Let the workers of the training ignore the signals.

        Args:
            runner (Runner): The runner, whose loader a resumed run has built again.
        """
        if self._previous:
            self._protect(runner.train_loop)

    def _protect(self, loop: BaseLoop | None) -> None:
        loader = getattr(loop, 'dataloader', None)
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.worker_init_fn = partial(
                _ignore_signals, loader.worker_init_fn, self.signals
            )

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: object = None,
    ) -> None:
        """Stop here if any process was asked to.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch in the epoch.
            data_batch (object): Not used.
            outputs (object): Not used.

        Raises:
            SystemExit: With the code ``PREEMPTED``, after saving.
        """
        self._remove_superseded(runner)
        if not self.every_n_train_iters(runner, self.interval) or not self._agree():
            return
        # The last iteration of an epoch ends in after_train_epoch, where the
        # regular checkpoint is. Iteration-based loops know no such end.
        if not isinstance(runner.train_loop, IterBasedTrainLoop) and (
            batch_idx + 1 == len(runner.train_dataloader)
        ):
            return
        if not self.is_last_train_iter(runner):
            self._stop(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop before the validation if any process was asked to.

        Args:
            runner (Runner): The runner.

        Raises:
            SystemExit: With the code ``PREEMPTED``, after saving.
        """
        self._remove_superseded(runner)
        if self._agree() and not self.is_last_train_epoch(runner):
            self._stop(runner, epoch=runner.epoch + 1, iteration=runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Let the file of an earlier stop be forgotten by what takes its place.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What is to be written.
        """
        hook = _checkpoint_hook(runner)
        info = checkpoint['message_hub']['runtime_info']
        if hook and hook.last_ckpt and osp.basename(hook.last_ckpt) != info.get(KEY):
            info.pop(KEY, None)

    def after_train(self, runner: Runner) -> None:
        """Give the signals back.

        Args:
            runner (Runner): The runner.
        """
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def after_run(self, runner: Runner) -> None:
        """Let others have the work dir.

        Args:
            runner (Runner): The runner.
        """
        self._lock.close()

    def _agree(self) -> bool:
        """Tell whether any process has been asked to stop; the same in all."""
        if not self._agreed:
            flag = torch.tensor(int(self._asked))
            # Does nothing in a single process.
            dist.all_reduce(flag, 'max')
            self._agreed = bool(flag)
        return self._agreed

    def _stop(self, runner: Runner, epoch: int, iteration: int) -> None:
        """Save what has not been saved and leave."""
        hook = _checkpoint_hook(runner)
        if hook is None:
            saved = 'Nothing is saved, as there is no CheckpointHook.'
        else:
            step = epoch if hook.by_epoch else iteration
            regular = osp.basename(str(hook.last_ckpt)) == hook.filename_tmpl.format(
                step
            )
            # In the middle of an epoch, its number is that of the last checkpoint.
            if not regular or (hook.by_epoch and epoch == runner.epoch):
                self._save(runner, hook, epoch, iteration)
            saved = f'The last checkpoint is {hook.last_ckpt}.'
        # No process may leave while another saves: launchers end the rest then.
        dist.barrier()
        runner.logger.warning(
            f'Stopped by a signal after {iteration} iterations. {saved} '
            f'Exit code {PREEMPTED}; go on with --resume.'
        )
        raise SystemExit(PREEMPTED)

    def _save(
        self, runner: Runner, hook: CheckpointHook, epoch: int, iteration: int
    ) -> None:
        """Have CheckpointHook save, beside the files that it counts."""
        former = runner.message_hub.runtime_info.get(KEY)
        name = f'iter_{iteration}.pth'
        runner.message_hub.update_info(KEY, name)
        changes = dict(by_epoch=False, filename_tmpl='iter_{}.pth', max_keep_ckpts=-1)
        settings = {key: getattr(hook, key) for key in changes}
        vars(hook).update(changes)
        try:
            # CheckpointHook has no public way to save at a moment of one's own.
            hook._save_checkpoint_with_step(
                runner, iteration, meta=dict(epoch=epoch, iter=iteration)
            )
        finally:
            vars(hook).update(settings)
        if osp.basename(str(hook.last_ckpt)) != name:
            # It could not be saved, as the hook has said.
            runner.message_hub.update_info(KEY, former)
        elif former not in (None, name):
            _remove(hook, former)

    def _remove_superseded(self, runner: Runner) -> None:
        """Delete the file of an earlier stop once there is a later checkpoint."""
        name = runner.message_hub.runtime_info.get(KEY)
        hook = _checkpoint_hook(runner) if name else None
        # None until the resumed run has saved.
        if hook is None or hook.last_ckpt is None:
            return
        if osp.basename(str(hook.last_ckpt)) != name:
            _remove(hook, name)
            runner.message_hub.runtime_info.pop(KEY)


def _checkpoint_hook(runner: Runner) -> CheckpointHook | None:
    return next(iter(checkpoint_hooks(runner)), None)


def _remove(hook: CheckpointHook, name: str) -> None:
    if dist.is_main_process():
        remove_checkpoint(hook, name)


def _handled() -> dict[signal.Signals, PreemptionHook]:
    """Return the signals that a hook has taken over in this process."""
    owners = {
        number: getattr(signal.getsignal(number), '__self__', None)
        for number in map(signal.Signals.__getitem__, SIGNALS)
    }
    return {n: own for n, own in owners.items() if isinstance(own, PreemptionHook)}


def _before_fork() -> None:
    # Python forgets what reaches a child before it has the handlers of its own.
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _handled())


def _after_fork(in_child: bool = False) -> None:
    """Let no child inherit the handlers: one that is told to end must end."""
    for number, hook in _handled().items() if in_child else ():
        signal.signal(number, hook._previous.get(number, signal.SIG_DFL))
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


# The mask of signals belongs to the thread that forks.
_fork = threading.local()
os.register_at_fork(
    before=_before_fork,
    after_in_parent=_after_fork,
    after_in_child=partial(_after_fork, in_child=True),
)


def _ignore_signals(
    init: Callable[[int], None] | None,
    signals: Sequence[signal.Signals],
    worker_id: int,
) -> None:
    """Let a worker of a data loader ignore signals that are meant for the run.

    The parent's own SIGTERM, by which it ends a worker that hangs, still does.

    Args:
        init (Callable, optional): The ``worker_init_fn`` that is there already.
        signals (Sequence[Signals]): What to ignore.
        worker_id (int): Number of the worker.
    """
    # Only a thread that waits for a signal is told who has sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    threading.Thread(target=_wait_for_parent, args=[signals], daemon=True).start()
    if init is not None:
        init(worker_id)


def _wait_for_parent(signals: Sequence[signal.Signals]) -> None:
    while True:
        info = signal.sigwaitinfo(signals)
        if (info.si_signo, info.si_pid) == (signal.SIGTERM, os.getppid()):
            os._exit(0)
