"""Settings of a process, and the exit codes that launchers understand."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

from ..hooks.stop import PREEMPTED

__all__ = ['MISTAKE', 'PREEMPTED', 'end_with_launcher', 'keep_memory']

# The exit code for what the user has to mend, as argparse has it. As after PREEMPTED,
# starting again in the same way is of no use.
MISTAKE = 2

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
    chosen = os.environ.get('LD_PRELOAD') or 'malloc' in os.environ.get(
        'GLIBC_TUNABLES', ''
    )
    if chosen or any(name.startswith('MALLOC_') for name in os.environ):
        return False
    if not sys.platform.startswith('linux'):
        return False
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt is None:
        return False
    # Never trim, and no mapping of its own for any tensor.
    settings = {M_MMAP_MAX: 0, M_TRIM_THRESHOLD: -1, M_TOP_PAD: TOP_PAD}
    return all(mallopt(name, value) == 1 for name, value in settings.items())


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
