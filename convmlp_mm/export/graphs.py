"""Graphs to export: what stands between the pixels and the results of a model.

Each is the normalisation of the data preprocessor, the modules of the toolkit, and a
post-processing without loops over pictures and without branches on values, so that
batch and size of the pictures stay open.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = [
    'NO_LABEL',
    'BackboneGraph',
    'ClassifierGraph',
    'DetectorGraph',
    'Normalize',
    'SegmentorGraph',
    'map_sizes',
]

# Of the places in the lists of detections that none takes.
NO_LABEL = -1


class Normalize(nn.Module):
    """The arithmetic of a data preprocessor: normalise, then pad to a multiple.

    Args:
        preprocessor (nn.Module): ``data_preprocessor`` of a model.
        divisor (int): Height and width become multiples of it.
    """

    def __init__(self, preprocessor: nn.Module, divisor: int = 1) -> None:
        super().__init__()
        self.divisor = divisor
        # mmseg has a name of its own.
        pad_value = getattr(preprocessor, 'pad_value', None)
        self.pad_value = float(preprocessor.pad_val if pad_value is None else pad_value)
        self.enabled = preprocessor._enable_normalize
        if self.enabled:
            self.register_buffer('mean', preprocessor.mean.detach().clone())
            self.register_buffer('std', preprocessor.std.detach().clone())

    def forward(self, images: Tensor) -> Tensor:
        """Map (N, 3, H, W) to the same, up to ``divisor - 1`` pixels larger."""
        if self.enabled:
            images = (images - self.mean) / self.std
        if self.divisor > 1:
            height, width = images.shape[2:]
            more = self.divisor
            # By more than needed, then cut: a number of pixels that may be nothing
            # would split the graph in two.
            images = F.pad(images, (0, more, 0, more), value=self.pad_value)
            height = (height + more - 1) // more * more
            width = (width + more - 1) // more * more
            images = images[:, :, :height, :width]
        return images


class BackboneGraph(nn.Module):
    """Pixels to the maps of the backbone."""

    def __init__(self, model: BaseModel, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.backbone = model.backbone
        self.outputs = tuple(f'feature_{i}' for i in range(len(map_sizes(model))))
        self.axes = tuple(
            {0: 'batch', 2: f'{name}_height', 3: f'{name}_width'}
            for name in self.outputs
        )

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map (N, 3, H, W) to the backbone's maps."""
        return tuple(self.backbone(self.normalize(images)))


class ClassifierGraph(nn.Module):
    """Pixels to the probabilities of the classes."""

    outputs = ('scores',)
    axes = ({0: 'batch'},)

    def __init__(self, model: BaseModel, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor]:
        """Map (N, 3, H, W) to (N, classes)."""
        logits = self.model(self.normalize(images), mode='tensor')
        return (logits.softmax(dim=1),)


class SegmentorGraph(nn.Module):
    """Pixels to logits and classes of all pixels."""

    outputs = ('labels', 'logits')
    axes = (
        {0: 'batch', 1: 'height', 2: 'width'},
        {0: 'batch', 2: 'height', 3: 'width'},
    )

    def __init__(self, model: BaseModel, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        _free_upsampling(model)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map (N, 3, H, W) to (N, H, W) and (N, classes, H, W)."""
        height, width = images.shape[2:]
        padded = self.normalize(images)
        logits = self.model(padded, mode='tensor')
        logits = F.interpolate(
            logits,
            size=padded.shape[2:],
            mode='bilinear',
            align_corners=self.model.align_corners,
        )
        logits = logits[:, :, :height, :width]
        return logits.argmax(dim=1), logits


class DetectorGraph(nn.Module):
    """Pixels to detections, by the settings ``test_cfg`` of RetinaNet's head.

    The candidates of mmdet's post-processing: from each level, those of the highest
    scores. Every picture has a list of ``max_per_img`` detections, of which those
    that are none have score 0 and label -1.
    """

    outputs = ('boxes', 'scores', 'labels')
    axes = ({0: 'batch'},) * 3

    def __init__(self, model: BaseModel, normalize: Normalize) -> None:
        super().__init__()
        self.normalize = normalize
        self.model = model
        cfg = model.bbox_head.test_cfg
        self.nms_pre = cfg.nms_pre
        self.score_thr = cfg.get('score_thr', 0)
        self.min_size = cfg.get('min_bbox_size', -1)
        self.iou_threshold = cfg.nms.iou_threshold
        self.class_agnostic = cfg.nms.get('class_agnostic', False)
        levels = model.bbox_head.prior_generator.num_levels
        self.max_per_img = min(cfg.max_per_img, levels * self.nms_pre)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (N, 3, H, W) to (N, K, 4), (N, K) and (N, K)."""
        head = self.model.bbox_head
        features = self.model.extract_feat(self.normalize(images))
        all_logits, all_deltas = head(features)
        all_anchors = head.prior_generator.grid_priors(
            [logits.shape[-2:] for logits in all_logits], device=images.device
        )
        levels = zip(all_logits, all_deltas, all_anchors)
        boxes, scores, labels = map(
            lambda parts: torch.cat(parts, dim=1),
            zip(*(self.candidates(*level) for level in levels)),
        )
        if head.bbox_coder.clip_border:
            boxes = _clip(boxes, *images.shape[2:])
        valid = scores > self.score_thr
        if self.min_size >= 0:
            sides = boxes[..., 2:] - boxes[..., :2]
            valid = valid & (sides > self.min_size).all(dim=-1)
        scores = self.suppress(boxes, scores, labels, valid)
        scores, order = scores.topk(self.max_per_img, dim=1)
        found = scores > 0
        boxes = _take(boxes, order) * found[..., None]
        labels = labels.gather(1, order).masked_fill(~found, NO_LABEL)
        return boxes, scores, labels

    def candidates(
        self, logits: Tensor, deltas: Tensor, anchors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Decode the ``nms_pre`` pairs of box and class with the highest scores.

        Args:
            logits (Tensor): Of one level, (N, A * classes, H, W).
            deltas (Tensor): (N, A * 4, H, W).
            anchors (Tensor): (H * W * A, 4).

        Returns:
            tuple[Tensor, Tensor, Tensor]: Boxes (N, nms_pre, 4), scores and
            labels (N, nms_pre). Where the level has fewer, scores of 0 follow.
        """
        head = self.model.bbox_head
        batch, classes = logits.shape[0], head.cls_out_channels
        logits = logits.permute(0, 2, 3, 1).flatten(1)
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4)
        # Small levels have fewer, and the number to take must be a constant.
        logits = F.pad(logits, (self.nms_pre, 0), value=float('-inf'))
        top, order = logits.topk(self.nms_pre, dim=1)
        order = (order - self.nms_pre).clamp(min=0)
        labels, order = order % classes, order // classes
        boxes = head.bbox_coder.decode(
            anchors[order].flatten(0, 1), _take(deltas, order).flatten(0, 1)
        )
        return boxes.reshape(batch, self.nms_pre, 4), top.sigmoid(), labels

    def suppress(
        self, boxes: Tensor, scores: Tensor, labels: Tensor, valid: Tensor
    ) -> Tensor:
        """Set the scores to 0 of what is not valid or suppressed by a better box.

        Args:
            boxes (Tensor): (N, candidates, 4).
            scores (Tensor): (N, candidates).
            labels (Tensor): (N, candidates).
            valid (Tensor): (N, candidates), bool.

        Returns:
            Tensor: (N, candidates).
        """
        # As mmcv does, boxes are set apart by class, so that one suppression serves
        # all; here by picture too, in y alone to stay small where float32 is fine.
        step = (boxes * valid[..., None]).max() + 1
        index = torch.arange(boxes.shape[0], device=boxes.device)[:, None]
        across = torch.zeros_like(labels) if self.class_agnostic else labels
        down = across + index
        shift = torch.stack([across, down, across, down], dim=-1).to(boxes) * step
        candidates = valid.flatten().nonzero()[:, 0]
        apart = (boxes + shift).flatten(0, 1)[candidates]
        flat = scores.flatten()
        kept = torchvision.ops.nms(apart, flat[candidates], self.iou_threshold)
        kept = candidates[kept]
        return torch.zeros_like(flat).scatter(0, kept, flat[kept]).reshape(scores.shape)


def _take(values: Tensor, order: Tensor) -> Tensor:
    """Select rows of (N, rows, 4) by (N, k)."""
    return values.gather(1, order[..., None].expand(-1, -1, 4))


def _clip(boxes: Tensor, height: int, width: int) -> Tensor:
    """Cut boxes (..., 4) at the borders of the picture."""
    x = boxes[..., 0::2].clamp(min=0, max=width)
    y = boxes[..., 1::2].clamp(min=0, max=height)
    return torch.stack([x[..., 0], y[..., 0], x[..., 1], y[..., 1]], dim=-1)


class _Enlarge(nn.Module):
    """mmseg's ``Upsample`` by a whole factor, without its detour over numbers.

    ``int(side * factor)`` would fix the size in the graph.
    """

    def __init__(self, upsample: nn.Module) -> None:
        super().__init__()
        self.factor = int(upsample.scale_factor)
        self.mode, self.align_corners = upsample.mode, upsample.align_corners

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) to (N, C, factor * H, factor * W)."""
        size = [side * self.factor for side in x.shape[2:]]
        return F.interpolate(
            x, size=size, mode=self.mode, align_corners=self.align_corners
        )


def _free_upsampling(model: nn.Module) -> None:
    """Let the enlargements in a head of mmseg follow the size of their input."""
    from mmseg.models.utils import Upsample

    for module in list(model.modules()):
        for name, child in module.named_children():
            if (
                isinstance(child, Upsample)
                and not child.size
                and isinstance(child.scale_factor, float)
                and child.scale_factor.is_integer()
            ):
                setattr(module, name, _Enlarge(child))


def map_sizes(model: BaseModel) -> list[int]:
    """Return the widths of the maps that the backbone makes of 128 pixels."""
    with torch.no_grad():
        return [m.shape[-1] for m in model.backbone(torch.zeros(1, 3, 128, 128))]
