"""Scenes with labels of their own over the same ground: the ground counts once."""

import json
import os
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import rasterio
from affine import Affine

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.manifest import write_rows
from rayseg.engine.run import Engine, Step
from rayseg.errors import DataError
from rayseg.geo.region import Region, resolve_region
from rayseg.io import rasters
from rayseg.io.labels import ingest_rasters
from rayseg.io.remote import Passing
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile
from rayseg.steps import remap, scenes
from rayseg.steps.map import MapConfig
from rayseg.store import upath
from rayseg.vision.color import label_table


def write(path, crs, left, top, side, *, height=60, width=80, empty=0):
    """A scene of ones whose first columns are nodata."""
    pixels_HW = np.ones((height, width), np.uint8)
    pixels_HW[:, :empty] = 0
    transform = Affine(side, 0, left, 0, -side, top)
    with rasterio.open(
        path, "w", "GTiff", width, height, 1, dtype="uint8", nodata=0, crs=crs, transform=transform
    ) as file:
        file.write(pixels_HW, 1)
    os.utime(path, (0, 0))  # all of one time: the order is that of their names


def mapped_areas(folder, fates):
    """Scene -> square metres that its tiles count, where each scene is mapped wherever it has data."""
    region = resolve_region(ingest_rasters(folder / "scenes", folder / "cat") + "#imagery")
    config = MapConfig(tile=32)
    planned = scenes.find_scenes(region, config, halo=0, bands=(), scaling="auto", shared=False)
    write_tile = WriteTile(
        str(folder / "tiles"), label_table(1), bands=("p",), geometry=None, model="", imagery=planned.bands
    )
    record = partial(scenes.with_network, fates, upath("models"))
    areas = {}
    for tiles in planned.tiles:
        for row in tiles:
            scene = row["grid_image"]
            tile = record(row | {"scene": scene})
            if not isinstance(tile, TileRow):
                continue
            tile = TileRow(tile.tile, tile.sources_json, before=tile.before)
            with rasterio.open(tile.sources[0].assets[0][0]) as file:
                whole_HW, extent = file.read(1), tile.tile.grid.window_of(file.bounds)
            classes_HW = np.where(whole_HW[tile.tile.window.slices(extent)] == 1, 0, 255).astype(np.uint8)
            [settled] = write_tile([TileRow(tile.tile, tile.sources_json, before=tile.before, classes=classes_HW,
                                            scores=np.zeros((1, *classes_HW.shape), np.uint8))])  # fmt: skip
            areas[scene] = areas.get(scene, 0) + sum(settled.facts.get("areas", {}).values())
    return areas


def fates(status="done", **others):
    bundled = Record("", "done", facts={"bundle": "b"}) if status == "done" else None
    return dict.fromkeys("abc", bundled) | {name: Record(name, fate) for name, fate in others.items()}


NORTH, SOUTH = "EPSG:32633", "EPSG:32733"


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ({"a": (NORTH, 5e5, 465e4, 10), "b": (NORTH, 5e5, 465e4, 10)}, {"a": 480_000, "b": 0}),
        ({"a": (SOUTH, 5e5, 8e6, 10), "b": (SOUTH, 500_400, 8e6, 10)}, {"a": 480_000, "b": 240_000}),
        # b has pixels twice as large, and rows that do not fit those of a
        ({"a": (SOUTH, 5e5, 8e6, 10), "b": (SOUTH, 500_005, 8_000_105, 20)}, {"a": 480_000, "b": 1_443_000}),
        # the border of a without data is ground of b
        ({"a": (NORTH, 5e5, 465e4, 10, 30), "b": (NORTH, 5e5, 465e4, 10)}, {"a": 300_000, "b": 180_000}),
        ({"a": (NORTH, 5e5, 465e4, 10), "b": (NORTH, 500_400, 465e4, 10), "c": (NORTH, 500_600, 465e4, 10)},
         {"a": 480_000, "b": 240_000, "c": 120_000}),
    ],
    ids=["the same scene", "half", "other pixels", "a border without data", "three"],
)  # fmt: skip
def test_ground_under_several_scenes_counts_once(tmp_path, places, expected):
    (tmp_path / "scenes").mkdir()
    for name, (crs, left, top, side, *empty) in places.items():
        write(tmp_path / "scenes" / f"{name}.tif", crs, left, top, side, empty=empty[0] if empty else 0)
    assert mapped_areas(tmp_path, fates()) == pytest.approx(expected, rel=0.005, abs=1)


def test_ground_under_scenes_of_two_zones_counts_once(tmp_path):
    (tmp_path / "scenes").mkdir()
    # The same corner seen from zones 32 and 33, north of 45 N at 12 E.
    write(tmp_path / "scenes" / "a.tif", "EPSG:32632", 735_500, 5_000_000, 20)
    areas = mapped_areas(tmp_path, fates())
    [left], [top] = rasterio.warp.transform("EPSG:32632", "EPSG:32633", [735_500], [5_000_000])
    write(tmp_path / "scenes" / "b.tif", "EPSG:32633", round(left) - 200, round(top) + 200, 20, height=100, width=120)
    both = mapped_areas(tmp_path, fates())
    assert both["a"] == pytest.approx(areas["a"])
    assert sum(both.values()) == pytest.approx(100 * 120 * 400, rel=0.003)


@pytest.mark.parametrize(("fate", "expected"), [("nodata", 480_000), ("failed", 0)])
def test_a_scene_without_a_map_counts_no_ground_and_a_failed_one_keeps_it_for_its_retry(tmp_path, fate, expected):
    (tmp_path / "scenes").mkdir()
    for name in "ab":
        write(tmp_path / "scenes" / f"{name}.tif", NORTH, 5e5, 465e4, 10)
    assert mapped_areas(tmp_path, fates(a=fate)) == pytest.approx({"b": expected}, rel=0.005)


def on_one_ground(folder):
    """Two scenes on one ground, a without data in 30 of its 80 columns: areas, tiles, names of bands."""
    (folder / "scenes").mkdir()
    for name, empty in (("a", 30), ("b", 0)):
        write(folder / "scenes" / f"{name}.tif", NORTH, 5e5, 465e4, 10, empty=empty)
    areas = mapped_areas(folder, fates())
    region = resolve_region(f"{folder}/cat/catalog.json#imagery")
    found = scenes.find_scenes(region, MapConfig(tile=32), halo=0, bands=(), scaling="auto", shared=False)
    return areas, [row for tiles in found.tiles for row in tiles], found.bands


def test_a_lost_connection_is_tried_again_later_and_a_damaged_scene_counts_no_ground(tmp_path, monkeypatch):
    _, rows, bands = on_one_ground(tmp_path)
    row = TileRow.from_row(next(row for row in rows if row["before"] != "[]"))
    side = (row.tile.window.height, row.tile.window.width)
    row = replace(row, classes=np.zeros(side, np.uint8), scores=np.zeros((1, *side), np.uint8))
    stage = WriteTile(str(tmp_path / "tiles"), label_table(1), bands=("p",), geometry=None, model="", imagery=bands)
    monkeypatch.setattr(rasters, "read", Mock(side_effect=Passing("HTTP 503")))
    with pytest.raises(Passing, match="503"):
        stage([row])
    monkeypatch.setattr(rasters, "read", Mock(side_effect=DataError("a broken block")))
    [settled] = stage([row])
    assert settled.facts["areas"]["0"] == pytest.approx(side[0] * side[1] * 100, rel=0.005)
    (tmp_path / "scenes/a.tif").unlink()
    with pytest.raises(DataError, match="a broken block"):
        stage([row])


@pytest.mark.parametrize(("fate", "expected"), [("done", 180_000), ("nodata", 480_000)])
def test_a_map_that_is_decided_again_counts_shared_ground_once(tmp_path, fate, expected):
    areas, rows, bands = on_one_ground(tmp_path)
    assert areas == pytest.approx({"a": 300_000, "b": 180_000}, rel=0.005)
    # 1. the finished run of b, and of a where it has a map
    steps = tmp_path / "steps"
    (steps / "predict").mkdir(parents=True)
    rows = [row for row in rows if row["grid_image"] == "b"]
    write_rows(steps / "predict/manifest.parquet", rows)
    for row in rows:
        mapped = (tmp_path / "tiles" / row["id"]).exists()
        record = Record(row["id"], "done", facts={"counts": {"0": 1}}) if mapped else Record(row["id"], "nodata")
        Ledger(str(steps / "predict/ledger")).write(record)
    Ledger(str(steps / "networks/ledger")).write(Record("a", fate))
    (steps / "predict/done.json").write_text(json.dumps({"key": "k", "value": {}}))
    values = {"predict": {}, "scenes": {"bands": bands}}
    run = {"pipeline": "superpixel", "status": "done", "config": {}, "steps": values}
    (tmp_path / "run.json").write_text(json.dumps(run))
    # 2. a map of it, and one of that
    origin = str(tmp_path)
    for name in ("new", "newer"):
        step = Step("predict", str(tmp_path / name), "k", Engine("inline"))
        value = remap.reclassify_tiles(step, Region("r"), (origin, "k"), remap.ClassRules(), None, None, 60.0)
        assert value["troubles"] == {}
        found = Ledger(str(step.prefix / "ledger")).read().values()
        assert sum(sum(record.facts["areas"].values()) for record in found) == pytest.approx(expected, rel=0.005)
        (step.prefix / "done.json").write_text(json.dumps({"key": "k", "value": {}}))
        (tmp_path / name / "run.json").write_text(json.dumps(run | {"pipeline": "remap", "steps": {"predict": value}}))
        origin = step.root
