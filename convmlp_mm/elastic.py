"""torchrun, for runs that are stopped, fail for good, or lose a process.

``tools/dist_run.sh`` runs it as ``python -m convmlp_mm.elastic`` with the options of
torchrun. It is torchrun but for two things:

- When a process ends with an exit code of :data:`FINAL`, none is started again, and
  the launcher ends with that code.
- SIGTERM and SIGUSR1 are passed on to the processes, which then have all the time
  that they need; torchrun kills them after 30 seconds.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import (
    LocalElasticAgent,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

from .launch import MISTAKE, PREEMPTED

__all__ = ['FINAL', 'Agent', 'check_port', 'main', 'own_address']

FINAL = (PREEMPTED, MISTAKE)
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
# In seconds: how much longer the processes of another machine may take to end.
PATIENCE = 60


class Agent(LocalElasticAgent):
    """The part of torchrun that watches the processes of one machine.

    The processes find in ``CONVMLP_MM_ATTEMPT`` how often they have been started
    before. ``TORCHELASTIC_RESTART_COUNT`` does not count what another machine caused.
    """

    _attempt = -1
    _stopping = False

    def _pass_on(self, signum: int, frame: object) -> None:
        self._stopping = True
        for pid in self._pcontext.pids().values():
            # A process that has ended is not there.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _start_workers(self, worker_group):
        if self._stopping:
            # Asked to while there were none, between two attempts.
            raise SystemExit(PREEMPTED)
        self._attempt += 1
        os.environ['CONVMLP_MM_ATTEMPT'] = str(self._attempt)
        pids = super()._start_workers(worker_group)
        # torchrun has just installed its own handlers.
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        return pids

    def _monitor_workers(self, worker_group) -> RunResult:
        result = super()._monitor_workers(worker_group)
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            # They may have been asked to stop before there was anything to save.
            default = PREEMPTED if self._stopping else None
            final = next((code for code in FINAL if code in codes), default)
            if final is not None:
                # One machine has the store, and the others fail without it.
                self._exit_barrier_timeout = PATIENCE
                self._exit_barrier()
                raise SystemExit(final)
        return result


def check_port(port: int) -> None:
    """Check that this machine can listen at a port.

    Args:
        port (int): Its number.

    Raises:
        OSError: If something listens there already, or the port is not allowed.
    """
    try:
        socket.create_server(('', port)).close()
    except OSError as error:
        raise OSError(
            f'port {port} of this machine cannot be used ({error.strerror}); set PORT '
            'to another, on all machines the same'
        ) from None


def own_address(host: str, port: int) -> str:
    """Return the address by which this machine talks to another.

    Args:
        host (str): Name or address of the other, or of this one.
        port (int): Any port; nothing is sent.

    Returns:
        str: The address.

    Raises:
        OSError: If there is no way to the host.
    """
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_DGRAM
        )[0]
        with socket.socket(family, kind, proto) as talk:
            talk.connect(address)
            return talk.getsockname()[0]
    except OSError as error:
        raise OSError(f'MASTER_ADDR {host!r} cannot be reached: {error}') from None


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    options = run.parse_args(sys.argv[1:])
    host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=-1)
    try:
        if options.node_rank == 0:
            check_port(port)
        # By default they would look for each other by the names of the machines, which
        # not every network knows.
        options.local_addr = options.local_addr or own_address(host, port)
    except (OSError, OverflowError) as error:
        print(f'dist_run.sh: error: {error}', file=sys.stderr)
        sys.exit(MISTAKE)
    api.LocalElasticAgent = Agent
    try:
        run.run(options)
    except ChildFailedError as error:
        # What the processes have said stands above; the rest is a table of them.
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == '__main__':
    main()
