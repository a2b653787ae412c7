"""Tiles of a region, and their pixels."""

import json
from collections import defaultdict
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np

from rayseg.errors import DataError
from rayseg.geo import Grid, Lattice, Tile, Window, tile_at
from rayseg.io import rasters, regions
from rayseg.io.sources import Source

Row = dict[str, Any]
_PIECE = 256


class ReadTile:
    """`sources, <tile> -> image, valid, reach`: the tile's pixels with the halo that its patches need.

    image: (bands, height, width) in the imagery's dtype over the window `reach`; valid: (height, width) bool.
    A tile without any valid pixel in its own window is settled as "nodata". Where only the halo cannot be read it
    counts as without imagery, and the column `unread` says why: a damaged neighbour costs no tile but its own.

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
        if row.get("refused"):
            raise DataError(row["refused"])
        tile = Tile.from_row(row)
        reach = Lattice.of(tile.grid, self.patch, self.stride).reach(tile.window)
        sources = [Source.from_row(source) for source in json.loads(row["sources"])]
        try:
            (image, valid), unread = rasters.read(sources, tile.grid, reach, bands=self.bands), []
        except DataError:
            image, valid, unread = self._read_in_pieces(sources, tile, reach)
        if not valid[tile.window.slices(reach)].any():
            return row | {"status": "nodata"}
        return row | {"image": image, "valid": valid, "reach": reach} | ({"unread": unread} if unread else {})

    def _read_in_pieces(
        self, sources: Sequence[Source], tile: Tile, reach: Window
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """(image, valid, reasons) of `reach`, where pieces outside the tile that cannot be read are left out."""
        own_CHW, own_HW = rasters.read(sources, tile.grid, tile.window, bands=self.bands)
        image_CHW = np.zeros((len(own_CHW), reach.height, reach.width), own_CHW.dtype)
        valid_HW = np.zeros((reach.height, reach.width), bool)
        reasons: dict[str, None] = {}
        for piece in _pieces(reach):
            rows_cols = piece.slices(reach)
            try:
                image_CHW[:, *rows_cols], valid_HW[rows_cols] = rasters.read(
                    sources, tile.grid, piece, bands=self.bands
                )
            except DataError as error:
                reasons[str(error)] = None
        rows_cols = tile.window.slices(reach)
        image_CHW[:, *rows_cols], valid_HW[rows_cols] = own_CHW, own_HW
        return image_CHW, valid_HW, list(reasons)


def _pieces(window: Window) -> list[Window]:
    """`window` cut at multiples of `_PIECE` px of its grid."""
    return [
        Window(col, row, _PIECE, _PIECE).intersect(window)
        for row in range(window.row // _PIECE * _PIECE, window.row1, _PIECE)
        for col in range(window.col // _PIECE * _PIECE, window.col1, _PIECE)
    ]


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
