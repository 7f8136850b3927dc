"""Measuring models against each other, and the loading of data."""

import csv
import importlib.util
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

from convmlp_mm import ConvMLP
from convmlp_mm.benchmark import report, rounds, steps
from convmlp_mm.benchmark.data import LoadingTime, describe_need, needed_workers
from convmlp_mm.benchmark.equality import check_equal, replace_backbone
from convmlp_mm.benchmark.published import PublishedConvMLP
from convmlp_mm.benchmark.rounds import Measurement, WorkerError, run_interleaved
from convmlp_mm.benchmark.spec import ModelSpec, parse_spec
from convmlp_mm.benchmark.steps import MATMUL, Job
from convmlp_mm.benchmark.worker import Timer

ROOT = Path(__file__).resolve().parents[1]
TINY = dict(
    tokenizer_channels=8,
    conv_blocks=1,
    channels=(12, 16, 20),
    depths=(1, 2, 1),
    mlp_ratios=(2, 3, 1.5),
)
# Narrow in nothing that necks and heads look at.
SHALLOW = dict(
    tokenizer_channels=64,
    conv_blocks=1,
    channels=(128, 256, 512),
    depths=(1, 1, 1),
    mlp_ratios=(1, 1, 1),
)
SEVERAL = 'mmpretrain::resnet/resnet50_8xb32_in1k'


def load_tool():
    path = ROOT / 'tools' / 'benchmark.py'
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def job(name, mode='infer', **changes):
    return Job(parse_spec(str(name), mode), mode, 2, (64, 64), **changes)


@pytest.fixture
def shallow(tmp_path):
    """Write a configuration with a backbone that takes little time."""

    def write(base):
        path = tmp_path / f'{base}.py'
        arch = dict(SHALLOW, _delete_=True)
        backbone = f'backbone=dict(arch={arch}, init_cfg=None)'
        path.write_text(
            f'_base_ = {str(ROOT / "configs" / base)!r} + ".py"\n'
            f'model = dict({backbone})\n'
        )
        return path

    return write


def pair(arch=TINY, **kwargs):
    ours = ConvMLP(arch, **kwargs)
    published = PublishedConvMLP(arch, **kwargs)
    published.load_state_dict(ours.state_dict())
    return ours, published


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(out_indices=(-1,), final_norm=True, drop_path_rate=0.5),
        dict(out_indices=(0, 2), in_channels=1, drop_rate=0.2),
        dict(out_indices=0),
    ],
)
def test_published_structure_computes_the_same(kwargs):
    check_equal(*pair(**kwargs))


@pytest.mark.parametrize(
    'change',
    [
        lambda model: (
            model.stages[0]
            .blocks[0]
            .norm1.register_forward_hook(lambda module, args, out: out * (1 + 1e-5))
        ),
        # Only seen in evaluation, only in training, and only in the gradient.
        lambda model: setattr(model.tokenizer.block[1], 'eps', 1e-3),
        lambda model: setattr(model.tokenizer.block[1], 'momentum', 0.2),
        lambda model: model.conv_stages.downsample.register_forward_hook(
            lambda module, args, out: out.detach()
        ),
        lambda model: torch.nn.init.ones_(model.stages[1].blocks[0].connect.weight),
        lambda model: setattr(model.stages[1].blocks[1].drop_path, 'drop_prob', 0.4),
    ],
)
def test_structure_that_differs_is_refused(change):
    ours, published = pair()
    change(published)
    with pytest.raises(ValueError, match='the published structure'):
        check_equal(ours, published)


def test_check_changes_nothing():
    ours, published = pair()
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = torch.get_rng_state()
    check_equal(ours, published)
    assert torch.equal(torch.get_rng_state(), state)
    for model in (ours, published):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters()) and model.training


def test_published_structure_keeps_contiguous_memory():
    ours, published = pair()
    for name, weight in published.named_parameters():
        assert weight.is_contiguous(), name
    seen = []
    published.conv_stages.register_forward_hook(lambda m, a, out: seen.append(out))
    outs = published(torch.rand(2, 3, 64, 64))
    assert seen[0].is_contiguous() and all(out.is_contiguous() for out in outs)
    ours.conv_stages.register_forward_hook(lambda m, a, out: seen.append(out))
    ours(torch.rand(2, 3, 64, 64))
    assert not seen[1].is_contiguous()


@pytest.mark.parametrize(
    ('kwargs', 'error', 'match'),
    [
        (dict(with_cp=True), ValueError, 'with_cp=False only, but got True'),
        (dict(norm_cfg=dict(type='SyncBN')), ValueError, "'SyncBN'"),
        (dict(conv_stage=False), ValueError, 'conv_stage=True'),
        (dict(width=3), TypeError, "no argument 'width'"),
        (dict(out_indices=(7,)), ValueError, 'out_indices'),
    ],
)
def test_what_the_release_does_not_have_is_refused(kwargs, error, match):
    with pytest.raises(error, match=match):
        PublishedConvMLP(TINY, **kwargs)
    PublishedConvMLP(TINY, with_cp=False, norm_cfg=dict(type='BN', requires_grad=True))


def test_only_a_convmlp_is_replaced():
    model = torch.nn.Module()
    model.backbone = torch.nn.Identity()
    with pytest.raises(TypeError, match='ConvMLP backbone, but the model has Identity'):
        replace_backbone(model, {})


def test_options_of_a_model_stand_over_the_defaults():
    spec = parse_spec('a@b/c.py@nchw,fp16,threads=3,malloc', 'infer', dtype='bfloat16')
    assert spec.name == 'a@b/c.py' and spec.dtype == 'float16' and spec.malloc
    assert (spec.layout, spec.threads, spec.compile) == ('nchw', 3, False)
    assert parse_spec('x', 'train', dtype='bfloat16').dtype == 'bfloat16'


@pytest.mark.parametrize(
    ('text', 'mode', 'match'),
    [
        ('x@fast', 'infer', r"unknown option 'fast'.*published, deploy, fp32"),
        ('x@', 'infer', "unknown option ''"),
        ('x@threads=0', 'infer', "unknown option 'threads=0'"),
        ('x@threads=N', 'infer', "unknown option 'threads=N'"),
        ('@fp16', 'infer', 'names no model'),
        ('x@fp16,bf16', 'infer', "'bf16' of .* comes after 'fp16'"),
        ('x@nchw,channels-last', 'infer', "comes after 'nchw'"),
        ('x@deploy', 'train', "'deploy' of 'x@deploy' is for 'infer' only"),
        ('x@cp', 'infer', "for 'train' only"),
        ('x@published,deploy', 'infer', "'published' and 'deploy'"),
        ('arch:xl', 'infer', "no backbone 'arch:xl'; there are arch:s, arch:m"),
    ],
)
def test_wrong_models_are_named(text, mode, match):
    with pytest.raises(ValueError, match=match):
        parse_spec(text, mode)


@pytest.mark.parametrize(
    ('options', 'fragment'),
    [
        (['infer', 'arch:s', 'arch:s@fast'], "unknown option 'fast'"),
        (['infer', 'nothing'], "no configuration 'nothing'"),
        (['infer', f'{SEVERAL}@published'], 'its backbone is ResNet'),
        (['infer', 'arch:s', '--shape', '1', '2', '3'], 'but got 3 numbers'),
        (['infer', 'arch:s', '--device', 'tpu'], "but got 'tpu'"),
        (['infer', 'arch:s', '--device', 'cuda:99'], 'cuda:99 is not there'),
        (['infer', 'arch:s', '--plot', 'chart.svg'], "but got 'chart.svg'"),
        (['infer', 'arch:s', '--out', 'no/table.md'], "folder 'no' does not"),
        (['infer', 'arch:s', '--weights', 'yes'], 'no published weights'),
        (['train', 'arch:s', '--rounds', '0'], 'must be 1 or more, but is 0'),
        (['data', 'retinanet_convmlp_s'], "data folder 'data/coco/'"),
        (['data', 'timm::resnet18'], 'configuration has no train_dataloader'),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(
    options, fragment, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(tool, 'run_interleaved', None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        tool.main(options)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    (line,) = [n for n in printed.err.splitlines() if 'error:' in n]
    assert fragment in line and printed.out == ''
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('name', 'outputs'),
    [
        ('convmlp_s_imagenet', 1),
        ('retinanet_convmlp_s', 2),
        ('semantic_fpn_convmlp_s', 1),
    ],
)
def test_each_toolkit_is_inferred_and_trained(shallow, name, outputs):
    path = shallow(name)
    one = steps.build_step(job(path))()
    # Logits, or the outputs of a head.
    assert (len(one) if isinstance(one, tuple) else 1) == outputs
    seen = []

    def look(optimizer, args, kwargs):
        groups = optimizer.param_groups
        seen.append({group['lr'] for group in groups})
        assert all(p.grad is not None for group in groups for p in group['params'])
        seen.append(type(optimizer).__name__)

    hook = register_optimizer_step_pre_hook(look)
    try:
        step = steps.build_step(job(f'{path}@cp,bf16', 'train'))
        step()
        step()
    finally:
        hook.remove()
    assert seen == [{0.0}, 'AdamW'] * 2


def test_models_that_ask_the_runner_are_trained():
    # Its preprocessor looks for the number of the iteration.
    name = 'mmdet::yolox/yolox_tiny_8xb8-300e_coco'
    assert steps.build_step(job(name, 'train'))() is None


def test_predictions_are_in_the_size_of_the_pictures(shallow):
    path = shallow('semantic_fpn_convmlp_s')
    samples = steps.build_step(job(path, predict=True))()
    assert [s.pred_sem_seg.shape for s in samples] == [(64, 64)] * 2


def test_layouts_that_compute_other_values_are_not_measured():
    with pytest.raises(ValueError, match=r'mmcv.RoIAlign, which computes other val'):
        steps.build_step(
            job('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py@channels-last')
        )


def test_options_change_the_model(shallow, monkeypatch):
    path = shallow('convmlp_s_imagenet')
    built = []

    def keep(job, model, batch):
        built.append(model)

    monkeypatch.setattr(steps, '_train', keep)
    monkeypatch.setattr(steps, '_infer', keep)
    for options in ('published', 'nchw', 'deploy', 'fp32'):
        steps.build_step(job(f'{path}@{options}'))
    steps.build_step(job(f'{path}@cp', 'train'))
    published, nchw, deployed, plain, recomputing = (m.backbone for m in built)
    assert isinstance(published, PublishedConvMLP)
    assert all(p.is_contiguous() for p in nchw.parameters())
    assert not all(p.is_contiguous() for p in plain.parameters())
    names = [name for name, _ in deployed.named_buffers()]
    assert not any('running' in name for name in names)
    assert recomputing.with_cp and not plain.with_cp
    # The same weights in each process.
    weights = [b.stages[0].blocks[0].connect.weight for b in (published, plain)]
    assert torch.equal(*weights)


def measured(name, seconds, **changes):
    return Measurement(replace(job(name), **changes), list(seconds), 1, 'CPU', 2**20)


def test_table_has_the_figures():
    first = measured('arch:s', [0.2, 0.1, 0.4, 0.3, 0.2])
    # Twice as fast in each round, whatever else was going on.
    second = measured('arch:s@deploy', [0.1, 0.05, 0.2, 0.15, 0.1])
    product = measured('arch:s', [0.5], mode='infer')
    product.job = replace(product.job, spec=ModelSpec(MATMUL, MATMUL))
    macs = [10**9, 10**9, None]
    table = report.results_table([first, second, product], macs, [None] * 3, 'csv')
    one, two, last = csv.DictReader(table.splitlines())
    assert [float(one[key]) for key in ('ms', 'q1', 'q3')] == [200, 200, 300]
    assert float(two['ratio']) == 2 and float(two['images/s']) == 20
    # Two pictures of 2 GFLOP each in 0.1 s.
    assert float(two['GFLOP/s']) == 40 and float(two['MiB']) == 1
    assert float(last['GFLOP/s']) == pytest.approx(2 * 2048**3 / 0.5 / 1e9)
    assert 'top-1' not in one and two['shape'] == '64x64'
    train = [replace(m.job, mode='train') for m in (first, second)]
    first.job, second.job = train
    text = report.results_table([first, second], macs, [None] * 2)
    assert 'GMACs' in text and 'GFLOP' not in text


def test_accuracies_are_the_published_ones():
    assert report.find_top1('convmlp_s_imagenet') == (76.8, 'paper')
    assert report.find_top1('convmlp_mm::convmlp_l_imagenet.py') == (80.2, 'paper')
    assert report.find_top1(SEVERAL) == (76.1, 'paper')
    assert report.find_top1('timm::mixer_s16_224') == (73.8, 'paper')
    tiny = 'mmpretrain::convnext/convnext-tiny_32xb128_in1k'
    # Not that of weights from ImageNet-21k, which name this configuration too.
    assert report.find_top1(tiny) == (82.14, 'mmpretrain')
    # Another data set; another model than the paper's; a detector's backbone.
    assert report.find_top1('convmlp_s_cifar10') is None
    assert report.find_top1('timm::resmlp_big_24_224') is None
    assert report.find_top1('mmdet::pvt/retinanet_pvt-s_fpn_1x_coco') is None


def test_chart_has_accuracies_where_there_are_any():
    found = [measured('convmlp_s_imagenet', [0.1]), measured(SEVERAL, [0.2])]
    known = [(76.8, 'paper'), (76.1, 'paper')]
    figure = report.draw_chart(found, known, 'title')
    (ax,) = figure.axes
    assert 'top-1' in ax.get_ylabel() and 'images per second' in ax.get_xlabel()
    assert {t.get_text() for t in ax.texts} == {'convmlp_s', 'resnet50'}
    for chart in (
        report.draw_chart(found, [None, None], 'title'),
        report.draw_chart([found[0]] * 2, known, 'title'),
    ):
        (ax,) = chart.axes
        assert 'milliseconds' in ax.get_xlabel() and len(ax.patches) == 2


def test_timer_divides_by_the_steps():
    calls = []
    timer = Timer(lambda: calls.append(0), torch.device('cpu'))
    assert timer.measure(5) >= 0 and len(calls) == 5


def test_memory_is_the_peak_above_the_start():
    # In a process of its own: what others have freed would be used again.
    code = """
import torch
from convmlp_mm.benchmark.worker import Memory
kept = torch.zeros(25_000_000)
memory = Memory(torch.device('cpu'))
before = memory.above()
for size in (50_000_000, 10_000_000):
    torch.ones(size)
print(before, memory.above())
"""
    run = subprocess.run([sys.executable, '-c', code], capture_output=True, check=True)
    before, peak = map(int, run.stdout.split())
    # 200 MB, not with the second ones, and not what was there before.
    assert peak - before == pytest.approx(200e6, rel=0.1) and before < 50e6


def test_models_are_measured_in_turn_in_processes_of_their_own(tmp_path, capsys):
    path = tmp_path / 'tiny.py'
    backbone = dict(type='ConvMLP', arch=TINY, out_indices=(3,), final_norm=True)
    head = dict(type='LinearClsHead', in_channels=20, num_classes=5)
    neck = dict(type='GlobalAveragePooling')
    model = dict(type='ImageClassifier', backbone=backbone, neck=neck, head=head)
    Config(dict(default_scope='mmpretrain', model=model)).dump(path)
    out, plot = tmp_path / 'table.csv', tmp_path / 'chart.png'
    common = ['--batch-size', '2', '--shape', '32', '--rounds', '2', '--min-time', '0']
    tool.main(
        ['infer', f'{path}@published,malloc,threads=1', '--matmul', *common]
        + ['--format', 'csv', '--out', str(out), '--plot', str(plot)]
    )
    rows = list(csv.DictReader(out.read_text().splitlines()))
    for row in rows:
        low, median, high = (float(row[key]) for key in ('q1', 'ms', 'q3'))
        assert 0 < low <= median <= high
    model, product = rows
    assert model['model'] == f'{path}@published,malloc,threads=1'
    assert float(model['images/s']) == pytest.approx(2e3 / float(model['ms']), rel=1e-3)
    assert float(model['ratio']) == 1 and float(model['MiB']) > 0
    assert product['model'] == 'matmul' and product['images/s'] == '-'
    assert Image.open(plot).size[0] > 500
    assert capsys.readouterr().out == ''

    tool.main(['train', str(path), *common])
    text = capsys.readouterr().out
    assert re.search(r'tiny\.py +2 +32x32 +[\d.]+ ', text)
    assert 'train, batch of 2: median and quartiles of a step in 2 interleaved' in text


def test_failure_of_a_worker_is_said_and_ends_the_others(monkeypatch, capsys):
    started = []

    def popen(*args, **kwargs):
        started.append(process(*args, **kwargs))
        return started[-1]

    process = subprocess.Popen
    monkeypatch.setattr(rounds.subprocess, 'Popen', popen)
    product = Job(ModelSpec(MATMUL, MATMUL), 'train', 1, (0, 0), warmup=1)
    with pytest.raises(WorkerError, match="nothing@cp: ValueError: .* 'nothing'"):
        run_interleaved([product, job('nothing@cp', 'train')], 1)
    assert started[0].poll() == -signal.SIGKILL and started[1].poll() is not None

    def fail(*args, **kwargs):
        raise WorkerError('arch:s: it broke')

    monkeypatch.setattr(tool, 'run_interleaved', fail)
    with pytest.raises(SystemExit) as stopped:
        tool.main(['infer', 'arch:s', '--shape', '32'])
    assert stopped.value.code == 1
    assert capsys.readouterr().err.endswith('error: arch:s: it broke\n')


def test_process_that_is_killed_is_named(monkeypatch):
    monkeypatch.setattr(rounds.sys, 'executable', '/bin/false')
    with pytest.raises(WorkerError, match=r'matmul: the process ended \(exit code 1\)'):
        run_interleaved([Job(ModelSpec(MATMUL, MATMUL), 'infer', 1, (0, 0))], 1)


def test_number_of_processes_follows_from_the_times():
    assert needed_workers(1.0, 1.0) == needed_workers(0.1, 1.0) == 1
    assert needed_workers(0.3, 0.1) == 3 and needed_workers(1.01, 0.5) == 3
    times = [LoadingTime(0, 1.0, 0.4, 5.0), LoadingTime(2, 1.0, 0.21, 9.5)]
    text = describe_need(times, 0.2, 2)
    assert 'needs 2 processes' in text and 'none of those measured did' in text
    assert '2 did here' in describe_need(times, 0.3, 2)


def test_loading_is_timed_by_processes_and_by_steps(tmp_path, capsys):
    made = tmp_path / 'shapes'
    script = ROOT / 'tools' / 'data' / 'make_shapes_dataset.py'
    command = [sys.executable, script, made, '--train', '9', '--val', '2']
    subprocess.run([*command, '--size', '96'], check=True, capture_output=True)
    tool.main(
        ['data', 'quickstart/retinanet_convmlp_s_shapes', '--format', 'markdown']
        + ['--cfg-options', f'data_root={made}/coco', '--workers', '0', '2']
        # More than the set has.
        + ['--batches', '4', '--batch-size', '3', '--samples', '7', '--step', '100']
    )
    text = capsys.readouterr().out
    rows = [line.strip('| ').split(' | ') for line in text.splitlines() if '|' in line]
    loaders, parts = rows[2:4], {row[0]: row[1:] for row in rows[6:]}
    assert [row[0] for row in loaders] == ['0', '2']
    for _, _, milliseconds, images in loaders:
        assert float(images) == pytest.approx(3e3 / float(milliseconds), rel=0.1)
    names = ['record', 'LoadImageFromFile', 'LoadAnnotations', 'Resize', 'RandomFlip']
    assert list(parts) == [*names, 'PackDetInputs', 'collate']
    assert sum(float(share) for _, share in parts.values()) == pytest.approx(100, abs=1)
    assert 'A step of 100 s with 3 pictures needs 1 process' in text
    assert '4 batches of 3' in text


def test_pictures_of_other_classes_are_refused_in_one_line(tmp_path, capsys):
    for split in ('train', 'val'):
        (tmp_path / split / 'cat').mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / split / 'cat' / '1.jpg')
    options = ['--cfg-options', f'data_root={tmp_path}', '--workers', '0']
    with pytest.raises(SystemExit, match='2'):
        tool.main(['data', 'convmlp_s_imagenet', *options])
    assert (
        'train_dataloader of the configuration: The number of subfolders (1)'
        in (capsys.readouterr().err.splitlines()[-1])
    )
