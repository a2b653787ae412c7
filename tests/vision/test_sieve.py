"""Units below a minimum area give way to those around them, the same in every tiling."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.measure import label

from rayseg.vision.sieve import filled, margin, sieved

NODATA = 255


def constant(least):
    return lambda rows, _cols: np.full(len(rows), float(least))


def noisy(height, width, seed=0):
    field = gaussian_filter(np.random.default_rng(seed).random((height, width)), 1.5)
    classes_HW = np.digitize(field, np.quantile(field, [0.3, 0.6])).astype(np.uint8)
    classes_HW[np.random.default_rng(seed + 9).random((height, width)) < 0.03] = NODATA
    return classes_HW


def test_a_speck_and_a_hole_take_the_class_around_them_and_a_unit_of_the_minimum_stays():
    classes_HW = np.zeros((30, 30), np.uint8)
    classes_HW[5:7, 5:7] = 1  # 4 px
    classes_HW[12:25, 12:25] = 2
    classes_HW[15:17, 15:17] = 0
    classes_HW[3, 20:25] = 1  # 5 px
    expected_HW = classes_HW.copy()
    expected_HW[5:7, 5:7], expected_HW[15:17, 15:17] = 0, 2
    assert np.array_equal(sieved(classes_HW, constant(5)), expected_HW)


def test_a_speck_between_two_units_is_shared_between_them_and_ties_take_the_lowest_class():
    row = np.array([[2, 2, 2, 2, 2, 1, 1, 1, 3, 3, 3, 3, 3]], np.uint8)
    classes_HW = np.pad(row, ((4, 4), (4, 4)), mode="edge")[3:-3]
    classes_HW[0], classes_HW[2] = NODATA, NODATA
    assert sieved(classes_HW, constant(5))[1, 9:12].tolist() == [2, 2, 3]


def test_what_no_larger_unit_reaches_stays():
    classes_HW = np.full((12, 12), NODATA, np.uint8)
    classes_HW[4:6, 4:6] = 1
    assert np.array_equal(sieved(classes_HW, constant(20)), classes_HW)


def test_no_unit_below_the_minimum_is_left_beside_one_above_it():
    classes_HW = np.pad(noisy(90, 90), 20, constant_values=0)
    result_HW = sieved(classes_HW, constant(30))
    labels_HW = label(result_HW, background=NODATA, connectivity=1)
    few = np.flatnonzero(np.bincount(labels_HW.ravel()) < 30)
    assert np.bincount(label(classes_HW, background=NODATA, connectivity=1).ravel()).min() < 30
    for number in few:  # islands in nodata
        grown_HW = np.pad(labels_HW == number, 1)
        beside_HW = grown_HW[2:, 1:-1] | grown_HW[:-2, 1:-1] | grown_HW[1:-1, 2:] | grown_HW[1:-1, :-2]
        assert set(labels_HW[beside_HW & (labels_HW != number)]) <= {0, *few}


@pytest.mark.parametrize("least", [3, 12, 40])
def test_a_window_with_its_margin_gives_the_pixels_of_the_whole(least):
    classes_HW, wide = noisy(160, 150, seed=least), margin(least)
    whole_HW = sieved(np.pad(classes_HW, wide, constant_values=NODATA), constant(least))[wide:-wide, wide:-wide]
    assert (whole_HW != classes_HW).sum() > 50
    padded_HW = np.pad(classes_HW, wide, constant_values=NODATA)
    for row in range(0, 160, 40):
        for col in range(0, 150, 50):
            part_HW = padded_HW[row : row + 40 + 2 * wide, col : col + 50 + 2 * wide]
            assert np.array_equal(
                sieved(part_HW, constant(least))[wide : wide + 40, wide : wide + 50],
                whole_HW[row : row + 40, col : col + 50],
            )


def test_long_units_and_those_that_touch_a_seam_are_kept():
    classes_HW = np.zeros((40, 400), np.uint8)
    classes_HW[20, 40:360] = 1
    classes_HW[10, 100:110] = 1
    result_HW = sieved(classes_HW, constant(1000))
    assert (result_HW[20, 40:360] == 1).all()
    assert (result_HW[10] == 0).all()
    seam_HW = np.zeros(classes_HW.shape, bool)
    seam_HW[10, 100] = True
    assert (sieved(classes_HW, constant(1000), seam_HW)[10, 100:110] == 1).all()


def test_pixels_are_filled_up_to_their_round():
    classes_HW = np.array([[1, 0, 0, 0, 0]], np.uint8)
    rounds_HW = np.array([[0, 2, 2, 2, 2]], np.int32)
    assert filled(classes_HW, rounds_HW).tolist() == [[1, 1, 1, 0, 0]]
