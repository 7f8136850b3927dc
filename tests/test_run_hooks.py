"""Hooks of every run: the summary, its curves, and what one process alone writes."""

import itertools
import json
import re
from pathlib import Path

import matplotlib.image
import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.runner import Runner
from torch import nn

from convmlp_mm import BFloat16OptimWrapper, SummaryHook
from convmlp_mm.hooks.summary import read_curves

# mmengine keeps loggers and visualizers by the name of the experiment.
NUMBERS = itertools.count()


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
    return Runner(
        model=Model(),
        work_dir=str(tmp_path),
        train_dataloader=loader(),
        train_cfg=train_cfg,
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=by_epoch, **checkpoint),
            logger=dict(type='MainProcessLoggerHook', interval=1),
        ),
        custom_hooks=list(hooks),
        experiment_name=f'run{next(NUMBERS)}',
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
    assert re.search(r'trained  9 iterations in 0:00:\d\d\n', text)
    assert re.search(r'speed    [\d.]+ images/s\n', text)
    best = tmp_path / 'best_coco_bbox_mAP_epoch_2.pth'
    assert best.is_file()
    assert 'best     coco/bbox_mAP 0.5000 after epoch 2\n' in text
    assert f'saved    {best}\n  saved    {tmp_path / "epoch_3.pth"}\n' in text
    assert f'logs     {runner.log_dir}\n' in text
    assert text.endswith(f'curves   {tmp_path / "curves.png"}\n')
    assert_figure(tmp_path)


def assert_figure(folder):
    height, width, _ = matplotlib.image.imread(folder / 'curves.png').shape
    assert height > 500 and width > 500


def test_summary_of_iterations_passes_over_a_metric_that_is_no_number(tmp_path):
    train_cfg = dict(by_epoch=False, max_iters=6, val_interval=2)
    values = [0.5, float('nan'), 0.4]
    runner = make_runner(tmp_path, values, [SummaryHook()], train_cfg, interval=6)
    runner.train()
    text = summary(runner)
    assert 'best     coco/bbox_mAP 0.5000 after iteration 2\n' in text
    assert f'saved    {tmp_path / "iter_6.pth"}' in text


def test_summary_and_curves_of_a_resumed_run_know_what_was_before(tmp_path):
    values = [0.1, 0.5, 0.4]
    first = make_runner(tmp_path, values, [SummaryHook()], interval=1)
    first.train()
    # The folders of logs are named by the second, in which the next may begin too.
    path = Path(first.log_dir)
    path.rename(path.with_name('20200101_000000'))
    train_cfg = dict(by_epoch=True, max_epochs=4, val_interval=1)
    runner = make_runner(tmp_path, [0.3, 0.2], [SummaryHook()], train_cfg, interval=1)
    # It goes back by an epoch.
    runner._resume, runner._load_from = True, str(tmp_path / 'epoch_2.pth')
    runner.train()
    text = summary(runner)
    assert 'trained  6 iterations in' in text
    assert 'coco/bbox_mAP 0.5000 after epoch 2\n' in text
    trained, validated = read_curves(str(tmp_path))
    assert validated['coco/bbox_mAP'] == {1: 0.1, 2: 0.5, 3: 0.3, 4: 0.2}
    assert list(trained['loss']) == list(range(1, 13))


def test_summary_without_validation_and_without_the_first_process(
    tmp_path, monkeypatch
):
    runner = make_runner(tmp_path / 'a', hooks=[SummaryHook()])
    runner.train()
    assert 'trained  9 iterations in' in summary(runner)
    assert 'best' not in summary(runner)
    assert_figure(tmp_path / 'a')

    monkeypatch.setattr('convmlp_mm.hooks.summary.is_main_process', lambda: False)
    runner = make_runner(tmp_path / 'b', hooks=[SummaryHook()])
    runner.train()
    assert summary(runner) == ''
    assert not (tmp_path / 'b' / 'curves.png').exists()


def test_half_a_line_and_values_that_are_no_numbers_are_passed_over(tmp_path):
    lines = [
        dict(bbox_mAP=0.5, step=1),
        dict(iter=1, step=1, loss=2.0, lr=0.1),
        dict(iter=2, step=2, loss=float('nan'), lr=0.1, note='text'),
    ]
    text = '\n'.join(json.dumps(line) for line in lines)
    path = tmp_path / '20200101_000000' / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text(text + '\n{"iter": 3, "step": 3, "lo')
    trained, validated = read_curves(str(tmp_path))
    assert trained['loss'] == {1: 2.0} and trained['lr'] == {1: 0.1, 2: 0.1}
    assert 'note' not in trained and validated == dict(bbox_mAP={1: 0.5})


def test_what_a_run_has_gone_back_from_is_no_longer_drawn(tmp_path):
    for name, steps in (('20200101_000000', (1, 2, 3, 4)), ('20200102_000000', (3,))):
        path = tmp_path / name / 'vis_data' / 'scalars.json'
        path.parent.mkdir(parents=True)
        lines = [dict(iter=i, step=i, loss=i + len(steps)) for i in steps]
        path.write_text('\n'.join(map(json.dumps, lines)))
    assert read_curves(str(tmp_path))[0]['loss'] == {1: 5, 2: 6, 3: 4}


def test_figure_that_cannot_be_drawn_ends_no_run(tmp_path):
    (tmp_path / 'curves.png').mkdir()
    runner = make_runner(tmp_path, hooks=[SummaryHook()])
    runner.train()
    assert 'The summary is cut short: IsADirectoryError' in read_log(runner)
    text = summary(runner)
    assert 'logs     ' in text and 'curves' not in text


def test_summary_is_not_given_when_the_run_fails(tmp_path):
    runner = make_runner(tmp_path, [0.1], [SummaryHook()])
    with pytest.raises(IndexError):
        runner.train()
    assert summary(runner) == ''


@pytest.mark.parametrize('main', [True, False])
def test_metrics_of_a_test_are_written_by_the_first_process(
    tmp_path, monkeypatch, main
):
    monkeypatch.setattr('convmlp_mm.hooks.summary.is_main_process', lambda: main)
    runner = make_runner(tmp_path, [0.3])
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
