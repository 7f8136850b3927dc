"""Let the processes of a run agree on where it stands before they train."""

import zlib
from collections import defaultdict
from collections.abc import Iterator

import torch
from mmengine.dist import all_gather_object, get_world_size
from mmengine.hooks import EarlyStoppingHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import some_of
from ._mmengine import accumulative_counts, is_resumed, load_from

# The key in the meta of a checkpoint for what its states do not say.
KEY = 'recipe'
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
        checkpoint['meta'][KEY] = _note(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Raise a ValueError if a checkpoint that is resumed has another recipe."""
        if not is_resumed(runner):
            return
        before, now = (checkpoint.get('meta') or {}).get(KEY) or {}, _note(runner)
        if 'optimizer' in checkpoint:
            schedulers = _listed(runner.param_schedulers)
            states = [scheduler.state_dict() for scheduler in schedulers]
            now.update(_settings(runner.optim_wrapper.state_dict(), states))
            states = _listed(checkpoint.get('param_schedulers'))
            before = {**before, **_settings(checkpoint['optimizer'], states)}
        changes = list(_changes(before, now))
        # Where a schedule ends follows from the length of the run.
        ends = [change for change in changes if '.end ' in change]
        refused = [change for change in changes if change not in ends]
        another = (
            'begin another from its weights, in another --work-dir, without --resume '
            f'and with --cfg-options load_from={load_from(runner)}'
        )
        if refused:
            raise ValueError(
                f'the run cannot be resumed with another recipe ({some_of(refused)}): '
                f'resume it as it was, or {another}'
            )
        if ends:
            runner.logger.warning(
                f'The schedule of the checkpoint goes on ({some_of(ends)}): after '
                f'its end, the values stay. For that of the configuration, {another}'
            )

    def before_train(self, runner: Runner) -> None:
        """Raise a RuntimeError if processes disagree; let early stopping count on."""
        if get_world_size() > 1:
            _compare_processes(runner)
        if not is_resumed(runner):
            return
        for hook in runner.hooks:
            if isinstance(hook, EarlyStoppingHook):
                values = runner.message_hub.log_scalars.get(f'val/{hook.monitor}')
                for value in values.data[0] if values else ():
                    hook.after_val_epoch(runner, {hook.monitor: float(value)})


def _note(runner: Runner) -> dict[str, object]:
    """Return what a resumed run must have as before, and no state says."""
    loader, wrapper = runner.train_dataloader, runner.optim_wrapper
    schedulers, dataset = _listed(runner.param_schedulers), loader.dataset
    return dict(
        processes=get_world_size(),
        batch_size=getattr(loader.batch_sampler, 'batch_size', 1),
        accumulative_counts=accumulative_counts(runner),
        training_samples=len(dataset) if hasattr(dataset, '__len__') else None,
        optimizer=type(getattr(wrapper, 'optimizer', wrapper)).__name__,
        param_scheduler=[type(scheduler).__name__ for scheduler in schedulers],
    )


def _compare_processes(runner: Runner) -> None:
    checksum = 0
    for param in runner.model.parameters():
        content = param.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        checksum = zlib.crc32(content.numpy(), checksum)
    place = f'epoch {runner.epoch}, iteration {runner.iter}, weights {checksum:08x}'
    ranks = defaultdict(list)
    for rank, other in enumerate(all_gather_object(place)):
        ranks[other].append(str(rank))
    if len(ranks) > 1:
        found = '; '.join(f'rank {", ".join(r)}: {other}' for other, r in ranks.items())
        raise RuntimeError(
            f'the processes do not start from the same checkpoint ({found}): let all '
            'machines see the same work dir and load_from'
        )


def _listed(schedulers: object) -> list:
    """Return schedulers, or their states; none of a run with several optimizers."""
    return schedulers if isinstance(schedulers, list) else []


def _settings(optimizer: dict, schedulers: list) -> dict[str, object]:
    """Take out of states what the configuration has said."""
    groups = optimizer.get('param_groups', [])
    settings = {'parameters': [len(group['params']) for group in groups]}
    for key in groups[0] if groups else ():
        if key == 'params' or key.startswith('initial_'):
            continue
        if key == 'betas' and 'initial_momentum' in groups[0]:
            # A schedule of the momentum changes the first of them.
            settings[key] = [group[key][1:] for group in groups]
        else:
            settings[key] = [g.get(f'initial_{key}', g.get(key)) for g in groups]
    for i, state in enumerate(schedulers):
        for key, value in state.items():
            if not key.startswith('_') and key not in PROGRESS and not callable(value):
                settings[f'param_scheduler.{i}.{key}'] = value
    return settings


def _changes(before: dict, now: dict) -> Iterator[str]:
    """Name what differs, of lists of one length the first items that do."""
    # What one side alone has may be of another version.
    for key in [key for key in now if key in before]:
        a, b = before[key], now[key]
        if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
            a, b = next(((x, y) for x, y in zip(a, b) if x != y), (a, b))
        if a != b:
            name = key if '.' in key else key.replace('_', ' ')
            yield f'{name} {a!s:.40} before and {b!s:.40} now'
