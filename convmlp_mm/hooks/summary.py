"""What a run has come to, in a few lines at its end."""

from __future__ import annotations

import os
import os.path as osp
import time
from datetime import timedelta

from mmengine.dist import get_world_size, is_main_process
from mmengine.hooks import CheckpointHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import IterBasedTrainLoop, Runner

from .saving import checkpoint_hooks

__all__ = ['SummaryHook']

# The metrics by which the paper reports, in this order; higher is better.
HEADLINES = ('bbox_mAP', 'segm_mAP', 'mIoU', 'top1')
# Where the message hub, and so each checkpoint, keeps the best of them.
BEST = 'summary_best'
PICTURES = ('.png', '.jpg', '.jpeg')


@HOOKS.register_module()
class SummaryHook(Hook):
    """Log at the end of training what one looks for in the log otherwise.

    That is: the best value of the metric and where it was reached, the last
    checkpoint, the time, the number of iterations and of images per second, and
    where logs and pictures are. The images per second are those of all processes,
    with the loading of data and the saving, without the validations.

    The metric is that of ``save_best`` of the checkpoint hook, else the first of box
    AP, mask AP, mIoU and top-1 accuracy that the validation gives.
    """

    # Before CheckpointHook saves the best value with the message hub.
    priority = 'LOW'

    def __init__(self) -> None:
        self._start = self._val_start = 0.0
        self._val_seconds = 0.0
        self._images = self._first_iter = 0

    def before_run(self, runner: Runner) -> None:
        """Start the clock, before a resumed run makes up for a validation.

        Args:
            runner (Runner): The runner.
        """
        self.__init__()
        self._start = time.monotonic()

    def before_train(self, runner: Runner) -> None:
        """Note where the run goes on.

        Args:
            runner (Runner): The runner.
        """
        self._first_iter = runner.iter

    def before_val(self, runner: Runner) -> None:
        self._val_start = time.monotonic()

    def after_val(self, runner: Runner) -> None:
        self._val_seconds += time.monotonic() - self._val_start

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: object = None,
        outputs: object = None,
    ) -> None:
        """Count the images.

        Args:
            runner (Runner): The runner.
            batch_idx (int): Not used.
            data_batch (object): What the loader gives; its ``inputs`` are counted.
            outputs (object): Not used.
        """
        if isinstance(data_batch, dict) and 'inputs' in data_batch:
            self._images += _count(data_batch['inputs'])

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        """Remember the best value.

        Args:
            runner (Runner): The runner.
            metrics (dict, optional): Values by name.
        """
        names = [n for h in HEADLINES for n in metrics or () if _last_part(n) == h]
        if not names:
            return
        value = float(metrics[names[0]])
        best = runner.message_hub.runtime_info.get(BEST)
        # Not NaN, which compares as neither.
        if best is None or value > best[1] or best[1] != best[1]:
            found = [names[0], value, _step(runner)[1]]
            runner.message_hub.update_info(BEST, found)

    def after_train(self, runner: Runner) -> None:
        """Log the summary, in the first process.

        Args:
            runner (Runner): The runner.
        """
        if is_main_process():
            runner.logger.info('\n'.join(['Summary', *self._lines(runner)]))

    def _lines(self, runner: Runner) -> list[str]:
        seconds = time.monotonic() - self._start
        iterations = runner.iter - self._first_iter
        resumed = f', of {runner.iter}' if self._first_iter else ''
        lines = [
            f'  trained     {iterations} iterations{resumed} in '
            f'{timedelta(seconds=round(seconds))}'
        ]
        if self._val_seconds:
            validated = timedelta(seconds=round(self._val_seconds))
            lines[0] += f', of which validation {validated}'
        if self._images:
            rate = self._images * get_world_size() / (seconds - self._val_seconds)
            lines.append(f'  speed       {rate:.1f} images/s')
        hooks = checkpoint_hooks(runner)
        lines += self._best_lines(runner, hooks)
        lines += [f'  last        {hook.last_ckpt}' for hook in hooks if hook.last_ckpt]
        lines.append(f'  logs        {runner.log_dir}')
        folders = _picture_folders(runner.log_dir)
        lines += [f'  pictures    {n} in {folder}' for folder, n in folders.items()]
        return lines

    def _best_lines(self, runner: Runner, hooks: list[CheckpointHook]) -> list[str]:
        """What CheckpointHook holds for the best, else what was seen here."""
        info = runner.message_hub.runtime_info
        for hook in hooks:
            keys = getattr(hook, 'key_indicators', None) or []
            suffixes = [''] if len(keys) == 1 else [f'_{key}' for key in keys]
            lines = [
                f'  best        {key} {float(info[f"best_score{suffix}"]):.4f} in '
                f'{info[f"best_ckpt{suffix}"]}'
                for key, suffix in zip(keys, suffixes)
                if f'best_score{suffix}' in info and f'best_ckpt{suffix}' in info
            ]
            if lines:
                return lines
        if BEST not in info:
            return []
        name, value, step = info[BEST]
        unit = _step(runner)[0]
        line = f'  best        {name} {value:.4f} after {unit} {step}'
        for hook in hooks:
            path = osp.join(str(hook.out_dir), hook.filename_tmpl.format(step))
            if hook.by_epoch == (unit == 'epoch') and osp.exists(path):
                return [f'{line} in {path}']
        return [f'{line}, of which no checkpoint was kept']


def _count(inputs: object) -> int:
    """Count the images of a batch, as loaders of the toolkits give it."""
    if isinstance(inputs, dict):
        # Branches of semi-supervised training.
        return sum(map(_count, inputs.values()))
    if isinstance(inputs, (list, tuple)) and getattr(inputs[0], 'ndim', 0) == 4:
        # Views of the same images, for self-supervised training.
        return len(inputs[0])
    return len(inputs)


def _last_part(name: str) -> str:
    return name.rpartition('/')[2]


def _step(runner: Runner) -> tuple[str, int]:
    """Return by what the loop counts and how far it is.

    Both loops have advanced their counter before they validate.
    """
    if isinstance(runner.train_loop, IterBasedTrainLoop):
        return 'iteration', runner.iter
    return 'epoch', runner.epoch


def _picture_folders(root: str) -> dict[str, int]:
    """Count the pictures below a folder, by the folder that they are in."""
    counts = {}
    for folder, _, files in os.walk(root):
        number = sum(name.lower().endswith(PICTURES) for name in files)
        if number:
            counts[folder] = number
    return counts
