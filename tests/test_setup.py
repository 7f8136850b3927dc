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

# Stands for uv and for the Python of the environment. mmcv works from the index if
# PUBLISHED is set, and from a folder if there is a wheel in it.
PRETENDED = r"""#!/bin/bash
echo "${0##*/} $*" >>"$CALLS"
case "$*" in
  venv*) mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
  *--find-links\ http*) [[ -n $PUBLISHED ]] && touch "$WORKS" ;;
  *--find-links*) compgen -G "$KEPT/*.whl" && touch "$WORKS" ;;
  *'wheel -v'*) echo ' [1/2] c++' && touch "$KEPT/a.whl" ;;
  *'stack.py works'*) [[ -e $WORKS ]] ;;
  *'stack.py mmcv'*) echo 'mmcv>=1 http://index/page kept' ;;
esac
"""


@pytest.mark.skipif(not find_spec('uv'), reason='needs uv')
def test_lock_fits_the_ranges_and_keeps_the_stacks_apart():
    def uv(*arguments):
        run = [sys.executable, '-m', 'uv', *arguments, '--offline', '--no-cache']
        return subprocess.run(run, cwd=ROOT, capture_output=True, text=True)

    checked = uv('lock', '--check')
    assert checked.returncode == 0, checked.stderr
    both = uv('export', '--frozen', '--extra', 'onedl', '--extra', 'openmmlab')
    assert both.returncode and 'are incompatible' in both.stderr


def test_lock_names_public_files_by_their_hashes():
    lock = (ROOT / 'uv.lock').read_text(encoding='utf-8')
    hosts = set(re.findall(r'://([^/"]+)', lock))
    assert hosts == {'pypi.org', 'files.pythonhosted.org'}
    files = [line for line in lock.splitlines() if 'url = ' in line]
    assert len(files) > 500
    assert all(re.search(r'hash = "sha256:[0-9a-f]{64}"', line) for line in files)


@pytest.mark.parametrize('source', ['index', 'cache', 'compiler'])
def test_mmcv_is_taken_where_it_is_nearest(tmp_path, monkeypatch, source):
    root, kept = tmp_path / 'a checkout', tmp_path / 'convmlp_mm' / 'wheels' / 'kept'
    for folder in (root / 'tools', kept, tmp_path / 'bin'):
        folder.mkdir(parents=True)
    for name in ('uv.lock', 'pyproject.toml', 'tools/setup.sh'):
        shutil.copy(ROOT / name, root / name)
    for name in ('uv', 'python', 'python3', 'c++'):
        (tmp_path / 'bin' / name).write_text(PRETENDED)
        (tmp_path / 'bin' / name).chmod(0o755)
    for name in ('STACK', 'PYTHON', 'CXX'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PATH', f'{tmp_path}/bin:{os.environ["PATH"]}')
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('PUBLISHED', 'yes' if source == 'index' else '')
    for name, path in (('WORKS', 'works'), ('CALLS', 'calls'), ('KEPT', kept)):
        monkeypatch.setenv(name, str(tmp_path / path))
    if source == 'cache':
        (kept / 'a.whl').touch()
    run = ['bash', str(root / 'tools' / 'setup.sh'), 'tests']
    first, second = (subprocess.run(run, capture_output=True, text=True) for _ in '12')
    assert first.stdout == second.stdout == f'{root}/.venv/bin/python\n', first.stderr
    assert second.stderr == '', 'nothing is left to do'
    calls = (tmp_path / 'calls').read_text()
    tried = ['http://index/page', str(kept), str(kept)]
    number = ['index', 'cache', 'compiler'].index(source) + 1
    assert re.findall(r'--find-links (\S+)', calls) == tried[:number]
    assert ('pip wheel' in calls) == (source == 'compiler')
    assert ('compiling mmcv, once: [1/2]' in first.stderr) == (source == 'compiler')
    assert len((ROOT / 'tools' / 'setup.sh').read_text().splitlines()) <= 60
