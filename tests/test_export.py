"""Exported files, run by onnxruntime and torch as their users do."""

import io
import json

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config, ConfigDict

from convmlp_mm.apis import build_model
from convmlp_mm.config_files import find_config
from convmlp_mm.export import ExportError, check_request, draw_images, export, write
from convmlp_mm.export.systems import SYSTEMS, Graph
from convmlp_mm.export.verify import (
    _differences,
    count_wrong,
    toolkit_results,
    verify,
)

ARCH = dict(tokenizer_channels=8, conv_blocks=1, channels=(8, 16, 24))
ARCH.update(depths=(1, 1, 1), mlp_ratios=(2, 1.5, 2))
CLASSIFIER, SEGMENTOR, DETECTOR = (
    'convmlp_s_imagenet',
    'semantic_fpn_convmlp_s',
    'retinanet_convmlp_s',
)
NEWER_TORCH = hasattr(torch.export.Dim, 'DYNAMIC')


def tiny_config(name):
    cfg = find_config(name)
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    if name == CLASSIFIER:
        cfg.model.head.update(in_channels=24, num_classes=5)
    else:
        cfg.model.neck.update(in_channels=[8, 8, 16, 24], out_channels=16)
    if name == SEGMENTOR:
        head = dict(in_channels=[16] * 4, channels=16, num_classes=5)
        cfg.model.decode_head.update(head)
    elif name == DETECTOR:
        head = dict(in_channels=16, feat_channels=16, num_classes=3)
        cfg.model.bbox_head.update(head)
    return cfg


def tiny_model(name, **test_cfg):
    """Build a model with BN that has seen something, and a head that finds boxes."""
    cfg = tiny_config(name)
    if test_cfg:
        cfg.model.test_cfg.update(test_cfg)
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    if name == DETECTOR:
        model.bbox_head.retina_cls.bias.data.fill_(-1)
        model.bbox_head.retina_cls.weight.data.normal_(std=0.1)
    return model


def draw(batch, height, width):
    return np.stack(draw_images(batch, (height, width), seed=3))


def save(model, path, shape, images=None, **options):
    exported = export(model, shape, **options)
    verify(exported, model, images)
    write(exported, path)
    return exported


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    given = images[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'images': given})))


def read_properties(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def test_classifier_gives_probabilities_at_any_batch_and_size(tmp_path):
    model, path = tiny_model(CLASSIFIER), tmp_path / 'a.onnx'
    before = {k: v.clone() for k, v in model.state_dict().items()}
    save(model, path, (64, 64))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert list(tmp_path.iterdir()) == [path]
    for shape in ((1, 32, 32), (3, 45, 70)):
        found = run_onnx(path, draw(*shape))
        expected = [one['scores'] for one in toolkit_results(model, draw(*shape))]
        np.testing.assert_allclose(found['scores'], expected, atol=1e-5)


@pytest.mark.parametrize(
    ('settings', 'expected'),
    [
        (dict(to_rgb=False), dict(channel_order='BGR')),
        (dict(mean=None, std=None), dict(mean='[0.0, 0.0, 0.0]', channel_order='RGB')),
    ],
)
def test_pixels_are_prepared_as_the_configuration_says(tmp_path, settings, expected):
    cfg = tiny_config(CLASSIFIER)
    cfg.data_preprocessor.update(settings)
    save(build_model(cfg), tmp_path / 'a.onnx', (64, 64))
    assert read_properties(tmp_path / 'a.onnx').items() >= expected.items()


def test_segmentor_gives_labels_and_logits_of_every_pixel(tmp_path):
    model = tiny_model(SEGMENTOR)
    save(model, tmp_path / 'a.onnx', (64, 96), batch_size=2)
    for shape in ((1, 64, 96), (3, 71, 33)):
        found = run_onnx(tmp_path / 'a.onnx', draw(*shape))
        expected = [one['logits'] for one in toolkit_results(model, draw(*shape))]
        np.testing.assert_allclose(found['logits'], expected, atol=1e-5)
        assert (found['labels'] == found['logits'].argmax(axis=1)).all()
        assert found['labels'].shape == shape


def check_lists(found, expected, limits):
    for i, one in enumerate(expected):
        number = len(one['scores'])
        assert number > 5
        for name, limit in limits.items():
            mine = found[name][i, :number]
            np.testing.assert_allclose(mine, one[name], rtol=0, atol=limit)
        assert (found['labels'][i, number:] == -1).all()


@pytest.mark.parametrize(
    ('settings', 'length'),
    [
        ({}, 100),
        (dict(nms=dict(type='nms', iou_threshold=0.3, class_agnostic=True)), 100),
        (dict(nms_pre=10, min_bbox_size=30, score_thr=0.3), 50),
    ],
)
def test_detector_gives_what_mmdet_predicts(tmp_path, settings, length):
    model = tiny_model(DETECTOR, **settings)
    exported = save(model, tmp_path / 'a.onnx', (96, 128))
    assert exported.detections > 20 and not exported.rounded
    images = draw(3, 75, 101)
    found = run_onnx(tmp_path / 'a.onnx', images)
    assert found['boxes'].shape == (3, length, 4)
    (boxes, *_) = onnx.load(tmp_path / 'a.onnx').graph.output
    assert boxes.type.tensor_type.shape.dim[1].dim_value == length
    limits = dict(boxes=1e-2, scores=1e-5, labels=0)
    check_lists(found, toolkit_results(model, images), limits)


def test_detector_graph_is_bit_for_bit_mmdets():
    # Folding BN rounds, so here it is not folded.
    model = tiny_model(DETECTOR)
    graph = SYSTEMS['RetinaNet'](model).eval()
    images = draw(3, 75, 101)
    pixels = torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).float()
    with torch.no_grad():
        found = dict(zip(graph.outputs, (output.numpy() for output in graph(pixels))))
    limits = dict(boxes=0, scores=0, labels=0)
    check_lists(found, toolkit_results(model, images), limits)


def test_detector_that_finds_nothing_gives_an_empty_list(tmp_path):
    model = tiny_model(DETECTOR, score_thr=0.999)
    assert save(model, tmp_path / 'a.onnx', (64, 64)).detections == 0
    found = run_onnx(tmp_path / 'a.onnx', draw(2, 64, 64))
    assert (found['labels'] == -1).all()
    assert not found['boxes'].any() and not found['scores'].any()


def test_backbone_of_a_model_that_cannot_be_exported_as_a_whole(tmp_path):
    cfg, path = find_config('mask_rcnn_convmlp_s'), tmp_path / 'a.onnx'
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.neck.in_channels = [8, 8, 16, 24]
    with pytest.raises(ValueError, match='MaskRCNN cannot.* RetinaNet can'):
        check_request(cfg, path)
    save(build_model(cfg), path, (64, 64), part='backbone', opset=13)
    found = run_onnx(path, draw(1, 50, 70))
    # The data preprocessor pads to multiples of 32.
    shapes = [found[f'feature_{i}'].shape[1:] for i in range(4)]
    assert shapes == [(8, 16, 24), (8, 8, 12), (16, 4, 6), (24, 2, 3)]
    assert read_properties(path)['strides'] == '[4, 8, 16, 32]'


@pytest.mark.parametrize(
    ('kind', 'outputs', 'least'),
    [(CLASSIFIER, 1, 33), (SEGMENTOR, 2, 33), (DETECTOR, 3, 129)],
)
def test_torch_format_leaves_batch_and_size_open(tmp_path, kind, outputs, least):
    model, path = tiny_model(kind), tmp_path / 'a.pt2'
    if not NEWER_TORCH:
        with pytest.raises(ImportError, match=r'needs torch 2\.6 or newer'):
            save(model, path, (160, 160), form='torch')
        return
    with pytest.raises(ValueError, match=f'at least {least} {least}'):
        save(model, path, (least - 1, 160), form='torch')
    save(model, path, (160, 160), form='torch')
    extra = {'metadata.json': ''}
    module = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    assert json.loads(extra['metadata.json'])['channel_order'] == 'RGB'
    for batch, height, width in ((1, least, 190), (3, 165, 164)):
        found = module.module()(torch.rand(batch, 3, height, width) * 255)
        assert [len(output) for output in found] == [batch] * outputs


@pytest.mark.parametrize(
    ('kind', 'way', 'message'),
    [
        (CLASSIFIER, 'scaled', 'ImageClassifier differs from PyTorch by'),
        (SEGMENTOR, 'not_a_number', r'logits nan, labels 0'),
        (DETECTOR, 'missing', r'RetinaNet differs.* selection [1-9]'),
        (CLASSIFIER, 'narrow', r"output 'scores' has shape \(1, 4\)"),
        (CLASSIFIER, 'untraceable', 'ImageClassifier cannot be exported to onnx'),
    ],
)
def test_what_differs_is_not_written(tmp_path, monkeypatch, kind, way, message):
    forward = Graph.forward

    def wrong(self, images):
        outputs = forward(self, images)
        *others, last = outputs
        return dict(
            scaled=lambda: (last * 1.001,),
            not_a_number=lambda: (*others, last * float('nan')),
            missing=lambda: tuple(values[:, 1:] for values in outputs),
            narrow=lambda: (last[:, 1:],),
            untraceable=lambda: (torch.tensor(np.linalg.inv(last.tolist())),),
        )[way]()

    monkeypatch.setattr(Graph, 'forward', wrong)
    with pytest.raises(ExportError, match=message):
        save(tiny_model(kind), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())


def test_file_is_compared_on_all_images_and_other_sizes_before_it_is_written(tmp_path):
    model, path, shapes = tiny_model(CLASSIFIER), tmp_path / 'a.onnx', []
    exported = export(model, (64, 64), batch_size=2)
    run = exported.run
    with pytest.raises(ExportError, match=r'only after verify\(\)'):
        write(exported, path)
    exported.run = lambda images: [][0]
    with pytest.raises(ExportError, match='does not run: IndexError'):
        verify(exported, model)
    assert not list(tmp_path.iterdir())
    exported.run = lambda images: (shapes.append(tuple(images.shape)), run(images))[1]
    verify(exported, model, draw(4, 70, 90))
    expected = [(2, 64, 64), (2, 64, 64), (2, 51, 45), (3, 64, 64)]
    assert shapes == [(batch, 3, *size) for batch, *size in expected]
    assert exported.differences['scores'] < 1e-5
    write(exported, path)
    with pytest.raises(FileExistsError):
        write(exported, path)
    write(exported, path, overwrite=True)


def test_detections_that_only_rounding_chooses(tmp_path):
    # In an even image neighbours have the same scores, and whether BN is folded
    # decides who suppresses whom.
    nms = dict(type='nms', iou_threshold=0.3)
    model, even = tiny_model(DETECTOR, nms=nms), np.full((1, 9, 9, 3), 90, np.uint8)
    exported = save(model, tmp_path / 'a.onnx', (320, 448), even)
    assert exported.rounded and exported.differences['selection'] == 0


@pytest.mark.parametrize(
    ('kind', 'settings', 'message'),
    [
        (SEGMENTOR, dict(mode='slide', crop_size=(64, 64), stride=(32, 32)), 'mode'),
        (DETECTOR, dict(nms=dict(type='soft_nms', iou_threshold=0.5)), 'be nms'),
        (DETECTOR, dict(nms_pre=-1), r'nms_pre must be above 0.* is -1'),
    ],
)
def test_settings_that_the_graphs_lack(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        save(tiny_model(kind, **settings), tmp_path / 'a.onnx', (64, 64))


def detections(*rows):
    columns = zip(('boxes', 'scores', 'labels'), zip(*rows))
    kinds = dict(boxes=np.float32, scores=np.float32, labels=np.int64)
    return {name: np.array(column, kinds[name]) for name, column in columns}


def test_detections_may_differ_by_rounding_alone():
    cfg = ConfigDict(nms=dict(iou_threshold=0.5), score_thr=0.05, max_per_img=3)
    best = ([0, 0, 10, 10], 0.8, 1)
    twin = ([1, 0, 11, 10], 0.79999, 1)
    other = ([1, 0, 11, 10], 0.7, 2)
    low = ([50, 50, 60, 60], 0.05001, 0)
    last = ([50, 50, 60, 60], 0.6, 0)
    more = ([70, 70, 80, 80], 0.5, 0)

    def wrong(*found, expected=(best, other)):
        return count_wrong(cfg, detections(*found), detections(*expected))

    assert wrong(best, other) == 0
    # A score at the threshold may be on either side of it.
    assert wrong(best, other, low) == wrong(best, expected=(best, low)) == 0
    # Of two whose scores are equal but for rounding, either suppresses the other.
    assert wrong(twin, other) == 0
    assert wrong(best, twin, other) == 1
    assert wrong(other) == wrong(best) == 1
    assert wrong(best, other, last) == 1
    # What comes after the end of a full list does not count.
    assert wrong(best, other, last, expected=(best, other, last, more)) == 0
    assert wrong(best, other, more, expected=(best, other, last)) == 1
    cfg.nms.class_agnostic = True
    assert wrong(best, other) == 1
    assert wrong(best) == 0


def test_distance_of_detections():
    expected = detections(([0, 0, 10, 10], 0.8, 1), ([1, 0, 11, 10], 0.7, 2))
    moved = detections(([0, 0, 10, 10.002], 0.8, 1), ([0, 0, 10, 10], 0.8003, 1))
    assert _differences(moved, expected)[:, 0] == pytest.approx([2e-4, 3e-4], rel=0.01)
    assert np.isinf(_differences(moved, expected)[:, 1]).all()


def test_command_line(tool, tmp_path):
    config, path = tmp_path / 'tiny.py', tmp_path / 'a.onnx'
    cfg = tiny_config(CLASSIFIER)
    Config(cfg.to_dict()).dump(config)
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), draw(1, 80, 90)[0])
    options = [config, 'none', path, '--shape', 64, 64, '--images', image]
    done = tool('export.py', *options)
    assert done.returncode == 0, done.stderr
    assert 'scores: ' in done.stdout and 'random weights (seed 0)' in done.stdout
    properties = read_properties(path)
    assert properties['channel_order'] == 'RGB'
    assert properties['normalized_inside'] == 'true'
    assert json.loads(properties['mean']) == pytest.approx([123.675, 116.28, 103.53])
    assert len(json.loads(properties['classes'])) == 1000
    before = path.read_bytes()

    for wrong, message in (
        (options, 'already there'),
        ([config, 'none', tmp_path / 'a.pt2', '--shape', 64, 64], 'must end with'),
        (['mask_rcnn_convmlp_s', 'none', tmp_path / 'b.onnx'], 'MaskRCNN'),
        ([config, 'none', tmp_path / 'b.onnx', '--shape', 16, 64], 'at least 32 32'),
        ([config, tmp_path / 'no.pth', tmp_path / 'b.onnx'], 'does not exist'),
        ([*options[:2], tmp_path / 'b.onnx', '--images', config], 'cannot be read'),
    ):
        done = tool('export.py', *wrong)
        assert done.returncode == 2
        assert message in done.stderr and 'Traceback' not in done.stderr
    assert path.read_bytes() == before
    assert not (tmp_path / 'b.onnx').exists()
