from pathlib import Path

import numpy as np
import pytest
import torch

from rayseg.models import losses


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(2, 1, 24, 20, generator=generator)
    mask = (torch.rand(2, 1, 24, 20, generator=generator) > 0.6).float()
    return logits, mask


def gradient(loss: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss, logits)[0]


def test_a_perfect_and_sure_answer_costs_nothing(pair):
    _, mask = pair
    assert losses.bce_ssim_iou(mask * 80 - 40, mask).item() == pytest.approx(0, abs=1e-5)


def test_the_loss_and_its_gradient_stay_finite_for_very_sure_wrong_answers(pair):
    _, mask = pair
    logits = (400 - 800 * mask).requires_grad_()
    loss = losses.bce_ssim_iou(logits, mask)
    assert loss.item() > 100
    assert gradient(loss, logits).isfinite().all()


def test_an_empty_mask_has_a_finite_loss_and_gradient(pair):
    logits = pair[0].requires_grad_()
    loss = losses.bce_ssim_iou(logits, torch.zeros_like(logits))
    assert loss.isfinite()
    assert gradient(loss, logits).isfinite().all()


def test_ssim_weighs_a_full_two_dimensional_gaussian(pair):
    p, t = pair[0].sigmoid().double(), pair[1].double()
    at = torch.arange(11, dtype=torch.float64) - 5
    window = torch.exp(-(at[:, None] ** 2 + at[None] ** 2) / 4.5)
    window = (window / window.sum())[None, None]

    def blur(x: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, window, padding=5)

    mp, mt = blur(p), blur(t)
    vp, vt, c = blur(p * p) - mp**2, blur(t * t) - mt**2, blur(p * t) - mp * mt
    expected = (2 * mp * mt + 1e-4) * (2 * c + 9e-4) / ((mp**2 + mt**2 + 1e-4) * (vp + vt + 9e-4))
    torch.testing.assert_close(losses.ssim(p, t), expected.mean((1, 2, 3)))


def test_a_weight_of_one_everywhere_changes_nothing(pair):
    torch.testing.assert_close(losses.bce_ssim_iou(*pair, torch.ones_like(pair[1])), losses.bce_ssim_iou(*pair))


def test_what_stands_at_ignored_pixels_does_not_matter_to_cross_entropy_and_iou(pair):
    logits, mask = pair
    weight = torch.ones_like(mask)
    weight[:, :, :, 12:] = 0
    other, flipped = torch.where(weight > 0, logits, -logits), torch.where(weight > 0, mask, 1 - mask)
    torch.testing.assert_close(losses.bce(other, flipped, weight), losses.bce(logits, mask, weight))
    torch.testing.assert_close(losses.bce(logits, mask, weight), losses.bce(logits[..., :12], mask[..., :12]))
    iou = losses.soft_iou(logits.sigmoid(), mask, weight)
    torch.testing.assert_close(losses.soft_iou(other.sigmoid(), flipped, weight), iou)
    torch.testing.assert_close(iou, losses.soft_iou(logits[..., :12].sigmoid(), mask[..., :12]))


def test_ssim_is_the_mean_over_the_pixels_that_count(pair):
    probabilities, mask = pair[0].sigmoid(), pair[1]
    weight = torch.ones_like(mask)
    weight[:, :, :, 12:] = 0
    far = weight.clone()
    far[:, :, :, :18] = 1
    changed = torch.where(far > 0, mask, 1 - mask)
    torch.testing.assert_close(losses.ssim(probabilities, changed, weight), losses.ssim(probabilities, mask, weight))
    assert not torch.allclose(losses.ssim(probabilities, mask, weight), losses.ssim(probabilities, mask))


def test_an_image_without_a_pixel_that_counts_adds_nothing(pair):
    logits = pair[0].requires_grad_()
    weight = torch.ones_like(pair[1])
    weight[1] = 0
    loss = losses.bce_ssim_iou(logits, pair[1], weight)
    torch.testing.assert_close(loss, losses.bce_ssim_iou(logits[:1], pair[1][:1]) / 2)
    assert losses.ssim(logits.sigmoid(), pair[1], weight)[1] == 1
    slope = gradient(loss, logits)
    assert slope.isfinite().all()
    assert (slope[1] == 0).all()


@pytest.mark.real
def test_losses_and_gradients_equal_the_reference(shared: Path):
    golden = np.load(shared / "golden/gpc/losses.npz")
    logits, mask = torch.tensor(golden["logits"], requires_grad=True), torch.tensor(golden["mask"])
    p = logits.sigmoid()
    parts = {
        "bce": losses.bce(logits, mask),
        "ssim_loss": 1 - losses.ssim(p, mask),
        "iou_loss": 1 - losses.soft_iou(p, mask),
    }
    total = losses.bce_ssim_iou(logits, mask)
    np.testing.assert_allclose(parts["bce"].detach(), golden["bce_per_sample"], atol=1e-5)
    np.testing.assert_allclose(1 - parts["ssim_loss"].detach(), golden["ssim_per_sample"], atol=1e-5)
    np.testing.assert_allclose(parts["iou_loss"].detach(), golden["iou_loss_per_sample"], atol=1e-5)
    assert total.item() == pytest.approx(float(golden["BCE_SSIM_IOU"]), abs=1e-5)
    for name, part in parts.items():
        slope = torch.autograd.grad(part.mean(), logits, retain_graph=True)[0]
        np.testing.assert_allclose(slope, golden[f"grad_{name}"], atol=1e-6)
    np.testing.assert_allclose(gradient(total, logits), golden["grad_BCE_SSIM_IOU"], atol=1e-6)


# -- many classes -----------------------------------------------------------------------------------------------------


def many(seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, 6, 7, generator=generator)
    classes = torch.randint(0, 5, (4, 6, 7), generator=generator)
    classes[torch.rand(4, 6, 7, generator=generator) < 0.3] = 255
    return logits, classes


WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.1, 3.0])


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_the_loss_of_a_batch_is_the_sum_of_its_parts_over_its_mass(weights):
    logits, classes = many()
    whole = torch.nn.functional.cross_entropy(logits, classes, weights, ignore_index=255)
    parts = [losses.cross_entropy_sum(logits[k : k + 1], classes[k : k + 1], weights) for k in range(4)]
    assert sum(parts) / losses.mass(classes, weights) == pytest.approx(float(whole))
    assert losses.cross_entropy(logits, classes, weights) == pytest.approx(float(whole))


def test_focal_loss_without_focus_is_cross_entropy_and_focus_is_per_pixel():
    logits, classes = many()
    flat = losses.focal_sum(logits, classes, WEIGHTS, gamma=0.0, alpha=1.0)
    assert flat == pytest.approx(float(losses.cross_entropy_sum(logits, classes, WEIGHTS)))
    p = logits.softmax(1)
    expected = 0.0
    for n, row, col in (classes != 255).nonzero().tolist():
        right = float(p[n, classes[n, row, col], row, col])
        expected += -0.5 * (1 - right) ** 2 * np.log(right)
    assert losses.focal_sum(logits, classes) == pytest.approx(expected, rel=1e-5)


def test_what_nobody_labelled_teaches_nothing():
    logits = torch.randn(2, 5, 4, 4, requires_grad=True)
    classes = torch.full((2, 4, 4), 255)
    for weights in (None, WEIGHTS):
        loss = losses.cross_entropy(logits, classes, weights)
        loss.backward()
        assert loss == 0
    assert not logits.grad.any()
    assert losses.focal_sum(logits, classes) == 0


@pytest.mark.real
def test_losses_of_many_classes_are_the_published_ones(shared):
    golden = np.load(shared / "golden" / "landcover" / "losses.npz", allow_pickle=False)
    logits, target = torch.from_numpy(golden["logits"]).requires_grad_(), torch.from_numpy(golden["target"])
    weight, images = torch.from_numpy(golden["weight"]), len(target)
    mean = losses.cross_entropy(logits, target)
    assert float(mean.detach()) == pytest.approx(float(golden["ce_nobatch"]), abs=1e-6)
    assert float(mean.detach()) / images == pytest.approx(float(golden["ce"]), abs=1e-6)
    weighted = losses.cross_entropy(logits, target, weight)
    assert float(weighted.detach()) / images == pytest.approx(float(golden["ce_weight"]), abs=1e-6)
    np.testing.assert_allclose(
        torch.autograd.grad(mean / images, logits, retain_graph=True)[0], golden["ce_grad"], atol=1e-7
    )
    focal = losses.published_focal(mean)
    assert float(focal.detach()) == pytest.approx(float(golden["focal_nobatch"]), abs=1e-6)
    np.testing.assert_allclose(torch.autograd.grad(focal / images, logits)[0], golden["focal_grad"], atol=1e-7)
    of_weighted = losses.published_focal(weighted).detach() / images
    assert float(of_weighted) == pytest.approx(float(golden["focal_weight"]), abs=1e-6)
    no_alpha = losses.published_focal(mean, gamma=3.0, alpha=1.0) / images
    assert float(no_alpha.detach()) == pytest.approx(float(golden["focal_g3_noalpha"]), abs=1e-6)
    per_pixel = losses.focal_sum(logits, target) / losses.mass(target) / images
    assert float(per_pixel.detach()) == pytest.approx(float(golden["focal_per_pixel_not_reference"]), abs=1e-6)
