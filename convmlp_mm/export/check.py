"""What can be exported, and the graph of it."""

from __future__ import annotations

import os
from importlib import util
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..checkpoint import check_output
from .graphs import (
    BackboneGraph,
    ClassifierGraph,
    DetectorGraph,
    Normalize,
    SegmentorGraph,
)

if TYPE_CHECKING:
    from mmengine.config import Config
    from mmengine.model import BaseModel

__all__ = [
    'EXPORTABLE',
    'FORMATS',
    'OPSETS',
    'PARTS',
    'ExportError',
    'channel_order',
    'check_request',
    'make_graph',
]

EXPORTABLE = ('ImageClassifier', 'EncoderDecoder', 'RetinaNet')
# With the ending of the file.
FORMATS = {'onnx': '.onnx', 'torch': '.pt2'}
PARTS = ('model', 'backbone')
# The newest is what the exporter of torch 2.2 writes.
OPSETS = range(13, 18)


class ExportError(ValueError):
    """A model could not be exported, or what was exported computes something else."""


def check_request(
    cfg: Config,
    path: str | os.PathLike,
    part: str = 'model',
    form: str = 'onnx',
    opset: int = OPSETS[-1],
    overwrite: bool = False,
) -> None:
    """Check what can be checked before a model is built.

    Args:
        cfg (Config): Of the model.
        path (str | PathLike): The file to write.
        part (str): One of ``PARTS``. Defaults to ``'model'``.
        form (str): One of ``FORMATS``. Defaults to ``'onnx'``.
        opset (int): One of ``OPSETS``. Defaults to the newest.
        overwrite (bool): Whether the file may be there. Defaults to False.

    Raises:
        ValueError: If an argument is none of those allowed, or the model cannot be
            exported.
        ImportError: If a package is missing, or torch is too old.
        OSError: See :func:`convmlp_mm.checkpoint.check_output`.
    """
    for name, value, allowed in (
        ('part', part, PARTS),
        ('format', form, tuple(FORMATS)),
        ('opset', opset, tuple(OPSETS)),
    ):
        if value not in allowed:
            raise ValueError(f'{name} must be one of {allowed}, but got {value!r}')
    if not str(path).endswith(FORMATS[form]):
        raise ValueError(
            f'the file of format {form!r} must end with {FORMATS[form]!r}, but got '
            f'{str(path)!r}'
        )
    if form == 'torch' and not hasattr(torch.export.Dim, 'DYNAMIC'):
        raise ImportError(
            "format 'torch' needs torch 2.6 or newer: torch.export of torch "
            f"{torch.__version__} fixes batch and size; format 'onnx' does not"
        )
    needed = ('onnx', 'onnxruntime') if form == 'onnx' else ()
    missing = [name for name in needed if util.find_spec(name) is None]
    if missing:
        raise ImportError(
            f"{' and '.join(missing)} missing: pip install 'convmlp_mm[deploy]'"
        )
    # A class, in configurations that import.
    kind = getattr(cfg.model.type, '__name__', cfg.model.type).rpartition('.')[2]
    if part == 'backbone':
        if not cfg.model.get('backbone'):
            raise ValueError(f'{kind} has no part that is called backbone')
    elif kind not in EXPORTABLE:
        raise ValueError(
            f'{kind} cannot be exported as a whole; {", ".join(EXPORTABLE)} can, and '
            "of other models the part 'backbone'"
        )
    check_output(path, overwrite)


def _check_settings(model: BaseModel) -> None:
    """Refuse the settings that the graphs do not have."""
    scope = model.cfg.default_scope
    if scope == 'mmpretrain':
        from mmpretrain.models import ClsHead

        head = type(model.head).__name__
        _require('head', isinstance(model.head, ClsHead), head, 'a ClsHead')
    elif scope == 'mmseg':
        mode = model.test_cfg.get('mode', 'whole')
        _require('test_cfg.mode', mode == 'whole', mode, "'whole'")
        channels = model.out_channels
        _require('decode_head.out_channels', channels > 1, channels, 'above 1')
    else:
        head = model.bbox_head
        kind = type(head).__name__
        _require('bbox_head', kind == 'RetinaHead', kind, 'RetinaHead')
        sigmoid = head.use_sigmoid_cls
        _require('bbox_head.loss_cls.use_sigmoid', sigmoid, sigmoid, 'True')
        coder = type(head.bbox_coder).__name__
        allowed = 'DeltaXYWHBBoxCoder'
        _require('bbox_head.bbox_coder', coder == allowed, coder, allowed)
        cfg = head.test_cfg
        for key in ('nms_pre', 'max_per_img'):
            value = cfg.get(key, -1)
            _require(f'test_cfg.{key}', value > 0, value, 'above 0')
        threshold = cfg.get('score_thr', 0)
        _require('test_cfg.score_thr', threshold >= 0, threshold, 'at least 0')
        keys = {'type', 'iou_threshold', 'class_agnostic', 'split_thr'}
        fits = cfg.nms.get('type') == 'nms' and set(cfg.nms) <= keys
        _require('test_cfg.nms', fits, dict(cfg.nms), f"type='nms' with {sorted(keys)}")


def _require(name: str, fits: bool, value: object, allowed: str) -> None:
    if not fits:
        raise ValueError(f'{name} must be {allowed} to be exported, but is {value}')


def _divisor(model: BaseModel) -> int:
    """Return what the data preprocessor pads to when it tests."""
    if model.cfg.default_scope != 'mmseg':
        return model.data_preprocessor.pad_size_divisor or 1
    settings = model.data_preprocessor.test_cfg or {}
    size = settings.get('size')
    _require('data_preprocessor.test_cfg.size', not size, size, 'None')
    return settings.get('size_divisor') or 1


def channel_order(model: BaseModel) -> str:
    """Return the order of colours that the layers see.

    Args:
        model (BaseModel): A model with the data preprocessor of its toolkit.

    Returns:
        str: ``'RGB'`` or ``'BGR'``.
    """
    given = model.cfg.model.get('data_preprocessor') or {}
    to_rgb = given.get('bgr_to_rgb') or getattr(model.data_preprocessor, 'to_rgb', 0)
    return 'RGB' if to_rgb else 'BGR'


def make_graph(model: BaseModel, part: str) -> nn.Module:
    """Wrap a model into the graph of its kind.

    Args:
        model (BaseModel): A model that :func:`check_request` lets pass.
        part (str): One of ``PARTS``.

    Returns:
        nn.Module: One of :mod:`convmlp_mm.export.graphs`, in evaluation mode.

    Raises:
        ValueError: If a setting of the model is one that the graph does not have.
    """
    normalize = Normalize(model.data_preprocessor, _divisor(model))
    if part == 'backbone':
        graph = BackboneGraph
    else:
        _check_settings(model)
        graph = dict(
            mmpretrain=ClassifierGraph, mmseg=SegmentorGraph, mmdet=DetectorGraph
        )[model.cfg.default_scope]
    return graph(model, normalize).eval()
