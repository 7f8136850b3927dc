"""Detections of an exported graph against the candidates and rules of mmdet."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torchvision.ops import box_iou

from .compare import TOLERANCE, detections_of, larger, to_data, toolkit_results
from .graphs import NO_LABEL, DetectorGraph

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = ['compare_detections']

# Of the overlap of two boxes. mmcv shifts boxes by class before it compares them, which
# leaves them whole 1/128 pixels.
OVERLAP = 1e-2


def compare_detections(
    graph: DetectorGraph,
    model: BaseModel,
    batch: Sequence[np.ndarray],
    found: Mapping[str, np.ndarray],
) -> tuple[dict[str, float], int, int]:
    """Compare detections with the candidates of mmdet, and their choice with its rules.

    Lists cannot be compared one by one: in an even area of a picture, scores of
    neighbours are equal but for rounding, which then decides who suppresses whom.

    Args:
        graph (DetectorGraph): With the settings.
        model (BaseModel): The detector.
        batch (Sequence[ndarray]): Pictures.
        found (Mapping[str, ndarray]): What the exported graph gives for them.

    Returns:
        tuple[dict[str, float], int, int]: The largest difference of each output, see
        :class:`ExportReport`; the number of detections; and how many of them mmdet
        has not, since rounding decided otherwise.
    """
    worst = dict.fromkeys(graph.outputs, 0.0)
    number = rounded = 0
    for n, final in enumerate(toolkit_results(model, batch, 'model')):
        candidates, more = _candidates(model, batch[n])
        mine = {name: values[n] for name, values in found.items()}
        valid = mine['labels'] != NO_LABEL
        mine = {name: values[valid] for name, values in mine.items()}
        full = valid.all()
        result = _distance(mine, more)
        result['labels'] = _count_wrong(graph, mine, candidates, full)
        worst = larger(worst, result)
        number += len(mine['scores'])
        rounded += int(
            (_costs(mine, final).min(axis=1, initial=np.inf) > TOLERANCE).sum()
        )
    return worst, number, rounded


def _candidates(
    model: BaseModel, picture: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return mmdet's boxes before the suppression, and more than it takes."""
    head = model.bbox_head
    with torch.no_grad():
        data = model.data_preprocessor(to_data(model, [picture]), False)
        maps = head(model.extract_feat(data['inputs']))
        metas = [sample.metainfo for sample in data['data_samples']]
        both = []
        for factor, less in ((1, 0), (2, TOLERANCE)):
            cfg = copy.deepcopy(head.test_cfg)
            cfg.nms_pre = factor * cfg.nms_pre
            cfg.score_thr = cfg.get('score_thr', 0) - less
            (one,) = head.predict_by_feat(
                *maps, batch_img_metas=metas, cfg=cfg, with_nms=False
            )
            both.append(detections_of(one))
    return tuple(both)


def _box_costs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Return the differences of (N, 4) and (M, 4) boxes, (N, M).

    Relative to the farthest edge of a box: each edge is the centre and half a side.
    """
    difference = np.abs(first[:, None] - second[None]).max(axis=-1, initial=0)
    return difference / np.maximum(1, np.abs(second).max(axis=-1, initial=0))


def _costs(
    first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]
) -> np.ndarray:
    """Return the differences of detections, (N, M); without end between classes."""
    costs = np.maximum(
        _box_costs(first['boxes'], second['boxes']),
        np.abs(first['scores'][:, None] - second['scores'][None]),
    )
    costs[first['labels'][:, None] != second['labels'][None]] = np.inf
    return costs


def _distance(
    found: Mapping[str, np.ndarray], candidates: Mapping[str, np.ndarray]
) -> dict[str, float]:
    """Return how far boxes and scores are from those of the nearest candidates."""
    if not len(found['scores']):
        return dict(boxes=0.0, scores=0.0)
    if not len(candidates['scores']):
        return dict(boxes=np.inf, scores=np.inf)
    nearest = _costs(found, candidates).argmin(axis=1)
    boxes = _box_costs(found['boxes'], candidates['boxes'])
    scores = np.abs(found['scores'] - candidates['scores'][nearest])
    wrong = found['labels'] != candidates['labels'][nearest]
    return dict(
        boxes=np.inf if wrong.any() else boxes[np.arange(len(boxes)), nearest].max(),
        scores=scores.max(),
    )


def _count_wrong(
    graph: DetectorGraph,
    found: Mapping[str, np.ndarray],
    candidates: Mapping[str, np.ndarray],
    full: bool,
) -> int:
    """Count where a list is not what suppression leaves of the candidates.

    That is the one list in which no box overlaps a better one, and to which every box
    that is missing has a better one that it overlaps: "better" and "overlaps" as far as
    rounding lets tell. Candidates after the end of a full list do not count.
    """
    scores, boxes = found['scores'], torch.from_numpy(found['boxes'])
    same = found['labels'][:, None] == found['labels'][None]
    overlap = box_iou(boxes, boxes).numpy()
    twice = (overlap > graph.iou_threshold + OVERLAP) & (same | graph.class_agnostic)
    np.fill_diagonal(twice, False)
    end = scores.min() if full else graph.score_thr
    wanted = candidates['scores'] > end + TOLERANCE
    candidates = {name: values[wanted] for name, values in candidates.items()}
    same = found['labels'][:, None] == candidates['labels'][None]
    overlap = box_iou(boxes, torch.from_numpy(candidates['boxes'])).numpy()
    better = scores[:, None] >= candidates['scores'][None] - TOLERANCE
    suppressed = (
        (overlap >= graph.iou_threshold - OVERLAP)
        & (same | graph.class_agnostic)
        & better
    )
    there = _costs(found, candidates) <= TOLERANCE
    missing = ~(suppressed | there).any(axis=0)
    return int(twice.sum()) // 2 + int(missing.sum())
