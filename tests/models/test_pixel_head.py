import numpy as np
import pytest
import skimage.color
import torch
from torch.nn.functional import conv2d, interpolate

from rayseg.models.pixel_head import build_pixel_head


@pytest.fixture
def images():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 64, 96)).astype(np.float32))


@pytest.mark.parametrize("hidden", [0, 8])
def test_logits_are_layers_of_the_features_interpolated_to_the_images(images, hidden):
    torch.manual_seed(0)
    net = build_pixel_head("mobilenet_v2", classes=5, weights="none", hidden=hidden).eval()
    with torch.inference_mode():
        units = conv2d(net.features(images), net.first.weight[..., None, None], net.first.bias)
        logits = net.last(units.relu()) if hidden else units
        wanted = interpolate(logits, size=(64, 96), mode="bilinear")
        torch.testing.assert_close(net(images), wanted, rtol=1e-4, atol=1e-4)


def test_colour_is_lab_of_the_values_before_normalisation(images):
    net = build_pixel_head("mobilenet_v2", classes=2, weights="none")
    net.mean.copy_(torch.tensor([127.0, 120.0, 110.0]))
    net.std.copy_(torch.tensor([128.0, 60.0, 50.0]))
    colors = net.color((images - net.mean[:, None, None]) / net.std[:, None, None])
    lab_NHW3 = skimage.color.rgb2lab(images.permute(0, 2, 3, 1).numpy() / 255) / 100
    means = lab_NHW3.reshape(2, 16, 4, 24, 4, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    assert np.allclose(colors[:, :3], means, atol=2e-4)
    # The deviation of brightness in squares of 8 px: here around the square of 4 px at (4, 8).
    square = lab_NHW3[0, 2:10, 6:14, 0]
    assert float(colors[0, 9, 1, 2]) == pytest.approx(square.std(), abs=1e-3)
    assert colors.shape == (2, 11, 16, 24)


def test_other_bands_are_taken_as_they_are():
    net = build_pixel_head("mobilenet_v2", classes=2, weights="none", channels=4, lab=0)
    images = torch.randn(1, 4, 32, 32)
    assert net.color(images).shape == (1, 14, 8, 8)
    torch.testing.assert_close(net.color(images)[0, :4, 0, 0], images[0, :, :4, :4].mean(dim=(1, 2)))


def test_the_encoder_is_frozen():
    net = build_pixel_head("mobilenet_v2", classes=2, weights="none")
    assert {name.partition(".")[0] for name, weight in net.named_parameters() if weight.requires_grad} == {"first"}


@pytest.mark.parametrize(("flips", "axes"), [(2, [(3,)]), (4, [(3,), (2,), (2, 3)])])
def test_probabilities_are_the_mean_over_mirror_images(images, flips, axes):
    torch.manual_seed(0)
    net = build_pixel_head("mobilenet_v2", classes=3, weights="none", flips=flips).eval()
    with torch.inference_mode():
        alone = net.logits(images).softmax(dim=1)
        mirrored = [net.logits(images.flip(axis)).flip(axis).softmax(dim=1) for axis in axes]
        mean = torch.stack([alone, *mirrored]).mean(dim=0)
        torch.testing.assert_close(net(images).softmax(dim=1), mean)
        assert (mean - alone).abs().max() > 1e-3
        for axis in axes:
            torch.testing.assert_close(net(images.flip(axis)).flip(axis), net(images))
