"""What is checked before a run begins: settings, data, annotations and GPUs."""

import contextlib
import json
import os
import os.path as osp
import sys
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import zip_longest
from math import isfinite
from numbers import Real

import numpy as np
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import OPTIMIZERS

from ..checkpoint import some_of
from ..hooks.data import walk_datasets

# The launchers' variables for the number of a process among all.
RANK = dict(pytorch='RANK', slurm='SLURM_PROCID', mpi='OMPI_COMM_WORLD_RANK')
# Data sets that fetch themselves.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')
# The least that a number of a section may be.
LEAST = dict(lr=0, weight_decay=0, batch_size=1, num_workers=0, accumulative_counts=1)
LEAST.update(max_epochs=1, max_iters=1, val_interval=1)


def is_first_process(launcher: str) -> bool:
    """Tell whether this is the process that speaks for all that a launcher started."""
    return os.environ.get(RANK.get(launcher, ''), '0') == '0'


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check the settings, and what the data sets and metrics name.

    An annotation file of COCO's size takes many seconds to parse. The first process
    reads it, but not if it belongs to a launcher, which has run this check before.

    Args:
        cfg: The configuration.
        splits: Those of ``'train'``, ``'val'`` and ``'test'`` that will be used.

    Raises:
        OSError: If a folder or file is not there, or is the other of the two.
        ValueError: If a setting, an annotation or the classes of a data set are
            wrong, or a metric cannot be computed.
    """
    _check_settings(cfg, splits)
    head = (cfg.get('model') or {}).get('head')
    classes = head.get('num_classes') if isinstance(head, dict) else None
    datasets, metrics = [], []
    for split in splits:
        dataset = (cfg.get(f'{split}_dataloader') or {}).get('dataset') or {}
        found = list(walk_datasets(dataset, f'{split}_dataloader.dataset'))
        datasets += [part for _, part in found]
        key = f'{split}_evaluator'
        evaluators = cfg.get(key) or []
        for metric in [evaluators] if isinstance(evaluators, dict) else evaluators:
            found.append((key, metric))
            metrics.append((key, metric, dataset))
            topk = metric.get('topk', 1)
            if classes and _name_of(metric) == 'Accuracy' and np.max(topk) > classes:
                raise ValueError(
                    f'{key}.topk is {topk}, but model.head has {classes} classes'
                )
        for key, part in found:
            for name, path in _paths_of(part).items():
                _check_path(path, f'{key}.{name}')
    launcher = cfg.get('launcher', 'none')
    # The launchers of this package count their attempts, after they have run --check.
    is_checked = launcher != 'none' and 'CONVMLP_MM_ATTEMPT' in os.environ
    is_coco = cfg.get('default_scope') == 'mmdet'
    if is_coco and is_first_process(launcher) and not is_checked:
        _check_coco(datasets, metrics)


def _check_settings(cfg: Config, splits: Iterable[str]) -> None:
    """Check numbers whose errors would not name them."""
    sections = {f'{s}_dataloader': cfg.get(f'{s}_dataloader') for s in splits}
    if 'train' in splits:
        wrapper = cfg.get('optim_wrapper') or {}
        sections['train_cfg'], sections['optim_wrapper'] = cfg.get('train_cfg'), wrapper
        sections['optim_wrapper.optimizer'] = wrapper.get('optimizer')
    for name, section in sections.items():
        for key, least in LEAST.items():
            value = (section or {}).get(key)
            if value is not None and not (isinstance(value, Real) and value >= least):
                what = f'{name}.{key} must be a number of at least {least}'
                raise ValueError(f'{what}, but is {value!r}')


def check_optimizer(cfg: Config) -> None:
    """Raise a KeyError for an unknown optimizer, which mmengine calls None."""
    kind = (cfg.get('optim_wrapper') or {}).get('optimizer', {}).get('type')
    with OPTIMIZERS.switch_scope_and_registry(None) as registry:
        is_known = not isinstance(kind, str) or kind in registry
    if not is_known:
        raise KeyError(f'optim_wrapper.optimizer.type {kind!r} is not in the registry')


def _name_of(section: ConfigDict) -> str:
    """Return the name of a type that may be a class, or carry its scope."""
    kind = section.get('type', '')
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def _paths_of(part: ConfigDict) -> dict[str, str]:
    """Return the files and folders here that data or a metric reads, by their keys."""
    # Of others, only the run can tell.
    backend = (part.get('backend_args') or {}).get('backend', 'local')
    if backend != 'local' or _name_of(part) in DOWNLOADED:
        return {}
    root, prefixes = part.get('data_root') or '', part.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    names = {f'data_prefix.{key}'.rstrip('.'): name for key, name in prefixes.items()}
    names['ann_file'] = part.get('ann_file')
    paths = {'data_root': root} if root else {}
    for key, name in names.items():
        if isinstance(name, str) and name:
            paths[key] = osp.join(root, name)
    return {key: path for key, path in paths.items() if '://' not in path}


def _check_path(path: str, key: str) -> None:
    is_file = key.endswith('.ann_file')
    what, named = ('annotation file', 'folder') if is_file else ('data folder', 'file')
    where = f'(named by {key} in the configuration)'
    if not osp.exists(path):
        raise FileNotFoundError(f'{what} {path!r} does not exist {where}')
    if osp.isdir(path) == is_file:
        raise OSError(f'{what} {path!r} is a {named} {where}')


def _check_coco(datasets: Iterable[ConfigDict], metrics: Iterable[tuple]) -> None:
    """Check the annotation files of the data sets that mmdet reads as COCO's.

    Metrics, given with their key and their data set, must have the images of the data;
    otherwise they fail after the first epoch.
    """
    from mmdet.datasets import CocoDataset
    from mmdet.registry import DATASETS

    read, images_of = cache(_read_coco), {}
    for dataset in datasets:
        kind, path = dataset.get('type'), _paths_of(dataset).get('ann_file')
        kind = DATASETS.get(kind) if isinstance(kind, str) else kind
        # Data sets that read by themselves or by another API have other formats.
        ways = [getattr(kind, name, None) for name in ('load_data_list', 'COCOAPI')]
        if path and ways == [CocoDataset.load_data_list, CocoDataset.COCOAPI]:
            meta = {**kind.METAINFO, **(dataset.get('metainfo') or {})}
            images_of[path], names = read(path)
            _check_classes(meta['classes'], names, path)
    for key, *parts in metrics:
        path, other = (_paths_of(part).get('ann_file') for part in parts)
        if path is None or other not in images_of or osp.samefile(path, other):
            continue
        there = read(path)[0]
        for number, name in images_of[other].items():
            if there.get(number) != name:
                raise ValueError(
                    f'annotation file {path!r} (named by {key}.ann_file in the '
                    f'configuration) does not have image {number}, {name!r}, of '
                    f'{other!r}: data and metric must be of the same images'
                )


def _read_coco(path: str) -> tuple[dict, list[str]]:
    """Check an annotation file; return its images, name by id, and its categories."""
    try:
        with open(path, encoding='utf-8') as file:
            content = json.load(file)
        changed = check_annotations(content)
        rows, categories = content['images'], content['categories']
        images = {row['id']: osp.basename(row['file_name']) for row in rows}
        names = [row['name'] for row in categories]
    except (ValueError, KeyError, TypeError) as error:
        reason = error if type(error) is ValueError else repr(error)
        raise ValueError(f'annotation file {path!r} is wrong: {reason}') from error
    for what, numbers in changed.items():
        count = f'{len(numbers)} of {len(content["annotations"])} annotations'
        text = f'{count} {what}: {some_of(map(str, numbers))}'
        # No log of a run is there yet.
        print(f'warning: annotation file {path!r}: {text}', file=sys.stderr)
    return images, names


def check_annotations(content: dict) -> dict[str, list]:
    """Check what an annotation file in COCO's format holds.

    Returns:
        dict: By what mmdet does without a word to annotations that are common in real
        data, such as boxes that it clips, their ids.

    Raises:
        ValueError: If an id stands twice, an annotation is wrong, or none is of an
            image and a category of the file.
        KeyError, TypeError: If a part is missing, or of another kind.
    """
    # The files of test sets have no annotations.
    content = {'annotations': [], **content}
    for table in ('images', 'categories', 'annotations'):
        counts = Counter(row['id'] for row in content[table])
        twice = [str(number) for number, count in counts.items() if count > 1]
        if twice:
            raise ValueError(f'ids stand twice in {table}: {some_of(twice)}')
    sizes = {row['id']: [row['height'], row['width']] for row in content['images']}
    empty = [str(number) for number, size in sizes.items() if not min(size) > 0]
    if empty or not sizes:
        what = f'height or width of {some_of(empty)} is not above 0'
        raise ValueError(what if empty else 'images is empty')
    categories = {row['id'] for row in content['categories']}
    found = defaultdict(list)
    lost = 'are of images or categories it has not and dropped'
    for row in content['annotations']:
        what = lost
        if row['image_id'] in sizes and row['category_id'] in categories:
            what = _check_annotation(row, *sizes[row['image_id']])
        if what:
            found[what].append(row['id'])
    if found and len(found.get(lost, ())) == len(content['annotations']):
        raise ValueError('all annotations are of images or categories that it has not')
    return found


def _check_annotation(row: dict, rows: int, columns: int) -> str | None:
    """Check an annotation; say what mmdet does to one that does not fit its image."""
    box, mask = row['bbox'], row.get('segmentation')
    if len(box) != 4 or not all(isinstance(x, Real) and isfinite(x) for x in box):
        raise ValueError(
            f'bbox of annotation {row["id"]} must be four finite numbers, x, y, width '
            f'and height, but is {box}'
        )
    # Run-length codes know the size of the image.
    if isinstance(mask, dict) and mask.get('size') != [rows, columns]:
        raise ValueError(
            f'segmentation of annotation {row["id"]} has the size {mask.get("size")}, '
            f'but its image {[rows, columns]}'
        )
    if 'area' not in row:
        raise KeyError('area')
    x, y, width, height = box
    right, below = x + width - columns, y + height - rows
    if min(width, height) < 1:
        return 'have boxes smaller than a pixel and are dropped'
    if min(x + width, y + height) <= 0 or right >= width or below >= height:
        return 'have boxes outside of their image and are dropped'
    # Rounding makes a pixel.
    if min(x, y) < -1 or max(right, below) > 1:
        return 'have boxes that reach out of their image and are clipped'
    return None


def _check_classes(classes: object, names: list[str], path: str) -> None:
    """Check the classes of a data set against the names of its categories.

    mmdet numbers those that it finds in the order of the file, and says nothing of
    the others: labels would then belong to other classes than the names say.
    """
    missing = [name for name in classes if name not in names]
    if missing:
        raise ValueError(
            f'annotation file {path!r} has no category for {len(missing)} of the '
            f'{len(classes)} names in metainfo.classes: {some_of(missing)}; it has '
            f'{some_of(names)}'
        )
    ordered = [name for name in names if name in classes]
    for i, pair in enumerate(zip_longest(classes, ordered)):
        if pair[0] != pair[1]:
            raise ValueError(
                'metainfo.classes must be each once and in the order of the categories '
                f'of {path!r}: class {i} is {pair[0]!r}, but there it is {pair[1]!r}'
            )


@contextlib.contextmanager
def naming_data() -> Iterator[None]:
    """Name the files of a data set that a toolkit fails to read, or finds empty."""
    try:
        yield
    except (ValueError, TypeError, KeyError, IndexError) as error:
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        owners = {f.f_code.co_name: f.f_locals.get('self') for f in frames}
        dataset = owners.get('full_init')
        if not isinstance(dataset, BaseDataset):
            raise
        files = {'ann_file': dataset.ann_file, **(dataset.data_prefix or {})}
        files = ', '.join(f'{key} {path!r}' for key, path in files.items() if path)
        what = f'cannot read its data ({files}): {error!r}'
        if 'load_data_list' not in owners and not dataset.data_list:
            what = f'has no images ({files}; filter_cfg is {dataset.filter_cfg})'
        raise ValueError(f'{type(dataset).__name__} {what}') from error


def check_checkpoint(path: str) -> None:
    """Raise an OSError if there is no such file; of a URL, only the run can tell."""
    if '://' not in path and not osp.isfile(path):
        what = 'is a folder, not a file' if osp.isdir(path) else 'does not exist'
        raise FileNotFoundError(f'checkpoint {path!r} {what}')


def check_gpus() -> None:
    """Raise a ValueError if this machine has fewer GPUs than processes of the run."""
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', 1))
    gpus = torch.cuda.device_count()
    if torch.cuda.is_available() and processes > gpus:
        visible = os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')
        what = f'{processes} processes need as many GPUs, but {gpus} are visible'
        raise ValueError(f'{what} (CUDA_VISIBLE_DEVICES is {visible})')
