"""Written files: valid COGs with the right names, colours, nodata and overviews, and the same bytes every time."""

import hashlib
import json

import numpy as np
import pytest
import rasterio
from rasterio.shutil import exists
from rio_cogeo.cogeo import cog_validate

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.io.cog import write_classes, write_image, write_scores
from rayseg.io.rasters import footprint, grids_of, read, source_of_file
from rayseg.vision.color import ClassTable

GRID = Grid("EPSG:32650", (2.0, 2.0), (1.0, 0.5))
WINDOW = Window(2048, -4096, 1300, 1100)
TABLE = ClassTable(((0, "background", (0, 0, 0)), (1, "gpc", (0, 158, 115)), (7, "other", (9, 8, 7))))


@pytest.fixture
def classes():
    blocks = np.random.default_rng(0).choice([0, 1, 7, 255], (11, 13)).astype(np.uint8)
    return blocks.repeat(100, 0).repeat(100, 1)


def valid_cog(path):
    ok, errors, warnings = cog_validate(str(path), strict=True, quiet=True)
    return ok and not errors and not warnings


def test_classes_carry_colours_names_nodata_and_mode_overviews(tmp_path, classes):
    path = tmp_path / "classes.tif"
    write_classes(path, classes, GRID, WINDOW, TABLE)
    assert valid_cog(path)
    with rasterio.open(path) as dataset:
        assert np.array_equal(dataset.read(1), classes)
        assert dataset.nodata == 255
        assert dataset.crs.to_epsg() == 32650
        assert dataset.transform == GRID.transform(WINDOW)
        assert dataset.block_shapes == [(512, 512)]
        assert dataset.compression.name == "deflate"
        assert dataset.descriptions == ("class",)
        assert json.loads(dataset.tags(1)["classes"]) == {"0": "background", "1": "gpc", "7": "other"}
        assert dataset.colormap(1)[1] == (0, 158, 115, 255)
        assert dataset.colormap(1)[7] == (9, 8, 7, 255)
        assert dataset.colormap(1)[255][3] == 0
        factor = dataset.overviews(1)[-1]
        small = dataset.read(1, out_shape=(1100 // factor, 1300 // factor))
        assert set(np.unique(small)) <= {0, 1, 7, 255}


def test_an_overview_shows_the_most_frequent_class_and_no_colour_between(tmp_path):
    table = ClassTable(((0, "dark", (0, 0, 0)), (1, "light", (200, 200, 200)), (2, "between", (50, 50, 50))))
    classes = np.zeros((1100, 1300), np.uint8)
    classes[::2, ::2] = 1
    write_classes(tmp_path / "a.tif", classes, GRID, WINDOW, table)
    with rasterio.open(tmp_path / "a.tif", overview_level=0) as dataset:
        assert not dataset.read(1).any()


def test_scores_keep_zero_and_nodata_apart_and_average_below(tmp_path):
    scores = np.random.default_rng(0).integers(0, 255, (2, 1100, 1300)).astype(np.uint8)
    scores[:, :600, :600] = 255
    scores[:, 600:, 600:] = 0
    path = tmp_path / "scores.tif"
    write_scores(path, scores, GRID, WINDOW, ["urban", "water"])
    assert valid_cog(path)
    with rasterio.open(path) as dataset:
        assert np.array_equal(dataset.read(), scores)
        assert dataset.descriptions == ("urban", "water")
        assert dataset.nodata == 255
        assert not dataset.read_masks(1)[:600, :600].any()
        assert dataset.read_masks(1)[600:, 600:].all()
        middle = dataset.read(1, out_shape=(550, 650))[10:290, 310:600]
        assert 100 < middle.mean() < 154
        assert middle.std() < 50


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_image_reads_back_through_the_reader(tmp_path, dtype):
    image = np.random.default_rng(0).integers(1, 200, (3, 700, 600)).astype(dtype)
    window = Window(7, -9, 600, 700)
    valid = np.ones((700, 600), bool)
    valid[50:90] = False
    for nodata in (None, 0):
        path = tmp_path / f"image-{nodata}.tif"
        write_image(path, image, GRID, window, bands=["red", "green", "nir"], nodata=nodata, valid_HW=valid)
        assert valid_cog(path)
        source = source_of_file(str(path), "image")
        assert source.bands == ("red", "green", "nir")
        assert grids_of([source])[0][0] == GRID
        assert footprint(source, GRID) == window
        pixels, ok = read([source], GRID, window, bands=source.bands)
        assert np.array_equal(ok, valid)
        assert np.array_equal(pixels[:, valid], image[:, valid])


def test_the_same_pixels_are_the_same_bytes(tmp_path, classes):
    for name in "ab":
        write_classes(tmp_path / name, classes, GRID, WINDOW, TABLE)
    a, b = (hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in "ab")
    assert a == b


def test_pixels_without_crs_lie_where_they_are_in_their_image(tmp_path):
    grid = Grid(None, (1.0, 1.0), (0.0, 0.0), "photo")
    classes = np.eye(60, 80, dtype=np.uint8)
    write_classes(tmp_path / "a.tif", classes, grid, Window(512, 40, 80, 60), TABLE)
    source = source_of_file(str(tmp_path / "a.tif"), "photo")
    assert source.crs is None
    assert source.transform == (1, 0, 512, 0, -1, -40)
    assert np.array_equal(read([source], grid, Window(512, 40, 80, 60), bands=source.bands)[0][0], classes)


def test_a_wkt_grid_keeps_its_crs(tmp_path):
    wkt = rasterio.crs.CRS.from_proj4("+proj=laea +lat_0=10 +lon_0=20 +ellps=WGS84 +units=m").to_wkt()
    grid = Grid(wkt, (2.0, 2.0), (0.0, 0.0))
    write_scores(tmp_path / "a.tif", np.zeros((1, 20, 30), np.uint8), grid, Window(0, 0, 30, 20), ["gpc"])
    source = source_of_file(str(tmp_path / "a.tif"), "a")
    assert footprint(source, grid) == Window(0, 0, 30, 20)


def test_folders_are_made_and_nothing_else_is_left(tmp_path, classes):
    write_classes(tmp_path / "deep" / "er" / "classes.tif", classes, GRID, WINDOW, TABLE)
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["classes.tif"]
    assert not exists("/vsimem/classes.tif")


def test_a_memory_store_takes_files_too(classes):
    from upath import UPath

    write_classes("memory://run/classes.tif", classes, GRID, WINDOW, TABLE)
    with rasterio.MemoryFile(UPath("memory://run/classes.tif").read_bytes()) as file, file.open() as dataset:
        assert np.array_equal(dataset.read(1), classes)


def test_what_does_not_fit_is_refused(tmp_path, classes):
    with pytest.raises(DataError, match=r"shape \(1100, 1300\) do not fill columns 0 to 9"):
        write_classes(tmp_path / "a.tif", classes, GRID, Window(0, 0, 10, 10), TABLE)
    with pytest.raises(DataError, match="int64 values"):
        write_classes(tmp_path / "a.tif", classes.astype(np.int64), GRID, WINDOW, TABLE)
    with pytest.raises(DataError, match="1 bands were to be written, 2 names"):
        write_scores(tmp_path / "a.tif", classes[None], GRID, WINDOW, ["a", "b"])
    assert not list(tmp_path.iterdir())
