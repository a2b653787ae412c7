"""The classifier of plots: hue and richness as they are published, and a network that a bundle keeps."""

import numpy as np
import pytest
import torch

from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Scaling
from rayseg.models.plot_classifier import AttendedHue, build_plot_classifier, hue, richness


def test_hue_is_that_of_the_colour_circle():
    colors = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [0.5, 0.5, 0.5]]).float()
    assert hue(colors.T[None, :, None])[0, 0].tolist() == [0, 60, 120, 180, 240, 300, 0]


def test_richness_counts_the_values_that_occur():
    images = torch.zeros(2, 3, 16, 16)
    images[1, 0] = torch.arange(256).view(16, 16) / 255
    images[1, 1, 0, 0] = 2.0  # beyond what counts
    assert richness(images).tolist() == [1.0, (256 + 1 + 1) / 3]


def test_colour_takes_part_in_the_decision():
    torch.manual_seed(0)
    model = build_plot_classifier("mobilenet_v2", weights="none").eval()
    with torch.no_grad():
        model.head.weight[:, :-2] = 0
        model.head.weight[:, -2:] = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    flat, rich = torch.full((1, 3, 64, 64), 0.5), torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        logits = model(torch.cat([flat, rich])) - model.head.bias
    assert logits[0].tolist() == pytest.approx([0.0, 2 / 256])
    assert 0 < logits[1, 0] < 3
    assert logits[1, 1] > 1.9


def test_a_bundle_keeps_it(tmp_path):
    described = Bundle(
        name="plots",
        task="classification",
        architecture=Architecture(factory="plots", options={"encoder": "mobilenet_v2", "classes": 2}),
        classes=((1, "field", (0, 158, 115)), (2, "other", (213, 94, 0))),
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(scale=1 / 255, mean=(0.0,) * 3, std=(1.0,) * 3),
        patch=64,
        stride=64,
    )
    model = build_plot_classifier("mobilenet_v2", weights="none").eval()
    bundle.save(tmp_path, described, model)
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(bundle.build(tmp_path)[1](image), model(image))


@pytest.mark.real
@pytest.mark.parametrize("kind", ["norm", "unit"])
def test_hue_and_richness_are_the_published_ones(shared, kind):
    golden = np.load(shared / "golden/agri/hue_richness.npz")
    images = torch.from_numpy(golden["images_rgb"]).permute(0, 3, 1, 2).float() / 255
    if kind == "norm":
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        images = (images - mean[:, None, None]) / std[:, None, None]
    attended = AttendedHue()
    attended.load_state_dict({name: torch.from_numpy(golden[f"hue.{name}"]) for name in attended.state_dict()})
    assert hue(images).numpy() == pytest.approx(golden[f"{kind}.hue"], abs=1e-3)
    assert attended(images).detach().numpy() == pytest.approx(golden[f"{kind}.hue_attended_mean"], abs=1e-3)
    assert richness(images).numpy() == pytest.approx(golden[f"{kind}.richness"], abs=0.34)
