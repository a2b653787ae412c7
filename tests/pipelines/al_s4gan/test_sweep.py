from types import SimpleNamespace

import pytest
import ray
from ray.exceptions import RayTaskError, WorkerCrashedError

from rayseg.config import load_values
from rayseg.engine.run import Engine
from rayseg.errors import ConfigError
from rayseg.geo.region import Region
from rayseg.pipelines.al_s4gan import sweep
from rayseg.pipelines.al_s4gan.pipeline import Config
from rayseg.pipelines.al_s4gan.sweep import Trial


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
    trials = sweep.list_trials(
        Config(), ratios=[0.1, 0.2], strategies=["margin", "random"], learners=["s4gan"], seeds=3
    )
    assert len({trial.name for trial in trials}) == len(trials) == 12
    one = trials[-1].config(Config(seed=7))
    assert (one.active.ratio, one.active.strategy, one.seed) == (0.2, "random", 9)
    assert one.segmenter.discriminator is not None
    bare = Trial(0.1, "random", "supervised", 0).config(Config())
    assert bare.segmenter.discriminator is None
    consistent = Config(segmenter={"learner": "consistency"})
    tried = {name: Trial(0.1, "random", name, 0).config(consistent).segmenter for name in sweep.LEARNERS}
    learners = {name: tried[name].learner for name in ("s4gan", "consistency", "supervised")}
    assert learners == {"s4gan": "s4gan", "consistency": "consistency", "supervised": "s4gan"}
    networks = [tried[name].network for name in sweep.LEARNERS]
    assert networks == ["decoder", "decoder", "decoder", "linear", "frozen"]
    assert [tried[name].uses_unlabelled for name in sweep.LEARNERS] == [True, True, False, False, False]
    assert Trial(0.1, "random", "s4gan", 0).config(Config()) == Config(
        seed=1234, active={"ratio": 0.1, "strategy": "random"}
    )


def test_without_a_segmenter_the_largest_share_shows_the_others():
    base = Config(segmenter=None)
    trials = sweep.list_trials(base, ratios=[0.1, 0.3], strategies=["badge"], learners=["s4gan", "supervised"], seeds=2)
    assert [(trial.ratio, trial.learner) for trial in trials] == [(0.3, "classifier")] * 2


def test_unknown_names_are_refused():
    with pytest.raises(ConfigError, match="strategy best is unknown, expected some of: margin"):
        sweep.list_trials(Config(), ratios=[0.1], strategies=["best"], learners=["s4gan"], seeds=1)
    with pytest.raises(ConfigError, match="learner gan is unknown, expected some of: s4gan, consistency, sup"):
        sweep.list_trials(Config(), ratios=[0.1], strategies=["margin"], learners=["gan"], seeds=1)
    with pytest.raises(ConfigError, match="needs one or more ratios"):
        sweep.list_trials(Config(), ratios=[], strategies=["margin"], learners=["s4gan"], seeds=1)
    with pytest.raises(ConfigError, match=r"active.ratio = 2"):
        sweep.list_trials(Config(), ratios=[2.0], strategies=["margin"], learners=["s4gan"], seeds=1)


def test_equal_trials_are_tried_once():
    trials = sweep.list_trials(
        Config(), ratios=[0.02, 0.02], strategies=["margin", "margin"], learners=["s4gan"], seeds=1
    )
    assert trials == [Trial(0.02, "margin", "s4gan", 0)]


def test_what_any_trial_could_not_use_is_refused(tmp_path):
    network = {"encoder": "test_resnet", "weights": "none"}
    active = {"classifier": network | {"network": "chips", "size": 100}}
    base = load_values(Config, {"active": active, "segmenter": network | {"architecture": "unet"}})
    trials = [Trial(0.1, strategy, "s4gan", 0) for strategy in ("random", "margin")]
    with pytest.raises(ConfigError, match="classifier's size 100 is not a multiple of 32"):
        sweep.run(base, Region("r"), trials, str(tmp_path / "out"), Engine("inline"))


def test_trials_beside_each_other_have_no_workers_of_their_own(tmp_path):
    with pytest.raises(ConfigError, match="set workers=0 or use --engine inline"):
        sweep.run(Config(workers=2), Region("r"), [Trial(0.1, "random", "s4gan", 0)], str(tmp_path), Engine("ray"))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("error", "said"), [
    (WorkerCrashedError(), "its process was lost (WorkerCrashedError)"),
    (RayTaskError("carry_out", "", KeyError("ours")), None),
])  # fmt: skip
def test_only_a_process_that_was_lost_is_called_so(monkeypatch, error, said):
    def fails(_):
        raise error

    told = SimpleNamespace(remote=lambda *_: "task")
    fakes = {"cluster_resources": dict, "remote": lambda **_: lambda _: told, "put": str, "get": fails}
    for name, fake in (fakes | {"wait": lambda tasks, **_: (tasks, [])}).items():
        monkeypatch.setattr(ray, name, fake)
    monkeypatch.setattr(sweep.cluster, "connect", str)
    trial = Trial(0.1, "random", "s4gan", 0)
    found = sweep._carried_out(Config(), Region("r"), [trial], "out", Engine("ray", "there"), None)
    if said:
        assert list(found) == [(trial, {"failed": said})]
    else:
        with pytest.raises(RayTaskError):
            list(found)


def test_a_table_is_in_the_order_of_the_trials_whichever_ends_first(tmp_path, monkeypatch):
    trials = [Trial(0.1, strategy, "s4gan", 0) for strategy in ("random", "margin")]
    monkeypatch.setattr(sweep, "_checked", lambda *_: None)
    monkeypatch.setattr(sweep, "_carried_out", lambda *_: ((one, {"curve": [(4, 0.5)]}) for one in trials[::-1]))
    told = sweep.run(Config(), Region("r"), trials, str(tmp_path), Engine("inline"))
    assert told.splitlines()[0].split("  ") == ["labels", "random, s4gan", "margin, s4gan"]
    assert (tmp_path / "table.csv").read_text().startswith('labels,"random, s4gan","margin, s4gan"')
