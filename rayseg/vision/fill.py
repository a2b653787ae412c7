"""Fill pixels without data, so that a network sees texture, not a flat colour, beyond the edge of the imagery."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rayseg.errors import DataError


def mirrored(image_CHW: NDArray[Any], valid_HW: NDArray[np.bool_]) -> NDArray[Any]:
    """Fill invalid pixels with the mirror image of valid ones.

    A pixel takes the value at the same distance on the other side of its nearest valid pixel. Where that is outside the
    array or invalid, it takes the value of the nearest valid pixel.

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
