"""Polygons on one grid that goes once around the Earth: its last column and its first are neighbours."""

import geopandas
import mercantile
import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from rayseg.engine.ledger import Record
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.io import cog, seams, vectors
from rayseg.io.maps import MappedTile
from rayseg.io.mapview import classes_tile, lonlat_bounds, values_at
from rayseg.io.plot_joins import across_seams
from rayseg.io.polygonize import polygonize
from rayseg.serve.runs import _intersecting
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "low", (0, 0, 0)), (1, "high", (0, 158, 115))))


def joined(grid, *tiles):
    """Polygons of (classes_HW, col, row) on a grid."""
    windows = [Window(col, row, classes_HW.shape[1], classes_HW.shape[0]) for classes_HW, col, row in tiles]
    parts = [
        vectors.polygons_of(classes_HW.astype(np.uint8), None, grid, window)
        for (classes_HW, _, _), window in zip(tiles, windows, strict=True)
    ]
    return vectors.join_parts(parts, TABLE, seams.begins_of(Tile("", grid, window) for window in windows))


@pytest.mark.parametrize(
    ("origin", "side", "first"),
    [(0.0, 1.0, -180), (0.5, 1.0, -181), (0.0, 1.0, 0), (0.25 - 0.125, 0.25, -1), (0.0, 2.5, 30)],
    ids=["-180 to 180", "-180.5", "0 to 360", "0 to 360 by centres", "75 to 435"],
)
def test_a_polygon_over_the_ends_of_the_grid_is_one(origin, side, first):
    grid, count = Grid("EPSG:4326", (side, side), (origin, 0.0)), round(360 / side)
    classes_HW = np.zeros((6, count))
    classes_HW[1:4, :3] = classes_HW[2:5, -4:] = 1  # they share two rows at the seam
    classes_HW[5, 20:22] = 1
    half = count // 2
    frame = joined(grid, (classes_HW[:, :half], first, 8), (classes_HW[:, half:], first + half, 8))
    assert len(frame) == 2
    [whole] = frame[frame.pixels == 3 * 3 + 3 * 4].geometry
    assert whole.is_valid
    assert whole.area == pytest.approx(21 * side**2)
    assert frame.area_m2.sum() == pytest.approx(frame.to_crs("EPSG:6933").area.sum(), rel=1e-9)
    begin = (origin + first * side + 180) % 360 - 180
    assert whole.geom_type == ("MultiPolygon" if begin == -180 else "Polygon") or abs(begin) > 170


def test_polygons_of_two_classes_or_in_other_rows_stay_apart():
    grid, classes_HW = Grid("EPSG:4326", (1.0, 1.0), (0.0, 0.0)), np.zeros((4, 360))
    classes_HW[:2, :3] = classes_HW[2:, -3:] = 1
    assert len(joined(grid, (classes_HW, -180, 0))) == 2
    part = joined(grid, (np.ones((4, 100)), -180, 0), (np.ones((4, 100)), 50, 0))  # not a whole turn
    assert len(part) == 2


def test_web_mercator_and_two_scenes_at_180_join_too(tmp_path):
    half = 20_037_508.342789244
    pixels_HW = np.zeros((4, 64), np.uint8)
    pixels_HW[1:3, :2] = pixels_HW[1:3, -2:] = 1
    with rasterio.open(
        tmp_path / "a.tif", "w", "GTiff", 64, 4, 1, "EPSG:3857", from_origin(-half, 1e6, half / 32, half / 32), "uint8"
    ) as file:  # fmt: skip
        file.write(pixels_HW, 1)
    assert polygonize(str(tmp_path / "a.tif"), str(tmp_path / "a.geojson")) == len(
        geopandas.read_file(tmp_path / "a.geojson")
    )
    ones = geopandas.read_file(tmp_path / "a.geojson")
    ones = ones[ones["class"] == 1]
    assert len(ones) == 1
    grid = Grid("EPSG:4269", (0.01, 0.01), (0.0, 0.0))
    assert len(joined(grid, (np.ones((50, 100)), 17_900, 0), (np.ones((50, 100)), -18_000, 0))) == 1


def test_plots_over_the_ends_of_the_grid_are_one():
    grid = Grid("EPSG:4326", (1.0, 1.0), (0.0, 0.0))
    begins = seams.begins_of([Tile("", grid, Window(0, 0, 360, 10))])
    boxes = [shapely.box(0, 2, 5, 6), shapely.box(355, 2, 360, 6), shapely.box(0, 7, 4, 9), shapely.box(100, 2, 104, 6)]
    plots = [{"number": n, "grid": 0, "geometry": box.wkb} for n, box in enumerate(boxes, 1)]
    assert across_seams([grid], plots, least=0.5, begins=begins) == {1: 1, 2: 1, 3: 3, 4: 4}


@pytest.mark.parametrize(("crs", "west", "side"), [("EPSG:4326", 190.0, 0.01), ("EPSG:3857", 21_150_450.0, 1000.0)])
def test_a_map_that_counts_on_is_shown_at_its_place(tmp_path, crs, west, side):
    """On a web map, whose longitudes end at 180."""
    classes_HW = np.random.default_rng(5).integers(0, 2, (64, 64), np.uint8)
    x, y = west / side, (0.0 if crs == "EPSG:3857" else 5.0) / side
    grid, window = Grid(crs, (side, side), (0.0, 0.0)), Window(round(x), -round(y), 64, 64)
    cog.write_classes(tmp_path / "classes.tif", classes_HW, grid, window, TABLE)
    tile = MappedTile(Tile("t", grid, window), Record("t", "done"), str(tmp_path / "classes.tif"), ())
    left, bottom, right, top = lonlat_bounds(grid, window)
    turned = [lon - 360 * (lon > 180) for lon in (left + (right - left) * 10.5 / 64, left + (right - left) * 40.5 / 64)]
    for lon, col in zip(turned, (10, 40), strict=True):
        lat = bottom + (top - bottom) * 0.5 / 64
        assert values_at(tile, lon, lat)[0] == classes_HW[63, col]
    place = mercantile.tile(turned[0], lat, 8)
    assert (classes_tile([tile], (8, place.x, place.y)) != NODATA).any()
    near = mercantile.bounds(place)
    assert _intersecting(np.array([(left, bottom, right, top)]), (near.west, near.south, near.east, near.north)) == [0]
    (tmp_path / "classes.tif").write_bytes(b"cut")
    with pytest.raises(DataError, match="cannot be read"):
        values_at(tile, turned[0], lat)
