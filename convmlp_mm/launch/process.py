"""Settings of a process, and how it ends: messages, exit codes and its group."""

import contextlib
import ctypes
import errno
import os
import os.path as osp
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import torch

from ..hooks.stop import PREEMPTED

# The exit code for what the user has to mend, as argparse has it. As after PREEMPTED,
# starting again in the same way is of no use.
MISTAKE = 2

# Trying again does not help against these, as it may where memory or a network fails.
MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    FileNotFoundError,
    ImportError,
    LookupError,
    NameError,
    PermissionError,
    TypeError,
    ValueError,
)
# Nor does it against these; other errors of a far disk may pass.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)

PACKAGE = osp.dirname(osp.dirname(osp.abspath(__file__)))
FRAME = re.compile(r'File "(.+)", line \d+, in .+\n\s*(.*)')

# The parameter of prctl(2) for the signal that a process gets when its parent ends.
PR_SET_PDEATHSIG = 1
# Parameters of mallopt(3).
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
# Grow in steps that a batch does not use up at once, in bytes.
TOP_PAD = 256 * 1024**2


def keep_memory() -> bool:
    """Let malloc of glibc keep what is freed, for the next activation.

    By default it gives each large tensor back to the system, and the pages of the next
    one are mapped and zeroed again, which docs/performance.md measures. An allocator
    that is preloaded, or set up by the environment, stays as it is.

    Returns:
        bool: Whether the settings were made; not without glibc.
    """
    tunables = os.environ.get('GLIBC_TUNABLES', '')
    chosen = os.environ.get('LD_PRELOAD') or 'malloc' in tunables
    if chosen or any(name.startswith('MALLOC_') for name in os.environ):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    # Never trim, and no mapping of its own for any tensor.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}
    return bool(mallopt) and all(mallopt(*item) == 1 for item in settings.items())


def end_with_launcher() -> None:
    """Have this process told to end (SIGTERM) when its launcher is killed.

    A training that :mod:`convmlp_mm.launch.elastic` has started then saves and stops,
    where it has PreemptionHook, and anything else ends at once. Other launchers and
    systems than Linux see to that themselves, or do not.
    """
    # The processes that this one starts have another parent.
    launcher = os.environ.pop('CONVMLP_MM_LAUNCHER', None)
    if launcher is None or not sys.platform.startswith('linux'):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGTERM))
    # It may have been killed before that.
    if os.getppid() != int(launcher):
        sys.exit(PREEMPTED)


def _end(message: object) -> NoReturn:
    print(f'{osp.basename(sys.argv[0])}: error: {message}', file=sys.stderr)
    sys.exit(MISTAKE)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Say what a user got wrong before a run begins in one line; exit with 2."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, ImportError) as error:
        # str() of a KeyError is the repr of its message.
        _end(error.args[0] if isinstance(error, KeyError) else error)


@contextlib.contextmanager
def final_mistakes() -> Iterator[None]:
    """Say in one line what this package has found wrong in the middle of a run.

    Other errors keep their stack traces. The exit code tells a launcher that restarts
    not to do so after a mistake of the user's, or when a disk is full.
    """
    try:
        yield
    except (*MISTAKES, OSError) as error:
        if not isinstance(error, MISTAKES) and error.errno not in FULL:
            raise
        path, code = FRAME.findall(''.join(traceback.format_exception(error)))[-1]
        if path.startswith(PACKAGE + os.sep) and code.startswith('raise '):
            # A loader wraps the trace of its worker around the sentence.
            _end(str(error).rstrip().rpartition(f'\n{type(error).__name__}: ')[2])
        if 'TORCHELASTIC_RESTART_COUNT' not in os.environ:
            raise
        traceback.print_exc()
        sys.exit(MISTAKE)


@contextlib.contextmanager
def closing_group() -> Iterator[None]:
    """Close the group of the processes when a run has ended.

    torch leaves its threads to the end of the interpreter, where one that drops the
    tensors of the last collective may abort the process, with an exit code that is not
    the run's. After an error the group stays: to close it could wait for the others.
    """
    end = None
    try:
        yield
    except SystemExit as stop:
        end = stop
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # To drop the tensors of the last collective, its thread needs the interpreter's
        # lock, which it gets here. Up to torch 2.2 at least, the group would wait for
        # the thread with the lock in its hands.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
    if end is not None:
        raise end
