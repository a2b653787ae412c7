"""Superpixels: small patches of similar pixels, the units in which unsupervised labels are voted."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage import segmentation

from rayseg.errors import DataError


def felzenszwalb(
    image_HWC: NDArray[Any], *, scale: float = 32, sigma: float = 0.5, min_size: int = 64
) -> NDArray[np.int32]:
    """Felzenszwalb's graph-based superpixels (Felzenszwalb & Huttenlocher 2004, IJCV 59).

    Args:
        image_HWC: image, any number of channels; integers are scaled by their type's range, floats are 0..1.
        scale: larger means larger superpixels.
        sigma: width in pixels of the Gaussian that smooths the image first.
        min_size: smallest superpixel in pixels.

    Returns:
        Labels (H, W) int32, 0..n-1 without gaps.

    Raises:
        DataError: the image is not (H, W, C) or is empty.
    """
    _check_image(image_HWC)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Got image with third dimension", RuntimeWarning
        )  # the third dimension holds bands
        labels_HW = segmentation.felzenszwalb(image_HWC, scale=scale, sigma=sigma, min_size=min_size, channel_axis=-1)
    return np.asarray(labels_HW, dtype=np.int32)


def slic(
    image_HWC: NDArray[Any], *, segments: int = 1000, compactness: float = 10.0, sigma: float = 0.5
) -> NDArray[np.int32]:
    """SLIC superpixels (Achanta et al. 2012, TPAMI 34): compact and of nearly equal size.

    Args:
        image_HWC: image, uint8 or floats 0..1; three channels are taken as RGB and compared in CIELAB, other numbers of
            channels by their values.
        segments: approximate number of superpixels.
        compactness: weight of distance in space against distance in colour.
        sigma: width in pixels of the Gaussian that smooths the image first.

    Returns:
        Labels (H, W) int32, 0..n-1 without gaps.

    Raises:
        DataError: the image is not (H, W, C) or is empty.
    """
    _check_image(image_HWC)
    labels_HW = segmentation.slic(
        image_HWC,
        n_segments=segments,
        compactness=compactness,
        sigma=sigma,
        start_label=0,
        convert2lab=image_HWC.shape[2] == 3,
        channel_axis=-1,
    )
    # relabel_sequential keeps 0, so labels move above 0 and back.
    gapless_HW, _, _ = segmentation.relabel_sequential(labels_HW + 1)
    return np.asarray(gapless_HW, dtype=np.int32) - np.int32(1)


def watershed(image_HWC: NDArray[Any], *, spacing: int = 14, compactness: float = 0.0) -> NDArray[np.int32]:
    """Superpixels by a watershed of the gradient from a regular grid of seeds (after Neubert & Protzel 2014, ICPR).

    Args:
        image_HWC: image, uint8 or floats 0..1, any number of channels; the largest gradient of all channels counts.
        spacing: distance of the seeds in pixels.
        compactness: weight of the distance to the seed; 0 follows edges alone.

    Returns:
        Labels (H, W) int32, 0..n-1 without gaps.

    Raises:
        DataError: the image is not (H, W, C) or is empty.
    """
    _check_image(image_HWC)
    scale = np.float32(1 / 255 if image_HWC.dtype == np.uint8 else 1)
    steepest_HW = np.zeros(image_HWC.shape[:2], np.float32)
    for channel in range(image_HWC.shape[2]):
        smooth_HW = ndimage.gaussian_filter(image_HWC[..., channel].astype(np.float32) * scale, 1.0)
        down_HW, across_HW = ndimage.sobel(smooth_HW, axis=0), ndimage.sobel(smooth_HW, axis=1)
        # Maximum over the channels: an edge in one band is enough.
        np.maximum(steepest_HW, np.hypot(down_HW, across_HW), out=steepest_HW)
    height, width = image_HWC.shape[:2]
    seeds_HW = np.zeros((height, width), np.int32)
    # Seeds start half a spacing from the edge; an image smaller than that gets a seed at its last pixel.
    rows, cols = (np.arange(min(spacing // 2, side - 1), side, spacing) for side in (height, width))
    seeds_HW[np.ix_(rows, cols)] = np.arange(1, len(rows) * len(cols) + 1).reshape(len(rows), len(cols))
    labels_HW = segmentation.watershed(steepest_HW, seeds_HW, compactness=compactness)
    return np.asarray(labels_HW, dtype=np.int32) - np.int32(1)


def _check_image(image_HWC: NDArray[Any]) -> None:
    if image_HWC.ndim != 3 or image_HWC.size == 0:
        raise DataError(
            f"the image has the shape {image_HWC.shape}, superpixels expect a non-empty (height, width, channels); "
            "add the channel axis or read a window that holds pixels"
        )


def halved(image_HWC: NDArray[Any], *, scale: float = 32, sigma: float = 0.5, min_size: int = 64) -> NDArray[np.int32]:
    """`felzenszwalb` on the means of 2 x 2 pixels: the same superpixels with coarser outlines.

    Args:
        image_HWC: as in `felzenszwalb`.
        scale: as in `felzenszwalb`.
        sigma: width of the Gaussian in pixels of half the resolution.
        min_size: smallest superpixel in pixels of the image.
    """
    _check_image(image_HWC)
    height, width = image_HWC.shape[:2]
    # An odd side repeats its last row or column, which the final crop removes.
    padded_HWC = np.pad(image_HWC, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge").astype(np.float32)
    if image_HWC.dtype.kind in "ui":
        padded_HWC /= np.float32(np.iinfo(image_HWC.dtype).max)
    means_HWC = (padded_HWC[::2] + padded_HWC[1::2]).reshape(-1, padded_HWC.shape[1] // 2, 2, image_HWC.shape[2])
    labels_hw = felzenszwalb(means_HWC.sum(axis=2) / 4, scale=scale, sigma=sigma, min_size=max(1, min_size // 4))
    return labels_hw.repeat(2, axis=0).repeat(2, axis=1)[:height, :width]


def outlined(image_HWC: NDArray[np.uint8], segments_HW: NDArray[np.integer]) -> NDArray[np.uint8]:
    """The image (height, width, 3) uint8 with the borders of its superpixels in yellow."""
    at_border_HW = segmentation.find_boundaries(segments_HW, mode="inner")
    return np.where(at_border_HW[..., None], np.array([255, 255, 0], np.uint8), image_HWC)


def _evenly(image_HWC: NDArray[Any], *, spacing: int = 14) -> NDArray[np.int32]:
    """SLIC with superpixels about `spacing` px apart in an image of any size."""
    height, width = image_HWC.shape[:2]
    return slic(image_HWC, segments=max(1, height * width // spacing**2))


METHODS: Mapping[str, Callable[..., NDArray[np.int32]]] = {
    "felzenszwalb": felzenszwalb,
    "halved": halved,
    "slic": _evenly,
    "watershed": watershed,
}
