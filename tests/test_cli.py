"""The command line: output, and errors for wrong input: one sentence, an exit code, no partial files."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
from pathlib import Path

import geopandas
import huggingface_hub
import numpy as np
import pytest
import rasterio
import torch
import yaml
from fake_run import GPC, blobs, make, picture
from PIL import Image
from small_world import BANDS, GRID, catalogue, chip_folder, classifier, files, rayseg, refused, segmenter
from small_world import window_at as window
from typer.main import get_command

from rayseg.cli import app
from rayseg.engine.run import read
from rayseg.io import cog, labels, xyz
from rayseg.io.stac_read import open_items
from rayseg.models.encoders import build_encoder
from rayseg.pipelines import PIPELINES

TINY = (
    *("chips.size=64", "chips.held_out=0", "patch=64", "stride=48", "map.tile=128"),
    *("classifier.encoder=mobilenet_v2", "classifier.size=64", "classifier.epochs=1", "classifier.learning.batch=4"),
    *("segmenter.encoder=mobilenet_v2", "segmenter.size=64", "segmenter.learning.batch=4"),
)
TABLES = {"classes"}  # a folder of class tables, no configurations
CONFIGS = [p for p in sorted(Path(__file__).parents[1].glob("configs/*/*.yaml")) if p.parent.name not in TABLES]
RANDOM = ("classifier.weights=none", "segmenter.weights=none")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A scene, chips in folders, catalogues of both, a bundle."""
    root = tmp_path_factory.mktemp("world")
    chips = labels.ingest_folder(chip_folder(root / "chips"), root / "chips-cat", labels="folder")
    return {
        "root": root,
        "imagery": catalogue(root / "imagery", scene={}),
        "chips": f"{chips}#chips",
        "model": segmenter(root / "model"),
    }


@pytest.fixture
def out(tmp_path):
    return tmp_path / "new" / "out"


def options(*overrides):
    return [word for override in overrides for word in ("--set", override)]


def predict(world, out, *more, model=None, source=None):
    words = ("predict", model or world["model"], source or world["imagery"], "--out", out, "--engine", "inline")
    return (*words, *more)


def test_ingest_describes_the_good_rasters_beside_one_that_cannot_be_read(world, out, tmp_path, caplog):
    (tmp_path / "bad.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    result = rayseg("ingest", "rasters", tmp_path / "bad.tif", world["root"] / "imagery" / "scene.tif", "--out", out)
    assert result.exit_code == 0, result.output
    assert (out / "imagery" / "scene.json").exists()
    assert "bad.tif cannot be read" in caplog.text
    assert "catalog.json#imagery: 1 image" in result.stderr


def test_a_box_of_the_western_hemisphere_is_a_region_and_no_option(world, out):
    message = refused(3, *predict(world, out, "--set", f"map.imagery={world['imagery']}", source="-105.5,39,-.5,40"))
    assert "the region [-105.5, 39, -0.5, 40] and the imagery of" in message
    result = rayseg(*predict(world, out, "-x"))
    assert result.exit_code == 2
    assert "No such option: -x" in result.stderr


def run_gpc(world, out, *overrides):
    chips = (f"chips.source={world['chips']}", *TINY)
    where = ("--region", world["imagery"], "--out", out, "--engine", "inline")
    return ("run", "pipeline", "gpc", *where, *options(*chips, *overrides))


# -- help and what needs no imagery ------------------------------------------------------------------------------------


def commands(group=None, words=()):
    for name, command in (group or get_command(app)).commands.items():
        yield from commands(command, (*words, name)) if hasattr(command, "commands") else [((*words, name), command)]


@pytest.mark.parametrize(("words", "command"), list(commands()), ids=lambda part: getattr(part, "name", None))
def test_every_command_and_option_has_a_help_text(words, command):
    found = rayseg(*words, "--help")
    assert found.exit_code == 0
    assert command.help.split("\n")[0].endswith(".")
    for parameter in command.params:
        assert parameter.help, (words, parameter.name)


def test_the_commands_are_listed_in_their_order_of_use():
    names = get_command(app).list_commands(None)
    assert names[:4] == ["run", "plan", "status", "retry"]
    assert set(names) == set(get_command(app).commands)


def test_help_waits_for_no_heavy_library():
    heavy = "torch", "ray", "rasterio", "numpy", "pydantic", "pyarrow", "geopandas"
    code = f"import sys, rayseg.cli; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_version_and_environment_are_printed():
    assert rayseg("--version").stdout.startswith("rayseg ")
    said = rayseg("env").stdout
    for name in ("rayseg", "python", "torch", "ray", "GPUs", "cache"):
        assert f"\n{name} " in f"\n{said}"


def test_a_configuration_is_shown_as_yaml_that_can_be_given_back(tmp_path):
    shown = rayseg("config", "show", "gpc", "--set", "chips.size=128").stdout
    assert yaml.safe_load(shown)["chips"]["size"] == 128
    (tmp_path / "c.yaml").write_text(shown)
    assert rayseg("config", "show", "gpc", "--config", tmp_path / "c.yaml").stdout == shown
    assert rayseg("config", "validate", "gpc", "--config", tmp_path / "c.yaml").stdout == "valid\n"


@pytest.mark.parametrize("name", ["predict", "remap", "refresh", "diff"])
def test_the_keys_of_commands_on_models_and_runs_are_shown(name):
    shown = rayseg("config", "show", name)
    assert shown.exit_code == 0, shown.output
    required = [line for line in shown.stdout.splitlines() if line.endswith("''")]
    assert required == {"remap": ["run: ''"], "diff": ["before: ''", "after: ''"]}.get(name, ["model: ''"])
    assert shown.stdout.count("Required.") == len(required)
    assert "is missing; set it" in refused(2, "config", "validate", name)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_key_of_the_schema_has_a_meaning(name):
    schema = json.loads(rayseg("config", "schema", name).stdout)
    parts = [schema, *schema["$defs"].values()]
    for part in parts:
        for key, field in part.get("properties", {}).items():
            assert field.get("description") or "$ref" in str(field), (part["title"], key)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_configurations_that_come_along_are_valid(path):
    assert path.parent.name in PIPELINES
    assert rayseg("config", "validate", path.parent.name, "--config", path).exit_code == 0


def test_every_pipeline_comes_with_three_configurations():
    for name in PIPELINES:
        assert {"smoke", "default", "paper"} <= {path.stem for path in CONFIGS if path.parent.name == name}


def test_regions_are_listed_and_found(monkeypatch, tmp_path):
    said = rayseg("regions").stdout
    assert said.startswith("demo  ")
    assert "\ndaxing  12 x 10 km" in said
    (tmp_path / "stac/regions").mkdir(parents=True)
    (tmp_path / "stac/regions/valley.geojson").write_text("{")
    monkeypatch.chdir(tmp_path)
    assert "\nvalley  not readable" in rayseg("regions").stdout
    assert "\ndaxing  " in rayseg("regions").stdout


# -- good input --------------------------------------------------------------------------------------------------------


def test_models_are_listed_and_shown(world, tmp_path):
    classifier(tmp_path / "a" / "models" / "classifier")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "bundle.json").write_text("{")
    rows = rayseg("models", "list", tmp_path, world["root"]).stdout.splitlines()
    assert [row.split()[:4] for row in rows] == sorted(
        [
            [str(tmp_path / "a" / "models" / "classifier"), "classification", "mobilenet_v2", "gpc/nongpc"],
            [world["model"], "segmentation", "mobilenet_v2", "background/gpc"],
        ]
    )
    shown = json.loads(rayseg("models", "show", world["model"]).stdout)
    assert shown["bands"] == ["red", "green", "blue"]
    assert len(shown["sha256"]) == 64
    nothing = rayseg("models", "list", tmp_path / "broken")
    assert (nothing.exit_code, nothing.stdout) == (0, "")
    assert "no models" in nothing.stderr


def test_folders_and_rasters_are_ingested(world, tmp_path):
    made = rayseg("ingest", "folder", world["root"] / "chips", "--labels", "folder", "--out", tmp_path / "a").stdout
    assert made == f"{tmp_path / 'a' / 'catalog.json'}\n"
    assert len(list((tmp_path / "a" / "chips").glob("gpc-*.json"))) == 3
    rayseg("ingest", "rasters", world["root"] / "imagery" / "scene.tif", "--out", tmp_path / "b")
    assert (tmp_path / "b" / "imagery" / "scene.json").exists()


def test_options_of_web_map_tiles_reach_the_ingest(monkeypatch):
    asked = []
    monkeypatch.setattr(xyz, "ingest_xyz", lambda *words, **more: asked.append((words, more)) or "cat/catalog.json")
    settings = ("--set", "tile_size=512", "--set", "concurrency=3", "--set", "limit=9")
    words = ("--label", "kind", "--chips", "p.geojson", *settings)
    assert rayseg("ingest", "xyz", "--url", "u", "--out", "cat", *words).stdout == "cat/catalog.json\n"
    [((url, out), more)] = asked
    fetching = more["fetching"]
    assert (url, out, more["label"], more["chips"], more["geometry"]) == ("u", "cat", "kind", "p.geojson", None)
    assert (fetching.tile_size, fetching.concurrency, fetching.limit) == (512, 3, 9)


@pytest.fixture
def mapped(tmp_path):
    """A run of two tiles and a folder with its truth, in which an eighth is turned over."""
    mask_HW = blobs(64, 128)
    root = tmp_path / "run"
    make(root, {"scene": (picture(mask_HW), mask_HW, (0, 0))})
    truth_HW = mask_HW.copy()
    truth_HW[:8] = 1 - truth_HW[:8]
    (tmp_path / "truth").mkdir()
    for name, values_HW in (("truth", truth_HW), ("predicted", mask_HW)):
        (tmp_path / name).mkdir(exist_ok=True)
        Image.fromarray(values_HW).save(tmp_path / name / "a.png")
    (tmp_path / "classes.yaml").write_text("classes: [{name: other, color: '#000000'}, {name: gpc, color: '#009e73'}]")
    return tmp_path


def test_folders_are_evaluated(mapped):
    words = ("evaluate", mapped / "predicted", mapped / "truth", "--classes", mapped / "classes.yaml")
    assert "overall accuracy" in rayseg(*words).stdout
    result = json.loads(rayseg(*words, "--json").stdout)
    assert result["overall"]["overall_accuracy"]["value"] == pytest.approx(7 / 8)
    assert result["pixels"] == 64 * 128


def test_a_raster_becomes_polygons(tmp_path):
    mask_HW = np.zeros((40, 60), np.uint8)
    mask_HW[5:15, 5:25] = 1
    mask_HW[30:34, 50:60] = 1
    cog.write_classes(tmp_path / "map.tif", mask_HW, GRID, window(0, 0, 40, 60), GPC)
    for name, reader in (("p.parquet", geopandas.read_parquet), ("p.geojson", geopandas.read_file)):
        said = rayseg("polygonize", tmp_path / "map.tif", "--out", tmp_path / name).stdout
        assert said == f"2 polygons in {tmp_path / name}\n"
        frame = reader(tmp_path / name)
        assert sorted(frame["pixels"]) == [40, 200]
        assert frame["area_m2"].sum() == pytest.approx(240, rel=2e-3)
        assert frame.crs == "EPSG:4326"


def test_a_run_becomes_polygons_and_is_evaluated(world, tmp_path):
    rayseg(*predict(world, tmp_path / "run", *options("map.tile=128")))
    rayseg("polygonize", tmp_path / "run", "--out", tmp_path / "p.parquet")
    frame = geopandas.read_parquet(tmp_path / "p.parquet")
    assert frame.equals(geopandas.read_parquet(tmp_path / "run" / "polygons.parquet"))
    (tmp_path / "truth").mkdir()
    scene_HW = blobs(200, 180)
    cog.write_classes(tmp_path / "truth" / "any.tif", scene_HW, GRID, window(0, 0), GPC)
    result = json.loads(rayseg("evaluate", tmp_path / "run", tmp_path / "truth", "--json").stdout)
    assert result["unit"] == "tile"
    assert result["units"] == 9
    assert result["seams"]["borders"] > 0


# -- wrong input -------------------------------------------------------------------------------------------------------


def test_unknown_pipelines_regions_and_keys(out):
    assert "pipeline 'gcp' is unknown, expected one of: gpc" in refused(2, "run", "pipeline", "gcp", "--region", "demo")
    said = refused(2, "run", "pipeline", "gpc", "--region", "nowhere", "--out", out)
    assert "nowhere" in said
    assert "daxing" in said
    words = ("run", "pipeline", "gpc", "--region", "nowhere", "--out", out)
    assert "key chips.sise is unknown, expected one of: held_out" in refused(2, *words, *options("chips.sise=3"))
    assert "key chips.size = 'big'" in refused(2, *words, *options("chips.size=big"))
    assert "not of the form key=value" in refused(2, *words, *options("chips.size"))
    assert "no.yaml cannot be read" in refused(2, *words, "--config", "no.yaml")
    assert not out.exists()


def test_keys_of_a_file_are_named_by_their_path(tmp_path):
    (tmp_path / "c.yaml").write_text("segmenter: {learning: {bacth: 4}}")
    said = refused(2, "config", "validate", "gpc", "--config", tmp_path / "c.yaml")
    assert "segmenter.learning.bacth is unknown, expected one of: " in said
    (tmp_path / "c.yaml").write_text("a: [1")
    assert "is not YAML" in refused(2, "config", "validate", "gpc", "--config", tmp_path / "c.yaml")


def test_an_invalid_scaling_is_an_error_with_its_values():
    said = refused(2, "config", "validate", "gpc", *options("scaling.mean=[1, 2, 3]", "scaling.std=[1, 0, 1]"))
    assert said == "rayseg: config key scaling: scale 1 and std [1.0, 0.0, 1.0] must be above 0\n"


@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        ('{"type": "FeatureCollection", "features": []}', 3, "is empty"),
        ("", 3, "is not JSON"),
        ('{"type": "Feature", "properties": {}, "geometry": {"type": "Point", "coordinates": [1, 2]}}', 3, "no area"),
        ('{"type": "Feature", "properties": {}, "geometry": null}', 3, "is empty"),
        ("[1]", 3, "neither GeoJSON nor STAC"),
        ('{"type": "FeatureCollection", "features": [1]}', 3, "expected a GeoJSON Feature"),
    ],
)
def test_region_files_without_an_area(world, out, tmp_path, content, code, words):
    (tmp_path / "region.geojson").write_text(content)
    more = options(f"map.imagery={world['imagery']}")
    assert words in refused(code, *predict(world, out, *more, source=tmp_path / "region.geojson"))
    assert not out.exists()


def test_regions_without_imagery(world, out):
    box = "10,50,11,51"
    more = options(f"map.imagery={world['imagery']}")
    assert "do not overlap" in refused(3, *predict(world, out, *more, source=box))
    assert "map.imagery" in refused(3, *predict(world, out, source=box))
    assert "does not exist" in refused(2, *predict(world, out, source="nowhere.json"))
    assert "the region is empty, expected demo" in refused(2, *predict(world, out, source=" "))
    assert "longitudes are -180 to 180" in refused(2, *predict(world, out, source="400,10,405,15"))
    assert "south < north" in refused(2, *predict(world, out, source="10,51,11,50"))
    assert "no collection 'nope', expected one of imagery" in refused(
        2, *predict(world, out, source=f"{world['imagery']}#nope")
    )
    assert not out.exists()


def test_unknown_tiles(world, out):
    said = refused(2, *predict(world, out, "--tiles", "32650_1_1"))
    assert "no tile 32650_1_1" in said
    assert "32650_244_-2148" in said
    assert not out.exists()


def test_imagery_outside_the_models_contract(world, out, tmp_path):
    other = segmenter(tmp_path / "nir", bands=("red", "green", "nir"))
    said = refused(4, *predict(world, out, model=other))
    assert "needs the bands red, green, nir" in said
    assert "nir missing" in said
    wide = catalogue(tmp_path / "wide", scene={"dtype": "uint16"})
    said = refused(4, *predict(world, out, source=wide))
    assert "trained on uint8 values, scene has uint16" in said
    assert not out.exists()


def test_models_that_cannot_map(world, out, tmp_path):
    assert "holds no model bundle" in refused(4, *predict(world, out, model=tmp_path / "none"))
    said = refused(2, *predict(world, out), "--set", "units.of=tiles")
    assert "is for segmentation, units are of classifiers" in said
    cut = Path(segmenter(tmp_path / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:100_000])
    assert "are damaged" in refused(4, *predict(world, out, model=tmp_path / "cut"))
    assert not out.exists()


def test_sources_without_images(world, out, tmp_path):
    assert "does not exist" in refused(3, *predict(world, out, source=tmp_path / "a.tif"))
    (tmp_path / "a.tif").write_bytes(b"II*\0 no tiff")
    assert "a.tif cannot be read" in refused(3, *predict(world, out, source=tmp_path / "a.tif"))
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refused(3, *predict(world, out, source=tmp_path / "empty"))
    assert not out.exists()


def _one_class(folder):
    for path in (folder / "nongpc").iterdir():
        path.unlink()
    return "at least two classes"


def _twins(folder):
    (folder / "gpc" / "1.jpg").write_bytes((folder / "gpc" / "1.png").read_bytes())
    return "would both have the id gpc-1"


@pytest.mark.parametrize("spoil", [_one_class, _twins])
def test_label_folders_are_taken_whole_or_not_at_all(spoil, tmp_path, out):
    folder = chip_folder(tmp_path / "chips")
    words = spoil(folder)
    assert words in refused(3, "ingest", "folder", folder, "--labels", "folder", "--out", out)
    assert not out.exists()


def test_an_image_that_cannot_be_decoded_is_named_and_left_out(tmp_path, out):
    folder = chip_folder(tmp_path / "chips")
    path = folder / "gpc" / "1.png"
    path.write_bytes(path.read_bytes()[:-500])
    said = refused(3, "ingest", "folder", folder, "--labels", "folder", "--out", out)
    assert f"1 of 6 images are left out of {out}/catalog.json: {path}" in said
    assert {item.id for item in open_items(str(out / "catalog.json"), "chips")} == {
        *(f"gpc-{n}" for n in (0, 2)),
        *(f"nongpc-{n}" for n in range(3)),
    }


def test_other_sources_that_cannot_be_ingested(tmp_path, out):
    folder = chip_folder(tmp_path / "chips")
    assert "expected folder" in refused(2, "ingest", "folder", folder, "--labels", "names", "--out", out)
    assert "not a folder" in refused(3, "ingest", "folder", tmp_path / "none", "--out", out)
    assert "add --labels folder" in refused(3, "ingest", "folder", folder, "--out", out)
    assert "no georeference" in refused(3, "ingest", "rasters", folder / "gpc", "--out", out)
    assert "give one of the two" in refused(2, "ingest", "xyz", "--url", "http://h/{z}/{x}/{y}.png", "--out", out)
    xyz_words = ("ingest", "xyz", "--url", "http://h/{z}/{x}/{y}.png", "--region", "1,2,1.1,2.1", "--out", out)
    assert "256 or 512" in refused(2, *xyz_words, "--set", "tile_size=300")
    assert "the limit is 5" in refused(2, *xyz_words, "--set", "limit=5")
    assert not out.exists()


def test_masks_with_values_that_are_not_a_class(mapped):
    values_HW = np.zeros((64, 128), np.uint8)
    values_HW[3, 4] = 7
    Image.fromarray(values_HW).save(mapped / "truth" / "a.png")
    said = refused(3, "evaluate", mapped / "predicted", mapped / "truth", "--classes", mapped / "classes.yaml")
    assert "a.png" in said
    assert "7" in said


def test_evaluation_without_a_match_or_a_table(mapped):
    (mapped / "truth" / "a.png").rename(mapped / "truth" / "b.png")
    words = ("evaluate", mapped / "predicted", mapped / "truth")
    assert "no prediction matches a reference mask" in refused(3, *words, "--classes", mapped / "classes.yaml")
    assert "--classes" in refused(2, *words)
    assert "cannot be read" in refused(2, *words, "--classes", mapped / "none.yaml")
    (mapped / "classes.yaml").write_text("classes: [{name: gpc, colour: green}]")
    assert "colour" in refused(2, *words, "--classes", mapped / "classes.yaml")
    assert "holds no masks" in refused(3, "evaluate", mapped / "none", mapped / "truth")


def test_folders_that_are_not_a_run(tmp_path, mapped):
    for command in ("status", "retry"):
        assert "is not a run" in refused(2, command, tmp_path / "none")
        assert "is not a run" in refused(2, command, mapped / "classes.yaml")
    (tmp_path / "run.json").write_text("[]")
    assert "run.json is not a JSON object" in refused(2, "status", tmp_path)


def test_files_that_cannot_become_polygons(tmp_path, world):
    refused(2, "polygonize", world["root"] / "imagery" / "scene.tif", "--out", tmp_path / "p.kml")
    out = tmp_path / "p.parquet"
    said = refused(3, "polygonize", world["root"] / "imagery" / "scene.tif", "--out", out)
    assert "one band of uint8 was expected, 3 bands of uint8 found" in said
    assert "cannot be read" in refused(3, "polygonize", tmp_path / "none.tif", "--out", out)
    assert "predict" in refused(3, "polygonize", tmp_path, "--out", out)
    assert not out.exists()


def test_folders_without_models(tmp_path):
    assert "is not a folder" in refused(4, "models", "list", tmp_path / "none")
    assert "holds no model bundle" in refused(4, "models", "show", tmp_path)


# -- outputs -----------------------------------------------------------------------------------------------------------


def test_an_output_below_a_file(world, tmp_path):
    (tmp_path / "file").write_text("mine")
    assert "--out" in refused(2, *predict(world, tmp_path / "file" / "run"))
    for words in (
        ("ingest", "folder", world["root"] / "chips", "--labels", "folder", "--out", tmp_path / "file" / "cat"),
        ("ingest", "rasters", world["root"] / "imagery" / "scene.tif", "--out", tmp_path / "file" / "cat"),
    ):
        assert "cannot be used (Not a directory)" in refused(2, *words)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_is_not_writable(world, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(stat.S_IRUSR | stat.S_IXUSR)
    assert "--out" in refused(2, *predict(world, tmp_path / "locked" / "run"))


@pytest.mark.parametrize("address", ["127.0.0.1:1", "nowhere"])
def test_a_cluster_that_does_not_answer(world, out, address):
    words = [str(word) for word in predict(world, out, "--address", address)]
    words[words.index("inline")] = "ray"
    assert f"no Ray cluster answers at {address}" in refused(2, *words)
    assert not out.exists()


def test_an_interrupted_command_prints_how_to_resume(monkeypatch, world, out):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("rayseg.pipelines.predict.run", interrupt)
    assert "run the same command to resume" in refused(130, *predict(world, out))


def test_a_terminated_command_prints_how_to_resume_and_may_be_asked_to_by_a_scheduler(monkeypatch, world, out):
    monkeypatch.setattr("rayseg.pipelines.predict.run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert "terminated; finished tiles are kept, run the same command" in refused(143, *predict(world, out))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert read(str(out))["status"] == "stopped"


@pytest.mark.more  # engine/test_run.py: outputs of other settings and folders of something else
def test_an_output_of_another_run_or_of_another_program(world, tmp_path):
    folder = tmp_path / "thesis"
    folder.mkdir()
    (folder / "main.tex").write_text("...")
    assert "choose an empty or new --out" in refused(2, *predict(world, folder))
    assert [path.name for path in folder.iterdir()] == ["main.tex"]
    rayseg(*predict(world, tmp_path / "run"))
    before = files(tmp_path / "run")
    said = refused(2, *predict(world, tmp_path / "run", *options("map.tile=512")))
    assert "config.map.tile is 2048 there, 512 here" in said
    assert "--out" in said
    assert files(tmp_path / "run") == before


# -- wrong input of a pipeline that trains -----------------------------------------------------------------------------


def test_unknown_encoders_offer_others(world, out):
    said = refused(2, *run_gpc(world, out, *RANDOM, "classifier.encoder=mobilnet_v2"))
    assert "mobilenet_v2" in said


def test_the_segmenters_encoder_is_looked_at_before_the_classifier_is_trained(world, out):
    said = refused(2, *run_gpc(world, out, *RANDOM, "segmenter.encoder=resnet1000"))
    assert "resnet1000" in said
    assert "architecture 'unett' is unknown" in refused(
        2, *run_gpc(world, out, *RANDOM, "segmenter.architecture=unett")
    )
    assert not out.exists()


@pytest.mark.parametrize(("override", "said"), [
    ("stride=700", "stride 700 is above patch 64"),
    ("segmenter.reduce=3", "patch 64 is not a multiple of 32 x segmenter.reduce 3"),
    ("scaling={mean: [1.0], std: [1.0]}", "3 bands but scaling of 1"),
    ("classifier.network=plots", "classifier.network = 'plots': input should be 'chips'"),
])  # fmt: skip
def test_windows_scalings_and_networks_that_do_not_fit_gpc(world, out, override, said):
    sizes = ("segmenter.size=288",) if "reduce" in override else ()
    assert said in refused(2, *run_gpc(world, out, *RANDOM, *sizes, override))
    assert not out.exists()


def test_truncated_weights(world, out, tmp_path):
    path = tmp_path / "encoder.pth"
    torch.save(build_encoder("mobilenet_v2", weights="none").state_dict(), path)
    path.write_bytes(path.read_bytes()[:50_000])
    said = refused(4, *run_gpc(world, out, f"classifier.weights={path}", "segmenter.weights=none"))
    assert "encoder.pth (50000 bytes) are damaged" in said
    said = refused(
        4, *run_gpc(world, out.parent / "b", f"classifier.weights={tmp_path}/no.pth", "segmenter.weights=none")
    )
    assert "no.pth cannot be read" in said


def test_pretrained_weights_without_a_network(world, out, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    said = refused(4, *run_gpc(world, out))
    assert "set weights to a local .pth or .safetensors file, or to none" in said


def test_chips_of_other_labels(world, out, tmp_path):
    folder = chip_folder(tmp_path / "chips")
    (folder / "nongpc").rename(folder / "forest")
    other = labels.ingest_folder(folder, tmp_path / "cat", labels="folder")
    said = refused(3, *run_gpc(world, out, *RANDOM, f"chips.source={other}#chips"))
    assert "are labelled forest, expected gpc or nongpc" in said
    labels.ingest_folder(world["root"] / "chips" / "gpc", tmp_path / "bare")
    said = refused(3, *run_gpc(world, out.parent / "b", *RANDOM, f"chips.source={tmp_path}/bare/catalog.json"))
    assert "labelled None" in said


def test_regions_without_chips(world, out):
    words = ("run", "pipeline", "gpc", "--region", "10,50,11,51", "--out", out, "--engine", "inline")
    assert "chips.source" in refused(2, *words, *options(*TINY, *RANDOM))


def test_an_invalid_pipeline_leaves_no_files_and_trains_nothing(world, out, tmp_path):
    for code, overrides in {
        2: ("classifier.encoder=none_such",),
        3: (f"chips.source={world['imagery']}",),
        4: (f"classifier.weights={tmp_path}/none.pth",),
    }.items():
        refused(code, *run_gpc(world, out, *RANDOM, *overrides))
    words = ("run", "pipeline", "gpc", "--region", "10,50,11,51", "--out", out, "--engine", "inline")
    far = (f"chips.source={world['chips']}", f"map.imagery={world['imagery']}", *TINY, *RANDOM)
    assert "do not overlap" in refused(3, *words, *options(*far))
    assert "holds no masks" in refused(3, *run_gpc(world, out, *RANDOM, f"truth={tmp_path}"))
    grey = catalogue(tmp_path / "grey", scene={"bands": BANDS[:2]})
    assert "blue missing" in refused(4, *run_gpc(world, out, *RANDOM, f"map.imagery={grey}"))
    assert not out.exists()


def test_a_folder_of_images_and_masks_leads_to_landcover(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "set" / name / "a.png")
    said = refused(3, "ingest", "folder", tmp_path / "set", "--out", tmp_path / "cat")
    assert f"landcover with --set labelled.source={tmp_path}/set" in said
    assert f"give {tmp_path}/set/images" in said
    assert not (tmp_path / "cat").exists()


def test_bands_are_named_where_files_do_not(tmp_path, world):
    pixels = np.full((2, 16, 16), 700, np.uint16)
    (tmp_path / "in").mkdir()
    with rasterio.open(tmp_path / "in/a.tif", "w", "GTiff", 16, 16, 2, dtype="uint16") as file:
        file.write(pixels)
    found = rayseg("ingest", "folder", tmp_path / "in", "--out", tmp_path / "cat", "--bands", "nir, red")
    assert "bands nir, red (uint16)" in found.stderr
    assert "has 2 bands (b1, b2), --bands names nir" in refused(
        3, "ingest", "folder", tmp_path / "in", "--out", tmp_path / "x", "--bands", "nir"
    )
    said = refused(2, *predict(world, tmp_path / "run"), "--bands", "b1,b2")
    assert "--bands names 2 bands" in said
    assert "name one for each" in said


def test_a_map_of_imagery_of_another_resolution_is_warned_of(tmp_path, world, caplog):
    shutil.copytree(world["model"], tmp_path / "model")
    described = json.loads((tmp_path / "model/bundle.json").read_text()) | {"metres": 10.0}
    (tmp_path / "model/bundle.json").write_text(json.dumps(described))
    assert rayseg(*predict(world, tmp_path / "run", model=tmp_path / "model")).exit_code == 0
    assert "model learnt from pixels of 10 m" in caplog.text.replace(f"model {described['name']} ", "model ")
