"""Loaders and loops that go on from the middle of the data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice

from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch.utils.data import DataLoader

from ._mmengine import endless_iterator, train_loader_settings

__all__ = ['AdvancedIterator', 'Remainder', 'build_loader_again', 'shift_batch_index']


def build_loader_again(runner: Runner, loop: BaseLoop, seed: int) -> None:
    """Give the samplers the seed of the first start, and none of its batches.

    Args:
        runner (Runner): The runner.
        loop (BaseLoop): Its training; it gets another ``dataloader`` with the same
            data set, unless the caller has built the loader.
        seed (int): The seed.
    """
    settings = train_loader_settings(runner)
    if not isinstance(settings, dict):
        # Built by the caller, who knows the seed.
        return
    settings = dict(settings)
    settings['dataset'] = loop.dataloader.dataset
    diff_rank_seed = runner.cfg.get('randomness', {}).get('diff_rank_seed', False)
    loop.dataloader = runner.build_dataloader(
        settings, seed=seed, diff_rank_seed=diff_rank_seed
    )


def shift_batch_index(loop: EpochBasedTrainLoop, batches: int) -> None:
    """Let the hooks of this epoch see the index of the batch in the whole epoch.

    Args:
        loop (EpochBasedTrainLoop): It is changed until the epoch ends.
        batches (int): How many batches the epoch has had.
    """
    run_iter, run_epoch = loop.run_iter, loop.run_epoch

    def run_shifted(idx: int, data_batch: object) -> None:
        run_iter(idx + batches, data_batch)

    def run_first_epoch() -> None:
        try:
            run_epoch()
        finally:
            del loop.run_iter, loop.run_epoch

    loop.run_iter, loop.run_epoch = run_shifted, run_first_epoch


class Remainder:
    """A batch sampler whose first round is what is left of one.

    Args:
        loader (DataLoader): One that has not been used. It gets the new sampler.
        rest (Callable): Returns the batches that are left.
        begin (Callable): Called before the first batch, once the loader has drawn
            the random number that it begins with.
    """

    def __init__(
        self,
        loader: DataLoader,
        rest: Callable[[], Iterator],
        begin: Callable[[], None],
    ) -> None:
        self.batch_sampler = loader.batch_sampler
        self.first = (rest, begin)
        # torch forbids the assignment, lest a sampler change under a loader in use.
        vars(loader)['batch_sampler'] = self

    @classmethod
    def of_epoch(
        cls, loader: DataLoader, count: int, begin: Callable[[], None]
    ) -> None:
        """Skip batches of the first epoch, of which the sampler hears later.

        Args:
            loader (DataLoader): It is changed.
            count (int): How many to skip.
            begin (Callable): See above.
        """
        whole = loader.batch_sampler
        cls(loader, lambda: islice(iter(whole), count, None), begin)

    @classmethod
    def of_passes(
        cls, loader: DataLoader, count: int, begin: Callable[[], None]
    ) -> int:
        """Skip batches of a loader that is begun again whenever it ends.

        Args:
            loader (DataLoader): It is changed.
            count (int): How many to skip.
            begin (Callable): See above.

        Returns:
            int: How often it has ended.
        """
        whole, passes = loader.batch_sampler, 0
        batches = iter(whole)
        for _ in range(count):
            if next(batches, None) is None:
                passes += 1
                _set_epoch(loader, passes)
                batches = iter(whole)
                next(batches)
        cls(loader, lambda: batches, begin)
        return passes

    def __iter__(self) -> Iterator:
        if self.first is None:
            yield from self.batch_sampler
            return
        (rest, begin), self.first = self.first, None
        batches = rest()
        begin()
        yield from batches

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __getattr__(self, name: str) -> object:
        if name == 'batch_sampler':
            raise AttributeError(name)
        return getattr(self.batch_sampler, name)


def _set_epoch(loader: DataLoader, epoch: int) -> None:
    for sampler in (loader.sampler, getattr(loader.batch_sampler, 'sampler', None)):
        if hasattr(sampler, 'set_epoch'):
            sampler.set_epoch(epoch)
            return


class AdvancedIterator:
    """The endless iterator of an iteration-based loop, already where it belongs.

    The loop advances it by as many batches as have been trained; of those, none is
    loaded.
    """

    def __init__(self, loop: IterBasedTrainLoop, passes: int) -> None:
        # What the loop has made for itself, for another loader.
        self.batches = endless_iterator(loop, passes)
        # A loop that skips by the sampler asks for none.
        by_sampler = getattr(loop, 'fast_forward_on_resume', False)
        self.to_skip = 0 if by_sampler else loop.iter

    def skip_iter(self, num_iters: int) -> None:
        """Do what the loop of newer versions asks for: nothing is left to skip."""
        self.to_skip = 0

    def __iter__(self) -> AdvancedIterator:
        return self

    def __next__(self) -> object:
        if self.to_skip:
            self.to_skip -= 1
            return None
        return next(self.batches)

    def __getattr__(self, name: str) -> object:
        if name == 'batches':
            raise AttributeError(name)
        return getattr(self.batches, name)
