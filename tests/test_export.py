"""Exported files, run by onnxruntime and torch as their users do."""

import copy
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
from convmlp_mm.export import check_request, draw_images, export, verify, write
from convmlp_mm.export.systems import SYSTEMS, ExportError, Graph
from convmlp_mm.export.verify import _differences, count_wrong, toolkit_results
from convmlp_mm.zoo import find_config

ARCH = dict(tokenizer_channels=8, conv_blocks=1, channels=(8, 16, 24))
ARCH.update(depths=(1, 1, 1), mlp_ratios=(2, 1.5, 2))
CLASSIFIER, SEGMENTOR = 'convmlp_s_imagenet', 'semantic_fpn_convmlp_s'
DETECTOR = 'retinanet_convmlp_s'


def tiny_config(name):
    cfg = find_config(name)
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    if name == CLASSIFIER:
        cfg.model.head.update(in_channels=24, num_classes=5)
        return cfg
    cfg.model.neck.update(in_channels=[8, 8, 16, 24], out_channels=16)
    if name == SEGMENTOR:
        cfg.model.decode_head.update(in_channels=[16] * 4, channels=16, num_classes=5)
    elif name == DETECTOR:
        cfg.model.bbox_head.update(in_channels=16, feat_channels=16, num_classes=3)
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


def to_pixels(images):
    return images[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)


def run_onnx(path, images):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'images': to_pixels(images)})))


def read_properties(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


@pytest.mark.parametrize(
    ('kind', 'name'), [(CLASSIFIER, 'scores'), (SEGMENTOR, 'logits')]
)
def test_file_computes_the_same_at_any_batch_and_size(tmp_path, kind, name):
    model, path = tiny_model(kind), tmp_path / 'a.onnx'
    before = copy.deepcopy(model.state_dict())
    save(model, path, (64, 96))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert list(tmp_path.iterdir()) == [path]
    for shape in ((1, 32, 32), (3, 71, 33)):
        found = run_onnx(path, draw(*shape))
        expected = [one[name] for one in toolkit_results(model, draw(*shape))]
        np.testing.assert_allclose(found[name], expected, atol=1e-5)
        if kind == SEGMENTOR:
            assert (found['labels'] == found['logits'].argmax(axis=1)).all()
            assert found['labels'].shape == shape


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
    assert exported.detections > 20
    images = draw(3, 75, 101)
    found = run_onnx(tmp_path / 'a.onnx', images)
    assert found['boxes'].shape == (3, length, 4)
    boxes = onnx.load(tmp_path / 'a.onnx').graph.output[0]
    assert boxes.type.tensor_type.shape.dim[1].dim_value == length
    expected = toolkit_results(model, images)
    check_lists(found, expected, dict(boxes=1e-2, scores=1e-5, labels=0))


def test_detector_graph_is_bit_for_bit_mmdets():
    # Folding BN rounds, so here it is not folded.
    model = tiny_model(DETECTOR)
    graph = SYSTEMS['RetinaNet'](model).eval()
    images = draw(3, 75, 101)
    with torch.no_grad():
        outputs = graph(torch.from_numpy(to_pixels(images)))
    found = {name: values.numpy() for name, values in zip(graph.outputs, outputs)}
    exactly = dict(boxes=0, scores=0, labels=0)
    check_lists(found, toolkit_results(model, images), exactly)


def test_detector_that_finds_nothing_gives_an_empty_list(tmp_path):
    model = tiny_model(DETECTOR, score_thr=0.999)
    assert save(model, tmp_path / 'a.onnx', (64, 64)).detections == 0
    found = run_onnx(tmp_path / 'a.onnx', draw(2, 64, 64))
    assert (found['labels'] == -1).all()
    assert not found['boxes'].any() and not found['scores'].any()


def test_backbone_of_a_model_that_cannot_be_exported_as_a_whole(tmp_path):
    cfg, path = tiny_config('mask_rcnn_convmlp_s'), tmp_path / 'a.onnx'
    cfg.model.neck.out_channels = 256
    with pytest.raises(ValueError, match='MaskRCNN cannot.* RetinaNet can'):
        check_request(cfg, path)
    save(build_model(cfg), path, (64, 64), part='backbone')
    found = run_onnx(path, draw(1, 50, 70))
    # The data preprocessor pads to multiples of 32.
    shapes = [found[f'feature_{i}'].shape[1:] for i in range(4)]
    assert shapes == [(8, 16, 24), (8, 8, 12), (16, 4, 6), (24, 2, 3)]
    assert read_properties(path)['strides'] == '[4, 8, 16, 32]'


@pytest.mark.parametrize(
    ('kind', 'outputs'), [(CLASSIFIER, 1), (SEGMENTOR, 2), (DETECTOR, 3)]
)
def test_torch_format_leaves_batch_and_size_open(tmp_path, kind, outputs):
    model, path = tiny_model(kind), tmp_path / 'a.pt2'
    if not hasattr(torch.export.Dim, 'DYNAMIC'):
        with pytest.raises(ImportError, match=r'needs torch 2\.6 or newer'):
            save(model, path, (160, 160), form='torch')
        return
    with pytest.raises(ValueError, match='at least 129 129'):
        save(model, path, (128, 160), form='torch')
    save(model, path, (160, 160), form='torch')
    extra = {'metadata.json': ''}
    module = torch.export.load(io.BytesIO(path.read_bytes()), extra_files=extra)
    assert json.loads(extra['metadata.json'])['channel_order'] == 'RGB'
    least = 129 if kind == DETECTOR else 33
    for batch, height, width in ((1, least, 190), (3, 165, 164)):
        found = module.module()(torch.rand(batch, 3, height, width) * 255)
        assert [len(output) for output in found] == [batch] * outputs


@pytest.mark.parametrize(
    ('kind', 'way', 'message'),
    [
        (CLASSIFIER, 'scaled', 'ImageClassifier differs from PyTorch by'),
        (SEGMENTOR, 'not_a_number', r'logits nan, labels 0'),
        (DETECTOR, 'moved', r'RetinaNet differs.* detections .*e-01'),
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
            moved=lambda: (outputs[0] + 5, *outputs[1:]),
            narrow=lambda: (last[:, 1:],),
            untraceable=lambda: (torch.tensor(np.linalg.inv(last.tolist())),),
        )[way]()

    monkeypatch.setattr(Graph, 'forward', wrong)
    with pytest.raises(ExportError, match=message):
        save(tiny_model(kind), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())


def test_file_is_compared_on_all_images_and_other_sizes_before_it_is_written(tmp_path):
    model, path, shapes = tiny_model(CLASSIFIER), tmp_path / 'a.onnx', []
    exported = export(model, (64, 64))
    run = exported.run
    with pytest.raises(ExportError, match=r'only after verify\(\)'):
        write(exported, path)
    exported.run = lambda images: [][0]
    with pytest.raises(ExportError, match='does not run: IndexError'):
        verify(exported, model)
    exported.run = lambda images: (shapes.append(tuple(images.shape)), run(images))[1]
    verify(exported, model, draw(2, 70, 90))
    size, other = (3, 64, 64), (3, 73, 81)
    assert shapes == [(1, *size), (1, *size), (1, *other), (2, *size)]
    write(exported, path)
    with pytest.raises(FileExistsError):
        write(exported, path)
    write(exported, path, overwrite=True)
    exported.run = lambda images: [run(images)[0] + 1]
    with pytest.raises(ExportError, match='differs'):
        verify(exported, model)
    with pytest.raises(ExportError, match='only after'):
        write(exported, path, overwrite=True)


def test_detections_that_only_rounding_chooses():
    # In an even image neighbours have the same scores, and whether BN is folded
    # decides who suppresses whom.
    model = tiny_model(DETECTOR, nms=dict(type='nms', iou_threshold=0.3))
    exported = export(model, (320, 448))
    image = np.full((1, 320, 448, 3), 90, np.uint8)
    verify(exported, model, image)
    assert exported.differences['selection'] == 0
    found = exported.run(torch.from_numpy(to_pixels(image)))
    valid = found[2][0] >= 0
    found = {n: values[0][valid] for n, values in zip(exported.graph.outputs, found)}
    (expected,) = toolkit_results(model, image)
    assert (_differences(found, expected).min(axis=1) > 1e-4).any()


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
    best, twin = ([0, 0, 10, 10], 0.8, 1), ([1, 0, 11, 10], 0.79999, 1)
    other, low = ([1, 0, 11, 10], 0.7, 2), ([50, 50, 60, 60], 0.05001, 0)
    last, more = ([50, 50, 60, 60], 0.6, 0), ([70, 70, 80, 80], 0.5, 0)

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
    assert wrong(best, other) == 1 and wrong(best) == 0


def test_distance_of_detections():
    expected = detections(([0, 0, 10, 10], 0.8, 1), ([1, 0, 11, 10], 0.7, 2))
    moved = detections(([0, 0, 10, 10.002], 0.8, 1), ([0, 0, 10, 10], 0.8003, 1))
    assert _differences(moved, expected)[:, 0] == pytest.approx([2e-4, 3e-4], rel=0.01)
    assert np.isinf(_differences(moved, expected)[:, 1]).all()


def test_command_line(tool, tmp_path):
    config, path, image = (tmp_path / name for name in ('tiny.py', 'a.onnx', 'a.png'))
    Config(tiny_config(CLASSIFIER).to_dict()).dump(config)
    cv2.imwrite(str(image), draw(1, 80, 90)[0])
    options = [config, 'none', path, '--shape', 64, 64, '--images', image]
    done = tool('export.py', *options)
    assert done.returncode == 0, done.stderr
    assert 'scores: ' in done.stdout and 'random weights (seed 0)' in done.stdout
    properties = read_properties(path)
    assert properties['channel_order'] == 'RGB'
    assert json.loads(properties['mean']) == pytest.approx([123.675, 116.28, 103.53])
    assert len(json.loads(properties['classes'])) == 1000
    before, new = path.read_bytes(), tmp_path / 'b.onnx'
    for wrong, message in (
        (options, 'already there'),
        ([config, 'none', tmp_path / 'a.pt2'], 'must end with'),
        (['mask_rcnn_convmlp_s', 'none', new], 'MaskRCNN'),
        ([config, 'none', new, '--shape', 16, 64], 'at least 32 32'),
        ([config, tmp_path / 'no.pth', new], 'does not exist'),
        ([config, 'none', new, '--images', config], 'cannot be read'),
    ):
        done = tool('export.py', *wrong)
        assert done.returncode == 2
        assert message in done.stderr and 'Traceback' not in done.stderr
    assert path.read_bytes() == before and not new.exists()
