"""Scenes before anything is learnt from them: where their values lie, and whether there is anything to tell apart."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.geo.grid import Tile, Window
from rayseg.io import rasters
from rayseg.io.sources import from_json

Row = dict[str, Any]
BLOCK = 256
MOST_BLOCKS = 64
ROBUST = (1, 99)


class Survey:
    """`tiles -> facts`: percentiles of every band, from at most 64 blocks of 256 px spread evenly over the scene.

    facts: `low`, `high`: the 1st and 99th percentile of each band's valid values, widened to 1 where they are equal.
    A scene without a valid pixel is settled as "nodata"; one whose valid pixels are all the same (every pixel is
    looked at before that is said) as "empty".

    Args:
        bands: names, in order.
    """

    def __init__(self, bands: Sequence[str]) -> None:
        self.bands = tuple(bands)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Survey each scene."""
        return [self._survey(row) for row in rows]

    def _survey(self, row: Row) -> Row:
        kept = {key: row[key] for key in ("id", "seconds") if key in row}
        tiles = json.loads(row["tiles"])
        values_CN = self._values(list(_blocks(tiles)))
        if values_CN.shape[1] == 0 or (values_CN == values_CN[:, :1]).all():
            values_CN = self._first_two(tiles, values_CN)
        if values_CN.shape[1] == 0:
            return kept | {"status": "nodata", "reason": "the scene has no valid pixel"}
        if values_CN.shape[1] == 1:
            return kept | {"status": "empty", "reason": f"all pixels of the scene are {values_CN[:, 0].tolist()}"}
        low_C, high_C = np.percentile(values_CN.astype(np.float64), ROBUST, axis=1)
        high_C = np.where(high_C > low_C, high_C, low_C + 1)
        return kept | {"facts": {"low": low_C.tolist(), "high": high_C.tolist()}}

    def _values(self, blocks: Sequence[tuple[Row, Window]]) -> NDArray[Any]:
        """Valid values (C, N) of some blocks."""
        return np.concatenate([self._read(*block) for block in blocks], axis=1)

    def _first_two(self, tiles: Sequence[Row], values_CN: NDArray[Any]) -> NDArray[Any]:
        """All values of the first tile that shows a second one; else one pixel, or none where there is no data."""
        for tile in tiles:
            values_CN = np.concatenate([values_CN[:, :1], self._read(tile, Tile.from_row(tile).window)], axis=1)
            if (values_CN != values_CN[:, :1]).any():
                return values_CN
        return values_CN[:, :1]

    def _read(self, row: Row, window: Window) -> NDArray[Any]:
        sources = from_json(row["sources"])
        image_CHW, valid_HW = rasters.read(sources, Tile.from_row(row).grid, window, bands=self.bands)
        return image_CHW[:, valid_HW]


def _blocks(tiles: Sequence[Row]) -> Iterator[tuple[Row, Window]]:
    """Blocks of `BLOCK` px on a regular raster in every tile, at most `MOST_BLOCKS` in all."""
    found = [
        (row, Window(col, line, BLOCK, BLOCK).intersect(window))
        for row in tiles
        for window in [Tile.from_row(row).window]
        for line in range(window.row, window.row1, BLOCK)
        for col in range(window.col, window.col1, BLOCK)
    ]
    for at in sorted({round(at) for at in np.linspace(0, len(found) - 1, MOST_BLOCKS)}):
        yield found[at]
