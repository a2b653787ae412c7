"""al-s4gan end to end on drawn scenes: with masks at hand, with people who draw them, undisturbed and killed, swept."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from small_world import files, finished, goes_on_elsewhere, planned, rayseg, refused

from rayseg.config import load
from rayseg.engine.run import read
from rayseg.geo.region import Region
from rayseg.io import labels
from rayseg.models import bundle
from rayseg.pipelines.al_s4gan import chip_pool, classifier, pipeline
from rayseg.train import s4gan

pytestmark = pytest.mark.e2e

COLORS = {0: (130, 100, 70), 1: (50, 170, 80), 2: (40, 80, 200)}
SETTINGS = """
classes:
  classes: [{name: ground, color: "#826446"}, {name: wood, color: "#32AA50"}, {name: water, color: "#2850C8"}]
pool: {size: 64, validation: [south]}
scaling: {mean: [90.0, 110.0, 110.0], std: [50.0, 50.0, 60.0]}
active:
  ratio: 0.35
  classifier:
    network: chips
    encoder: test_resnet
    weights: none
    size: 64
    epochs: 1
    rates: [[1, 3.0e-3]]
    learning: {batch: 3, optimizer: adamw, average: 0.9}
segmenter:
  architecture: unet
  encoder: test_resnet
  weights: none
  size: 64
  steps: 4
  checkpoint: 2
  rate: 3.0e-3
  head_rate: 1.0
  bias_rate: 1.0
  discriminator: {width: 4, after: 2, threshold: 0.4}
  learning: {batch: 4, optimizer: adamw}
  augment: {crop: random}
patch: 96
stride: 64
"""
STEPS = [
    *("pool", "round-0", "round-1", "round-2", "segmenter", "measure"),
    *("baseline", "predict", "generalize", "polygons", "evaluate", "publish", "qgis", "certificate", "report"),
]


def draw(folder, name, *, seed, masks=True, size=(128, 192)):
    rng = np.random.default_rng(seed)
    classes = np.zeros(size, np.uint8)
    for value in (1, 2, 1, 2, 1, 2):
        top, left = rng.integers(0, size[0] - 40), rng.integers(0, size[1] - 50)
        classes[top : top + 40, left : left + 50] = value
    image = np.zeros((*size, 3))
    for value, color in COLORS.items():
        image[classes == value] = color
    image = (image + rng.normal(0, 8, image.shape)).clip(0, 255).astype(np.uint8)
    for part, pixels in (("images", image), ("masks", classes)):
        if part == "images" or masks:
            (folder / name / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / name / part / "a.png")
    return classes


def scenes(folder, *, masks=True):
    drawn = {name: draw(folder, name, seed=k, masks=masks) for k, name in enumerate(("east", "north", "west"))}
    return drawn | {"south": draw(folder, "south", seed=9)}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    scenes(root / "scenes")
    (root / "small.yaml").write_text(SETTINGS)
    return root


@pytest.fixture(scope="module")
def words(world):
    return (
        *("run", "pipeline", "al-s4gan", "--region", world / "scenes", "--config", world / "small.yaml"),
        *("--engine", "inline"),
    )


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    return finished(tmp_path_factory.mktemp("whole") / "run", *words)


def test_a_plan_times_the_segmenter_and_says_what_it_does_not(words):
    plan = planned(*words)
    assert {"segmenter", "Predict", "WriteTile"} <= set(plan["seconds"])
    assert "the selection among" in plan["unknown"][0]


def table(run, step):
    return pq.read_table(run / "steps" / step / "labelled.parquet").to_pylist()


@pytest.mark.more  # test_superpixel.py moves a run in make test
def test_a_moved_run_goes_on_with_its_own_files(whole, words, tmp_path):
    goes_on_elsewhere(whole, words, tmp_path)


def test_rounds_choose_as_many_chips_as_asked_and_say_why(whole):
    assert list(read(str(whole))["steps"]) == STEPS
    rows = table(whole, "round-2")
    assert [row["round"] for row in rows] == [0, 0, 0, 1, 1, 1, 2]
    assert [row["rank"] for row in rows] == list(range(7))
    assert len({row["id"] for row in rows}) == 7
    assert rows[:6] == table(whole, "round-1")
    assert {row["why"] for row in rows} == {"first", "entropy"}
    for row in rows[3:]:
        assert row["taken_for"] in {"ground", "wood", "water"}
        assert 1 / 3 <= row["probability"] <= 1
        assert 0 <= row["score"] <= np.log(3) + 1e-9
    assert rows[3]["score"] >= rows[4]["score"] >= rows[5]["score"]


def test_the_model_is_measured_where_it_was_not_trained_and_maps_every_scene(whole):
    said = read(str(whole))["steps"]
    assert (said["measure"]["part"], said["measure"]["chips"]) == ("validation", 6)
    assert said["segmenter"]["masks"] == 7
    described, _ = bundle.build(whole / "models" / "segmenter")
    assert described.metres is None  # the images have no CRS
    assert [name for _, name, _ in described.classes] == ["ground", "wood", "water"]
    assert len(list(whole.glob("tiles/*/classes.tif"))) == 4
    page = (whole / "report" / "index.html").read_text()
    assert "Trained on 7 masks, chosen by entropy, and 11 chips without." in page
    assert "by which the checkpoint was chosen too" in page
    assert "Chips chosen by entropy" in page
    simple = said["baseline"]["methods"]
    # The drawn classes differ by colour, so the simple methods are hard to beat; four steps do not.
    assert [row["name"].split()[1] for row in simple] == ["linear", "random"]
    assert min(row["value"] for row in simple) > 0.6
    assert f"This model is behind its baseline: mean IoU {said['measure']['mean_iou']:.3f}" in page
    assert (whole / said["baseline"]["pictures"][0][1]).exists()


def test_the_second_run_does_nothing(whole, words):
    before = files(whole)
    assert rayseg(*words, "--out", whole).exit_code == 0
    changed = [name for name, found in files(whole).items() if before.get(name) != found and name != ".lock"]
    assert changed == ["run.json"]


@pytest.mark.more  # test_superpixel.py: a killed training goes on; here: a round, and a step of it
def test_a_killed_run_goes_on_with_the_round_and_the_step_it_was_in(whole, words, tmp_path, monkeypatch):
    learnt, steps, calls = classifier.fit_and_score, s4gan._steps, []

    def falls(step, *arguments, **more):
        calls.append(step.name)
        if calls == ["round-1", "round-2"]:
            raise KeyboardInterrupt
        return learnt(step, *arguments, **more)

    def falls_too(first, *arguments):
        calls.append(first)
        if first == 2 and calls.count(2) == 1:
            raise KeyboardInterrupt
        return steps(first, *arguments)

    monkeypatch.setattr(classifier, "fit_and_score", falls)
    monkeypatch.setattr(s4gan, "_steps", falls_too)
    out = tmp_path / "run"
    codes = [rayseg(*words, "--out", out).exit_code for _ in range(3)]
    assert codes == [130, 130, 0]
    assert calls == ["round-1", "round-2", "round-2", 0, 2, 2]
    assert table(out, "round-2") == table(whole, "round-2")
    sums = [bundle.description(run / "models" / "segmenter").sha256 for run in (out, whole)]
    assert sums[0] == sums[1]


def test_people_draw_what_is_asked_for_round_by_round(tmp_path):
    truth = scenes(tmp_path / "scenes", masks=False)
    (tmp_path / "small.yaml").write_text(SETTINGS)
    out = tmp_path / "run"
    words = ["run", "pipeline", "al-s4gan", "--region", tmp_path / "scenes", "--config", tmp_path / "small.yaml"]
    words += ["--engine", "inline", "--out", out, "--set", "map.tile=256"]
    asked = []
    for number in (3, 3, 1):
        stopped = rayseg(*words)
        assert stopped.exit_code == 3
        said = stopped.stderr.splitlines()[-1]
        assert f"{number} chips need masks, see {out}/to-label/index.html" in said
        wanted = json.loads((out / "to-label" / "request.json").read_text())["chips"]
        fresh = [chip for chip in wanted if chip not in asked]
        assert len(fresh) == number
        pages = json.loads((out / "to-label" / "chips.geojson").read_text())["features"]
        assert {one["id"] for one in pages} == set(wanted)
        drawn = tmp_path / f"drawn-{len(asked)}"
        drawn.mkdir()
        for one in pages:
            place = one["properties"]
            rows, cols = slice(place["row"], place["row"] + 64), slice(place["col"], place["col"] + 64)
            shown = np.asarray(Image.open(out / "to-label" / "images" / f"{one['id']}.png"))
            mask = truth[place["scene"]][rows, cols]
            for value in np.unique(mask):
                assert np.abs(shown[mask == value].mean(0) - COLORS[value]).max() < 5
            Image.fromarray(mask).save(drawn / f"{one['id']}.png")
        told = rayseg("labels", "import", drawn, out)
        assert told.stdout == f"{number} masks imported into {out}, none is missing\n"
        asked += fresh
    found = rayseg(*words)
    assert found.exit_code == 0, found.output
    assert [row["id"] for row in table(out, "round-2")] == [*asked]


@pytest.mark.more  # train/test_frozen.py and test_consistency.py: the learners; here: in their run
@pytest.mark.parametrize("learner", ["network=linear", "network=frozen", "learner=consistency"])
def test_every_learner_gives_a_model_like_any_other(world, words, tmp_path, learner):
    out = tmp_path / "run"
    more = ["--set", "active.strategy=random", "--set", f"segmenter.{learner}", "--set", "baseline=false"]
    found = rayseg(*words, *more, "--out", out)
    assert found.exit_code == 0, found.output
    said = read(str(out))["steps"]
    assert said["segmenter"]["masks"] == 7
    assert said["segmenter"]["measures"]["mean_iou"] == pytest.approx(said["measure"]["mean_iou"])
    assert said["measure"]["mean_iou"] > (0.5 if learner.startswith("network") else 0.1)
    described, _ = bundle.build(out / "models" / "segmenter")
    assert described.architecture.factory == ("pixel-head" if learner.startswith("network") else "segmenter")
    page = (out / "report" / "index.html").read_text()
    assert ("11 chips without" in page) == (learner == "learner=consistency")


@pytest.mark.more  # test_sweep.py: trials, table and report of made runs; here: of real trainings
def test_a_sweep_gives_a_row_per_ratio_and_is_done_once(world, tmp_path):
    out = tmp_path / "sweep"
    words = ["run", "sweep", "al-s4gan", "--region", world / "scenes", "--config", world / "small.yaml"]
    words += ["--ratios", ".2,.35", "--strategies", "random,entropy", "--learners", "s4gan,supervised"]
    words += ["--seeds", "1", "--engine", "inline", "--out", out, "--set", "segmenter.steps=2"]
    found = rayseg(*words)
    assert found.exit_code == 0, found.output
    header, *lines = found.stdout.splitlines()
    assert header.split("  ")[0] == "labels"
    assert [line.split()[0] for line in lines[:2]] == ["4", "7"]
    rows = list(csv.DictReader((out / "trials.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert {(row["ratio"], row["labels"]) for row in rows} == {("0.2", "4"), ("0.35", "7")}
    page = (out / "report" / "index.html").read_text()
    assert "Learning curves" in page
    before = {name: found for name, found in files(out / "trials").items() if not name.endswith(("run.json", ".lock"))}
    assert rayseg(*words).stdout == found.stdout
    again = {name: found for name, found in files(out / "trials").items() if not name.endswith(("run.json", ".lock"))}
    assert again == before
    assert "belongs to a sweep with other settings" in refused(2, *words, "--set", "segmenter.size=32")


def test_active_learning_alone_tells_accuracy_by_number_of_labels(tmp_path):
    for name, color in (("green", (50, 170, 80)), ("blue", (40, 80, 200)), ("brown", (130, 100, 70))):
        (tmp_path / "images" / name).mkdir(parents=True)
        for k in range(8):
            pixels = np.random.default_rng(k).normal(color, 10, (70, 80, 3)).clip(0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{k}.png")
    assert (
        rayseg("ingest", "folder", tmp_path / "images", "--labels", "folder", "--out", tmp_path / "cat").exit_code == 0
    )
    (tmp_path / "small.yaml").write_text(SETTINGS)
    words = ["run", "pipeline", "al-s4gan", "--region", tmp_path / "images", "--config", tmp_path / "small.yaml"]
    words += ["--engine", "inline", "--set", f"pool.chips={tmp_path}/cat/catalog.json#chips", "--set", "segmenter=null"]
    found = rayseg(*words, "--out", tmp_path / "run", "--set", "active.strategy=badge", "--set", "pool.validation=[]")
    assert found.exit_code == 0, found.output
    said = read(str(tmp_path / "run"))["steps"]
    assert [step for step in said if step.startswith("round")] == ["round-0", "round-1", "round-2"]
    assert [labels for labels, _ in said["report"]["curve"]] == [3, 6, 7]
    assert said["last"]["accuracy"] == said["report"]["curve"][-1][1]
    assert said["pool"]["validation"] == 6


@pytest.mark.more
def test_scene_labels_choose_the_images_and_masks_teach(tmp_path):
    # 1. UC Merced in small: images of three scenes in folders, masks of other classes in one folder
    (tmp_path / "masks").mkdir()
    for k in range(18):
        classes = draw(tmp_path, "one", seed=k, size=(64, 64))
        label, name = ("forest", "river", "town")[k % 3], f"{'frt'[k % 3]}{k:02d}.png"
        (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "one" / "images" / "a.png", tmp_path / "images" / label / name)
        Image.fromarray(classes).save(tmp_path / "masks" / name)
    catalog = labels.ingest_folder(tmp_path / "images", tmp_path / "cat", labels="folder")
    (tmp_path / "small.yaml").write_text(SETTINGS)
    words = ["run", "pipeline", "al-s4gan", "--region", f"{catalog}#chips", "--config", tmp_path / "small.yaml"]
    words += ["--engine", "inline", "--set", f"pool.chips={catalog}#chips", "--set", "pool.validation=[]"]
    words += ["--set", "baseline=false", "--set", "segmenter.steps=2"]
    assert "name them by pool.masks" in refused(2, *words, "--out", tmp_path / "no")
    # 2. the classifier knows scenes, the segmenter what the masks show
    words += ["--set", f"pool.masks={tmp_path}/masks"]
    finished(tmp_path / "run", *words)
    said = read(str(tmp_path / "run"))["steps"]
    assert said["pool"]["classes"] == ["forest", "river", "town"]
    classes = [name for _, name, _ in bundle.description(tmp_path / "run" / "models" / "segmenter").classes]
    assert classes == ["ground", "wood", "water"]
    assert said["segmenter"]["masks"] == 6  # .35 of the 15 images of the pool
    assert set(said["measure"]["iou"]) == {"ground", "wood", "water"}
    (tmp_path / "masks" / "f00.png").unlink()
    assert "has no mask called forest-f00 or f00, expected one" in refused(3, *words, "--out", tmp_path / "no")


REFUSALS = {
    "active.ratio=0.1": "ratio 0.1 of 18 images gives 2 to label, fewer than one for each of 3 classes; the least",
    "segmenter.learning.batch=1": "batch norms would see one image at a time",
    "pool.size=256": "ratio 0.35 of 3 images gives 2 to label",
    "pool.validation=[nowhere]": "there is no scene nowhere",
    "segmenter.size=96": "segmenter.size 96 exceeds the chips' 64 px",
    "active.strategy=best": "active.strategy = 'best'",
    "active.classifier.encoder=resnet1001": "encoder 'resnet1001' is neither in",
    "active.classifier.pooling=least": "pooling 'least' is unknown",
    "segmenter.architecture=nonet": "architecture 'nonet' is unknown",
    "segmenter.weights=nowhere.pth": "nowhere.pth cannot be read",
    "crf.near=20": "crf.near = 20: input should be less than or equal to 8",
    "stride=128": "stride 128 is above patch 96",
    "crf={}": "crf refines a decoder; set crf to null, or segmenter.network to decoder",
    "segmenter.reduce=2": "patch 96 is not a multiple of 32 x segmenter.reduce 2",
    "scaling={mean: [1.0], std: [1.0]}": "scaling is of 1 bands",
}


@pytest.mark.parametrize("setting", REFUSALS)
def test_what_cannot_be_meant_is_refused_before_anything_is_written(words, tmp_path, setting):
    more = ["--set", "active.classifier.size=32"] if setting == "segmenter.size=96" else []
    more += ["--set", "segmenter.network=linear"] if setting == "crf={}" else []
    found = rayseg(*words, "--set", setting, *more, "--out", tmp_path / "run")
    assert found.exit_code in {2, 3, 4}
    assert REFUSALS[setting] in found.stderr
    assert not Path(tmp_path / "run").exists()


def test_the_papers_settings_take_the_images_of_uc_merced(tmp_path):
    images = [draw(tmp_path, f"s{k}", seed=k, size=(256, 256)) for k in range(3)]
    tiny = ["segmenter.encoder=test_resnet", "segmenter.weights=none", "segmenter.architecture=unet"]
    tiny += ["active.classifier.encoder=resnet10t", "active.classifier.weights=none"]
    config = load(pipeline.Config, "configs/al-s4gan/paper.yaml", tiny)
    config.expect_trainable()
    chips = chip_pool.find_chips(Region("r", images=str(tmp_path)), config.pool, config.table)
    assert [(row["width"], row["height"]) for row in chips.rows] == [(256, 256)] * len(images)
    assert config.segmenter.size == 320


def test_a_report_counts_chips_without_masks_only_where_they_taught():
    config = pipeline.Config()
    alone = config.model_copy(update={"segmenter": config.segmenter.model_copy(update={"discriminator": None})})
    told = [pipeline._trained_from(settings, masks=7, chips=18) for settings in (config, alone)]
    assert told[0] == "Trained on 7 masks, chosen by entropy, and 11 chips without."
    assert told[1] == "Trained on 7 masks, chosen by entropy."


def test_what_cannot_be_mapped_is_refused_before_anything_is_learnt(words, tmp_path):
    found = rayseg(*words, "--tiles", "nowhere", "--out", tmp_path / "run")
    assert found.exit_code == 2
    assert "has no tile nowhere" in found.stderr
    assert not Path(tmp_path / "run").exists()


def test_masks_that_do_not_fit_are_refused_and_nothing_is_taken(tmp_path):
    scenes(tmp_path / "scenes", masks=False)
    (tmp_path / "small.yaml").write_text(SETTINGS)
    out = tmp_path / "run"
    refused(
        *(3, "run", "pipeline", "al-s4gan", "--region", tmp_path / "scenes", "--config", tmp_path / "small.yaml"),
        *("--engine", "inline", "--out", out),
    )
    chips = sorted(json.loads((out / "to-label" / "request.json").read_text())["chips"])
    cases = {
        "size": (np.zeros((60, 64), np.uint8), "is 60 x 64 px, its chip 64 x 64"),
        "value": (np.full((64, 64), 7, np.uint8), "mask value 7"),
        "color": (np.full((64, 64, 3), 9, np.uint8), "mask colour #090909"),
        "blank": (np.full((64, 64), 255, np.uint8), "has no labelled pixel"),
    }
    for name, (mask, why) in cases.items():
        (tmp_path / name).mkdir()
        Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / name / f"{chips[0]}.png")
        Image.fromarray(mask).save(tmp_path / name / f"{chips[1]}.png")
        assert why in refused(3, "labels", "import", tmp_path / name, out)
        assert not (out / "masks").exists()
    (tmp_path / "other").mkdir()
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "other" / "unasked.png")
    assert "1 masks in" in refused(3, "labels", "import", tmp_path / "other", out)
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(tmp_path / "size" / f"{chips[1]}.png")
    told = rayseg("labels", "import", tmp_path / "size", out)
    assert f"2 masks imported into {out}, 1 chips without a mask: {chips[2]}" in told.stdout
    Image.fromarray(np.ones((64, 64), np.uint8)).save(tmp_path / "size" / f"{chips[1]}.png")
    assert "has another mask of" in refused(3, "labels", "import", tmp_path / "size", out)
