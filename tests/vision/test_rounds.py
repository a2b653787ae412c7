"""Rounds of proposals on what is left, and once more inside mixed masks, with proposers that tests make up."""

import numpy as np
import pytest

from rayseg.vision import rle, rounds
from rayseg.vision.proposals import Proposals, SuperpixelProposer
from rayseg.vision.rounds import Refining, Round, RoundsConfig, find_plots, in_rounds

SHAPE = (60, 80)


def box(row, col, row1, col1, shape=SHAPE):
    mask_HW = np.zeros(shape, bool)
    mask_HW[row:row1, col:col1] = True
    return rle.encode(mask_HW)


def proposals(*runs):
    return Proposals(tuple(runs), np.linspace(0.9, 1, len(runs)), np.ones(len(runs)))


class Told:
    """A proposer that says what it is told, round by round, and remembers what it was shown."""

    def __init__(self, *answers):
        self.answers, self.shown = list(answers), []

    def __call__(self, image_HWC, open_HW):
        self.shown.append((image_HWC.copy(), open_HW.copy()))
        return self.answers[len(self.shown) - 1] if len(self.shown) <= len(self.answers) else Proposals.none()


def dark(shape=SHAPE, seed=0):
    """Dark ground with a bright half, so that Otsu leaves the dark one."""
    image = np.random.default_rng(seed).integers(20, 60, (*shape, 3)).astype(np.uint8)
    image[:, -10:] = 190
    return image


def test_what_was_found_is_white_for_the_next_round_and_not_asked_again():
    propose = Told(proposals(box(5, 5, 40, 30)), proposals(box(10, 40, 50, 60)))
    found = in_rounds(dark(), propose, RoundsConfig().rounds[:2], left=0.0)
    image_HWC, open_HW = propose.shown[1]
    assert (image_HWC[5:40, 5:30] == 255).all()
    assert (image_HWC[2:43, 10:20] == 255).all()  # grown by 3 px
    assert not open_HW[5:40, 5:30].any()
    assert open_HW[50, 20]
    assert found.round_N.tolist() == [1, 2]
    assert found.coverage == pytest.approx([875 / 4800, 1675 / 4800])


def test_masks_that_are_mostly_white_already_are_dropped():
    again, half = box(5, 5, 40, 30), box(5, 20, 40, 60)
    propose = Told(proposals(box(5, 5, 40, 30)), proposals(again, half))
    found = in_rounds(dark(), propose, (Round(), Round(white=0.5)), left=0.0)
    assert [runs.tolist() for runs in found.proposals.masks[1:]] == [half.tolist()]


def test_masks_of_different_rounds_are_not_stacked():
    one, other = box(5, 5, 40, 30), box(45, 40, 58, 60)
    plots = find_plots(dark(), Told(proposals(one), proposals(other)), RoundsConfig(refining=None))
    assert sorted(map(rle.area, plots.proposals.masks)) == sorted([rle.area(one), rle.area(other)])
    assert plots.round_N.tolist() == [1, 2]


def test_rounds_end_when_little_is_left():
    propose = Told(proposals(box(0, 0, 60, 80)), proposals(box(0, 0, 9, 9)))
    found = in_rounds(dark(), propose, RoundsConfig().rounds, left=0.05)
    assert len(propose.shown) == 1
    assert found.coverage == (1.0,)


def test_pixels_without_data_count_neither_as_bare_nor_as_left():
    valid_HW = np.zeros(SHAPE, bool)
    valid_HW[:, :40] = True
    propose = Told(proposals(box(0, 0, 60, 15)), proposals(box(0, 10, 60, 50)))
    config = RoundsConfig(rounds=(Round(), Round(), Round()), left=0.4, refining=None)
    plots = find_plots(dark(), propose, config, valid_HW)
    assert plots.coverage == (0.375, 1.0)  # 22 of 40 columns were left for the second round, then none
    assert (propose.shown[0][0][:, 40:] == 255).all()
    assert not propose.shown[0][1][:, 40:].any()
    assert find_plots(dark(), Told(proposals(box(0, 0, 60, 15))), config).coverage[0] == 0.1875


def test_plots_are_connected_of_some_size_and_no_duplicates():
    mask_HW = np.zeros(SHAPE, bool)
    mask_HW[2:20, 2:20] = mask_HW[30:50, 2:20] = mask_HW[55:57, 2:20] = True
    propose = Told(proposals(rle.encode(mask_HW), box(2, 2, 20, 20), box(30, 40, 50, 60), box(30, 40, 50, 61)))
    plots = find_plots(dark(), propose, RoundsConfig(rounds=(Round(),), refining=None))
    assert sorted(map(rle.area, plots.proposals.masks)) == [324, 324, 360, 420]


def checkered(shape=(160, 160)):
    """A mask that looks mixed: many colours and many edges inside."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 250, (shape[0] // 5, shape[1] // 5, 3)).repeat(5, 0).repeat(5, 1)
    return np.clip(blocks + rng.integers(0, 5, (*shape, 3)), 0, 254).astype(np.uint8)


def test_a_mixed_mask_is_looked_at_once_more_in_its_crop():
    image, whole = checkered(), box(20, 30, 150, 140, (160, 160))
    inner = box(10, 10, 60, 100, (130, 110))
    propose = Told(proposals(whole), proposals(inner))
    plots = find_plots(image, propose, RoundsConfig(rounds=(Round(),)))
    crop_HWC, _ = propose.shown[1]
    assert np.array_equal(crop_HWC, image[20:150, 30:140])
    assert plots.refined_N.tolist() == [False, True]
    assert plots.round_N.tolist() == [1, 1]
    assert np.array_equal(plots.proposals.masks[1], box(30, 40, 80, 130, (160, 160)))
    smooth = np.full_like(image, 90)
    assert len(find_plots(smooth, Told(proposals(whole)), RoundsConfig(rounds=(Round(),))).proposals) == 1


def test_one_colour_is_not_mixed_and_has_no_entropy():
    image = np.full((*SHAPE, 3), 80, np.uint8)
    everything = np.ones(SHAPE, bool)
    assert rounds.entropy(image) == 0
    assert rounds.edge_share(image, everything) == 0
    assert not rounds.is_mixed(image, everything, Refining())
    assert rounds.entropy(np.full((4, 4, 3), 255, np.uint8)) == 0
    two = np.concatenate([image, image + np.uint8(9)])
    assert rounds.entropy(two) == pytest.approx(1.0)


@pytest.mark.parametrize("value", [0, 128, 255])
def test_flat_images_have_no_plots(value):
    plots = find_plots(np.full((*SHAPE, 3), value, np.uint8), SuperpixelProposer(), RoundsConfig())
    assert len(plots.proposals) == 0


def test_superpixels_find_fields_and_overlap_nothing():
    image = np.full((120, 120, 3), 120, np.uint8)
    image[10:50, 10:50], image[10:50, 60:110], image[60:110, 10:110] = (30, 90, 30), (160, 120, 60), (60, 60, 20)
    open_HW = np.ones((120, 120), bool)
    open_HW[:, 100:] = False
    found = SuperpixelProposer(reduce=1)(image, open_HW)
    assert rle.areas(found.masks).sum() == rle.union(found.masks, (120, 120)).sum()
    assert not (rle.union(found.masks, (120, 120)) & ~open_HW).any()
    field = rle.encode(np.pad(np.ones((40, 40), bool), ((10, 70), (10, 70))))
    assert max(rle.ious([field, runs])[0, 1] for runs in found.masks) > 0.9
    assert ((found.iou_N >= 0.5) & (found.iou_N <= 1) & (found.stability_N <= 1)).all()
    assert len(SuperpixelProposer()(image, np.zeros((120, 120), bool))) == 0


@pytest.mark.real
def test_rounds_are_the_published_ones(shared):
    golden = np.load(shared / "golden/agri/rounds_pipeline.npz")
    answers = [proposals(*(rle.encode(m > 0) for m in golden[f"r{k}.masks_in"])) for k in (1, 2, 3, 4)]
    propose = Told(*answers)
    found = in_rounds(golden["image_bgr"][..., ::-1].copy(), propose, RoundsConfig().rounds, left=0.05)
    for k in (1, 2, 3, 4):
        assert np.array_equal(propose.shown[k - 1][0], golden[f"r{k}.sam_input_rgb"])
        kept = [rle.decode(found.proposals.masks[at], (128, 128)) for at in np.flatnonzero(found.round_N == k)]
        assert np.array_equal(kept, golden[f"r{k}.masks_kept"] > 0)


@pytest.mark.real
def test_whitening_is_the_published_one(shared):
    golden = np.load(shared / "golden/agri/whiten.npz")
    assert np.array_equal(rounds.clean_up(golden["image_bgr"][..., ::-1])[..., ::-1], golden["both_bgr"])


@pytest.mark.real
def test_edges_and_entropy_are_the_published_ones(shared):
    golden = np.load(shared / "golden/agri/edge_entropy.npz")
    for k, mask in enumerate(golden["masks"]):
        image = rounds.alone(golden["image_rgb"], mask > 0)
        assert rounds.edge_share(image, mask > 0) == pytest.approx(golden["edge_ratio"][k])
        if k in {0, 3, 4}:  # the others hold saturated colours, which the published code leaves out by mistake
            assert rounds.entropy(image) == pytest.approx(golden["average_entropy"][k], abs=1e-5)
