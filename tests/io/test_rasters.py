"""Reading: exact where the grids agree, window-independent where they do not, and every kind of missing pixel."""

import json
import math
import os
import pickle
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from scipy.ndimage import minimum_filter

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.rasters import Source, footprint, grids_of, read, source_of_file
from rayseg.io.sources import crs_text, same_crs

UTM = "EPSG:32650"
TEN = Affine(10, 0, 500_000, 0, -10, 4_000_000)


def noise(bands=3, height=48, width=64, dtype="uint8", seed=0):
    return np.random.default_rng(seed).integers(1, 250, (bands, height, width)).astype(dtype)


def write(
    path, image, *, crs=UTM, transform=TEN, nodata=None, mask=None, names=None, alpha=False, gcps=None, colors=None
):
    bands, height, width = image.shape
    profile = {"driver": "GTiff", "count": bands, "height": height, "width": width, "dtype": image.dtype}
    profile |= {"photometric": "minisblack", "alpha": "no"} if colors == "gray" else {}
    place = {"gcps": gcps, "crs": crs} if gcps else {"crs": crs, "transform": transform}
    place = place if transform else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile, **place, nodata=nodata) as dataset:
            if alpha:
                dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
            dataset.write(image)
            if mask is not None:
                dataset.write_mask(mask)
            if names:
                dataset.descriptions = names
    return source_of_file(str(path), Path(path).stem)


def whole(source):
    [(grid, [found])] = grids_of([source])
    assert found == source
    return grid, footprint(source, grid)


def test_pixels_of_the_own_grid_come_back_untouched_and_outside_is_invalid_zero(tmp_path):
    image = noise()
    source = write(tmp_path / "a.tif", image)
    grid, window = whole(source)
    assert grid == Grid(UTM, (10.0, 10.0), (0.0, 0.0))
    assert window == Window(50_000, -400_000, 64, 48)
    wide = Window(window.col - 5, window.row - 7, window.width + 11, window.height + 13)
    pixels, valid = read([source], grid, wide, bands=["blue", "red"])
    assert np.array_equal(pixels[:, 7:55, 5:69], image[[2, 0]])
    assert valid.sum() == 48 * 64
    assert valid[7:55, 5:69].all()
    assert not pixels[:, ~valid].any()
    assert grid.transform(window) == TEN


def test_a_window_off_the_imagery_is_all_invalid_and_of_the_imagerys_dtype(tmp_path):
    source = write(tmp_path / "a.tif", noise(dtype="uint16"))
    pixels, valid = read([source], whole(source)[0], Window(0, 0, 4, 3), bands=["b1"])
    assert pixels.shape == (1, 3, 4)
    assert pixels.dtype == np.uint16
    assert not valid.any()


def test_the_origin_is_the_alignment_offset_of_the_imagery(tmp_path):
    source = write(tmp_path / "a.tif", noise(), transform=Affine(10, 0, 500_003, 0, -10, 4_000_004))
    grid, window = whole(source)
    assert grid.origin == (3.0, 4.0)
    assert grid.bounds(window) == (500_003, 4_000_004 - 480, 500_003 + 640, 4_000_004)


def test_sources_that_share_grid_keep_it_newest_first_and_a_half_pixel_shift_sends_them_to_utm(tmp_path):
    old = replace(write(tmp_path / "b.tif", noise()), datetime="2019-01-01T00:00:00Z")
    new = replace(
        write(tmp_path / "c.tif", noise(), transform=TEN @ Affine.translation(20, 3)), datetime="2020-01-01T00:00:00Z"
    )
    undated = write(tmp_path / "a.tif", noise())
    [(grid, ordered)] = grids_of([old, undated, new])
    assert [source.item_id for source in ordered] == ["c", "b", "a"]
    assert grid == Grid(UTM, (10.0, 10.0), (0.0, 0.0))
    shifted = write(tmp_path / "d.tif", noise(), transform=TEN @ Affine.translation(0.5, 0), crs="EPSG:32651")
    grids = grids_of([old, shifted])
    assert [(grid.name, [s.item_id for s in sources]) for grid, sources in grids] == [
        ("32650", ["b"]),
        ("32651", ["d"]),
    ]
    assert [grid.resolution for grid, _ in grids] == [(10.0, 10.0)] * 2


def test_grids_do_not_depend_on_the_order_of_the_sources(tmp_path):
    nudged = TEN @ Affine.translation(4e-4, 0)
    sources = [write(tmp_path / "a.tif", noise()), write(tmp_path / "b.tif", noise(), transform=nudged)]
    assert grids_of(sources) == grids_of(sources[::-1])
    assert len(grids_of(sources)) == 1


def test_utm_resolution_is_the_finest_ground_size_of_the_zone(tmp_path):
    coarse = write(tmp_path / "a.tif", noise(), transform=Affine(30, 0, 500_000, 0, -30, 4_000_000))
    fine = write(tmp_path / "b.tif", noise(), transform=Affine(5, 0, 500_000, 0, -5, 4_000_000))
    [(grid, _)] = grids_of([coarse, fine])
    assert grid.resolution == (5.0, 5.0)


def test_crs_are_compared_by_meaning():
    assert same_crs(rasterio.crs.CRS.from_epsg(32650).to_wkt(), "EPSG:32650")
    assert not same_crs("EPSG:32650", "EPSG:32651")
    assert crs_text(rasterio.crs.CRS.from_epsg(32650)) == "EPSG:32650"
    assert crs_text(None) is None


@pytest.mark.parametrize(("lat", "lon"), [(86.0, 10.0), (-81.0, 10.0), (47_000.0, 15.0)])
def test_imagery_beyond_utm_is_refused_by_name(lat, lon):
    polar = Source("polar", (("x.tif", ("b1",)),), "EPSG:4326", (0.1, 0, lon, 0, -0.1, lat), 2, 2, "uint8")
    other = replace(polar, item_id="other", transform=(0.2, 0, lon, 0, -0.2, lat))
    with pytest.raises(DataError, match=r"(polar|other) has its centre at .* no UTM zone"):
        grids_of([polar, other])


def test_images_without_crs_are_grids_of_their_own(tmp_path):
    image = noise()
    sources = [write(tmp_path / f"{name}.tif", image, crs=None, transform=Affine.rotation(30)) for name in "ab"]
    grids = grids_of(sources)
    assert [grid for grid, _ in grids] == [Grid(None, (1.0, 1.0), (0.0, 0.0), name) for name in "ab"]
    grid = grids[0][0]
    assert footprint(sources[0], grid) == Window(0, 0, 64, 48)
    assert footprint(sources[1], grid).empty
    pixels, valid = read(sources[:1], grid, Window(0, 0, 64, 48), bands=["red", "green", "blue"])
    assert np.array_equal(pixels, image)
    assert valid.all()


def test_the_first_valid_source_wins_in_the_order_given(tmp_path):
    first, second = noise(seed=1), noise(seed=2)
    first[:, :10] = 0
    sources = [write(tmp_path / "a.tif", first, nodata=0), write(tmp_path / "b.tif", second, nodata=0)]
    grid, _ = grids_of(sources)[0]
    window = footprint(sources[0], grid)
    pixels, valid = read(sources, grid, window, bands=["red", "green", "blue"])
    assert valid.all()
    assert np.array_equal(pixels[:, :10], second[:, :10])
    assert np.array_equal(pixels[:, 10:], first[:, 10:])
    assert np.array_equal(read(sources[::-1], grid, window, bands=["red", "green", "blue"])[0], second)


def test_a_pixel_is_valid_when_any_chosen_band_has_data(tmp_path):
    image = noise()
    image[0, 0, :] = 0
    image[:, 1, :] = 0
    source = write(tmp_path / "a.tif", image, nodata=0)
    grid, window = whole(source)
    assert read([source], grid, window, bands=["red", "green"])[1].sum() == 47 * 64
    assert read([source], grid, window, bands=["red"])[1].sum() == 46 * 64


def test_a_band_without_data_at_a_valid_pixel_reads_zero(tmp_path):
    image = noise(dtype="float32")
    image[0, 0, 0], image[1, 0, 1] = -9999, np.nan
    source = write(tmp_path / "a.tif", image, nodata=-9999)
    grid, window = whole(source)
    pixels, valid = read([source], grid, window, bands=["b1", "b2", "b3"])
    assert valid.all()
    assert pixels[0, 0, 0] == 0
    assert pixels[1, 0, 1] == 0


@pytest.mark.parametrize(
    ("value", "dtype", "nodata"),
    [(np.inf, np.float32, None), (-np.inf, np.float64, -9999.0), (np.inf, np.float32, 0.0)],
)
def test_an_infinite_pixel_is_never_data(tmp_path, value, dtype, nodata):
    image = np.ones((2, 8, 8), dtype)
    image[:, 3, 4] = value
    image[0, 5, 6] = value  # in one band alone: that band reads as 0, as with NaN
    source = write(tmp_path / "a.tif", image, nodata=nodata)
    [(grid, _)] = grids_of([source])
    pixels_CHW, valid_HW = read([source], grid, footprint(source, grid), bands=["b1", "b2"])
    assert np.isfinite(pixels_CHW).all()
    assert np.argwhere(~valid_HW).tolist() == [[3, 4]]


def test_nan_is_never_data(tmp_path):
    image = noise(1, dtype="float32")
    image[0, 3, 4] = np.nan
    source = write(tmp_path / "a.tif", image, nodata=math.nan)
    assert source.nodata is None
    grid, window = whole(source)
    pixels, valid = read([source], grid, window, bands=["b1"])
    assert np.argwhere(~valid).tolist() == [[3, 4]]
    assert pixels[0, 3, 4] == 0


def test_infinite_nodata_is_left_out_of_a_warp_as_any_other(tmp_path):
    seen = {}
    for value in (np.inf, -9999.0):
        image = np.ones((1, 8, 8), np.float32)
        image[0, 3, 4] = value
        source = write(tmp_path / "a.tif", image, nodata=value)
        [(grid, _)] = grids_of([source])
        shifted = replace(grid, origin=(grid.origin[0] + 4, grid.origin[1] + 4))
        pixels, seen[value] = read([source], shifted, footprint(source, shifted), bands=["b1"])
        assert (pixels[0][seen[value]] == 1).all()
    assert (seen[np.inf] == seen[-9999.0]).all()


def test_nodata_of_the_item_counts_where_the_file_has_none(tmp_path):
    image = noise(1, dtype="int16")
    image[0, 3, 4] = -9999
    source = replace(write(tmp_path / "a.tif", image), nodata=-9999)
    grid, window = whole(source)
    assert np.argwhere(~read([source], grid, window, bands=["b1"])[1]).tolist() == [[3, 4]]


@pytest.mark.parametrize(
    ("dtype", "nodata"), [("uint16", -9999.0), ("uint16", 1.5), ("uint8", 65535.0), ("int16", 1e20), ("float32", 1e300)]
)
def test_a_nodata_value_that_no_pixel_can_have_is_ignored_read_as_it_is_and_warped(tmp_path, dtype, nodata):
    image = np.full((1, 8, 8), 7, dtype)
    image[0, 3, 4] = 0
    half = TEN * Affine.translation(0.5, 0.5)
    for name, own, missing in (("bare", None, []), ("own", 0, [[3, 4]])):
        one = replace(write(tmp_path / f"{name}.tif", image, nodata=own), nodata=nodata)
        grid = Grid(UTM, (10.0, 10.0), (0.0, 0.0))
        window = footprint(one, grid)
        assert np.argwhere(~read([one], grid, window, bands=["b1"])[1]).tolist() == missing
        other = replace(write(tmp_path / f"{name}_half.tif", image, nodata=own, transform=half), nodata=nodata)
        pixels_CHW, valid_HW = read([other], grid, footprint(other, grid), bands=["b1"], categorical=True)
        assert np.count_nonzero(valid_HW) == 64 - len(missing)
        assert set(pixels_CHW[0][valid_HW].tolist()) == ({7} if missing else {0, 7})


def test_large_nodata_values_of_float_files_count_however_they_are_rounded(tmp_path):
    image = np.ones((1, 8, 8), np.float32)
    image[0, 3, 4] = np.finfo(np.float32).min
    source = replace(write(tmp_path / "a.tif", image, transform=TEN * Affine.translation(0.5, 0)), nodata=-3.4028235e38)
    grid = Grid(UTM, (10.0, 10.0), (0.0, 0.0))
    pixels_CHW, valid_HW = read([source], grid, footprint(source, grid), bands=["b1"])
    assert set(pixels_CHW[0][valid_HW].tolist()) == {1.0}
    assert np.count_nonzero(valid_HW) >= 60


@pytest.mark.parametrize("internal", [True, False])
def test_mask_bands_count_inside_and_beside_the_file(tmp_path, internal):
    mask = np.full((48, 64), 255, np.uint8)
    mask[5:9, 6:10] = 0
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
        source = write(tmp_path / "a.tif", noise(), mask=mask)
    assert (tmp_path / "a.tif.msk").exists() is not internal
    grid, window = whole(source)
    assert np.array_equal(read([source], grid, window, bands=["red"])[1], mask > 0)


@pytest.mark.parametrize(("dtype", "opaque"), [("uint8", 200), ("uint16", 200), ("uint16", 1), ("float32", 200)])
def test_alpha_counts_read_as_it_is_and_warped(tmp_path, dtype, opaque):
    image = noise(4, dtype=dtype)
    image[3] = opaque
    image[3, 10:20, 10:20] = 0
    source = write(tmp_path / "a.tif", image, alpha=True)
    assert source.bands == ("red", "green", "blue", "alpha")
    grid, window = whole(source)
    assert np.array_equal(read([source], grid, window, bands=["red"])[1], image[3] > 0)
    shifted = Grid(UTM, (10.0, 10.0), (2.5, 2.5))
    window = footprint(source, shifted)
    valid = read([source], shifted, window, bands=["red"])[1]
    assert not valid[12:18, 12:18].any()
    assert 0.9 < valid.sum() / (48 * 64 - 100) < 1.1


def test_bands_are_chosen_by_name_over_several_files(tmp_path):
    image = noise()
    for name, band in zip(["red", "green", "blue"], image, strict=True):
        write(tmp_path / f"{name}.tif", band[None])
    files = tuple((str(tmp_path / f"{name}.tif"), (name,)) for name in ["blue", "red", "green"])
    source = replace(write(tmp_path / "a.tif", image), assets=files)
    grid, window = whole(source)
    pixels, valid = read([source], grid, window, bands=["green", "blue", "red"])
    assert np.array_equal(pixels, image[[1, 2, 0]])
    assert valid.all()


def test_a_missing_band_is_refused_with_what_there_is(tmp_path):
    source = write(tmp_path / "a.tif", noise())
    with pytest.raises(DataError, match=r"no band nir.*wanted red, nir.*found red, green, blue"):
        read([source], *whole(source), bands=["red", "nir"])


def test_every_file_of_an_item_must_have_data_for_a_pixel_to_count(tmp_path):
    image = noise(1)
    write(tmp_path / "full.tif", image)
    write(tmp_path / "part.tif", image[:, :, :30])
    source = write(tmp_path / "full.tif", image)
    source = replace(source, assets=((source.assets[0][0], ("red",)), (str(tmp_path / "part.tif"), ("nir",))))
    for bands in (["red", "nir"], ["nir", "red"]):
        valid = read([source], *whole(source), bands=bands)[1]
        assert valid[:, :30].all()
        assert not valid[:, 30:].any()


def test_a_coarser_band_is_brought_to_the_finest_grid(tmp_path):
    fine, coarse = noise(1), np.full((1, 24, 32), 77, np.uint8)
    source = write(tmp_path / "fine.tif", fine)
    write(tmp_path / "coarse.tif", coarse, transform=TEN @ Affine.scale(2))
    source = replace(source, assets=((source.assets[0][0], ("red",)), (str(tmp_path / "coarse.tif"), ("rededge",))))
    pixels, valid = read([source], *whole(source), bands=["red", "rededge"])
    assert np.array_equal(pixels[0], fine[0])
    assert (pixels[1] == 77).all()
    assert valid.all()


@pytest.mark.parametrize(
    ("transform", "resolution"),
    [
        (TEN @ Affine.rotation(20), 10.0),
        (TEN @ Affine.rotation(20), 47.0),
        (TEN @ Affine.translation(0.5, 0.5), 10.0),
        (Affine(10, 0, 500_000, 0, 10, 4_000_000), 7.0),
    ],
)
def test_warped_pixels_do_not_depend_on_the_window(tmp_path, transform, resolution):
    source = write(tmp_path / "a.tif", noise(3, 120, 140), transform=transform)
    grid = Grid("EPSG:32651", (resolution, resolution), (0.0, 0.0))
    window = footprint(source, grid)
    image, valid = read([source], grid, window, bands=["red", "green", "blue"])
    assert 0.3 < valid.mean() <= 1
    for size in (13, 64):
        for row in range(window.row, window.row1, 5 * size):
            for col in range(window.col, window.col1, 4 * size):
                part = Window(col, row, size, size).intersect(window)
                for pixels, ok in (read_of(source, grid, part), afresh(read_of, source, grid, part)):
                    assert np.array_equal(pixels, image[:, *part.slices(window)])
                    assert np.array_equal(ok, valid[part.slices(window)])


@pytest.mark.parametrize("resolution", [9.3, 31.0])
def test_warped_pixels_do_not_depend_on_how_a_scene_is_cut_into_files(tmp_path, resolution):
    image, turned = noise(3, 600, 500), TEN @ Affine.rotation(20)
    scene = write(tmp_path / "scene.tif", image, transform=turned)
    cut = write(tmp_path / "cut.tif", image[:, 77:, 130:], transform=turned @ Affine.translation(130, 77))
    grid = Grid("EPSG:32651", (resolution, resolution), (0.0, 0.0))
    window = footprint(cut, grid)
    (one, _), (other, valid) = read_of(scene, grid, window), read_of(cut, grid, window)
    inside = valid & (minimum_filter(valid, 9))
    assert inside.mean() > 0.3
    assert np.array_equal(one[:, inside], other[:, inside])
    smooth = one[:, inside].std() < 0.4 * image.std()
    assert bool(smooth) == (resolution > 20)  # a coarser grid averages


def read_of(source, grid, window):
    return read([source], grid, window, bands=["red", "green", "blue"])


def afresh(function, *arguments):
    """Call it where no file is open yet: files are kept open per thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *arguments).result()


def test_a_warp_puts_pixels_where_they_are_on_the_ground(tmp_path):
    image = np.zeros((1, 200, 200), np.uint8)
    image[0, 90:110, 120:140] = 200
    source = write(tmp_path / "a.tif", image, transform=TEN @ Affine.rotation(30))
    grid = Grid(UTM, (10.0, 10.0), (0.0, 0.0))
    window = footprint(source, grid)
    pixels, _ = read([source], grid, window, bands=["b1"])
    rows, cols = np.nonzero(pixels[0] > 100)
    found = grid.transform(window) @ (cols.mean() + 0.5, rows.mean() + 0.5)
    assert np.allclose(found, TEN @ Affine.rotation(30) @ (130, 100), atol=5)
    assert abs(len(rows) - 400) < 40


@pytest.mark.parametrize("degrees", [0, 25])
def test_ground_control_points_alone_place_an_image(tmp_path, degrees):
    affine = TEN @ Affine.rotation(degrees)
    image = np.full((1, 100, 100), 20, np.uint8)
    image[0, 40:60, 70:90] = 200
    corners = [(0, 0), (0, 100), (100, 0), (100, 100)]
    gcps = [GroundControlPoint(row, col, *(affine @ (col, row))) for row, col in corners]
    source = write(tmp_path / "a.tif", image, gcps=gcps)
    assert source.gcps
    assert source.crs == UTM
    [(grid, _)] = grids_of([source])
    assert grid.crs == UTM
    assert 8 < grid.resolution[0] < 15
    window = footprint(source, grid)
    pixels, valid = read([source], grid, window, bands=["b1"])
    share = 100 * 100 * 100 / (valid.size * grid.resolution[0] ** 2)
    assert valid.mean() == pytest.approx(share, abs=0.02)
    rows, cols = np.nonzero(pixels[0] > 110)
    found = grid.transform(window) @ (cols.mean() + 0.5, rows.mean() + 0.5)
    assert np.allclose(found, affine @ (80, 50), atol=5)


def test_the_items_georeference_places_a_file_that_has_none(tmp_path):
    image = noise()
    source = write(tmp_path / "a.tif", image, crs=None, transform=None)
    source = replace(source, crs=UTM, transform=tuple(TEN)[:6])
    pixels, _ = read([source], *whole(source), bands=["red", "green", "blue"])
    assert np.array_equal(pixels, image)
    warped = read([source], Grid(UTM, (10.0, 10.0), (5.0, 5.0)), Window(50_001, -399_999, 60, 40), bands=["red"])
    assert warped[1].all()
    assert warped[0].std() > 0


def test_complex_pixels_are_refused_in_words(tmp_path):
    source = write(tmp_path / "a.tif", noise(1, dtype="complex64"))
    with pytest.raises(DataError, match=r"complex pixels.*amplitude"):
        read([source], *whole(source), bands=["b1"])


def test_pixel_types_are_not_mixed(tmp_path):
    sources = [write(tmp_path / "a.tif", noise(1) * 0, nodata=0), write(tmp_path / "b.tif", noise(1, dtype="uint16"))]
    sources[0] = replace(sources[0], assets=((sources[0].assets[0][0], ("b1",)),))
    grid = grids_of(sources)[0][0]
    with pytest.raises(DataError, match=r"b has uint16 pixels where uint8"):
        read(sources, grid, footprint(sources[0], grid), bands=["b1"])


def test_a_damaged_block_names_file_and_window_and_spares_the_rest(tmp_path):
    path = tmp_path / "a.tif"
    image = noise(1, 512, 512)
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=512, width=512, dtype="uint8", crs=UTM, transform=TEN,
        tiled=True, blockxsize=256, blockysize=256, compress="deflate",
    ) as dataset:  # fmt: skip
        dataset.write(image)
    with rasterio.open(path) as dataset:
        offset = int(
            dataset.tags(ns="TIFF", bidx=1).get("BLOCK_OFFSET_1_1", 0)
            or dataset.get_tag_item("BLOCK_OFFSET_1_1", "TIFF", bidx=1)
        )
    data = bytearray(path.read_bytes())
    data[offset : offset + 200] = b"\x55" * 200
    path.write_bytes(data)
    source = source_of_file(str(path), "a")
    grid, window = whole(source)
    upper = Window(window.col, window.row, 512, 256)
    assert np.array_equal(read([source], grid, upper, bands=["b1"])[0], image[:, :256])
    with pytest.raises(DataError, match=rf"{path} cannot be read in columns 50000"):
        read([source], grid, window, bands=["b1"])


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_a_truncated_image_is_an_error_and_not_garbage(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    write(tmp_path / "whole.tif", noise(3, 200, 200), crs=None, transform=None)
    with rasterio.open(tmp_path / "whole.tif") as dataset:
        rasterio.shutil.copy(dataset, path, driver={"png": "PNG", "jpg": "JPEG", "tif": "GTiff"}[suffix])
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    def read_it():
        source = source_of_file(str(path), "a")
        return read([source], *whole(source), bands=["red", "green", "blue"])

    with pytest.raises(DataError, match=f"{path} cannot be read"):
        read_it()


def test_classes_are_warped_without_mixing_them(tmp_path):
    image = np.random.default_rng(0).choice([10, 200], (1, 48, 64)).astype(np.uint8)
    source = write(tmp_path / "a.tif", image, transform=TEN @ Affine.rotation(20))
    grid = Grid(UTM, (7.0, 7.0), (0.0, 0.0))
    window = footprint(source, grid)
    pixels, valid = read([source], grid, window, bands=["b1"], categorical=True)
    assert set(np.unique(pixels[0][valid])) == {10, 200}
    assert len(np.unique(read([source], grid, window, bands=["b1"])[0])) > 50


@pytest.mark.parametrize("href", ["gs://bucket/a.tif", "ftp://host/a.tif", "/nowhere/a.tif"])
def test_a_file_that_cannot_be_opened_is_named(href):
    with pytest.raises(DataError, match=href):
        source_of_file(href, "a")


def test_file_uris_are_local_paths(tmp_path):
    image = noise()
    write(tmp_path / "a.tif", image)
    source = source_of_file(f"file://{tmp_path}/a.tif", "a")
    assert np.array_equal(read([source], *whole(source), bands=["red"])[0], image[:1])


def test_a_rewritten_file_is_read_anew(tmp_path):
    source = write(tmp_path / "a.tif", noise())
    grid, window = whole(source)
    read([source], grid, window, bands=["red"])
    other = noise(seed=9, width=65)
    source = write(tmp_path / "a.tif", other)
    assert np.array_equal(read([source], grid, footprint(source, grid), bands=["red"])[0], other[:1])


def test_more_files_than_are_kept_open_can_be_read(tmp_path):
    sources = [write(tmp_path / f"{i}.tif", noise(seed=i)) for i in range(30)]
    grid, window = whole(sources[0])
    for _ in range(2):
        for i, source in enumerate(sources):
            assert np.array_equal(read([source], grid, window, bands=["red"])[0], noise(seed=i)[:1])


def test_threads_read_the_same_files_at_once(tmp_path):
    image = noise(3, 400, 400)
    source = write(tmp_path / "a.tif", image)
    grid, window = whole(source)
    wrong = []

    def check(seed):
        for col, row in np.random.default_rng(seed).integers(0, 300, (20, 2)).tolist():
            part = Window(window.col + col, window.row + row, 100, 100)
            pixels, _ = read([source], grid, part, bands=["red"])
            wrong.extend([] if np.array_equal(pixels[0], image[0, row : row + 100, col : col + 100]) else [(col, row)])

    threads = [Thread(target=check, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_source_survives_pickle_and_json(tmp_path):
    source = replace(write(tmp_path / "a.tif", noise()), datetime="2020-01-01T00:00:00Z", nodata=0.0)
    assert pickle.loads(pickle.dumps(source)) == source
    assert Source.from_row(json.loads(json.dumps(source.to_row()))) == source


def test_bands_are_named_by_description_then_colour_then_position(tmp_path):
    assert write(tmp_path / "a.tif", noise(2), names=("nir", "swir")).bands == ("nir", "swir")
    assert write(tmp_path / "b.tif", noise(4), colors="gray").bands == ("red", "green", "blue", "nir")
    assert write(tmp_path / "c.tif", noise(2)).bands == ("b1", "b2")
    assert write(tmp_path / "d.tif", noise(5, dtype="uint16")).bands == ("b1", "b2", "b3", "b4", "b5")


_ON_S3 = """
import sys
import numpy as np
from moto.server import ThreadedMotoServer
from upath import UPath
from rayseg.io import cog
from rayseg.io.rasters import footprint, grids_of, read, source_of_file
from rayseg.geo.grid import Grid, Window
import os
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
os.environ["AWS_ENDPOINT_URL"] = "http://{}:{}".format(*server.get_host_and_port())
UPath("s3://bucket").fs.mkdir("bucket")
image = np.arange(600, dtype=np.uint8).reshape(2, 15, 20)
grid, window = Grid("EPSG:32650", (10.0, 10.0), (0.0, 0.0)), Window(3, 4, 20, 15)
cog.write_image("s3://bucket/run/a.tif", image, grid, window, bands=["red", "nir"])
source = source_of_file("s3://bucket/run/a.tif", "a")
[(own, _)] = grids_of([source])
assert own == grid and footprint(source, own) == window
assert np.array_equal(read([source], own, window, bands=["red", "nir"])[0], image)
server.stop()
"""


def test_files_on_an_object_store_of_ones_own_are_written_and_read():
    keys = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    command, where = [sys.executable, "-c", _ON_S3], {**os.environ, **keys}
    done = subprocess.run(command, env=where, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


# -- real files

_SHIFTS = [(0, 0), (0, 1), (1, 0), (0, -1), (-1, 0)]


def rasters(shared, name):
    path = shared / "data" / "rasters" / name
    return source_of_file(str(path), path.stem)


@pytest.mark.real
def test_abutting_tiles_of_one_scene_are_the_scene_again(shared):
    tiles = [rasters(shared, f"rasterio/rgb{i}.tif") for i in range(1, 5)]
    scene = rasters(shared, "rasterio/RGB.byte.tif")
    [(grid, sources)] = grids_of(tiles)
    assert len(sources) == 4
    window = footprint(tiles[0], grid)
    for tile in tiles[1:]:
        window = window.union(footprint(tile, grid))
    pixels, valid = read(sources, grid, window, bands=["red", "green", "blue"])
    with rasterio.open(scene.assets[0][0]) as dataset:
        assert np.array_equal(pixels, dataset.read())
        assert np.array_equal(valid, dataset.dataset_mask() > 0)


@pytest.mark.real
def test_two_years_of_naip_lie_on_shifted_grids_and_meet_in_utm(shared):
    old, new = (rasters(shared, f"opengeos/m_4709963_se_14_1_{day}.tif") for day in ("20090818", "20200831"))
    assert old.bands == ("red", "green", "blue", "nir")
    old, new = replace(old, datetime="2009-08-18T00:00:00Z"), replace(new, datetime="2020-08-31T00:00:00Z")
    [(grid, ordered)] = grids_of([old, new])
    assert ordered == [new, old]
    assert grid == Grid("EPSG:32614", (5.0, 5.0), (0.0, 0.0))
    window = footprint(old, grid)
    pixels, valid = read(ordered, grid, Window(window.col + 200, window.row + 200, 256, 256), bands=["nir", "red"])
    assert valid.all()
    assert 40 < pixels.mean() < 220


@pytest.mark.real
def test_the_same_place_in_another_crs_warps_onto_the_same_pixels(shared):
    scene, nir = rasters(shared, "rasterio/rgb1.tif"), rasters(shared, "rasterio/rgb1_fake_nir_epsg3857.tif")
    item = replace(scene, assets=(*scene.assets, (nir.assets[0][0], ("nir",))))
    [(grid, _)] = grids_of([item])
    pixels, valid = read([item], grid, footprint(item, grid), bands=["nir", "green"])
    correlation = [np.corrcoef(np.roll(pixels[0], by, (0, 1))[valid], pixels[1][valid])[0, 1] for by in _SHIFTS]
    assert correlation[0] > 0.92
    assert max(correlation[1:]) < correlation[0] - 0.05


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "share"),
    [
        ("rio-tiler/cog_rgb_mask.tif", 0.97),
        ("rio-tiler/201404_13SED190110_201404_0x1500m_CL_1_extmask.tif", 0.97),
        ("rio-tiler/pix4d_alpha_nodata.tif", 0.875),
        ("rasterio/all-nodata.tif", 0.0),
        ("rasterio/RGBA.uint16.tif", None),
        ("rio-tiler/cog_nodata_nan.tif", None),
    ],
)
def test_every_kind_of_mask_is_read(shared, name, share):
    source = rasters(shared, name)
    grid, window = whole(source)
    with rasterio.open(source.assets[0][0]) as dataset:
        expected = dataset.dataset_mask() > 0
        if dataset.dtypes[0] == "float32":
            expected &= ~np.isnan(dataset.read(1))
    bands = [band for band in source.bands if band != "alpha"]
    assert np.array_equal(read([source], grid, window, bands=bands)[1], expected)
    assert share is None or abs(expected.mean() - share) < 0.02


@pytest.mark.parametrize(
    ("crs", "across", "down"),
    [(UTM, 10.0, 10.0), ("EPSG:4326", 0.1, 0.1), ("EPSG:32733", -30.0, -30.0), ("EPSG:3857", -5.0, 5.0)],
)
@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_a_flipped_raster_is_read_as_it_is_the_right_way_round(tmp_path, crs, across, down, dtype):
    image = noise(dtype=dtype)
    image[:, 3:9, 5:20] = 0
    x, y = (10.0, 20.0) if crs == "EPSG:4326" else (500_000.0, 4_000_000.0)
    left, top = (x if across > 0 else x + 64 * -across), (y - 48 * down if down > 0 else y)
    stored = image[:, :: -1 if down > 0 else 1, :: 1 if across > 0 else -1]
    more = {"crs": crs, "nodata": 0, "names": ("b1", "b2", "b3")}
    source = write(tmp_path / "a.tif", stored, transform=Affine(across, 0, left, 0, down, top), **more)
    other = write(tmp_path / "b.tif", image, transform=Affine(abs(across), 0, x, 0, -abs(down), y), **more)
    grid, window = whole(source)
    assert (grid, window) == whole(other)
    assert len(grids_of([source, other])) == 1
    for part in (window, Window(window.col + 7, window.row + 5, 21, 13), Window(window.col - 3, window.row - 2, 9, 9)):
        pixels, valid = read([source], grid, part, bands=["b2", "b1"])
        expected, ok = read([other], grid, part, bands=["b2", "b1"])
        assert np.array_equal(pixels, expected)
        assert np.array_equal(valid, ok)
    assert np.array_equal(read([source], grid, window, bands=["b1"])[0][0], image[0])


def test_a_rotated_world_is_refused_in_words_and_a_turned_country_is_not(tmp_path):
    turned = Affine.translation(0, 0) @ Affine.rotation(30)
    world = write(tmp_path / "a.tif", noise(), crs="EPSG:4326", transform=turned @ Affine.scale(3, -2))
    with pytest.raises(DataError, match=r"too (far|wide) for (the|its) UTM zone"):
        grids_of([world])
    country = write(tmp_path / "b.tif", noise(), crs="EPSG:4326", transform=turned @ Affine.scale(0.1, -0.1))
    assert grids_of([country])[0][0].crs.startswith("EPSG:32")


@pytest.mark.real
def test_files_with_control_points_or_rotation_are_warped_and_the_odd_ones_refused(shared):
    for name, least in (("rio-tiler/cog_gcps.tif", 0.5), ("odc-geo/au-3577-rotated.tif", 0.1)):
        source = rasters(shared, name)
        [(grid, _)] = grids_of([source])
        assert grid.name.startswith("32")
        assert read([source], grid, footprint(source, grid), bands=["b1"])[1].mean() > least
    with pytest.raises(DataError, match="complex"):
        read(
            [rasters(shared, "rio-cogeo/slc.tif")],
            Grid("EPSG:32633", (10.0, 10.0), (0.0, 0.0)),
            Window(0, 0, 9, 9),
            bands=["b1"],
        )
    assert grids_of([rasters(shared, "rasterio/rotated.tif")])[0][0].crs is None


@pytest.mark.real
def test_one_bad_block_fails_alone_and_every_corrupt_file_is_named(shared):
    bad, twin = rasters(shared, "rasterio/corrupt.tif"), rasters(shared, "rasterio/cogeo.tif")
    grid, window = whole(twin)
    fine = 0
    for row in (0, 512):
        for col in (0, 512):
            part = Window(window.col + col, window.row + row, 512, 512)
            try:
                pixels, _ = read([bad], grid, part, bands=["red"])
            except DataError as error:
                assert "corrupt.tif cannot be read in columns" in str(error)  # noqa: PT017
            else:
                fine += 1
                assert np.array_equal(pixels, read([twin], grid, part, bands=["red"])[0])
    assert fine == 3
    readable = set()
    for path in sorted((shared / "data" / "rasters" / "corrupt").glob("*.tif*")):
        try:
            _read_whole(path)
            readable.add(path.name)
        except DataError as error:
            assert path.name in str(error)  # noqa: PT017
    assert readable == {"oor_panic_008.tif"}  # its first band is sound; a run refuses it with the others


def _read_whole(path):
    source = source_of_file(str(path), path.stem)
    grid, window = whole(source)
    read([source], grid, window, bands=source.bands[:1])


TURNED = TEN @ Affine.rotation(20)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("by", ["alpha", "mask"])
@pytest.mark.parametrize("stated", ["file", "item", "both"])
def test_a_mask_and_a_nodata_value_both_count_read_as_it_is_and_warped(tmp_path, dtype, by, stated):
    image, mask = np.full((4, 48, 64), 50, dtype), np.full((48, 64), 255, np.uint8)
    mask[5:15, 5:15], image[3] = 0, 255
    image[:3, 30:40, 40:60] = 7
    image[3, 5:15, 5:15] = 0
    found = []
    for number, transform in enumerate((TEN, TURNED)):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            source = write(
                tmp_path / f"{number}.tif",
                image if by == "alpha" else image[:3],
                transform=transform,
                nodata=None if stated == "item" else 7,
                alpha=by == "alpha",
                mask=None if by == "alpha" else mask,
                names=None if by == "alpha" else ["red", "green", "blue"],
            )
        source = replace(source, nodata={"file": None, "item": 7.0, "both": 7.0}[stated])
        grid, window = whole(source)
        pixels, valid = read([source], grid, window, bands=["red"])
        assert set(pixels[0][valid].tolist()) == {50}
        found.append(valid.sum())
    assert found[0] == 48 * 64 - 300
    assert found[1] == pytest.approx(found[0], abs=25)


@pytest.mark.parametrize(("dtype", "nodata"), [("float32", -9999), ("uint16", 65535), ("uint8", 0), ("int16", -32768)])
def test_a_band_without_data_is_zero_in_a_warp_too_and_mixes_with_nothing(tmp_path, dtype, nodata):
    image = np.full((2, 48, 64), 50, dtype)
    image[0, 10:20, 10:20] = nodata
    image[:, 30:40, 30:40] = nodata
    for number, transform in enumerate((TEN, TURNED)):
        source = write(tmp_path / f"{number}.tif", image, transform=transform, nodata=nodata, names=["p", "q"])
        grid, window = whole(source)
        pixels, valid = read([source], grid, window, bands=["p", "q"])
        assert set(pixels[0][valid].tolist()) == {0, 50}
        assert set(pixels[1][valid].tolist()) == {50}
        assert (pixels[0][valid] == 0).sum() == pytest.approx(100, abs=25 * number)
        assert valid.sum() == pytest.approx(48 * 64 - 100, abs=25 * number)


def test_bands_of_different_nodata_are_warped_by_their_own(tmp_path):
    for name, nodata in (("p", 0), ("q", 9)):
        image = np.full((1, 48, 64), 50, np.uint8)
        image[0, 10:20, 10:20] = nodata
        image[0, 30:40, 30:40] = 9 - nodata  # data, though it is nodata of the other band
        write(tmp_path / f"{name}.tif", image, transform=TURNED, nodata=nodata)
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{number}"><Description>{name}</Description><NoDataValue>{nodata}'
        f'</NoDataValue><SimpleSource><SourceFilename relativeToVRT="1">{name}.tif</SourceFilename></SimpleSource>'
        "</VRTRasterBand>"
        for number, name, nodata in ((1, "p", 0), (2, "q", 9))
    )
    place = ",".join(map(str, TURNED.to_gdal()))
    vrt = f'<VRTDataset rasterXSize="64" rasterYSize="48"><SRS>{UTM}</SRS><GeoTransform>{place}</GeoTransform>{bands}'
    (tmp_path / "a.vrt").write_text(f"{vrt}</VRTDataset>")
    source = source_of_file(str(tmp_path / "a.vrt"), "a")
    for one in (source, replace(source, nodata=None, nodatas=())):  # an item that does not state them
        grid, window = whole(one)
        pixels, valid = read([one], grid, window, bands=["p", "q"])
        assert valid.sum() == pytest.approx(48 * 64 - 100, abs=25)
        for pixels_HW, data in zip(pixels, (9, 0), strict=True):
            assert (pixels_HW[valid] == data).sum() > 60
            low, high = sorted((data, 50))
            assert ((pixels_HW[valid] >= low) & (pixels_HW[valid] <= high)).all()


@pytest.mark.parametrize("warped", [False, True])
@pytest.mark.parametrize(("dtype", "fill"), [("uint8", 255), ("uint16", 65535)])
def test_a_saturated_band_of_a_photo_whose_background_is_white_stays_bright(tmp_path, dtype, fill, warped):
    """White as nodata, as GIS exports it: of a pixel with 255 in one band this band is known in 8 bits."""
    image_CHW = np.full((3, 40, 40), 100, dtype)
    image_CHW[:, :10] = fill  # the background
    image_CHW[0, 20:30, 20:30] = fill  # a bright red roof
    affine = Affine(10, 0, 400_000, 0, -10, 4_400_000) @ (Affine.rotation(20) if warped else Affine.identity())
    with rasterio.open(
        tmp_path / "a.tif", "w", "GTiff", 40, 40, 3, dtype=dtype, nodata=fill, crs="EPSG:32633", transform=affine
    ) as file:
        file.write(image_CHW)
    source = source_of_file(str(tmp_path / "a.tif"), "a")
    [(grid, _)] = grids_of([source])
    pixels_CHW, valid_HW = read([source], grid, footprint(source, grid), bands=source.bands)
    assert valid_HW.sum() == (1200 if not warped else pytest.approx(1200, abs=60))
    red_HW = pixels_CHW[0][valid_HW]
    bright = 255 if dtype == "uint8" else 0
    assert set(np.unique(red_HW)) == {100, bright}
    assert (red_HW == bright).sum() == (100 if not warped else pytest.approx(100, abs=25))
    assert set(np.unique(pixels_CHW[1:, valid_HW])) == {100}
    assert not pixels_CHW[:, ~valid_HW].any()
