"""Label images: painted from masks, compared where two of them see the same ground."""

import numpy as np
import pytest

from rayseg.vision import rle
from rayseg.vision.crops import square_crop
from rayseg.vision.instances import inscribed_radii, painted, without_slivers


def test_small_masks_lie_on_large_ones_and_scraps_go():
    large, small, scrap = np.zeros((3, 20, 20), bool)
    large[2:18, 2:18], small[4:10, 4:10], scrap[0:2, 0:3] = True, True, True
    where_HW = np.ones((20, 20), bool)
    where_HW[:, 16:] = False
    found = [rle.encode(m) for m in (small, scrap, large)]
    labels_HW, kept = painted(found, (20, 20), where_HW=where_HW, least=10)
    assert kept == [0, 2]
    assert np.array_equal(labels_HW == 1, small)
    assert np.array_equal(labels_HW == 2, large & ~small & where_HW)


def test_a_crop_is_the_plot_in_the_middle_of_a_black_square():
    image = np.full((30, 40, 3), 200, np.uint8)
    mask_HW = np.zeros((30, 40), bool)
    mask_HW[5:25, 10:20] = True
    crop = square_crop(image, mask_HW, size=20)
    assert crop.shape == (20, 20, 3)
    assert (crop[:, 5:15] == 200).all()  # all of it: the published crop lacks the last row and column
    assert (crop[:, :5] == 0).all()
    assert (crop[:, 15:] == 0).all()
    assert square_crop(image, mask_HW, size=224).shape == (224, 224, 3)


def test_the_radius_of_a_plot_is_that_of_its_largest_circle_and_the_edge_of_the_image_is_not_a_border():
    labels_HW = np.zeros((50, 50), np.int32)
    labels_HW[10:23, 10:40] = 1  # 13 px wide: a circle of 7 px around its middle row
    labels_HW[45:, :] = 2  # 5 px, and maybe more beyond the edge
    assert inscribed_radii(labels_HW)[1:].tolist() == [7, 5]
    assert np.isinf(inscribed_radii(np.zeros((4, 4), np.int32))).all()


def test_a_sliver_between_two_plots_goes_to_both_and_one_in_the_open_goes():
    labels_HW = np.zeros((40, 90), np.int32)
    labels_HW[:, :30], labels_HW[:, 30:38], labels_HW[:, 38:60] = 1, 7, 2
    labels_HW[10:15, 5:10] = 3  # inside a plot
    labels_HW[:, 70:74] = 4
    expected_HW = np.zeros((40, 90), np.int32)
    expected_HW[:, :34], expected_HW[:, 34:60] = 1, 2
    assert np.array_equal(without_slivers(labels_HW, 6), expected_HW)


def test_a_net_of_roads_goes_to_the_fields_along_it():
    rows, cols = np.indices((100, 100)) // 25
    labels_HW = (rows * 4 + cols + 1).astype(np.int32)
    fields_HW = labels_HW.copy()
    labels_HW[(np.indices((100, 100)) % 25 < 3).any(axis=0)] = 17
    same_HW = without_slivers(labels_HW, 6) == fields_HW
    assert same_HW.mean() > 0.85
    assert all(same_HW[fields_HW == k].mean() > 0.7 for k in range(1, 17))


@pytest.mark.parametrize("seed", range(3))
def test_no_sliver_is_left_whatever_the_labels(seed):
    rng = np.random.default_rng(seed)
    labels_HW = rng.integers(0, 30, (12, 12)).repeat(5, axis=0).repeat(5, axis=1).astype(np.int32)
    merged_HW = without_slivers(labels_HW, 6)
    assert merged_HW.max() == 0 or inscribed_radii(merged_HW)[1:].min() >= 6
    assert np.unique(np.append(merged_HW, 0)).tolist() == list(range(merged_HW.max() + 1))
