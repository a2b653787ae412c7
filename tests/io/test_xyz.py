"""Web-map tiles: every pixel at its place, polite and stubborn fetching, resume, and keys that stay secret."""

import json
import logging
import math
import re
import threading
import time
from collections import Counter
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import geopandas
import mercantile
import numpy as np
import pystac
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import Geod
from rasterio.io import MemoryFile
from rio_cogeo.cogeo import cog_validate
from shapely.geometry import Point, box, mapping, shape

import rayseg
from rayseg.config import load_values
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Tile, Window
from rayseg.geo.region import kept, resolve_region
from rayseg.io import remote, stac_read, webmap, xyz
from rayseg.io.labels import chips_of
from rayseg.io.maps import pixel_areas_m2
from rayseg.io.rasters import grids_of, read
from rayseg.io.webmap import Fetching
from rayseg.io.xyz import ingest_xyz
from rayseg.stages.read import tile_rows

QUICK = Fetching(backoff=0.01, tries=3, timeout=5)
HALF_WORLD = 20037508.342789244
SCENE = 384  # one and a half tiles
NATIVE_14 = 156543.03392804097 / 2**14
SHANGHAI = (121.4737, 31.2304)
LEAK = "s3cr3t"


@cache
def drawn(x, y, size=256):
    """(3, size, size) of tile (x, y): red and green count the zoom's pixels, blue names the tile."""
    rows, cols = np.mgrid[0:size, 0:size]
    red, green = (x * size + cols) % 241, (y * size + rows) % 239
    return np.stack([red, green, np.full_like(red, (x * 7 + y * 13) % 200 + 20)]).astype("uint8")


def encoded(image, driver="PNG", colors=None, **options):
    with MemoryFile() as file:
        bands, height, width = image.shape
        with file.open(driver=driver, count=bands, height=height, width=width, dtype=image.dtype, **options) as out:
            out.write(image)
            if colors:
                out.write_colormap(1, colors)
        return bytes(file.getbuffer())


@cache
def picture(x, y, size=256):
    return encoded(drawn(x, y, size))


class World:
    """A tile server on this machine, and what it has seen."""

    def __init__(self):
        self.size, self.hold = 256, 0.0
        self.answer = {}  # (z, x, y) -> list of answers: status, (status, headers) or body; the last one stays
        self.default = None
        self.asked, self.paths, self.times, self.headers = [], [], [], []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def reply(self, tile):
        script = self.answer.get(tile) or self.default
        if not script:
            return picture(*tile[1:], self.size)
        return script.pop(0) if len(script) > 1 else script[0]

    def url(self, path="/{z}/{x}/{y}.png"):
        return f"http://127.0.0.1:{self.port}{path}"


def tile_of(path):
    """(z, x, y) that a request's path or query means, whatever the scheme."""
    parts = urlsplit(path)
    if found := re.search(r"/q([0-3]+)\.", parts.path):
        tile = mercantile.quadkey_to_tile(found[1])
        return tile.z, tile.x, tile.y
    if (query := parse_qs(parts.query)) and "x" in query:
        return tuple(int(query[name][0]) for name in "zxy")
    z, x, y = map(int, re.search(r"/(\d+)/(\d+)/(\d+)", parts.path).groups())
    return z, x, 2**z - 1 - y if parts.path.startswith("/tms") else y


@pytest.fixture
def world():
    served = World()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            tile = tile_of(self.path)
            with served.lock:
                served.asked.append(tile)
                served.paths.append(self.path)
                served.times.append(time.monotonic())
                served.headers.append(dict(self.headers))
                served.at_once += 1
                served.most_at_once = max(served.at_once, served.most_at_once)
                reply = served.reply(tile)
            time.sleep(served.hold)
            with served.lock:
                served.at_once -= 1
            if reply == "reset":
                self.close_connection = True
                return
            status, headers, body = 200, {}, reply
            if not isinstance(reply, bytes):
                status, headers = reply if isinstance(reply, tuple) else (reply, {})
                body = b"" if status == 204 else b"no"
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    served.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def small_scenes(monkeypatch):
    monkeypatch.setattr(xyz, "SCENE", SCENE)


def around(lon, lat, metres):
    """A square region of EPSG:3857 metres around a place, in degrees."""
    x, y = mercantile.xy(lon, lat)
    corners = [mercantile.lnglat(x + dx * metres / 2, y + dy * metres / 2) for dx, dy in ((-1, -1), (1, 1))]
    return mapping(box(*corners[0], *corners[1]))


def images(uri):
    """(transform, pixels_CHW, valid_HW) of every item, by id."""
    found = {}
    for item in stac_read.open_items(uri, stac_read.imagery_collection(uri)):
        path = item.assets["image"].get_absolute_href()
        with rasterio.open(path) as dataset:
            assert dataset.crs.to_epsg() == 3857
            found[item.id] = dataset.transform, dataset.read(), dataset.dataset_mask() > 0
    assert found
    return found


def pixels_of(transform, side):
    """(col, row) of an image in the pixels of a zoom, which start at the world's upper-left corner."""
    return round((transform.c + HALF_WORLD) / side), round((HALF_WORLD - transform.f) / side)


def expected(col, row, height, width, size=256):
    """What `drawn` tiles show in a window of a zoom's pixels."""
    rows, cols = np.mgrid[row : row + height, col : col + width]
    return np.stack([cols % 241, rows % 239, (cols // size * 7 + rows // size * 13) % 200 + 20]).astype("uint8")


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_at_a_zooms_own_resolution_every_pixel_is_the_tiles_own_at_its_place(world, tmp_path):
    uri = ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 3500), resolution=NATIVE_14, fetching=QUICK)
    found = images(uri)
    assert len(found) in {4, 6, 9}
    assert {z for z, _, _ in world.asked} == {14}
    for transform, pixels, valid in found.values():
        col, row = pixels_of(transform, NATIVE_14)
        assert np.array_equal(pixels, expected(col, row, SCENE, SCENE))
        assert valid.all()
        assert (transform.a, transform.e) == (NATIVE_14, -NATIVE_14)
        for position in (transform.c, transform.f):
            assert position / NATIVE_14 % SCENE == pytest.approx(0, abs=1e-6)


def test_a_place_given_in_degrees_shows_the_tile_that_holds_it(world, tmp_path):
    bounds = mercantile.xy_bounds(mercantile.tile(*SHANGHAI, 15))
    corner = mercantile.lnglat(bounds.left, bounds.top)
    uri = ingest_xyz(world.url(), tmp_path, geometry=around(*corner, 90), resolution=4.0, fetching=QUICK)
    [(grid, sources)] = grids_of([stac_read.source_of(item) for item in stac_read.open_items(uri)])
    assert (grid.crs, grid.resolution, grid.origin) == ("EPSG:3857", (4.0, 4.0), (0.0, 0.0))
    for dx, dy in ((-6, -6), (-6, 6), (6, -6), (6, 6)):
        x, y = bounds.left + dx, bounds.top + dy
        pixels, valid = read(sources, grid, grid.window_of((x, y, x + 1e-3, y + 1e-3)), bands=["blue"])
        tile = mercantile.tile(*mercantile.lnglat(x, y), 16)
        assert valid.all()
        assert set(np.unique(pixels)) == {(tile.x * 7 + tile.y * 13) % 200 + 20}


@pytest.mark.parametrize(
    ("resolution", "tile_size", "zoom"),
    [
        (1.0, 256, 18),
        (1.0, 512, 17),
        (156543.03392804097 / 2**18, 256, 18),
        (0.5971642, 256, 18),
        (0.597, 256, 19),
        (0.6, 256, 18),
        (1e6, 256, 0),
    ],
)
def test_the_zoom_is_the_one_as_fine_as_asked_or_the_next_finer(resolution, tile_size, zoom):
    service, grid = webmap.service_for("http://h/{z}/{x}/{y}", resolution, Fetching(tile_size=tile_size))
    assert service.zoom == zoom
    assert grid.resolution[0] == pytest.approx(resolution, rel=1e-6)
    assert service.native.resolution[0] * 2**zoom == pytest.approx(156543.03392804097 * 256 / tile_size)


def test_tiles_of_512_px_are_taken_one_zoom_lower(world, tmp_path):
    world.size = 512
    fetching = Fetching(tile_size=512)
    uri = ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 300), resolution=NATIVE_14, fetching=fetching)
    assert {z for z, _, _ in world.asked} == {13}
    for transform, pixels, _ in images(uri).values():
        assert np.array_equal(pixels, expected(*pixels_of(transform, NATIVE_14), SCENE, SCENE, size=512))


def overlaps(first, count, side, start, length):
    """(count, length): how much of tile pixel j lies in output pixel i of 1 m, from `first` m on, along one axis."""
    low = np.arange(count)[:, None] + first
    pixels = start + np.arange(length)[None] * side
    return np.clip(np.minimum(low + 1, pixels + side) - np.maximum(low, pixels), 0, None)


def test_a_coarser_resolution_is_the_mean_by_area_of_the_data_under_each_pixel(world, tmp_path):
    side = 156543.03392804097 / 2**18
    tile = mercantile.tile(*SHANGHAI, 18)
    world.answer[18, tile.x, tile.y] = [404]
    uri = ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 20), resolution=1.0, fetching=QUICK)
    for transform, pixels, valid in images(uri).values():
        assert transform.c % SCENE == transform.f % SCENE == 0
        col, row = math.floor((transform.c + HALF_WORLD) / side), math.floor((HALF_WORLD - transform.f) / side)
        length = math.ceil(SCENE / side) + 2
        native = expected(col, row, length, length).astype(float)
        rows, cols = np.mgrid[row : row + length, col : col + length]
        seen = ~((cols // 256 == tile.x) & (rows // 256 == tile.y))
        down = overlaps(-transform.f, SCENE, side, row * side - HALF_WORLD, length)
        across = overlaps(transform.c, SCENE, side, col * side - HALF_WORLD, length)
        share = down @ seen @ across.T
        mean = (down @ (native * seen) @ across.T) / np.maximum(share, 1e-9)
        clear = (share > 1e-3) | (share == 0)
        assert np.array_equal(valid[clear], share[clear] > 0)
        assert 0 < valid.mean() < 1
        assert np.abs(pixels - mean)[:, valid & clear].max() <= 0.51
        assert not pixels[:, ~valid].any()


def test_a_pixel_is_the_same_whatever_window_it_is_fetched_in(world, tmp_path, monkeypatch):
    area = around(*SHANGHAI, 60)
    mosaics = {}
    for size in (SCENE, 96):
        monkeypatch.setattr(xyz, "SCENE", size)
        uri = ingest_xyz(world.url(), tmp_path / str(size), geometry=area, resolution=1.0, fetching=QUICK)
        sources = [stac_read.source_of(item) for item in stac_read.open_items(uri)]
        [(grid, _)] = grids_of(sources)
        x, y = mercantile.xy(*SHANGHAI)
        mosaics[size] = read(sources, grid, Window(int(x) - 25, int(-y) - 25, 50, 50), bands=["red", "green", "blue"])
    assert mosaics[96][1].all()
    for one, other in zip(*mosaics.values(), strict=True):
        assert np.array_equal(one, other)


def test_scenes_are_the_blocks_that_share_ground_with_the_region_and_whole(world, tmp_path):
    side = SCENE * 100.0
    corner = (52 * side, -13 * side)  # of four blocks
    boxes = [box(corner[0] - 5000, corner[1] - 5000, *corner), box(corner[0], corner[1], corner[0] + 9, corner[1] + 9)]
    region = geopandas.GeoSeries(boxes, crs=3857).to_crs(4326)
    uri = ingest_xyz(world.url(), tmp_path, geometry=mapping(region.union_all()), resolution=100.0, fetching=QUICK)
    # the two others only touch the region there, up to rounding
    assert set(images(uri)) == {"3857_51_13", "3857_52_12"}
    assert {pixels.shape for _, pixels, _ in images(uri).values()} == {(3, SCENE, SCENE)}


@pytest.mark.parametrize(
    ("driver", "kind"),
    [
        *(("PNG", kind) for kind in ("rgb", "grey", "palette", "rgba", "grey-alpha")),
        *(("JPEG", kind) for kind in ("rgb", "grey")),
        *(("WEBP", kind) for kind in ("rgb", "rgba")),
    ],
)
def test_every_kind_of_tile_image_is_understood(world, tmp_path, driver, kind):
    image = np.full((4, 256, 256), 100, "uint8")
    image[1], image[2], image[3, :, 128:] = 150, 200, 0
    image[3, :, :128] = 7
    options = {"LOSSLESS": "YES"} if driver == "WEBP" else {}
    colors = {0: (100, 150, 200, 255), 1: (9, 9, 9, 0)} if kind == "palette" else None
    bands = {"rgb": [0, 1, 2], "grey": [0], "rgba": [0, 1, 2, 3], "grey-alpha": [0, 3], "palette": [3]}[kind]
    picture = (image[bands] == 0).astype("uint8") if kind == "palette" else image[bands]
    world.default = [encoded(picture, driver, colors, **options)]
    tile = mercantile.tile(*SHANGHAI, 14)
    [(_, pixels, valid)] = fetched_chip(world, tmp_path, tile).values()
    see_through = kind in {"rgba", "grey-alpha", "palette"}
    assert valid[:, :128].all()
    assert valid[:, 128:].all() == (not see_through)
    assert not (see_through and pixels[:, ~valid].any())
    color = [100, 100, 100] if kind.startswith("grey") else [100, 150, 200]
    assert np.abs(pixels[:, valid].T.astype(int) - color).max() <= (3 if driver == "JPEG" else 0)


def chip_file(path, rows, crs="EPSG:3857"):
    frame = geopandas.GeoDataFrame(rows, crs=crs)
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path, driver="GeoJSON")
    return path


def fetched_chip(world, tmp_path, tile, fetching=QUICK):
    """Fetch one chip that is exactly one tile of zoom 14."""
    b = mercantile.xy_bounds(tile)
    polygons = chip_file(tmp_path / "one.parquet", [{"id": "one", "geometry": box(b.left, b.bottom, b.right, b.top)}])
    uri = ingest_xyz(world.url(), tmp_path / "out", chips=polygons, resolution=NATIVE_14, fetching=fetching)
    return images(uri)


# -- items -------------------------------------------------------------------------------------------------------------


def test_items_say_where_they_are_what_they_are_made_of_and_whom_they_are_owed_to(world, tmp_path):
    uri = ingest_xyz(
        world.url("/{z}/{x}/{y}.png?key=abc"),
        tmp_path,
        geometry=around(*SHANGHAI, 5),
        resolution=1.0,
        attribution="(c) Somebody",
        fetching=QUICK,
    )
    assert Path(uri) == tmp_path / "catalog.json"
    [item] = stac_read.open_items(uri, "imagery")
    properties = item.properties
    assert properties["attribution"] == "(c) Somebody"
    assert properties["license"] == "other"
    assert [p["name"] for p in properties["providers"]] == ["(c) Somebody", "127.0.0.1"]
    assert properties["rayseg:tiles"] == world.url("/{z}/{x}/{y}.png")
    assert (properties["rayseg:zoom"], properties["proj:code"]) == (18, "EPSG:3857")
    assert abs(item.datetime - datetime.now(UTC)) < timedelta(minutes=5)
    lon, lat = SHANGHAI
    west, south, east, north = item.bbox
    assert west < lon < east
    assert south < lat < north
    image = item.assets["image"]
    assert [band["name"] for band in image.extra_fields["bands"]] == ["red", "green", "blue"]
    assert cog_validate(image.get_absolute_href(), quiet=True)[0]
    pystac.validation.stac_validator.JsonSchemaSTACValidator().validate_core(
        json.loads(Path(item.get_self_href()).read_text()), pystac.STACObjectType.ITEM, "1.1.0"
    )
    assert {header["User-Agent"] for header in world.headers} == {f"rayseg/{rayseg.__version__}"}


@pytest.mark.parametrize("suffix", [".geojson", ".parquet"])
def test_a_chip_is_the_envelope_of_its_polygon_under_its_id_with_its_label(world, tmp_path, suffix):
    x, y = mercantile.xy(*SHANGHAI)
    x, y = round(x), round(y)
    polygons = chip_file(
        tmp_path / f"chips{suffix}",
        [
            {"id": "a", "kind": "gpc", "geometry": Point(x + 30.5, y + 30.5).buffer(20)},
            {"id": "b/../c", "kind": None, "geometry": box(x + 100, y, x + 167, y + 50)},
        ],
    )
    uri = ingest_xyz(world.url(), tmp_path / "out", chips=polygons, label="kind", resolution=1.0, fetching=QUICK)
    items = {item.id: item for item in stac_read.open_items(uri, "chips")}
    assert {name: item.properties.get("rayseg:label") for name, item in items.items()} == {"a": "gpc", "b-..-c": None}
    found = images(uri)
    chips = {chip.id: chip for chip in chips_of(items.values())}
    assert (chips["a"].label, chips["b-..-c"].label) == ("gpc", None)
    assert (chips["a"].window.height, chips["a"].window.width) == (41, 41)
    assert found["a"][0] == Affine(1, 0, x + 10, 0, -1, y + 51)
    assert found["a"][1].shape == (3, 41, 41)
    assert found["b-..-c"][0] == Affine(1, 0, x + 100, 0, -1, y + 50)
    assert found["b-..-c"][1].shape == (3, 50, 67)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["catalog.json", "chips"]


def test_a_label_that_changed_is_brought_up_to_date_without_a_request(world, tmp_path):
    x, y = mercantile.xy(*SHANGHAI)
    for label in ("yes", "no"):
        rows = [{"id": 7, "label": label, "geometry": box(x, y, x + 9, y + 9)}]
        before = len(world.asked)
        uri = ingest_xyz(world.url(), tmp_path / "out", chips=chip_file(tmp_path / "c.parquet", rows), fetching=QUICK)
        [item] = stac_read.open_items(uri, "chips")
        assert (item.id, item.properties["rayseg:label"]) == ("7", label)
    assert len(world.asked) == before > 0


SQUARE = box(0, 0, 9, 9)


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        ([{"id": "a", "geometry": SQUARE}, {"id": "a", "geometry": SQUARE}], "used twice.*a"),
        ([{"id": "a b", "geometry": SQUARE}, {"id": "a/b", "geometry": SQUARE}], "used twice.*a-b"),
        ([{"id": "collection", "geometry": SQUARE}], "collection"),
        ([{"id": 1.0, "geometry": SQUARE}, {"id": None, "geometry": SQUARE}], "1 of 2 polygons .* have no id"),
        ([{"name": "a", "geometry": SQUARE}], "no column `id`.*name"),
        ([{"id": "a", "geometry": Point(0, 0)}], "Point"),
        ([{"id": "a", "geometry": box(0, 0, 9, 5000)}], "a would have 9 x 5000 px"),
        ([{"id": "a", "geometry": SQUARE.intersection(box(20, 20, 30, 30))}], "none empty"),
    ],
)
def test_polygons_that_make_no_chips_are_refused_before_any_request(world, tmp_path, rows, says):
    with pytest.raises(DataError, match=says):
        ingest_xyz(world.url(), tmp_path / "out", chips=chip_file(tmp_path / "c.parquet", rows), fetching=QUICK)
    assert not world.asked
    assert not (tmp_path / "out").exists()


def test_files_that_hold_no_polygons_are_refused(tmp_path):
    (tmp_path / "a.geojson").write_text("nothing")
    (tmp_path / "a.parquet").write_text("nothing")
    (tmp_path / "a.csv").write_text("id,name\n1,a\n")
    for name in ("a.geojson", "a.parquet", "a.csv", "none.geojson"):
        with pytest.raises(DataError, match=re.escape(name)):
            ingest_xyz("http://h/{z}/{x}/{y}", tmp_path / "out", chips=tmp_path / name)
    polygons = chip_file(tmp_path / "b.parquet", [{"id": 1, "geometry": SQUARE}])
    with pytest.raises(ConfigError, match=r"columns id.* no column 'kind'"):
        ingest_xyz("http://h/{z}/{x}/{y}", tmp_path / "out", chips=polygons, label="kind")


# -- templates ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/tms/{z}/{x}/{-y}.png", "/q{q}.png", "/{s}/{z}/{x}/{y}", "/?x={x}&y={y}&z={z}&k=1"])
def test_tms_quadkeys_subdomains_and_queries_name_the_same_tiles(world, tmp_path, path):
    uri = ingest_xyz(world.url(path), tmp_path, geometry=around(*SHANGHAI, 3000), resolution=NATIVE_14, fetching=QUICK)
    for transform, pixels, _ in images(uri).values():
        assert np.array_equal(pixels, expected(*pixels_of(transform, NATIVE_14), SCENE, SCENE))
    if "{s}" in path:
        assert {asked.split("/")[1] for asked in world.paths} == {"a", "b", "c"}


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://h/{z}/{x}/{y}/{time}", r"\{time\}.*\{z\}, \{x\}, \{y\}, \{-y\}, \{q\}, \{s\}"),
        ("http://h/{z}/{x}/{y", "unknown placeholders"),
        ("http://h/{z}/{x}", "lacks placeholders"),
        ("http://h/{x}/{y}", "lacks placeholders"),
        ("file:///etc/{z}/{x}/{y}", "http:// or https://"),
        ("ftp://h/{z}/{x}/{y}", "http:// or https://"),
        ("{z}/{x}/{y}.png", "http:// or https://"),
        ("http://[h/{z}/{x}/{y}", "not a valid URL"),
        ("http://h:port/{z}/{x}/{y}", "not a valid URL"),
    ],
)
def test_templates_that_name_no_tiles_are_refused(tmp_path, url, says):
    with pytest.raises(ConfigError, match=says):
        ingest_xyz(url, tmp_path, geometry=around(*SHANGHAI, 5))


def test_settings_that_cannot_be_meant_are_refused(tmp_path):
    area, url = around(*SHANGHAI, 5), "http://h/{z}/{x}/{y}"
    for resolution in (0, -1.0, math.nan, math.inf, 1e-9):
        with pytest.raises(ConfigError, match="resolution"):
            ingest_xyz(url, tmp_path, geometry=area, resolution=resolution)
    for settings in ({"tile_size": 100}, {"concurrency": 0}, {"tries": 0}, {"limit": -1}, {"timeout": 0}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            load_values(Fetching, settings)
    for choice in ({}, {"geometry": area, "chips": "a.geojson"}):
        with pytest.raises(ConfigError, match="one of the two"):
            ingest_xyz(url, tmp_path, **choice)
    for nowhere in (mapping(Point(1, 1)), mapping(box(0, 86, 1, 89))):
        with pytest.raises(ConfigError, match="no area"):
            ingest_xyz(url, tmp_path, geometry=nowhere)


def test_more_tiles_than_the_limit_are_refused_before_any_request_with_their_number(world, tmp_path, monkeypatch):
    world_region = mapping(box(-180, -90, 180, 90))
    with pytest.raises(ConfigError, match=r"\d{11} tiles of zoom 18 .* limit is 200000"):
        ingest_xyz(world.url(), tmp_path, geometry=world_region, resolution=1.0)
    monkeypatch.setattr(xyz, "SCENE", 2048)
    with pytest.raises(ConfigError, match=r"(196|210|225) tiles of zoom 18 .* limit is 20\b"):
        ingest_xyz(world.url(), tmp_path, geometry=around(121.4, 31.2, 5), fetching=Fetching(limit=20))
    assert not world.asked
    assert not list(tmp_path.iterdir())


# -- fetching ----------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_for_nothing_and_changes_nothing(world, tmp_path):
    def go():
        return ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 3500), resolution=NATIVE_14, fetching=QUICK)

    def state():
        return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.rglob("*.tif")}

    uri, before, asked = go(), state(), len(world.asked)
    catalogue = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    assert go() == uri
    assert len(world.asked) == asked
    assert state() == before
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.json")} == catalogue
    gone = sorted(tmp_path.rglob("*.tif"))[0]
    gone.unlink()
    go()
    assert len(world.asked) - asked == 4
    assert gone.read_bytes() == before[gone][0]
    assert {path.name for path in tmp_path.rglob("*.part")} == set()


def test_an_ingest_that_was_stopped_goes_on_and_links_what_was_there(world, tmp_path, monkeypatch):
    area, asked = around(*SHANGHAI, 3500), []
    write_image = xyz.cog.write_image

    def stop_at_third(path, *args, **kwargs):
        asked.append(path)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return write_image(path, *args, **kwargs)

    monkeypatch.setattr(xyz.cog, "write_image", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        ingest_xyz(world.url(), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    assert len(list(tmp_path.rglob("*.json"))) == len(list(tmp_path.rglob("*.tif"))) == 2
    monkeypatch.setattr(xyz.cog, "write_image", write_image)
    uri = ingest_xyz(world.url(), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    whole = ingest_xyz(world.url(), tmp_path / "whole", geometry=area, resolution=NATIVE_14, fetching=QUICK)
    assert {item.id for item in stac_read.open_items(uri)} == {item.id for item in stac_read.open_items(whole)}


def test_images_of_other_settings_are_not_taken_for_those_asked_for(world, tmp_path):
    area = around(*SHANGHAI, 5)
    ingest_xyz(world.url(), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    with pytest.raises(DataError, match=r"rayseg:tiles.*choose another --out"):
        ingest_xyz(world.url("/other/{z}/{x}/{y}"), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    polygons = [chip_file(tmp_path / f"{n}.parquet", [{"id": 1, "geometry": box(n, 0, 9, 9)}]) for n in (0, 5)]
    ingest_xyz(world.url(), tmp_path, chips=polygons[0], fetching=QUICK)
    with pytest.raises(DataError, match=r"proj:shape \[9, 9\], expected \[9, 4\].*choose another --out"):
        ingest_xyz(world.url(), tmp_path, chips=polygons[1], fetching=QUICK)


def test_missing_tiles_are_no_data_and_a_place_without_any_is_an_error(world, tmp_path):
    tile = mercantile.tile(*SHANGHAI, 14)
    world.answer[14, tile.x, tile.y] = [204]
    uri = ingest_xyz(
        world.url(), tmp_path / "a", geometry=around(*SHANGHAI, 3500), resolution=NATIVE_14, fetching=QUICK
    )
    found = images(uri)
    assert not all(valid.all() for _, _, valid in found.values())
    for transform, pixels, valid in found.values():
        col, row = pixels_of(transform, NATIVE_14)
        rows, cols = np.mgrid[row : row + SCENE, col : col + SCENE]
        assert np.array_equal(valid, ~((cols // 256 == tile.x) & (rows // 256 == tile.y)))
        assert np.array_equal(pixels, expected(col, row, SCENE, SCENE) * valid)
    world.default = [404]
    with pytest.raises(DataError, match="no imagery there at zoom 14"):
        ingest_xyz(world.url(), tmp_path / "b", geometry=around(0, 0, 3500), resolution=NATIVE_14, fetching=QUICK)
    assert not list((tmp_path / "b").rglob("*.*"))


@pytest.mark.parametrize("trouble", [500, 503, 429, 408, "reset", b"<html>busy</html>", b"", "cut PNG", "cut JPEG"])
def test_a_passing_failure_is_tried_again(world, tmp_path, trouble):
    tile = mercantile.tile(*SHANGHAI, 14)
    good = encoded(drawn(tile.x, tile.y))
    if trouble in {"cut PNG", "cut JPEG"}:
        trouble = encoded(drawn(tile.x, tile.y), trouble[4:])
        trouble = trouble[: len(trouble) // 2]
    world.answer[14, tile.x, tile.y] = [trouble, trouble, good]
    [(_, pixels, valid)] = fetched_chip(world, tmp_path, tile).values()
    assert len(world.asked) == 3
    assert valid.all()
    assert np.array_equal(pixels, drawn(tile.x, tile.y))


def test_a_server_that_does_not_answer_in_time_is_asked_again(world, tmp_path):
    tile = mercantile.tile(*SHANGHAI, 14)
    world.hold = 0.5
    with pytest.raises(DataError, match="failed 2 times, last with ReadTimeout"):
        fetched_chip(world, tmp_path, tile, Fetching(tries=2, backoff=0.01, timeout=0.1))
    assert len(world.asked) == 2


def test_an_answer_that_trickles_in_is_given_up(world, tmp_path, monkeypatch):
    tile = mercantile.tile(*SHANGHAI, 14)
    clock = iter(range(0, 10_000, 25))
    monkeypatch.setattr(webmap.time, "monotonic", lambda: next(clock))
    with pytest.raises(DataError, match="an answer that took more than 20 s"):
        fetched_chip(world, tmp_path, tile)


def test_retry_after_is_waited_for(world, tmp_path):
    tile = mercantile.tile(*SHANGHAI, 14)
    world.answer[14, tile.x, tile.y] = [(429, {"Retry-After": "1"}), encoded(drawn(tile.x, tile.y))]
    assert fetched_chip(world, tmp_path, tile)
    assert 1.0 <= world.times[1] - world.times[0] < 3.0


def test_retry_after_may_be_a_date_or_nonsense():
    later = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < remote.retry_after(later) <= 30
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert [remote.retry_after(text) for text in ("7", "", "soon", "-5", past, "Fri, 01 Jan 2100")] == [
        7,
        0,
        0,
        0,
        0,
        0,
    ]


def test_waits_grow_and_are_capped(world, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(threading.Event, "wait", lambda _self, seconds=None: waits.append(seconds) and False)
    service, _ = webmap.service_for(world.url(), NATIVE_14, Fetching(tries=8, backoff=1.0))
    script = [(429, {"Retry-After": "9999"})] + [503] * 7
    world.answer[14, 1, 2] = script
    with webmap.session(service) as server, pytest.raises(DataError, match="failed 8 times"):
        webmap._tile(server, mercantile.Tile(1, 2, 14), threading.Event())
    pauses = [seconds for seconds in waits if seconds is not None][:7]
    assert pauses[0] == 60.0
    for k, pause in enumerate(pauses[1:], 1):
        assert min(60.0, 0.5 * 2**k) <= pause <= min(60.0, 1.5 * 2**k)


def test_a_tile_that_fails_for_good_is_named_and_the_other_scenes_are_kept(world, tmp_path):
    area, bad = around(*SHANGHAI, 6500), mercantile.tile(*SHANGHAI, 14)
    world.answer[14, bad.x, bad.y] = [b"<html>"]
    name = world.url(f"/14/{bad.x}/{bad.y}.png")
    with pytest.raises(
        DataError, match=rf"\d of \d+ imagery .*{re.escape(name)} failed 3 times.*not a PNG, JPEG or WebP"
    ):
        ingest_xyz(world.url(), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    kept = stac_read.open_items(str(tmp_path / "catalog.json"), "imagery")
    asked = len(world.asked)
    assert len(kept) >= 4
    del world.answer[14, bad.x, bad.y]
    uri = ingest_xyz(world.url(), tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
    assert len(stac_read.open_items(uri)) > len(kept)
    assert max(Counter(world.asked[asked:]).values()) <= 4


def test_failures_between_successes_do_not_end_the_ingest(world, tmp_path):
    tiles = [mercantile.Tile(13_000 + 10 * k, 6000, 14) for k in range(7)]
    rows = [{"id": k, "geometry": box(*mercantile.xy_bounds(tile)).buffer(-9)} for k, tile in enumerate(tiles)]
    for tile in tiles[::2]:
        world.answer[14, tile.x, tile.y] = [403]
    chips = chip_file(tmp_path / "c.parquet", rows)
    with pytest.raises(DataError, match="4 of 7 chips"):
        ingest_xyz(world.url(), tmp_path, chips=chips, resolution=NATIVE_14, fetching=QUICK)
    assert {item.id for item in stac_read.open_items(str(tmp_path / "catalog.json"), "chips")} == {"1", "3", "5"}


def test_once_a_tile_failed_for_good_the_others_of_its_scene_are_not_waited_for(world, tmp_path):
    bad = mercantile.tile(*SHANGHAI, 14)
    world.default = [(503, {"Retry-After": "30"})]
    world.answer[14, bad.x, bad.y] = [403]
    start = time.monotonic()
    with pytest.raises(DataError, match=f"1 of 1 imagery .*/14/{bad.x}/{bad.y}.png was answered with HTTP 403"):
        ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 5), resolution=NATIVE_14, fetching=QUICK)
    assert time.monotonic() - start < 15
    assert set(Counter(world.asked).values()) == {1}


@pytest.mark.parametrize(("status", "most"), [(403, 3 * 8), (500, 3 * 8 * 3)])
def test_a_server_that_has_gone_is_left_alone_after_three_scenes(world, tmp_path, status, most):
    world.default = [status]
    with pytest.raises(DataError, match=f"3 of [0-9]+ imagery .*HTTP {status}"):
        ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 20_000), resolution=NATIVE_14, fetching=QUICK)
    assert len(world.asked) <= most
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (encoded(drawn(0, 0, 512)), "512 x 512 px of uint8, expected 256 x 256"),
        (encoded(drawn(0, 0).astype("uint16")), "of uint16"),
        (b"\x89PNG\r\n\x1a\n" + bytes(9 << 20), "more than 8388608 bytes"),
    ],
)
def test_an_image_that_is_no_such_tile_is_refused_at_once(world, tmp_path, body, says):
    world.default = [body]
    with pytest.raises(DataError, match=says):
        fetched_chip(world, tmp_path, mercantile.tile(*SHANGHAI, 14))
    assert len(world.asked) == 1


def test_no_more_requests_are_under_way_than_allowed(world, tmp_path):
    world.hold = 0.3
    fetching = Fetching(concurrency=3)
    ingest_xyz(world.url(), tmp_path, geometry=around(*SHANGHAI, 1500), resolution=NATIVE_14, fetching=fetching)
    assert len(world.asked) >= 4
    assert world.most_at_once == 3


# -- secrets -----------------------------------------------------------------------------------------------------------


@contextmanager
def everything_logged():
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(handler.format(record))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield lines
    root.removeHandler(handler)
    root.setLevel(level)


def test_keys_reach_the_server_and_nothing_else(world, tmp_path, capfd):
    url = world.url(f"/{{z}}/{{x}}/{{y}}.png?token={LEAK}&v={LEAK}{{z}}#{LEAK}").replace("//", f"//me:{LEAK}@")
    area = around(*SHANGHAI, 5)
    with everything_logged() as lines:
        ingest_xyz(url, tmp_path, geometry=area, resolution=NATIVE_14, fetching=QUICK)
        texts = []
        for place, status in ((1, 403), (2, 500), (3, "reset"), (4, b"html")):
            world.default = [status]
            with pytest.raises(DataError) as caught:
                ingest_xyz(url, tmp_path / str(place), geometry=area, resolution=NATIVE_14, fetching=QUICK)
            texts += [str(caught.value), repr(caught.value.__cause__)]
        with pytest.raises(ConfigError) as refused:
            ingest_xyz(url.replace("{x}", "{w}"), tmp_path, geometry=area)
    assert world.paths
    assert all(LEAK in path for path in world.paths)
    assert all("Authorization" in header for header in world.headers)
    assert world.url("/14/") in texts[0]
    service, _ = webmap.service_for(url, NATIVE_14, QUICK)
    captured = capfd.readouterr()
    for text in (*lines, *texts, str(refused.value), repr(service), captured.out, captured.err):
        assert LEAK not in text
    for path in tmp_path.rglob("*"):
        assert path.is_dir() or LEAK.encode() not in path.read_bytes()


def test_httpx_logs_again_afterwards(world, tmp_path, caplog):
    service, _ = webmap.service_for(world.url(), NATIVE_14, QUICK)
    with webmap.session(service):
        pass
    with caplog.at_level(logging.INFO, "httpx"):
        logging.getLogger("httpx").info("hello")
    assert "hello" in caplog.text


@pytest.mark.parametrize("resolution", [100.0, 70.3, 156543.03392804097 / 2**11])
@pytest.mark.parametrize("lat", [-16.5, 52.0])
def test_a_region_over_180_degrees_is_one_scene_each_side_and_no_ground_twice(world, tmp_path, resolution, lat):
    region = resolve_region(f"179.9,{lat - 0.02},-179.9,{lat + 0.02}").geometry
    uri = ingest_xyz(world.url(), tmp_path, geometry=region, resolution=resolution, fetching=QUICK)
    items = {item.id: item for item in stac_read.open_items(uri)}
    outlines = [shape(item.geometry) for item in items.values()]
    east = [one for one in outlines if one.bounds[0] > 0]
    assert all(one.bounds[2] < 0 for one in outlines if one not in east)
    assert {one.geom_type for one in outlines} == {"Polygon"}
    assert shapely.union_all(outlines).area == pytest.approx(sum(one.area for one in outlines), rel=1e-9)
    for item in items.values():
        assert abs(item.bbox[2] - item.bbox[0]) < 2
    # 1. every pixel of a scene has data, as its centre lies on its side
    half = HALF_WORLD
    for transform, pixels, valid in images(uri).values():
        centres = transform.c + (np.arange(pixels.shape[2]) + 0.5) * resolution
        assert np.abs(centres).max() <= half
        assert valid.all()
    # 2. both sides together are the ground of the region: tiles of a map hold it once
    sources = [stac_read.source_of(item) for item in items.values()]
    total = 0.0
    for row in tile_rows(sources, region, size=SCENE, halo=0):
        tile = Tile.from_row(row)
        inside, _ = kept(region, tile.grid, tile.window)
        _, valid = read(sources, tile.grid, tile.window, bands=["red"])
        total += float(pixel_areas_m2(tile)[inside & valid].sum())
    pixel_share = resolution / (0.2 * HALF_WORLD / 180)
    expected_m2 = sum(abs(Geod(ellps="WGS84").geometry_area_perimeter(part)[0]) for part in shape(region).geoms)
    assert total == pytest.approx(expected_m2, rel=4 * pixel_share + 2 * resolution / 4000)


def test_a_chip_over_180_degrees_says_so(world, tmp_path):
    over = shapely.MultiPolygon([box(179.99, 1, 180, 1.01), box(-180, 1, -179.99, 1.01)])
    rows = {"id": ["a"], "geometry": [over]}
    path = chip_file(tmp_path / "chips.geojson", rows, crs="EPSG:4326")
    with pytest.raises(DataError, match="chip a lies on both sides of 180 degrees"):
        ingest_xyz(world.url(), tmp_path / "out", chips=path, resolution=10.0, fetching=QUICK)
    assert not world.asked
