"""The data of supervised training: which windows of which images come in which order, and how they reach the device.

The windows of an epoch depend on seed and epoch alone, not on the number of workers: each worker takes its part of
every batch, and each window carries the seed of its own augmentation. Windows are read straight from the images' files,
by tasks of Ray Data anywhere in the cluster or by threads of this process; nothing is written in between.
"""

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice, repeat, takewhile
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Generator, Tensor

from rayseg.config import Config, added
from rayseg.errors import DataError
from rayseg.geo.grid import Window
from rayseg.io.scenes import LabelledImage, read_window
from rayseg.train.augment import Augment, augment, resized
from rayseg.train.batches import made_ahead
from rayseg.vision.color import ClassTable

Pixels = NDArray[Any]
Counts = NDArray[np.int64]
PER_BLOCK = 4
"""Batches that a task of Ray Data reads: a block costs it about 20 ms, whatever its content."""


class Sampling(Config):
    """Which windows are drawn."""

    size: Annotated[int, Field(gt=0, multiple_of=32)] = 512
    """Side in px of a window as the network sees it; `augment.scale` sets the side on the image."""
    rare: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the windows placed over a pixel of a class drawn evenly from all; the others are placed anywhere."""
    windows: Annotated[int, Field(gt=0)] | None = None
    """Windows per epoch; by default as many as cover the images once."""
    whole: bool = added(default=False)
    """Show whole images, scaled to `size`, instead of windows, as the published code does; `rare` and `augment.scale`
    then have no effect. The map sees imagery at its own resolution all the same."""
    cell: Annotated[int, Field(gt=0)] = 64
    """Side in px of the cells in which classes are counted for `rare`."""


@dataclass(frozen=True)
class Draw:
    """One window to read.

    Attributes:
        image: position of the image.
        window: on its grid; may reach beyond the image.
        seed: of its augmentation.
    """

    image: int
    window: Window
    seed: int = 0


@dataclass(frozen=True)
class Cut:
    """A window as read: image_CHW in the imagery's data type, classes_HW uint8 with 255 = not labelled."""

    draw: Draw
    image_CHW: Pixels
    classes_HW: NDArray[np.uint8]


Step = tuple[Draw, ...]
Read = Callable[[Draw], Cut]


@dataclass(frozen=True)
class Windows:
    """Reads windows of labelled images; picklable.

    Attributes:
        images: labelled or not.
        bands: in the model's order.
        table: classes of the masks; None if no image is labelled.
    """

    images: tuple[LabelledImage, ...]
    bands: tuple[str, ...]
    table: ClassTable | None

    def __call__(self, draw: Draw) -> Cut:
        """The window's pixels.

        Raises:
            DataError: they cannot be read, or the mask contains a value that is not a class.
        """
        return Cut(draw, *read_window(self.images[draw.image], draw.window, bands=self.bands, table=self.table))

    def names(self, draws: Iterable[Draw]) -> str:
        """Images and places of windows, for messages."""
        return "images " + ", ".join(
            f"{self.images[draw.image].id} at ({draw.window.row}, {draw.window.col})" for draw in draws
        )


# -- drawing ----------------------------------------------------------------------------------------------------------


def windows_per_epoch(images: Sequence[LabelledImage], sampling: Sampling, batch: int) -> int:
    """Number of windows in an epoch, rounded up to whole batches."""
    pixels = sum(image.window.height * image.window.width for image in images)
    once = len(images) if sampling.whole else pixels // sampling.size**2 + 1
    return -(-(sampling.windows or once) // batch) * batch


def draw_epoch(
    images: Sequence[LabelledImage],
    counts: Sequence[Counts],
    sampling: Sampling,
    augment: Augment,
    *,
    batch: int,
    seed: int,
    epoch: int,
) -> list[Step]:
    """The batches of an epoch, for all workers together.

    Windows placed anywhere come from each image in proportion to its area. Their side is `sampling.size` divided by a
    magnification drawn from `augment.scale`, at most the image's shorter side.

    Args:
        images: to draw from.
        counts: of each image, pixels by cell and class (rows, cols, classes), as from `count_classes`; unused
            without `rare`.
        sampling: how windows are drawn.
        augment: how windows are magnified, and whether they are placed anywhere or in the middle.
        batch: windows per batch.
        seed: of the training.
        epoch: from 0.
    """
    rng = np.random.default_rng((seed, 11, epoch))
    total = windows_per_epoch(images, sampling, batch)
    if sampling.whole:
        passes = [rng.permutation(len(images)) for _ in range(-(-total // len(images)))]
        order = np.concatenate(passes)[:total].tolist()
        whole_images = [Draw(at, images[at].window, seed=int(rng.integers(2**62))) for at in order]
        return [tuple(whole_images[start : start + batch]) for start in range(0, total, batch)]
    area = np.array([image.window.height * image.window.width for image in images], float)
    # The order of draws is part of the contract: a resumed epoch shows the windows it would have shown.
    chosen = rng.choice(len(images), total, p=area / area.sum())
    # 1. windows over rare classes replace some of those placed anywhere
    around = _around_rare(counts, sampling, rng, total) if sampling.rare else {}
    # 2. side, corner and augmentation of each
    draws = []
    for number, anywhere in enumerate(chosen):
        image, at = around.get(number, (int(anywhere), None))
        whole = images[image].window
        low, high = augment.scale
        side = min(round(sampling.size / rng.uniform(low, high)), whole.height, whole.width)
        corner = _corner(whole, at, side, augment.crop, rng.random(2))
        window = Window(whole.col + corner[1], whole.row + corner[0], side, side)
        draws.append(Draw(image, window, seed=int(rng.integers(2**62))))
    return [tuple(draws[start : start + batch]) for start in range(0, total, batch)]


def _corner(
    whole: Window, at: tuple[float, float] | None, side: int, crop: Literal["centre", "random"], uniform: NDArray[Any]
) -> tuple[int, int]:
    """(row, col) of a window's corner in the image: anywhere, or so that the window covers the place `at`."""
    spare = (whole.height - side, whole.width - side)
    if crop == "centre":
        return spare[0] // 2, spare[1] // 2
    if at is None:
        return int(uniform[0] * (spare[0] + 1)), int(uniform[1] * (spare[1] + 1))
    row, col = (
        int(np.clip(place - share * side, 0, most)) for place, share, most in zip(at, uniform, spare, strict=True)
    )
    return row, col


def _around_rare(
    counts: Sequence[Counts], sampling: Sampling, rng: np.random.Generator, total: int
) -> dict[int, tuple[int, tuple[float, float]]]:
    """Number of a window -> (image, (row, col) in it) in a cell with a class drawn evenly from all present."""
    # The cells of all images in one list, so that a large image is drawn more often.
    shapes = [cells.shape[:2] for cells in counts]
    cells_NK = np.concatenate([cells.reshape(-1, cells.shape[-1]) for cells in counts]).astype(float)
    present = np.flatnonzero(cells_NK.sum(axis=0))
    first = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
    picked = {}
    for number in np.flatnonzero(rng.random(total) < sampling.rare):
        # A cell is drawn by its number of pixels of the class.
        of_class_N = cells_NK[:, rng.choice(present)].cumsum()
        cell = int(np.searchsorted(of_class_N, rng.random() * of_class_N[-1], side="right"))
        image = int(np.searchsorted(first, cell, side="right")) - 1
        row, col = divmod(cell - int(first[image]), shapes[image][1])
        place = (np.array([row, col]) + rng.random(2)) * sampling.cell
        picked[int(number)] = (image, (float(place[0]), float(place[1])))
    return picked


def part_of(steps: Sequence[Step], *, rank: int, world: int) -> list[Step]:
    """A worker's part of every batch; the parts are of equal size and together make the batch."""
    return [step[rank * len(step) // world : (rank + 1) * len(step) // world] for step in steps]


def cover(images: Sequence[LabelledImage], *, size: int, batch: int, rank: int = 0, world: int = 1) -> list[Step]:
    """Adjacent windows that cover all images once, every `world`-th of them for this worker, in batches."""
    draws = [
        Draw(position, Window(col, row, size, size))
        for position, image in enumerate(images)
        for row in range(image.window.row, image.window.row1, size)
        for col in range(image.window.col, image.window.col1, size)
    ][rank::world]
    return [tuple(draws[start : start + batch]) for start in range(0, len(draws), batch)]


def spread(images: Sequence[LabelledImage], *, size: int, most: int | None = None) -> list[Draw]:
    """Adjacent windows that cover the images once; at most `most` of them, evenly spread over all.

    A window at an image's edge ends there, or up to 31 px beyond, so that its sides are multiples of 32.
    """
    draws = []
    for [draw] in cover(images, size=size, batch=1):
        whole, window = images[draw.image].window, draw.window
        height, width = (min(size, -(-left // 32) * 32) for left in (whole.row1 - window.row, whole.col1 - window.col))
        draws.append(Draw(draw.image, Window(window.col, window.row, width, height)))
    places = np.linspace(0, len(draws) - 1, min(most or len(draws), len(draws))).round().astype(int)
    return [draws[place] for place in places]


# -- reading ----------------------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    """Seconds that a loop has waited for its data, and since when they are counted."""

    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def share(self) -> float:
        """Share of the time spent waiting; restarts the count."""
        now = time.perf_counter()
        share = self.seconds / max(now - self.since, 1e-9)
        self.seconds, self.since = 0.0, now
        return share


def stream(
    steps: Iterable[Sequence[Step]], read: Read, *, on_ray: bool, threads: int = 2, ahead: int = 3
) -> Iterator[list[Cut]]:
    """Read batches in order, some of them while earlier ones are in use, also across the ends of epochs.

    Args:
        steps: batches, epoch by epoch; an epoch is drawn when the one before is nearly used up.
        read: of every window; picklable.
        on_ray: read in tasks of Ray Data on the CPUs of the connected cluster; else in threads.
        threads: of this process, if not `on_ray`.
        ahead: batches that are ready, or in work, before they are needed.

    Raises:
        DataError: a window cannot be read.
    """
    if not on_ray:
        for epoch in steps:
            draws = (draw for step in epoch for draw in step)
            count = ahead * max(map(len, epoch), default=0)
            with closing(made_ahead(read, draws, threads=threads, count=count)) as cuts:
                for step in epoch:
                    yield list(islice(cuts, len(step)))
        return
    # Another thread starts the tasks of the next epoch while the last batches of this one are in use.
    batches = (batch for epoch in steps for batch in _by_ray(epoch, read))
    with closing(made_ahead(lambda _: next(batches, None), repeat(None), threads=1, count=ahead)) as coming:
        yield from takewhile(lambda batch: batch is not None, coming)


def timed(batches: Iterator[list[Cut]], waiting: Waiting) -> Iterator[list[Cut]]:
    """The same batches; the time to wait for each is added to `waiting`."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        waiting.seconds += time.perf_counter() - began
        if batch is None:
            return
        yield batch


def _by_ray(steps: Sequence[Step], read: Read) -> Iterator[list[Cut]]:
    """Batches from blocks of several, in order; each block is read by a task of half a CPU."""
    import ray.data

    numbers = ray.data.range(len(steps), override_num_blocks=-(-len(steps) // PER_BLOCK))
    table = numbers.map_batches(_ReadSteps(read, steps), batch_size=None, batch_format="pyarrow", num_cpus=0.5)
    # The context of this dataset alone: the process's settings are not ours.
    table.context.enable_progress_bars = False
    table.context.print_on_execution_start = False
    table.context.max_errored_blocks = 0
    table.context.execution_options.preserve_order = True
    for block in table.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for packed in block["cuts"]:
            content: list[Cut] | str = pickle.loads(packed.as_buffer())  # our own windows, from the task before
            if isinstance(content, str):
                raise DataError(content)
            yield content


class _ReadSteps:
    """`id -> cuts`: the windows of batches, pickled; or the message of the DataError of one of them."""

    def __init__(self, read: Read, steps: Sequence[Step]) -> None:
        self.read = read
        self.steps = list(steps)

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """Read the batches with these numbers."""
        packed = []
        for number in numbers["id"]:
            try:
                content: list[Cut] | str = [self.read(draw) for draw in self.steps[int(number)]]
            except DataError as error:
                content = str(error)
            packed.append(pickle.dumps(content, protocol=5))
        return pa.table({"cuts": pa.array(packed, pa.large_binary())})


# -- on the device ----------------------------------------------------------------------------------------------------


def to_device(cuts: Sequence[Cut], augmenting: Augment, device: torch.device, *, size: int) -> tuple[Tensor, Tensor]:
    """Send a batch to the device, and resize and augment its windows there.

    The augmentation of a window depends on its own seed, not on the other windows.

    Returns:
        images (N, C, size, size) float32 with the imagery's values, and classes (N, size, size) int64.
    """
    # Windows travel at their own size and data type: uint8 is a quarter of float32.
    images = torch.stack([resized(_sent(cut.image_CHW, device).float(), (size, size), smooth=True) for cut in cuts])
    classes = torch.stack(
        [resized(_sent(cut.classes_HW[None], device).float(), (size, size), smooth=False) for cut in cuts]
    )
    generators = [Generator().manual_seed(cut.draw.seed) for cut in cuts]
    still = augmenting.model_copy(update={"scale": (1.0, 1.0), "crop": "centre"})  # drawn already
    changed, masks = augment(images, classes, still, generators, size=size)
    assert masks is not None
    return changed, masks[:, 0].long()


def as_read(cuts: Sequence[Cut], device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and classes of windows of one size, as `to_device` returns them but not augmented."""
    images = torch.stack([_sent(cut.image_CHW, device).float() for cut in cuts])
    return images, torch.stack([_sent(cut.classes_HW, device) for cut in cuts]).long()


def _sent(array: Pixels, device: torch.device) -> Tensor:
    plain = array if array.dtype == np.uint8 else array.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(plain))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
