"""Pictures of a run: everything where it lies, decimated, stretched only where it must be."""

import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
from fake_run import CORNER, GPC, NODATA, blobs, make, picture, place

from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, mapview, pictures
from rayseg.io.maps import mapped_tiles
from rayseg.io.pictures import encoded, pictures_of
from rayseg.io.rasters import source_of_file
from rayseg.vision.color import ClassTable

PIXELS = Grid(None, (1.0, 1.0), (0.0, 0.0))


def tiles_of(tmp_path, images, **options):
    return mapped_tiles(make(tmp_path / "run", images, **options).root)


def test_a_small_region_is_shown_pixel_by_pixel_with_classes_over_the_imagery(tmp_path):
    mask = blobs(100, 150, seed=1)
    mask[:10, :10] = NODATA
    image = picture(mask % 2)
    [shown] = pictures_of(tiles_of(tmp_path, {"scene": (image, mask, (5, 7))}))
    assert shown.title == "EPSG:32650"
    assert shown.step == 1
    np.testing.assert_array_equal(shown.classes_HW, mask)
    np.testing.assert_array_equal(shown.imagery()[..., :3], image.transpose(1, 2, 0))
    over = shown.map(GPC, alpha=0.5)
    net, bare = (mask == 1), (mask == 0)
    np.testing.assert_array_equal(over[bare, :3], image.transpose(1, 2, 0)[bare])
    blended = image.transpose(1, 2, 0)[net] * 0.5 + np.array([0, 158, 115]) * 0.5
    np.testing.assert_allclose(over[net, :3], blended, atol=0.5)


def test_a_large_region_is_decimated_to_the_size_asked_for(tmp_path):
    mask = np.zeros((600, 400), np.uint8)
    mask[300:] = 1
    image = np.full((3, 600, 400), 100, np.uint8)
    image[:, :, 200:] = 200
    [shown] = pictures_of(tiles_of(tmp_path, {"scene": (image, mask, (0, 0))}, size=256), size=150)
    assert shown.classes_HW.shape == (150, 100)
    assert (shown.classes_HW[:75] == 0).all()
    assert (shown.classes_HW[76:] == 1).all()
    assert (shown.image_HWC[:, :50] == 100).all()
    assert (shown.image_HWC[:, 51:] == 200).all()
    assert shown.metres == pytest.approx(800, rel=1e-3)


def test_very_many_tiles_are_painted_without_opening_them(tmp_path, monkeypatch):
    mask = np.zeros((256, 512), np.uint8)
    mask[:, 100:400] = 1  # tiles of 128 px: the second and third column are class 1, most of the others class 0
    tiles = tiles_of(tmp_path, {"scene": (picture(mask), mask, (0, 0))}, size=128)
    [read] = pictures_of(tiles, size=64)
    monkeypatch.setattr(pictures, "MOST_READ", 3)
    [painted] = pictures_of([replace(tile, href="nothing") for tile in tiles], size=64)
    np.testing.assert_array_equal(painted.classes_HW, np.array([0, 1, 1, 0]).repeat(16) + np.zeros((32, 1)))
    np.testing.assert_array_equal(painted.image_HWC, read.image_HWC)


def test_decimation_leaves_no_gaps_between_tiles_or_at_the_edge(tmp_path):
    mask = np.ones((333, 277), np.uint8)
    [shown] = pictures_of(tiles_of(tmp_path, {"scene": (picture(mask), mask, (3, 5))}), size=100)
    assert shown.classes_HW.shape == (100, 84)
    assert (shown.classes_HW == 1).all()
    assert shown.seen_HW.all()


def test_where_nothing_is_known_the_picture_is_see_through(tmp_path):
    mask = blobs(64, 64)
    images = {"left": (picture(mask), mask, (0, 0)), "right": (picture(mask), mask, (0, 128))}
    [shown] = pictures_of(tiles_of(tmp_path, images))
    assert shown.imagery().shape == (64, 192, 4)
    assert not shown.imagery()[:, 64:128].any()
    assert (shown.imagery()[:, :64, 3] == 255).all()


def test_of_overlapping_scenes_the_newest_is_shown(tmp_path):
    mask = blobs(64, 64)
    tiles = tiles_of(tmp_path, {"old": (np.full((3, 64, 64), 50, np.uint8), mask, (0, 0))})
    cog.write_image(
        tmp_path / "new.tif",
        np.full((3, 64, 32), 90, np.uint8),
        tiles[0].tile.grid,
        place(mask[:, :32], 0, 0),
        bands=("red", "green", "blue"),
    )
    new = source_of_file(str(tmp_path / "new.tif"), "new", datetime="2024-01-01T00:00:00Z")
    [shown] = pictures_of([replace(tile, sources=(*tile.sources, new)) for tile in tiles])
    assert (shown.image_HWC[:, :32] == 90).all()
    assert (shown.image_HWC[:, 32:] == 50).all()


def test_values_that_are_not_bytes_are_stretched_over_the_whole_picture(tmp_path):
    mask = blobs(64, 64)
    ramp = np.linspace(1000, 3000, 64 * 64).reshape(1, 64, 64).repeat(3, 0).astype(np.uint16)
    [shown] = pictures_of(tiles_of(tmp_path, {"scene": (ramp, mask, (0, 0))}, size=32))
    gray = shown.image_HWC[..., 0]
    assert gray[0, 0] == 0
    assert gray[-1, -1] == 255
    assert gray[32, 0] == pytest.approx(127, abs=3)
    assert (gray == 255).mean() == pytest.approx(0.02, abs=0.005)
    assert (np.diff(gray.ravel().astype(int)) >= 0).all()


def test_imagery_on_another_grid_is_warped_onto_the_maps(tmp_path):
    mask = blobs(64, 64)
    tiles = tiles_of(tmp_path, {"scene": (picture(mask), mask, (0, 0))})
    finer = Grid("EPSG:32650", (1.0, 1.0), (0.5, 0.5))
    window = Window(2 * CORNER.col, 2 * CORNER.row, 128, 128)
    image = np.full((3, 128, 128), 77, np.uint8)
    cog.write_image(tmp_path / "fine.tif", image, finer, window, bands=("red", "green", "blue"))
    fine = source_of_file(str(tmp_path / "fine.tif"), "fine")
    [shown] = pictures_of([replace(tile, sources=(fine,)) for tile in tiles])
    assert (shown.image_HWC[2:-2, 2:-2] == 77).all()


def test_images_without_georeference_become_a_sheet_of_six(tmp_path):
    images = {}
    for number in range(8):
        mask = blobs(60, 90, seed=number)
        images[f"i{number}"] = (np.full((3, 60, 90), 100 + number, np.uint8), mask, (0, 0))
    [sheet] = pictures_of(tiles_of(tmp_path, images, grid=PIXELS), size=300)
    assert sheet.title == "6 of 8 images"
    assert sheet.classes_HW.shape[1] <= 300
    assert sheet.metres is None
    assert set(np.unique(sheet.image_HWC)) == {0, 100, 101, 103, 104, 106, 107}


def test_no_more_pictures_are_made_than_asked_for(tmp_path, monkeypatch):
    images = {name: (picture(blobs(20, 20)), blobs(20, 20), (0, 0)) for name in "abc"}
    tiles = tiles_of(tmp_path, images)
    grids = [replace(tiles[0].tile.grid, image=name) for name in "abc"]
    alone = [replace(tiles[0], tile=replace(tiles[0].tile, grid=grid)) for grid in grids]
    made, mosaic = [], pictures.mosaic
    monkeypatch.setattr(pictures, "mosaic", lambda *found, **named: made.append(found) or mosaic(*found, **named))
    assert len(pictures.pictures_of(alone, most=2)) == len(made) == 2
    assert len(pictures_of(alone)) == 3


def test_a_lone_image_fills_the_sheet(tmp_path):
    mask = blobs(50, 80)
    [sheet] = pictures_of(tiles_of(tmp_path, {"a": (picture(mask), mask, (0, 0))}, grid=PIXELS))
    np.testing.assert_array_equal(sheet.classes_HW, mask)
    assert sheet.title == "1 image"


def test_all_classes_are_painted_when_there_are_more_than_two(tmp_path):
    table = ClassTable(((0, "water", (0, 0, 255)), (1, "wood", (0, 99, 0)), (2, "town", (255, 0, 0))))
    mask = np.zeros((20, 20), np.uint8)
    [shown] = pictures_of(tiles_of(tmp_path, {"a": (picture(mask), mask, (0, 0))}, table=table))
    assert (shown.map(table, alpha=1.0) == (0, 0, 255, 255)).all()


def test_png_keeps_every_pixel_and_webp_is_an_image_too():
    image = np.dstack([picture(blobs(40, 50)).transpose(1, 2, 0), np.full((40, 50), 255, np.uint8)])
    back = matplotlib.image.imread(io.BytesIO(encoded(image)))
    np.testing.assert_array_equal(np.rint(back * 255), image)
    assert encoded(image, "webp")[8:12] == b"WEBP"


@pytest.mark.parametrize("bad", [np.inf, -3.4028235e38])
def test_pixels_that_are_no_number_are_transparent_on_the_map_page_and_do_not_change_its_contrast(tmp_path, bad):
    image_CHW = np.random.default_rng(1).uniform(0, 1, (3, 64, 64)).astype(np.float32)
    image_CHW[:, :8] = bad
    grid = Grid(None, (1.0, 1.0), (0.0, 0.0), "a")
    cog.write_image(tmp_path / "a.tif", image_CHW, grid, Window(0, 0, 64, 64), bands=("red", "green", "blue"))
    source = source_of_file(str(tmp_path / "a.tif"), "a")
    tile = mapview.imagery_tile([source], (0, 0, 0), image=Window(0, 0, 64, 64))
    assert not tile[:30, :, 3].any()
    assert (tile[34:, :, 3] == 255).all()
    assert 100 < tile[34:, :, :3].mean() < 155
    shown = pictures.shown([source], grid, Window(0, 0, 64, 64))
    assert not shown[:8].any()
    assert 100 < shown[8:].mean() < 155
