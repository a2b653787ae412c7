"""The steps every pipeline ends with: planned once, joined, published."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import rasterio
from small_world import catalogue, classifier, segmenter

from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError, DataError, ModelError
from rayseg.geo.region import Region
from rayseg.io import maps
from rayseg.io.sources import Source
from rayseg.models import bundle
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    scenes = {"west": {}, "east": {"col": 1000, "seed": 1}}
    return {"root": root, "imagery": catalogue(root / "imagery", **scenes), "model": segmenter(root / "model")}


@pytest.fixture
def step(tmp_path):
    return Step("predict", str(tmp_path / "run"), "key", Engine("inline"))


def planned(world, region=None, **settings):
    return mapping.tiles_for(region or Region("r", catalog=world["imagery"]), described(world), MapConfig(**settings))


def described(world):
    return bundle.description(world["model"])


def test_all_imagery_is_planned_and_some_of_it_by_name(world):
    rows = planned(world, tile=256)
    assert len(rows) == len({row["id"] for row in rows}) > 4
    some = Region("r", catalog=world["imagery"], tiles=(rows[3]["id"], rows[1]["id"]))
    assert planned(world, some, tile=256) == [rows[1], rows[3]]


def test_tiles_of_a_few_pixels_are_warned_of(world, caplog):
    planned(world, tile=128)
    assert not caplog.records
    planned(world, tile=100)
    assert "map.tile is 100 px" in caplog.text


def test_imagery_may_be_named_by_the_configuration(world):
    assert planned(world, Region("r"), imagery=f"{world['imagery']}#imagery") == planned(world)
    with pytest.raises(DataError, match="names no imagery"):
        planned(world, Region("r"))


def test_images_are_imagery_too(world):
    rows = planned(world, Region("r", images=str(world["root"] / "imagery" / "west.tif")))
    assert [row["id"] for row in rows] == ["32650_244_-2148"]


def test_imagery_named_by_the_configuration_goes_before_the_images_of_the_region(world):
    folder = Region("r", images=str(world["root"] / "imagery" / "west.tif"))
    assert planned(world, folder, imagery=f"{world['imagery']}#imagery") == planned(world)


def test_a_tile_that_is_not_there_is_told(world):
    with pytest.raises(ConfigError, match=r"no tile 32650_0_0, its tiles of 2048 px are 32650_244_-2148"):
        planned(world, Region("r", catalog=world["imagery"], tiles=("32650_0_0",)))


def test_a_model_of_images_maps_nothing(world, tmp_path):
    other = bundle.description(classifier(tmp_path / "classifier"))
    with pytest.raises(ModelError, match="classifier is for classification, a map needs segmentation"):
        mapping.tiles_for(Region("r", catalog=world["imagery"]), other, MapConfig())


def test_a_manifest_is_planned_once(world, step, tmp_path):
    moved = tmp_path / "imagery"
    shutil.copytree(world["root"] / "imagery", moved)
    region = Region("r", catalog=str(moved / "cat" / "catalog.json"))
    first = mapping.manifest(step, region, described(world), MapConfig(tile=256))
    shutil.rmtree(moved / "cat")
    assert mapping.manifest(step, region, described(world), MapConfig(tile=256)) == first
    assert mapping.read_manifest(step) == first


def test_a_model_is_known_by_its_weights_and_from_any_folder(world, step, monkeypatch):
    monkeypatch.chdir(world["root"])
    loaded = mapping.load_model(step, "model")
    assert loaded == {"bundle": world["model"], "sha256": described(world).sha256}


def test_tiles_steps_and_joins_fit_together(world, step):
    region, config = Region("r", catalog=world["imagery"]), MapConfig(tile=256)
    model = Step("model", step.root, "key", step.engine, mapping.load_model(step, world["model"]))
    value = mapping.predict_region(step, region, model, config)
    assert value["troubles"] == {}
    assert sum(value["account"].values()) == len(mapping.read_manifest(step))
    predicted = Step("predict", step.root, "key", step.engine, value)
    assert len(list(mapping.done_tiles(predicted))) == value["account"]["done"] + value["account"]["empty"]
    joined = mapping.join_polygons(Step("polygons", step.root, "key", step.engine), predicted, "cover")
    assert joined["polygons"] == "cover.parquet"
    assert joined["count"] > 0
    assert joined["area_m2"] > 0
    publish = Step("publish", step.root, "key", step.engine)
    tiles = list(mapping.done_tiles(predicted))
    assert mapping.publish(publish, predicted, "A map") == {"items": len(tiles)}


def test_a_run_goes_on_without_a_qgis_project_that_cannot_be_written(world, step, monkeypatch, caplog):
    model = Step("model", step.root, "key", step.engine, mapping.load_model(step, world["model"]))
    value = mapping.predict_region(step, Region("r", catalog=world["imagery"]), model, MapConfig(tile=512))
    predicted = Step("predict", step.root, "key", step.engine, value)
    mapping.publish(Step("publish", step.root, "key", step.engine), predicted, "A map")
    assert not (Path(step.root) / "qgis").exists()
    drawing = Step("qgis", step.root, "key", step.engine)
    with monkeypatch.context() as patched:
        patched.setattr(mapping.qgis, "save", Mock(side_effect=DataError("no room")))
        assert mapping.save_project(drawing, predicted, drawing) == {}
    assert f"no QGIS project: no room; then: rayseg export {step.root} --format qgis" in caplog.text
    mapping.save_project(drawing, predicted, drawing)
    with rasterio.open(Path(step.root) / "qgis/classes.vrt") as whole:
        assert (whole.read(1) != 255).any()


def test_what_is_published_of_the_ledger_is_what_the_files_say(world, step, monkeypatch):
    """The run of this version opens no item; one whose ledger has none, of a version before, gives the same files."""
    region, config = Region("r", catalog=world["imagery"]), MapConfig(tile=256)
    model = Step("model", step.root, "key", step.engine, mapping.load_model(step, world["model"]))
    predicted = Step("predict", step.root, "key", step.engine, mapping.predict_region(step, region, model, config))
    join, publish = (Step(name, step.root, "key", step.engine) for name in ("polygons", "publish"))
    tiles = {record.id: record for _, record in mapping.done_tiles(predicted)}
    for tile, record in tiles.items():
        stored = json.loads((Path(step.root) / "tiles" / tile / f"{tile}.json").read_text())
        assert mapping.stac_write.unpacked(record.facts["item"]) == stored

    def results():
        done = mapping.join_polygons(join, predicted, "cover") | mapping.publish(publish, predicted, "A map")
        names = ("collection.json", "items.parquet", "cover.parquet")
        return done, [(Path(step.root) / name).read_bytes() for name in names]

    with monkeypatch.context() as patched:
        patched.setattr(mapping, "content", None)
        patched.setattr(maps, "PART", 2)
        first = results()
    for path in (Path(step.root) / "steps/predict/ledger").glob("*.json"):
        row = json.loads(path.read_text())
        row["facts"] = {name: value for name, value in row["facts"].items() if name not in {"item", "parts"}}
        path.write_text(json.dumps(row))
    assert results() == first
    assert first[0]["items"] == len(tiles) > 2
    monkeypatch.setattr(mapping, "MOST_FILES", 1)
    monkeypatch.setattr(mapping, "GATHERED", 2)
    assert results() == first, "the parts of many tiles are gathered before they are joined"
    assert len(list((join.prefix / "parts").glob("*.parquet"))) > 1
    monkeypatch.setattr(mapping.vectors, "read_parts", gathered_only(mapping.vectors.read_parts))
    assert results() == first, "files that were gathered are not gathered again"


def gathered_only(read_parts):
    """`read_parts` for the joining process, which may not open a file of a tile."""

    def read(path, **options):
        assert "/steps/polygons/parts/" in str(path)
        return read_parts(path, **options)

    return read


@pytest.mark.parametrize("wrong", [{"tile": 0}, {"batch": 0}, {"stall_seconds": 0}])
def test_settings_that_cannot_be_meant_are_refused(wrong):
    with pytest.raises(ValueError, match="greater than 0"):
        MapConfig(**wrong)


def bands_of(source):
    return [name for _, names in source.assets for name in names]


@pytest.mark.parametrize(
    ("own", "names", "expected"),
    [
        (("red", "green", "blue", "nir"), {"red": "b3", "green": "b2", "blue": "b1"}, ["blue", "green", "red", "nir"]),
        (("red", "green", "blue", "nir"), {"red": "3", "green": "2", "blue": "1"}, ["blue", "green", "red", "nir"]),
        (
            ("red", "green", "blue", "nir"),
            {"red": "nir", "green": "red", "blue": "green"},
            ["green", "blue", "own blue", "red"],
        ),
        (("b1", "b2", "b3"), {"red": "b2", "green": "b3", "blue": "b1"}, ["blue", "red", "green"]),
        (("b3", "b1"), {"red": "b1"}, ["b3", "red"]),  # a name counts before a position
    ],
)
def test_bands_are_called_by_name_or_position(own, names, expected):
    source = Source("s", (("s.tif", own),), None, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), 8, 8, "uint8", None)
    assert bands_of(mapping.with_names(source, names)) == expected


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"red": "b1", "blue": "b9"}, "map.bands says blue: b9, but s has the bands red, green, blue; name some"),
        ({"red": "b1", "blue": "b1"}, "map.bands gives bands of s one name"),
    ],
)
def test_bands_that_a_source_has_not_or_that_are_named_twice_are_refused(names, said):
    bands = ("red", "green", "blue")
    source = Source("s", (("s.tif", bands),), None, (1.0, 0.0, 0.0, 0.0, -1.0, 0.0), 8, 8, "uint8", None)
    with pytest.raises(DataError, match=said):
        mapping.with_names(source, names)
    files = Source("s", tuple((f"{name}.tif", (name,)) for name in bands), *list(vars(source).values())[2:])
    with pytest.raises(DataError, match="red: b1, but s"):  # several files have no order
        mapping.with_names(files, {"red": "b1"})
