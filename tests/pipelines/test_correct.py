"""correct from the command line: the map follows clicks where they are, and stays what it was elsewhere."""

import json

import numpy as np
import pytest
import shapely
from pydantic import ValidationError
from pyproj import Transformer
from small_world import GRID, catalogue, files, mosaic, rayseg, refused, segmenter
from small_world import window_at as window

from rayseg.engine.run import read, verify
from rayseg.errors import ConfigError, DataError
from rayseg.io.clicks import read_clicks
from rayseg.io.maps import mapped_tiles
from rayseg.models import bundle
from rayseg.stages.embed import Embed
from rayseg.stages.predict import lattice_of
from rayseg.stages.rows import TileRow
from rayseg.steps.fine_tune import training_of
from rayseg.train.correction import CorrectionConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A finished run of three classes in tiles of 128 px over a scene, and its catalogue."""
    root = tmp_path_factory.mktemp("world")
    made = {"catalogue": catalogue(root / "imagery", scene={}), "model": segmenter(root / "model", classes=3)}
    words = ("--out", root / "run", "--engine", "inline", "--set", "map.tile=128")
    found = rayseg("predict", made["model"], made["catalogue"], *words)
    assert found.exit_code == 0, found.output
    return made | {"run": root / "run"}


def lonlat(row, col):
    """Longitude and latitude of the middle of a pixel of the scene."""
    x, y = GRID.transform(window(row, col, 1, 1)) @ (0.5, 0.5)
    return Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True).transform(x, y)


def click(name, *places, **more):
    """A feature: a point, or a stroke through (row, col) of the scene."""
    geometry = (
        shapely.Point(lonlat(*places[0])) if len(places) == 1 else shapely.LineString([lonlat(*p) for p in places])
    )
    return {
        "type": "Feature",
        "geometry": json.loads(shapely.to_geojson(geometry)),
        "properties": {"class": name, **more},
    }


def clicks(path, *features):
    path.write_text("".join(json.dumps(feature) + "\n" for feature in features))
    return path


def correct(run, path, out, *settings, code=0):
    words = [word for setting in settings for word in ("--set", setting)]
    found = rayseg("correct", run, "--clicks", path, "--out", out, "--engine", "inline", *words)
    assert found.exit_code == code, found.output
    return found.stdout


def test_the_map_follows_clicks_and_stays_elsewhere(world, tmp_path):
    before = mosaic(world["run"])[0]
    untouched = files(world["run"])
    made = clicks(tmp_path / "clicks.geojsonl", click("kind-2", (100, 40)), click("kind-2", (60, 90), (60, 120)))
    weak = ("head.reach=.2", "head.kept=1")
    output = correct(world["run"], made, tmp_path / "new", *weak)
    # 1. the class of the stroke, and what does not resemble it
    after = mosaic(tmp_path / "new")[0]
    assert (before[60, 90:121] == 2).mean() < 0.6
    assert (after[60, 90:121] == 2).mean() > 0.8
    changed = (after != before) & (before != 255)
    assert 0 < changed.sum() < 0.5 * (before != 255).sum()
    assert ((after == 255) == (before == 255)).all()
    same = (mosaic(tmp_path / "new", "scores") == mosaic(world["run"], "scores")).all(axis=0) & (before != 255)
    assert same.sum() > 0.2 * (before != 255).sum()
    # 2. the run that it is from is untouched, and named
    assert files(world["run"]) == untouched
    assert str(world["run"]) in (tmp_path / "new/report/index.html").read_text()
    assert "corrected by 2 clicks" in (tmp_path / "new/report/index.html").read_text()
    before_right, after_right = read(str(tmp_path / "new"))["steps"]["head"]["right"]
    assert before_right < after_right
    described = bundle.description(tmp_path / "new/models/segmenter")
    assert described.provenance.parents == (f"{world['model']}/item.json",)
    assert read(str(tmp_path / "new"))["steps"]["predict"]["bundle"] == f"{tmp_path}/new/models/segmenter"
    kept = json.loads((tmp_path / "new/steps/clicks/clicks.geojson").read_text())["features"]
    assert [feature["properties"]["class"] for feature in kept] == ["kind-2", "kind-2"]
    assert verify(str(tmp_path / "new"), deep=True)["damaged"] == {}
    # 3. a second call does nothing
    tiles = files(tmp_path / "new/tiles")
    assert correct(world["run"], made, tmp_path / "new", *weak) == output
    assert files(tmp_path / "new/tiles") == tiles


def test_a_tile_with_a_sliver_of_imagery_has_no_features(world, tmp_path):
    tile = mapped_tiles(world["run"])[0].tile
    reach = lattice_of(bundle.description(world["model"]), tile).reach(tile.window)
    image, valid = np.zeros((3, reach.height, reach.width), np.uint8), np.zeros((reach.height, reach.width), bool)
    valid[:, tile.window.col - reach.col] = True
    [settled] = Embed(world["model"], str(tmp_path), {}, count=9)(
        [TileRow(tile, "[]", image=image, valid=valid, reach=reach)]
    )
    assert settled.facts == {"clicked": 0, "drawn": 0}
    assert list(tmp_path.iterdir()) == []


def test_clicks_of_a_corrected_run_add_to_those_before(world, tmp_path):
    first, second = clicks(tmp_path / "a.geojsonl", click("kind-2", (60, 90), (60, 120))), tmp_path / "b.geojsonl"
    correct(world["run"], first, tmp_path / "one", "head.kept=1")
    clicks(second, click("kind-0", (140, 30), (140, 60)))
    correct(tmp_path / "one", second, tmp_path / "two", "head.kept=1")
    content = read(str(tmp_path / "two"))
    assert content["steps"]["model"]["bundle"] == world["model"]
    assert content["steps"]["clicks"]["clicks"] == 2
    after = mosaic(tmp_path / "two")[0]
    assert (after[60, 90:121] == 2).mean() > 0.8
    assert (after[140, 30:61] == 0).mean() > 0.8


def test_wrong_clicks_are_refused_before_anything_is_written(world, tmp_path):
    inside = tuple(np.argwhere(mosaic(world["run"])[0] == 0)[2000])

    def refusal(code, *features, run=world["run"], path=None):
        path = path or clicks(tmp_path / "wrong.geojsonl", *features)
        return refused(code, "correct", run, "--clicks", path, "--out", tmp_path / "new", "--engine", "inline")

    assert "has the class 'road', " in refusal(2, click("road", inside))
    assert "lies outside of the map" in refusal(3, click("kind-1", inside), click("kind-1", (500, 500)))
    assert "lies on nodata" in refusal(3, click("kind-1", (2, 2)))
    assert "was made on run other" in refusal(2, click("kind-1", inside, run="other"))
    assert "has no property class" in refusal(3, {**click("kind-1", inside), "properties": None})
    box = {**click("kind-1", inside), "geometry": json.loads(shapely.to_geojson(shapely.box(0, 0, 1, 1)))}
    assert "is of type Polygon" in refusal(3, box)
    assert "click 2 at" in refusal(3, click("kind-1", inside), click("kind-1", inside, (500, 500)))
    assert "px long, expected at most 5,000 px" in refusal(3, click("kind-1", inside, (9000, 9000)))
    assert "there is no file of clicks" in refusal(3, path=tmp_path / "none.geojson")
    (tmp_path / "empty.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert "holds no clicks" in refusal(3, path=tmp_path / "empty.geojson")
    undone = {"type": "Feature", "geometry": None, "properties": {"undo": "a"}}
    assert "holds no clicks" in refusal(3, click("kind-1", inside, id="a"), undone)
    assert "is not a run" in refusal(2, click("kind-1", inside), run=tmp_path / "none")
    assert not (tmp_path / "new").exists()
    path = clicks(tmp_path / "right.geojsonl", click("kind-1", inside))
    assert "which is only read" in refused(2, "correct", world["run"], "--clicks", path, "--out", world["run"])


@pytest.mark.parametrize("whole", [False, True])
def test_damaged_clicks_are_refused_by_number(tmp_path, whole):
    right = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [5, 5]}, "properties": {"class": "a"}}

    def refusal(wrong):
        path, rows = tmp_path / "wrong.geojson", [right, right | wrong]
        text = json.dumps({"type": "FeatureCollection", "features": rows})
        path.write_text(text if whole else "".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError) as caught:
            read_clicks(path)
        return str(caught.value)

    assert "click 2" in refusal({"geometry": None})
    assert "has no geometry" in refusal({"geometry": None})
    assert "click 2" in refusal({"properties": {"class": "a", "id": ["b"]}})
    assert "click 2" in refusal({"properties": {"class": "a", "undo": {"b": 1}}})
    if not whole:
        assert "click 2" in refusal({"properties": ["a"]})
        assert "coordinates that are no Point" in refusal({"geometry": {"type": "Point", "coordinates": ["a", 1]}})
        assert "has no coordinates" in refusal({"geometry": {"type": "MultiPoint", "coordinates": []}})
        assert "has no geometry" in refusal({"geometry": "here"})


@pytest.mark.parametrize("wrong", [{"reach": -1}, {"reach": 0}, {"change": 7}, {"change": 0}])
def test_settings_of_the_head_have_ranges(wrong):
    with pytest.raises(ValidationError):
        CorrectionConfig(**wrong)


@pytest.mark.more  # a training
def test_a_model_is_fine_tuned_on_the_corrected_map(tmp_path):
    region, model = catalogue(tmp_path / "imagery", a={}, b={"row": 400}), segmenter(tmp_path / "model", classes=3)
    words = ("--engine", "inline", "--set", "map.tile=128")
    assert rayseg("predict", model, region, "--out", tmp_path / "run", *words).exit_code == 0
    made = clicks(tmp_path / "clicks.geojsonl", click("kind-2", (60, 90), (60, 120)))
    more = ("--clicks", made, "--train", "--out", tmp_path / "new", "--engine", "inline")
    found = rayseg("correct", tmp_path / "run", *more, "--set", "head.kept=1")
    assert found.exit_code == 0, found.output
    assert "new-trained/report/index.html" in found.stdout
    described = bundle.description(tmp_path / "new-trained/models/segmenter")
    assert any(str(tmp_path / "new") in parent for parent in described.provenance.parents)
    assert described.provenance.config["start"] == model
    assert described.classes == bundle.description(model).classes
    content = read(str(tmp_path / "new-trained"))
    assert (content["pipeline"], content["status"]) == ("landcover", "done")
    tiles = [
        {path.parent.name for path in (tmp_path / name).glob("tiles/*/classes.tif")} for name in ("run", "new-trained")
    ]
    assert tiles[0] == tiles[1]


def test_a_model_that_cannot_be_fine_tuned_is_named(tmp_path, world, monkeypatch):
    described = bundle.description(world["model"])
    other = described.model_copy(
        update={"architecture": described.architecture.model_copy(update={"factory": "refined"})}
    )
    monkeypatch.setattr("rayseg.steps.fine_tune.bundle.description", lambda _: other)
    monkeypatch.setattr("rayseg.steps.fine_tune.runs.read", lambda _: {"steps": {"model": {"bundle": "/m"}}})
    with pytest.raises(ConfigError, match="/m is of the kind refined"):
        training_of("/run")
