"""Coarse masks from class activation maps (CAMs): whole objects instead of single pixels.

    cam, objects --> mean CAM of every object --> Otsu --> mask

Cao & Huang 2022, ISPRS J. Photogramm. Remote Sens. 188, section 3.2. The published loop over objects stops at the
number of connected components although it runs over label values, so labels beyond that number stay 0; here every
label gets its mean.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage import filters, measure

from rayseg.errors import ConfigError, DataError

Objects = Literal["labels", "components"]


def object_means(cam_HW: NDArray[np.float32], labels_HW: NDArray[np.integer]) -> NDArray[np.float32]:
    """Give every pixel the mean CAM of its label.

    Args:
        cam_HW: activation of every pixel, float32, usually 0..1.
        labels_HW: label of every pixel, 0 or more; gaps are allowed.

    Returns:
        Mean CAM of the label of every pixel, (H, W) float32; sums are taken in float64.

    Raises:
        DataError: the two shapes differ, or a label is negative.
    """
    if cam_HW.shape != labels_HW.shape:
        raise DataError(f"the CAM is {cam_HW.shape} but the objects are {labels_HW.shape}; cut both from the same chip")
    labels = labels_HW.ravel().astype(np.intp)
    if labels.size and labels.min() < 0:
        raise DataError(f"object labels start at {labels.min()}, expected 0 or more; renumber them from 0")
    # bincount sums its weights in float64.
    sums, counts = np.bincount(labels, weights=cam_HW.ravel()), np.bincount(labels)
    means = sums / np.maximum(counts, 1)
    return means[labels].reshape(cam_HW.shape).astype(np.float32)


def components(labels_HW: NDArray[np.integer], *, connectivity: Literal[1, 2] = 1) -> NDArray[np.int32]:
    """Give every connected component of equal label a label of its own.

    Args:
        labels_HW: label of every pixel.
        connectivity: 1 joins the 4 neighbours, 2 the 8 neighbours.

    Returns:
        Component of every pixel, (H, W) int32, 0..n-1; label 0 is split like every other.
    """
    # label() leaves its background out, so all labels are moved above 0 first
    above_HW = labels_HW.astype(np.int64) - int(labels_HW.min(initial=0)) + 1
    components_HW = measure.label(above_HW, background=0, connectivity=connectivity)
    return np.asarray(components_HW, dtype=np.int32) - np.int32(1)


def otsu(values_HW: NDArray[np.floating]) -> float:
    """Otsu's threshold (Otsu 1979) over 256 bins between the smallest and the largest value.

    Returns:
        The threshold, in the values' unit; of a constant field its own value, so nothing lies strictly above it.

    Raises:
        DataError: the field is empty or holds NaN or infinity.
    """
    finite = np.count_nonzero(np.isfinite(values_HW))
    if not finite or finite < values_HW.size:
        raise DataError(
            f"{finite} of {values_HW.size} values are finite, Otsu's threshold needs at least one and no NaN or "
            "infinity: mask these out first"
        )
    # A constant field has no two groups of values to separate.
    if values_HW.min() == values_HW.max():
        return float(values_HW.flat[0])
    return float(filters.threshold_otsu(values_HW))


def coarse_mask(
    cam_HW: NDArray[np.float32], labels_HW: NDArray[np.integer], *, objects: Objects = "labels"
) -> NDArray[np.uint8]:
    """Mark the objects whose mean CAM lies above Otsu's threshold of the means.

    Args:
        cam_HW: activation of every pixel, float32.
        labels_HW: label of every pixel, 0 or more.
        objects: the objects: `labels` = all pixels of a label, `components` = one connected component of a label.

    Returns:
        Mask (H, W) uint8: 1 where the mean is strictly above the threshold; all 0 when every mean is the same.

    Raises:
        ConfigError: `objects` is neither of the two.
        DataError: shapes differ, a label is negative, or the CAM holds NaN or infinity.
    """
    if objects not in {"labels", "components"}:
        raise ConfigError(f"objects is {objects!r}, expected 'labels' or 'components'; choose one of the two")
    objects_HW = labels_HW if objects == "labels" else components(labels_HW)
    means_HW = object_means(cam_HW, objects_HW)
    return (means_HW > otsu(means_HW)).astype(np.uint8)
