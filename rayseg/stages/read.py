"""Tiles of a region and their pixels."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import reduce
from typing import Any

import numpy as np

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row
from rayseg.errors import DataError
from rayseg.geo import region
from rayseg.geo.grid import Grid, Lattice, Window, tile_at
from rayseg.io import rasters
from rayseg.io.sources import Source
from rayseg.stages.rows import TileRow
from rayseg.store import is_local

_PIECE = 256  # px; damaged pixels are left out in squares of this side


@dataclass
class ReadTile:
    """`tile, sources -> image, valid, reach, inputs`: read the tile's pixels with the halo that its patches need.

    image: (bands, height, width) in the imagery's dtype over the window `reach`; valid: (height, width) bool.
    A tile without a valid pixel in its own window is settled as "nodata". Pixels that cannot be read count as nodata,
    so a damaged file costs only its own area: `incomplete` holds the reason if pixels of the tile are missing,
    `unread` if pixels of the halo are.

    Args:
        bands: names, in the order the model takes them.
        patch: side of a model patch in px.
        stride: distance of patches in px.
        made_by: key of what makes a map of the pixels; the ledger then keeps what a tile was made from.
    """

    bands: Sequence[str]
    _: KW_ONLY
    patch: int
    stride: int
    made_by: str = ""

    def __call__(self, rows: list[TileRow]) -> list[TileRow | Settled]:
        """Read each tile."""
        lattices = [Lattice.of(row.tile.grid, self.patch, self.stride) for row in rows]
        reaches = [lattice.reach(row.tile.window) for lattice, row in zip(lattices, rows, strict=True)]
        if self.made_by:
            rows = [replace(row, inputs=inputs_of(row, self.made_by)) for row in rows]
        return [read_reach(row, reach, self.bands) for row, reach in zip(rows, reaches, strict=True)]


def inputs_of(row: TileRow, made_by: str) -> str:
    """A hash of the tile's place, its sources, the versions of their files and what makes a map of them.

    It is "" if the version of a file is unknown.
    """
    sources = row.sources
    try:
        versions = [rasters.version(href) for source in sources for href, _ in source.assets]
    except DataError:
        return ""
    # Where a source's item lies does not matter: the source holds what it states.
    described = [replace(source, href="").to_row() for source in sources]
    text = json.dumps([made_by, row.tile.to_row(), described, versions], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16] if all(versions) else ""


def read_reach(row: TileRow, reach: Window, bands: Sequence[str]) -> TileRow | Settled:
    """`tile, sources -> image, valid, reach, incomplete, unread`, as `ReadTile` describes them.

    Raises:
        DataError: nothing can be read, or the tile's scene was refused when the run was planned.
    """
    if row.refused:
        raise DataError(row.refused)
    tile = row.tile
    try:
        # All at once: most files are not damaged.
        image_CHW, valid_HW = rasters.read(row.sources, tile.grid, reach, bands=bands)
        row = replace(row, image=image_CHW, valid=valid_HW, reach=reach)
    except DataError as error:
        row = _read_in_pieces(row, reach, bands, error)
    if row.valid[tile.window.slices(reach)].any():
        return row
    if row.incomplete:
        raise DataError(row.incomplete)
    return Settled("nodata")


def _read_in_pieces(row: TileRow, reach: Window, bands: Sequence[str], error: DataError) -> TileRow:
    """Read `reach` piece by piece and leave out what is damaged; raise `error` if nothing can be read."""
    image_CHW: np.ndarray | None = None
    valid_HW = np.zeros((reach.height, reach.width), bool)
    incomplete = unread = ""
    # Scenes in their order, so that the first valid pixel wins as in a read of the whole.
    for source in row.sources:
        for piece in _pieces(rasters.footprint(source, row.tile.grid).intersect(reach)):
            rows_cols = piece.slices(reach)
            try:
                pixels_CHW, ok_HW = rasters.read([source], row.tile.grid, piece, bands=bands)
            except DataError as problem:
                # Damage in the margin alone costs patches their surroundings, but the tile has all of
                # its pixels.
                if piece.intersect(row.tile.window).empty:
                    unread = unread or str(problem)
                else:
                    incomplete = incomplete or str(problem)
                if all(is_local(href) for href, _ in source.assets):
                    continue
                break  # because each further attempt would wait for the network again
            if image_CHW is None:
                image_CHW = np.zeros((len(pixels_CHW), reach.height, reach.width), pixels_CHW.dtype)
            np.copyto(image_CHW[:, *rows_cols], pixels_CHW, where=ok_HW & ~valid_HW[rows_cols])
            valid_HW[rows_cols] |= ok_HW
    if image_CHW is None:
        raise error
    return replace(row, image=image_CHW, valid=valid_HW, reach=reach, incomplete=incomplete, unread=unread)


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
    """`tile_rows`, one grid at a time: of a planet, one UTM zone at a time."""
    for grid, on_grid in rasters.grids_of(sources):
        yield rows_on(grid, on_grid, geometry, size, halo)


def rows_on(grid: Grid, sources: Sequence[Source], geometry: dict[str, Any] | None, size: int, halo: int) -> list[Row]:
    """`tile_rows` of one grid."""
    # 1. Tiles that a source touches, cut to the extent of the imagery; of these, the tiles in the region.
    footprints = [rasters.footprint(source, grid) for source in sources]
    extent = reduce(Window.union, footprints)
    # Only around the region: of a large source next to fine ones, all tiles would fill the memory.
    inside = region.part_in_region(geometry, grid, extent)
    more = size + halo
    around = Window(inside.col - more, inside.row - more, inside.width + 2 * more, inside.height + 2 * more)
    footprints = [window.intersect(around) for window in footprints]
    core_N2 = np.unique(np.concatenate([_touched(window.intersect(inside), size, 0) for window in footprints]), axis=0)
    low_N2 = np.maximum(core_N2 * size, (extent.row, extent.col))
    high_N2 = np.minimum((core_N2 + 1) * size, (extent.row1, extent.col1))
    corners_N4 = np.concatenate([low_N2[:, ::-1], high_N2[:, ::-1]], axis=1)
    corners_N4 = region.windows_on_ground(grid, corners_N4)
    inside_N = region.windows_inside(region.on_grid(geometry, grid, extent), grid, corners_N4)
    inside_N &= corners_N4[:, 2] > corners_N4[:, 0]
    # 2. The sources of every tile, with those that only its halo reaches.
    near: dict[tuple[int, int], tuple[int, ...]] = {}
    for index, window in enumerate(footprints):
        alone = (index,)  # one tuple for all tiles of a single source: a planet has millions of them
        for row, col in map(tuple, _touched(window, size, halo).tolist()):
            near[row, col] = (*near[row, col], index) if (row, col) in near else alone
    # 3. Rows; tiles with the same sources share one text.
    described = [json.dumps(source.to_row()) for source in sources]
    texts: dict[tuple[int, ...], str] = {}
    rows = []
    cut_N4 = corners_N4[inside_N]
    for (row, col), (left, top, right, bottom) in zip(core_N2[inside_N].tolist(), cut_N4.tolist(), strict=True):
        indices = near[row, col]
        if indices not in texts:
            texts[indices] = f"[{', '.join(described[index] for index in indices)}]"
        cut = Window(left, top, right - left, bottom - top)
        rows.append(tile_at(grid, row, col, size=size, extent=cut).to_row() | {"sources": texts[indices]})
    return rows


def _touched(window: Window, size: int, halo: int) -> np.ndarray:
    """(N, 2) tile row and column of every tile that `window` and `halo` px around it reach into; none if empty."""
    if window.empty:
        return np.empty((0, 2), int)
    rows = np.arange((window.row - halo) // size, -(-(window.row1 + halo) // size))
    cols = np.arange((window.col - halo) // size, -(-(window.col1 + halo) // size))
    return np.stack(np.meshgrid(rows, cols, indexing="ij"), axis=-1).reshape(-1, 2)
