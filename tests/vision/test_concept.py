import numpy as np
import pytest
from skimage.color import lab2rgb

from rayseg.vision import concept
from rayseg.vision.concept import REACH

SITE, GRASS, ROOF = (-18, -4), (-15, 20), (25, 10)


def chip(*colors):
    """An image of vertical stripes of equal width, one object each."""
    lab = np.repeat(np.array([[(60, *color) for color in colors]], float), 12, axis=1)
    image_HWC = np.rint(lab2rgb(np.repeat(lab, 24, axis=0)) * 255).astype(np.uint8)
    labels_HW = np.repeat(np.arange(len(colors)), 12)[None].repeat(24, axis=0)
    return image_HWC, labels_HW


def plane(*colors):
    return concept.density(*concept.chroma(*chip(*colors)))


def test_chroma_is_the_mean_colour_of_each_object():
    ab_N2, areas_N = concept.chroma(*chip(SITE, ROOF))
    np.testing.assert_allclose(ab_N2, [SITE, ROOF], atol=0.6)
    assert areas_N.tolist() == [12 * 24, 12 * 24]


def test_a_density_is_a_share_of_the_area():
    ab_N2 = np.array([SITE, ROOF], np.float32)
    found = concept.density(ab_N2, np.array([3, 1]))
    assert found.sum() == pytest.approx(1, abs=1e-3)
    assert found[:REACH].sum() == pytest.approx(0.75, abs=1e-3)


def test_the_concept_is_what_all_positives_share_and_no_negative_has():
    positives = [plane(SITE, GRASS), plane(SITE, ROOF), plane(SITE, GRASS, ROOF)]
    negatives = [plane(GRASS, ROOF), plane(GRASS), plane(ROOF)]
    found = concept.evidence(positives, negatives)
    ab_N2, _ = concept.chroma(*chip(SITE, GRASS, ROOF))
    mask_HW = concept.concept_mask(chip(SITE, GRASS, ROOF)[1], ab_N2, found)
    assert [mask_HW[0, col] for col in (0, 12, 24)] == [1, 0, 0]


def test_one_negative_outweighs_all_positives():
    found = concept.evidence([plane(SITE, GRASS)] * 9, [plane(ROOF), plane(SITE)])
    assert not concept.region(found)[REACH + SITE[0], REACH + SITE[1]]


def test_only_what_is_connected_with_the_peak_belongs_to_the_concept():
    found = np.full((2 * REACH, 2 * REACH), -5, np.float32)
    found[10:14, 10:14], found[11, 11] = 2, 3
    found[60:62, 60:62] = 1
    assert concept.region(found).sum() == 16
    assert not concept.region(np.full_like(found, -1)).any()


def test_doubtful_objects_are_neither_yes_nor_no():
    found = np.full((2 * REACH, 2 * REACH), -5, np.float32)
    found[REACH, REACH], found[REACH, REACH + 5] = 1, -0.5
    ab_N2 = np.array([[0, 0], [0, 5], [0, 9], [300, -300]], np.float32)
    assert concept.concept_mask(np.arange(4)[None], ab_N2, found).tolist() == [[1, 255, 0, 0]]
