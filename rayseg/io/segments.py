"""Superpixels in files and the removal of small patches from a label map, by GDAL."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rasterio.features import sieve
from rasterio.windows import Window as FileWindow

from rayseg.geo.grid import Grid, Window
from rayseg.io import cog
from rayseg.io.remote import patient
from rayseg.io.sources import gdal, open_file
from rayseg.store import StorePath


def write_segments(path: StorePath, segments_HW: NDArray[np.uint32], grid: Grid, window: Window) -> None:
    """Write the number of every pixel's segment over `window` as a COG of uint32; 0 is nodata."""
    cog.write_image(path, segments_HW[None], grid, window, bands=("superpixel",), nodata=0, overviews="NEAREST")


def read_segments(files: Sequence[tuple[Window, StorePath]], window: Window) -> NDArray[np.uint32]:
    """Segments of `window` from files of one grid that do not overlap; 0 for no data.

    Args:
        files: (window of the file, its path).
        window: grid pixels.
    """
    segments_HW = np.zeros((window.height, window.width), np.uint32)
    for covers, path in files:
        part = covers.intersect(window)
        if part.empty:
            continue
        # Files lie on one grid, so windows are whole pixels and nothing is resampled.
        at = FileWindow(part.col - covers.col, part.row - covers.row, part.width, part.height)
        segments_HW[part.slices(window)] = _numbers(str(path), part, at)
    return segments_HW


@patient
def _numbers(path: str, part: Window, at: FileWindow) -> NDArray[np.uint32]:
    with gdal(path, part), open_file(path) as dataset:
        return np.asarray(dataset.read(1, window=at), np.uint32)


def without_specks(classes_HW: NDArray[np.uint8], valid_HW: NDArray[np.bool_], *, size: int) -> NDArray[np.uint8]:
    """Every 4-connected patch of fewer than `size` px takes the class of its largest neighbour (GDAL's sieve).

    Pixels that are not valid neither change nor give their class to others.
    """
    if size < 2 or not valid_HW.any():
        return classes_HW
    whole = bool(valid_HW.all())
    cleaned: NDArray[np.uint8] = sieve(classes_HW, size, mask=None if whole else valid_HW, connectivity=4)
    return cleaned
