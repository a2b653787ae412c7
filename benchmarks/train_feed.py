"""The data feed of supervised training: windows of COGs against chips cut and written before.

Both give batches of (images, classes) of one size to an empty loop, so that only the feed is measured. Chips are PNG
files of the same windows, read by torch's DataLoader with as many processes as Ray Data has CPUs. Target: at least 0.9
of the DataLoader's samples per second.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from measure import show
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from rayseg.demo import make
from rayseg.engine import cluster
from rayseg.io import class_tables, scenes
from rayseg.train import windows
from rayseg.train.augment import Augment
from rayseg.train.windows import Sampling, Step, Windows

AUGMENT = Augment(crop="random")


class Chips(Dataset):
    """Pre-cut chips: `<number>.png` and `<number>-mask.png`."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        image = np.asarray(Image.open(self.folder / f"{number}.png"))
        mask = np.asarray(Image.open(self.folder / f"{number}-mask.png"))
        return torch.from_numpy(image.transpose(2, 0, 1).copy()), torch.from_numpy(mask.copy())


def cut_chips(folder: Path, steps: list[Step], read: Windows) -> int:
    """Write the windows of an epoch as chips; return their number."""
    cuts = [cut for batch in windows.stream([steps], read, on_ray=False) for cut in batch]
    for number, cut in enumerate(cuts):
        Image.fromarray(cut.image_CHW.transpose(1, 2, 0)).save(folder / f"{number}.png")
        Image.fromarray(cut.classes_HW).save(folder / f"{number}-mask.png")
    return len(cuts)


def loaded(folder: Path, count: int, *, batch: int, epochs: int, processes: int) -> Iterator[int]:
    """Number of images in each batch of the DataLoader."""
    loader = DataLoader(
        Chips(folder, count), batch, shuffle=True, num_workers=processes, persistent_workers=processes > 0
    )
    for _ in range(epochs):
        for images, _ in loader:
            yield len(images)


def fed(epochs: list[list[Step]], read: Windows, *, size: int, on_ray: bool, threads: int) -> Iterator[int]:
    """Number of images in each batch of the feed, stacked like the DataLoader's."""
    for cuts in windows.stream(iter(epochs), read, on_ray=on_ray, threads=threads):
        images = torch.stack([torch.from_numpy(cut.image_CHW) for cut in cuts])
        torch.stack([torch.from_numpy(cut.classes_HW) for cut in cuts])
        assert images.shape[2:] == (size, size)
        yield len(images)


def rate(batches: Iterator[int], *, skip: int) -> float:
    """Samples per second without the first batches, which include the start."""
    began, count = 0.0, 0
    for number, images in enumerate(batches):
        if number == skip:
            began, count = time.perf_counter(), 0
        count += images
    return count / (time.perf_counter() - began)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--windows", type=int, default=800, help="of an epoch (quick: 160)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--labelled", help="a folder of scenes; by default the demo's")
    parser.add_argument("--classes", default="deepglobe")
    parser.add_argument("--no-ray", action="store_true")
    asked = parser.parse_args()
    catalogue = "" if asked.labelled else make.ensure()
    given = (asked.labelled, None) if asked.labelled else (f"{catalogue}#imagery", f"{catalogue}#truth/landcover")
    images = tuple(scenes.labelled_images(*given))
    read = Windows(images, ("red", "green", "blue"), class_tables.read_table(asked.classes))
    sampling = Sampling(size=asked.size, windows=asked.windows)
    epochs = [
        windows.draw_epoch(images, (), sampling, AUGMENT, batch=asked.batch, seed=0, epoch=epoch)
        for epoch in range(asked.epochs)
    ]
    skip, rows = max(2, len(epochs[0]) // 2), []
    with tempfile.TemporaryDirectory() as scratch:
        count = cut_chips(Path(scratch), epochs[0], read)
        options = {"batch": asked.batch, "epochs": asked.epochs, "processes": asked.processes}
        plain = rate(loaded(Path(scratch), count, **options), skip=skip)
    rows.append(("DataLoader over PNG chips", asked.processes, f"{plain:.1f}", "1.00"))
    ways = [("COG windows by threads", False)] + ([] if asked.no_ray else [("COG windows by Ray Data", True)])
    for name, on_ray in ways:
        if on_ray:
            cluster.connect(None)
        samples = rate(fed(epochs, read, size=asked.size, on_ray=on_ray, threads=asked.processes), skip=skip)
        rows.append((name, asked.processes, f"{samples:.1f}", f"{samples / plain:.2f}"))
    show(f"{asked.size} px, batches of {asked.batch}", ("feed", "processes or threads", "samples/s", "ratio"), rows)


if __name__ == "__main__":
    main()
