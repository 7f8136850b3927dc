"""Predictions of folders: pictures, results for other programs, and bad files."""

import copy
import json
import os
import socket
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from mmdet.structures import DetDataSample
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.structures import InstanceData
from mmseg.datasets import ADE20KDataset
from PIL import Image
from pycocotools import mask as mask_api
from pycocotools.coco import COCO
from reference import draw

from convmlp_mm import get_inferencer, get_model
from convmlp_mm.apis import build_model
from convmlp_mm.predict import (
    DetectionPredictor,
    add_legend,
    labels_of,
    list_images,
    name_outputs,
)
from convmlp_mm.zoo import find_config

SMALL = 'test_dataloader.dataset.pipeline.1.scale='
FEW = (
    'model.test_cfg.rpn.max_per_img=20',
    'model.test_cfg.rcnn.max_per_img=10',
    'model.test_cfg.rcnn.score_thr=0.0',
)
MODELS = {
    'convmlp_s_imagenet': (),
    'retinanet_convmlp_s': (f'{SMALL}(96,96)', 'model.test_cfg.max_per_img=10'),
    'mask_rcnn_convmlp_s': (f'{SMALL}(96,96)', *FEW),
    'semantic_fpn_convmlp_s': (f'{SMALL}(128,64)',),
}


SIZES = {name: (48, 64) for name in ('a.jpg', 'b.jpg', 'more/c.jpg')}
SIZES['b.png'] = (64, 40)


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    """Files with drawn weights, whose scores differ widely, by name of the model."""
    folder = tmp_path_factory.mktemp('weights')

    def make(name):
        path = folder / f'{name}.pth'
        if not path.exists():
            state = get_model(name).state_dict()
            for key, value in state.items():
                state[key] = draw(key, value.shape).to(value.dtype)
            torch.save(state, path)
        return path

    return make


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    """Four images, of two sizes, and three files that are none."""
    folder = tmp_path_factory.mktemp('images')
    (folder / 'more').mkdir()
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        pixels = rng.integers(0, 255, (*size, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    whole = (folder / 'a.jpg').read_bytes()
    (folder / 'broken.jpg').write_bytes(whole[: len(whole) // 2])
    (folder / 'text.png').write_text('no image')
    (folder / 'notes.txt').write_text('no image, and not called like one')
    return folder


def predict(tool, config, weights, source, out, *options):
    """Run the tool; return what it said, and the results that it has written."""
    command = ['predict.py', config, weights, source, '--out', out, '--device', 'cpu']
    done = tool(*command, *options)

    def refuse(constant):
        raise AssertionError(f'{constant} is no JSON')

    content = (out / 'results.json').read_text()
    return done, json.loads(content, parse_constant=refuse)


def run(tool, name, weights, source, out, *options):
    settings = ['--cfg-options', *MODELS[name]] if MODELS[name] else []
    return predict(tool, name, weights(name), source, out, *options, *settings)


@pytest.mark.parametrize('name', [m for m in MODELS if not m.startswith('mask')])
def test_folder_is_predicted_and_bad_files_are_named(
    tool, weights, images, tmp_path, name
):
    out = tmp_path / 'out'
    done, results = run(tool, name, weights, images, out, '--score-thr', '0')
    assert done.returncode == 1, done.stderr
    assert 'predicted 4 of 6 images' in done.stdout
    assert 'skipped broken.jpg' in done.stderr and 'skipped text.png' in done.stderr
    assert [i['file_name'] for i in results['skipped']] == ['broken.jpg', 'text.png']
    sizes = {i['file_name']: (i['height'], i['width']) for i in results['images']}
    assert sizes == SIZES
    pictures = {p.relative_to(out / 'vis').as_posix() for p in out.rglob('vis/**/*.*')}
    assert pictures == {'a.jpg', 'b.jpg', 'b.png.jpg', 'more/c.jpg'}
    for path in out.rglob('*.*'):
        assert path.name == 'results.json' or Image.open(path).size


def test_classes_are_those_of_the_model(tool, weights, images, tmp_path):
    name = 'convmlp_s_imagenet'
    _, results = run(tool, name, weights, images, tmp_path / 'out')
    inferencer = get_inferencer(name, str(weights(name)), 'cpu')
    for image, found in zip(results['images'], results['predictions'], strict=True):
        (expected,) = inferencer(str(images / image['file_name']))
        assert found['image_id'] == image['id']
        assert found['category_id'] == expected['pred_label']
        assert found['name'] == expected['pred_class']
        assert found['score'] == pytest.approx(expected['pred_score'], rel=1e-5)
        assert len(found['top5']) == 5


@pytest.mark.parametrize('name', ['retinanet_convmlp_s', 'mask_rcnn_convmlp_s'])
def test_detections_are_in_the_format_of_coco(tool, weights, images, tmp_path, name):
    options = ['--score-thr', 0]
    _, everything = run(tool, name, weights, images, tmp_path / 'all', *options)
    scores = [a['score'] for a in everything['annotations']]
    threshold = sum(sorted(set(scores))[len(set(scores)) // 2 - 1 :][:2]) / 2
    options = ['--score-thr', threshold]
    _, best = run(tool, name, weights, images, tmp_path / 'best', *options)
    assert best['images'] == everything['images']
    expected = [a for a in everything['annotations'] if a['score'] >= threshold]
    for one, two in zip(best['annotations'], expected, strict=True):
        assert one['image_id'] == two['image_id']
        assert (one['score'], one['bbox']) == (two['score'], two['bbox'])

    truth = COCO()
    truth.dataset = dict(everything, annotations=[])
    truth.createIndex()
    # The numbers of COCO, which leave some out.
    assert truth.cats[90]['name'] == 'toothbrush' and 12 not in truth.cats
    read = truth.loadRes(copy.deepcopy(everything['annotations']))
    assert len(read.anns) == len(scores) > 4
    for annotation in everything['annotations']:
        size = truth.imgs[annotation['image_id']]
        if name.startswith('mask'):
            mask = mask_api.decode(annotation['segmentation'])
            assert mask.shape == (size['height'], size['width'])
            assert mask.sum() == annotation['area']
        else:
            assert 'segmentation' not in annotation
        x, y, width, height = annotation['bbox']
        assert 0 <= x <= x + width <= size['width'] + 0.02
        assert 0 <= y <= y + height <= size['height'] + 0.02


@pytest.mark.parametrize('name', [m for m in MODELS if not m.startswith('mask')])
def test_drawing_has_the_colours_of_the_image(tool, weights, tmp_path, name):
    Image.new('RGB', (48, 64), (200, 90, 20)).save(tmp_path / 'orange.png')
    out = tmp_path / 'out'
    options = ['--score-thr', 1]
    run(tool, name, weights, tmp_path / 'orange.png', out, *options)
    drawn = np.asarray(Image.open(out / 'vis' / 'orange.jpg').convert('RGB'))
    corner = drawn[-8:, :8].reshape(-1, 3).mean(0)
    if 'semantic' in name:
        labels = np.asarray(Image.open(out / 'label_maps' / 'orange.png'))[-8:, :8]
        palette = np.array(ADE20KDataset.METAINFO['palette'])
        corner = (corner - 0.6 * palette[labels].reshape(-1, 3).mean(0)) / 0.4
    assert np.abs(corner - (200, 90, 20)).max() < 12


def test_detections_of_own_classes_are_numbered_from_1():
    model = SimpleNamespace(dataset_meta=dict(classes=('a', 'b')))
    predictor = DetectionPredictor(SimpleNamespace(model=model), 0.5)
    found = InstanceData(
        bboxes=torch.tensor([[1.0, 2.0, 5.0, 9.0], [0.0, 0.0, 4.0, 4.0]]),
        scores=torch.tensor([0.9, 0.4]),
        labels=torch.tensor([1, 0]),
    )
    predictor.add('x.png', (9, 9), DetDataSample(pred_instances=found), 'x')
    content = predictor.content()
    (annotation,) = content['annotations']
    assert annotation['bbox'] == [1.0, 2.0, 4.0, 7.0] and annotation['category_id'] == 2
    assert content['categories'] == [dict(id=1, name='a'), dict(id=2, name='b')]


def test_label_maps_have_the_class_of_each_pixel(tool, weights, images, tmp_path):
    name = 'semantic_fpn_convmlp_s'
    _, results = run(tool, name, weights, images / 'b.png', tmp_path / 'out')
    (found,) = results['predictions']
    labels = np.asarray(Image.open(tmp_path / 'out' / found['label_map']))
    assert labels.shape == (64, 40) and labels.dtype == np.uint8
    names = {c['id']: c['name'] for c in results['categories']}
    assert len(names) == 150
    values, counts = np.unique(labels, return_counts=True)
    assert found['pixels'] == {names[v]: c for v, c in zip(values, counts.tolist())}
    picture = Image.open(tmp_path / 'out' / 'vis' / 'b.jpg')
    # With a legend on its right.
    assert picture.height == 64 and picture.width > 40


def test_legend_leaves_out_what_does_not_fit():
    picture = np.zeros((100, 80, 3), np.uint8)
    few = add_legend(picture, ['sky'], [(0, 0, 255)])
    assert (few[:, :80] == 0).all() and (few[:, 80:] == (0, 0, 255)).all(-1).any()
    many = add_legend(picture, ['x'] * 99, [(255, 0, 0)] * 99)
    assert many.shape[0] == 100 and (many[-20:] == (255, 0, 0)).all(-1).any()


def test_mistakes_are_said_before_work_starts(tool, weights, images, tmp_path):
    name, out = 'convmlp_s_imagenet', tmp_path / 'out'
    out.mkdir()
    (out / 'results.json').write_text('mine')
    file = weights(name)
    for command, fragment in (
        (['nothing', file, images], "has no configuration 'nothing'"),
        ([name, 'no.pth', images], "checkpoint 'no.pth' does not exist"),
        ([name, file, tmp_path / 'no'], "no' does not exist"),
        ([name, file, out], 'has no images (.jpg'),
        ([name, file, images, '--score-thr', '2'], '--score-thr must be in [0, 1]'),
        (['ablation/pure_mlp_100e', 'published', images], 'no published weights'),
        (['convmlp_m_imagenet', file, images], 'The file is ConvMLP-S'),
        (['transfer/convmlp_s_cifar10', file, images], 'of another shape: head.fc'),
    ):
        done = tool('predict.py', *command, '--out', tmp_path / 'new')
        assert done.returncode == 2 and fragment in done.stderr, done.stderr
        lines = [line for line in done.stderr.splitlines() if 'error:' in line]
        assert len(lines) == 1 and lines[0].startswith('predict.py: error: ')
        assert not (tmp_path / 'new').exists()
    done = tool('predict.py', name, file, images, '--out', out)
    assert done.returncode == 2 and 'is already there' in done.stderr
    assert (out / 'results.json').read_text() == 'mine'


def test_images_are_found_in_folders_and_named_apart(images):
    found = list_images(images)
    assert len(found) == 6 and str(images / 'notes.txt') not in found
    names = name_outputs(found, str(images))
    assert len(set(names.values())) == 6
    assert list_images(images / 'a.jpg') == [str(images / 'a.jpg')]


def test_hidden_and_own_images_are_left_out_and_linked_ones_are_found(tmp_path, capsys):
    folder, elsewhere = tmp_path / 'data', tmp_path / 'elsewhere'
    places = [
        'a.png',
        '.b.png',
        '.ipynb_checkpoints/a.png',
        'out/vis/a.jpg',
        'x/.y/c.png',
    ]
    for place in (*(folder / p for p in places), elsewhere / 'd.png'):
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(place)
    (folder / 'linked').symlink_to(elsewhere)
    (folder / 'again').symlink_to(elsewhere)
    found = list_images(folder, str(folder / 'out'))
    assert [p.removeprefix(f'{folder}/') for p in found][0] == 'a.png'
    assert len(found) == 2 and found[1].endswith('/d.png')
    assert '4 images in' in capsys.readouterr().err
    circle = tmp_path / 'circle'
    circle.mkdir()
    (circle / 'circle').symlink_to(circle)
    Image.new('RGB', (8, 8)).save(circle / 'e.png')
    assert list_images(circle) == [str(circle / 'e.png')]
    # A hidden folder that is asked for is no accident.
    hidden = folder / '.ipynb_checkpoints'
    assert list_images(hidden) == [str(hidden / 'a.png')]


def test_flips_of_segmentation_tta_make_the_prediction_symmetric(weights, images):
    cfg = find_config('semantic_fpn_convmlp_s')
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    model = build_model(cfg)
    model.module.load_state_dict(torch.load(weights('semantic_fpn_convmlp_s')))
    augment = cfg.tta_pipeline[1].transforms
    cfg.tta_pipeline[1].transforms = [augment[0][2:3], augment[1], augment[3]]
    with DefaultScope.overwrite_default_scope('mmseg'):
        # Loads an array, which can be mirrored.
        transform = TRANSFORMS.build(cfg.tta_pipeline[1])

    def segment(pixels):
        shape = pixels.shape[:2]
        image = dict(img=pixels, img_path='', img_shape=shape, ori_shape=shape)
        data = transform(image)
        data = {key: [[value] for value in values] for key, values in data.items()}
        assert len(data['inputs']) == 2
        with torch.no_grad():
            return labels_of(model.test_step(data)[0])

    pixels = np.array(Image.open(images / 'a.jpg'))
    labels, mirrored = segment(pixels), segment(pixels[:, ::-1].copy())
    assert labels.shape == (48, 64) and len(np.unique(labels)) > 1
    assert (labels == mirrored[:, ::-1]).mean() > 0.999


@pytest.fixture(scope='module')
def small(tmp_path_factory):
    """A recipe without visualizer, and its weights, by kind."""
    folder = tmp_path_factory.mktemp('small')
    tiny.write_data(folder / 'data')

    def make(kind):
        config, file = folder / f'{kind}.py', folder / f'{kind}.pth'
        tiny.write_config(config, kind, folder / 'data')
        torch.save(build_model(find_config(str(config))).state_dict(), file)
        return config, file

    return make


# Height and width by name: no two images have both in common.
HOSTILE = {
    'a.jpg': (48, 64),
    'a.png': (32, 96),
    'a.jpg.png': (40, 40),
    'a.png.jpg': (20, 20),
    'A.jpg': (33, 33),
    'x/1.jpg': (48, 63),
    'X/1.jpg': (48, 62),
    'y.png': (9, 70),
    'y.bmp': (9, 71),
    '\u00fc.png': (30, 31),
}


@pytest.mark.parametrize('kind', ['classifier', 'detector', 'segmentor'])
def test_no_two_images_share_a_file(tool, small, tmp_path, kind):
    config, weights = small(kind)
    for name, size in HOSTILE.items():
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', size[::-1]).save(path)
    os.mkfifo(tmp_path / 'images' / 'pipe.jpg')
    (tmp_path / 'images' / 'zero.jpg').symlink_to('/dev/zero')
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(tmp_path / 'images' / 'socket.jpg'))
        out, rest = tmp_path / 'out', (tmp_path / 'out', '--score-thr', '0')
        done, results = predict(tool, config, weights, tmp_path / 'images', *rest)
    assert done.returncode == 1, done.stderr
    reason = 'it is a pipe, socket or device'
    skipped = {entry['file_name']: entry['reason'] for entry in results['skipped']}
    assert list(skipped) == ['pipe.jpg', 'socket.jpg', 'zero.jpg']
    assert all(said.endswith(reason) for said in skipped.values())
    images = {image['id']: image for image in results['images']}
    assert {i['file_name'] for i in images.values()} == set(HOSTILE)
    written = [image['picture'] for image in images.values()]
    if kind == 'segmentor':
        for found in results['predictions']:
            image = images[found['image_id']]
            size = Image.open(out / found['label_map']).size
            assert size == (image['width'], image['height'])
            assert Image.open(out / image['picture']).height == image['height']
            written.append(found['label_map'])
    assert all((out / name).is_file() for name in written)
    # On a disk that ignores the case, too.
    assert len({name.casefold() for name in written}) == len(written)


@pytest.fixture
def pair(tmp_path):
    """A folder of two images."""
    folder = tmp_path / 'images'
    folder.mkdir()
    for name in 'ab':
        Image.fromarray(tiny.picture()).save(folder / f'{name}.jpg')
    return folder


# mmdet drops the detections that are below a threshold, or no number.
@pytest.mark.parametrize('kind', ['classifier', 'segmentor'])
def test_prediction_that_is_not_finite_is_skipped(tool, small, tmp_path, pair, kind):
    config, weights = small(kind)
    state = torch.load(weights)
    # The weights are finite, but their products are not.
    large = [k for k in state if k.endswith('.weight') and ('head' in k or 'norm' in k)]
    state.update({key: torch.full_like(state[key], 3e38) for key in large})
    torch.save(state, tmp_path / 'large.pth')
    out, options = tmp_path / 'out', ('--score-thr', '0')
    done, results = predict(tool, config, tmp_path / 'large.pth', pair, out, *options)
    assert done.returncode == 1
    skipped = {entry['file_name']: entry['reason'] for entry in results['skipped']}
    assert results['images'] == [] and list(skipped) == ['a.jpg', 'b.jpg']
    assert 'not finite' in skipped['a.jpg']


def test_picture_that_cannot_be_written_costs_no_other(tool, small, tmp_path, pair):
    out = tmp_path / 'out'
    (out / 'vis' / 'a.jpg').mkdir(parents=True)
    done, results = predict(tool, *small('classifier'), pair, out)
    assert done.returncode == 1
    assert [entry['file_name'] for entry in results['skipped']] == ['a.jpg']
    assert [image['file_name'] for image in results['images']] == ['b.jpg']
