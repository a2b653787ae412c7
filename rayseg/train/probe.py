"""Trainings cut short, to tell what the whole of them would take.

Inside `taken` the passes of a training end after a few batches and few passes are made; the seconds that were left out
are added up. Elsewhere nothing is left out.
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
"""Batches of each pass that are computed: until those that were read ahead are used up, and then for the pace."""


@dataclass
class Sample:
    """What was left out of trainings so far, in seconds."""

    left_out: float = 0.0
    epochs: int = 0
    """That were made."""
    cut: int = 0
    """Passes that were."""
    once: float = 0.0
    """Seconds of whole passes that no further epoch makes."""


_TAKEN: ContextVar[Sample | None] = ContextVar("sample", default=None)


@contextmanager
def taken() -> Iterator[Sample]:
    """Cut the trainings inside this block short, in its own thread."""
    sample = Sample()
    token = _TAKEN.set(sample)
    try:
        yield sample
    finally:
        _TAKEN.reset(token)


def is_taken() -> bool:
    """Whether trainings are cut short."""
    return _TAKEN.get() is not None


def epochs(numbers: range, *, count: float | None = None) -> Iterator[int]:
    """The numbers of epochs; of a sample the first alone, or the first two where it had nothing that could be cut.

    The last of them stands for all that follow. They are `count` whole ones together if their last is a shorter one.
    """
    sample = _TAKEN.get()
    if sample is None:
        yield from numbers
        return
    whole, made = 0.0, 0
    for made, number in enumerate(numbers[:2], 1):
        began, before, cut = time.perf_counter(), sample.left_out - sample.once, sample.cut
        yield number
        sample.epochs += 1
        whole = time.perf_counter() - began + sample.left_out - sample.once - before
        if sample.cut > cut or made == 2:
            break
    sample.left_out += whole * max(0.0, (len(numbers) if count is None else count) - made)


def batches(items: Iterable[T], count: int, *, share: float = 1.0, once: bool = False) -> Iterator[T]:
    """The batches of a pass; of a sample the first few, and of all `count` each takes as long as the last of these.

    `share` is that of the epochs in which the pass is made; or it is made `once` in all of them.
    """
    sample = _TAKEN.get()
    if sample is None:
        yield from items
        return
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
