"""Exported files, run by onnxruntime and torch as their users do."""

import io
import json
from types import SimpleNamespace

import cv2
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from mmengine.config import Config

from convmlp_mm.apis import build_model
from convmlp_mm.export import (
    ExportError,
    check,
    check_request,
    compare,
    draw_images,
    export_model,
    graphs,
)
from convmlp_mm.export.detections import _count_wrong, _distance
from convmlp_mm.zoo import find_config

ARCH = dict(
    tokenizer_channels=8,
    conv_blocks=1,
    channels=(8, 16, 24),
    depths=(1, 1, 1),
    mlp_ratios=(2, 1.5, 2),
)
NAMES = dict(
    classifier='convmlp_s_imagenet',
    segmentor='semantic_fpn_convmlp_s',
    detector='retinanet_convmlp_s',
)
NEWER_TORCH = hasattr(torch.export.Dim, 'DYNAMIC')


def tiny_config(kind):
    cfg = find_config(NAMES[kind])
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    if kind == 'classifier':
        cfg.model.head.update(in_channels=24, num_classes=5)
    else:
        cfg.model.neck.update(in_channels=[8, 8, 16, 24], out_channels=16)
    if kind == 'segmentor':
        head = dict(in_channels=[16] * 4, channels=16, num_classes=5)
        cfg.model.decode_head.update(head)
    elif kind == 'detector':
        head = dict(in_channels=16, feat_channels=16, num_classes=3)
        cfg.model.bbox_head.update(head)
    return cfg


def tiny_model(kind, **test_cfg):
    """Build a model with BN that has seen something, and a head that finds boxes."""
    cfg = tiny_config(kind)
    cfg.model.setdefault('test_cfg', {}).update(test_cfg)
    if kind == 'classifier':
        cfg.model.pop('test_cfg')
    torch.manual_seed(0)
    model = build_model(cfg)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    if kind == 'detector':
        model.bbox_head.retina_cls.bias.data.fill_(-1)
        model.bbox_head.retina_cls.weight.data.normal_(std=0.1)
    return model


def picture(batch, height, width, seed=3):
    return draw_images(batch, (height, width), seed)


def run_onnx(path, pictures):
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    given = np.stack(pictures)[..., ::-1].transpose(0, 3, 1, 2).astype(np.float32)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {'images': given})))


def toolkit(model, pictures, sample):
    size = pictures[0].shape[:2]
    meta = dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0))
    planes = [torch.from_numpy(p.transpose(2, 0, 1).copy()) for p in pictures]
    samples = [sample(metainfo=dict(meta)) for _ in pictures]
    with torch.no_grad():
        return model.test_step(dict(inputs=planes, data_samples=samples))


def test_classifier_gives_probabilities_at_any_batch_and_size(tmp_path):
    from mmpretrain.structures import DataSample

    model = tiny_model('classifier')
    before = {k: v.clone() for k, v in model.state_dict().items()}
    path = tmp_path / 'a.onnx'
    report = export_model(model, path, (64, 64))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)
    assert {shape for shape, _ in report.differences} >= {(1, 64, 64), (2, 64, 64)}
    assert list(tmp_path.iterdir()) == [path]
    for shape in ((1, 32, 32), (3, 45, 70)):
        found = run_onnx(path, picture(*shape))
        expected = toolkit(model, picture(*shape), DataSample)
        expected = np.stack([one.pred_score.numpy() for one in expected])
        np.testing.assert_allclose(found['scores'], expected, atol=1e-5)


def test_colours_stay_blue_first_where_the_configuration_says_so(tmp_path):
    cfg = tiny_config('classifier')
    cfg.data_preprocessor.to_rgb = False
    export_model(build_model(cfg), tmp_path / 'a.onnx', (64, 64))
    properties = {p.key: p.value for p in onnx.load(tmp_path / 'a.onnx').metadata_props}
    assert properties['channel_order'] == 'BGR'


def test_segmentor_gives_labels_and_logits_of_every_pixel(tmp_path):
    from mmseg.structures import SegDataSample

    model = tiny_model('segmentor')
    export_model(model, tmp_path / 'a.onnx', (64, 96), batch_size=2)
    for shape in ((1, 64, 96), (3, 71, 33)):
        found = run_onnx(tmp_path / 'a.onnx', picture(*shape))
        for i, one in enumerate(toolkit(model, picture(*shape), SegDataSample)):
            expected = one.seg_logits.data.numpy()
            np.testing.assert_allclose(found['logits'][i], expected, atol=1e-5)
        assert (found['labels'] == found['logits'].argmax(axis=1)).all()
        assert found['labels'].shape == shape


@pytest.mark.parametrize(
    'settings',
    [
        {},
        dict(nms=dict(type='nms', iou_threshold=0.3, class_agnostic=True)),
        dict(nms_pre=40, min_bbox_size=30, score_thr=0.3),
    ],
    ids=['as_configured', 'class_agnostic', 'few_candidates'],
)
def test_detector_gives_what_mmdet_predicts(tmp_path, settings):
    from mmdet.structures import DetDataSample

    model = tiny_model('detector', **settings)
    report = export_model(model, tmp_path / 'a.onnx', (96, 128))
    assert report.detections > 20
    pictures = picture(3, 75, 101)
    found = run_onnx(tmp_path / 'a.onnx', pictures)
    assert found['boxes'].shape == (3, 100, 4)
    for i, one in enumerate(toolkit(model, pictures, DetDataSample)):
        number = len(one.pred_instances)
        assert number > 5
        scores = one.pred_instances.scores.numpy()
        np.testing.assert_allclose(found['scores'][i, :number], scores, atol=1e-5)
        boxes = one.pred_instances.bboxes.numpy()
        np.testing.assert_allclose(found['boxes'][i, :number], boxes, atol=1e-2)
        labels = one.pred_instances.labels.numpy()
        assert (found['labels'][i, :number] == labels).all()
        assert (found['labels'][i, number:] == -1).all()


def test_detector_graph_is_bit_for_bit_mmdets():
    # Until BN is folded, which rounds.
    model = tiny_model('detector')
    graph = check.make_graph(model, 'model')
    pictures = picture(3, 75, 101)
    with torch.no_grad():
        found = graph(compare.to_input(pictures, 'RGB'))
    found = dict(zip(graph.outputs, (output.numpy() for output in found)))
    for i, expected in enumerate(compare.toolkit_results(model, pictures, 'model')):
        number = len(expected['scores'])
        assert number > 5
        for name, values in expected.items():
            assert (found[name][i, :number] == values).all()
        assert (found['labels'][i, number:] == -1).all()


def test_detector_that_finds_nothing_gives_an_empty_list(tmp_path):
    report = export_model(
        tiny_model('detector', score_thr=0.999), tmp_path / 'a.onnx', (64, 64)
    )
    assert report.detections == 0
    found = run_onnx(tmp_path / 'a.onnx', picture(2, 64, 64))
    assert (found['labels'] == -1).all()
    assert not found['boxes'].any() and not found['scores'].any()


def test_backbone_of_a_model_that_cannot_be_exported_as_a_whole(tmp_path):
    cfg = find_config('mask_rcnn_convmlp_s')
    cfg.model.backbone.update(arch=ARCH, init_cfg=None)
    cfg.model.neck.in_channels = [8, 8, 16, 24]
    path = tmp_path / 'a.onnx'
    with pytest.raises(ValueError, match='MaskRCNN cannot.* RetinaNet can'):
        check_request(cfg, path)
    model = build_model(cfg)
    export_model(model, path, (64, 64), part='backbone', opset=13)
    found = run_onnx(path, picture(1, 50, 70))
    # The data preprocessor pads to multiples of 32.
    shapes = [found[f'feature_{i}'].shape[1:] for i in range(4)]
    assert shapes == [(8, 16, 24), (8, 8, 12), (16, 4, 6), (24, 2, 3)]
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
    assert json.loads(properties['strides']) == [4, 8, 16, 32]


def test_torch_format_leaves_batch_and_size_open(tmp_path):
    model = tiny_model('classifier')
    if not NEWER_TORCH:
        with pytest.raises(ImportError, match=r'needs torch 2\.6 or newer'):
            export_model(model, tmp_path / 'a.pt2', (64, 64), form='torch')
        return
    with pytest.raises(ValueError, match='at least 33 33'):
        export_model(model, tmp_path / 'a.pt2', (32, 32), form='torch')
    export_model(model, tmp_path / 'a.pt2', (64, 64), form='torch')
    extra = {'metadata.json': ''}
    content = io.BytesIO((tmp_path / 'a.pt2').read_bytes())
    module = torch.export.load(content, extra_files=extra).module()
    assert json.loads(extra['metadata.json'])['channel_order'] == 'RGB'
    for batch, height, width in ((1, 33, 90), (3, 65, 64)):
        (scores,) = module(torch.rand(batch, 3, height, width) * 255)
        assert scores.shape == (batch, 5)


def test_what_differs_is_not_written(tmp_path, monkeypatch):
    forward = graphs.ClassifierGraph.forward

    def altered(self, images):
        return (forward(self, images)[0] * 1.001,)

    monkeypatch.setattr(graphs.ClassifierGraph, 'forward', altered)
    with pytest.raises(ExportError, match='ImageClassifier differs from PyTorch by'):
        export_model(tiny_model('classifier'), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())


def test_detector_that_misses_boxes_is_not_written(tmp_path, monkeypatch):
    forward = graphs.DetectorGraph.forward

    def altered(self, images):
        return tuple(values[:, 1:] for values in forward(self, images))

    monkeypatch.setattr(graphs.DetectorGraph, 'forward', altered)
    with pytest.raises(ExportError, match=r'RetinaNet differs.* labels 1\.0e\+00'):
        export_model(tiny_model('detector'), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())


def test_model_that_the_exporter_refuses(tmp_path, monkeypatch):
    def failing(self, images):
        return (torch.from_numpy(np.linalg.inv(images[0, 0].numpy().tolist())),)

    monkeypatch.setattr(graphs.ClassifierGraph, 'forward', failing)
    with pytest.raises(ExportError, match='ImageClassifier cannot be exported to onnx'):
        export_model(tiny_model('classifier'), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('kind', 'settings', 'message'),
    [
        ('segmentor', dict(mode='slide', crop_size=(64, 64), stride=(32, 32)), 'mode'),
        ('detector', dict(nms=dict(type='soft_nms', iou_threshold=0.5)), r'cfg\.nms'),
        ('detector', dict(nms_pre=-1), r'nms_pre must be above 0.* is -1'),
    ],
)
def test_settings_that_the_graphs_lack(tmp_path, kind, settings, message):
    with pytest.raises(ValueError, match=message):
        export_model(tiny_model(kind, **settings), tmp_path / 'a.onnx', (64, 64))


def detections(*rows):
    boxes, scores, labels = zip(*rows)
    return dict(
        boxes=np.array(boxes, np.float32),
        scores=np.array(scores, np.float32),
        labels=np.array(labels),
    )


def test_detections_must_be_what_suppression_leaves():
    graph = SimpleNamespace(iou_threshold=0.5, score_thr=0.05, class_agnostic=False)
    best = ([0, 0, 10, 10], 0.8, 1)
    twin = ([1, 0, 11, 10], 0.79999, 1)
    other = ([1, 0, 11, 10], 0.7, 2)
    low = ([50, 50, 60, 60], 0.05001, 0)
    candidates = detections(best, twin, other, low)

    def wrong(*found, full=False):
        return _count_wrong(graph, detections(*found), candidates, full)

    assert wrong(best, other) == wrong(best, other, low) == 0
    # Of two whose scores are equal but for rounding, either suppresses the other.
    assert wrong(twin, other) == 0
    assert wrong(best, twin, other) == 1
    assert wrong(other) == 2
    assert wrong(best) == 1
    assert wrong(best, full=True) == 0
    graph.class_agnostic = True
    assert wrong(best) == 0

    moved = detections(([0, 0, 10, 10.002], 0.8003, 1))
    distance = _distance(moved, candidates)
    assert distance['boxes'] == pytest.approx(2e-4, rel=0.01)
    assert distance['scores'] == pytest.approx(3e-4, rel=0.01)
    assert _distance(detections((*best[:2], 7)), candidates)['boxes'] == np.inf


def test_command_line(tool, tmp_path):
    config, path = tmp_path / 'tiny.py', tmp_path / 'a.onnx'
    cfg = tiny_config('classifier')
    Config(cfg.to_dict()).dump(config)
    image = tmp_path / 'a.png'
    cv2.imwrite(str(image), picture(1, 80, 90)[0])
    options = [config, 'none', path, '--shape', 64, 64, '--images', image]
    done = tool('export.py', *options)
    assert done.returncode == 0, done.stderr
    assert 'onnxruntime' in done.stdout and 'random weights (seed 0)' in done.stdout
    properties = {p.key: p.value for p in onnx.load(path).metadata_props}
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
        ([config, tmp_path / 'no.pth', tmp_path / 'b.onnx'], 'do not exist'),
    ):
        done = tool('export.py', *wrong)
        assert done.returncode == 2
        assert message in done.stderr and 'Traceback' not in done.stderr
    assert path.read_bytes() == before
    assert not (tmp_path / 'b.onnx').exists()


def test_what_is_not_a_number_is_not_written(tmp_path, monkeypatch):
    forward = graphs.SegmentorGraph.forward

    def altered(self, images):
        labels, logits = forward(self, images)
        return labels, logits * float('nan')

    monkeypatch.setattr(graphs.SegmentorGraph, 'forward', altered)
    with pytest.raises(ExportError, match=r'labels 0.* logits nan'):
        export_model(tiny_model('segmentor'), tmp_path / 'a.onnx', (64, 64))
    assert not list(tmp_path.iterdir())
