import logging

import numpy as np
import pytest
import torch
from torch import nn

from rayseg.errors import ConfigError, DataError, ModelError
from rayseg.train import session
from rayseg.train.learning import Learner, Learning, Schedule, expect_batch, precision
from rayseg.train.session import Setup


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
        self.head = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))

    def forward(self, x):
        return self.head(self.encoder(x))


IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) + 2


def learn(tmp_path, settings, function):
    def loop(_):
        torch.manual_seed(0)
        return {"value": function(Learner.start(Net(), settings, torch.device("cpu")))}

    return session.fit(loop, {}, Setup(tmp_path), name="t")["value"]


def step(learner, loss, rate=1.0):
    return learner.step(lambda _: loss, 1, rate, items=lambda: "image a", what="net, step 3")


def weight(part):
    return part[0].weight.item()


def test_encoder_and_head_learn_at_their_own_rates(tmp_path):
    def function(learner):
        before = weight(learner.net.encoder), weight(learner.net.head)
        step(learner, weight_sum(learner.net), rate=0.5)
        return before[0] - weight(learner.net.encoder), before[1] - weight(learner.net.head)

    def weight_sum(net):
        return net.encoder[0].weight.sum() + net.head[0].weight.sum()

    settings = Learning(optimizer="sgd", encoder_rate=0.1)
    assert learn(tmp_path, settings, function) == pytest.approx((0.05, 0.5))
    shortened = settings.model_copy(update={"clip": 0.1, "encoder_rate": 1.0})
    assert learn(tmp_path, shortened, function) == pytest.approx((0.5 * 0.1 / 2**0.5,) * 2, rel=1e-3)


def test_what_is_shown_is_the_average_of_the_weights(tmp_path):
    def function(learner):
        values = []
        for _ in range(3):
            step(learner, learner.net.head[0].weight.sum())
            values.append(weight(learner.net.head))
        return values, weight(learner.shown.head), learner.weights()["head.0.weight"].item()

    values, shown, kept = learn(tmp_path, Learning(optimizer="sgd", average=0.5), function)
    expected = values[0]
    for n, value in enumerate(values[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * value
    assert shown == kept == pytest.approx(expected)
    assert shown != values[-1]


@pytest.mark.parametrize(("frozen", "moved"), [("none", (1, 1)), ("encoder", (0, 1)), ("all", (0, 0))])
def test_norms_keep_their_statistics_where_they_are_frozen(tmp_path, frozen, moved):
    def function(learner):
        learner.train_mode()
        learner.net(IMAGES)
        return [int(part[1].num_batches_tracked) for part in (learner.net.encoder, learner.net.head)]

    assert learn(tmp_path, Learning(freeze_batchnorm=frozen), function) == list(moved)


def test_statistics_are_taken_anew_from_a_few_batches_if_asked(tmp_path):
    def function(learner):
        seen = learner.net.encoder[0](IMAGES).mean().item()
        batches = iter([IMAGES, IMAGES, IMAGES * 100])
        shown = learner.show_mode(batches)
        return shown.training, shown.encoder[1].running_mean.item() - seen, len(list(batches))

    training, difference, left = learn(tmp_path, Learning(recalibrate=2), function)
    assert not training
    assert difference == pytest.approx(0, abs=1e-5)
    assert left == 1


def test_half_precision_is_for_gpus_unless_asked_for():
    convolution = nn.Conv2d(1, 1, 1)
    for half, kind in ((None, torch.float32), (False, torch.float32), (True, torch.bfloat16)):
        with precision(Learning(half=half), torch.device("cpu")):
            assert convolution(IMAGES).dtype == kind


# -- steps ------------------------------------------------------------------------------------------------------------


def of_head(learner, part):
    """A loss of images 0, 1, 2, ... whose shares add up to their mean x the head's weight."""
    return learner.net.head[0].weight.sum() * torch.arange(8.0)[part].sum() / 8


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tmp_path):
    def function(learner):
        before = weight(learner.net.head)
        loss = learner.step(lambda part: of_head(learner, part), 8, 0.1, items=str, what="")
        return before, loss, weight(learner.net.head)

    for micro in (None, 3, 1):
        before, loss, after = learn(tmp_path, Learning(optimizer="sgd", micro=micro), function)
        assert loss == pytest.approx(3.5 * before)
        assert after == pytest.approx(before - 0.1 * 3.5)


def test_short_memory_halves_the_part_and_says_so(tmp_path, caplog):
    seen = []

    def function(learner):
        def loss_of(part):
            seen.append(part.stop - part.start)
            if seen[-1] > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return of_head(learner, part)

        learner.train_mode()
        before = weight(learner.net.head)
        learner.step(loss_of, 8, 0.1, items=str, what="")
        seen.append("then")
        learner.step(loss_of, 8, 0.0, items=str, what="")
        return before - weight(learner.net.head)

    room = 2
    with caplog.at_level(logging.WARNING):
        assert learn(tmp_path, Learning(optimizer="sgd"), function) == pytest.approx(0.35)
    assert seen == [8, 4, 2, 2, 2, 2, "then", 2, 2, 2, 2]
    assert [record.message for record in caplog.records] == [
        f"GPU memory is short: computing {count} images at a time and accumulating gradients" for count in (4, 2)
    ]
    room = 0
    with pytest.raises(
        ModelError, match=r"does not hold 2 images in training, and batch norms need more than one; freeze them"
    ):
        learn(tmp_path, Learning(), function)
    with pytest.raises(ModelError, match=r"does not hold 1 image in training; lower size"):
        learn(tmp_path, Learning(freeze_batchnorm="all"), function)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_changes_nothing_and_names_what_it_is_of(tmp_path, bad):
    nets = []

    def function(learner):
        nets.append(learner.net)
        learner.keep(tmp_path, "key", {"epoch": 2})
        step(learner, learner.net.head[0].weight.sum() * bad)

    message = rf"^net, step 3: loss {bad} on image a; the last good checkpoint is .*checkpoint.pt, of 2 epochs; check"
    with pytest.raises(DataError, match=message):
        learn(tmp_path, Learning(), function)
    torch.manual_seed(0)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), Net().parameters(), strict=True))


def test_a_gradient_that_is_no_number_is_not_followed_either(tmp_path):
    def function(learner):
        step(learner, (learner.net.head[0].weight.sum() * 0).sqrt())

    with pytest.raises(DataError, match="a gradient that is not finite"):
        learn(tmp_path, Learning(), function)


def test_weights_can_be_learnt_in_groups_of_ones_own(tmp_path):
    def function(_):
        net = Net()
        groups = [
            {"params": [net.encoder[0].weight], "factor": 1.0},
            {"params": [net.head[0].weight], "factor": 20.0, "weight_decay": 0.0},
        ]
        learner = Learner.start(net, Learning(optimizer="sgd", weight_decay=0.5), torch.device("cpu"), groups)
        before = [weight(part) for part in (net.encoder, net.head)]
        step(learner, net.encoder[0].weight.sum() * 0 + net.head[0].weight.sum() * 0, rate=0.1)
        return before, [weight(part) for part in (net.encoder, net.head)]

    before, after = learn(tmp_path, Learning(), function)
    assert after == pytest.approx([before[0] * (1 - 0.1 * 0.5), before[1]])


# -- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_fall_from_their_rate_and_warm_up_from_nothing():
    for kind in ("poly", "cos", "step"):
        schedule = Schedule(kind=kind, rate=0.1, every=2, warm_up=1)
        assert schedule.at(0, 10) == 0
        assert schedule.at(0.5, 10) == pytest.approx(0.5 * Schedule(kind=kind, rate=0.1, every=2).at(0.5, 10))
        rates = [schedule.at(done, 10) for done in np.linspace(1, 10, 50)]
        assert rates == sorted(rates, reverse=True)
    assert [Schedule(kind="step", rate=1, every=2).at(done, 10) for done in (1.99, 2, 4)] == pytest.approx(
        [1, 0.1, 0.01]
    )
    assert Schedule(kind="cos", rate=1).at(5, 10) == pytest.approx(0.5)
    assert Schedule(kind="poly", rate=1, power=1).at(2.5, 10) == pytest.approx(0.75)


@pytest.mark.real
@pytest.mark.parametrize(("name", "kind", "warm_up"), [
    ("poly", "poly", 0), ("poly_warm1", "poly", 1), ("cos", "cos", 0), ("cos_warm1", "cos", 1),
    ("step2", "step", 0), ("step2_warm1", "step", 1),
])  # fmt: skip
def test_schedules_are_the_published_ones(shared, name, kind, warm_up):
    golden = np.load(shared / "golden" / "landcover" / "lr.npz", allow_pickle=False)[name]
    schedule = Schedule(kind=kind, rate=0.01, every=2, warm_up=warm_up)
    rates = [schedule.at(step / 10, 6) for step in range(60)]
    np.testing.assert_allclose(rates, golden[:, 0], atol=1e-12)
    np.testing.assert_allclose(np.multiply(rates, 10), golden[:, 1], atol=1e-12)


@pytest.mark.parametrize(("batch", "micro", "workers"), [(1, None, 0), (2, None, 2), (4, 1, 0), (5, 2, 1)])
def test_batch_norms_are_not_fed_single_images(batch, micro, workers):
    settings = Learning(batch=batch, micro=micro)
    with pytest.raises(ConfigError, match="batch norms would see one image at a time"):
        expect_batch(settings, workers=workers, what="segmenter")
    expect_batch(settings.model_copy(update={"freeze_batchnorm": "all"}), workers=workers, what="segmenter")


def test_a_batch_is_shared_evenly():
    with pytest.raises(ConfigError, match=r"learning\.batch 10 cannot be shared by 4 workers"):
        expect_batch(Learning(batch=10), workers=4, what="segmenter")
    expect_batch(Learning(batch=12), workers=4, what="segmenter")


def test_every_nth_weights_are_kept_on_request(tmp_path):
    def function(learner):
        for epoch in range(1, 6):
            step(learner, learner.net.head[0].weight.sum())
            learner.keep(tmp_path, "key", {"epoch": epoch, "best": session.UNTRAINED})
        return learner.rates(), weight(learner.net.head)

    (rates, last) = learn(tmp_path, Learning(optimizer="sgd", keep_every=2, encoder_rate=0.5), function)
    assert rates == {"learning_rate/0": 0.5, "learning_rate/1": 1.0}
    files = sorted((tmp_path / "kept").iterdir())
    assert [path.name for path in files] == ["000002.pt", "000004.pt"]
    kept = [torch.load(path, weights_only=True) for path in files]
    assert [row["number"] for row in kept] == [2, 4]
    assert kept[0]["weights"]["head.0.weight"].item() > kept[1]["weights"]["head.0.weight"].item() > last
    assert "keep_every" not in Learning().model_dump()
