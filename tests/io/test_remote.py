import json
import logging
import subprocess
import sys
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
import rasterio
from botocore.exceptions import ClientError
from rasterio.transform import from_origin
from s3fs.errors import translate_boto_error

from rayseg.errors import ConfigError, DataError, StoreRefused
from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, maps, pictures, remote, segments, sources
from rayseg.io.gdal_errors import gdal_errors
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.sources import source_of_file
from rayseg.store import access, public


@pytest.fixture
def service(monkeypatch):
    """A service that signs, as Planetary Computer's does; `lasts` is how long a signature holds."""

    class Sign(BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.asked += 1
            if self.server.together:
                self.server.together.wait()
            href = parse_qs(urlsplit(self.path).query)["href"][0]
            ends = datetime.fromtimestamp(time.time() + self.server.lasts, UTC).isoformat()
            row = {"href": f"{href}?sig=S{self.server.asked}", "msft:expiry": ends}
            content = json.dumps(row if self.server.lasts else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Sign)
    server.asked, server.lasts, server.together = 0, 3600, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("RAYSEG_SIGN", f"http://127.0.0.1:{server.server_port}/sign?href={{href}}")
    monkeypatch.setattr(remote, "_signatures", OrderedDict())
    yield server
    server.shutdown()
    server.server_close()


HREF = "https://one.blob.core.windows.net/a/b.tif"


def test_hrefs_of_hosts_that_want_it_are_signed_and_others_are_not(service):
    assert remote.signed(HREF) == f"{HREF}?sig=S1"
    assert remote.signed(HREF) == f"{HREF}?sig=S1"
    for other in ("https://example.org/b.tif", "s3://b/k", "/a/b.tif", "https://evilblob.core.windows.net.org/x"):
        assert remote.signed(other) == other
    assert service.asked == 1


def test_a_signature_near_its_end_is_renewed_and_files_opened_anew(service):
    service.lasts = remote.EARLY - 10
    first, stamped = remote.signed(HREF), remote.stamp(HREF)
    service.lasts = 2 * remote.EARLY
    assert remote.signed(HREF) != first
    assert remote.stamp(HREF) != stamped


def test_only_the_signatures_used_last_are_kept(service, monkeypatch):
    monkeypatch.setattr(remote, "MOST_SIGNATURES", 2)
    one, two, three = (f"{HREF}{number}" for number in range(3))
    for href in (one, two, one, three):
        remote.signed(href)
    assert list(remote._signatures) == [one, three]
    assert service.asked == 3
    remote.signed(two)
    assert service.asked == 4


def test_hosts_are_signed_at_the_same_time_and_one_href_once(service):
    service.together = threading.Barrier(2, timeout=20)
    hrefs = [f"https://{host}.blob.core.windows.net/a.tif" for host in ("one", "two")]
    with ThreadPoolExecutor(8) as pool:
        signed = list(pool.map(remote.signed, hrefs * 4))
    assert service.asked == 2
    assert len(set(signed)) == 2


def test_a_service_that_does_not_sign_is_named_without_the_secret(service):
    service.lasts = 0
    with pytest.raises(DataError, match=r"cannot be signed by 127\.0\.0\.1") as told:
        remote.signed(f"{HREF}?sig=OLD")
    assert "OLD" not in str(told.value)


@pytest.fixture
def answer(monkeypatch):
    """The error that every request to S3 meets, which the test chooses."""
    chosen = [OSError("no network")]

    async def fails(*_, **__):
        raise chosen[0]

    monkeypatch.setattr("s3fs.S3FileSystem._call_s3", fails)
    return chosen


@pytest.mark.parametrize("code", ["ExpiredToken", "NoSuchBucket", "AccessDenied"])
def test_a_file_that_the_store_refuses_is_named_with_the_cause(answer, code):
    """GDAL says of all three that the file does not exist."""
    answer[0] = translate_boto_error(ClientError({"Error": {"Code": code, "Message": code}}, "GetObject"))
    kind, said = {
        "ExpiredToken": (StoreRefused, "the session token has expired"),
        "NoSuchBucket": (ConfigError, "has no bucket 'b'"),
        "AccessDenied": (DataError, "s3://b/k.tif: AccessDenied; the keys in use need s3:GetObject there: grant it"),
    }[code]
    with pytest.raises(kind, match=said):
        raise remote.failure("s3://b/k.tif", "does not exist in the file system")


def test_reading_is_tried_again_only_where_it_helps(monkeypatch, answer):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    calls = []

    def read(name, reason, times):
        calls.append(reason)
        if len(calls) <= times:
            raise remote.failure(name, reason)
        return "pixels"

    assert remote.patiently(lambda: read("s3://b/k", "HTTP 503", 2)) == "pixels"
    assert calls == ["HTTP 503"] * 3
    for name, reason in (("s3://b/k", "response code 404"), ("/a/b.tif", "HTTP 503")):
        calls.clear()
        with pytest.raises(DataError):
            remote.patiently(lambda name=name, why=reason: read(name, why, 9))
        assert calls == [reason]


def test_files_of_a_run_are_read_again_where_that_helps(monkeypatch):
    """Class rasters, superpixels, masks: GDAL gives up an open file whose connection is reset."""
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))
    opened = []

    def fails(href, *_):
        opened.append(href)
        raise remote.Passing("TIFFReadEncodedTile() failed")

    for module in (cog, segments, maps):
        monkeypatch.setattr(module, "open_file", fails)
    window = Window(0, 0, 4, 4)
    tile = SimpleNamespace(href="/a/classes.tif")
    for read_it in (
        lambda: cog.read_bands("/a/b.tif"),
        lambda: segments.read_segments([(window, "/a/b.tif")], window),
        lambda: maps.read_tile(tile, "scores"),
    ):
        opened.clear()
        with pytest.raises(remote.Passing):
            read_it()
        assert len(opened) == 3


def test_waits_are_those_given_or_the_servers_own_and_end_when_the_caller_gives_up():
    pauses = []

    def attempt():
        raise remote.Passing("busy", 7.0 if not pauses else 1e9)

    with pytest.raises(remote.Passing, match="busy"):
        remote.patiently(attempt, (3.0, 9.0, 1.0), pause=pauses.append)
    assert pauses == [7.0, remote.LONGEST_WAIT, remote.LONGEST_WAIT]
    with pytest.raises(remote.Passing):
        remote.patiently(attempt, (3.0, 9.0), pause=lambda wait: pauses.append(wait) or len(pauses) == 4)
    assert len(pauses) == 4


def test_images_without_georeference_raise_no_warning_in_any_thread(tmp_path):
    """In a process of its own, for pytest sets filters per test; warnings are errors there from the start."""
    script = f"""
import sys, threading
from concurrent.futures import ThreadPoolExecutor
import numpy as np
from rayseg.geo.grid import Grid, Window
from rayseg.io import cog, vectors
from rayseg.io.rasters import read, source_of_file
sys.setswitchinterval(1e-5)
grid, window = Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), Window(0, 0, 64, 48)
start = threading.Barrier(8)

def work(number):
    start.wait()
    for turn in range(20):
        path = "{tmp_path}/%d-%d.tif" % (number, turn)
        image = np.full((1, 48, 64), number + 1, np.uint8)
        cog.write_image(path, image, grid, window, bands=["red"])
        pixels, valid = read([source_of_file(path, "a")], grid, window, bands=["red"])
        assert (pixels == image).all() and valid.all()
        assert len(vectors.polygons_of(image[0], None, grid, window)) == 1

with ThreadPoolExecutor(8) as pool:
    list(pool.map(work, range(8)))
"""
    others = ["-W", "ignore::DeprecationWarning", "-W", "ignore::PendingDeprecationWarning"]
    words = [sys.executable, "-W", "error", *others, "-c", script]
    process = subprocess.run(words, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_files_are_opened_and_written_by_several_threads_at_once(tmp_path, monkeypatch):
    """No thread waits for another one's file: each of two is inside rasterio.open until the other one is too."""
    pixels = np.ones((1, 8, 8), np.uint8)
    grid, window = Grid(None, (1.0, 1.0), (0.0, 0.0), "a"), Window(0, 0, 8, 8)
    for name in "ab":
        cog.write_image(tmp_path / f"{name}.tif", pixels, grid, window, bands=["red"])
    together, opened = threading.Barrier(2, timeout=20), rasterio.open

    def slow(*args, **kwargs):
        together.wait()
        return opened(*args, **kwargs)

    monkeypatch.setattr(sources.rasterio, "open", slow)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: source_of_file(str(tmp_path / f"{name}.tif"), name), "ab"))
        list(pool.map(lambda name: cog.write_image(tmp_path / f"{name}.tif", pixels, grid, window, bands=["r"]), "ab"))


def test_texts_for_others_hold_no_secrets():
    told = public("GET https://u:pw@h/x?a=1&sig=AbC%2F&X-Amz-Credential=K&b=2#f failed")
    assert told == "GET https://***@h/x?a=1&sig=***&X-Amz-Credential=***&b=2#f failed"
    assert public("s3://bucket/catalog.json#imagery") == "s3://bucket/catalog.json#imagery"


def test_other_machines_are_told_where_stores_are_but_no_keys(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://h")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "K")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "T")
    assert access()["AWS_ENDPOINT_URL"] == "http://h"
    assert not {"K", "T"} & set(access().values())


def test_only_lost_data_that_this_thread_is_told_of_counts():
    tags, errors = logging.getLogger("rasterio._env"), logging.getLogger("rasterio._err")
    signalled = "GDAL signalled an error: err_no=1, msg="
    with gdal_errors() as said:
        tags.warning("CPLE_AppDefined in a.tif: TIFFReadDirectory:IO error during reading of GeoKeyDirectory; ignored")
        tags.warning("CPLE_AppDefined in a.tif: something else")
        errors.info(f"{signalled}'a block that cannot be read'")
        errors.info(f"{signalled}'PROJ: utm: Invalid latitude'")
        errors.info(f"{signalled}'Error reading EXIF Directory count at 60030'")
        with gdal_errors() as inner:
            errors.info(f"{signalled}'Read error'")
        other = threading.Thread(target=tags.warning, args=("IO error in another file",))
        other.start()
        other.join()
    tags.warning("IO error, later")
    assert [text[:26] for text in said] == ["CPLE_AppDefined in a.tif: ", "a block that cannot be rea"]
    assert inner == ["Read error"]


def test_what_is_lost_is_heard_whatever_a_program_does_to_loggers(caplog):
    logger = logging.getLogger("rasterio._err")
    logger.setLevel(logging.ERROR)
    logger.disabled = True
    with gdal_errors() as said:
        logger.info("GDAL signalled an error: err_no=1, msg='Read error'")
    assert said == ["Read error"]
    assert caplog.text == ""


@pytest.fixture
def cutting():
    """Address of a server of a file, of whose first answer at /<n>/... only n bytes come."""
    servers = []

    def address(path):
        if not servers:
            words = [sys.executable, str(Path(__file__).with_name("cut_server.py")), str(path)]
            servers.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
            address.port = servers[0].stdout.readline().strip()
        return f"http://127.0.0.1:{address.port}"

    yield address
    for server in servers:
        server.terminate()
        server.communicate()


def test_an_answer_that_is_cut_short_is_never_taken_for_pixels(tmp_path, monkeypatch, cutting):
    """Some tags and block offsets GDAL does without, if it cannot have them."""
    monkeypatch.setattr(remote, "WAITS", ())
    image = np.random.default_rng(0).integers(1, 255, (3, 512, 512), np.uint8)
    profile = {"width": 512, "height": 512, "count": 3, "dtype": "uint8", "blocksize": 64, "compress": "deflate"}
    place = {"crs": "EPSG:32633", "transform": from_origin(5e5, 5e6, 1, 1), "nodata": 0}
    with rasterio.open(tmp_path / "a.tif", "w", driver="COG", **profile, **place) as file:
        file.write(image)
    source = source_of_file(str(tmp_path / "a.tif"), "a")
    [(grid, _)] = grids_of([source])
    refused = Counter()
    for cut in range(100, 3000, 25):
        hrefs = [f"{cutting(tmp_path / 'a.tif')}/{cut}/{name}.tif" for name in "abc"]
        there = [replace(source, assets=((href, source.bands),)) for href in hrefs]
        with refusals(refused, "opened"):
            opened = source_of_file(hrefs[0], "a")
            assert (opened.crs, opened.nodata) == ("EPSG:32633", 0), cut
        place = footprint(source, grid)
        with refusals(refused, "pictures"):
            pixels_CHW, valid_HW = pictures._decimated(there[1], grid, place, (512, 512))
            assert valid_HW.all(), cut
            assert np.array_equal(pixels_CHW, image), cut
        for one in (*there[1:], there[2]):
            with refusals(refused, "read"):
                found, valid = read([one], grid, place, bands=["red"])
                assert valid.all(), cut
                assert np.array_equal(found, image[:1]), cut
    assert all(refused[name] > 20 for name in ("opened", "pictures", "read")), refused


@contextmanager
def refusals(count, name):
    try:
        yield
    except DataError:
        count[name] += 1
