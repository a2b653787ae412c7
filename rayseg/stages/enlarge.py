"""Tiles of imagery made larger, as imagery of its own."""

from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Lattice, Tile, Window
from rayseg.io import cog, stac_write
from rayseg.io.sources import from_json
from rayseg.store import upath
from rayseg.vision.fill import filled

if TYPE_CHECKING:
    from rayseg.models.super_resolution import Enlarge, EnlargeConfig

Row = dict[str, Any]
BANDS = ("red", "green", "blue")


def lattice_of(config: "EnlargeConfig") -> Lattice:
    """What is enlarged at once, whatever the tiling."""
    return Lattice.of_cells(config.stride + 2 * config.margin, config.stride)


class EnlargeTiles:
    """`image, valid, reach, <tile> -> larger, larger_valid`: the tile's own pixels, each `factor` x `factor` then.

    Where there is no data the network sees the mirror image of what is there. What is made is imagery like any other,
    which says of no pixel that it was made from half of what there is; so a tile fails if anything in its reach cannot
    be read.

    Args:
        config: how.
    """

    def __init__(self, config: "EnlargeConfig") -> None:
        self.config, self.lattice = config, lattice_of(config)

    @cached_property
    def _enlarge(self) -> "Enlarge":
        from rayseg.models.super_resolution import load_enlarger

        return load_enlarger(self.config)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Enlarge each tile."""
        from rayseg.models.cpu import threads

        with threads():
            return [self._tile(row) for row in rows]

    def _tile(self, row: Row) -> Row:
        if why := row.get("incomplete") or row.get("unread"):
            raise DataError(why)
        tile, reach, factor = Tile.from_row(row), row["reach"], self.config.factor
        larger_HWC = np.zeros((tile.window.height * factor, tile.window.width * factor, 3), np.uint8)
        whole = scaled(tile.window, factor)
        for cell in self.lattice.cells(tile.window):
            part, seen = cell.intersect(tile.window), self.lattice.around(cell)
            image_HWC, valid_HW = (row[name][seen.slices(reach)] for name in ("image", "valid"))
            if not valid_HW.any():
                continue
            found_HWC = self._enlarge(filled(image_HWC, valid_HW))
            place = scaled(part, factor)
            larger_HWC[place.slices(whole)] = found_HWC[place.slices(scaled(seen, factor))]
        valid_HW = row["valid"][tile.window.slices(reach)].repeat(factor, axis=0).repeat(factor, axis=1)
        rest = {key: value for key, value in row.items() if key not in {"image", "valid", "reach"}}
        return rest | {"larger": larger_HWC, "larger_valid": valid_HW}


def larger(tile: Tile, factor: int) -> Tile:
    """What a tile becomes: its ground on a finer grid; without georeference it takes the name of its image."""
    grid = tile.grid
    finer = (grid.resolution[0] / factor, grid.resolution[1] / factor) if grid.crs else grid.resolution
    name = tile.id if grid.crs else str(grid.image)
    return Tile(name, Grid(grid.crs, finer, grid.origin, grid.image), scaled(tile.window, factor))


def scaled(window: Window, factor: int) -> Window:
    """The window on a grid of pixels `factor` times smaller."""
    return Window(window.col * factor, window.row * factor, window.width * factor, window.height * factor)


class WriteLarger:
    """`larger, larger_valid, <tile> -> facts`: kept as `<prefix>/<id>.tif` and its item, georeferenced as it was.

    The id is the tile's, or that of the image where there is no georeference.

    Args:
        prefix: where.
        factor: pixels that one pixel has become, across and down.
    """

    def __init__(self, prefix: str, *, factor: int) -> None:
        self.prefix, self.factor = prefix, factor

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Write each tile."""
        return [self._write(row) for row in rows]

    def _write(self, row: Row) -> Row:
        folder, fine = upath(self.prefix), larger(Tile.from_row(row), self.factor)
        file, valid_HW = f"{fine.id}.tif", row["larger_valid"]
        image_CHW = np.ascontiguousarray(row["larger"].transpose(2, 0, 1))
        cog.write_image(folder / file, image_CHW, fine.grid, fine.window, bands=BANDS, valid_HW=valid_HW)
        sources = from_json(row["sources"])
        item = stac_write.item_of(fine.id, fine.grid, fine.window, folder=folder, files=[file], sources=sources)
        stac_write.write_item(item, folder / f"{fine.id}.json")
        return {"id": row["id"], "seconds": row["seconds"], "facts": {"item": f"{fine.id}.json"}}
