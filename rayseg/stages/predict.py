"""Tiles through a segmentation model, patch by patch on the grid's one lattice."""

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np

from rayseg.engine.tuning import reused_memory
from rayseg.geo.grid import NODATA, Lattice, Tile, Window
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Precision
from rayseg.stages.rows import ABSENT, TileRow
from rayseg.vision.blend import Blend
from rayseg.vision.fill import mirrored

if TYPE_CHECKING:  # planning, and the driver of a run, do without torch
    import torch


class Predict:
    """`tile, image, valid, reach -> classes, scores, batch`: a model's blended probabilities over the tile's window.

    classes: (height, width) uint8, 255 where there is no imagery.
    scores: (bands, height, width) uint8, probability x 254 rounded, 255 where there is no imagery; one band for the
    one class of a binary model, else one per class.

    A patch is predicted only where its cell holds imagery, and its bits depend on the patch alone: all batches on a
    GPU have the same size (the last one is padded), and a CPU computes each patch in a thread (`cpu.Apart`). So a
    pixel's value does not depend on the tiling. Where a patch has no imagery, the model sees the mirror image of its
    valid pixels.

    Args:
        prefix: of the bundle.
        batch: patches per batch; None takes the number of threads on a CPU, and 16 on a GPU, where lack of memory
            halves it.
        device: torch device; None takes the GPU if there is one.
        precision: of a CPU, `fp32`, `bf16`, or `auto`: bfloat16 where the CPU multiplies it natively and the bundle
            says that the map hardly changes. A GPU computes in bfloat16.
    """

    def __init__(
        self, prefix: str, *, batch: int | None = None, device: str | None = None, precision: Precision = "auto"
    ) -> None:
        self.prefix = prefix
        self.batch = batch
        self.device = device
        self.precision = precision
        self.batch_halved = 0
        """The batch after lack of memory halved it; 0 before. Tiles record it in the ledger's facts."""
        self.in_bf16 = False
        """Whether a CPU computes in bfloat16; known once the model is loaded. Tiles record it, too."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickle in an actor, and import the model's modules there while another process reads the first tile."""
        self.__dict__.update(state)
        importlib.import_module("rayseg.models.segmenter")

    @property
    def bundle(self) -> Bundle:
        """The model's description."""
        return self._loaded[0]

    @cached_property
    def _loaded(self) -> "tuple[Bundle, torch.nn.Module]":
        import torch

        from rayseg.models.cpu import Apart, folded
        from rayseg.models.precision import InBf16, chosen
        from rayseg.models.segmenter import Probabilities

        described, model = bundle.build(self.prefix)
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        if self.device.startswith("cuda"):
            self.batch = self.batch or 16
            return described, Probabilities(model).eval().to(self.device).to(memory_format=torch.channels_last)
        # On a CPU each patch is computed by one thread, so that its bits do not depend on the machine.
        quick = Probabilities(folded(model.eval(), len(described.bands)))
        self.in_bf16 = chosen(self.precision, described.bf16)
        net = InBf16(quick) if self.in_bf16 else quick
        apart = Apart(net.eval().to(memory_format=torch.channels_last))
        self.batch = self.batch or apart.count
        return described, apart

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Predict each tile."""
        with reused_memory():
            return [self._tile(row) for row in rows]

    def _tile(self, row: TileRow) -> TileRow:
        tile, reach, valid = row.tile, row.reach, row.valid
        patches = patches_of(self.bundle, tile, valid, reach)
        cuts = [(slice(None), *patch.slices(reach)) for patch in patches]
        batches = (batch.cpu().numpy() for batch in self.probabilities(row.image, valid, cuts))
        blend = Blend(tile.window, self.bundle.outputs, lattice_of(self.bundle, tile))
        for patch, probabilities in zip(patches, chain.from_iterable(batches), strict=True):
            blend.add(patch, probabilities)
        classes, scores = decide(blend.result(), valid[tile.window.slices(reach)], self.bundle.threshold)
        read = replace(row, image=ABSENT, valid=ABSENT)  # no later stage needs the pixels
        return replace(read, classes=classes, scores=scores, batch=self.batch_halved, bf16=self.in_bf16)

    def probabilities(
        self, image_CHW: np.ndarray, valid_HW: np.ndarray, cuts: Sequence[tuple[slice, ...]]
    ) -> "Iterator[torch.Tensor]":
        """Probabilities of every patch, in order.

        Args:
            image_CHW: values as the bundle's contract defines them.
            valid_HW: bool, where there is imagery; elsewhere the model sees its mirror image.
            cuts: (all, rows, columns) slices of the patches.

        Yields:
            (patches, outputs, height, width) float32 on the device, one batch at a time.
        """
        import torch

        start = 0
        while start < len(cuts):
            assert self.batch is not None
            part = cuts[start : start + self.batch]
            try:
                results = self.forward([self.input(image_CHW[cut], valid_HW[cut[1:]]) for cut in part])
            except torch.OutOfMemoryError:
                if self.batch == 1:
                    raise
                # The smaller batch stays: the next tiles are as large as this one.
                torch.cuda.empty_cache()
                self.batch = self.batch_halved = self.batch // 2
                continue
            yield results
            start += len(part)

    def input(self, patch_CHW: np.ndarray, valid_HW: np.ndarray) -> np.ndarray:
        """The model's input for a patch, float32, mirrored where the patch is not valid."""
        return self.bundle.normalize(mirrored(patch_CHW, valid_HW))

    def forward(self, patches_CHW: Sequence[np.ndarray], *, exact: bool = True) -> "torch.Tensor":
        """Probabilities (patches, outputs, height, width) of a batch of inputs.

        On a GPU an `exact` batch is padded to the fixed size.
        """
        import torch

        _, model = self._loaded
        assert self.batch is not None
        assert self.device is not None
        count, half = len(patches_CHW), self.device.startswith("cuda")
        # Kernels on GPUs are chosen by the batch's size, and round differently.
        padded = np.zeros((self.batch if half and exact else count, *patches_CHW[0].shape), np.float32)
        padded[:count] = patches_CHW
        batch = torch.from_numpy(padded).to(self.device, memory_format=torch.channels_last)
        with torch.inference_mode(), torch.autocast(self.device.split(":")[0], torch.bfloat16, enabled=half):
            outputs: torch.Tensor = model(batch)
        return outputs[:count]

    def help_one(self) -> None:
        """Let all processors compute a single patch together, where their bits equal those of one processor."""
        import torch

        from rayseg.models.cpu import Apart

        described, model = self._loaded
        if isinstance(model, Apart):
            shape = (3, len(described.bands), described.patch, described.patch)
            samples = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            model.help_one(samples.contiguous(memory_format=torch.channels_last))


def decide(probabilities_CHW: np.ndarray, valid_HW: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Classes (height, width) and scores (bands, height, width), both uint8 with 255 where not valid.

    One band is the probability of class 1, which a pixel gets if its score is `above` the threshold; several bands are
    one per class, and a pixel gets the largest.
    """
    scores = np.rint(probabilities_CHW * 254).astype(np.uint8)
    classes = above(scores[0], threshold) if len(scores) == 1 else probabilities_CHW.argmax(0).astype(np.uint8)
    return np.where(valid_HW, classes, NODATA).astype(np.uint8), np.where(valid_HW, scores, NODATA).astype(np.uint8)


def above(scores_HW: np.ndarray, threshold: float) -> np.ndarray:
    """Classes 0 and 1, uint8, of the scores (probability x 254) of a binary map.

    The rounded score decides, so that another threshold can be applied to a finished map as it would be to the model.
    """
    return (scores_HW > threshold * 254).astype(np.uint8)


def lattice_of(described: Bundle, tile: Tile) -> Lattice:
    """The lattice of a bundle's patches on the tile's grid."""
    return Lattice.of(tile.grid, described.patch, described.stride)


def patches_of(described: Bundle, tile: Tile, valid_HW: np.ndarray, reach: Window) -> list[Window]:
    """The patches that a tile's pixels need, row by row: patches whose cell holds imagery.

    Args:
        described: the model's bundle, which defines the patches.
        tile: the tile to predict.
        valid_HW: bool, where there is imagery in `reach`.
        reach: the window of `valid_HW`, which covers all patches of the tile.
    """
    lattice = lattice_of(described, tile)
    cells = {patch: lattice.cell(patch).intersect(reach) for patch in lattice.patches(tile.window)}
    return [patch for patch, cell in cells.items() if valid_HW[cell.slices(reach)].any()]
