"""The data set of drawn shapes: its pictures, its annotations and its manners."""

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO

TOOL = Path(__file__).parents[1] / 'tools' / 'data' / 'make_shapes_dataset.py'
SMALL = {'train': 6, 'val': 4, 'size': 96, 'seed': 3, 'classification_per_class': 2}
TWO_TEXTURES = 6 + 1, 6 + 2


def load_tool():
    spec = importlib.util.spec_from_file_location(TOOL.stem, TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


tool = load_tool()


def run(*arguments):
    command = [sys.executable, TOOL, *arguments]
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True
    )


def as_options(values):
    return [f'--{k.replace("_", "-")}={v}' for k, v in values.items()]


def content(folder):
    """Every file under a folder and its bytes."""
    files = sorted(path for path in folder.rglob('*') if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def read_labels(root, split, index):
    folder = root / 'ade' / 'ADEChallengeData2016' / 'annotations'
    name = f'{tool.SPLITS[split]}/ADE_{split}_{index:08d}.png'
    return cv2.imread(str(folder / name), cv2.IMREAD_UNCHANGED)


def make(out, **changes):
    return tool.make_dataset(out, **SMALL | changes)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    out = tmp_path_factory.mktemp('data') / 'new folder' / 'shapes'
    made = run(out, *as_options(SMALL))
    assert made.returncode == 0, made.stderr
    assert str(out) in made.stdout and made.stderr == ''
    return out


@pytest.fixture(scope='module', params=['train', 'val'])
def coco(request, root):
    path = root / 'coco' / 'annotations' / f'instances_{request.param}2017.json'
    loaded = COCO(str(path))
    loaded.split = request.param
    return loaded


# Determinism


def test_same_arguments_give_the_same_bytes(root, tmp_path):
    make(tmp_path / 'again')
    assert content(tmp_path / 'again') == content(root)


def test_another_seed_gives_other_pictures(root, tmp_path):
    make(tmp_path / 'other', seed=4)
    old, new = content(root), content(tmp_path / 'other')
    pictures = [name for name in old if name.endswith(('.jpg', '.png'))]
    assert pictures and old.keys() == new.keys()
    assert not [name for name in pictures if old[name] == new[name]]


def test_more_pictures_begin_with_the_same_ones(root, tmp_path):
    make(tmp_path / 'more', train=8, val=5, classification_per_class=5)
    old, new = content(root), content(tmp_path / 'more')
    pictures = {name for name in old if name.endswith(('.jpg', '.png'))}
    assert pictures and all(old[name] == new[name] for name in pictures)
    assert len(new) > len(old)
    for split in tool.SPLITS:
        name = f'coco/annotations/instances_{split}2017.json'
        before, after = (json.loads(files[name])['annotations'] for files in (old, new))
        assert after[: len(before)] == before and len(after) > len(before)


def test_every_picture_is_another(root):
    ade = 'ade/ADEChallengeData2016/images'  # the same pictures as in coco
    pictures = {k: v for k, v in content(root).items() if k.endswith('.jpg')}
    unique = [v for k, v in pictures.items() if not k.startswith(ade)]
    assert len(unique) == 6 + 4 + 6 * (2 + 1)
    assert len(set(unique)) == len(unique) == len(set(pictures.values()))


# Annotations


def test_pictures_have_the_stated_size(coco, root):
    assert len(coco.imgs) == SMALL[coco.split]
    for entry in coco.imgs.values():
        picture = cv2.imread(
            str(root / 'coco' / f'{coco.split}2017' / entry['file_name'])
        )
        assert picture.shape == (entry['height'], entry['width'], 3)
        assert max(picture.shape) == 96 and min(picture.shape[:2]) >= 72
        assert picture.std() > 10


def test_boxes_and_areas_are_those_of_the_masks(coco):
    for annotation in coco.anns.values():
        mask = coco.annToMask(annotation)
        entry = coco.imgs[annotation['image_id']]
        assert mask.shape == (entry['height'], entry['width'])
        assert annotation['area'] == mask.sum() >= tool.MIN_PIXELS
        rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
        x, y, w, h = annotation['bbox']
        assert (x, y) == (columns[0], rows[0])
        assert (x + w, y + h) == (columns[-1] + 1, rows[-1] + 1)


def test_masks_do_not_overlap_and_agree_with_label_maps(coco, root):
    for index in coco.imgs:
        labels = read_labels(root, coco.split, index)
        assert labels.dtype == np.uint8 and labels.ndim == 2
        seen = np.zeros(labels.shape, int)
        for annotation in coco.imgToAnns[index]:
            mask = coco.annToMask(annotation).astype(bool)
            seen += mask
            assert (labels[mask] == annotation['category_id']).all()
        assert seen.max() == 1
        assert np.isin(labels[seen == 0], (0, *TWO_TEXTURES)).all()
        assert (labels == 0).mean() < 0.1


def test_each_way_to_say_a_mask_is_used(coco):
    crowds = [a for a in coco.anns.values() if a['iscrowd']]
    objects = [a for a in coco.anns.values() if not a['iscrowd']]
    assert crowds and all(isinstance(a['segmentation'], dict) for a in crowds)
    polygons = [a for a in objects if isinstance(a['segmentation'], list)]
    holes = [a for a in objects if isinstance(a['segmentation'], dict)]
    assert len(polygons) > len(holes) > 0
    assert all(isinstance(a['segmentation']['counts'], str) for a in holes + crowds)
    # Polygons, not their boxes only: something slanted has more than four corners.
    assert max(len(part) for a in polygons for part in a['segmentation']) > 8


def test_every_class_is_there(coco, root):
    names = [category['name'] for category in coco.cats.values()]
    assert names == list(tool.OBJECTS)
    if coco.split == 'train':  # six pictures, six classes
        assert {a['category_id'] for a in coco.anns.values()} == set(range(1, 7))
        maps = [read_labels(root, 'train', index) for index in coco.imgs]
        labels = {int(value) for labels in maps for value in np.unique(labels)}
        assert labels >= set(range(1, 9))


def test_a_mask_with_a_hole_or_of_several_parts_is_exact():
    mask = np.zeros((30, 40), bool)
    mask[2:9, 3:17] = mask[20:29, 30:40] = mask[15, 5] = True
    parts = tool.encode_mask(mask, crowd=False)
    assert len(parts['segmentation']) == 3
    assert (parts['bbox'], parts['area']) == ([3, 2, 37, 27], 7 * 14 + 9 * 10 + 1)
    mask[4, 5] = False
    assert isinstance(tool.encode_mask(mask, crowd=False)['segmentation'], dict)


def test_visible_masks_stack_from_the_back_to_the_front():
    back, front = np.zeros((2, 8, 8), np.float32)
    back[:6], front[4:] = 1, 0.5
    masks = tool.visible_masks([tool.Layer(0, back, 48), tool.Layer(1, front, 32)])
    assert [mask.sum() for mask in masks] == [32, 32]
    assert not (masks[0] & masks[1]).any()


@pytest.mark.parametrize('name', tool.OBJECTS)
def test_outlines_fill_their_box(name):
    first, *holes = tool.outline(np.random.default_rng(0), name)
    assert np.ptp(first, axis=0).max() == pytest.approx(1)
    assert first.min(0) + first.max(0) == pytest.approx(0)
    assert len(holes) == (name == 'ring')


def test_objects_keep_to_the_stated_limits():
    counts, shares = [], []
    for index in range(1, 25):
        image, _, layers, masks = tool.make_scene(0, 'train', index, 96)
        objects = [i for i, layer in enumerate(layers) if not layer.crowd]
        assert len(layers) - len(objects) == (index % 8 == 4)
        counts.append(len(objects))
        for layer, mask in zip(layers, masks, strict=True):
            assert mask.sum() >= tool.MIN_VISIBLE * layer.area
            assert mask.any(0).sum() <= 0.6 * min(image.shape[:2])
            shares.append(mask.sum() / layer.area)
    assert min(counts) >= 1 and max(counts) == 5
    assert min(shares) < 0.8  # some of them are hidden in part


def test_colours_stand_out():
    rng = np.random.default_rng(0)
    for _ in range(20):
        around = tool.make_background(rng, 32, 32)[2]
        both = np.vstack([tool.pick_colour(rng, 'star', around), around])
        lab = tool.convert(both, cv2.COLOR_BGR2LAB)
        apart = np.linalg.norm(lab[0] - lab[1:], axis=1)
        assert apart.min() >= tool.MIN_CONTRAST


def test_image_folder_is_complete(root):
    for split, count in (('train', 2), ('val', 1)):
        folders = sorted((root / 'imagenet' / split).iterdir())
        assert [folder.name for folder in folders] == sorted(tool.OBJECTS)
        assert all(len(list(folder.glob('*.jpg'))) == count for folder in folders)


def test_manifest_says_what_was_made(root):
    manifest = json.loads((root / 'dataset.json').read_text())
    assert manifest['arguments'] == SMALL
    assert manifest['imagenet']['val'] == {'images': 6}
    assert manifest['ade']['classes'] == [*tool.OBJECTS, *tool.BACKGROUNDS]
    for split in tool.SPLITS:
        path = root / 'coco' / 'annotations' / f'instances_{split}2017.json'
        annotations = json.loads(path.read_text())['annotations']
        counts = manifest['coco'][split]
        assert counts['images'] == SMALL[split] and counts['crowds'] == 1
        assert counts['objects'] + counts['crowds'] == len(annotations)
    for name in ('coco', 'ade', 'imagenet'):
        assert (root / manifest[name]['root']).is_dir()


# Manners


@pytest.mark.parametrize(
    ('option', 'value', 'allowed'),
    [
        ('--train', '-1', '1 to 99999'),
        ('--val', '0', '1 to 99999'),
        ('--size', '63', '64 to 2048'),
        ('--size', 'big', '64 to 2048'),
        ('--seed', '1.5', '0 to 4294967295'),
        ('--classification-per-class', '0', '1 to 99999'),
    ],
)
def test_bad_options_are_named_before_anything_is_written(
    option, value, allowed, tmp_path, capsys
):
    with pytest.raises(SystemExit) as stopped:
        tool.main([str(tmp_path / 'new'), option, value])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f'{option} {value}' in line and allowed in line
    assert not list(tmp_path.iterdir())


def test_command_line_says_errors_in_one_line(tmp_path):
    for options in (['--size', '63'], ['--sise', '96'], []):
        result = run(*[tmp_path / 'new'][: len(options)], *options)
        assert result.returncode == 2 and result.stdout == ''
        assert result.stderr.count('\n') == 1 and 'error: ' in result.stderr
    assert not list(tmp_path.iterdir())


def test_the_same_data_set_is_left_alone(root, capsys):
    before = {path: path.stat().st_mtime_ns for path in root.rglob('*')}
    assert tool.main([str(root), *as_options(SMALL)]) == 0
    assert 'already there' in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in root.rglob('*')} == before


@pytest.mark.parametrize('options', [[], ['--overwrite']])
@pytest.mark.parametrize(
    'manifest', [None, '', '[]', '{"tool": "other"}', '{"tool": "make_shapes_dataset"}']
)
def test_foreign_folders_are_never_touched(manifest, options, tmp_path, capsys):
    out = tmp_path / 'mine'
    out.mkdir()
    (out / 'thesis.txt').write_text('three years')
    if manifest is not None:
        (out / 'dataset.json').write_text(manifest)
    before = content(tmp_path)
    assert tool.main([str(out), *options]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(out) in line
    assert content(tmp_path) == before


@pytest.mark.parametrize('kind', ['file', 'empty folder'])
def test_other_things_in_the_way_are_never_touched(kind, tmp_path):
    out = tmp_path / 'out'
    out.write_text('text') if kind == 'file' else out.mkdir()
    with pytest.raises(FileExistsError, match='choose another folder'):
        make(out, overwrite=True)
    assert out.read_text() == 'text' if kind == 'file' else not list(out.iterdir())


def test_other_arguments_need_overwrite(tmp_path):
    out = tmp_path / 'out'
    few = {'train': 1, 'val': 1, 'classification_per_class': 1}
    assert make(out, **few)
    before = content(out)
    with pytest.raises(FileExistsError, match='--overwrite'):
        make(out, **few, seed=9)
    assert content(out) == before
    assert make(out, **few, seed=9, overwrite=True)
    assert content(out) != before
    assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_a_link_keeps_pointing(tmp_path):
    few = {'train': 1, 'val': 1, 'classification_per_class': 1}
    link = tmp_path / 'link'
    link.symlink_to(tmp_path / 'disk')
    assert make(link, **few) and not make(link, **few)
    assert link.is_symlink() and (tmp_path / 'disk' / 'dataset.json').is_file()


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError('disk full')])
@pytest.mark.parametrize('there', [False, True])
def test_a_stopped_run_leaves_everything_as_it_was(
    error, there, tmp_path, monkeypatch, capsys
):
    out = tmp_path / 'out'
    few = {'train': 1, 'val': 1, 'classification_per_class': 1}
    if there:
        make(out, **few)
    before = content(tmp_path)

    def stop(path, image, save=tool.save):
        save(path, image)
        if path.suffix == '.png':
            raise error

    monkeypatch.setattr(tool, 'save', stop)
    assert tool.main([str(out), *as_options(SMALL), '--overwrite']) in (1, 130)
    (line,) = capsys.readouterr().err.splitlines()
    assert 'disk full' in line or 'interrupted' in line
    assert content(tmp_path) == before and out.exists() == there
    assert len(list(tmp_path.iterdir())) == there


def test_a_failed_swap_brings_the_old_data_set_back(tmp_path, monkeypatch):
    out = tmp_path / 'out'
    few = {'train': 1, 'val': 1, 'classification_per_class': 1}
    make(out, **few)
    before = content(tmp_path)

    def refuse(self, target, rename=Path.rename):
        if self.suffix == '.tmp':
            raise OSError('no')
        return rename(self, target)

    monkeypatch.setattr(Path, 'rename', refuse)
    with pytest.raises(OSError, match='no'):
        make(out, **few, seed=9, overwrite=True)
    assert content(tmp_path) == before


def test_a_terminated_run_leaves_nothing(tmp_path):
    command = [sys.executable, str(TOOL), str(tmp_path / 'out'), '--train', '99999']
    process = subprocess.Popen(command)
    try:
        deadline = time.monotonic() + 30
        while not list(tmp_path.rglob('*.png')) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert list(tmp_path.rglob('*.png')), 'nothing was begun'
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 128 + signal.SIGTERM
    finally:
        process.kill()
    assert not list(tmp_path.iterdir())


# The toolkits


def test_mmdet_reads_it(root, coco):
    pytest.importorskip('mmdet')
    from mmcv.transforms import LoadImageFromFile
    from mmdet.datasets import CocoDataset
    from mmdet.datasets.transforms import LoadAnnotations

    dataset = CocoDataset(
        data_root=str(root / 'coco'),
        ann_file=f'annotations/instances_{coco.split}2017.json',
        data_prefix={'img': f'{coco.split}2017/'},
        metainfo={'classes': tool.OBJECTS},
        pipeline=[LoadImageFromFile(), LoadAnnotations(with_mask=True)],
    )
    assert len(dataset) == SMALL[coco.split]
    for item in dataset:
        annotations = coco.imgToAnns[item['img_id']]
        assert item['ori_shape'] == item['gt_masks'].masks.shape[1:]
        assert len(item['gt_bboxes']) == len(annotations)
        assert item['gt_masks'].areas.tolist() == [a['area'] for a in annotations]
        assert item['gt_ignore_flags'].tolist() == [a['iscrowd'] for a in annotations]
        assert item['gt_bboxes_labels'].max() < len(tool.OBJECTS)


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('named', [False, True])
def test_mmseg_reads_it(root, split, named):
    pytest.importorskip('mmseg')
    from mmcv.transforms import LoadImageFromFile
    from mmseg.datasets import ADE20KDataset, BaseSegDataset
    from mmseg.datasets.transforms import LoadAnnotations

    kind, options = ADE20KDataset, {}
    if named:  # ADE20KDataset admits no class names but its own
        classes = tool.OBJECTS + tool.BACKGROUNDS
        kind, options = BaseSegDataset, {'metainfo': {'classes': classes}}
        options['reduce_zero_label'] = True
    folder = tool.SPLITS[split]
    dataset = kind(
        data_root=str(root / 'ade' / 'ADEChallengeData2016'),
        data_prefix={
            'img_path': f'images/{folder}',
            'seg_map_path': f'annotations/{folder}',
        },
        pipeline=[LoadImageFromFile(), LoadAnnotations()],
        **options,
    )
    assert len(dataset) == SMALL[split]
    for index, item in enumerate(dataset, 1):
        labels = read_labels(root, split, index)
        assert item['ori_shape'] == labels.shape
        # One less than in the file, and 0 becomes 255, which losses ignore.
        assert (item['gt_seg_map'] == labels - np.uint8(1)).all()


@pytest.mark.parametrize('split', ['train', 'val'])
@pytest.mark.parametrize('kind', ['CustomDataset', 'ImageNet'])
def test_mmpretrain_reads_it(root, split, kind):
    pytest.importorskip('mmpretrain')
    import mmpretrain.datasets

    options = {'data_root': str(root / 'imagenet')}
    if kind == 'ImageNet':
        options.update(split=split, metainfo={'classes': sorted(tool.OBJECTS)})
    else:
        options.update(data_prefix=split)
    dataset = getattr(mmpretrain.datasets, kind)(**options)
    count = SMALL['classification_per_class'] if split == 'train' else 1
    assert list(dataset.CLASSES) == sorted(tool.OBJECTS)
    assert dataset.get_gt_labels().tolist() == sorted(list(range(6)) * count)
    item = dataset[0]
    assert cv2.imread(item['img_path']) is not None
