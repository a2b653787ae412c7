"""predict from the command line: maps that lie exactly on the imagery, whatever the tiling and the engine."""

import json

import geopandas
import numpy as np
import pystac
import pytest
import rasterio
from fake_run import blobs, picture
from PIL import Image
from rio_cogeo.cogeo import cog_validate
from small_world import (
    CORNER,
    GRID,
    HEIGHT,
    WIDTH,
    catalogue,
    damage,
    files,
    mosaic,
    rayseg,
    refused,
    segmenter,
    valid_stac,
)
from small_world import window_at as window

from rayseg.engine import run as runs
from rayseg.engine.run import read


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A scene with a margin of nodata, its catalogue, a bundle."""
    root = tmp_path_factory.mktemp("world")
    return {"catalogue": catalogue(root / "imagery", scene={}), "model": tiny_model, "root": root}


@pytest.fixture(scope="module")
def runs_by_tile(world):
    """Side of a tile -> finished run over the scene."""
    made = {}
    for tile in (2048, 256, 128):
        made[tile] = world["root"] / f"run-{tile}"
        found = predict(world, made[tile], "--set", f"map.tile={tile}")
        assert found.exit_code == 0, found.output
    return made


def predict(world, out, *more, engine="inline"):
    words = ("--out", out, "--engine", engine, "--set", "polygons.simplify=null")  # pixels can be compared
    return rayseg("predict", world["model"], world["catalogue"], *words, *more)


def polygons(root):
    return geopandas.read_parquet(root / "polygons.parquet")


def test_the_map_lies_exactly_on_the_imagery(runs_by_tile, world):
    [path] = (runs_by_tile[2048] / "tiles").glob("*/classes.tif")
    with rasterio.open(path) as classes, rasterio.open(world["root"] / "imagery/scene.tif") as image:
        assert classes.transform == image.transform
        assert (classes.crs, classes.bounds, classes.shape) == (image.crs, image.bounds, image.shape)
        assert (classes.dtypes, classes.nodata) == (("uint8",), 255)
        assert classes.colormap(1)[1][:3] == (0, 158, 115)
        valid_HW = image.read_masks(1) > 0
        assert ((classes.read(1) != 255) == valid_HW).all()
        assert set(np.unique(classes.read(1))) == {0, 1, 255}
    with rasterio.open(path.parent / "scores.tif") as scores:
        assert (scores.shape, scores.transform) == (valid_HW.shape, image.transform)
        assert (scores.nodata, scores.descriptions) == (255, ("gpc",))
        assert ((scores.read(1) != 255) == valid_HW).all()
    for name in ("classes", "scores"):
        valid, errors, warnings = cog_validate(path.parent / f"{name}.tif", strict=True)
        assert (valid, errors, warnings) == (True, [], [])


def test_classes_are_the_scores_above_a_half(runs_by_tile):
    classes, scores = mosaic(runs_by_tile[2048])[0], mosaic(runs_by_tile[2048], "scores")[0]
    seen = classes != 255
    assert (classes[seen & (scores > 127)] == 1).all()
    assert (classes[seen & (scores < 127)] == 0).all()


def test_polygons_are_the_map(runs_by_tile, world):
    frame, classes = polygons(runs_by_tile[2048]), mosaic(runs_by_tile[2048], "sieved")[0]
    assert frame.crs == "EPSG:4326"
    assert set(frame["name"]) == {"gpc"}
    assert frame["pixels"].sum() == (classes == 1).sum()
    assert frame["area_m2"].sum() == pytest.approx((classes == 1).sum(), rel=2e-3)  # the scale of the UTM zone
    assert frame["score_mean"].between(0.5, 1).all()
    grounded = frame.to_crs(GRID.crs)
    burnt = rasterio.features.rasterize(
        grounded.geometry, out_shape=classes.shape, transform=GRID.transform(window(0, 0))
    )
    assert (burnt == (classes == 1)).mean() > 0.9999  # a vertex on its way through EPSG:4326 moves by less than a mm
    left, bottom, right, top = GRID.bounds(window(0, 0))
    x0, y0, x1, y1 = grounded.total_bounds
    assert left - 1e-3 <= x0
    assert bottom - 1e-3 <= y0
    assert x1 <= right + 1e-3
    assert y1 <= top + 1e-3


def test_items_and_collection_are_valid_and_lead_to_their_files(runs_by_tile, world):
    run = runs_by_tile[256]
    collection = pystac.Collection.from_file(str(run / "collection.json"))
    found = list(collection.get_items())
    assert len(found) == 4
    valid_stac(run / "collection.json")
    for item in found:
        row = valid_stac(item.get_self_href())
        with rasterio.open(item.assets["classes"].get_absolute_href()) as classes:
            assert row["properties"]["proj:code"] == "EPSG:32650"
            assert row["properties"]["proj:transform"][:6] == list(classes.transform)[:6]
            assert row["properties"]["proj:shape"] == list(classes.shape)
        sources = [link.get_absolute_href() for link in item.get_links("derived_from")]
        assert any(href.endswith("scene.json") for href in sources)
        assert any(href.endswith("model/item.json") for href in sources)
    assert len(geopandas.read_parquet(run / "items.parquet")) == 4


@pytest.mark.parametrize("tile", [256, 128])
def test_tiled_is_whole(runs_by_tile, tile):
    count = {256: 4, 128: 9}[tile]
    assert len(list((runs_by_tile[tile] / "tiles").glob("*/classes.tif"))) == count
    for name in ("classes", "scores"):
        assert (mosaic(runs_by_tile[tile], name) == mosaic(runs_by_tile[2048], name)).all()
    whole, tiled = polygons(runs_by_tile[2048]), polygons(runs_by_tile[tile])
    assert len(whole) > 5
    assert whole.equals(tiled)


def test_the_second_run_does_nothing(runs_by_tile, world):
    before = files(runs_by_tile[256])
    again = predict(world, runs_by_tile[256], "--set", "map.tile=256")
    assert again.exit_code == 0
    after = files(runs_by_tile[256])
    changed = [name for name, found in after.items() if before.get(name) != found and name != ".lock"]
    assert changed == ["run.json"]
    assert read(str(runs_by_tile[256]))["status"] == "done"


def test_the_report_is_printed_and_is_there(runs_by_tile, world):
    said = predict(world, runs_by_tile[128], "--set", "map.tile=128").stdout
    path, _, summary = said.partition(": ")
    assert path == str(runs_by_tile[128] / "report" / "index.html")
    assert "gpc" in summary
    assert "<html" in (runs_by_tile[128] / "report" / "index.html").read_text()


def test_status_adds_up(runs_by_tile):
    said = rayseg("status", runs_by_tile[128])
    assert said.exit_code == 0
    assert "predict, done" in said.stdout
    assert "9 planned = 8 done + 1 empty" in said.stdout
    report = json.loads(rayseg("status", runs_by_tile[128], "--json").stdout)
    steps = ["model", "predict", "generalize", "polygons", "publish", "qgis", "certificate", "report"]
    assert list(report["times"]) == steps
    assert report["steps"]["predict"]["counts"]["done"] == 8


def test_a_killed_run_is_told_from_a_running_one(runs_by_tile, tmp_path, world):
    out = tmp_path / "killed"
    out.mkdir()
    (out / "run.json").write_text(json.dumps(read(str(runs_by_tile[128])) | {"status": "running"}))
    said = rayseg("status", out)
    assert "killed" in said.stdout
    assert said.exit_code == 3
    with runs._locked(str(out)):
        said = rayseg("status", out)
    assert "running" in said.stdout
    assert said.exit_code == 0


def test_only_some_tiles(world, tmp_path, runs_by_tile):
    ids = sorted(path.name for path in (runs_by_tile[128] / "tiles").iterdir())
    out = tmp_path / "some"
    found = predict(world, out, "--set", "map.tile=128", "--tiles", f"{ids[4]}, {ids[0]}")
    assert found.exit_code == 0
    assert sorted(path.name for path in (out / "tiles").iterdir()) == [ids[0], ids[4]]
    for name in (ids[0], ids[4]):
        part = f"tiles/{name}/classes.tif"
        assert (out / part).read_bytes() == (runs_by_tile[128] / part).read_bytes()


def test_a_region_cuts_the_map(world, tmp_path, runs_by_tile):
    area = geopandas.GeoSeries.from_wkt(
        [
            f"POLYGON(({CORNER.col + 50} {-CORNER.row - 50}, {CORNER.col + 150} {-CORNER.row - 50}, "
            f"{CORNER.col + 150} {-CORNER.row - 150}, {CORNER.col + 50} {-CORNER.row - 150}, "
            f"{CORNER.col + 50} {-CORNER.row - 50}))"
        ],
        crs=GRID.crs,
    )
    region = tmp_path / "area.geojson"
    area.to_crs("EPSG:4326").to_file(region)
    out = tmp_path / "cut"
    words = ("--set", f"map.imagery={world['catalogue']}", "--engine", "inline")
    assert rayseg("predict", world["model"], region, "--out", out, *words).exit_code == 0
    cut, whole = mosaic(out)[0], mosaic(runs_by_tile[2048])[0]
    inside = np.zeros_like(cut, bool)
    inside[50:150, 50:150] = True
    assert (cut[inside] == whole[inside]).mean() > 0.999
    assert (cut[~inside] == 255).mean() > 0.999


def test_several_classes_have_a_band_of_scores_each(world, tmp_path):
    model = segmenter(tmp_path / "model", classes=3)
    out = tmp_path / "run"
    assert rayseg("predict", model, world["catalogue"], "--out", out, "--engine", "inline").exit_code == 0
    classes, scores = mosaic(out)[0], mosaic(out, "scores")
    assert scores.shape == (3, HEIGHT, WIDTH)
    assert set(np.unique(classes)) == {0, 1, 2, 255}
    seen = classes != 255
    chosen = np.take_along_axis(scores, classes[None] % 3, axis=0)[0]
    assert (chosen[seen] == scores.max(axis=0)[seen]).all()
    assert set(polygons(out)["name"]) == {"kind-0", "kind-1", "kind-2"}


def test_images_without_georeference_keep_their_shapes(world, tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    shapes = {"a": (90, 130), "b": (64, 64), "c": (50, 200)}
    for name, (height, width) in shapes.items():
        image_CHW = picture(blobs(height, width))
        Image.fromarray(image_CHW.transpose(1, 2, 0)).save(folder / f"{name}.png")
    out = tmp_path / "run"
    words = ("--engine", "inline", "--set", "polygons.min_area=null")
    found = rayseg("predict", world["model"], folder, "--out", out, *words)
    assert found.exit_code == 0, found.output
    for name, shape in shapes.items():
        [path] = (out / "tiles").glob(f"{name}_px_*/classes.tif")
        with rasterio.open(path) as file:
            assert (file.shape, file.crs) == (shape, None)
            assert (file.read(1) != 255).all()
    frame = polygons(out)
    assert frame.crs is None
    assert set(frame["image"]) == {"a", "b", "c"}
    assert "3 planned" in rayseg("status", out).stdout


def test_one_image_is_a_source_too(world, tmp_path, runs_by_tile):
    out = tmp_path / "run"
    words = ("predict", world["model"], world["root"] / "imagery/scene.tif", "--out", out, "--engine", "inline")
    assert "polygons.min_area is 1000000000 m2" in refused(2, *words, "--set", "polygons.min_area=1e9")
    assert not out.exists()
    assert rayseg(*words).exit_code == 0
    assert (mosaic(out) == mosaic(runs_by_tile[2048])).all()


def test_a_damaged_tile_fails_alone_and_is_mended_by_a_retry(world, tmp_path, monkeypatch):
    apart = {"left": {"seed": 1}, "middle": {"col": 2048, "seed": 2}, "right": {"col": 4096, "seed": 3}}
    imagery = catalogue(tmp_path / "imagery", **apart)
    whole = damage(tmp_path / "imagery/middle.tif")
    out = tmp_path / "run"
    found = rayseg("predict", world["model"], imagery, "--out", out, "--engine", "inline")
    assert found.exit_code == 3
    assert found.stderr.splitlines()[-1].startswith("rayseg: 1 tile failed: predict 32650_245_-2148 (ReadTile: ")
    assert found.stderr.splitlines()[-1].endswith(f"rayseg retry {out}")
    assert len(list((out / "tiles").glob("*/classes.tif"))) == 2
    assert not (out / "tiles/32650_245_-2148").exists()
    said = rayseg("status", out)
    assert said.exit_code == 3
    assert "3 planned = 2 done + 1 failed" in said.stdout
    assert "middle.tif cannot be read" in said.stdout
    assert rayseg("status", out, "--json").exit_code == 3
    before = files(out / "tiles")
    (tmp_path / "imagery/middle.tif").write_bytes(whole)
    monkeypatch.chdir(tmp_path / "imagery")
    again = rayseg("retry", out, "--engine", "inline")
    assert again.exit_code == 0, again.output
    assert rayseg("status", out).exit_code == 0
    after = files(out / "tiles")
    # Pixels of a mended tile may reach into the sieved classes of its neighbours, which are made again.
    assert {name: after[name] for name in before if "sieved" not in name} == {
        name: content for name, content in before.items() if "sieved" not in name
    }
    assert "32650_245_-2148/classes.tif" in after
    assert set(polygons(out)["name"]) == {"gpc"}
    assert len(list(pystac.Collection.from_file(str(out / "collection.json")).get_items())) == 3


@pytest.mark.more  # engine/test_flow.py: both engines, the same bytes
@pytest.mark.ray
def test_ray_and_inline_give_the_same_bytes(world, tmp_path, local_ray, runs_by_tile):
    out = tmp_path / "run"
    assert predict(world, out, "--set", "map.tile=128", engine="ray").exit_code == 0
    inline, ray = files(runs_by_tile[128]), files(out)
    made = [name for name in inline if name.startswith("tiles/") or name in {"polygons.parquet", "items.parquet"}]
    tiles = [name for name in made if name.endswith((".tif", "parts.parquet")) or name == "polygons.parquet"]
    assert len(tiles) == 9 * 4 + 1
    for name in tiles:
        assert ray[name][1] == inline[name][1], name
