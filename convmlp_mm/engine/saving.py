"""What the hooks that save share."""

from __future__ import annotations

from collections.abc import Callable

from mmengine.dist import all_gather_object
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner

__all__ = [
    'NotSavedError',
    'SavingRunner',
    'checkpoint_hooks',
    'is_first',
    'reason_of',
    'remove_checkpoint',
    'restore',
    'together',
]


class NotSavedError(OSError):
    """A file could not be written, in any of the processes.

    Args:
        message (str): What has happened.
        number (int, optional): ``errno`` of what has happened. Defaults to None.
    """

    def __init__(self, message: str, number: int | None = None) -> None:
        super().__init__(message)
        self.errno = number


class SavingRunner:
    """A runner with another way to save; what else is asked, it passes on.

    Args:
        runner (Runner): The runner.
        save (Callable): In place of its ``save_checkpoint``.
    """

    def __init__(self, runner: Runner, save: Callable) -> None:
        self.wrapped, self.save_checkpoint = runner, save

    def __getattr__(self, name: str) -> object:
        return getattr(self.wrapped, name)


def together(work: Callable[[], None]) -> None:
    """Fail in all processes if one has failed: they must not part ways.

    Args:
        work (Callable): It is called in each of them.

    Raises:
        NotSavedError: If it was by an OSError.
        Exception: If it was by any other.
    """
    failure, found = None, None
    try:
        work()
    except Exception as error:
        failure = error
        disk = isinstance(error, OSError)
        found = (disk, reason_of(error), error.errno if disk else None)
    all_found = [item for item in all_gather_object(found) if item is not None]
    if failure is not None and not found[0]:
        raise failure
    if all_found:
        disk, text, number = min(all_found, key=lambda item: item[:2])
        if not disk:
            raise RuntimeError(f'another process cannot save: {text}')
        raise NotSavedError(text, number) from failure


def checkpoint_hooks(runner: Runner) -> list[CheckpointHook]:
    """List the hooks of a runner that save, of mmengine's class or of one below it.

    Args:
        runner (Runner): The runner.

    Returns:
        list[CheckpointHook]: In the order of their priority.
    """
    return [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]


def remove_checkpoint(hook: CheckpointHook, name: str) -> None:
    """Delete a file, or what DeepSpeed saves as a folder, if it is there.

    Args:
        hook (CheckpointHook): Of the main process; it knows the place.
        name (str): Name of the file.

    Raises:
        OSError: If it cannot be deleted.
    """
    backend = hook.file_backend
    path = backend.join_path(hook.out_dir, name)
    if backend.isfile(path):
        backend.remove(path)
    elif backend.isdir(path):
        backend.rmtree(path)


def restore(hub: MessageHub, keys: list[str], before: dict) -> None:
    """Give the message hub what it held, or did not hold, before.

    Args:
        hub (MessageHub): It is changed.
        keys (list[str]): Of its information.
        before (dict): What it held under them.
    """
    for key in keys:
        if key in before:
            hub.update_info(key, before[key])
        else:
            hub.pop_info(key)


def is_first(runner: Runner, hook: Hook) -> bool:
    """Tell whether a hook is the first of its class, if it is listed twice.

    Args:
        runner (Runner): The runner.
        hook (Hook): One of its hooks.

    Returns:
        bool: Whether it is.
    """
    return hook is next(other for other in runner.hooks if type(other) is type(hook))


def reason_of(error: Exception) -> str:
    """Say in one line what is wrong; paths of temporary files help nobody.

    Args:
        error (Exception): What was raised.

    Returns:
        str: Its first line.
    """
    text = getattr(error, 'strerror', None) or str(error) or type(error).__name__
    return text.splitlines()[0]
