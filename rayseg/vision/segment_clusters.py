"""Clusters of superpixels by colour and texture: labels of a scene without a network.

Colour is CIELAB with more weight on its chroma, because hue separates kinds of cover where brightness separates sun
from shade; texture is the deviation of the brightness in a window. A segment counts by the square root of its area:
large fields do not take all clusters, and specks get none of their own.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage.color import rgb2lab
from sklearn.cluster import KMeans

from rayseg.vision.superpixels import felzenszwalb

CHROMA = 1.5
"""Weight of chroma against brightness."""
WINDOW = 31
"""Side in px of the window in which the texture is measured."""
MOST_FITTED = 100_000
"""Most segments that take part in the search for centres."""


def pixel_features(image_HWC: NDArray[np.floating], bands: Sequence[str]) -> NDArray[np.float32]:
    """Brightness, chroma and texture of every pixel, (H, W, F) float32, on the scale of CIELAB (L from 0 to 100).

    Args:
        image_HWC: values scaled to 0..1.
        bands: names of the C bands. Red, green and blue, or three bands of any names, give CIELAB (L, a, b), and each
            further band its difference to L; other images have the bands' mean as brightness and every band's
            difference to it as chroma.
    """
    image_HWC, bands = np.asarray(image_HWC, np.float32), list(bands)
    count = image_HWC.shape[2]
    named = {"red", "green", "blue"} <= set(bands)
    rgb = [bands.index(name) for name in ("red", "green", "blue")] if named else [0, 1, 2] if count == 3 else []
    if rgb:
        lab_HW3 = np.asarray(rgb2lab(image_HWC[..., rgb]), np.float32)
        brightness_HW, chroma = lab_HW3[..., 0], lab_HW3[..., 1:]
        others_HWC = np.delete(image_HWC, rgb, axis=2)
    else:
        brightness_HW, chroma = 100 * image_HWC.mean(axis=2), image_HWC[..., :0]
        others_HWC = image_HWC[..., : count if count > 1 else 0]
    # As many bands as there are weigh together as a and b do.
    others_HWC = (100 * others_HWC - brightness_HW[..., None]) * np.float32(np.sqrt(2 / max(others_HWC.shape[2], 2)))
    mean_HW = ndimage.uniform_filter(brightness_HW, WINDOW)
    variance_HW = ndimage.uniform_filter(brightness_HW**2, WINDOW) - mean_HW**2
    texture_HW = np.sqrt(np.maximum(variance_HW, 0))
    return np.dstack([brightness_HW, CHROMA * chroma, CHROMA * others_HWC, texture_HW]).astype(np.float32)


def segment_sums(features_HWF: NDArray[np.floating], segments_HW: NDArray[np.integer]) -> NDArray[np.float64]:
    """(pixels, sums of the features) of every segment, (n, 1 + F); segments are numbered 0..n-1."""
    flat = segments_HW.ravel()
    columns = [np.bincount(flat, feature_HW.ravel()) for feature_HW in np.moveaxis(features_HWF, 2, 0)]
    return np.stack([np.bincount(flat).astype(np.float64), *columns], axis=1)


def cluster_centres(
    features_NF: NDArray[np.floating], areas_N: NDArray[np.floating], *, clusters: int, seed: int
) -> NDArray[np.float64]:
    """Centres (K, F) of k-means over segments, K <= `clusters`; the cluster of the largest area is first.

    Args:
        features_NF: mean features of N segments.
        areas_N: their pixels.
        clusters: most centres; fewer if fewer segments differ.
        seed: of the draw of the segments and of the first centres.
    """
    drawn = np.random.default_rng(seed).permutation(len(features_NF))[:MOST_FITTED]
    features_NF, areas_N = features_NF[drawn], areas_N[drawn]
    clusters = min(clusters, len(np.unique(features_NF, axis=0)))
    fitted = KMeans(clusters, n_init=4, random_state=seed).fit(features_NF, sample_weight=np.sqrt(areas_N))
    areas_K = np.bincount(fitted.labels_, areas_N, minlength=clusters)
    return np.asarray(fitted.cluster_centers_[np.argsort(-areas_K, kind="stable")], np.float64)


def distances(features_NF: NDArray[np.floating], centres_KF: NDArray[np.floating]) -> NDArray[np.float64]:
    """Squared distance of every segment to every centre, (N, K)."""
    return np.asarray(cdist(features_NF, centres_KF, "sqeuclidean"), np.float64)


def simple_clusters(image_HWC: NDArray[np.uint8], *, clusters: int = 8, seed: int = 0) -> NDArray[np.int64]:
    """The baseline: k-means of the mean colour and the deviation of the brightness of felzenszwalb's segments.

    Args:
        image_HWC: RGB, uint8.
        clusters: most labels.
        seed: of the first centres.

    Returns:
        Labels (H, W), from 0.
    """
    segments_HW = felzenszwalb(image_HWC, scale=100)
    lab_HWC = rgb2lab(image_HWC)
    sums_N = segment_sums(np.dstack([lab_HWC, lab_HWC[..., 0] ** 2]), segments_HW)
    means_N4 = sums_N[:, 1:] / sums_N[:, :1]
    means_N4[:, 3] = np.sqrt(np.maximum(means_N4[:, 3] - means_N4[:, 0] ** 2, 0))
    fitted = KMeans(min(clusters, len(means_N4)), n_init=3, random_state=seed).fit(means_N4)
    return np.asarray(fitted.labels_[segments_HW], np.int64)
