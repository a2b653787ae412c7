"""Pictures and charts of a run: a mosaic per grid, a contact sheet of images without georeference, plots, sizes."""

import io
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import cog
from rayseg.io.maps import MappedTile, by_grid, width_m
from rayseg.io.rasters import changed, footprint, is_number, view
from rayseg.io.remote import patient, patiently
from rayseg.io.sources import Source, gdal, open_file
from rayseg.io.tables import THREADS
from rayseg.io.times import time_order
from rayseg.vision.color import RGB, UNCHANGED, ClassTable, label_table, overlay
from rayseg.vision.superpixels import outlined

MOST_READ = 20_000
"""Tiles of a grid whose files are read for a picture; more of them have less than 30 of its pixels a side."""
SHEET = 6
"""Images on a contact sheet, at most."""
_log = logging.getLogger(__name__)
_GAP = 8  # px between images of a sheet
_BARE = (200, 30, 30)
_STRIP = 256  # rows
_PLOT_COLORS = 24
_OUTLINE = (255, 255, 0)
_SHOWN = 3  # tiles
_SIDE = 1000  # px of a tile, at most


def plots_over_imagery(tiles: Sequence[MappedTile]) -> bytes:
    """The three tiles with the largest share under plots, side by side with their plots outlined, as WebP.

    Each is cropped at the upper left; without tiles the result is empty.
    """
    cells = []
    for tile in sorted(tiles, key=lambda tile: -tile.record.facts.get("coverage", 0))[:_SHOWN]:
        whole = tile.tile.window
        window = Window(whole.col, whole.row, min(_SIDE, whole.width), min(_SIDE, whole.height))
        cut = window.slices(whole)
        numbers_HW = cog.read_bands(plots_path(tile))[0][cut]
        image_HWC = shown(tile.sources, tile.tile.grid, window)
        # Background is tinted, so that gaps between plots show.
        bare_HW = cog.read_bands(tile.href)[0][cut] == 0
        image_HWC[bare_HW] = image_HWC[bare_HW] // 2 + np.array(_BARE, np.uint8) // 2
        cells.append(outlined(image_HWC, numbers_HW))
    if not cells:
        return b""
    height = max(len(cell) for cell in cells)
    padded = [np.pad(cell, ((0, height - len(cell)), (0, 8), (0, 0))) for cell in cells]
    return encoded(np.concatenate(padded, axis=1), "webp")


@dataclass(frozen=True, eq=False)
class Picture:
    """An overview of a region.

    Attributes:
        title: name of the grid, or number of images.
        image_HWC: the imagery, RGB uint8, 0 without imagery.
        seen_HW: True where there is imagery.
        classes_HW: class values uint8, 255 where nothing is mapped.
        metres: length of the picture's middle row in metres; None without CRS.
        step: grid pixels per picture pixel.
        numbers_HW: number of the plot, uint32, 0 for none, where plots are mapped.
    """

    title: str
    image_HWC: NDArray[np.uint8]
    seen_HW: NDArray[np.bool_]
    classes_HW: NDArray[np.uint8]
    metres: float | None
    step: float
    numbers_HW: NDArray[np.uint32] | None = None

    def imagery(self) -> NDArray[np.uint8]:
        """The imagery (height, width, 4), transparent without imagery."""
        return self._with_alpha(self.image_HWC)

    def map(self, table: ClassTable, *, alpha: float = 0.6) -> NDArray[np.uint8]:
        """The classes over the imagery (height, width, 4); plots in colours of their own, with outlines."""
        if self.numbers_HW is None:
            return self._with_alpha(_overlaid(self.image_HWC, self.classes_HW, shown_colors(table), alpha))
        colors = dict(enumerate(label_table(_PLOT_COLORS).colors, 1))
        colors_HW = np.where(self.numbers_HW == 0, 0, 1 + self.numbers_HW % _PLOT_COLORS).astype(np.uint8)
        image_HWC = _overlaid(self.image_HWC, colors_HW, colors, alpha / 2)
        for axis in (0, 1):  # each pixel that differs from the one above it, or to its left
            edge_HW = np.diff(self.numbers_HW, axis=axis, prepend=self.numbers_HW.take([0], axis)) != 0
            image_HWC[edge_HW] = _OUTLINE
        return self._with_alpha(image_HWC)

    def _with_alpha(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        there_HW = self.seen_HW | (self.classes_HW != NODATA)
        return np.dstack([image_HWC, np.where(there_HW, 255, 0)]).astype(np.uint8)


def _overlaid(
    image_HWC: NDArray[np.uint8], values_HW: NDArray[np.uint8], colors: dict[int, RGB], alpha: float
) -> NDArray[np.uint8]:
    # In strips: the colours of a pixel take eight times its memory.
    strips = [slice(row, row + _STRIP) for row in range(0, len(image_HWC), _STRIP)]
    return np.concatenate([overlay(image_HWC[rows], values_HW[rows], colors, alpha) for rows in strips])


def shown_colors(table: ClassTable) -> dict[int, RGB]:
    """Colours of the classes to paint: all but the background, class 0 of two or of a comparison."""
    plain = table.binary or UNCHANGED in table.names
    return {value: color for value, _, color in table.classes if not (plain and value == 0)}


def encoded(image_HWC: NDArray[np.uint8], kind: Literal["png", "webp"] = "png") -> bytes:
    """The image (height, width, 3 or 4) uint8 as a PNG file, or as a lossy WebP file a tenth of its size."""
    import matplotlib.image  # slow to import, needed at the end of a run only

    sink = io.BytesIO()
    options = {"quality": 82, "method": 4} if kind == "webp" else {"optimize": True}
    matplotlib.image.imsave(sink, image_HWC, format=kind, pil_kwargs=options)
    return sink.getvalue()


def smaller(image_HWC: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """The image (height, width, 3 or 4), averaged down to at most `size` px."""
    from PIL import Image  # needed at the end of a run only

    image = Image.fromarray(image_HWC)
    image.thumbnail((size, size), Image.Resampling.BOX)
    return np.asarray(image)


def pictures_of(
    tiles: Sequence[MappedTile], *, size: int = 1400, most: int | None = None, plots: bool = False
) -> list[Picture]:
    """One picture per grid with CRS, then one sheet of at most six of the images without.

    Args:
        tiles: of one run.
        size: the longer side of a picture in px, at most.
        most: number of pictures, the first ones; None for all.
        plots: show the plots that the tiles have, too.
    """
    grids = by_grid(tiles)
    placed = [
        partial(
            mosaic,
            members,
            size=size,
            plots=plots,
            title=grid.crs if grid.crs.upper().startswith("EPSG:") else grid.name,
        )
        for grid, members in grids.items()
        if grid.crs
    ]
    # Photos have no place on one map: each has a grid of its own.
    images = [members for grid, members in grids.items() if not grid.crs]
    sheets = [partial(contact_sheet, images, size=size, plots=plots)] if images else []
    return [draw() for draw in [*placed, *sheets][:most]]


def _title(grid: Grid) -> str:
    named = [grid.crs if grid.crs and grid.crs.upper().startswith("EPSG:") else grid.name]
    return ", ".join([*([grid.image] if grid.image else []), *named])


def mosaic(tiles: Sequence[MappedTile], *, size: int, title: str, plots: bool = False) -> Picture:
    """Tiles of one grid side by side, decimated to at most `size` px.

    Files are read through their overviews; of more than `MOST_READ` tiles each has the colour of its largest class, and
    no plots. Values that are not uint8 are stretched between their 2nd and 98th
    percentile, band by band, over the whole picture.
    """
    grid, extent = tiles[0].tile.grid, reduce(Window.union, (tile.tile.window for tile in tiles))
    canvas = _Canvas(extent, max(1.0, max(extent.width, extent.height) / size))
    classes_HW = np.full(canvas.shape, NODATA, np.uint8)
    few = len(tiles) <= MOST_READ
    numbers_HW = np.zeros(canvas.shape, np.uint32) if plots and few else None

    @patient
    def read(tile: MappedTile, href: str, resampling: Resampling) -> NDArray[np.generic]:
        with gdal(href), open_file(href) as dataset:
            part_HW: NDArray[np.generic] = dataset.read(
                1, out_shape=canvas.shape_of(tile.tile.window), resampling=resampling, masked=True
            ).filled(NODATA if href == tile.href else 0)
            return part_HW

    def parts_of(tile: MappedTile) -> list[NDArray[np.generic]]:
        classes = [read(tile, tile.href, Resampling.mode)]
        return [*classes, read(tile, plots_path(tile), Resampling.nearest)] if plots else classes

    if not few:  # a request for every tile would take hours
        for tile in tiles:
            if counts := tile.counts:
                classes_HW[canvas.slices(tile.tile.window)] = max(counts, key=counts.__getitem__)
    with ThreadPoolExecutor(THREADS) as pool:  # each waits for its store
        read_tiles = tiles if few else ()
        for tile, parts in zip(read_tiles, pool.map(parts_of, read_tiles), strict=True):
            place = canvas.slices(tile.tile.window)
            classes_HW[place] = parts[0]
            if numbers_HW is not None:
                numbers_HW[place] = parts[1]
    # newest first: the order in which the map takes pixels
    sources = {source.item_id: source for tile in tiles for source in tile.sources}
    by_name = [sources[name] for name in sorted(sources)]
    newest_first = sorted(by_name, key=lambda source: time_order(source.datetime), reverse=True)
    image_CHW, seen_HW = _imagery(newest_first, grid, canvas)
    image_HWC = painted(image_CHW, seen_HW)
    return Picture(title, image_HWC, seen_HW, classes_HW, width_m(grid, extent), canvas.step, numbers_HW)


def plots_path(tile: MappedTile) -> str:
    """The raster with the numbers of the plots of a tile."""
    return tile.href.replace("classes.tif", "plots.tif")


def contact_sheet(images: Sequence[Sequence[MappedTile]], *, size: int, plots: bool = False) -> Picture:
    """At most six images, chosen evenly, in rows of three."""
    chosen = [images[at] for at in sorted({round(at) for at in np.linspace(0, len(images) - 1, SHEET)})]
    # Images keep their proportions; all cells are as large as the widest and the highest image.
    across = min(3, len(chosen))
    side = (size - _GAP * (across - 1)) // across
    cells = [mosaic(tiles, size=side, title="", plots=plots) for tiles in chosen]
    height, width = (max(cell.classes_HW.shape[axis] for cell in cells) for axis in (0, 1))
    rows = math.ceil(len(cells) / across)
    shape = (rows * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP)
    image_HWC, seen_HW = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
    classes_HW = np.full(shape, NODATA, np.uint8)
    numbers_HW = np.zeros(shape, np.uint32) if plots else None
    for at, cell in enumerate(cells):
        top, left = at // across * (height + _GAP), at % across * (width + _GAP)
        place = np.s_[top : top + cell.classes_HW.shape[0], left : left + cell.classes_HW.shape[1]]
        image_HWC[place], seen_HW[place], classes_HW[place] = cell.image_HWC, cell.seen_HW, cell.classes_HW
        if numbers_HW is not None and cell.numbers_HW is not None:
            numbers_HW[place] = cell.numbers_HW
    title = (
        f"{len(cells)} of {len(images)} images"
        if len(cells) < len(images)
        else f"{len(cells)} image{'s' * (len(cells) > 1)}"
    )
    return Picture(title, image_HWC, seen_HW, classes_HW, None, max(cell.step for cell in cells), numbers_HW)


def shown(sources: Sequence[Source], grid: Grid, window: Window) -> NDArray[np.uint8]:
    """The imagery of a small window at full resolution, RGB (height, width, 3) uint8."""
    image_CHW, seen_HW = _imagery(sources, grid, _Canvas(window, 1.0))
    return painted(image_CHW, seen_HW)


@dataclass(frozen=True)
class _Canvas:
    """The pixels of a picture over `extent`, each `step` grid pixels wide."""

    extent: Window
    step: float

    @property
    def shape(self) -> tuple[int, int]:
        return math.ceil(self.extent.height / self.step), math.ceil(self.extent.width / self.step)

    def slices(self, window: Window) -> tuple[slice, slice]:
        """Picture pixels that `window` (inside the extent) touches."""
        rows, cols = (
            slice(math.floor(part.start / self.step), math.ceil(part.stop / self.step))
            for part in window.slices(self.extent)
        )
        return rows, cols

    def shape_of(self, window: Window) -> tuple[int, int]:
        rows, cols = self.slices(window)
        return rows.stop - rows.start, cols.stop - cols.start


def _imagery(sources: Sequence[Source], grid: Grid, canvas: _Canvas) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """(three bands of the imagery, True where there is imagery) over the canvas; unreadable files are left out.

    A damaged file must not prevent the report; the ledger names its tiles.
    """
    image_CHW: NDArray[np.generic] = np.zeros((3, *canvas.shape), sources[0].dtype)
    seen_HW = np.zeros(canvas.shape, bool)
    for source in sources:
        part = footprint(source, grid).intersect(canvas.extent)
        # A covered source is not opened: later sources show only in gaps.
        if part.empty or seen_HW[canvas.slices(part)].all():
            continue
        place = canvas.slices(part)
        try:
            pixels_CHW, valid_HW = _decimated(source, grid, part, canvas.shape_of(part))
        except DataError as error:
            _log.warning("left out of the picture: %s", error)
            continue
        # First valid pixel wins, as in the map.
        fresh_HW = valid_HW & ~seen_HW[place]
        np.copyto(image_CHW[:, *place], pixels_CHW, where=fresh_HW, casting="unsafe")
        seen_HW[place] |= fresh_HW
    return image_CHW, seen_HW


def _decimated(
    source: Source, grid: Grid, part: Window, shape: tuple[int, int]
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """(three bands of a source over `part` of its footprint, averaged down to `shape`, True where they have data)."""
    bands, valid_HW, known = [], np.ones(shape, bool), []
    for href, index in bands_shown(source):
        band_HW, ok_HW = patiently(partial(_averaged, source, href, index, grid, part, shape))
        place = _places(source).index((href, index))
        # A pixel is nodata if all three bands are: 0 alone is a dark value.
        nodata = nodata_of(source, href, index)
        known.append(np.ones(shape, bool) if nodata is None else band_HW != nodata)
        valid_HW &= ok_HW
        bands.append(changed(band_HW, source.change[place] if source.change else None))
    return np.stack(bands), valid_HW & np.any(known, axis=0) & is_number(np.stack(bands)).all(axis=0)


def _places(source: Source) -> list[tuple[str, int]]:
    """(href, index in the file) of each of the source's bands."""
    return [(href, index) for href, names in source.assets for index, _ in enumerate(names, 1)]


def nodata_of(source: Source, href: str, index: int) -> float | None:
    """The nodata value that a band has by its item."""
    return source.nodatas[_places(source).index((href, index))] if source.nodatas else source.nodata


def _averaged(
    source: Source, href: str, index: int, grid: Grid, part: Window, shape: tuple[int, int]
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    with view(source, href, grid, part) as (dataset, place):
        at = place.at(part)
        band_HW = dataset.read(index, window=at, out_shape=shape, resampling=Resampling.average)
        return place.upright(band_HW), place.upright(dataset.dataset_mask(window=at, out_shape=shape) > 0)


def bands_shown(source: Source) -> list[tuple[str, int]]:
    """(href, band) to show as red, green and blue: by name, else the first three, else the first as grey."""
    where = {name: (href, at) for href, names in reversed(source.assets) for at, name in enumerate(names, 1)}
    names = [name for name in source.bands if name != "alpha"]
    visible = ["red", "green", "blue"]
    chosen = visible if set(visible) <= set(names) else names[:3] if len(names) >= 3 else names[:1] * 3
    return [where[name] for name in chosen]


def painted(image_CHW: NDArray[np.generic], seen_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bands as RGB (height, width, 3) uint8, 0 without imagery; other types than uint8 are stretched."""
    if image_CHW.dtype != np.uint8 and seen_HW.any():
        stretched = []
        for band_HW in image_CHW:
            # Percentiles ignore the outliers that minimum and maximum would follow.
            low, high = np.percentile(band_HW[seen_HW], [2, 98])
            scaled_HW = np.clip((band_HW.astype(np.float64) - low) / max(high - low, 1e-12), 0, 1) * 255
            stretched.append(scaled_HW.astype(np.uint8))
        image_CHW = np.stack(stretched)
    return np.where(seen_HW[..., None], image_CHW.transpose(1, 2, 0), 0).astype(np.uint8)
