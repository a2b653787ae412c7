import numpy as np
import pytest
import torch
from coloured_squares import SCALING, pair

from rayseg.errors import DataError
from rayseg.train import frozen
from rayseg.train.frozen import HeadConfig, fit_forest, fit_hidden, fit_linear, sample, untrained


def head(hidden=0, classes=3):
    torch.manual_seed(0)
    return untrained("mobilenet_v2", "none", SCALING, classes=classes, lab=True, hidden=hidden)


def predicted(net, image_CHW):
    with torch.inference_mode():
        return net(torch.from_numpy(SCALING.normalize(image_CHW))[None])[0].argmax(dim=0).numpy()


@pytest.fixture(scope="module")
def samples():
    return sample(head(), [pair(seed) for seed in range(3)], 3, SCALING)


@pytest.mark.parametrize("hidden", [0, 16])
def test_classes_of_distinct_colours_are_learnt(samples, hidden):
    net = head(hidden)
    if hidden:
        fit_hidden(net, samples, HeadConfig(hidden=8, members=2, steps=40), seed=3)
    else:
        fit_linear(net, samples)
    image_CHW, classes_HW = pair(9)
    assert (predicted(net, image_CHW) == classes_HW).mean() > 0.9


def test_a_class_without_samples_is_never_chosen_and_two_classes_are_enough():
    for values in ((0, 2), (2,)):
        net = head(classes=4)
        fit_linear(net, sample(net, [pair(1, values=values)], 1, SCALING))
        image_CHW, classes_HW = pair(5, values=values)
        assert set(np.unique(predicted(net, image_CHW))) <= set(values)
        assert (predicted(net, image_CHW) == classes_HW).mean() > 0.9


def test_members_side_by_side_give_the_mean_of_their_logits(samples):
    settings = HeadConfig(hidden=8, members=2, steps=5)
    together, first, second = head(16), head(8), head(8)
    fit_hidden(together, samples, settings, seed=3)
    for net, seed in ((first, 3), (second, 4)):
        fit_hidden(net, samples, settings.model_copy(update={"members": 1}), seed=seed)
    images = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        torch.testing.assert_close(together(images), (first(images) + second(images)) / 2, rtol=1e-4, atol=1e-4)


def test_rare_classes_count_more_with_balance():
    weights = frozen._weights(np.array([0] * 90 + [2] * 10, np.uint8), 0.5)
    assert weights[1] == 0
    assert weights[2] / weights[0] == pytest.approx(3)
    assert 0.9 * weights[0] + 0.1 * weights[2] == pytest.approx(1)


def test_samples_are_labelled_pixels_and_at_most_as_many_as_memory_allows(monkeypatch):
    image_CHW, classes_HW = pair(0)
    classes_HW[:, :64] = 255
    net = head()
    found = sample(net, [(image_CHW, classes_HW)], 1, SCALING)
    assert found.features_NF.shape == (24 * 16, sum(net.widths))
    assert found.classes_N.tolist() == classes_HW[2::4, 66::4].ravel().tolist()
    monkeypatch.setattr(frozen, "MOST_NUMBERS", 50 * sum(net.widths))
    assert len(sample(net, [(image_CHW, classes_HW)], 1, SCALING).classes_N) == 50
    with pytest.raises(DataError, match="no pixel of the training images is labelled"):
        sample(net, [(image_CHW, np.full_like(classes_HW, 255))], 1, SCALING)


def test_the_forest_sees_colour_alone(samples):
    forest = fit_forest(samples)
    assert forest.n_features_in_ == samples.colors == 11
    assert (forest.predict(samples.features_NF[:, -11:]) == samples.classes_N).mean() > 0.95
