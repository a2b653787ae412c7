"""Short trainings from which the duration of whole ones is estimated.

Inside `taken` every pass of a training ends after a few batches and few passes are made; the estimated seconds of the
skipped ones are added up. Elsewhere nothing is skipped.
"""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

T = TypeVar("T")
WARM, TIMED = 4, 3
"""Batches of each pass that are computed: until those read ahead are used up, and then those that are timed."""


@dataclass
class Sample:
    """The skipped part of the trainings so far."""

    left_out: float = 0.0
    """Estimated seconds."""
    epochs: int = 0
    """Number of epochs."""
    cut: int = 0
    """Passes that were shortened."""
    once: float = 0.0
    """Seconds of whole passes that later epochs do not repeat."""


_TAKEN: ContextVar[Sample | None] = ContextVar("sample", default=None)


@contextmanager
def taken() -> Iterator[Sample]:
    """Shorten the trainings inside this block, in its own thread."""
    sample = Sample()
    token = _TAKEN.set(sample)
    try:
        yield sample
    finally:
        _TAKEN.reset(token)


def is_taken() -> bool:
    """Whether trainings are shortened."""
    return _TAKEN.get() is not None


def epochs(numbers: range, *, count: float | None = None) -> Iterator[int]:
    """The numbers of epochs; in a sample only the first, or the first two if no pass of the first was shortened.

    The time of the last one is taken for each that follows; there are `count` whole ones, if the very last is shorter.
    """
    sample = _TAKEN.get()
    if sample is None:
        yield from numbers
        return
    whole, done = 0.0, 0
    for done, number in enumerate(numbers[:2], 1):
        began, before, cut = time.perf_counter(), sample.left_out - sample.once, sample.cut
        yield number
        sample.epochs += 1
        whole = time.perf_counter() - began + sample.left_out - sample.once - before
        if sample.cut > cut or done == 2:
            break
    sample.left_out += whole * max(0.0, (len(numbers) if count is None else count) - done)


def batches(items: Iterable[T], count: int, *, share: float = 1.0, once: bool = False) -> Iterator[T]:
    """The batches of a pass; in a sample the first few, whose last ones give the pace of all `count`.

    Args:
        items: the batches.
        count: their number.
        share: of the epochs that make the pass.
        once: the first epoch makes the pass, later ones do not.
    """
    sample = _TAKEN.get()
    if sample is None:
        yield from items
        return
    # The first batches are slower, as caches and kernels warm up: they do not count in the pace.
    ends = [time.perf_counter()]
    try:
        for item in islice(items, WARM + TIMED):
            yield item
            ends.append(time.perf_counter())
    finally:
        took = whole = time.perf_counter() - ends[0]
        if count > len(ends) - 1 == WARM + TIMED:
            sample.cut += 1
            whole = (ends[-1] - ends[WARM]) / TIMED * count
        sample.left_out += whole * share - took
        sample.once += whole if once else 0.0
