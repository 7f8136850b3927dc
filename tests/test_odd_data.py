"""What real data sets and recipes contain must train: none of it is a mistake."""

import json
import math
import pickle
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tiny
from mmcv.transforms import RandomFlip, Resize
from mmdet.datasets import CocoPanopticDataset
from mmengine.config import Config

from convmlp_mm import get_model
from convmlp_mm.hooks.data import WatchedPipeline, check_heads, check_neck

RNG = np.random.default_rng(1)
# Some sizes at which rounding, padding and cropping go wrong.
PICTURES = {
    'grey.jpg': (tiny.HEIGHT, tiny.WIDTH),
    'alpha.png': (tiny.HEIGHT, tiny.WIDTH, 4),
    'deep.png': (tiny.HEIGHT, tiny.WIDTH, 3),
    'deep_grey.png': (tiny.HEIGHT, tiny.WIDTH),
    'one_pixel.png': (1, 1, 3),
    'odd.jpg': (37, 5, 3),
    'wide.jpg': (8, 20000, 3),
    'high.png': (5000, 3, 3),
    'plain.jpg': (tiny.HEIGHT, tiny.WIDTH, 3),
    'turned.jpg': (tiny.WIDTH, tiny.HEIGHT, 3),
}


def write_pictures(folder):
    """Write them, and return width and height by name."""
    folder.mkdir(parents=True)
    for name, shape in PICTURES.items():
        kind = np.uint16 if name.startswith('deep') else np.uint8
        pixels = RNG.integers(0, np.iinfo(kind).max, shape, kind)
        assert cv2.imwrite(str(folder / name), pixels)
    return {name: (shape[1], shape[0]) for name, shape in PICTURES.items()}


def write_boxes(path, sizes):
    names = list(sizes)
    images = [
        dict(id=i, file_name=name, width=sizes[name][0], height=sizes[name][1])
        for i, name in enumerate(names, 1)
    ]
    number = {name: i for i, name in enumerate(names, 1)}
    crowd = dict(size=[tiny.HEIGHT, tiny.WIDTH], counts=[99, 200, 2773])
    boxes = [
        ('grey.jpg', (8, 8, 30, 30), {}),
        # deep.png has no objects.
        ('alpha.png', (4, 4, 40, 20), dict(iscrowd=1, segmentation=crowd)),
        ('deep_grey.png', (50, 30, 40, 40), {}),
        ('one_pixel.png', (0, 0, 1, 1), {}),
        ('odd.jpg', (0, 30, 5, 7), {}),
        ('wide.jpg', (100, 0, 19000, 8), {}),
        ('high.png', (0, 0, 3, 4000), {}),
        ('plain.jpg', (10, 10, 0.5, 0.2), {}),
        ('plain.jpg', (70, 60, 10, 10), {}),
        ('plain.jpg', (10, 10, 2, 2), {}),
        ('plain.jpg', (-5, -5, 30, 30), {}),
    ]
    annotations = [
        tiny.box(i, number[name], bbox, category=1 + i % 2, **more)
        for i, (name, bbox, more) in enumerate(boxes, 1)
    ]
    # Of an image and a category that somebody has taken out.
    annotations += [tiny.box(90, 99), tiny.box(91, 1, category=7)]
    categories = [dict(id=1 + i, name=name) for i, name in enumerate(tiny.CLASSES)]
    content = dict(images=images, annotations=annotations, categories=categories)
    path.write_text(json.dumps(content))


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Config, 'pretty_text', property(repr))
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    folder = tmp_path / 'data'
    sizes = write_pictures(folder / 'images')
    write_boxes(folder / 'boxes.json', sizes)
    (folder / 'labels').mkdir()
    for name, (width, height) in sizes.items():
        labels = RNG.choice(np.uint8([0, 1, 255]), (height, width))
        cv2.imwrite(str(folder / 'labels' / f'{name}.png'), labels)
    lines = [f'{name} {i % 2}\n' for i, name in enumerate(sizes)]
    (folder / 'labels.txt').write_text(''.join(lines))
    (folder / 'names.txt').write_text(''.join(f'{name}\n' for name in sizes))
    return folder


OPTIONS = {
    # The recipe's 1333 pixels, in which a wide image is still one pixel high.
    'detector': [
        'train_dataloader.dataset.pipeline.2.scale=(1333,64)',
        'val_dataloader.dataset.pipeline.1.scale=(1333,64)',
    ],
    'segmentor': [
        'train_dataloader.dataset.pipeline.2.scale=(2048,64)',
        'val_dataloader.dataset.pipeline.1.scale=(2048,64)',
        *(
            f'{split}_dataloader.dataset.{key}'
            for split in ('train', 'val')
            for key in ('ann_file=names.txt', 'img_suffix=', 'seg_map_suffix=.png')
        ),
        'val_dataloader.batch_size=1',
    ],
    'classifier': [],
}
METRIC = dict(detector='coco/bbox_mAP', segmentor='mIoU', classifier='accuracy/top1')


@pytest.mark.slow
@pytest.mark.parametrize('kind', OPTIONS)
def test_odd_data_train_and_validate(data, tmp_path, tool, kind):
    recipe, work = tmp_path / 'recipe.py', tmp_path / 'work'
    tiny.write_config(recipe, kind, data)
    options = ['--cfg-options', f'experiment_name={tmp_path.name}', *OPTIONS[kind]]
    done = tool('train.py', recipe, '--work-dir', work, *options)
    assert done.returncode == 0, done.stderr
    (path,) = work.glob('*/vis_data/scalars.json')
    records = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [record['loss'] for record in records if 'loss' in record]
    assert len(losses) == len(PICTURES) // 2 and all(map(math.isfinite, losses))
    assert sum(METRIC[kind] in record for record in records) == 1
    assert (work / 'epoch_1.pth').is_file()
    if kind == 'detector':
        log = done.stdout + done.stderr
        words = (
            '2 of 13 annotations are of images or categories it has not and dropped',
            '1 of 13 annotations have boxes smaller than a pixel and are dropped',
            '1 of 13 annotations have boxes outside of their image and are dropped',
            '2 of 13 annotations have boxes that reach out of their image and are clip',
        )
        assert all(f"boxes.json': {text}" in log for text in words)


CLASSES = tuple(map(str, range(19)))


@pytest.mark.parametrize(
    ('name', 'metainfo'),
    [
        # The boxes are of the 80 things, the maps of all 133.
        (
            'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco',
            CocoPanopticDataset.METAINFO,
        ),
        # One auxiliary head finds edges.
        ('mmseg::stdc/stdc1_4xb12-80k_cityscapes-512x1024', dict(classes=CLASSES)),
    ],
)
def test_heads_that_have_other_classes_for_a_reason_pass(name, metainfo):
    dataset, model = SimpleNamespace(metainfo=metainfo), get_model(name)
    check_heads(model, metainfo['classes'], dataset, 'train_dataloader.dataset')
    with pytest.raises(ValueError, match='but train_dataloader.dataset'):
        check_heads(
            model, ('one',), SimpleNamespace(metainfo={}), 'train_dataloader.dataset'
        )
    # Of a text, as in Grounding DINO, the words are the classes.
    model.language_model = True
    check_heads(
        model, ('one',), SimpleNamespace(metainfo={}), 'train_dataloader.dataset'
    )


def test_watched_pipeline_is_as_the_one_it_watches():
    resize, flip = Resize(scale=(9, 8)), RandomFlip(prob=0.0)
    watched = WatchedPipeline([resize, flip], 2, 255)
    image = np.zeros((4, 4, 3), np.uint8)
    for copy in (watched, pickle.loads(pickle.dumps(watched))):
        assert repr(resize) in repr(copy) and copy.transforms[0].scale == (9, 8)
        assert copy(dict(img=image))['img'].shape == (8, 9, 3)
    # A transform that drops an image ends the pipeline.
    assert WatchedPipeline([lambda results: None, resize], 2, 255)({}) is None


def test_neck_that_takes_the_maps_in_its_own_order_is_right():
    def model(channels):
        backbone = dict(type='ConvMLP', arch=tiny.ARCH, out_indices=(1, 2, 3))
        out = dict(num_scales=3, out_channels=[16, 8, 8])
        neck = dict(type='YOLOV3Neck', in_channels=channels, **out)
        changes = dict(backbone=backbone, neck=neck)
        for change in changes.values():
            change['_delete_'] = True
        return get_model('retinanet_convmlp_s', **changes)

    check_neck(model([16, 16, 8]))
    with pytest.raises(ValueError, match=r'in_channels is \[16, 8, 8\], but'):
        check_neck(model([16, 8, 8]))
