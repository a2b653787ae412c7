"""Sieve a class map: units smaller than a minimum area give way to the units around them.

A unit is a 4-connected component of one class. The result at a pixel depends on a bounded neighbourhood (`margin`), so
that a map sieved tile by tile with this margin equals the map sieved whole.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

NODATA = 255
LENGTH = 256
"""px; a unit that is smaller than the minimum but longer than this, and than 4 sides of the minimum, is kept."""
_STEPS = np.array([(-1, 0), (0, -1), (0, 1), (1, 0)])


def margin(least: float) -> int:
    """The px around a window that decide about the pixels in it.

    Args:
        least: pixels of the smallest unit that is kept.
    """
    return int(_length(np.array(least))) + int(_rounds(np.array(least))) + 2


def _length(least: NDArray[np.float64]) -> NDArray[np.float64]:
    """Side of the bounding box, in px, above which a unit is kept: a road or a hedge."""
    return np.asarray(np.ceil(np.maximum(np.minimum(least, LENGTH), 4 * np.sqrt(least))))


def _rounds(least: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many px deep a group of small units is filled from its outside."""
    return np.asarray(np.maximum(16, 2 * np.ceil(np.sqrt(least))))


def sieved(
    classes_HW: NDArray[np.uint8],
    least: Callable[[NDArray[np.int64], NDArray[np.int64]], NDArray[np.float64]],
    keep_HW: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """The map without units that are too small.

    Units are filled from their outside, pixel by pixel: a pixel takes the most frequent class of its settled
    4-neighbours. So a filled pixel always belongs to a unit that is large enough. Pixels of a small unit that no larger
    one reaches (an island in nodata, or deep in a field of noise) keep their class.

    Args:
        classes_HW: uint8, 255 = nodata. Within `margin` of its border the result is not final.
        least: (rows, columns) of the units' first pixels in reading order -> pixels of the smallest unit kept there.
        keep_HW: units that touch these pixels are kept.
    """
    labels_HW, count = label(classes_HW, background=NODATA, connectivity=1, return_num=True)
    if not count:
        return classes_HW
    labels, width = labels_HW.ravel(), labels_HW.shape[1]
    # 1. units of too few pixels, by their first pixel: of equal indices the last write stays
    first_N = np.zeros(count + 1, np.int64)
    first_N[labels[::-1]] = np.arange(labels.size)[::-1]
    least_N = least(*np.divmod(first_N, width))
    small_N = np.bincount(labels, minlength=count + 1) < least_N
    small_N[0] = False
    # 2. of these, long ones are kept, and those at the border, which may be larger than what is seen of them
    pixels = np.flatnonzero(small_N[labels])
    for along in np.divmod(pixels, width):
        low_N, high_N = np.full(count + 1, labels.size), np.zeros(count + 1, np.int64)
        np.minimum.at(low_N, labels[pixels], along)
        np.maximum.at(high_N, labels[pixels], along)
        small_N &= high_N - low_N < _length(least_N)
    for edge in (labels_HW[0], labels_HW[-1], labels_HW[:, 0], labels_HW[:, -1]):
        small_N[edge] = False
    if keep_HW is not None:
        small_N[labels_HW[keep_HW]] = False
    # 3. fill them
    rounds_N = np.where(small_N, _rounds(least_N), 0)
    return filled(classes_HW, rounds_N.astype(np.int32)[labels_HW])


def filled(classes_HW: NDArray[np.uint8], rounds_HW: NDArray[np.int32]) -> NDArray[np.uint8]:
    """The map with some pixels filled from their neighbours; of equally frequent classes the lowest counts.

    Args:
        classes_HW: uint8, 255 = nodata.
        rounds_HW: round up to which a pixel may be filled; 0 for pixels that stay. A pixel that no round reaches stays.
    """
    # One pixel of nodata around, so that neighbours need no test of the border.
    wide = classes_HW.shape[1] + 2
    state = np.pad(np.where(rounds_HW > 0, NODATA, classes_HW), 1, constant_values=NODATA).ravel()
    rounds = np.pad(rounds_HW, 1).ravel()
    beside = _STEPS @ np.array([wide, 1])
    waiting = np.flatnonzero(rounds)
    for number in range(1, int(rounds_HW.max(initial=0)) + 1):
        waiting = waiting[rounds[waiting] >= number]
        near_N4 = state[waiting[:, None] + beside]
        # A round looks at the state after the last one, not at pixels filled in this one: order makes no
        # difference.
        reached = (near_N4 != NODATA).any(axis=1)
        if not reached.any():
            break
        near_N4 = near_N4[reached]
        # Frequency first, then the lowest class: both in one number.
        votes_N4 = (near_N4[:, :, None] == near_N4[:, None]).sum(axis=2) * 256 + (255 - near_N4.astype(np.int64))
        votes_N4[near_N4 == NODATA] = -1
        state[waiting[reached]] = np.take_along_axis(near_N4, votes_N4.argmax(axis=1)[:, None], axis=1)[:, 0]
        waiting = waiting[~reached]
    result: NDArray[np.uint8] = state.reshape(-1, wide)[1:-1, 1:-1]
    return np.where((rounds_HW > 0) & (result == NODATA), classes_HW, result)
