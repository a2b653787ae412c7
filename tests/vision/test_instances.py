"""Label images: painted from masks, compared where two of them see the same ground."""

import numpy as np

from rayseg.vision import rle
from rayseg.vision.crops import square_crop
from rayseg.vision.instances import painted


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
