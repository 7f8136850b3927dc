"""What several test files use."""

import os
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Sub-processes of the tests must find the checkout as this process does.
os.environ['PYTHONPATH'] = os.pathsep.join(
    [str(ROOT)] + [p for p in [os.environ.get('PYTHONPATH')] if p]
)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool as from the command line, but in this process, which is faster."""

    def run(name, *options):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, options)])
        code = 0
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run
