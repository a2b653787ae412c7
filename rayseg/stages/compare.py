"""Tiles of labelled images compared with their masks."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import Grid, Tile
from rayseg.io import cog, pictures
from rayseg.io.masks import read_classes
from rayseg.io.scenes import LabelledImage, image_on, masks_on
from rayseg.metrics import Confusion
from rayseg.stages.rows import TileRow
from rayseg.store import upath
from rayseg.vision.color import ClassTable

_SIDE = 512  # px of a picture's panels at most


@dataclass
class CompareTile:
    """`tile, classes -> facts`: the confusion matrix of a tile's classes and its mask; write `<tile id>.tif`.

    Args:
        prefix: folder of the files.
        images: labelled images that the tiles are of.
        table: the classes, with values 0, 1, 2, ...
    """

    prefix: str
    images: Sequence[LabelledImage]
    table: ClassTable

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Compare each tile."""
        settled = []
        for row in rows:
            tile = row.tile
            truth_HW = truth_of(self.images, tile, self.table)
            confusion = Confusion.from_arrays(truth_HW, row.classes, len(self.table.classes))
            cog.write_classes(upath(self.prefix) / f"{tile.id}.tif", row.classes, tile.grid, tile.window, self.table)
            batch = {"batch": row.batch} if row.batch else {}
            settled.append(Settled(facts={"confusion": confusion.matrix.tolist(), **batch}))
        return settled


def truth_of(images: Sequence[LabelledImage], tile: Tile, table: ClassTable) -> NDArray[np.uint8]:
    """The masks of all images on a tile, (height, width) uint8, 255 where no image is labelled."""
    masks = [mask for image in images_on(images, tile.grid) for mask in masks_on(image)]
    return read_classes(masks, tile.grid, tile.window, table)


def images_on(images: Sequence[LabelledImage], grid: Grid) -> list[LabelledImage]:
    """The images that may lie on a grid: a grid without CRS belongs to a single image."""
    return [image for image in images if (image.grid.crs if grid.crs else image.grid == grid)]


def pictured(prefix: str, tile: Tile, images: Sequence[LabelledImage], table: ClassTable) -> NDArray[np.uint8]:
    """A compared tile as (height, 3 x width, 3) uint8: imagery, mask, map; unlabelled pixels are grey."""
    step = max(1, -(-max(tile.window.width, tile.window.height) // _SIDE))
    colors_K3 = np.full((256, 3), 110, np.uint8)
    colors_K3[list(table.values)] = table.colors
    image_HWC = pictures.shown([image_on(image) for image in images_on(images, tile.grid)], tile.grid, tile.window)
    truth_HW = truth_of(images, tile, table)
    [classes_HW] = cog.read_bands(upath(prefix) / f"{tile.id}.tif")
    panels = [image_HWC, colors_K3[truth_HW], colors_K3[classes_HW]]
    return np.concatenate([panel[::step, ::step] for panel in panels], axis=1)
