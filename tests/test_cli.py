"""What the command lines share."""

import contextlib
import os
import platform
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from unittest.mock import Mock

import pytest
import tiny
import torch
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper
from mmpretrain.datasets import CIFAR10, ImageNet
from mmpretrain.models import ImageClassifier
from torch.utils.data import DataLoader, Dataset

from convmlp_mm.apis import build_model
from convmlp_mm.launch import (
    add_common_arguments,
    build_runner,
    check_data,
    check_gpus,
    closing_group,
    final_mistakes,
    load_config,
    one_line_errors,
)
from convmlp_mm.launch.checks import check_annotations
from convmlp_mm.zoo import find_config, name_types


@pytest.fixture
def data(tmp_path):
    (tmp_path / 'train').mkdir()
    (tmp_path / 'train.json').write_text('{}')
    return tmp_path


def config(root, **changes):
    dataset = dict(
        type='CocoDataset',
        data_root=str(root),
        ann_file='train.json',
        data_prefix=dict(img='train/'),
    )
    dataset.update(changes)
    return Config(dict(train_dataloader=dict(dataset=dataset)))


def args(path, **changes):
    values = dict(
        config=str(path), cfg_options=None, launcher='none', work_dir=None, local_rank=0
    )
    return Namespace(**{**values, **changes})


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / 'some.py'
    path.write_text(
        "data_root = 'data/coco/'\n"
        "pipeline = [dict(x='data/y')]\n"
        "d = dict(data_root=data_root, ann_file='a.json', pipeline=pipeline)\n"
        'train_dataloader = dict(dataset=dict(dataset=d))\n'
        "val_evaluator = [dict(ann_file=data_root + 'val.json')]\n"
    )
    return path


def test_data_that_is_there_passes(data):
    check_data(config(data), ('train', 'val', 'test'))


def test_data_that_only_the_run_can_find_passes(data):
    petrel = dict(backend='petrel', path_mapping={'no/where': 's3://bucket'})
    for changes in (
        dict(data_root='no/where', backend_args=petrel),
        dict(data_root='s3://bucket'),
        # As mmengine's new style of configurations has it.
        dict(data_root='no/where', type=CIFAR10),
        dict(ann_file=['train.json', 'none.json']),
    ):
        check_data(config(data, **changes), ('train', 'val', 'test'))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (
            dict(data_root='no/where'),
            "data folder 'no/where' does not exist .*dataset.data_root",
        ),
        (dict(ann_file='b.json'), "annotation file '.*b.json'.*dataset.ann_file"),
        (dict(data_prefix=dict(img='val/')), "data folder '.*val/'.*data_prefix.img"),
        (dict(data_prefix='val'), "data folder '.*val'.*dataset.data_prefix in"),
    ],
)
def test_missing_data_is_named_with_its_key(data, changes, message):
    with pytest.raises(FileNotFoundError, match=message):
        check_data(config(data, **changes), ('train',))


def test_wrapped_data_sets_are_checked(data):
    inner = config(data, ann_file='b.json').train_dataloader.dataset
    for wrapper, key in (
        (dict(type='RepeatDataset', dataset=inner), 'dataset.dataset.ann_file'),
        (dict(type='ConcatDataset', datasets=[inner]), 'dataset.datasets.0.ann_file'),
    ):
        cfg = Config(dict(train_dataloader=dict(dataset=wrapper)))
        with pytest.raises(FileNotFoundError, match=key):
            check_data(cfg, ('train',))


def test_only_used_splits_remote_paths_and_downloads_are_left_alone(data):
    check_data(config('no/where'), ('test',))
    check_data(config('s3://bucket/coco'), ('train',))
    check_data(config('no/where', type='mmpretrain.CIFAR10'), ('train',))


def test_annotations_of_metrics_are_checked(data):
    cfg = Config(dict(val_evaluator=dict(ann_file=str(data / 'none.json'))))
    with pytest.raises(FileNotFoundError, match='val_evaluator.ann_file'):
        check_data(cfg, ('val',))


def test_missing_configuration_is_named():
    with pytest.raises(FileNotFoundError, match="configuration 'x/y.py' does not"):
        load_config(args('x/y.py'))


def test_work_dir_comes_from_option_then_configuration_then_name(config_file):
    assert load_config(args(config_file)).work_dir == 'work_dirs/some'
    assert load_config(args(config_file, work_dir='w')).work_dir == 'w'
    with pytest.raises(ValueError, match='--work-dir must name a folder'):
        load_config(args(config_file, work_dir=''))
    config_file.write_text("work_dir = 'of_config'\n")
    assert load_config(args(config_file)).work_dir == 'of_config'


@pytest.mark.parametrize('root', ['/new/root', '/new/root/'])
def test_data_root_option_moves_all_paths_below_the_old_one(config_file, root):
    options = dict(data_root=root)
    cfg = load_config(args(config_file, cfg_options=options))
    dataset = cfg.train_dataloader.dataset.dataset
    assert Path(dataset.data_root) == Path('/new/root')
    assert cfg.val_evaluator[0].ann_file == '/new/root/val.json'
    assert (dataset.ann_file, dataset.pipeline[0].x) == ('a.json', 'data/y')
    assert cfg.data_root == root


def test_option_values_keep_their_spaces():
    parser = ArgumentParser()
    add_common_arguments(parser)
    options = ['data_root=/my data/coco', 'lr=2e-4', 'scale=(320, 192)', 'cfg=None']
    parsed = parser.parse_args(['--cfg-options', *options]).cfg_options
    assert parsed == dict(
        data_root='/my data/coco', lr=2e-4, scale=(320, 192), cfg=None
    )


def test_explicit_option_wins_over_data_root(config_file):
    options = {'data_root': '/new', 'val_evaluator.0.ann_file': 'mine.json'}
    cfg = load_config(args(config_file, cfg_options=options))
    assert cfg.val_evaluator[0].ann_file == 'mine.json'


def test_errors_become_one_line_and_exit_code_2(capsys):
    with pytest.raises(SystemExit) as stop, one_line_errors():
        raise KeyError('what came')
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].endswith('error: what came')


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '8')
    check_gpus()
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    with pytest.raises(ValueError, match='8 processes need as many GPUs, but 2'):
        check_gpus()


@pytest.mark.parametrize('device', ['cpu', 'cuda'])
def test_recipe_for_accelerators_is_fitted_to_the_cpu_only(
    tmp_path, monkeypatch, capsys, device
):
    monkeypatch.setattr('convmlp_mm.launch.runner.get_device', lambda: device)
    cfg = Config(
        dict(
            model=dict(type='ConvMLP', arch='s', out_indices=(0,)),
            optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic'),
            train_dataloader=dict(),
            train_cfg=dict(max_epochs=1),
            work_dir=str(tmp_path),
            launcher='none',
            log_level='ERROR',
        )
    )
    optimizer = cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.1)
    build_runner(cfg)
    message = capsys.readouterr().err
    if device == 'cpu':
        assert cfg.optim_wrapper == dict(type='OptimWrapper', optimizer=optimizer)
        assert 'OptimWrapper instead of AmpOptimWrapper' in message
    else:
        assert cfg.optim_wrapper.type == 'AmpOptimWrapper'
        assert message == ''


def tiny_cfg(tmp_path, **changes):
    cfg = dict(
        model=dict(type='ConvMLP', arch='s', out_indices=(0,)),
        optim_wrapper=dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1)),
        train_dataloader=dict(),
        train_cfg=dict(max_epochs=1),
        work_dir=str(tmp_path),
        launcher='none',
        log_level='ERROR',
    )
    return Config(cfg | changes)


def test_bfloat16_is_kept_on_the_cpu(tmp_path, monkeypatch):
    monkeypatch.setattr('convmlp_mm.launch.runner.get_device', lambda: 'cpu')
    cfg = tiny_cfg(tmp_path)
    optimizer = cfg.optim_wrapper.optimizer
    cfg.optim_wrapper.update(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
    build_runner(cfg)
    assert cfg.optim_wrapper == dict(type='BFloat16OptimWrapper', optimizer=optimizer)


def test_processes_of_one_machine_meet_in_a_file_on_gpus_too(tmp_path, monkeypatch):
    init = Mock()
    monkeypatch.setattr('convmlp_mm.launch.runner.init_dist', init)
    monkeypatch.setattr(
        'convmlp_mm.launch.runner.RUNNERS.build', Mock(return_value=Mock(hooks=[]))
    )
    monkeypatch.setattr('convmlp_mm.launch.runner.get_device', lambda: 'cuda')
    for name, value in dict(CONVMLP_MM_STORE='/x/0', RANK='1', WORLD_SIZE='2').items():
        monkeypatch.setenv(name, value)
    env_cfg = dict(dist_cfg=dict(backend='nccl', timeout=9))
    build_runner(
        tiny_cfg(tmp_path, launcher='pytorch', runner_type='Runner', env_cfg=env_cfg)
    )
    options = dict(init_method='file:///x/0', rank=1, world_size=2)
    init.assert_called_once_with('pytorch', backend='nccl', timeout=9, **options)


@pytest.mark.parametrize(
    'option', [{'strategy.type': 'FSDPStrategy'}, {'runner_type': 'FlexibleRunner'}]
)
def test_other_ways_to_share_a_model_are_refused(config_file, option):
    with pytest.raises(ValueError, match='the tools train with DDP only'):
        load_config(args(config_file, cfg_options=option))


def test_num_classes_option_reaches_every_head(tmp_path):
    path = tmp_path / 'some.py'
    path.write_text(
        'num_classes = 80\n'
        'head = dict(num_classes=num_classes)\n'
        'model = dict(heads=[head, dict(num_classes=1)], mask_head=head)\n'
        'data_preprocessor = dict(num_classes=num_classes)\n'
        'train_dataloader = dict(dataset=dict(num_classes=80))\n'
    )
    cfg = load_config(args(path, cfg_options=dict(num_classes=6)))
    assert cfg.num_classes == 6
    assert [head.num_classes for head in cfg.model.heads] == [6, 1]
    assert cfg.model.mask_head.num_classes == 6
    assert cfg.data_preprocessor.num_classes == 6
    assert cfg.train_dataloader.dataset.num_classes == 80


@pytest.mark.skipif(
    platform.libc_ver()[0] != 'glibc', reason='other allocators have no mallopt'
)
@pytest.mark.parametrize(
    ('variables', 'kept'), [({}, True), ({'MALLOC_TOP_PAD_': '0'}, False)]
)
def test_memory_that_was_freed_is_kept_unless_the_user_has_set_malloc(variables, kept):
    code = """
import resource
from convmlp_mm.launch.process import keep_memory
print(keep_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2):
    first = faults()
    bytearray(100_000_000)
print(faults() - first)
"""
    env = {k: v for k, v in os.environ.items() if not k.startswith('MALLOC_')}
    done = subprocess.run(
        [sys.executable, '-c', code],
        env={**env, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, pages = done.stdout.split()
    assert answer == str(kept)
    # Of 4 KiB each.
    assert (int(pages) < 1000) == kept


@pytest.mark.parametrize('end', [None, SystemExit(85), RuntimeError('others wait')])
def test_group_of_processes_is_closed_unless_the_run_failed(tmp_path, end):
    store = torch.distributed.FileStore(str(tmp_path / 'store'), 1)
    torch.distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    try:
        with contextlib.suppress(SystemExit, RuntimeError), closing_group():
            if end is not None:
                raise end
        assert torch.distributed.is_initialized() == isinstance(end, RuntimeError)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    (tmp_path / 'elsewhere').mkdir()
    monkeypatch.chdir(tmp_path / 'elsewhere')
    tiny.write_data(tmp_path / 'data')
    return tmp_path


def test_a_tilde_means_the_home_folder_everywhere(home, tool):
    tiny.write_config(home / 'of_data.py', 'detector', '~/data')
    (home / 'recipe.py').write_text("_base_ = 'of_data.py'\nwork_dir = '~/runs'\n")
    name = f'experiment_name={home.name}'
    recipe, more = ('~/recipe.py', '--cfg-options', name), 'train_cfg.max_epochs=2'
    for command in (
        ['train.py', *recipe, 'train_dataloader.dataset.data_root=~/data'],
        ['train.py', *recipe, 'load_from=~/runs/epoch_1.pth'],
        ['train.py', '--resume', '~/runs/epoch_1.pth', *recipe, more],
        ['test.py', '~/recipe.py', '~/runs/epoch_1.pth', '--out=~/p.pkl'],
        ['predict.py', '~/recipe.py', '~/runs/epoch_1.pth', '~/data', '--out=~/out'],
    ):
        done = tool(*command)
        assert done.returncode == 0, done.stderr
    assert (home / 'p.pkl').exists() and (home / 'out' / 'results.json').exists()
    assert (home / 'runs' / 'epoch_2.pth').exists()
    assert os.listdir(home / 'elsewhere') == []


def test_configuration_with_classes_as_types_is_as_good_as_with_names(home, tool):
    config, weights = home / 'recipe.py', home / 'weights.pth'
    tiny.write_config(config, 'classifier', home / 'data')
    torch.save(build_model(find_config(str(config))).state_dict(), weights)
    # mmengine does not let a file that imports classes inherit from one that does not.
    text = config.read_text().replace('_base_ =', 'base =')
    imports = (
        'from mmpretrain.datasets import CustomDataset, LoadImageFromFile, PackInputs',
        'from mmpretrain.datasets import Resize',
        'from mmpretrain.models import GlobalAveragePooling, ImageClassifier',
        'from mmpretrain.models import CrossEntropyLoss, LinearClsHead',
        'from mmpretrain.engine import VisualizationHook',
        'from mmpretrain.evaluation import Accuracy',
        'from mmengine.dataset import DefaultSampler, default_collate',
        'from mmengine.optim import OptimWrapper',
        'from torch.optim import SGD',
        'from convmlp_mm import ConvMLP, SafeCheckpointHook',
    )
    kinds = ', '.join(line.partition(' import ')[2] for line in imports).split(', ')
    for kind in kinds:
        text = text.replace(f"type='{kind}'", f'type={kind}')
    hook = 'default_hooks["visualization"] = dict(type=VisualizationHook)\n'
    config.write_text('\n'.join([*imports, text, hook]))
    name = f'experiment_name={home.name}', 'optim_wrapper.dtype=bfloat16'
    # Of two runs of one name in one second, the visualizer would be the same.
    shown = '--cfg-options', f'{name[0]}_shown'
    for command in (
        ['train.py', config, '--amp', '--work-dir', home / 'w', '--cfg-options', *name],
        ['test.py', config, weights, '--show-dir', home / 'shown', *shown],
        ['predict.py', config, weights, home / 'data/images', '--out', home / 'p'],
        ['export.py', config, weights, home / 'e.onnx', '--shape', '64', '64'],
        ['complexity.py', config],
    ):
        done = tool(*map(str, command))
        assert done.returncode == 0, done.stderr
    assert list((home / 'shown').rglob('*.*'))
    # The size of the test pipeline.
    assert '64x64' in done.stdout


def test_only_what_the_scope_knows_is_named():
    class Mine(ImageClassifier):
        pass

    for kind, name in (
        (ImageClassifier, 'ImageClassifier'),
        ('mmpretrain.models.classifiers.ImageClassifier', 'ImageClassifier'),
        (torch.nn.BatchNorm2d, 'BN'),
        (AmpOptimWrapper, 'AmpOptimWrapper'),
        ('mmdet.CocoDataset', 'mmdet.CocoDataset'),
        (Mine, Mine),
    ):
        cfg = Config(dict(default_scope='mmpretrain', x=[dict(y=dict(type=kind))]))
        name_types(cfg)
        assert cfg.x[0].y.type == name
    # Of another toolkit, the name means another class.
    cfg = Config(dict(default_scope='mmseg', x=dict(type=ImageNet)))
    name_types(cfg)
    assert cfg.x.type is ImageNet


def test_loaders_without_workers_train_and_hooks_that_are_dropped_are_told(home, tool):
    tiny.write_config(home / 'recipe.py', 'detector', home / 'data')
    keys = 'persistent_workers=True', 'prefetch_factor=4'
    options = [f'{s}_dataloader.{key}' for s in ('train', 'val') for key in keys]
    command = ['train.py', home / 'recipe.py', '--work-dir', home / 'w']
    name = f'experiment_name={home.name}'
    hooks = "[{'type':'CheckDataHook'},{'type':'SummaryHook'}]"
    (home / 'child.py').write_text(f"_base_ = 'recipe.py'\ncustom_hooks = {hooks}\n")
    done = tool(*command, '--cfg-options', name, *options)
    assert done.returncode == 0, done.stderr
    assert 'leaves out' not in done.stderr
    command[1] = home / 'child.py'
    done = tool(*command, '--cfg-options', f'{name}_child')
    assert done.stderr.count('leaves out CheckWeightsHook, ChannelsLastHook') == 1
    assert 'CheckDataHook' not in done.stderr.partition('leaves out')[2].split(';')[0]
    assert 'leaves out' not in tool(*command, '--check').stderr


class Broken(Dataset):
    def __len__(self):
        return 1

    def __getitem__(self, index):
        check_annotations(dict(images=[dict(id=7), dict(id=7)]))


@pytest.mark.parametrize('workers', [0, 1])
def test_what_is_wrong_stands_alone(capsys, workers):
    with pytest.raises(SystemExit) as stop, final_mistakes():
        next(iter(DataLoader(Broken(), num_workers=workers)))
    assert stop.value.code == 2
    message = 'error: ids stand twice in images: 7\n'
    said = capsys.readouterr().err
    assert said.endswith(message) and said.count('\n') == 1


def test_errors_of_others_keep_their_trace():
    for broken in (lambda: check_annotations({'images': 1}), lambda: int('x')):
        with pytest.raises((TypeError, ValueError)), final_mistakes():
            broken()


@pytest.mark.parametrize(
    ('name', 'variables', 'expected'),
    [
        ('train.py', {}, '1000'),
        ('test.py', dict(GOMP_SPINCOUNT='7'), '7'),
        ('test.py', dict(OMP_WAIT_POLICY='PASSIVE'), '0'),
    ],
)
def test_threads_that_wait_leave_their_core_soon(tmp_path, name, variables, expected):
    ours = 'OMP_WAIT_POLICY', 'GOMP_SPINCOUNT'
    env = {k: v for k, v in os.environ.items() if k not in ours}
    # The first import of a tool that brings torch brings no more than its libgomp here.
    library = next(Path(torch.__file__).parent.glob('lib/libgomp*'))
    code = f'import ctypes\nctypes.CDLL({str(library)!r})\nraise SystemExit'
    (tmp_path / 'mmengine.py').write_text(code)
    env['PYTHONPATH'] = str(tmp_path)
    tool = Path(__file__).parents[1] / 'tools' / name
    done = subprocess.run(
        [sys.executable, tool, '--help'],
        # libgomp says what it has read.
        env={**env, 'OMP_DISPLAY_ENV': 'VERBOSE', **variables},
        capture_output=True,
        text=True,
    )
    assert f"GOMP_SPINCOUNT = '{expected}'" in done.stderr
