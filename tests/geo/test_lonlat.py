"""Polygons in longitude and latitude, cut where their rings cross the antimeridian and nowhere else."""

import numpy as np
import pytest
import shapely
from pyproj import CRS, Transformer

from rayseg.geo.lonlat import bounds_of, box_of, geographic, jumps, lobes_of, normalised, sound, to_lonlat


def projected(crs, *polygons):
    return to_lonlat(np.array(polygons, object), crs)


@pytest.mark.parametrize(
    ("crs", "bounds"),
    [
        ("EPSG:4326", (-180, -90, 180, 90)),
        ("EPSG:4326", (-179.5, -60, 179.5, 60)),  # edges longer than half the world
        ("EPSG:3857", (-20_030_000, -1e7, 20_030_000, 1e7)),
        ("EPSG:32650", (400_000, 4_000_000, 500_000, 4_100_000)),
    ],
)
def test_a_polygon_that_does_not_cross_stays_whole_however_wide_it_is(crs, bounds):
    [moved] = projected(crs, shapely.box(*bounds))
    assert moved.geom_type == "Polygon"
    west, _, east, _ = moved.bounds
    assert bounds_of(moved) == moved.bounds
    left, _, right, _ = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform_bounds(*bounds)
    assert (west, east) == pytest.approx((left, right), abs=1e-6)


@pytest.mark.parametrize(
    ("crs", "bounds", "degrees"),
    [
        ("EPSG:32660", (600_000, 5_000_000, 900_000, 5_200_000), (178.272, -177.754)),
        ("EPSG:4326", (170, -10, 190, 10), (170, -170)),
        ("EPSG:2193", (1_000_000, 4_700_000, 2_900_000, 6_200_000), (165.02, -170.017)),
    ],
)
def test_a_polygon_that_crosses_has_an_edge_there_and_bounds_around_it(crs, bounds, degrees):
    [moved] = projected(crs, shapely.box(*bounds))
    assert moved.geom_type == "MultiPolygon"
    assert moved.is_valid
    assert sorted(part.bounds[0] == -180 or part.bounds[2] == 180 for part in moved.geoms) == [True, True]
    west, _, east, _ = bounds_of(moved)
    assert (west, east) == pytest.approx(degrees, abs=1e-3)


@pytest.mark.parametrize(("crs", "south", "north"), [("EPSG:3413", 83.4, 90), ("EPSG:3031", -90, -83.4)])
def test_a_polygon_around_a_pole_holds_the_pole(crs, south, north):
    [moved] = projected(crs, shapely.box(-500_000, -500_000, 500_000, 500_000))
    assert moved.is_valid
    assert moved.bounds == pytest.approx((-180, south, 180, north), abs=0.1)
    assert moved.covers(shapely.Point(45, 90 if north == 90 else -90))


@pytest.mark.parametrize(
    ("crs", "bounds", "lons"),
    [
        ("EPSG:3031", (-6000, -4000, 0, 0), (-180, -90)),
        ("EPSG:3031", (0, 0, 6000, 4000), (0, 90)),
        ("EPSG:3995", (0, -4000, 6000, 0), (0, 90)),
        ("EPSG:5041", (2_000_000, 2_000_000, 2_006_000, 2_004_000), (90, 180)),
    ],
)
def test_a_polygon_with_a_corner_at_a_pole_lies_between_its_meridians(crs, bounds, lons):
    [moved] = projected(crs, shapely.box(*bounds))
    assert moved.is_valid
    west, south, east, north = moved.bounds
    assert (west, east) == pytest.approx(lons, abs=1e-3)
    assert 89.93 < max(-south, north) <= 90


def test_holes_stay_and_a_ring_around_the_world_becomes_one_polygon():
    outer, inner = (
        shapely.box(600_000, 5_000_000, 900_000, 5_200_000),
        shapely.box(700_000, 5_050_000, 800_000, 5_150_000),
    )
    [whole] = projected("EPSG:32660", outer)
    [pierced] = projected("EPSG:32660", shapely.difference(outer, inner))
    [hole] = projected("EPSG:32660", inner)
    assert whole.area - pierced.area == pytest.approx(hole.area, rel=1e-6)
    [world] = projected("EPSG:4326", shapely.box(0, -60, 360, 60))
    assert world.is_valid
    assert (world.bounds, world.area) == ((-180, -60, 180, 60), pytest.approx(360 * 120))


def test_a_jump_between_rings_is_none():
    two = shapely.MultiPolygon([shapely.box(-179, 0, -170, 1), shapely.box(170, 0, 179, 1)])
    ring = shapely.Polygon([(179, 0), (-179, 0), (-179, 1), (179, 1)])
    assert jumps(np.array([two, ring], object)).tolist() == [False, True]


@pytest.mark.parametrize(
    ("bbox", "expected"),
    [
        ([1, 2, 3, 4], (1, 2, 3, 4)),
        ([15, -42, 12, 15.02, -41, 840], (15, -42, 15.02, -41)),
        ((500_003, 4_648_404, -5, 502_003, 4_650_004, 0), (500_003, 4_648_404, 502_003, 4_650_004)),
    ],
)
def test_a_box_of_four_or_six_numbers_has_four_sides(bbox, expected):
    assert box_of(bbox) == expected


@pytest.mark.parametrize(
    "area",
    [
        shapely.Polygon(),
        shapely.Polygon([(0, 0), (5, 5), (5, 0), (0, 5)]),
        shapely.Polygon([(0, 0), (5, 5), (9, 9)]),
    ],
)
def test_an_outline_that_is_no_area_is_not_sound(area):
    box = shapely.box(0, 0, 5, 5)
    assert sound(box) is box
    with pytest.raises(shapely.errors.ShapelyError):
        sound(area)


def test_a_ring_that_crosses_itself_at_the_antimeridian_is_an_error_of_the_overlay():
    with pytest.raises(shapely.errors.ShapelyError):
        normalised(shapely.Polygon([(-100, 0), (100, 0), (-100, 5), (100, 5)]))


@pytest.mark.parametrize(
    ("crs", "degrees"),
    [
        ("EPSG:4326", True),
        ("EPSG:4283", True),
        ("EPSG:4979", True),
        (CRS.from_epsg(4269).to_wkt("WKT1_ESRI"), True),
        ("EPSG:4807", False),  # grads from Paris
        ("EPSG:32633", False),
        ("+proj=longlat +pm=180", False),
        ("+proj=ob_tran +o_proj=longlat +o_lon_p=-162 +o_lat_p=39.25 +lon_0=180", False),
    ],
)
def test_coordinates_are_degrees_from_greenwich_or_are_transformed(crs, degrees):
    assert geographic(crs) == degrees


@pytest.mark.parametrize(
    ("crs", "lon", "lat"),
    [
        ("EPSG:28193", 35.2, 31.7),  # Cassini-Soldner
        ("EPSG:5880", -54.0, -10.0),  # polyconic
        ("EPSG:2154", 3.0, 46.5),  # conformal cone
        ("EPSG:5070", -96.0, 40.0),  # equal-area cone
        ("EPSG:2056", 7.44, 46.95),  # oblique Mercator
        ("EPSG:32733", 15.0, -30.0),
    ],
)
def test_planes_of_a_country_keep_their_polygons_as_they_are(crs, lon, lat):
    x, y = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(lon, lat)
    [moved] = projected(crs, shapely.box(x - 1000, y - 1000, x + 1000, y + 1000))
    assert moved.geom_type == "Polygon"
    assert len(moved.exterior.coords) == 5
    assert (moved.centroid.x, moved.centroid.y) == pytest.approx((lon, lat), abs=1e-3)


@pytest.mark.parametrize(
    ("crs", "parts"),
    [("+proj=igh", 6), ("+proj=moll", 1), ("EPSG:28193", 0), ("EPSG:5880", 0), ("EPSG:32733", 0), ("EPSG:3857", 0)],
)
def test_maps_of_the_world_have_lobes_and_other_planes_none(crs, parts):
    assert len(lobes_of(crs)) == parts
