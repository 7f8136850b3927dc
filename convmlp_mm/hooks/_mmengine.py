"""The only door to the private names of mmengine.

Each function says what mmengine offers no public way for. When the engine moves,
``tests/test_mmengine.py`` names what has changed, and the mend belongs here.
"""

from mmengine.hooks import CheckpointHook
from mmengine.runner import BaseLoop, Runner


def is_training(runner: Runner) -> bool:
    """Tell whether ``runner.train()`` was called.

    The public ``train_loop`` would build the loop of a run that tests.
    """
    return isinstance(runner._train_loop, BaseLoop)


def is_resumed(runner: Runner) -> bool:
    """Tell whether the run goes on from a checkpoint."""
    return runner._resume


def load_from(runner: Runner) -> str | None:
    """Return the checkpoint that the run starts or goes on from, if one is named."""
    return runner._load_from


def set_start(runner: Runner, resume: bool, checkpoint: str | None) -> None:
    """Choose what the runner loads once ``before_run`` is over."""
    runner._resume, runner._load_from = resume, checkpoint


def train_loader_settings(runner: Runner) -> object:
    """Return ``train_dataloader`` as it was given: a dict, or a built loader.

    Once the loop is built, the public ``train_dataloader`` is the loader.
    """
    return runner._train_dataloader


def accumulative_counts(runner: Runner) -> int:
    """Return how many batches make a step; 1 for wrappers of several optimizers."""
    return getattr(runner.optim_wrapper, '_accumulative_counts', 1)


def save_now(hook: CheckpointHook, runner: Runner, epoch: int, iteration: int) -> None:
    """Let a CheckpointHook save the iteration at a moment that it would not choose."""
    meta = dict(epoch=epoch, iter=iteration)
    hook._save_checkpoint_with_step(runner, iteration, meta=meta)
