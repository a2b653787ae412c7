"""Areas from a sample: the published worked example, samples that are fair, answers that do not fit."""

import csv
import json

import geopandas
import numpy as np
import pytest
from fake_run import UTM, blobs, make, picture
from small_world import catalogue, rayseg, refused

from rayseg.errors import ConfigError
from rayseg.io import maps
from rayseg.metrics import allocation, stratified_mean, stratified_ratio
from rayseg.steps import area

# Olofsson et al. 2014, table 8: rows are strata (map classes), columns reference classes; pixels of 30 m.
COUNTS = np.array([[66, 0, 5, 4], [0, 55, 8, 12], [1, 0, 153, 11], [2, 1, 9, 313]])
PIXELS = np.array([200_000, 150_000, 3_200_000, 6_450_000])


def test_estimates_are_those_of_the_published_example():
    strata, reference = (np.repeat(axis.ravel(), COUNTS.ravel()) for axis in np.indices(COUNTS.shape))
    weights = PIXELS / PIXELS.sum()
    hectares = PIXELS.sum() * 0.09
    areas, users, producers = [], [], []
    for kind in range(4):
        is_it, is_mapped = (reference == kind).astype(float), (strata == kind).astype(float)
        areas.append(stratified_mean(is_it, strata, weights))
        users.append(stratified_ratio(is_it * is_mapped, is_mapped, strata, weights))
        producers.append(stratified_ratio(is_it * is_mapped, is_it, strata, weights))
    assert [round(found.value * hectares) for found in areas] == [21158, 11686, 285770, 581386]
    assert [round(1.96 * found.error * hectares) for found in areas] == [6158, 3756, 15510, 16282]
    assert [round(found.value, 2) for found in users] == [0.88, 0.73, 0.93, 0.96]
    assert [round(1.96 * found.error, 2) for found in users] == [0.07, 0.10, 0.04, 0.02]
    assert [round(found.value, 2) for found in producers] == [0.75, 0.85, 0.93, 0.96]
    assert [round(1.96 * found.error, 2) for found in producers] == [0.21, 0.25, 0.03, 0.02]
    overall = stratified_mean((strata == reference).astype(float), strata, weights)
    assert (round(overall.value, 2), round(1.96 * overall.error, 2)) == (0.95, 0.02)


def test_points_go_where_the_map_may_be_wrong():
    counts = allocation(100, np.array([0.5, 0.25, 0.25, 0.0]), np.array([0.1, 0.2, 0.0, 0.5]), least=5)
    assert list(counts) == [50, 50, 5, 0]


@pytest.fixture(scope="module")
def predicted(tmp_path_factory, tiny_model):
    """A run of a network that marks about half of a scene."""
    root = tmp_path_factory.mktemp("area")
    imagery = catalogue(root / "imagery", scene={"height": 300, "width": 260})
    found = rayseg("predict", tiny_model, imagery, "--out", root / "run", "--engine", "inline", "--set", "map.tile=128")
    assert found.exit_code == 0, found.output
    return root / "run"


def answered(folder, truth):
    """Answers to a sample: `truth(point)` -> class or ""."""
    content = json.loads((folder / "sample.json").read_text())
    rows = [(point["id"], truth(point)) for point in content["points"]]
    with (folder / "answers.csv").open("w") as sink:
        csv.writer(sink).writerows([("id", "class"), *rows])
    return folder / "answers.csv"


def test_a_sample_is_drawn_answered_and_estimated(predicted, tmp_path):
    found = rayseg("area", "sample", predicted, "--per-stratum", 20, "--out", tmp_path / "s", "--seed", 3)
    assert found.exit_code == 0, found.output
    content = json.loads((tmp_path / "s" / "sample.json").read_text())
    tiles = {tile.tile.id: tile for tile in maps.mapped_tiles(predicted)}
    for point in content["points"]:
        classes = maps.read_tile(tiles[point["tile"]], "classes")[0]
        assert classes[point["row"], point["col"]] == point["mapped"] == content["strata"][point["stratum"]]["value"]
        assert (tmp_path / "s" / "images" / f"{point['id']}.png").exists()
    drawn = [sum(point["stratum"] == k for point in content["points"]) for k in range(len(content["strata"]))]
    assert [stratum["points"] for stratum in content["strata"]] == drawn
    assert all(15 <= count <= 20 for count, stratum in zip(drawn, content["strata"], strict=True) if stratum["area_m2"])
    mapped = sum(stratum["area_m2"] for stratum in content["strata"])
    assert mapped == pytest.approx(sum(sum(tile.areas.values()) for tile in tiles.values()))
    places = geopandas.read_file(tmp_path / "s" / "points.geojson")
    assert list(places["id"]) == [point["id"] for point in content["points"]]
    assert places.geometry.x.tolist() == pytest.approx([point["lon"] for point in content["points"]])
    page = (tmp_path / "s" / "index.html").read_text()
    assert all(name in page for name in ("background", "gpc", content["points"][0]["id"]))

    # a map that is right everywhere has the counted areas, without an error
    answers = answered(tmp_path / "s", lambda point: "gpc" if point["mapped"] else "0")
    words = ("area", "estimate", predicted, "--answers", answers, "--sample", tmp_path / "s")
    result = json.loads(rayseg(*words, "--json").stdout)
    counted = result["classes"]["gpc"]["counted"]["share"]
    share = sum(stratum["area_m2"] for stratum in content["strata"] if stratum["value"] == 1) / mapped
    assert counted == pytest.approx(share)
    assert result["classes"]["gpc"]["share"] == pytest.approx({"value": share, "error": 0, "low": share, "high": share})
    assert result["classes"]["gpc"]["hectares"]["value"] == pytest.approx(share * mapped / 1e4)
    assert result["overall"]["value"] == pytest.approx(1)
    assert "overall accuracy 1.000" in rayseg(*words).stdout


def test_the_same_seed_draws_the_same_points_and_another_others(predicted, tmp_path):
    draws = [
        area.sample(predicted, tmp_path / str(k), per_stratum=5, seed=seed)["points"]
        for k, seed in enumerate((1, 1, 2))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_every_bit_of_ground_has_the_same_chance(predicted, tmp_path, monkeypatch):
    """Rows of a tile in degrees differ in area: those with more have more points, and strata are weighted by it."""

    def areas(tile):
        upper_H = np.arange(tile.window.height) < tile.window.height // 2
        return np.broadcast_to(np.where(upper_H, 9.0, 1.0)[:, None], (tile.window.height, tile.window.width))

    monkeypatch.setattr(area, "pixel_areas_m2", areas)
    content = area.sample(predicted, tmp_path, per_stratum=100, seed=1)
    tiles = {tile.tile.id: tile.tile for tile in maps.mapped_tiles(predicted)}
    upper = [point["row"] < tiles[point["tile"]].window.height // 2 for point in content["points"]]
    assert np.mean(upper) == pytest.approx(0.9, abs=0.06)
    whole = 0.0
    for tile in maps.mapped_tiles(predicted):
        whole += float(areas(tile.tile)[maps.read_tile(tile, "classes")[0] != 255].sum())
    assert sum(stratum["area_m2"] for stratum in content["strata"]) == pytest.approx(whole)


def test_strata_of_too_few_answers_are_joined_and_named(predicted, tmp_path):
    area.sample(predicted, tmp_path, per_stratum=6, seed=1)
    content = json.loads((tmp_path / "sample.json").read_text())
    first = min(point["stratum"] for point in content["points"])
    answers = answered(tmp_path, lambda point: "" if point["stratum"] == first else str(point["mapped"]))
    found = area.estimate(predicted, tmp_path, answers)
    assert found["pooled"] == ["background"]
    assert found["answered"] == len(content["points"]) - 6
    assert found["overall"]["value"] == pytest.approx(1)
    none = answered(tmp_path, lambda point: "1" if point["mapped"] else "")
    message = refused(3, "area", "estimate", predicted, "--answers", none, "--sample", tmp_path)
    assert "class background of the map has 0 answers, expected two or more" in message


def test_what_does_not_fit_is_refused(predicted, tmp_path):
    with pytest.raises(ConfigError, match=r"either --per-stratum"):
        area.sample(predicted, tmp_path)
    with pytest.raises(ConfigError, match=r"the sample would have [\d,]+ points, expected 20,000 or fewer"):
        area.sample(predicted, tmp_path, half_width=1e-5)
    with pytest.raises(ConfigError, match=r"between 0 and 0\.5"):
        area.sample(predicted, tmp_path, half_width=2)
    assert "holds no sample" in refused(3, "area", "estimate", predicted, "--answers", "x.csv", "--sample", tmp_path)
    area.sample(predicted, tmp_path, per_stratum=4)
    words = ("area", "estimate", predicted, "--sample", tmp_path, "--answers")
    answers = answered(tmp_path, lambda point: "tree")
    assert "the class 'tree', expected one of 0, background, 1, gpc" in refused(3, *words, answers)
    answers.write_text("id,class\n9999,1\n")
    assert "name the point 9999, which is not in this sample" in refused(3, *words, answers)
    first = json.loads((tmp_path / "sample.json").read_text())["points"][0]["id"]
    answers.write_text(f"id,class\n{first},1\n{first},0\n")
    assert f"name the point {first} twice" in refused(3, *words, answers)
    assert "holds a sample" in refused(2, "area", "sample", predicted, "--per-stratum", 4, "--out", tmp_path)
    answers.write_bytes(f"id;class\n{first};tree\n".encode("utf-8-sig"))  # as spreadsheets write it
    assert "the class 'tree'" in refused(3, *words, answers)
    answers.write_bytes(b"id,class\n\xff\n")
    assert "cannot be read" in refused(3, *words, answers)
    answers.write_text("point;kind\n")
    assert "no columns id and class" in refused(3, *words, answers)
    other = area.sample(predicted, tmp_path / "other", per_stratum=4, seed=9)
    assert not {point["id"] for point in other["points"]} & {
        point["id"] for point in json.loads((tmp_path / "sample.json").read_text())["points"]
    }
    content = json.loads((tmp_path / "sample.json").read_text()) | {"key": "other"}
    (tmp_path / "sample.json").write_text(json.dumps(content))
    assert "is of another map" in refused(3, *words, answers)


def test_images_without_georeference_have_shares_and_no_hectares(tmp_path):
    mask = blobs(64, 64)
    bare = UTM.__class__(None, (1.0, 1.0), (0.0, 0.0))
    make(tmp_path / "run", {"one": (picture(mask), mask, (0, 0))}, grid=bare)
    tiles = maps.mapped_tiles(tmp_path / "run")
    assert maps.pixel_lonlat(tiles[0].tile, 0, 0) is None
