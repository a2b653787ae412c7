import numpy as np
import pytest

from rayseg.vision.linear import class_probabilities


def test_clouds_of_features_are_told_apart_and_classes_without_labels_have_no_probability():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 40)) * 2
    labels = np.repeat([0, 2, 3], 30)
    features = np.repeat(centres, 30, axis=0) + rng.normal(size=(90, 40))
    known = np.r_[0:5, 30:35, 60:65]
    p = class_probabilities(features[known], labels[known], features, classes=5)
    assert p.shape == (90, 5)
    assert p.sum(1) == pytest.approx(1)
    assert (p[:, [1, 4]] == 0).all()
    assert (p.argmax(1) == labels).mean() > 0.95


def test_one_class_alone_is_certain():
    p = class_probabilities(np.ones((2, 3)), np.array([1, 1]), np.ones((4, 3)), classes=3)
    assert p.tolist() == [[0, 1, 0]] * 4
