"""Tiles through a network trained on their scene, one row of patches at a time."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from rayseg.engine.tuning import reused_memory
from rayseg.geo.grid import NODATA, Lattice, Window
from rayseg.io.segments import without_specks
from rayseg.models.cpu import threads
from rayseg.stages.oversegment import grown
from rayseg.stages.predict import Predict
from rayseg.stages.rows import ABSENT, TileRow

_KEPT = 4


class LabelTile:
    """`tile, bundle, image, valid, reach -> classes, scores, batch`: the most probable label of every pixel.

    classes: (height, width) uint8, 255 where there is no imagery.
    scores: (1, height, width) uint8, the label's probability x 254 rounded, 255 where there is no imagery.

    Probabilities are blended on the grid's lattice of patches as in `Predict`, but only one row of patches is held at
    a time: memory grows with labels x patch x tile width, not with labels x tile.

    Args:
        margin: px around the tile that are labelled too, so that specks at its border are complete.
        sieve: patches of fewer px become part of their largest neighbour.
        batch: patches at once; None takes as many as there are threads on a CPU, and 8 on a GPU, where lack of memory
            halves it.
    """

    def __init__(self, *, margin: int, sieve: int, batch: int | None = None) -> None:
        self.margin, self.sieve, self.batch = margin, sieve, batch
        self._models: OrderedDict[str, Predict] = OrderedDict()

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Label each tile."""
        with threads(), reused_memory():
            return [self._tile(row) for row in rows]

    def _loaded(self, prefix: str) -> Predict:
        """The scene's network; the last few stay in memory."""
        if prefix not in self._models:
            batch = self.batch or (8 if torch.cuda.is_available() else None)
            self._models[prefix] = Predict(prefix, batch=batch)
            while len(self._models) > _KEPT:
                self._models.popitem(last=False)
        self._models.move_to_end(prefix)
        return self._models[prefix]

    def _tile(self, row: TileRow) -> TileRow:
        # 1. the patches that reach into the tile and its margin
        network = self._loaded(row.bundle)
        described, tile, valid, reach = network.bundle, row.tile, row.valid, row.reach
        window = grown(tile.window, self.margin)
        lattice = Lattice.of(tile.grid, described.patch, described.stride)
        patches = [p for p in lattice.patches(window) if valid[lattice.cell(p).intersect(reach).slices(reach)].any()]
        classes = np.zeros((window.height, window.width), np.uint8)
        scores = np.zeros_like(classes)
        assert network.device is not None

        def predict(some: Sequence[Window]) -> Iterator[tuple[Window, Tensor]]:
            cuts = [(slice(None), *patch.slices(reach)) for patch in some]
            batches = network.probabilities(row.image, valid, cuts)
            yield from zip(some, chain.from_iterable(batches), strict=True)

        # 2. the most probable label, a row of patches at a time
        parts = blended(predict, patches, window, lattice, classes=described.outputs, device=network.device)
        for part, labels, tops in parts:
            classes[part.slices(window)], scores[part.slices(window)] = labels, tops
        # 3. without specks, cut to the tile
        seen = valid[window.slices(reach)]
        classes = without_specks(classes, seen, size=self.sieve)
        inner = tile.window.slices(window)
        classes, scores = (np.where(seen, values, NODATA).astype(np.uint8)[inner] for values in (classes, scores))
        return replace(
            row, image=ABSENT, valid=ABSENT, classes=classes, scores=scores[None], batch=network.batch_halved
        )


@torch.inference_mode()
def blended(
    predict: Callable[[Sequence[Window]], Iterator[tuple[Window, Tensor]]],
    patches: Sequence[Window],
    window: Window,
    lattice: Lattice,
    *,
    classes: int,
    device: str,
) -> Iterator[tuple[Window, np.ndarray, np.ndarray]]:
    """The weighted mean of patch probabilities, one row of patches after the other.

    Args:
        predict: patches -> each with its probabilities (classes, patch, patch) on the device, in order.
        patches: patches of the lattice that are predicted.
        window: the window to blend over.
        lattice: gives the patches' weight.
        classes: number of channels.
        device: torch device of the sums.

    Yields:
        (part of the window, most probable class (height, width) uint8, its probability x 254 uint8), from the top;
        class and probability are 0 where no patch lies.
    """
    side, stride = lattice.patch, lattice.stride
    weight_HW = torch.from_numpy(lattice.weight()).to(device)
    sums_CHW = torch.zeros(classes + 1, side, window.width, device=device)  # the last channel sums the weights
    for row in sorted({patch.row for patch in lattice.patches(window)}):
        strip = Window(window.col, row, window.width, side)
        for at, probabilities_CHW in predict([patch for patch in patches if patch.row == row]):
            part = at.intersect(strip)
            rows, cols = part.slices(at)
            target_CHW = sums_CHW[:, rows, part.slices(strip)[1]]
            target_CHW[:-1] += weight_HW[rows, cols] * probabilities_CHW[:, rows, cols]
            target_CHW[-1] += weight_HW[rows, cols]
        # No later patch reaches the first `stride` rows of the strip: they are final.
        part = Window(window.col, row, window.width, stride).intersect(window)
        if not part.empty:
            rows, _ = part.slices(strip)
            tops_HW, labels_HW = sums_CHW[:-1, rows].max(0)
            shares_HW = tops_HW / sums_CHW[-1, rows].clamp(min=1e-12) * 254
            yield part, labels_HW.to(torch.uint8).cpu().numpy(), shares_HW.round().to(torch.uint8).cpu().numpy()
        rest_CHW = sums_CHW[:, stride:].clone()
        sums_CHW.zero_()
        sums_CHW[:, : side - stride] = rest_CHW
