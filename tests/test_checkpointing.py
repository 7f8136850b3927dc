"""A good checkpoint is always there, and is what a run goes on from."""

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from mmengine import fileio
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from tiny import full_disk
from torch.utils.data import Dataset

from convmlp_mm.checkpoint import read_checkpoint, remove_leftovers
from convmlp_mm.hooks import find_latest_checkpoint
from convmlp_mm.hooks.checkpoint import (
    AtomicLocalBackend,
    NotSavedError,
    checkpoint_hooks,
)

# In bytes: the toy's checkpoint is larger than this, and its logs are smaller.
LIMIT = 2**20


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(LIMIT // 2))

    def forward(self, inputs, mode='tensor'):
        if mode == 'loss':
            return dict(loss=(self.weight[0] - inputs[0].mean()).square())
        return inputs


class Numbers(Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, i):
        return dict(inputs=torch.ones(3))


class Scores(BaseMetric):
    """What the test says, one score for each validation."""

    def __init__(self, scores):
        super().__init__()
        self.scores = [list(s) if isinstance(s, tuple) else [s] for s in scores]

    def process(self, *_):
        self.results.append(0)

    def compute_metrics(self, _):
        return dict(zip(('acc', 'mAP'), self.scores.pop(0)))


class Calls(Hook):
    """Do something at the beginning of some epochs or before some saves."""

    priority = 'VERY_HIGH'

    def __init__(self, epochs=None, gather=None):
        self.epochs, self.gather = epochs or {}, gather

    def before_train_epoch(self, runner):
        self.epochs.get(runner.epoch + 1, lambda: None)()

    def before_gather_state(self, runner):
        if self.gather is not None:
            self.gather(runner)


def build(work_dir, epochs=1, scores=None, calls=None, by_epoch=True, **options):
    """A run of two iterations an epoch."""
    start = {k: options.pop(k) for k in ('resume', 'load_from') if k in options}
    sampler = 'DefaultSampler' if by_epoch else 'InfiniteSampler'
    loader = dict(batch_size=1, num_workers=0, dataset=Numbers())
    loop = dict(by_epoch=True, max_epochs=epochs)
    if not by_epoch:
        loop = dict(by_epoch=False, max_iters=2 * epochs, val_interval=2)
    validation = {}
    if scores is not None:
        validation = dict(
            val_dataloader=dict(loader, sampler=dict(type='DefaultSampler')),
            val_cfg=dict(),
            val_evaluator=[Scores(scores)],
        )
    options = dict(interval=1) | options
    return Runner(
        Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(loader, sampler=dict(type=sampler)),
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)),
        default_hooks=dict(
            checkpoint=dict(type='SafeCheckpointHook', by_epoch=by_epoch, **options)
        ),
        custom_hooks=[calls] if calls else [],
        log_level='WARNING',
        experiment_name=f'run{time.monotonic_ns()}',
        **validation,
        **start,
    )


def train(work_dir, *args, **kwargs):
    runner = build(work_dir, *args, **kwargs)
    runner.train()
    return runner


def saved(folder):
    """The files but for the configuration, which the Runner writes as well."""
    files = (p for p in folder.iterdir() if p.is_file() and p.suffix != '.py')
    return sorted(p.name for p in files)


def contents(folder):
    return {name: (folder / name).read_bytes() for name in saved(folder)}


def info(path):
    return read_checkpoint(path)['message_hub']['runtime_info']


def hook_of(runner):
    (hook,) = checkpoint_hooks(runner)
    return hook


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_backend_replaces_whole_files_and_makes_folders(tmp_path):
    backend = fileio.get_file_backend(backend_args=dict(backend='atomic_local'))
    assert isinstance(backend, AtomicLocalBackend)
    path = tmp_path / 'new' / 'a.pth'
    backend.put(b'long content', path)
    backend.put(b'short', path)
    assert path.read_bytes() == b'short'
    with full_disk(LIMIT), pytest.raises(OSError, match='File too large'):
        backend.put(bytes(2 * LIMIT), path)
    assert path.read_bytes() == b'short'
    assert saved(path.parent) == ['a.pth']


def test_kill_in_the_middle_of_a_save_leaves_the_old_file(tmp_path):
    train(tmp_path)
    before = (tmp_path / 'epoch_1.pth').read_bytes()
    child = (
        'import os, sys, time\n'
        'from convmlp_mm.hooks.checkpoint import AtomicLocalBackend\n'
        'def slow(_):\n'
        '    print("half-way", flush=True)\n'
        '    time.sleep(600)\n'
        'os.fsync = slow\n'
        'AtomicLocalBackend().put(bytes(10**6), sys.argv[1])\n'
    )
    command = [sys.executable, '-c', child, str(tmp_path / 'epoch_1.pth')]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b'half-way\n'
        process.send_signal(signal.SIGKILL)
    assert (tmp_path / 'epoch_1.pth').read_bytes() == before
    (leftover,) = tmp_path.glob('.*.tmp')
    assert leftover.name.startswith('.epoch_1.pth.')
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')

    (tmp_path / '.mine.tmp').touch()
    train(tmp_path, 2, resume=True)
    assert saved(tmp_path) == [
        '.mine.tmp',
        'epoch_1.pth',
        'epoch_2.pth',
        'last_checkpoint',
    ]


def test_only_unfinished_files_are_taken_for_leftovers(tmp_path):
    names = ['.a.pth.0_a9zzzz.tmp', '.a.pth.0_a9zzz.tmp', 'a.pth.0_a9zzzz.tmp', '.tmp']
    for name in names:
        (tmp_path / name).touch()
    assert remove_leftovers(tmp_path) == names[:1]
    assert saved(tmp_path) == sorted(names[1:])


@pytest.mark.parametrize('by_epoch', [True, False])
def test_old_checkpoint_is_removed_after_the_new_one_is_there(
    tmp_path, monkeypatch, by_epoch
):
    events = []
    replace, remove = os.replace, fileio.LocalBackend.remove
    monkeypatch.setattr(
        os, 'replace', lambda a, b: (replace(a, b), events.append(f'+{b}'))
    )
    monkeypatch.setattr(
        fileio.LocalBackend,
        'remove',
        lambda self, path: (remove(self, path), events.append(f'-{path}')),
    )
    step = 1 if by_epoch else 2
    name = 'epoch' if by_epoch else 'iter'
    train(tmp_path, 3, by_epoch=by_epoch, interval=step, max_keep_ckpts=1)
    events = [e.replace(f'{tmp_path}/', '') for e in events]
    new = [f'{name}_{step * i}.pth' for i in (1, 2, 3)]
    assert events == [
        *(f'+{new[0]}', '+last_checkpoint'),
        *(f'+{new[1]}', '+last_checkpoint', f'-{new[0]}'),
        *(f'+{new[2]}', '+last_checkpoint', f'-{new[1]}'),
    ]
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / new[2])
    assert info(tmp_path / new[2])['keep_ckpt_ids'] == [3 * step]


def test_former_best_is_removed_once_the_last_checkpoint_knows_the_new_one(
    tmp_path, monkeypatch
):
    removed = []
    remove = fileio.LocalBackend.remove

    def record(self, path):
        removed.append((os.path.basename(path), info(tmp_path / 'epoch_2.pth')))
        remove(self, path)

    monkeypatch.setattr(fileio.LocalBackend, 'remove', record)
    train(tmp_path, 3, [0.1, 0.3, 0.2], save_best='auto', rule='greater')
    ((name, known),) = removed
    assert name == 'best_acc_epoch_1.pth'
    assert known['best_ckpt'] == str(tmp_path / 'best_acc_epoch_2.pth')
    assert known['best_score'] == 0.3
    assert saved(tmp_path) == [
        'best_acc_epoch_2.pth',
        *(f'epoch_{i}.pth' for i in (1, 2, 3)),
        'last_checkpoint',
    ]


def test_each_of_several_metrics_keeps_its_best(tmp_path):
    scores = [(0.1, 0.5), (0.3, 0.4), (0.2, 0.6)]
    train(tmp_path, 3, scores, save_best=['acc', 'mAP'], max_keep_ckpts=1)
    assert saved(tmp_path) == [
        'best_acc_epoch_2.pth',
        'best_mAP_epoch_3.pth',
        'epoch_3.pth',
        'last_checkpoint',
    ]


@pytest.mark.parametrize('options', [{}, dict(save_best='acc')])
def test_validation_without_a_training_saves_nothing(tmp_path, options):
    assert build(tmp_path, scores=[0.1], **options).val() == dict(acc=0.1)
    assert saved(tmp_path) == []


def test_name_that_is_used_again_is_not_removed(tmp_path):
    options = dict(max_keep_ckpts=1, save_best='acc', rule='less')
    train(tmp_path, 1, [0.1], **options)
    # As a run that goes on from an earlier checkpoint.
    runner = build(tmp_path, 2, [0.05], resume=True, **options)
    hook = hook_of(runner)
    again = ['epoch_2.pth', 'best_acc_epoch_2.pth']
    runner.register_hook(Calls({2: lambda: hook.file_backend.replaced.extend(again)}))
    # The best one that comes after the validation has the latest saved once more.
    between, first = Hook(), []
    between.before_val = lambda runner: first.append(saved(tmp_path))
    runner.register_hook(between)
    runner.train()
    assert 'epoch_2.pth' in first[-1]
    assert saved(tmp_path) == ['best_acc_epoch_2.pth', 'epoch_2.pth', 'last_checkpoint']


# What fails at epoch 3: when the disk is full, which file is named, which is the last
# good checkpoint, and what the saves that went well before have replaced.
FAILURES = {
    'latest': ('before_train_epoch', 'epoch_3.pth', 2, ()),
    'best': ('before_val', 'best_acc_epoch_3.pth', 3, ('epoch_2.pth',)),
}


@pytest.mark.parametrize('what', FAILURES)
def test_save_that_fails_ends_the_run_and_leaves_what_was_there(tmp_path, what):
    where, failed, good, replaced = FAILURES[what]
    options = dict(max_keep_ckpts=1, save_best='acc')
    train(tmp_path, 2, [0.1, 0.2], **options)
    before, disk, calls = contents(tmp_path), contextlib.ExitStack(), Calls()
    setattr(calls, where, lambda runner: disk.enter_context(full_disk(LIMIT)))
    runner = build(tmp_path, 3, [0.3], calls, resume=True, **options)
    with disk, pytest.raises(NotSavedError) as raised:
        runner.train()
    assert raised.value.errno == errno.EFBIG
    assert str(raised.value).startswith(f'cannot save {tmp_path / failed}')
    good = f'the last good checkpoint is {tmp_path}/epoch_{good}.pth'
    assert str(raised.value).endswith(f'pth: File too large; {good}')
    after = contents(tmp_path)
    for name in before.keys() - {*replaced, 'last_checkpoint'}:
        assert after[name] == before[name], name
    assert find_latest_checkpoint(tmp_path) == good.split()[-1]
    assert not [name for name in after if name.endswith('.tmp')]
    # The next one tidies up.
    train(tmp_path, 4, [0.4, 0.5], resume=True, **options)
    assert saved(tmp_path) == ['best_acc_epoch_4.pth', 'epoch_4.pth', 'last_checkpoint']


def test_note_that_cannot_be_written_ends_the_run_with_both_files(tmp_path):
    train(tmp_path, max_keep_ckpts=1)
    (tmp_path / 'last_checkpoint').unlink()
    (tmp_path / 'last_checkpoint').mkdir()
    words = f'{tmp_path}/last_checkpoint: Is a directory; .* is {tmp_path}/epoch_1.pth'
    with pytest.raises(NotSavedError, match=words):
        load_from = str(tmp_path / 'epoch_1.pth')
        train(tmp_path, 2, max_keep_ckpts=1, resume=True, load_from=load_from)
    assert saved(tmp_path) == ['epoch_1.pth', 'epoch_2.pth']


def test_failure_at_the_first_save_says_that_nothing_is_there(tmp_path):
    words = 'epoch_1.pth: File too large; there is none yet$'
    with full_disk(LIMIT), pytest.raises(NotSavedError, match=words):
        train(tmp_path)
    assert saved(tmp_path) == []


TORN = """
import builtins, os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_checkpointing import train
in_place = builtins.open
def kill(file, *args, **kwargs):
    stream = in_place(file, *args, **kwargs)
    if str(file).endswith('last_checkpoint') and args[:1] == ('w',):
        os.kill(os.getpid(), signal.SIGKILL)
    return stream
train(sys.argv[2], 1)
builtins.open = kill
train(sys.argv[2], 2, resume=True)
"""


def test_kill_while_the_note_is_written_loses_nothing(tmp_path):
    command = [sys.executable, '-c', TORN, os.path.dirname(__file__), str(tmp_path)]
    assert subprocess.run(command).returncode == -signal.SIGKILL
    assert (tmp_path / 'last_checkpoint').read_bytes() == b''
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_2.pth')


def test_other_errors_while_saving_are_not_hidden(tmp_path):
    def wrong(runner, checkpoint):
        raise FloatingPointError('NaN in the weights')

    calls = Calls()
    calls.before_save_checkpoint = wrong
    with pytest.raises(FloatingPointError, match='NaN in the weights'):
        train(tmp_path, calls=calls)


def test_other_hooks_are_told_before_each_save_to_resume_from(tmp_path):
    steps = []
    calls = Calls(gather=lambda runner: steps.append(runner.epoch))
    train(tmp_path, 2, [0.1, 0.2], calls, save_best='acc')
    # The epoch, and the epoch again, which then knows the best one.
    assert steps == [0, 1, 1, 2]


@pytest.mark.parametrize('by_epoch', [True, False])
def test_newest_checkpoint_that_opens_is_taken(tmp_path, capfd, by_epoch):
    step, name = (1, 'epoch') if by_epoch else (2, 'iter')
    options = dict(by_epoch=by_epoch, interval=step)
    train(tmp_path, 3, [0.1, 0.2, 0.3], save_best='acc', **options)
    newest = tmp_path / f'{name}_{3 * step}.pth'
    assert find_latest_checkpoint(tmp_path) == str(newest)
    capfd.readouterr()
    cut(newest)
    second = tmp_path / f'{name}_{2 * step}.pth'
    assert find_latest_checkpoint(str(tmp_path)) == str(second)
    captured = ''.join(capfd.readouterr())
    assert captured.count('WARNING') == 1
    assert f'checkpoint {str(newest)!r} cannot be resumed from: ' in captured

    runner = build(tmp_path, 4, resume=True, **options)
    resumed = []
    runner.register_hook(Calls())
    runner.hooks[0].before_train = lambda r: resumed.append(r.iter)
    runner.train()
    assert resumed == [4]


def test_folder_without_a_checkpoint_has_none(tmp_path):
    for name in ('best_epoch_1.pth', 'published-0a1b2c3d.pth'):
        (tmp_path / name).write_bytes(b'')
    assert find_latest_checkpoint(tmp_path) is None
    assert find_latest_checkpoint(tmp_path / 'no') is None


def test_note_without_its_checkpoint_is_not_started_anew(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/epoch_1.pth')
    with pytest.raises(ValueError, match='names no checkpoint that is there: name it'):
        find_latest_checkpoint(tmp_path)


@pytest.mark.parametrize('key', ['out_dir', 'published_keys', 'backend_args'])
def test_what_would_be_written_elsewhere_or_in_place_is_refused(tmp_path, key):
    with pytest.raises((TypeError, ValueError), match=key):
        build(tmp_path, **{key: 'x'})


@pytest.mark.parametrize('note', [None, b'\xff'])
def test_folder_without_a_whole_checkpoint_is_not_started_anew(tmp_path, note):
    train(tmp_path, 1, save_optimizer=False)
    (tmp_path / 'other.pth').write_bytes(b'')
    if note:
        (tmp_path / 'last_checkpoint').write_bytes(note)
    with pytest.raises(ValueError, match='epoch_1.pth.* and 1 more.* write over them'):
        find_latest_checkpoint(tmp_path)


@pytest.mark.parametrize(
    'note', ['..', '/', '.', 'folder', 'a\0b', 'x' * 10_000, 'no.pth', '']
)
def test_note_that_names_no_file_is_passed_over(tmp_path, note):
    (tmp_path / 'folder').mkdir()
    save_minimal(tmp_path / 'epoch_1.pth', iter=1)
    (tmp_path / 'last_checkpoint').write_text(note)
    assert find_latest_checkpoint(tmp_path) == str(tmp_path / 'epoch_1.pth')


def save_minimal(path, info=None, **meta):
    """Write what a Runner needs to go on."""
    content = dict(meta=dict(epoch=1, **meta), optimizer={})
    content['state_dict'] = dict(weight=torch.ones(1))
    hub = dict(log_scalars={}, resumed_keys={}, runtime_info=info or {})
    torch.save(dict(content, message_hub=hub), path)


def test_order_is_that_of_the_contents_and_not_of_clocks(tmp_path):
    for age, (name, step) in enumerate(
        [('epoch_12', 24), ('iter_22', 22), ('epoch_9', 18), ('epoch_2', 4)]
    ):
        path = tmp_path / f'{name}.pth'
        save_minimal(path, iter=step)
        os.utime(path, (1000 + age, 1000 + age))
    for name in ('epoch_12', 'iter_22', 'epoch_9'):
        path = tmp_path / f'{name}.pth'
        assert find_latest_checkpoint(tmp_path) == str(path)
        path.unlink()


def test_run_that_was_moved_is_found_where_it_is(tmp_path):
    train(tmp_path / 'a', 2)
    shutil.copytree(tmp_path / 'a', tmp_path / 'b')
    moved = str(tmp_path / 'b' / 'epoch_2.pth')
    assert find_latest_checkpoint(tmp_path / 'b') == moved
    shutil.rmtree(tmp_path / 'a')
    assert find_latest_checkpoint(tmp_path / 'b') == moved


def test_files_of_other_launches_are_passed_over(tmp_path):
    old, new = tmp_path / 'epoch_3.pth', tmp_path / 'epoch_1.pth'
    save_minimal(old, iter=6, launch='old')
    (tmp_path / 'last_checkpoint').write_text(str(old))
    assert find_latest_checkpoint(tmp_path, launch='new') is None
    save_minimal(new, iter=2, launch='new')
    (tmp_path / 'last_checkpoint').write_text(str(new))
    assert find_latest_checkpoint(tmp_path, launch='new') == str(new)
    (tmp_path / 'last_checkpoint').unlink()
    assert find_latest_checkpoint(tmp_path, launch='new') == str(new)
    assert find_latest_checkpoint(tmp_path) == str(old)
