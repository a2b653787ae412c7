"""Tiles of labelled images beside their masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io import cog, pictures
from rayseg.io.masks import read_classes
from rayseg.io.scenes import LabelledImage, image_on, masks_on
from rayseg.metrics import Confusion
from rayseg.store import upath
from rayseg.vision.color import ClassTable

Row = dict[str, Any]
_SIDE = 512  # px of a picture's panels at most


class CompareTile:
    """`classes, <tile> -> facts`: how a tile's classes and its mask meet, as counts; `<tile id>.tif` keeps the classes.

    Args:
        prefix: below which files go.
        images: labelled images that the tiles are of.
        table: the classes, with values 0, 1, 2, ...
    """

    def __init__(self, prefix: str, images: Sequence[LabelledImage], table: ClassTable) -> None:
        self.prefix, self.images, self.table = prefix, tuple(images), table

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Compare each tile."""
        return [self._compare(row) for row in rows]

    def _compare(self, row: Row) -> Row:
        tile, classes_HW = Tile.from_row(row), row["classes"]
        truth_HW = truth_of(self.images, tile.grid, tile.window, self.table)
        confusion = Confusion.from_arrays(truth_HW, classes_HW, len(self.table.classes))
        path = upath(self.prefix) / f"{tile.id}.tif"
        cog.write_classes(path, classes_HW, tile.grid, tile.window, self.table)
        facts = {"confusion": confusion.matrix.tolist()}
        return {"status": "done", "facts": facts} | {key: row[key] for key in ("id", "seconds")}


def truth_of(images: Sequence[LabelledImage], grid: Grid, window: Window, table: ClassTable) -> NDArray[np.uint8]:
    """The masks of all images on a window, (height, width) uint8, 255 where none is labelled."""
    return read_classes([mask for one in _on(images, grid) for mask in masks_on(one)], grid, window, table)


def _on(images: Sequence[LabelledImage], grid: Grid) -> list[LabelledImage]:
    """The images that may lie on a grid: one without CRS is a single image's."""
    return [one for one in images if (one.grid.crs if grid.crs else one.grid == grid)]


def pictured(prefix: str, row: Row, images: Sequence[LabelledImage], table: ClassTable) -> NDArray[np.uint8]:
    """A compared tile as (height, 3 x width, 3): imagery, mask, map; what is not labelled is grey."""
    tile = Tile.from_row(row)
    step = max(1, -(-max(tile.window.width, tile.window.height) // _SIDE))
    colors_K3 = np.full((256, 3), 110, np.uint8)
    colors_K3[list(table.values)] = table.colors
    image_HWC = pictures.shown([image_on(one) for one in _on(images, tile.grid)], tile.grid, tile.window)
    truth_HW = truth_of(images, tile.grid, tile.window, table)
    [found_HW] = cog.read_bands(upath(prefix) / f"{tile.id}.tif")
    panels = [image_HWC, colors_K3[truth_HW], colors_K3[found_HW]]
    return np.concatenate([panel[::step, ::step] for panel in panels], axis=1)
