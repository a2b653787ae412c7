"""Results as Cloud Optimized GeoTIFF: 512 px blocks, DEFLATE, overviews, names, colours; the same bytes every time."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.io import DatasetWriter, MemoryFile

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io.remote import patient
from rayseg.io.sources import crs_of, gdal, open_file
from rayseg.io.written_files import WrittenFile, bands_of, write_file
from rayseg.store import StorePath
from rayseg.vision.color import ClassTable

COG = {"driver": "COG", "compress": "DEFLATE", "blocksize": 512, "bigtiff": "IF_SAFER", "level": 6}


def write_classes(
    path: StorePath, classes_HW: np.ndarray, grid: Grid, window: Window, table: ClassTable
) -> WrittenFile:
    """Write class values with their colours; overviews show the most frequent class.

    Args:
        path: local path or URI; the file is written whole or not at all.
        classes_HW: uint8 class values over `window`, 255 = nodata.
        grid: their grid; without CRS the file has no georeference.
        window: their window of it.
        table: the classes; names go to the band's tag `classes`, as JSON from value to name.

    Raises:
        DataError: the array is not of the window's shape, or not uint8.
    """
    _expect_bytes(path, classes_HW)
    data = classes_file(classes_HW, grid, window, table, name=path)
    return write_file(path, data, bands_of(["class"], classes_HW.dtype, NODATA))


def classes_file(
    classes_HW: np.ndarray, grid: Grid, window: Window, table: ClassTable, *, name: StorePath = "the answer"
) -> bytes:
    """The content of the file that `write_classes` writes."""
    colors = {value: (*color, 255) for value, _, color in table.classes}
    names = json.dumps({str(value): title for value, title, _ in table.classes})
    with _in_memory(name, classes_HW[None], grid, window, nodata=NODATA) as dataset:
        dataset.descriptions = ("class",)
        dataset.update_tags(1, classes=names)
        dataset.write_colormap(1, {**dict.fromkeys(range(256), (0, 0, 0, 0)), **colors})
        return _encoded(dataset, {"overview_resampling": "MODE"})


def write_scores(
    path: StorePath, scores_CHW: np.ndarray, grid: Grid, window: Window, names: Sequence[str]
) -> WrittenFile:
    """Write scores, one band per name: uint8, 0..254 = probability x 254, 255 = nodata; overviews are averages.

    Raises:
        DataError: the array is not (names, height, width) of the window, or not uint8.
    """
    _expect_bytes(path, scores_CHW)
    return write_image(path, scores_CHW, grid, window, bands=names, nodata=NODATA)


def score_bands(names: Sequence[str]) -> list[dict[str, Any]]:
    """Metadata of the bands of a file that `write_scores` writes."""
    return bands_of(names, np.dtype(np.uint8), NODATA)


def write_image(
    path: StorePath,
    image_CHW: np.ndarray,
    grid: Grid,
    window: Window,
    *,
    bands: Sequence[str],
    nodata: float | None = None,
    valid_HW: np.ndarray | None = None,
    overviews: str = "AVERAGE",
) -> WrittenFile:
    """Write an image of any pixel type.

    Args:
        path: local path or URI.
        image_CHW: pixels over `window`.
        grid: their grid.
        window: their window of it.
        bands: name of each band.
        nodata: value that means no data; pixels that are not valid get it.
        valid_HW: where there is data; without `nodata` it becomes the file's internal mask.
        overviews: GDAL's resampling: AVERAGE, or MODE for values that are labels.

    Raises:
        DataError: shapes do not fit.
    """
    if len(bands) != len(image_CHW):
        raise DataError(f"{path}: {len(image_CHW)} bands were to be written, {len(bands)} names given ({bands})")
    if valid_HW is not None and nodata is not None:
        image_CHW = np.where(valid_HW, image_CHW, np.asarray(nodata, image_CHW.dtype))
    with _in_memory(path, image_CHW, grid, window, nodata=nodata) as dataset:
        dataset.descriptions = tuple(bands)
        if valid_HW is not None and nodata is None:
            dataset.write_mask(valid_HW)
        data = _encoded(dataset, {"overview_resampling": overviews, "predictor": "YES"})
    return write_file(path, data, bands_of(bands, image_CHW.dtype, nodata))


def _in_memory(
    path: StorePath, image_CHW: np.ndarray, grid: Grid, window: Window, *, nodata: float | None
) -> DatasetWriter:
    """A dataset in memory that holds the image; the COG driver only copies."""
    if image_CHW.shape[1:] != (window.height, window.width):
        raise DataError(f"{path}: pixels of shape {image_CHW.shape[1:]} do not fill {window}")
    # Without CRS, row 10 of an image lies at y = -10: there GDAL and QGIS show images without georeference.
    pixels = Affine(1, 0, window.col, 0, -1, -window.row)
    place = {"crs": crs_of(grid.crs), "transform": grid.transform(window)} if grid.crs else {"transform": pixels}
    count, height, width = image_CHW.shape
    # GDAL's COG driver cannot be written to: it copies a finished dataset.
    dataset = rasterio.open(
        "",
        "w",
        driver="MEM",
        count=count,
        height=height,
        width=width,
        dtype=image_CHW.dtype,
        nodata=nodata,
        **place,
    )
    dataset.write(image_CHW)
    return dataset


def scored_classes(
    classes_HW: np.ndarray,
    scores_CHW: np.ndarray,
    grid: Grid,
    window: Window,
    *,
    table: ClassTable,
    names: Sequence[str],
) -> bytes:
    """One file with the classes as band `class` and the scores after them, as `write_classes` and `write_scores`.

    The scale of the bands of scores gives probabilities. TIFF has no colours for one band of several.
    """
    layers_CHW = np.concatenate([classes_HW[None], scores_CHW])
    legend = json.dumps({str(value): name for value, name, _ in table.classes})
    with _in_memory("the answer", layers_CHW, grid, window, nodata=NODATA) as dataset:
        dataset.descriptions = ("class", *names)
        dataset.update_tags(1, classes=legend)
        dataset.scales = (1.0, *[1 / 254] * len(scores_CHW))
        return _encoded(dataset, {"overview_resampling": "MODE"})


def _encoded(dataset: DatasetWriter, options: dict[str, str]) -> bytes:
    with MemoryFile(ext=".tif") as target:
        rasterio.shutil.copy(dataset, target.name, **COG, **options)
        return bytes(target.getbuffer())


def _expect_bytes(path: StorePath, values: np.ndarray) -> None:
    if values.dtype != np.uint8:
        raise DataError(f"{path}: {values.dtype} values were to be written, expected uint8 with 255 for nodata")


@patient
def read_bands(path: StorePath) -> np.ndarray:
    """All bands of a small raster of our own, (bands, height, width).

    Raises:
        DataError: it cannot be read.
    """
    with gdal(str(path)), open_file(str(path)) as dataset:
        pixels: np.ndarray = dataset.read()
    return pixels
