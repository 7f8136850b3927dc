"""Checks of annotations while the toolkits read them.

An annotation file of COCO's size takes many seconds to parse: nothing here reads it a
second time. What the toolkits would drop, mix up or answer with an unrelated error is
refused with the name of the file.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.logging import print_log

__all__ = ['check_annotations', 'check_classes', 'check_while_reading']

MAX_NAMES = 5


def check_annotations(content: object, path: str | os.PathLike) -> None:
    """Check what an annotation file in COCO's format holds.

    Boxes that reach out of their image, or are smaller than a pixel, are common in
    real data and dropped or clipped by mmdet, and so are annotations of images or
    categories that were taken out of the file: they are counted in a warning.

    Args:
        content (object): What the file holds.
        path (str | PathLike): Its name, for the messages.

    Raises:
        ValueError: If something is missing, stands twice, or is no number, or no
            annotation is of an image and a category of the file; the message names
            the file and the ids.
    """
    where = f'annotation file {os.fspath(path)!r}'
    if not isinstance(content, dict):
        raise ValueError(f'{where} must hold a dict, but holds a {_type(content)}')
    images, categories = (
        _table(content, key, where) for key in ('images', 'categories')
    )
    # Test sets have none.
    annotations = _table({'annotations': [], **content}, 'annotations', where)
    if not images:
        raise ValueError(f'{where}: images is empty')
    image_ids = _ids(images, 'images', where)
    category_ids = _ids(categories, 'categories', where)
    _ids(annotations, 'annotations', where)
    _column(images, 'file_name', 'images', where)
    _column(categories, 'name', 'categories', where)
    of_image = _refer(annotations, 'image_id', image_ids, 'images', where)
    of_category = _refer(annotations, 'category_id', category_ids, 'categories', where)
    known = (of_image >= 0) & (of_category >= 0)
    if annotations and not known.any():
        raise ValueError(
            f'{where}: all annotations are of other images or categories than it has'
        )
    sizes = [_column(images, key, 'images', where) for key in ('width', 'height')]
    sizes = np.array(sizes, float).T
    _refuse(~(sizes > 0).all(1), images, 'width or height not above 0', 'images', where)
    if annotations:
        _column(annotations, 'area', 'annotations', where)
        annotations = [a for a, used in zip(annotations, known) if used]
        _check_boxes(annotations, sizes[of_image[known]], where)


def _check_boxes(annotations: list[dict], sizes: np.ndarray, where: str) -> None:
    """Check boxes and masks; ``sizes`` is the (N, 2) of their images."""
    boxes = _column(annotations, 'bbox', 'annotations', where)
    try:
        array, problem = np.array(boxes, float), ''
    except (TypeError, ValueError) as error:
        array, problem = np.empty(0), f' ({error})'
    if array.shape != (len(boxes), 4):
        wrong = [not _is_box(box) for box in boxes]
        what = f'a bbox that is not [x, y, width, height]{problem}'
        _refuse(wrong, annotations, what, 'annotations', where)
    boxes, what = array, 'NaN or Inf in bbox'
    _refuse(~np.isfinite(boxes).all(1), annotations, what, 'annotations', where)
    # Run-length codes know the size of the image.
    wrong = np.zeros(len(boxes), bool)
    for i, annotation in enumerate(annotations):
        if isinstance(annotation.get('segmentation'), dict):
            width, height = sizes[i]
            wrong[i] = annotation['segmentation'].get('size') != [height, width]
    what = 'a segmentation whose size is not [height, width] of its image'
    _refuse(wrong, annotations, what, 'annotations', where)
    low, high = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    small = (boxes[:, 2:] < 1).any(1)
    away = ((high <= 0) | (low >= sizes)).any(1) & ~small
    # Rounding makes a pixel.
    over = ((low < -1) | (high > sizes + 1)).any(1) & ~small & ~away
    for found, what in (
        (small, 'boxes are smaller than a pixel and dropped'),
        (away, 'boxes lie outside their image and are dropped'),
        (over, 'boxes reach out of their image and are clipped'),
    ):
        if found.any():
            print_log(
                f'{where}: {found.sum()} of {len(boxes)} {what} '
                f'(annotations {_some(_which(found, annotations))})',
                'current',
                logging.WARNING,
            )


def _is_box(value: object) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 4
        and all(isinstance(part, (int, float)) for part in value)
    )


def _type(value: object) -> str:
    return type(value).__name__


def _some(values: Iterable) -> str:
    values = list(values)
    more = len(values) - MAX_NAMES
    shown = ', '.join(map(str, values[:MAX_NAMES]))
    return f'{shown} and {more} more' if more > 0 else shown


def _table(content: dict, key: str, where: str) -> list[dict]:
    if key not in content:
        raise ValueError(f'{where} has no {key!r}, but {_some(content) or "nothing"}')
    rows = content[key]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f'{where}: {key} must be a list of dicts')
    return rows


def _column(rows: list[dict], key: str, table: str, where: str) -> list:
    try:
        return [row[key] for row in rows]
    except KeyError:
        number = next(i for i, row in enumerate(rows) if key not in row)
        raise ValueError(
            f'{where}: no {key!r} in {table}[{number}], which has {_some(rows[number])}'
        ) from None


def _ids(rows: list[dict], table: str, where: str) -> dict[Hashable, int]:
    """Return the places of the rows by their ids, which must differ."""
    ids = _column(rows, 'id', table, where)
    places = {name: i for i, name in enumerate(ids)}
    if len(places) < len(ids):
        twice = [name for name, count in Counter(ids).items() if count > 1]
        raise ValueError(f'{where}: ids stand twice in {table}: {_some(twice)}')
    return places


def _refer(
    rows: list[dict], key: str, places: dict[Hashable, int], table: str, where: str
) -> np.ndarray:
    """Return the places that ``key`` of each row refers to, -1 where there is none."""
    names = _column(rows, key, 'annotations', where)
    found = np.array([places.get(name, -1) for name in names], int)
    if (found < 0).any():
        unknown = sorted(set(names) - places.keys(), key=str)
        print_log(
            f'{where}: {(found < 0).sum()} of {len(rows)} annotations are dropped, '
            f'whose {key} {table} does not have: {_some(unknown)}',
            'current',
            logging.WARNING,
        )
    return found


def _which(found: Sequence[bool], rows: list[dict]) -> list:
    return [rows[i]['id'] for i in np.flatnonzero(found)]


def _refuse(
    found: Sequence[bool], rows: list[dict], what: str, table: str, where: str
) -> None:
    if np.any(found):
        raise ValueError(f'{where}: {what} in {table} {_some(_which(found, rows))}')


def check_classes(
    classes: Sequence[str], names: Sequence[str], path: str | os.PathLike
) -> None:
    """Check the classes of a data set against the categories of its file.

    mmdet numbers those that it finds in the order of the file, and says nothing of
    the others: labels would then belong to other classes than the names say.

    Args:
        classes (Sequence[str]): ``metainfo.classes``.
        names (Sequence[str]): Of the categories, in their order.
        path (str | PathLike): Name of the file, for the messages.

    Raises:
        ValueError: If a class is not among the names, or twice, or the order is
            another.
    """
    where = f'annotation file {os.fspath(path)!r}'
    if isinstance(classes, str):
        raise ValueError(
            f'metainfo.classes must be a tuple of names, but is {classes!r} ({where})'
        )
    missing = [name for name in classes if name not in names]
    if missing:
        raise ValueError(
            f'{where} has no category for {len(missing)} of the {len(classes)} names '
            f'in metainfo.classes: {_some(missing)}; it has {_some(names)}'
        )
    ordered = [name for name in names if name in set(classes)]
    if len(ordered) != len(classes):
        longer = max(ordered, classes, key=len)
        twice = [name for name, count in Counter(longer).items() if count > 1]
        raise ValueError(
            f'{where}: names stand twice in categories or metainfo.classes: '
            + _some(twice)
        )
    if ordered != list(classes):
        first = next(
            i for i, pair in enumerate(zip(ordered, classes)) if len({*pair}) > 1
        )
        raise ValueError(
            f'metainfo.classes must be in the order of the categories of {where}: '
            f'class {first} is {classes[first]!r}, but there it is {ordered[first]!r}'
        )


def check_while_reading(scope: str | None) -> None:
    """Let the data sets of this process check annotations when they read them.

    Not at import: only the tools of this package decide for the whole process.

    Args:
        scope (str, optional): ``default_scope`` of the configuration.
    """
    if not hasattr(BaseDataset.full_init, 'checks'):
        BaseDataset.full_init = _name_data(BaseDataset.full_init)
        # mmdet has a full_init of its own.
        BaseDataset._serialize_data = _refuse_nothing(BaseDataset._serialize_data)
    if scope != 'mmdet':
        return
    from mmdet.datasets import CocoDataset

    if not hasattr(CocoDataset.COCOAPI, 'checks'):
        CocoDataset.COCOAPI = _checked(CocoDataset.COCOAPI)


class _NoImagesError(ValueError):
    pass


def _describe(dataset: BaseDataset) -> str:
    sources = {'ann_file': dataset.ann_file, **(dataset.data_prefix or {})}
    return ', '.join(f'{key} {value!r}' for key, value in sources.items() if value)


def _name_data(full_init: Callable) -> Callable:
    """Make a method whose errors name the files."""

    def checked(self: BaseDataset) -> None:
        try:
            full_init(self)
        except _NoImagesError:
            raise
        except (ValueError, TypeError, KeyError, IndexError) as error:
            raise ValueError(
                f'{_type(self)} cannot read its data ({_describe(self)}): '
                f'{_type(error)}: {error}'
            ) from error

    checked.checks = True
    return checked


def _refuse_nothing(serialize: Callable) -> Callable:
    """Make a method that names the data set where mmengine fails to concatenate."""

    def checked(self: BaseDataset) -> tuple[np.ndarray, np.ndarray]:
        if not self.data_list:
            raise _NoImagesError(
                f'{_type(self)} has no images ({_describe(self)}; filter_cfg is '
                f'{self.filter_cfg}, indices is {self._indices})'
            )
        return serialize(self)

    return checked


def _checked(api: type) -> type:
    """Make a class of COCO's API one that checks."""

    class CheckedCOCO(api):
        checks = True

        def __init__(self, annotation_file: str) -> None:
            self.path = annotation_file
            try:
                super().__init__(annotation_file)
            except (KeyError, TypeError):
                # Of the index: what is missing has no name there.
                check_annotations(self.dataset, self.path)
                raise
            except (ValueError, AssertionError) as error:
                # Of the parser, and of the bytes that are no text.
                raise ValueError(
                    f'annotation file {self.path!r} is not JSON of COCO: {error}'
                ) from error
            check_annotations(self.dataset, self.path)

        def get_cat_ids(self, cat_names=(), **kwargs) -> list:
            names = [category['name'] for category in self.dataset['categories']]
            check_classes(cat_names, names, self.path)
            return super().get_cat_ids(cat_names=cat_names, **kwargs)

    return CheckedCOCO
