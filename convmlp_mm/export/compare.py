"""What the toolkits say of pictures, and how far a graph is from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .check import ExportError

if TYPE_CHECKING:
    from mmengine.model import BaseModel
    from mmengine.structures import InstanceData

__all__ = [
    'TOLERANCE',
    'compare',
    'detections_of',
    'larger',
    'to_data',
    'to_input',
    'toolkit_results',
]

# Of |exported - PyTorch| / max(1, |PyTorch|), number by number.
TOLERANCE = 1e-4


def to_input(batch: Sequence[np.ndarray], order: str) -> Tensor:
    """Stack pictures as the graph takes them.

    Args:
        batch (Sequence[ndarray]): Pictures of one size, (H, W, 3), uint8, blue first.
        order (str): ``'RGB'`` or ``'BGR'``.

    Returns:
        Tensor: Of shape (N, 3, H, W), float32.
    """
    stacked = np.stack(batch).transpose(0, 3, 1, 2)
    if order == 'RGB':
        stacked = stacked[:, ::-1]
    return torch.from_numpy(np.ascontiguousarray(stacked, dtype=np.float32))


def to_data(model: BaseModel, batch: Sequence[np.ndarray]) -> dict:
    """Put pictures into what a test pipeline of the toolkit hands on.

    Args:
        model (BaseModel): Of that toolkit.
        batch (Sequence[ndarray]): See :func:`to_input`.

    Returns:
        dict: ``inputs`` and ``data_samples``.
    """
    scope = model.cfg.default_scope
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample as Sample
    elif scope == 'mmdet':
        from mmdet.structures import DetDataSample as Sample
    else:
        from mmseg.structures import SegDataSample as Sample
    planes = [
        torch.from_numpy(np.ascontiguousarray(picture.transpose(2, 0, 1)))
        for picture in batch
    ]
    size = tuple(batch[0].shape[:2])
    meta = dict(ori_shape=size, img_shape=size, scale_factor=(1.0, 1.0))
    samples = [Sample(metainfo=dict(meta)) for _ in batch]
    return dict(inputs=planes, data_samples=samples)


def toolkit_results(
    model: BaseModel, batch: Sequence[np.ndarray], part: str
) -> list[dict[str, np.ndarray]]:
    """Return what the toolkit says of each picture.

    Args:
        model (BaseModel): A classifier, segmentor or detector.
        batch (Sequence[ndarray]): See :func:`to_input`.
        part (str): ``'model'`` or ``'backbone'``.

    Returns:
        list[dict[str, ndarray]]: For each picture, by names of outputs.
    """
    scope = model.cfg.default_scope
    data = to_data(model, batch)
    with torch.no_grad():
        if part == 'backbone':
            maps = model.backbone(model.data_preprocessor(data, False)['inputs'])
            return [
                {f'feature_{i}': m[n].numpy() for i, m in enumerate(maps)}
                for n in range(len(batch))
            ]
        samples = model.test_step(data)
    if scope == 'mmpretrain':
        return [dict(scores=sample.pred_score.numpy()) for sample in samples]
    if scope == 'mmseg':
        return [
            dict(
                labels=sample.pred_sem_seg.data[0].numpy(),
                logits=sample.seg_logits.data.numpy(),
            )
            for sample in samples
        ]
    return [detections_of(sample.pred_instances) for sample in samples]


def detections_of(instances: InstanceData) -> dict[str, np.ndarray]:
    """Return instances as the arrays that the exported graph gives.

    Args:
        instances (InstanceData): Of one picture.

    Returns:
        dict[str, ndarray]: ``boxes`` (N, 4), ``scores`` and ``labels`` (N,).
    """
    return dict(
        boxes=instances.bboxes.numpy(),
        scores=instances.scores.numpy(),
        labels=instances.labels.numpy(),
    )


def _difference(found: np.ndarray, expected: np.ndarray) -> np.ndarray:
    return np.abs(found - expected) / np.maximum(1, np.abs(expected))


def compare(
    graph: nn.Module,
    expected: Sequence[Mapping[str, np.ndarray]],
    found: Mapping[str, np.ndarray],
) -> dict[str, float]:
    """Return the largest difference of each output.

    Args:
        graph (nn.Module): With the names of its ``outputs``.
        expected (Sequence[Mapping[str, ndarray]]): Of :func:`toolkit_results`.
        found (Mapping[str, ndarray]): What the exported graph gives.

    Returns:
        dict[str, float]: As in :class:`convmlp_mm.export.ExportReport`.

    Raises:
        ExportError: If an output has another shape.
    """
    worst = dict.fromkeys(graph.outputs, 0.0)
    for n, one in enumerate(expected):
        mine = {name: values[n] for name, values in found.items()}
        result = {}
        for name, values in one.items():
            if values.shape != mine[name].shape:
                raise ExportError(
                    f'output {name!r} has shape {mine[name].shape}, but '
                    f'{values.shape} in PyTorch'
                )
            if name == 'labels':
                # Of two classes that are as good as equal, either is right.
                chosen = np.take_along_axis(one['logits'], mine[name][None], 0)
                values, mine[name] = one['logits'].max(axis=0), chosen[0]
            result[name] = _difference(mine[name], values).max()
        worst = larger(worst, result)
    return worst


def larger(first: Mapping[str, float], second: Mapping[str, float]) -> dict[str, float]:
    """Return the larger value for each key.

    Args:
        first (Mapping[str, float]): Differences by outputs.
        second (Mapping[str, float]): Others.

    Returns:
        dict[str, float]: Not a number where either is none.
    """
    return {name: float(np.maximum(first[name], second[name])) for name in first}
