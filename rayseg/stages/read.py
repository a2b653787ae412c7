"""Tiles of a region, and their pixels."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from typing import Any

from rayseg.geo import Grid, Lattice, Tile, Window, tile_at
from rayseg.io import rasters, regions
from rayseg.io.sources import Source

Row = dict[str, Any]


class ReadTile:
    """`sources, <tile> -> image, valid, reach`: the tile's pixels with the halo that its patches need.

    image: (bands, height, width) in the imagery's dtype over the window `reach`; valid: (height, width) bool.
    A tile without any valid pixel in its own window is settled as "nodata".

    Args:
        bands: names, in the order the model takes them.
        patch: side of a model patch in px.
        stride: distance of patches in px.
    """

    def __init__(self, bands: Sequence[str], *, patch: int, stride: int) -> None:
        self.bands = tuple(bands)
        self.patch, self.stride = patch, stride

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Read each tile."""
        return [self._read(row) for row in rows]

    def _read(self, row: Row) -> Row:
        tile = Tile.from_row(row)
        reach = Lattice.of(tile.grid, self.patch, self.stride).reach(tile.window)
        sources = [Source.from_row(source) for source in json.loads(row["sources"])]
        image, valid = rasters.read(sources, tile.grid, reach, bands=self.bands)
        if not valid[tile.window.slices(reach)].any():
            return row | {"status": "nodata"}
        return row | {"image": image, "valid": valid, "reach": reach}


def tile_rows(sources: Sequence[Source], geometry: dict[str, Any] | None, *, size: int, halo: int) -> list[Row]:
    """One flat row for every tile of the region that a source touches, grid by grid, row by row.

    Args:
        sources: imagery, first valid wins.
        geometry: GeoJSON in EPSG:4326 that tiles must meet; None for all of the imagery.
        size: side of a tile in px.
        halo: px around a tile in which a source still matters to it.

    Returns:
        The columns of `Tile.to_row`, and `sources`: the tile's sources as JSON, in order.
    """
    return [row for grid, its in rasters.grids_of(sources) for row in _rows_on(grid, its, geometry, size, halo)]


def _rows_on(grid: Grid, sources: Sequence[Source], geometry: dict[str, Any] | None, size: int, halo: int) -> list[Row]:
    footprints = [rasters.footprint(source, grid) for source in sources]
    extent = reduce(Window.union, footprints)
    near = _indices_by_tile(footprints, size, halo)
    core = sorted(_indices_by_tile(footprints, size, 0))
    candidates = [tile_at(grid, row, col, size=size, extent=extent) for row, col in core]
    texts: dict[tuple[int, ...], str] = {}
    rows = []
    for tile in regions.tiles_inside(candidates, regions.on_grid(geometry, grid)):
        indices = tuple(near[tile.window.row // size, tile.window.col // size])
        if indices not in texts:
            texts[indices] = json.dumps([sources[index].to_row() for index in indices])
        rows.append(tile.to_row() | {"sources": texts[indices]})
    return rows


def _indices_by_tile(footprints: Sequence[Window], size: int, halo: int) -> dict[tuple[int, int], list[int]]:
    """(tile row, tile col) -> positions of the footprints that reach into the tile and `halo` px around it."""
    found: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, window in enumerate(footprints):
        for row in range((window.row - halo) // size, -(-(window.row1 + halo) // size)):
            for col in range((window.col - halo) // size, -(-(window.col1 + halo) // size)):
                found[row, col].append(index)
    return found
