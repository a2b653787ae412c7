"""Access control, limits, malformed requests and malicious uploads."""

import asyncio
import io
import json
import logging
import struct
import zlib

import numpy as np
import pytest
import rasterio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from ray.serve._private.http_util import RequestIdMiddleware
from small_world import segmenter
from starlette.testclient import TestClient
from tiny_server import client, encoded, form, image_HWC, served

from rayseg.errors import ConfigError, DataError
from rayseg.serve import middleware
from rayseg.serve.settings import ServeConfig, require_token
from rayseg.serve.uploads import DecoderPool

TOKEN = "a-token-of-more-than-16-characters"
PREVIEW = "/v1/preview"


@pytest.fixture(scope="module")
def readers():
    found = DecoderPool(1, max_pixels=1 << 20, seconds=20)
    yield found
    found.close()


@pytest.fixture(scope="module")
def asked():
    return client(max_pixels=1 << 16, max_bytes=1 << 18, queue=2)


@pytest.fixture
def guarded(tmp_path):
    (tmp_path / "token").write_text(f"{TOKEN}\n")
    return client(token_file=str(tmp_path / "token"))


def problem(found, status):
    """The detail of a problem of this status."""
    assert found.status_code == status, found.text
    assert found.headers["content-type"] == "application/problem+json"
    body = found.json()
    assert set(body) >= {"type", "title", "status", "detail", "request_id"}
    assert "Traceback" not in found.text
    return body["detail"]


# -- access control ----------------------------------------------------------------------------------------------------


def test_without_the_token_there_is_only_the_page_and_health(guarded):
    for path in ("/", "/docs", "/healthz", "/page/style.css", "/runs/any"):
        assert guarded.get(path).status_code == 200, path
    for path in ("/v1/models", "/v1/runs", "/metrics", "/openapi.json", "/v1/nothing"):
        found = guarded.get(path)
        assert "the request has no token" in problem(found, 401)
        assert found.headers["www-authenticate"].startswith("Bearer")
    for wrong in ("Bearer wrong", f"Basic {TOKEN}", f"Bearer {TOKEN}x", "Bearer", f"Bearer {TOKEN[:-1]}"):
        problem(guarded.get("/v1/models", headers={"Authorization": wrong}), 401)
    assert guarded.get("/v1/models", headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "example.org"])
def test_another_host_demands_a_token(host):
    with pytest.raises(ConfigError, match="--token-file"):
        require_token(host, None)
    require_token(host, "token")
    for own in ("127.0.0.1", "localhost", "::1"):
        require_token(own, None)


def test_a_token_that_can_be_guessed_is_refused(tmp_path):
    (tmp_path / "short").write_text("secret\n")
    with pytest.raises(ConfigError, match="holds 6 characters"):
        ServeConfig(token_file=str(tmp_path / "short")).token()
    with pytest.raises(ConfigError, match="cannot be read"):
        ServeConfig(token_file=str(tmp_path / "none")).token()


def test_pages_of_other_sites_are_not_answered():
    named = client(hosts=("testserver",))
    assert named.get("/v1/models").status_code == 200
    assert "Host is evil.example, expected testserver" in problem(
        named.get("/v1/models", headers={"Host": "evil.example"}), 421
    )
    found = named.post(PREVIEW, headers={"Origin": "https://evil.example"}, **form(encoded(image_HWC())))
    assert "a page of another site" in problem(found, 403)
    own = named.post(PREVIEW, headers={"Origin": "http://testserver"}, **form(encoded(image_HWC())))
    assert own.status_code == 200
    asked = named.options(
        "/v1/models", headers={"Origin": "http://testserver", "Access-Control-Request-Method": "POST"}
    )
    assert not [name for name in asked.headers if name.startswith("access-control")]


def secured(found):
    """The answer, which must have the security headers."""
    assert "default-src 'none'" in found.headers["content-security-policy"]
    assert found.headers["x-content-type-options"] == "nosniff"
    assert found.headers["x-frame-options"] == "DENY"
    return found


def test_every_answer_has_the_security_headers(asked):
    for path in ("/", "/v1/models", "/nothing"):
        secured(asked.get(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Host", "["),
        ("Host", "[::1"),
        ("Origin", "http://["),
        ("Content-Length", "9" * 5000),
        ("Content-Length", "-1"),
    ],
)
def test_malformed_headers_are_a_problem_and_not_a_crash(asked, name, value):
    assert f"{name} is" in problem(secured(asked.get("/v1/models", headers={name: value})), 400)


@given(
    name=st.sampled_from(["host", "origin", "authorization", "content-length", "x-request-id"]),
    value=st.one_of(st.binary(max_size=40), st.from_regex(rb"[a-z0-9:/@\[\]%.\xbc-\xbe-]{0,20}", fullmatch=True)),
)
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_header_value_is_answered(guarded, name, value):
    scope = {"type": "http", "method": "GET", "path": "/v1/models", "headers": [(name.encode(), value)]}
    sent = []

    async def receive():
        return {"type": "http.request", "body": b""}

    async def send(message):
        sent.append(message)

    asyncio.run(guarded.app(scope, receive, send))
    assert sent[0]["status"] < 500


def test_an_error_of_the_middleware_is_a_problem_without_traceback(asked, monkeypatch):
    monkeypatch.setattr(type(asked.app), "_admit", lambda *_, **__: 1 / 0)
    assert "logged the cause" in problem(secured(asked.get("/v1/models")), 500)


@pytest.mark.parametrize(
    "path",
    ["/page/../app.py", "/page/%2e%2e/app.py", "/page//etc/passwd", "/v1/models/..%2f..%2fetc", "/v1/runs/..%2f"],
)
def test_no_path_of_a_request_leads_to_a_file(asked, path):
    assert asked.get(path).status_code in {404, 422}
    assert asked.get(path).headers["content-type"] == "application/problem+json"


# -- how much ----------------------------------------------------------------------------------------------------------


def test_too_many_bytes_are_refused_by_their_number_and_while_they_come(asked):
    big = b"x" * (1 << 19)
    assert "more than 262,144 bytes" in problem(asked.post(PREVIEW, **form(big)), 413)
    taken = []

    def endless():
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n'
        for part in [head, *[b"x" * 65536] * 1000]:
            taken.append(len(part))
            yield part

    found = asked.post(PREVIEW, content=endless(), headers={"Content-Type": "multipart/form-data; boundary=b"})
    assert "more than 262,144 bytes" in problem(found, 413)
    problem(asked.post(PREVIEW, content=b"x", headers={"Content-Length": "many"}), 400)


def lying_png(width, height):
    """A PNG of one row whose header names another size."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 30)) + chunk(b"IEND", b"")
    )


def test_too_many_pixels_are_refused_by_the_header(asked):
    detail = problem(asked.post(PREVIEW, **form(lying_png(60_000, 60_000))), 413)
    assert "60000 x 60000 px, 65,536 px are allowed" in detail
    problem(asked.post(PREVIEW, **form(encoded(np.zeros((300, 300, 3), np.uint8)))), 413)
    problem(asked.post(PREVIEW, **form(encoded(np.zeros((300, 300, 3), np.uint8), "JPEG"))), 413)
    problem(
        asked.post(PREVIEW, **form(encoded(np.zeros((300, 300, 3), np.uint8), "TIFF", compression="tiff_lzw"))), 413
    )


def test_a_header_that_lies_is_a_problem_and_not_a_crash(asked):
    assert "cannot be read" in problem(asked.post(PREVIEW, **form(lying_png(200, 200))), 422)


def test_more_requests_than_the_queue_holds_are_refused_at_once(asked):
    asked.app.busy["predictions and jobs"] = 2
    try:
        found = asked.post(PREVIEW, **form(encoded(image_HWC())))
        assert asked.get("/v1/models").status_code == 200
    finally:
        asked.app.busy.clear()
    assert "2 requests for predictions and jobs are already in progress" in problem(found, 503)
    assert int(found.headers["retry-after"]) >= 1
    assert asked.post(PREVIEW, **form(encoded(image_HWC()))).status_code == 200


def test_a_draining_server_refuses_requests(asked):
    asked.app.draining = True
    try:
        assert asked.get("/healthz").status_code == 503
        assert "is shutting down" in problem(asked.post(PREVIEW, **form(encoded(image_HWC()))), 503)
    finally:
        asked.app.draining = False


# -- what --------------------------------------------------------------------------------------------------------------


def tiff(path, **options):
    """Write a small GeoTIFF; return its path."""
    image_CHW = image_HWC(40, 50).transpose(2, 0, 1)
    place = {"crs": "EPSG:32650", "transform": rasterio.Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    with rasterio.open(
        path, "w", driver="GTiff", width=50, height=40, count=3, dtype="uint8", **place, **options
    ) as file:
        file.write(image_CHW)
    return path


def test_a_tiff_that_names_other_files_is_refused(readers, tmp_path):
    secret = tiff(tmp_path / "secret.tif")
    path = tiff(tmp_path / "points.tif")
    with rasterio.open(path, "r+") as file:
        file.update_tags(ns="OVERVIEWS", OVERVIEW_FILE=str(secret))
    with pytest.raises(DataError, match="refers to other files"):
        readers.read(path.read_bytes())


def test_sidecar_files_of_an_upload_are_ignored(readers, tmp_path):
    """GDAL in the reader's process knows three drivers, no network and no sidecars."""
    source, image = readers.read(tiff(tmp_path / "plain.tif").read_bytes())
    assert (source.crs, image.image_CHW.shape) == ("EPSG:32650", (3, 40, 50))
    np.testing.assert_array_equal(image.image_CHW, image_HWC(40, 50).transpose(2, 0, 1))
    environment = readers._environment
    assert {"VRT", "HTTP", "WMS", "PDF", "STACIT"} <= set(environment["GDAL_SKIP"].split(","))
    assert not {"PNG", "JPEG", "GTiff"} & set(environment["GDAL_SKIP"].split(","))
    assert environment["GDAL_DISABLE_READDIR_ON_OPEN"] == "EMPTY_DIR"
    assert not [name for name in environment if name.startswith("AWS")]


def test_a_palette_image_is_refused_as_a_mask(readers):
    sink = io.BytesIO()
    Image.fromarray(image_HWC()).quantize(8).save(sink, "PNG")
    with pytest.raises(DataError, match="palette"):
        readers.read(sink.getvalue())


def test_a_reader_that_dies_or_hangs_is_replaced(tmp_path):
    data = encoded(image_HWC())
    readers = DecoderPool(1, max_pixels=1 << 20, seconds=20)
    readers.read(data)
    child = readers._idle.get()
    child.process.kill()
    child.process.wait()
    readers._idle.put(child)
    assert readers.read(data)[1].image_CHW.shape == (3, 90, 130)
    readers.seconds = 0.0
    with pytest.raises(DataError, match="was not decoded within"):
        readers.read(data)
    readers.seconds = 20
    assert readers.read(data)[1] is not None
    readers.close()


# -- access log ----------------------------------------------------------------------------------------------


def test_every_request_is_a_line_with_its_id(asked, caplog):
    caplog.set_level(logging.INFO, logger="rayseg.serve")
    logging.getLogger("rayseg.serve").propagate = True
    found = asked.get("/v1/models", headers={"X-Request-ID": "mine-1"})
    assert found.headers["x-request-id"] == "mine-1"
    line = json.loads(middleware.JsonLines().format(caplog.records[-1]))
    assert (line["event"], line["path"], line["status"]) == ("request", "/v1/models", 200)
    assert len(asked.get("/v1/models").headers["x-request-id"]) == 32


@pytest.fixture
def lines():
    """() -> what was written down meanwhile."""
    sink = io.StringIO()
    handler = logging.StreamHandler(sink)
    handler.setFormatter(middleware.JsonLines())
    logging.getLogger("rayseg.serve").addHandler(handler)
    logging.getLogger("rayseg.serve").setLevel(logging.INFO)
    yield lambda: [json.loads(line) for line in sink.getvalue().splitlines()]
    logging.getLogger("rayseg.serve").removeHandler(handler)


@pytest.mark.parametrize("under_serve", [False, True])
@pytest.mark.parametrize("name", ["a b", "a\tb", "x" * 129])
def test_an_invalid_id_is_refused_under_that_id(name, under_serve, lines):
    """Serve's own middleware returns the client's id whatever it is."""
    app = served()
    app.names_requests = not under_serve
    asked = TestClient(RequestIdMiddleware(app) if under_serve else app, raise_server_exceptions=False)
    found = asked.get("/v1/models", headers={"X-Request-ID": name})
    assert "X-Request-ID is invalid" in problem(found, 400)
    assert found.json()["request_id"] == name
    assert found.headers.get_list("x-request-id") == [name]
    [line] = lines()
    assert (line["request_id"], line["status"]) == (name, 400)


def test_an_unexpected_error_is_a_problem_without_traceback(asked, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="rayseg.serve")
    monkeypatch.setattr("rayseg.serve.answers.picture", lambda *_: 1 / 0)
    found = asked.post(PREVIEW, **form(encoded(image_HWC())))
    assert "logged the cause" in problem(found, 500)
    assert "ZeroDivisionError" not in found.text
    assert [record for record in caplog.records if record.exc_info]


def test_requests_are_counted_by_route(asked):
    asked.get("/v1/models/none-1")
    text = asked.get("/metrics").text
    assert 'rayseg_requests_total{method="GET",route="/v1/models/{name}",status="404"}' in text
    assert "rayseg_request_seconds_bucket" in text


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/none", 404), ("DELETE", "/v1/models", 405)])
def test_errors_of_the_framework_are_problems(asked, method, path, status):
    assert "/docs" in problem(asked.request(method, path), status)


def test_a_form_without_an_image_is_refused(asked):
    assert "expected multipart/form-data" in problem(asked.post(PREVIEW, json={}), 415)
    assert "a file named image" in problem(asked.post(PREVIEW, files={"picture": b"x"}), 422)
    problem(asked.post(PREVIEW, content=b"junk", headers={"Content-Type": "multipart/form-data; boundary=b"}), 400)
    problem(asked.post(PREVIEW, content=b"junk", headers={"Content-Type": "multipart/form-data"}), 400)


def test_jobs_are_refused_unless_they_are_enabled(asked):
    assert "--set jobs=PREFIX" in problem(asked.post("/v1/jobs", json={"pipeline": "gpc", "region": "demo"}), 403)


def test_bundles_of_one_name_are_not_mixed_up(tmp_path):
    segmenter(tmp_path / "a/models/segmenter")
    segmenter(tmp_path / "b/models/segmenter")
    names = [row["name"] for row in client(tmp_path).get("/v1/models").json()["models"]]
    assert names == ["a-segmenter", "b-segmenter"]
    with pytest.raises(ConfigError, match="are both named segmenter"):
        client(tmp_path / "a", tmp_path / "b")


def test_head_is_answered_like_get_without_a_body(asked):
    for path in ("/", "/v1/models", "/healthz", "/page/style.css"):
        found, get = asked.head(path), asked.get(path)
        assert (found.status_code, found.content) == (200, b""), path
        assert found.headers["content-length"] == get.headers["content-length"]
    assert asked.head(PREVIEW).status_code == 405


@pytest.mark.parametrize("path", [PREVIEW, "/v1/unsupervised"])
def test_unknown_form_fields_are_refused(asked, path):
    found = asked.post(path, data={"treshold": "0.7"}, **form(encoded(image_HWC())))
    assert "unknown field 'treshold', expected: image" in problem(found, 422)


def test_a_json_body_that_is_too_large_is_a_413(tmp_path):
    jobs = client(jobs=str(tmp_path), max_bytes=1000)
    body = (b"x" * 600 for _ in range(2))  # without Content-Length
    problem(jobs.post("/v1/jobs", content=body, headers={"Content-Type": "application/json"}), 413)
