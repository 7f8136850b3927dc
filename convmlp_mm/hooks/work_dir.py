"""Who writes in a work dir: one run at a time, and which launch of it."""

import contextlib
import fcntl
import os
import os.path as osp
import shlex
import socket
import sys
import time
from collections.abc import Iterator

from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner

# This file of the work dir says who holds it. What a run that was killed has left of it
# is not locked.
LOCK = '.lock'
# Times in seconds. A run that has been told to end may need the first for that, and a
# file server the second to see that the machine of a run that is started again is gone.
PATIENCE, PATIENCE_OF_RESTART = 10, 120
# The key of a checkpoint's meta under which the launch stands that has saved it.
KEY = 'launch'


@contextlib.contextmanager
def work_dir_lock(folder: str | os.PathLike) -> Iterator[None]:
    """Keep other runs out of a work dir, which is made if need be.

    The lock is that of the operating system, so that a process which is killed leaves
    none; one process must not take it twice. Where the file system has no locks, a
    warning says so.

    Raises:
        BlockingIOError: If another run has it and keeps it; the message says which.
        PermissionError: If the folder cannot be written.
    """
    path = osp.join(osp.realpath(folder), LOCK)
    os.makedirs(osp.dirname(path), exist_ok=True)
    file, pid = _acquire(path), os.getpid()
    since = time.strftime('%Y-%m-%d %H:%M:%S')
    holder = f'process {pid} of {socket.gethostname()} since {since}'
    text = f'{holder}: {shlex.join(sys.argv)}\n'
    try:
        # The lock holds on a full disk, too.
        with contextlib.suppress(OSError):
            os.ftruncate(file, 0)
            os.pwrite(file, text.encode(errors='replace'), 0)
        yield
    finally:
        # A child that is forked has no lock, and may come here at its end.
        if os.getpid() == pid:
            # This comes before the file is closed: afterwards it may be another's.
            with contextlib.suppress(OSError):
                os.unlink(path)
            os.close(file)


def _acquire(path: str) -> int:
    """Open and lock a file, which is another one when its holder has removed it."""
    folder = osp.dirname(path)
    restarted = int(os.environ.get('CONVMLP_MM_ATTEMPT', 0)) > 0
    deadline = time.monotonic() + (PATIENCE_OF_RESTART if restarted else PATIENCE)
    while True:
        try:
            # A link could point to the file of somebody else.
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(path, flags, 0o666)
        except OSError as error:
            raise PermissionError(
                f'work_dir {folder!r} cannot be written: {error.strerror}: {path!r}'
            ) from error
        try:
            # Children that are forked would share a lock of flock(): a worker of a data
            # loader or of a metric that outlives a killed run would keep it. This one
            # ends when the process closes any descriptor of the file, so that nothing
            # else here may open it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if osp.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            # Its holder has removed it since it was opened.
            pass
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() > deadline:
                text = os.pread(file, 4096, 0).decode(errors='replace')
                holder = text.partition('\n')[0]
                os.close(file)
                raise BlockingIOError(
                    f'work_dir {folder!r} is in use by {holder}; '
                    'wait until it has ended, or choose another --work-dir; if it is '
                    f'gone with its machine, remove {path!r}'
                ) from error
        except OSError as error:
            print(
                f'warning: {path!r} cannot be locked ({error.strerror}): nothing '
                'keeps a second run out of this work dir',
                file=sys.stderr,
            )
            return file
        os.close(file)
        time.sleep(0.2)


class LaunchHook(Hook):
    """What runs need that ``tools/`` start, which add it to the hooks of the recipe.

    Checkpoints say which launch has saved them, ``CONVMLP_MM_LAUNCH_ID``; by it a
    restart knows its own. Processes that evaluate together exchange their results in
    the folder of the logs: by default mmengine does it in the current folder, which
    may be read-only.
    """

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint['meta'][KEY] = os.environ.get('CONVMLP_MM_LAUNCH_ID')

    def before_val(self, runner: Runner) -> None:
        _exchange_in_log_dir(runner, runner.val_evaluator)

    def before_test(self, runner: Runner) -> None:
        _exchange_in_log_dir(runner, runner.test_evaluator)


def _exchange_in_log_dir(runner: Runner, evaluator: Evaluator) -> None:
    for metric in evaluator.metrics:
        if metric.collect_device == 'cpu' and metric.collect_dir is None:
            metric.collect_dir = osp.join(runner.log_dir, '.results')
