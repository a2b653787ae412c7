"""Areas from a sample: the published worked example, samples that are fair, answers that do not fit."""

import csv
import json

import geopandas
import numpy as np
import pytest
import shapely
from fake_run import UTM, blobs, make, picture
from small_world import catalogue, rayseg, refused

from rayseg.errors import ConfigError
from rayseg.io import maps
from rayseg.metrics import allocation, regression_mean, slope, stratified_mean, stratified_ratio
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


# -- assisted by scores, and parts of the map --------------------------------------------------------------------------

MINMAX = ((min, 1), (max, 3))


def test_the_regression_estimate_is_that_of_the_formula():
    """Cochran 1977, equations 7.47 to 7.49, written out for two strata."""
    y = [np.array([1.0, 0, 0, 1]), np.array([0.0, 0, 1, 0, 0])]
    x = [np.array([0.9, 0.4, 0.2, 0.6]), np.array([0.1, 0.3, 0.5, 0.2, 0.0])]
    weights = np.array([0.3, 0.7])
    factors = [w**2 / (len(part) * (len(part) - 1)) for w, part in zip(weights, y, strict=True)]
    moments = [np.cov(one, other) * (len(one) - 1) for one, other in zip(x, y, strict=True)]
    b = sum(f * m[0, 1] for f, m in zip(factors, moments, strict=True)) / sum(
        f * m[0, 0] for f, m in zip(factors, moments, strict=True)
    )
    value = sum(w * one.mean() for w, one in zip(weights, y, strict=True))
    value += b * (0.25 - sum(w * one.mean() for w, one in zip(weights, x, strict=True)))
    variance = sum(f * (m[1, 1] - 2 * b * m[0, 1] + b**2 * m[0, 0]) for f, m in zip(factors, moments, strict=True))
    arrays = (np.concatenate(y), np.concatenate(x), np.repeat([0, 1], [4, 5]), weights)
    assert slope(*arrays) == pytest.approx(b)
    found = regression_mean(*arrays, mean=0.25)
    assert (found.value, found.error) == (pytest.approx(value), pytest.approx(variance**0.5))
    # An auxiliary that never changes says nothing.
    flat = (arrays[0], np.full(9, 0.5), *arrays[2:])
    assert regression_mean(*flat, mean=0.5) == stratified_mean(arrays[0], *arrays[2:])


def test_assisted_estimates_are_unbiased_and_their_intervals_hold_in_a_part_of_the_map():
    rng = np.random.default_rng(0)
    p = rng.beta(0.4, 1.2, 20_000)
    truth = (rng.random(20_000) < p**1.5).astype(float)  # scores are too high
    strata, within = (p > 0.5).astype(int), (np.arange(20_000) < 6_000).astype(float)
    weights = np.bincount(strata) / 20_000
    members = [np.flatnonzero(strata == k) for k in (0, 1)]
    whole, part, plain = [], [], []
    for _ in range(400):
        drawn = np.concatenate([rng.choice(of, 150) for of in members])
        y, x, of, inside = truth[drawn], p[drawn], strata[drawn], within[drawn]
        whole.append(regression_mean(y, x, of, weights, mean=p.mean()))
        plain.append(stratified_mean(y, of, weights))
        row = area.Ground("part", 1.0, np.array([0.0, p[within > 0].mean()]), np.zeros(2), inside > 0, np.c_[1 - x, x])
        found = area._Drawn([], y.astype(int), of, weights).of_region(row, [(0, "rest"), (1, "it")])
        part.append(found["classes"]["it"]["assisted"]["share"])
    for estimates, true in (([e.to_row() for e in whole], truth.mean()), (part, truth[within > 0].mean())):
        values = np.array([row["value"] for row in estimates])
        assert abs(values.mean() - true) < 4 * values.std() / 20
        held = np.mean([row["low"] <= true <= row["high"] for row in estimates])
        assert 0.91 <= held <= 0.985
    assert np.mean([e.error for e in whole]) < 0.95 * np.mean([e.error for e in plain])


def test_regions_have_areas_of_their_own(predicted, tmp_path):
    content = area.sample(predicted, tmp_path / "s", per_stratum=40, seed=5)
    tiles = maps.mapped_tiles(predicted)
    by_id = {tile.tile.id: tile.tile for tile in tiles}
    left = min(tile.window.col for tile in by_id.values())
    edge = left + 150  # a border of pixels: west of it they lie inside

    def is_west(tile, col):
        return tile.window.col + col < edge

    bounds = [tile.grid.bounds(tile.window) for tile in by_id.values()]
    x, south, north = bounds[0][0] + edge - tiles[0].tile.window.col, *(f(b[k] for b in bounds) for f, k in MINMAX)
    boxes = [shapely.box(x - 1000, south - 9, x, north + 9), shapely.box(x + 1, south, x + 9, south + 9)]
    frame = geopandas.GeoDataFrame({"name": ["west", "corner"]}, geometry=boxes, crs=32650)
    frame.to_file(tmp_path / "regions.gpkg")

    def truth(point):  # two of three where the map says so, and some elsewhere
        number = int(point["id"][-4:])
        return "gpc" if (number % 3 > 0 if point["mapped"] else number % 11 == 0) else "background"

    answers = answered(tmp_path / "s", truth)
    words = ("area", "estimate", predicted, "--answers", answers, "--sample", tmp_path / "s")
    result = json.loads(rayseg(*words, "--regions", tmp_path / "regions.gpkg", "--json").stdout)
    # 1. the same from the files of the map, written out
    probability, counted, whole, inside, total = 0.0, 0.0, 0.0, 0.0, 0.0
    for tile in tiles:
        classes, score = maps.read_tile(tile, "classes")[0], maps.read_tile(tile, "scores")[0] / 254
        rows, cols = np.nonzero(classes != 255)
        areas = maps.pixel_areas_m2(tile.tile)[rows, cols]
        within = is_west(tile.tile, cols)
        whole, total = whole + float(score[rows, cols] @ areas), total + float(areas.sum())
        probability += float(score[rows, cols] @ (areas * within))
        counted += float((classes[rows, cols] == 1) @ (areas * within))
        inside += float(areas @ within)
    drawn = content["points"]
    y = np.array([float(truth(point) == "gpc") for point in drawn])
    x = np.array([point["score"] if point["mapped"] else 1 - point["score"] for point in drawn])
    strata = np.array([point["stratum"] for point in drawn])
    weights = np.array([stratum["area_m2"] for stratum in content["strata"]])
    weights /= weights.sum()
    here = np.array([float(is_west(by_id[point["tile"]], point["col"])) for point in drawn])
    b = slope(y, x, strata, weights)
    rest = stratified_ratio((y - b * x) * here, here, strata, weights)
    # 2. of the region, of the whole, and none where answers are few
    of_west, of_corner = result["regions"]
    assert (of_west["name"], of_west["answered"], of_corner["name"]) == ("west", here.sum(), "corner")
    found = of_west["classes"]["gpc"]
    assert of_west["hectares"] == pytest.approx(inside / 1e4)
    assert found["counted"]["hectares"] == pytest.approx(counted / 1e4)
    assert found["assisted"]["share"]["value"] == pytest.approx(rest.value + b * probability / inside, abs=1e-4)
    assert found["assisted"]["hectares"]["error"] == pytest.approx(rest.error * inside / 1e4, rel=1e-3)
    plain = stratified_ratio(y * here, here, strata, weights)
    assert found["share"]["value"] == pytest.approx(plain.value)
    assert found["hectares"]["high"] == pytest.approx((plain.value + 1.959964 * plain.error) * inside / 1e4)
    assisted = regression_mean(y, x, strata, weights, mean=whole / total)
    assert result["classes"]["gpc"]["assisted"]["share"]["value"] == pytest.approx(assisted.value, abs=1e-4)
    assert of_corner["classes"] is None
    assert of_corner["answered"] < 10
    said = rayseg(*words, "--regions", tmp_path / "regions.gpkg").stdout
    assert f"west: {inside / 1e4:,.1f} ha, {int(here.sum())} answers" in said
    assert "answers, 10 are needed for an estimate" in said
    # 3. a region elsewhere, and a file of points
    frame.set_geometry(frame.translate(50_000)).to_file(tmp_path / "far.gpkg")
    assert "meets the map of" in refused(3, *words, "--regions", tmp_path / "far.gpkg")
    far = frame.geometry.translate(50_000)[:1]
    three = geopandas.GeoDataFrame({"name": ["west", "corner", "far"]}, geometry=[*frame.geometry, *far], crs=32650)
    three.to_file(tmp_path / "three.gpkg")
    *same, off = json.loads(rayseg(*words, "--regions", tmp_path / "three.gpkg", "--json").stdout)["regions"]
    assert same == result["regions"]
    assert off == {"name": "far", "answered": 0, "hectares": 0, "classes": None}
    assert "far: 0.0 ha, 0 answers, not on the map" in rayseg(*words, "--regions", tmp_path / "three.gpkg").stdout
    frame.set_geometry(frame.centroid).to_file(tmp_path / "points.gpkg")
    assert "have Point, expected polygons" in refused(3, *words, "--regions", tmp_path / "points.gpkg")
