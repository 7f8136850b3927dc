"""Let the processes of a run agree on where it stands before they train."""

from __future__ import annotations

import zlib
from collections import defaultdict

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ._mmengine import accumulative_counts, is_resumed, load_from

__all__ = ['AgreementHook', 'steps_of']

# Keys in the meta of a checkpoint.
STEPS, SAMPLES, TYPES = 'step_size', 'training_samples', 'recipe_types'
# Attributes of a scheduler that say how far it is, not what its configuration says.
PROGRESS = ('base_values', 'best', 'cooldown_counter', 'last_step', 'num_bad_epochs')


@HOOKS.register_module()
class AgreementHook(Hook):
    """Stop a run whose processes disagree, or that disagrees with its checkpoint.

    Each process looks up and loads its checkpoint alone. If they do not see the same
    files, some resume and others begin, and average their gradients; so, before the
    first step, all compare epoch, iteration and a checksum of the weights.

    A Runner that resumes takes the state of optimizer and schedulers from the
    checkpoint, and with it the learning rate, the weight decay and the schedule,
    whatever the configuration says now. A run is therefore refused if these, the
    optimizer, the number of processes, the batch size, the number of accumulated
    batches or the length of the training set are others than those of the checkpoint.
    One that is only to be longer goes on, with the schedule of the checkpoint.

    ``EarlyStoppingHook`` is told again what the validations before have given, which
    it forgets: a resumed run stops where it would have stopped.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Note in ``meta`` what the states in the checkpoint do not say."""
        checkpoint['meta'].update(_note(runner))

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Compare a checkpoint that is resumed with the configuration.

        Raises:
            ValueError: If they differ.
        """
        if not is_resumed(runner):
            return
        meta, note = checkpoint.get('meta') or {}, _note(runner)
        samples = ({k: d[k] for k in (SAMPLES,) if k in d} for d in (meta, note))
        changes = {
            'steps of another size': _changes(meta.get(STEPS), note[STEPS]),
            'a training set of another length': _changes(*samples),
        }
        ends = []
        if 'optimizer' in checkpoint:
            saved = _listed(checkpoint.get('param_schedulers'))
            states = [s.state_dict() for s in _listed(runner.param_schedulers)]
            before = _recipe(checkpoint['optimizer'], saved)
            now = _recipe(runner.optim_wrapper.state_dict(), states)
            recipe = _changes(meta.get(TYPES), note[TYPES]) + _changes(before, now)
            ends = [change for change in recipe if '.end ' in change]
            changes['another recipe'] = [c for c in recipe if c not in ends]
        named = [f'{what} ({_shorten(c)})' for what, c in changes.items() if c]
        another = (
            'begin another from its weights, in another --work-dir, without --resume '
            f'and with --cfg-options load_from={load_from(runner)}'
        )
        if named:
            raise ValueError(
                f'the run cannot be resumed with {" and ".join(named)}: resume it as '
                f'it was, or {another}'
            )
        if ends:
            runner.logger.warning(
                f'The schedule of the checkpoint goes on ({_shorten(ends)}): after '
                f'its end, the values stay. For that of the configuration, {another}'
            )

    def before_train(self, runner: Runner) -> None:
        """Compare the processes, and let early stopping count on.

        Raises:
            RuntimeError: If the processes disagree.
        """
        if get_world_size() > 1:
            _compare_processes(runner)
        if not is_resumed(runner):
            return
        for hook in runner.hooks:
            if isinstance(hook, EarlyStoppingHook):
                values = runner.message_hub.log_scalars.get(f'val/{hook.monitor}')
                for value in values.data[0] if values else ():
                    hook.after_val_epoch(runner, {hook.monitor: float(value)})


def steps_of(runner: Runner) -> dict[str, int]:
    """Return what the size of an optimizer step follows from.

    Returns:
        dict[str, int]: Number of processes, samples in the batch of each, and batches
        that are accumulated.
    """
    loader = runner.train_dataloader
    sizes = (getattr(s, 'batch_size', None) for s in (loader, loader.batch_sampler))
    return dict(
        processes=get_world_size(),
        batch_size=next(filter(None, sizes), 1),
        accumulative_counts=accumulative_counts(runner),
    )


def _note(runner: Runner) -> dict[str, object]:
    """Return what a resumed run must have as before, and no state says."""
    wrappers = runner.optim_wrapper
    wrappers = wrappers.values() if hasattr(wrappers, 'values') else [wrappers]
    dataset = runner.train_dataloader.dataset
    types = dict(
        optimizer=[type(getattr(w, 'optimizer', w)).__name__ for w in wrappers],
        param_scheduler=[type(s).__name__ for s in _listed(runner.param_schedulers)],
    )
    samples = len(dataset) if hasattr(dataset, '__len__') else None
    return {STEPS: steps_of(runner), SAMPLES: samples, TYPES: types}


def _compare_processes(runner: Runner) -> None:
    place = (
        f'epoch {runner.epoch}, iteration {runner.iter}, '
        f'weights {_checksum(runner.model):08x}'
    )
    ranks = defaultdict(list)
    for rank, other in enumerate(all_gather_object(place)):
        ranks[other].append(str(rank))
    if len(ranks) == 1:
        return
    found = '; '.join(
        f'rank{"s" * (len(members) > 1)} {", ".join(members)}: {other}'
        for other, members in ranks.items()
    )
    raise RuntimeError(
        f'the processes do not start from the same checkpoint ({found}): let all '
        'machines see the same work dir and load_from'
    )


def _checksum(model: torch.nn.Module) -> int:
    """Return the CRC-32 of the weights."""
    checksum = 0
    for param in model.parameters():
        content = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    return checksum


def _listed(schedulers: list | dict | None) -> list:
    """Return the schedulers of all optimizers, or their states."""
    groups = schedulers.values() if isinstance(schedulers, dict) else [schedulers or []]
    return [scheduler for group in groups for scheduler in group]


def _recipe(optimizer: dict, schedulers: list) -> dict[str, object]:
    """Take out of states what the configuration has said."""
    parts = {'': optimizer} if 'param_groups' in optimizer else optimizer
    recipe = {}
    for name, part in parts.items():
        groups = part.get('param_groups', [])
        recipe[f'{name} parameters'.strip()] = [len(g['params']) for g in groups]
        for key in {k: 0 for group in groups for k in group}:
            if key == 'params' or key.startswith('initial_'):
                continue
            if key == 'betas' and 'initial_momentum' in groups[0]:
                # A schedule of the momentum changes the first of them.
                values = [group[key][1:] for group in groups]
            else:
                values = [g.get(f'initial_{key}', g.get(key)) for g in groups]
            recipe[f'{name} {key}'.strip()] = values
    for i, state in enumerate(schedulers):
        for key, value in state.items():
            if not key.startswith('_') and key not in PROGRESS and not callable(value):
                recipe[f'param_scheduler.{i}.{key}'] = value
    return recipe


def _shorten(changes: list[str]) -> str:
    more = f' and {len(changes) - 5} more' if len(changes) > 5 else ''
    return ', '.join(changes[:5]) + more


def _changes(before: dict | None, now: dict) -> list[str]:
    """Name what differs, of lists of one length the first items that do."""
    before, changes = before if isinstance(before, dict) else {}, []
    lost, new = (sorted(a.keys() - b.keys()) for a, b in ((before, now), (now, before)))
    # Those of one side alone may be of another version.
    if lost and new:
        changes.append(f'{", ".join(lost)} before and {", ".join(new)} now')
    for key in [key for key in now if key in before]:
        pair = before[key], now[key]
        a, b = (list(v) if isinstance(v, tuple) else v for v in pair)
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = next(((x, y) for x, y in zip(a, b) if x != y), (a, b))
        if a != b:
            name = key if '.' in key else key.replace('_', ' ')
            changes.append(f'{name} {a!s:.40} before and {b!s:.40} now')
    return changes
