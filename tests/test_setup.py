"""The lock file, and tools/setup.sh with a pretended uv, pip and compiler."""

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCK = (ROOT / 'uv.lock').read_text(encoding='utf-8')

# Stands for uv and for the Python of the environment. mmcv works from the index if
# PUBLISHED is set, and from a folder if there is a wheel in it.
PRETENDED = r"""#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
case "$*" in
  venv*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *--find-links\ http*) [[ -n $PUBLISHED ]] && touch "$WORKS" ;;
  *--find-links*) compgen -G "$XDG_CACHE_HOME/*/wheels/kept/*.whl" && touch "$WORKS" ;;
  *'wheel -v'*) echo ' [1/2] c++' && touch "${@: -1}/a.whl" ;;
  *'stack.py works'*) [[ -e $WORKS ]] ;;
  *'stack.py mmcv'*) echo 'mmcv>=1 http://index/page kept' ;;
esac
"""


def uv(*arguments):
    command = [sys.executable, '-m', 'uv', *arguments, '--offline', '--no-cache']
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.skipif(not find_spec('uv'), reason='needs uv')
def test_lock_fits_the_ranges_and_holds_one_stack_at_a_time():
    checked = uv('lock', '--check')
    assert checked.returncode == 0, checked.stderr
    both = uv('export', '--frozen', '--extra', 'onedl', '--extra', 'openmmlab')
    assert both.returncode != 0 and len(both.stderr.splitlines()) == 1
    assert 'Extras `onedl` and `openmmlab` are incompatible' in both.stderr


def test_lock_names_public_files_by_their_hashes():
    hosts = set(re.findall(r'://([^/"]+)', LOCK))
    assert hosts == {'pypi.org', 'files.pythonhosted.org'}
    files = [line for line in LOCK.splitlines() if 'url = ' in line]
    assert len(files) > 500
    assert all(re.search(r'hash = "sha256:[0-9a-f]{64}"', line) for line in files)


@pytest.mark.parametrize('source', ['index', 'cache', 'compiler'])
def test_mmcv_is_taken_where_it_is_nearest(tmp_path, source):
    root, bin, cache = tmp_path / 'a checkout', tmp_path / 'bin', tmp_path / 'cache'
    (root / 'tools').mkdir(parents=True)
    bin.mkdir()
    for name in ('uv.lock', 'pyproject.toml', 'tools/setup.sh'):
        shutil.copy(ROOT / name, root / name)
    for name in ('uv', 'python', 'python3', 'c++'):
        (bin / name).write_text(PRETENDED)
        (bin / name).chmod(0o755)
    if source == 'cache':
        (cache / 'convmlp_mm' / 'wheels' / 'kept').mkdir(parents=True)
        (cache / 'convmlp_mm' / 'wheels' / 'kept' / 'a.whl').touch()
    calls = tmp_path / 'calls'
    settings = {
        'PATH': f'{bin}:{os.environ["PATH"]}',
        'XDG_CACHE_HOME': str(cache),
        'PUBLISHED': 'yes' if source == 'index' else '',
        'WORKS': str(tmp_path / 'works'),
        'CALLS': str(calls),
    }
    kept = {k: v for k, v in os.environ.items() if k not in ('STACK', 'PYTHON', 'CXX')}
    run = ['bash', str(root / 'tools' / 'setup.sh'), 'tests']
    first, second = (
        subprocess.run(run, env={**kept, **settings}, capture_output=True, text=True)
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout == f'{root}/.venv/bin/python\n'
    assert second.stderr == '', 'nothing is left to do'
    lines = calls.read_text().splitlines()
    places = [re.search(r'--find-links (\S+)', line) for line in lines]
    folder = f'{cache}/convmlp_mm/wheels/kept'
    assert [place.group(1) for place in places if place] == {
        'index': ['http://index/page'],
        'cache': ['http://index/page', folder],
        'compiler': ['http://index/page', folder, folder],
    }[source]
    assert any('pip wheel' in line for line in lines) == (source == 'compiler')
    assert ('compiling mmcv, once: [1/2]' in first.stderr) == (source == 'compiler')


def test_shell_of_the_set_up_is_short():
    assert len((ROOT / 'tools' / 'setup.sh').read_text().splitlines()) <= 60
