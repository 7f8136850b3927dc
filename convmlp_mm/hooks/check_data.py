"""Check the data that a run reads: once before it, and each file when it is read."""

from __future__ import annotations

import os.path as osp
from collections.abc import Callable, Iterator

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import BaseLoop, Runner
from PIL import Image, UnidentifiedImageError
from torch import nn

from ..convmlp import ConvMLP
from .model import _unwrap

__all__ = ['CheckDataHook']

# Where the models of the three toolkits have what predicts the classes.
HEADS = ('head', 'bbox_head', 'mask_head', 'decode_head', 'auxiliary_head')
HEADS += ('roi_head.bbox_head', 'roi_head.mask_head')
# Of models whose heads compare with texts, and have no classes of their own.
OF_TEXT = ('language_model', 'text_encoder')
# How whole files of these formats begin and end.
ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check that data and model belong together, and that files are whole.

    Before the run, the heads must have as many classes as the data sets, which must
    not be empty. During the run an image, label map or label that cannot be used
    stops it with the name of the file: OpenCV pads what a cut JPEG lacks in grey, and
    a label beyond the classes ends in an assertion of the GPU, long afterwards.
    """

    def before_run(self, runner: Runner) -> None:
        """Check the data sets of the loops, and watch what they load.

        Args:
            runner (Runner): The runner.

        Raises:
            ValueError: If a data set is empty, the number of classes of a head is
                not that of a data set, or the neck takes other channels than the
                backbone gives.
        """
        model = _unwrap(runner.model)
        _check_neck(model)
        for split in ('train', 'val', 'test'):
            loop = getattr(runner, f'_{split}_loop')
            if not isinstance(loop, BaseLoop):
                continue
            for dataset in _leaves(loop.dataloader.dataset):
                classes = _classes(dataset, split)
                _check_heads(model, classes, dataset, split)
                _watch(dataset, classes)


def _leaves(dataset: object) -> Iterator[object]:
    """Find the data sets in wrappers such as RepeatDataset and ConcatDataset."""
    inner = [getattr(dataset, key, None) for key in ('dataset', '_dataset')]
    inner = [part for part in inner if part is not None]
    inner = inner or list(getattr(dataset, 'datasets', []))
    if not inner:
        yield dataset
    for part in inner:
        yield from _leaves(part)


def _classes(dataset: object, split: str) -> list[str]:
    """Return the names of the classes, an empty list if there are none."""
    key = f'{split}_dataloader.dataset'
    classes = (getattr(dataset, 'metainfo', None) or {}).get('classes')
    if isinstance(classes, str):
        raise ValueError(
            f'{key}.metainfo.classes must be a tuple of names, but is {classes!r}'
        )
    # An endless sampler would look for the first image for ever.
    if hasattr(dataset, '__len__') and not len(dataset):
        raise ValueError(f'{key} ({type(dataset).__name__}) has no images')
    return list(classes or [])


def _check_neck(model: nn.Module) -> None:
    backbone = getattr(model, 'backbone', None)
    taken = getattr(getattr(model, 'neck', None), 'in_channels', None)
    if not isinstance(backbone, ConvMLP) or not isinstance(taken, (list, tuple)):
        return
    if tuple(taken) == tuple(backbone.out_channels):
        return
    # Some take the maps in another order: only a trial tells.
    training, image = model.training, torch.zeros(1, backbone.in_channels, 128, 128)
    model.eval()
    try:
        with torch.no_grad():
            model.neck(backbone(image.to(next(backbone.parameters()).device)))
    except (RuntimeError, AssertionError, IndexError) as error:
        raise ValueError(
            f'model.neck.in_channels is {list(taken)}, but the backbone gives '
            f'{list(backbone.out_channels)} channels'
        ) from error
    finally:
        model.train(training)


def _check_heads(
    model: nn.Module, classes: list[str], dataset: object, split: str
) -> None:
    if not classes or any(getattr(model, name, None) for name in OF_TEXT):
        return
    allowed = {len(classes)}
    # Of panoptic data, some heads see the things only.
    things = (getattr(dataset, 'metainfo', None) or {}).get('thing_classes')
    if things:
        allowed.add(len(things))
    for path in HEADS:
        head = model
        for name in path.split('.'):
            head = getattr(head, name, None)
        for part in head if isinstance(head, nn.ModuleList) else [head]:
            # Its two classes are edges and the rest.
            if type(part).__name__ == 'STDCHead':
                continue
            number = getattr(part, 'num_classes', None)
            if isinstance(number, int) and number not in allowed:
                raise ValueError(
                    f'model.{path}.num_classes is {number}, but '
                    f'{split}_dataloader.dataset ({type(dataset).__name__}) has '
                    f'{len(classes)} classes: {_shorten(classes)}'
                )


def _shorten(names: list[str]) -> str:
    return ', '.join(names[:5]) + (', ...' if names[5:] else '')


def _watch(dataset: object, classes: list[str]) -> None:
    """Put :class:`_Watched` around the transforms."""
    transforms = getattr(getattr(dataset, 'pipeline', None), 'transforms', None)
    ignored = getattr(dataset, 'ignore_index', 255)
    for i, transform in enumerate(transforms or []):
        if not isinstance(transform, _Watched):
            transforms[i] = _Watched(transform, len(classes), ignored)


class _Watched:
    """A transform whose errors name the image, and whose results are checked."""

    def __init__(self, transform: Callable, num_classes: int, ignored: int) -> None:
        self.transform, self.num_classes, self.ignored = transform, num_classes, ignored
        kinds = {kind.__name__ for kind in type(transform).__mro__}
        self.loads_image = 'LoadImageFromFile' in kinds
        self.loads_labels = 'LoadAnnotations' in kinds

    def __call__(self, results: dict) -> dict | None:
        # Transforms change it.
        source = _source(results)
        try:
            loaded = self.transform(results)
        except Exception as error:
            reason = _explain(error, results, self.loads_image, self.loads_labels)
            what = 'loaded' if self.loads_image or self.loads_labels else 'used'
            name = type(self.transform).__name__
            raise ValueError(f'{source} cannot be {what} ({name}): {reason}') from error
        if loaded is not None and self.loads_image:
            _check_image(loaded, self.num_classes)
        if loaded is not None and self.loads_labels:
            _check_label_map(loaded, self.num_classes, self.ignored)
        return loaded

    def __repr__(self) -> str:
        return repr(self.transform)

    def __getattr__(self, name: str) -> object:
        # Of a copy that is being made, nothing is there yet.
        if name == 'transform' or name.startswith('__'):
            raise AttributeError(name)
        return getattr(self.transform, name)


def _source(results: dict) -> str:
    source = f'image {results.get("img_path")!r}'
    if results.get('ori_shape') is not None:
        height, width = results['ori_shape'][:2]
        source += f' ({width}x{height} pixels)'
    if results.get('seg_map_path'):
        source += f' with label map {results["seg_map_path"]!r}'
    return source


def _explain(
    error: Exception, results: dict, loads_image: bool, loads_labels: bool
) -> str:
    """Say in one line what OpenCV and Pillow do not: what was wrong with the file."""
    path = results.get('img_path' if loads_image else 'seg_map_path')
    if (loads_image or loads_labels) and isinstance(path, str) and osp.isfile(path):
        if not osp.getsize(path):
            return 'the file is empty'
        if isinstance(error, (AssertionError, UnidentifiedImageError)):
            return 'it is damaged or no image'
    # Of cv2.error: without the line of OpenCV's source.
    reason = getattr(error, 'err', None) or str(error) or type(error).__name__
    return ' '.join(str(reason).split())


def _check_image(results: dict, num_classes: int) -> None:
    """Check that an image is whole, and that its labels and its size hold."""
    path = results.get('img_path')
    if isinstance(path, str) and osp.isfile(path):
        _check_whole(path)
    said = results.get('height'), results.get('width')
    if None not in said and said != tuple(results['ori_shape']):
        height, width = results['ori_shape']
        raise ValueError(
            f'image {path!r} has {width}x{height} pixels, but {said[1]}x{said[0]} '
            'by its annotations'
        )
    labels = np.atleast_1d(results.get('gt_label', []))
    if (
        num_classes
        and labels.size
        and not 0 <= labels.min() <= labels.max() < num_classes
    ):
        raise ValueError(
            f'image {path!r} has the label {labels.tolist()}, but there are '
            f'{num_classes} classes, numbered from 0'
        )


def _check_whole(path: str) -> None:
    """Let Pillow, which is exact, judge the few files with an unusual end."""
    with open(path, 'rb') as file:
        end = ENDS.get(file.read(2))
        if end is None:
            return
        file.seek(0, 2)
        file.seek(max(0, file.tell() - len(end)))
        if file.read() == end:
            return
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        raise ValueError(f'image {path!r} is damaged: {error}') from error


def _check_label_map(results: dict, num_classes: int, ignored: int) -> None:
    """Check the size of a label map and the numbers in it."""
    labels = results.get('gt_seg_map')
    if labels is None:
        return
    path, shape = results.get('seg_map_path'), tuple(results['ori_shape'])
    if 1 in shape and labels.size == np.prod(shape):
        # mmseg squeezes those that are one pixel high or wide.
        labels = results['gt_seg_map'] = labels.reshape(shape)
    if labels.shape != shape:
        raise ValueError(
            f'label map {path!r} has the shape {labels.shape}, but its image '
            f'{results.get("img_path")!r} has {shape}'
        )
    # Those of mmdet have stuff in them that no head counts.
    if not num_classes or 'reduce_zero_label' not in results:
        return
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    beyond = present[(present >= num_classes) & (present != ignored) & (present != 255)]
    if beyond.size:
        raise ValueError(
            f'label map {path!r} has the labels {beyond.tolist()}, but there are '
            f'{num_classes} classes, numbered from 0 after reduce_zero_label '
            f'({results.get("reduce_zero_label", False)}); {ignored} is ignored'
        )
