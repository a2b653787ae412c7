"""A model in this process: arrays, lazy arrays and files have the pixels of `rayseg predict`."""

import numpy as np
import pytest
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


def test_arrays_that_the_model_does_not_accept_are_refused(world, tmp_path):
    model = world["model"]
    with pytest.raises(DataError, match=r"shape \(90, 110, 3\).*transpose or select"):
        model.predict(np.zeros((90, 110, 3), np.uint8))
    with pytest.raises(ModelError, match="trained on uint8 values, the image has uint16"):
        model.predict(np.zeros((3, 9, 9), np.uint16))
    with pytest.raises(ModelError):
        public.load_model(tmp_path)
    assert "classification" in repr(public.load_model(classifier(tmp_path / "c")))
