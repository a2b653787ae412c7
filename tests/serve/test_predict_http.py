"""Predicting over HTTP: the same pixels as `rayseg predict`, in four kinds of answer."""

import io
import json

import numpy as np
import pytest
import rasterio
from PIL import Image
from small_world import catalogue, classifier, mosaic, rayseg, refused, segmenter
from tiny_server import client, encoded, form, image_HWC


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    segmenter(root / "one/models/binary")
    segmenter(root / "one/models/several", classes=3)
    classifier(root / "one/models/chips")
    catalogue(root / "imagery", scene={})
    return root


@pytest.fixture(scope="module")
def asked(world):
    return client(world / "one")


def predict(asked, name, data, accept="application/json"):
    return asked.post(f"/v1/models/{name}/predict", headers={"Accept": accept}, **form(data))


def tiles_of(out, name):
    """The one tile of a run over one image, (bands, height, width)."""
    [path] = out.glob(f"tiles/*/{name}.tif")
    with rasterio.open(path) as file:
        return file.read()


@pytest.mark.parametrize("name", ["binary", pytest.param("several", marks=pytest.mark.more)])
def test_an_image_gets_the_pixels_of_batch_prediction(world, asked, tmp_path, name):
    data = encoded(image_HWC())
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").write_bytes(data)
    model, out = world / "one/models" / name, tmp_path / "run"
    assert rayseg("predict", model, tmp_path / "images", "--out", out, "--engine", "inline").exit_code == 0
    found = predict(asked, name, data, "image/tiff")
    assert found.status_code == 200, found.text
    with rasterio.open(io.BytesIO(found.content)) as file:
        layers = file.read()
        assert file.descriptions[0] == "class"
    np.testing.assert_array_equal(layers[0], tiles_of(out, "classes")[0])
    np.testing.assert_array_equal(layers[1:], tiles_of(out, "scores"))
    mask = np.array(Image.open(io.BytesIO(predict(asked, name, data, "image/png").content)))
    np.testing.assert_array_equal(mask, layers[0])


def test_an_image_in_other_units_is_converted_as_in_batch_prediction(tmp_path):
    rng = np.random.default_rng(4)
    segmenter(tmp_path / "models/one")
    described = tmp_path / "models/one/bundle.json"
    content = json.loads(described.read_text())
    content |= {"dtype": "uint16", "units": [[1e-4, 0.0]] * 3}
    described.write_text(json.dumps(content))
    place = {"crs": "EPSG:32633", "transform": rasterio.Affine(10, 0, 5e5, 0, -10, 465e4)}
    path, out = tmp_path / "a.tif", tmp_path / "run"
    with rasterio.open(path, "w", "GTiff", 80, 60, 3, dtype="uint16", photometric="rgb", **place) as file:
        file.write(rng.integers(1000, 1256, (3, 60, 80), "uint16"))
        file.scales, file.offsets = (1e-4,) * 3, (-0.1,) * 3
    assert rayseg("predict", tmp_path / "models/one", path, "--out", out, "--engine", "inline").exit_code == 0
    found = predict(client(tmp_path), "one", path.read_bytes(), "image/tiff")
    assert found.status_code == 200, found.text
    with rasterio.open(io.BytesIO(found.content)) as file:
        np.testing.assert_array_equal(file.read(), np.concatenate([tiles_of(out, "classes"), tiles_of(out, "scores")]))


def test_a_georeferenced_scene_gets_the_pixels_of_batch_prediction(world, asked, tmp_path):
    model, scene, out = world / "one/models/binary", world / "imagery/scene.tif", tmp_path / "run"
    assert rayseg("predict", model, scene, "--out", out, "--engine", "inline").exit_code == 0
    found = predict(asked, "binary", scene.read_bytes(), "image/tiff")
    with rasterio.open(io.BytesIO(found.content)) as file, rasterio.open(scene) as source:
        assert (file.crs, file.transform, file.shape) == (source.crs, source.transform, source.shape)
        assert file.nodata == 255
        layers = file.read()
    np.testing.assert_array_equal(layers[0], mosaic(out)[0])
    np.testing.assert_array_equal(layers[1:], mosaic(out, "scores"))
    assert (layers[0] == 255).any()


def test_areas_shares_and_polygons_are_those_of_the_mask(world, asked):
    data = (world / "imagery/scene.tif").read_bytes()
    found = predict(asked, "binary", data).json()
    mask = np.array(Image.open(io.BytesIO(predict(asked, "binary", data, "image/png").content)))
    rows = {row["name"]: row for row in found["classes"]}
    assert rows["gpc"]["pixels"] == (mask == 1).sum()
    assert rows["gpc"]["area_m2"] == pytest.approx((mask == 1).sum(), rel=2e-3)
    assert 0.5 < rows["gpc"]["score_mean"] < 1
    assert 0.5 < rows["background"]["score_mean"] < 1
    assert sum(row["share"] for row in found["classes"]) == pytest.approx(1)
    shapes = json.loads(predict(asked, "binary", data, "application/geo+json").content)
    assert sum(one["properties"]["pixels"] for one in shapes["features"]) == (mask == 1).sum()
    x, y = np.array(shapes["features"][0]["geometry"]["coordinates"][0])[0][:2]
    assert -180 <= x <= 180
    assert -90 <= y <= 90


def test_the_background_of_one_class_is_see_through(asked):
    image = Image.open(io.BytesIO(predict(asked, "binary", encoded(image_HWC()), "image/png").content))
    rgba = np.array(image.convert("RGBA"))
    index = np.array(image)
    assert (rgba[index == 0][:, 3] == 0).all()
    assert (rgba[index == 1] == (0, 158, 115, 255)).all()


def test_models_are_listed_and_described(asked):
    found = asked.get("/v1/models").json()["models"]
    assert {(row["name"], row["task"]) for row in found} == {
        ("binary", "segmentation"),
        ("several", "segmentation"),
        ("chips", "classification"),
    }
    item = asked.get("/v1/models/binary").json()
    assert item["type"] == "Feature"
    assert item["properties"]["mlm:tasks"] == ["semantic-segmentation"]
    assert asked.get("/healthz").json()["status"] == "ok"


def test_a_jpeg_is_answered_too(asked):
    assert predict(asked, "binary", encoded(image_HWC(), "JPEG")).status_code == 200


def test_a_classifier_answers_with_class_and_score_and_where_it_looked(asked):
    found = predict(asked, "chips", encoded(image_HWC()), "application/json")
    assert found.status_code == 200
    said = found.json()
    assert said["name"] == max(said["probabilities"], key=said["probabilities"].get)
    assert said["score"] == max(said["probabilities"].values())
    assert sum(said["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    header, row = predict(asked, "chips", encoded(image_HWC()), "text/csv").text.splitlines()
    assert header.startswith("class,name,score,p_")
    assert row.split(",")[1] == said["name"]
    picture = predict(asked, "chips", encoded(image_HWC()), "image/png")
    side = next(model for model in asked.get("/v1/models").json()["models"] if model["name"] == "chips")["patch"]
    assert Image.open(io.BytesIO(picture.content)).size == (side, side)


@pytest.mark.parametrize(
    ("name", "accept", "status", "words"),
    [
        ("nothing", "image/png", 404, "no model 'nothing'"),
        ("chips", "image/tiff", 406, "text/csv"),
        ("binary", "text/html", 406, "image/png"),
        ("binary", "image/png;q=0", 406, "Accept is"),
    ],
)
def test_what_cannot_be_asked_is_a_problem(asked, name, accept, status, words):
    found = predict(asked, name, encoded(image_HWC()), accept)
    assert found.status_code == status
    assert found.headers["content-type"] == "application/problem+json"
    assert words in found.json()["detail"]
    assert found.json()["status"] == status
    assert found.json()["request_id"] == found.headers["x-request-id"]


def test_an_image_that_breaks_the_contract_is_refused_naming_both_sides(asked):
    grey = predict(asked, "binary", encoded(image_HWC()[..., 0]))
    assert grey.status_code == 422
    assert "needs the bands red, green, blue" in grey.json()["detail"]
    deep = predict(asked, "binary", encoded(image_HWC()[..., 0].astype(np.uint16)))
    assert deep.status_code == 422


MOON = 'GEOGCS["Moon",DATUM["Moon",SPHEROID["Moon",1737400,0]],PRIMEM["Zero",0],UNIT["degree",0.0174532925199433]]'


@pytest.mark.parametrize("crs", ['LOCAL_CS["site",UNIT["metre",1]]', MOON])
def test_a_georeference_that_is_not_on_earth_is_refused_as_in_batch_prediction(world, asked, tmp_path, crs):
    place = {"crs": crs, "transform": rasterio.Affine(0.01, 0, 10, 0, -0.01, 20)}
    size = {"driver": "GTiff", "dtype": "uint8", "count": 3, "height": 60, "width": 80}
    with rasterio.open(tmp_path / "a.tif", "w", **size, **place) as file:
        file.write(image_HWC()[:60, :80].transpose(2, 0, 1))
    words = (world / "one/models/binary", tmp_path / "a.tif", "--out", tmp_path / "run", "--engine", "inline")
    said = "cannot be placed on Earth by its CRS"
    assert said in refused(3, "predict", *words)
    found = predict(asked, "binary", (tmp_path / "a.tif").read_bytes())
    assert found.status_code == 422
    assert said in found.json()["detail"]
