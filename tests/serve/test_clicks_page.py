"""The page of a run in a real browser: choose a class, click and draw, see the tiles follow, take a click back."""

import shutil

import pytest
from small_world import catalogue, rayseg, segmenter
from tiny_server import listening, served

from rayseg.io.clicks import beside, read_clicks

CHROMIUM = shutil.which("chromium")
playwright = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium here")]


def test_a_person_corrects_a_map(tmp_path):
    segmenter(tmp_path / "model", classes=3)
    words = ("predict", tmp_path / "model", catalogue(tmp_path / "imagery", scene={}), "--out", tmp_path / "map")
    assert rayseg(*words, "--engine", "inline").exit_code == 0
    app = served(runs=(str(tmp_path / "map"),), clicks=str(tmp_path))
    with listening(app) as address, playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(), []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"{address}/runs/map")
        page.check("#correcting")
        page.keyboard.press("3")
        assert page.is_checked("#labels input[value=kind-2]")
        page.fill("#who", "Ann")
        with page.expect_response(
            lambda answer: "/clicks/tiles/" in answer.url and answer.status == 200, timeout=30_000
        ):
            page.click("#map", position={"x": 300, "y": 250})
        playwright.expect(page.locator("#clicked")).to_contain_text("1 clicks")
        page.keyboard.down("Shift")
        box = page.locator("#map").bounding_box()
        page.mouse.move(box["x"] + 260, box["y"] + 200)
        page.mouse.down()
        for step in range(10):
            page.mouse.move(box["x"] + 260 + 8 * step, box["y"] + 200)
        page.mouse.up()
        page.keyboard.up("Shift")
        playwright.expect(page.locator("#clicked")).to_contain_text("2 clicks")
        found = read_clicks(beside(str(tmp_path / "map")))
        assert [click.geometry.geom_type for click in found] == ["Point", "LineString"]
        assert {(click.properties["class"], click.properties["name"]) for click in found} == {("kind-2", "Ann")}
        page.focus("#map")
        page.keyboard.press("Control+z")
        playwright.expect(page.locator("#clicked")).to_contain_text("1 clicks")
        assert len(read_clicks(beside(str(tmp_path / "map")))) == 1
        assert errors == []
        browser.close()
