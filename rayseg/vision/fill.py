"""Pixels where there are none: so that a network sees ground, not a flat colour, beyond the edge of the imagery."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rayseg.errors import DataError


def mirrored(image_CHW: NDArray[Any], valid_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """Fill what is not valid with the mirror image of what is.

    A pixel takes the value on the other side of its nearest valid pixel, at the same distance; where that is outside
    the array or not valid either, the value of the nearest valid pixel itself.

    Args:
        image_CHW: any data type.
        valid_HW: where there is data; at least one pixel.

    Returns:
        The image with every pixel filled; valid pixels are as they were.
    """
    if valid_HW.all():
        return image_CHW
    here = np.indices(valid_HW.shape)
    nearest = ndimage.distance_transform_edt(~valid_HW, return_distances=False, return_indices=True)
    beyond = 2 * nearest - here
    size = np.array(valid_HW.shape)[:, None, None]
    inside = ((beyond >= 0) & (beyond < size)).all(axis=0)
    row, col = np.where(inside, beyond, nearest)
    use = valid_HW[row, col]
    row, col = np.where(use, row, nearest[0]), np.where(use, col, nearest[1])
    return image_CHW[:, row, col]


def filled(image_HWC: NDArray[Any], valid_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """`mirrored` for images with the bands last.

    Raises:
        DataError: no pixel is valid.
    """
    if not valid_HW.any():
        raise DataError(f"an image of {valid_HW.shape} px has no valid pixel to fill the others from; leave it out")
    return np.ascontiguousarray(mirrored(image_HWC.transpose(2, 0, 1), valid_HW).transpose(1, 2, 0))
