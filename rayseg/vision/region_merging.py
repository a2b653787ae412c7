"""Merge neighbouring segments whose difference is small for the length of their border (Koepfler et al. 1994).

Merging a and b adds |m_a - m_b|^2 n_a n_b / (n_a + n_b) to the squared error of the regions' means m over their n
pixels, and saves the border between them (the functional of Mumford & Shah). A weak border of any length goes, a strong
one stays, however small its segment is: a road or a roof keeps its own region, and no chain of small steps joins two
fields, as the means of whole regions are compared.
"""

import numpy as np
from numpy.typing import NDArray

from rayseg.vision.segments import counted


def borders(segments_HW: NDArray[np.integer]) -> NDArray[np.int64]:
    """(segment, other segment, px of their common border) of all neighbours, (borders, 3); 0 is no segment."""
    ones = np.concatenate([segments_HW[:, 1:].ravel(), segments_HW[1:].ravel()])
    others = np.concatenate([segments_HW[:, :-1].ravel(), segments_HW[:-1].ravel()])
    differ = (ones != others) & (ones > 0) & (others > 0)
    return summed(np.column_stack(counted(ones[differ], others[differ])))


def summed(borders_M3: NDArray[np.integer]) -> NDArray[np.int64]:
    """The borders with one row for every pair of different segments, the smaller number first."""
    borders_M3 = borders_M3[borders_M3[:, 0] != borders_M3[:, 1]]
    pairs_M2 = np.sort(borders_M3[:, :2].astype(np.int64), axis=1)
    width = int(pairs_M2.max(initial=0)) + 1
    # One integer per pair sorts faster than rows of two.
    codes, inverse = np.unique(pairs_M2[:, 0] * width + pairs_M2[:, 1], return_inverse=True)
    lengths = np.bincount(inverse, borders_M3[:, 2], minlength=len(codes)).astype(np.int64)
    return np.stack([*np.divmod(codes, width), lengths], axis=1)


def merged_regions(
    means_NF: NDArray[np.floating], areas_N: NDArray[np.floating], borders_M3: NDArray[np.integer], *, contrast: float
) -> NDArray[np.int64]:
    """Region of every segment (N,), numbered from 0.

    In each round all pairs of regions merge that are each other's best partner, until no pair costs less.

    Args:
        means_NF: mean features of the segments.
        areas_N: their pixels.
        borders_M3: rows of `borders`, of segments numbered from 0.
        contrast: error that a pixel of border is worth, in squared units of the features; larger merges more.
    """
    regions_N = np.arange(len(areas_N))
    means, areas, edges = np.array(means_NF, np.float64), np.array(areas_N, np.float64), summed(borders_M3)
    while len(edges):
        # 1. the cheapest partner of every region
        a, b, length = edges.T
        cost = ((means[a] - means[b]) ** 2).sum(axis=1) * areas[a] * areas[b] / ((areas[a] + areas[b]) * length)
        cheapest = np.full(len(areas), np.inf)
        np.minimum.at(cheapest, a, cost)
        np.minimum.at(cheapest, b, cost)
        at = np.flatnonzero((cost < contrast) & (cost <= cheapest[a]) & (cost <= cheapest[b]))
        # Of equally cheap partners the first one is taken: a region merges once in a round.
        at = at[np.unique(a[at], return_index=True)[1]]
        at = at[np.unique(b[at], return_index=True)[1]]
        at = at[~np.isin(a[at], b[at])]
        if not len(at):
            break
        # 2. merge the second into the first, and number the regions without gaps
        kept, gone = a[at], b[at]
        weights = areas[kept] / (areas[kept] + areas[gone])
        means[kept] += (means[gone] - means[kept]) * (1 - weights)[:, None]
        areas[kept] += areas[gone]
        targets = np.arange(len(areas))
        targets[gone] = kept
        used, numbers = np.unique(targets, return_inverse=True)
        regions_N, means, areas = numbers[regions_N], means[used], areas[used]
        edges = summed(np.concatenate([numbers[edges[:, :2]], edges[:, 2:]], axis=1))
    return regions_N
