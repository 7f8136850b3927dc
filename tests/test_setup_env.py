"""tools/setup_env.sh, run for real as far as it goes without long downloads."""

import os
import shutil
import subprocess
import sys
import time
import zipfile
from importlib import metadata, util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / 'tools' / 'setup_env.sh'
CHOICES = ('STACK', 'VENV', 'PYTHON', 'TORCH_VERSION', 'TORCHVISION_VERSION', 'CXX')
ACTIVE = ('VIRTUAL_ENV', 'CONDA_PREFIX')
HAS_STACK = all(util.find_spec(m) for m in ('mmcv', 'mmdet', 'mmseg', 'mmpretrain'))

# What the script may call, without any compiler.
COMMANDS = (
    'awk basename bash cat cksum cp dirname env flock getconf grep head ls mkdir '
    'mktemp mv nproc rm sed sort tail touch tr uname wc'
)


@pytest.fixture
def checkout(tmp_path):
    """Lay out what the script needs of a checkout, in a folder with a space."""
    folder = tmp_path / 'check out'
    (folder / 'tools').mkdir(parents=True)
    shutil.copy(ROOT / 'setup.py', folder)
    shutil.copy(SCRIPT, folder / 'tools')
    return folder


@pytest.fixture
def no_compiler(tmp_path):
    """Make a PATH that has the usual commands and neither compiler nor Python."""
    folder = tmp_path / 'bin'
    folder.mkdir()
    for name in COMMANDS.split():
        if found := shutil.which(name):
            (folder / name).symlink_to(found)
    return folder


@pytest.fixture
def setup_env(checkout, tmp_path):
    """Return a function that runs the script with a cache of its own."""

    def run(*extras, **choices):
        kept = {k: v for k, v in os.environ.items() if k not in CHOICES + ACTIVE}
        return subprocess.run(
            ['bash', str(checkout / 'tools' / 'setup_env.sh'), *extras],
            env={**kept, 'XDG_CACHE_HOME': str(tmp_path / 'cache'), **choices},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            cwd=tmp_path,
        )

    return run


def lines(done):
    return done.stderr.strip().splitlines()


def assert_refused(done, *fragments):
    """Check that the script ended with one sentence, and printed no Python."""
    assert done.returncode == 1, done.stderr
    assert done.stdout == ''
    (line,) = lines(done)
    for fragment in fragments:
        assert fragment in line


def write_script(path, body):
    path.write_text(f'#!/bin/sh\n{body}\n')
    path.chmod(0o755)
    return str(path)


def test_unknown_stack(setup_env):
    assert_refused(setup_env(STACK='mmlab'), 'mmlab', 'onedl', 'openmmlab')


def test_unknown_extra(setup_env):
    assert_refused(setup_env('tets'), "no extra called 'tets'")


def test_stack_as_extra(setup_env):
    assert_refused(setup_env('openmmlab'), 'STACK=openmmlab')


def test_python_too_old(setup_env, tmp_path):
    old = write_script(tmp_path / 'old', 'echo 3.9')
    assert_refused(setup_env(PYTHON=old), 'Python 3.9', '3.10 to 3.12')


def test_python_that_does_not_run(setup_env, tmp_path):
    shim = write_script(tmp_path / 'shim', 'exit 127')
    assert_refused(setup_env(PYTHON=shim), 'does not run', '3.10 to 3.12')


def test_no_python(setup_env, no_compiler):
    assert_refused(
        setup_env(PATH=str(no_compiler)), 'no Python 3.10 to 3.12', 'PYTHON='
    )


def test_no_compiler(setup_env, no_compiler, checkout):
    done = setup_env(PATH=str(no_compiler), PYTHON=sys.executable)
    assert_refused(done, 'no C++ compiler', 'g++')
    assert not (checkout / '.venv').exists(), 'nothing is made before this is clear'


def test_compiler_that_fails(setup_env, tmp_path):
    done = setup_env(
        PYTHON=sys.executable, CXX=write_script(tmp_path / 'cxx', 'exit 1')
    )
    assert_refused(done, 'cannot compile', '-std=c++20')


def test_foreign_folder_is_left_alone(setup_env, tmp_path):
    mine = tmp_path / 'mine'
    mine.mkdir()
    (mine / 'thesis.txt').write_text('years of work')
    done = setup_env(VENV=str(mine), PYTHON=sys.executable)
    assert_refused(done, str(mine), 'not made by this script')
    assert [path.name for path in mine.iterdir()] == ['thesis.txt']


@pytest.mark.slow
def test_failed_download_then_interruption(setup_env, checkout):
    if not shutil.which('c++'):
        pytest.skip('needs a compiler')
    venv = checkout / '.venv'
    offline = {
        'PYTHON': sys.executable,
        'PIP_CONFIG_FILE': os.devnull,
        'PIP_NO_INDEX': '1',
        'PIP_FIND_LINKS': '',
    }

    done = setup_env(**offline)
    assert done.returncode == 1
    assert done.stdout == ''
    assert 'making' in lines(done)[0]
    assert 'torch' in lines(done)[-1]
    assert 'check the network' in lines(done)[-1]
    assert len(lines(done)) == 3, done.stderr
    assert not (venv / '.made_by_setup_env' / 'busy').exists()

    # The environment is sound: the next run goes on with it.
    (venv / 'kept').touch()
    done = setup_env(**offline)
    assert 'continuing' in lines(done)[0]
    assert (venv / 'kept').exists()

    # What a kill leaves while pip is at work: the next run starts clean.
    (venv / '.made_by_setup_env' / 'busy').write_text('999999999')
    done = setup_env(**offline)
    assert 'start clean' in lines(done)[0]
    assert 'interrupted' in lines(done)[0]
    assert not (venv / 'kept').exists()


@pytest.mark.skipif(not HAS_STACK, reason='runs in an environment with a stack')
def test_active_environment_is_taken(setup_env, tmp_path, no_compiler):
    active = write_script(no_compiler / 'python', f'exec "{sys.executable}" "$@"')
    began = time.monotonic()
    done = setup_env('tests', PATH=os.path.dirname(active))
    assert time.monotonic() - began < 10
    assert done.returncode == 0, done.stderr
    assert done.stdout == f'{sys.executable}\n'
    assert 'using the active environment' in lines(done)[-1]

    names = {d.metadata['Name'].lower() for d in metadata.distributions()}
    mine, other = ('onedl', 'openmmlab')[:: 1 if 'onedl-mmcv' in names else -1]
    done = setup_env(PATH=os.path.dirname(active), STACK=other)
    assert f'its stack is {mine}' in lines(done)[0]
    assert done.returncode == 1


@pytest.mark.skipif(not HAS_STACK, reason='runs in an environment with a stack')
def test_nothing_to_do_takes_seconds():
    def seconds():
        began = time.monotonic()
        done = subprocess.run(
            ['bash', str(SCRIPT), 'tests'], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert Path(done.stdout.rstrip('\n')).is_file()
        return time.monotonic() - began

    # Up to three times: the machine may have other work.
    assert any(seconds() < 10 for _ in range(3))


@pytest.mark.parametrize(
    'state', ['good', 'without operators', 'cut short', 'bad byte']
)
def test_cached_wheel_is_checked(tmp_path, state):
    wheel = tmp_path / 'mmcv-2.1.0-cp311-cp311-linux_x86_64.whl'
    with zipfile.ZipFile(wheel, 'w') as archive:
        archive.writestr('mmcv/__init__.py', '')
        if state != 'without operators':
            archive.writestr('mmcv/_ext.cpython-311-x86_64-linux-gnu.so', 'x' * 10000)
    content = wheel.read_bytes()
    if state == 'cut short':
        wheel.write_bytes(content[: len(content) // 2])
    elif state == 'bad byte':
        wheel.write_bytes(content.replace(b'x' * 10000, b'x' * 9999 + b'y'))
    function = (
        'eval "$(sed -n "/^wheel_is_good()/,/^}/p" "$1")"; wheel_is_good "$2" "$3"'
    )
    done = subprocess.run(
        ['bash', '-c', function, '-', str(SCRIPT), sys.executable, str(wheel)]
    )
    assert (done.returncode == 0) == (state == 'good')
