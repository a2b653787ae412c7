"""Clusters of feature vectors without a network: ISODATA, and labels merged by the distance of their features."""

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
    """Centres of ISODATA (Ball & Hall 1965): k-means whose clusters are split, merged and dropped as it goes.

    Args:
        samples_NC: values of `samples` pixels, bands scaled to about 0..1.
        clusters: so many are left at most.
        iterations: most rounds of assigning, dropping, splitting or merging.
        fewest: share of the samples below which a cluster is dropped.
        spread: standard deviation in a band above which a cluster may be split.
        nearest: distance of two centres below which they are merged.
        seed: of the first centres.

    Returns:
        Centres (clusters found, C).
    """
    samples = np.asarray(samples_NC, np.float64)
    centres = samples[np.random.default_rng(seed).choice(len(samples), min(clusters, len(samples)), replace=False)]
    for turn in range(iterations):  # splits and merges take turns; an even number of rounds ends with a merge
        centres, own_N = _assigned(samples, np.unique(centres, axis=0), round(fewest * len(samples)))
        if len(centres) < 2 * clusters and (len(centres) <= clusters / 2 or turn % 2 == 0):
            centres = _split(samples, centres, own_N, spread)[: 2 * clusters]
        elif len(centres) > clusters / 2:
            centres = _joined(centres, np.bincount(own_N, minlength=len(centres)), nearest, clusters)
    return _assigned(samples, centres, round(fewest * len(samples)))[0]


def _assigned(samples_NC: Floats, centres_KC: Floats, fewest: int) -> tuple[Floats, NDArray[np.intp]]:
    """(means of the samples nearest to each centre, without clusters of too few; cluster of every sample)."""
    sizes = np.bincount(_nearest(samples_NC, centres_KC), minlength=len(centres_KC))
    kept_KC = centres_KC[(sizes > fewest) | (sizes == sizes.max())]
    own_N = _nearest(samples_NC, kept_KC)
    sizes = np.maximum(np.bincount(own_N, minlength=len(kept_KC)), 1)
    sums = [np.bincount(own_N, weights=band_N, minlength=len(kept_KC)) for band_N in samples_NC.T]
    return np.stack(sums, axis=1) / sizes[:, None], own_N


def _nearest(samples_NC: Floats, centres_KC: Floats) -> NDArray[np.intp]:
    found: NDArray[np.intp] = ((centres_KC**2).sum(axis=1) - 2 * samples_NC @ centres_KC.T).argmin(axis=1)
    return found


def _split(samples_NC: Floats, centres_KC: Floats, own_N: NDArray[np.intp], spread: float) -> Floats:
    """Clusters that are wide in a band become two, half a standard deviation to each side of the centre in it."""
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
    """The nearest centres merged while they are too near, or while there are more than wanted."""
    centres: Floats = centres_KC.copy()
    sizes: Floats = sizes_K.astype(np.float64)
    while len(centres) > 1:
        distances = cdist(centres, centres)
        np.fill_diagonal(distances, np.inf)
        one, other = np.unravel_index(distances.argmin(), distances.shape)
        if distances[one, other] > nearest and len(centres) <= clusters:
            break
        weight = max(float(sizes[one] + sizes[other]), 1.0)
        centres[one] = (centres[one] * sizes[one] + centres[other] * sizes[other]) / weight
        sizes[one] = weight
        centres, sizes = np.delete(centres, other, axis=0), np.delete(sizes, other)
    return centres


def grouped(features_KD: NDArray[np.floating], sizes_K: NDArray[np.integer], *, most: int | None) -> NDArray[np.intp]:
    """Labels put into groups by the distance of their mean features, the largest group first.

    Groups are merged one pair at a time, those first whose union adds least to the squared distance of pixels from
    their group's mean (Ward 1963), so small labels join large ones that look alike.

    Args:
        features_KD: mean feature of the pixels of each label.
        sizes_K: pixels of each label.
        most: groups that are left at most; None merges nothing.

    Returns:
        Group of every label (K,), 0 for the largest; -1 of a label without a pixel.
    """
    members = [[int(label)] for label in np.flatnonzero(sizes_K)]
    means = np.asarray(features_KD, np.float64)[[group[0] for group in members]]
    sizes = np.asarray(sizes_K, np.float64)[[group[0] for group in members]]
    while len(members) > (most or len(members)):
        added = cdist(means, means, "sqeuclidean") * (sizes[:, None] * sizes / (sizes[:, None] + sizes))
        np.fill_diagonal(added, np.inf)
        one, other = sorted(int(at) for at in np.unravel_index(added.argmin(), added.shape))
        means[one] = (means[one] * sizes[one] + means[other] * sizes[other]) / (sizes[one] + sizes[other])
        sizes[one] += sizes[other]
        members[one] += members.pop(other)
        means, sizes = np.delete(means, other, axis=0), np.delete(sizes, other)
    groups = np.full(len(sizes_K), -1, np.intp)
    for rank, at in enumerate(np.argsort(-sizes, kind="stable")):
        groups[members[at]] = rank
    return groups
