"""The threshold of a run in its view: shares by score, tiles that carry scores, and a map that follows a slider."""

import io
import json
import shutil

import mercantile
import numpy as np
import pytest
from PIL import Image
from small_world import catalogue, mosaic, rayseg, segmenter
from tiny_server import client, listening, served

from rayseg.serve import thresholds
from rayseg.stages.predict import above

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model):
    root = tmp_path_factory.mktemp("threshold")
    words = ("predict", tiny_model, catalogue(root / "imagery", scene={}), "--out", root / "map", "--engine", "inline")
    found = rayseg(*words, "--set", "map.tile=128", "--set", "certificate=false")
    assert found.exit_code == 0, found.output
    return root / "map"


def test_shares_by_score_give_the_share_of_every_threshold(run):
    said = client(runs=(str(run),)).get("/v1/runs/map/scores").json()
    scores = mosaic(run, "scores")[0]
    seen = scores != 255
    assert (said["class"], said["own"], said["tiles"]) == ("gpc", 0.5, said["of"])
    assert said["area_m2"] == pytest.approx(seen.sum(), rel=2e-3)  # pixels of a metre
    for threshold in (0.1, 0.5, 0.63):
        share = sum(part for score, part in enumerate(said["shares"]) if score > threshold * 254)
        assert share == pytest.approx(above(scores[seen], threshold).mean(), abs=1e-4)


def test_tiles_of_probabilities_carry_the_scores_themselves(run):
    asked = client(runs=(str(run),))
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 18)
    answer = asked.get(f"/v1/runs/map/tiles/18/{place.x}/{place.y}.png?layer=probabilities")
    image = np.array(Image.open(io.BytesIO(answer.content)).convert("RGBA"))
    seen = image[..., 3] > 0
    assert seen.any()
    assert (image[..., 0] == image[..., 1]).all()
    assert set(np.unique(image[seen][:, 0])) <= set(np.unique(mosaic(run, "scores")[0])) - {255}


@pytest.mark.parametrize("steps", [None, {"predict": {"run": "/gone"}}])
def test_a_threshold_that_is_not_known_yet_or_any_more_is_none(run, tmp_path, steps):
    shutil.copytree(run, tmp_path / "map")
    content = json.loads((run / "run.json").read_text())
    del content["steps"]
    content |= {"status": "running"} if steps is None else {"steps": steps}
    (tmp_path / "map/run.json").write_text(json.dumps(content))
    said = client(runs=(str(tmp_path / "map"),)).get("/v1/runs/map/scores")
    assert (said.status_code, said.json().get("own", 0)) == (200, None)


def test_few_tiles_stand_for_many(run, monkeypatch):
    monkeypatch.setattr(thresholds, "MOST", 2)
    thresholds._counted.cache_clear()
    said = thresholds.scores_of(str(run))
    thresholds._counted.cache_clear()
    assert (said["tiles"], said["of"]) == (2, 9)
    assert sum(said["shares"]) == pytest.approx(1)


def test_a_map_of_several_classes_has_no_threshold(tmp_path):
    segmenter(tmp_path / "model", classes=3)
    words = ("predict", tmp_path / "model", catalogue(tmp_path / "imagery", scene={}), "--out", tmp_path / "three")
    assert rayseg(*words, "--engine", "inline", "--set", "certificate=false").exit_code == 0
    answer = client(runs=(str(tmp_path / "three"),)).get("/v1/runs/three/scores")
    assert answer.status_code == 404
    assert "has no threshold" in answer.text


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")
def test_the_map_follows_the_slider_without_a_request(run, monkeypatch):
    playwright = pytest.importorskip("playwright.sync_api")
    app = served(runs=(str(run),))
    monkeypatch.setattr(thresholds.mapping, "threshold_of", lambda _: 0.7968)
    own = "rayseg remap RUN --set threshold=0.7968 --out NEW"
    count = "() => [...document.querySelectorAll('#map canvas')].reduce((sum, one) => sum + one.getContext('2d')"
    count += ".getImageData(0, 0, 256, 256).data.filter((value, at) => at % 4 === 3 && value).length, 0)"
    with listening(app) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors, asked = browser.new_page(), [], []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/runs/map")
        playwright.expect(page.locator("#deciding")).to_be_visible()
        assert page.inner_text("#command") == own
        page.fill("#threshold", "10")
        page.wait_for_function("() => document.querySelectorAll('#map canvas.leaflet-tile-loaded').length > 0")
        page.wait_for_load_state("networkidle")
        page.on("request", lambda request: asked.append(request.url))
        low = page.evaluate(count)
        page.fill("#threshold", "70")
        high = page.evaluate(count)
        assert low > high > 0
        assert asked == []
        scores = mosaic(run, "scores")[0]
        share = above(scores[scores != 255], 0.7).mean()
        assert page.inner_text("#share").startswith(f"{100 * share:.3g}"[:3])
        assert page.inner_text("#command") == "rayseg remap RUN --set threshold=0.70 --out NEW"
        page.click("#own")
        assert page.input_value("#threshold") == "80"
        assert page.inner_text("#command") == own
        assert page.is_checked("#show-classes")
        assert errors == []
        browser.close()
