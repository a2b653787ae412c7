import numpy as np
import pytest
import torch

from rayseg.config import load
from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import write_rows
from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, DataError, RunIncomplete
from rayseg.io.class_tables import Classes
from rayseg.models import bundle
from rayseg.models.bundle import Scaling
from rayseg.pipelines.al_s4gan import chip_pixels, chip_pool, classifier, queries
from rayseg.pipelines.al_s4gan.classifier import ChipsClassifierConfig, Common
from rayseg.pipelines.al_s4gan.queries import ActiveConfig

KINDS = Classes.model_validate(
    {"classes": [{"name": "ground", "color": "#826446"}, {"name": "wood", "color": "#32AA50"}]}
)
COMMON = Common(kinds=KINDS, scaling=Scaling(mean=(100.0,) * 3, std=(50.0,) * 3), seed=3)
CONFIG = ActiveConfig(
    frozen=True, classifier=ChipsClassifierConfig(network="chips", encoder="test_resnet", weights="none", size=32)
)


@pytest.fixture
def listed(tmp_path):
    """A pool of two labelled chips and none for validation."""
    step = Step("pool", str(tmp_path), "key", Engine("inline"), {"classes": ["ground", "wood"]})
    rows = [{"id": name, "part": "pool", "label": label} for name, label in (("a", "ground"), ("b", "wood"))]
    write_rows(step.prefix / "pool.parquet", rows)
    return step


def step_of(listed, name):
    return Step(name, listed.root, "key", Engine("inline"))


def test_networks_that_give_no_features_are_refused():
    with pytest.raises(ConfigError, match=r"classifier.network = 'plots': input should be 'chips' or 'over-imagenet'"):
        load(ActiveConfig, None, ["classifier.network=plots"])


def test_a_chip_that_could_not_be_scored_is_tried_again_by_the_same_command(listed, monkeypatch):
    def broken(_):
        raise DataError("torn")

    def score(rows):
        return [Settled(facts={"p": [0.5, 0.5]}) for _ in rows]

    rows = chip_pool.rows_of(listed, "pool")
    monkeypatch.setattr(chip_pixels, "image_of", broken)
    with pytest.raises(RunIncomplete, match=r"chip a was not scored \(.*torn"):
        classifier.score_chips(step_of(listed, "round-1"), rows, score, COMMON)
    monkeypatch.setattr(chip_pixels, "image_of", lambda _: np.zeros((32, 32, 3), np.uint8))
    found = classifier.score_chips(step_of(listed, "round-1"), rows, score, COMMON)
    assert found == {"a": [0.5, 0.5], "b": [0.5, 0.5]}


def test_a_network_that_stays_as_it_is_is_the_same_when_its_step_goes_on(listed, monkeypatch):
    monkeypatch.setattr(classifier, "score_chips", lambda *_: {})
    sums = []
    for name in ("first", "second"):
        torch.rand(len(name))  # whatever was drawn before
        queries.see(step_of(listed, name), listed, CONFIG, COMMON)
        sums.append(bundle.description(step_of(listed, name).prefix / "classifier").sha256)
    assert sums[0] == sums[1]


@pytest.mark.parametrize("frozen", [True, False])
def test_without_chips_for_validation_nothing_is_measured(listed, frozen):
    before, seen = step_of(listed, "round-1"), step_of(listed, "features") if frozen else None
    queries._keep(before, [queries._picked(row, 0, 0, "first") for row in chip_pool.rows_of(listed, "pool")])
    found = queries.measure_last(step_of(listed, "last"), listed, seen, before, CONFIG, COMMON)
    assert found == {"before": 2, "labelled": 2}


def test_a_list_of_names_takes_the_place_of_queries_and_every_choice_is_left_as_lists(listed, tmp_path):
    rows = [{"id": f"{of}_{k}", "of": of, "part": "pool", "label": "wood"} for of in ("a", "b", "c") for k in (0, 1)]
    write_rows(listed.prefix / "pool.parquet", rows)
    step = Step("pool", listed.root, "key", Engine("inline"), {"pool": 6})
    (tmp_path / "published.txt").write_text("images/c.tif\nb_1\n")
    config = load(ActiveConfig, None, [f"chosen={tmp_path}/published.txt"])
    chosen = step_of(listed, "round-0")
    assert queries.take_chosen(chosen, step, config)["labelled"] == 3
    assert [row["id"] for row in queries.labelled(chosen)] == ["c_0", "c_1", "b_1"]
    for suffix in ("txt", "csv", "npy"):
        assert load(ActiveConfig, None, [f"chosen={chosen.prefix}/chosen.{suffix}"]).chosen == ("c_0", "c_1", "b_1")
    assert queries.picks(chosen, "entropy")[2][0][2] == "named in active.chosen"
    with pytest.raises(DataError, match=r"active.chosen names d, which is not in the pool of 6 chips"):
        queries.take_chosen(chosen, step, ActiveConfig(chosen=("d",)))
    assert "chosen" not in ActiveConfig().model_dump()


def test_all_chips_with_masks_may_be_taken(listed):
    masks = {"a": "[]", "b": '["b.png"]', "c": '["c.png"]'}
    rows = [{"id": of, "of": of, "part": "pool", "label": None, "masks": own} for of, own in masks.items()]
    write_rows(listed.prefix / "pool.parquet", [*rows, rows[1] | {"id": "held", "part": "validation"}])
    step, chosen = Step("pool", listed.root, "key", Engine("inline"), {"pool": 3}), step_of(listed, "round-0")
    config = load(ActiveConfig, None, ["chosen=masked"])
    assert queries.take_chosen(chosen, step, config)["labelled"] == 2
    assert [row["id"] for row in queries.labelled(chosen)] == ["b", "c"]
    write_rows(listed.prefix / "pool.parquet", rows[:1])
    with pytest.raises(DataError, match=r"active.chosen is masked, but none of the 3 chips of the pool has a mask"):
        queries.take_chosen(chosen, step, config)
