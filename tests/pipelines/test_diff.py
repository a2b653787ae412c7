"""diff from the command line: the changes between two runs, whatever their tiles."""

import geopandas
import numpy as np
import pytest
from small_world import GRID, catalogue, mosaic, rayseg, refused

from rayseg.engine.run import read
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
    assert "is not a run" in refused(2, "diff", world / "loose", tmp_path, *words)
    assert not (tmp_path / "diff").exists()
