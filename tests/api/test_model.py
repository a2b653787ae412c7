"""A model in this process: arrays, lazy arrays and files have the pixels of `rayseg predict`."""

import numpy as np
import pytest
import rasterio
import rioxarray
from small_world import catalogue, classifier, mosaic, rayseg

import rayseg as public
from rayseg.errors import DataError, ModelError


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_model):
    """A scene, the run of it, and the model."""
    root = tmp_path_factory.mktemp("model")
    catalogue(root / "imagery", scene={})
    image = root / "imagery" / "scene.tif"
    found = rayseg("predict", tiny_model, image, "--out", root / "run", "--engine", "inline")
    assert found.exit_code == 0, found.output
    return {"image": image, "run": root / "run", "model": public.load_model(tiny_model)}


def test_a_file_and_a_lazy_array_have_the_pixels_of_the_command(world):
    classes, scores = mosaic(world["run"])[0], mosaic(world["run"], "scores")
    with rioxarray.open_rasterio(world["image"]) as image:
        for given in (world["image"], str(world["image"]), image):
            found = world["model"].predict(given)
            assert np.array_equal(found.classes.values, classes)
            assert np.array_equal(found.scores.values.reshape(scores.shape), scores)
            assert found.classes.rio.transform() == image.rio.transform()
            assert (found.classes.rio.crs, found.classes.rio.nodata) == (image.rio.crs, 255)


def test_a_plain_array_lies_at_the_origin(world, tmp_path):
    rng = np.random.default_rng(3)
    image = rng.integers(1, 255, (3, 90, 110), np.uint8)
    found = world["model"].predict(image)
    assert (found.classes.shape, found.scores.shape) == ((90, 110), (1, 90, 110))
    from PIL import Image

    Image.fromarray(image.transpose(1, 2, 0)).save(tmp_path / "image.png")
    assert np.array_equal(world["model"].predict(tmp_path / "image.png").classes.values, found.classes)


def test_a_lazy_array_is_read_as_a_file_is(world, tmp_path):
    """A pixel is valid where any band is; another scale, and rows to the north, are not taken for the model's."""
    with rioxarray.open_rasterio(world["image"]) as image:
        holed = image.copy(data=image.values)
        holed.values[1, 40:60, 30:50] = 0  # nodata in one band of three
        holed.rio.write_nodata(0).rio.to_raster(tmp_path / "holed.tif")
        with rioxarray.open_rasterio(tmp_path / "holed.tif") as again:
            found = world["model"].predict(again)
        assert np.array_equal(found.classes.values, world["model"].predict(tmp_path / "holed.tif").classes.values)
        assert (found.classes.values[40:60, 30:50] != 255).all()
        part = image.isel(x=slice(30, None), y=slice(50, None))
        part.rio.to_raster(tmp_path / "part.tif")
        found = world["model"].predict(part).classes
        assert np.array_equal(found.values, world["model"].predict(tmp_path / "part.tif").classes.values)
        assert found.rio.transform().c == image.rio.transform().c + 30
        with pytest.raises(DataError, match="rotated or flipped"):
            world["model"].predict(image.isel(y=slice(None, None, -1)))


@pytest.mark.parametrize("masked_bands", [slice(None), slice(1, 2)])
def test_masked_pixels_are_missing_data(world, tmp_path, masked_bands):
    image = np.random.default_rng(4).integers(1, 255, (3, 90, 110), np.uint8)
    mask = np.zeros(image.shape, bool)
    mask[masked_bands, 20:50, 30:70] = True
    found = world["model"].predict(np.ma.masked_array(image, mask, fill_value=200))
    zeroed = np.where(mask, 0, image)
    with rasterio.open(
        tmp_path / "a.tif", "w", "GTiff", 110, 90, 3, dtype="uint8", nodata=0, photometric="RGB"
    ) as file:
        file.write(zeroed)
    assert np.array_equal(found.classes, world["model"].predict(tmp_path / "a.tif").classes.values)
    assert (found.classes == 255).sum() == (1200 if mask.all(axis=0).any() else 0)


def test_arrays_that_the_model_does_not_accept_are_refused(world, tmp_path):
    model = world["model"]
    with pytest.raises(DataError, match=r"shape \(90, 110, 3\).*transpose or select"):
        model.predict(np.zeros((90, 110, 3), np.uint8))
    with pytest.raises(ModelError, match="trained on uint8 values, the image has uint16"):
        model.predict(np.zeros((3, 9, 9), np.uint16))
    with pytest.raises(ModelError):
        public.load_model(tmp_path)
    assert "classification" in repr(public.load_model(classifier(tmp_path / "c")))


def test_bands_of_a_lazy_array_are_taken_by_name_in_any_order(world):
    image, model = rioxarray.open_rasterio(world["image"]).load(), world["model"]
    expected = model.predict(image).classes.values
    names = list(model.bundle.bands)
    for order in ([2, 0, 1], [1, 2, 0], [0, 1, 2]):
        named = image.isel(band=order).assign_coords(band=[names[at] for at in order])
        assert np.array_equal(model.predict(named).classes.values, expected)
        long = image.isel(band=order).assign_attrs(long_name=tuple(names[at] for at in order))
        assert np.array_equal(model.predict(long).classes.values, expected)
        assert np.array_equal(model.predict(named.transpose("y", "x", "band")).classes.values, expected)
    with pytest.raises(DataError, match=f"has the bands nir, {names[1]}, {names[2]} and lacks {names[0]}"):
        model.predict(image.assign_coords(band=["nir", *names[1:]]))
    with pytest.raises(DataError, match="has the dimensions y, x, expected band, y and x"):
        model.predict(image[0])
    with pytest.raises(DataError, match="the image is a Dataset"):
        model.predict(image.to_dataset(name="a"))


def test_uneven_coordinates_are_refused(world):
    image = rioxarray.open_rasterio(world["image"]).load()
    for name in ("x", "y"):
        places = np.delete(np.arange(image.sizes[name]), 10)
        with pytest.raises(DataError, match=f"the coordinates {name} of the image are not evenly spaced"):
            world["model"].predict(image.isel({name: places}))
    assert world["model"].predict(image.isel(x=slice(0, None, 2))).classes.shape[1] == (image.sizes["x"] + 1) // 2


def test_masked_values_of_a_plain_array_are_missing(world):
    image = rioxarray.open_rasterio(world["image"]).load().values
    mask = np.zeros(image.shape, bool)
    mask[:, 10:30, 20:50] = True
    classes = world["model"].predict(np.ma.array(image, mask=mask)).classes
    assert np.array_equal(classes == 255, mask[0])
