"""Nothing that one client does stops another: a real server, a client that attacks, and one that measures."""

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from fake_run import blobs, make, picture
from tiny_server import encoded, form, image_HWC, listening, served, untrained_sam

from rayseg.serve import middleware, runs
from rayseg.serve.uploads import DecoderPool

PREVIEW = "/v1/preview"
HEAD = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    mask = blobs(128, 192)
    make(root / "map", {"scene": (picture(mask), mask, (0, 0))})
    return root / "map"


@contextmanager
def unfinished(address, sent, *, path=PREVIEW, size=200_000):
    """A connection that has sent the first `sent` bytes of an upload."""
    url = urlsplit(address)
    with socket.create_connection((url.hostname, url.port), timeout=20) as connection:
        head = f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {size}\r\n"
        connection.sendall(f"{head}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
        connection.sendall(HEAD + b"x" * (sent - len(HEAD)))
        yield connection


def upload(address, data=None, timeout=20):
    return httpx.post(f"{address}{PREVIEW}", timeout=timeout, **form(data or encoded(image_HWC())))


def at_once(count, function):
    """Threads that call a function; ended by `join`."""
    threads = [threading.Thread(target=function) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def until(condition, seconds=10):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# -- the API process ---------------------------------------------------------------------------------------------------

REQUESTS = """
import io
import sys
import numpy as np
from PIL import Image
from starlette.testclient import TestClient
import rayseg.serve.deployment
from rayseg.serve.app import api
from rayseg.serve.models import ModelIndex
from rayseg.serve.settings import ServeConfig

class Backend:
    async def instances(self, model, image, options):
        return [{"runs": np.array([3, 9]), "iou": 0.5, "stability": 0.5}]

png = io.BytesIO()
Image.new("RGB", (80, 60)).save(png, "PNG")
form = {"image": ("a.png", png.getvalue())}
for models in ((), (sys.argv[1],)):
    asked = TestClient(api(ServeConfig(models=models), Backend(), ModelIndex(models)))
    for path, fields in (("auto", {}), ("prompt", {"points": "[[9, 9]]"})):
        for accept in ("application/json", "image/png", "application/geo+json"):
            found = asked.post(f"/v1/sam/{path}", data=fields, headers={"Accept": accept}, files=form)
            assert found.status_code == (200 if models else 404), found.text
assert "torch" not in sys.modules
"""


def test_the_api_process_answers_without_pytorch(tmp_path):
    """Its import takes seconds, in which an event loop answers nobody."""
    with untrained_sam(tmp_path / "sam") as sam:
        words = [sys.executable, "-c", REQUESTS, str(sam)]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_slow_uploads_hold_no_slot():
    with listening(served(queue=2)) as address, ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(unfinished(address, 2000))
        time.sleep(0.3)
        assert upload(address).status_code == 200
        assert httpx.get(f"{address}/v1/models").status_code == 200


def test_an_upload_below_the_minimum_rate_is_a_408(monkeypatch):
    monkeypatch.setattr(middleware, "GRACE_SECONDS", 0.5)
    with listening(served(min_bytes_per_second=100_000)) as address:
        began = time.monotonic()
        with unfinished(address, 50_000) as slow:
            answer = slow.recv(4096)
        assert b" 408 " in answer.partition(b"\r\n")[0]
        assert time.monotonic() - began >= 0.5
        assert upload(address).status_code == 200


def test_an_upload_beyond_the_time_limit_is_a_408():
    with listening(served(timeout_seconds=0.5)) as address, unfinished(address, 190_000) as slow:
        assert b" 408 " in slow.recv(4096).partition(b"\r\n")[0]


def test_bytes_of_all_uploads_are_limited_and_given_back():
    app = served(max_bytes_in_flight=100_000)
    with listening(app) as address:
        with unfinished(address, 90_000):
            until(lambda: app.bytes >= 90_000)
            found = upload(address, encoded(image_HWC(), compress_level=0))
            assert found.status_code == 503
            assert "uploads of 100,000 bytes" in found.json()["detail"]
        until(lambda: app.bytes == 0)
        assert upload(address, encoded(image_HWC(300, 300))).status_code == 200  # alone, one of any size


def test_pixels_of_all_images_are_limited_and_given_back():
    data, waiting = encoded(image_HWC(100, 100)), threading.Event()

    async def hold(*_):
        waiting.set()
        await asyncio.sleep(1)
        return np.zeros((100, 100), np.uint8)

    app = served(max_pixels_in_flight=15_000)
    predictor = next(r for r in app.app.routes if getattr(r, "path", "") == "/v1/unsupervised").endpoint.__self__
    predictor.backend.labels = hold
    with listening(app) as address:
        path, codes = f"{address}/v1/unsupervised", []
        [first] = at_once(1, lambda: codes.append(httpx.post(path, timeout=20, **form(data)).status_code))
        waiting.wait(20)
        refused = httpx.post(path, timeout=20, **form(data))
        first.join()
        assert (refused.status_code, codes) == (503, [200])
        assert "images of 10,000 px are in progress" in refused.json()["detail"]
        assert httpx.post(path, timeout=20, **form(data)).status_code == 200
        assert predictor.pixels == 0


def test_images_that_are_decoded_slowly_do_not_delay_other_work(run, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(DecoderPool, "read", lambda *_, **__: ended.wait(60) and None)
    with listening(served(runs=(str(run),))) as address:
        threads = at_once(12, lambda: upload(address, timeout=90))
        time.sleep(0.5)
        assert httpx.get(f"{address}/v1/runs/map", timeout=30).status_code == 200
        ended.set()
        for thread in threads:
            thread.join()


def bomb(chunks=400, inflated=8_000_000):
    """A PNG with text chunks that inflate a thousandfold."""
    text = b"zTXt" + b"a\0\0" + zlib.compress(b"\0" * (inflated - 100), 9)
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    png = encoded(image_HWC())
    return png[:33] + chunk * chunks + png[33:]  # after the header


def test_compressed_texts_of_a_png_are_not_inflated():
    decoders = DecoderPool(1, max_pixels=1 << 20)
    plain = decoders.read(encoded(image_HWC()))[1]
    began = time.monotonic()
    image = decoders.read(bomb())[1]
    assert time.monotonic() - began < 8  # 3.2 GB inflated take longer
    np.testing.assert_array_equal(image.image_CHW, plain.image_CHW)
    decoders.close()


def test_a_client_that_leaves_during_its_upload_is_not_an_error(caplog):
    app = served()
    with listening(app) as address:
        with unfinished(address, 50_000):
            until(lambda: app.bytes >= 50_000)
        until(lambda: app.bytes == 0)
        assert upload(address).status_code == 200
    assert not [record for record in caplog.records if record.exc_info]


# -- map tiles ---------------------------------------------------------------------------------------------------------


def test_slow_tiles_do_not_delay_other_work(run, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(runs, "TILE_SECONDS", 60)
    monkeypatch.setattr(runs, "tile_png", lambda *_, **__: ended.wait(60) and None)
    with listening(served(runs=(str(run),), queue=8)) as address:
        tile = f"{address}/v1/runs/map/tiles/8/3/3.png"
        threads = at_once(12, lambda: httpx.get(tile, timeout=90))
        time.sleep(0.5)
        assert httpx.get(f"{address}/v1/runs/map", timeout=30).status_code == 200
        assert upload(address, timeout=30).status_code == 200
        ended.set()
        for thread in threads:
            thread.join()


def test_a_tile_is_given_up_when_its_client_leaves(run, monkeypatch):
    drawing, stopped = threading.Event(), threading.Event()

    def draw(*_, stop, **__):
        drawing.set()
        if stop.wait(8):
            stopped.set()

    monkeypatch.setattr(runs, "tile_png", draw)
    with listening(served(runs=(str(run),))) as address:
        url = urlsplit(address)
        with socket.create_connection((url.hostname, url.port)) as connection:
            connection.sendall(f"GET /v1/runs/map/tiles/8/3/3.png HTTP/1.1\r\nHost: {url.netloc}\r\n\r\n".encode())
            assert drawing.wait(10)
        assert stopped.wait(7)


def test_a_tile_beyond_the_time_limit_is_a_503(run, monkeypatch):
    monkeypatch.setattr(runs, "TILE_SECONDS", 0.3)
    monkeypatch.setattr(runs, "tile_png", lambda *_, stop, **__: stop.wait(8))
    with listening(served(runs=(str(run),))) as address:
        found = httpx.get(f"{address}/v1/runs/map/tiles/8/3/3.png")
    assert (found.status_code, found.headers["retry-after"]) == (503, "10")
    assert "was not drawn within 0.3 s" in found.json()["detail"]
