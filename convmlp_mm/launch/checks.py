"""What is checked before a run begins: data, settings and GPUs."""

from __future__ import annotations

import json
import os
import os.path as osp

import torch
from mmengine.config import Config, ConfigDict

from ..config_checks import check_settings

__all__ = ['check_checkpoint', 'check_data', 'check_gpus']


# Data sets that fetch themselves.
DOWNLOADED = ('CIFAR10', 'CIFAR100', 'MNIST', 'FashionMNIST')


def check_data(cfg: Config, splits: tuple[str, ...]) -> None:
    """Check the settings, and that what the data sets and metrics name is there.

    Args:
        cfg (Config): The configuration.
        splits (tuple[str]): Of ``'train'``, ``'val'`` and ``'test'``, those
            that will be used.

    Raises:
        FileNotFoundError: If a folder or file is not; the message names it and
            the key of the configuration.
        IsADirectoryError: If a file is a folder.
        NotADirectoryError: If a folder is a file.
        ValueError: See :func:`convmlp_mm.config_checks.check_settings`.
    """
    check_settings(cfg, splits)
    head = (cfg.get('model') or {}).get('head')
    head = head if isinstance(head, dict) else {}
    for split in splits:
        loader = cfg.get(f'{split}_dataloader')
        if loader is not None:
            _check_dataset(loader['dataset'], f'{split}_dataloader.dataset')
        evaluators = cfg.get(f'{split}_evaluator') or []
        if isinstance(evaluators, dict):
            evaluators = {f'{split}_evaluator': evaluators}
        else:
            evaluators = {f'{split}_evaluator.{i}': e for i, e in enumerate(evaluators)}
        for key, evaluator in evaluators.items():
            path = evaluator.get('ann_file')
            backend = (evaluator.get('backend_args') or {}).get('backend', 'local')
            if path and backend == 'local':
                _check_path(path, f'{key}.ann_file', 'annotation file')
                if loader is not None and not evaluator.get('format_only'):
                    _check_images(path, f'{key}.ann_file', loader.dataset, split)
            if str(evaluator.get('type')).rpartition('.')[2] == 'Accuracy':
                _check_topk(evaluator, key, head)
    if 'train' in splits and head.get('cal_acc'):
        _check_topk(head, 'model.head', head)


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
    """Refuse a metric whose file, another than that of the data, has other images.

    Both are read in this case alone, as COCO's files take seconds.
    """
    other = dataset.get('ann_file')
    if not isinstance(other, str) or not other or '://' in path:
        return
    other = osp.join(dataset.get('data_root') or '', other)
    if osp.realpath(path) == osp.realpath(other):
        return
    needed, there = _images_of(other), _images_of(path)
    missing = next((image for image in needed if there.get(image) != needed[image]), 0)
    if there and missing:
        raise ValueError(
            f'annotation file {path!r} (named by {key} in the configuration) does not '
            f'have image {missing}, {needed[missing]!r}, of {other!r} (named by '
            f'{split}_dataloader.dataset): data and metric must be of the same images'
        )


def _images_of(path: str) -> dict[str, str]:
    """Return the names of the images in a file of COCO's format by their ids."""
    try:
        with open(path, encoding='utf-8') as file:
            images = json.load(file)['images']
        return {repr(i['id']): osp.basename(i['file_name']) for i in images}
    except (OSError, ValueError, TypeError, KeyError):
        # In another format, or what the data set will refuse.
        return {}


def _check_dataset(dataset: ConfigDict, key: str) -> None:
    """Walk wrappers such as RepeatDataset down to the data sets with files."""
    if 'dataset' in dataset:
        _check_dataset(dataset['dataset'], f'{key}.dataset')
        return
    if 'datasets' in dataset:
        for i, part in enumerate(dataset['datasets']):
            _check_dataset(part, f'{key}.datasets.{i}')
        return
    kind = dataset.get('type', '')
    kind = kind if isinstance(kind, str) else kind.__name__
    # Through another backend, a path may be mapped to where only it can look.
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    if kind.rpartition('.')[2] in DOWNLOADED or backend != 'local':
        return
    root = dataset.get('data_root') or ''
    if root:
        _check_path(root, f'{key}.data_root', 'data folder')
    if isinstance(dataset.get('ann_file'), str) and dataset['ann_file']:
        path = osp.join(root, dataset['ann_file'])
        _check_path(path, f'{key}.ann_file', 'annotation file')
    prefixes = dataset.get('data_prefix') or {}
    if isinstance(prefixes, str):
        prefixes = {'': prefixes}
    for name, prefix in prefixes.items():
        if isinstance(prefix, str) and prefix:
            name = f'{key}.data_prefix.{name}'.rstrip('.')
            _check_path(osp.join(root, prefix), name, 'data folder')


def _check_path(path: str, key: str, what: str) -> None:
    """Let remote paths pass: only the run can tell."""
    if '://' in path:
        return
    found, named = osp.expanduser(path), f'(named by {key} in the configuration)'
    if not osp.exists(found):
        raise FileNotFoundError(f'{what} {path!r} does not exist {named}')
    if what == 'annotation file' and osp.isdir(found):
        raise IsADirectoryError(f'{what} {path!r} is a folder {named}')
    if what == 'data folder' and not osp.isdir(found):
        raise NotADirectoryError(f'{what} {path!r} is a file {named}')


def check_checkpoint(path: str) -> None:
    """Check that a checkpoint is there; of a URL, only the run can tell.

    Args:
        path (str): Path or URL.

    Raises:
        FileNotFoundError: If it does not exist.
        IsADirectoryError: If it is a folder.
    """
    if '://' in path or osp.isfile(path):
        return
    if not osp.isdir(path):
        raise FileNotFoundError(f'checkpoint {path!r} does not exist')
    raise IsADirectoryError(f'checkpoint {path!r} is a folder, not a file')


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
