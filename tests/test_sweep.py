import numpy as np
import pytest

from rayseg import sweep
from rayseg.errors import ConfigError
from rayseg.pipelines.al_s4gan import Config
from rayseg.sweep import Trial


def test_intervals_are_students():
    assert sweep.interval([0.5]) == (0.5,)
    mean, low, high = sweep.interval([0.4, 0.5, 0.6])
    assert mean == pytest.approx(0.5)
    assert high - mean == pytest.approx(mean - low) == pytest.approx(4.30265 * 0.1 / np.sqrt(3), rel=1e-5)


def test_lines_are_means_over_seeds_at_each_number_of_labels():
    found = {
        Trial(0.1, "entropy", "s4gan", seed): {"curve": [(10, value)]} for seed, value in enumerate((0.2, 0.4))
    } | {
        Trial(0.2, "entropy", "s4gan", 0): {"curve": [(20, 0.5)]},
        Trial(0.1, "random", "supervised", 0): {"failed": "no luck"},
    }
    points = sweep.lines(found)
    assert list(points) == ["entropy, s4gan"]
    assert points["entropy, s4gan"][0][:2] == (10, pytest.approx(0.3))
    assert points["entropy, s4gan"][1] == (20, 0.5)


def test_every_combination_is_tried_with_every_seed():
    trials = sweep.plan(Config(), ratios=[0.1, 0.2], strategies=["margin", "random"], learners=["s4gan"], seeds=3)
    assert len({trial.name for trial in trials}) == len(trials) == 12
    one = trials[-1].config(Config(seed=7))
    assert (one.active.ratio, one.active.strategy, one.seed) == (0.2, "random", 9)
    assert one.segmenter.discriminator is not None
    bare = Trial(0.1, "random", "supervised", 0).config(Config())
    assert bare.segmenter.discriminator is None


def test_without_a_segmenter_the_largest_share_shows_the_others():
    base = Config(segmenter=None)
    trials = sweep.plan(base, ratios=[0.1, 0.3], strategies=["badge"], learners=["s4gan", "supervised"], seeds=2)
    assert [(trial.ratio, trial.learner) for trial in trials] == [(0.3, "classifier")] * 2


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="strategy best is unknown, expected some of: margin"):
        sweep.plan(Config(), ratios=[0.1], strategies=["best"], learners=["s4gan"], seeds=1)
    with pytest.raises(ConfigError, match="learner gan is unknown, expected some of: s4gan, supervised"):
        sweep.plan(Config(), ratios=[0.1], strategies=["margin"], learners=["gan"], seeds=1)
    with pytest.raises(ConfigError, match="needs one or more ratios"):
        sweep.plan(Config(), ratios=[], strategies=["margin"], learners=["s4gan"], seeds=1)
    with pytest.raises(ConfigError, match=r"active.ratio = 2"):
        sweep.plan(Config(), ratios=[2.0], strategies=["margin"], learners=["s4gan"], seeds=1)
