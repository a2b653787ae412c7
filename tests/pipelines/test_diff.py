"""diff from the command line: the changes between two runs, whatever their tiles."""

import shutil

import geopandas
import numpy as np
import pytest
from fake_run import blobs, picture
from PIL import Image
from small_world import GRID, catalogue, damage, mosaic, rayseg, refused

from rayseg.engine.run import read
from rayseg.io import cog
from rayseg.io.maps import mapped_tiles
from rayseg.models import bundle
from rayseg.steps.diff import changes_of
from rayseg.vision.color import ClassTable

PIXELS = ("--set", "polygons.min_area=null", "--set", "polygons.simplify=null")


def made(*words):
    found = rayseg(*words, "--engine", "inline")
    assert found.exit_code == 0, found.output
    return found.output


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """Runs of two models over a scene, in tiles of 128 and of 2048 px."""
    root = tmp_path_factory.mktemp("world")
    region = catalogue(root / "imagery", scene={})
    described, model = bundle.build(tiny_model)
    bundle.save(root / "model", described.model_copy(update={"threshold": 0.7}), model)
    made("predict", tiny_model, region, "--out", root / "loose", "--set", "map.tile=128")
    made("predict", root / "model", region, "--out", root / "strict", "--set", "map.tile=2048")
    return root


def test_changes_are_those_of_the_pixels_whatever_the_tiles(world, tmp_path):
    made("diff", world / "loose", world / "strict", "--out", tmp_path / "diff", *PIXELS)
    before, after, found = (mosaic(root)[0] for root in (world / "loose", world / "strict", tmp_path / "diff"))
    lost = (before == 1) & (after == 0)
    assert lost.any()
    assert (found[before != 255] == np.where(lost, 3, 0)[before != 255]).all()
    assert ((found == 255) == (before == 255)).all()
    shares = read(str(tmp_path / "diff"))["steps"]["report"]["shares"]
    assert shares["gpc to background"] == pytest.approx(lost.sum() / (before != 255).sum(), rel=1e-3)
    assert shares["background to gpc"] == shares["in one map only"] == 0
    # polygons are those of the changes
    frame = geopandas.read_parquet(tmp_path / "diff/changes.parquet")
    assert set(frame["name"]) == {"gpc to background"}
    assert frame["pixels"].sum() == lost.sum()
    assert frame.to_crs(GRID.crs).area.sum() == pytest.approx(lost.sum(), rel=2e-3)
    page = (tmp_path / "diff/report/index.html").read_text()
    assert f"Compared: {world}/loose and then {world}/strict" in page


def test_a_map_in_other_tiles_has_not_changed(world, tmp_path):
    made("remap", world / "strict", "--set", "threshold=.5", "--out", tmp_path / "again")
    made("diff", world / "loose", tmp_path / "again", "--out", tmp_path / "diff", "--set", "tile=96")
    assert set(np.unique(mosaic(tmp_path / "diff")[0])) == {0, 255}
    assert geopandas.read_parquet(tmp_path / "diff/changes.parquet").empty


@pytest.mark.more  # the same comparison of pixels, image by image
def test_images_without_georeference_are_compared_image_by_image(world, tiny_model, tmp_path):
    for number in range(2):
        image = picture(blobs(150, 130, seed=number), seed=number).transpose(1, 2, 0)
        (tmp_path / "images").mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / f"images/{number}.png")
    made("predict", tiny_model, tmp_path / "images", "--out", tmp_path / "a", "--set", "map.tile=64")
    made("predict", world / "model", tmp_path / "images", "--out", tmp_path / "b")
    made("diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "diff", "--set", "tile=100", *PIXELS)
    counts = {}
    for name in ("a", "b", "diff"):
        values = [cog.read_bands(tile.href)[0].ravel() for tile in mapped_tiles(tmp_path / name)]
        counts[name] = np.bincount(np.concatenate(values), minlength=256)
    assert counts["diff"][3] == counts["a"][1] - counts["b"][1] > 0
    assert counts["diff"][0] == 2 * 150 * 130 - counts["diff"][3]


@pytest.mark.more  # several runs
def test_a_run_that_is_made_again_is_compared_again(world, tiny_model, tmp_path):
    region = catalogue(tmp_path / "imagery", scene={"seed": 4})
    words = ("predict", tiny_model, region, "--set", "map.tile=128", "--out")
    made(*words, tmp_path / "a")
    made("remap", tmp_path / "a", "--set", "threshold=.52", "--out", tmp_path / "b")
    made("diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "diff")
    before = mosaic(tmp_path / "diff")[0]
    shutil.rmtree(tmp_path / "b")
    made("remap", tmp_path / "a", "--set", "threshold=.6", "--out", tmp_path / "b")
    made("diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "diff")
    assert (mosaic(tmp_path / "diff")[0] == 3).sum() > (before == 3).sum()


@pytest.mark.more  # two runs with a damaged scene
def test_ground_of_failed_tiles_is_named(tiny_model, tmp_path):
    region = catalogue(tmp_path / "imagery", whole={}, broken={"row": 400})
    damage(tmp_path / "imagery/broken.tif")
    words = ("predict", tiny_model, region, "--set", "map.tile=128", "--engine", "inline", "--out")
    assert rayseg(*words, tmp_path / "a").exit_code == 3
    assert (
        rayseg(
            "remap", tmp_path / "a", "--set", "threshold=.7", *("--engine", "inline"), "--out", tmp_path / "b"
        ).exit_code
        == 3
    )
    made("diff", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "diff")
    assert f"9 tiles of {tmp_path}/a have no map" in (tmp_path / "diff/report/index.html").read_text()


def test_classes_are_compared_by_name():
    before = ClassTable(((0, "land", (0, 0, 0)), (1, "water", (0, 0, 9))))
    after = ClassTable(((0, "water", (0, 0, 9)), (4, "land", (0, 9, 0)), (5, "roof", (9, 0, 0))))
    table, codes = changes_of(before, after)
    names = {value: name for value, name, _ in table.classes}
    assert (codes[0, 4], codes[1, 0]) == (0, 0)
    assert names[codes[0, 0]] == "land to water"
    assert names[codes[1, 5]] == "water to roof"
    assert (names[codes[255, 5]], names[codes[1, 255]], codes[255, 255]) == ("in one map only", "in one map only", 255)


def test_one_run_and_what_is_no_run_are_refused(world, tmp_path):
    words = ("--out", tmp_path / "diff", "--engine", "inline")
    assert "both runs are" in refused(2, "diff", world / "loose", world / "loose", *words)
    assert "is not a run" in refused(2, "diff", world / "loose", tmp_path / "none", *words)
    two = (world / "loose", world / "strict")
    assert "polygons.min_area is 1000000000 m2" in refused(2, "diff", *two, *words, "--set", "polygons.min_area=1e9")
    assert not (tmp_path / "diff").exists()
