"""Tiles of imagery enlarged by super-resolution, as imagery of its own."""

from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Tile, Window
from rayseg.io import cog, stac_write
from rayseg.stages.rows import TileRow
from rayseg.store import upath
from rayseg.vision.fill import filled

if TYPE_CHECKING:
    from rayseg.models.super_resolution import Enlarge, EnlargeConfig

BANDS = ("red", "green", "blue")


def lattice_of(config: "EnlargeConfig") -> Lattice:
    """The patches that are enlarged at once, whatever the tiling."""
    return Lattice.of_cells(config.stride + 2 * config.margin, config.stride)


@dataclass
class EnlargeTiles:
    """`tile, image, valid, reach -> image, valid, reach`: the tile's own pixels, each as `factor` x `factor` pixels.

    `reach` is the tile's window on the finer grid afterwards. Where there is no data the network sees the mirror image
    of the valid pixels. The enlarged imagery has no place to mark pixels made from incomplete input, so a tile fails if
    any pixel in its reach cannot be read.

    Args:
        config: network and patches.
    """

    config: "EnlargeConfig"

    @property
    def lattice(self) -> Lattice:
        """The patches."""
        return lattice_of(self.config)

    @cached_property
    def _enlarge(self) -> "Enlarge":
        from rayseg.models.super_resolution import load_enlarger

        return load_enlarger(self.config)

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Enlarge each tile."""
        from rayseg.models.cpu import threads

        enlarged, factor = [], self.config.factor
        with threads():
            for row in rows:
                if reason := row.incomplete or row.unread:
                    raise DataError(reason)
                window, reach = row.tile.window, row.reach
                larger_HWC = np.zeros((window.height * factor, window.width * factor, 3), np.uint8)
                whole = scaled(window, factor)
                # Cells of one lattice, whatever the tiling: a pixel depends on its patch alone.
                for cell in self.lattice.cells(window):
                    seen = self.lattice.around(cell)
                    image_HWC, valid_HW = (array[seen.slices(reach)] for array in (row.image, row.valid))
                    if not valid_HW.any():
                        continue
                    patch_HWC = self._enlarge(filled(image_HWC, valid_HW))
                    place = scaled(cell.intersect(window), factor)
                    larger_HWC[place.slices(whole)] = patch_HWC[place.slices(scaled(seen, factor))]
                valid_HW = row.valid[window.slices(reach)].repeat(factor, axis=0).repeat(factor, axis=1)
                enlarged.append(replace(row, image=larger_HWC, valid=valid_HW, reach=whole))
        return enlarged


def larger(tile: Tile, factor: int) -> Tile:
    """The same area on a grid `factor` times finer; without georeference it has the name of its image."""
    grid = tile.grid
    finer = (grid.resolution[0] / factor, grid.resolution[1] / factor) if grid.crs else grid.resolution
    name = tile.id if grid.crs else str(grid.image)
    return Tile(name, replace(grid, resolution=finer), scaled(tile.window, factor))


def scaled(window: Window, factor: int) -> Window:
    """The window on a grid of pixels `factor` times smaller."""
    return Window(window.col * factor, window.row * factor, window.width * factor, window.height * factor)


@dataclass
class WriteLarger:
    """`tile, sources, image, valid -> facts`: write `<prefix>/<id>.tif` and its item, with the tile's georeference.

    The id is the tile's, or the image's where there is no georeference.

    Args:
        prefix: folder of the files.
        factor: pixels across and down that replace one pixel.
    """

    prefix: str
    _: KW_ONLY
    factor: int

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Write each tile."""
        settled, folder = [], upath(self.prefix)
        for row in rows:
            fine = larger(row.tile, self.factor)
            # The item comes last: an image without an item is not read.
            path, image_CHW = folder / f"{fine.id}.tif", np.ascontiguousarray(row.image.transpose(2, 0, 1))
            image = cog.write_image(path, image_CHW, fine.grid, fine.window, bands=BANDS, valid_HW=row.valid)
            item = stac_write.item_of(
                fine.id, fine.grid, fine.window, folder=folder, files=[image], sources=row.sources
            )
            stac_write.write_item(item, folder / f"{fine.id}.json")
            settled.append(Settled(facts={"item": f"{fine.id}.json"}))
        return settled
