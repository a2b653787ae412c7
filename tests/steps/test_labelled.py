"""Labelled scenes of several units: training and map see the values of one unit."""

import json

import numpy as np
import pytest
import rasterio
from affine import Affine
from small_world import damage

from rayseg.errors import DataError
from rayseg.geo.region import Region
from rayseg.io.scenes import read_window
from rayseg.models.bundle import Architecture, Bundle, Scaling
from rayseg.steps import labelled
from rayseg.steps import map as mapping
from rayseg.steps.labelled import LabelledConfig
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "land", (9, 9, 9)), (1, "water", (0, 0, 255))))
BANDS = ("nir", "red")
GROUND = np.random.default_rng(2).uniform(0.05, 0.4, (2, 40, 40))
STORED = Scaling(mean=(0.0, 0.0), std=(1.0, 1.0))
OFFSETS = {"before": 0.0, "after": -0.1}


@pytest.fixture
def folder(tmp_path):
    """Two scenes of one ground in the south, with the tags of two processing baselines."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number, (name, offset) in enumerate(OFFSETS.items()):
        place = {"crs": "EPSG:32736", "transform": Affine(20, 0, 500_000 + 800 * number, 0, -20, 8_000_000)}
        shape = {"driver": "GTiff", "height": 40, "width": 40, **place}
        with rasterio.open(tmp_path / "images" / f"{name}.tif", "w", count=2, dtype="int16", **shape) as file:
            file.write(np.rint((GROUND - offset) * 10_000).astype(np.int16))
            file.descriptions, file.scales, file.offsets = ("red", "nir"), (1e-4,) * 2, (offset,) * 2
        with rasterio.open(tmp_path / "masks" / f"{name}.tif", "w", count=1, dtype="uint8", **shape) as file:
            file.write((GROUND[0] > 0.2).astype(np.uint8), 1)
    return tmp_path


def divided(folder, scaling=STORED):
    region, config = Region("r", images=str(folder)), LabelledConfig(source=str(folder))
    parts = labelled.divide(region, config, TABLE, cell=16, bands=BANDS, scaling=scaling)
    return {image.id: image for part in parts.values() for image, _ in part}


@pytest.mark.parametrize("scaling", [STORED, Scaling(scale=1e-4, offset=0.0, mean=(0.2,) * 2, std=(0.1,) * 2)])
def test_training_sees_one_ground_as_the_same_values(folder, scaling):
    images = divided(folder, scaling)
    before, after = (
        read_window(images[name], images[name].window, bands=BANDS, table=TABLE)[0].astype(int) for name in OFFSETS
    )
    assert (before == after).all()
    offset = -0.1 if scaling == STORED else 0.0
    assert np.abs(before - (GROUND[::-1] - offset) * 10_000).max() <= 0.5 + 1e-6
    assert {image.image.units for image in images.values()} == {((1e-4, offset),) * 2}


@pytest.mark.parametrize("offset", [0.0, -0.1])
def test_a_map_is_made_from_values_of_the_models_unit(folder, offset):
    described = Bundle(
        name="m", task="segmentation", architecture=Architecture(factory="segmenter", options={"classes": 2}),
        classes=TABLE.classes, bands=BANDS, dtype="int16", scaling=STORED, units=((1e-4, offset),) * 2,
        patch=32, stride=32,
    )  # fmt: skip
    region = Region("r", images=str(folder))
    [texts] = {row["sources"] for row in mapping.tiles_for(region, described, mapping.MapConfig())}
    changes = {source["item_id"]: source["change"] for source in json.loads(texts)}
    assert changes == {
        name: [[1.0, round((own - offset) * 10_000)]] * 2 if own != offset else [] for name, own in OFFSETS.items()
    }
    with pytest.raises(DataError, match=r"after states nir as stored x 0\.0001 \+ offset -0\.1, before as"):
        mapping.tiles_for(region, described.model_copy(update={"units": ()}), mapping.MapConfig())


def test_a_scene_that_states_nothing_is_not_mixed_with_one_that_does(folder):
    with rasterio.open(folder / "images" / "before.tif", "r+") as file:
        file.scales, file.offsets = (1.0, 1.0), (0.0, 0.0)
    with pytest.raises(DataError, match=r"after states nir as stored x 0\.0001 .*before as stored, without scale"):
        divided(folder)


@pytest.mark.parametrize("how", ["header", "pixels", "unknown value"])
def test_a_mask_that_cannot_be_read_is_not_used_and_named(tmp_path, caplog, how):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for number, name in enumerate("abcd"):
        place = {"crs": "EPSG:32633", "transform": Affine(10, 0, 5e5 + 400 * number, 0, -10, 5e6)}
        shape = {"driver": "GTiff", "height": 40, "width": 40, "dtype": "uint8", **place}
        for kind, bands in (("images", 2), ("masks", 1)):
            values_CHW = np.random.default_rng(number).integers(0, 2, (bands, 40, 40))
            if (kind, name, how) == ("masks", "b", "unknown value"):
                values_CHW[0, 3, 3] = 9
            with rasterio.open(tmp_path / kind / f"{name}.tif", "w", count=bands, compress="deflate", **shape) as file:
                file.write(values_CHW.astype(np.uint8))
                if bands == 2:
                    file.descriptions = ("red", "nir")
    if how == "header":
        (tmp_path / "masks" / "b.tif").write_bytes(b"II*")
    if how == "pixels":
        damage(tmp_path / "masks" / "b.tif")
    assert divided(tmp_path).keys() == {"a", "c", "d"}
    assert "1 of 4 masks cannot be read and are not used: " in caplog.text
    assert "b.tif" in caplog.text
    for name in "acd":
        (tmp_path / "masks" / f"{name}.tif").write_bytes(b"II*")
    with pytest.raises(DataError, match=r"\.tif"):
        divided(tmp_path)


def test_images_whose_masks_label_nothing_are_named(folder, caplog):
    place = {"crs": "EPSG:32736", "transform": Affine(20, 0, 501_600, 0, -20, 8_000_000)}
    shape = {"driver": "GTiff", "height": 40, "width": 40, **place}
    with rasterio.open(folder / "images/bare.tif", "w", count=2, dtype="int16", **shape) as file:
        file.write(np.ones((2, 40, 40), np.int16))
        file.descriptions, file.scales, file.offsets = ("red", "nir"), (1e-4,) * 2, (0.0,) * 2
    with rasterio.open(folder / "masks/bare.tif", "w", count=1, dtype="uint8", nodata=7, **shape) as file:
        file.write(np.full((40, 40), 7, np.uint8), 1)
    divided(folder)
    assert "the masks of 1 of 3 images label no pixel of them: bare" in caplog.text
