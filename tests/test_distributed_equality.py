"""Two processes with N images each do what one with 2N does.

All cases run in one pair of processes and once in this one: most of the time is
imports. Training is in float64: AdamW divides by the size of the gradient, so that
what float32 rounds in a gradient that is nearly zero becomes a step of full size.
"""

import json
import os
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from mmengine import load
from mmengine.config import Config
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, MODELS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData, PixelData
from torch import multiprocessing, nn
from torch.utils.data import Dataset
from toy import free_port

from convmlp_mm import SyncStatisticsHook
from convmlp_mm.launch import build_runner, closing_group

# They share what has been trained.
pytestmark = pytest.mark.xdist_group('equality')
CONFIGS = Path(__file__).parents[1] / 'configs'
SIZE = 64
STEPS = 5
CLASSES = ('circle', 'square', 'star')
# By configuration.
METRICS = {
    'retinanet_convmlp_s': 'coco/bbox_mAP',
    'semantic_fpn_convmlp_s': 'mIoU',
    'convmlp_s_imagenet': 'accuracy/top1',
}


class GlooSyncBN(nn.BatchNorm2d):
    """torch's SyncBatchNorm refuses tensors of the CPU: the same by two sums."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        count = x.numel() / x.shape[1] * dist.get_world_size()
        shape = 1, -1, 1, 1
        mean = dist_functional.all_reduce(x.sum((0, 2, 3))) / count
        centred = x - mean.view(shape)
        var = dist_functional.all_reduce(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        return centred * scale.view(shape) + self.bias.view(shape)


def make_data(root):
    """Noise with boxes: the losses need not be learned, only be the same."""
    rng = np.random.default_rng(0)
    for folder in ('img', 'seg'):
        (root / folder).mkdir()
    images, same, varied = [], [], []
    for i in range(2 * STEPS):
        pixels = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
        cv2.imwrite(str(root / 'img' / f'{i}.png'), pixels)
        labels = np.repeat(rng.integers(1, 6, (SIZE, 1), dtype=np.uint8), SIZE, 1)
        cv2.imwrite(str(root / 'seg' / f'{i}.png'), labels)
        images.append(dict(id=i, file_name=f'{i}.png', height=SIZE, width=SIZE))
        boxes = [[8.0, 12.0, 40.0, 36.0]]
        same += [(i, box) for box in boxes]
        # One object in every other image, four in the others.
        if i % 2:
            boxes += [[4.0 * j, 30.0, 33.0, 33.0 - j] for j in range(1, 4)]
        varied += [(i, box) for box in boxes]
    categories = [dict(id=i, name=name) for i, name in enumerate(CLASSES)]
    for name, pairs in (('same', same), ('varied', varied)):
        objects = [
            dict(id=k, image_id=i, category_id=k % 3, bbox=box, iscrowd=0)
            | dict(area=box[2] * box[3])
            for k, (i, box) in enumerate(pairs, start=1)
        ]
        for number in (len(images), 7):
            content = dict(
                images=images[:number],
                annotations=[o for o in objects if o['image_id'] < number],
                categories=categories,
            )
            (root / f'{name}{number}.json').write_text(json.dumps(content))
    (root / 'seven.txt').write_text('\n'.join(str(i) for i in range(7)))
    (root / 'labels.txt').write_text('\n'.join(f'{i}.png {i % 5}' for i in range(7)))


DETECTION = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs'),
]
SEGMENTATION = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', reduce_zero_label=True),
    dict(type='PackSegInputs'),
]


def detection_data(root, annotations):
    return dict(
        data_root=str(root),
        ann_file=annotations,
        data_prefix=dict(img='img'),
        metainfo=dict(classes=CLASSES),
        pipeline=DETECTION,
    )


def retinanet(root, annotations, images=2 * STEPS):
    cfg = Config.fromfile(CONFIGS / 'retinanet_convmlp_s.py')
    cfg.model.bbox_head.num_classes = len(CLASSES)
    data = detection_data(root, annotations)
    cfg.train_dataloader.dataset.update(data, indices=images)
    cfg.train_cfg.max_epochs = 1
    return cfg


def semantic_fpn(root):
    cfg = Config.fromfile(CONFIGS / 'semantic_fpn_convmlp_s.py')
    cfg.model.data_preprocessor.size = (SIZE, SIZE)
    cfg.model.decode_head.dropout_ratio = 0.0
    cfg.train_dataloader.dataset.update(
        data_root=str(root),
        data_prefix=dict(img_path='img', seg_map_path='seg'),
        img_suffix='.png',
        pipeline=SEGMENTATION,
    )
    cfg.train_cfg.max_iters = STEPS
    # Of the whole gradient, which the processes must have averaged before.
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.1)
    return cfg


def train(cfg, sync_bn=True):
    """Train STEPS steps of two images; return the losses, weights and buffers."""
    cfg.model.backbone.update(init_cfg=None, drop_path_rate=0.0)
    cfg.train_dataloader.update(
        num_workers=0,
        persistent_workers=False,
        batch_size=2 // (dist.get_world_size() if dist.is_initialized() else 1),
    )
    for part in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'val_{part}'] = cfg[f'test_{part}'] = None
    # The schedules' warm-up of 500 steps would leave the weights as they were.
    cfg.param_scheduler = None
    cfg.default_hooks.pop('checkpoint')
    torch.set_default_dtype(torch.float64)
    try:
        runner = build_runner(cfg)
        model = getattr(runner.model, 'module', runner.model)
        if sync_bn and dist.is_initialized():
            for module in model.modules():
                if type(module) is nn.BatchNorm2d:
                    module.__class__ = GlooSyncBN

        def to_double(module, args, output):
            output['inputs'] = output['inputs'].double()

        # The toolkits' preprocessors make single precision of every image.
        model.data_preprocessor.register_forward_hook(to_double)
        runner.train()
    finally:
        torch.set_default_dtype(torch.float32)
    losses, _ = runner.message_hub.get_scalar('train/loss').data
    return dict(losses=torch.tensor(losses), state=model.state_dict())


@DATASETS.register_module()
class Images(Dataset):
    """Four of them."""

    def __getitem__(self, index):
        shape = 3, 96, 96
        return dict(inputs=torch.arange(3.0 * 96 * 96).mul(index + 1).sin().view(shape))

    def __len__(self):
        return 4


@MODELS.register_module()
class Oracle(BaseModel):
    """Predicts the ground truth, less well for the later images."""

    def __init__(self, data_preprocessor):
        super().__init__(data_preprocessor)
        # DDP wants a parameter.
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, inputs, data_samples, mode='predict'):
        for sample in data_samples:
            i = int(Path(sample.img_path).stem)
            if 'gt_instances' in sample:
                boxes = sample.gt_instances.bboxes
                sample.pred_instances = InstanceData(
                    bboxes=boxes + 3 * i,
                    labels=(sample.gt_instances.labels + i // 3) % len(CLASSES),
                    scores=torch.linspace(1, 0.5, len(boxes)) - i / 20,
                )
            elif 'gt_sem_seg' in sample:
                labels = sample.gt_sem_seg.data.clone()
                labels[:, : 8 * i] = i
                sample.pred_sem_seg = PixelData(data=labels)
            else:
                sample.set_pred_score(torch.eye(6)[i % 4])
        return data_samples


def metric_config(name, root):
    """The evaluator and test loader of a configuration, with seven images."""
    cfg = Config.fromfile(CONFIGS / f'{name}.py')
    dataset = cfg.test_dataloader.dataset
    if 'retinanet' in name:
        dataset.update(detection_data(root, 'varied7.json'))
        cfg.test_evaluator.ann_file = str(root / 'varied7.json')
    elif 'semantic' in name:
        dataset.update(
            data_root=str(root),
            data_prefix=dict(img_path='img', seg_map_path='seg'),
            img_suffix='.png',
            ann_file='seven.txt',
            pipeline=SEGMENTATION,
        )
    else:
        cfg.test_dataloader.dataset = dict(
            type='CustomDataset',
            data_root=str(root),
            ann_file='labels.txt',
            data_prefix='img',
            classes=[str(i) for i in range(6)],
            pipeline=[dict(type='LoadImageFromFile'), dict(type='PackInputs')],
        )
    return cfg


def evaluate(cfg, dump):
    preprocessor = cfg.model.get('data_preprocessor') or dict(
        cfg.data_preprocessor, type='ClsDataPreprocessor'
    )
    cfg.model = dict(type='Oracle', data_preprocessor=preprocessor)
    cfg.data_preprocessor = None
    for part in ('dataloader', 'evaluator', 'cfg'):
        cfg[f'val_{part}'] = cfg[f'train_{part}'] = None
    cfg.optim_wrapper = cfg.param_scheduler = None
    cfg.test_dataloader.update(num_workers=0, persistent_workers=False, batch_size=2)
    cfg.test_evaluator = [
        cfg.test_evaluator,
        dict(type='DumpResults', out_file_path=dump),
    ]
    # Of 150 classes, most have no pixel.
    metrics = {k: v for k, v in build_runner(cfg).test().items() if v == v}
    # The first process writes them, when it has all.
    first = is_main_process()
    names = [Path(sample['img_path']).stem for sample in load(dump)] if first else None
    return metrics, names


class Toy(BaseModel):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, inputs, mode='loss'):
        return dict(loss=self.norm(inputs).square().mean())


def average(work_dir, hooks):
    """Train a toy with a moving average; return its state as this process has it."""
    images = torch.arange(60.0).view(20, 3).square()
    wrapper = dict(
        type='MMDistributedDataParallel', device_ids=None, broadcast_buffers=False
    )
    ema = EMAHook(momentum=0.1, update_buffers=True)
    runner = Runner(
        Toy(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=[dict(inputs=image) for image in images],
            batch_size=2,
            collate_fn=dict(type='default_collate'),
            sampler=dict(type='InfiniteSampler', shuffle=False),
        ),
        train_cfg=dict(by_epoch=False, max_iters=4),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', interval=4, by_epoch=False)
        ),
        custom_hooks=[ema, *hooks],
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=wrapper),
        experiment_name=str(work_dir.name),
        log_level='ERROR',
    )
    runner.train()
    return dict(
        model=runner.model.module.state_dict(), ema=ema.ema_model.module.state_dict()
    )


def run_cases(root, work_dir):
    """Run everything in this process, which may be one of two."""
    distributed = dist.is_initialized()
    cases = dict(
        retinanet=partial(retinanet, root, f'same{2 * STEPS}.json'),
        retinanet_varied=partial(retinanet, root, f'varied{2 * STEPS}.json', images=4),
        semantic_fpn=partial(semantic_fpn, root),
    )
    for name in METRICS:
        cases[name] = partial(metric_config, name, root)
    results = {}
    for name, make in cases.items():
        cfg = make()
        cfg.work_dir = str(work_dir)
        cfg.experiment_name = name
        cfg.log_level = 'ERROR'
        cfg.launcher = 'pytorch' if distributed else 'none'
        if name in METRICS:
            results[name] = evaluate(cfg, str(work_dir / f'{name}.pkl'))
        else:
            results[name] = train(cfg)
    if distributed:
        # With and without what the configurations list.
        for name, hooks in (('shared', [SyncStatisticsHook()]), ('own', [])):
            results[name] = average(work_dir / name, hooks)
    return results


@closing_group()
def work(rank, root, port, work_dir):
    os.environ.update(
        MASTER_ADDR='127.0.0.1',
        MASTER_PORT=str(port),
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE='2',
    )
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    torch.save(run_cases(root, work_dir), work_dir / f'rank{rank}.pth')


@pytest.fixture(scope='module')
def results(tmp_path_factory):
    """Results of the first and the second of two processes, and of one alone."""
    root = tmp_path_factory.mktemp('data')
    make_data(root)
    pair = tmp_path_factory.mktemp('two')
    multiprocessing.spawn(work, (root, free_port(), pair), nprocs=2)
    scopes = dict(DefaultScope._instance_dict)
    try:
        alone = run_cases(root, tmp_path_factory.mktemp('one'))
    finally:
        DefaultScope._instance_dict.clear()
        DefaultScope._instance_dict.update(scopes)
    read = partial(torch.load, weights_only=False)
    return read(pair / 'rank0.pth'), read(pair / 'rank1.pth'), alone


@pytest.mark.slow
@pytest.mark.parametrize('name', ['retinanet', 'semantic_fpn'])
def test_two_processes_train_as_one_with_twice_the_batch(results, name):
    first, second, alone = (result[name] for result in results)
    assert len(alone['losses']) == STEPS
    # Each process has the loss of its own images.
    assert not torch.allclose(first['losses'], second['losses'], rtol=1e-6)
    mean = (first['losses'] + second['losses']) / 2
    # The toolkits add an epsilon to the number that they divide by.
    torch.testing.assert_close(mean, alone['losses'], rtol=1e-8, atol=0)
    assert alone['losses'][-1] < 0.95 * alone['losses'][0]
    for key, value in alone['state'].items():
        torch.testing.assert_close(
            first['state'][key], value, rtol=1e-8, atol=1e-9, msg=key
        )
        assert torch.equal(first['state'][key], second['state'][key]), key


@pytest.mark.slow
def test_retinanet_divides_by_the_objects_of_its_own_process(results):
    first, second, alone = (result['retinanet_varied'] for result in results)
    # mmdet's, which docs/clusters.md tells: if this fails, it has changed.
    mean = (first['losses'] + second['losses']) / 2
    assert (mean / alone['losses'] - 1).abs().max() > 1e-3
    for key, value in first['state'].items():
        assert torch.equal(value, second['state'][key]), key


@pytest.mark.slow
@pytest.mark.parametrize('name', METRICS)
def test_metrics_are_those_of_one_process(results, name):
    first, second, alone = (result[name] for result in results)
    assert first == alone and second == (alone[0], None)
    # Neither of nothing nor of all, and nothing twice.
    assert 0 < alone[0][METRICS[name]] < 100 and alone[0][METRICS[name]] != 1
    assert alone[1] == [str(i) for i in range(7)]


@pytest.mark.slow
def test_saved_statistics_are_those_of_all_processes(results):
    first, second, _ = results
    for kind in ('model', 'ema'):
        for key, value in first['shared'][kind].items():
            assert torch.equal(value, second['shared'][kind][key]), (kind, key)
            own = [result['own'][kind][key] for result in (first, second)]
            assert 'running' not in key or not torch.allclose(*own, rtol=1e-2)
            mean = torch.stack(own).double().mean(0).to(value.dtype)
            torch.testing.assert_close(value, mean)
