"""Let the processes of a run agree on where it stands before they train."""

from __future__ import annotations

import zlib
from collections import defaultdict

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import _ParamScheduler
from mmengine.registry import HOOKS
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch.nn.parallel import DistributedDataParallel

__all__ = ['AgreementHook', 'steps_of']

# Of the checkpoint's meta.
KEY = 'step_size'
# What a scheduler has reached, in contrast to what its configuration says.
PROGRESS = ('last_step', '_global_step', '_last_value', 'base_values', 'optimizer')


@HOOKS.register_module(force=True)
class AgreementHook(Hook):
    """Stop a run whose processes disagree, or whose steps are of another size.

    Each process looks up and loads its checkpoint alone. If they do not see the same
    files, some resume and others begin, and average their gradients; so, before the
    first step, all compare epoch, iteration and a checksum of the weights.

    A run that is resumed with another number of processes, batch size or number of
    accumulated batches would go on with a learning rate for the former ones: it is
    refused, unless ``auto_scale_lr`` is enabled (``--auto-scale-lr`` of
    ``tools/train.py``). Then learning rate and schedule are scaled by the size of the
    steps, and an epoch that had begun starts over.
    """

    def __init__(self) -> None:
        self._saved: dict | None = None
        self._recipe: list[dict] = []

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note the size of the steps.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): Its ``meta`` gets the key ``'step_size'``.
        """
        checkpoint['meta'][KEY] = steps_of(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Take the note of a checkpoint that is resumed.

        Args:
            runner (Runner): The runner.
            checkpoint (dict): What the file holds.
        """
        if runner._resume:
            self._saved = checkpoint.get('meta', {}).get(KEY)
            # They are about to get the lengths of the former run.
            self._recipe = [
                {k: v for k, v in vars(scheduler).items() if k not in PROGRESS}
                for scheduler in _schedulers(runner)
            ]

    def before_train(self, runner: Runner) -> None:
        """Compare.

        Args:
            runner (Runner): The runner.

        Raises:
            RuntimeError: If the processes disagree.
            ValueError: If the steps are of another size.
        """
        if get_world_size() > 1:
            _compare_processes(runner)
        saved, self._saved = self._saved, None
        steps = steps_of(runner)
        if saved is None or saved == steps:
            return
        changes = ', '.join(
            f'{name.replace("_", " ")} {saved[name]} before and {steps[name]} now'
            for name in steps
            if saved[name] != steps[name]
        )
        # FlexibleRunner keeps it to itself.
        scale = getattr(runner, 'auto_scale_lr', None) or vars(runner).get(
            '_auto_scale_lr'
        )
        if not (scale or {}).get('enable'):
            raise ValueError(
                f'the run cannot be resumed with steps of another size ({changes}): '
                'resume it as it was, or have the learning rate scaled by '
                '--auto-scale-lr (auto_scale_lr.enable=True)'
            )
        ratio = _samples(steps) / _samples(saved)
        _rescale(runner, ratio, self._recipe)
        runner.logger.warning(
            f'Resumed with {changes}: the learning rate is multiplied by {ratio:g}.'
        )


def steps_of(runner: Runner) -> dict[str, int]:
    """Return what the size of an optimizer step follows from.

    Args:
        runner (Runner): While it trains.

    Returns:
        dict[str, int]: Number of processes, samples in the batch of each, and batches
        that are accumulated.
    """
    loader = runner.train_dataloader
    sizes = (loader, loader.batch_sampler)
    batch_size = next(
        (s.batch_size for s in sizes if getattr(s, 'batch_size', None)), 1
    )
    accumulated = getattr(runner.optim_wrapper, '_accumulative_counts', 1)
    return dict(
        processes=get_world_size(),
        batch_size=batch_size,
        accumulative_counts=accumulated,
    )


def _samples(steps: dict[str, int]) -> int:
    return steps['processes'] * steps['batch_size'] * steps['accumulative_counts']


def _compare_processes(runner: Runner) -> None:
    places = all_gather_object((runner.epoch, runner.iter, _checksum(runner.model)))
    ranks = defaultdict(list)
    for rank, place in enumerate(places):
        ranks[place].append(rank)
    if len(ranks) == 1:
        return
    found = '; '.join(
        f'{"ranks" if len(members) > 1 else "rank"} '
        f'{", ".join(map(str, members))}: epoch {epoch}, iteration {iteration}, '
        f'weights {checksum:08x}'
        for (epoch, iteration, checksum), members in ranks.items()
    )
    raise RuntimeError(
        f'the processes do not start from the same checkpoint ({found}): let all '
        'machines see the same work dir and load_from'
    )


def _checksum(model: torch.nn.Module) -> int:
    """Return the CRC-32 of the weights; 0 where each process has a part of them."""
    if is_model_wrapper(model) and not isinstance(model, DistributedDataParallel):
        return 0
    checksum = 0
    for param in model.parameters():
        content = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    return checksum


def _schedulers(runner: Runner) -> list:
    groups = runner.param_schedulers or []
    groups = groups.values() if isinstance(groups, dict) else [groups]
    schedulers = [s for group in groups for s in group]
    # FlexibleRunner loads before it builds them.
    return [s for s in schedulers if isinstance(s, _ParamScheduler)]


def _rescale(runner: Runner, ratio: float, recipe: list[dict]) -> None:
    """Multiply the learning rate, and move the schedule to the new iterations."""
    wrappers = runner.optim_wrapper
    wrappers = wrappers.values() if hasattr(wrappers, 'values') else [wrappers]
    for wrapper in wrappers:
        for group in wrapper.optimizer.param_groups:
            for key in ('lr', 'initial_lr'):
                if key in group:
                    group[key] *= ratio
    for scheduler in _schedulers(runner):
        if scheduler.param_name == 'lr':
            for name in ('base_values', '_last_value'):
                values = getattr(scheduler, name)
                setattr(scheduler, name, [value * ratio for value in values])
    loop = runner.train_loop
    if not isinstance(loop, EpochBasedTrainLoop):
        # Its recipe counts iterations, whatever they hold.
        return
    before, loop._iter = loop._iter, loop._epoch * len(loop.dataloader)
    # The Runner has done so for the former iteration; accumulation counts by it.
    runner.optim_wrapper.initialize_count_status(
        runner.model, loop._iter, loop.max_iters
    )
    for scheduler, lengths in zip(_schedulers(runner), recipe):
        if not scheduler.by_epoch:
            vars(scheduler).update(lengths)
            scheduler.last_step = round(scheduler.last_step * loop._iter / before)
