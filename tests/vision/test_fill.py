import numpy as np
import pytest

from rayseg.vision.fill import mirrored


def test_what_lies_beyond_an_edge_is_the_mirror_image():
    image_CHW = np.arange(12).reshape(1, 2, 6)
    valid_HW = np.zeros((2, 6), bool)
    valid_HW[:, 2:] = True
    assert mirrored(image_CHW, valid_HW)[0].tolist() == [[4, 3, 2, 3, 4, 5], [10, 9, 8, 9, 10, 11]]


def test_a_narrow_strip_is_repeated_where_it_cannot_be_mirrored():
    image_CHW = np.full((2, 1, 5), 9, np.uint16)
    image_CHW[:, 0, 2] = 3
    valid_HW = np.array([[False, False, True, False, False]])
    assert (mirrored(image_CHW, valid_HW) == 3).all()


def test_valid_pixels_stay_and_nothing_invalid_is_left():
    rng = np.random.default_rng(3)
    image_CHW = rng.integers(1, 255, (3, 40, 30), np.uint8)
    valid_HW = rng.random((40, 30)) > 0.4
    image_CHW[:, ~valid_HW] = 0
    filled_CHW = mirrored(image_CHW, valid_HW)
    assert (filled_CHW[:, valid_HW] == image_CHW[:, valid_HW]).all()
    assert filled_CHW.min() > 0
    assert filled_CHW.dtype == np.uint8


def test_a_whole_image_is_returned_as_it_is():
    image_CHW = np.ones((1, 3, 3))
    assert mirrored(image_CHW, np.ones((3, 3), bool)) is image_CHW


def test_a_single_bad_pixel_takes_the_mean_of_its_neighbours():
    image_CHW = np.zeros((1, 5, 5), np.uint8)
    image_CHW[0, 1:4, 1:4] = [[10, 20, 30], [40, 255, 60], [70, 80, 91]]
    valid_HW = np.ones((5, 5), bool)
    valid_HW[2, 2] = False
    assert mirrored(image_CHW, valid_HW)[0, 2, 2] == 50
    valid_HW[2, 3] = False
    assert mirrored(image_CHW.astype(np.float32), valid_HW)[0, 2, 2:4].tolist() == pytest.approx([341 / 7, 221 / 7])
