"""What users get wrong: one clear message each, and nothing is written."""

import contextlib
import ctypes
import os
import shutil
import socket
from types import SimpleNamespace

import bad_input
import pytest
import tiny
from mmdet.registry import DATASETS
from mmengine.config import Config
from torch.nn import Module

from convmlp_mm.hooks import CheckDataHook
from convmlp_mm.launch import check_data


def snapshot(folder):
    """What is in a folder."""
    return {
        path.relative_to(folder): path.read_bytes() if path.is_file() else None
        for path in folder.rglob('*')
    }


def checkpoints(folder):
    """What is in a work dir beside its logs and the configuration."""
    files = (path for path in folder.glob('*') if path.is_file())
    return {path.name: path.read_bytes() for path in files if path.suffix != '.py'}


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('good') / 'data'
    tiny.write_data(folder)
    return folder


@pytest.fixture
def paths(data, tmp_path, monkeypatch, tool):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    # They only enter the log, and take most of the time.
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    # Loggers of earlier runs write to streams that were captured.
    monkeypatch.setattr('logging.raiseExceptions', False)
    shutil.copytree(data, tmp_path / 'data')
    config, work = tmp_path / 'recipe.py', tmp_path / 'work'

    def train():
        name = f'experiment_name={tmp_path.name}_before'
        command = 'train.py', config, '--work-dir', work, '--cfg-options', name
        assert tool(*command).returncode == 0

    return SimpleNamespace(
        data=tmp_path / 'data',
        config=config,
        work=work,
        checkpoint=tmp_path / 'weights.pth',
        train=train,
    )


def message_of(tool, *command):
    """Run a tool that must fail, and return what it says."""
    try:
        done = tool(*command)
    except Exception as error:
        return f'{type(error).__name__}: {error}'
    assert done.returncode not in (0, None), done.stdout + done.stderr
    assert 'Traceback' not in done.stderr
    return [line for line in done.stderr.splitlines() if line][-1]


def options(paths, row):
    arguments = row.arguments(paths) if hasattr(row, 'arguments') else []
    if '--work-dir' not in arguments:
        arguments = [*arguments, '--work-dir', paths.work]
    name = f'experiment_name={paths.work.parent.name}'
    return [*arguments, '--cfg-options', name, *row.options]


@pytest.mark.parametrize('row', bad_input.CASES)
def test_mistake_ends_the_run_and_is_named(paths, row, tool):
    tiny.write_config(paths.config, row.kind, paths.data)
    if row.spoil:
        row.spoil(paths)
    before, saved = snapshot(paths.data), checkpoints(paths.work)
    weights = [paths.checkpoint] if row.tool == bad_input.TEST else []
    with getattr(row, 'during', contextlib.nullcontext)():
        command = row.tool, paths.config, *weights, *options(paths, row)
        message = message_of(tool, *command)
    for words in row.words:
        assert words in message
    assert snapshot(paths.data) == before
    assert checkpoints(paths.work) == saved


@pytest.mark.parametrize(
    ('launcher', 'variables', 'is_read'),
    [
        ('none', {}, True),
        # Of processes that torchrun or srun alone has started, the first reads.
        ('pytorch', dict(RANK='0'), True),
        ('pytorch', dict(RANK='1'), False),
        ('slurm', dict(SLURM_PROCID='1'), False),
        # The launchers of this package have run --check.
        ('pytorch', dict(RANK='0', CONVMLP_MM_ATTEMPT='0'), False),
    ],
)
def test_annotations_are_read_once_in_a_launch(
    paths, monkeypatch, launcher, variables, is_read
):
    tiny.write_config(paths.config, 'detector', paths.data)
    (paths.data / bad_input.JSON).write_text('{}')
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    cfg = Config.fromfile(paths.config)
    cfg.launcher = launcher
    message = r"boxes.json' is wrong: KeyError\('images'\)"
    expected = pytest.raises(ValueError, match=message)
    with expected if is_read else contextlib.nullcontext():
        check_data(cfg, ('train', 'val'))


def test_class_without_a_category_is_found_without_our_tools(paths):
    tiny.write_config(paths.config, 'detector', paths.data)
    loader = Config.fromfile(paths.config).train_dataloader
    loader.dataset.metainfo.classes = ('apple', 'plum')
    loader.dataset = DATASETS.build(loader.dataset)
    runner = SimpleNamespace(model=Module(), train_dataloader=loader, val_loop=None)
    with pytest.raises(ValueError, match=r'train_dataloader.dataset has 2 names .* 1 '):
        CheckDataHook().before_train(runner)


class Capabilities(ctypes.Structure):
    _fields_ = [(f'{kind}{i}', ctypes.c_uint32) for i in (0, 1) for kind in 'epi']


@pytest.fixture
def permissions():
    """Let permissions hold for root, too, who otherwise reads and writes all."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, held = (ctypes.c_uint32 * 2)(0x20080522, 0), Capabilities()
    assert libc.capget(header, ctypes.byref(held)) == 0
    dropped = Capabilities.from_buffer_copy(held)
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH; what is permitted can come back.
    dropped.e0 &= ~0b110
    assert libc.capset(header, ctypes.byref(dropped)) == 0
    yield
    assert libc.capset(header, ctypes.byref(held)) == 0


ELASTIC = 'convmlp_mm.launch.elastic'
WEIGHTS = 'load_from=http://127.0.0.1:9/weights.pth'


@pytest.mark.parametrize(
    ('locked', 'changes', 'words'),
    [
        ('data/images/1.jpg', [], ['Permission denied', "images/1.jpg' cannot be lo"]),
        ('data/boxes.json', [], ['Permission denied', "boxes.json'"]),
        ('data/images', [], ['Permission denied', "images/1.jpg'"]),
        ('work', [], ['Permission denied', "/work/run'"]),
        ('cache', [WEIGHTS], ['Permission denied', "/cache/hub'"]),
    ],
)
def test_what_may_not_be_read_or_written_is_named(
    paths, tool, permissions, locked, changes, words
):
    tiny.write_config(paths.config, 'detector', paths.data)
    target = paths.data.parent / locked
    if not target.exists():
        target.mkdir()
    before = snapshot(paths.data)
    target.chmod(0o000 if locked.startswith('data') else 0o500)
    try:
        command = ['train.py', paths.config, '--work-dir', paths.work / 'run']
        message = message_of(tool, *command, '--cfg-options', 'launcher=none', *changes)
    finally:
        target.chmod(0o700)
    for part in words:
        assert part in message
    assert snapshot(paths.data) == before
    assert not list(paths.work.rglob('*.pth'))


RECIPE, IMAGES, OUT, BUSY = 'RECIPE', 'data/images', 'out', 'BUSY'
PREDICT = ['predict.py', RECIPE, 'none.pth']


@pytest.mark.parametrize(
    ('command', 'words'),
    [
        (
            ['predict.py', 'no_such', 'none', IMAGES, '--out', OUT],
            ["no configuration 'no_such'", 'retinanet_convmlp_s'],
        ),
        (
            ['predict.py', 'ablation/pure_mlp_100e', 'published', IMAGES, '--out', OUT],
            ["'ablation/pure_mlp_100e' has no published weights"],
        ),
        ([*PREDICT, IMAGES, '--out', OUT], ["checkpoint 'none.pth' does not exist"]),
        ([*PREDICT, 'no/images', '--out', OUT], ["folder 'no/images' does not exist"]),
        ([*PREDICT, 'empty', '--out', OUT], ["folder 'empty' has no images"]),
        ([*PREDICT, IMAGES, '--out', 'full'], ["results.json' is already there"]),
        ([*PREDICT, IMAGES, '--out', OUT, '--score-thr', '2'], ['in [0, 1], got 2.0']),
        (['export.py', RECIPE, 'none', 'a.onnx', '--format', 'x'], ['invalid', "'x'"]),
        (['export.py', RECIPE, 'none', 'no/a.onnx'], ["folder 'no' does not exist"]),
        (['complexity.py', 'no_such'], ["no configuration 'no_such'"]),
        (['convert_weights.py', 'no.pth', 'a.pth'], ["'no.pth' does not exist"]),
        (['publish_model.py', 'no.pth', 'a.pth'], ["'no.pth' does not exist"]),
        (['analysis/benchmark.py', 'infer', 'no_such'], ["no configuration 'no_such'"]),
        (
            [
                ELASTIC,
                '--rdzv_endpoint',
                f'127.0.0.1:{BUSY}',
                'train.py',
            ],
            [f'error: port {BUSY} of this machine cannot be used', 'set PORT'],
        ),
        (
            [
                ELASTIC,
                '--rdzv_endpoint',
                '127.0.0.1:70000',
                'train.py',
            ],
            ['error: ', '70000'],
        ),
    ],
    ids=lambda value: '-'.join(value[:1] + value[-1:]) if len(value) > 2 else '',
)
def test_other_tools_say_what_is_wrong(paths, tool, command, words):
    tiny.write_config(paths.config, 'classifier', paths.data)
    folder = paths.data.parent
    (folder / 'empty').mkdir()
    (folder / 'full').mkdir()
    (folder / 'full' / 'results.json').write_text('{}')
    before = snapshot(folder)
    command = [paths.config if part == RECIPE else part for part in command]
    with socket.create_server(('', 0)) as server:
        port = str(server.getsockname()[1])
        message = message_of(tool, *(str(c).replace(BUSY, port) for c in command))
    for part in words:
        assert part.replace(BUSY, port) in message
    assert snapshot(folder) == before


def test_more_processes_than_gpus_are_refused(paths, tool, monkeypatch):
    tiny.write_config(paths.config, 'detector', paths.data)
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    message = message_of(tool, 'train.py', paths.config, '--check')
    assert '8 processes need as many GPUs, but 2 are visible' in message
