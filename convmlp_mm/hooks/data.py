"""Check the data of a run: once before it, and each file when it is read."""

import os.path as osp
import re
from collections.abc import Iterator

import numpy as np
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from PIL import Image, UnidentifiedImageError
from torch import nn

from ..checkpoint import some_of
from ..convmlp import ConvMLP
from .model import unwrap_model

# Places where the models of the three toolkits have what predicts the classes.
HEADS = re.compile(
    r'(head|(decode|auxiliary|bbox|mask|roi_head\.bbox|roi_head\.mask)_head)(\.\d+)?'
)
# Models with one of these compare with texts and have no classes of their own.
TEXT_PARTS = ('language_model', 'text_encoder')
# The bytes that whole files of these formats begin and end with.
ENDS = {b'\xff\xd8': b'\xff\xd9', b'\x89P': b'IEND\xaeB`\x82'}


def walk_datasets(dataset: object, key: str = 'dataset') -> Iterator[tuple]:
    """Find the data sets in wrappers such as RepeatDataset and ConcatDataset.

    Args:
        dataset: A data set, or its section of a configuration.
        key: Its name in the configuration.

    Yields:
        Name and data set, or section, of each that wraps no other.
    """
    get = type(dataset).get if isinstance(dataset, dict) else getattr
    several = get(dataset, 'datasets', None) or []
    inner = {f'datasets.{i}': part for i, part in enumerate(several)}
    if get(dataset, 'dataset', None) is not None:
        inner['dataset'] = get(dataset, 'dataset', None)
    if not inner:
        yield key, dataset
    for name, part in inner.items():
        yield from walk_datasets(part, f'{key}.{name}')


@HOOKS.register_module()
class CheckDataHook(Hook):
    """Check that data and model belong together, and that files are whole.

    Before the first step, the heads must have as many classes as the data sets, which
    must not be empty. During the run an image, label map or label that cannot be used
    stops it, by a ValueError with the name of the file: OpenCV pads what a cut JPEG
    lacks in grey, and a label beyond the classes ends in an assertion of the GPU, long
    afterwards.
    """

    def before_train(self, runner: Runner) -> None:
        """Check what trains, and what will validate, before an epoch is spent."""
        _check(runner, 'train')
        if runner.val_loop is not None:
            self.before_val(runner)

    def before_val(self, runner: Runner) -> None:
        _check(runner, 'val')

    def before_test(self, runner: Runner) -> None:
        _check(runner, 'test')


def _check(runner: Runner, split: str) -> None:
    name, model = f'{split}_dataloader', unwrap_model(runner.model)
    check_neck(model)
    for key, leaf in walk_datasets(getattr(runner, name).dataset, f'{name}.dataset'):
        # An endless sampler would look for the first image for ever.
        if hasattr(leaf, '__len__') and not len(leaf):
            raise ValueError(f'{key} ({type(leaf).__name__}) has no images')
        classes = (getattr(leaf, 'metainfo', None) or {}).get('classes') or []
        # mmdet drops the objects of a class that it does not find by its name.
        found = getattr(leaf, 'cat_ids', classes)
        if len(found) < len(classes):
            raise ValueError(
                f'{key} has {len(classes)} names in metainfo.classes, but its '
                f'annotation file has only {len(found)} categories with such a name'
            )
        check_heads(model, classes, leaf, key)
        pipeline = getattr(leaf, 'pipeline', None)
        # A model may be validated more than once.
        if isinstance(pipeline, Compose) and not isinstance(pipeline, WatchedPipeline):
            ignored = getattr(leaf, 'ignore_index', 255)
            leaf.pipeline = WatchedPipeline(pipeline.transforms, len(classes), ignored)


def check_neck(model: nn.Module) -> None:
    """Raise a ValueError if the neck takes other channels than a ConvMLP gives."""
    backbone = getattr(model, 'backbone', None)
    taken = getattr(getattr(model, 'neck', None), 'in_channels', None)
    if not isinstance(backbone, ConvMLP) or not isinstance(taken, (list, tuple)):
        return
    # Some necks take the maps in another order.
    if sorted(taken) != sorted(backbone.out_channels):
        raise ValueError(
            f'model.neck.in_channels is {list(taken)}, but the backbone gives '
            f'{list(backbone.out_channels)} channels'
        )


def check_heads(model: nn.Module, classes: list, dataset: object, key: str) -> None:
    """Raise a ValueError if a head has other classes than a data set, called ``key``.

    Heads may have the number of ``thing_classes`` of panoptic data.
    """
    if not classes or any(getattr(model, name, None) for name in TEXT_PARTS):
        return
    things = (getattr(dataset, 'metainfo', None) or {}).get('thing_classes')
    allowed = {len(classes), len(things or classes)}
    for path, head in model.named_modules():
        # The two classes of STDCHead are edges and the rest.
        if not HEADS.fullmatch(path) or type(head).__name__ == 'STDCHead':
            continue
        number = getattr(head, 'num_classes', None)
        if isinstance(number, int) and number not in allowed:
            raise ValueError(
                f'model.{path}.num_classes is {number}, but {key} '
                f'({type(dataset).__name__}) has {len(classes)} classes: '
                f'{some_of(classes)}'
            )


class WatchedPipeline(Compose):
    """A pipeline whose errors name the image, and whose results are checked."""

    def __init__(self, transforms: list, num_classes: int, ignored: int) -> None:
        super().__init__(transforms)
        self.num_classes, self.ignored = num_classes, ignored

    def __call__(self, results: dict) -> dict | None:
        """Run the transforms, until one returns None."""
        for transform in self.transforms:
            kinds = {kind.__name__ for kind in type(transform).__mro__}
            loads_image = 'LoadImageFromFile' in kinds
            loads_labels = 'LoadAnnotations' in kinds
            # Transforms change the results.
            source = _describe(results)
            path = results.get('img_path' if loads_image else 'seg_map_path')
            try:
                results = transform(results)
            except Exception as error:
                loads = loads_image or loads_labels
                what = 'loaded' if loads else 'used'
                raise ValueError(
                    f'{source} cannot be {what} ({type(transform).__name__}): '
                    f'{_explain(error, path if loads else None)}'
                ) from error
            if results is None:
                return None
            if loads_image:
                _check_image(results, self.num_classes)
            if loads_labels and 'gt_seg_map' in results:
                _check_label_map(results, self.num_classes, self.ignored)
        return results


def _describe(results: dict) -> str:
    source = f'image {results.get("img_path")!r}'
    if results.get('ori_shape') is not None:
        height, width = results['ori_shape'][:2]
        source += f' ({width}x{height} pixels)'
    if results.get('seg_map_path'):
        source += f' with label map {results["seg_map_path"]!r}'
    return source


def _explain(error: Exception, path: str | None) -> str:
    """Say in one line what OpenCV and Pillow do not: what was wrong with the file."""
    if isinstance(path, str) and osp.isfile(path):
        if not osp.getsize(path):
            return 'the file is empty'
        if isinstance(error, (AssertionError, UnidentifiedImageError)):
            return 'it is damaged or no image'
    # The err of a cv2.error leaves out the line of OpenCV's source.
    return ' '.join(str(getattr(error, 'err', error)).split()) or repr(error)


def _check_image(results: dict, num_classes: int) -> None:
    """Check that an image is whole, and that its labels and its size hold."""
    path = results.get('img_path')
    if isinstance(path, str) and osp.isfile(path):
        _check_whole(path)
    height, width = results['ori_shape']
    said = results.get('height', height), results.get('width', width)
    if said != (height, width):
        raise ValueError(
            f'image {path!r} has {width}x{height} pixels, but {said[1]}x{said[0]} '
            'by its annotations'
        )
    labels = np.atleast_1d(results.get('gt_label', []))
    if num_classes and ((labels < 0) | (labels >= num_classes)).any():
        raise ValueError(
            f'image {path!r} has the label {labels.tolist()}, but there are '
            f'{num_classes} classes, numbered from 0'
        )


def _check_whole(path: str) -> None:
    """Let Pillow, which is exact, judge the few files with an unusual end."""
    with open(path, 'rb') as file:
        end = ENDS.get(file.read(2), b'')
        file.seek(max(0, osp.getsize(path) - len(end)))
        if file.read() == end:
            return
    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:
        raise ValueError(f'image {path!r} is damaged: {error}') from error


def _check_label_map(results: dict, num_classes: int, ignored: int) -> None:
    """Check the size of a label map and the numbers in it."""
    labels, shape = results['gt_seg_map'], tuple(results['ori_shape'])
    path = results.get('seg_map_path')
    if 1 in shape and labels.size == np.prod(shape):
        # mmseg squeezes those that are one pixel high or wide.
        labels = results['gt_seg_map'] = labels.reshape(shape)
    if labels.shape != shape:
        raise ValueError(
            f'label map {path!r} has the shape {labels.shape}, but its image '
            f'{results.get("img_path")!r} has {shape}'
        )
    # The maps of mmdet have stuff in them that no head counts.
    if not num_classes or 'reduce_zero_label' not in results:
        return
    present = np.flatnonzero(np.bincount(labels.ravel(), minlength=256))
    beyond = present[(present >= num_classes) & (present != ignored) & (present != 255)]
    if beyond.size:
        raise ValueError(
            f'label map {path!r} has the labels {beyond.tolist()}, but there are '
            f'{num_classes} classes, numbered from 0 after reduce_zero_label '
            f'({results["reduce_zero_label"]}); {ignored} is ignored'
        )
