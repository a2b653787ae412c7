import os
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from rayseg.models.cpu import Apart, BatchNorm, Conv1x1, Conv3x3, folded
from rayseg.models.segmenter import build_segmenter

PAIRS = [
    (Conv3x3(20, 6), nn.Conv2d(20, 6, 3, padding=1)),
    (Conv3x3(3, 6), nn.Conv2d(3, 6, 3, padding=1)),
    (Conv1x1(20, 6), nn.Conv2d(20, 6, 1)),
    (BatchNorm(20), nn.BatchNorm2d(20)),
]


def passed(layer: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Output of the layer, gradients of its input and parameters."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    output = layer(x)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    return [output, *torch.autograd.grad((output * weight).sum(), [x, *layer.parameters()])]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("ours", "torchs"), PAIRS)
def test_a_layer_and_its_gradients_equal_those_of_torch(ours, torchs, batch, layout):
    generator = torch.Generator().manual_seed(1)
    bands = 20 if isinstance(ours, nn.BatchNorm2d) else ours.in_channels
    x = torch.randn(batch, bands, 9, 7, generator=generator, dtype=torch.float64) * 3 + 1
    for parameter in torchs.parameters():
        nn.init.normal_(parameter, generator=generator)
    ours.load_state_dict(torchs.state_dict())
    ours.double()
    torchs.double()
    torch.testing.assert_close(passed(ours, x.contiguous(memory_format=layout)), passed(torchs, x))


def test_running_statistics_equal_those_of_torch_and_serve_in_evaluation():
    ours, torchs = BatchNorm(4), nn.BatchNorm2d(4)
    x = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(2)).contiguous(
        memory_format=torch.channels_last
    )
    for _ in range(3):
        ours(x)
        torchs(x)
    torch.testing.assert_close(dict(ours.state_dict()), dict(torchs.state_dict()))
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_normalisations_are_folded_into_what_comes_before_and_change_nothing_but_rounding():
    torch.manual_seed(0)
    model = build_segmenter(architecture="unet", encoder="mobilenet_v2", classes=2, channels=3, weights="none")
    for norm in (one for one in model.modules() if isinstance(one, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
        norm.weight.data.uniform_(0.5, 2)
    quicker = folded(model.eval(), 3)
    assert not [one for one in quicker.modules() if isinstance(one, nn.BatchNorm2d)]
    assert [one for one in model.modules() if isinstance(one, nn.BatchNorm2d)]
    x = torch.randn(1, 3, 96, 96)
    with torch.inference_mode():
        expected = model(x)
        torch.testing.assert_close(quicker(x), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


class Crossed(nn.Module):
    """Layers that are not passed in the order they are named in."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1)
        self.norm.running_mean.fill_(2.0)
        self.norm.running_var.fill_(9.0)

    def forward(self, x):
        return self.last(self.conv(self.norm(x)))


def test_a_model_whose_layers_lie_in_another_order_is_left_as_it_is():
    torch.manual_seed(0)
    model = Crossed().eval()
    assert folded(model, 3) is model


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("encoder", ["mobilenet_v2", "resnet18"])
def test_an_image_has_the_same_bits_in_any_batch_and_by_any_number_of_threads(encoder, two_threads):
    torch.manual_seed(0)
    model = build_segmenter(architecture="unet", encoder=encoder, classes=2, channels=3, weights="none").eval()
    quick = folded(model, 3).to(memory_format=torch.channels_last)
    x_NCHW = torch.randn(5, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = torch.cat([quick(x_NCHW[n : n + 1]) for n in range(5)])
        for most in (1, 2, 4):
            apart = Apart(quick, most=most)
            assert (apart(x_NCHW) == expected).all()
            apart.help_one(torch.randn_like(x_NCHW))
            assert all((apart(x_NCHW[n : n + 1]) == expected[n]).all() for n in range(5))
    assert torch.get_num_threads() == 2


class Counted(nn.Module):
    """A model whose output is how many threads it may have, unless it hides it."""

    shown = True

    def __init__(self):
        super().__init__()
        self.seen, self.go_on, self.waits = [], threading.Event(), threading.Event()

    def forward(self, x):
        self.seen.append(torch.get_num_threads())
        if x.max() == 7:
            self.waits.set()
            assert self.go_on.wait(20)
        return torch.full_like(x, self.seen[-1] if self.shown else 0)


def test_threads_are_one_where_more_of_them_change_the_bits(two_threads):
    x_NCHW, apart = torch.zeros(3, 1, 2, 2), Apart(Counted(), most=2)
    apart.help_one(x_NCHW)
    assert (apart(x_NCHW) == 1).all()
    assert (apart(x_NCHW[:1]) == 1).all()


def test_an_image_by_itself_gets_all_threads_if_asked_and_one_beside_others_does_not(two_threads):
    apart, x_NCHW = Apart(Counted(), most=2), torch.zeros(1, 1, 2, 2)
    apart.model.shown, most = False, min(2, os.cpu_count())
    apart(x_NCHW)
    apart.help_one(x_NCHW)
    apart.model.seen.clear()
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(apart, torch.full_like(x_NCHW, 7))
        assert apart.model.waits.wait(20)
        apart(x_NCHW)
        apart.model.go_on.set()
        first.result()
    apart(x_NCHW)
    assert apart.model.seen == [most, 1, most]


def test_three_threads_are_used_as_two_for_one_image(monkeypatch, two_threads):
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    apart, x_NCHW = Apart(Counted()), torch.zeros(1, 1, 2, 2)
    apart.model.shown = False
    apart.help_one(x_NCHW)
    apart.model.seen.clear()
    apart(x_NCHW)
    assert apart.model.seen == [2]
