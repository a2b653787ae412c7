"""Compute places of a finished map again: in other tiles, from changed imagery, on a shifted lattice of patches."""

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.io import cog, rasters
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Precision
from rayseg.models.input_statistics import features
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile
from rayseg.stages.rows import TileRow
from rayseg.store import upath

Change = Callable[[NDArray[Any], NDArray[Any]], NDArray[Any]]
CHANGES: dict[str, tuple[Change, ...]] = {
    "brightness": (lambda x, mean: 0.8 * x, lambda x, mean: 1.2 * x),
    "contrast": (lambda x, mean: mean + 0.8 * (x - mean), lambda x, mean: mean + 1.2 * (x - mean)),
}
"""Measure -> changes of values in the imagery's physical unit, and of their mean per band."""
_KNOWN = 0.25  # least share of a place with imagery, for its statistics


@dataclass(frozen=True)
class Place:
    """A square of a mapped tile.

    Attributes:
        at: where it is; its id is that of the row.
        of: the tile.
        sources: the tile's imagery as JSON.
        again: whether its map is computed again.
    """

    at: Tile
    of: Tile
    sources: str
    again: bool

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Place":
        """The record of a row of `to_row`."""
        at = Tile.from_row(row)
        window = Window(row["of_col"], row["of_row"], row["of_width"], row["of_height"])
        return cls(at, Tile(row["of"], at.grid, window), row["sources"], row["again"])

    def to_row(self) -> Row:
        """The record as a flat row."""
        window = self.of.window
        place = {"of_col": window.col, "of_row": window.row, "of_width": window.width, "of_height": window.height}
        return self.at.to_row() | {"of": self.of.id, **place, "sources": self.sources, "again": self.again}


class Certify:
    """`place -> facts`: how many pixels of a place change when it is mapped again in other ways.

    facts: `distance` of the imagery from what the model learnt, if the bundle has statistics; of places that are mapped
    again `pixels` and `changed`: measure -> pixels that differ, one number per change; of binary maps `of_class`: the
    same of the pixels that have class 1 in either map, as (differ, all). A place that cannot be read is settled as
    "nodata" with the reason: it says nothing about the map.

    Args:
        prefix: of the bundle.
        tiles: below which the run has `<tile id>/`.
        seconds: after these no further place is mapped again, except the first.
        precision: that of the map.
    """

    def __init__(self, prefix: str, tiles: str, *, precision: Precision = "auto", seconds: float = math.inf) -> None:
        self.prefix, self.tiles = prefix, tiles
        self.seconds, self._spent = seconds, 0.0
        self.predict = Predict(prefix, precision=precision)

    @cached_property
    def described(self) -> Bundle:
        """The model's description; the model itself is loaded for the first place that is mapped again."""
        return bundle.description(self.prefix)

    def __call__(self, rows: list[Place]) -> list[Settled]:
        """Measure each place."""
        return [self._place(row) for row in rows]

    def _place(self, place: Place) -> Settled:
        try:
            facts = self._distance(place)
            if place.again and self._spent < self.seconds:
                began = time.perf_counter()
                facts |= self._again(place)
                self._spent += time.perf_counter() - began
            return Settled(facts=facts)
        except DataError as error:  # the imagery is gone since, or was never whole
            return Settled("nodata", str(error))

    def _distance(self, place: Place) -> dict[str, Any]:
        described = self.described
        if (known := described.statistics) is None:
            return {}
        window, side = place.at.window, known.size
        middle = Window(window.col + (window.width - side) // 2, window.row + (window.height - side) // 2, side, side)
        sources = TileRow(place.of, place.sources).sources
        image_CHW, valid_HW = rasters.read(sources, place.of.grid, middle, bands=described.bands)
        if valid_HW.mean() < _KNOWN:
            return {}
        distance = float(known.distances(features(image_CHW, valid_HW)[None])[0])
        return {"distance": distance, "far": distance > known.limit}

    def _again(self, place: Place) -> dict[str, Any]:
        folder, here = upath(self.tiles) / place.of.id, place.at.window.slices(place.of.window)
        classes_HW = cog.read_bands(folder / "classes.tif")[0][here]
        scores_CHW = cog.read_bands(folder / "scores.tif")[:, *here]
        kept_HW = classes_HW != NODATA  # pixels outside the region have no class
        # 1. mapped again in two tiles: the bits must be those of the map
        [whole] = self._read(place, [place.at])
        if not kept_HW.any() or not isinstance(whole, TileRow):
            return {}
        other_HW = kept_HW & self._other_bits(place, classes_HW, scores_CHW)
        changed = {"retiled": [int(other_HW.sum())]}
        of_class: dict[str, list[tuple[int, int]]] = {}
        # 2. small changes of the imagery, and a shifted lattice: pixels whose class changes
        ways = {name: [self._changed(whole, change) for change in changes] for name, changes in CHANGES.items()}
        for name, maps in (ways | {"shift": [self._shifted(place)]}).items():
            seen = [kept_HW & (map_HW != NODATA) for map_HW in maps]
            pairs = list(zip(seen, maps, strict=True))
            changed[name] = [int((seen_HW & (map_HW != classes_HW)).sum()) for seen_HW, map_HW in pairs]
            # For the IoU of the one class with itself: pixels that have it before or after.
            either = [int((seen_HW & ((map_HW == 1) | (classes_HW == 1))).sum()) for seen_HW, map_HW in pairs]
            of_class[name] = list(zip(changed[name], either, strict=True))
        facts = {"pixels": int(kept_HW.sum()), "changed": changed}
        return facts | ({"of_class": of_class} if self.predict.bundle.outputs == 1 else {})

    def _other_bits(
        self, place: Place, classes_HW: NDArray[np.uint8], scores_CHW: NDArray[np.uint8]
    ) -> NDArray[np.bool_]:
        """Where the place, mapped in two tiles of its own, the last one first, differs from the map in any bit."""
        window, split = place.at.window, max(1, place.at.window.width * 3 // 7)
        parts = [
            Window(window.col + split, window.row, window.width - split, window.height),
            Window(window.col, window.row, split, window.height),
        ]
        tiled_HW, again_CHW = np.full_like(classes_HW, NODATA), np.full_like(scores_CHW, NODATA)
        tiles = [Tile("", place.at.grid, part) for part in parts if not part.empty]
        for row in self.predict([row for row in self._read(place, tiles) if isinstance(row, TileRow)]):
            cut = row.tile.window.slices(window)
            tiled_HW[cut], again_CHW[:, *cut] = row.classes, row.scores
        return np.asarray((tiled_HW != classes_HW) | (again_CHW != scores_CHW).any(axis=0))

    def _read(self, place: Place, tiles: list[Tile]) -> list[TileRow | Settled]:
        """The place's imagery over tiles, with the margin that their patches need."""
        described = self.predict.bundle
        read = ReadTile(described.bands, patch=described.patch, stride=described.stride)
        return read([TileRow(tile, place.sources) for tile in tiles])

    def _changed(self, row: TileRow, change: Change) -> NDArray[np.uint8]:
        """Classes of a tile from changed imagery."""
        described = self.predict.bundle
        # Stored values with an offset are changed in their physical unit: 20 % of a reflectance, not of a number.
        units = described.units or ((described.scaling.scale, described.scaling.offset),) * len(described.bands)
        scale_C11, offset_C11 = (np.array(values)[:, None, None] for values in zip(*units, strict=True))
        values_CHW = row.image * scale_C11 + offset_C11
        mean_C11 = values_CHW[:, row.valid].mean(axis=1)[:, None, None]
        stored_CHW = (change(values_CHW, mean_C11) - offset_C11) / scale_C11
        if np.issubdtype(row.image.dtype, np.integer):
            limits = np.iinfo(row.image.dtype)
            stored_CHW = np.clip(np.rint(stored_CHW), limits.min, limits.max)
        [mapped] = self.predict([replace(row, image=stored_CHW.astype(row.image.dtype))])
        return mapped.classes

    def _shifted(self, place: Place) -> NDArray[np.uint8]:
        """Classes of the place by patches that lie half a stride to the right of and below those of the map."""
        grid, window, by = place.at.grid, place.at.window, self.predict.bundle.stride // 2
        (x, y), (across, down) = grid.origin, grid.resolution
        # The lattice hangs on the grid's origin: the same ground on a grid that begins earlier.
        origin = (x - by * across, y + by * down if grid.crs else y - by * down)
        moved = Grid(grid.crs, grid.resolution, origin, grid.image, grid.divided)
        tile = Tile("", moved, Window(window.col + by, window.row + by, window.width, window.height))
        rows = [row for row in self._read(place, [tile]) if isinstance(row, TileRow)]
        for mapped in self.predict(rows):
            return mapped.classes
        return np.full((window.height, window.width), NODATA, np.uint8)
