"""Stop a training whose loss is no number any more."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from numbers import Real

import torch
from mmengine.dist import all_reduce
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import AmpOptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..layouts import some_of
from ..weights import find_not_finite
from .latest import named_checkpoint

__all__ = ['FiniteLossHook']

FINE, INFINITE, NOT_A_NUMBER = range(3)


@HOOKS.register_module()
class FiniteLossHook(Hook):
    """Stop the run at the first loss that is NaN or Inf.

    The Runner would train on, and write checkpoints of weights that are all NaN.
    The processes agree on it after each step, since with the gradients the weights
    of all are spoilt: one number each, which is little beside the gradients, and
    mmengine's RuntimeInfoHook waits for the loss in each iteration anyway. Where a
    GradScaler guards the weights (fp16), a single Inf is a warning: that step was
    left out. NaN, and Inf in two iterations in a row, stop there too.

    Besides, no checkpoint with NaN or Inf in its weights or its optimizer is written:
    gradients can be NaN where the loss is not, so that the next loss tells it when the
    file is there already, and ``SafeCheckpointHook`` has removed the one before.

    Args:
        interval (int): Look at the loss every so many iterations. Defaults to 1.

    Raises:
        ValueError: If ``interval`` is not at least 1.
    """

    # Before any hook that saves.
    priority = 'VERY_HIGH'

    def __init__(self, interval: int = 1) -> None:
        if interval < 1:
            raise ValueError(f'interval must be at least 1, got {interval!r}')
        self.interval = interval
        self._last = FINE

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: dict | None = None,
    ) -> None:
        """Look at the terms of the loss.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Number of the batch in the epoch.
            data_batch (object): What the data loader gave. Defaults to None.
            outputs (dict, optional): The terms by name. Defaults to None.

        Raises:
            FloatingPointError: If one of them, in any process, is NaN or Inf.
        """
        if not self.every_n_train_iters(runner, self.interval):
            return
        # As in BaseModel.parse_losses, which takes their sum; there are others,
        # such as an accuracy.
        terms = outputs if isinstance(outputs, dict) else {}
        terms = {
            k: v
            for k, v in terms.items()
            if 'loss' in k and isinstance(v, (torch.Tensor, Real))
        }
        values = [torch.as_tensor(v).detach().float().sum() for v in terms.values()]
        # One transfer; terms that are plain numbers are on the CPU already.
        values = [value.to(values[0].device) for value in values]
        values = torch.stack(values).tolist() if values else []
        bad = {k: v for k, v in zip(terms, values) if not math.isfinite(v)}
        nan = any(math.isnan(value) for value in bad.values())
        state = NOT_A_NUMBER if nan else INFINITE if bad else FINE
        # On the device that the processes talk on; mmengine brings it there.
        agreed = torch.tensor(state)
        all_reduce(agreed, 'max')
        last, self._last = self._last, int(agreed)
        if self._last == FINE:
            return
        where = f'iteration {runner.iter + 1}'
        if not bad:
            message = f'{where}: the loss of another process is NaN or Inf'
        else:
            found = ', '.join(f'{key} is {value}' for key, value in bad.items())
            message = (
                f'{where}: {found}; the images are {_images(data_batch)}; the last '
                f'checkpoint before it is {_last_checkpoint(runner)}'
            )
        if self._last == INFINITE and last != INFINITE and _scales(runner):
            if bad:
                print_log(f'step left out in {message}', 'current', logging.WARNING)
            return
        raise FloatingPointError(message)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Look at the weights, the optimizer and open gradients.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What is to be written.

        Raises:
            FloatingPointError: If there is NaN or Inf in one of them.
        """
        names = list(find_not_finite(checkpoint.get('state_dict', {})))
        names += find_not_finite(checkpoint.get('optimizer', {}), 'optimizer')
        if not _scales(runner):
            # Of an accumulation that goes on after the run has been resumed.
            params = runner.model.named_parameters()
            grads = {name: param.grad for name, param in params}
            names += find_not_finite(grads, 'gradient of')
        if names:
            raise FloatingPointError(
                f'iteration {checkpoint["meta"]["iter"]}: NaN or Inf in '
                f'{some_of(names)}; nothing is saved, and the last checkpoint before '
                f'it is {_last_checkpoint(runner)}'
            )


def _scales(runner: Runner) -> bool:
    """Whether steps with gradients that are not finite are left out."""
    wrapper = runner.optim_wrapper
    wrappers = wrapper.values() if isinstance(wrapper, OptimWrapperDict) else [wrapper]
    return all(
        isinstance(w, AmpOptimWrapper) and w.loss_scaler.is_enabled() for w in wrappers
    )


def _images(batch: object) -> str:
    """Name the images of a batch, in the order of the batch."""
    names = [_image(sample) for sample in _samples(batch)]
    return ', '.join(names) or 'unknown'


def _samples(batch: object) -> Iterator[object]:
    """Find the data samples, which semi-supervised detectors have in branches."""
    if hasattr(batch, 'metainfo'):
        yield batch
    elif isinstance(batch, dict):
        yield from _samples(batch.get('data_samples', list(batch.values())))
    elif isinstance(batch, (list, tuple)):
        for part in batch:
            yield from _samples(part)


def _image(sample: object) -> str:
    meta = sample.metainfo
    for key in ('img_path', 'img_id', 'sample_idx'):
        if meta.get(key) is not None:
            return str(meta[key]) if key == 'img_path' else f'{key} {meta[key]}'
    return 'one without a name'


def _last_checkpoint(runner: Runner) -> str:
    return named_checkpoint(runner.work_dir) or 'none yet'
