"""What several test files use."""

import gc
import os
import runpy
import signal
import sys
from collections import OrderedDict
from multiprocessing import active_children
from pathlib import Path
from types import SimpleNamespace

import pytest
from mmengine.logging import MMLogger
from mmengine.visualization import Visualizer
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

ROOT = Path(__file__).resolve().parents[1]
# Sub-processes of the tests must find the checkout as this process does.
os.environ['PYTHONPATH'] = os.pathsep.join(
    [str(ROOT)] + [p for p in [os.environ.get('PYTHONPATH')] if p]
)
# Where Python itself looks for what the scripts in them import.
sys.path += [str(ROOT / name) for name in ('tools', 'tools/analysis', 'docs')]
# Launchers of tests that run at once must not meet at a port.
WORKER = int(os.environ.get('PYTEST_XDIST_WORKER', 'gw0')[2:])
os.environ['PORT'] = str(29500 + 10 * WORKER)


def pytest_collection_modifyitems(items):
    """Begin with what takes long, each on its own; keep the rest of a file together.

    Several processes share them (``--dist loadgroup``), but not their fixtures.
    """
    items.sort(key=lambda item: 'slow' not in item.keywords)
    for item in items:
        if not {'slow', 'xdist_group'} & set(item.keywords):
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(autouse=True)
def signals_of_the_process():
    """A training that a test has run in this process may have taken them over."""
    numbers = (signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def end_workers():
    """End those that a training has left: the garbage collector waits 5 s for each.

    It closes their queues before the loader can tell them to end.
    """
    for each in gc.get_objects() if active_children() else ():
        if type(each) is _MultiProcessingDataLoaderIter:
            each._shutdown_workers()


@pytest.fixture(autouse=True)
def workers_of_the_process():
    yield
    end_workers()


@pytest.fixture(autouse=True)
def plain_logs(monkeypatch):
    """Most of the time of a short run goes into the layout of what it logs."""
    monkeypatch.setattr(
        'yapf.yapflib.yapf_api.FormatCode', lambda text, **_: (text, True)
    )
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)


@pytest.fixture
def tool(monkeypatch, capsys):
    """Run a tool or module as from the command line, but in this process: faster."""

    def run(name, *options):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, options)])
        # Other runs in this process have left theirs. Two of one recipe in the same
        # second would share a logger, which writes to where output went before.
        for kind in (MMLogger, Visualizer, *Visualizer.__subclasses__()):
            monkeypatch.setattr(kind, '_instance_dict', OrderedDict())
        code = 0
        path = ROOT / 'tools' / name
        try:
            if path.exists():
                runpy.run_path(str(path), run_name='__main__')
            else:
                runpy.run_module(name, run_name='__main__')
        except SystemExit as stop:
            code = stop.code or 0
        end_workers()
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=code, stdout=out, stderr=err)

    return run
