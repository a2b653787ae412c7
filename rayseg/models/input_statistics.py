"""Statistics of the windows that a model has learnt from, to say which other imagery is unlike them."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.config import Config

MOST = 200
"""Windows whose statistics a bundle keeps, at most: further ones hardly change a distance."""
LEAST = 20
"""Windows below which no distance can be judged."""
_NEIGHBOUR = 5  # of the nearest windows, the one whose distance counts: a single odd window then admits nothing
_SHRUNK = 0.1  # weight of the diagonal in the covariance, which has few windows to be known from
Floats = NDArray[np.float64]


class InputStatistics(Config):
    """Mean, deviation and texture of each band in windows of the training imagery.

    The distance of another window is that to its fifth nearest neighbour among them, in units of their covariance
    (Mahalanobis). Nearest neighbours and not a single mean, because training imagery is of several kinds.
    """

    one_value = True

    size: int
    """Side of a window in px."""
    features: tuple[tuple[float, ...], ...]
    """Of each window: means, deviations and textures of its bands, of values as the imagery stores them."""
    limit: float
    """Distance that 1 % of the windows themselves exceed."""

    @classmethod
    def of(cls, images_CHW: Iterable[NDArray[Any]]) -> "InputStatistics | None":
        """Statistics of windows, all of one size; None for fewer than `LEAST`."""
        rows, size = [], 0
        for image_CHW in images_CHW:
            size = max(size, min(image_CHW.shape[1:]))
            rows.append(features(image_CHW, np.ones(image_CHW.shape[1:], bool)))
        if len(rows) < LEAST:
            return None
        # Four digits: the bundle is JSON, and the distances do not change.
        features_NF = tuple(tuple(float(f"{value:.4g}") for value in row) for row in rows)
        unjudged = cls(size=size, features=features_NF, limit=0.0)
        # Without itself the fifth neighbour of a window is the sixth nearest.
        distances_N = unjudged.distances(np.array(features_NF), nth=_NEIGHBOUR + 1)
        return unjudged.model_copy(update={"limit": float(np.quantile(distances_N, 0.99))})

    def distances(self, others_MF: Floats, *, nth: int = _NEIGHBOUR) -> Floats:
        """Distances of windows, given by their `features`, to the `nth` nearest of those that the model learnt from."""
        known_NF = np.array(self.features)
        covariance_FF = np.atleast_2d(np.cov(known_NF.T))
        covariance_FF = (1 - _SHRUNK) * covariance_FF + _SHRUNK * np.diag(np.diag(covariance_FF))
        # A band that never changes has no deviation: any other value of it is far away.
        floor = 1e-6 * max(float(np.diag(covariance_FF).max()), 1e-12)
        white_FF = np.linalg.cholesky(np.linalg.inv(covariance_FF + floor * np.eye(len(covariance_FF))))
        known_NF, others_MF = known_NF @ white_FF, others_MF @ white_FF
        squares_MN = ((others_MF[:, None] - known_NF[None]) ** 2).mean(axis=2)
        return np.asarray(np.sqrt(np.partition(squares_MN, nth - 1, axis=1)[:, nth - 1]), np.float64)


def features(image_CHW: NDArray[Any], valid_HW: NDArray[np.bool_]) -> Floats:
    """Means, deviations and textures (mean difference of neighbouring pixels) of the bands of a window, (3 x bands).

    Args:
        image_CHW: values as the imagery stores them.
        valid_HW: the pixels that count; at least one does.
    """
    values_CHW = image_CHW.astype(np.float64)
    textures = []
    for axis in (1, 2):
        both_HW = valid_HW.take(range(1, valid_HW.shape[axis - 1]), axis - 1)
        both_HW = both_HW & valid_HW.take(range(valid_HW.shape[axis - 1] - 1), axis - 1)
        steps_CN = np.abs(np.diff(values_CHW, axis=axis))[:, both_HW]
        textures.append(steps_CN.mean(axis=1) if steps_CN.size else np.zeros(len(values_CHW)))
    values_CN = values_CHW[:, valid_HW]
    return np.concatenate([values_CN.mean(axis=1), values_CN.std(axis=1), textures[0] + textures[1]])
