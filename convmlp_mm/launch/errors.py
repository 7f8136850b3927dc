"""How a run of a tool ends: messages, exit codes, and the group of the processes."""

from __future__ import annotations

import contextlib
import errno
import os
import os.path as osp
import re
import sys
import time
import traceback
from collections.abc import Iterator
from typing import NoReturn

import torch

from .process import MISTAKE

__all__ = ['closing_group', 'final_mistakes', 'one_line_errors']


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
    try:
        yield
    except SystemExit:
        _close_group()
        raise
    _close_group()


def _close_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # To drop the tensors of the last collective, its thread needs the interpreter's
        # lock, which it gets here. Up to torch 2.2 at least, the group would wait for
        # the thread with the lock in its hands.
        time.sleep(0.2)
        torch.distributed.destroy_process_group()
