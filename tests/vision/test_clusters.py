import numpy as np
import pytest

from rayseg.vision.clusters import grouped, isodata


@pytest.fixture(scope="module")
def heaps():
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(centre, 0.02, (200, 2)) for centre in ((0.1, 0.1), (0.9, 0.1), (0.5, 0.9))])


def test_isodata_finds_the_heaps_whatever_it_was_told(heaps):
    for clusters in (3, 5, 9):
        centres = isodata(heaps, clusters=clusters, seed=1)
        assert len(centres) <= clusters
        nearest = np.linalg.norm(centres[:, None] - np.array([(0.1, 0.1), (0.9, 0.1), (0.5, 0.9)]), axis=2).min(axis=0)
        assert (nearest < 0.05).all(), clusters


def test_isodata_is_the_same_each_time_and_takes_one_value(heaps):
    np.testing.assert_array_equal(isodata(heaps, clusters=4, seed=3), isodata(heaps, clusters=4, seed=3))
    assert isodata(np.full((50, 3), 0.5), clusters=4).tolist() == [[0.5, 0.5, 0.5]]


def test_small_labels_join_the_large_ones_they_look_like_and_groups_are_ranked_by_size():
    features = np.array([[0.0, 0], [1, 1], [0.1, 0], [9, 9], [1, 1.1]])
    sizes = np.array([10, 500, 300, 0, 2])
    assert grouped(features, sizes, most=None).tolist() == [2, 0, 1, -1, 3]
    assert grouped(features, sizes, most=2).tolist() == [1, 0, 1, -1, 0]
    assert grouped(features, sizes, most=1).tolist() == [0, 0, 0, -1, 0]
