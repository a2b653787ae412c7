"""Batches of chips: their order is a function of seed and epoch alone; reading runs ahead of training."""

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
from torch.nn.functional import pad

from rayseg.errors import DataError

Array = NDArray[Any]
Read = Callable[[int], Array]
Indices = NDArray[np.int64]
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Chips:
    """Labelled training images, read one by one on demand.

    Attributes:
        ids: of the chips, for messages.
        labels: class of every chip, 0..K-1.
        read: position -> image (height, width, bands), all of one shape and data type.
        read_mask: position -> mask (height, width), uint8, of the images' size; None without masks.
        classes: K, if some classes may be missing among the labels.
    """

    ids: tuple[str, ...]
    labels: tuple[int, ...]
    read: Read
    read_mask: Read | None = None
    classes: int | None = None

    def __post_init__(self) -> None:
        if len(self.ids) != len(self.labels):
            raise DataError(f"{len(self.ids)} chip ids but {len(self.labels)} labels; give one label per chip")

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def count(self) -> int:
        """Number of classes."""
        return self.classes or max(self.labels) + 1

    def pairs(self) -> Iterator[tuple[Array, Array | None]]:
        """Image (bands, height, width) and mask of each chip, or None."""
        for position in range(len(self)):
            yield self.read(position).transpose(2, 0, 1), self.read_mask(position) if self.read_mask else None

    @classmethod
    def of_arrays(
        cls, ids: Sequence[str], labels: Sequence[int], images_NHWC: Array, masks_NHW: Array | None
    ) -> "Chips":
        """Chips in memory."""
        # Bound methods of arrays are picklable, so such chips reach the workers.
        read_mask = None if masks_NHW is None else masks_NHW.__getitem__
        return cls(tuple(ids), tuple(labels), images_NHWC.__getitem__, read_mask)

    def where(self, label: int) -> Indices:
        """Positions of the chips of a class."""
        return np.flatnonzero(np.array(self.labels) == label)

    def where_not(self, label: int) -> Indices:
        """Positions of the chips of all other classes."""
        return np.flatnonzero(np.array(self.labels) != label)


class Kept:
    """`read` with results kept in memory until they fill `limit` bytes; the first ones stay.

    Every chip is read once per epoch in a new order, so this hits more often than dropping the oldest would.
    """

    def __init__(self, read: Read, *, limit: int) -> None:
        self._read = read
        self._limit = limit
        self._kept: dict[int, Array] = {}
        self._lock = threading.Lock()

    def __call__(self, position: int) -> Array:
        """The array at `position`, read or kept."""
        array = self._kept.get(position)
        if array is None:
            array = self._read(position)
            with self._lock:
                if array.nbytes <= self._limit and position not in self._kept:
                    self._kept[position] = array
                    self._limit -= array.nbytes
        return array


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
    """The batches of one epoch for one worker: one pass over the positives, with negatives in an endless loop.

    Every worker has its own fixed shard of the chips and the same number of batches. The positives are shuffled
    every epoch; the last batch is filled up from the front. The negatives are one endless row of shuffled passes that
    continues from epoch to epoch, so all of them are used equally often.

    Args:
        positives: positions of the chips of one pass.
        negatives: positions of the other chips; may be empty if their count is 0.
        counts: positives and negatives in each batch of this worker.
        seed: of the training.
        epoch: from 0.
        rank: number of this worker.
        world: number of workers.

    Raises:
        DataError: there are fewer positives, or negatives, than workers.
    """
    # 1. this worker's chips
    shards = [shard(chips, seed=seed, rank=rank, world=world) for chips in (positives, negatives)]
    for own, count, kind in zip(shards, counts, ("positive", "negative"), strict=True):
        if count and not len(own):
            raise DataError(f"worker {rank} of {world} has no {kind} chips; add {kind} chips or use fewer workers")
    # 2. as many batches as the largest shard needs: workers exchange gradients at every step
    longest = -(-len(positives) // world)
    batches = -(-longest // counts[0])
    order = [endless(shards[0], 0, batches * counts[0], seed=(seed, 1, rank, epoch))]
    if counts[1]:
        needed = batches * counts[1]
        order.append(endless(shards[1], epoch * needed, needed, seed=(seed, 2, rank)))
    # 3. positives first in each batch
    parts = [chips.reshape(batches, -1) for chips in order]
    return list(np.concatenate(parts, axis=1))


def shard(chips: Indices, *, seed: int, rank: int, world: int) -> Indices:
    """This worker's chips, the same for the whole training."""
    return np.random.default_rng((seed, 0)).permutation(chips)[rank::world] if world > 1 else chips


def endless(chips: Indices, start: int, count: int, *, seed: tuple[int, ...]) -> Indices:
    """`count` members from position `start` of an endless row of shuffled passes over `chips`.

    The row depends on `seed` and `chips` alone, so a training resumed at a position sees the same chips.
    """
    first, last = start // len(chips), (start + count - 1) // len(chips)
    passes = [np.random.default_rng((*seed, number)).permutation(chips) for number in range(first, last + 1)]
    offset = start - first * len(chips)
    return np.concatenate(passes)[offset : offset + count]


@dataclass(frozen=True)
class Batch:
    """One batch as read, in the chips' data types; masks_NMHW is None without masks."""

    chips: Indices
    images_NCHW: Tensor
    masks_NMHW: Tensor | None


def read_ahead(
    batches: Iterable[Indices], read: Read, read_mask: Read | None = None, *, threads: int = 2, ahead: int = 2
) -> Iterator[Batch]:
    """Read the batches in order, `ahead` of them while earlier ones are in use.

    `read_mask` returns one mask (height, width) per chip, or several (M, height, width).

    Raises:
        DataError: the images of a batch have different shapes.
    """
    return made_ahead(partial(_read_batch, read, read_mask), batches, threads=threads, count=ahead)


def made_ahead(make: Callable[[T], R], items: Iterable[T], *, threads: int, count: int) -> Generator[R, None, None]:
    """Results of `make` for all items, in order; `count` are ready, or in work, before they are needed."""
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(make, item))
                # In order: results wait for the slowest of those before them.
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def whole_units(images_NCHW: Tensor, unit: int) -> Tensor:
    """Images padded at their lower and right edges to sides that are multiples of `unit` px.

    They are mirrored there, as black borders would change the features near them; of an image that is too small for
    that, the last pixels are repeated.
    """
    height, width = images_NCHW.shape[2:]
    below, right = -height % unit, -width % unit
    mode = "reflect" if below < height and right < width else "replicate"
    return pad(images_NCHW, (0, right, 0, below), mode=mode)


def _read_batch(read: Read, read_mask: Read | None, chips: Indices) -> Batch:
    images = [read(int(position)) for position in chips]
    shapes = sorted({image.shape for image in images})
    if len(shapes) > 1:
        raise DataError(f"chips of shapes {shapes} cannot be one batch; read all chips at one size with the same bands")
    images_NHWC = np.stack(images)
    if images_NHWC.dtype != np.uint8:  # uint8 stays as it is, small on its way to the device
        images_NHWC = images_NHWC.astype(np.float32)
    images_NCHW = torch.from_numpy(images_NHWC).permute(0, 3, 1, 2)
    if read_mask is None:
        return Batch(chips, images_NCHW, None)
    masks = torch.from_numpy(np.stack([read_mask(int(position)) for position in chips]))
    return Batch(chips, images_NCHW, masks if masks.ndim == 4 else masks[:, None])
