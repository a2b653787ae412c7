"""The colours that positive chips share and negative chips lack, by diverse density over their objects.

    chips --> objects --> chroma of each --> share of the chip's area at every chroma  (one density per chip)
    densities of positives and negatives --> evidence per chroma --> the concept: where it is positive, around its peak

Maron & Lozano-Perez 1998, "A framework for multiple-instance learning", NIPS 10: a concept is a point in feature space
near instances of every positive bag and far from all instances of negative bags. The features here are the two chroma
axes of CIE Lab, a plane small enough to tabulate. The label of a negative chip holds for each of its pixels, so one
negative chip with much of a chroma outweighs all positive ones.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.color import rgb2lab

REACH = 40
"""The plane is a, b in -REACH..REACH, in bins of one unit; stronger colours are clipped to its edge."""
NEVER = -9.0
"""Evidence of a chroma that no positive chip has."""
_FLOOR = 1e-5  # added to shares, so that their logarithm is finite
_TRACE = 1e-6  # mean share below which a chroma counts as absent

Plane = NDArray[np.float32]


def chroma(
    image_HWC: NDArray[np.uint8], labels_HW: NDArray[np.integer]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Mean chroma and area of every object.

    Args:
        image_HWC: RGB, uint8.
        labels_HW: object of every pixel, 0..n-1.

    Returns:
        (ab_N2 float32, the mean of a and b of CIE Lab, D65; areas_N, pixels).
    """
    labels = labels_HW.ravel()
    areas_N = np.bincount(labels)
    lab = rgb2lab(image_HWC).reshape(-1, 3)
    sums = [np.bincount(labels, weights=lab[:, axis]) for axis in (1, 2)]
    means = np.stack(sums, axis=1) / np.maximum(areas_N, 1)[:, None]
    return means.astype(np.float32), areas_N


def density(ab_N2: NDArray[np.floating], weights_N: NDArray[np.number], *, sigma: float = 1.5) -> Plane:
    """Share of a chip at every chroma, (2 REACH, 2 REACH) float32, smoothed by a Gaussian of `sigma` units.

    Args:
        ab_N2: chroma of the chip's objects.
        weights_N: weight of each object: its area, or its area times its mean class activation.
        sigma: standard deviation of the Gaussian, in units of chroma.
    """
    plane = np.zeros((2 * REACH, 2 * REACH), np.float64)
    np.add.at(plane, _bins(ab_N2), weights_N)
    shares = plane / max(float(np.sum(weights_N)), _TRACE)
    return np.asarray(ndimage.gaussian_filter(shares, sigma), np.float32)


def evidence(positives: Iterable[Plane], negatives: Iterable[Plane]) -> Plane:
    """Log of the geometric mean over positive chips minus log of the maximum over negative chips, per chroma.

    Takes one pass over both; needs at least one positive chip.
    """
    logs, shares, count = np.zeros((2 * REACH, 2 * REACH)), np.zeros((2 * REACH, 2 * REACH)), 0
    for plane in positives:
        logs += np.log(plane + _FLOOR)
        shares += plane
        count += 1
    highest = np.zeros((2 * REACH, 2 * REACH))
    for plane in negatives:
        # The maximum, not the mean: one negative chip suffices to exclude a chroma.
        highest = np.maximum(highest, plane)
    ratios = logs / count - np.log(highest + _FLOOR)
    return np.where(shares / count < _TRACE, NEVER, ratios).astype(np.float32)


def region(evidence_AB: Plane) -> NDArray[np.bool_]:
    """The concept: chromas of positive evidence connected with the peak; empty without positive evidence."""
    pieces, _ = ndimage.label(evidence_AB > 0)
    peak = np.unravel_index(np.argmax(evidence_AB), evidence_AB.shape)
    return np.asarray((pieces == pieces[peak]) & (evidence_AB > 0))


def concept_mask(
    labels_HW: NDArray[np.integer], ab_N2: NDArray[np.floating], evidence_AB: Plane, *, doubtful: float = -1.0
) -> NDArray[np.uint8]:
    """Mark the objects whose chroma belongs to the concept.

    Args:
        labels_HW: object of every pixel, 0..n-1.
        ab_N2: chroma of the objects.
        evidence_AB: from `evidence`.
        doubtful: objects outside the concept with evidence above this are doubtful.

    Returns:
        (H, W) uint8: 1 concept, 255 doubtful, 0 all others.
    """
    bins = _bins(ab_N2)
    of_object = np.where(evidence_AB[bins] > doubtful, np.uint8(255), np.uint8(0))
    # After the doubtful ones: all chromas of the concept have positive evidence too.
    of_object[region(evidence_AB)[bins]] = 1
    mask_HW: NDArray[np.uint8] = of_object[labels_HW]
    return mask_HW


def _bins(ab_N2: NDArray[np.floating]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    inside = np.floor(np.clip(ab_N2, -REACH, REACH - 1) + REACH).astype(np.intp)
    return inside[:, 0], inside[:, 1]
