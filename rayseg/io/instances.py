"""Instances in files, read on any window: masks whose values are ids, or polygons."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import geopandas
import numpy as np
import shapely
from numpy.typing import NDArray
from rasterio.features import rasterize

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window, slug
from rayseg.geo.lonlat import from_lonlat, geographic, jumps, of_file, valid, within
from rayseg.geo.region import degrees_around
from rayseg.geo.vector_files import read_frame
from rayseg.io import labelme
from rayseg.io.rasters import footprint, read
from rayseg.io.sources import Source
from rayseg.store import upath

_log = logging.getLogger(__name__)
Ids = NDArray[np.int64]
UNKNOWN = -1
"""A pixel that is not labelled."""
_PER_FILE = 1 << 32  # ids of one mask: 32 bits


def read_ids(masks: Sequence[Source], grid: Grid, window: Window, *, numbers: Sequence[int] | None = None) -> Ids:
    """Ids of `window` from the first mask (in the order given) that is labelled there; 0 for no instance.

    Args:
        masks: of one band of whole numbers; 0 is no instance, also where a file calls it nodata, and any other nodata
            value is not labelled.
        grid: grid of the window.
        window: to read.
        numbers: distinct number of each mask, which keeps ids of several masks apart; by default their order.

    Returns:
        (height, width): number of the mask x 2^32 + value, 0, or `UNKNOWN`.

    Raises:
        DataError: a mask has several bands or fractions, or cannot be read.
    """
    ids_HW = np.full((window.height, window.width), UNKNOWN, np.int64)
    for number, mask in zip(numbers or range(len(masks)), masks, strict=True):
        part = footprint(mask, grid).intersect(window)
        target_HW = ids_HW[part.slices(window)]
        if part.empty or (target_HW != UNKNOWN).all():
            continue
        bands = [name for name in mask.bands if name != "alpha"]
        if len(bands) != 1 or np.dtype(mask.dtype).kind not in "ui":
            raise DataError(
                f"mask {mask.assets[0][0]} has {len(bands)} bands of {mask.dtype}, expected one band of whole numbers, "
                "an id for each plot and 0 for none; convert it"
            )
        values_CHW, valid_HW = read([mask], grid, part, bands=bands, categorical=True)
        values_HW = values_CHW[0].astype(np.int64)
        found_HW = np.where(values_HW > 0, values_HW + number * _PER_FILE, 0)
        # A nodata value of 0 means "no plot here", not "nobody looked here".
        found_HW = np.where(valid_HW, found_HW, 0 if mask.nodata == 0 else UNKNOWN)
        np.copyto(target_HW, found_HW, where=target_HW == UNKNOWN)
    return ids_HW


@dataclass(frozen=True, eq=False)
class Polygons:
    """Instances as polygons, each with its position + 1 as its id.

    Attributes:
        frame: with a CRS, or in pixels (x = column, y = row) with a column `image`.
        where: their file, for messages.
    """

    frame: geopandas.GeoDataFrame
    where: str

    @classmethod
    def open(cls, path: str) -> "Polygons":
        """Read polygons: GeoParquet (fiboa too), GeoJSON, GeoPackage, Shapefile, or a folder of LabelMe's JSONs.

        Raises:
            DataError: it cannot be read, holds no polygons, or has neither a CRS nor a column `image`.
        """
        target = upath(path)
        if target.is_dir():
            return cls(labelme.polygons_of(path), path)
        try:
            frame = read_frame(path)
        except OSError as error:
            raise DataError(f"{path} cannot be read as polygons: {error}; give GeoParquet or GeoJSON") from None
        # Lines and points come with fields in some data sets.
        areas = frame.geom_type.isin(["Polygon", "MultiPolygon"])
        if not areas.all():
            _log.warning("%d of %d rows of %s are lines or points and are left out", (~areas).sum(), len(frame), path)
        frame = frame[areas].reset_index(drop=True)
        if frame.empty:
            raise DataError(f"{path} holds no polygons, expected one for each plot; give another file")
        if frame.crs is None and "image" not in frame:
            raise DataError(
                f"{path} has no CRS and no column image; set the CRS, or name the image of each polygon in pixels"
            )
        frame.geometry = valid(frame.geometry.to_numpy())
        return cls(frame, path)

    def ids(self, grid: Grid, window: Window) -> Ids:
        """Ids of `window`, 0 for none; a pixel belongs to the last polygon that holds its centre."""
        geometries, numbers = self._near(grid, window)
        near = np.flatnonzero(
            shapely.intersects(geometries, shapely.box(window.col, window.row, window.col1, window.row1))
        )
        if not len(near):
            return np.zeros((window.height, window.width), np.int64)
        local = shapely.transform(geometries[near], lambda points: points - (window.col, window.row))
        shape = (window.height, window.width)
        burnt = rasterize(zip(local, numbers[near].tolist(), strict=True), shape, dtype=np.int32)
        return np.asarray(burnt, np.int64)

    def _near(self, grid: Grid, window: Window) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """`placed`; where one of both counts longitudes beyond 180, the polygons around the window, on its turn."""
        if grid.crs is None or self.frame.crs is None:
            return self.placed(grid)
        west, south, east, north = near = degrees_around(grid, window)
        bounds_N4 = shapely.bounds(self._lonlat)
        turned = self._counts_on or west < -180 or east > 180
        if not turned:
            return self.placed(grid)
        meets = [(bounds_N4[:, 0] + turn < east) & (bounds_N4[:, 2] + turn > west) for turn in (-360.0, 0.0, 360.0)]
        at = np.flatnonzero(np.any(meets, axis=0) & (bounds_N4[:, 1] < north) & (bounds_N4[:, 3] > south))
        parts = [from_lonlat(within(area, near), grid.crs) for area in self._lonlat[at]]
        return _in_pixels(np.array(parts, object), grid), (at + 1).astype(np.int32)

    @cached_property
    def _lonlat(self) -> NDArray[np.object_]:
        """The polygons in EPSG:4326, cut at 180 degrees."""
        return of_file(self.frame.geometry.to_numpy(), str(self.frame.crs.to_wkt()))

    @cached_property
    def _counts_on(self) -> bool:
        """Whether the file has longitudes beyond 180, or rings that jump over it."""
        shapes = self.frame.geometry.to_numpy()
        west, _, east, _ = shapely.total_bounds(shapes)
        return bool(geographic(str(self.frame.crs.to_wkt())) and (west < -180 or east > 180 or jumps(shapes).any()))

    def on(self, grid: Grid) -> bool:
        """Whether polygons can be drawn on this grid: both have a CRS, or they name its image."""
        return len(self.placed(grid)[0]) > 0

    @lru_cache(maxsize=64)  # noqa: B019 - few objects, one per command
    def placed(self, grid: Grid) -> tuple[NDArray[np.object_], NDArray[np.int32]]:
        """(polygons in grid pixels, their ids) of the polygons that can be drawn on this grid."""
        numbers = np.arange(1, len(self.frame) + 1, dtype=np.int32)
        if grid.crs is None or self.frame.crs is None:
            if grid.crs is not None or self.frame.crs is not None:
                return np.zeros(0, object), numbers[:0]
            here = self.frame["image"].map(lambda name: slug(str(name))).to_numpy() == slug(str(grid.image))
            return self.frame.geometry.to_numpy()[here], numbers[here]
        return _in_pixels(self.frame.geometry.to_crs(grid.crs).to_numpy(), grid), numbers


def _in_pixels(shapes: NDArray[np.object_], grid: Grid) -> NDArray[np.object_]:
    """Shapes in the CRS of a grid in its pixels."""
    affine = grid.transform(Window(0, 0, 1, 1))
    scale, shift = np.array([affine.a, affine.e]), np.array([affine.c, affine.f])
    return np.asarray(shapely.transform(shapes, lambda points: (points - shift) / scale), object)
