"""Tiles of a region, and their pixels."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np

from rayseg.errors import DataError
from rayseg.geo import region
from rayseg.geo.grid import Grid, Lattice, Tile, Window, tile_at
from rayseg.io import rasters
from rayseg.io.sources import Source, from_json
from rayseg.store import is_local

Row = dict[str, Any]
_PIECE = 256  # px; what is damaged is left out in squares of this side


class ReadTile:
    """`sources, <tile> -> image, valid, reach`: the tile's pixels with the halo that its patches need.

    image: (bands, height, width) in the imagery's dtype over the window `reach`; valid: (height, width) bool.
    A tile without any valid pixel in its own window is settled as "nodata". What cannot be read counts as without
    imagery, so a damaged file costs nothing but its own ground: `incomplete` says why something is missing in the
    tile's own window, `unread` why something is around it.

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
        return read_reach(row, Lattice.of(tile.grid, self.patch, self.stride).reach(tile.window), self.bands)


def read_reach(row: Row, reach: Window, bands: Sequence[str]) -> Row:
    """A tile's row with image, valid, reach, and `incomplete` and `unread` if something is missing, as `ReadTile` says.

    Raises:
        DataError: nothing can be read.
    """
    tile, sources = Tile.from_row(row), from_json(row["sources"])
    try:
        (image_CHW, valid_HW), unread = rasters.read(sources, tile.grid, reach, bands=bands), _Unread()
    except DataError as error:
        image_CHW, valid_HW, unread = _read_in_pieces(sources, tile, reach, bands, error)
    if not valid_HW[tile.window.slices(reach)].any():
        if unread.inside:
            raise DataError(unread.inside)
        return row | {"status": "nodata"}
    return row | {"image": image_CHW, "valid": valid_HW, "reach": reach} | unread.columns()


def _read_in_pieces(
    sources: Sequence[Source], tile: Tile, reach: Window, bands: Sequence[str], error: DataError
) -> tuple[np.ndarray, np.ndarray, "_Unread"]:
    """(image, valid, what is missing) of `reach`; raises `error` where nothing can be read."""
    image_CHW: np.ndarray | None = None
    valid_HW = np.zeros((reach.height, reach.width), bool)
    unread = _Unread()
    for source in sources:
        for piece in _pieces(rasters.footprint(source, tile.grid).intersect(reach)):
            rows_cols = piece.slices(reach)
            try:
                pixels_CHW, ok_HW = rasters.read([source], tile.grid, piece, bands=bands)
            except DataError as found:
                unread.note(str(found), inside=not piece.intersect(tile.window).empty)
                if all(is_local(href) for href, _ in source.assets):
                    continue
                break  # every further try would wait for the network again
            if image_CHW is None:
                image_CHW = np.zeros((len(pixels_CHW), reach.height, reach.width), pixels_CHW.dtype)
            np.copyto(image_CHW[:, *rows_cols], pixels_CHW, where=ok_HW & ~valid_HW[rows_cols])
            valid_HW[rows_cols] |= ok_HW
    if image_CHW is None:
        raise error
    return image_CHW, valid_HW, unread


def incomplete(row: Row) -> Row:
    """The fate of a tile of which a part could not be read: failed, so that it is seen, and mended by a retry."""
    why = row.get("incomplete")
    return {"status": "failed", "reason": f"a part of the tile cannot be read: {why}"} if why else {}


@dataclass
class _Unread:
    """The first reason why something in a tile's own window, and around it, could not be read."""

    inside: str = ""
    around: str = ""

    def note(self, reason: str, *, inside: bool) -> None:
        """Keep the reason unless there is one already."""
        if inside:
            self.inside = self.inside or reason
        else:
            self.around = self.around or reason

    def columns(self) -> Row:
        """Those of a row."""
        return {key: why for key, why in (("incomplete", self.inside), ("unread", self.around)) if why}


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
    return [row for rows in rows_by_grid(sources, geometry, size=size, halo=halo) for row in rows]


def rows_by_grid(
    sources: Sequence[Source], geometry: dict[str, Any] | None, *, size: int, halo: int
) -> Iterator[list[Row]]:
    """`tile_rows` of one grid after the other: of a planet, a zone at a time."""
    for grid, its in rasters.grids_of(sources):
        yield _rows_on(grid, its, geometry, size, halo)


def _rows_on(grid: Grid, sources: Sequence[Source], geometry: dict[str, Any] | None, size: int, halo: int) -> list[Row]:
    footprints = [rasters.footprint(source, grid) for source in sources]
    extent = reduce(Window.union, footprints)
    core_N2 = np.unique(np.concatenate([_touched(window, size, 0) for window in footprints]), axis=0)
    low_N2 = np.maximum(core_N2 * size, (extent.row, extent.col))
    high_N2 = np.minimum((core_N2 + 1) * size, (extent.row1, extent.col1))
    corners_N4 = np.concatenate([low_N2[:, ::-1], high_N2[:, ::-1]], axis=1)
    inside_N = region.windows_inside(region.on_grid(geometry, grid), grid, corners_N4)
    near = _indices_by_tile(footprints, size, halo)
    described = [json.dumps(source.to_row()) for source in sources]
    texts: dict[tuple[int, ...], str] = {}
    rows = []
    for row, col in core_N2[inside_N].tolist():
        indices = near[row, col]
        if indices not in texts:
            texts[indices] = f"[{', '.join(described[index] for index in indices)}]"
        rows.append(tile_at(grid, row, col, size=size, extent=extent).to_row() | {"sources": texts[indices]})
    return rows


def _touched(window: Window, size: int, halo: int) -> np.ndarray:
    """(N, 2) tile row and column of every tile that `window` and `halo` px around it reach into."""
    rows = np.arange((window.row - halo) // size, -(-(window.row1 + halo) // size))
    cols = np.arange((window.col - halo) // size, -(-(window.col1 + halo) // size))
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)


def _indices_by_tile(footprints: Sequence[Window], size: int, halo: int) -> dict[tuple[int, int], tuple[int, ...]]:
    """(tile row, tile col) -> positions of the footprints that reach into the tile and `halo` px around it."""
    found: dict[tuple[int, int], tuple[int, ...]] = {}
    for index, window in enumerate(footprints):
        alone = (index,)
        for row, col in map(tuple, _touched(window, size, halo).tolist()):
            before = found.get((row, col))
            found[row, col] = alone if before is None else (*before, index)
    return found
