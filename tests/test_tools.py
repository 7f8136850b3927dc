"""The command lines, run as users run them."""

import hashlib
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.logging.history_buffer import HistoryBuffer
from reference import draw_checkpoint

from convmlp_mm import get_model

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / 'tools'
SHAPES = ROOT / 'configs' / 'quickstart' / 'retinanet_convmlp_s_shapes.py'


def run(*command, env=None, cwd=None, timeout=400):
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env=env,
    )


def python(tool, *options, **kwargs):
    return run(sys.executable, TOOLS / tool, *options, **kwargs)


def bash(tool, *options, **kwargs):
    return run('bash', TOOLS / tool, *options, **kwargs)


def assert_one_line_error(result, *fragments):
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if 'error:' in line]
    assert len(lines) == 1 and 'Traceback' not in result.stderr, result.stderr
    for fragment in fragments:
        assert fragment in lines[0]


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'shapes of tests'
    made = python(
        'data/make_shapes_dataset.py', out, '--train', 16, '--val', 6, '--size', 96
    )
    assert made.returncode == 0, made.stderr
    return out


@pytest.mark.parametrize(
    ('command', 'fragments'),
    [
        (('dist_train.sh', 'no/config.py', 2), ["configuration 'no/config.py'"]),
        (
            ('dist_train.sh', ROOT / 'configs' / 'retinanet_convmlp_s.py', 2),
            ["data folder 'data/coco/'", 'train_dataloader.dataset.data_root'],
        ),
        (('dist_train.sh', SHAPES, '2 4'), ["but got '2 4'"]),
        (('dist_test.sh', SHAPES, 'no.pth', 1), ["checkpoint 'no.pth'"]),
    ],
)
def test_launchers_report_mistakes_before_starting(tmp_path, command, fragments):
    result = bash(*command, cwd=tmp_path)
    assert_one_line_error(result, *fragments)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('tool', ['dist_train.sh', 'dist_test.sh'])
def test_launchers_say_how_they_are_used(tool):
    result = bash(tool, SHAPES)
    assert result.returncode == 2
    assert result.stderr.startswith(f'usage: {tool} CONFIG')


def test_missing_annotation_file_is_named(shapes, tool):
    options = ['--cfg-options', f'data_root={shapes}/coco']
    options.append('train_dataloader.dataset.ann_file=annotations/none.json')
    result = tool('train.py', SHAPES, '--check', *options)
    assert_one_line_error(result, 'annotations/none.json', 'dataset.ann_file')


@pytest.mark.parametrize(
    ('options', 'fragment'),
    [
        (['--resume', 'no.pth'], "checkpoint 'no.pth' does not exist"),
        (['--auto-scale-lr', '--cfg-options', 'auto_scale_lr={}'], 'base_batch_size'),
        pytest.param(
            ['--amp', '--cfg-options', 'optim_wrapper.dtype=float16'],
            '--amp on the CPU trains in bfloat16, but optim_wrapper.dtype is float16',
            marks=pytest.mark.skipif(
                torch.cuda.is_available(), reason='with a GPU it is no mistake'
            ),
        ),
    ],
)
def test_train_reports_options_that_cannot_be_met(
    tmp_path, monkeypatch, tool, options, fragment
):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(tool('train.py', SHAPES, *options), fragment)
    assert not any(tmp_path.iterdir())


def scalars(work_dir):
    """All records of the newest run, as mmengine writes them line by line."""
    newest = max(work_dir.glob('*/vis_data/scalars.json'))
    return [json.loads(line) for line in newest.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_train_and_test(shapes, tmp_path, tool):
    work = tmp_path / 'work dir'
    options = ['--cfg-options', f'data_root={shapes}/coco']
    options += ['train_dataloader.batch_size=2', 'optim_wrapper.optimizer.lr=3e-3']
    options += ['param_scheduler.0.end=2', 'model.test_cfg.score_thr=0.0']
    options += ['default_hooks.logger.interval=1', 'train_cfg.val_interval=1']
    options += ['default_hooks.checkpoint.interval=1']
    train = ['dist_train.sh', SHAPES, 2, '--work-dir', work]

    done = bash(*train, *options, 'train_cfg.max_epochs=2', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    records = scalars(work)
    # 16 images, 2 processes with 2 each.
    assert [r['step'] for r in records if 'loss' in r] == list(range(1, 9))
    trained = [r for r in records if 'coco/bbox_mAP_50' in r][-1]

    dump = tmp_path / 'predictions'
    test = ['dist_test.sh', SHAPES, work / 'epoch_2.pth', 2, *options]
    test += [f'test_evaluator.outfile_prefix={dump}']
    tested = bash(*test, '--work-dir', tmp_path / 'test', cwd=tmp_path)
    assert tested.returncode == 0, tested.stderr[-2000:]
    for key in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_m'):
        (value,) = set(re.findall(rf'{key}: (-?[\d.]+)', tested.stdout))
        assert float(value) == trained[key]

    sheet = tmp_path / 'sheet.png'
    annotations = shapes / 'coco' / 'annotations' / 'instances_val2017.json'
    files = [f'{dump}.bbox.json', annotations, shapes / 'coco' / 'val2017', sheet]
    drawn = tool('data/show_detections.py', *files, '--num', 3, '--score-thr', 0.1)
    assert drawn.returncode == 0, drawn.stderr
    assert sheet.read_bytes().startswith(b'\x89PNG')


SMALL = ['default_hooks.logger.interval=1', 'model.backbone.init_cfg=None']
SMALL += [f'{split}_dataloader.num_workers=1' for split in ('train', 'val')]
EPOCHS = ['train_dataloader.dataset.indices=4', 'val_dataloader.dataset.indices=2']
EPOCHS += ['train_dataloader.batch_size=2']
DETECTION = ['num_classes=6', 'train_dataloader.dataset.pipeline.2.scale=(96,96)']
DETECTION += ['val_dataloader.dataset.pipeline.1.scale=(96,96)', *EPOCHS]
CLASSES = {
    'imagenet': ['circle', 'cross', 'ring', 'square', 'star', 'triangle'],
    'coco': ['circle', 'square', 'triangle', 'star', 'ring', 'cross'],
}
HEADLINES = {
    'convmlp_s_imagenet': (
        'imagenet',
        'accuracy/top1',
        [
            'num_classes=6',
            'param_scheduler=None',
            'train_dataloader.dataset.pipeline.1.scale=64',
            'val_dataloader.dataset.pipeline.1.scale=64',
            'val_dataloader.dataset.pipeline.2.crop_size=64',
            *EPOCHS,
        ],
    ),
    'retinanet_convmlp_s': (
        'coco',
        'coco/bbox_mAP',
        [*DETECTION, 'model.test_cfg.score_thr=0.0'],
    ),
    'mask_rcnn_convmlp_s': (
        'coco',
        'coco/segm_mAP',
        [
            *DETECTION,
            'model.train_cfg.rcnn.sampler.num=16',
            'model.test_cfg.rpn.max_per_img=50',
            'model.test_cfg.rcnn.max_per_img=10',
        ],
    ),
    # The recipe's own 150 classes, of which the data have eight.
    'semantic_fpn_convmlp_s': (
        'ade/ADEChallengeData2016',
        'mIoU',
        [
            'model.data_preprocessor.size=(64,64)',
            'train_dataloader.dataset.pipeline.2.scale=(96,96)',
            'train_dataloader.dataset.pipeline.3.crop_size=(64,64)',
            'val_dataloader.dataset.pipeline.1.scale=(96,96)',
            'train_cfg.val_interval=2',
            'default_hooks.checkpoint.interval=2',
        ],
    ),
}


def headline(name, shapes):
    """Return a headline configuration, and options that make it small."""
    data, _, options = HEADLINES[name]
    options = ['--cfg-options', f'data_root={shapes}/{data}', *SMALL, *options]
    for split in ('train', 'val') if data in CLASSES else ():
        key = f'{split}_dataloader.dataset.metainfo.classes'
        options.append(f'{key}={CLASSES[data]}'.replace(' ', ''))
    return ROOT / 'configs' / f'{name}.py', options


@pytest.mark.slow
@pytest.mark.parametrize('name', HEADLINES)
def test_headline_trains_validates_saves_and_resumes(shapes, tmp_path, name, tool):
    metric, by_iter = HEADLINES[name][1], name.startswith('semantic')
    config, options = headline(name, shapes)
    for i, resume in enumerate([[], ['--resume']], start=1):
        end = f'max_iters={2 * i}' if by_iter else f'max_epochs={i}'
        command = ['train.py', config, '--work-dir', tmp_path, *resume, *options]
        done = tool(*command, f'train_cfg.{end}')
        assert done.returncode == 0, done.stderr[-2000:]
        last = (tmp_path / 'last_checkpoint').read_text()
        assert last.endswith(f'iter_{2 * i}.pth' if by_iter else f'epoch_{i}.pth')
        records = scalars(tmp_path)
        losses = [r for r in records if 'loss' in r]
        assert [r['step'] for r in losses] == [2 * i - 1, 2 * i]
        assert all(math.isfinite(r['loss']) for r in losses)
        # Resumed, it begins with the one that follows the checkpoint.
        assert sum(metric in r for r in records) == i


# RetinaNet has trained in two processes above, the classifier does in
# test_distributed_equality.py.
@pytest.mark.slow
@pytest.mark.parametrize('name', ['mask_rcnn_convmlp_s', 'semantic_fpn_convmlp_s'])
def test_headline_trains_in_two_processes(shapes, tmp_path, name):
    config, options = headline(name, shapes)
    by_iter = name.startswith('semantic')
    end = 'max_iters=2' if by_iter else 'max_epochs=2'
    train = ['dist_train.sh', config, 2, '--work-dir', tmp_path, *options]
    done = bash(*train, f'train_cfg.{end}', cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    records = scalars(tmp_path)
    losses = [r['loss'] for r in records if 'loss' in r]
    assert len(losses) == 2 and all(map(math.isfinite, losses))
    assert sum(HEADLINES[name][1] in r for r in records) == (1 if by_iter else 2)
    if by_iter:
        # Said once, not by each process.
        assert done.stderr.count('on the CPU, with') == (not torch.cuda.is_available())


def test_published_file_has_the_weights_only_and_its_hash_in_the_name(tmp_path, tool):
    weights = {'backbone.a': torch.rand(3, 2), 'head.b': torch.arange(5)[1:3]}
    checkpoint = dict(
        state_dict=weights,
        ema_state_dict={f'module.{k}': v for k, v in weights.items()},
        optimizer=dict(state={0: torch.rand(1000)}),
        message_hub=dict(log_scalars={'loss': HistoryBuffer([1.0], [1])}),
        meta=dict(epoch=3, dataset_meta=dict(classes=('a', 'b'))),
    )
    torch.save(checkpoint, tmp_path / 'epoch_3.pth')
    command = ['publish_model.py', tmp_path / 'epoch_3.pth', tmp_path / 'model.pth']
    done = tool(*command)
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob('model-*.pth')
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert path.name == f'model-{digest[:8]}.pth'
    assert done.stdout.splitlines()[0] == str(path)
    assert f'SHA256: {digest}' in done.stdout
    published = torch.load(path, weights_only=True)
    assert published['meta'] == dict(dataset_meta=dict(classes=('a', 'b')))
    assert published['state_dict'].keys() == weights.keys()
    for key, value in weights.items():
        assert torch.equal(published['state_dict'][key], value)

    # The same weights make the same file, which is not written over.
    assert_one_line_error(tool(*command), 'is already there', path.name)
    assert len(list(tmp_path.iterdir())) == 2
    missing = tool('publish_model.py', 'no.pth', tmp_path / 'x.pth')
    assert_one_line_error(missing, "checkpoint 'no.pth' does not exist")


class OpensADoor:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
def test_load_from_takes_published_weights_and_refuses_others(shapes, tmp_path, tool):
    options = ['--work-dir', tmp_path, '--cfg-options', f'data_root={shapes}/coco']
    options += ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=4']
    weights, larger, evil = (tmp_path / f'{name}.pth' for name in ('s', 'm', 'evil'))
    door = tmp_path / 'door'
    torch.save(draw_checkpoint('s'), weights)
    torch.save(draw_checkpoint('m'), larger)
    torch.save(dict(state_dict={}, x=OpensADoor(str(door))), evil)

    trained = tool('train.py', SHAPES, *options, f'load_from={weights}')
    log = trained.stdout + trained.stderr
    assert trained.returncode == 0, log[-2000:]
    assert f'RetinaNet: loaded 180 of 244 tensors from {weights}' in log
    assert 'skipped backbone.norm.weight, backbone.norm.bias, head.fc.weight' in log
    # One epoch is less than the interval: only the last checkpoint is there.
    assert Path((tmp_path / 'last_checkpoint').read_text()).is_file()

    # What starts a training is not enough for a test.
    done = tool('test.py', SHAPES, weights, *options)
    assert done.returncode == 2 and 'missing: neck.lateral_convs.0' in done.stderr
    done = tool('train.py', SHAPES, *options, f'load_from={larger}')
    message = 'The file is ConvMLP-M; the configuration says ConvMLP-S\n'
    assert done.returncode == 2 and done.stderr.endswith(message)
    done = tool('test.py', SHAPES, evil, *options)
    assert done.returncode == 2 and 'objects that are not allowed' in done.stderr
    assert not door.exists()


@pytest.mark.slow
def test_one_process_draws_into_show_dir(shapes, tmp_path, tool):
    options = ['--work-dir', tmp_path, '--cfg-options', f'data_root={shapes}/coco']
    checkpoint = tmp_path / 'weights.pth'
    torch.save(get_model(str(SHAPES)).state_dict(), checkpoint)
    shown = tool('test.py', SHAPES, checkpoint, '--show-dir', 'shown', *options)
    assert shown.returncode == 0, shown.stderr[-2000:]
    assert len(list(tmp_path.glob('*/shown/*.jpg'))) == 6


@pytest.mark.slow
def test_views_of_an_image_are_averaged(shapes, tmp_path, tool):
    options = ['--work-dir', tmp_path, '--cfg-options', f'data_root={shapes}/coco']
    checkpoint = tmp_path / 'weights.pth'
    torch.save(get_model(str(SHAPES)).state_dict(), checkpoint)
    key = 'tta_pipeline.1.transforms.0'
    scales = [f'{key}.{i}.scale=({n},{n})' for i, n in enumerate((96, 64, 128))]
    options += [*scales, 'model.test_cfg.score_thr=0.0']
    averaged = tool('test.py', SHAPES, checkpoint, '--tta', *options)
    assert averaged.returncode == 0, averaged.stderr[-2000:]
    assert 'coco/bbox_mAP' in averaged.stdout


@pytest.mark.slow
def test_quickstart_ends_with_a_figure_and_a_picture(tmp_path):
    out = tmp_path / 'quick start'
    short = ['train_cfg.max_epochs=1', 'train_dataloader.dataset.indices=16']
    short += [f'{split}_dataloader.dataset.indices=16' for split in ('val', 'test')]
    result = bash('quickstart.sh', out, *short)
    assert result.returncode == 0, result.stderr[-2000:]
    assert re.search(
        r'^AP50: [01][\d.]* .*on the validation', result.stdout, re.MULTILINE
    )
    assert str(out / 'detections.png') in result.stdout
    assert (out / 'detections.png').read_bytes().startswith(b'\x89PNG')
