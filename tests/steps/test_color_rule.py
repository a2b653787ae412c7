import numpy as np
import pytest

from rayseg.steps.color_rule import ColorRule, fit_rule


def plain(*colors):
    """An image of stripes in some colours, with a little noise."""
    stripes = np.repeat(np.array(colors, np.float64), 12, axis=0)[:, None].repeat(30, axis=1)
    return np.clip(stripes + np.random.default_rng(0).normal(0, 3, stripes.shape), 0, 255).astype(np.uint8)


def test_the_rule_is_the_axis_that_tells_positive_chips_from_negative_ones():
    green, white, brown, grey = (60, 150, 90), (250, 250, 250), (130, 100, 70), (120, 120, 120)
    rule = fit_rule([plain(green, brown), plain(green, grey)], [plain(brown, grey, (230, 230, 230), (20, 20, 20))])
    assert (rule.axis, rule.sign) == (1, -1)
    marked = rule(plain(green, grey))
    assert marked[:12].all()
    assert marked[12:].mean() < 0.2
    rule = fit_rule([plain(white, brown)], [plain(brown, grey)])
    assert (rule.axis, rule.sign) == (0, 1)


def test_it_marks_the_share_of_negative_pixels_that_it_may():
    rng = np.random.default_rng(1)
    negative = rng.integers(0, 256, (150, 150, 3), np.uint8)
    rule = fit_rule([plain((60, 150, 90))], [negative], marked=0.1)
    assert rule(negative).mean() == pytest.approx(0.1, abs=0.02)


def test_its_name_reads_as_a_person_would_write_it():
    assert ColorRule(1, -1, 2.0).name == "a threshold on a (green to red) < -2"
    assert ColorRule(0, 1, 70.4).name == "a threshold on lightness > 70"
