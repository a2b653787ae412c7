"""Runs over HTTP: descriptions, and their map as tiles."""

import asyncio
import io
import json
import signal
import subprocess
import sys
import time

import httpx
import mercantile
import numpy as np
import pytest
from fake_run import GPC, NODATA, UTM, blobs, make, picture
from PIL import Image
from tiny_server import client, free_port, served
from upath import UPath

from rayseg.engine.manifest import read_rows, write_rows
from rayseg.errors import DataError
from rayseg.geo.grid import Grid
from rayseg.io import mapview
from rayseg.io.maps import mapped_tiles
from rayseg.serve import runs
from rayseg.steps import map as mapping

SHAPE = (128, 192)


@pytest.fixture(scope="module")
def mask():
    return blobs(*SHAPE)


@pytest.fixture(scope="module")
def root(tmp_path_factory, mask):
    """A run of six tiles on Earth, of which one failed, and one over an image without georeference."""
    root = tmp_path_factory.mktemp("runs")
    (root / "earth").mkdir()
    (root / "flat").mkdir()
    make(root / "earth/map", {"scene": (picture(mask), mask, (0, 0))})
    [*_, last] = mapped_tiles(root / "earth/map")
    make(
        root / "earth/broken",
        {"scene": (picture(mask), mask, (0, 0))},
        fates={last.tile.id: ("failed", "its file is damaged")},
    )
    (root / "earth/torn").mkdir()
    (root / "earth/torn/run.json").write_text("{")
    make(root / "flat/photo", {"photo": (picture(mask), mask, (0, 0))}, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    return root


@pytest.fixture(scope="module")
def asked(root):
    return client(runs=(str(root / "earth"), str(root / "flat/photo")))


def image_of(answer):
    assert answer.status_code == 200, answer.text
    return np.array(Image.open(io.BytesIO(answer.content)))


def test_readable_runs_are_listed_by_name(asked):
    assert {row["name"] for row in asked.get("/v1/runs").json()["runs"]} == {"map", "broken", "photo"}
    found = asked.get("/v1/runs/none")
    assert found.status_code == 404
    assert "no run 'none'" in found.json()["detail"]


def test_a_run_reports_areas_and_failed_tiles(asked, mask):
    said = asked.get("/v1/runs/map").json()
    rows = {row["name"]: row for row in said["classes"]}
    assert rows["gpc"]["share"] == pytest.approx((mask == 1).mean())
    assert rows["gpc"]["area_m2"] == pytest.approx((mask == 1).sum() * 4, rel=2e-3)
    assert said["troubles"] == []
    west, south, east, north = said["bounds"]
    assert west < east
    assert south < north
    [trouble] = asked.get("/v1/runs/broken").json()["troubles"]
    assert trouble["reason"] == "its file is damaged"
    assert west <= trouble["bounds"][0] < trouble["bounds"][2] <= east + 1e-9


def test_tiles_show_the_classes_and_the_imagery_where_they_are(asked, root, mask):
    """Every pixel of a map tile is that of the map at its place."""
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 17)
    classes_HW = image_of(asked.get(f"/v1/runs/map/tiles/17/{place.x}/{place.y}.png"))
    imagery_HWC = image_of(asked.get(f"/v1/runs/map/tiles/17/{place.x}/{place.y}.png?layer=imagery"))
    seen = classes_HW != NODATA
    assert 0.02 < seen.mean() < 1
    assert (seen == (imagery_HWC[..., 3] > 0)).mean() > 0.99
    both = seen & (imagery_HWC[..., 3] > 0)
    green = imagery_HWC[..., 1].astype(int) > imagery_HWC[..., 0].astype(int)
    assert (green[both] == (classes_HW[both] == 1)).mean() > 0.9
    assert (classes_HW[seen] == 1).mean() == pytest.approx((mask == 1).mean(), abs=0.15)


def test_imagery_is_shown_where_a_tile_failed_too(asked, root):
    west, south, east, north = asked.get("/v1/runs/broken").json()["troubles"][0]["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 22)
    path = f"/v1/runs/broken/tiles/22/{place.x}/{place.y}.png"
    assert asked.get(path).status_code == 204
    assert (image_of(asked.get(f"{path}?layer=imagery"))[..., 3] == 255).all()
    assert asked.get("/v1/runs/broken").json()["bounds"] == asked.get("/v1/runs/map").json()["bounds"]


def test_more_tiles_than_the_queue_holds_are_refused_at_once(root, monkeypatch):
    """Threads draw few tiles at a time; the others would wait, however many there are."""
    monkeypatch.setattr(runs, "tile_png", lambda *_, **__: time.sleep(0.3))
    app = served(runs=(str(root / "earth/map"),), queue=3)

    async def together():
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://testserver") as asked:
            return await asyncio.gather(*[asked.get(f"/v1/runs/map/tiles/9/{x}/0.png") for x in range(20)])

    found = asyncio.run(together())
    assert sorted(one.status_code for one in found) == [204] * 3 + [503] * 17
    refused = [one for one in found if one.status_code == 503]
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    assert all("3 requests for map tiles are already in progress" in one.json()["detail"] for one in refused)
    assert app.busy.total() == 0


def test_a_tile_beside_the_map_holds_nothing(asked):
    assert asked.get("/v1/runs/map/tiles/10/0/0.png").status_code == 204
    assert asked.get("/v1/runs/map/tiles/2/9/0.png").status_code == 404
    assert asked.get("/v1/runs/map/tiles/99/0/0.png").status_code == 422
    assert asked.get("/v1/runs/map/tiles/0/0/0.png?layer=secret").status_code == 422


def test_an_image_without_georeference_has_a_pyramid_of_its_own(asked, mask):
    said = asked.get("/v1/runs/photo").json()
    assert said["bounds"] is None
    assert said["images"] == [{"id": "photo", "width": SHAPE[1], "height": SHAPE[0]}]
    whole = image_of(asked.get("/v1/runs/photo/tiles/0/0/0.png?image=photo"))
    height = round(256 * SHAPE[0] / SHAPE[1])
    assert (whole[height + 1 :] == NODATA).all()
    rows = (np.arange(height) + 0.5) * SHAPE[0] / height
    cols = (np.arange(256) + 0.5) * SHAPE[1] / 256
    expected = mask[rows.astype(int)][:, cols.astype(int)]
    assert (whole[:height] == expected).mean() > 0.97
    part = image_of(asked.get("/v1/runs/photo/tiles/1/1/0.png?image=photo"))
    assert (part[:, 1:-1] != NODATA).any()
    assert asked.get("/v1/runs/photo/tiles/0/0/0.png?image=other").status_code == 204


def test_a_run_whose_files_could_not_all_be_opened_is_shown_without_those(root, mask, tmp_path):
    make(tmp_path / "part", {"photo": (picture(mask), mask, (0, 0))}, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    path = UPath(tmp_path / "part/steps/predict/manifest.parquet")
    rows = [row | {"refused": ""} for row in read_rows(path)]
    write_rows(path, [*rows, mapping.refused_row("lost", DataError("lost.tif cannot be read."))])
    asked = client(runs=(str(tmp_path / "part"),))
    assert [image["id"] for image in asked.get("/v1/runs/part").json()["images"]] == ["photo"]
    assert asked.get("/v1/runs/part/tiles/0/0/0.png?image=lost").status_code == 204


def test_imagery_is_read_from_allowed_hosts_only():
    assert mapview.allowed("/data/a.tif", ())
    assert mapview.allowed("s3://bucket/a.tif", ())
    assert not mapview.allowed("https://169.254.169.254/a.tif", ())
    assert not mapview.allowed("gs://bucket/a.tif", ("bucket",))
    assert not mapview.allowed("/vsicurl/http://a/b.tif".replace("/vsicurl/", "vsicurl://"), ())
    assert mapview.allowed("https://tiles.example/a.tif", ("tiles.example",))


def test_models_below_a_run_lead_to_it(root):
    (root / "earth/map/models").mkdir()
    assert runs.runs_below([str(root / "earth/map/models")]) == {"map": str(root / "earth/map")}


def test_the_world_of_these_tests_is_what_they_say():
    assert GPC.names == ("background", "gpc")
    assert UTM.crs == "EPSG:32650"


def test_view_shows_a_run_until_it_is_stopped(root):
    port = free_port()
    words = ["view", str(root / "earth/broken"), "--port", str(port), "--no-browser"]
    with subprocess.Popen([sys.executable, "-m", "rayseg", *words], stderr=subprocess.PIPE, text=True) as process:
        said = process.stderr.readline()
        address = said.split(";")[0]
        assert address == f"http://127.0.0.1:{port}/runs/broken"
        with httpx.Client(transport=httpx.HTTPTransport(retries=5), timeout=30) as asked:
            assert "leaflet" in asked.get(address).text
            said = asked.get(f"http://127.0.0.1:{port}/v1/runs/broken").json()
            assert said["ledger"]["predict"]["counts"]["failed"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) in {0, -signal.SIGTERM}


def reads_of(monkeypatch, root):
    """Calls that read the manifest or the ledger of a run."""
    calls = []
    for name in ("mapped_tiles", "planned_tiles"):
        original = getattr(runs, name)
        monkeypatch.setattr(runs, name, lambda *given, of=original: calls.append(of.__name__) or of(*given))
    monkeypatch.setattr(runs.runs, "status", lambda path, of=runs.runs.status: calls.append("status") or of(path))
    return calls


@pytest.mark.parametrize(("status", "times"), [("done", 1), ("running", 2)])
def test_a_finished_run_is_read_once_and_a_running_one_again_after_some_seconds(
    root, mask, tmp_path, monkeypatch, status, times
):
    make(tmp_path / "map", {"scene": (picture(mask), mask, (0, 0))})
    content = json.loads((tmp_path / "map/run.json").read_text()) | {"status": status, "reason": ""}
    (tmp_path / "map/run.json").write_text(json.dumps(content))
    calls, asked = reads_of(monkeypatch, root), client(runs=(str(tmp_path / "map"),))
    for moment in (0.0, 1.0, 1000.0):
        monkeypatch.setattr(runs, "monotonic", lambda now=moment: now)
        assert asked.get("/v1/runs/map").json()["classes"]
        assert asked.get("/v1/runs/map/tiles/0/0/0.png").status_code == 200
    assert sorted(calls) == sorted(times * ["mapped_tiles", "planned_tiles", "status"])


def test_a_finished_run_that_is_resumed_is_read_again(root, mask, tmp_path, monkeypatch):
    make(tmp_path / "map", {"scene": (picture(mask), mask, (0, 0))})
    content = json.loads((tmp_path / "map/run.json").read_text())
    calls, asked = reads_of(monkeypatch, root), client(runs=(str(tmp_path / "map"),))
    for number, moment in enumerate((0.0, 1000.0)):
        monkeypatch.setattr(runs, "monotonic", lambda now=moment: now)
        (tmp_path / "map/run.json").write_text(json.dumps(content | {"status": "done", "seconds": number}))
        assert asked.get("/v1/runs/map").json()["status"] == "done"
    assert calls.count("status") == 2


def opened_by(monkeypatch):
    """Files that tiles open."""
    mapview._block.cache_clear()
    opened, reader, file = [], mapview._open, mapview.open_file
    monkeypatch.setattr(mapview, "_open", lambda href, **given: opened.append(href) or reader(href, **given))
    monkeypatch.setattr(mapview, "open_file", lambda href, **given: opened.append(href) or file(href, **given))
    return opened


@pytest.mark.parametrize(("run", "place", "query"), [("map", "14/{x}/{y}", ""), ("photo", "0/0/0", "&image=photo")])
def test_a_tile_over_many_tiles_opens_no_more_files_than_the_limit(asked, mask, monkeypatch, run, place, query):
    """Above the limit each tile of the run is filled with its most frequent class, which the ledger counts."""
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    where = mercantile.tile((west + east) / 2, (south + north) / 2, 14)
    path = f"/v1/runs/{run}/tiles/{place.format(x=where.x, y=where.y)}.png?layer="
    opened = opened_by(monkeypatch)
    assert (image_of(asked.get(f"{path}classes{query}")) != NODATA).any()
    assert len(opened) == 6
    monkeypatch.setattr(runs, "MAX_OPENED", 5)
    del opened[:]
    coarse_HW = image_of(asked.get(f"{path}classes{query}"))
    assert (coarse_HW != NODATA).any()
    assert opened == []
    if run == "photo":
        side = 256 * 64 / SHAPE[1]
        for row, col in np.ndindex(2, 3):
            most = np.bincount(mask[64 * row : 64 * row + 64, 64 * col : 64 * col + 64].ravel()).argmax()
            assert coarse_HW[int(side * (row + 0.5)), int(side * (col + 0.5))] == most


def test_a_mosaic_shows_the_pixels_of_the_maps(root, mask, monkeypatch):
    tiles = mapped_tiles(root / "earth/map")
    _, south, east, _ = mapview.lonlat_bounds(tiles[0].tile.grid, tiles[0].tile.window)
    place = mercantile.tile(east, south, 17)
    fine_HW = mapview.classes_tile(tiles, (17, place.x, place.y))
    assert 0.01 < (fine_HW == 1).mean() < 1
    whole = mapview.Mosaic.of(tiles)
    assert whole.step == 1
    np.testing.assert_array_equal(whole.tile((17, place.x, place.y)), fine_HW)
    monkeypatch.setattr(mapview, "_MOSAIC", SHAPE[0] * SHAPE[1] // 16)
    small = mapview.Mosaic.of(tiles)
    assert small.step == 4
    assert (small.tile((17, place.x, place.y)) == fine_HW).mean() > 0.95
    assert small.suffices((14, 0, 0), tiles[0].tile.grid, None) is False  # far away nothing is known
    near = mercantile.tile(east, south, 13)
    assert small.suffices((13, near.x, near.y), tiles[0].tile.grid, None)
    assert not small.suffices((20, place.x * 8, place.y * 8), tiles[0].tile.grid, None)


def test_a_mosaic_never_has_a_hole_where_a_tile_cannot_be_read(root, monkeypatch, caplog):
    tiles, reader = mapped_tiles(root / "earth/map"), mapview.open_file

    def fail(href, **given):
        if href == tiles[-1].href:
            raise DataError("c.tif cannot be read")
        return reader(href, **given)

    monkeypatch.setattr(mapview, "open_file", fail)
    overview = runs.Overview()
    overview._make(tiles)
    assert overview.mosaic is None
    assert "no mosaic: c.tif cannot be read" in caplog.text


def test_a_finished_run_of_many_tiles_is_drawn_from_its_mosaic_at_low_zooms(root, mask, tmp_path, monkeypatch):
    make(tmp_path / "map", {"scene": (picture(mask), mask, (0, 0))})
    content = json.loads((tmp_path / "map/run.json").read_text()) | {"status": "done", "reason": ""}
    (tmp_path / "map/run.json").write_text(json.dumps(content))
    monkeypatch.setattr(runs, "MAX_OPENED", 4)
    asked = client(runs=(str(tmp_path / "map"),))
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 16)
    while (
        "max-age=60"
        not in (found := asked.get(f"/v1/runs/map/tiles/16/{place.x}/{place.y}.png")).headers["cache-control"]
    ):
        time.sleep(0.05)
    opened = opened_by(monkeypatch)
    np.testing.assert_array_equal(
        image_of(asked.get(f"/v1/runs/map/tiles/16/{place.x}/{place.y}.png")), image_of(found)
    )
    assert opened == []
    expected_HW = mapview.classes_tile(mapped_tiles(tmp_path / "map"), (16, place.x, place.y))
    assert (image_of(found) == expected_HW).mean() > 0.99


def test_imagery_of_more_scenes_than_the_limit_is_not_drawn(asked, monkeypatch):
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 8)
    opened = opened_by(monkeypatch)
    monkeypatch.setattr(runs, "MAX_OPENED", 0)
    assert asked.get(f"/v1/runs/map/tiles/8/{place.x}/{place.y}.png?layer=imagery").status_code == 204
    assert opened == []


def test_coarse_tiles_lie_where_the_files_do(asked, monkeypatch):
    """At a zoom where a tile of the run is many pixels wide, both ways of drawing cover the same pixels."""
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    place = mercantile.tile((west + east) / 2, (south + north) / 2, 16)
    path = f"/v1/runs/map/tiles/16/{place.x}/{place.y}.png"
    fine_HW = image_of(asked.get(path))
    monkeypatch.setattr(runs, "MAX_OPENED", 0)
    coarse_HW = image_of(asked.get(path))
    assert ((fine_HW != NODATA) == (coarse_HW != NODATA)).mean() > 0.98
    assert 0.01 < (coarse_HW != NODATA).mean() < 1


def test_a_tile_that_the_client_has_is_not_drawn_again(root, mask, tmp_path, monkeypatch):
    make(tmp_path / "map", {"scene": (picture(mask), mask, (0, 0))})
    content = json.loads((tmp_path / "map/run.json").read_text()) | {"status": "done", "reason": ""}
    (tmp_path / "map/run.json").write_text(json.dumps(content))
    asked = client(runs=(str(tmp_path / "map"),))
    monkeypatch.setattr(runs, "monotonic", lambda: 0.0)
    while "max-age=60" not in (first := asked.get("/v1/runs/map/tiles/0/0/0.png")).headers["cache-control"]:
        time.sleep(0.05)  # until the mosaic is made, after which tiles are others
    known = {"If-None-Match": first.headers["etag"]}
    with monkeypatch.context() as patch:
        patch.setattr(runs, "tile_png", lambda *_, **__: 1 / 0)
        found = asked.get("/v1/runs/map/tiles/0/0/0.png", headers=known)
        assert (found.status_code, found.content, found.headers["etag"]) == (304, b"", first.headers["etag"])
    assert asked.get("/v1/runs/map/tiles/1/0/0.png", headers=known).status_code != 304
    assert asked.get("/v1/runs/map/tiles/0/0/0.png?layer=imagery", headers=known).status_code != 304
    (tmp_path / "map/run.json").write_text(json.dumps(content | {"seconds": 9}))
    monkeypatch.setattr(runs, "monotonic", lambda: 1000.0)
    assert asked.get("/v1/runs/map/tiles/0/0/0.png", headers=known).status_code == 200


def test_large_imagery_without_overviews_is_not_read_from_afar(asked, root, monkeypatch):
    west, south, east, north = asked.get("/v1/runs/map").json()["bounds"]
    where = mercantile.tile((west + east) / 2, (south + north) / 2, 13)
    path = f"/v1/runs/map/tiles/13/{where.x}/{where.y}.png?layer=imagery"
    assert image_of(asked.get(path))[..., 3].any()
    monkeypatch.setattr(mapview, "MAX_READ", 128 * 128)
    assert not image_of(asked.get(path))[..., 3].any()
    near = mercantile.tile((west + east) / 2, (south + north) / 2, 19)
    assert image_of(asked.get(f"/v1/runs/map/tiles/19/{near.x}/{near.y}.png?layer=imagery"))[..., 3].any()


def test_pixels_are_drawn_from_the_lowest_zoom_on_that_a_run_reports(asked, monkeypatch):
    said = asked.get("/v1/runs/map").json()
    west, south, east, north = said["bounds"]
    monkeypatch.setattr(runs, "MAX_OPENED", 4)
    monkeypatch.setattr(mapview.Mosaic, "suffices", lambda *_: False)  # which opens no file, once it is made
    lowest = runs._min_zoom(np.array([[west, south, west + (east - west) / 3, south + (north - south) / 2]]))
    opened = opened_by(monkeypatch)
    for x, y, z in mercantile.tiles(west, south, east, north, lowest):
        mapview._block.cache_clear()  # neighbouring web tiles share blocks
        del opened[:]
        mapview._block.cache_clear()
        asked.get(f"/v1/runs/map/tiles/{z}/{x}/{y}.png")
        assert 0 < len(opened) <= 4
    assert asked.get("/v1/runs/photo").json()["minzoom"] == 0
