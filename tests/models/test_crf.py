import numpy as np
import pytest
import torch

from rayseg.config import load_values
from rayseg.errors import ConfigError
from rayseg.models.crf import Kernels, Refined, mean_field


def by_definition(log_p, colors, kernels):
    """Mean field with full matrices over all pairs of pixels, float64."""
    classes, height, width = log_p.shape
    places = np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)
    tints = colors.reshape(len(colors), -1).T

    def squares(points):
        return ((points[:, None] - points[None]) ** 2).sum(-1)

    near = np.exp(-squares(places) / (2 * kernels.near**2))
    alike = np.exp(-squares(places) / (2 * kernels.alike**2) - squares(tints) / (2 * kernels.color**2))
    messages = []
    for kernel, weight in ((near, kernels.near_weight), (alike, kernels.alike_weight)):
        norm = 1 / np.sqrt(kernel.sum(1))
        messages.append(weight * norm[:, None] * kernel * norm)
    unary = log_p.reshape(classes, -1).T
    log_q = unary
    for _ in range(kernels.iterations):
        q = np.exp(log_q - log_q.max(1, keepdims=True))
        log_q = unary + sum(messages) @ (q / q.sum(1, keepdims=True))
    q = np.exp(log_q - log_q.max(1, keepdims=True))
    return (q / q.sum(1, keepdims=True)).T.reshape(log_p.shape)


@pytest.mark.parametrize("kernels", [Kernels(iterations=3), Kernels(iterations=2, near=1.5, alike=2.0, color=20.0)])
def test_it_is_the_mean_field_of_all_pairs(kernels):
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.ones(3), (9, 14)).transpose(2, 0, 1))
    colors = rng.uniform(0, 255, (3, 9, 14))
    found = mean_field(torch.tensor(log_p[None]).float(), torch.tensor(colors[None]).float(), kernels).exp()[0]
    assert found.numpy() == pytest.approx(by_definition(log_p, colors, kernels), abs=2e-3)


def test_specks_go_and_edges_of_colour_stay():
    image = np.full((3, 24, 24), 40.0)
    image[:, :, 12:] = 220
    p = np.full((2, 24, 24), 0.3)
    p[0, :, :12], p[1, :, 12:] = 0.7, 0.7
    p[:, 5, 5] = 0.3, 0.7
    kernels = Kernels()
    found = mean_field(torch.tensor(np.log(p))[None].float(), torch.tensor(image)[None].float(), kernels)[0].argmax(0)
    assert (found[:, 12:] == 1).all()
    assert (found[:, :12] == 0).all()


def test_a_patch_is_refined_as_the_batch_it_is_in_and_colours_are_got_back():
    class Answer(torch.nn.Module):
        def forward(self, images):
            return images[:, :2]

    refined = Refined(Answer(), channels=3, kernels=Kernels(iterations=2))
    refined.std.copy_(torch.tensor([50.0, 40, 30]))
    assert "std" in refined.state_dict()
    images = torch.randn(2, 3, 10, 10)
    both = refined(images)
    assert torch.allclose(refined(images[1:]), both[1:], atol=1e-5)
    colors = images * torch.tensor([50.0, 40, 30])[:, None, None]
    assert torch.allclose(both, mean_field(images[:, :2].log_softmax(1), colors, Kernels(iterations=2)), atol=1e-5)


def test_kernels_too_wide_for_plain_sums_are_refused():
    with pytest.raises(ConfigError, match=r"alike = 49.0: input should be less than or equal to 8"):
        load_values(Kernels, {"near": 3.0, "alike": 49.0})
