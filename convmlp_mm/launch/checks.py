"""What is checked before a run begins: settings, data, annotations and GPUs."""

from __future__ import annotations

import contextlib
import json
import math
import os
import os.path as osp
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import NoReturn

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_from_file
from mmengine.registry import OPTIMIZERS

from ..hooks.data import walk_datasets

__all__ = [
    'check_annotations',
    'check_checkpoint',
    'check_data',
    'check_gpus',
    'check_optimizer',
    'check_settings',
    'is_first_process',
    'naming_data',
]

# The launchers' variables for the number of a process among all.
RANK = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
# Data sets that fetch themselves.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
# The least that a setting may be. Rates can be broken, and the loops take 12.0 for 12.
RATES = dict(lr=0, weight_decay=0)
LENGTHS = dict(max_epochs=1, max_iters=1, val_interval=1)
LEAST = dict(**RATES, **LENGTHS, batch_size=1, num_workers=0, accumulative_counts=1)
# The columns that mmdet reads of each table of an annotation file.
COLUMNS = dict(
    images=('id', 'file_name', 'width', 'height'),
    categories=('id', 'name'),
    annotations=('id', 'image_id', 'category_id', 'area', 'bbox'),
)


def is_first_process(launcher: str) -> bool:
    """Tell whether this is the process that speaks for all that a launcher started."""
    return os.environ.get(RANK.get(launcher, ''), '0') == '0'


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check the settings, and what the data sets and metrics name.

    An annotation file of COCO's size takes many seconds to parse. The first process
    reads it, but not if it belongs to a launcher, which has run this check before.

    Args:
        cfg (Config): The configuration.
        splits (Iterable[str]): Those of ``'train'``, ``'val'`` and ``'test'`` that
            will be used.

    Raises:
        OSError: If a folder or file is not there, or is the other of the two.
        ValueError: If a setting, an annotation or the classes of a data set are
            wrong, or a metric cannot be computed.
    """
    check_settings(cfg, splits)
    head = (cfg.get('model') or {}).get('head')
    head = head if isinstance(head, dict) else {}
    if 'train' in splits and head.get('cal_acc'):
        _check_topk(head, 'model.head', head)
    datasets = []
    for split in splits:
        loader = cfg.get(f'{split}_dataloader') or {}
        found = loader.get('dataset') or {}
        for key, dataset in walk_datasets(found, f'{split}_dataloader.dataset'):
            datasets.append(dataset)
            if _name_of(dataset) not in DOWNLOADED:
                for name, path in _paths_of(dataset).items():
                    _check_path(path, f'{key}.{name}')
        evaluators = cfg.get(f'{split}_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = {f'{split}_evaluator': evaluators}
        else:
            evaluators = {f'{split}_evaluator.{i}': e for i, e in enumerate(evaluators)}
        for key, evaluator in evaluators.items():
            path = evaluator.get('ann_file')
            if path and _is_local(path, evaluator):
                _check_path(path, f'{key}.ann_file')
                if not evaluator.get('format_only'):
                    _check_images(path, f'{key}.ann_file', found, split)
            if _name_of(evaluator) == 'Accuracy':
                _check_topk(evaluator, key, head)
    launcher = cfg.get('launcher', 'none')
    # The launchers of this package count their attempts, after they have run --check.
    is_checked = launcher != 'none' and 'CONVMLP_MM_ATTEMPT' in os.environ
    is_coco = cfg.get('default_scope') == 'mmdet'
    if is_coco and is_first_process(launcher) and not is_checked:
        _check_coco(datasets)


def check_settings(cfg: Config, splits: Iterable[str]) -> None:
    """Check numbers whose errors would not name them, and ``work_dir``.

    Raises:
        NotADirectoryError: If a part of ``work_dir`` is a file.
        PermissionError: If ``work_dir`` cannot be written.
        ValueError: If a number is none, or out of its range.
    """
    sections = [f'{split}_dataloader' for split in splits]
    if 'train' in splits:
        sections += ['train_cfg', 'optim_wrapper', 'optim_wrapper.optimizer']
    for section in sections:
        values = cfg
        for key in section.split('.'):
            values = (values or {}).get(key)
        for key, least in LEAST.items() if isinstance(values, dict) else ():
            value = values.get(key)
            # True is 1, but nobody means that.
            right = isinstance(value, Real) and not isinstance(value, bool)
            if key not in RATES and right:
                right = isinstance(value, int) or (key in LENGTHS and value % 1 == 0)
            if value is not None and not (right and value >= least):
                kind = 'number' if key in RATES else 'whole number'
                raise ValueError(
                    f'{section}.{key} must be a {kind} of at least {least}, but is '
                    f'{value!r}'
                )
    folder = osp.abspath(osp.expanduser(cfg.get('work_dir') or ''))
    while not osp.isdir(folder):
        if osp.lexists(folder):
            raise NotADirectoryError(
                f'work_dir {cfg.work_dir!r} cannot be made: {folder!r} is a file'
            )
        folder = osp.dirname(folder)
    # Permissions, and file systems that are mounted for reading only.
    effective = os.access in os.supports_effective_ids
    if cfg.get('work_dir') and not os.access(folder, os.W_OK, effective_ids=effective):
        raise PermissionError(
            f'work_dir {cfg.work_dir!r} cannot be written: {folder!r} is not writable'
        )


def check_optimizer(cfg: Config) -> None:
    """Check the type of the optimizer, where mmengine calls None.

    Raises:
        KeyError: If the scope that is open has no such optimizer.
    """
    kind = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        if isinstance(kind, str) and registry.get(kind) is None:
            known = ', '.join(sorted({*OPTIMIZERS.module_dict, *registry.module_dict}))
            raise KeyError(
                f'optim_wrapper.optimizer.type is {kind!r}, which is not in the '
                f'registry of optimizers; known are {known}'
            )


def _name_of(section: ConfigDict) -> str:
    """Return the name of a type that may be a class, or carry its scope."""
    kind = section.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _check_topk(section: ConfigDict, key: str, head: ConfigDict) -> None:
    """Refuse what would fail once the first epoch is over."""
    topk, classes = section.get('topk', 1), head.get('num_classes')
    highest = max(topk, default=0) if isinstance(topk, (list, tuple)) else topk
    if isinstance(classes, int) and highest > classes:
        raise ValueError(
            f'{key}.topk is {topk}, but model.head has {classes} classes: '
            f'--cfg-options {key}.topk="[1]" is right for any number'
        )


def _check_images(path: str, key: str, dataset: ConfigDict, split: str) -> None:
    """Refuse a metric whose file, another than that of the data, has other images."""
    other = _paths_of(dataset).get('ann_file')
    if not other or osp.realpath(path) == osp.realpath(other):
        return
    names = []
    for name in (path, other):
        try:
            with open(name, encoding='utf-8') as file:
                images = json.load(file)['images']
            names.append({repr(i['id']): osp.basename(i['file_name']) for i in images})
        except (OSError, ValueError, TypeError, KeyError):
            # The file has another format, or is one that the data set refuses.
            return
    there, needed = names
    missing = [number for number in needed if there.get(number) != needed[number]]
    if missing:
        raise ValueError(
            f'annotation file {path!r} (named by {key} in the configuration) does not '
            f'have image {missing[0]}, {needed[missing[0]]!r}, of {other!r} (named by '
            f'{split}_dataloader.dataset): data and metric must be of the same images'
        )


def _is_local(path: str, section: ConfigDict) -> bool:
    """Tell whether a path means a file here; of others, only the run can tell."""
    backend = (section.get('backend_args') or {}).get('backend', 'local')
    return backend == 'local' and '://' not in path


def _paths_of(dataset: ConfigDict) -> dict[str, str]:
    """Return the files and folders that a data set reads by their keys."""
    root, prefixes = dataset.get('data_root') or '', dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    parts = {f'data_prefix.{key}'.rstrip('.'): p for key, p in prefixes.items()}
    parts['ann_file'] = dataset.get('ann_file')
    paths = {
        key: osp.join(root, p) for key, p in parts.items() if isinstance(p, str) and p
    }
    paths = {'data_root': root, **paths} if root else paths
    return {key: path for key, path in paths.items() if _is_local(path, dataset)}


def _check_path(path: str, key: str) -> None:
    what = 'annotation file' if key.endswith('.ann_file') else 'data folder'
    found, named = osp.expanduser(path), f'(named by {key} in the configuration)'
    if not osp.exists(found):
        raise FileNotFoundError(f'{what} {path!r} does not exist {named}')
    if osp.isdir(found) and what == 'annotation file':
        raise IsADirectoryError(f'{what} {path!r} is a folder {named}')
    if not osp.isdir(found) and what == 'data folder':
        raise NotADirectoryError(f'{what} {path!r} is a file {named}')


def _check_coco(datasets: Iterable[ConfigDict]) -> None:
    """Check the annotation files of the data sets that mmdet reads as COCO's."""
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    classes_of: dict[str, list] = {}
    for dataset in datasets:
        kind, path = dataset.get('type'), _paths_of(dataset).get('ann_file')
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        # Data sets that read by themselves or by another API have other formats.
        ways = [getattr(kind, name, None) for name in ('load_data_list', 'COCOAPI')]
        if path and ways == [CocoDataset.load_data_list, CocoDataset.COCOAPI]:
            meta = {**kind.METAINFO, **(dataset.get('metainfo') or {})}
            classes_of.setdefault(path, []).append(meta['classes'])
    for path, lists in classes_of.items():
        where = f'annotation file {path!r}'
        with open(osp.expanduser(path), encoding='utf-8') as file:
            try:
                content = json.load(file)
            except ValueError as error:
                raise ValueError(f'{where} is not JSON: {error}') from error
        check_annotations(content, path)
        names = [category['name'] for category in content['categories']]
        for classes in lists:
            # mmengine, too, reads the names in such a file.
            if isinstance(classes, str) and osp.isfile(classes):
                classes = list_from_file(classes)
            _check_classes(classes, names, where)


def _some(values: Iterable) -> str:
    """Join the first names or ids for a message."""
    values = list(values)
    more = f' and {len(values) - 5} more' if len(values) > 5 else ''
    return ', '.join(map(str, values[:5])) + more


def _twice(names: Iterable) -> list:
    return [name for name, count in Counter(names).items() if count > 1]


def check_annotations(content: object, path: str | os.PathLike) -> None:
    """Check what the annotation file ``path`` in COCO's format holds.

    Boxes that reach out of their image, or are smaller than a pixel, are common in
    real data and dropped or clipped by mmdet, and so are annotations of images or
    categories that were taken out of the file: they are counted in a warning.

    Raises:
        ValueError: If something is missing, stands twice, or is no number, or no
            annotation is of an image and a category of the file.
    """
    where = f'annotation file {os.fspath(path)!r}'

    def refuse(what: str) -> NoReturn:
        raise ValueError(f'{where}{what}')

    if not isinstance(content, dict):
        refuse(f' must hold a dict, but holds a {type(content).__name__}')
    # The files of test sets have none.
    content = {'annotations': [], **content}
    for table, columns in COLUMNS.items():
        if table not in content:
            refuse(f' has no {table!r}, but {_some(content)}')
        rows = content[table]
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            refuse(f': {table} must be a list of dicts')
        for key in columns:
            for i, row in enumerate(rows):
                if key not in row:
                    refuse(f': no {key!r} in {table}[{i}], which has {_some(row)}')
        twice = _twice(row['id'] for row in rows)
        if twice:
            refuse(f': ids stand twice in {table}: {_some(twice)}')
    if not content['images']:
        refuse(': images is empty')
    sizes = {row['id']: [row['height'], row['width']] for row in content['images']}
    wrong = [
        name
        for name, size in sizes.items()
        if not all(isinstance(side, Real) and side > 0 for side in size)
    ]
    if wrong:
        refuse(f': width or height not above 0 in images {_some(wrong)}')
    used = content['annotations']
    for key, table in (('image_id', 'images'), ('category_id', 'categories')):
        there = {row['id'] for row in content[table]}
        unknown = [row[key] for row in used if row[key] not in there]
        if unknown:
            what = f'annotations are dropped, whose {key} {table} does not have'
            names = _some(sorted(set(unknown), key=str))
            _warn(f'{where}: {len(unknown)} of {len(used)} {what}: {names}')
            used = [row for row in used if row[key] in there]
    if content['annotations'] and not used:
        refuse(': all annotations are of other images or categories than it has')
    faults: dict[str, list] = {}
    for row in used:
        fault = _find_fault(row, sizes[row['image_id']])
        if fault:
            faults.setdefault(fault, []).append(row['id'])
    for fault, ids in faults.items():
        if not fault.startswith('boxes'):
            refuse(f': {fault} in annotations {_some(ids)}')
    for fault, ids in faults.items():
        count = f'{len(ids)} of {len(used)}'
        _warn(f'{where}: {count} {fault} (annotations {_some(ids)})')


def _warn(message: str) -> None:
    # No log of a run is there yet.
    print(f'warning: {message}', file=sys.stderr)


def _find_fault(row: dict, size: list) -> str | None:
    """Say what is wrong with an annotation of an image of [height, width]."""
    try:
        x, y, width, height = row['bbox']
        is_finite = all(map(math.isfinite, row['bbox']))
    except (TypeError, ValueError):
        return f'a bbox that is not [x, y, width, height], but {row["bbox"]},'
    if not is_finite:
        return 'NaN or Inf in bbox'
    mask = row.get('segmentation')
    # Run-length codes know the size of the image.
    if isinstance(mask, dict) and mask.get('size') != size:
        return 'a segmentation whose size is not [height, width] of its image'
    right, below = x + width - size[1], y + height - size[0]
    if min(width, height) < 1:
        return 'boxes are smaller than a pixel and dropped'
    if min(x + width, y + height) <= 0 or right >= width or below >= height:
        return 'boxes lie outside their image and are dropped'
    # Rounding makes a pixel.
    if min(x, y) < -1 or max(right, below) > 1:
        return 'boxes reach out of their image and are clipped'
    return None


def _check_classes(classes: Sequence[str], names: Sequence[str], where: str) -> None:
    """Check the classes of a data set against the names of its categories.

    mmdet numbers those that it finds in the order of the file, and says nothing of
    the others: labels would then belong to other classes than the names say.
    """
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
    ordered = [name for name in names if name in classes]
    twice = _some(_twice(ordered) or _twice(classes))
    if twice:
        raise ValueError(
            f'{where}: names stand twice in categories or metainfo.classes: {twice}'
        )
    for i, (name, there) in enumerate(zip(classes, ordered)):
        if name != there:
            raise ValueError(
                f'metainfo.classes must be in the order of the categories of {where}: '
                f'class {i} is {name!r}, but there it is {there!r}'
            )


@contextlib.contextmanager
def naming_data() -> Iterator[None]:
    """Name the files of a data set that a toolkit fails to read, or finds empty.

    Raises:
        ValueError: In place of the toolkit's error, which seldom does.
    """
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        names = [frame.f_code.co_name for frame in frames]
        read = [f.f_locals for f in frames if f.f_code.co_name == 'full_init']
        dataset = read[-1].get('self') if read else None
        if not isinstance(dataset, BaseDataset):
            raise
        files = {'ann_file': dataset.ann_file, **(dataset.data_prefix or {})}
        files = ', '.join(f'{key} {path!r}' for key, path in files.items() if path)
        if 'load_data_list' not in names and not dataset.data_list:
            what = f'has no images ({files}; filter_cfg is {dataset.filter_cfg})'
        else:
            what = f'cannot read its data ({files}): {type(error).__name__}: {error}'
        raise ValueError(f'{type(dataset).__name__} {what}') from error


def check_checkpoint(path: str) -> None:
    """Check that a checkpoint is there; of a URL, only the run can tell.

    Raises:
        OSError: If it does not exist, or is a folder.
    """
    if osp.isdir(path):
        raise IsADirectoryError(f'checkpoint {path!r} is a folder, not a file')
    if '://' not in path and not osp.isfile(path):
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')


def check_gpus() -> None:
    """Check that each process of this machine has a GPU of its own.

    Raises:
        ValueError: If there are more processes than visible GPUs.
    """
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f'{processes} processes need as many GPUs, but '
            f'{torch.cuda.device_count()} are visible (CUDA_VISIBLE_DEVICES is '
            f'{os.environ.get("CUDA_VISIBLE_DEVICES", "not set")})'
        )
