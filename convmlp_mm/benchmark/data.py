"""Time the loading of data, apart from any model."""

from __future__ import annotations

import copy
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.utils.dl_utils import set_multi_processing

from ..zoo import WORKER_KEYS

if TYPE_CHECKING:
    from torch.utils.data import DataLoader, Dataset

__all__ = [
    'LoadingTime',
    'build_loader',
    'describe_need',
    'needed_workers',
    'time_loading',
    'time_pipeline',
]

# Keys of a loader that only processes of its own have.
TRIES = 100


@dataclass(frozen=True)
class LoadingTime:
    """How fast a loader hands out batches.

    Attributes:
        workers (int): Number of processes; 0 is the process of the loop itself.
        first (float): Seconds to the first batch, the start of the processes
            included.
        batch (float): Seconds of a batch thereafter.
        images (float): Images per second thereafter.
    """

    workers: int
    first: float
    batch: float
    images: float


def build_loader(
    cfg: Config, workers: int, batch_size: int | None = None, seed: int = 0
) -> DataLoader:
    """Build the loader of the training as the Runner does.

    Args:
        cfg (Config): A configuration with ``train_dataloader``.
        workers (int): Number of processes.
        batch_size (int, optional): Defaults to the configuration's.
        seed (int): Of the order. Defaults to 0.

    Returns:
        DataLoader: The loader.

    Raises:
        ValueError: If there is none, if the data do not match its settings, or if
            they do not fill a batch.
    """
    if cfg.get('train_dataloader') is None:
        raise ValueError('the configuration has no train_dataloader')
    scope = cfg.get('default_scope') or 'mmengine'
    if scope != 'mmengine':
        import_module(f'{scope}.utils').register_all_modules(False)
    set_multi_processing(**(cfg.get('env_cfg') or {}).get('mp_cfg', {}))
    settings = copy.deepcopy(cfg.train_dataloader)
    settings.num_workers = workers
    if batch_size is not None:
        settings.batch_size = batch_size
    settings.pin_memory = settings.get('pin_memory', False) and (
        torch.cuda.is_available()
    )
    if workers:
        # Else each epoch of a small set would start them again.
        settings.persistent_workers = True
    else:
        for key in WORKER_KEYS:
            settings.pop(key, None)
    with DefaultScope.overwrite_default_scope(scope):
        try:
            loader = Runner.build_dataloader(settings, seed=seed)
        except AssertionError as error:
            # What the toolkits say of data that do not match their settings.
            raise ValueError(
                f'train_dataloader of the configuration: {error}'
            ) from error
    if len(loader) == 0:
        raise ValueError(
            f'the {len(loader.dataset)} pictures of the training set do not fill a '
            f'batch of {settings.get("batch_size")}'
        )
    return loader


def time_loading(loader: DataLoader, batches: int) -> LoadingTime:
    """Time batches, more epochs than one if need be.

    Args:
        loader (DataLoader): See :func:`build_loader`.
        batches (int): Number of batches to time, from 1 on. As many as there are
            processes go before, which all start at once.

    Returns:
        LoadingTime: The times.
    """
    start = time.perf_counter()
    stream = _endless(loader)
    next(stream)
    first = time.perf_counter() - start
    for _ in range(max(loader.num_workers - 1, 0)):
        next(stream)
    images = 0
    start = time.perf_counter()
    for _ in range(batches):
        images += len(next(stream)['inputs'])
    seconds = time.perf_counter() - start
    stream.close()
    return LoadingTime(loader.num_workers, first, seconds / batches, images / seconds)


def _endless(loader: DataLoader) -> Iterator[dict]:
    while True:
        yield from loader


def needed_workers(batch_seconds: float, step_seconds: float) -> int:
    """Tell how many processes keep up with a training step.

    Args:
        batch_seconds (float): That one process takes for a batch.
        step_seconds (float): That the step takes.

    Returns:
        int: The number, each with a core of its own.

    Examples:
        >>> needed_workers(1.9, 0.5)
        4
    """
    # Not one more for the last digit of a quotient.
    return max(1, math.ceil(round(batch_seconds / step_seconds, 9)))


def time_pipeline(
    loader: DataLoader, samples: int, seed: int = 0
) -> list[tuple[str, float]]:
    """Time each step of the data set's pipeline in this process.

    Args:
        loader (DataLoader): See :func:`build_loader`.
        samples (int): Number of pictures, drawn from the set.
        seed (int): Of what is drawn. Defaults to 0.

    Returns:
        list[tuple[str, float]]: Names and seconds for one picture: reading its
        record, the steps in their order, and making batches of them.

    Raises:
        ValueError: If the data set has no pipeline of its own, or drops one picture
            after the other.
    """
    dataset = _innermost(loader.dataset)
    transforms = dataset.pipeline.transforms
    names = ['record', *(type(t).__name__ for t in transforms), 'collate']
    seconds = defaultdict(float)
    generator = torch.Generator().manual_seed(seed)
    done: list[dict] = []
    tries = 0
    while len(done) < samples:
        tries += 1
        if tries > samples + TRIES:
            raise ValueError(
                f'the pipeline has dropped {tries - 1 - len(done)} of {tries - 1} '
                'pictures'
            )
        index = int(torch.randint(len(dataset), (1,), generator=generator))
        times = []
        start = time.perf_counter()
        data = dataset.get_data_info(index)
        times.append(time.perf_counter() - start)
        for transform in transforms:
            start = time.perf_counter()
            data = transform(data)
            times.append(time.perf_counter() - start)
            if data is None:
                break
        else:
            done.append(data)
            for i, passed in enumerate(times):
                seconds[i] += passed
    size = loader.batch_size or 1
    start = time.perf_counter()
    for i in range(0, samples, size):
        loader.collate_fn(done[i : i + size])
    seconds[len(names) - 1] = time.perf_counter() - start
    return [(name, seconds[i] / samples) for i, name in enumerate(names)]


def _innermost(dataset: Dataset) -> Dataset:
    """Go through wrappers such as RepeatDataset; of several sets, the first."""
    while not hasattr(getattr(dataset, 'pipeline', None), 'transforms'):
        inner = getattr(dataset, 'dataset', None)
        inner = inner or next(iter(getattr(dataset, 'datasets', [])), None)
        if inner is None:
            raise ValueError(f'{type(dataset).__name__} has no pipeline to time')
        dataset = inner
    return dataset


def describe_need(times: Sequence[LoadingTime], step: float, batch_size: int) -> str:
    """Say which number of processes keeps up with a training step.

    Args:
        times (Sequence[LoadingTime]): What was measured.
        step (float): Seconds of the step.
        batch_size (int): Number of pictures in it.

    Returns:
        str: A line.
    """
    alone = min(times, key=lambda t: t.workers)
    need = needed_workers(alone.batch * max(alone.workers, 1), step)
    enough = [t.workers for t in times if t.batch <= step]
    seen = f'{min(enough)} did here' if enough else 'none of those measured did'
    return (
        f'A step of {step:g} s with {batch_size} pictures needs {need} '
        f'{"process" if need == 1 else "processes"}, each with a core of its own; '
        f'{seen}.'
    )
