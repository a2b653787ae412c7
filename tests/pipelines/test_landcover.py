"""landcover end to end on a tiny landscape: from scenes with masks to a measured map, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from fake_run import blobs
from PIL import Image
from small_world import (
    GRID,
    HEIGHT,
    WIDTH,
    files,
    finished,
    goes_on_elsewhere,
    planned,
    rayseg,
    refused,
    scene,
    segmenter,
    valid_stac,
    window_at,
)

from rayseg.engine.manifest import write_rows
from rayseg.engine.run import Engine, Step, read
from rayseg.io import cog, scenes
from rayseg.models import bundle
from rayseg.models.precision import is_fast
from rayseg.pipelines import landcover
from rayseg.vision.color import ClassTable, hex_of

pytestmark = pytest.mark.e2e

STEPS = ["scenes", "segmenter", "validation", "baseline", "predict", "generalize", "polygons"]
STEPS += ["evaluate", "publish", "qgis", "certificate", "report"]
SMALL = """
labelled: {masks: "#truth/landcover", validation: [demo-east], absent: [unknown]}
classes: deepglobe
segmenter:
  architecture: linknet
  encoder: test_resnet
  weights: none
  reduce: 2
  epochs: 2
  schedule: {rate: 3.0e-3}
  sampling: {size: 128, rare: 0.3, windows: 16}
  learning: {batch: 4, optimizer: adamw}
patch: 192
stride: 128
map: {tile: 512}
truth: "#truth/landcover"
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory, demo_region):
    """The command but for --out, on a landscape of 512 x 1024 px."""
    root = tmp_path_factory.mktemp("world")
    (root / "small.yaml").write_text(SMALL)
    return (
        *("run", "pipeline", "landcover", "--region", demo_region, "--config", root / "small.yaml"),
        *("--engine", "inline"),
    )


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    """A run that nothing disturbed."""
    return finished(tmp_path_factory.mktemp("whole") / "run", *words)


def test_a_plan_times_training_and_validation(words):
    plan = planned(*words)
    assert {"segmenter", "CompareTile", "Predict", "WriteTile"} <= set(plan["seconds"])
    assert plan["wall_seconds"] > plan["seconds"]["segmenter"] + plan["seconds"]["Predict"]


@pytest.mark.more  # test_superpixel.py moves a run in make test
def test_a_moved_run_goes_on_with_its_own_files(whole, words, tmp_path):
    goes_on_elsewhere(whole, words, tmp_path)


def test_all_steps_are_done_and_leave_what_they_should(whole):
    said = read(str(whole))
    assert said["status"] == "done"
    assert list(said["steps"]) == STEPS
    listed = said["steps"]["scenes"]
    assert [listed[part]["scenes"] for part in ("training", "validation")] == [["demo-west"], ["demo-east"]]
    described = bundle.build(str(whole / "models" / "segmenter"))[0]
    assert [name for _, name, _ in described.classes][:2] == ["urban", "agriculture"]
    assert 0 < described.metrics["mean_iou"] < 1
    assert (described.bf16 is not None) == is_fast()  # on validation images
    valid_stac(whole / "collection.json")


def test_the_validation_scenes_are_measured_apart_from_the_map(whole):
    said = read(str(whole))["steps"]
    validated, measured = said["validation"], said["evaluate"]
    assert validated["truth"] == "the validation scenes demo-east"
    assert 200_000 < validated["pixels"] < measured["pixels"]
    assert np.array(validated["confusion"]).shape == (7, 7)
    assert len(validated["worst"]) == min(6, validated["units"])
    rights = [one["right"] for one in validated["worst"]]
    assert rights == sorted(rights)
    page = (whole / "report" / "index.html").read_text()
    assert "1 image of 1 scene to learn from" in page
    assert "Among the worst" in page
    for one in validated["worst"]:
        with Image.open(whole / one["picture"]) as picture:
            assert picture.width % 3 == 0
            assert 32 <= picture.height <= 512


def test_simple_methods_stand_beside_the_model_on_the_same_pixels(whole):
    said = read(str(whole))
    simple, validated = said["steps"]["baseline"], said["steps"]["validation"]
    assert [row["name"].split()[1] for row in simple["methods"]] == ["linear", "random"]
    assert simple["where"] == validated["truth"]
    present = {row["name"] for row in validated["classes"] if row["reference"]}
    for row in simple["methods"]:
        assert set(row["parts"]) == present
        assert 0 < row["value"] < 1
        assert row["seconds"] > 0
    page = (whole / "report" / "index.html").read_text()
    own, best = validated["overall"]["mean_iou"]["value"], max(row["value"] for row in simple["methods"])
    behind = f"This model is behind its baseline: mean IoU {own:.3f}"
    assert (behind in page) == said["steps"]["report"]["summary"].startswith(behind) == (best > own)
    with Image.open(whole / simple["pictures"][0][1]) as picture:
        panel = (picture.width - 4 * 6) // 5  # imagery, mask, this model and two methods
        assert picture.width == 5 * panel + 4 * 6
        # The second panel is the mask, the third the segmenter's map: they differ somewhere.
        rgb = np.asarray(picture.convert("RGB")).astype(int)
        assert np.abs(rgb[:, panel + 6 : 2 * panel + 6] - rgb[:, 2 * (panel + 6) : 3 * panel + 12]).max() > 60


def test_the_map_has_the_imagerys_pixels_and_the_tables_colours(whole, words):
    seen = mapped = 0
    for path in Path(words[4]).parent.glob("imagery/*.tif"):
        with rasterio.open(path) as file:
            seen += int((file.read_masks(1) > 0).sum())
    for path in whole.glob("tiles/*/classes.tif"):
        with rasterio.open(path) as file:
            mapped += int((file.read(1) != 255).sum())
            assert file.colormap(1)[1][:3] == (255, 255, 0)
            assert file.res == (1.0, 1.0)
    assert mapped == seen > 0


def test_the_second_run_does_nothing(whole, words):
    before = files(whole)
    assert rayseg(*words, "--out", whole).exit_code == 0
    changed = [name for name, found in files(whole).items() if before.get(name) != found and name != ".lock"]
    assert changed == ["run.json"]


@pytest.mark.parametrize("masks", ["png", "tif", "both"])
def test_georeferenced_scenes_are_validated_whether_their_masks_say_where_they_are_or_not(tmp_path, masks):
    table = ClassTable(((0, "wood", (0, 99, 0)), (1, "field", (230, 159, 0))))
    (tmp_path / "scenes/masks").mkdir(parents=True)
    for number, name in enumerate(("east", "west")):
        scene(tmp_path / "scenes/images" / f"{name}.tif", col=WIDTH * number, seed=number, margin=0)
        mask_HW = blobs(HEIGHT, WIDTH, seed=number)
        if masks == "png" or (masks == "both" and number):
            Image.fromarray(mask_HW).save(tmp_path / "scenes/masks" / f"{name}.png")
        else:
            place = window_at(0, WIDTH * number)
            cog.write_classes(tmp_path / "scenes/masks" / f"{name}.tif", mask_HW, GRID, place, table)
    rows = [{"name": name, "color": hex_of(color)} for _, name, color in table.classes]
    config = landcover.Config(classes={"classes": rows}, map={"tile": 128})
    images = scenes.labelled_images(str(tmp_path / "scenes"), table=table)
    listed = Step("scenes", str(tmp_path / "run"), "", Engine("inline"), {"validation": {"scenes": ["east", "west"]}})
    rows = [one.to_row() | {"part": "validation", "counts": "[]"} for one in images]
    write_rows(listed.prefix / "images.parquet", rows)
    model = Step("model", listed.root, "", listed.engine, {"bundle": segmenter(tmp_path / "model", classes=2)})
    found = landcover.validate(Step("validation", listed.root, "", listed.engine), listed, model, config)
    assert found["troubles"] == {}
    assert found["pixels"] == 2 * HEIGHT * WIDTH
    truth = np.bincount(np.concatenate([blobs(HEIGHT, WIDTH, seed=number).ravel() for number in (0, 1)]))
    assert np.array(found["confusion"]).sum(axis=1).tolist() == truth.tolist()
    assert found["worst"]


@pytest.mark.more  # train/test_frozen.py and models/test_pixel_head.py: learning and the model; here: in their run
@pytest.mark.parametrize("network", ["linear", "frozen"])
def test_a_head_on_frozen_features_is_a_model_like_any_other(tmp_path, network):
    for number, name in enumerate(("a", "b")):
        rng = np.random.default_rng(number)
        classes_HW = np.kron(rng.integers(0, 2, (4, 4)), np.ones((32, 32))).astype(np.uint8)
        image_HWC = np.where(classes_HW[..., None], (60, 160, 60), (150, 120, 90)) + rng.integers(
            -20, 21, (128, 128, 3)
        )
        for kind, array in (("images", image_HWC.astype(np.uint8)), ("masks", classes_HW)):
            (tmp_path / "scenes" / name / kind).mkdir(parents=True)
            Image.fromarray(array).save(tmp_path / "scenes" / name / kind / "0.png")
    (tmp_path / "c.yaml").write_text(f"""
classes: {{classes: [{{name: soil, color: "#967859"}}, {{name: wood, color: "#3ca03c"}}]}}
labelled: {{validation: [b]}}
segmenter: {{network: {network}, encoder: tf_efficientnet_lite0, weights: packaged, sampling: {{size: 128}}}}
patch: 128
stride: 96
baseline: false
""")
    out = tmp_path / "run"
    config = ("--config", tmp_path / "c.yaml", "--set", "segmenter.head={steps: 60, flips: 2}", "--engine", "inline")
    found = rayseg("run", "pipeline", "landcover", "--region", tmp_path / "scenes", *config, "--out", out)
    assert found.exit_code == 0, found.output
    described, net = bundle.build(str(out / "models" / "segmenter"))
    assert described.architecture.factory == "pixel-head"
    assert described.architecture.options["flips"] == net.flips == 2
    assert described.architecture.options["hidden"] == (0 if network == "linear" else 192)
    assert described.scaling.mean == (127.0,) * 3
    assert described.metrics["mean_iou"] > 0.8
    assert read(str(out))["steps"]["validation"]["overall"]["mean_iou"]["value"] > 0.8
    assert "baseline" not in read(str(out))["steps"]
    images = tmp_path / "scenes" / "a" / "images"
    again = rayseg("predict", out / "models/segmenter", images, "--out", tmp_path / "p", "--engine", "inline")
    assert again.exit_code == 0, again.output
    [mapped] = (tmp_path / "p").glob("tiles/*/classes.tif")
    truth_HW = np.asarray(Image.open(tmp_path / "scenes" / "a" / "masks" / "0.png"))
    assert (cog.read_bands(mapped)[0] == truth_HW).mean() > 0.9


# -- what is refused, before anything is written ----------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Two scenes of two images each; their masks hold the first two classes, as colours."""
    colors = np.array([(0, 255, 255), (255, 255, 0)], np.uint8)
    for name in ("a", "b"):
        for sub in ("images", "masks"):
            (tmp_path / "scenes" / name / sub).mkdir(parents=True)
        for number in range(2):
            classes = np.indices((96, 96)).sum(0) // 48 % 2
            rng = np.random.default_rng(number)
            image = rng.integers(1, 255, (96, 96, 3)).astype(np.uint8)
            Image.fromarray(image).save(tmp_path / "scenes" / name / "images" / f"{number}.png")
            Image.fromarray(colors[classes]).save(tmp_path / "scenes" / name / "masks" / f"{number}.png")
    return tmp_path / "scenes"


ABSENT = "labelled.absent=[rangeland, forest, water, barren, unknown]"
NET = ("--set", "segmenter.weights=none", "--set", "segmenter.encoder=mobilenet_v2", "--engine", "inline")


def words_for(folder, *settings):
    given = [part for setting in settings for part in ("--set", setting)]
    return ("run", "pipeline", "landcover", "--region", folder, *NET, *given, "--out", folder.parent / "run")


@pytest.mark.parametrize(("settings", "said"), [
    ((), "class rangeland has no pixel in any mask"),
    ((ABSENT, "labelled.validation=[c]"), "there is no scene c, the scenes are a, b"),
    ((ABSENT, "labelled.validation=[a, b]"), "expected one or more for training"),
    ((ABSENT, "classes=dubai", "labelled.absent=[]"), "mask colour #"),
    ((ABSENT, "segmenter.learning.batch=1"), "batch norms would see one image at a time"),
    ((ABSENT, "workers=3"), "cannot be shared by 3 workers"),
    ((ABSENT, "patch=96", "stride=64", "segmenter.reduce=2", "segmenter.sampling.size=64"), "patch 96 is not a"),
    ((ABSENT, "stride=2048"), "stride 2048 is above patch 1024"),
    ((ABSENT, "bands=[red]"), "1 bands but scaling of 3"),
    ((ABSENT, "segmenter.loss.weights=[1, 1]"), "loss.weights has 2 values, expected 7"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_scenes_are_refused(folder, settings, said):
    assert said in refused(3 if "labelled" in str(settings[1:]) or not settings else 2, *words_for(folder, *settings))
    assert not (folder.parent / "run").exists()


def test_masks_that_do_not_fit_are_refused(folder):
    wrong = folder / "b" / "masks" / "1.png"
    Image.fromarray(np.zeros((96, 95, 3), np.uint8)).save(wrong)
    assert "has 96 x 96 px, its mask" in refused(3, *words_for(folder, ABSENT))
    image = np.zeros((96, 96, 3), np.uint8)
    image[..., 0] = 255
    for path in folder.glob("*/masks/*.png"):  # of one alone, the others are used
        Image.fromarray(image).save(path)
    assert "mask colour #FF0000 (9216 pixels" in refused(3, *words_for(folder, ABSENT))
    shutil.rmtree(folder / "a" / "masks")
    shutil.rmtree(folder / "b" / "masks")
    assert "none of the 4 images of" in refused(3, *words_for(folder, ABSENT))
    assert not (folder.parent / "run").exists()


def test_a_split_that_leaves_a_class_out_is_refused(folder):
    for path in (folder / "a" / "masks").iterdir():
        Image.fromarray(np.full((96, 96, 3), (0, 255, 255), np.uint8)).save(path)
    said = refused(3, *words_for(folder, ABSENT, "labelled.validation=[b]"))
    assert "the split leaves class agriculture out" in said
    assert "(a), all are in b" in said


def test_a_region_without_scenes_says_how_to_name_some(tmp_path):
    (tmp_path / "area.geojson").write_text(
        json.dumps({"type": "Polygon", "coordinates": [[[0, 0], [0, 1], [1, 1], [0, 0]]]})
    )
    said = refused(
        2, "run", "pipeline", "landcover", "--region", tmp_path / "area.geojson", *NET, "--out", tmp_path / "r"
    )
    assert "names no images; name a folder of images and masks with --set labelled.source=FOLDER" in said
