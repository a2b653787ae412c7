"""Clustering without a network: ISODATA, and labels merged by the distance of their features."""

import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

Floats = NDArray[np.float64]


def isodata(
    samples_NC: NDArray[np.floating],
    *,
    clusters: int,
    iterations: int = 20,
    fewest: float = 0.005,
    spread: float = 0.1,
    nearest: float = 0.05,
    seed: int = 0,
) -> Floats:
    """Cluster centres by ISODATA (Ball & Hall 1965): k-means that splits, merges and drops clusters.

    Args:
        samples_NC: values of `samples` pixels, bands scaled to about 0..1.
        clusters: most clusters returned.
        iterations: rounds of assigning, dropping, splitting or merging.
        fewest: share of the samples below which a cluster is dropped.
        spread: standard deviation in a band above which a cluster may be split.
        nearest: distance of two centres below which they are merged.
        seed: for drawing the first centres.

    Returns:
        Centres (K, C), K <= `clusters`.
    """
    samples = np.asarray(samples_NC, np.float64)
    centres = samples[np.random.default_rng(seed).choice(len(samples), min(clusters, len(samples)), replace=False)]
    # splits and merges take turns; an even number of rounds ends with a merge
    for turn in range(iterations):
        centres, own_N = _assigned(samples, np.unique(centres, axis=0), round(fewest * len(samples)))
        if len(centres) < 2 * clusters and (len(centres) <= clusters / 2 or turn % 2 == 0):
            centres = _split(samples, centres, own_N, spread)[: 2 * clusters]
        elif len(centres) > clusters / 2:
            centres = _joined(centres, np.bincount(own_N, minlength=len(centres)), nearest, clusters)
    return _assigned(samples, centres, round(fewest * len(samples)))[0]


def _assigned(samples_NC: Floats, centres_KC: Floats, fewest: int) -> tuple[Floats, NDArray[np.intp]]:
    """(means of the samples nearest to each centre, without clusters of few samples; cluster of every sample)."""
    sizes = np.bincount(_nearest(samples_NC, centres_KC), minlength=len(centres_KC))
    # The largest cluster always remains, so that the result has at least one centre.
    kept_KC = centres_KC[(sizes > fewest) | (sizes == sizes.max())]
    own_N = _nearest(samples_NC, kept_KC)
    sizes = np.maximum(np.bincount(own_N, minlength=len(kept_KC)), 1)
    sums = [np.bincount(own_N, weights=band_N, minlength=len(kept_KC)) for band_N in samples_NC.T]
    return np.stack(sums, axis=1) / sizes[:, None], own_N


def _nearest(samples_NC: Floats, centres_KC: Floats) -> NDArray[np.intp]:
    # |s - c|^2 without |s|^2, which is the same for every centre
    distances_NK = (centres_KC**2).sum(axis=1) - 2 * samples_NC @ centres_KC.T
    return np.asarray(distances_NK.argmin(axis=1), np.intp)


def _split(samples_NC: Floats, centres_KC: Floats, own_N: NDArray[np.intp], spread: float) -> Floats:
    """Split clusters that are wide in a band, half a standard deviation to each side of the centre in it."""
    result = []
    for number, centre_C in enumerate(centres_KC):
        members = samples_NC[own_N == number]
        deviation_C = members.std(axis=0) if len(members) else np.zeros_like(centre_C)
        band = deviation_C.argmax()
        step_C = np.zeros_like(centre_C)
        step_C[band] = deviation_C[band] / 2
        result += [centre_C - step_C, centre_C + step_C] if deviation_C[band] > spread else [centre_C]
    return np.stack(result)


def _joined(centres_KC: Floats, sizes_K: NDArray[np.intp], nearest: float, clusters: int) -> Floats:
    """Merge the nearest centres while they are closer than `nearest`, or more than `clusters`."""
    centres: Floats = centres_KC.copy()
    sizes: Floats = sizes_K.astype(np.float64)
    while len(centres) > 1:
        # All distances again after each merge: the merged centre has moved.
        distances = cdist(centres, centres)
        np.fill_diagonal(distances, np.inf)
        a, b = np.unravel_index(distances.argmin(), distances.shape)
        if distances[a, b] > nearest and len(centres) <= clusters:
            break
        weight = max(float(sizes[a] + sizes[b]), 1.0)
        centres[a] = (centres[a] * sizes[a] + centres[b] * sizes[b]) / weight
        sizes[a] = weight
        centres, sizes = np.delete(centres, b, axis=0), np.delete(sizes, b)
    return centres


def grouped(features_KD: NDArray[np.floating], sizes_K: NDArray[np.integer], *, most: int | None) -> NDArray[np.intp]:
    """Merge labels into groups by the distance of their mean features, the largest group first.

    Each step merges the pair of groups that adds least to the squared distance of pixels from their group's mean (Ward
    1963), so small labels join large labels of similar features.

    Args:
        features_KD: mean feature of the pixels of each label.
        sizes_K: pixels of each label.
        most: most groups; None merges nothing.

    Returns:
        Group of every label (K,), 0 for the largest; -1 of a label without a pixel.
    """
    members = [[int(label)] for label in np.flatnonzero(sizes_K)]
    means = np.asarray(features_KD, np.float64)[[group[0] for group in members]]
    sizes = np.asarray(sizes_K, np.float64)[[group[0] for group in members]]
    while len(members) > (most or len(members)):
        # Ward: merging a and b adds |a - b|^2 n_a n_b / (n_a + n_b) to the sum of squares.
        added = cdist(means, means, "sqeuclidean") * (sizes[:, None] * sizes / (sizes[:, None] + sizes))
        np.fill_diagonal(added, np.inf)
        a, b = sorted(int(at) for at in np.unravel_index(added.argmin(), added.shape))
        means[a] = (means[a] * sizes[a] + means[b] * sizes[b]) / (sizes[a] + sizes[b])
        sizes[a] += sizes[b]
        members[a] += members.pop(b)
        means, sizes = np.delete(means, b, axis=0), np.delete(sizes, b)
    groups = np.full(len(sizes_K), -1, np.intp)
    for rank, at in enumerate(np.argsort(-sizes, kind="stable")):
        groups[members[at]] = rank
    return groups
