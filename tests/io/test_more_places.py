"""Places and planes that imagery comes in beyond the usual zones: their pixels and their ground."""

import numpy as np
import pytest
import rasterio
from geopandas import GeoSeries
from rasterio.crs import CRS
from rasterio.transform import from_origin

from rayseg.geo.grid import Tile
from rayseg.io.maps import pixel_areas_m2
from rayseg.io.output_grids import beyond_utm, footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.sources import outline_of, source_of_file

MODIS = 1_111_950.519667  # m, side of a tile


def scene(folder, name, crs, x, y, side, *, size=40, dtype="uint8"):
    pixels_HW = np.random.default_rng(len(name)).integers(1, 100, (size, size)).astype(dtype)
    place = from_origin(x, y, side, side)
    with rasterio.open(
        folder / f"{name}.tif", "w", "GTiff", size, size, 1, CRS.from_user_input(crs), place, dtype
    ) as file:  # fmt: skip
        file.write(pixels_HW, 1)
    return source_of_file(str(folder / f"{name}.tif"), name), pixels_HW


def ground_m2(*sources):
    """Area of the sources' outlines together, each place once."""
    return GeoSeries([outline_of(source) for source in sources], crs="EPSG:4326").to_crs("EPSG:6933").union_all().area


def mapped_m2(sources):
    """Area of the valid pixels of all grids, as a run maps them."""
    total = 0.0
    for grid, members in grids_of(sources):
        window = footprint(members[0], grid)
        for member in members[1:]:
            window = window.union(footprint(member, grid))
        _, valid_HW = read(members, grid, window, bands=["b1"])
        total += pixel_areas_m2(Tile("", grid, window))[valid_HW].sum()
    return total


@pytest.mark.parametrize(
    ("crs", "x", "y", "side"),
    [
        ("EPSG:2227", 6_000_000, 2_000_000, 30),  # California, feet
        ("EPSG:3460", 2_080_000, 4_000_000, 3000),  # Fiji, over 180
        ("EPSG:2193", 2_450_000, 5_150_000, 1000),  # New Zealand, east of 180
        ("EPSG:4167", 182.5, -43, 0.01),
        ("EPSG:5041", 1_900_000, 2_100_000, 5000),  # the pole is inside
        ("EPSG:3571", -900_000, -1_800_000, 20_000),
        ("EPSG:26931", 800_000, 700_000, 50),
        ("EPSG:5514", -600_000, -1_050_000, 50),
        ("EPSG:28193", 150_000, 130_000, 50),  # Cassini-Soldner
        ("EPSG:5880", 5_000_000, 9_000_000, 500),
        ("EPSG:5070", -100_000, 1_500_000, 1000),
        ("EPSG:32633+5773", 500_000, 5_000_000, 10),  # with heights
    ],
)
def test_a_scene_alone_keeps_its_pixels_and_its_ground(tmp_path, crs, x, y, side):
    source, pixels_HW = scene(tmp_path, "a", crs, x, y, side, dtype="int16")
    [(grid, _)] = grids_of([source])
    [read_HW], valid_HW = read([source], grid, footprint(source, grid), bands=["b1"])
    assert valid_HW.all()
    assert np.array_equal(read_HW, pixels_HW)
    assert mapped_m2([source]) == pytest.approx(ground_m2(source), rel=1e-3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("EPSG:25832", 500_000, 5_500_000, 20), ("EPSG:32632", 500_400, 5_500_005, 10)),
        (("EPSG:2227", 6_000_000, 2_000_000, 60), ("EPSG:32610", 553_000, 4_140_000, 20)),
        (("EPSG:4267", -100, 40, 0.001), ("EPSG:4269", -99.97, 40.0003, 0.001)),
        (("EPSG:2056", 2_600_000, 1_200_000, 50), ("EPSG:32632", 385_000, 5_200_000, 50)),
        (("EPSG:28356", 300_000, 6_200_000, 10), ("EPSG:7856", 300_200, 6_200_000, 10)),
    ],
)
def test_two_scenes_of_two_systems_count_their_ground_once(tmp_path, one, other):
    sources = [scene(tmp_path, name, *place)[0] for name, place in (("a", one), ("b", other))]
    assert not beyond_utm(sources)
    assert mapped_m2(sources) == pytest.approx(ground_m2(*sources), rel=0.03)


@pytest.mark.parametrize(("tiles", "row"), [((33, 34), 9), ((0, 35), 9), ((17, 18), 0)])
def test_tiles_of_modis_hold_the_ground_that_is_on_earth(tmp_path, tiles, row):
    corner = (-20_015_109.354, 10_007_554.677 - row * MODIS)
    sources = [
        scene(tmp_path, f"h{col}", "+proj=sinu +R=6371007.181", corner[0] + col * MODIS, corner[1], MODIS / 40)[0]
        for col in tiles
    ]
    [(grid, _)] = grids_of(sources)
    assert grid.resolution == pytest.approx((MODIS / 40, MODIS / 40))
    assert mapped_m2(sources) == pytest.approx(ground_m2(*sources), rel=0.006)  # of a sphere
