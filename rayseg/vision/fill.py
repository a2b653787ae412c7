"""Fill pixels without data, so that a network sees texture, not a flat colour, beyond the edge of the imagery."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rayseg.errors import DataError

_NEIGHBOURS = 5  # of 8; next to a straight edge a pixel has 3, in its corner 5


def mirrored(image_CHW: NDArray[Any], valid_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """Fill invalid pixels with the mirror image of valid ones.

    A pixel takes the value at the same distance on the other side of its nearest valid pixel. Where that is outside the
    array or invalid, it takes the value of the nearest valid pixel. A pixel with at least five valid neighbours takes
    their mean: a single bad pixel has no side to be mirrored at.

    Args:
        image_CHW: any data type.
        valid_HW: True where there is data, at least once.

    Returns:
        The image with every pixel filled; valid pixels keep their values.
    """
    if valid_HW.all():
        return image_CHW
    nearest = ndimage.distance_transform_edt(~valid_HW, return_distances=False, return_indices=True)
    here = np.array(np.nonzero(~valid_HW))
    nearest = nearest[:, *here]
    # Reflection of the pixel about its nearest valid pixel.
    beyond = 2 * nearest - here
    inside = ((beyond >= 0) & (beyond < np.array(valid_HW.shape)[:, None])).all(axis=0)
    taken = np.where(inside, beyond, nearest)
    taken = np.where(valid_HW[*taken], taken, nearest)
    image_CHW = image_CHW.copy()
    image_CHW[:, *here] = image_CHW[:, *taken]
    # Sums over 3 x 3 windows; the middle of such a window is invalid, so it counts only neighbours.
    counts_HW = ndimage.convolve(valid_HW.astype(np.uint8), np.ones((3, 3), np.uint8), mode="constant")
    holes_HW = ~valid_HW & (counts_HW >= _NEIGHBOURS)
    if holes_HW.any():
        sums_CHW = ndimage.uniform_filter(
            np.where(valid_HW, image_CHW, 0).astype(np.float64), (0, 3, 3), mode="constant"
        )
        means_CN = 9 * sums_CHW[:, holes_HW] / counts_HW[holes_HW]
        image_CHW[:, holes_HW] = means_CN if image_CHW.dtype.kind == "f" else np.rint(means_CN)
    return image_CHW


def filled(image_HWC: NDArray[Any], valid_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """`mirrored` for images with the bands last.

    Raises:
        DataError: no pixel is valid.
    """
    if not valid_HW.any():
        raise DataError(
            f"an image of {valid_HW.shape} px has no valid pixel, expected at least one to fill the others from; "
            "leave it out"
        )
    return np.ascontiguousarray(mirrored(image_HWC.transpose(2, 0, 1), valid_HW).transpose(1, 2, 0))
