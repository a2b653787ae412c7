"""Polygons: identical whatever the tiling, exactly the pixels they stand for, of the right place and size."""

import json

import geopandas
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio.features
import shapely
from affine import Affine
from geopandas.testing import assert_geodataframe_equal
from pyproj import CRS, Geod
from scipy.ndimage import gaussian_filter

from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, vectors
from rayseg.io.polygonize import polygonize
from rayseg.io.vectors import (
    join_parts,
    polygons_of,
    read_parts,
    write_geojson,
    write_geoparquet,
    write_parts,
)
from rayseg.vision.color import ClassTable

GRID = Grid("EPSG:32650", (10.0, 10.0), (3.0, 4.0))
PIXELS = Grid(None, (1.0, 1.0), (0.0, 0.0), "photo")
TABLE = ClassTable(((0, "land", (0, 0, 0)), (1, "water", (0, 0, 255)), (2, "road", (9, 9, 9))))


def blobs(height, width, seed, smooth=2.0, classes=3):
    field = gaussian_filter(np.random.default_rng(seed).random((height, width)), smooth)
    edges = np.quantile(field, np.linspace(0, 1, classes + 2)[1:-1])
    found = np.digitize(field, edges).astype(np.uint8)
    return np.where(found == classes, 255, found).astype(np.uint8)


def scores_of(classes, seed=0, bands=3):
    scores = np.random.default_rng(seed).integers(0, 255, (bands, *classes.shape)).astype(np.uint8)
    return np.where(classes == 255, 255, scores).astype(np.uint8)


def joined(classes, scores, size, *, grid=GRID, col=-17, row=5, order=1, **options):
    height, width = classes.shape
    parts = []
    for r in range(0, height, size):
        for c in range(0, width, size):
            cut = (slice(r, r + size), slice(c, c + size))
            part = classes[cut]
            window = Window(col + c, row + r, part.shape[1], part.shape[0])
            parts.append(polygons_of(part, None if scores is None else scores[:, *cut], grid, window, **options))
    return join_parts(parts[::order], TABLE)


def assert_identical(one, other):
    assert_geodataframe_equal(one, other)  # which takes equal areas for equal geometries
    assert one.geometry.to_wkb().tolist() == other.geometry.to_wkb().tolist()


@pytest.mark.parametrize("smooth", [0.0, 0.7, 3.0])
@pytest.mark.parametrize("grid", [GRID, PIXELS], ids=["utm", "pixels"])
def test_polygons_are_the_same_whatever_the_tiling(smooth, grid):
    for seed in range(2):
        classes = blobs(41, 53, seed, smooth)
        scores = scores_of(classes)
        whole = joined(classes, scores, 100, grid=grid)
        assert whole.geometry.is_valid.all()
        for size, order in ((30, 1), (13, -1), (7, 1)):
            assert_identical(joined(classes, scores, size, grid=grid, order=order), whole)


def test_single_pixels_are_tiles_too():
    for seed in range(3):
        classes = blobs(9, 11, seed, 0.6)
        whole = joined(classes, scores_of(classes), 11)
        for size in (1, 2):
            assert_identical(joined(classes, scores_of(classes), size), whole)


def test_polygons_cover_the_pixels_of_their_class_and_no_other():
    classes = blobs(50, 60, 5, 1.0)
    frame = joined(classes, scores_of(classes), 16, grid=PIXELS, col=0, row=0)
    again = rasterio.features.rasterize(
        zip(frame.geometry, frame["class"], strict=True),
        classes.shape,
        fill=255,
        transform=Affine.identity(),
        dtype="uint8",
    )
    assert np.array_equal(again, classes)
    assert (frame.geometry.area == frame["pixels"]).all()
    assert frame["pixels"].sum() == (classes != 255).sum()


def test_pieces_that_meet_at_a_corner_only_stay_apart():
    classes = np.array([[1, 0, 0, 0], [0, 1, 1, 0], [0, 0, 0, 1]], np.uint8)
    for size in (4, 2, 1):
        assert len(joined(classes, None, size, grid=PIXELS)) == 3


def test_classes_do_not_join_each_other_over_a_border():
    classes = np.array([[1, 2], [1, 2]], np.uint8)
    assert joined(classes, None, 1, grid=PIXELS)["class"].tolist() == [1, 2]


def test_a_ring_over_many_tiles_keeps_its_hole_and_its_corners_only():
    classes = np.zeros((30, 30), np.uint8)
    classes[3:27, 4:26] = 1
    classes[10:20, 10:20] = 0
    for size in (30, 5, 3):
        [polygon] = joined(classes, None, size, grid=PIXELS, col=0, row=0).geometry
        assert polygon.bounds == (4, 3, 26, 27)
        assert len(polygon.exterior.coords) == 5
        assert [hole.bounds for hole in polygon.interiors] == [(10, 10, 20, 20)]
        assert len(polygon.interiors[0].coords) == 5


def test_holes_that_touch_at_a_corner_make_valid_polygons():
    classes = np.ones((6, 6), np.uint8)
    classes[1, 1] = classes[2, 2] = classes[3, 1] = classes[0, 3] = classes[1, 4] = 0
    whole = joined(classes, None, 6, grid=PIXELS)
    assert whole.geometry.is_valid.all()
    for size in (1, 2, 3, 4):
        assert_identical(joined(classes, None, size, grid=PIXELS), whole)


def test_the_background_of_a_yes_or_no_map_is_left_out_and_no_class_of_others():
    classes = np.array([[0, 1], [2, 255]], np.uint8)
    one, three = scores_of(classes, bands=1), scores_of(classes)
    assert joined(np.where(classes == 2, 0, classes), one, 2)["class"].tolist() == [1]
    assert joined(classes, three, 2)["class"].tolist() == [0, 1, 2]
    assert joined(classes, three, 2, skip=(1, 2))["class"].tolist() == [0]
    assert joined(classes, three, 2)["name"].tolist() == ["land", "water", "road"]


def test_the_mean_score_is_that_of_the_class_over_the_polygons_pixels():
    classes = np.array([[1, 1, 2], [1, 255, 2]], np.uint8)
    scores = scores_of(classes)
    frame = joined(classes, scores, 1, grid=PIXELS)
    assert frame["score_mean"].tolist() == [
        pytest.approx(scores[1][classes == 1].mean() / 254), pytest.approx(scores[2][classes == 2].mean() / 254),
    ]  # fmt: skip
    single = scores[:1]
    frame = joined(np.where(classes == 2, 0, classes), single, 1, grid=PIXELS, skip=())
    land, water = 254 - single[0][classes == 2].astype(int), single[0][classes == 1]
    assert frame["score_mean"].tolist() == [pytest.approx(land.mean() / 254), pytest.approx(water.mean() / 254)]
    assert joined(classes, None, 2, grid=PIXELS)["score_mean"].isna().all()


def test_areas_are_those_on_the_ground_and_places_too():
    classes = np.zeros((300, 300), np.uint8)
    classes[100:200, 50:250] = 1
    grid = Grid("EPSG:32650", (10.0, 10.0), (0.0, 0.0))
    [polygon], [area] = (
        joined(classes, None, 64, grid=grid, col=40_000, row=-440_000)[name] for name in ("geometry", "area_m2")
    )
    truth = abs(Geod(ellps="WGS84").geometry_area_perimeter(polygon)[0])
    assert area == pytest.approx(truth, rel=1e-4)
    assert area == pytest.approx(20_000 * 100, rel=2e-3)
    assert polygon.exterior.is_ccw
    left, top = grid.transform(Window(40_050, -439_900, 1, 1)) @ (0, 0)
    from pyproj import Transformer

    lon, lat = Transformer.from_crs("EPSG:32650", "EPSG:4326", always_xy=True).transform(left, top)
    assert shapely.Point(lon, lat).distance(shapely.MultiPoint(polygon.exterior.coords)) < 1e-9


def test_without_crs_polygons_stay_in_pixels():
    classes = np.array([[0, 1], [0, 1]], np.uint8)
    frame = joined(classes, None, 1, grid=PIXELS, col=10, row=20)
    assert frame.crs is None
    assert frame.geometry[0].bounds == (11, 20, 12, 22)
    assert frame["area_px"].tolist() == [2]
    assert frame["image"].tolist() == ["photo"]
    assert "area_m2" not in frame


def test_a_polygon_over_the_antimeridian_is_cut_there():
    grid = Grid("EPSG:32660", (1000.0, 1000.0), (0.0, 0.0))
    classes = np.ones((50, 400), np.uint8)
    frame = joined(classes, None, 100, grid=grid, col=600, row=-5000)
    [polygon] = frame.geometry
    assert polygon.geom_type == "MultiPolygon"
    assert polygon.is_valid
    assert all(part.bounds[2] - part.bounds[0] < 10 for part in polygon.geoms)
    truth = sum(abs(Geod(ellps="WGS84").geometry_area_perimeter(part)[0]) for part in polygon.geoms)
    assert frame["area_m2"][0] == pytest.approx(truth, rel=1e-2)


@pytest.mark.parametrize("west", [160.0, 175.0, -195.0, 200.0])
def test_polygons_of_a_grid_in_degrees_that_counts_on_beyond_180_lie_within_the_world(west):
    grid = Grid("EPSG:4326", (0.25, 0.25), (0.0, 0.0))
    classes = np.ones((20, 160), np.uint8)
    classes[5:15, 60:70] = classes[5:15, 80:84] = 0  # holes, at 175 on the antimeridian
    frame = joined(classes, None, 50, grid=grid, col=round(4 * west), row=-10)
    cover = frame[frame["name"] == "water"].geometry.iloc[0]
    assert cover.is_valid
    assert -180 <= cover.bounds[0] < cover.bounds[2] <= 180
    assert cover.area == pytest.approx((classes == 1).sum() / 16)
    inside = shapely.Point((west + 0.1 + 180) % 360 - 180, 2.4)
    hole = shapely.Point((west + 16 + 180) % 360 - 180, 0)
    assert cover.covers(inside)
    assert not cover.covers(hole)


def test_zones_are_joined_into_one_table_and_pixels_are_not_mixed_with_them():
    classes = np.ones((4, 4), np.uint8)
    other = Grid("EPSG:32651", (10.0, 10.0), (0.0, 0.0))
    parts = [polygons_of(classes, None, grid, Window(50_000, -400_000, 4, 4)) for grid in (other, GRID)]
    frame = join_parts(parts, TABLE)
    assert len(frame) == 2
    assert frame.geometry[0].bounds[0] < 118 < frame.geometry[1].bounds[0]
    assert frame.crs.to_epsg() == 4326
    with pytest.raises(DataError, match="with and without CRS"):
        join_parts([*parts, polygons_of(classes, None, PIXELS, Window(0, 0, 4, 4))], TABLE)


def test_nothing_found_is_an_empty_table_with_all_columns(tmp_path):
    classes = np.zeros((9, 9), np.uint8)
    for frame in (joined(classes, None, 4), join_parts([], TABLE)):
        assert len(frame) == 0
        assert {"class", "name", "score_mean", "area_m2", "geometry"} <= set(frame.columns)
        assert frame.crs.to_epsg() == 4326
        write_geoparquet(frame, tmp_path / "empty.parquet")
        assert len(geopandas.read_parquet(tmp_path / "empty.parquet")) == 0


def test_parts_survive_their_file(tmp_path):
    classes = blobs(40, 40, 1)
    parts = polygons_of(classes, scores_of(classes), GRID, Window(0, 0, 40, 40))
    write_parts(tmp_path / "deep" / "parts.parquet", parts)
    assert read_parts(tmp_path / "deep" / "parts.parquet").equals(parts, check_metadata=True)
    again = tmp_path / "again.parquet"
    write_parts(again, parts)
    assert again.read_bytes() == (tmp_path / "deep" / "parts.parquet").read_bytes()
    with pytest.raises(DataError, match="map the tile again"):
        read_parts(tmp_path / "none.parquet")


def test_tables_are_written_as_geoparquet_and_geojson(tmp_path):
    classes = blobs(40, 40, 1)
    frame = joined(classes, scores_of(classes), 16)
    write_geoparquet(frame, tmp_path / "a.parquet")
    assert_geodataframe_equal(geopandas.read_parquet(tmp_path / "a.parquet"), frame, check_like=True)
    geo = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"geo"])
    assert geo["version"] == "1.1.0"
    assert "bbox" in geo["columns"]["geometry"]["covering"]
    write_geojson(frame, tmp_path / "a.geojson")
    assert len(json.loads((tmp_path / "a.geojson").read_text())["features"]) == len(frame)
    write_geoparquet(joined(classes, None, 16, grid=PIXELS), tmp_path / "p.parquet")
    assert geopandas.read_parquet(tmp_path / "p.parquet").crs is None


@pytest.mark.parametrize("grids", [(GRID,), (PIXELS,), (GRID, Grid("EPSG:32651", (10.0, 10.0), (0.0, 0.0), "b"))])
@pytest.mark.parametrize("few", [1, 40, 1 << 16])
def test_a_file_written_in_pieces_is_that_of_the_whole(tmp_path, monkeypatch, few, grids):
    """Whatever number of parts is in memory at a time: one tile, some, all; also over rows of tiles and grids."""
    parts = []
    for seed, grid in enumerate(grids):
        classes = blobs(45, 60, seed, 2.5)
        scores = scores_of(classes)
        for row in range(0, 45, 9):
            for col in range(0, 60, 7):
                cut = (slice(row, row + 9), slice(col, col + 7))
                window = Window(col - 17, row + 5, classes[cut].shape[1], classes[cut].shape[0])
                parts.append(polygons_of(classes[cut], scores[:, *cut], grid, window))
    frame = join_parts(parts, TABLE)
    write_geoparquet(frame, tmp_path / "whole.parquet")
    monkeypatch.setattr(vectors, "_PARTS", few)
    count, area = vectors.write_joined(iter(parts), TABLE, tmp_path / "pieces.parquet")
    assert count == len(frame) > 20
    assert area == (frame["area_m2"].sum() if "area_m2" in frame else None)
    assert (tmp_path / "pieces.parquet").read_bytes() == (tmp_path / "whole.parquet").read_bytes()


def test_a_file_of_many_row_groups_holds_the_same_polygons(tmp_path, monkeypatch):
    classes = blobs(45, 60, 3)
    frame = joined(classes, scores_of(classes), 100)
    parts = [polygons_of(classes, scores_of(classes), GRID, Window(-17, 5, 60, 45))]
    monkeypatch.setattr(vectors, "_ROWS", 16)
    vectors.write_joined(parts, TABLE, tmp_path / "a.parquet")
    assert pq.ParquetFile(tmp_path / "a.parquet").num_row_groups == -(-len(frame) // 16) > 2
    assert_identical(geopandas.read_parquet(tmp_path / "a.parquet"), frame)
    vectors.write_joined([], TABLE, tmp_path / "none.parquet")
    assert len(geopandas.read_parquet(tmp_path / "none.parquet")) == 0


def test_a_class_raster_becomes_polygons(tmp_path):
    classes = np.where(blobs(60, 60, 1) == 1, 1, 0).astype(np.uint8)
    two = ClassTable(TABLE.classes[:2])
    cog.write_classes(tmp_path / "a.tif", classes, GRID, Window(0, 0, 60, 60), two)
    count = polygonize(str(tmp_path / "a.tif"), str(tmp_path / "a.parquet"))
    frame = geopandas.read_parquet(tmp_path / "a.parquet")
    assert len(frame) == count > 3
    assert set(frame["name"]) == {"water"}
    assert frame["pixels"].sum() == classes.sum()
    cog.write_classes(tmp_path / "b.tif", classes, GRID, Window(0, 0, 60, 60), TABLE)
    assert polygonize(str(tmp_path / "b.tif"), str(tmp_path / "b.geojson")) > count
    with pytest.raises(ConfigError, match=r"expected .fgb, .geojson, .gpkg, .parquet, .shp"):
        polygonize(str(tmp_path / "a.tif"), str(tmp_path / "a.kml"))
    cog.write_scores(tmp_path / "s.tif", np.zeros((2, 60, 60), np.uint8), GRID, Window(0, 0, 60, 60), ["a", "b"])
    with pytest.raises(DataError, match="not a class raster: one band of uint8 was expected, 2 bands"):
        polygonize(str(tmp_path / "s.tif"), str(tmp_path / "s.parquet"))


def test_polygons_that_cannot_be_placed_are_refused_in_words():
    grid = Grid(CRS.from_user_input("+proj=aeqd +lat_0=30").to_wkt(), (4e5, 4e5), (-2e7, 2e7))
    with pytest.raises(DataError, match=r"polygon on the grid crs-.* cannot be placed .* leaves the Earth"):
        vectors.lonlat_of(grid, np.array([shapely.box(0, 0, 100, 100)], object))
