"""What the hooks that save share."""

from __future__ import annotations

import os.path as osp
import re
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
    'keep_own_files',
    'reason_of',
    'remove_checkpoint',
    'restore',
    'together',
]

# Keys of the message hub, and so of each checkpoint. What a checkpoint that is being
# saved replaces: who is killed before that is removed finds it there.
OUTDATED = 'outdated_ckpts'
# What a preempted run has saved in the middle of an epoch.
PREEMPTED_FILE = 'preempted_ckpt'


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


def _is_own_name(hook: CheckpointHook, name: object) -> bool:
    """Whether a name is one that the hook gives to a file, or PreemptionHook does."""
    template = r'\d+'.join(map(re.escape, re.split(r'\{.*?\}', hook.filename_tmpl)))
    pattern = rf'(best_[^/\\]+_)?{template}|iter_\d+\.pth'
    return isinstance(name, str) and re.fullmatch(pattern, name) is not None


def remove_checkpoint(hook: CheckpointHook, name: str) -> None:
    """Delete a file that this run has saved, if it is there.

    Args:
        hook (CheckpointHook): Of the main process; it knows the place.
        name (str): Name of the file. Others than the hook's own, and folders, stay.

    Raises:
        OSError: If it cannot be deleted.
    """
    path = hook.file_backend.join_path(hook.out_dir, name)
    if _is_own_name(hook, name) and hook.file_backend.isfile(path):
        hook.file_backend.remove(path)


def keep_own_files(runner: Runner, info: dict, resumed: str) -> None:
    """Forget the files that a checkpoint names, unless the run has saved them.

    The hooks remove, publish and replace what stands there. A run has saved what lies
    where it saves, under one of its names, if the checkpoint lies there too.

    Args:
        runner (Runner): The runner, before its training.
        info (dict): ``runtime_info`` in the message hub of the checkpoint; it is
            changed.
        resumed (str): The checkpoint.
    """
    hook = next(iter(checkpoint_hooks(runner)), None)
    folder = runner.work_dir
    if hook is not None and hook.out_dir not in (None, folder):
        # As CheckpointHook will do.
        folder = osp.join(hook.out_dir, osp.basename(folder.rstrip('/')))

    def place(path: str) -> str:
        return path if '://' in path else osp.realpath(osp.expanduser(path))

    template = getattr(hook, 'filename_tmpl', '')
    own = hook is not None and place(osp.dirname(resumed)) == place(folder)

    def is_own(name: object) -> bool:
        named = own and _is_own_name(hook, name)
        return named and not osp.isdir(osp.join(folder, name))

    for key, value in list(info.items()):
        if key == 'keep_ckpt_ids':
            steps = [n for n in value if type(n) is int] if type(value) is list else []
            info[key] = [n for n in steps if is_own(template.format(n))]
        elif key == OUTDATED:
            info[key] = list(filter(is_own, value)) if type(value) is list else []
        elif key == 'last_ckpt' or str(key).startswith('best_ckpt'):
            # The run may have been moved.
            info[key] = osp.join(folder, osp.basename(str(value)))
            if not is_own(osp.basename(info[key])):
                info.pop(key)
        elif key == PREEMPTED_FILE and not is_own(value):
            info.pop(key)


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
