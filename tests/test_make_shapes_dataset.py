"""The data set of drawn shapes: its images, its annotations and its manners."""

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmcv.transforms import LoadImageFromFile
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[1] / 'tools' / 'data' / 'make_shapes_dataset.py'
SMALL = dict(zip(('--train', '--val', '--size', '--seed'), (6, 4, 96, 3)))
OBJECTS = ['circle', 'square', 'triangle', 'star', 'ring', 'cross']
SPLITS = {'train': 'training', 'val': 'validation'}


def run(out, **changes):
    options = SMALL | {f'--{name}': value for name, value in changes.items()}
    command = [sys.executable, TOOL, out, *sum(options.items(), ())]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True)


def content(folder):
    """Every file under a folder and its bytes."""
    files = (path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def images(folder):
    files = content(folder)
    return {k: v for k, v in files.items() if k.endswith(('.jpg', '.png'))}


def read_labels(root, split, index):
    folder = root / 'ade/ADEChallengeData2016/annotations' / SPLITS[split]
    return cv2.imread(str(folder / f'ADE_{split}_{index:08d}.png'), -1)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'new folder' / 'shapes'
    made = run(out)
    assert made.returncode == 0, made.stderr
    assert made.stdout == f'made: {out}\n' and not made.stderr
    return out


@pytest.fixture(scope='module', params=SPLITS)
def coco(request, root):
    path = root / 'coco' / 'annotations' / f'instances_{request.param}2017.json'
    loaded = COCO(str(path))
    loaded.split = request.param
    return loaded


def test_same_arguments_give_the_same_bytes_and_others_do_not(root, tmp_path):
    assert run(tmp_path / 'again').returncode == 0
    assert content(tmp_path / 'again') == content(root)
    assert run(tmp_path / 'other', seed=4).returncode == 0
    old, new = images(root), images(tmp_path / 'other')
    assert old.keys() == new.keys() and not [k for k in old if old[k] == new[k]]
    # Only the second layout repeats images.
    files = [v for k, v in old.items() if not k.startswith('ade/')]
    assert len(files) == len(set(files)) == 6 + 4 + 6 * (1 + 1)


def test_more_images_begin_with_the_same_ones(root, tmp_path):
    assert run(tmp_path / 'more', train=11, val=5).returncode == 0
    old, new = images(root), images(tmp_path / 'more')
    assert len(new) > len(old) and old.items() <= new.items()
    for split in SPLITS:
        name = f'coco/annotations/instances_{split}2017.json'
        files = (folder / name for folder in (root, tmp_path / 'more'))
        before, after = (json.loads(f.read_text())['annotations'] for f in files)
        assert after[: len(before)] == before and len(after) > len(before)


def test_boxes_areas_and_label_maps_are_those_of_the_masks(coco, root):
    assert [category['name'] for category in coco.cats.values()] == OBJECTS
    assert len(coco.imgs) == SMALL[f'--{coco.split}']
    for index, entry in coco.imgs.items():
        folder = root / 'coco' / f'{coco.split}2017'
        image = cv2.imread(str(folder / entry['file_name']))
        assert image.shape == (entry['height'], entry['width'], 3)
        assert max(image.shape) == 96 and min(image.shape[:2]) >= 72
        labels = read_labels(root, coco.split, index)
        assert labels.dtype == np.uint8 and labels.shape == image.shape[:2]
        seen = np.zeros(labels.shape, int)
        for annotation in coco.imgToAnns[index]:
            mask = coco.annToMask(annotation)
            seen += mask
            assert (labels[mask == 1] == annotation['category_id']).all()
            assert annotation['area'] == mask.sum() >= 16
            assert annotation['bbox'] == list(cv2.boundingRect(mask))
        assert seen.max() == 1 and set(labels[seen == 0]) <= {0, 7, 8}
        assert (labels == 0).mean() < 0.15


def test_a_few_images_hold_every_class(root):
    maps = [read_labels(root, 'train', index) for index in range(1, 7)]
    assert set(np.concatenate([m.ravel() for m in maps])) == set(range(9))


def test_at_least_half_of_every_object_is_visible():
    make_image = runpy.run_path(str(TOOL))['make_image']
    shares = []
    for index in range(1, 25):
        objects = make_image(0, 'train', index, 96)[2]
        assert 1 <= len(objects) <= 5
        shares += [mask.sum() / area for _, mask, area in objects]
    assert min(shares) >= 0.5
    assert min(shares) < 0.8  # some of them are hidden in part


BAD = [('train', -1), ('val', 0), ('size', 63), ('size', 'big'), ('seed', 1.5)]
BAD += [('sise', 96)]


@pytest.mark.parametrize(('option', 'value'), BAD)
def test_bad_options_are_named_before_anything_is_written(option, value, tmp_path):
    done = run(tmp_path / 'new', **{option: value})
    assert done.returncode == 2 and not done.stdout
    (line,) = [line for line in done.stderr.splitlines() if 'error: ' in line]
    assert f'--{option}' in line and str(value) in line
    assert not list(tmp_path.iterdir())


def test_the_same_data_set_is_left_alone_also_behind_a_link(root, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    (tmp_path / 'link').symlink_to(root)
    for out in (root, tmp_path / 'link'):
        assert run(out).stdout == f'already there: {root}\n'
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before


@pytest.mark.parametrize('kind', ['file', 'empty', 'foreign', 'other arguments'])
def test_what_is_in_the_way_is_never_touched(kind, tmp_path):
    out = tmp_path / 'mine'
    if kind == 'file':
        out.write_text('three years')
    elif kind == 'other arguments':
        assert run(out, seed=1).returncode == 0
    else:
        out.mkdir()
        if kind == 'foreign':
            (out / 'dataset.json').write_text('{"tool": "other"}')
    before = content(tmp_path)
    done = run(out)
    assert done.returncode == 2 and str(out) in done.stderr.splitlines()[-1]
    assert content(tmp_path) == before and list(tmp_path.iterdir()) == [out]


def test_a_stopped_run_leaves_nothing(tmp_path):
    command = [sys.executable, str(TOOL), str(tmp_path / 'out'), '--train', '99999']
    # A shell has its jobs in the background ignore SIGINT, and they pass that on.
    process = subprocess.Popen(
        command,
        stderr=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob('*.png')) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.rglob('*.png')), 'nothing was begun'
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


def test_mmdet_reads_it(root, coco):
    datasets = pytest.importorskip('mmdet.datasets')
    dataset = datasets.CocoDataset(
        data_root=str(root / 'coco'),
        ann_file=f'annotations/instances_{coco.split}2017.json',
        data_prefix=dict(img=f'{coco.split}2017/'),
        metainfo=dict(classes=OBJECTS),
        pipeline=[LoadImageFromFile(), datasets.transforms.LoadAnnotations(True, True)],
    )
    assert len(dataset) == len(coco.imgs)
    for item in dataset:
        annotations = coco.imgToAnns[item['img_id']]
        labels = [a['category_id'] - 1 for a in annotations]
        assert item['gt_bboxes_labels'].tolist() == labels
        assert item['gt_masks'].areas.tolist() == [a['area'] for a in annotations]


@pytest.mark.parametrize(('split', 'folder'), SPLITS.items())
def test_mmseg_reads_it(root, split, folder):
    datasets = pytest.importorskip('mmseg.datasets')
    dataset = datasets.BaseSegDataset(
        data_root=str(root / 'ade' / 'ADEChallengeData2016'),
        data_prefix=dict(
            img_path='images/' + folder, seg_map_path=f'annotations/{folder}'
        ),
        metainfo=dict(classes=[*OBJECTS, 'plain', 'patterned']),
        reduce_zero_label=True,
        pipeline=[LoadImageFromFile(), datasets.transforms.LoadAnnotations()],
    )
    assert len(dataset) == SMALL[f'--{split}']
    for index, item in enumerate(dataset, 1):
        # One less than in the file, and 0 becomes 255, which losses ignore.
        labels = read_labels(root, split, index) - np.uint8(1)
        assert (item['gt_seg_map'] == labels).all()


@pytest.mark.parametrize('split', SPLITS)
def test_mmpretrain_reads_it(root, split):
    datasets = pytest.importorskip('mmpretrain.datasets')
    options = dict(split=split, metainfo=dict(classes=sorted(OBJECTS)))
    dataset = datasets.ImageNet(data_root=str(root / 'imagenet'), **options)
    assert dataset.get_gt_labels().tolist() == list(range(6))
    assert cv2.imread(dataset[0]['img_path']) is not None
