"""Crops of images: the middle of a chip, and plots on a black square."""

import cv2
import numpy as np
from numpy.typing import NDArray

from rayseg.geo.grid import Window
from rayseg.vision.proposals import Image
from rayseg.vision.rle import Mask


def middle(window: Window, size: int) -> Window:
    """The central `size` x `size` px of a window; a smaller window is extended on all sides."""
    col, row = window.col + int((window.width - size) / 2), window.row + int((window.height - size) / 2)
    return Window(col, row, size, size)


def square_crop(image_HWC: Image, mask_HW: Mask, *, size: int) -> Image:
    """Cut out the pixels under a mask, centre them on a black square and resize it to (size, size, 3).

    Args:
        image_HWC: RGB uint8.
        mask_HW: bool, of the image's shape, with at least one pixel.
        size: side of the result in px.
    """
    rows, cols = np.flatnonzero(mask_HW.any(axis=1)), np.flatnonzero(mask_HW.any(axis=0))
    box = np.s_[rows[0] : rows[-1] + 1, cols[0] : cols[-1] + 1]
    cut_HWC = np.where(mask_HW[box][..., None], image_HWC[box], np.uint8(0))
    height, width = cut_HWC.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    square_HWC = np.zeros((side, side, 3), np.uint8)
    square_HWC[top : top + height, left : left + width] = cut_HWC
    # Area averaging avoids aliasing when the crop is reduced.
    way = cv2.INTER_AREA if side > size else cv2.INTER_LINEAR
    resized: NDArray[np.uint8] = np.asarray(cv2.resize(square_HWC, (size, size), interpolation=way), np.uint8)
    return resized
