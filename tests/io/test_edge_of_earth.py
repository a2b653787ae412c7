"""Rasters that show the Earth from space, or the whole world on a plane with an edge: only the Earth is mapped."""

from dataclasses import replace

import numpy as np
import pytest
import rasterio
import shapely
from geopandas import GeoSeries
from rasterio.crs import CRS
from rasterio.transform import from_origin
from shapely.geometry import shape

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.geo.lonlat import jumps
from rayseg.geo.region import on_grid, pixels_inside, resolve_region
from rayseg.io.maps import pixel_areas_m2
from rayseg.io.output_grids import beyond_utm, expect_mappable, footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.sources import source_of_file
from rayseg.io.stac_write import lonlat_outline
from rayseg.io.vectors import lonlat_of

EARTH = 510.0656e12  # m2, of WGS 84
RADIUS = 6_371_007.0


def cap(height):
    """Share of a sphere that is seen from a height in metres."""
    return (1 - RADIUS / (RADIUS + height)) / 2


KINDS = {
    "geostationary": ("+proj=geos +h=35785831 +lon_0=140.7 +sweep=x +R=6371007", 5.5e6, 5.5e6, cap(35_785_831)),
    "orthographic": ("+proj=ortho +lat_0=-35 +lon_0=175 +R=6371007", 6.6e6, 6.6e6, 0.5),
    "orthographic at a pole": ("+proj=ortho +lat_0=90 +lon_0=20", 6.6e6, 6.6e6, 0.5),
    "perspective": ("+proj=nsper +h=3000000 +lat_0=40 +lon_0=-100 +R=6371007", 5e6, 5e6, cap(3e6)),
    "Robinson": ("ESRI:54030", 17.1e6, 8.7e6, 1.0),
    "Goode": ("+proj=igh", 20.1e6, 8.7e6, 1.0),
    "Hammer": ("+proj=hammer +lon_0=-60", 18.2e6, 9.2e6, 1.0),
    "interrupted Mollweide": ("+proj=imoll", 19.2e6, 9.2e6, 1.0),
    "perspective that may tilt": (
        "+proj=tpers +h=3000000 +lat_0=40 +lon_0=-100 +R=6371007",
        5e6,
        5e6,
        cap(3e6),
    ),
    "sinusoidal": ("+proj=sinu +R=6371007.181", 20.1e6, 10.1e6, 1.0),
}


def flat_m2(lonlat):
    """Area of a geometry in degrees on the sphere, by Lambert's cylindrical equal-area projection."""

    def project(points_N2):
        lon, lat = np.radians(points_N2).T
        return RADIUS**2 * np.stack([lon, np.sin(lat)], axis=1)

    return shapely.transform(lonlat, lambda points_N2: project(points_N2) / RADIUS).area


def raster(folder, crs, right, top, *, width=48, height=40):
    pixels_HW = np.random.default_rng(2).integers(1, 250, (height, width), "uint8")
    place = from_origin(-right, top, 2 * right / width, 2 * top / height)
    with rasterio.open(
        folder / "a.tif", "w", "GTiff", width, height, 1, CRS.from_user_input(crs), place, "uint8"
    ) as file:  # fmt: skip
        file.write(pixels_HW, 1)
    return source_of_file(str(folder / "a.tif"), "a")


@pytest.mark.parametrize("name", KINDS)
def test_the_part_on_earth_is_mapped_with_its_whole_area(tmp_path, name):
    crs, right, top, share = KINDS[name]
    source = raster(tmp_path, crs, right, top)
    expect_mappable(source, tile=24)
    [(grid, _)] = grids_of([source])
    whole = footprint(source, grid)
    areas = outlines = polygons = 0.0
    for row, col in ((0, 0), (0, 24), (24, 0), (24, 24)):
        window = Window(whole.col + col, whole.row + row, 24, 24).intersect(whole)
        _, valid_HW = read([source], grid, window, bands=["b1"])
        areas_HW = pixel_areas_m2(Tile("", grid, window))
        assert not valid_HW.all()  # pixels in space
        assert (areas_HW[valid_HW] > 0).mean() > 0.98
        areas += areas_HW[valid_HW].sum()
        geometry, bbox = lonlat_outline(grid, window)
        assert shape(geometry).is_valid
        assert not jumps(np.array([shape(geometry)]))[0]
        assert all(-180 <= lon <= 180 for lon in bbox[::2])
        outlines += flat_m2(shape(geometry))
        cells = np.array([shapely.box(window.col, window.row, window.col1, window.row1)], object)
        [polygon] = lonlat_of(grid, cells)
        polygons += flat_m2(polygon)
    assert areas == pytest.approx(share * EARTH, rel=0.004)  # of a sphere and of the ellipsoid
    assert outlines == pytest.approx(share * EARTH, rel=0.004)
    assert polygons == pytest.approx(outlines, rel=0.001)


def test_pixels_far_from_the_edge_have_the_areas_of_their_outlines():
    grid = Grid(CRS.from_user_input("+proj=ortho +lat_0=10 +lon_0=20").to_wkt(), (50_000.0, 50_000.0), (0.0, 0.0))
    areas_HW = pixel_areas_m2(Tile("", grid, Window(-140, -140, 280, 280)))
    for row, col in ((140, 140), (40, 120), (15, 137), (200, 250)):
        [outline] = lonlat_of(grid, np.array([shapely.box(col - 140, row - 140, col - 139, row - 139)], object))
        [exact] = GeoSeries([outline], crs="EPSG:4326").to_crs("EPSG:6933").area
        assert areas_HW[row, col] == pytest.approx(exact, rel=0.002)


def test_a_region_on_a_disk_is_cut_where_the_earth_ends():
    grid = Grid(CRS.from_user_input(KINDS["geostationary"][0]).to_wkt(), (1e5, 1e5), (0.0, 0.0))
    disk = Window(-55, -55, 110, 110)
    inside = pixels_inside(on_grid(resolve_region("130,-10,-100,10").geometry, grid, disk), grid, disk)
    assert inside[55, 55]  # 140.7 E
    assert inside[55, 105]
    assert not inside[55, 20]
    assert not inside[20, 55]
    assert not pixels_inside(on_grid(resolve_region("-60,-10,-30,10").geometry, grid, disk), grid, disk).any()


@pytest.mark.parametrize("corner", [(-60, -60), (0, -60), (-60, 0), (0, 0)])
def test_a_region_around_a_pole_fills_every_quarter_of_a_disk(corner):
    grid = Grid(CRS.from_user_input("+proj=ortho +lat_0=90 +lon_0=-30 +R=6371007").to_wkt(), (1.2e5, 1.2e5), (0.0, 0.0))
    window = Window(*corner, 60, 60)
    inside = pixels_inside(on_grid(resolve_region("-180,60,180,90").geometry, grid, window), grid, window)
    assert inside.sum() == pytest.approx(np.pi * (RADIUS / 2) ** 2 / 4 / 1.2e5**2, rel=0.02)


def test_sources_meet_across_the_edge_of_a_disk(tmp_path):
    disk = raster(tmp_path, "+proj=geos +h=35785831 +lon_0=0 +sweep=y +R=6371007", 5.5e6, 5.5e6)
    (tmp_path / "b").mkdir()
    world = replace(raster(tmp_path / "b", "EPSG:4326", 180, 90), item_id="world")
    [(on_disk, _)], [(degrees, _)] = grids_of([disk]), grids_of([world])
    around = degrees.bounds(footprint(disk, degrees))
    assert around == pytest.approx((-82.5, -81, 82.5, 81), abs=4.5)  # in whole pixels
    left, bottom, right, top = on_disk.bounds(footprint(world, on_disk))
    assert min(-left, -bottom, right, top) > 5.2e6
    pacific = replace(world, transform=(0.5, 0.0, 160.0, 0.0, -0.5, 10.0), width=20, height=20)
    assert footprint(pacific, on_disk).empty


def test_the_result_does_not_depend_on_what_ran_before(tmp_path):
    """PROJ raises errors at first, and later gives infinity instead."""
    source = raster(tmp_path, *KINDS["geostationary"][:3])
    [(grid, _)] = grids_of([source])
    first = lonlat_outline(grid, Window(-20, -20, 20, 20))
    beyond = replace(source, transform=(1e5, 0.0, -5e7, 0.0, -1e5, 5e7))
    with pytest.raises(DataError):
        expect_mappable(beyond, tile=24)
    assert lonlat_outline(grid, Window(-20, -20, 20, 20)) == first


def test_a_disk_among_other_scenes_is_refused_by_name(tmp_path):
    disk = raster(tmp_path, *KINDS["geostationary"][:3])
    (tmp_path / "b").mkdir()
    field = raster(tmp_path / "b", "EPSG:32654", 5e3, 5e3)
    errors = beyond_utm([disk, replace(field, item_id="field")])
    assert list(errors) == ["a"]
    assert "beyond the edge of the Earth" in str(errors["a"])
