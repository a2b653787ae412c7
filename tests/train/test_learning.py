import pytest
import torch
from torch import nn

from rayseg.train import session
from rayseg.train.learning import Learner, Learning, precision


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

    return session.fit(loop, {}, storage=tmp_path, name="t")["value"]


def weight(part):
    return part[0].weight.item()


def test_encoder_and_head_learn_at_their_own_rates(tmp_path):
    def function(learner):
        before = weight(learner.net.encoder), weight(learner.net.head)
        learner.step(weight_sum(learner.net), rate=0.5)
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
            learner.step(learner.net.head[0].weight.sum(), rate=1.0)
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
        learner.model(IMAGES)
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
