"""Finished tiles on the store."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
import rasterio
from fake_run import GPC
from small_world import CORNER, GRID, files, scene, valid_stac

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.rasters import source_of_file
from rayseg.stages.read import tile_rows
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile, facts_of
from rayseg.vision.color import ClassTable

NODATA = 255
THREE = ClassTable(((0, "a", (0, 0, 0)), (1, "b", (0, 158, 115)), (2, "c", (230, 159, 0))))


@pytest.fixture(scope="module")
def row(tmp_path_factory):
    """A tile of one scene, without its results."""
    path = tmp_path_factory.mktemp("scene") / "s.tif"
    scene(path)
    [row] = tile_rows([source_of_file(str(path), "s")], None, size=4096, halo=0)
    return TileRow.from_row(row)


def written(tmp_path, row, classes_HW, *, table=GPC, bands=("gpc",), geometry=None):
    stage = WriteTile(str(tmp_path / "tiles"), table, bands=bands, geometry=geometry, model=str(tmp_path / "item.json"))
    scores = np.repeat(np.where(classes_HW == NODATA, NODATA, 100).astype(np.uint8)[None], len(bands), axis=0)
    [found] = pickle.loads(pickle.dumps(stage))([replace(row, classes=classes_HW, scores=scores)])
    return found


def test_a_tile_is_four_files_and_its_facts(tmp_path, row):
    classes_HW = np.zeros((200, 180), np.uint8)
    classes_HW[:10], classes_HW[-5:] = 1, NODATA
    found = written(tmp_path, row, classes_HW)
    assert (found.status, found.reason) == ("done", "")
    assert found.facts["counts"] == {"0": 185 * 180, "1": 10 * 180}
    folder = tmp_path / "tiles" / row.tile.id
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["classes.tif", "scores.tif", "parts.parquet", f"{row.tile.id}.json"]
    )
    item = valid_stac(folder / f"{row.tile.id}.json")
    assert set(item["assets"]) == {"classes", "scores", "parts"}
    with rasterio.open(folder / "classes.tif") as file:
        assert (file.read(1) == classes_HW).all()


def test_the_item_is_written_last_and_the_same_each_time(tmp_path, row):
    classes_HW = np.eye(200, 180, dtype=np.uint8)
    written(tmp_path, row, classes_HW)
    first = files(tmp_path / "tiles")
    written(tmp_path, row, classes_HW)
    second = files(tmp_path / "tiles")
    assert {name: part[1] for name, part in first.items()} == {name: part[1] for name, part in second.items()}
    assert max(second, key=lambda name: second[name][0]).endswith(".json")


def test_background_alone_is_empty_where_there_is_one(tmp_path, row):
    nothing_HW = np.zeros((200, 180), np.uint8)
    assert written(tmp_path, row, nothing_HW).status == "empty"
    assert written(tmp_path, row, nothing_HW, table=THREE, bands=("a", "b", "c")).status == "done"


def test_no_data_leaves_no_files(tmp_path, row):
    assert written(tmp_path, row, np.full((200, 180), NODATA, np.uint8)) == Settled("nodata")
    assert not (tmp_path / "tiles").exists()


def test_a_tile_read_in_part_is_written_and_fails_and_its_facts_tell_what_reading_and_predicting_met(tmp_path, row):
    met = replace(row, incomplete="a.tif is damaged", unread="b.tif is damaged", batch=2)
    found = written(tmp_path, met, np.ones((200, 180), np.uint8))
    assert (found.status, found.reason) == ("failed", "a part of the tile cannot be read: a.tif is damaged")
    assert (found.facts["unread"], found.facts["batch"], found.facts["pairs"]) == ("b.tif is damaged", 2, 71620)
    assert (tmp_path / "tiles" / row.tile.id / f"{row.tile.id}.json").exists()


def test_outside_of_the_region_is_nodata(tmp_path, row):
    lonlat = rasterio.warp.transform_geom(
        GRID.crs,
        "EPSG:4326",
        {
            "type": "Polygon",
            "coordinates": [
                [(CORNER.col + x, -CORNER.row - y) for x, y in ((20, 20), (60, 20), (60, 80), (20, 80), (20, 20))]
            ],
        },
    )
    found = written(tmp_path, row, np.ones((200, 180), np.uint8), geometry=lonlat)
    with rasterio.open(tmp_path / "tiles" / row.tile.id / "classes.tif") as file:
        classes_HW = file.read(1)
    with rasterio.open(tmp_path / "tiles" / row.tile.id / "scores.tif") as file:
        assert ((file.read(1) == NODATA) == (classes_HW == NODATA)).all()
    assert (classes_HW[21:79, 21:59] == 1).all()
    assert (classes_HW == 1).sum() == pytest.approx(40 * 60, rel=0.02)
    assert found.facts["counts"] == {"1": int((classes_HW == 1).sum())}


def test_changes_are_counted_between_neighbours_with_data():
    classes_HW = np.array([[0, 1, 1], [0, 1, NODATA]], np.uint8)
    tile = Tile("px", Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), Window(0, 0, 3, 2))
    assert facts_of(classes_HW, tile) == {"counts": {"0": 2, "1": 3}, "pairs": 5, "changes": 2}
    placed = Tile("t", Grid("EPSG:32633", (10.0, 10.0), (0.0, 0.0)), Window(50_000, -500_000, 3, 2))
    areas = json.loads(json.dumps(facts_of(classes_HW, placed)))["areas"]
    assert areas == {"0": pytest.approx(200, rel=1e-3), "1": pytest.approx(300, rel=1e-3)}
