"""Drawn pictures with labels, as the loader of each toolkit hands them to a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from mmengine.model import BaseModel

__all__ = ['draw_batch']

# As many objects in each picture, about the mean of COCO.
OBJECTS = 7


def draw_batch(
    model: BaseModel, batch_size: int, shape: tuple[int, int], seed: int = 0
) -> dict:
    """Draw a batch for ``model.data_preprocessor``.

    Args:
        model (BaseModel): Of mmpretrain, mmdet or mmseg, from
            :func:`convmlp_mm.apis.build_model`.
        batch_size (int): Number of pictures.
        shape (tuple[int, int]): Height and width in pixels.
        seed (int): Of the values. Defaults to 0.

    Returns:
        dict: ``inputs``, uint8 of shape (3, height, width) each, and
        ``data_samples`` with labels, boxes (and masks, if the model has a head for
        them) or maps of classes.
    """
    scope = model.cfg.default_scope
    if scope == 'mmdet':
        return _detection(model, batch_size, shape)
    generator = torch.Generator().manual_seed(seed)

    def integers(high: int, *size: int) -> torch.Tensor:
        return torch.randint(high, size, generator=generator)

    images = integers(256, batch_size, 3, *shape).to(torch.uint8)
    if scope == 'mmpretrain':
        from mmpretrain.structures import DataSample

        labels = integers(_num_classes(model), batch_size)
        # Stacked, as default_collate does.
        return dict(
            inputs=images,
            data_samples=[DataSample().set_gt_label(int(n)) for n in labels],
        )
    from mmengine.structures import PixelData
    from mmseg.structures import SegDataSample

    meta = dict(ori_shape=shape, img_shape=shape, scale_factor=(1.0, 1.0), flip=False)
    samples = [SegDataSample(metainfo=meta) for _ in images]
    for sample in samples:
        labels = integers(model.decode_head.num_classes, 1, *shape)
        sample.gt_sem_seg = PixelData(data=labels)
    return dict(inputs=list(images), data_samples=samples)


def _detection(model: BaseModel, batch_size: int, shape: tuple[int, int]) -> dict:
    from mmdet.testing import demo_mm_inputs

    return demo_mm_inputs(
        batch_size,
        (3, *shape),
        num_items=[OBJECTS] * batch_size,
        # It draws from 1 on.
        num_classes=max(2, _num_classes(model)),
        with_mask=getattr(model, 'with_mask', False),
    )


def _num_classes(model: BaseModel) -> int:
    """Find how many classes there are labels of."""
    heads = [getattr(model, 'roi_head', None), model]
    for part in heads:
        for name in ('bbox_head', 'head'):
            head = getattr(part, name, None)
            # Of a cascade, the first.
            head = head[0] if isinstance(head, torch.nn.ModuleList) else head
            if getattr(head, 'num_classes', None):
                return head.num_classes
    preprocessor = model.cfg.get('data_preprocessor') or {}
    return preprocessor.get('num_classes') or 2
