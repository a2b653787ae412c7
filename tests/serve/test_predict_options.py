"""Fields of a prediction: threshold, bands by number, minimum area, outlines, layers; an image as the whole body."""

import io
import json

import geopandas
import numpy as np
import pytest
import rasterio
from PIL import Image
from small_world import catalogue, classifier, mosaic, rayseg, segmenter
from tiny_server import client, encoded, form, image_HWC

from rayseg.geo.grid import Grid, Tile, Window
from rayseg.serve.answers import NODATA, Result, decided, geojson
from rayseg.vision.color import ClassTable


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    segmenter(root / "models/binary")
    segmenter(root / "models/several", classes=3)
    classifier(root / "models/chips")
    catalogue(root / "imagery", scene={})
    return root


@pytest.fixture(scope="module")
def asked(world):
    return client(world / "models")


def predict(asked, fields, data=None, name="binary", accept="image/tiff"):
    return asked.post(
        f"/v1/models/{name}/predict", data=fields, headers={"Accept": accept}, **form(data or encoded(image_HWC()))
    )


def layers_of(found):
    assert found.status_code == 200, found.text
    with rasterio.open(io.BytesIO(found.content)) as file:
        return file.read()


def test_a_threshold_is_applied_to_the_stored_scores(asked):
    classes_HW, scores_HW = layers_of(predict(asked, {}))
    high = float(np.quantile(scores_HW, 0.9)) / 254
    other_HW, same_HW = layers_of(predict(asked, {"threshold": str(high)}))
    np.testing.assert_array_equal(same_HW, scores_HW)
    np.testing.assert_array_equal(other_HW, scores_HW > high * 254)
    assert other_HW.sum() != classes_HW.sum()
    refused = predict(asked, {"threshold": "0.5"}, name="several")
    assert refused.status_code == 422
    assert "threshold is for models of one class" in refused.json()["detail"]


def tiff(path, image_CHW, **options):
    place = {"crs": "EPSG:32650", "transform": rasterio.Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    count, height, width = image_CHW.shape
    with rasterio.open(path, "w", "GTiff", width, height, count, dtype="uint8", **place, **options) as file:
        file.write(image_CHW)
    return path.read_bytes()


def test_bands_of_a_file_without_names_are_given_by_number(asked, tmp_path):
    red, green, blue = image_HWC().transpose(2, 0, 1)
    plain = tiff(tmp_path / "rgb.tif", np.stack([red, green, blue]), photometric="rgb")
    mixed = tiff(tmp_path / "mixed.tif", np.stack([blue, red, green, blue + 1, red]), photometric="minisblack")
    expected = layers_of(predict(asked, {}, plain))
    np.testing.assert_array_equal(layers_of(predict(asked, {"bands": "[2, 3, 1]"}, mixed)), expected)
    assert (layers_of(predict(asked, {"bands": "[1, 2, 3]"}, mixed)) != expected).any()
    unnamed = predict(asked, {}, mixed)
    assert unnamed.status_code == 422
    assert "bands=[4,3,2]" in unnamed.json()["detail"]
    for numbers, words in (("[1, 2]", "expected 3 different"), ("[1, 1, 2]", "different"), ("[1, 2, 9]", "has 5")):
        assert words in predict(asked, {"bands": numbers}, mixed).json()["detail"]
    assert predict(asked, {"bands": "[2, 3, 1]"}, mixed, "chips", "application/json").status_code == 200


def test_a_minimum_area_and_simple_outlines_are_those_of_a_run(world, asked, tmp_path):
    out, scene = tmp_path / "run", world / "imagery/scene.tif"
    areas = ["--set", "polygons.min_area=12", "--set", "polygons.simplify=2"]
    words = ["predict", world / "models/binary", scene, "--out", out, "--engine", "inline", *areas]
    assert rayseg(*words).exit_code == 0
    fields, data = {"min_area": "12", "simplify": "2"}, scene.read_bytes()
    sieved_HW = layers_of(predict(asked, fields, data))[0]
    np.testing.assert_array_equal(sieved_HW, mosaic(out, "sieved")[0])
    assert (sieved_HW != layers_of(predict(asked, {}, data))[0]).any()
    answer = predict(asked, fields, data, accept="application/geo+json")
    ours = geopandas.GeoDataFrame.from_features(json.loads(answer.content)["features"])
    theirs = geopandas.read_parquet(out / "polygons.parquet")
    assert len(ours) == len(theirs) > 3
    for column in ("class", "pixels", "area_m2", "score_mean"):
        np.testing.assert_allclose(ours[column], theirs[column], rtol=1e-9)


def test_units_are_measured_on_the_ground():
    table = ClassTable(((0, "land", (0, 0, 0)), (1, "ice", (255, 255, 255))))
    classes_HW = np.zeros((60, 60), np.uint8)
    classes_HW[5:8, 5:8], classes_HW[20:40, 20:40], classes_HW[:2] = 1, 1, NODATA
    tile = Tile("t", Grid("EPSG:32650", (2.0, 2.0), (0.0, 0.0)), Window(250_000, -2_000_000, 60, 60))
    result = Result("m", tile, table, classes_HW, None, 0.0)
    found_HW = decided(result, None, 100.0).classes_HW  # 9 px are 36 m2
    assert (found_HW == 1).sum() == 400
    assert (found_HW[:2] == NODATA).all()
    np.testing.assert_array_equal(decided(result, None, 30.0).classes_HW, classes_HW)


def test_outlines_without_scores_are_simplified_too():
    table = ClassTable(((0, "land", (0, 0, 0)), (1, "ice", (255, 255, 255))))
    classes_HW = np.tri(50, dtype=np.uint8)
    tile = Tile("t", Grid("EPSG:32650", (2.0, 2.0), (0.0, 0.0)), Window(2048 * 122 - 20, -2_000_000, 50, 50))

    def corners(simplify):
        found = json.loads(geojson(Result("m", tile, table, classes_HW, None, 0.0, simplify)))["features"]
        assert sum(one["properties"]["pixels"] for one in found) == 2500
        return sum(len(ring) for one in found for ring in one["geometry"]["coordinates"])

    assert corners(4.0) < corners(None) / 2


def test_the_classes_alone_have_their_colours_and_the_scores_their_scale(asked):
    found = predict(asked, {"layers": "classes"})
    with rasterio.open(io.BytesIO(found.content)) as file:
        assert file.count == 1
        assert file.colormap(1)[1] == (0, 158, 115, 255)
        assert json.loads(file.tags(1)["classes"]) == {"0": "background", "1": "gpc"}
    with rasterio.open(io.BytesIO(predict(asked, {}).content)) as file:
        assert file.scales == (1.0, pytest.approx(1 / 254))
        assert file.descriptions == ("class", "gpc")
        assert json.loads(file.tags(1)["classes"])["1"] == "gpc"


def test_an_image_can_be_the_whole_body(asked):
    data = encoded(image_HWC())
    expected = np.array(Image.open(io.BytesIO(predict(asked, {"threshold": "0.6"}, data, accept="image/png").content)))
    for kind in ("image/png", "application/octet-stream"):
        headers = {"Content-Type": kind, "Accept": "image/png"}
        found = asked.post("/v1/models/binary/predict?threshold=0.6", content=data, headers=headers)
        assert found.status_code == 200, found.text
        np.testing.assert_array_equal(np.array(Image.open(io.BytesIO(found.content))), expected)
    unknown = asked.post("/v1/models/binary/predict?limit=1", content=data, headers={"Content-Type": "image/png"})
    assert unknown.status_code == 422
    assert "unknown field 'limit'" in unknown.json()["detail"]
    text = asked.post("/v1/models/binary/predict", content=data, headers={"Content-Type": "text/plain"})
    assert text.status_code == 415


def test_one_answer_can_hold_all_media_types(asked):
    found = predict(asked, {}, accept="multipart/form-data")
    assert found.status_code == 200, found.text
    kind, boundary = found.headers["content-type"].split("; boundary=")
    assert kind == "multipart/form-data"
    fields = {}
    for part in found.content.split(f"--{boundary}".encode())[1:-1]:
        head, _, body = part.partition(b"\r\n\r\n")
        fields[head.decode().partition('name="')[2].partition('"')[0]] = body[:-2]
    assert set(fields) == {"application/json", "image/png", "image/tiff", "application/geo+json"}
    for media in ("image/png", "image/tiff", "application/geo+json"):
        assert fields[media] == predict(asked, {}, accept=media).content
    assert json.loads(fields["application/json"])["width"] == 130


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threshold": "2"}, "less than or equal to 1"),
        ({"threshold": "NaN"}, "config key threshold"),
        ({"min_area": "-1"}, "greater than 0"),
        ({"bands": "4,3,2"}, "expected JSON"),
        ({"bands": "[0, 1, 2]"}, "greater than or equal to 1"),
        ({"layers": "scores"}, "layers"),
        ({"simplify": "[]"}, "simplify"),
    ],
)
def test_invalid_fields_are_refused(asked, fields, words):
    found = predict(asked, fields)
    assert found.status_code == 422, found.text
    assert words in found.json()["detail"]
