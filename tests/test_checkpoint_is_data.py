"""A checkpoint is data: nothing in it runs, deletes or grows."""

import argparse
import contextlib
import io
import os
import pickle
import resource
import socket
import tarfile
import threading
import zipfile
from collections import Counter

import numpy as np
import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.logging import HistoryBuffer
from mmengine.runner import Runner
from test_weights import TINY, build, detector
from toy import LENGTH, write_config

from convmlp_mm import ConvMLP, checkpoint
from convmlp_mm.checkpoint import fit_checkpoint, read_checkpoint
from convmlp_mm.hooks import checkpoint as saving
from convmlp_mm.hooks import find_latest_checkpoint

# Files


class Program(torch.nn.Module):
    """It makes a file when it is loaded."""

    def __init__(self, path):
        super().__init__()
        self.path: str = path
        self.content = torch.zeros(4)

    @torch.jit.export
    def __getstate__(self):
        return self.path, self.content, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, torch.Tensor, bool]):
        self.path, self.training = state[0], state[2]
        self.content = torch.from_file(self.path, True, 4, dtype=torch.uint8)

    def forward(self, x):
        return x + self.content


def test_program_named_as_a_checkpoint_does_not_run(tmp_path):
    canary, path = tmp_path / 'canary', tmp_path / 'a.pth'
    torch.jit.save(torch.jit.script(Program(str(canary))), str(path))
    with pytest.raises(ValueError, match=r"a\.pth' .* it is a TorchScript archive"):
        read_checkpoint(path)
    assert not canary.exists()


def rewrite(path, change=lambda name, data: data, compression=zipfile.ZIP_STORED):
    """Write the entries of an archive again."""
    with zipfile.ZipFile(path) as archive:
        entries = [(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(path, 'w', compression) as archive:
        for name, data in entries:
            archive.writestr(name, change(name, data))


def test_small_file_of_large_tensors_is_refused_before_it_is_unpacked(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.zeros(2**26)}, path)
    rewrite(path, compression=zipfile.ZIP_DEFLATED)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"a\.pth' .* bytes would become 2684"):
        read_checkpoint(path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16


def test_storage_cannot_reach_beyond_its_entry(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.ones(4)}, path)
    four, many = b'K\x04', b'M\x00\x40'
    rewrite(path, lambda name, data: data.replace(four, many))
    with pytest.raises(ValueError, match='16 bytes'):
        read_checkpoint(path)


def test_entries_of_one_name_are_refused(tmp_path):
    path = tmp_path / 'a.pth'
    torch.save({'w': torch.ones(4)}, path)
    with zipfile.ZipFile(path, 'a') as archive, pytest.warns(UserWarning, match='Dup'):
        archive.writestr(
            next(n for n in archive.namelist() if 'data/0' in n), b'0' * 64
        )
    with pytest.raises(ValueError, match='the same name'):
        read_checkpoint(path)


def with_pickle(path, code):
    """Write an archive whose content is made by these instructions of pickle."""
    torch.save({'w': torch.ones(4)}, path)
    rewrite(path, lambda name, data: code if name.endswith('data.pkl') else data)
    return path


@pytest.mark.parametrize(
    'kind', [Counter, HistoryBuffer, argparse.Namespace], ids=lambda kind: kind.__name__
)
def test_classes_are_not_changed_by_a_pickle(tmp_path, kind):
    name = f'{kind.__module__}\n{kind.__name__}\n'.encode()
    code = b'\x80\x02c' + name + b'N}X\x05\0\0\0spoilK\x01s\x86b.'
    path = with_pickle(tmp_path / 'a.pth', code)
    with contextlib.suppress(ValueError):
        read_checkpoint(path)
    assert not hasattr(kind, 'spoil')


def test_numbers_of_logs_hold_no_addresses(tmp_path):
    class Structured:
        def __reduce__(self):
            return np.dtype, ('V8', False, True)

    torch.save(dict(state_dict={}, x=Structured()), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="not allowed: .*numpy.dtype of 'V8'|V8"):
        read_checkpoint(tmp_path / 'a.pth')


def test_logs_in_a_file_do_not_change_those_of_the_process(tmp_path):
    class Log:
        def __reduce__(self):
            state = dict(vars(HistoryBuffer([1.0], [1])))
            return HistoryBuffer, (), {**state, 'statistics_methods': dict(mean=1)}

    torch.save(dict(log=Log()), tmp_path / 'a.pth')
    read = read_checkpoint(tmp_path / 'a.pth')['log']
    for log in (read, HistoryBuffer([1.0], [1])):
        assert log.statistics('mean') == 1


def test_source_code_in_old_files_is_written_nowhere(tmp_path, monkeypatch):
    # torch compares it with the class, and writes down how they differ.
    monkeypatch.chdir(tmp_path)
    container = b'ccollections\nCounter\nN}X\x0c\0\0\0dump_patches\x88s\x86b'
    source = b'X\x03\0\0\0filX\x05\0\0\0x = 1'
    code = b'\x80\x02(X\x06\0\0\0module' + container + source + b'tQ.'
    parts = [0x1950A86A20F9469CFC6C, 1001, dict(little_endian=True)]
    content = b''.join(pickle.dumps(part, 2) for part in parts) + code
    (tmp_path / 'a.pth').write_bytes(content + pickle.dumps([], 2))
    with pytest.raises(ValueError, match=r'a\.pth'):
        read_checkpoint('a.pth')
    assert os.listdir(tmp_path) == ['a.pth']


def test_tar_archive_is_not_unpacked(tmp_path):
    with tarfile.open(tmp_path / 'a.pth', 'w') as archive:
        pipe = tarfile.TarInfo('storages')
        pipe.type = tarfile.LNKTYPE
        pipe.linkname = 'a'
        archive.addfile(pipe)
    with pytest.raises(ValueError, match=r"a\.pth' is not a file of plain weights"):
        read_checkpoint(tmp_path / 'a.pth')


def test_files_of_old_torch_are_read(tmp_path):
    content = dict(state_dict={'w': torch.rand(3)}, log=HistoryBuffer([1.5], [1]))
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=False)
    read = read_checkpoint(tmp_path / 'a.pth')
    assert torch.equal(read['state_dict']['w'], content['state_dict']['w'])
    assert read['log'].mean() == 1.5


@pytest.mark.parametrize(
    ('content', 'words'),
    [
        (dict(state_dict=[torch.ones(1)]), 'a dict as state_dict, but holds a list'),
        (dict(state_dict={}, meta=[1]), 'a dict as meta, but holds a list'),
        (
            dict(state_dict={}, meta=dict(dataset_meta=[1])),
            'a dict as meta.dataset_meta, but holds a list',
        ),
    ],
)
def test_malformed_content_is_named(tmp_path, content, words):
    torch.save(content, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=words):
        read_checkpoint(tmp_path / 'a.pth')


# Downloads


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server whose files hold their address, but not /silent.pth and /short.pth."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    silent = threading.Event()

    def serve(listener):
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            path = connection.recv(10000).split()[1].decode()
            if path == '/silent.pth':
                threading.Thread(target=silent.wait, args=(20,), daemon=True).start()
                connections.append(connection)
                continue
            buffer = io.BytesIO()
            torch.save({path: torch.ones(1)}, buffer)
            length = b'Content-Length: 100000\r\n' if path == '/short.pth' else b''
            head = b'HTTP/1.0 200 OK\r\n' + length + b'\r\n'
            connection.sendall(head + buffer.getvalue())
            connection.close()

    connections = []
    with socket.create_server(('127.0.0.1', 0)) as listener:
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        yield f'http://127.0.0.1:{listener.getsockname()[1]}'
        silent.set()


def test_files_of_one_name_from_two_addresses_are_two_files(server):
    for path in ('/a/model.pth', '/b/model.pth', '/b/model.pth?v=2'):
        for _ in range(2):
            assert list(read_checkpoint(server + path)) == [path]


def test_silent_server_is_given_up(server, monkeypatch):
    monkeypatch.setattr(checkpoint, 'TIMEOUT', 0.2)
    with pytest.raises(OSError, match='cannot fetch .*silent.pth: timed out'):
        read_checkpoint(f'{server}/silent.pth')


def test_connection_that_breaks_off_is_named(server):
    with pytest.raises(OSError, match='cannot fetch .*short.pth: IncompleteRead'):
        read_checkpoint(f'{server}/short.pth')


# Tensors

WEIGHT = 'stages.0.blocks.0.norm1.weight'
SPOILERS = {
    'int8': (lambda t: t.to(torch.int8), 'another kind of numbers: .*int8 in the file'),
    'bool': (lambda t: t > 0, r'kind of numbers: .* \(torch.bool in the file'),
    'complex': (lambda t: t.to(torch.complex64), 'kind of numbers: .*complex64'),
    'sparse': (lambda t: t.to_sparse(), 'sparse, quantised or without data: '),
    'meta': (lambda t: t.to('meta'), 'sparse, quantised or without data: '),
    'quantised': (
        lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8),
        'sparse, quantised or without data: ',
    ),
    'nan': (lambda t: t * float('nan'), 'with NaN or Inf: '),
    'inf': (lambda t: t + float('inf'), 'with NaN or Inf: '),
    '-inf': (lambda t: t - float('inf'), 'with NaN or Inf: '),
}


def spoilt(state, key, kind):
    return {k: SPOILERS[kind][0](v) if k == key else v for k, v in state.items()}


@pytest.mark.parametrize('kind', SPOILERS)
def test_tensors_that_are_no_weights_are_refused_everywhere(tmp_path, kind):
    state, words = ConvMLP(TINY).state_dict(), SPOILERS[kind][1] + f'.*{WEIGHT}'
    if 'kind of numbers' in words:
        words = words.replace('numbers: ', f'numbers: {WEIGHT}').removesuffix(
            f'.*{WEIGHT}'
        )
    path, model = tmp_path / 'a.pth', detector(num_classes=2)
    whole = spoilt(model.state_dict(), f'backbone.{WEIGHT}', kind)
    words = words.replace(WEIGHT, f'(backbone.)?{WEIGHT}')
    for exact in (False, True):
        with pytest.raises(ValueError, match=words):
            fit_checkpoint(model, whole, 'a.pth', exact=exact)
    with pytest.raises(ValueError, match=words):
        fit_checkpoint(model, spoilt(state, WEIGHT, kind), 'a.pth', partial=True)
    torch.save(spoilt(state, WEIGHT, kind), path)
    # Before 2.6, torch's list for files has no sparse or meta tensors.
    with pytest.raises(ValueError, match=f'{words}|objects that are not allowed'):
        build(path).init_weights()


def test_counter_of_floats_is_refused():
    model = detector(num_classes=2)
    state, key = model.state_dict(), 'backbone.tokenizer.block.1.num_batches_tracked'
    state[key] = torch.tensor(1.0)
    with pytest.raises(
        ValueError, match=f'{key} .torch.float32 in the file, torch.int64'
    ):
        fit_checkpoint(model, state, 'a.pth')


def test_half_precision_is_taken():
    model = detector(num_classes=2)
    half = {
        k: v.half() if v.is_floating_point() else v
        for k, v in model.state_dict().items()
    }
    loaded, message = fit_checkpoint(model, half, 'a.pth')
    assert len(loaded) == len(half) and message.endswith(' from a.pth')


def test_masks_of_attention_are_no_damage():
    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            mask = torch.full((3, 3), float('-inf')).triu(1)
            self.register_buffer('mask', mask)

    model = Masked()
    fit_checkpoint(model, model.state_dict(), 'a.pth')


def test_file_of_timm_is_read_and_its_options_are_data(tmp_path, tool):
    path, out = tmp_path / 'last.pth.tar', tmp_path / 'out.pth'
    model = ConvMLP(TINY)
    state = {f'module.{key}': value + 1 for key, value in model.state_dict().items()}
    args = argparse.Namespace(model='convmlp_s', opt=dict(lr=[0.1]))
    torch.save(dict(epoch=3, args=args, state_dict=state), path)
    read = read_checkpoint(path)['args']
    assert isinstance(read, argparse.Namespace) and vars(read) == vars(args)
    build(path).init_weights()
    done = tool('convert_weights.py', path, out, '--to', 'published')
    assert done.stdout == f"wrote {out}: {len(state)} tensors, layout 'published'\n"
    read = torch.load(out, weights_only=True)
    assert all(torch.equal(read[k.removeprefix('module.')], state[k]) for k in state)


class Canary:
    """Runs when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_conversion_runs_nothing(tmp_path, tool):
    state = ConvMLP(TINY).state_dict()
    canary, path = tmp_path / 'canary', tmp_path / 'a.pth'
    torch.save(dict(state_dict=state, meta=dict(x=Canary(canary))), path)
    done = tool('convert_weights.py', path, tmp_path / 'b.pth')
    assert done.returncode == 2 and 'not allowed: posix.mkdir' in done.stderr
    assert os.listdir(tmp_path) == ['a.pth']


@pytest.mark.parametrize('kind', ['inf', 'nan'])
def test_spoilt_weights_are_neither_converted_nor_published(tmp_path, tool, kind):
    path, out = tmp_path / 'a.pth', tmp_path / 'b.pth'
    torch.save(spoilt(ConvMLP(TINY).state_dict(), WEIGHT, kind), path)
    for name in ('convert_weights.py', 'publish_model.py'):
        done = tool(name, path, out)
        assert done.returncode == 2
        assert "a.pth' cannot be used: 1 with NaN or Inf: " in done.stderr
        assert WEIGHT in done.stderr
    assert os.listdir(tmp_path) == ['a.pth']


def test_expanded_tensor_is_refused(tmp_path, tool):
    torch.save({'a': torch.zeros(1).expand(2**40)}, tmp_path / 'a.pth')
    done = tool('publish_model.py', tmp_path / 'a.pth', tmp_path / 'b.pth')
    assert done.returncode == 2 and 'without data: a' in done.stderr


# Runs


def build_run(folder, resume=True, load_from=None, **changes):
    """A run of the toy with all hooks that have to do with checkpoints."""
    folder.mkdir(exist_ok=True, parents=True)
    hook = dict(type='SafeCheckpointHook', interval=1) | changes.pop('checkpoint', {})
    names = 'CheckWeightsHook', 'FiniteLossHook', 'ExactResumeHook'
    hooks = [*(dict(type=name) for name in names), *changes.pop('hooks', [])]
    path = write_config(
        folder / 'toy.py',
        hooks,
        default_hooks=dict(checkpoint=hook, logger=dict(type='LoggerHook', interval=1)),
        log_level='WARNING',
        **changes,
    )
    cfg = Config.fromfile(path)
    cfg.work_dir, cfg.resume, cfg.load_from = str(folder / 'work'), resume, load_from
    cfg.experiment_name, cfg.env_cfg = f'run{os.urandom(8).hex()}', dict()
    return Runner.from_cfg(cfg)


def run(folder, **options):
    runner = build_run(folder, **options)
    runner.train()
    return runner


def files(folder):
    return sorted(p.name for p in (folder / 'work').iterdir() if p.suffix == '.pth')


def change(path, function):
    content = torch.load(path, weights_only=False)
    function(content)
    torch.save(content, path)


def info(content):
    return content['message_hub']['runtime_info']


@pytest.mark.parametrize('named', [False, True])
def test_configuration_in_a_checkpoint_is_not_executed(tmp_path, named):
    run(tmp_path, epochs=1)
    path, canary = tmp_path / 'work' / 'epoch_1.pth', tmp_path / 'canary'
    text = f'__import__("os").mkdir({str(canary)!r})'
    change(path, lambda c: c['meta'].update(config=text))
    runner = run(tmp_path, load_from=str(path) if named else None)
    assert not canary.exists()
    assert runner.iter == 2 * LENGTH


def test_tools_check_the_checkpoints_of_any_configuration(tmp_path, tool):
    # As that of a toolkit, without a hook of this package.
    tiny.write_data(tmp_path / 'data')
    config, canary = tmp_path / 'recipe.py', tmp_path / 'canary'
    tiny.write_config(config, 'classifier', tmp_path / 'data')
    with config.open('a') as file:
        file.write(
            'custom_hooks = []\nmodel["backbone"] = dict(type="ResNet", depth=18,'
        )
        file.write('out_indices=(3,))\nmodel["head"]["in_channels"] = 512\n')
        file.write('default_hooks["checkpoint"]["type"] = "CheckpointHook"\n')
    command = 'train.py', config, '--work-dir', tmp_path / 'work', '--cfg-options'
    name = f'experiment_name={os.urandom(8).hex()}'
    assert tool(*command, f'{name}a').returncode == 0
    text = f'__import__("os").mkdir({str(canary)!r})'
    change(tmp_path / 'work' / 'epoch_1.pth', lambda c: c['meta'].update(config=text))
    done = tool(*command, f'{name}b', 'train_cfg.max_epochs=2', '--resume')
    assert done.returncode == 0 and not canary.exists()
    assert files(tmp_path)[-1] == 'epoch_2.pth'


FILES = ['../victim/file.pth', '{folder}/victim/file.pth', 'mine.pth']
FOREIGN = {
    'preempted_ckpt': ['../victim', 'victim', 'iter_0.pth', *FILES],
    'keep_ckpt_ids': [['../victim', 1, 2, 'victim', None], '../victim', [0, 0, 0]],
    'best_ckpt': ['{folder}/victim/file.pth', '{folder}/victim', '../victim', 5],
    'last_ckpt': ['{folder}/victim/file.pth'],
}


def snapshot(folder):
    return {p: p.read_bytes() for p in folder.rglob('*.pth') if p.is_file()}


@pytest.mark.parametrize('kind', ['SafeCheckpointHook', 'CheckpointHook'])
@pytest.mark.parametrize('key', FOREIGN)
def test_names_in_a_checkpoint_delete_nothing(tmp_path, key, kind):
    """Folders, files elsewhere, and files of the work dir that the run has not made."""
    work = tmp_path / 'work'
    options = dict(type=kind, max_keep_ckpts=1, save_best='count', rule='less')
    changes = dict(checkpoint=options, epochs=1, val_cfg={})
    loader = dict(
        dataset=dict(type='Numbers', length=4),
        batch_size=2,
        sampler=dict(type='DefaultSampler', shuffle=False),
        collate_fn=dict(type='default_collate'),
    )
    changes.update(val_dataloader=loader, val_evaluator=dict(type='Count'))
    run(tmp_path, **changes)
    content = (work / 'epoch_1.pth').read_bytes()
    victims = [tmp_path / 'victim', work / 'victim', work / 'iter_0.pth']
    for victim in (*victims, work / 'epoch_0.pth'):
        victim.mkdir()
        (victim / 'file.pth').write_bytes(content)
    (work / 'mine.pth').write_bytes(content)
    before = snapshot(tmp_path)
    for value in FOREIGN[key]:
        (work / 'epoch_1.pth').write_bytes(content)
        text = repr(value).replace('{folder}', str(tmp_path))

        def write(c, text=text):
            info(c)[key] = eval(text)
            info(c)['best_score'] = 1000

        change(work / 'epoch_1.pth', write)
        before.pop(work / 'epoch_1.pth', None)
        changes['epochs'] += 1
        run(tmp_path, load_from=str(work / 'epoch_1.pth'), **changes)
        after = snapshot(tmp_path)
        lost = [p for p in before if p not in after or after[p] != before[p]]
        assert set(lost) <= {work / 'best_count_epoch_1.pth'}
        strange = [
            p for p in after if p not in before and p.parent not in (work, tmp_path)
        ]
        assert not [p for p in strange if p.suffix == '.pth']


def test_checkpoint_of_another_run_deletes_nothing_of_this_one(tmp_path):
    a, b = tmp_path / 'a', tmp_path / 'b'
    stop = dict(
        type='SignalOnce', marker=str(a / 'marker'), name='SIGTERM', iteration=2
    )
    with pytest.raises(SystemExit):
        run(a, hooks=[stop])
    assert files(a) == ['iter_2.pth']
    (b / 'work').mkdir(parents=True)
    (b / 'work' / 'iter_2.pth').write_text('of another run')
    run(b, load_from=str(a / 'work' / 'iter_2.pth'))
    assert files(b) == ['epoch_1.pth', 'epoch_2.pth', 'iter_2.pth']
    assert (b / 'work' / 'iter_2.pth').read_text() == 'of another run'
    assert files(a) == ['iter_2.pth']
    # In its own folder, the run removes it, and forgets it.
    run(a)
    assert files(a) == ['epoch_1.pth', 'epoch_2.pth']
    last = read_checkpoint(a / 'work' / 'epoch_2.pth')
    assert 'preempted_ckpt' not in info(last)


def test_resuming_from_other_names_is_refused(tmp_path):
    run(tmp_path, epochs=1)

    def rename(content):
        state = content['state_dict']
        content['state_dict'] = {f'former_{key}': state[key] for key in state}

    change(tmp_path / 'work' / 'epoch_1.pth', rename)
    words = "epoch_1.pth' does not fit this Toy.*2 missing: linear.*2 unknown: former_"
    with pytest.raises(ValueError, match=words):
        run(tmp_path)
    assert files(tmp_path) == ['epoch_1.pth']


def put(key, value):
    *path, last = key.split('.')

    def write(content):
        for part in path:
            content = content[int(part) if part.isdigit() else part]
        content[last] = value

    return write


def broken_log(content):
    log = HistoryBuffer([1.0], [1])
    log._count_history = 'spoilt'
    content['message_hub']['log_scalars']['train/loss'] = log


MALFORMED = {
    'epoch': (put('meta.epoch', -2), 'meta.epoch is -2'),
    'iteration': (put('meta.iter', 'four'), "meta.iter is 'four'"),
    'no meta': (put('meta', None), 'it has no meta.epoch, meta.iter'),
    'meta': (put('meta', [1]), 'must hold a dict as meta, but holds a list'),
    'message hub': (put('message_hub.log_scalars', 3), 'log_scalars is no dict'),
    'no message hub': (put('message_hub', {}), 'it has no message_hub'),
    'log': (broken_log, 'message_hub.log_scalars.train/loss is no log'),
    'no weights': (put('state_dict', {}), 'it has no state_dict'),
    'infinite optimizer': (
        put('optimizer.state.0.momentum_buffer', torch.tensor(float('inf'))),
        'NaN or Inf in optimizer.state.0.momentum_buffer',
    ),
    'infinite weights': (
        put('state_dict.linear.bias', None),
        'NaN or Inf in state_dict.linear.bias',
    ),
    'exact resume': (put('exact_resume', [1]), 'exact_resume is damaged: TypeError'),
    'seed': (put('exact_resume.seed', 'x'), 'exact_resume is damaged'),
    'random numbers': (put('exact_resume.processes.0.random', {}), 'damaged: KeyError'),
    'negative batches': (put('exact_resume.batches', -3), 'exact_resume is damaged'),
    'many batches': (put('exact_resume.batches', 10**18), 'exact_resume is damaged'),
}


@pytest.fixture(scope='module')
def two_epochs(tmp_path_factory):
    folder = tmp_path_factory.mktemp('run')
    run(folder)
    return {name: (folder / 'work' / name).read_bytes() for name in files(folder)}


@pytest.mark.parametrize('kind', MALFORMED)
def test_malformed_checkpoint_is_named_and_the_one_before_is_taken(
    tmp_path, two_epochs, monkeypatch, kind
):
    spoil, words = MALFORMED[kind]
    if kind == 'infinite weights':
        spoil = lambda c: c['state_dict']['linear.bias'].fill_(float('inf'))  # noqa: E731
    work = tmp_path / 'work'
    work.mkdir()
    for name, content in two_epochs.items():
        (work / name).write_bytes(content)
    change(work / 'epoch_2.pth', spoil)
    os.utime(work / 'epoch_1.pth', (0, 0))
    lines = []
    monkeypatch.setattr(saving, 'print_log', lambda line, **_: lines.append(line))
    assert find_latest_checkpoint(work) == str(work / 'epoch_1.pth')
    (line,) = lines
    assert words in line
    with pytest.raises(ValueError, match=r"epoch_2\.pth'") as error:
        run(tmp_path, load_from=str(work / 'epoch_2.pth'), epochs=3)
    assert words in str(error.value)


def spoil_hook(where, name):
    from mmengine.hooks import Hook

    class Spoil(Hook):
        """In the last iteration before the second checkpoint."""

        def after_train_iter(self, runner, **kwargs):
            if runner.iter + 1 == 2 * LENGTH:
                bias = runner.model.linear.bias
                target = runner.optim_wrapper.optimizer.state[bias]
                tensor = bias.data if where == 'bias' else target['momentum_buffer']
                tensor.fill_(float(name))

    return Spoil()


@pytest.mark.parametrize('value', ['inf', '-inf', 'nan'])
@pytest.mark.parametrize('where', ['bias', 'momentum'])
def test_spoilt_run_keeps_its_good_checkpoint_and_names_it(tmp_path, where, value):
    runner = build_run(tmp_path, checkpoint=dict(max_keep_ckpts=1))
    runner.register_hook(spoil_hook(where, value), 'VERY_HIGH')
    words = f'NaN or Inf in .*{where}.* before it is {tmp_path}/work/epoch_1.pth$'
    with pytest.raises(FloatingPointError, match=words):
        runner.train()
    assert files(tmp_path) == ['epoch_1.pth']
    assert run(tmp_path).iter == 2 * LENGTH
