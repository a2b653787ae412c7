"""A classifier over images, tiles and polygons: the tables it leaves, its pictures, and its accuracy."""

import csv
import json

import geopandas
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from shapely.geometry import box
from small_world import BANDS, SCALING, classifier, rayseg, refused

from rayseg.io import labels
from rayseg.models.bundle import Architecture, Bundle, Provenance
from rayseg.stages.classify import by_class

GREEN, BROWN = (40, 200, 60), (150, 110, 80)


def trained_on_colour(model):
    """Fit the head to flat green and brown images, so that the network tells them apart."""
    flat = np.stack([np.full((64, 64, 3), color, np.uint8) for color in (GREEN, BROWN)]).transpose(0, 3, 1, 2)
    images, target = torch.from_numpy(SCALING.normalize(flat)), torch.tensor([0, 1])
    model.eval()
    with torch.no_grad():
        _, features_NF = model.embed(images)
        away_F = (features_NF[0] - features_NF[1]) / (features_NF[0] - features_NF[1]).norm() ** 2 * 8
        middle = float(features_NF.mean(dim=0) @ away_F)
        model.head.weight.copy_(torch.stack([away_F, -away_F])[..., None, None])
        model.head.bias.copy_(torch.tensor([-middle, middle]))
        assert model(images).argmax(dim=1).tolist() == target.tolist()
    return model


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A classifier; chips in folders of classes, one of them in the wrong one; and a georeferenced scene."""
    root = tmp_path_factory.mktemp("classes")
    classifier(root / "model", encoder="test_resnet", train=trained_on_colour)
    for label, name, color in (
        ("gpc", "a", GREEN),
        ("gpc", "b", GREEN),
        ("gpc", "wrong", BROWN),
        ("nongpc", "c", BROWN),
    ):
        (root / "chips" / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((70, 90, 3), color, np.uint8)).save(root / "chips" / label / f"{name}.png")
    labels.ingest_folder(root / "chips", root / "cat", labels="folder")
    scene = np.zeros((3, 128, 192), np.uint8)
    scene[:] = np.array(BROWN)[:, None, None]
    scene[:, :64, :64] = np.array(GREEN)[:, None, None]
    place = rasterio.transform.from_origin(500_000, 4_400_000, 1, 1)
    (root / "scenes").mkdir()
    with rasterio.open(root / "scenes" / "s.tif", "w", driver="GTiff", width=192, height=128, count=3, dtype="uint8",
                       crs="EPSG:32650", transform=place) as file:  # fmt: skip
        file.write(scene)
    return root


def predict(world, out, source, *settings):
    words = [part for text in settings for part in ("--set", text)]
    found = rayseg("predict", world / "model", source, "--out", out, "--engine", "inline", *words)
    assert found.exit_code == 0, found.output
    rows = {row["id"]: row for row in csv.DictReader((out / "classes.csv").read_text().splitlines())}
    frame = geopandas.read_parquet(out / "classes.parquet")
    assert {row["id"]: row["name"] for row in json.loads((out / "classes.json").read_text())["units"]} == {
        name: row["name"] for name, row in rows.items()
    }
    assert frame["name"].tolist() == [row["name"] for row in rows.values()]
    return rows, frame, found.stdout


def test_chips_are_classified_and_compared_with_their_labels(world, tmp_path):
    out = tmp_path / "run"
    rows, frame, said = predict(world, out, f"{world}/cat/catalog.json#chips", "units.pictures=true")
    assert {name: row["name"] for name, row in rows.items()} == {
        "gpc-a": "gpc", "gpc-b": "gpc", "gpc-wrong": "nongpc", "nongpc-c": "nongpc",
    }  # fmt: skip
    assert said == f"{out}/report/index.html: 4 units: 2 gpc, 2 nongpc\n"
    assert float(rows["gpc-a"]["score"]) == pytest.approx(float(rows["gpc-a"]["p_gpc"]))
    assert float(rows["gpc-a"]["p_gpc"]) + float(rows["gpc-a"]["p_nongpc"]) == pytest.approx(1, abs=1e-5)
    assert frame.crs is None
    assert frame.geometry[0].bounds == (0, 0, 90, 70)
    assert np.asarray(Image.open(out / "pictures" / "gpc-a.webp")).shape == (64, 64, 3)
    # 3 of 4 are right; one gpc is missed
    for truth in (f"{world}/cat/catalog.json#chips", world / "chips"):
        found = json.loads(rayseg("evaluate", out, truth, "--json").stdout)
        assert found["overall"]["overall_accuracy"]["value"] == 0.75
        assert found["confusion"] == [[2, 1], [0, 1]]
        assert [row["f1"]["value"] for row in found["classes"]] == pytest.approx([0.8, 2 / 3])
    text = rayseg("evaluate", out, world / "chips").stdout
    assert text.startswith("4 units compared; 95 % intervals by bootstrap over them")
    assert "       2       1\n       0       1" in text


def test_a_scene_is_classified_by_tiles_and_by_polygons(world, tmp_path):
    rows, frame, _ = predict(world, tmp_path / "tiles", world / "scenes")
    assert len(rows) == 8  # the scene begins in the middle of a cell of 64 px
    assert frame.crs == "EPSG:4326"
    polygons = geopandas.GeoDataFrame(
        {"id": ["field", "ground"], "label": ["gpc", "nongpc"]},
        geometry=[box(500_000, 4_399_936, 500_064, 4_400_000), box(500_100, 4_399_880, 500_180, 4_399_960)],
        crs="EPSG:32650",
    )
    polygons.to_file(tmp_path / "p.geojson")
    rows, frame, _ = predict(world, tmp_path / "run", world / "scenes", f"units.polygons={tmp_path}/p.geojson")
    assert {name: row["name"] for name, row in rows.items()} == {"field": "gpc", "ground": "nongpc"}
    back = frame.to_crs("EPSG:32650").geometry[0].bounds
    assert back == pytest.approx((500_000, 4_399_936, 500_064, 4_400_000), abs=0.01)
    found = json.loads(rayseg("evaluate", tmp_path / "run", tmp_path / "p.geojson", "--json").stdout)
    assert found["confusion"] == [[1, 0], [0, 1]]


def test_what_cannot_be_classified_is_refused(world, tmp_path):
    words = ("predict", world / "model", world / "scenes", "--out", tmp_path / "run", "--engine", "inline")
    (tmp_path / "far.geojson").write_text(geopandas.GeoSeries([box(1, 1, 2, 2)], crs="EPSG:4326").to_json())
    said = refused(3, *words, "--set", f"units.polygons={tmp_path}/far.geojson")
    assert "none of the 1 polygons" in said
    out = tmp_path / "done"
    predict(world, out, f"{world}/cat/catalog.json#chips")
    (tmp_path / "other.csv").write_text("id,label\ngpc-a,forest\n")
    assert "has the labels forest, the model's are gpc, nongpc" in refused(3, "evaluate", out, tmp_path / "other.csv")
    (tmp_path / "none.csv").write_text("id,label\nx,gpc\n")
    assert "no unit of" in refused(3, "evaluate", out, tmp_path / "none.csv")
    (tmp_path / "bad.csv").write_text("name\nx\n")
    assert "expected id and label" in refused(3, "evaluate", out, tmp_path / "bad.csv")


def test_one_logit_is_the_probability_of_the_positive_class():
    described = Bundle(
        name="c", task="classification", architecture=Architecture(factory="classifier", options={"classes": 1}),
        classes=((0, "gpc", (0, 1, 2)), (1, "nongpc", (0, 0, 0))), bands=BANDS, dtype="uint8", scaling=SCALING,
        patch=64, stride=64, provenance=Provenance(config={"positive": 1}),
    )  # fmt: skip
    assert by_class(described, [0.25]) == [0.75, 0.25]
    assert by_class(described, [0.1, 0.9]) == [0.1, 0.9]
