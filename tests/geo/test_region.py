"""Regions of any size and on any turn around the Earth, on any grid."""

import json

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import Transformer
from shapely.geometry import box, mapping, shape

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.lonlat import transformer
from rayseg.geo.region import on_grid, pixels_inside, resolve_region, windows_inside
from rayseg.io.stac_read import open_items

BOXES = {
    "170,-20,-170,-10": [(170, -20, 180, -10), (-180, -20, -170, -10)],
    "179.6,-10,180.3,10": [(179.6, -10, 180, 10), (-180, -10, -179.7, 10)],
    "-180.09,50,-179,51": [(179.91, 50, 180, 51), (-180, 50, -179, 51)],
    "-179,-60,179,60": [(-179, -60, 179, 60)],
    "190,-20,195,-10": [(-170, -20, -165, -10)],
    "350,40,10,50": [(-10, 40, 10, 50)],
    "170,-20,-5,-170,-10,80": [(170, -20, 180, -10), (-180, -20, -170, -10)],  # heights between
    "-.5,-.25,+.5,.25": [(-0.5, -0.25, 0.5, 0.25)],
    "0,-60,360,60": [(-180, -60, 180, 60)],
}


@pytest.mark.parametrize("text", BOXES)
def test_a_typed_box_lies_within_the_world_whatever_its_longitudes_count_from(text):
    region = shape(resolve_region(text).geometry)
    expected = shapely.union_all([box(*part) for part in BOXES[text]])
    assert region.is_valid
    assert region.symmetric_difference(expected).area < 1e-9


def ring(*corners):
    return shapely.Polygon(corners)


@pytest.mark.parametrize(
    ("polygon", "parts"),
    [
        (ring((170, -20), (-170, -20), (-170, -10), (170, -10)), BOXES["170,-20,-170,-10"]),
        (ring((-170, 60), (170, 60), (170, 61), (-170, 61)), [(170, 60, 180, 61), (-180, 60, -170, 61)]),
        (box(179.6, -10, 180.3, 10), BOXES["179.6,-10,180.3,10"]),
        (box(-180.09, 50, -179, 51), BOXES["-180.09,50,-179,51"]),
        (box(-180, -90, 180, 90), [(-180, -90, 180, 90)]),
        (shapely.segmentize(box(-140, -30, 120, 30), 90), [(-140, -30, 120, 30)]),
        (box(100, 0, 300, 10), [(100, 0, 180, 10), (-180, 0, -60, 10)]),
        (shapely.MultiPolygon([box(170, 0, 180, 5), box(180, 0, 185, 5)]), [(170, 0, 180, 5), (-180, 0, -175, 5)]),
        (
            shapely.GeometryCollection([box(175, 0, 185, 5), ring((-170, 6), (170, 6), (170, 7), (-170, 7))]),
            [(175, 0, 180, 5), (-180, 0, -175, 5), (170, 6, 180, 7), (-180, 6, -170, 7)],
        ),
        (
            box(170, -9, 190, 9).difference(box(178, -1, 182, 1)),
            [(170, -9, 178, 9), (-178, -9, -170, 9), *((w, s, w + 2, s + 8) for w in (178, -180) for s in (-9, 1))],
        ),
        (shapely.MultiPolygon([box(0, 0, 2, 2), box(1, 1, 3, 3)]), [(0, 0, 2, 2), (1, 1, 3, 3)]),  # parts that overlap
        *(
            (
                shapely.Polygon(outer, [hole]),
                [
                    (175, 0, 179, 4),
                    (-179, 0, -175, 4),
                    (179, 0, 180, 1),
                    (179, 2, 180, 4),
                    (-180, 0, -179, 1),
                    (-180, 2, -179, 4),
                ],
            )
            for outer in (((175, 0), (175, 4), (-175, 4), (-175, 0)), ((175, 0), (-175, 0), (-175, 4), (175, 4)))
            for hole in (((179, 1), (-179, 1), (-179, 2), (179, 2)), ((179, 1), (179, 2), (-179, 2), (-179, 1)))
        ),
        # long edges: as wide as they look counterclockwise, across the antimeridian clockwise (RFC 7946)
        (ring((-100, 0), (100, 0), (100, 5), (-100, 5)), [(-100, 0, 100, 5)]),
        (box(-120, -60, 140, 70), [(-120, -60, 140, 70)]),
        (ring((-100, 0), (-100, 5), (100, 5), (100, 0)), [(100, 0, 180, 5), (-180, 0, -100, 5)]),
        (ring((95, -40), (-100, -40), (-100, -20), (95, -20)), [(95, -40, 180, -20), (-180, -40, -100, -20)]),
        (shapely.MultiPolygon([box(-95, 10, 96, 20), box(0, 30, 1, 31)]), [(-95, 10, 96, 20), (0, 30, 1, 31)]),
    ],
)
def test_a_polygon_in_a_file_crosses_where_its_steps_do_and_not_because_it_is_wide(tmp_path, polygon, parts):
    path = tmp_path / "r.geojson"
    path.write_text(json.dumps(mapping(polygon)))
    region = shape(resolve_region(str(path)).geometry)
    assert region.symmetric_difference(shapely.union_all([box(*part) for part in parts])).area < 1e-6


@pytest.mark.parametrize("crs", ["OGC:CRS84", "EPSG:4326", "EPSG:4979", "EPSG:4269", "EPSG:4258", "EPSG:4322"])
@pytest.mark.parametrize("suffix", [".parquet", ".geojson", ".gpkg", ".fgb", ".shp"])
def test_degrees_of_any_datum_and_format_are_cut_as_those_of_wgs_84(tmp_path, crs, suffix):
    path, frame = tmp_path / f"r{suffix}", geopandas.GeoDataFrame(
        geometry=[ring((179, -20), (-179, -20), (-179, -10), (179, -10)), ring((-90, 0), (-90, 5), (100, 5), (100, 0))],
        crs=crs,
    )  # fmt: skip
    frame.to_parquet(path) if suffix == ".parquet" else frame.to_file(path)
    region = shape(resolve_region(str(path)).geometry)
    parts = [(179, -20, 180, -10), (-180, -20, -179, -10), (100, 0, 180, 5), (-180, 0, -90, 5)]
    assert region.symmetric_difference(shapely.union_all([box(*part) for part in parts])).area < 0.05


def test_heights_of_a_geojson_do_not_make_the_complement_of_a_region(tmp_path):
    path, corners = tmp_path / "r.geojson", [[179, -20, 5], [-179, -20, 5], [-179, -10, 5], [179, -10, 5]]
    path.write_text(json.dumps({"type": "Polygon", "coordinates": [[*corners, corners[0]]]}))
    assert shape(resolve_region(str(path)).geometry).area == pytest.approx(20)


@pytest.mark.parametrize(("crs", "unit", "meridian"), [("EPSG:4903", 1, -3.687375), ("EPSG:4807", 0.9, 2.337229)])
def test_a_ring_over_180_of_another_meridian_is_cut_at_180_of_greenwich(tmp_path, crs, unit, meridian):
    half = 180 / unit
    frame = geopandas.GeoDataFrame(
        geometry=[ring((half - 9, -20), (9 - half, -20), (9 - half, -10), (half - 9, -10))], crs=crs
    )
    frame.to_parquet(tmp_path / "r.parquet")
    region = shape(resolve_region(str(tmp_path / "r.parquet")).geometry)
    west, east = 180 - 9 * unit + meridian, -180 + 9 * unit + meridian
    expected = box(west, -20 * unit, 180, -10 * unit).union(box(-180, -20 * unit, east, -10 * unit))
    assert region.symmetric_difference(expected).area < 0.01 * expected.area


def test_what_surrounds_a_wide_region_is_not_its_complement(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("rayseg.io.stac_catalog.rows_of", lambda *words: asked.append(shape(words[2])) or [])
    for text in ("-100,0,100,5", "-130,-50,130,-20"):
        with pytest.raises(DataError, match="holds no items"):
            open_items("https://h/v1", geometry=resolve_region(text).geometry, halo=64)
        assert asked[-1].symmetric_difference(box(*map(float, text.split(",")))).area < 0.2 * asked[-1].length


def test_a_file_in_metres_is_cut_at_the_antimeridian(tmp_path):
    frame = geopandas.GeoDataFrame(geometry=[box(700_000, 5_900_000, 800_000, 6_000_000)], crs="EPSG:32760")
    frame.to_parquet(tmp_path / "r.parquet")
    region = shape(resolve_region(str(tmp_path / "r.parquet")).geometry)
    assert {part.bounds[0] > 0 for part in region.geoms} == {True, False}
    assert region.area < 2


# -- on grids


def window_on(grid, bounds):
    return grid.window_of(bounds)


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("60,-10,150,55", {"EPSG:32646": 1.0, "EPSG:32633": 0.0, "EPSG:32748": 1.0, "EPSG:32608": 0.0}),
        ("-170,5,-50,75", {"EPSG:32646": 0.0, "EPSG:32633": 0.0, "EPSG:32748": 0.0, "EPSG:32608": 1.0}),
        ("-180,-90,180,90", dict.fromkeys(("EPSG:32646", "EPSG:32633", "EPSG:32748", "EPSG:32608"), 1.0)),
    ],
)
def test_continents_and_the_world_are_cut_before_they_are_projected(text, inside):
    region = resolve_region(text)
    for crs, share in inside.items():
        north = 9_700_000 if crs == "EPSG:32748" else 3_000_000
        grid = Grid(crs, (1000.0, 1000.0), (0.0, 0.0))
        window = window_on(grid, (400_000, north, 500_000, north + 100_000))
        area = on_grid(region.geometry, grid, window)
        assert pixels_inside(area, grid, window).mean() == share
        corners = np.array([[window.col, window.row, window.col1, window.row1]])
        assert windows_inside(area, grid, corners).tolist() == [bool(share)]


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4269"])
def test_a_region_over_the_antimeridian_is_found_on_grids_that_count_on(crs):
    grid = Grid(crs, (0.1, 0.1), (0.0, 0.0))
    over = Window(1750, 100, 100, 100)  # 175..185 E, 10..20 S
    for text, cols in (("179,-20,-179,-10", slice(40, 60)), ("-176,-20,-175.5,-10", slice(90, 95))):
        mask = pixels_inside(on_grid(resolve_region(text).geometry, grid, over), grid, over)
        assert mask[:, cols].all()
        assert mask.sum() == mask[:, cols].size
    to_360 = Window(0, -500, 3600, 100)  # 0..360 E, 40..50 N
    mask = pixels_inside(on_grid(resolve_region("350,40,10,50").geometry, grid, to_360), grid, to_360)
    assert mask[:, :100].all()
    assert mask[:, -100:].all()
    assert mask.sum() == 200 * 100


@pytest.mark.parametrize(
    ("crs", "edge"), [("EPSG:3857", 180.0), ("EPSG:6933", 180.0), ("EPSG:3832", -30.0), ("EPSG:3395", 180.0)]
)
@pytest.mark.parametrize("lat", [-30.0, 12.0])
def test_a_region_over_the_edge_of_a_plane_is_found_on_both_sides(crs, edge, lat):
    """Web Mercator ends at 180 degrees: what lies beyond is at its other end."""
    lons = [(edge + step + 180) % 360 - 180 for step in (-0.1, 0.1)]
    region, grid = (
        resolve_region(f"{lons[0]},{lat - 1},{lons[1]},{lat + 1}").geometry,
        Grid(crs, (100.0, 100.0), (0, 0)),
    )
    for side in (-1, 1):
        xs, ys = transformer("EPSG:4326", crs).transform([edge + side * step for step in (1e-6, 0.1, 0.15)], [lat] * 3)
        window = grid.window_of((min(xs) - 300, ys[0] - 2000, max(xs) + 300, ys[0] + 2000))
        inside = pixels_inside(on_grid(region, grid, window), grid, window)
        assert inside.mean(axis=0).sum() == pytest.approx(abs(xs[1] - xs[0]) / 100, abs=1)


def test_the_cap_around_a_pole_is_whole_on_a_polar_grid():
    grid = Grid("EPSG:3413", (10_000.0, 10_000.0), (0.0, 0.0))
    window = window_on(grid, (-2e6, -2e6, 2e6, 2e6))
    assert pixels_inside(on_grid(mapping(box(-180, -90, 180, 90)), grid, window), grid, window).all()
    cap = pixels_inside(on_grid(mapping(box(-180, 80, 180, 90)), grid, window), grid, window)
    to_degrees = Transformer.from_crs("EPSG:3413", "EPSG:4326", always_xy=True)
    side = (np.arange(400) + 0.5) * 10_000 - 2e6
    xs, ys = np.meshgrid(side, side[::-1])
    assert (cap == (to_degrees.transform(xs, ys)[1] > 80)).mean() > 0.999


def test_what_a_tile_is_cut_to_does_not_depend_on_the_window_it_is_asked_for():
    """Bits, not only bounds: a pixel must not change with the tile size."""
    grid = Grid("EPSG:32650", (10.0, 10.0), (0.0, 0.0))
    region = mapping(shapely.Point(117, 36.1).buffer(0.05, quad_segs=3))
    whole = Window(49_000, -401_000, 2000, 2000)
    area = pixels_inside(on_grid(region, grid, whole), grid, whole)
    assert 0 < area.sum() < area.size
    for row in range(0, 2000, 500):
        part = Window(49_500, whole.row + row, 700, 500)
        assert (pixels_inside(on_grid(region, grid, part), grid, part) == area[part.slices(whole)]).all()


@pytest.mark.parametrize(
    ("area", "crs"),
    [
        (box(40, 100, 41, 120), "EPSG:4326"),  # longitude and latitude swapped
        (box(-20, -130, -19, -129), "EPSG:4269"),
        (box(500_000, 4_600_000, 501_000, 4_601_000), None),  # metres without their CRS
    ],
)
def test_a_region_file_nowhere_on_earth_is_refused_by_name(tmp_path, area, crs):
    path = tmp_path / "field.parquet" if crs else tmp_path / "field.geojson"
    frame = geopandas.GeoDataFrame(geometry=[area], crs=crs)
    frame.to_parquet(path) if crs else path.write_text(frame.to_json())
    with pytest.raises(DataError, match=r"field\.\w+ lies within .* nowhere on Earth; are longitude and"):
        resolve_region(str(path))
