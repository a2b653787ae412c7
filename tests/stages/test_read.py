"""Tiles of sources and their pixels."""

import json
import pickle
from dataclasses import replace

import numpy as np
import pytest
from small_world import BANDS, CORNER, GRID, damage, scene
from small_world import window_at as window

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Tile
from rayseg.io.rasters import source_of_file
from rayseg.io.sources import Source
from rayseg.stages.oversegment import Divide, ReadAround
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.stages.rows import TileRow

STAGE = ReadTile(BANDS, patch=64, stride=48)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two scenes that abut, 200 x 180 px each."""
    root = tmp_path_factory.mktemp("scenes")
    scene(root / "a.tif", seed=1)
    scene(root / "b.tif", seed=2, col=180, margin=0)
    return [source_of_file(str(root / f"{name}.tif"), name) for name in "ab"]


def records(sources, *, halo=0):
    return [TileRow.from_row(row) for row in tile_rows(sources, None, size=4096, halo=halo)]


@pytest.mark.parametrize("size", [64, 128, 1000])
def test_tiles_cover_all_imagery_exactly_once(sources, size):
    rows = tile_rows(sources, None, size=size, halo=0)
    covered = np.zeros((200, 360), int)
    for row in rows:
        covered[Tile.from_row(row).window.slices(window(0, 0))] += 1
    assert (covered == 1).all()
    assert len({row["id"] for row in rows}) == len(rows)


def test_a_tile_has_the_sources_that_its_halo_reaches(sources):
    def names(halo):
        rows = tile_rows(sources, None, size=100, halo=halo)
        return {row["id"]: [one["item_id"] for one in json.loads(row["sources"])] for row in rows}

    first = f"32650_{CORNER.col // 100}_{CORNER.row // 100}"
    assert names(0)[first] == ["a"]
    assert names(300)[first] == ["a", "b"]


def test_rows_are_plain_and_pickle(sources):
    [row] = tile_rows(sources[:1], None, size=4096, halo=0)
    assert {type(value) for value in row.values()} <= {str, int, float, type(None)}
    assert pickle.loads(pickle.dumps(row)) == row
    assert Source.from_row(json.loads(row["sources"])[0]) == sources[0]
    record = pickle.loads(pickle.dumps(TileRow.from_row(row)))
    assert (record.tile, record.sources, record.refused) == (Tile.from_row(row), sources[:1], "")


def test_only_tiles_inside_the_region(sources):
    lon = 117.0
    far = {"type": "Polygon", "coordinates": [[[lon, 10], [lon + 1, 10], [lon + 1, 11], [lon, 11], [lon, 10]]]}
    near = {"type": "Polygon", "coordinates": [[[116, 39], [118, 39], [118, 40], [116, 40], [116, 39]]]}
    assert tile_rows(sources, far, size=128, halo=0) == []
    assert tile_rows(sources, near, size=128, halo=0) == tile_rows(sources, None, size=128, halo=0)


def test_a_tile_is_read_with_the_halo_of_its_patches(sources):
    [row] = pickle.loads(pickle.dumps(STAGE))(records(sources[1:], halo=112))
    own = row.tile.window
    reach = Lattice.of(GRID, 64, 48).reach(own)
    assert row.reach == reach
    assert row.image.shape == (3, reach.height, reach.width)
    assert row.valid[own.slices(reach)].all()
    assert row.valid.sum() == own.width * own.height
    assert (row.image[:, ~row.valid] == 0).all()


def test_a_tile_without_data_is_settled(sources, tmp_path):
    scene(tmp_path / "bare.tif", margin=10_000)
    assert STAGE(records([source_of_file(str(tmp_path / "bare.tif"), "bare")])) == [Settled("nodata")]


def test_a_scene_that_is_refused_fails_with_its_reason(sources):
    with pytest.raises(DataError, match="no red band"):
        STAGE([replace(row, refused="no red band") for row in records(sources)])


def test_a_band_that_is_missing_is_an_error_of_the_data(sources):
    with pytest.raises(DataError, match="nir"):
        ReadTile(("nir",), patch=64, stride=48)(records(sources))


def test_of_a_damaged_file_labels_miss_no_more_than_maps_and_superpixels_wait_for_the_whole(tmp_path):
    scene(tmp_path / "a.tif", margin=0, height=900, width=900)
    rows = records([source_of_file(str(tmp_path / "a.tif"), "a")])
    whole = ReadAround(BANDS, margin=8)(rows)[0]
    damage(tmp_path / "a.tif")
    [row] = ReadAround(BANDS, margin=8)(rows)
    missing_HW = whole.valid & ~row.valid
    assert 0 < missing_HW.sum() < 0.8 * whole.valid.sum()
    assert np.array_equal(row.image[:, row.valid], whole.image[:, row.valid])
    assert "cannot be read" in row.incomplete
    for damaged in (row, replace(row, incomplete="", unread="a.tif")):
        with pytest.raises(DataError, match=r"a\.tif"):
            Divide(str(tmp_path / "parts"), "slic", {"spacing": 40})([damaged])


@pytest.mark.parametrize("stride", [64, 48])
def test_a_refused_scene_fails_with_its_reason_also_where_patches_do_not_overlap(stride):
    tile = TileRow(Tile("b", GRID, window(0, 0, 0, 0)), "[]", "b has 1 band, expected 3")
    with pytest.raises(DataError, match="b has 1 band, expected 3"):
        ReadTile(BANDS, patch=64, stride=stride, made_by="x")([tile])
