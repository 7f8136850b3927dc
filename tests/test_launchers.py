"""Runs of several processes, as the launchers start, restart and end them."""

import argparse
import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy import LENGTH, free_port, write_config

from convmlp_mm import launch
from convmlp_mm.hooks.checkpoint import NotSavedError
from convmlp_mm.launch import elastic
from convmlp_mm.launch.checks import is_first_process
from convmlp_mm.launch.process import MISTAKE, PREEMPTED

TOOLS = Path(__file__).parents[1] / 'tools'


def environment(**changes):
    names = ('NNODES', 'NODE_RANK', 'MASTER_ADDR', 'MAX_RESTARTS', 'CONVMLP_MM_ATTEMPT')
    env = {key: value for key, value in os.environ.items() if key not in names}
    env = {**env, 'OMP_NUM_THREADS': '1', 'PORT': str(free_port())}
    return {**env, **{key: str(value) for key, value in changes.items()}}


def bash(*command, cwd, **env):
    return subprocess.run(
        ['bash', *map(str, command)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=400,
        env=environment(**env),
    )


def kill(tmp_path, **changes):
    marker = str(tmp_path / 'marker')
    return dict(type='SignalOnce', marker=marker, name='SIGKILL', **changes)


@contextlib.contextmanager
def training(tmp_path, hooks=(), **changes):
    """Two processes of a long training that has begun, and what they write."""
    hooks = [kill(tmp_path, iteration=-1, every=0.2), *hooks]
    config = write_config(tmp_path / 'toy.py', hooks, 100, world_size=2, **changes)
    command = [TOOLS / 'dist_train.sh', config, '2', '--work-dir', tmp_path / 'work']
    log = tmp_path / 'log'
    with log.open('w') as file:
        run = subprocess.Popen(
            ['bash', *map(str, command)],
            cwd=tmp_path,
            env=environment(TMPDIR=tmp_path),
            stdout=file,
            stderr=file,
        )
    members = [run.pid]
    try:
        for _ in range(400):
            if re.search(r'Epoch\(train\) *\[1\]', log.read_text()):
                break
            assert run.poll() is None, log.read_text()[-2000:]
            time.sleep(0.2)
        members = family(run.pid)
        yield run, log
    finally:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def family(pid):
    """A process and those that it has started."""
    pids = [pid]
    for each in pids:
        pids += map(int, Path(f'/proc/{each}/task/{each}/children').read_text().split())
    return pids


def listening(pids):
    """The sockets at which processes listen, as the kernel writes address and port."""
    opened = {
        os.readlink(path) for pid in pids for path in Path(f'/proc/{pid}/fd').iterdir()
    }
    for table in ('tcp', 'tcp6'):
        for line in Path(f'/proc/net/{table}').read_text().splitlines()[1:]:
            _, socket_, _, state, *_ = fields = line.split()
            if state == '0A' and f'socket:[{fields[9]}]' in opened:
                address, port = socket_.split(':')
                yield address, int(port, 16)


@pytest.mark.slow
def test_killed_process_is_started_again_and_goes_on(tmp_path):
    hooks = [kill(tmp_path, iteration=LENGTH + 2, rank=1)]
    config = write_config(tmp_path / 'toy.py', hooks, world_size=2)
    with config.open('a') as file:
        file.write('val_dataloader, val_evaluator = train_dataloader, test_evaluator\n')
        file.write('val_cfg = dict()\n')
    command = TOOLS / 'dist_train.sh', config, 2, '--work-dir', tmp_path / 'work'
    # Nobody can write to this folder.
    done = bash(*command, cwd='/proc')
    assert done.returncode == 0, done.stderr[-2000:]
    # The other process may have been seen to fail first.
    assert (tmp_path / 'marker').exists()
    log = done.stdout + done.stderr
    assert log.count(f'resumed epoch: 1, iter: {LENGTH}') == 1
    assert (tmp_path / 'work' / 'epoch_2.pth').is_file()


@pytest.mark.slow
def test_signal_to_the_launcher_saves_and_goes_through(tmp_path):
    with training(tmp_path) as (run, log):
        # Meanwhile, no other machine reaches the processes.
        sockets = list(listening(family(run.pid)))
        with contextlib.suppress(OSError):
            outside = elastic.own_address('192.0.2.1', 9)
            for _, port in sockets:
                with pytest.raises(ConnectionRefusedError):
                    socket.create_connection((outside, port), timeout=5)
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=200) == PREEMPTED
    assert {address for address, _ in sockets} == {'0100007F'}
    text = log.read_text()
    saved = Path((tmp_path / 'work' / 'last_checkpoint').read_text())
    assert saved.is_file() and text.count('Stopped by a signal') == 1
    assert text.count('Checkpoints will be saved to') == 1


@pytest.mark.slow
def test_processes_of_a_launcher_that_is_killed_save_before_another_run(tmp_path):
    with training(tmp_path) as (run, log):
        ranks = [pid for pid in family(run.pid) if pid != run.pid]
        holder = (tmp_path / 'work' / '.lock').read_text()
        os.kill(run.pid, signal.SIGKILL)
        # Started again at once, as the docs say; its first process waits for the lock.
        command = [sys.executable, TOOLS / 'train.py', tmp_path / 'toy.py', '--resume']
        command += ['--work-dir', tmp_path / 'work']
        command += ['--cfg-options', 'train_cfg.max_epochs=1']
        env = environment()
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert f'process {ranks[0]} of {socket.gethostname()} since ' in holder
    assert not any(Path(f'/proc/{pid}').exists() for pid in ranks)
    assert log.read_text().count('Stopped by a signal') == 1
    assert 'resumed epoch: ' in done.stdout + done.stderr, done.stderr[-2000:]


@pytest.mark.slow
def test_full_disk_ends_all_processes_and_is_not_tried_again(tmp_path):
    # The limit on the size of a file, in KiB, is above that of the log only.
    changes = dict(
        model=dict(type='Toy', size=2**18),
        default_hooks=dict(checkpoint=dict(type='SafeCheckpointHook')),
    )
    # There is more to do for the process that does not save.
    config = write_config(tmp_path / 'toy.py', epochs=3, world_size=2, **changes)
    script = 'ulimit -f 512; exec bash "$0" "$@"'
    command = [script, TOOLS / 'dist_train.sh', config, 2]
    done = bash('-c', *command, cwd=tmp_path, MAX_RESTARTS=3)
    assert done.returncode == MISTAKE, done.stderr[-2000:]
    (line,) = [x for x in done.stderr.splitlines() if 'error: cannot save' in x]
    assert line.endswith('epoch_3.pth: File too large; there is none yet')
    assert 'NotSavedError' not in done.stderr


@pytest.mark.parametrize(
    ('error', 'code'),
    [
        (ValueError('no such model'), MISTAKE),
        (PermissionError(errno.EACCES, 'denied'), MISTAKE),
        (OSError(errno.ENOSPC, 'full'), MISTAKE),
        (NotSavedError('cannot save', errno.ENOSPC), MISTAKE),
        (OSError(errno.EIO, 'network file system'), None),
        (RuntimeError('out of memory'), None),
    ],
)
def test_what_comes_again_is_not_tried_again(monkeypatch, capsys, error, code):
    monkeypatch.setenv('TORCHELASTIC_RESTART_COUNT', '0')
    with pytest.raises((type(error), SystemExit)) as info, launch.final_mistakes():
        raise error
    assert getattr(info.value, 'code', None) == code
    # The trace is there, whoever prints it.
    assert (str(error) in capsys.readouterr().err) == (code is not None)
    monkeypatch.delenv('TORCHELASTIC_RESTART_COUNT')
    with pytest.raises(type(error)), launch.final_mistakes():
        raise error


def test_signal_between_two_attempts_ends_the_launcher():
    agent = object.__new__(elastic.Agent)
    with subprocess.Popen(['true']) as worker:
        worker.wait()
    agent._pcontext = SimpleNamespace(pids=lambda: {0: worker.pid})
    agent._pass_on(signal.SIGTERM, None)
    with pytest.raises(SystemExit) as stop:
        agent._start_workers(None)
    assert stop.value.code == PREEMPTED


def test_launcher_knows_the_exit_codes_of_the_processes():
    assert elastic.FINAL == (PREEMPTED, MISTAKE)


def test_check_of_a_launch_speaks_for_all_whatever_the_environment_says(monkeypatch):
    command = ['--nproc_per_node', '2', 'a/train.py', 'c.py', '--launcher', 'pytorch']
    options, seen = elastic.run.parse_args(command), []
    monkeypatch.setattr('runpy.run_path', lambda *args, **kwargs: seen.extend(sys.argv))
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setattr(sys, 'path', [*sys.path])
    for name, value in (('RANK', '1'), ('LOCAL_WORLD_SIZE', '1')):
        monkeypatch.setenv(name, value)
    elastic._check(options)
    parser = argparse.ArgumentParser()
    parser.add_argument('config')
    launch.add_common_arguments(parser)
    args = parser.parse_args(seen[1:])
    assert args.check and is_first_process(args.launcher)
    assert os.environ['LOCAL_WORLD_SIZE'] == '2'


def test_address_of_this_machine_is_the_one_that_reaches_the_other():
    assert elastic.own_address('127.0.0.1', 1) == '127.0.0.1'
    with pytest.raises(OSError, match="MASTER_ADDR 'no.such.host.invalid' cannot"):
        elastic.own_address('no.such.host.invalid', 1)


@pytest.mark.slow
def test_two_machines_survive_a_kill_on_the_second(tmp_path):
    tool = Path(__file__).parent / 'cluster' / 'two_nodes.sh'
    tried = bash(tool, 'true', cwd=tmp_path)
    if tried.returncode == 77 or not shutil.which('ip'):
        pytest.skip(f'no network namespaces here: {tried.stderr.strip()}')
    hooks = [kill(tmp_path, iteration=LENGTH + 2, rank=1)]
    config = write_config(tmp_path / 'toy.py', hooks, world_size=2)
    command = [tool, 'bash', TOOLS / 'dist_train.sh', config, 1, '--work-dir', 'work']
    done = bash(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'exitcode: -9' in done.stderr
    assert done.stderr.count('warning: RDZV_ID is not set') == 2
    log = done.stdout + done.stderr
    assert f'resumed epoch: 1, iter: {LENGTH}' in log
    assert (tmp_path / 'work' / 'epoch_2.pth').is_file()


@pytest.mark.parametrize(
    ('variables', 'fragment'),
    [
        (dict(PORT='http'), "PORT must be a number, but is 'http'"),
        (dict(PORT='70000'), 'PORT must be from 1 to 65535, but is 70000'),
        (dict(NNODES='08', NODE_RANK='09', MASTER_ADDR='a'), 'is 8, but is 9'),
        (dict(MAX_RESTARTS='-1'), "MAX_RESTARTS must be a number, but is '-1'"),
        (dict(NNODES=2, NODE_RANK=2, MASTER_ADDR='a'), 'NODE_RANK must be below'),
        (dict(NNODES=2), 'MASTER_ADDR must be an address'),
    ],
)
def test_variables_of_dist_run_are_checked(tmp_path, variables, fragment):
    done = bash(TOOLS / 'dist_train.sh', 'x.py', 1, cwd=tmp_path, **variables)
    assert done.returncode == 2 and fragment in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ('tool', 'least'), [('slurm_train.sh', 3), ('slurm_test.sh', 4)]
)
def test_slurm_launchers_say_how_they_are_used(tmp_path, tool, least):
    done = bash(TOOLS / tool, *['x'] * (least - 1), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f'usage: {tool} PARTITION JOB_NAME CONFIG')
    done = bash(TOOLS / tool, *['x'] * least, cwd=tmp_path, GPUS='many')
    assert done.returncode == 2
    assert "GPUS must be 1 or more, but is 'many'" in done.stderr
    done = bash(TOOLS / tool, *['x'] * least, cwd=tmp_path, PORT='70000')
    assert done.returncode == 2
    assert "PORT must be from 1 to 65535, but is '70000'" in done.stderr


@pytest.mark.parametrize(
    ('options', 'expected'),
    [
        (['work', '--amp'], '--work-dir work --amp --launcher slurm'),
        (['--amp'], '--amp --seed 1 --launcher slurm'),
    ],
)
def test_slurm_train_hands_the_options_on(tmp_path, options, expected):
    # What would be run; a real SLURM is in tests/cluster.
    (tmp_path / 'srun').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'srun').chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', GPUS=4, SRUN_ARGS='--x --y')
    env['PY_ARGS'] = '' if 'work' in options else '--seed 1'
    tool = TOOLS / 'slurm_train.sh'
    done = bash(tool, 'part', 'a job', 'c.py', *options, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    assert '--ntasks=4 --ntasks-per-node=4 --cpus-per-task=5' in done.stdout
    assert '--partition=part --job-name=a job --gres=gpu:4' in done.stdout
    assert ' --x --y python -u ' in done.stdout
    assert done.stdout.endswith(f'train.py c.py {expected}\n')


def test_slurm_job_gets_the_arguments_as_they_were_given(tmp_path):
    for name, line in (
        # SLURM runs what sbatch wraps as a script of /bin/sh.
        ('sbatch', 'for last; do :; done; SLURM_JOB_ID=7 exec sh -c "$last"'),
        ('python', 'true'),
        ('srun', 'printf "%s|" "$@"'),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\n{line}\n')
        (tmp_path / name).chmod(0o755)
    config, *rest = "m ä'x.py", 'a\n\'; touch PWNED; # "', '$(touch PWNED)', '\\n*'
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', BATCH=1, LC_ALL='C')
    done = bash(TOOLS / 'slurm_train.sh', 'p', 'j', config, *rest, cwd=tmp_path, **env)
    assert done.returncode == 0, done.stderr
    got = [config, '--work-dir', *rest, '--launcher', 'slurm', '']
    assert done.stdout.split('|')[-len(got) :] == got
    assert not (tmp_path / 'PWNED').exists()


def test_launchers_find_their_folder_where_cd_says_where_it_goes(tmp_path):
    (tmp_path / 'tools').symlink_to(TOOLS)
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$@"\n')
    (tmp_path / 'python').chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', CDPATH='.')
    done = bash('tools/dist_train.sh', 'x.py', 1, cwd=tmp_path, **env)
    assert str(tmp_path / 'tools' / 'train.py') in done.stdout.split()


@pytest.mark.parametrize('tools', ['tools', 'convmlp_mm/.mim/tools'])
def test_launcher_is_found_in_a_checkout_and_in_an_installed_package(tmp_path, tools):
    shutil.copytree(TOOLS, tmp_path / tools)
    elastic_file = tmp_path / 'convmlp_mm' / 'launch' / 'elastic.py'
    elastic_file.parent.mkdir(parents=True)
    elastic_file.touch()
    (tmp_path / 'python').write_text('#!/bin/sh\necho "$1"\n')
    (tmp_path / 'python').chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}')
    done = bash(tmp_path / tools / 'dist_train.sh', 'x.py', 1, cwd=tmp_path, **env)
    assert Path(done.stdout.strip()).samefile(elastic_file)


def test_slurm_job_that_is_queued_again_keeps_its_own_resume(tmp_path):
    for name, line in (
        ('srun', 'echo "$CONVMLP_MM_ATTEMPT" "$CONVMLP_MM_LAUNCH_ID" "$@"'),
        ('python', 'true'),
    ):
        (tmp_path / name).write_text(f'#!/bin/sh\n{line}\n')
        (tmp_path / name).chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', BATCH=1, SLURM_JOB_ID=7)
    command = TOOLS / 'slurm_train.sh', 'p', 'j', 'c.py', 'work', '--resume', 'x.pth'
    done = bash(*command, cwd=tmp_path, SLURM_RESTART_COUNT=2, **env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith('2 slurm_7 ')
    assert done.stdout.count('--resume') == 1


def test_named_checkpoint_is_resumed_even_if_it_is_load_from(tmp_path, tool):
    def train(work, *options, **changes):
        changes['default_hooks'] = dict(checkpoint=dict(type='SafeCheckpointHook'))
        changes['experiment_name'] = f'{tmp_path.name}_{work}'
        config = write_config(tmp_path / 'toy.py', **changes)
        done = tool('train.py', config, '--work-dir', tmp_path / work, *options)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    first = str(tmp_path / 'first' / 'epoch_1.pth')
    train('first', epochs=1)
    log = train('second', '--resume', first, load_from=first)
    assert f'resumed epoch: 1, iter: {LENGTH}' in log
    # Without a name, and with nothing there, it is where the training starts.
    log = train('third', '--resume', load_from=first)
    assert 'resumed' not in log and f'Load checkpoint from {first}' in log


@pytest.mark.parametrize(
    ('attempt', 'launch_id', 'resume', 'found'),
    [
        (0, 'this', 'auto', False),
        (1, 'this', None, True),
        (1, 'other', None, False),
        (1, 'other', 'auto', True),
        (1, 'this', 'other.pth', True),
        (1, 'other', 'other.pth', False),
        (1, None, None, False),
    ],
)
def test_restart_goes_on_from_what_this_launch_saved(
    tmp_path, monkeypatch, attempt, launch_id, resume, found
):
    saved = tmp_path / 'epoch_1.pth'
    meta = dict(epoch=1, iter=2, launch='this')
    hub = dict(log_scalars={}, runtime_info={}, resumed_keys={})
    content = dict(meta=meta, state_dict=dict(a=torch.ones(1)), message_hub=hub)
    torch.save(dict(content, optimizer={}), saved)
    # The clock has gone back, or that of the file server differs.
    os.utime(saved, (1000, 1000))
    (tmp_path / 'last_checkpoint').write_text(str(saved))
    monkeypatch.delenv('TORCHELASTIC_RESTART_COUNT', raising=False)
    monkeypatch.setenv('CONVMLP_MM_ATTEMPT', str(attempt))
    monkeypatch.delenv('CONVMLP_MM_LAUNCH_ID', raising=False)
    if launch_id is not None:
        monkeypatch.setenv('CONVMLP_MM_LAUNCH_ID', launch_id)
    path = launch.checkpoint_of_restart(str(tmp_path), resume)
    assert path == (str(saved) if found else None)


SLURM = dict(SLURM_PROCID='3', SLURM_NTASKS='4', SLURM_LOCALID='1')


def test_slurm_tells_the_ranks(monkeypatch):
    for key in ('MASTER_PORT', 'RANK', 'WORLD_SIZE', 'LOCAL_RANK'):
        # So that what it sets is taken back.
        monkeypatch.setenv(key, '')
        monkeypatch.delenv(key)
    for key, value in {**SLURM, 'SLURM_JOB_ID': '70123', 'MASTER_ADDR': 'a'}.items():
        monkeypatch.setenv(key, value)
    launch.read_slurm()
    names = ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR', 'MASTER_PORT')
    assert [os.environ[n] for n in names] == ['3', '4', '1', 'a', '15123']


def test_slurm_launcher_without_srun_is_named(monkeypatch):
    for key in SLURM:
        monkeypatch.delenv(key, raising=False)
    with pytest.raises(ValueError, match='SLURM_PROCID is not'):
        launch.read_slurm()
