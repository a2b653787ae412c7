"""remap from the command line: another map from the scores of a finished run, as a whole run would have made it."""

import json

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import Transformer
from small_world import GRID, catalogue, damage, files, mosaic, rayseg, refused, segmenter
from small_world import window_at as window

from rayseg.engine.run import read, verify
from rayseg.models import bundle


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A finished run in tiles of 128 px over a scene, and its catalogue."""
    root = tmp_path_factory.mktemp("world")
    made = {"catalogue": catalogue(root / "imagery", scene={}), "model": tiny_model, "run": root / "run"}
    predict(made["model"], made["catalogue"], made["run"])
    return made


def predict(model, region, out, *more, code=0):
    found = rayseg("predict", model, region, "--out", out, "--engine", "inline", "--set", "map.tile=128", *more)
    assert found.exit_code == code, found.output


def remap(run, out, *settings, code=0):
    words = [word for setting in settings for word in ("--set", setting)]
    found = rayseg("remap", run, "--out", out, "--engine", "inline", *words)
    assert found.exit_code == code, found.output
    return found.output


def test_a_remapped_run_is_the_run_that_a_model_with_this_threshold_makes(world, tmp_path):
    # 1. the model with another threshold
    described, model = bundle.build(world["model"])
    stricter = described.model_copy(update={"threshold": 0.7})
    bundle.save(tmp_path / "model", stricter, model)
    predict(tmp_path / "model", world["catalogue"], tmp_path / "whole")
    # 2. the same files, without it
    remap(world["run"], tmp_path / "new", "threshold=.7")
    kinds = ("tiles/*/*.tif", "tiles/*/parts.parquet", "polygons.parquet")
    made, whole = (
        {p.relative_to(root): p.read_bytes() for kind in kinds for p in sorted(root.glob(kind))}
        for root in (tmp_path / "new", tmp_path / "whole")
    )
    assert made.keys() == whole.keys()
    assert [path for path in whole if made[path] != whole[path]] == []
    assert 0 < (mosaic(tmp_path / "new")[0] == 1).sum() < (mosaic(world["run"])[0] == 1).sum()
    # 3. lineage, verification, and a second call that does nothing
    page = (tmp_path / "new/report/index.html").read_text()
    assert f"Decided again from the scores of {world['run']}" in page
    assert f"A pixel has the class above 0.7; there it is above {described.threshold:g}." in page
    items = sorted((tmp_path / "new/tiles").glob("*/*.json"))
    assert "tiny" in json.dumps([json.loads(item.read_text())["links"] for item in items])
    assert verify(str(tmp_path / "new"), deep=True)["damaged"] == {}
    before = files(tmp_path / "new/tiles")
    remap(world["run"], tmp_path / "new", "threshold=.7")
    assert files(tmp_path / "new/tiles") == before


@pytest.mark.more  # stages/test_reclassify.py has the arrays
def test_merged_and_dropped_classes_of_a_map_of_three(world, tmp_path):
    model = segmenter(tmp_path / "model", classes=3)
    predict(model, world["catalogue"], tmp_path / "run")
    before = mosaic(tmp_path / "run")[0]
    remap(tmp_path / "run", tmp_path / "merged", "classes.merge={both: [kind-2, kind-0]}")
    merged = mosaic(tmp_path / "merged")[0]
    assert (merged == np.where(before == 0, 2, before)).all()
    assert set(read(str(tmp_path / "merged"))["steps"]["report"]["shares"]) == {"kind-1", "both"}
    remap(tmp_path / "run", tmp_path / "dropped", "classes.drop=[kind-1]")
    dropped, scores = mosaic(tmp_path / "dropped")[0], mosaic(tmp_path / "run", "scores")
    # of two classes none is a background, so none has the value 0
    expected = np.where(before == 1, np.where(scores[2] > scores[0], 2, 1), np.where(before == 0, 1, before))
    assert (dropped == expected).all()
    summary = read(str(tmp_path / "dropped"))["steps"]["report"]["summary"]
    assert "kind-0" in summary
    assert "kind-2" in summary
    assert set(geopandas.read_parquet(tmp_path / "dropped/polygons.parquet")["class"]) == {1, 2}


def test_a_remapped_map_ends_at_the_polygons_of_inside(world, tmp_path):
    left, bottom, right, top = GRID.bounds(window(50, 40, 90, 70))
    lonlat = Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True)
    box = shapely.transform(shapely.box(left, bottom, right, top), lambda xy: np.stack(lonlat.transform(*xy.T), axis=1))
    (tmp_path / "inside.geojson").write_text(shapely.to_geojson(box))
    remap(world["run"], tmp_path / "new", f"inside={tmp_path}/inside.geojson")
    old, new = mosaic(world["run"])[0], mosaic(tmp_path / "new")[0]
    inside = np.zeros_like(old, bool)
    inside[50:140, 40:110] = True
    assert (new[inside] == old[inside]).all()
    assert (new[~inside] == 255).all()


@pytest.mark.more  # two runs and their retries
def test_tiles_that_failed_before_fail_again_by_name(world, tmp_path):
    region = catalogue(tmp_path / "imagery", whole={}, broken={"row": 400})
    whole = damage(tmp_path / "imagery/broken.tif")
    predict(world["model"], region, tmp_path / "run", code=3)
    output = remap(tmp_path / "run", tmp_path / "new", "threshold=.7", code=3)
    failed = read(str(tmp_path / "run"))["steps"]["predict"]["troubles"]
    assert read(str(tmp_path / "new"))["steps"]["predict"]["troubles"].keys() == failed.keys()
    assert f"first: rayseg retry {tmp_path}/run" in " ".join(output.split())
    # once the run is whole, so is a retry of what was made from it
    (tmp_path / "imagery/broken.tif").write_bytes(whole)
    for root in ("run", "new"):
        assert rayseg("retry", tmp_path / root, "--engine", "inline").exit_code == 0
    tiles = [{path.parent.name for path in (tmp_path / root).glob("tiles/*/classes.tif")} for root in ("run", "new")]
    assert tiles[0] == tiles[1]
    assert failed.keys() <= tiles[1]


def test_what_a_map_cannot_be_made_from_is_refused_before_anything_is_written(world, tmp_path):
    def words(*settings, run=world["run"]):
        chosen = [word for setting in settings for word in ("--set", setting)]
        return ["remap", run, "--out", tmp_path / "new", "--engine", "inline", *chosen]

    assert "nothing is to change" in refused(2, *words())
    assert "nothing is to change" in refused(2, *words("polygons.min_area=25"))
    assert "polygons.min_area is 1000000000 m2" in refused(2, *words("polygons.min_area=1e9"))
    assert "classes kind-9 are not in" in refused(2, *words("classes.drop=[kind-9]"))
    assert "1 class would remain" in refused(2, *words("classes.merge={all: [background, gpc]}"))
    assert "has one score band (gpc)" in refused(2, *words("classes.drop=[gpc]"))
    assert "names gpc twice" in refused(2, *words("classes={merge: {a: [gpc, background]}, drop: [gpc]}"))
    assert "is not a run" in refused(2, *words("threshold=.7", run=tmp_path / "none"))
    assert "leave #classes out" in refused(2, *words("threshold=.7", run=f"{world['run']}#classes"))
    assert "meets no tile" in refused(3, *words("inside=10,10,11,11"))
    assert not (tmp_path / "new").exists()
    for out in (world["run"], world["run"] / "sub"):
        assert "which is only read" in refused(2, "remap", world["run"], "--out", out, "--set", "threshold=.7")


@pytest.mark.more  # another run
def test_polygons_off_the_region_are_refused(world, tmp_path):
    words = ["--set", "inside=10,10,11,11", "--out", tmp_path / "new", "--engine", "inline"]
    assert "does not meet the region" in refused(3, "remap", _over_a_box(world, tmp_path), *words)


def _over_a_box(world, tmp_path):
    """A run over a region with an area."""
    west, south, east, north = Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True).transform_bounds(
        *GRID.bounds(window(20, 20, 90, 90))
    )
    area = {"type": "Feature", "properties": {"catalog": world["catalogue"].split("#")[0]}}
    area["geometry"] = json.loads(shapely.to_geojson(shapely.box(west, south, east, north)))
    (tmp_path / "area.geojson").write_text(json.dumps(area))
    predict(world["model"], tmp_path / "area.geojson", tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.more  # stages/test_refine.py has the arrays
def test_a_map_follows_the_segments_of_its_imagery(world, tmp_path):
    chosen = ["refine.stride=64", "refine.patch=96", "refine.superpixels.scales=[150]", "refine.superpixels.least=40"]
    chosen.append("refine.superpixels.contrast=0")
    remap(world["run"], tmp_path / "new", *chosen)
    before, after = mosaic(world["run"])[0], mosaic(tmp_path / "new")[0]
    assert (before == 255).tolist() == (after == 255).tolist()
    assert 0.02 < (before != after).mean() < 0.5
    scores = mosaic(tmp_path / "new", "scores")[0]
    threshold = bundle.description(world["model"]).threshold
    assert ((after == 1) == ((scores > threshold * 254) & (after != 255))).all()
    # neighbours in a segment have one score
    own = mosaic(world["run"], "scores")[0]
    alike, together = ((of[after != 255][1:] == of[after != 255][:-1]).mean() for of in (own, scores))
    assert together > 0.5 > alike
    assert "(felzenszwalb) has one class" in (tmp_path / "new/report/index.html").read_text()
    # the tiles make no difference
    predict(world["model"], world["catalogue"], tmp_path / "large", "--set", "map.tile=192")
    remap(tmp_path / "large", tmp_path / "other", *chosen)
    assert (mosaic(tmp_path / "other")[0] == after).all()
    words = ["remap", world["run"], "--out", tmp_path / "no", "--engine", "inline", "--set"]
    assert "refine.stride is 1024, expected a divisor of 128" in refused(2, *words, "refine={}")
    assert "above stride 1024 by an even number" in refused(2, *words, "refine={patch: 1024}")
