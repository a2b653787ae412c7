"""Tiles of a scene in, superpixels out: each tile with an overlap, by which neighbours are joined afterwards."""

from collections.abc import Mapping, Sequence

import numpy as np
from upath import UPath

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Tile, Window
from rayseg.io import segments
from rayseg.models.bundle import Scaling
from rayseg.stages.read import read_reach
from rayseg.stages.rows import TileRow
from rayseg.store import upath
from rayseg.vision.fill import mirrored
from rayseg.vision.segments import agreeing, united
from rayseg.vision.superpixels import METHODS


class ReadAround:
    """`tile, sources -> image, valid, reach, incomplete, unread`: read the tile's pixels and those around it.

    Like `ReadTile`, over a window with a margin; with a lattice, over all its patches on that window.

    Args:
        bands: names, in order.
        margin: px around the tile.
        lattice: (patch, stride) of patches that must be whole.
    """

    def __init__(self, bands: Sequence[str], *, margin: int, lattice: tuple[int, int] | None = None) -> None:
        self.bands = tuple(bands)
        self.margin, self.lattice = margin, lattice

    def __call__(self, rows: list[TileRow]) -> list[TileRow | Settled]:
        """Read each tile."""
        return [self._read(row) for row in rows]

    def _read(self, row: TileRow) -> TileRow | Settled:
        reach = grown(row.tile.window, self.margin)
        if self.lattice:
            reach = Lattice.of(row.tile.grid, *self.lattice).reach(reach)
        return read_reach(row, reach, self.bands)


class Divide:
    """`tile, scaling, image, valid, reach -> facts`: write the superpixels of the tile and its overlap, `part_path`.

    They are numbered from 1 in the tile; 0 is no data. A tile fails if any pixel in its reach cannot be read: its
    neighbours would not agree with it after a retry.

    Args:
        prefix: where they are kept.
        method: a name in `METHODS`.
        options: its arguments.
    """

    def __init__(self, prefix: str, method: str, options: Mapping[str, float]) -> None:
        self.prefix, self.method, self.options = prefix, method, dict(options)

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Divide each tile."""
        return [self._divide(row) for row in rows]

    def _divide(self, row: TileRow) -> Settled:
        if why := row.incomplete or row.unread:
            raise DataError(why)
        tile, valid = row.tile, row.valid
        scaling = Scaling.model_validate_json(row.scaling)
        image_CHW = np.clip(scaling.normalize(mirrored(row.image, valid)), 0, 1)
        labels_HW = METHODS[self.method](image_CHW.transpose(1, 2, 0), **self.options)
        _, gapless = np.unique(np.where(valid, labels_HW + 1, 0), return_inverse=True)
        numbers = gapless.reshape(valid.shape).astype(np.uint32) + np.uint32(valid.all())
        segments.write_segments(part_path(self.prefix, tile.id), numbers, tile.grid, row.reach)
        return Settled(facts={"segments": int(numbers.max())})


def grown(window: Window, margin: int) -> Window:
    """The window with a margin on every side."""
    return Window(window.col - margin, window.row - margin, window.width + 2 * margin, window.height + 2 * margin)


def part_path(prefix: str, tile_id: str) -> UPath:
    """Where `Divide` keeps the superpixels of a tile with its overlap."""
    return upath(prefix) / "parts" / f"{tile_id}.tif"


def segments_path(prefix: str, tile_id: str) -> UPath:
    """Where the superpixels of a tile are once its neighbours agree."""
    return upath(prefix) / f"{tile_id}.tif"


def unite(prefix: str, found: Sequence[tuple[Tile, int]], overlap: int) -> None:
    """Write the superpixels of all tiles, `segments_path`, gapless over all of them; neighbours that agree are one.

    Every file is written each time: a tile that has come since shifts the numbers of those behind it.

    Args:
        prefix: where `Divide` kept its parts.
        found: tiles, each with the number of its superpixels.
        overlap: px around each that its part holds too.
    """
    tables = united([count for _, count in found], _agreed(prefix, found, overlap))
    for (tile, _), table in zip(found, tables, strict=True):
        numbers = table[_part_of(prefix, tile, tile.window, overlap)]
        segments.write_segments(segments_path(prefix, tile.id), numbers, tile.grid, tile.window)


def _agreed(prefix: str, found: Sequence[tuple[Tile, int]], overlap: int) -> dict[tuple[int, int], np.ndarray]:
    """(position of a tile, of the one right of or below it) -> the pairs that are one."""
    corners = {(tile.grid, tile.window.row, tile.window.col): at for at, (tile, _) in enumerate(found)}
    pairs = {}
    for one, (tile, _) in enumerate(found):
        window = tile.window
        for line, place in (
            ("col", (tile.grid, window.row, window.col1)),
            ("row", (tile.grid, window.row1, window.col)),
        ):
            if (other := corners.get(place)) is not None:
                pairs[one, other] = _pairs(prefix, tile, found[other][0], line, overlap)
    return pairs


def _pairs(prefix: str, one: Tile, other: Tile, line: str, overlap: int) -> np.ndarray:
    """Segments that two neighbours found alike around their border: a column or a row of the grid."""
    zone = grown(one.window, overlap).intersect(grown(other.window, overlap))
    border = np.s_[:, overlap - 1 : overlap + 1] if line == "col" else np.s_[overlap - 1 : overlap + 1, :]
    one_HW, other_HW = (_part_of(prefix, tile, zone, overlap) for tile in (one, other))
    return agreeing(one_HW, other_HW, border)


def _part_of(prefix: str, tile: Tile, window: Window, overlap: int) -> np.ndarray:
    """Segments of `window` as the tile alone numbers them."""
    return segments.read_segments([(grown(tile.window, overlap), part_path(prefix, tile.id))], window)
