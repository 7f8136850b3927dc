"""Measuring models against each other, and the loading of data."""

import json
from types import SimpleNamespace

import benchmark
import pytest
import torch
from reference import PublishedConvMLP, check_equal
from tiny import ARCH, write_config, write_data
from torch.optim.optimizer import register_optimizer_step_pre_hook

from convmlp_mm import ConvMLP

PUBLISHED = 'published::convmlp_s_imagenet'
RESNET = 'mmpretrain::resnet/resnet50_8xb32_in1k'
MASK_RCNN = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco'
KEYS = {'model', 'shape', 'seconds', 'q1', 'median', 'q3', 'images_per_second'}
KEYS |= {'ratio', 'memory', 'precision', 'flops', 'bytes', 'rate_share', 'copy_share'}


@pytest.fixture
def recipe(tmp_path):
    """Write the smallest recipe of a kind."""

    def write(kind):
        path = tmp_path / f'{kind}.py'
        write_config(path, kind, tmp_path / 'data')
        return path

    return write


def pair(**kwargs):
    ours = ConvMLP({**ARCH, 'depths': (1, 2, 1)}, **kwargs)
    names = {k: v for k, v in kwargs.items() if k != 'out_indices'}
    twin = PublishedConvMLP(ours.arch, out_indices=ours.out_indices, **names)
    twin.load_state_dict(ours.state_dict())
    return ours, twin


def step_of(text, mode='infer'):
    args = SimpleNamespace(mode=mode, batch_size=2, device='cpu')
    entry = benchmark.parse_entry(str(text), mode)
    return benchmark.build_step(entry, (64, 64), args)[0]


@pytest.mark.parametrize(
    'kwargs',
    [
        dict(),
        dict(out_indices=(-1,), final_norm=True, drop_path_rate=0.5),
        dict(out_indices=(0, 2), in_channels=1, drop_rate=0.2),
        dict(out_indices=0),
    ],
)
def test_twin_computes_the_same_and_the_check_changes_nothing(kwargs):
    ours, twin = pair(**kwargs)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    state = torch.get_rng_state()
    check_equal(ours, twin)
    assert torch.equal(torch.get_rng_state(), state)
    for model in (ours, twin):
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters()) and model.training


@pytest.mark.parametrize(
    'change',
    [
        lambda model: (
            model.stages[0]
            .blocks[0]
            .norm1.register_forward_hook(lambda module, args, out: out * (1 + 1e-5))
        ),
        lambda model: setattr(model.tokenizer.block[1], 'eps', 1e-3),
        # Only seen in the statistics after training, and only in the gradient.
        lambda model: setattr(model.tokenizer.block[1], 'momentum', 0.2),
        lambda model: model.conv_stages.downsample.register_forward_hook(
            lambda module, args, out: out.detach()
        ),
        lambda model: torch.nn.init.ones_(model.stages[1].blocks[0].connect.weight),
        lambda model: setattr(model.stages[1].blocks[1].drop_path, 'drop_prob', 0.4),
    ],
)
def test_structure_that_differs_is_refused(change):
    ours, twin = pair()
    change(twin)
    with pytest.raises(ValueError, match='does not compute the same and is not timed'):
        check_equal(ours, twin)


def test_twin_keeps_contiguous_memory():
    ours, twin = pair()
    seen = []
    for model in (twin, ours):
        model.conv_stages.register_forward_hook(lambda m, a, out: seen.append(out))
    outs = twin(torch.rand(2, 3, 64, 64))
    ours(torch.rand(2, 3, 64, 64))
    assert all(x.is_contiguous() for x in (*outs, *twin.parameters()))
    assert seen[0].is_contiguous() and not seen[1].is_contiguous()


@pytest.mark.parametrize(
    ('options', 'fragment'),
    [
        (['infer', f'{RESNET}@fast'], "no option 'fast' of infer in deploy, tf32"),
        (['infer', RESNET, 'nothing'], "no configuration 'nothing'; there are"),
        (['infer', f'published::{RESNET}'], 'is for ConvMLP, not for ResNet'),
        (['infer', f'{PUBLISHED}@deploy'], "'deploy' is not for published::"),
        (['infer', 'published::ablation/pure_mlp_100e'], "argument 'conv_"),
        (['train', f'{RESNET}@deploy'], "no option 'deploy' of train in tf32, bf16"),
        (['train', f'{RESNET}@tf32,bf16'], 'names more than one precision'),
        (['infer', f'{MASK_RCNN}@channels-last'], 'mmcv.RoIAlign reads such maps'),
        (['infer', RESNET, '--shape', '0', '1'], "from 1 on, not '0'"),
        (['infer', RESNET, '--device', 'cuda:99'], "invalid choice: 'cuda:99'"),
        (['infer', RESNET, '--out', 'no/table.json'], "folder 'no' does not"),
        (['data', 'retinanet_convmlp_s'], "data folder 'data/coco/'"),
        (['data', 'timm::resnet18'], "'timm::resnet18' has no train_dataloader"),
    ],
    ids=lambda value: '-'.join(value) if isinstance(value, list) else '',
)
def test_mistakes_are_one_line_before_anything_is_timed(
    options, fragment, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(benchmark, 'Timer', None)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match='2'):
        benchmark.main(options)
    printed = capsys.readouterr()
    (line,) = [n for n in printed.err.splitlines() if 'error:' in n]
    assert fragment in line and printed.out == ''
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('kind', ['classifier', 'segmentor', 'detector'])
def test_each_toolkit_is_inferred_and_trained(recipe, kind):
    path = recipe(kind)
    # With the same weights; a detector has outputs of two kinds at five levels.
    torch.testing.assert_close(
        step_of(f'published::{path}')(), step_of(path)(), rtol=1e-4, atol=1e-4
    )
    seen = []

    def look(optimizer, args, kwargs):
        groups = optimizer.param_groups
        assert all(p.grad is not None for group in groups for p in group['params'])
        seen.append((type(optimizer).__name__, {group['lr'] for group in groups}))

    hook = register_optimizer_step_pre_hook(look)
    try:
        step = step_of(f'{path}@bf16', 'train')
        step()
        step()
    finally:
        hook.remove()
    # The optimizer of the recipe, at a learning rate that leaves the weights.
    assert seen == [('SGD', {0.0})] * 3


def test_models_that_ask_the_runner_are_trained():
    # Its preprocessor looks for the number of the iteration.
    assert step_of('mmdet::yolox/yolox_tiny_8xb8-300e_coco', 'train')() is None


def test_ratio_is_the_median_over_the_rounds():
    # Twice as fast in each round, whatever else was going on.
    seconds = [[0.2, 0.1, 0.4, 0.3, 0.2], [0.1, 0.05, 0.2, 0.15, 0.1]]
    work = dict(precision='bf16', flops=300, bytes=40)
    rows = [dict(work, seconds=s) for s in seconds]
    ceilings = dict(float32=1500, copy=1000)
    for row in rows:
        benchmark.summarize(row, seconds[0], 2, ceilings)
    first, second = rows
    assert [first[key] for key in ('q1', 'median', 'q3')] == [0.2, 0.2, 0.3]
    assert (first['ratio'], second['ratio']) == (1, 2)
    assert second['images_per_second'] == 20
    # Without a rate of its own, bf16 is compared with float32.
    assert (second['rate_share'], second['copy_share']) == pytest.approx((2, 0.4))
    unsteady = dict(work, seconds=[0.1, 0.1, 0.8, 0.1, 0.4])
    benchmark.summarize(unsteady, seconds[0], 2, ceilings)
    # The rounds have 2, 1, 0.5, 3 and 0.5; the medians alone would have 2.
    assert unsteady['ratio'] == 1


def test_work_is_that_of_the_operators_without_views():
    a, b = torch.rand(8, 4), torch.rand(4, 16)
    work = benchmark.count_work(lambda: (a.t().t() @ b).add_(1).view(-1))
    # The product, and the sum: its input, and its output in the same memory.
    moved = 8 * 4 + 4 * 16 + 8 * 16 + 2 * 8 * 16
    assert work == dict(flops=2 * 8 * 4 * 16, bytes=4 * moved)


@pytest.mark.parametrize('mode', ['infer', 'train'])
def test_models_are_timed_in_turn_and_all_is_written(recipe, tmp_path, capsys, mode):
    path, out = recipe('classifier'), tmp_path / 'all.json'
    models = [str(path), f'published::{path}', f'{path}@channels-last', f'{path}@bf16']
    options = ['--batch-size', '2', '--shape', '64', '64']
    options += ['--rounds', '3', '--warmup', '1']
    benchmark.main([mode, *models, *options, '--out', str(out)])
    text = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert (found['mode'], found['batch_size'], found['rounds']) == (mode, 2, 3)
    assert found['torch'] == torch.__version__ and found['device'] == 'cpu'
    # Each model once in every round, not always in the same order.
    assert [sorted(turn) for turn in found['order']] == [[0, 1, 2, 3]] * 3
    assert len({tuple(turn) for turn in found['order']}) > 1
    assert [row['model'] for row in found['models']] == models
    for row, line in zip(found['models'], text.splitlines()[1:]):
        assert row.keys() == KEYS and len(row['seconds']) == 3
        assert row['shape'] == [64, 64] and row['memory'] is None
        assert 0 < min(row['seconds']) <= row['q1'] <= row['median'] <= row['q3']
        assert line.split()[0] == row['model']
        assert float(line.split()[1]) == pytest.approx(1e3 * row['median'], abs=0.01)
    assert found['models'][0]['ratio'] == 1
    assert f'{mode}, batch of 2: median and quartiles of a step in 3 rounds' in text
    with pytest.raises(SystemExit, match='2'):
        benchmark.main([mode, str(path), '--out', str(out)])
    assert json.loads(out.read_text()) == found


@pytest.mark.parametrize('kind', ['classifier', 'segmentor', 'detector'])
def test_loading_is_timed_for_each_number_of_workers(recipe, tmp_path, capsys, kind):
    write_data(tmp_path / 'data')
    path, out = recipe(kind), tmp_path / 'all.json'
    options = ['--workers', '0', '2', '--batch-size', '3', '--out', str(out)]
    # More batches than the set has.
    benchmark.main(['data', str(path), '--batches', '4', *options])
    loading = json.loads(out.read_text())['loading']
    assert list(loading) == ['0', '2']
    for row in loading.values():
        # The four images are a batch of three and one of one, or two of three.
        assert 1 <= row['images_per_second'] * row['batch'] <= 3
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ['workers', '0', '2']
