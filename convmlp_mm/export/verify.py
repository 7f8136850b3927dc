"""What the toolkits compute of images, and how far an exported file is from it."""

from collections.abc import Sequence
from operator import attrgetter

import cv2
import numpy as np
import torch
from mmengine.config import ConfigDict
from mmengine.model import BaseModel
from mmengine.structures import BaseDataElement
from mmengine.utils import get_object_from_string
from PIL import Image, ImageOps
from torchvision.ops import box_iou

from ..toolkits import toolkit_of
from .formats import Exported, refusing
from .systems import NO_LABEL, ExportError

# The most that |exported - PyTorch| / max(1, |PyTorch|) may be, and the overlap of two
# boxes: mmcv shifts boxes by class, after which float32 tells them to 1/128 pixel.
TOLERANCE, OVERLAP = 1e-4, 1e-2
Arrays = dict[str, np.ndarray]


@torch.no_grad()
def verify(
    exported: Exported, model: BaseModel, images: Sequence[np.ndarray] | None = None
) -> None:
    """Compare a file with the toolkit's ``test_step``, whose BN is not folded.

    It is run at its shape on each image, at another size, and on two images. Then
    ``exported.differences`` has the largest difference of each output, divided by
    ``|PyTorch|`` where this is above 1. For labels of pixels it is how far the logit of
    the exported class lies below the highest one. Detectors have ``detections``, how
    far boxes (relative to their farthest edge) and scores are from mmdet's candidates,
    and ``selection``, how many are missing or must not be there.

    Args:
        exported: What :func:`export` has made.
        model: The model that was exported.
        images: Images (H, W, 3), uint8, blue first, which are cut and resized to the
            shape. Defaults to three that are drawn.

    Raises:
        ExportError: If the file does not run, or differs by more than ``TOLERANCE``.
    """
    kind, graph, shape = type(model).__name__, exported.graph, exported.shape
    images = draw_images(3, shape) if images is None else images
    other = (shape[0] * 9 // 8 | 1, shape[1] * 5 // 4 | 1)
    checks = [([image], shape) for image in images]
    checks += [([images[0]], other), ([images[0], images[-1]], shape)]
    exported.differences, exported.detections = None, 0
    differences = {}
    for chosen, size in checks:
        batch = np.stack([ImageOps.fit(Image.fromarray(x), size[::-1]) for x in chosen])
        pixels = torch.from_numpy(batch).permute(0, 3, 1, 2).float()
        if graph.properties['channel_order'] == 'RGB':
            pixels = pixels.flip(1)
        with refusing(f'the exported {kind} does not run'):
            found = dict(zip(graph.outputs, exported.run(pixels)))
        if 'boxes' in found:
            exported.detections += int((found['labels'] != NO_LABEL).sum())
            result = _compare_detections(model, batch, found)
        else:
            result = _compare_arrays(model, batch, found)
        # np.max and "not <=" refuse what is not a number, too.
        worst = np.max(list(result.values()))
        if not worst <= TOLERANCE:
            each = ', '.join(f'{name} {value:.1e}' for name, value in result.items())
            raise ExportError(
                f'the exported {kind} differs from PyTorch by {worst:.1e} (more than '
                f'{TOLERANCE:.0e}) on pixels of shape {batch.shape[:3]}: {each}'
            )
        differences = {n: max(v, differences.get(n, 0)) for n, v in result.items()}
    exported.differences = differences


def draw_images(number: int, shape: tuple[int, int], seed: int = 0) -> list[np.ndarray]:
    """Draw images of coloured spots (H, W, 3), uint8, the same for the same seed."""
    rng = np.random.default_rng(seed)
    spots = rng.integers(0, 256, (number, 24, 24, 3), np.uint8)
    return [cv2.resize(n, shape[::-1], interpolation=cv2.INTER_CUBIC) for n in spots]


def _to_data(model: BaseModel, batch: np.ndarray) -> dict:
    """Return what a test pipeline of the toolkit hands to ``test_step``."""
    sample = get_object_from_string(toolkit_of(model.cfg.default_scope).sample)
    size = batch.shape[1:3]
    meta = dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0))
    samples = [sample(metainfo=dict(meta)) for _ in batch]
    pixels = torch.from_numpy(batch).permute(0, 3, 1, 2)
    return dict(inputs=list(pixels), data_samples=samples)


def _read_result(model: BaseModel, sample: BaseDataElement) -> Arrays:
    results = toolkit_of(model.cfg.default_scope).results
    return {name: attrgetter(path)(sample).numpy() for name, path in results.items()}


@torch.no_grad()
def toolkit_results(model: BaseModel, batch: np.ndarray) -> list[Arrays]:
    """Return what the toolkit computes of each image, by names of outputs."""
    return [_read_result(model, s) for s in model.test_step(_to_data(model, batch))]


def _compare_arrays(model: BaseModel, batch: np.ndarray, found: Arrays) -> dict:
    """Return the largest difference of each output."""
    if 'feature_0' in found:
        data = model.data_preprocessor(_to_data(model, batch), False)
        maps = model.backbone(data['inputs'])
        expected = dict(zip(found, (m.numpy() for m in maps)))
    else:
        results = toolkit_results(model, batch)
        expected = {k: np.stack([one[k] for one in results]) for k in results[0]}
    if 'labels' in found:
        expected['labels'] = expected['logits'].max(axis=1)
    differences = {}
    for name, values in expected.items():
        mine = found[name]
        if mine.shape != values.shape:
            raise ExportError(
                f'output {name!r} has shape {mine.shape}, but {values.shape} in PyTorch'
            )
        if name == 'labels':
            # If the logits of two classes differ by rounding, either class is right.
            mine = np.take_along_axis(expected['logits'], mine[:, None], 1)[:, 0]
        relative = np.abs(mine - values) / np.maximum(1, np.abs(values))
        differences[name] = float(relative.max())
    return differences


def _compare_detections(model: BaseModel, batch: np.ndarray, found: Arrays) -> dict:
    """Compare detections with mmdet's candidates, and their choice with mmdet's.

    Lists cannot be compared one by one: in an even area of an image, scores of
    neighbours are equal but for rounding, which then decides who suppresses whom.
    """
    distances, wrong, cfg = [], 0, model.bbox_head.test_cfg
    for n, final in enumerate(toolkit_results(model, batch)):
        valid = found['labels'][n] != NO_LABEL
        mine = {name: values[n][valid] for name, values in found.items()}
        candidates = _candidates(model, batch[n : n + 1])
        distances.extend(_differences(mine, candidates).min(axis=1, initial=np.inf))
        wrong += count_wrong(cfg, mine, final)
    return dict(detections=float(np.max(distances, initial=0)), selection=float(wrong))


def _candidates(model: BaseModel, batch: np.ndarray) -> Arrays:
    """Return boxes of mmdet before the suppression, and some more.

    Rounding decides which of those at the limits of score and number are taken.
    """
    head, given = model.bbox_head, model.bbox_head.test_cfg
    cfg = ConfigDict(given, nms_pre=2 * given.nms_pre)
    cfg.score_thr = given.get('score_thr', 0) - TOLERANCE
    data = model.data_preprocessor(_to_data(model, batch), False)
    (sample,) = data['data_samples']
    maps = head(model.extract_feat(data['inputs']))
    (sample.pred_instances,) = head.predict_by_feat(
        *maps, batch_img_metas=[sample.metainfo], cfg=cfg, with_nms=False
    )
    return _read_result(model, sample)


def _differences(first: Arrays, second: Arrays) -> np.ndarray:
    """Return how far detections are from others, (N, M); infinite between classes."""
    # Each edge is the sum of a centre and half a side, which rounds as the farthest.
    boxes = np.abs(first['boxes'][:, None] - second['boxes']).max(axis=-1)
    boxes = boxes / np.maximum(1, np.abs(second['boxes']).max(axis=-1))
    scores = np.abs(first['scores'][:, None] - second['scores'])
    same = first['labels'][:, None] == second['labels']
    return np.where(same, np.maximum(boxes, scores), np.inf)


def count_wrong(cfg: ConfigDict, found: Arrays, expected: Arrays) -> int:
    """Count where rounding does not explain how two lists of detections differ.

    In ``found`` no boxes overlap too much; and what one list has, the other has too, or
    a better box that suppresses it, or it is full before.
    """

    def overlapping(first: Arrays, second: Arrays, slack: float) -> np.ndarray:
        overlap = box_iou(*(torch.from_numpy(d['boxes']) for d in (first, second)))
        same = first['labels'][:, None] == second['labels']
        same |= cfg.nms.get('class_agnostic', False)
        return same & (overlap.numpy() > cfg.nms.iou_threshold + slack)

    wrong = np.triu(overlapping(found, found, OVERLAP), 1).sum()
    for one, other in ((found, expected), (expected, found)):
        full = len(other['scores']) >= cfg.max_per_img
        end = other['scores'].min() if full else cfg.get('score_thr', 0)
        better = one['scores'][:, None] <= other['scores'] + TOLERANCE
        there = _differences(one, other) <= TOLERANCE
        explained = there | (overlapping(one, other, -OVERLAP) & better)
        wrong += (~explained.any(axis=1) & (one['scores'] > end + TOLERANCE)).sum()
    return int(wrong)
