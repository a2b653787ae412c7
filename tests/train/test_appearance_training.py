import numpy as np
import pytest
import torch

from rayseg.errors import DataError
from rayseg.models.bundle import Scaling
from rayseg.train.appearance import AppearanceConfig, fit_appearance

SCALING = Scaling(mean=(100.0, 100.0, 100.0), std=(50.0, 50.0, 50.0))
COVER, EARTH, ROOF = (70, 150, 130), (120, 100, 80), (240, 240, 240)


def scene(left, right, *, seed=0, noise=6):
    """A chip (96, 96) with one colour in its left half and another in its right one."""
    image = np.empty((96, 96, 3))
    image[:, :48], image[:, 48:] = left, right
    return np.clip(image + np.random.default_rng(seed).normal(0, noise, image.shape), 0, 255).astype(np.uint8)


def chips():
    labels = np.zeros((96, 96), np.uint8)
    labels[:, :40], labels[:, 40:56] = 1, 255
    city = np.random.default_rng(1).integers(0, 256, (12, 12, 3)).repeat(8, 0).repeat(8, 1).astype(np.uint8)
    return [(scene(COVER, EARTH), labels), (city, np.zeros((96, 96), np.uint8))]


def logits(model, image):
    with torch.inference_mode():
        return model(SCALING.normalize(torch.from_numpy(image.transpose(2, 0, 1).copy())[None]))[0, 0].numpy()


def test_the_class_is_found_and_what_is_unlike_both_is_not_the_class():
    model = fit_appearance(chips(), AppearanceConfig(components=2), scaling=SCALING)
    found = logits(model, scene(COVER, ROOF, seed=2)) > 0
    assert found[:, :40].all()
    assert not found[:, 56:].any()


def test_texture_tells_one_colour_from_the_same_colour():
    labels, rough = np.ones((96, 96), np.uint8), scene(EARTH, EARTH, seed=3, noise=40)
    learnt = [(scene(EARTH, EARTH), labels), (rough, 0 * labels)]
    model = fit_appearance(learnt, AppearanceConfig(components=1), scaling=SCALING)
    assert (logits(model, scene(EARTH, EARTH, seed=4)) > 0).mean() > 0.95
    assert (logits(model, scene(EARTH, EARTH, seed=5, noise=40)) > 0).mean() < 0.05


def test_the_fit_is_the_same_again():
    models = [fit_appearance(chips(), AppearanceConfig(components=2), scaling=SCALING) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*(model.state_dict().values() for model in models), strict=True))


def test_chips_without_a_sure_pixel_are_refused():
    nothing = [(scene(EARTH, EARTH), np.zeros((96, 96), np.uint8))]
    with pytest.raises(DataError, match=r"0 sure pixels of the class in the chips, expected at least 2; lower appear"):
        fit_appearance(nothing, AppearanceConfig(), scaling=SCALING)
