"""Masks and imagery of one place that count their longitudes on different turns around the Earth."""

import logging

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.masks import Piece, read_classes, turns_of
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.scenes import labelled_images, read_window
from rayseg.io.sources import source_of_file
from rayseg.steps.evaluate import compare, match
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "low", (0, 0, 0)), (1, "high", (0, 158, 115))))


def raster(path, west, *, crs="EPSG:4326", side=0.001, top=-17.0, dtype="uint8"):
    """A raster whose classes differ from pixel to pixel."""
    path.parent.mkdir(exist_ok=True)
    classes_HW = np.random.default_rng(4).integers(0, 2, (30, 40)).astype(dtype)
    with rasterio.open(path, "w", "GTiff", 40, 30, 1, crs, from_origin(west, top, side, side), dtype) as file:
        file.write(classes_HW, 1)
    return classes_HW


@pytest.mark.parametrize(("image", "mask"), [(-160.0, 200.0), (200.0, -160.0), (-179.98, 180.02), (340.0, -20.0)])
def test_a_mask_on_another_turn_labels_its_image_and_counts_in_evaluation(tmp_path, image, mask):
    raster(tmp_path / "images" / "a.tif", image)
    classes_HW = raster(tmp_path / "masks" / "b.tif", mask)
    [labelled] = labelled_images(str(tmp_path / "images"), str(tmp_path / "masks"), table=TABLE)
    _, read_HW = read_window(labelled, labelled.window, bands=["b1"], table=TABLE)
    assert np.array_equal(read_HW, classes_HW)
    source, truth = (source_of_file(str(tmp_path / name), name) for name in ("images/a.tif", "masks/b.tif"))
    [(grid, _)] = grids_of([source])
    piece = Piece(Tile("t", grid, footprint(source, grid)), source, "a", (30, 40))
    [matched] = match([piece], [truth])
    assert compare(matched, TABLE).confusion.matrix.tolist() == np.diag(np.bincount(classes_HW.ravel())).tolist()


def test_a_mask_over_the_end_of_a_turn_is_read_on_both_sides_of_it(tmp_path):
    classes_HW = raster(tmp_path / "m.tif", 179.98)
    mask = source_of_file(str(tmp_path / "m.tif"), "m")
    grid = Grid("EPSG:4326", (0.001, 0.001), (-180.0, 90.0))
    east = read_classes([mask], grid, Window(359_980, 107_000, 20, 30), TABLE)
    west = read_classes([mask], grid, Window(0, 107_000, 20, 30), TABLE)
    assert np.array_equal(np.concatenate([east, west], axis=1), classes_HW)


@pytest.mark.parametrize("crs", ["EPSG:3857", "EPSG:3832", "EPSG:4269"])
def test_planes_that_count_turns_have_three_and_others_one(crs):
    assert len(turns_of(Grid(crs, (1.0, 1.0), (0.0, 0.0)))) == 3
    assert len(turns_of(Grid("EPSG:32760", (1.0, 1.0), (0.0, 0.0)))) == 1
    assert len(turns_of(Grid(None, (1.0, 1.0), (0.0, 0.0), "a"))) == 1


def test_degrees_beyond_180_label_imagery_in_utm(tmp_path):
    (tmp_path / "images").mkdir()
    place = from_origin(180_000, 8_110_000, 100, 100)
    with rasterio.open(tmp_path / "images" / "a.tif", "w", "GTiff", 40, 30, 1, "EPSG:32701", place, "uint8") as file:
        file.write(np.ones((30, 40), "uint8"), 1)
    raster(tmp_path / "masks" / "b.tif", 179.9, side=0.01, top=-16.9)
    [labelled] = labelled_images(str(tmp_path / "images"), str(tmp_path / "masks"), table=TABLE)
    _, classes_HW = read_window(labelled, labelled.window, bands=["b1"], table=TABLE)
    assert set(np.unique(classes_HW)) == {0, 1}


def test_masks_over_no_image_are_named(tmp_path, caplog):
    raster(tmp_path / "images" / "a.tif", -160.0)
    raster(tmp_path / "masks" / "b.tif", 200.0)
    raster(tmp_path / "masks" / "far.tif", 20.0)
    with caplog.at_level(logging.WARNING):
        labelled_images(str(tmp_path / "images"), str(tmp_path / "masks"), table=TABLE)
    assert "1 of 2 masks lie over no image and are not used: far" in caplog.text
