"""Scenes with labels of their own over the same ground: the ground counts once."""

import os
from functools import partial

import numpy as np
import pytest
import rasterio
from affine import Affine

from rayseg.engine.ledger import Record
from rayseg.geo.region import resolve_region
from rayseg.io.labels import ingest_rasters
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile
from rayseg.steps import scenes
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
