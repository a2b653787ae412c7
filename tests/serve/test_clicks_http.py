"""Clicks over HTTP: kept next to a run by several people, taken back, and followed by the tiles in view."""

import asyncio
import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import mercantile
import numpy as np
import pytest
from PIL import Image
from pyproj import Transformer
from small_world import GRID, catalogue, files, rayseg, segmenter
from small_world import window_at as window
from tiny_server import client

from rayseg.io.clicks import beside, identity, read_clicks
from rayseg.serve import clicks


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of three classes over a scene."""
    root = tmp_path_factory.mktemp("world")
    segmenter(root / "model", classes=3)
    words = ("--out", root / "runs/map", "--engine", "inline")
    found = rayseg("predict", root / "model", catalogue(root / "imagery", scene={}), *words)
    assert found.exit_code == 0, found.output
    return root / "runs/map"


def lonlat(row, col):
    x, y = GRID.transform(window(row, col, 1, 1)) @ (0.5, 0.5)
    return Transformer.from_crs(GRID.crs, "EPSG:4326", always_xy=True).transform(x, y)


def test_clicks_are_lines_next_to_the_run_and_can_be_taken_back(run):
    before, asked = files(run), client(runs=(str(run),), clicks=str(run.parent))
    assert asked.get("/v1/runs/map/clicks").json()["features"] == []
    places = [lonlat(60, 90), lonlat(60, 120)]
    first = asked.post("/v1/runs/map/clicks", json={"label": "kind-2", "coordinates": places, "name": "Ann"})
    second = asked.post("/v1/runs/map/clicks", json={"label": "kind-0", "coordinates": places[:1]})
    assert (first.status_code, second.status_code) == (201, 201)
    assert asked.delete(f"/v1/runs/map/clicks/{second.json()['id']}").status_code == 200
    shown = asked.get("/v1/runs/map/clicks").json()
    assert shown["file"] == "map.clicks.geojsonl"
    assert "path" not in asked.get("/v1/runs/map").json()
    own = client(runs=(str(run),), clicks=str(run.parent), paths=True)
    assert own.get("/v1/runs/map/clicks").json()["file"] == beside(str(run))
    assert own.get("/v1/runs/map").json()["path"] == str(run)
    [feature] = shown["features"]
    assert feature["geometry"] == {"type": "LineString", "coordinates": [list(place) for place in places]}
    assert feature["properties"]["name"] == "Ann"
    assert feature["properties"]["run"] == identity(str(run))
    assert [click.properties["id"] for click in read_clicks(beside(str(run)))] == [first.json()["id"]]
    assert len((run.parent / "map.clicks.geojsonl").read_text().splitlines()) == 3
    assert files(run) == before


def test_clicks_of_several_people_at_once_are_all_kept(run, tmp_path):
    asked = client(runs=(str(run),), clicks=str(tmp_path))
    click = {"label": "kind-1", "coordinates": [lonlat(60, 90)]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: asked.post("/v1/runs/map/clicks", json=click), range(40)))
    assert {answer.status_code for answer in answers} == {201}
    lines = [json.loads(line) for line in (tmp_path / "map.clicks.geojsonl").read_text().splitlines()]
    assert len({line["properties"]["id"] for line in lines}) == 40


def test_a_line_that_was_cut_off_takes_no_other_click_with_it(run, tmp_path):
    asked, path = client(runs=(str(run),), clicks=str(tmp_path)), "/v1/runs/map/clicks"
    click = {"label": "kind-1", "coordinates": [lonlat(60, 90)]}
    first = asked.post(path, json=click).json()["id"]
    with (tmp_path / "map.clicks.geojsonl").open("a") as stream:
        stream.write('{"type": "Feature", "geom')
    second = asked.post(path, json=click).json()["id"]
    assert [row["properties"]["id"] for row in asked.get(path).json()["features"]] == [first, second]


def test_wrong_clicks_are_refused_in_a_sentence(run, tmp_path):
    click = {"label": "kind-1", "coordinates": [lonlat(60, 90)]}
    path = "/v1/runs/map/clicks"
    assert "keeps no clicks" in client(runs=(str(run),)).post(path, json=click).json()["detail"]
    asked = client(runs=(str(run),), clicks=str(tmp_path))
    assert "the classes are kind-0" in asked.post(path, json=click | {"label": "road"}).json()["detail"]
    assert asked.post(path, json=click | {"coordinates": []}).status_code == 422
    assert asked.post("/v1/runs/none/clicks", json=click).status_code == 404
    assert asked.delete(f"{path}/{'0' * 32}").status_code == 404
    token = tmp_path / "token"
    token.write_text("a" * 16)
    assert (
        client(runs=(str(run),), clicks=str(tmp_path), token_file=str(token)).post(path, json=click).status_code == 401
    )
    (tmp_path / "file").write_text("")
    assert client(runs=(str(run),), clicks=str(tmp_path / "file")).post(path, json=click).status_code == 409
    assert not (tmp_path / "map.clicks.geojsonl").exists()


def test_the_server_refuses_what_the_command_would_refuse(run, tmp_path):
    asked, path = client(runs=(str(run),), clicks=str(tmp_path)), "/v1/runs/map/clicks"
    inside, outside = lonlat(60, 90), lonlat(500, 500)
    for places, sentence in (
        ([outside], "lies outside of the map"),
        ([inside, outside], f"click 1 at {outside[0]:.6g}, {outside[1]:.6g} lies outside of the map"),
        ([lonlat(2, 2)], "lies on nodata"),
        ([inside, lonlat(60, 120)] * 200, "px long, expected at most 5,000 px"),
    ):
        found = asked.post(path, json={"label": "kind-1", "coordinates": places})
        assert found.status_code == 422
        assert sentence in found.json()["detail"]
    assert not (tmp_path / "map.clicks.geojsonl").exists()


def test_tiles_in_view_follow_the_clicks(run, tmp_path):
    asked = client(runs=(str(run),), clicks=str(tmp_path))
    lon, lat = lonlat(100, 90)
    place = mercantile.tile(lon, lat, 19)
    path = f"/v1/runs/map/clicks/tiles/{place.z}/{place.x}/{place.y}.png"
    assert asked.get(path).status_code == 204  # no clicks
    plain = asked.get(path.replace("/clicks", ""))
    bounds = mercantile.bounds(place)
    wests, middle = np.linspace(bounds.west, bounds.east, 6)[2:4], (bounds.south + bounds.north) / 2
    for name, color in (("kind-2", (230, 159, 0)), ("kind-1", (0, 158, 115))):
        asked.post("/v1/runs/map/clicks", json={"label": name, "coordinates": [[west, middle] for west in wests]})
        found = asked.get(path)
        assert found.status_code == 200, found.text
        assert share_of(color, found) > 0.6
        assert share_of(color, plain) < 0.6
    assert asked.get(path, headers={"If-None-Match": found.headers["etag"]}).status_code == 304
    assert asked.get("/v1/runs/map/clicks/tiles/2/0/0.png").status_code == 204


def share_of(color, answer):
    """Share of the stroke's pixels that have a colour."""
    row_N4 = np.asarray(Image.open(io.BytesIO(answer.content)).convert("RGBA"))[128, 106:150]
    return (row_N4 == (*color, 255)).all(axis=1).mean()


APART = """
import sys
from starlette.testclient import TestClient
from rayseg.serve.app import api
from rayseg.serve.models import ChildBackend, ModelIndex
from rayseg.serve.settings import ServeConfig

if __name__ == "__main__":
    run, folder, lon, lat, place = *sys.argv[1:3], float(sys.argv[3]), float(sys.argv[4]), sys.argv[5]
    asked = TestClient(api(ServeConfig(runs=(run,), clicks=folder), ChildBackend(), ModelIndex()))
    click = {"label": "kind-2", "coordinates": [[lon, lat]]}
    assert asked.post("/v1/runs/map/clicks", json=click).status_code == 201
    found = asked.get(f"/v1/runs/map/clicks/tiles/{place}.png")
    assert found.status_code == 200, found.text
    assert "torch" not in sys.modules
"""


@pytest.mark.more  # two processes start
def test_the_process_of_the_page_follows_clicks_without_pytorch(run, tmp_path):
    script = tmp_path / "asked.py"
    script.write_text(APART)
    lon, lat = lonlat(100, 90)
    place = mercantile.tile(lon, lat, 19)
    words = [sys.executable, str(script), run, tmp_path, str(lon), str(lat), f"{place.z}/{place.x}/{place.y}"]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_features_that_take_too_long_are_a_503(run, tmp_path, monkeypatch):
    async def slow(*_):
        await asyncio.sleep(5)

    monkeypatch.setattr("rayseg.serve.models.LocalBackend.follow", slow)
    monkeypatch.setattr(clicks, "FOLLOW_SECONDS", 0.05)
    asked = client(runs=(str(run),), clicks=str(tmp_path))
    asked.post("/v1/runs/map/clicks", json={"label": "kind-1", "coordinates": [lonlat(60, 90)]})
    assert asked.get("/v1/runs/map/clicks/tiles/19/1/1.png").status_code == 503
