"""Superpixels: small patches of alike pixels, the grain in which unsupervised labels are voted."""

import warnings

import numpy as np
from numpy.typing import NDArray
from skimage import segmentation

from rayseg.errors import DataError


def felzenszwalb(
    image_HWC: NDArray[np.uint8], *, scale: float = 32, sigma: float = 0.5, min_size: int = 64
) -> NDArray[np.int32]:
    """Felzenszwalb's graph-based superpixels (Felzenszwalb & Huttenlocher 2004, IJCV 59).

    Args:
        image_HWC: image, any number of channels.
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
        warnings.filterwarnings("ignore", "Got image with third dimension", RuntimeWarning)  # bands are meant
        labels_HW = segmentation.felzenszwalb(image_HWC, scale=scale, sigma=sigma, min_size=min_size, channel_axis=-1)
    return np.asarray(labels_HW, dtype=np.int32)


def slic(
    image_HWC: NDArray[np.uint8], *, segments: int = 1000, compactness: float = 10.0, sigma: float = 0.5
) -> NDArray[np.int32]:
    """SLIC superpixels (Achanta et al. 2012, TPAMI 34): compact and of nearly equal size.

    Args:
        image_HWC: image; three channels are taken as RGB and compared in CIELAB, any other number as they are.
        segments: superpixels aimed at.
        compactness: weight of nearness against likeness of colour.
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
    gapless_HW, _, _ = segmentation.relabel_sequential(labels_HW + 1)
    return np.asarray(gapless_HW, dtype=np.int32) - np.int32(1)


def _check_image(image_HWC: NDArray[np.uint8]) -> None:
    if image_HWC.ndim != 3 or image_HWC.size == 0:
        raise DataError(
            f"superpixels need a non-empty image of shape (height, width, channels), found {image_HWC.shape}: "
            "add the channel axis or read a window that holds pixels"
        )
