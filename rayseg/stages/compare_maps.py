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
        before_json: class rasters of the earlier map as JSON of sources; `sources` are those of the imagery.
        after_json: those of the later map.
    """

    before_json: str = "[]"
    after_json: str = "[]"

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "ComparedRow":
        """The record of a row of `diff.list_tiles`."""
        return cls(Tile.from_row(row), row["sources"], before_json=row["before"], after_json=row["after"])


class CompareMaps:
    """`tile, before, after -> classes, scores`: which class became which.

    Both maps are read on the tile's grid, so that neither's tiling matters.

    Args:
        codes: (256, 256) uint8: class before, class after -> class of the change; 255 is nodata.
    """

    def __init__(self, codes: np.ndarray) -> None:
        self.codes = codes

    def __call__(self, rows: list[ComparedRow]) -> list[ComparedRow]:
        """Compare each tile; a score is 254 where there is a class."""
        return [self._tile(row) for row in rows]

    def _tile(self, row: ComparedRow) -> ComparedRow:
        before_HW, after_HW = (self._read(row, from_json(text)) for text in (row.before_json, row.after_json))
        classes_HW = self.codes[before_HW, after_HW]
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
