"""Read windows of pixels with their validity; imagery that is on the grid is not resampled.

`grids_of` returns the grids of sources, `footprint` the window of a source on its grid, `read` the pixels of a window.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from affine import Affine
from rasterio.enums import ColorInterp, MaskFlags, Resampling
from rasterio.io import DatasetReader
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window as FileWindow

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.lonlat import LONLAT, around, transformer, turn_of
from rayseg.geo.region import pixels_on_earth
from rayseg.io import remote
from rayseg.io.output_grids import aligned, flips, footprint, grids_of
from rayseg.io.sources import (
    NO_NODATA,
    STORED,
    Source,
    bounds_of,
    crs_of,
    described,
    expect_same_place,
    gdal,
    holds,
    moved,
    open_file,
    source_of_file,
)
from rayseg.store import is_local, public, upath

__all__ = ["Source", "footprint", "grids_of", "read", "source_of_file", "view"]

_HUGE = 1e30  # of -3.4e38, float32's usual fill value, little more than nothing is left by an interpolation
_OPEN_FILES = 24  # per thread; a tile touches few files, and neighbouring tiles the same ones
_FAR = 6.0  # degrees from the middle of a UTM zone, to which its projection is exact
_SEAM = 135.0  # degrees of longitude from which files are warped in a plane of their own
_local = threading.local()


def read(
    sources: Sequence[Source], grid: Grid, window: Window, *, bands: Sequence[str], categorical: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels of `window`, each of the first source (in the order given) that is valid there.

    A file whose pixels are the grid's is read as it is; any other through a bilinear warp onto the grid, whose result
    does not depend on the window. Inside a file a pixel is valid when any of the chosen bands is: nodata, NaN, alpha,
    internal masks and external `.msk` count. A band without data at a valid pixel reads 0, in 8 bits its stored value.
    An item in several files needs valid data in every file that holds a chosen band.

    Args:
        sources: items over the window, the preferred one first.
        grid: a grid of `grids_of`.
        window: grid pixels; may reach beyond the imagery.
        bands: band names in the order wanted, whichever files they are in.
        categorical: the values are classes: where a warp is needed, take the nearest pixel instead of a mixture.

    Returns:
        (image_CHW in the imagery's dtype, valid_HW bool); pixels that are not valid are 0, and so are those in space.

    Raises:
        DataError: a band is missing, a file or block cannot be read, or sources differ in pixel type.
    """
    if not sources:
        raise DataError(f"there is no imagery to read in {grid.name} {window}")
    for source in sources:
        _refuse_complex(source.item_id, source.dtype)
    image_CHW: np.ndarray | None = None
    valid_HW = np.zeros((window.height, window.width), bool)
    for source in sources:
        part = footprint(source, grid).intersect(window)
        rows_cols = part.slices(window)
        # The first valid source wins, so a file whose pixels are all covered is not opened.
        if part.empty or valid_HW[rows_cols].all():
            continue
        pixels_CHW, ok_HW = _read_source(source, grid, part, bands, categorical=categorical)
        if image_CHW is None:
            image_CHW = np.zeros((len(bands), window.height, window.width), pixels_CHW.dtype)
        _same_dtype(source.item_id, pixels_CHW.dtype, image_CHW.dtype)
        np.copyto(image_CHW[:, *rows_cols], pixels_CHW, where=ok_HW & ~valid_HW[rows_cols])
        valid_HW[rows_cols] |= ok_HW
    if image_CHW is None:
        image_CHW = np.zeros((len(bands), window.height, window.width), sources[0].dtype)
    if (earth_HW := pixels_on_earth(grid, window)) is not None:
        valid_HW &= earth_HW
        image_CHW[:, ~valid_HW] = 0
    return image_CHW, valid_HW


def _refuse_complex(name: str, dtype: str) -> None:
    if dtype.startswith("complex"):
        raise DataError(f"{name} has complex pixels ({dtype}); convert it to amplitude or intensity first")


def _same_dtype(name: str, dtype: np.dtype, expected: np.dtype) -> None:
    if dtype != expected:
        raise DataError(f"{name} has {dtype} pixels where {expected} was read before; select items of one pixel type")


def _read_source(
    source: Source, grid: Grid, part: Window, bands: Sequence[str], *, categorical: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(pixels_CHW, valid_HW) of one source in `part`, which lies in its footprint."""
    image_CHW: np.ndarray | None = None
    changes = dict(reversed([*zip(source.bands, source.change, strict=False)]))
    valid: dict[str, np.ndarray] = {}
    for (href, nodata), wanted in _files_of(source, bands).items():
        indexes = [index for _, index in wanted]
        of_file = replace(source, nodata=nodata, nodatas=(), change=())
        # Each attempt opens the file again: an open one keeps its lost connection.
        attempt = partial(_read_file, of_file, href, grid, part, indexes, categorical=categorical)
        pixels_CHW, ok_HW = remote.patiently(attempt)
        if image_CHW is None:
            image_CHW = np.zeros((len(bands), part.height, part.width), pixels_CHW.dtype)
        _same_dtype(href, pixels_CHW.dtype, image_CHW.dtype)
        for (position, _), pixels_HW in zip(wanted, pixels_CHW, strict=True):
            image_CHW[position] = np.where(ok_HW, changed(pixels_HW, changes.get(bands[position])), 0)
        valid[href] = valid[href] | ok_HW if href in valid else ok_HW
    if image_CHW is None:
        raise DataError(f"no band of {source.item_id} was requested; its bands are {', '.join(source.bands)}")
    return image_CHW, np.logical_and.reduce([*valid.values()])


def is_number(pixels: np.ndarray) -> np.ndarray:
    """Where values are finite and no huge fill value, bool; either would spoil every patch that sees it."""
    if pixels.dtype.kind != "f":
        return np.ones(pixels.shape, bool)
    return np.asarray(np.isfinite(pixels) & (np.abs(pixels.astype(np.float64)) < _HUGE))


def changed(pixels_HW: np.ndarray, change: tuple[float, float] | None) -> np.ndarray:
    """Stored values x factor + addend in their dtype, whole numbers rounded and clipped to its range."""
    if change is None or change == STORED:
        return pixels_HW
    values_HW = pixels_HW.astype(np.float64) * change[0] + change[1]
    if pixels_HW.dtype.kind in "ui":
        limits = np.iinfo(pixels_HW.dtype)
        values_HW = np.clip(np.rint(values_HW), limits.min, limits.max)
    return values_HW.astype(pixels_HW.dtype)


def _files_of(source: Source, bands: Sequence[str]) -> dict[tuple[str, float | None], list[tuple[int, int]]]:
    """(href, nodata) -> (position in `bands`, index in the file) of each band; the first file with a name counts."""
    # Reversed, so that of several bands with one name the first one counts.
    nodatas = dict(reversed([*zip(source.bands, source.nodatas, strict=False)]))
    places = {name: (href, i) for href, names in reversed(source.assets) for i, name in enumerate(names, 1)}
    if missing := [name for name in bands if name not in places]:
        raise DataError(
            f"{source.item_id} has no band {', '.join(missing)}: wanted {', '.join(bands)}, "
            f"found {', '.join(source.bands)}; name the bands of the imagery or select other items"
        )
    files: dict[tuple[str, float | None], list[tuple[int, int]]] = {}
    for position, name in enumerate(bands):
        href, index = places[name]
        files.setdefault((href, nodatas.get(name, source.nodata)), []).append((position, index))
    return files


def _read_file(
    source: Source, href: str, grid: Grid, part: Window, indexes: list[int], *, categorical: bool
) -> tuple[np.ndarray, np.ndarray]:
    with view(source, href, grid, part, categorical=categorical) as (dataset, place):
        if source.nodata is None and len({place.nodatas[index - 1] for index in indexes if place.nodatas}) > 1:
            # A warp takes one value, so each band is warped by its own.
            owns = [NO_NODATA if (own := place.nodatas[index - 1]) is None else own for index in indexes]
            each = [
                _read_file(replace(source, nodata=own), href, grid, part, [index], categorical=categorical)
                for own, index in zip(owns, indexes, strict=True)
            ]
            return np.concatenate([pixels for pixels, _ in each]), np.logical_or.reduce([ok for _, ok in each])
        if len(dtypes := {dataset.dtypes[index - 1] for index in indexes}) > 1:
            raise DataError(
                f"{href} has bands of {' and '.join(sorted(dtypes))}, expected one type; choose bands of one"
            )
        inside = part.intersect(place.extent)
        image_CHW = np.zeros((len(indexes), part.height, part.width), dataset.dtypes[indexes[0] - 1])
        valid_HW = np.zeros((part.height, part.width), bool)
        if not inside.empty:
            at = place.at(inside)
            pixels_CHW = dataset.read(indexes, window=at)
            ok_CHW = _valid(dataset, indexes, at, pixels_CHW, source.nodata)
            if place.unmixed is not None:
                nodata = place.nodatas[indexes[0] - 1] if source.nodata is None else source.nodata
                stored_CHW = place.unmixed.read(indexes, window=at)
                ok_CHW &= _valid(place.unmixed, indexes, at, stored_CHW, nodata)
            image_CHW[:, *inside.slices(part)] = place.upright(known(pixels_CHW, ok_CHW))
            valid_HW[inside.slices(part)] = place.upright(ok_CHW).any(axis=0)
        return image_CHW, valid_HW


def known(pixels_CHW: np.ndarray, ok_CHW: np.ndarray) -> np.ndarray:
    """The pixels, 0 in bands without data.

    In 8 bits a fill value such as 255 is also a usual brightness: a pixel with data in another band keeps it.
    """
    kept_CHW = ok_CHW.any(axis=0, keepdims=True) if pixels_CHW.dtype == np.uint8 else ok_CHW
    filled_CHW: np.ndarray = np.where(kept_CHW, pixels_CHW, 0)
    return filled_CHW


def _valid(
    dataset: DatasetReader, indexes: list[int], at: FileWindow, pixels_CHW: np.ndarray, nodata: float | None
) -> np.ndarray:
    """Where each band has data, (C, H, W) bool."""
    valid_CHW = np.ones(pixels_CHW.shape, bool)
    # Alpha and masks of the file hold for all bands, nodata for its own band alone.
    flags = {flag for index in indexes for flag in dataset.mask_flag_enums[index - 1]}
    if ColorInterp.alpha in dataset.colorinterp:  # GDAL takes an alpha band for a mask in unsigned files only
        valid_CHW &= dataset.read(dataset.colorinterp.index(ColorInterp.alpha) + 1, window=at) > 0
    elif MaskFlags.per_dataset in flags:
        valid_CHW &= dataset.read_masks(indexes[0], window=at) > 0
    if pixels_CHW.dtype.kind == "f":
        valid_CHW &= is_number(pixels_CHW)
    if nodata == NO_NODATA:
        return valid_CHW
    by_gdal = MaskFlags.nodata in flags  # not where there is a mask, too
    if by_gdal:
        valid_CHW &= dataset.read_masks(indexes, window=at) > 0
    for at_band, index in enumerate(indexes):
        own = dataset.nodatavals[index - 1]
        for value in {own, nodata} - ({own} if by_gdal else set()):
            if value is not None and holds(dataset.dtypes[index - 1], value):
                valid_CHW[at_band] &= pixels_CHW[at_band] != value
    return valid_CHW


# -- open files -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where a dataset whose pixels are those of a grid lies on it.

    Attributes:
        extent: the grid window that it covers.
        northward: its rows run to the north, as netCDF and models store them.
        westward: its columns run to the west.
        nodatas: of the bands of a warped file.
        unmixed: of a warped file with both a mask and nodata, of which a warp heeds one, its nearest pixels.
    """

    extent: Window
    northward: bool = False
    westward: bool = False
    nodatas: tuple[float | None, ...] = ()
    unmixed: DatasetReader | None = None

    def at(self, part: Window) -> FileWindow:
        """`part`, which lies in the extent, in pixels of the dataset."""
        col = self.extent.col1 - part.col1 if self.westward else part.col - self.extent.col
        row = self.extent.row1 - part.row1 if self.northward else part.row - self.extent.row
        return FileWindow(col, row, part.width, part.height)

    def upright(self, pixels: np.ndarray) -> np.ndarray:
        """Pixels (..., height, width) as the dataset stores them, with rows to the south and columns to the east."""
        return pixels[..., :: -1 if self.northward else 1, :: -1 if self.westward else 1]


_View = tuple[Any, Place, tuple[Any, ...]]


@contextmanager
def view(
    source: Source, href: str, grid: Grid, part: Window, *, categorical: bool = False
) -> Iterator[tuple[DatasetReader, Place]]:
    """(dataset whose pixels are the grid's, its place there) to read `part` from; this thread keeps it open.

    If reading fails, the thread's files of `href` are closed: their cached blocks may be the cause.

    Raises:
        DataError: the file, or what is read of it, cannot be read.
    """
    try:
        with gdal(href, part):
            yield _opened(source, href, grid, categorical=categorical)
    except DataError:
        views = _views()
        # A file that failed is opened again by the next attempt.
        for key in [key for key in views if key[0] == href]:
            _close(views.pop(key))
        raise


def _opened(source: Source, href: str, grid: Grid, *, categorical: bool) -> tuple[DatasetReader, Place]:
    views = _views()
    # Everything that decides how the file is read, and nothing that only names it.
    key = (href, _stamp(href), grid, replace(source, assets=(), datetime=None, href=""), categorical)
    if key not in views:
        views[key] = _on_grid(open_file(href), source, href, grid, categorical=categorical)
        while len(views) > _OPEN_FILES:
            _close(views.popitem(last=False)[1])
    views.move_to_end(key)
    return views[key][:2]


def _close(viewed: _View) -> None:
    opened, _, beneath = viewed
    for file in (opened, *beneath):
        file.close()


def _views() -> "OrderedDict[Any, _View]":
    """This thread's open files; a forked process opens its own, because it shares file positions with its parent."""
    if getattr(_local, "process", None) != os.getpid():
        _local.process, _local.views = os.getpid(), OrderedDict()
    views: OrderedDict[Any, _View] = _local.views
    return views


def _on_grid(file: DatasetReader, source: Source, href: str, grid: Grid, *, categorical: bool) -> _View:
    """The open file as it is where its pixels are the grid's, else warped onto the grid."""
    _refuse_complex(file.name, file.dtypes[0])
    placed, flat = _placed(file, source, href), file
    if placed.gcps and grid.crs is not None:
        # rasterio drops control points when it is given the grid to warp to, so they are flattened first, on a grid
        # of GDAL's choice: such a file is interpolated twice.
        flat = _warp(file, source.nodata, {"crs": crs_of(grid.crs)}, categorical=categorical)
        placed = replace(described(flat), item_id=source.item_id)
    extent = footprint(placed, grid)
    if grid.crs is None or aligned(placed, grid):
        return flat, Place(extent, *(flips(placed) if grid.crs else (False, False))), (file,)
    # Without XSCALE and YSCALE GDAL estimates the scale for each window, and tiles would differ.
    scale = dict(zip(("XSCALE", "YSCALE"), _scale(placed, grid), strict=True))
    origin = _continuous(placed)
    goal = {"transform": grid.transform(extent), "width": extent.width, "height": extent.height}
    goal |= {"crs": crs_of(grid.crs), **scale}
    warped = _warp(flat, source.nodata, {**origin, **goal}, categorical=categorical)
    nodatas = tuple(file.nodatavals)
    flags = {flag for of_band in file.mask_flag_enums for flag in of_band}
    masked = ColorInterp.alpha in file.colorinterp or MaskFlags.per_dataset in flags
    if not masked or source.nodata == NO_NODATA or {source.nodata, *file.nodatavals} == {None}:
        return warped, Place(extent, nodatas=nodatas), (flat, file)
    unmixed = _warp(flat, NO_NODATA, {**origin, **goal}, categorical=True)
    return warped, Place(extent, nodatas=nodatas, unmixed=unmixed), (unmixed, flat, file)


def _warp(dataset: DatasetReader, nodata: float | None, place: dict[str, Any], *, categorical: bool) -> WarpedVRT:
    """A bilinear (or nearest) view of the dataset, of the whole of it, exact and of one scale.

    By default GDAL approximates the transformation and estimates the scale from one window to the next: then a pixel's
    value would depend on the window it is read in.
    """
    stated = [] if nodata == NO_NODATA else [nodata, dataset.nodata]
    stated = [value for value in stated if value is not None]
    nodata = next((value for value in stated if holds(dataset.dtypes[0], value)), None)
    # A warp compares the values of all bands as those of the first.
    if nodata is None and any(holds(dtype, value) for dtype in dataset.dtypes[1:] for value in stated):
        raise DataError(
            f"{dataset.name} has bands of several pixel types and a nodata value that the first cannot hold, which is "
            "not warped; save the bands as files of their own"
        )
    bare = nodata is None and ColorInterp.alpha not in dataset.colorinterp
    kind = Resampling.nearest if categorical else Resampling.bilinear
    options = {"XSCALE": 1.0, "YSCALE": 1.0, "tolerance": 1e-9, "resampling": kind, **place}
    # By default GDAL takes a band's fill value for data wherever another band has data.
    options["UNIFIED_SRC_NODATA"] = "NO"
    # A pixel counts unless it is wholly transparent; of 65,535 steps GDAL would take the first as none.
    options["SRC_ALPHA_MAX"] = "1"
    return WarpedVRT(dataset, src_nodata=nodata, nodata=nodata, add_alpha=bare, **options)


def _continuous(placed: Source) -> dict[str, Any]:
    """CRS and transform of a file to warp: near the end of a turn around the Earth, or beyond, in a plane around it.

    GDAL transforms to the turn of the CRS alone, and loses pixels up to a third of a degree from its end.
    """
    crs, affine = str(placed.crs), Affine(*placed.transform)
    if turn := turn_of(crs):
        lons = [(x - turn[0]) / turn[1] for x in bounds_of(placed)[::2]]
        plane = around(crs, sum(lons) / 2)
        if plane and max(map(abs, lons)) > _SEAM:
            return {"src_crs": crs_of(plane[0]), "src_transform": plane[1] @ affine}
    return {"src_crs": crs_of(crs), "src_transform": affine}


def _scale(placed: Source, grid: Grid) -> tuple[float, float]:
    """Grid pixels per file pixel along the grid's x and y, at most 1 (1 = no smoothing).

    Taken at the file's centre and rounded, so that neighbouring files of one kind have the same.
    """
    col, row = _nearest(placed, grid)
    (x, y), (xc, yc), (xr, yr) = moved(placed, str(grid.crs), [(col, row), (col + 1, row), (col, row + 1)])
    (rx, ry) = grid.resolution
    # The Jacobian of file pixels to grid pixels at that place, inverted.
    step = np.linalg.inv(np.array([[(xc - x) / rx, (xr - x) / rx], [(yc - y) / ry, (yr - y) / ry]]))
    across, down = np.hypot(step[0], step[1])  # file pixels per grid pixel
    # Two digits, so that scenes of nearly one scale are smoothed alike.
    return min(1.0, float(f"{1 / across:.2g}")), min(1.0, float(f"{1 / down:.2g}"))


def _nearest(placed: Source, grid: Grid) -> tuple[float, float]:
    """Pixel, from the file's centre, where its scale on a grid is taken: in a wide file, near the grid's ground."""
    if not (ground := grid.ground):
        return 0.0, 0.0
    lon, lat = moved(placed, LONLAT, [(0.0, 0.0)])[0]
    middle = (ground[0] + ground[2]) / 2
    # The difference of longitudes, across the antimeridian too.
    if abs((lon - middle + 180) % 360 - 180) <= _FAR:
        return 0.0, 0.0
    col, row = ~Affine(*placed.transform) @ transformer(LONLAT, str(placed.crs)).transform(middle, lat)
    return col - placed.width / 2, row - placed.height / 2


def _placed(dataset: DatasetReader, source: Source, href: str) -> Source:
    """The open file's georeference, or the item's if the file has none.

    Raises:
        DataError: the item states another place, or does not state the file's scale and offset.
    """
    own, stated = described(dataset), source.of_file(href)
    expect_same_place(href, own, stated)
    # Checked as the file opens: the run was planned from the item, which does not state the units.
    if own.units and not source.units:
        scale, offset = next(unit for unit in own.units if unit != STORED)
        raise DataError(
            f"{public(href)} has values stored x {scale:g} + offset {offset:g}, its item {source.item_id} states no "
            "scale and offset, expected both or neither; state raster:scale and raster:offset in the item, or ingest "
            "the file again"
        )
    if own.crs is None:
        own = replace(own, crs=stated.crs, transform=stated.transform)
    return replace(own, item_id=source.item_id)


def version(href: str) -> str:
    """Changes when a file is written again: time and size of a local file, `remote.version` of another."""
    return " ".join(map(str, _stamp(href))) if is_local(href) else remote.version(href)


def _stamp(href: str) -> tuple[int, int]:
    """Changes when a local file is written again; remote files are taken as immutable, but their signatures expire."""
    if not is_local(href):
        return remote.stamp(href), 0
    try:
        status = os.stat(str(upath(href)))  # noqa: PTH116 - a UPath has no cheaper one
    except OSError as error:
        raise DataError(f"{href} cannot be read: {error.strerror}") from error
    return status.st_mtime_ns, status.st_size
