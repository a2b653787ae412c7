"""gpc end to end on a tiny landscape: from chips to a measured map, resumed after a kill as if there had been none."""

import json
from dataclasses import replace
from pathlib import Path

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
from small_world import SMALL_GPC, damage, files, finished, goes_on_elsewhere, planned, rayseg, scene, valid_stac

from rayseg.config import load
from rayseg.engine.manifest import write_rows
from rayseg.engine.run import Engine, Step, read
from rayseg.errors import DataError
from rayseg.io import labels, stac_read
from rayseg.models import bundle
from rayseg.pipelines import gpc
from rayseg.steps import charts, cues
from rayseg.train import segmenter
from rayseg.vision import concept

pytestmark = pytest.mark.e2e

STEPS = [
    *("chips", "classifier", "cues", "segmenter", "predict"),
    *("generalize", "polygons", "evaluate", "publish", "qgis", "pictures", "baseline", "certificate", "report"),
]


@pytest.fixture(scope="module")
def words(tmp_path_factory, demo_region):
    """The command but for --out: a landscape of 512 x 1024 px with 8 + 8 chips, and settings for seconds."""
    root = tmp_path_factory.mktemp("world")
    (root / "small.yaml").write_text(SMALL_GPC)
    return "run", "pipeline", "gpc", "--region", demo_region, "--config", root / "small.yaml", "--engine", "inline"


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run that nothing disturbed."""
    return finished(tmp_path_factory.mktemp("whole") / "run", *words)


@pytest.mark.more  # test_superpixel.py moves a run in make test
def test_a_moved_run_goes_on_with_its_own_files(whole, words, tmp_path):
    goes_on_elsewhere(whole, words, tmp_path)


def test_all_steps_are_done_and_leave_what_they_should(whole):
    said = read(str(whole))
    assert said["status"] == "done"
    assert list(said["steps"]) == STEPS
    assert not any(step.get("troubles") for step in said["steps"].values())
    for name in ("classifier", "warm-up", "segmenter"):
        assert bundle.build(str(whole / "models" / name))[0].name == name
        links = json.loads((whole / "models" / name / "item.json").read_text())["links"]
        assert [Path(link["href"]).name for link in links if link["rel"] == "derived_from"] == ["catalog.json"]
    assert len(list((whole / "tiles").glob("*/classes.tif"))) >= 2
    assert {"gpc"} >= set(geopandas.read_parquet(whole / "gpc.parquet")["name"])
    valid_stac(whole / "collection.json")
    page = (whole / "report" / "index.html").read_text()
    assert "8 chips labelled gpc and 8 labelled nongpc" in page
    assert "Next to simple baselines" in page
    simple = said["steps"]["baseline"]
    iou = next(row["iou"]["value"] for row in said["steps"]["evaluate"]["classes"] if row["name"] == "gpc")
    assert simple["product"] == pytest.approx(iou)  # measured on all tiles, as there are few
    assert said["steps"]["evaluate"]["pixels"] > 400_000


def test_the_map_covers_both_scenes(whole, words):
    imagery = sorted(Path(words[4]).parent.glob("imagery/*.tif"))
    seen = 0
    for path in imagery:
        with rasterio.open(path) as file:
            seen += int((file.read_masks(1) > 0).sum())
    mapped = 0
    for path in whole.glob("tiles/*/classes.tif"):
        with rasterio.open(path) as file:
            mapped += int((file.read(1) != 255).sum())
    assert mapped == seen


@pytest.mark.more  # test_landcover.py plans trainings in make test
@pytest.mark.parametrize(("method", "more"), [
    ("cam", set()),
    ("concept", {"Superpixels", "WriteDensity", "ConceptCue"}),
])  # fmt: skip
def test_a_plan_times_all_that_comes_before_the_map(words, method, more):
    plan = planned(*words, "--set", f"cues.method={method}")
    assert {"classifier", "Cam", "WriteCue", "segmenter", "Predict", *more} <= set(plan["seconds"])
    assert plan["wall_seconds"] > plan["seconds"]["classifier"] + plan["seconds"]["segmenter"]


def test_the_second_run_does_nothing(whole, words):
    before = files(whole)
    assert rayseg(*words, "--out", whole).exit_code == 0
    after = files(whole)
    changed = [name for name, found in after.items() if before.get(name) != found and name != ".lock"]
    assert changed == ["run.json"]


@pytest.mark.more  # train/test_appearance_training.py and models/test_appearance.py: the model; here: in its run
def test_a_map_by_appearance_is_a_step_after_the_segmenter_and_a_bundle_like_any_other(words, tmp_path):
    out, more = tmp_path / "run", ("--set", "appearance.components=3", "--set", "appearance.sure=0")
    assert rayseg(*words, "--out", out, *more).exit_code == 0
    said = read(str(out))
    assert list(said["steps"])[3:6] == ["segmenter", "appearance", "predict"]
    assert said["steps"]["predict"]["bundle"] == said["steps"]["appearance"]["bundle"] == str(out / "models/segmenter")
    assert bundle.description(out / "models/network").architecture.factory == "segmenter"
    assert bundle.description(out / "models/segmenter").architecture.factory == "appearance"
    [tile, *_] = sorted((out / "tiles").glob("*/classes.tif"))
    with rasterio.open(tile) as file:
        assert set(np.unique(file.read(1))) <= {0, 1, 255}


@pytest.mark.more  # tests/steps/test_chips.py and test_segmenter_training.py have the parts
def test_drawn_masks_of_some_chips_choose_the_segmenters_epoch(whole, words, tmp_path, demo_region):
    page = (whole / "report" / "index.html").read_text()
    assert "no mask was drawn, so the segmenter&#39;s last epoch is kept" in page
    # 1. a mask of one positive chip: everything is cover
    chip = next(row for row in labels.chips_of(stac_read.open_items(demo_region, "chips")) if row.label == "gpc")
    (tmp_path / "masks").mkdir()
    mask = np.ones((chip.source.height, chip.source.width), np.uint8)
    with rasterio.open(tmp_path / "masks" / f"{chip.id}.tif", "w", driver="GTiff", dtype="uint8", count=1,
                       height=mask.shape[0], width=mask.shape[1]) as file:  # fmt: skip
        file.write(mask, 1)
    out = tmp_path / "run"
    found = rayseg(
        *words, "--set", f"chips.masks={tmp_path}/masks", "--set", "segmenter.scratch.epochs=2", "--out", out
    )
    assert found.exit_code == 0, found.output
    # 2. every epoch is measured, and the best one is kept
    said = read(str(out))["steps"]
    [measures] = said["segmenter"]["measures"]
    histories = charts.histories(str(out))
    [scratch] = [epochs for name, epochs in histories.items() if "scratch" in name]
    assert measures["accuracy"] == pytest.approx(max(epoch["accuracy"] for epoch in scratch))
    assert {"accuracy", "f1", "iou", "loss"} <= scratch[0].keys()
    assert "1 drawn masks selected the segmenter&#39;s epoch: accuracy" in (out / "report" / "index.html").read_text()


@pytest.mark.more  # train/test_segmenter_training.py: the same of the training alone
def test_a_killed_training_goes_on_as_if_nothing_had_been(whole, words, tmp_path, monkeypatch):
    epoch, killed = segmenter._epoch, []

    def fall(number, *arguments):
        if number == 1 and not killed:
            killed.append(number)
            raise KeyboardInterrupt
        return epoch(number, *arguments)

    monkeypatch.setattr(segmenter, "_epoch", fall)
    out = tmp_path / "run"
    assert rayseg(*words, "--out", out).exit_code == 130
    assert killed
    said = rayseg("status", out, "--json")
    assert said.exit_code == 3
    report = json.loads(said.stdout)
    assert report["status"] == "stopped"
    assert [name for name, seconds in report["times"].items() if seconds is None] == ["segmenter"]
    before = files(out / "steps" / "classifier") | files(out / "steps" / "cues")
    assert rayseg(*words, "--out", out).exit_code == 0
    assert read(str(out))["status"] == "done"
    assert files(out / "steps" / "classifier") | files(out / "steps" / "cues") == before
    for name in ("warm-up", "segmenter"):
        assert bundle.description(out / "models" / name).sha256 == bundle.description(whole / "models" / name).sha256
    rasters = sorted(whole.glob("tiles/*/*.tif"))
    assert rasters
    for path in rasters:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()


def test_chips_that_cannot_be_read_say_how_to_go_on_when_they_are_mended(tmp_path):
    path = tmp_path / "chip.tif"
    scene(path, height=64, width=64)
    [chip] = labels.chips_of([*pystac.Catalog.from_file(labels.ingest_rasters([path], tmp_path / "cat")).get_items(
        recursive=True
    )])  # fmt: skip
    whole = damage(path)
    engine, settings = Engine("inline"), cues.CuesConfig(method="concept")
    step, listed = (Step(name, str(tmp_path / "run"), "", engine) for name in ("densities", "chips"))
    write_rows(listed.prefix / "chips.parquet", [chip.to_row() | {"label": "gpc", "held_out": False}])
    classifier = replace(listed, value={"bundle": str(tmp_path / "none")})
    said = rf"1 of 1 chips cannot be used, first chip \(.*rayseg retry {tmp_path}/run"
    for _ in range(2):
        with pytest.raises(DataError, match=said):
            cues.write_densities(step, listed, classifier, settings, 64, 60.0)
    path.write_bytes(whole)
    with pytest.raises(DataError, match=rf"first chip \(Cam: .*{tmp_path}/none"):  # it was read this time
        cues.write_densities(replace(step, engine=replace(engine, retry=True)), listed, classifier, settings, 64, 60.0)


def test_the_concept_is_what_positive_chips_have_and_negative_ones_lack(tmp_path):
    densities = Step("densities", str(tmp_path), "", Engine("inline"))
    densities.prefix.mkdir(parents=True)
    green, red = (-20, 5), (20, 5)
    rows = [{"id": f"{label}-{k}", "label": label} for label in (cues.YES, cues.NO) for k in range(2)]
    for row in rows:
        colors_N2 = np.array([green, red] if row["label"] == cues.YES else [red])
        plane = concept.density(colors_N2, np.ones(len(colors_N2)))
        np.save(densities.prefix / f"{row['id']}.npy", plane)
    evidence = cues.evidence_in(densities, rows)
    at_green, at_red = (evidence[a + concept.REACH, b + concept.REACH] for a, b in (green, red))
    assert at_green > 3
    assert at_red < 0


@pytest.mark.more  # engine/test_flow.py: both engines, the same bytes
@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_cues_are_the_same_bytes_with_both_engines(whole, words, tmp_path):
    config = load(gpc.Config, str(words[words.index("--config") + 1]))
    done = {name: Step(name, str(whole), "", Engine("inline"), read(str(whole))["steps"][name]) for name in STEPS[:2]}
    step = Step("cues", str(tmp_path), "", Engine("ray"))
    cues.write_cues(step, done["chips"], done["classifier"], None, config.cues, config.chips.size, 1800.0)
    expected = {path.name: path.read_bytes() for path in (whole / "steps" / "cues").glob("*.tif")}
    assert expected
    assert {path.name: path.read_bytes() for path in (tmp_path / "steps" / "cues").glob("*.tif")} == expected
