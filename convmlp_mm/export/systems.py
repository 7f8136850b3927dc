"""The systems that can be exported, as graphs from pixels to results.

``SYSTEMS`` has one function per system, which refuses the settings that its graph does
not have. A graph has no loop over images and no branch on values, so that batch and
size of the images stay open.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
import torchvision
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from torch import Tensor, nn

# The label of the places in a list of detections that no detection takes.
NO_LABEL = -1


class ExportError(ValueError):
    """A model cannot be exported, or the exported file computes something else."""


class Graph(nn.Module):
    """A model behind the arithmetic of its data preprocessor.

    ``compute`` maps model, preprocessed images and their size before padding to the
    ``outputs``, which are given as their names, each with its open axes. ``notes`` are
    properties of the file beside those that all files have.
    """

    def __init__(
        self, model: BaseModel, compute: Callable, outputs: dict[str, dict], **notes
    ) -> None:
        super().__init__()
        self.model, self.compute, self.outputs = model, compute, outputs
        settings = model.cfg.model.get('data_preprocessor') or {}
        to_rgb = settings.get('bgr_to_rgb') or settings.get('to_rgb')
        given = model.data_preprocessor
        for name, neutral in (('mean', 0.0), ('std', 1.0)):
            value = getattr(given, name, torch.full((3, 1, 1), neutral))
            self.register_buffer(name, value.clone())
        # mmseg has names of its own: pad_val, and test_cfg for the padding in tests.
        test_cfg = getattr(given, 'test_cfg', None) or {}
        _require('data_preprocessor.test_cfg.size', test_cfg.get('size'), None)
        padding = getattr(given, 'pad_size_divisor', test_cfg.get('size_divisor'))
        self.divisor = padding or 1
        self.pad_value = getattr(given, 'pad_value', getattr(given, 'pad_val', 0))
        self.properties = dict(
            channel_order='RGB' if to_rgb else 'BGR',
            value_range=[0, 255],
            normalized_inside=True,
            mean=self.mean.flatten().tolist(),
            std=self.std.flatten().tolist(),
            padded_inside_to=self.divisor,
            classes=list(model.dataset_meta.get('classes') or ()),
            outputs=list(outputs),
            **notes,
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map pixels (N, 3, H, W), from 0 to 255, to the outputs."""
        size, more = images.shape[2:], self.divisor
        images = (images - self.mean) / self.std
        if more > 1:
            # A padding that may be 0 would split the graph in two, so it pads by more
            # than needed and cuts.
            images = F.pad(images, (0, more, 0, more), value=float(self.pad_value))
            rows, columns = ((side + more - 1) // more * more for side in size)
            images = images[:, :, :rows, :columns]
        return self.compute(self.model, images, size)


def _require(name: str, value: object, allowed: object) -> None:
    if value != allowed:
        raise ExportError(f'{name} must be {allowed} to be exported, but is {value}')


def backbone(model: BaseModel) -> Graph:
    """Export the backbone of any model: ``feature_0`` and so on, (N, C, h, w)."""
    maps = model.backbone(torch.zeros(1, 3, 128, 128))
    outputs = {
        f'feature_{i}': {0: 'batch', 2: f'height_{i}', 3: f'width_{i}'}
        for i in range(len(maps))
    }
    graph = Graph(
        model,
        lambda backbone, images, size: tuple(backbone(images)),
        outputs,
        strides=[128 // m.shape[2] for m in maps],
        out_channels=[m.shape[1] for m in maps],
    )
    # The file holds no weights of neck and head.
    graph.model = model.backbone
    return graph


def classifier(model: BaseModel) -> Graph:
    """Export a classifier: ``scores`` (N, classes), which add up to 1."""
    from mmpretrain.models import ClsHead

    def compute(model, images, size):
        return (model(images, mode='tensor').softmax(dim=1),)

    if not isinstance(model.head, ClsHead):
        raise ExportError(f'the head {type(model.head).__name__} cannot be exported')
    return Graph(model, compute, dict(scores={0: 'batch'}))


def segmentor(model: BaseModel) -> Graph:
    """Export a segmentor of whole images: ``labels`` and ``logits``.

    They are (N, H, W), int64, and (N, classes, H, W).
    """
    from mmseg.models.utils import Upsample

    def compute(model, images, size):
        settings = dict(mode='bilinear', align_corners=model.align_corners)
        logits = model(images, mode='tensor')
        logits = F.interpolate(logits, size=images.shape[2:], **settings)
        logits = logits[:, :, : size[0], : size[1]]
        return logits.argmax(dim=1), logits

    _require('test_cfg.mode', model.test_cfg.get('mode', 'whole'), 'whole')
    if model.out_channels == 1:
        raise ExportError('a segmentor with one output for two classes has no logits')
    for module in model.modules():
        if isinstance(module, Upsample) and not module.size:
            # Its own int(side * factor) would fix the size.
            options = dict(mode=module.mode, align_corners=module.align_corners)
            options['scale_factor'] = module.scale_factor
            module.forward = partial(F.interpolate, **options)
    labels = {0: 'batch', 1: 'height', 2: 'width'}
    logits = {0: 'batch', 2: 'height', 3: 'width'}
    return Graph(model, compute, dict(labels=labels, logits=logits))


def retinanet(model: BaseModel) -> Graph:
    """Export RetinaNet with the post-processing that its ``test_cfg`` asks for.

    It gives ``boxes`` (N, K, 4), left, top, right, bottom in pixels, ``scores`` and
    ``labels`` (N, K), best first. K is ``max_per_img``; places that no detection takes
    have the label ``NO_LABEL`` and 0 else.
    """
    head, cfg = model.bbox_head, model.bbox_head.test_cfg
    _require('bbox_head', type(head).__name__, 'RetinaHead')
    _require('bbox_head.loss_cls.use_sigmoid', head.use_sigmoid_cls, True)
    coder = type(head.bbox_coder).__name__
    _require('bbox_head.bbox_coder', coder, 'DeltaXYWHBBoxCoder')
    _require('test_cfg.nms.type', cfg.nms.get('type'), 'nms')
    for key in ('nms_pre', 'max_per_img'):
        if cfg.get(key, -1) <= 0:
            raise ExportError(f'test_cfg.{key} must be above 0, but is {cfg.get(key)}')
    outputs = dict.fromkeys(('boxes', 'scores', 'labels'), {0: 'batch'})
    return Graph(model, _detect, outputs, test_cfg=cfg.to_dict())


def _detect(model: BaseModel, images: Tensor, size: tuple) -> tuple[Tensor, ...]:
    head, cfg = model.bbox_head, model.bbox_head.test_cfg
    logits, deltas = head(model.extract_feat(images))
    anchors = head.prior_generator.grid_priors(
        [level.shape[-2:] for level in logits], device=images.device
    )
    levels = [_decode_best(head, *level) for level in zip(logits, deltas, anchors)]
    boxes, scores, labels = (torch.cat(parts, dim=1) for parts in zip(*levels))
    if head.bbox_coder.clip_border:
        x = boxes[..., 0::2].clamp(min=0, max=size[1])
        y = boxes[..., 1::2].clamp(min=0, max=size[0])
        boxes = torch.stack([x, y], dim=-1).flatten(-2)
    sides = boxes[..., 2:] - boxes[..., :2]
    valid = (sides > cfg.get('min_bbox_size', -1)).all(dim=-1)
    valid = valid & (scores > cfg.get('score_thr', 0))
    scores = _suppress(cfg.nms, boxes, scores, labels, valid)
    scores, order = scores.topk(min(cfg.max_per_img, scores.shape[1]), dim=1)
    found = scores > 0
    boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4)) * found[..., None]
    return boxes, scores, labels.gather(1, order).masked_fill(~found, NO_LABEL)


def _decode_best(
    head: nn.Module, logits: Tensor, deltas: Tensor, anchors: Tensor
) -> tuple[Tensor, ...]:
    """Decode the ``nms_pre`` pairs of box and class of a level with the best scores.

    Logits (N, A * classes, H, W), deltas (N, A * 4, H, W) and anchors (H * W * A, 4)
    give boxes (N, nms_pre, 4), scores and labels (N, nms_pre).
    """
    batch, number = logits.shape[0], head.test_cfg.nms_pre
    logits = logits.permute(0, 2, 3, 1).flatten(1)
    deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
    # The number to take must be a constant, but small levels have fewer pairs: others
    # of score 0 stand before them.
    logits = F.pad(logits, (number, 0), value=float('-inf'))
    best, order = logits.topk(number, dim=1)
    order = (order - number).clamp(min=0)
    labels, order = order % head.cls_out_channels, order // head.cls_out_channels
    deltas = deltas.gather(1, order[..., None].expand(-1, -1, 4))
    boxes = head.bbox_coder.decode(anchors[order].flatten(0, 1), deltas.flatten(0, 1))
    return boxes.reshape(batch, number, 4), best.sigmoid(), labels


def _suppress(
    nms: ConfigDict, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor
) -> Tensor:
    """Set the scores (N, M) to 0 of boxes that are not valid or are suppressed."""
    # Boxes are set apart by class, as in mmcv, so that one suppression serves all; here
    # by image too, in y alone, which keeps them small enough for float32.
    step = (boxes * valid[..., None]).max() + 1
    index = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
    across = torch.zeros_like(labels) if nms.get('class_agnostic') else labels
    shift = torch.stack([across, across + index] * 2, dim=-1).to(boxes) * step
    candidates = valid.flatten().nonzero()[:, 0]
    apart = (boxes + shift).flatten(0, 1)[candidates]
    flat = scores.flatten()
    kept = torchvision.ops.nms(apart, flat[candidates], nms.iou_threshold)
    kept = candidates[kept]
    return torch.zeros_like(flat).scatter(0, kept, flat[kept]).reshape(scores.shape)


SYSTEMS = dict(
    ImageClassifier=classifier, EncoderDecoder=segmentor, RetinaNet=retinanet
)
