"""superpixel end to end on scenes of a hundred pixels: what it leaves, what it refuses, how it goes on after a kill."""

import json
import shutil
from dataclasses import replace

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from fake_run import blobs, make, picture
from PIL import Image
from sklearn.metrics.cluster import contingency_matrix
from small_world import GRID, catalogue, files, finished, goes_on_elsewhere, rayseg, refused, valid_stac, window_at
from upath import UPath

from rayseg.config import load
from rayseg.engine.ledger import Ledger, Record, Settled
from rayseg.engine.run import Engine, Step, read
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.geo.region import Region
from rayseg.io import cog, label_names, labels, masks
from rayseg.metrics import agreement
from rayseg.models import bundle
from rayseg.pipelines import superpixel
from rayseg.stages.oversegment import Divide
from rayseg.steps import area, estimate, scenes
from rayseg.steps.numbers import area as area_text
from rayseg.train import scene as training

pytestmark = pytest.mark.e2e

STEPS = [
    "scenes",
    "superpixels",
    "networks",
    "predict",
    "generalize",
    "polygons",
    "evaluate",
    "publish",
    "qgis",
    "pictures",
    "baseline",
    "report",
]
SMALL = """
network: {network: deepnet, epochs: 2, patch: 64, stride: 48, labels: 8, reduce: 1}
superpixels: {min_size: 16, overlap: 16}
map: {tile: 128}
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two scenes that overlap, and truth of the first."""
    root = tmp_path_factory.mktemp("world")
    catalogue(root, one={"seed": 1}, two={"seed": 2, "col": 120})
    (root / "small.yaml").write_text(SMALL)
    (root / "truth").mkdir()
    cog.write_image(
        root / "truth" / "one.tif",
        blobs(200, 180, seed=1)[None].astype(np.uint8),
        GRID,
        window_at(0, 0),
        bands=("kind",),
    )
    return root


def words(world, *more):
    """The command but for --out."""
    region = f"{world}/cat/catalog.json#imagery"
    given = [
        "run",
        "pipeline",
        "superpixel",
        "--region",
        region,
        "--config",
        world / "small.yaml",
        "--engine",
        "inline",
    ]
    return [*given, *[word for value in more for word in ("--set", value)]]


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A run that nothing disturbed."""
    return finished(tmp_path_factory.mktemp("whole") / "run", *words(world, f"truth={world}/truth"))


def records(out, step):
    return Ledger(str(out / "steps" / step / "ledger")).read()


def test_all_steps_are_done_and_leave_what_they_should(whole):
    said = read(str(whole))
    assert said["status"] == "done"
    assert list(said["steps"]) == STEPS
    assert {fate.status for fate in records(whole, "predict").values()} == {"done"}
    for name in ("one", "two"):
        described, _ = bundle.build(str(whole / "models" / name))
        assert described.outputs == records(whole, "networks")[name].facts["labels"]
    frame = geopandas.read_parquet(whole / "labels.parquet")
    assert set(frame["name"]) <= {f"label {k}" for k in range(8)}
    assert frame["score_mean"].between(0, 1).all()
    valid_stac(whole / "collection.json")
    page = (whole / "report" / "index.html").read_text()
    assert "AMI" in page
    assert "k-means of segments" in page
    one_label = said["steps"]["baseline"]["methods"][1]
    assert one_label["name"] == "one label for everything"
    assert one_label["value"] == pytest.approx(0, abs=1e-6)
    assert "Superpixels" in page
    assert said["steps"]["evaluate"]["scenes"]["one"]["pixels"] > 30_000


def test_each_scene_is_labelled_where_it_has_data_even_where_they_overlap(whole, world):
    for name, col in (("one", 0), ("two", 120)):
        with rasterio.open(world / f"{name}.tif") as file:
            seen = file.read_masks(1) > 0
            left, top = file.bounds.left, file.bounds.top
        found = np.zeros(seen.shape, bool)
        for path in whole.glob(f"tiles/{name}_*/classes.tif"):
            with rasterio.open(path) as file:
                row, at = round(top - file.bounds.top), round(file.bounds.left - left)
                found[row : row + file.height, at : at + file.width] = file.read(1) != 255
        np.testing.assert_array_equal(found, seen, err_msg=f"{name} {col}")


def test_ground_under_two_scenes_is_counted_once(whole, world):
    ground = np.zeros((400, 400), bool)
    for name, col in (("one", 0), ("two", 120)):
        with rasterio.open(world / f"{name}.tif") as file:
            ground[: file.height, col : col + file.width] |= file.read_masks(1) > 0
    assert read(str(whole))["steps"]["report"]["area_m2"] == pytest.approx(ground.sum(), rel=2e-3)


def test_superpixels_have_one_number_each_over_all_tiles_of_the_scene(whole):
    segments = {path.stem: rasterio.open(path).read(1) for path in (whole / "steps/superpixels").glob("one_*.tif")}
    assert len(segments) > 1
    numbers = [set(np.unique(part)) - {0} for part in segments.values()]
    assert any(one & other for k, one in enumerate(numbers) for other in numbers[k + 1 :])
    assert all(part.dtype == np.uint32 for part in segments.values())


def test_the_second_run_does_nothing(whole, world):
    before = files(whole)
    assert rayseg(*words(world, f"truth={world}/truth"), "--out", whole).exit_code == 0
    after = files(whole)
    assert [name for name, found in after.items() if before.get(name) != found and name != ".lock"] == ["run.json"]


def test_a_run_that_is_moved_computes_nothing_again_and_goes_on_with_its_own_networks(whole, world, tmp_path):
    goes_on_elsewhere(whole, words(world, f"truth={world}/truth"), tmp_path)
    for path in (tmp_path / "there").glob("tiles/*/*.json"):
        models = {link["href"] for link in json.loads(path.read_text())["links"] if link["title"] == "model"}
        assert models <= {f"../../models/{name}/item.json" for name in ("one", "two")}


def test_a_training_killed_in_the_middle_goes_on_as_if_nothing_had_been(whole, world, tmp_path, monkeypatch):
    epoch, seen = training.epoch, []

    def fall(number, *arguments, **named):
        seen.append(number)
        if seen == [0, 1]:
            raise KeyboardInterrupt
        return epoch(number, *arguments, **named)

    monkeypatch.setattr(training, "epoch", fall)
    out = tmp_path / "run"
    assert rayseg(*words(world, f"truth={world}/truth"), "--out", out).exit_code == 130
    assert rayseg(*words(world, f"truth={world}/truth"), "--out", out).exit_code == 0
    assert seen == [0, 1, 1, 0, 1]  # the first scene's second epoch again, then the second scene
    for name in ("one", "two"):
        assert bundle.description(out / "models" / name).sha256 == bundle.description(whole / "models" / name).sha256
    rasters = sorted(whole.glob("tiles/*/*.tif"))
    assert rasters
    for path in rasters:
        assert (out / path.relative_to(whole)).read_bytes() == path.read_bytes()


@pytest.mark.more  # test_predict.py: a damaged tile fails alone, retry mends it; here: a killed training
def test_a_tile_that_failed_once_is_seen_in_the_report_and_leaves_the_superpixels_of_an_undisturbed_run(
    whole, world, tmp_path, monkeypatch
):
    divide, first = Divide._divide, json.loads(mapping_rows(whole)[0]["tiles"])[0]["id"]

    def fall(stage, row):
        if row.tile.id == first:
            raise DataError("not today")
        return divide(stage, row)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Divide, "_divide", fall)
        said = rayseg(*words(world, f"truth={world}/truth"), "--out", out)
    assert said.exit_code == 3
    assert "not today" in said.stderr
    assert (out / "report" / "index.html").exists()
    assert (out / "tiles" / first).exists()
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    paths = sorted((whole / "steps/superpixels").glob("*.tif"))
    assert len(paths) > 4
    for path in paths:
        assert (out / "steps/superpixels" / path.name).read_bytes() == path.read_bytes()


def mapping_rows(out):
    return pq.read_table(out / "steps/scenes/manifest.parquet").to_pylist()


def test_one_network_over_all_scenes_gives_one_mosaic(world, tmp_path):
    assert rayseg(*words(world, "shared=true", "network.merge_to=3"), "--out", tmp_path / "run").exit_code == 0
    assert list(records(tmp_path / "run", "networks")) == ["all-scenes"]
    assert bundle.description(tmp_path / "run/models/all-scenes").outputs <= 3
    tiles = [path.name for path in (tmp_path / "run/tiles").iterdir()]
    assert tiles
    assert all(name.startswith("32650_") for name in tiles)


CLUSTERS = """
superpixels: {min_size: 16, overlap: 16}
network: {merge_to: 2}
"""


def test_clusters_of_superpixels_give_one_map_whatever_the_tiling(world, tmp_path):
    """The labels agree over tile borders, which cut superpixels: the map in tiles is nearly that of the whole."""
    (tmp_path / "small.yaml").write_text(CLUSTERS)
    given = [word if word != world / "small.yaml" else tmp_path / "small.yaml" for word in words(world)]
    maps = []
    for size in (100, 1024):
        out = tmp_path / str(size)
        truth = f"truth={world}/truth"
        found = rayseg(*given, "--set", f"map.tile={size}", "--set", truth, "--set", "sieve=4", "--out", out)
        assert found.exit_code == 0, found.output
        assert {fate.status for fate in records(out, "predict").values()} == {"done"}
        assert read(str(out))["steps"]["evaluate"]["scenes"]["one"]["ami"] > 0.8
        frame = np.full((400, 400), 255, np.uint8)
        for path in out.glob("tiles/one_*/classes.tif"):
            with rasterio.open(path) as file:
                frame[GRID.window_of(tuple(file.bounds)).slices(window_at(0, 0, 400, 400))] = file.read(1)
        maps.append(frame)
    assert len(list((tmp_path / "100").glob("tiles/one_*"))) > 3
    seen = maps[1] != 255
    np.testing.assert_array_equal(maps[0] != 255, seen)
    table = contingency_matrix(maps[0][seen], maps[1][seen])
    assert agreement(table)["ami"] > 0.8


@pytest.mark.more  # models/test_segment_labels.py: the model alone
def test_the_clusters_of_a_scene_map_other_imagery_as_a_model(world, tmp_path):
    (tmp_path / "small.yaml").write_text(CLUSTERS)
    more = ("map.tile=1024", "sieve=0", f"truth={world}/truth", "baseline=false")
    given = [word if word != world / "small.yaml" else tmp_path / "small.yaml" for word in words(world, *more)]
    assert rayseg(*given, "--out", tmp_path / "run").exit_code == 0
    assert "baseline" not in read(str(tmp_path / "run"))["steps"]
    region = f"{world}/cat/catalog.json#imagery"
    model = tmp_path / "run/models/one"
    found = rayseg("predict", model, region, "--engine", "inline", "--out", tmp_path / "other")
    assert found.exit_code == 0, found.output
    assert bundle.description(model).outputs == 2


def test_a_scene_of_weak_contrast_keeps_more_than_one_region(tmp_path):
    """Two fields whose colours differ by 3 of 255: at the default contrast all of it would be one region."""
    image_CHW = np.full((3, 60, 80), 90, np.uint8)
    image_CHW[:, :, 40:] = 93
    command = single(tmp_path, image_CHW)
    (tmp_path / "small.yaml").write_text(CLUSTERS.replace("min_size: 16", "min_size: 16, scale: 1"))
    assert rayseg(*command, "--set", "map.tile=1024").exit_code == 0
    [record] = records(tmp_path / "run", "networks").values()
    assert record.facts["regions"] >= 2
    assert record.facts["contrast"] < superpixel.MERGE
    [path] = (tmp_path / "run").glob("tiles/*/classes.tif")
    classes_HW = rasterio.open(path).read(1)
    assert len(np.unique(classes_HW[:, :36])) == len(np.unique(classes_HW[:, 44:])) == 1
    assert classes_HW[0, 0] != classes_HW[0, -1]


def test_a_scene_of_one_superpixel_is_refused_by_name(tmp_path):
    image_CHW = np.full((3, 60, 60), 90, np.uint8)
    image_CHW[:, 0, 0] = 91  # not a constant scene
    command = single(tmp_path, image_CHW)
    (tmp_path / "small.yaml").write_text(CLUSTERS)
    assert rayseg(*command).exit_code == 3
    [record] = records(tmp_path / "run", "networks").values()
    assert "one region, expected at least two that differ: lower superpixels.scale" in record.reason


@pytest.mark.more  # the next test maps by four of them
@pytest.mark.parametrize("network", ["kmeans", "v1", "v2", "isodata"])
def test_every_network_maps_by_the_same_path(world, tmp_path, network):
    assert rayseg(*words(world, f"network.network={network}"), "--out", tmp_path / "run").exit_code == 0
    assert {fate.status for fate in records(tmp_path / "run", "predict").values()} == {"done"}


@pytest.mark.parametrize("network", ["deepnet", "v2", "kmeans", "isodata"])
def test_a_scene_with_data_in_one_small_place_is_mapped_there(tmp_path, network):
    """None of the 32 patches that lie evenly over the scene meets the place."""
    image_CHW = np.zeros((3, 700, 700), np.uint8)
    image_CHW[:, 300:330, 410:440] = picture(blobs(30, 30, seed=3), seed=3)
    more = (f"network.network={network}", *(["network.start=null"] if network == "v2" else []))
    words = [word for value in more for word in ("--set", value)]
    found = rayseg(*single(tmp_path, image_CHW, nodata=0), *words)
    assert found.exit_code == 0, found.output
    counts = [fate.facts["counts"] for fate in records(tmp_path / "run", "predict").values() if "counts" in fate.facts]
    assert sum(int(count) for one in counts for count in one.values()) == 900
    assert len({label for one in counts for label in one}) > 1


def test_labels_become_classes_by_a_table(whole, world, tmp_path):
    found = [f"{name},{k},{'field' if k else 'water'}" for name in ("one", "two") for k in labels_of(whole, name)]
    (tmp_path / "table.csv").write_text("\n".join(["scene,label,class", *found]))
    said = rayseg("labels", "assign", whole, "--csv", tmp_path / "table.csv", "--out", tmp_path / "classes")
    assert said.exit_code == 0, said.output
    # the two scenes overlap: their ground counts once, as in the report and in a sample
    result = label_names.assign(str(whole), str(tmp_path / "table.csv"), str(tmp_path / "again"))
    covered = read(str(whole))["steps"]["report"]["area_m2"]
    assert (result["unassigned_m2"], sum(result["areas"].values())) == (0, pytest.approx(covered))
    assert sum(result["classes"].values()) > 1.05 * covered  # of 1 m2 each
    assert f"water {area_text(result['areas']['water'])}, field" in said.stdout
    assert "; 0 m² without a class" in said.stdout
    sampled = area.sample(whole, tmp_path / "sample", per_stratum=2)
    assert sum(stratum["area_m2"] for stratum in sampled["strata"]) == pytest.approx(covered)
    valid_stac(tmp_path / "classes/catalog.json")
    sources = masks.masks_of(f"{tmp_path}/classes/catalog.json#classes")
    assert len(sources) == len(list(whole.glob("tiles/*")))
    assert masks.table_of(sources[0].assets[0][0]).names == ("water", "field")
    (tmp_path / "table.csv").write_text("label,class\n0,water\n")
    assert "column scene" in refused(3, "labels", "assign", whole, "--csv", tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text("scene,label,class\none,77,water\n")
    assert "the label 77" in refused(3, "labels", "assign", whole, "--csv", tmp_path / "table.csv")
    (tmp_path / "table.csv").write_text("name\none\n")
    assert "columns label and class" in refused(3, "labels", "assign", whole, "--csv", tmp_path / "table.csv")


def test_one_network_over_images_without_georeference_needs_one_row_per_label(tmp_path):
    (tmp_path / "in").mkdir()
    for seed, name in enumerate(("a", "b")):
        Image.fromarray(picture(blobs(90, 90, seed=seed), seed=seed).transpose(1, 2, 0)).save(
            tmp_path / f"in/{name}.png"
        )
    catalogue = labels.ingest_folder(tmp_path / "in", tmp_path / "cat")
    (tmp_path / "small.yaml").write_text(SMALL)
    given = ("run", "pipeline", "superpixel", "--region", catalogue, "--config", tmp_path / "small.yaml")
    for shared in ("true", "false"):
        out = tmp_path / shared
        said = rayseg(*given, "--engine", "inline", "--set", f"shared={shared}", "--out", out)
        assert said.exit_code == 0, said.output
    rows = [f"{k},{'field' if k else 'water'}" for k in labels_of(tmp_path / "true", "all-scenes")]
    (tmp_path / "table.csv").write_text("\n".join(["label,class", *rows]))
    said = rayseg("labels", "assign", tmp_path / "true", "--csv", tmp_path / "table.csv")
    assert said.exit_code == 0, said.output
    assert "; 0 px without a class" in said.stdout
    found = masks.masks_of(f"{tmp_path}/true/assigned/catalog.json#classes")
    assert {source.item_id.split("_")[0] for source in found} == {"a", "b"}
    (tmp_path / "table.csv").write_text("label,class\n0,water\n")
    assert "column scene" in refused(3, "labels", "assign", tmp_path / "false", "--csv", tmp_path / "table.csv")


def test_classes_that_have_names_are_not_given_others(tmp_path):
    mask_HW = blobs(48, 48).astype(np.uint8)
    make(tmp_path / "run", {"scene": (picture(mask_HW), mask_HW, (0, 0))})
    (tmp_path / "table.csv").write_text("label,class\n0,water\n")
    said = refused(3, "labels", "assign", tmp_path / "run", "--csv", tmp_path / "table.csv")
    assert "maps background, gpc, expected unnamed labels" in said
    assert not (tmp_path / "run" / "assigned").exists()


def labels_of(out, scene):
    return range(records(out, "networks")[scene].facts["labels"])


def single(folder, image_CHW, **options):
    """The command on one scene of given pixels."""
    folder.mkdir(exist_ok=True)
    height, width = image_CHW.shape[1:]
    names = tuple(f"b{k}" for k in range(len(image_CHW)))
    cog.write_image(folder / "odd.tif", image_CHW, GRID, window_at(0, 0, height, width), bands=names, **options)
    labels.ingest_rasters([str(folder / "odd.tif")], folder / "cat")
    (folder / "small.yaml").write_text(SMALL)
    return [*words(folder), "--out", folder / "run"]


RNG = np.random.default_rng(0)
ODD = {
    "ten bands of uint16": (RNG.integers(0, 9000, (10, 70, 90)).astype(np.uint16), "done"),
    "one band": (picture(blobs(70, 90, seed=1), seed=1)[:1], "done"),
    "floats with NaN": (
        np.where(RNG.random((2, 70, 90)) < 0.3, np.nan, RNG.random((2, 70, 90))).astype(np.float32),
        "done",
    ),
    "smaller than a patch": (picture(blobs(20, 13, seed=2), seed=2), "done"),
    "two pixels": (np.array([[[3, 200]]] * 3, np.uint8), "failed"),  # no network tells them apart
    "one pixel": (np.full((3, 1, 1), 9, np.uint8), "empty"),
    "constant": (np.full((3, 70, 90), 9, np.uint8), "empty"),
    "all nodata": (np.zeros((3, 70, 90), np.uint8), "nodata"),
}


@pytest.mark.parametrize("network", ["segments", pytest.param("deepnet", marks=pytest.mark.more)])
@pytest.mark.parametrize("kind", ODD)
def test_odd_scenes_end_as_they_should(tmp_path, kind, network):
    image_CHW, fate = ODD[kind]
    command = single(tmp_path, image_CHW, nodata=None if image_CHW.dtype.kind == "f" else 0)
    found = rayseg(*command, "--set", f"network.network={network}")
    assert found.exit_code == (3 if fate == "failed" else 0), found.output
    assert {record.status for record in records(tmp_path / "run", "predict").values()} == {fate}
    if fate != "done":
        [record] = records(tmp_path / "run", "networks" if fate == "failed" else "scenes").values()
        assert record.status == fate
        assert {"segments": "one region", "deepnet": "one label"}[network] in record.reason or fate != "failed"
        assert "scene" in record.reason or fate == "failed"
    if fate in {"empty", "nodata"}:
        assert f"Nothing was mapped. 1 scene without labels (odd: {record.reason})." in found.stdout
    seen_HW = (~np.isnan(image_CHW) if image_CHW.dtype.kind == "f" else image_CHW != 0).any(axis=0)
    where, found_HW = window_at(0, 0, *seen_HW.shape), np.full(seen_HW.shape, 255, np.uint8)
    for path in (tmp_path / "run").glob("tiles/*/classes.tif"):
        with rasterio.open(path) as file:
            tile = GRID.window_of(tuple(file.bounds))
            found_HW[tile.slices(where)] = file.read(1)
    np.testing.assert_array_equal(found_HW != 255, seen_HW if fate == "done" else np.zeros_like(seen_HW))


def test_a_plan_knows_how_many_patches_networks_will_see(tmp_path):
    given = single(tmp_path, ODD["one band"][0], nodata=0)
    assert rayseg(*given).exit_code == 0
    region = Region("r", catalog=f"{tmp_path}/cat/catalog.json")
    [record] = records(tmp_path / "run", "networks").values()
    config = load(superpixel.Config, str(tmp_path / "small.yaml"), [])
    scenes = superpixel.check(config, region)
    assert superpixel.forecast(config, region, scenes).efforts == {"networks": record.facts["effort"]}
    assert record.facts["effort"] > 2
    few = config.network.model_copy(update={"patches": 1})
    assert superpixel.forecast(config.model_copy(update={"network": few}), region, scenes).efforts == {"networks": 2}


def test_what_shows_nothing_can_be_planned(tmp_path):
    _, *given = single(tmp_path, ODD["all nodata"][0], nodata=0)[:-4]
    assert "1 items, 4 tiles" in rayseg("plan", *given).output


@pytest.mark.parametrize(("bands", "said"), [("", "red, green, blue"), ("bands=[red, blue]", "red, blue")])
def test_a_scaling_of_other_bands_than_the_imagerys_is_refused(world, tmp_path, bands, said):
    given = words(world, "scaling={mean: [1.0], std: [1.0]}", *([bands] if bands else []))
    found = refused(2, *given, "--out", tmp_path / "run")
    assert f"scaling is of 1 bands, the imagery has {said}; give one mean and std for each" in found
    assert not (tmp_path / "run").exists()


def test_complex_pixels_are_refused_and_nothing_is_left(tmp_path):
    command = single(tmp_path, np.ones((1, 20, 20), np.float32))
    where = window_at(0, 0, 20, 20)
    place = {"height": 20, "width": 20, "count": 1, "crs": GRID.crs, "transform": GRID.transform(where)}
    with rasterio.open(tmp_path / "odd.tif", "w", driver="GTiff", dtype="complex64", **place) as file:
        file.write(np.ones((1, 20, 20), np.complex64))
    shutil.rmtree(tmp_path / "cat")
    labels.ingest_rasters([str(tmp_path / "odd.tif")], tmp_path / "cat")
    assert "complex" in refused(3, *command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "code", "said"),
    [
        ("truth={}/none", 3, "holds no masks"),
        ("truth={}/other", 3, "no prediction matches a reference mask"),
        ("unlabelled=[grey]", 2, "colour is 'grey'"),
    ],
)
def test_a_truth_that_cannot_be_compared_is_refused_and_nothing_is_left(world, tmp_path, given, code, said):
    other = tmp_path / "other"
    other.mkdir()
    ones = np.ones((1, 20, 20), np.uint8)
    cog.write_image(other / "far.tif", ones, GRID, window_at(90000, 90000, 20, 20), bands=("kind",))
    more = [given.format(tmp_path), *([] if given.startswith("truth") else [f"truth={world}/truth"])]
    assert said in refused(code, *words(world, *more), "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("shared", [False, True])
def test_scenes_that_cannot_be_mapped_fail_alone_and_by_name(tmp_path, shared):
    """Of other bands, without georeference, unreadable: beside two that can be mapped."""
    scenes = {name: {"seed": seed} for name, seed in (("one", 1), ("two", 2), ("gone", 3), ("bare", 4))}
    catalogue(tmp_path, odd={"bands": ("red", "green")}, **scenes)
    change(tmp_path, "gone", assets={})
    change(tmp_path, "bare", properties={"proj:code": None})
    with rasterio.open(tmp_path / "bare.tif", "r+", IGNORE_COG_LAYOUT_BREAK="YES") as file:
        file.crs = rasterio.CRS()
    region = Region("r", catalog=f"{tmp_path}/cat/catalog.json")
    step = Step("scenes", str(tmp_path / "run"), "key", Engine("inline"))
    listed = superpixel.list_scenes(step, region, superpixel.Config(shared=shared))
    found = records(tmp_path / "run", "scenes")
    assert listed["troubles"].keys() == {"odd", "gone", "bare"}
    assert {name for name, one in found.items() if one.status == "done"} == (
        {"all-scenes"} if shared else {"one", "two"}
    )
    assert "odd has red, green of uint8, expected red, green, blue of uint8 as bare has" in found["odd"].reason
    assert "bare has no georeference" in found["bare"].reason
    assert listed["bands"] == ["red", "green", "blue"]
    config = superpixel.Config(shared=shared)
    forecast = replace(superpixel.forecast(config, region, superpixel.check(config, region)), trial=None)
    assert estimate.estimate_run(forecast, region, rates=estimate.Rates())["refused"] == 3


def change(folder, name, *, properties=None, **fields):
    """Change an item of a catalogue."""
    [path] = folder.glob(f"cat/**/{name}.json")
    item = json.loads(path.read_text())
    path.write_text(json.dumps(item | fields | {"properties": item["properties"] | (properties or {})}))


def test_tiles_of_a_scene_without_a_network_share_its_fate():
    row = Tile("a", Grid("EPSG:32650", (1.0, 1.0), (0.0, 0.0)), Window(0, 0, 8, 8)).to_row()
    row |= {"sources": "[]", "scene": "one"}
    trained = Record("one", "done", facts={"bundle": "/run/models/one"})
    assert scenes.with_network({"one": trained}, UPath("/moved/models"), row).bundle == "/moved/models/one"
    for fate, status, why in (
        (Record("one", "empty", "all alike"), "empty", "scene one: all alike"),
        (Record("one", "failed", "damaged"), "failed", "scene one: damaged"),
        (Record("one", "done", facts={"low": [0]}), "failed", "scene one: not processed"),  # no record of its network
        (None, "failed", "scene one: not processed"),
    ):
        found = scenes.with_network({"one": fate} if fate else {}, UPath("/run/models"), row)
        assert found == Settled(status, why)


def test_a_network_that_keeps_one_label_is_tried_from_three_seeds_and_then_reported(tmp_path, monkeypatch):
    tried = []

    def collapsed(net, patches, device):
        tried.append(1)
        return np.ones((8, 4)), np.array([0, 5, *[0] * 6])

    monkeypatch.setattr(training, "measured", collapsed)
    found = rayseg(*single(tmp_path, picture(blobs(70, 90, seed=1), seed=1), nodata=0))
    assert found.exit_code == 3
    assert len(tried) == 3
    [record] = records(tmp_path / "run", "networks").values()
    assert record.status == "failed"
    assert "seeds 2021, 2022, 2023" in record.reason
    assert {fate.status for fate in records(tmp_path / "run", "predict").values()} == {"failed"}
    assert "seeds 2021" in json.dumps(read(str(tmp_path / "run")))


@pytest.mark.more
def test_mean_colours_and_a_model_of_each_epoch_on_request(world, tmp_path):
    words = ("run", "pipeline", "superpixel", "--region", world / "cat" / "catalog.json", "--engine", "inline")
    words += ("--config", world / "small.yaml", "--set", "mean_colors=true", "--set", "network.keep_every=1")
    out = finished(tmp_path / "run", *words)
    # 1. each label has one colour in all tiles of its scene, and it is the mean of its pixels
    pixels = {}
    for path in sorted(out.glob("tiles/one_*/classes.tif")):
        with rasterio.open(path) as classes, rasterio.open(path.with_name("mean.tif")) as mean:
            assert (mean.crs, mean.transform, mean.count) == (classes.crs, classes.transform, 3)
            labels_HW, mean_CHW, window = classes.read(1), mean.read(), mean.bounds
        with rasterio.open(world / "one.tif") as image:
            image_CHW = image.read(window=image.window(*window), boundless=True)
        for label in set(np.unique(labels_HW).tolist()) - {255}:
            where = labels_HW == label
            pixels.setdefault(label, []).append((image_CHW[:, where], mean_CHW[:, where]))
    for parts in pixels.values():
        image_CN, mean_CN = (np.concatenate(part, axis=1) for part in zip(*parts, strict=True))
        assert (mean_CN == mean_CN[:, :1]).all()
        np.testing.assert_allclose(mean_CN[:, 0], image_CN.mean(axis=1), atol=0.51)
    # 2. a model of each epoch maps on its own, another image too
    assert {path.name for path in (out / "models").iterdir()} >= {"one", "one-epoch-1", "one-epoch-2", "two-epoch-1"}
    found = rayseg(
        "predict", f"{out}#models/one-epoch-1", world / "two.tif", "--out", tmp_path / "map", "--engine", "inline"
    )
    assert found.exit_code == 0, found.output
    last, kept = (bundle.build(out / "models" / name)[1].state_dict() for name in ("one", "one-epoch-1"))
    assert any(not np.array_equal(tensor, last[key]) for key, tensor in kept.items() if key in last)
