"""Distance of imagery from the windows that a model learnt from."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from rayseg.models.input_statistics import LEAST, InputStatistics, features


def windows(count, *, seed=0, mean=100.0, size=16):
    rng = np.random.default_rng(seed)
    return [rng.normal(rng.normal(mean, 10, (3, 1, 1)), rng.uniform(5, 15), (3, size, size)) for _ in range(count)]


def test_features_are_means_deviations_and_steps_between_neighbours_of_valid_pixels():
    image_CHW = np.array([[[1.0, 3.0, 99.0], [1.0, 7.0, 99.0]]])
    valid_HW = np.array([[True, True, False], [True, True, False]])
    mean, deviation, texture = features(image_CHW, valid_HW)
    assert (mean, deviation) == (3.0, pytest.approx(np.std([1, 3, 1, 7])))
    assert texture == pytest.approx((0 + 4) / 2 + (2 + 6) / 2)  # down, then across


def test_the_distance_is_mahalanobis_to_the_fifth_nearest_window():
    known = InputStatistics.of(windows(40))
    others = np.array([features(image, np.ones((16, 16), bool)) for image in windows(6, seed=1, mean=120.0)])
    table = np.array(known.features)
    covariance = np.cov(table.T)
    covariance = 0.9 * covariance + 0.1 * np.diag(np.diag(covariance))
    inverse = np.linalg.inv(covariance + 1e-6 * np.diag(covariance).max() * np.eye(9))
    expected = np.sort(cdist(others, table, "mahalanobis", VI=inverse) / 3, axis=1)[:, 4]
    assert known.distances(others) == pytest.approx(expected)
    own = np.sort(cdist(table, table, "mahalanobis", VI=inverse) / 3, axis=1)[:, 5]  # without itself
    assert known.limit == pytest.approx(np.quantile(own, 0.99))


def test_like_imagery_is_near_and_unlike_imagery_is_far():
    known = InputStatistics.of(windows(60))
    full = np.ones((16, 16), bool)

    def far(images):
        return np.mean([known.distances(features(image, full)[None])[0] > known.limit for image in images])

    assert far(windows(40, seed=2)) <= 0.2
    assert far(windows(40, seed=2, mean=200.0)) == 1.0
    assert far([image[[1, 0, 2]] + [[[60]], [[0]], [[0]]] for image in windows(40, seed=2)]) == 1.0


def test_few_windows_give_no_statistics_and_a_constant_band_gives_finite_distances():
    assert InputStatistics.of(windows(LEAST - 1)) is None
    flat = [np.concatenate([image, np.zeros((1, 16, 16))]) for image in windows(LEAST)]
    known = InputStatistics.of(flat)
    assert np.isfinite(known.distances(np.array(known.features))).all()
