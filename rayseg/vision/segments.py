"""Join segments of overlapping tiles into one partition: segments on which two tiles agree become one."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

AGREED = 0.5


def alike(one_HW: NDArray[np.integer], other_HW: NDArray[np.integer], *, least: float = AGREED) -> NDArray[np.int64]:
    """The pairs of segments in two label images of the same area whose IoU is above `least`, (pairs, 2) ascending.

    0 means no segment. With `least` >= 0.5, each segment has at most one partner.
    """
    both_HW = (one_HW > 0) & (other_HW > 0)
    pairs_N2, shared_N = counted(one_HW[both_HW], other_HW[both_HW])
    ones, others = np.bincount(one_HW.ravel()), np.bincount(other_HW.ravel())
    # The union of two segments counts all their pixels, also those over no data of the other.
    either_N = ones[pairs_N2[:, 0]] + others[pairs_N2[:, 1]] - shared_N
    return np.asarray(pairs_N2[shared_N > least * either_N], np.int64)


def agreeing(
    one_HW: NDArray[np.integer], other_HW: NDArray[np.integer], border: tuple[slice, slice]
) -> NDArray[np.int64]:
    """The pairs of segments that agree where two tiles overlap (IoU > 0.5) and that the tiles' border cuts.

    Each segment has at most one partner.

    Args:
        one_HW: segments of the first tile over the overlap, 1 or more; 0 means no data.
        other_HW: segments of the second tile over the same pixels.
        border: rows and columns of the overlap's pixels on both sides of the border.

    Returns:
        (pairs, 2): segment of the first tile, segment of the second.
    """
    alike_N2 = alike(one_HW, other_HW)
    cut_N2, _ = counted(one_HW[border], other_HW[border])
    at_border = np.isin(alike_N2[:, 0], cut_N2[:, 0]) & np.isin(alike_N2[:, 1], cut_N2[:, 1])
    return np.asarray(alike_N2[at_border], np.int64)


def counted(one_HW: NDArray[np.integer], other_HW: NDArray[np.integer]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(distinct pairs of values at the same pixel (pairs, 2), number of pixels of each), of arrays of any shape."""
    # one integer per pair sorts faster than rows of two
    width = int(other_HW.max(initial=0)) + 1
    codes, counts = np.unique(one_HW.ravel().astype(np.int64) * width + other_HW.ravel(), return_counts=True)
    return np.stack(np.divmod(codes, width), axis=1), counts.astype(np.int64)


def united(counts: Sequence[int], pairs: Mapping[tuple[int, int], NDArray[np.int64]]) -> list[NDArray[np.uint32]]:
    """Number the segments of all tiles together, 1..n without gaps.

    Args:
        counts: segments of every tile; each tile numbers its own 1..count.
        pairs: (tile, tile) -> the segments (pairs, 2) of both that are one segment.

    Returns:
        For every tile the number of each of its segments, (count + 1,) uint32; 0 stays 0.
    """
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    links = [np.empty((0, 2), np.int64)]
    links += [pairs_N2 - 1 + starts[list(tiles)] for tiles, pairs_N2 in pairs.items()]
    names = groups(int(starts[-1]), np.concatenate(links))
    parts = np.split(names.astype(np.uint32) + np.uint32(1), starts[1:])[:-1]
    return [np.concatenate([np.zeros(1, np.uint32), part]) for part in parts]


def groups(count: int, pairs_N2: NDArray[np.integer]) -> NDArray[np.int64]:
    """Group number of each of `count` elements, in order; elements in a pair of `pairs_N2` share a group."""
    from scipy.sparse import coo_array  # slow to import, not needed to cut tiles
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(pairs_N2), bool), pairs_N2.T), shape=(count, count))
    return np.asarray(connected_components(graph, directed=False)[1], np.int64)
