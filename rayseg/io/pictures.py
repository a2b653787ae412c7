"""Pictures of a mapped region: a mosaic of every grid, a sheet of a few images where there is no georeference."""

import io
import logging
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial, reduce
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray
from rasterio.enums import Resampling
from rasterio.windows import Window as FileWindow

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import cog
from rayseg.io.maps import MappedTile, width_m
from rayseg.io.rasters import footprint, view
from rayseg.io.remote import patiently
from rayseg.io.sources import Source, gdal, open_file
from rayseg.vision.color import RGB, ClassTable, overlay
from rayseg.vision.superpixels import outlined

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INK = "#80868b"
_BARE = (200, 30, 30)
_SHOWN = 3
_SIDE = 1000  # px of a tile at most


def plots_over_imagery(tiles: Sequence[MappedTile]) -> bytes:
    """The tiles of a run with the largest share under plots, cut from the upper left, as WebP; nothing without tiles.

    They are side by side, each with its plots outlined.
    """
    chosen = sorted(tiles, key=lambda tile: -tile.record.facts.get("coverage", 0))[:_SHOWN]
    cells = [_outlined(tile) for tile in chosen]
    if not cells:
        return b""
    height = max(len(cell) for cell in cells)
    padded = [np.pad(cell, ((0, height - len(cell)), (0, 8), (0, 0))) for cell in cells]
    return encoded(np.concatenate(padded, axis=1), "webp")


def _outlined(tile: MappedTile) -> NDArray[np.uint8]:
    whole = tile.tile.window
    window = Window(whole.col, whole.row, min(_SIDE, whole.width), min(_SIDE, whole.height))
    cut = window.slices(whole)
    numbers_HW = cog.read_bands(tile.href.replace("classes.tif", "plots.tif"))[0][cut]
    bare_HW = cog.read_bands(tile.href)[0][cut] == 0
    image_HWC = shown(tile.sources, tile.tile.grid, window)
    image_HWC[bare_HW] = image_HWC[bare_HW] // 2 + np.array(_BARE, np.uint8) // 2
    return outlined(image_HWC, numbers_HW)


def coverage_chart(patches: Sequence[tuple[int, Sequence[float]]]) -> bytes:
    """Mean share of the imagery under plots after each round, as SVG; a patch that needed fewer rounds keeps its share.

    Args:
        patches: (valid pixels, share of these after each round) of every patch.
    """
    patches = [(pixels, shares) for pixels, shares in patches if shares]
    if not patches:
        return b""
    rounds = max(len(shares) for _, shares in patches)
    weights = [pixels for pixels, _ in patches]
    means = [
        float(np.average([shares[min(k, len(shares) - 1)] for _, shares in patches], weights=weights))
        for k in range(rounds)
    ]
    from matplotlib.figure import Figure  # drawn at the end of a run, imported then

    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    bars = axes.bar([f"{k + 1}" for k in range(rounds)], means, color="#009e73")
    axes.bar_label(bars, [f"{mean:.1%}" for mean in means], color=_INK, fontsize=9)
    axes.set_ylim(0, 1.1)
    axes.set_xlabel("round", color=_INK)
    return _svg(figure)


def size_chart(pixels: Sequence[int]) -> bytes:
    """How many plots there are of which size, as SVG."""
    if not pixels:
        return b""
    from matplotlib.figure import Figure  # drawn at the end of a run, imported then

    figure = Figure(figsize=(4.8, 2.6), layout="constrained")
    axes = figure.subplots()
    edges = np.geomspace(max(min(pixels), 1), max(pixels) + 1, 25)
    axes.hist(pixels, bins=list(edges), color="#e69f00")
    axes.set_xscale("log")
    axes.set_xlabel("pixels", color=_INK)
    axes.set_ylabel("plots", color=_INK)
    return _svg(figure)


def _svg(figure: "Figure") -> bytes:
    axes = figure.axes[0]
    axes.tick_params(colors=_INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    sink = io.BytesIO()
    figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return sink.getvalue()


_log = logging.getLogger(__name__)

SHEET = 6
_GAP = 8


@dataclass(frozen=True, eq=False)
class Picture:
    """A region seen from afar.

    Attributes:
        title: the grid or the images it shows.
        image_HWC: the imagery, RGB uint8, 0 where there is none.
        seen_HW: where there is imagery, bool.
        classes_HW: class values uint8, 255 where nothing is mapped.
        metres: length on the ground of the picture's middle row; None without CRS.
        step: number of grid pixels along one picture pixel.
    """

    title: str
    image_HWC: NDArray[np.uint8]
    seen_HW: NDArray[np.bool_]
    classes_HW: NDArray[np.uint8]
    metres: float | None
    step: float

    def imagery(self) -> NDArray[np.uint8]:
        """The imagery (height, width, 4), see-through where there is none."""
        return self._with_alpha(self.image_HWC)

    def map(self, table: ClassTable, *, alpha: float = 0.6) -> NDArray[np.uint8]:
        """The classes over the imagery (height, width, 4)."""
        return self._with_alpha(overlay(self.image_HWC, self.classes_HW, shown_colors(table), alpha))

    def _with_alpha(self, image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        there_HW = self.seen_HW | (self.classes_HW != NODATA)
        return np.dstack([image_HWC, np.where(there_HW, 255, 0)]).astype(np.uint8)


def shown_colors(table: ClassTable) -> dict[int, RGB]:
    """Colours of the classes worth painting: all, but for class 0 of two, which is the background."""
    binary = len(table.classes) == 2
    return {value: color for value, _, color in table.classes if not (binary and value == 0)}


def encoded(image_HWC: NDArray[np.uint8], kind: Literal["png", "webp"] = "png") -> bytes:
    """The image (height, width, 3 or 4) uint8 as a PNG file, or as a lossy WebP file a tenth of its size."""
    import matplotlib.image  # drawn at the end of a run, imported then

    sink = io.BytesIO()
    options = {"quality": 82, "method": 4} if kind == "webp" else {"optimize": True}
    matplotlib.image.imsave(sink, image_HWC, format=kind, pil_kwargs=options)
    return sink.getvalue()


def pictures_of(tiles: Sequence[MappedTile], *, size: int = 1400, most: int | None = None) -> list[Picture]:
    """One picture per grid with CRS, then one sheet of at most six of the images without.

    Args:
        tiles: of one run.
        size: the longer side of a picture in px, at most.
        most: pictures that are made, the first ones; None for all.
    """
    grids: dict[Grid, list[MappedTile]] = {}
    for tile in tiles:
        grids.setdefault(tile.tile.grid, []).append(tile)
    placed = [partial(mosaic, found, size=size, title=_named(grid)) for grid, found in grids.items() if grid.crs]
    images = [found for grid, found in grids.items() if not grid.crs]
    sheets = [partial(contact_sheet, images, size=size)] if images else []
    return [draw() for draw in [*placed, *sheets][:most]]


def _named(grid: Grid) -> str:
    return grid.crs if grid.crs and grid.crs.upper().startswith("EPSG:") else grid.name


def mosaic(tiles: Sequence[MappedTile], *, size: int, title: str) -> Picture:
    """Tiles of one grid side by side, decimated to at most `size` px.

    Files are read through their overviews. Values that are not uint8 are stretched between their 2nd and 98th
    percentile, band by band, over the whole picture.
    """
    grid, extent = tiles[0].tile.grid, reduce(Window.union, (tile.tile.window for tile in tiles))
    canvas = _Canvas(extent, max(1.0, max(extent.width, extent.height) / size))
    classes_HW = np.full(canvas.shape, NODATA, np.uint8)
    with ThreadPoolExecutor(4) as pool:
        for tile, found_HW in zip(tiles, pool.map(lambda tile: _classes(tile, canvas), tiles), strict=True):
            classes_HW[canvas.slices(tile.tile.window)] = found_HW
    image_CHW, seen_HW = _imagery(_sources(tiles), grid, canvas)
    metres = width_m(grid, extent)
    return Picture(title, painted(image_CHW, seen_HW), seen_HW, classes_HW, metres, canvas.step)


def contact_sheet(images: Sequence[Sequence[MappedTile]], *, size: int) -> Picture:
    """At most six images, chosen evenly, in rows of three."""
    chosen = [images[at] for at in sorted({round(at) for at in np.linspace(0, len(images) - 1, SHEET)})]
    across = min(3, len(chosen))
    side = (size - _GAP * (across - 1)) // across
    cells = [mosaic(tiles, size=side, title="") for tiles in chosen]
    height, width = (max(cell.classes_HW.shape[axis] for cell in cells) for axis in (0, 1))
    rows = math.ceil(len(cells) / across)
    shape = (rows * (height + _GAP) - _GAP, across * (width + _GAP) - _GAP)
    image_HWC, seen_HW = np.zeros((*shape, 3), np.uint8), np.zeros(shape, bool)
    classes_HW = np.full(shape, NODATA, np.uint8)
    for at, cell in enumerate(cells):
        top, left = at // across * (height + _GAP), at % across * (width + _GAP)
        place = np.s_[top : top + cell.classes_HW.shape[0], left : left + cell.classes_HW.shape[1]]
        image_HWC[place], seen_HW[place], classes_HW[place] = cell.image_HWC, cell.seen_HW, cell.classes_HW
    title = (
        f"{len(cells)} of {len(images)} images"
        if len(cells) < len(images)
        else f"{len(cells)} image{'s' * (len(cells) > 1)}"
    )
    return Picture(title, image_HWC, seen_HW, classes_HW, None, max(cell.step for cell in cells))


def shown(sources: Sequence[Source], grid: Grid, window: Window) -> NDArray[np.uint8]:
    """The imagery of a small window at its own resolution, RGB (height, width, 3)."""
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
        rows, cols = window.slices(self.extent)
        return self._touched(rows), self._touched(cols)

    def _touched(self, part: slice) -> slice:
        return slice(math.floor(part.start / self.step), math.ceil(part.stop / self.step))

    def shape_of(self, window: Window) -> tuple[int, int]:
        rows, cols = self.slices(window)
        return rows.stop - rows.start, cols.stop - cols.start


def _classes(tile: MappedTile, canvas: _Canvas) -> NDArray[np.uint8]:
    with gdal(tile.href), open_file(tile.href) as dataset:
        shape = canvas.shape_of(tile.tile.window)
        found_HW: NDArray[np.uint8] = dataset.read(1, out_shape=shape, resampling=Resampling.mode)
    return found_HW


def _sources(tiles: Iterable[MappedTile]) -> list[Source]:
    """All imagery of the tiles, in the order in which it counts."""
    found = {source.item_id: source for tile in tiles for source in tile.sources}
    return sorted((found[name] for name in sorted(found)), key=lambda source: source.datetime or "", reverse=True)


def _imagery(sources: Sequence[Source], grid: Grid, canvas: _Canvas) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """(three bands of the imagery, where there is any) over the canvas; what cannot be read is left out.

    A damaged file has cost its own tiles, and the ledger names them: it must not cost the rest of the run its report.
    """
    image_CHW: NDArray[np.generic] = np.zeros((3, *canvas.shape), sources[0].dtype)
    seen_HW = np.zeros(canvas.shape, bool)
    for source in sources:
        part = footprint(source, grid).intersect(canvas.extent)
        if part.empty or seen_HW[canvas.slices(part)].all():
            continue
        place = canvas.slices(part)
        try:
            pixels_CHW, valid_HW = _decimated(source, grid, part, canvas.shape_of(part))
        except DataError as error:
            _log.warning("left out of the picture: %s", error)
            continue
        fresh_HW = valid_HW & ~seen_HW[place]
        np.copyto(image_CHW[:, *place], pixels_CHW, where=fresh_HW, casting="unsafe")
        seen_HW[place] |= fresh_HW
    return image_CHW, seen_HW


def _decimated(
    source: Source, grid: Grid, part: Window, shape: tuple[int, int]
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    """Three bands of a source over `part` of its footprint, averaged down to `shape`, and where they have data."""
    bands, valid_HW = [], np.ones(shape, bool)
    for href, index in bands_shown(source):
        band_HW, ok_HW = patiently(partial(_averaged, source, href, index, grid, part, shape))
        valid_HW &= ok_HW
        bands.append(band_HW)
    if source.nodata is not None:
        valid_HW &= np.any([band_HW != source.nodata for band_HW in bands], axis=0)
    return np.stack(bands), valid_HW & np.isfinite(bands).all(axis=0)


def _averaged(
    source: Source, href: str, index: int, grid: Grid, part: Window, shape: tuple[int, int]
) -> tuple[NDArray[np.generic], NDArray[np.bool_]]:
    with view(source, href, grid, part) as (dataset, extent):
        at = FileWindow(part.col - extent.col, part.row - extent.row, part.width, part.height)
        band_HW = dataset.read(index, window=at, out_shape=shape, resampling=Resampling.average)
        return band_HW, dataset.dataset_mask(window=at, out_shape=shape) > 0


def bands_shown(source: Source) -> list[tuple[str, int]]:
    """(href, band) to show as red, green and blue: by these names, else the first three, else the first as grey."""
    where = {name: (href, at) for href, names in reversed(source.assets) for at, name in enumerate(names, 1)}
    names = [name for name in source.bands if name != "alpha"]
    visible = ["red", "green", "blue"]
    chosen = visible if set(visible) <= set(names) else names[:3] if len(names) >= 3 else names[:1] * 3
    return [where[name] for name in chosen]


def painted(image_CHW: NDArray[np.generic], seen_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Bands as RGB (height, width, 3) uint8, 0 where there is no imagery."""
    if image_CHW.dtype != np.uint8 and seen_HW.any():
        image_CHW = np.stack([_stretched(band_HW.astype(np.float64), seen_HW) for band_HW in image_CHW])
    return np.where(seen_HW[..., None], image_CHW.transpose(1, 2, 0), 0).astype(np.uint8)


def _stretched(band_HW: NDArray[np.float64], seen_HW: NDArray[np.bool_]) -> NDArray[np.float64]:
    low, high = np.percentile(band_HW[seen_HW], [2, 98])
    return np.asarray(np.clip((band_HW - low) / max(high - low, 1e-12), 0, 1) * 255)
