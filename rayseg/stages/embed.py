"""Features of single pixels of tiles by the frozen network of a bundle."""

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import Tile, Window
from rayseg.io.clicks import Clicked
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.stages.predict import lattice_of, patches_of
from rayseg.stages.rows import TileRow
from rayseg.store import put, upath
from rayseg.vision.fill import mirrored

if TYPE_CHECKING:
    import torch

SQUARE = 4
"""Pixels per position of the features: `pixel_head.STRIDE`, without PyTorch."""
PATCHES = 4
"""Patches of a tile that pixels of the map are drawn from, besides those with clicks."""


@dataclass(frozen=True)
class Drawn:
    """Pixels of a tile with their features; of clicks, then of the map.

    Attributes:
        features_NF, logits_NK: float32.
        values_N: class that is right; -1 for a pixel of the map.
        weights_N: of the clicks; 1 for a pixel of the map.
    """

    features_NF: NDArray[np.float32]
    logits_NK: NDArray[np.float32]
    values_N: NDArray[np.int64]
    weights_N: NDArray[np.float32]

    def pack(self) -> bytes:
        """The arrays as a file."""
        sink = io.BytesIO()
        np.savez(sink, allow_pickle=False, **vars(self))
        return sink.getvalue()

    @classmethod
    def unpack(cls, content: bytes) -> "Drawn":
        """What `pack` returned."""
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            return cls(**file)


class Embed:
    """`tile, image, valid, reach -> facts`: write features of a tile's clicks, and of some pixels of its map.

    Only the patches with clicks and a few others are computed, each as `Predict` sees it.

    Args:
        prefix: of the bundle.
        folder: receives `<tile id>.npz`; none of a tile with hardly any imagery.
        clicked: clicked pixels of tiles, by id.
        count: pixels of the map that are drawn from a tile.
    """

    def __init__(self, prefix: str, folder: str, clicked: Mapping[str, Clicked], *, count: int) -> None:
        self.prefix, self.folder, self.clicked, self.count = prefix, folder, clicked, count

    @cached_property
    def _loaded(self) -> "tuple[Bundle, torch.nn.Module]":
        import torch

        described, base = bundle.build(self.prefix)
        return described, base.to("cuda" if torch.cuda.is_available() else "cpu")

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Write the features of each tile."""
        return [self._tile(row) for row in rows]

    def _tile(self, row: TileRow) -> Settled:
        described, base = self._loaded
        lattice, window = lattice_of(described, row.tile), row.tile.window
        patches = patches_of(described, row.tile, row.valid, row.reach)
        patches = [patch for patch in patches if not lattice.cell(patch).intersect(window).empty]
        # By the tile's id, so that a retry draws the same pixels.
        rng = np.random.default_rng(list(row.tile.id.encode()))
        others = set(rng.permutation(len(patches))[:PATCHES].tolist())
        parts = []
        for at, patch in enumerate(patches):
            cell = lattice.cell(patch).intersect(window)
            squares: dict[tuple[int, int], tuple[int, float]] = {}
            if at in others:
                inside_S2 = squares_in(row.valid[patch.slices(row.reach)], patch, cell)
                taken_S2 = inside_S2[rng.permutation(len(inside_S2))[: -(-self.count // len(others))]]
                squares = dict.fromkeys(map(tuple, taken_S2.tolist()), (-1, 1.0))
            squares |= squares_of(self.clicked.get(row.tile.id), row.tile, patch, cell)
            if squares:
                features_Fhw, logits_Khw = embedded(described, base, row, patch)
                places, (values, weights) = np.array(list(squares)).T, zip(*squares.values(), strict=True)
                parts.append((features_Fhw[:, *places].T, logits_Khw[:, *places].T, values, weights))
        if not parts:  # imagery so narrow that it has no middle of a square
            return Settled(facts={"clicked": 0, "drawn": 0})
        columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
        drawn = Drawn(columns[0], columns[1], columns[2].astype(np.int64), columns[3].astype(np.float32))
        put(upath(self.folder) / f"{row.tile.id}.npz", drawn.pack())
        return Settled(facts={"clicked": int((drawn.values_N >= 0).sum()), "drawn": int((drawn.values_N < 0).sum())})


def squares_of(
    clicked: Clicked | None, tile: Tile, patch: Window, cell: Window
) -> dict[tuple[int, int], tuple[int, float]]:
    """(row, col) of every square of a patch with clicks in its cell -> class and weight; the last class counts."""
    squares: dict[tuple[int, int], tuple[int, float]] = {}
    if clicked is None:
        return squares
    rows_N, cols_N = clicked.rows_N + tile.window.row, clicked.cols_N + tile.window.col
    inside_N = (rows_N >= cell.row) & (rows_N < cell.row1) & (cols_N >= cell.col) & (cols_N < cell.col1)
    places_N2 = np.stack([rows_N - patch.row, cols_N - patch.col], axis=1)[inside_N] // SQUARE
    columns = (places_N2, clicked.values_N[inside_N], clicked.weights_N[inside_N])
    for (row, col), value, weight in zip(*(column.tolist() for column in columns), strict=True):
        before = squares.get((row, col), (value, 0.0))
        squares[row, col] = (value, weight + (before[1] if before[0] == value else 0.0))
    return squares


def squares_in(valid_HW: NDArray[np.bool_], patch: Window, cell: Window) -> NDArray[np.int64]:
    """(row, col) of the squares of a patch whose middles are in a cell and have imagery.

    Args:
        valid_HW: where the patch has imagery.
        patch: the patch.
        cell: within it.
    """
    middle = SQUARE // 2
    inside_HW = np.zeros_like(valid_HW)
    inside_HW[cell.slices(patch)] = valid_HW[cell.slices(patch)]
    return np.argwhere(inside_HW[middle::SQUARE, middle::SQUARE])


def embedded(
    described: Bundle, base: "torch.nn.Module", row: TileRow, patch: Window
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Features (F, h, w) and logits (K, h, w) of a patch's squares."""
    import torch

    from rayseg.models.correction import features

    at = patch.slices(row.reach)
    values = described.normalize(mirrored(row.image[:, *at], row.valid[at]))
    device = next(base.parameters()).device if any(True for _ in base.parameters()) else "cpu"
    with torch.inference_mode():
        found = features(base, torch.from_numpy(values)[None].to(device))
    features_Fhw, logits_Khw = (part[0].float().cpu().numpy() for part in found)
    return features_Fhw, logits_Khw
