"""Batches of chips: who comes when is a function of seed and epoch alone; reading runs ahead of training."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rayseg.errors import DataError

Array = NDArray[Any]
Read = Callable[[int], Array]
Indices = NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Chips:
    """Labelled training images, read one by one when they are needed.

    Attributes:
        ids: of the chips, for messages.
        labels: class of every chip, 0..K-1.
        read: position -> image (height, width, bands), all of one shape and data type.
        read_mask: position -> mask (height, width), uint8, of the images' size; None where there are none.
        classes: K, where not every class need be among the labels.
    """

    ids: tuple[str, ...]
    labels: tuple[int, ...]
    read: Read
    read_mask: Read | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise DataError(f"{len(self.ids)} chip ids but {len(self.labels)} labels: give one label per chip")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.classes or max(self.labels) + 1

    @classmethod
    def of_arrays(
        cls, ids: Sequence[str], labels: Sequence[int], images_NHWC: Array, masks_NHW: Array | None
    ) -> "Chips":
        """Chips that lie in memory."""
        read_mask = None if masks_NHW is None else partial(_at, masks_NHW)
        return cls(tuple(ids), tuple(labels), partial(_at, images_NHWC), read_mask)

    def where(self, label: int) -> Indices:
        """Positions of the chips of a class."""
        return np.flatnonzero(np.array(self.labels) == label)

    def where_not(self, label: int) -> Indices:
        """Positions of the chips of all other classes."""
        return np.flatnonzero(np.array(self.labels) != label)


def _at(arrays: Array, position: int) -> Array:
    found: Array = arrays[position]
    return found


class Kept:
    """`read`, with results kept in memory until they fill `limit` bytes; what came first stays.

    With every chip read once per epoch in a new order this hits more often than dropping the oldest would.
    """

    def __init__(self, read: Read, *, limit: int) -> None:
        self._read = read
        self._limit = limit
        self._kept: dict[int, Array] = {}
        self._lock = threading.Lock()

    def __call__(self, position: int) -> Array:
        """The array at `position`, read or kept."""
        found = self._kept.get(position)
        if found is None:
            found = self._read(position)
            with self._lock:
                if found.nbytes <= self._limit and position not in self._kept:
                    self._kept[position] = found
                    self._limit -= found.nbytes
        return found


def epoch_batches(
    positives: Indices,
    negatives: Indices,
    *,
    counts: tuple[int, int],
    seed: int,
    epoch: int,
    rank: int = 0,
    world: int = 1,
) -> list[Indices]:
    """The batches of one epoch for one worker: one pass over the positives, negatives in a loop beside them.

    Every worker has its own fixed shard of the chips and the same number of batches. The positives are shuffled anew
    each epoch; the last batch is filled up from the front. The negatives are one endless row of shuffled passes that
    goes on from epoch to epoch, so all of them are used equally often.

    Args:
        positives: positions of the chips an epoch passes over.
        negatives: positions of the chips drawn beside them; may be empty if their count is 0.
        counts: positives and negatives in each batch of this worker.
        seed: of the whole training.
        epoch: from 0.
        rank: this worker's number.
        world: number of workers.

    Raises:
        DataError: there are fewer positives, or negatives, than workers that need some.
    """
    shards = [shard(chips, seed=seed, rank=rank, world=world) for chips in (positives, negatives)]
    for own, count, kind in zip(shards, counts, ("positive", "negative"), strict=True):
        if count and not len(own):
            raise DataError(f"worker {rank} of {world} has no {kind} chips; add {kind} chips or use fewer workers")
    batches = -(-_longest(len(positives), world) // counts[0])
    order = [endless(shards[0], 0, batches * counts[0], seed=(seed, 1, rank, epoch))]
    if counts[1]:
        needed = batches * counts[1]
        order.append(endless(shards[1], epoch * needed, needed, seed=(seed, 2, rank)))
    parts = [chips.reshape(batches, -1) for chips in order]
    return list(np.concatenate(parts, axis=1))


def shard(chips: Indices, *, seed: int, rank: int, world: int) -> Indices:
    """The chips that are this worker's for the whole training."""
    return np.random.default_rng((seed, 0)).permutation(chips)[rank::world] if world > 1 else chips


def _longest(chips: int, world: int) -> int:
    return -(-chips // world)


def endless(chips: Indices, start: int, count: int, *, seed: tuple[int, ...]) -> Indices:
    """`count` members from position `start` of an endless row of shuffled passes over `chips`.

    The row depends on `seed` and `chips` alone, so a training that goes on at a position meets what it would have met.
    """
    first, last = start // len(chips), (start + count - 1) // len(chips)
    passes = [np.random.default_rng((*seed, number)).permutation(chips) for number in range(first, last + 1)]
    offset = start - first * len(chips)
    return np.concatenate(passes)[offset : offset + count]


@dataclass(frozen=True)
class Batch:
    """One batch as read, in the chips' own data types; masks_NMHW is None without masks."""

    chips: Indices
    images_NCHW: Tensor
    masks_NMHW: Tensor | None


def read_ahead(
    batches: Iterable[Indices], read: Read, read_mask: Read | None = None, *, threads: int = 2, ahead: int = 2
) -> Iterator[Batch]:
    """Read the batches in order, `ahead` of them while earlier ones are in use.

    `read_mask` gives one mask (height, width) per chip, or several (M, height, width).

    Raises:
        DataError: the images of a batch have different shapes.
    """
    return made_ahead(partial(_read_batch, read, read_mask), batches, threads=threads, count=ahead)


def made_ahead(make: Callable[[T], R], items: Iterable[T], *, threads: int, count: int) -> Generator[R, None, None]:
    """What `make` gives of every item, in order; `count` are ready, or in work, before they are asked for."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _read_batch(read: Read, read_mask: Read | None, chips: Indices) -> Batch:
    images = [read(int(position)) for position in chips]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise DataError(f"chips of shapes {shapes} cannot be one batch: read all chips at one size with the same bands")
    images_NCHW = torch.from_numpy(_torchable(np.stack(images))).permute(0, 3, 1, 2)
    if read_mask is None:
        return Batch(chips, images_NCHW, None)
    masks = torch.from_numpy(np.stack([read_mask(int(position)) for position in chips]))
    return Batch(chips, images_NCHW, masks if masks.ndim == 4 else masks[:, None])


def _torchable(images_NHWC: Array) -> Array:
    """uint8 as it is, to be sent to the device small; everything else as float32."""
    return images_NHWC if images_NHWC.dtype == np.uint8 else images_NHWC.astype(np.float32)
