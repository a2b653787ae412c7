import numpy as np
import pytest
import torch
from coloured_squares import GROUND_SCALING as SCALING
from coloured_squares import SEMI_SUPERVISED, chips_on_ground
from pydantic import ValidationError
from torch import nn

from rayseg.models.bundle import Scaling
from rayseg.train import consistency, s4gan, session
from rayseg.train.augment import Augment
from rayseg.train.batches import Batch
from rayseg.train.consistency import Student, fit_consistency
from rayseg.train.learning import Learner, Learning, trained
from rayseg.train.s4gan import ConsistencyConfig, Data
from rayseg.train.session import Setup

QUICK = SEMI_SUPERVISED.model_copy(update={"learner": "consistency", "consistency": ConsistencyConfig(threshold=0.4)})


def scenes(count, **more):
    return chips_on_ground(count, (50, 170, 80), **more)


@pytest.fixture
def data():
    return Data(scenes(4, seed=1), scenes(8, seed=2, masks=False), scenes(3, seed=3))


@pytest.fixture
def _alone(monkeypatch):
    """One worker, outside of a training session."""
    monkeypatch.setattr(session, "world", lambda: 1)
    monkeypatch.setattr(session, "rank", lambda: 0)


def fit(settings, data, prefix, **where):
    return fit_consistency(settings, data, Setup(prefix, **where), scaling=SCALING)


class Fixed(nn.Module):
    """A network whose logits are the first `classes` bands of its input, as one feature map."""

    def __init__(self, classes):
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.forward = lambda images: [images, images[:, :classes] * 1.0]
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, images):
        return self.encoder(images)[1] * self.weight


def fixed(classes=2, **learning):
    return Learner.start(Fixed(classes), Learning(average=0.9, **learning), torch.device("cpu"))


def plain(settings=QUICK):
    """What a loop is called with, for images that are logits already."""
    return {"settings": settings, "scaling": Scaling(mean=(0.0, 0.0), std=(1.0, 1.0)), "device": torch.device("cpu")}


def test_it_learns_and_keeps_the_teacher(tmp_path, data):
    settings = QUICK.model_copy(update={"steps": 40, "checkpoint": 20, "rate": 3e-3})
    measures = fit(settings, data, tmp_path)
    assert measures["mean_iou"] > 0.7
    assert 0.5 < measures["taught"] <= 1
    state = session.load_checkpoint(tmp_path, None)
    net = trained(settings.build(classes=2, channels=3), tmp_path)
    found = s4gan.confusions(net, data.validation, range(3), SCALING, unit=32)
    assert s4gan.measures_of(sum(found[1:], found[0]))["mean_iou"] == pytest.approx(measures["mean_iou"])
    if measures["step"] == 40:
        teacher = {name.removeprefix("module."): value for name, value in state["learner"]["average"].items()}
        assert all(torch.equal(value, teacher[name]) for name, value in net.state_dict().items())


def test_a_training_that_was_stopped_gives_the_same_weights_as_one_that_was_not(tmp_path, data, monkeypatch):
    whole = fit(QUICK, data, tmp_path / "whole")
    steps, calls = consistency._steps, []

    def dies(first, **more):
        calls.append(first)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return steps(first, **more)

    monkeypatch.setattr(consistency, "_steps", dies)
    with pytest.raises(KeyboardInterrupt):
        fit(QUICK, data, tmp_path / "parts")
    assert fit(QUICK, data, tmp_path / "parts") == whole
    assert calls == [0, 2, 2, 4]
    first, second = (session.load_checkpoint(tmp_path / name, None) for name in ("whole", "parts"))
    for part in ("net", "average"):
        assert all(torch.equal(value, second["learner"][part][name]) for name, value in first["learner"][part].items())
    assert torch.equal(first["sure"], second["sure"])
    assert (first["sure"] < 1).all()


@pytest.mark.usefixtures("_alone")
def test_the_teacher_is_the_moving_average_of_the_student():
    learner = fixed()
    weights = []
    for _ in range(4):
        learner.step(lambda _: learner.net.weight * 1.0, 1, 0.1, items=str, what="")
        weights.append(float(learner.net.weight.detach()))
    expected = weights[0]
    for n, weight in enumerate(weights[1:], 1):
        kept = min(0.9, (1 + n) / (10 + n))
        expected = kept * expected + (1 - kept) * weight
    assert float(learner.shown.weight.detach()) == pytest.approx(expected)
    assert len(set(weights)) == 4


@pytest.mark.usefixtures("_alone")
def test_only_sure_pixels_teach_by_a_threshold_of_each_class():
    # Probability of the better class: .9, .7, .6 of class 0 and .7, .6 of class 1; the last image is unsure everywhere.
    p = torch.tensor([[0.9, 0.7, 0.6, 0.3, 0.4], [0.6, 0.6, 0.55, 0.5, 0.45]])
    images = torch.stack([p.log(), (1 - p).log()], dim=1)[:, :, None].repeat(1, 1, 5, 1)
    settings = QUICK.model_copy(
        update={"consistency": ConsistencyConfig(threshold=0.8, mix=0.0, views=Augment(flip=0, quadrants=0, rotate=0))}
    )
    student = Student(fixed(), torch.tensor([0.9, 0.75]))
    views = consistency.teach(images, None, student, torch.Generator(), plain(settings))
    mean_0, mean_1 = (0.9 + 0.7 + 0.6 + 0.6 + 0.6 + 0.55 + 0.5) / 7, (0.7 + 0.6 + 0.55) / 3
    sure = [0.99 * 0.9 + 0.01 * mean_0, 0.99 * 0.75 + 0.01 * mean_1]
    assert student.sure_K.tolist() == pytest.approx(sure)
    assert 0.6 < 0.8 * sure[1] / sure[0] < 0.7  # the threshold of class 1; that of class 0 is .8
    for shown, classes in views:
        assert torch.equal(shown, images)
        assert classes[0].tolist() == [[0, 255, 255, 1, 255]] * 5
        assert (classes[1] == 255).all()


@pytest.mark.usefixtures("_alone")
def test_pixels_beyond_an_image_teach_nothing():
    settings = QUICK.model_copy(update={"size": 8, "augment": Augment(flip=0, quadrants=0, rotate=0, pad=True)})
    settings = settings.model_copy(update={"consistency": ConsistencyConfig(threshold=0.0, mix=0.0)})
    config = plain(settings)
    batch = Batch(np.arange(2), torch.full((2, 2, 5, 6), 3.0), None)
    images, beyond = s4gan.augmented(batch, torch.Generator(), config)
    student = Student(fixed(), torch.tensor([0.9, 0.9]))
    views = consistency.teach(images, beyond, student, torch.Generator(), config)
    for _, classes in views:
        assert (classes[:, :5, :6] != 255).all()
        assert (classes[:, 5:] == 255).all()
        assert (classes[:, :, 6:] == 255).all()
    # The mean of the pixels inside alone: .5 each.
    assert student.sure_K[0] == pytest.approx(0.99 * 0.9 + 0.01 * 0.5)


@pytest.mark.usefixtures("_alone")
def test_the_loss_is_the_mean_of_both_losses_and_unsure_pixels_count_as_zero(monkeypatch):
    monkeypatch.setattr(consistency, "_complementary", list)
    learner = fixed()
    monkeypatch.setattr(learner, "step", lambda loss_of, count, *_, **__: loss_of(slice(0, count)).item())
    images = torch.randn(2, 2, 4, 4)
    masks = torch.randint(0, 2, (2, 4, 4))
    sure = torch.full((2, 4, 4), 255)
    sure[0, 0, 0] = 1
    losses = consistency._step(
        0, (images, masks), ((images, sure), (images, sure)), Student(learner, None), plain(), str
    )
    surprise = nn.functional.cross_entropy(images, masks)
    taught = -images[0, :, 0, 0].log_softmax(0)[1] / 32
    assert losses["ce_loss"] == pytest.approx(surprise.item(), rel=1e-5)
    assert losses["consistency_loss"] == pytest.approx(taught.item(), rel=1e-5)
    assert losses["loss"] == pytest.approx((surprise + taught).item() / 2, rel=1e-5)
    assert losses["taught"] == pytest.approx(1 / 32)


@pytest.mark.usefixtures("_alone")
def test_pixels_count_alike_whichever_worker_and_part_has_them(monkeypatch):
    monkeypatch.setattr(consistency, "_complementary", list)
    images, masks = torch.randn(4, 2, 4, 4), torch.randint(0, 2, (4, 4, 4))
    masks[2:, 1:] = 255
    sure = torch.randint(0, 2, (4, 4, 4)) * 254 + 1
    learner = fixed()
    size = 4

    def in_parts(loss_of, count, *_, **__):
        return sum(loss_of(slice(start, start + size)).item() for start in range(0, count, size))

    monkeypatch.setattr(learner, "step", in_parts)

    def loss(*shown):
        view = images[list(shown)], sure[list(shown)]
        labelled = images[list(shown)], masks[list(shown)]
        return consistency._step(0, labelled, (view, view), Student(learner, None), plain(), str)["loss"]

    whole = loss(0, 1, 2, 3)
    size = 1
    assert loss(0, 1, 2, 3) == pytest.approx(whole, rel=1e-5)
    monkeypatch.setattr(session, "world", lambda: 2)
    monkeypatch.setattr(session, "sum_over_workers", lambda _: (masks != 255).sum().float())
    assert (loss(0, 1) + loss(2, 3)) / 2 == pytest.approx(whole, rel=1e-5)


def test_two_views_see_complementary_channels_and_half_of_the_images_all():
    net, images = Fixed(64), torch.rand(8, 64, 2, 2) + 0.5
    with consistency.complementary_channels(net):
        factors = (net(torch.cat([images, images])) / torch.cat([images, images])).mean(dim=(2, 3))
    first, second = factors[:8], factors[8:]
    assert torch.allclose(first + second, torch.full_like(first, 2))
    whole = (first == 1).all(dim=1)
    assert whole.sum() == 4
    assert set(first[~whole].unique().tolist()) == {0, 2}
    assert 0.35 < first[~whole].mean() / 2 < 0.65
    assert torch.equal(net(images), images)


def test_without_images_without_masks_it_learns_from_the_masks(tmp_path, data):
    measures = fit(QUICK, Data(data.labelled, None, None), tmp_path)
    assert measures["loss"] == pytest.approx(measures["ce_loss"])
    assert measures["consistency_loss"] == measures["taught"] == 0


def test_views_that_move_pixels_are_refused():
    with pytest.raises(ValidationError, match=r"views change geometry by flip, crop, expected colours alone"):
        ConsistencyConfig(views=Augment(flip=0.5, quadrants=0, rotate=0, crop="random"))


@pytest.mark.more  # test_pixels_count_alike_...: the loss of two workers is that of one
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_two_workers_keep_one_teacher(tmp_path, data):
    fit(QUICK, data, tmp_path, workers=2)
    state = session.load_checkpoint(tmp_path, None)
    assert state["step"] == 6
    assert np.isfinite(state["best"]["measures"]["consistency_loss"])
