"""Stop a run in all processes at once: on a signal, or at a loss that is no number."""

import logging
import os
import os.path as osp
import signal
import threading
from collections.abc import Callable, Sequence
from functools import partial

import torch
from mmengine import dist
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, IterBasedTrainLoop, Runner
from torch import Tensor
from torch.utils.data import DataLoader

from ..checkpoint import find_not_finite, some_of
from ._mmengine import is_training, save_now
from .checkpoint import PREEMPTED_FILE as KEY
from .checkpoint import checkpoint_hooks, named_checkpoint, remove_checkpoint

# The exit code of a run that was saved and stopped, to go on in another allocation.
# tools/slurm_run.sh knows it.
PREEMPTED = 85

# Schedulers send these: SLURM and Kubernetes SIGTERM, ``--signal`` of SLURM either.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


def average(tensors: Sequence[Tensor]) -> None:
    """Overwrite tensors by their means over the processes, in one all-reduce.

    Args:
        tensors: Of floating point; of the same shapes in each process. A single
            process leaves them as they are.
    """
    if not tensors or dist.get_world_size() == 1:
        return
    device = dist.get_comm_device()
    vector = torch.cat([tensor.flatten().to(device) for tensor in tensors])
    dist.all_reduce(vector, 'mean')
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, mean in zip(tensors, vector.split(sizes)):
        tensor.copy_(mean.view_as(tensor))


class StepHook(Hook):
    """A hook with numbers that the processes share after each step.

    Those of all such hooks form one vector, so that a step costs one all-reduce beside
    that of the gradients. The first hook to be called does it for all.
    """

    # The numbers must be shared before EMAHook copies the statistics and a hook saves.
    priority = 'VERY_HIGH'

    def numbers(self, runner: Runner, outputs: object) -> list[Tensor]:
        """Return what is to be shared; the mean over all processes overwrites it."""
        raise NotImplementedError

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: object = None,
    ) -> None:
        """Share the numbers of all hooks, if this one is called first."""
        hooks = [hook for hook in runner.hooks if isinstance(hook, StepHook)]
        if hooks[0] is self:
            average([x for hook in hooks for x in hook.numbers(runner, outputs)])
        self.after_sharing(runner, batch_idx, data_batch)

    def after_sharing(self, runner: Runner, batch_idx: int, data_batch: object) -> None:
        """Do what follows from the means; nothing by default."""


@HOOKS.register_module()
class FiniteLossHook(StepHook):
    """Stop the run by a FloatingPointError at the first loss that is NaN or Inf.

    The Runner would train on, and save weights that are all NaN. The processes agree
    on it after each step, since with the gradients the weights of all are spoilt. Where
    a GradScaler guards the weights (fp16), a single Inf is a warning: that step was
    left out. NaN, and Inf in two iterations in a row, stop there too.

    Besides, no checkpoint with NaN or Inf in its weights or its optimizer is written:
    gradients can be NaN where the loss is not, and the next loss would come too late.
    """

    # Whether any process had an Inf in the iteration before.
    _was_infinite = False

    def numbers(self, runner: Runner, outputs: object) -> list[Tensor]:
        """Return a flag for Inf and one for NaN; above 0 where any process has it."""
        # BaseModel.parse_losses takes the sum of these terms. Others, such as an
        # accuracy, may be NaN.
        terms = outputs.items() if isinstance(outputs, dict) else ()
        self._losses = {
            name: value.detach().float().sum()
            for name, value in terms
            if 'loss' in name and isinstance(value, Tensor)
        }
        # The flags stay on the device, so that it is waited for once, after they have
        # been shared.
        values = torch.stack(list(self._losses.values()) or [torch.zeros(())])
        self._flags = torch.stack([values.isinf().any(), values.isnan().any()]).float()
        return [self._flags]

    def after_sharing(self, runner: Runner, batch_idx: int, data_batch: object) -> None:
        infinite, nan = (self._flags > 0).tolist()
        again, self._was_infinite = self._was_infinite, infinite
        if not infinite and not nan:
            return
        losses = self._losses.items()
        bad = [f'{name} is {x.item()}' for name, x in losses if not x.isfinite()]
        message = 'the loss of another process is NaN or Inf'
        if bad:
            images = ', '.join(_image_names(data_batch)) or 'unknown'
            message = (
                f'{", ".join(bad)}; the images are {images}; '
                f'the last checkpoint before it is {_last_checkpoint(runner)}'
            )
        message = f'iteration {runner.iter + 1}: {message}'
        if nan or again or not _scales(runner):
            raise FloatingPointError(message)
        print_log(f'step left out in {message}', 'current', logging.WARNING)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at the weights, the optimizer and open gradients."""
        names = list(find_not_finite(checkpoint.get('state_dict', {})))
        names += find_not_finite(checkpoint.get('optimizer', {}), 'optimizer')
        if not _scales(runner):
            # They belong to an accumulation that a resumed run goes on with.
            params = runner.model.named_parameters()
            names += find_not_finite({n: p.grad for n, p in params}, 'gradient of')
        if names:
            raise FloatingPointError(
                f'iteration {checkpoint["meta"]["iter"]}: NaN or Inf in '
                f'{some_of(names)}; nothing is saved, and the last checkpoint before '
                f'it is {_last_checkpoint(runner)}'
            )


def _scales(runner: Runner) -> bool:
    """Tell whether steps with gradients that are not finite are left out."""
    wrapper = runner.optim_wrapper
    return isinstance(wrapper, AmpOptimWrapper) and wrapper.loss_scaler.is_enabled()


def _image_names(batch: object) -> list[str]:
    """Name the images of a batch, in its order or that of a detector's branches."""
    if hasattr(batch, 'metainfo'):
        return [str(batch.metainfo.get('img_path', 'one without a name'))]
    if isinstance(batch, dict):
        return _image_names(batch.get('data_samples', list(batch.values())))
    parts = batch if isinstance(batch, (list, tuple)) else ()
    return [name for part in parts for name in _image_names(part)]


def _last_checkpoint(runner: Runner) -> str:
    return named_checkpoint(runner.work_dir) or 'none yet'


@HOOKS.register_module()
class PreemptionHook(StepHook):
    """Stop at the end of an iteration when SIGTERM or SIGUSR1 asks for it.

    It may reach one process or all of them, in different iterations. The processes
    agree after each, so that all stop at the same one; a signal that comes later in an
    iteration counts for the next. Then a checkpoint is saved, from which ``--resume``
    goes on, and the processes exit with :data:`PREEMPTED`, on which
    ``tools/slurm_train.sh`` has the job queued again. During validation nobody looks:
    the processes may have different numbers of batches.

    In the middle of an epoch the checkpoint is named ``iter_{iter}.pth``, is not among
    those that ``max_keep_ckpts`` counts, and is deleted when the resumed run has saved
    a regular one. After the last iteration the run goes on to its end.

    Workers of data loaders ignore the signals, which may have been sent to the whole
    job step, but for those that ``IterBasedTrainLoop`` of mmengine up to 0.10.7 starts
    before any hook. Other processes that are forked, such as the pool of a metric,
    treat the signals as without this hook.
    """

    # This hook comes after CheckpointHook, to see what it has saved.
    priority = 'LOWEST'

    # Whether this process was asked to stop.
    _asked = False

    def _note(self, signum: int, frame: object) -> None:
        self._asked = True

    def before_run(self, runner: Runner) -> None:
        """Take over the signals, before a resumed run makes up for a validation."""
        if is_training(runner):
            self._take_signals()
            self._protect(runner.val_loop)

    def _take_signals(self) -> None:
        for number in SIGNALS:
            # It is None for a handler that Python does not know.
            _taken.setdefault(number, signal.getsignal(number) or signal.SIG_DFL)
            signal.signal(number, self._note)

    def before_train(self, runner: Runner) -> None:
        """Let the workers of the training ignore the signals."""
        # A resumed run has built its loader again.
        self._protect(runner.train_loop)

    def _protect(self, loop: BaseLoop | None) -> None:
        loader = getattr(loop, 'dataloader', None)
        if isinstance(loader, DataLoader) and loader.num_workers:
            loader.worker_init_fn = partial(_obey_only_parent, loader.worker_init_fn)

    def numbers(self, runner: Runner, outputs: object) -> list[Tensor]:
        """Return a flag that is above 0 where any process was asked to stop."""
        self._flag = torch.full((1,), float(self._asked))
        return [self._flag]

    def after_sharing(self, runner: Runner, batch_idx: int, data_batch: object) -> None:
        """Stop here if any process was asked to."""
        self._remove_superseded(runner)
        if self._flag == 0 or self.is_last_train_iter(runner):
            return
        # The last iteration of an epoch ends in after_train_epoch, where the
        # regular checkpoint is. Iteration-based loops know no such end.
        by_epoch = not isinstance(runner.train_loop, IterBasedTrainLoop)
        if not by_epoch or batch_idx + 1 < len(runner.train_dataloader):
            self._stop(runner, epoch=runner.epoch, iteration=runner.iter + 1)

    def after_train_epoch(self, runner: Runner) -> None:
        """Stop before the validation if any process was asked to."""
        self._remove_superseded(runner)
        # The saving, which takes long, has given a signal time to come.
        average(self.numbers(runner, None))
        if self._flag > 0 and not self.is_last_train_epoch(runner):
            self._stop(runner, epoch=runner.epoch + 1, iteration=runner.iter)

    def after_train(self, runner: Runner) -> None:
        _give_back()

    def _stop(self, runner: Runner, epoch: int, iteration: int) -> None:
        """Save what has not been saved, beside the files that count, and leave."""
        hooks, saved = checkpoint_hooks(runner), 'Nothing is saved.'
        if hooks:
            hook = hooks[0]
            name = hook.filename_tmpl.format(epoch if hook.by_epoch else iteration)
            regular = hook.last_ckpt == osp.join(hook.out_dir, name)
            # The last checkpoint has the same number until the epoch is over.
            if not regular or (hook.by_epoch and epoch == runner.epoch):
                path = osp.join(hook.out_dir, f'iter_{iteration}.pth')
                former = runner.message_hub.get_info(KEY, path)
                runner.message_hub.update_info(KEY, path)
                # The process ends after it, so that nothing has to be set back.
                hook.by_epoch, hook.filename_tmpl = False, 'iter_{}.pth'
                hook.max_keep_ckpts = -1
                save_now(hook, runner, epoch, iteration)
                if former != path:
                    remove_checkpoint(hook, former)
            saved = f'The last checkpoint is {hook.last_ckpt}.'
        # All wait here, since launchers end the others once a process has left.
        dist.barrier()
        runner.logger.warning(
            f'Stopped by a signal after {iteration} iterations. {saved} '
            f'Exit code {PREEMPTED}; go on with --resume.'
        )
        raise SystemExit(PREEMPTED)

    def _remove_superseded(self, runner: Runner) -> None:
        """Delete the file of an earlier stop once there is a later checkpoint."""
        info, hooks = runner.message_hub.runtime_info, checkpoint_hooks(runner)
        # There is no last checkpoint until the resumed run has saved.
        if KEY in info and hooks and hooks[0].last_ckpt not in (None, info[KEY]):
            remove_checkpoint(hooks[0], info.pop(KEY))


# The signals that a hook has taken over in this process, and what they did before.
_taken: dict = {}


def _before_fork() -> None:
    # Python forgets what reaches a child before it has the handlers of its own.
    _fork.mask = signal.pthread_sigmask(signal.SIG_BLOCK, _taken)


def _after_fork() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _fork.mask)


def _give_back() -> None:
    for number, handler in _taken.items():
        signal.signal(number, handler)
    _taken.clear()


# The mask of signals belongs to the thread that forks.
_fork = threading.local()
os.register_at_fork(before=_before_fork, after_in_parent=_after_fork)
# No child inherits the handlers: one that is told to end must end. They are called in
# this order, and a signal that waits comes when the mask is lifted.
os.register_at_fork(after_in_child=_give_back)
os.register_at_fork(after_in_child=_after_fork)


def _obey_only_parent(init: Callable[[int], None] | None, worker_id: int) -> None:
    """Let a worker of a data loader ignore the signals, but for its parent's SIGTERM.

    A worker that ends takes the run with it, before that has saved. But by SIGTERM the
    loader ends a worker that hangs. A handler is not told who has sent a signal, only a
    thread that waits for it is, while all threads block it.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    threading.Thread(target=_wait_for_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _wait_for_parent() -> None:
    while True:
        info = signal.sigwaitinfo(SIGNALS)
        if (info.si_signo, info.si_pid) == (signal.SIGTERM, os.getppid()):
            os._exit(0)
