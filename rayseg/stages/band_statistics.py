"""Percentiles of the bands of a scene, computed before its network trains."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import Window
from rayseg.io import rasters
from rayseg.stages.rows import SceneRow, TileRow

BLOCK = 256
MOST_BLOCKS = 64
ROBUST = (1, 99)


@dataclass
class BandPercentiles:
    """`tiles -> facts`: percentiles of every band, from at most 64 blocks of 256 px spread evenly over the scene.

    facts: `low`, `high`: the 1st and 99th percentile of each band's valid values; `high` is `low` + 1 where both are
    equal. A scene without a valid pixel is settled as "nodata"; a scene whose valid pixels are all the same as "empty",
    after every pixel was read.

    Args:
        bands: names, in order.
    """

    bands: Sequence[str]

    def __call__(self, rows: list[SceneRow]) -> list[Settled]:
        """Compute the statistics of each scene."""
        return [self._percentiles(row) for row in rows]

    def _percentiles(self, scene: SceneRow) -> Settled:
        values_CN = np.concatenate([self._read(*block) for block in _blocks(scene.tiles)], axis=1)
        # Blocks without two different values do not show that the whole scene has none.
        if values_CN.shape[1] == 0 or (values_CN == values_CN[:, :1]).all():
            values_CN = self._first_two(scene.tiles, values_CN)
        if values_CN.shape[1] == 0:
            return Settled("nodata", "the scene has no valid pixel")
        if values_CN.shape[1] == 1:
            return Settled("empty", f"all pixels of the scene are {values_CN[:, 0].tolist()}")
        low_C, high_C = np.percentile(values_CN.astype(np.float64), ROBUST, axis=1)
        high_C = np.where(high_C > low_C, high_C, low_C + 1)
        return Settled(facts={"low": low_C.tolist(), "high": high_C.tolist()})

    def _first_two(self, tiles: Sequence[TileRow], values_CN: NDArray[Any]) -> NDArray[Any]:
        """All values of the first tile with two different ones; else one pixel, or none where there is no data."""
        for tile in tiles:
            values_CN = np.concatenate([values_CN[:, :1], self._read(tile, tile.tile.window)], axis=1)
            if (values_CN != values_CN[:, :1]).any():
                return values_CN
        return values_CN[:, :1]

    def _read(self, row: TileRow, window: Window) -> NDArray[Any]:
        """Valid values (bands, pixels) of a window."""
        image_CHW, valid_HW = rasters.read(row.sources, row.tile.grid, window, bands=self.bands)
        return image_CHW[:, valid_HW]


def _blocks(tiles: Sequence[TileRow]) -> Iterator[tuple[TileRow, Window]]:
    """Blocks of `BLOCK` px on a regular raster in every tile, at most `MOST_BLOCKS` in all."""
    blocks = [
        (tile, Window(col, row, BLOCK, BLOCK).intersect(window))
        for tile in tiles
        for window in [tile.tile.window]
        for row in range(window.row, window.row1, BLOCK)
        for col in range(window.col, window.col1, BLOCK)
    ]
    for at in sorted({round(at) for at in np.linspace(0, len(blocks) - 1, MOST_BLOCKS)}):
        yield blocks[at]
