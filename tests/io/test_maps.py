"""Areas on the ground: rows of one tile differ, and shares of classes are shares of area."""

import math

import numpy as np
import pytest

from rayseg.geo.grid import NODATA, Grid, Tile, Window
from rayseg.io.maps import class_areas, pixel_area_m2, row_areas_m2

EARTH = 5.10065621724e14  # m2, surface of the WGS 84 ellipsoid
DEGREES = Grid("EPSG:4326", (1.0, 1.0), (0.0, 0.0))


def tile(grid, *window):
    return Tile("t", grid, Window(*window))


def test_the_whole_world_in_degrees_has_the_area_of_the_earth():
    areas_H = row_areas_m2(tile(DEGREES, -180, -90, 360, 180))
    assert areas_H.sum() * 360 == pytest.approx(EARTH, rel=1e-3)
    # 1 x 1 degree at the equator and at 60 degrees north or south
    assert areas_H[90] == pytest.approx(111_320 * 110_574, rel=3e-3)
    assert areas_H[30] == pytest.approx(areas_H[149], rel=1e-9)
    assert areas_H[30] / areas_H[90] == pytest.approx(math.cos(math.radians(59.5)), rel=0.02)


@pytest.mark.parametrize("south", [-70, 20])
def test_rows_of_web_mercator_shrink_with_the_square_of_the_cosine(south):
    size = 10_000.0
    grid = Grid("EPSG:3857", (size, size), (0.0, 0.0))
    y = 6_378_137 * math.log(math.tan(math.pi / 4 + math.radians(south) / 2))
    areas_H = row_areas_m2(tile(grid, 40, round(-y / size), 300, 400))
    lats = [2 * math.atan(math.exp((y - size * (row + 0.5)) / 6_378_137)) - math.pi / 2 for row in (0, 399)]
    assert areas_H[0] == pytest.approx((size * math.cos(lats[0])) ** 2, rel=0.015)
    assert areas_H[-1] == pytest.approx((size * math.cos(lats[1])) ** 2, rel=0.015)


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
