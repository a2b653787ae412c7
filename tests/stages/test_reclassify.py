"""A map decided again from its scores: thresholds, merged and dropped classes."""

import numpy as np

from rayseg.geo.grid import Grid, Window
from rayseg.io.maps import top_scores
from rayseg.io.vectors import polygons_of
from rayseg.stages.predict import decide
from rayseg.stages.reclassify import Decision
from rayseg.vision.color import ClassTable

KINDS = ClassTable(((0, "land", (0, 0, 0)), (1, "roof", (9, 0, 0)), (2, "road", (0, 9, 0)), (7, "water", (0, 0, 9))))
COVER = ClassTable(((0, "background", (0, 0, 0)), (1, "gpc", (0, 9, 0))))
CLASSES_HW = np.array([[0, 1, 2], [7, 1, 255]], np.uint8)
SCORES_CHW = np.array(
    [
        [[100, 30, 40], [10, 90, 255]],
        [[90, 120, 50], [20, 100, 255]],
        [[40, 60, 100], [24, 50, 255]],
        [[24, 44, 64], [200, 14, 255]],
    ],
    np.uint8,
)


def test_a_threshold_decides_as_the_model_would_have():
    probabilities = np.random.default_rng(0).random((1, 40, 50), np.float32)
    valid = np.ones((40, 50), bool)
    valid[3] = False
    classes, scores = decide(probabilities, valid, 0.5)
    for threshold in (0.1, 0.3, 0.5, 0.8):
        again, kept = Decision(COVER, threshold).apply(classes, scores)
        expected, expected_scores = decide(probabilities, valid, threshold)
        assert (again == expected).all()
        assert (kept == expected_scores).all()
    assert 0 < (again == 1).sum() < (classes == 1).sum()


def test_merged_classes_take_the_pixels_and_add_the_scores_of_their_members():
    classes, scores = Decision(KINDS, merged={2: 1}).apply(CLASSES_HW, SCORES_CHW)
    assert classes.tolist() == [[0, 1, 1], [7, 1, 255]]
    assert Decision(KINDS, merged={2: 1}).left.names == ("land", "roof", "water")
    assert scores.tolist() == [
        [[100, 30, 40], [10, 90, 255]],
        [[130, 180, 150], [44, 150, 255]],
        [[24, 44, 64], [200, 14, 255]],
    ]


def test_pixels_of_a_dropped_class_get_the_likeliest_of_the_others():
    classes, scores = Decision(KINDS, dropped=(1,)).apply(CLASSES_HW, SCORES_CHW)
    assert classes.tolist() == [[0, 2, 2], [7, 0, 255]]
    assert (scores == SCORES_CHW[[0, 2, 3]]).all()
    both, _ = Decision(KINDS, merged={2: 7}, dropped=(1,)).apply(CLASSES_HW, SCORES_CHW)
    assert both.tolist() == [[0, 7, 7], [7, 0, 255]]


def test_scores_of_the_own_class_alone_stay_with_the_pixel():
    classes, scores = Decision(KINDS, merged={1: 0}).apply(CLASSES_HW, SCORES_CHW[:1])
    assert classes.tolist() == [[0, 0, 2], [7, 0, 255]]
    assert (scores == SCORES_CHW[:1]).all()


def test_of_two_classes_that_are_left_none_is_a_background():
    decision = Decision(KINDS, merged={1: 7, 2: 7}, renumbered={0: 1})
    assert decision.left.values == (1, 7)
    assert not decision.left.binary
    assert decision.apply(CLASSES_HW, SCORES_CHW)[0].tolist() == [[1, 7, 7], [7, 7, 255]]
    dropped = Decision(KINDS, merged={2: 7}, dropped=(1,), renumbered={0: 1})
    assert dropped.apply(CLASSES_HW, SCORES_CHW)[0].tolist() == [[1, 7, 7], [7, 1, 255]]


def test_a_class_has_its_own_score_whatever_the_values_of_the_classes():
    left = Decision(KINDS, merged={2: 1})
    classes, scores = left.apply(CLASSES_HW, SCORES_CHW)
    top = top_scores(classes, scores, left.left)
    assert (top[classes != 255] * 254).round().tolist() == [100, 180, 150, 200, 150]
    grid = Grid("EPSG:32650", (10.0, 10.0), (3.0, 4.0))
    parts = polygons_of(classes, scores, grid, Window(0, 0, 3, 2), values=left.left.values)
    assert parts.select(["class", "score_sum"]).to_pydict() == {"class": [0, 1, 7], "score_sum": [100, 480, 200]}
