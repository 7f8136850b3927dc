"""torchrun, for runs that are stopped, fail for good, or lose a process.

``tools/dist_run.sh`` runs this file with torchrun's options, and not as a module: the
imports of the package would take seconds. It is torchrun but for five things:

- One process reads the configuration and looks for the data first, so that a mistake is
  said once and before anything starts.
- When a process ends with an exit code of :data:`FINAL`, none is started again, and
  the launcher ends with that code.
- SIGTERM and SIGUSR1 are passed on to the processes, which then have all the time
  that they need; torchrun kills them after 30 seconds. They end with the launcher, too.
- Each launch has a name, which its checkpoints carry.
- With ``--rdzv_backend one_machine`` nothing listens at an address that other machines
  reach. Whoever reaches the store of a rendezvous can have the launcher run code.
"""

import argparse
import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import tempfile
import uuid

from torch.distributed import HashStore, run
from torch.distributed.elastic import rendezvous
from torch.distributed.elastic.agent.server.api import RunResult, WorkerState
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import c10d_rendezvous_backend as c10d
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import create_handler
from torch.distributed.elastic.rendezvous.utils import parse_rendezvous_endpoint
from torch.distributed.launcher import api

# Those of convmlp_mm.hooks.stop and convmlp_mm.launch.process.
FINAL = PREEMPTED, MISTAKE = 85, 2
PASSED_ON = (signal.SIGTERM, signal.SIGUSR1)
# How much longer the processes of another machine may take to end, in seconds.
PATIENCE = 60
# The name of a rendezvous for a launcher that has nobody to wait for.
ONE_MACHINE = 'one_machine'


class Agent(api.LocalElasticAgent):
    """The part of torchrun that watches the processes of one machine.

    The processes find in ``CONVMLP_MM_ATTEMPT`` how often they have been started
    before. ``TORCHELASTIC_RESTART_COUNT`` does not count what another machine caused.
    ``CONVMLP_MM_LAUNCH_ID`` is the same in all attempts and on all machines, but not
    in two launches. ``CONVMLP_MM_LAUNCHER`` is the process that started them, and
    ``CONVMLP_MM_STORE``, on one machine, a file in which they can meet.
    """

    # A folder for the files of all attempts.
    meetings: str | None = None
    _attempt = -1
    _launch = uuid.uuid4().hex
    _stopping = False

    def _pass_on(self, signum: int, frame: object) -> None:
        self._stopping = True
        for pid in self._pcontext.pids().values():
            # A process that has ended is not there.
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def _start_workers(self, worker_group):
        if self._stopping:
            # The signal came between two attempts, while there was no process.
            raise SystemExit(PREEMPTED)
        self._attempt += 1
        if worker_group.group_rank == 0:
            worker_group.store.set('convmlp_mm/launch', self._launch)
        self._launch = worker_group.store.get('convmlp_mm/launch').decode()
        os.environ['CONVMLP_MM_ATTEMPT'] = str(self._attempt)
        os.environ['CONVMLP_MM_LAUNCH_ID'] = self._launch
        os.environ['CONVMLP_MM_LAUNCHER'] = str(os.getpid())
        if self.meetings is not None:
            os.environ['CONVMLP_MM_STORE'] = f'{self.meetings}/{self._attempt}'
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


def own_address(host: str, port: int) -> str:
    """Return the address by which this machine talks to a host, or raise an OSError."""
    try:
        # Nothing is sent.
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, kind, proto, _, address = found[0]
        with socket.socket(family, kind, proto) as talk:
            talk.connect(address)
            return talk.getsockname()[0]
    except OSError as error:
        raise OSError(f'MASTER_ADDR {host!r} cannot be reached: {error}') from None


def _meet_nobody(params: rendezvous.RendezvousParameters):
    """Make the rendezvous of one machine, in the memory of the launcher."""
    store = HashStore()
    backend = c10d.C10dRendezvousBackend(store, params.run_id)
    handler = create_handler(store, backend, params)
    handler.get_backend = lambda: ONE_MACHINE
    return handler


def _stay_on_this_machine(options: argparse.Namespace) -> None:
    """Keep the processes of one machine from listening to others."""
    rendezvous.rendezvous_handler_registry.register(ONE_MACHINE, _meet_nobody)
    options.rdzv_id, options.local_addr = uuid.uuid4().hex, '127.0.0.1'
    if 'lo' in (name for _, name in socket.if_nameindex()):
        for library in ('GLOO', 'NCCL'):
            os.environ.setdefault(f'{library}_SOCKET_IFNAME', 'lo')


def _check_addresses(options: argparse.Namespace) -> None:
    """Check that several machines can meet."""
    host, port = parse_rendezvous_endpoint(options.rdzv_endpoint, default_port=-1)
    if options.node_rank == 0:
        try:
            socket.create_server(('', port)).close()
        except OSError as error:
            raise OSError(
                f'port {port} of this machine cannot be used ({error.strerror}); set '
                'PORT to another, on all machines the same'
            ) from None
    # By default they would look for each other by the names of the machines, which not
    # every network knows.
    options.local_addr = options.local_addr or own_address(host, port)


def _check(options: argparse.Namespace) -> None:
    """Run the script up to its checks, in a process that has torch already."""
    script, arguments = options.training_script, options.training_script_args
    os.environ['LOCAL_WORLD_SIZE'] = options.nproc_per_node
    # No launcher has started this one, whatever the environment says.
    sys.argv = [script, *arguments, '--check', '--launcher', 'none']
    sys.path[0] = os.path.dirname(script)
    runpy.run_path(script, run_name='__main__')


def main() -> None:
    """Run torchrun with the arguments of the command line."""
    options = run.parse_args(sys.argv[1:])
    api.LocalElasticAgent = Agent
    with tempfile.TemporaryDirectory(prefix='convmlp_mm_') as folder:
        try:
            if options.rdzv_backend == ONE_MACHINE:
                Agent.meetings = folder
                _stay_on_this_machine(options)
            else:
                _check_addresses(options)
        except (OSError, OverflowError, ValueError) as error:
            print(f'dist_run.sh: error: {error}', file=sys.stderr)
            sys.exit(MISTAKE)
        check = multiprocessing.get_context('fork').Process(
            target=_check, args=(options,)
        )
        check.start()
        check.join()
        if check.exitcode:
            sys.exit(check.exitcode)
        try:
            run.run(options)
        except ChildFailedError as error:
            # The messages of the processes stand above; this is a table of them.
            print(error, file=sys.stderr)
            sys.exit(1)


if __name__ == '__main__':
    main()
