"""Each segment gets one class: that of its mean scores; what lies outside of all segments stays."""

import numpy as np

from rayseg.stages.refine import Refine

LABELS_HW = np.array([[1, 1, 1, 0], [2, 2, 2, 2]], np.int32)
ALL = np.s_[:2, :4]


def refined(classes, scores, *, values, threshold=None):
    classes_HW, scores_CHW = np.array(classes, np.uint8), np.array(scores, np.uint8)
    Refine(64, values, threshold).refine(LABELS_HW, classes_HW, scores_CHW, ALL)
    return classes_HW.tolist(), scores_CHW.tolist()


def test_one_band_is_compared_with_the_threshold():
    scores = [[[200, 200, 20, 200], [130, 10, 10, 255]]]
    classes, means = refined([[1, 1, 0, 1], [1, 0, 0, 255]], scores, values=(0, 1), threshold=0.5)
    assert classes == [[1, 1, 1, 1], [0, 0, 0, 255]]  # nodata stays, and does not count
    assert means == [[[140, 140, 140, 200], [50, 50, 50, 255]]]
    assert refined([[1, 1, 0, 1], [1, 0, 0, 255]], scores, values=(0, 1), threshold=0.6)[0][0] == [0, 0, 0, 1]


def test_of_several_bands_the_largest_mean_wins_not_the_most_pixels():
    scores = [[[100, 100, 0, 0], [254] * 4], [[154, 154, 0, 254], [0] * 4], [[0, 0, 254, 0], [0] * 4]]
    scores[0][0][2], scores[2][0][2] = 250, 4
    classes, means = refined([[3, 3, 0, 3], [0] * 4], scores, values=(0, 3, 7))
    assert classes == [[0, 0, 0, 3], [0, 0, 0, 0]]
    assert means[0][0] == [150, 150, 150, 0]


def test_where_a_band_is_of_each_pixels_own_class_most_pixels_win_and_scores_stay():
    scores = [[[10, 20, 250, 5], [1, 2, 3, 4]]]
    classes, kept = refined([[4, 4, 9, 9], [9, 9, 4, 255]], scores, values=(4, 9, 11))
    assert classes == [[4, 4, 4, 9], [9, 9, 9, 255]]
    assert kept == scores
