"""The data of supervised training: which windows of which images come when, and how they get to the device.

What an epoch shows is drawn from seed and epoch alone, whatever workers there are: each takes its part of every
batch, and each window brings its own luck for augmentation. Windows are read straight from the images' files, by Ray
Data's tasks anywhere in the cluster or by threads of this process; nothing is written in between.
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

from rayseg.config import Config
from rayseg.errors import DataError
from rayseg.geo.grid import Window
from rayseg.io.scenes import LabelledImage, read_window
from rayseg.train.augment import Augment, augment, resized
from rayseg.train.batches import made_ahead
from rayseg.vision.color import ClassTable

Pixels = NDArray[Any]
Counts = NDArray[np.int64]
PER_BLOCK = 4
"""Batches that one of Ray Data's tasks reads: a block costs it some 20 ms, whatever is in it."""


class Sampling(Config):
    """Which windows training sees."""

    size: Annotated[int, Field(gt=0, multiple_of=32)] = 512
    """Side in px of a window as the network sees it; `augment.scale` says how much ground that is."""
    rare: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the windows that are laid over a pixel of a class drawn evenly from all; the others lie anywhere."""
    windows: Annotated[int, Field(gt=0)] | None = None
    """In an epoch; by default as many as cover the images once."""
    cell: Annotated[int, Field(gt=0)] = 64
    """Side in px of the cells in which classes are counted, for `rare`."""


@dataclass(frozen=True)
class Draw:
    """One window to be read.

    Attributes:
        image: position of the image.
        window: on its grid; may reach beyond the image.
        luck: seeds what happens to it.
    """

    image: int
    window: Window
    luck: int = 0


@dataclass(frozen=True)
class Cut:
    """A window as it was read: image_CHW in the imagery's data type, classes_HW uint8 with 255 = not labelled."""

    draw: Draw
    image_CHW: Pixels
    classes_HW: NDArray[np.uint8]


Step = tuple[Draw, ...]
Read = Callable[[Draw], Cut]


@dataclass(frozen=True)
class Windows:
    """Reads windows of labelled images: what travels to whoever reads.

    Attributes:
        images: labelled or not.
        bands: in the model's order.
        table: classes of the masks; None where nothing is labelled.
    """

    images: tuple[LabelledImage, ...]
    bands: tuple[str, ...]
    table: ClassTable | None

    def __call__(self, draw: Draw) -> Cut:
        """The window's pixels.

        Raises:
            DataError: they cannot be read, or the mask holds what is no class.
        """
        return Cut(draw, *read_window(self.images[draw.image], draw.window, bands=self.bands, table=self.table))

    def names(self, draws: Iterable[Draw]) -> str:
        """What windows were cut from, for messages."""
        return "images " + ", ".join(
            f"{self.images[draw.image].id} at ({draw.window.row}, {draw.window.col})" for draw in draws
        )


# -- what comes when --------------------------------------------------------------------------------------------------


def windows_per_epoch(images: Sequence[LabelledImage], sampling: Sampling, batch: int) -> int:
    """Windows of an epoch, in whole batches."""
    ground = sum(image.window.height * image.window.width for image in images)
    return -(-(sampling.windows or ground // sampling.size**2 + 1) // batch) * batch


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

    Windows that lie anywhere come from an image as often as its share of all ground says. Their side is
    `sampling.size` over a magnification drawn from `augment.scale`, at most the image's shorter side.

    Args:
        images: to draw from.
        counts: of each image, pixels by cell and class (rows, cols, classes), as `count_classes` gives them; not
            needed without `rare`.
        sampling: how.
        augment: says how windows are magnified and whether they lie anywhere or in the middle.
        batch: windows in a batch.
        seed: of the training.
        epoch: from 0.
    """
    rng = np.random.default_rng((seed, 11, epoch))
    total = windows_per_epoch(images, sampling, batch)
    ground = np.array([image.window.height * image.window.width for image in images], float)
    chosen = rng.choice(len(images), total, p=ground / ground.sum())
    around = _around_rare(counts, sampling, rng, total) if sampling.rare else {}
    draws = []
    for number, anywhere in enumerate(chosen):
        image, at = around.get(number, (int(anywhere), None))
        whole = images[image].window
        low, high = augment.scale
        side = min(round(sampling.size / rng.uniform(low, high)), whole.height, whole.width)
        corner = _corner(whole, at, side, augment.crop, rng.random(2))
        luck = int(rng.integers(2**62))
        draws.append(Draw(image, Window(whole.col + corner[1], whole.row + corner[0], side, side), luck))
    return [tuple(draws[start : start + batch]) for start in range(0, total, batch)]


def _corner(
    whole: Window, at: tuple[float, float] | None, side: int, crop: Literal["centre", "random"], luck: NDArray[Any]
) -> tuple[int, int]:
    """(row, col) in the image of a window's corner: anywhere, or so that the window covers the place `at`."""
    spare = (whole.height - side, whole.width - side)
    if crop == "centre":
        return spare[0] // 2, spare[1] // 2
    if at is None:
        return int(luck[0] * (spare[0] + 1)), int(luck[1] * (spare[1] + 1))
    row, col = (int(np.clip(place - share * side, 0, room)) for place, share, room in zip(at, luck, spare, strict=True))
    return row, col


def _around_rare(
    counts: Sequence[Counts], sampling: Sampling, rng: np.random.Generator, total: int
) -> dict[int, tuple[int, tuple[float, float]]]:
    """Number of a window -> (image, (row, col) in it) in a cell that holds a class drawn evenly from all there are."""
    shapes = [found.shape[:2] for found in counts]
    cells_NK = np.concatenate([found.reshape(-1, found.shape[-1]) for found in counts]).astype(float)
    present = np.flatnonzero(cells_NK.sum(axis=0))
    first = np.cumsum([0, *(rows * cols for rows, cols in shapes)])
    picked = {}
    for number in np.flatnonzero(rng.random(total) < sampling.rare):
        of_class_N = cells_NK[:, rng.choice(present)].cumsum()
        cell = int(np.searchsorted(of_class_N, rng.random() * of_class_N[-1], side="right"))
        image = int(np.searchsorted(first, cell, side="right")) - 1
        row, col = divmod(cell - int(first[image]), shapes[image][1])
        place = (np.array([row, col]) + rng.random(2)) * sampling.cell
        picked[int(number)] = (image, (float(place[0]), float(place[1])))
    return picked


def part_of(steps: Sequence[Step], *, rank: int, world: int) -> list[Step]:
    """A worker's part of every batch; together they have all of it, each as much as the others."""
    return [step[rank * len(step) // world : (rank + 1) * len(step) // world] for step in steps]


def cover(images: Sequence[LabelledImage], *, size: int, batch: int, rank: int = 0, world: int = 1) -> list[Step]:
    """Windows that cover all images once, side by side, of which a worker has every `world`-th; in batches."""
    draws = [
        Draw(position, Window(col, row, size, size))
        for position, image in enumerate(images)
        for row in range(image.window.row, image.window.row1, size)
        for col in range(image.window.col, image.window.col1, size)
    ][rank::world]
    return [tuple(draws[start : start + batch]) for start in range(0, len(draws), batch)]


# -- how it gets here -------------------------------------------------------------------------------------------------


@dataclass
class Waiting:
    """How long a loop has waited for its data, since when."""

    seconds: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def share(self) -> float:
        """Share of the time that was waiting; from here on it is counted anew."""
        now = time.perf_counter()
        share = self.seconds / max(now - self.since, 1e-9)
        self.seconds, self.since = 0.0, now
        return share


def stream(
    steps: Iterable[Sequence[Step]], read: Read, *, on_ray: bool, threads: int = 2, ahead: int = 3
) -> Iterator[list[Cut]]:
    """Read batches in order, some of them while earlier ones are in use; across the epochs' ends too.

    Args:
        steps: batches, epoch by epoch; an epoch is asked for when the one before is nearly used up.
        read: of every window; picklable.
        on_ray: read in Ray Data's tasks on the CPUs of the cluster that is connected; else in threads.
        threads: of this process that read otherwise.
        ahead: batches that are ready, or in work, before they are asked for.

    Raises:
        DataError: a window cannot be read.
    """
    batches = (batch for epoch in steps for batch in (_by_ray if on_ray else _by_threads)(epoch, read, threads, ahead))
    return _ahead(batches, ahead) if on_ray else batches


def timed(batches: Iterator[list[Cut]], waiting: Waiting) -> Iterator[list[Cut]]:
    """The same batches; what the wait for each took is added up."""
    while True:
        began = time.perf_counter()
        batch = next(batches, None)
        waiting.seconds += time.perf_counter() - began
        if batch is None:
            return
        yield batch


def _by_threads(steps: Sequence[Step], read: Read, threads: int, ahead: int) -> Iterator[list[Cut]]:
    draws = (draw for step in steps for draw in step)
    count = ahead * max(map(len, steps), default=0)
    with closing(made_ahead(read, draws, threads=threads, count=count)) as cuts:
        for step in steps:
            yield list(islice(cuts, len(step)))


def _by_ray(steps: Sequence[Step], read: Read, _threads: int, _ahead: int) -> Iterator[list[Cut]]:
    """Blocks of some batches, in order; each is read by a task of half a CPU."""
    import ray.data

    numbers = ray.data.range(len(steps), override_num_blocks=-(-len(steps) // PER_BLOCK))
    table = numbers.map_batches(_ReadSteps(read, steps), batch_size=None, batch_format="pyarrow", num_cpus=0.5)
    table.context.enable_progress_bars = False  # of this dataset alone: what is set in the process is others'
    table.context.print_on_execution_start = False
    table.context.max_errored_blocks = 0
    table.context.execution_options.preserve_order = True
    for block in table.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
        for packed in block["cuts"]:
            yield _unpacked(packed)


class _ReadSteps:
    """`id -> cuts`: the windows of some batches, pickled; or the DataError that one of them met."""

    def __init__(self, read: Read, steps: Sequence[Step]) -> None:
        self.read = read
        self.steps = list(steps)

    def __call__(self, numbers: pa.Table) -> pa.Table:
        """Read the batches with these numbers."""
        return pa.table({"cuts": pa.array([self._packed(int(k)) for k in numbers["id"]], pa.large_binary())})

    def _packed(self, number: int) -> bytes:
        try:
            content: list[Cut] | str = [self.read(draw) for draw in self.steps[number]]
        except DataError as error:
            content = str(error)
        return pickle.dumps(content, protocol=5)


def _unpacked(packed: pa.LargeBinaryScalar) -> list[Cut]:
    content: list[Cut] | str = pickle.loads(packed.as_buffer())  # our own windows, from the task before
    if isinstance(content, str):
        raise DataError(content)
    return content


def _ahead(batches: Iterator[list[Cut]], count: int) -> Iterator[list[Cut]]:
    """The same batches, made in another thread, `count` of them before they are asked for."""
    with closing(made_ahead(lambda _: next(batches, None), repeat(None), threads=1, count=count)) as coming:
        yield from takewhile(lambda batch: batch is not None, coming)


# -- on the device ----------------------------------------------------------------------------------------------------


def to_device(cuts: Sequence[Cut], augmenting: Augment, device: torch.device, *, size: int) -> tuple[Tensor, Tensor]:
    """Send a batch to the device, bring its windows to one size there, and augment them there.

    Each window meets what its own luck says, whatever it is beside.

    Returns:
        images (N, C, size, size) float32 with the imagery's values, and classes (N, size, size) int64.
    """
    images = torch.stack([resized(_sent(cut.image_CHW, device).float(), size, smooth=True) for cut in cuts])
    classes = torch.stack([resized(_sent(cut.classes_HW[None], device).float(), size, smooth=False) for cut in cuts])
    luck = [Generator().manual_seed(cut.draw.luck) for cut in cuts]
    still = augmenting.model_copy(update={"scale": (1.0, 1.0), "crop": "centre"})  # the draw has seen to both
    changed, masks = augment(images, classes, still, luck, size=size)
    assert masks is not None
    return changed, masks[:, 0].long()


def as_read(cuts: Sequence[Cut], device: torch.device) -> tuple[Tensor, Tensor]:
    """The same of windows of one size, as they are."""
    images = torch.stack([_sent(cut.image_CHW, device).float() for cut in cuts])
    return images, torch.stack([_sent(cut.classes_HW, device) for cut in cuts]).long()


def _sent(array: Pixels, device: torch.device) -> Tensor:
    plain = array if array.dtype == np.uint8 else array.astype(np.float32)
    tensor = torch.from_numpy(np.ascontiguousarray(plain))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
