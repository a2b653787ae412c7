"""Two maps of the same ground, compared pixel by pixel."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from rayseg.geo.grid import NODATA, Tile
from rayseg.io import rasters
from rayseg.io.sources import Source, from_json
from rayseg.stages.rows import TileRow

BAND = "class"
"""Name of the one band of both maps' files."""


@dataclass(frozen=True, eq=False)
class ComparedRow(TileRow):
    """A tile with the tiles of two maps that meet it.

    Attributes:
        maps_json: the class rasters of both maps as JSON of sources; `sources` are those of the imagery.
    """

    maps_json: str = "[]"

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ComparedRow":
        """The record of a row of `diff.list_tiles`."""
        return cls(Tile.from_row(row), row["sources"], maps_json=row["maps"])


class CompareMaps:
    """`tile, maps -> classes, scores`: which class became which.

    Both maps are read on the tile's grid, so that neither's tiling matters.

    Args:
        before: prefix of the earlier map; hrefs of its files begin with it.
        codes: (256, 256) uint8: class before, class after -> class of the change; 255 is nodata.
    """

    def __init__(self, before: str, codes: np.ndarray) -> None:
        self.before, self.codes = f"{before}/", codes

    def __call__(self, rows: list[ComparedRow]) -> list[ComparedRow]:
        """Compare each tile; a score is 254 where there is a class."""
        return [self._tile(row) for row in rows]

    def _tile(self, row: ComparedRow) -> ComparedRow:
        maps = from_json(row.maps_json)
        older = [source for source in maps if source.assets[0][0].startswith(self.before)]
        newer = [source for source in maps if source not in older]
        classes_HW = self.codes[self._read(row, older), self._read(row, newer)]
        scores_HW = np.where(classes_HW == NODATA, NODATA, NODATA - 1).astype(np.uint8)
        return replace(row, classes=classes_HW, scores=scores_HW[None])

    def _read(self, row: ComparedRow, sources: list[Source]) -> np.ndarray:
        """Class values (height, width), 255 where the map has none."""
        window = row.tile.window
        if not sources:
            return np.full((window.height, window.width), NODATA, np.uint8)
        image, valid = rasters.read(sources, row.tile.grid, window, bands=[BAND], categorical=True)
        values: np.ndarray = np.where(valid, image[0], NODATA)
        return values
