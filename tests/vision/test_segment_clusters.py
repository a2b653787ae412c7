import numpy as np
import pytest
from skimage.color import rgb2lab

from rayseg.vision.segment_clusters import (
    CHROMA,
    cluster_centres,
    distances,
    pixel_features,
    segment_sums,
    simple_clusters,
)

RNG = np.random.default_rng(0)


def test_features_are_cielab_with_weighted_chroma_and_the_deviation_in_a_window():
    image_HWC = RNG.random((80, 90, 3)).astype(np.float32)
    features_HWF = pixel_features(image_HWC, ("red", "green", "blue"))
    assert features_HWF.dtype == np.float32
    lab_HWC = rgb2lab(image_HWC)
    np.testing.assert_allclose(features_HWF[..., 0], lab_HWC[..., 0], atol=1e-3)
    np.testing.assert_allclose(features_HWF[..., 1:3], CHROMA * lab_HWC[..., 1:], atol=1e-3)
    window = lab_HWC[40 - 15 : 40 + 16, 40 - 15 : 40 + 16, 0]
    assert features_HWF[40, 40, 3] == pytest.approx(window.std(), rel=1e-3)


def test_bands_are_found_by_name_and_others_are_compared_with_the_brightness():
    image_HWC = RNG.random((40, 40, 3)).astype(np.float32)
    turned = pixel_features(image_HWC[..., ::-1], ("blue", "green", "red"))
    np.testing.assert_array_equal(turned, pixel_features(image_HWC, ("red", "green", "blue")))
    four = pixel_features(np.dstack([image_HWC, image_HWC[..., 0]]), ("red", "green", "blue", "nir"))
    assert four.shape == (40, 40, 5)
    np.testing.assert_array_equal(four[..., :3], turned[..., :3])
    difference = CHROMA * (100 * image_HWC[..., 0] - four[..., 0])
    np.testing.assert_allclose(four[..., 3], difference, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("count", "features"), [(1, 2), (2, 4), (10, 12)])
def test_images_of_any_bands_have_brightness_chroma_and_texture(count, features):
    image_HWC = RNG.random((40, 40, count)).astype(np.float32)
    features_HWF = pixel_features(image_HWC, [f"b{k}" for k in range(count)])
    assert features_HWF.shape[2] == features
    np.testing.assert_allclose(features_HWF[..., 0], 100 * image_HWC.mean(axis=2), rtol=1e-4)
    grey = pixel_features(np.full((40, 40, count), 0.4, np.float32), [f"b{k}" for k in range(count)])
    np.testing.assert_allclose(grey[..., 1:], 0, atol=0.2)


def test_sums_are_those_of_every_segment():
    features_HWF, segments_HW = RNG.random((6, 7, 2)), RNG.integers(0, 4, (6, 7))
    sums_N = segment_sums(features_HWF, segments_HW)
    for number in range(4):
        inside = segments_HW == number
        np.testing.assert_allclose(sums_N[number], [inside.sum(), *features_HWF[inside].sum(axis=0)])


def test_the_cluster_of_the_largest_area_is_first_and_specks_get_none_of_their_own():
    means_NF = np.concatenate([np.full((5, 2), 10.0), np.full((5, 2), 60.0), [[90.0, 90.0]]])
    means_NF += RNG.normal(0, 0.5, means_NF.shape)
    areas_N = np.array([100.0] * 5 + [10_000.0] * 5 + [4.0])
    centres_KF = cluster_centres(means_NF, areas_N, clusters=2, seed=1)
    np.testing.assert_allclose(centres_KF, [[60, 60], [10, 10]], atol=1)
    nearest = distances(means_NF, centres_KF).argmin(axis=1)
    assert nearest.tolist() == [1] * 5 + [0] * 6


def test_as_many_centres_as_segments_that_differ():
    means_NF = np.array([[1.0], [1.0], [5.0]])
    assert len(cluster_centres(means_NF, np.ones(3), clusters=8, seed=0)) == 2


def test_the_baseline_tells_two_fields_apart():
    image_HWC = np.full((60, 80, 3), 60, np.uint8)
    image_HWC[:, 40:] = (200, 180, 90)
    labels_HW = simple_clusters(image_HWC)
    assert len(np.unique(labels_HW[:, :36])) == len(np.unique(labels_HW[:, 44:])) == 1
    assert labels_HW[0, 0] != labels_HW[0, -1]
