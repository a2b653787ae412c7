"""Generalize a class map: sieve it, and draw its polygons with simple outlines."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from scipy import ndimage

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row
from rayseg.geo import region
from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.io import cog, maps, rasters, vectors
from rayseg.io.sources import Source
from rayseg.store import upath
from rayseg.vision import sieve
from rayseg.vision.color import ClassTable

BLOCK = 2048
"""Side in px of the blocks of a grid whose outlines are simplified together, whatever the tiles are."""


@dataclass(frozen=True)
class GeneralRow:
    """A tile of a map, the blocks drawn with it, and the tiles around both.

    Attributes:
        tile: the tile.
        blocks: windows of blocks; each block belongs to one tile of those that it meets.
        near: (id, col, row, width, height) of the tiles that have a map there, the tile among them.
    """

    tile: Tile
    blocks: tuple[Window, ...]
    near: tuple[tuple[str, int, int, int, int], ...]

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "GeneralRow":
        """The record of a row."""
        blocks = tuple(Window(left, top, BLOCK, BLOCK) for left, top in json.loads(row["blocks"]))
        return cls(Tile.from_row(row), blocks, tuple((name, *place) for name, *place in json.loads(row["near"])))

    def to_row(self) -> Row:
        """The record as a flat row."""
        blocks = [(block.col, block.row) for block in self.blocks]
        return self.tile.to_row() | {"blocks": json.dumps(blocks), "near": json.dumps(self.near)}


class Generalize:
    """`tile, blocks, near -> facts`: sieved.tif of the tile, and the parts of the polygons of its blocks.

    Args:
        tiles: prefix of the map's tiles; sieved.tif is written next to classes.tif.
        blocks: prefix of the parts.
        table: the classes.
        bands: of the scores: one per class, or one alone (see `WriteTile`).
        min_area: m2 (px without CRS) of the smallest unit; None keeps all, and writes no sieved.tif.
        simplify: tolerance of outlines in m (px without CRS); None keeps the outlines of pixels.
        geometry: the region, GeoJSON in EPSG:4326, or None.
    """

    def __init__(
        self,
        tiles: str,
        blocks: str,
        table: ClassTable,
        *,
        bands: Sequence[str],
        min_area: float | None,
        simplify: float | None,
        geometry: dict[str, Any] | None,
    ) -> None:
        self.tiles, self.blocks, self.table, self.bands = tiles, blocks, table, tuple(bands)
        self.min_area, self.simplify, self.geometry = min_area, simplify or 0.0, geometry

    def __call__(self, rows: list[GeneralRow]) -> list[Settled]:
        """Generalize each tile."""
        return [self._generalize(row) for row in rows]

    def _generalize(self, row: GeneralRow) -> Settled:
        tile, grid = row.tile, row.tile.grid
        window = around(row)
        reach = with_margin(grid, window, self.min_area)
        classes_HW = self._read(row, "classes", ("class",), reach)[0]
        sieved_HW = self._sieved(classes_HW, grid, reach)
        drawn_HW = self._beyond_seams(sieved_HW, grid, reach)
        of_tile_HW = sieved_HW[tile.window.slices(reach)]
        if self.min_area is not None:
            path = upath(self.tiles) / tile.id / "sieved.tif"
            cog.write_classes(path, of_tile_HW, grid, tile.window, self.table)
        # The blocks, each by itself: outlines are simplified up to their borders, where blocks fit together.
        parts: dict[str, tuple[int, int, int]] = {}
        for block in row.blocks:
            cut = block.slices(reach)
            scores_CHW = self._scores(row, block, sieved_HW[cut], classes_HW[cut])
            simplify = _in_pixels(self.simplify, grid, block)
            kept_HW = sieved_HW[cut] != NODATA
            table = vectors.polygons_of(
                drawn_HW[cut], scores_CHW, grid, block, values=self.table.values, kept_HW=kept_HW, simplify=simplify
            )
            name = f"{tile.id}-{len(parts)}"  # ids are unique; scenes with grids of their own share places
            vectors.write_parts(upath(self.blocks) / f"{name}.parquet", table)
            parts[name] = (block.row, block.col, len(table))
        values, counts = np.unique(of_tile_HW[of_tile_HW != NODATA], return_counts=True)
        pixels = {str(value): int(count) for value, count in zip(values, counts, strict=True)}
        return Settled("done", facts={"counts": pixels, "blocks": parts})

    def _sieved(self, classes_HW: NDArray[np.uint8], grid: Grid, reach: Window) -> NDArray[np.uint8]:
        if self.min_area is None:
            return classes_HW
        # A seam cuts units: what lies there may be large on both sides together.
        seam_HW = None
        if grid.divided:
            ground_HW = region.pixels_inside(region.on_grid(None, grid, reach), grid, reach)
            seam_HW = ndimage.binary_dilation(~ground_HW) & ground_HW
        return sieved(classes_HW, grid, reach, self.min_area, seam_HW)

    def _beyond_seams(self, classes_HW: NDArray[np.uint8], grid: Grid, reach: Window) -> NDArray[np.uint8]:
        """The map with a few px more beyond a seam between zones, where polygons are cut later."""
        if not grid.divided:
            return classes_HW
        ground_HW = region.pixels_inside(region.on_grid(None, grid, reach), grid, reach)
        whole_HW = region.pixels_inside(region.on_grid(self.geometry, grid, reach, whole=True), grid, reach)
        open_HW = ~ground_HW & whole_HW & (classes_HW == NODATA)
        # Outlines beyond the seam are simplified, too: they must not come back over it.
        depth = 2 + int(np.ceil(2 * self.simplify / min(grid.resolution)))
        return sieve.filled(classes_HW, np.where(open_HW, depth, 0).astype(np.int32))

    def _scores(
        self, row: GeneralRow, block: Window, sieved_HW: NDArray[np.uint8], classes_HW: NDArray[np.uint8]
    ) -> NDArray[np.uint8]:
        scores_CHW = self._read(row, "scores", self.bands, block)
        if len(self.bands) > 1 or self.table.binary:
            return scores_CHW
        # Scores of the predicted class alone: of any other class nothing is known.
        scores_CHW = np.where(sieved_HW == classes_HW, scores_CHW, 0).astype(np.uint8)
        return np.broadcast_to(scores_CHW, (len(self.table.classes), *classes_HW.shape))

    def _read(self, row: GeneralRow, name: str, bands: Sequence[str], window: Window) -> NDArray[np.uint8]:
        sources = self._sources(row, name, bands)
        image, valid = rasters.read(sources, row.tile.grid, window, bands=bands, categorical=True)
        return np.where(valid, image, NODATA).astype(np.uint8)

    def _sources(self, row: GeneralRow, name: str, bands: Sequence[str]) -> list[Source]:
        tiles = [Tile(name, row.tile.grid, Window(*place)) for name, *place in row.near]
        return [maps.source_on(tile, str(upath(self.tiles) / tile.id / f"{name}.tif"), bands) for tile in tiles]


def sieved(
    classes_HW: NDArray[np.uint8],
    grid: Grid,
    window: Window,
    min_area: float,
    seam_HW: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The map over `window` without units below `min_area` m2 (px without CRS), except those that touch `seam_HW`."""

    def least(rows: NDArray[np.int64], cols: NDArray[np.int64]) -> NDArray[np.float64]:
        blocks_N2 = np.stack([(rows + window.row) // BLOCK, (cols + window.col) // BLOCK], axis=1)
        few_N2, where = np.unique(blocks_N2, axis=0, return_inverse=True)
        return np.array([min_area / pixel_area(grid, *block) for block in few_N2.tolist()])[where.ravel()]

    return sieve.sieved(classes_HW, least, seam_HW)


def outlined(
    classes_HW: NDArray[np.uint8], scores_CHW: NDArray[np.uint8] | None, grid: Grid, window: Window, simplify: float
) -> list[pa.Table]:
    """The parts of polygons of a whole map over `window`, with a tolerance in m (px without CRS), block by block."""
    parts = []
    for row, col in blocks_of(window):
        # Some nodata around the map: its own edge is an outline like others, a block's border is not.
        block = Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK)
        cut = block.intersect(Window(window.col - 2, window.row - 2, window.width + 4, window.height + 4))
        inside = cut.intersect(window)
        own_HW = np.full((cut.height, cut.width), NODATA, np.uint8)
        own_HW[inside.slices(cut)] = classes_HW[inside.slices(window)]
        own_CHW = None
        if scores_CHW is not None:
            own_CHW = np.full((len(scores_CHW), *own_HW.shape), NODATA, np.uint8)
            own_CHW[:, *inside.slices(cut)] = scores_CHW[:, *inside.slices(window)]
        skip = None if scores_CHW is not None else ()
        tolerance = _in_pixels(simplify, grid, block)
        parts.append(vectors.polygons_of(own_HW, own_CHW, grid, cut, skip=skip, simplify=tolerance))
    return parts


def _in_pixels(simplify: float, grid: Grid, block: Window) -> float:
    return simplify / float(np.sqrt(pixel_area(grid, block.row // BLOCK, block.col // BLOCK)))


def around(row: GeneralRow) -> Window:
    """The window of a row's tile and blocks together."""
    return reduce(Window.union, row.blocks, row.tile.window)


def with_margin(grid: Grid, window: Window, min_area: float | None) -> Window:
    """The window with the pixels around it that decide what sieving makes of it."""
    if min_area is None:
        return window
    # Twice: pixels of the neighbouring blocks, which a margin reaches, can be smaller.
    least = min_area / min(pixel_area(grid, *block) for block in blocks_of(window, 1))
    margin = sieve.margin(least)
    return Window(window.col - margin, window.row - margin, window.width + 2 * margin, window.height + 2 * margin)


def blocks_of(window: Window, more: int = 0) -> list[tuple[int, int]]:
    """(row, col) of the blocks that a window meets, and of `more` rows and columns of blocks around them."""
    rows = range(window.row // BLOCK - more, -(-window.row1 // BLOCK) + more)
    cols = range(window.col // BLOCK - more, -(-window.col1 // BLOCK) + more)
    return [(row, col) for row in rows for col in cols]


@lru_cache(maxsize=4096)
def pixel_area(grid: Grid, row: int, col: int) -> float:
    """Mean area in m2 of the pixels of a block on the ground; 1 without CRS, and where the block leaves the Earth."""
    tile = Tile("", grid, Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK))
    area = maps.pixel_area_m2(tile)
    return area if area and np.isfinite(area) else 1.0
