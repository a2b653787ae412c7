import numpy as np
import pytest
import torch
from torch import nn

from rayseg.config import load
from rayseg.errors import ConfigError, DataError
from rayseg.models import losses
from rayseg.train.batches import Chips
from rayseg.train.labels import LOSSES, Labelling, Masks, labelled, probabilities

P = torch.tensor([0.1, 0.3, 0.4, 0.6, 0.7]).view(1, 1, 1, 5)


@pytest.mark.parametrize(
    ("settings", "coarse", "expected"),
    [
        ({}, [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]),
        ({"below": 0.3, "above": 0.6}, [1, 1, 1, 1, 1], [0, 0, 255, 255, 1]),
        ({"below": 0.3, "above": 0.6, "keep_cues": True}, [1, 1, 1, 255, 0], [0, 0, 1, 255, 1]),
    ],
)
def test_labels_follow_the_probabilities(settings, coarse, expected):
    labels = labelled(P, torch.tensor(coarse, dtype=torch.uint8).view(1, 1, 1, 5), Labelling(**settings))
    assert labels.dtype == torch.uint8
    assert labels.flatten().tolist() == expected


def test_thresholds_in_the_wrong_order_are_refused():
    with pytest.raises(ConfigError, match=r"below 0\.5 exceeds above"):
        load(Labelling, overrides=["above=0.4"])


class Slope(nn.Module):
    """Logits of each pixel: its value plus its column; only takes sides that are multiples of 8."""

    def forward(self, images_NCHW):
        assert images_NCHW.shape[2] % 8 == images_NCHW.shape[3] % 8 == 0
        return images_NCHW[:, :1] + torch.arange(images_NCHW.shape[3])


def test_probabilities_have_the_size_of_images_of_any_size():
    images = torch.zeros(2, 3, 11, 13)
    plain = probabilities(Slope(), images, unit=8, flip=False)
    torch.testing.assert_close(plain, torch.arange(13.0).sigmoid().expand(2, 1, 11, 13))
    both = probabilities(Slope(), images[..., :8, :8], unit=8, flip=True)
    torch.testing.assert_close(both, both.flip(3))


@pytest.mark.parametrize("name", ["bce", "bce_iou"])
def test_unknown_pixels_pull_at_nothing(name):
    logits = torch.randn(2, 1, 8, 8, requires_grad=True)
    mask = torch.randint(0, 2, (2, 1, 8, 8)).float()
    mask[:, :, :3] = 255
    LOSSES[name](logits, mask).backward()
    assert logits.grad[:, :, :3].abs().max() == 0
    assert logits.grad[:, :, 3:].abs().min() > 0


def test_without_unknown_pixels_the_loss_is_the_published_one():
    logits, mask = torch.randn(3, 1, 16, 16), torch.randint(0, 2, (3, 1, 16, 16)).float()
    torch.testing.assert_close(LOSSES["bce_ssim_iou"](logits, mask), losses.bce_ssim_iou(logits, mask))


def test_empty_masks_do_not_count_in_the_iou_of_bce_iou():
    logits, mask = torch.randn(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    torch.testing.assert_close(LOSSES["bce_iou"](logits, mask), LOSSES["bce"](logits, mask))
    mask[0] = 1
    expected = LOSSES["bce"](logits, mask) + 1 - losses.soft_iou(logits.sigmoid(), mask)[0]
    torch.testing.assert_close(LOSSES["bce_iou"](logits, mask), expected)


@pytest.fixture
def cued():
    return Chips.of_arrays("abc", [0, 1, 0], np.zeros((3, 4, 6, 3), np.uint8), np.ones((3, 4, 6), np.uint8))


def test_negative_chips_are_empty_whatever_their_mask_says(cued):
    masks = Masks(cued, 0, kept=0)
    assert [int(masks(k).sum()) for k in range(3)] == [24, 0, 24]
    assert masks(0).shape == (1, 4, 6)


def test_labels_of_the_network_stand_behind_the_coarse_mask(cued):
    masks = Masks(cued, 0, kept=1000)
    assert not masks.relabelled
    own = torch.randint(0, 2, (1, 1, 4, 6), dtype=torch.uint8)
    masks.relabel(np.array([2]), own)
    assert masks.relabelled
    assert (masks(2)[0] == 1).all()
    assert np.array_equal(masks(2)[1], own[0, 0])
    assert not masks(1).any()


@pytest.mark.parametrize("mask", [np.full((4, 6), 3, np.uint8), np.ones((4, 5), np.uint8)])
def test_a_mask_that_cannot_be_one_is_refused_with_its_chip(cued, mask):
    masks = Masks(Chips(cued.ids, cued.labels, cued.read, lambda _: mask), 0, kept=0)
    with pytest.raises(DataError, match="mask of chip c is"):
        masks(2)
