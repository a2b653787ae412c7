import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy as plain

from rayseg.errors import ConfigError
from rayseg.models.discriminator import (
    Discriminator,
    discriminator_loss,
    expect_seen,
    feature_matching,
    one_hot,
    poly,
    self_training,
)
from rayseg.models.losses import cross_entropy


@pytest.fixture
def golden(shared):
    return {name: np.load(shared / f"golden/als4gan/{name}.npz") for name in ("discriminator", "losses", "lr")}


def tensor(array):
    return torch.from_numpy(np.ascontiguousarray(array))


def test_the_discriminator_tells_any_size_and_channels_are_what_the_paper_says():
    net = Discriminator(classes=6)
    assert [net.get_submodule(f"conv{k}").out_channels for k in (1, 2, 3, 4)] == [64, 128, 256, 512]
    logits, features = net(torch.rand(3, 9, 40, 24))
    assert (logits.shape, features.shape) == ((3,), (3, 512))
    expect_seen(16)
    with pytest.raises(ConfigError, match="too small for the discriminator, expected 16"):
        expect_seen(15)


def test_dropout_leaves_the_last_layer_alone():
    net = Discriminator(classes=1, width=4, dropout=1.0).train()
    _, features = net(torch.rand(2, 4, 32, 32))
    bias = torch.nn.functional.leaky_relu(net.conv4.bias, 0.2)
    assert torch.allclose(features, bias.expand(2, -1), atol=1e-6)


def test_only_maps_above_the_threshold_teach_themselves():
    logits = torch.randn(3, 2, 4, 4)
    loss, count = self_training(logits, torch.tensor([0.9, 0.8, 0.1]), 0.8)
    assert count == 1
    assert torch.allclose(loss, plain(logits[:1], logits[:1].argmax(1)))
    assert self_training(logits, torch.zeros(3), 0.8) == (0.0, 0)


def test_rates_end_at_zero_after_as_many_steps_as_are_asked_for():
    assert poly(1.0, 0, 50) == 1
    assert poly(1.0, 25, 50) == pytest.approx(0.5**0.9)
    assert poly(1.0, 50, 50) == poly(1.0, 70, 50) == 0
    assert poly(1.0, 49, 50, every=10) > 0


@pytest.mark.real
def test_the_discriminator_is_that_of_the_reference(golden):
    found = golden["discriminator"]
    net = Discriminator(classes=6, width=8).eval()
    net.load_state_dict({key[3:]: tensor(found[key]) for key in found if key.startswith("sd.")})
    whole = found["input_lowres"].repeat(8, axis=2).repeat(8, axis=3)
    n, c, i, j = np.indices(whole.shape, sparse=True)
    maps = whole + (((7 * i + 13 * j + 3 * c + 5 * n) % 32) / 256).astype(np.float32)
    assert maps.astype(np.float64).sum() == pytest.approx(float(found["input_sum"]))
    logits, features = net(tensor(maps.astype(np.float32)))
    assert logits.sigmoid().detach().numpy() == pytest.approx(found["eval.out"][:, 0], abs=1e-5)
    assert features.detach().numpy() == pytest.approx(found["eval.maps"][:, :, 0, 0], abs=1e-5)
    assert discriminator_loss(logits, logits).item() == pytest.approx(float(found["loss_D"]), abs=1e-5)
    net.train()
    kept = iter([found[f"train.keep{k}"] for k in (1, 2, 3)])
    net.dropout.forward = lambda x: x * 2 * tensor(next(kept))[:, :, None, None]
    logits, features = net(tensor(maps.astype(np.float32)))
    assert logits.sigmoid().detach().numpy() == pytest.approx(found["train.out"][:, 0], abs=1e-5)
    assert features.detach().numpy() == pytest.approx(found["train.maps"][:, :, 0, 0], abs=1e-5)


@pytest.mark.real
def test_losses_are_those_of_the_reference(golden):
    found = golden["losses"]
    logits = tensor(found["pred"]).requires_grad_()
    loss = cross_entropy(logits, tensor(found["label"]))
    loss.backward()
    assert loss.item() == pytest.approx(float(found["ce"]), abs=1e-5)
    assert logits.grad.numpy() == pytest.approx(found["ce_grad"], abs=1e-7)
    weighted = cross_entropy(logits, tensor(found["label"]), tensor(found["weight"]))
    assert weighted.item() == pytest.approx(float(found["ce_weighted"]), abs=1e-5)
    matched = feature_matching(tensor(found["fm_gt"])[:, :, 0, 0], tensor(found["fm_pred"])[:, :, 0, 0])
    assert matched.item() == pytest.approx(float(found["loss_fm"]), abs=1e-5)
    taught, count = self_training(tensor(found["st_pred"]), tensor(found["st_scores"])[:, 0], 0.6)
    assert (taught.item(), count) == (pytest.approx(float(found["st_loss"]), abs=1e-5), int(found["st_count"]))
    assert np.array_equal(one_hot(tensor(found["onehot_label"]), 6).numpy(), found["onehot"])


@pytest.mark.real
def test_rates_are_those_of_the_reference(golden):
    found = golden["lr"]
    for steps in (20000, 45):
        for group, rate in enumerate(found["base_lr"]):
            count = min(steps, 61)  # what comes after the last step is never used
            rates = [poly(rate, step, steps, every=10) for step in range(count)]
            assert rates == pytest.approx(found[f"lr_itermax{steps}"][:count, group], rel=1e-12)
    rates = [poly(1e-4, int(step), 40000) for step in found["D_iter"]]
    assert rates == pytest.approx(found["D_lr"], rel=1e-12)
