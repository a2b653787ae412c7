"""Instances of one image as one label image."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from rayseg.vision import rle
from rayseg.vision.rle import Mask, Runs

Labels = NDArray[np.int32]


def painted(found: Sequence[Runs], shape: tuple[int, int], *, where_HW: Mask, least: int) -> tuple[Labels, list[int]]:
    """Masks painted one over the other, the smaller ones last: each pixel belongs to one of them at most.

    Args:
        found: runs of each mask.
        shape: (height, width).
        where_HW: where there may be any.
        least: what is left of a mask must have so many pixels.

    Returns:
        (labels_HW, kept): 0 for none, k + 1 for the mask at position kept[k]; `kept` ascends.
    """
    labels = np.zeros(shape[0] * shape[1], np.int32)
    for position in np.argsort(-rle.areas(found), kind="stable"):
        starts, lengths = found[position][::2], found[position][1::2] - found[position][::2]
        inside = np.repeat(starts - (np.cumsum(lengths) - lengths), lengths)
        labels[inside + np.arange(len(inside))] = position + 1
    labels[~where_HW.ravel()] = 0
    counts = np.bincount(labels, minlength=len(found) + 1)
    kept = np.flatnonzero(counts[1:] >= least)
    number = np.zeros(len(found) + 1, np.int32)
    number[kept + 1] = np.arange(1, len(kept) + 1)
    return number[labels].reshape(shape), [int(k) for k in kept]
