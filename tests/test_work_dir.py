"""One run at a time writes in a work dir, and a launch knows its own checkpoints."""

import contextlib
import ctypes
import errno
import os
import signal
import subprocess
import sys

import pytest
import torch
from toy import LENGTH, write_config

from convmlp_mm.hooks import work_dir
from convmlp_mm.hooks.work_dir import LOCK, work_dir_lock

# Another run, without the time that its imports take. Its child outlives it, as the
# worker of a data loader may.
HOLDER = """
import fcntl, os, sys, time
file = open(sys.argv[1], 'w')
fcntl.lockf(file, fcntl.LOCK_EX)
file.write('process 7 of there since noon: train.py')
file.flush()
if os.fork() == 0:
    time.sleep(60)
    os._exit(0)
print(flush=True)
time.sleep(60)
"""


@contextlib.contextmanager
def held(folder):
    folder.mkdir(exist_ok=True)
    command = [sys.executable, '-c', HOLDER, str(folder / LOCK)]
    run = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    try:
        run.stdout.readline()
        yield run
    finally:
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        run.stdout.close()


def test_second_run_is_told_who_has_the_work_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(work_dir, 'PATIENCE', 0.5)
    words = f'{str(tmp_path)!r} is in use by process 7 of there since noon: train.py'
    with held(tmp_path), pytest.raises(BlockingIOError, match=words):
        work_dir_lock(tmp_path).__enter__()


def test_run_that_is_killed_leaves_no_lock(tmp_path):
    with held(tmp_path) as run:
        run.kill()
        with work_dir_lock(tmp_path):
            text = (tmp_path / LOCK).read_text()
            assert text.startswith(f'process {os.getpid()} of ') and 'noon' not in text
    assert not (tmp_path / LOCK).exists()


def test_link_in_place_of_the_lock_is_not_followed(tmp_path):
    (tmp_path / 'other').write_text('mine')
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work' / LOCK).symlink_to(tmp_path / 'other')
    with pytest.raises(PermissionError, match='work.* cannot be written: Too many'):
        work_dir_lock(tmp_path / 'work').__enter__()
    assert (tmp_path / 'other').read_text() == 'mine'


def test_lock_waits_for_a_run_that_is_ending(tmp_path):
    with held(tmp_path) as run:
        subprocess.Popen(['sh', '-c', f'sleep 0.5; kill -9 {run.pid}'])
        with work_dir_lock(tmp_path):
            assert run.wait() == -signal.SIGKILL


def test_lock_holds_against_others_until_its_holder_ends(tmp_path):
    code = (
        'import fcntl, sys; fcntl.lockf(open(sys.argv[1], "a"), fcntl.LOCK_EX | '
        'fcntl.LOCK_NB)'
    )
    command = [sys.executable, '-c', code, str(tmp_path / 'new' / LOCK)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(work_dir_lock(tmp_path / 'new'))
        child = os.fork()
        if child == 0:
            # As its interpreter does at its end.
            stack.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        refused = subprocess.run(command, capture_output=True, text=True)
        assert 'BlockingIOError' in refused.stderr
    assert subprocess.run(command).returncode == 0


def test_file_system_without_locks_is_named_and_used(tmp_path, monkeypatch, capsys):
    def lockf(*args):
        raise OSError(errno.ENOLCK, 'No locks available')

    monkeypatch.setattr(work_dir.fcntl, 'lockf', lockf)
    with work_dir_lock(tmp_path):
        assert (tmp_path / LOCK).exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert f'{str(tmp_path / LOCK)!r} cannot be locked (No locks available)' in line


@pytest.mark.parametrize(('rank', 'waits'), [('0', True), ('1', False)])
def test_first_process_alone_takes_the_lock(tmp_path, monkeypatch, tool, rank, waits):
    monkeypatch.setattr(work_dir, 'PATIENCE', 0)
    monkeypatch.setenv('RANK', rank)
    config = write_config(tmp_path / 'toy.py')
    command = ['train.py', config, '--work-dir', tmp_path / 'work', '--check']
    with held(tmp_path / 'work'):
        done = tool(*command, '--launcher', 'pytorch')
    assert done.returncode == (2 if waits else 0)
    assert ('in use by process 7' in done.stderr) == waits


def test_checkpoints_name_their_launch(tmp_path, monkeypatch, tool):
    monkeypatch.setenv('CONVMLP_MM_LAUNCH_ID', 'first')
    config = write_config(tmp_path / 'toy.py', epochs=1)
    name = f'experiment_name={tmp_path.name}'
    command = ['train.py', config, '--work-dir', tmp_path / 'work', '--cfg-options']
    assert tool(*command, name).returncode == 0
    saved = tmp_path / 'work' / 'epoch_1.pth'
    assert torch.load(saved, weights_only=False)['meta']['launch'] == 'first'
    # Started again, whatever the clock says.
    os.utime(saved, (1000, 1000))
    monkeypatch.setenv('CONVMLP_MM_ATTEMPT', '1')
    done = tool(*command, f'{name}_2', 'train_cfg.max_epochs=2')
    assert f'resumed epoch: 1, iter: {LENGTH}' in done.stdout + done.stderr
    # Another launch in the same folder has saved nothing yet.
    monkeypatch.setenv('CONVMLP_MM_LAUNCH_ID', 'second')
    done = tool(*command, f'{name}_3')
    assert 'resumed' not in done.stdout + done.stderr
    assert 'this launch has saved nothing' in done.stderr


# The launcher waits for the process to be ready, or is gone before it is.
@pytest.mark.parametrize(('ready', 'end'), [(True, '-15'), (False, '85')])
def test_process_ends_with_its_launcher(tmp_path, ready, end):
    code = f"""
import os, signal, subprocess, sys, time
from convmlp_mm.launch.process import end_with_launcher
if sys.argv[1:] == ['rank']:
    while {not ready} and os.getppid() == int(os.environ['CONVMLP_MM_LAUNCHER']):
        time.sleep(0.01)
    end_with_launcher()
    assert 'CONVMLP_MM_LAUNCHER' not in os.environ
    print(flush=True)
    time.sleep(60)
pid = os.getpid()
os.environ['CONVMLP_MM_LAUNCHER'] = str(pid)
rank = [sys.executable, sys.argv[0], 'rank']
process = subprocess.Popen(rank, stdout=subprocess.PIPE)
if {ready}:
    process.stdout.readline()
print(process.pid, flush=True)
os.kill(pid, signal.SIGKILL)
"""
    script = tmp_path / 'launcher.py'
    script.write_text(code)
    libc = ctypes.CDLL(None)
    # Orphans become children of this process (PR_SET_CHILD_SUBREAPER).
    assert libc.prctl(36, 1) == 0
    try:
        done = subprocess.run([sys.executable, script], stdout=subprocess.PIPE)
        assert done.returncode == -signal.SIGKILL
        status = os.waitpid(int(done.stdout), 0)[1]
    finally:
        libc.prctl(36, 0)
    assert str(os.waitstatus_to_exitcode(status)) == end
