"""What the page of a run asks for: layers, outlines in view, the value at a place, files."""

import io
import json
import shutil

import geopandas as gpd
import mercantile
import numpy as np
import pytest
import shapely
from fake_run import blobs, make, picture
from PIL import Image
from pydantic import ValidationError
from tiny_server import client

from rayseg.io import cog, mapview, vectors
from rayseg.io.maps import mapped_tiles
from rayseg.serve.settings import ServeConfig

MASK = blobs(128, 192, seed=3)
BASEMAP = "https://tiles.example/{z}/{x}/{y}.png"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of six tiles with scores (200 in the class, else 20), a report, and an outline per tile."""
    root = tmp_path_factory.mktemp("details") / "map"
    make(root, {"scene": (picture(MASK), MASK, (0, 0))})
    tiles = mapped_tiles(root)
    for tile in tiles:
        scores_HW = np.where(cog.read_bands(tile.href)[0] == 1, 200, 20).astype(np.uint8)
        cog.write_scores(mapview.scores_of(tile), scores_HW[None], tile.tile.grid, tile.tile.window, ("gpc",))
    boxes = [shapely.box(*mapview.lonlat_bounds(tile.tile.grid, tile.tile.window)) for tile in tiles]
    rows = {"id": range(6), "name": "gpc", "area_m2": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]}
    vectors.write_geoparquet(gpd.GeoDataFrame(rows, geometry=boxes, crs="EPSG:4326"), root / "gpc.parquet")
    content = json.loads((root / "run.json").read_text())
    content |= {"status": "done", "steps": {"polygons": {"polygons": "gpc.parquet", "count": 6}}}
    (root / "run.json").write_text(json.dumps(content))
    (root / "report").mkdir()
    (root / "report/index.html").write_text("<p>report</p>")
    (root / "secret.txt").write_text("no")
    return root


@pytest.fixture(scope="module")
def asked(run):
    return client(runs=(str(run),), basemap=BASEMAP)


def test_the_layers_and_files_that_a_run_has_are_listed(asked, run):
    said = asked.get("/v1/runs/map/layers").json()
    assert (said["basemap"], said["scores"], said["outlines"]) == (BASEMAP, True, True)
    for _, path in said["files"]:
        assert asked.get(f"/v1/runs/map/files/{path}").content == (run / path).read_bytes()
    assert {path for _, path in said["files"]} == {"report/index.html", "gpc.parquet"}


def test_the_value_at_a_place_is_that_of_its_pixel(asked, run):
    tile = mapped_tiles(run)[1]
    bounds = mapview.lonlat_bounds(tile.tile.grid, tile.tile.window)
    classes_HW = cog.read_bands(tile.href)[0]
    for row, col in ((10, 50), (40, 8)):
        lon = bounds[0] + (bounds[2] - bounds[0]) * (col + 0.5) / 64
        lat = bounds[3] - (bounds[3] - bounds[1]) * (row + 0.5) / 64
        said = asked.get(f"/v1/runs/map/value?x={lon}&y={lat}").json()
        inside = classes_HW[row, col] == 1
        assert said["class"] == ("gpc" if inside else "background")
        assert said["scores"] == {"gpc": pytest.approx((200 if inside else 20) / 254)}
        assert said["tile"] == tile.tile.id
    assert asked.get("/v1/runs/map/value?x=0&y=0").json()["class"] is None


def test_only_outlines_in_the_box_are_sent_and_the_largest_first(asked, run, monkeypatch):
    tile = mapped_tiles(run)[0]
    west, south, east, north = mapview.lonlat_bounds(tile.tile.grid, tile.tile.window)
    inner = f"west={west + 1e-5}&south={south + 1e-5}&east={east - 1e-5}&north={north - 1e-5}"
    said = asked.get(f"/v1/runs/map/shapes?{inner}").json()
    assert [row["properties"]["id"] for row in said["features"]] == [0]
    monkeypatch.setattr("rayseg.serve.details.MOST_SHAPES", 2)
    said = asked.get("/v1/runs/map/shapes?west=-180&south=-90&east=180&north=90").json()
    assert ([row["properties"]["id"] for row in said["features"]], said["more"]) == ([5, 4], 4)


@pytest.mark.parametrize("content", [None, b"PAR1"])
def test_outlines_that_cannot_be_read_are_an_error_in_a_sentence(run, tmp_path, content):
    shutil.copytree(run, tmp_path / "map")
    (tmp_path / "map/gpc.parquet").unlink()
    if content:
        (tmp_path / "map/gpc.parquet").write_bytes(content)
    found = client(runs=(str(tmp_path / "map"),)).get("/v1/runs/map/shapes?west=-180&south=-90&east=180&north=90")
    assert (found.status_code, "gpc.parquet are missing or damaged" in found.json()["detail"]) == (422, True)


def test_scores_of_a_file_that_comes_later_are_found(tmp_path):
    make(tmp_path / "map", {"scene": (picture(MASK), MASK, (0, 0))})
    tile = mapped_tiles(tmp_path / "map")[0]
    assert not mapview.has_scores(tile)
    scores = np.full((1, tile.tile.window.height, tile.tile.window.width), 9, np.uint8)
    cog.write_scores(mapview.scores_of(tile), scores, tile.tile.grid, tile.tile.window, ("gpc",))
    assert mapview.has_scores(tile)


def test_scores_are_drawn_in_the_colours_of_the_ramp(asked):
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 17)
    found = asked.get(f"/v1/runs/map/tiles/17/{place.x}/{place.y}.png?layer=scores")
    values_HW = np.array(Image.open(io.BytesIO(found.content)))
    assert set(np.unique(values_HW)) <= {*range(20, 201), 255}
    assert {20, 200} <= set(np.unique(values_HW))


@pytest.mark.parametrize("path", ["secret.txt", "../map/run.json", "report/../secret.txt", "%2e%2e/x", "steps/a.json"])
def test_other_files_are_refused(asked, path):
    assert asked.get(f"/v1/runs/map/files/{path}").status_code == 404


def test_a_report_may_run_its_own_script_alone_and_the_page_fetch_from_the_basemap(asked):
    policy = asked.get("/v1/runs/map/files/report/index.html").headers["content-security-policy"]
    assert "script-src 'sha256-" in policy
    assert "default-src 'none'" in policy
    assert "img-src https://tiles.example " in asked.get("/runs/map").headers["content-security-policy"]
    assert "tiles.example" not in asked.get("/").headers["content-security-policy"]


@pytest.mark.parametrize(
    "basemap", ["tiles", "https://a;script-src *//{z}/{x}/{y}", "https://a/{z}.png", "file:///{z}/{x}/{y}"]
)
def test_a_basemap_that_is_not_a_template_is_refused(basemap):
    with pytest.raises(ValidationError, match="expected a URL such as"):
        ServeConfig(basemap=basemap)
