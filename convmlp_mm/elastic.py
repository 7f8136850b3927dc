"""torchrun, for runs that are stopped, fail for good, or lose a process.

``tools/dist_run.sh`` runs it as ``python -m convmlp_mm.elastic`` with the options of
torchrun. It is torchrun but for three things:

- A process that ends with an exit code of :data:`FINAL` is not started again, and the
  launcher ends with that code on all machines.
- SIGTERM and SIGUSR1 are passed on to the processes, which then have all the time
  that they need; torchrun kills them after 30 seconds.
- When a process of one machine dies, those of the others are started again at once.
  They would otherwise wait until a collective operation fails.

It needs the static rendezvous, where the first machine has the first ranks and
MASTER_PORT is the only port that torchrun listens at.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time

from torch.distributed import run
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import (
    LocalElasticAgent,
)
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher import api

from .launch import MISTAKE, PREEMPTED

__all__ = ['FINAL', 'Agent', 'check_port', 'main']

FINAL = (PREEMPTED, MISTAKE)
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)


class Agent(LocalElasticAgent):
    """The part of torchrun that watches the processes of one machine."""

    _stopping = False

    def _pass_on(self, signum: int, frame: object) -> None:
        self._stopping = True
        if self._pcontext is None:
            raise SystemExit(PREEMPTED)
        for pid in self._pcontext.pids().values():
            try:
                os.kill(pid, signum)
            except ProcessLookupError:
                continue

    def _start_workers(self, worker_group):
        pids = super()._start_workers(worker_group)
        # torchrun has just installed its own handlers.
        for number in PASSED_ON:
            signal.signal(number, self._pass_on)
        return pids

    def _monitor_workers(self, worker_group) -> RunResult:
        result = super()._monitor_workers(worker_group)
        several = worker_group.group_world_size > 1
        attempt = worker_group.spec.max_restarts - self._remaining_restarts
        if result.state == WorkerState.FAILED:
            codes = {failure.exitcode for failure in result.failures.values()}
            final = [code for code in FINAL if code in codes]
            if self._stopping and not final:
                # Asked to stop before it trained.
                final = [PREEMPTED]
            if final:
                if several:
                    worker_group.store.set('final', str(final[0]))
                    # The first machine has the store, from which the others read.
                    time.sleep(2 * worker_group.spec.monitor_interval + 1)
                raise SystemExit(final[0])
            if several:
                worker_group.store.set(f'failed_{attempt}', '1')
        elif several and result.state == WorkerState.HEALTHY:
            if worker_group.store.check(['final']):
                raise SystemExit(int(worker_group.store.get('final')))
            if worker_group.store.check([f'failed_{attempt}']):
                if not self._remaining_restarts:
                    raise SystemExit(1)
                return RunResult(state=WorkerState.UNHEALTHY)
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


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    options = run.parse_args(sys.argv[1:])
    if options.node_rank == 0:
        try:
            check_port(options.master_port)
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
