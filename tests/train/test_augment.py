import colorsys

import pytest
import torch

from rayseg.config import load
from rayseg.errors import ConfigError, DataError
from rayseg.models.bundle import Scaling
from rayseg.train.augment import Augment, augment, centre, cut_mix

AS_READ = Scaling(mean=(0.0,) * 3, std=(1.0,) * 3)
STILL = {"flip": 0, "quadrants": 0, "rotate": 0, "jitter": 0}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def images():
    """Every pixel its own value, so that a mask which is the first band shows where each pixel went."""
    return torch.arange(6 * 64 * 64, dtype=torch.float32).reshape(6, 1, 64, 64).repeat(1, 3, 1, 1)


@pytest.mark.parametrize("which", ["flip", "quadrants", "rotate"])
def test_masks_follow_the_images_and_no_pixel_is_lost(images, which):
    changed, masks = augment(images, images[:, :1], Augment(**(STILL | {which: 1.0})), generator(), size=64)
    assert torch.equal(changed[:, :1], masks)
    assert torch.equal(changed.flatten(1).sort().values, images.flatten(1).sort().values)
    assert not torch.equal(changed, images)


def test_nothing_happens_where_nothing_may(images):
    changed, masks = augment(images, None, Augment(**STILL), generator(), size=64)
    assert torch.equal(changed, images)
    assert masks is None


@pytest.mark.parametrize("which", ["flip", "quadrants", "rotate", "jitter"])
def test_about_the_share_of_the_images_changes(which):
    images = torch.rand(400, 3, 8, 8) * 200
    changed, _ = augment(images, None, Augment(**(STILL | {which: 0.3})), generator(), size=8)
    share = (changed != images).flatten(1).any(1).float().mean().item()
    expected = 1 - 0.7**2 if which == "flip" else 0.3
    assert share == pytest.approx(expected, abs=0.08)


def test_the_same_generator_gives_the_same_batch(images):
    settings = Augment(crop="random", scale=(0.8, 1.5), jitter=1)
    first, second, other = (augment(images % 200, None, settings, generator(s), size=32)[0] for s in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_the_centre_is_cut_out_and_random_windows_reach_every_edge(images):
    middle = centre(images, Augment(), AS_READ, size=32)
    assert torch.equal(middle, images[:, :, 16:48, 16:48])
    many = images[:1].repeat(400, 1, 1, 1)
    windows, _ = augment(many, None, Augment(**STILL, crop="random"), generator(), size=60)
    tops = (windows[:, 0, 0, 0] // 64).long()
    assert set(tops.tolist()) == {0, 1, 2, 3, 4}


def test_magnification_shows_less_ground_and_reduction_more():
    images = torch.linspace(0, 255, 64).repeat(1, 1, 64, 1)
    near, masks = augment(images, images, Augment(**STILL, scale=(2, 2)), generator(), size=32)
    far, _ = augment(images, None, Augment(**STILL, scale=(0.5, 0.5)), generator(), size=32)
    as_is = centre(images, Augment(), Scaling(mean=(0.0,), std=(1.0,)), size=32)
    spread = [(x[..., -1] - x[..., 0]).mean().item() for x in (near, as_is, far)]
    assert spread[0] == pytest.approx(spread[1] / 2, rel=0.1)
    assert spread[2] == pytest.approx(spread[1] * 2, rel=0.1)
    assert set(masks.unique().tolist()) <= set(images.unique().tolist())


def test_chips_smaller_than_the_window_are_refused(images):
    with pytest.raises(DataError, match="64 x 64 px, training needs 96 x 96"):
        centre(images, Augment(), AS_READ, size=96)


def test_padded_windows_show_small_images_whole_and_the_rest_is_zero_to_the_network(images):
    scaling = Scaling(mean=(100, 90, 80), std=(50, 50, 50))
    padded = Augment(**STILL, pad=True)
    assert Augment().fill(scaling) is None
    shown, masks = augment(images, images[:, :1], padded, generator(), size=96, fill=padded.fill(scaling))
    assert torch.equal(shown[..., :64, :64], images)
    assert (masks[..., 64:, :] == 255).all()
    assert (masks[..., 64:] == 255).all()
    for normal in (scaling.normalize(shown), centre(images, padded, scaling, size=96)):
        assert torch.equal(normal[..., :64, :64], scaling.normalize(images))
        assert (normal[..., 64:, :] == 0).all()
        assert (normal[..., 64:] == 0).all()
    # A magnification below 1 really shrinks the image, which without `pad` ends at its edge.
    settings = Augment(**STILL, pad=True, scale=(0.5, 0.5), crop="random")
    flat = torch.full((2, 3, 64, 64), 7.0)
    shown, masks = augment(flat, flat[:, :1], settings, generator(), size=64, fill=settings.fill(scaling))
    assert [(mask == 7).sum() for mask in masks] == [32 * 32] * 2
    assert torch.equal(shown[:, :1] == 7, masks == 7)
    assert (augment(flat, flat, settings, generator(), size=64)[1] == 7).all()


def test_a_horizontal_mirror_never_turns_an_image_upside_down(images):
    settings = Augment(**(STILL | {"flip": 0.5}), mirror="horizontal")
    shown, _ = augment(images, None, settings, generator(), size=64)
    kept = [torch.equal(new, old) for new, old in zip(shown, images, strict=True)]
    turned = [torch.equal(new, old.flip(2)) for new, old in zip(shown, images, strict=True)]
    assert kept == [not one for one in turned]
    assert any(kept)
    assert any(turned)


def jittered(images, **strength):
    none = {"brightness": 0, "contrast": 0, "saturation": (1, 1), "hue": 0}
    return augment(images, None, Augment(**(STILL | none | {"jitter": 1} | strength)), generator(), size=8)[0]


def test_saturation_and_hue_leave_grey_alone_and_brightness_does_not():
    grey = torch.full((4, 3, 8, 8), 90.0)
    torch.testing.assert_close(jittered(grey, saturation=(0.1, 1.9), hue=0.5), grey, atol=1.0, rtol=0)
    assert (jittered(grey, brightness=0.5) - grey).abs().amax((1, 2, 3)).min() > 1


def test_contrast_keeps_the_mean():
    images = torch.rand(4, 3, 8, 8) * 50 + 100
    changed = jittered(images, contrast=0.5)
    torch.testing.assert_close(changed.mean((1, 2, 3)), images.mean((1, 2, 3)))
    assert not torch.allclose(changed, images)


def test_hue_turns_the_colour_and_keeps_its_luma():
    images = torch.tensor([160.0, 100.0, 90.0])[None, :, None, None].expand(8, 3, 8, 8)
    changed = jittered(images, hue=0.2)
    luma = torch.tensor([0.299, 0.587, 0.114])
    torch.testing.assert_close(
        (changed[:, :, 0, 0] * luma).sum(1), (images[:, :, 0, 0] * luma).sum(1), atol=0.5, rtol=0
    )
    hues = [colorsys.rgb_to_hsv(*pixel.tolist())[0] for pixel in changed[:, :, 0, 0]]
    assert max(hues) - min(hues) > 0.1


def test_four_bands_are_jittered_in_brightness_only_and_stay_in_range():
    changed = jittered(torch.full((3, 4, 8, 8), 250.0), brightness=0.9, hue=0.5)
    assert changed.max() <= 255
    assert changed.min() >= 0
    assert changed.std(dim=1).max() == 0


def test_saturation_zero_is_grey_and_a_cast_changes_the_bands_apart():
    images = torch.rand(4, 3, 8, 8) * 130
    grey = jittered(images, saturation=(0, 0))
    torch.testing.assert_close(grey[:, 0], grey[:, 2], atol=1.0, rtol=0)
    ratio = jittered(images, cast=0.4) / images
    assert ratio.flatten(2).std(dim=2).max() < 1e-3
    assert ratio[:, :, 0, 0].std(dim=1).min() > 0.01


def test_gamma_bends_the_values_and_keeps_the_ends():
    changed = jittered(torch.tensor([0.0, 127.5, 255.0])[None, :, None, None].repeat(5, 1, 8, 8), gamma=(2, 2))
    torch.testing.assert_close(changed[0, :, 0, 0], torch.tensor([0.0, 63.75, 255.0]), atol=0.5, rtol=0)


def test_windows_are_drawn_until_their_mask_covers_enough():
    masks = torch.zeros(200, 1, 64, 64)
    masks[:, :, :24, :24] = 1
    masks[:, :, 40:] = 255
    found = {}
    for draws in (1, 30):
        settings = Augment(**STILL, crop="random", covered=0.1, draws=draws)
        _, windows = augment(masks, masks, settings, generator(), size=32)
        found[draws] = (windows == 1).float().mean((1, 2, 3)) > 0.1
    assert found[1].float().mean() < 0.5
    assert found[30].float().mean() > 0.95


def test_shares_beyond_one_are_refused():
    with pytest.raises(ConfigError, match="flip"):
        load(Augment, overrides=["flip=1.5"])


def test_rectangles_of_other_images_bring_their_classes_along():
    images = torch.arange(64.0)[:, None, None, None].expand(64, 3, 32, 32)
    classes = torch.arange(64)[:, None, None].expand(64, 32, 32)
    shown, known = cut_mix(images, classes, torch.Generator().manual_seed(1), share=0.5)
    assert torch.equal(shown[:, 0].long(), known)
    foreign = (known == 63 - classes).float().mean(dim=(1, 2))
    assert ((known == classes) | (known == 63 - classes)).all()
    assert 0.3 < (foreign > 0).float().mean() < 0.7
    assert (foreign[foreign > 0] > 0.01).all()
    assert (foreign < 0.45).all()
    for inside in known[foreign > 0] == (63 - classes)[foreign > 0]:
        rows, columns = inside.any(dim=1), inside.any(dim=0)
        assert inside.sum() == rows.sum() * columns.sum()
    assert torch.equal(cut_mix(images, classes, torch.Generator(), share=0.0)[0], images)
