"""Areas on the ground: rows of one tile differ, and shares of classes are shares of area."""

import itertools
import math
from dataclasses import replace

import geopandas
import numpy as np
import pytest
from pyproj import Geod, Transformer
from shapely.geometry import shape

from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.io import maps, vectors
from rayseg.io.maps import class_areas, pixel_area_m2, pixel_areas_m2
from rayseg.io.sources import Source
from rayseg.io.stac_write import lonlat_outline
from rayseg.vision.color import label_table

EARTH = 5.10065621724e14  # m2, surface of the WGS 84 ellipsoid
DEGREES = Grid("EPSG:4326", (1.0, 1.0), (0.0, 0.0))


def tile(grid, *window):
    return Tile("t", grid, Window(*window))


def test_the_whole_world_in_degrees_has_the_area_of_the_earth():
    areas_H = pixel_areas_m2(tile(DEGREES, -180, -90, 360, 180))[:, 0]
    assert areas_H.sum() * 360 == pytest.approx(EARTH, rel=1e-3)
    # 1 x 1 degree at the equator and at 60 degrees north or south
    assert areas_H[90] == pytest.approx(111_320 * 110_574, rel=3e-3)
    assert areas_H[30] == pytest.approx(areas_H[149], rel=1e-9)
    assert areas_H[30] / areas_H[90] == pytest.approx(math.cos(math.radians(59.5)), rel=0.02)


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:3395", "EPSG:3832", "EPSG:6933", "EPSG:4087"])
@pytest.mark.parametrize("south", [-70, 0, 20])
def test_rows_on_a_cylinder_have_the_area_of_the_ground(crs, south):
    """The scale of Web Mercator in PROJ is that of a sphere, 0.7 % off at the equator and 0.5 % at 70 degrees."""
    size = 10_000.0
    grid = Grid(crs, (size, size), (0.0, 0.0))
    [x], [y] = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform([170.0], [south])
    part = tile(grid, round(x / size), round(-y / size), 3, 40)
    areas_HW = pixel_areas_m2(part)
    for row in (0, 39):
        window = Window(part.window.col, part.window.row + row, 1, 1)
        assert areas_HW[row, 0] == pytest.approx(area_on_earth(grid, window), rel=1e-5)
    assert areas_HW.sum() == pytest.approx(area_on_earth(grid, part.window), rel=1e-5)


def test_the_whole_world_on_a_cylinder_has_the_area_of_the_earth():
    """EPSG:6933 ends at a pole within its first and its last row: there PROJ returns no latitude."""
    size, (width, height) = 50_000.0, (695, 294)
    areas_HW = pixel_areas_m2(tile(Grid("EPSG:6933", (size, size), (0.0, 0.0)), -347, -147, width, height))
    assert areas_HW[:, 0].sum() * 2 * 17_367_530.445 / size == pytest.approx(EARTH, rel=1e-6)


def test_a_class_near_the_pole_has_the_area_that_it_has_on_the_ground():
    part = tile(DEGREES, 10, -80, 20, 80)
    classes_HW = np.repeat((np.arange(80) < 40).astype(np.uint8)[:, None], 20, axis=1)
    classes_HW[:, 0] = NODATA
    areas = class_areas(part, classes_HW)
    share = areas[1] / (areas[0] + areas[1])
    # on a sphere: (sin 80 - sin 40) / sin 80
    assert share == pytest.approx(1 - math.sin(math.radians(40)) / math.sin(math.radians(80)), abs=2e-3)
    assert pixel_area_m2(part) * 1600 * 19 / 20 == pytest.approx(sum(areas.values()), rel=1e-6)


def test_without_georeference_there_is_no_area():
    assert class_areas(tile(Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), 0, 0, 4, 4), np.zeros((4, 4), np.uint8)) is None


GEOD = Geod(ellps="WGS84")


def area_on_earth(grid, window):
    """By geodesic polygons of small cells, with vertices along their edges."""
    to_degrees, total = Transformer.from_crs(grid.crs, "EPSG:4326", always_xy=True), 0.0
    there, still = np.linspace(0, 1, 5)[:-1], np.zeros(4)
    ring = np.concatenate([there, still + 1, 1 - there, still]), np.concatenate([still, there, still + 1, 1 - there])
    affine, cols, rows = grid.transform(window), *(np.linspace(0, side, 33) for side in (window.width, window.height))
    for left, right in itertools.pairwise(cols):
        for top, bottom in itertools.pairwise(rows):
            place = left + (right - left) * ring[0], top + (bottom - top) * ring[1]
            total += abs(GEOD.polygon_area_perimeter(*to_degrees.transform(*(affine @ place)))[0])
    return total


@pytest.mark.parametrize(
    ("crs", "size", "window", "inner"),
    [
        ("EPSG:3413", 1000.0, (-512, -512, 1024, 1024), (-300, -400, 120, 40)),
        ("EPSG:3413", 4000.0, (-512, -512, 1024, 1024), (400, 400, 100, 100)),  # to 64 N
        ("EPSG:3031", 1000.0, (-512, -512, 1024, 1024), (-24, -124, 100, 100)),  # nearly around the pole
        ("EPSG:3995", 1000.0, (-512, -512, 1024, 1024), (2, -6, 478, 10)),  # its pole 2 px away
        ("EPSG:3995", 250.0, (0, 0, 512, 512), (10, 20, 300, 200)),
        ("EPSG:4326", 0.01, (1000, -8900, 1500, 100), (1100, -8890, 1200, 60)),
        ("EPSG:4326", 0.1, (0, 850, 900, 50), (30, 860, 800, 39)),
    ],
)
def test_areas_near_the_poles_are_those_of_the_ground(crs, size, window, inner):
    """Of classes, polygons and outlines: pixels of a row differ there, and straight edges are curves in degrees."""
    part = tile(Grid(crs, (size, size), (0.0, 0.0)), *window)
    classes_HW = np.zeros((part.window.height, part.window.width), np.uint8)
    classes_HW[Window(*inner).slices(part.window)] = 1
    expected = area_on_earth(part.grid, Window(*inner))
    assert class_areas(part, classes_HW)[1] == pytest.approx(expected, rel=5e-4)
    frame = vectors.join_parts([vectors.polygons_of(classes_HW, None, part.grid, part.window)], label_table(2))
    assert frame.loc[frame["class"] == 1, "area_m2"].sum() == pytest.approx(expected, rel=5e-4)
    outline, _ = lonlat_outline(part.grid, Window(*inner))
    found = geopandas.GeoSeries([shape(outline)], crs=4326).to_crs(vectors.EQUAL_AREA).area.sum()
    assert found == pytest.approx(expected, rel=5e-3)


def test_the_size_of_a_pixel_is_that_on_the_ground():
    utm = Source("a", (), "EPSG:32650", (2.0, 0, 500000.0, 0, -2.0, 4400000.0), 10, 10, "uint8")
    assert maps.pixel_metres(utm) == pytest.approx(2 / 0.9996, rel=1e-4)
    web = replace(utm, crs="EPSG:3857", transform=(2.0, 0, 0.0, 0, -2.0, 8399737.89))  # at 60 degrees, where it is half
    assert maps.pixel_metres(web) == pytest.approx(1.0, rel=0.01)
    assert maps.pixel_metres(replace(utm, crs=None)) is None
    assert maps.mean_metres([utm, utm, web]) == pytest.approx(2, rel=1e-3)
    assert maps.mean_metres([utm, replace(utm, crs=None)]) is None
    assert maps.mean_metres([]) is None
