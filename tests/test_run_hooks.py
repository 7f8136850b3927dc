"""Hooks of every run: the summary, TensorBoard, and what one process alone writes."""

import errno
import importlib.util
import json
import re
import sys
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.visualization.vis_backend import BaseVisBackend, LocalVisBackend
from tiny import full_disk
from torch import nn

from convmlp_mm import (
    BFloat16OptimWrapper,
    OneMetricsFileHook,
    SafeLogHook,
    SummaryHook,
    TensorBoardHook,
)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 1)
        self.dtypes = []

    def forward(self, inputs, mode='tensor'):
        out = self.layer(torch.stack(inputs))
        self.dtypes.append(out.dtype)
        return dict(loss=out.float().mean()) if mode == 'loss' else [out]


class Metric(BaseMetric):
    default_prefix = 'coco'

    def __init__(self, values):
        super().__init__()
        self.values = list(values)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return dict(other=7.0, bbox_mAP=self.values.pop(0))


def make_runner(tmp_path, values=(), hooks=(), train_cfg=None, **checkpoint):
    train_cfg = train_cfg or dict(by_epoch=True, max_epochs=3, val_interval=1)
    by_epoch = train_cfg['by_epoch']

    def loader():
        return dict(
            dataset=[torch.ones(2)] * 6,
            batch_size=2,
            collate_fn=collate,
            sampler=dict(type='DefaultSampler' if by_epoch else 'InfiniteSampler'),
        )

    validation = dict(
        val_dataloader=loader() | dict(sampler=dict(type='DefaultSampler')),
        val_evaluator=[Metric(values)],
        val_cfg=dict(),
    )
    name = re.sub(r'\W', '_', str(tmp_path))
    return Runner(
        model=Model(),
        work_dir=str(tmp_path),
        train_dataloader=loader(),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, **checkpoint),
            logger=dict(type='LoggerHook', interval=1),
        ),
        custom_hooks=list(hooks),
        experiment_name=name,
        **(validation if values else {}),
    )


def collate(batch):
    return dict(inputs=batch)


def read_log(runner):
    (log,) = Path(runner.log_dir).glob('*.log')
    return log.read_text()


def summary(runner):
    return read_log(runner).partition('Summary\n')[2]


def test_summary_names_the_best_of_the_checkpoint_hook(tmp_path):
    runner = make_runner(
        tmp_path, [0.1, 0.5, 0.4], [SummaryHook()], save_best='coco/bbox_mAP'
    )
    runner.train()
    text = summary(runner)
    assert re.search(
        r'trained     9 iterations in 0:00:\d\d, of which validation', text
    )
    assert re.search(r'speed       [\d.]+ images/s', text)
    best = tmp_path / 'best_coco_bbox_mAP_epoch_2.pth'
    assert best.is_file()
    assert f'best        coco/bbox_mAP 0.5000 in {best}\n' in text
    assert f'last        {tmp_path / "epoch_3.pth"}\n' in text
    assert f'logs        {runner.log_dir}\n' in text
    assert 'pictures' not in text


def test_summary_finds_the_headline_metric_and_its_checkpoint(tmp_path):
    runner = make_runner(
        tmp_path, [float('nan'), 0.5, 0.4], [SummaryHook()], interval=1
    )
    pictures = Path(runner.log_dir) / 'vis_data' / 'vis_image'
    pictures.mkdir(parents=True)
    (pictures / '1.png').touch()
    runner.train()
    text = summary(runner)
    path = tmp_path / 'epoch_2.pth'
    assert f'best        coco/bbox_mAP 0.5000 after epoch 2 in {path}\n' in text
    assert f'pictures    1 in {pictures}\n' in text


def test_summary_of_iterations_says_where_no_checkpoint_was_kept(tmp_path):
    runner = make_runner(
        tmp_path,
        [0.5, 0.4],
        [SummaryHook()],
        dict(by_epoch=False, max_iters=4, val_interval=2),
        interval=4,
    )
    runner.train()
    text = summary(runner)
    line = 'coco/bbox_mAP 0.5000 after iteration 2, of which no checkpoint was kept'
    assert line in text
    assert f'last        {tmp_path / "iter_4.pth"}' in text


def test_summary_of_a_resumed_run_knows_the_best_of_before(tmp_path):
    make_runner(tmp_path / 'a', [0.1, 0.5, 0.4], [SummaryHook()]).train()
    train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    runner = make_runner(tmp_path / 'b', [0.3], [SummaryHook()], train_cfg)
    runner._resume, runner._load_from = True, str(tmp_path / 'a' / 'epoch_3.pth')
    runner.train()
    # That of the third epoch is saved before its validation.
    line = 'coco/bbox_mAP 0.5000 after epoch 2, of which no checkpoint was kept'
    assert line in summary(runner)


def test_summary_without_validation_and_without_the_first_process(
    tmp_path, monkeypatch
):
    runner = make_runner(tmp_path / 'a', hooks=[SummaryHook()])
    runner.train()
    assert 'trained     9 iterations in' in summary(runner)
    assert 'best' not in summary(runner)

    monkeypatch.setattr('convmlp_mm.hooks.summary.is_main_process', lambda: False)
    runner = make_runner(tmp_path / 'b', hooks=[SummaryHook()])
    runner.train()
    assert summary(runner) == ''


@pytest.mark.parametrize(
    ('inputs', 'number'),
    [
        (torch.zeros(4, 3, 2, 2), 4),
        ([torch.zeros(3, 2, 2)] * 4, 4),
        ([torch.zeros(4, 3, 2, 2)] * 2, 4),
        (dict(sup=[torch.zeros(3, 2, 2)], unsup=[torch.zeros(3, 2, 2)] * 3), 4),
    ],
)
def test_images_of_a_batch_are_counted_in_all_its_forms(inputs, number):
    hook = SummaryHook()
    hook.before_train(SimpleNamespace(iter=0))
    hook.after_train_iter(None, 0, dict(inputs=inputs))
    assert hook._images == number


def test_summary_is_not_given_when_the_run_fails(tmp_path):
    runner = make_runner(tmp_path, [0.1], [SummaryHook()])
    with pytest.raises(IndexError):
        runner.train()
    assert summary(runner) == ''


def fake_tensorboard(monkeypatch, written):
    """A torch.utils.tensorboard that keeps what it is given."""

    class SummaryWriter:
        def __init__(self, folder):
            written['folder'] = folder

        def add_text(self, name, text):
            written[name] = text

        def add_scalar(self, name, value, step):
            written.setdefault(name, {})[step] = value

        def close(self):
            pass

    found = importlib.util.find_spec
    monkeypatch.setattr(
        'convmlp_mm.hooks.tracking.find_spec',
        lambda name: name if name == 'tensorboard' else found(name),
    )
    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', module)


def test_tensorboard_gets_the_scalars_where_it_is_installed(tmp_path, monkeypatch):
    written = {}
    fake_tensorboard(monkeypatch, written)
    runner = make_runner(tmp_path, [0.1, 0.2, 0.3], [TensorBoardHook()])
    runner.train()
    assert written['folder'] == f'{runner.log_dir}/vis_data'
    assert sorted(written['loss']) == list(range(1, 10))
    assert written['coco/bbox_mAP'] == {1: 0.1, 2: 0.2, 3: 0.3}


@pytest.mark.parametrize('broken', [False, True])
def test_training_goes_on_without_tensorboard(tmp_path, monkeypatch, broken):
    monkeypatch.setattr(
        'convmlp_mm.hooks.tracking.find_spec', lambda name: name if broken else None
    )
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', None)
    runner = make_runner(tmp_path, hooks=[TensorBoardHook()])
    runner.train()
    assert list(runner.visualizer._vis_backends) == ['LocalVisBackend']
    assert ('TensorBoard is installed but fails' in read_log(runner)) == broken


class Disk(Hook):
    """Full in the second epoch of three."""

    def __init__(self):
        self.full = ExitStack()

    def before_train_epoch(self, runner):
        if runner.epoch == 1:
            sizes = [p.stat().st_size for p in Path(runner.log_dir).rglob('*.*s*')]
            self.full.enter_context(full_disk(max(sizes) + 20))
        else:
            self.full.close()


def test_training_goes_on_when_its_log_cannot_be_written(tmp_path, capsys, monkeypatch):
    class Lost(BaseVisBackend):
        experiment = _init_env = None

        def add_scalars(self, scalars, step=0, file_path=None, **kwargs):
            raise ConnectionError('the server is gone')

    runner = make_runner(tmp_path, hooks=[SafeLogHook(), disk := Disk()])
    runner.visualizer._vis_backends['Lost'] = Lost(str(tmp_path))
    with disk.full:
        runner.train()
    (scalars,) = Path(runner.log_dir).glob('vis_data/scalars.json')
    steps = [json.loads(line)['step'] for line in scalars.read_text().splitlines()]
    # What was too much is lost, and no half line is there.
    assert steps == [1, 2, 3, 7, 8, 9]
    said = ''.join(capsys.readouterr())
    assert said.count('LocalVisBackend cannot write: File too large; training') == 1
    assert said.count('Lost cannot write: the server is gone; training goes on') == 1
    assert 'Logging error' not in said

    class ReadOnly(LocalVisBackend):
        def add_scalars(self, *args, **kwargs):
            raise OSError(errno.EROFS, 'Read-only file system')

    runner = make_runner(tmp_path / 'closed', hooks=[SafeLogHook()])
    backends = runner.visualizer._vis_backends
    backends['ReadOnly'] = ReadOnly(backends['LocalVisBackend']._save_dir)
    with monkeypatch.context() as patch:
        patch.setattr('os.truncate', ReadOnly.add_scalars)
        runner.train()
    said = ''.join(capsys.readouterr())
    assert 'ReadOnly cannot write: Read-only file system; training goes on' in said

    class Wrong(Lost):
        def add_scalars(self, *args, **kwargs):
            raise ValueError('no number')

    runner = make_runner(tmp_path / 'wrong', hooks=[SafeLogHook()])
    runner.visualizer._vis_backends['Wrong'] = Wrong(str(tmp_path))
    with pytest.raises(ValueError, match='no number'):
        runner.train()


@pytest.mark.parametrize('main', [True, False])
def test_metrics_of_a_test_are_written_by_the_first_process(
    tmp_path, monkeypatch, main
):
    monkeypatch.setattr('convmlp_mm.hooks.distributed.is_main_process', lambda: main)
    runner = make_runner(tmp_path, [0.3], [OneMetricsFileHook()])
    runner._test_dataloader = runner._val_dataloader
    runner._test_evaluator = runner._val_evaluator
    runner._test_loop = dict()
    assert runner.test() == {'coco/other': 7.0, 'coco/bbox_mAP': 0.3}
    files = list(Path(runner.log_dir).glob('*.json'))
    assert len(files) == main
    if main:
        assert json.loads(files[0].read_text())['coco/bbox_mAP'] == 0.3


def test_bfloat16_is_of_the_forward_pass_only():
    model = Model()
    wrapper = BFloat16OptimWrapper(optimizer=torch.optim.SGD(model.parameters(), 0.1))
    before = model.layer.weight.detach().clone()
    model.train_step(dict(inputs=[torch.ones(2)]), wrapper)
    assert model.dtypes == [torch.bfloat16]
    assert model.layer.weight.dtype == torch.float32
    assert torch.equal(model.layer.weight, before - 0.1)
