"""The map in view as it follows clicks: features are computed once for each patch, and a click only fits a head.

This module imports PyTorch: it runs in the process of the models, never in that of the API.
"""

from collections import OrderedDict
from dataclasses import dataclass
from functools import cached_property, lru_cache
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.geo.lonlat import transformer
from rayseg.io import mapview, rasters
from rayseg.io.maps import MappedTile, mapped_tiles, read_tile
from rayseg.models import bundle
from rayseg.models.correction import Corrected
from rayseg.stages.embed import Drawn, embedded, squares_in, squares_of
from rayseg.stages.predict import lattice_of
from rayseg.stages.rows import TileRow
from rayseg.steps import correct
from rayseg.store import upath
from rayseg.train.correction import CorrectionConfig, fit_correction

MOST_BYTES = 1 << 30
"""Of features that are kept; of more, those that were not used for the longest time are computed again."""
MOST_PATCHES = 16
"""Patches under a web tile; over more of them the map does not follow."""
_PATCHES, _DRAWN = 6, 1_000  # patches that the map's own pixels are drawn from, and pixels of each
_MERCATOR = "EPSG:3857"
_ONE = Lock()  # a follower changes while it computes; a replica of the models has two threads


@dataclass(frozen=True, eq=False)
class Patch:
    """Features (F, h, w) float16 and logits (K, h, w) of a patch's squares, and where there is imagery (H, W)."""

    features_Fhw: NDArray[np.float16]
    logits_Khw: NDArray[np.float32]
    valid_HW: NDArray[np.bool_]


class Follower:
    """A run's map with the clicks of a file.

    Args:
        root: prefix of the run.
    """

    def __init__(self, root: str) -> None:
        self.root = root
        self.described, self.base = bundle.build(correct.base_of(root))
        self.tiles = list(mapped_tiles(root))
        self._patches: OrderedDict[tuple[Grid, Window], Patch] = OrderedDict()
        self._fitted: tuple[Any, Corrected | None] = (None, None)

    def web_tile(self, path: str, place: mapview.Place, image: str | None) -> NDArray[np.uint8] | None:
        """Class values (256, 256) uint8 of a web tile; None if it is over too many patches to follow.

        Args:
            path: file of the clicks.
            place: (z, x, y) of the web tile.
            image: name of an image without CRS, or None.

        Raises:
            DataError, ConfigError: the clicks are not of this run.
        """
        found_HW = np.full((mapview.SIDE, mapview.SIDE), NODATA, np.uint8)
        grids = dict.fromkeys(tile.tile.grid for tile in self.tiles)
        for grid in grids:
            if (grid.image if grid.crs is None else None) != image:
                continue
            rows_HW, cols_HW = self._pixels(grid, place)
            for mapped in self.tiles:
                window = mapped.tile.window
                inside_HW = (
                    (rows_HW >= window.row)
                    & (rows_HW < window.row1)
                    & (cols_HW >= window.col)
                    & (cols_HW < window.col1)
                )
                if mapped.tile.grid != grid or not inside_HW.any():
                    continue
                rows_N, cols_N = rows_HW[inside_HW], cols_HW[inside_HW]
                part = Window(int(cols_N.min()), int(rows_N.min()), int(np.ptp(cols_N)) + 1, int(np.ptp(rows_N)) + 1)
                if len(lattice_of(self.described, mapped.tile).cells(part)) > MOST_PATCHES:
                    return None
                classes_HW = self.classes(path, mapped, part)
                new_N = classes_HW[rows_N - part.row, cols_N - part.col]
                found_HW[inside_HW] = np.where(found_HW[inside_HW] == NODATA, new_N, found_HW[inside_HW])
        return found_HW

    def classes(self, path: str, mapped: MappedTile, window: Window) -> NDArray[np.uint8]:
        """The classes of a window of a tile as they follow the clicks; where nothing moves, those of the run."""
        model, lattice = self.model(path), lattice_of(self.described, mapped.tile)
        whole_HW = read_tile(mapped, "classes")[0]
        classes_HW: NDArray[np.uint8] = whole_HW[window.slices(mapped.tile.window)].copy()
        for cell in lattice.cells(window):
            cut = cell.intersect(window)
            patch = self.patch(mapped, lattice.around(cell))
            if patch is None:
                continue
            new_HW, moves_HW = self._moved(model, patch)
            inside = cut.slices(lattice.around(cell))
            part_HW = classes_HW[cut.slices(window)]
            follows_HW = moves_HW[inside] & (part_HW != NODATA)
            part_HW[follows_HW] = new_HW[inside][follows_HW]
        return classes_HW

    def _moved(self, model: Corrected, patch: Patch) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
        """(classes of a patch, where the head or the memory moves them), (H, W) each."""
        size = list(patch.valid_HW.shape)
        with torch.inference_mode():
            features = torch.from_numpy(patch.features_Fhw.astype(np.float32)).flatten(1)
            units = torch.cat([model.weight_KF, model.axes_DF]) @ features
            moved = model.moved(units.view(1, -1, *patch.features_Fhw.shape[1:]))
            own = torch.from_numpy(patch.logits_Khw)[None]
            moved, logits = (interpolate(part, size=size, mode="bilinear")[0] for part in (moved, own + moved))
        one = len(logits) == 1
        classes = (logits[0].sigmoid() > self.described.threshold) if one else logits.argmax(dim=0)
        return classes.numpy().astype(np.uint8), (moved != 0).any(dim=0).numpy()

    def patch(self, mapped: MappedTile, window: Window) -> Patch | None:
        """A patch with its features; None without imagery."""
        key = (mapped.tile.grid, window)
        if key not in self._patches:
            bands = self.described.bands
            image_CHW, valid_HW = rasters.read(mapped.sources, mapped.tile.grid, window, bands=bands)
            if not valid_HW.any():
                return None
            row = TileRow(mapped.tile, "[]", image=image_CHW, valid=valid_HW, reach=window)
            features_Fhw, logits_Khw = embedded(self.described, self.base, row, window)
            self._patches[key] = Patch(features_Fhw.astype(np.float16), logits_Khw, valid_HW)
            # The new one stays, however large it is.
            while len(self._patches) > 1 and sum(of.features_Fhw.nbytes for of in self._patches.values()) > MOST_BYTES:
                self._patches.popitem(last=False)
        self._patches.move_to_end(key)
        return self._patches[key]

    def model(self, path: str) -> Corrected:
        """The head that fits the clicks of a file, fitted again when the file has changed."""
        state = upath(path).stat()
        key = (path, state.st_mtime, state.st_size)
        if self._fitted[0] != key or self._fitted[1] is None:
            _, clicked = correct.clicks_for(self.root, path)
            by_id = {mapped.tile.id: mapped for mapped in self.tiles}
            parts = []
            for name, pixels in clicked.items():
                mapped, lattice = by_id[name], lattice_of(self.described, by_id[name].tile)
                for cell in lattice.cells(mapped.tile.window):
                    around = lattice.around(cell)
                    squares = squares_of(pixels, mapped.tile, around, cell.intersect(mapped.tile.window))
                    if squares and (patch := self.patch(mapped, around)):
                        parts.append(_drawn(patch, squares))
            clicks, kept = correct.known_of([*parts, *self._kept])
            fitted, _ = fit_correction(self.base, clicks, kept, CorrectionConfig(), self.described.threshold)
            self._fitted = (key, fitted)
        fitted_model = self._fitted[1]
        assert fitted_model is not None
        return fitted_model

    @cached_property
    def _kept(self) -> list[Drawn]:
        """Pixels of the map, from a few patches spread over it."""
        rng, parts = np.random.default_rng(0), list[Drawn]()
        for at in np.linspace(0, len(self.tiles) - 1, _PATCHES).astype(int):
            mapped = self.tiles[at]
            lattice = lattice_of(self.described, mapped.tile)
            cells = lattice.cells(mapped.tile.window)
            around = lattice.around(cells[int(rng.integers(len(cells)))])
            if patch := self.patch(mapped, around):
                inside_S2 = squares_in(patch.valid_HW, around, lattice.cell(around).intersect(mapped.tile.window))
                taken_S2 = inside_S2[rng.permutation(len(inside_S2))[:_DRAWN]]
                if len(taken_S2):
                    parts.append(_drawn(patch, dict.fromkeys(map(tuple, taken_S2.tolist()), (-1, 1.0))))
        return parts

    def _pixels(self, grid: Grid, place: mapview.Place) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(rows, columns) of a grid's pixels at the middles of a web tile's pixels."""
        z, x, y = place
        steps = (np.arange(mapview.SIDE) + 0.5) / mapview.SIDE
        if grid.crs is None:
            sizes = [max(s.width, s.height) for tile in self.tiles for s in tile.sources if s.item_id == grid.image]
            side = max(sizes) / 2**z
            rows, cols = np.floor((y + steps) * side), np.floor((x + steps) * side)
            rows_HW, cols_HW = np.meshgrid(rows.astype(np.int64), cols.astype(np.int64), indexing="ij")
            return rows_HW, cols_HW
        world = 2 * np.pi * 6_378_137.0
        xs, ys = np.meshgrid((x + steps) / 2**z * world - world / 2, world / 2 - (y + steps) / 2**z * world)
        places = transformer(_MERCATOR, grid.crs).transform(xs, ys)
        cols, rows = ~grid.transform(Window(0, 0, 1, 1)) @ places
        lost = ~(np.isfinite(cols) & np.isfinite(rows))
        rows, cols = (np.floor(np.where(lost, -1e9, part)).astype(np.int64) for part in (rows, cols))
        return rows, cols


def _drawn(patch: Patch, squares: dict[tuple[int, int], tuple[int, float]]) -> Drawn:
    places, (values, weights) = np.array(list(squares)).T, zip(*squares.values(), strict=True)
    features, logits = (part[:, *places].T.astype(np.float32) for part in (patch.features_Fhw, patch.logits_Khw))
    return Drawn(features, logits, np.array(values, np.int64), np.array(weights, np.float32))


@lru_cache(maxsize=2)
def _follower(root: str, version: str) -> Follower:
    return Follower(root)


def web_tile(root: str, version: str, path: str, place: mapview.Place, image: str | None) -> NDArray[np.uint8] | None:
    """See `Follower.web_tile`.

    Args:
        root: prefix of the run.
        version: of its files, so that a run that is made again is read again.
        path: file of the clicks.
        place: (z, x, y) of the web tile.
        image: name of an image without CRS, or None.
    """
    with _ONE:
        return _follower(root, version).web_tile(path, place, image)
