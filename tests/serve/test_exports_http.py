"""Runs for other programs: TileJSON, WMTS, STAC and files; other sites, compression, the limit of rate, OpenAPI."""

import gzip
import json
import subprocess
import sys
from xml.etree import ElementTree

import pystac
import pytest
import rasterio
from fake_run import blobs, make, picture
from small_world import catalogue, finished, segmenter
from tiny_server import client, encoded, form, image_HWC, listening, served

from rayseg.geo.grid import Grid
from rayseg.serve import web

TOKEN = "a-token-of-more-than-16-characters"
SITE = "https://maps.example.org"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A run on Earth with all its files, and one over an image without georeference."""
    root = tmp_path_factory.mktemp("runs")
    segmenter(root / "model")
    catalogue(root / "imagery", scene={})
    finished(root / "runs/map", "predict", root / "model", root / "imagery/scene.tif", "--engine", "inline")
    mask = blobs(64, 64)
    make(root / "runs/photo", {"photo": (picture(mask), mask, (0, 0))}, grid=Grid(None, (1.0, 1.0), (0.0, 0.0)))
    return root / "runs"


@pytest.fixture(scope="module")
def asked(root):
    return client(runs=(str(root),))


def test_tilejson_names_the_tiles_and_their_bounds(asked):
    said = asked.get("/v1/runs/map/tilejson.json").json()
    assert said["tiles"] == ["http://testserver/v1/runs/map/tiles/{z}/{x}/{y}.png?layer=classes"]
    assert said["bounds"] == asked.get("/v1/runs/map").json()["bounds"]
    assert said["minzoom"] == 0
    assert "layer=imagery" in asked.get("/v1/runs/map/tilejson.json?layer=imagery").json()["tiles"][0]
    flat = asked.get("/v1/runs/photo/tilejson.json")
    assert flat.status_code == 422
    assert "has no CRS" in flat.json()["detail"]


def test_gdal_reads_the_map_over_wmts(root):
    with rasterio.open(next((root / "map").glob("tiles/*/classes.tif"))) as own:
        bounds = rasterio.warp.transform_bounds(own.crs, "EPSG:3857", *own.bounds)
    app = served(runs=(str(root),))
    with listening(app) as address, rasterio.open(f"WMTS:{address}/v1/runs/map/wmts,layer=classes") as file:
        assert file.crs.to_epsg() == 3857
        window = rasterio.windows.from_bounds(*bounds, file.transform)
        pixels = file.read(window=window, out_shape=(file.count, 64, 64))
    assert {(0, 158, 115)} <= {tuple(pixel) for pixel in pixels[:3].reshape(3, -1).T.tolist()}


def test_wmts_escapes_what_a_client_sends(asked):
    found = asked.get("/v1/runs/map/wmts", headers={"Host": "a&b"})
    assert found.status_code == 200
    assert found.headers["content-type"] == "application/xml"
    ElementTree.fromstring(found.text)


def test_the_collection_leads_to_items_and_rasters(root):
    with listening(served(runs=(str(root),))) as address:
        collection = pystac.Collection.from_file(f"{address}/v1/runs/map/stac")
        items = list(collection.get_items())
        assert items
        href = items[0].assets["classes"].get_absolute_href()
        assert href.startswith(f"{address}/v1/runs/map/files/tiles/")
        # In another process: rasterio keeps Python's lock, which this process's server needs, while it opens a URL.
        words = [sys.executable, "-c", "import rasterio, sys; print(rasterio.open(sys.argv[1]).checksum(1))", href]
        sum_ = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    with rasterio.open(root / "map/tiles" / items[0].id / "classes.tif") as own:
        assert int(sum_) == own.checksum(1)


@pytest.mark.parametrize(
    ("header", "status", "part"),
    [
        ("", 200, slice(None)),
        ("bytes=0-9", 206, slice(0, 10)),
        ("bytes=5-", 206, slice(5, None)),
        ("bytes=-7", 206, slice(-7, None)),
        ("bytes=3-999999999", 206, slice(3, None)),
        ("bytes=0-1,4-5", 200, slice(None)),
        ("rows=1-2", 200, slice(None)),
        ("bytes=99999999-", 416, None),
        ("bytes=5-4", 416, None),
    ],
)
def test_files_are_answered_in_ranges(root, asked, header, status, part):
    data = (root / "map/items.parquet").read_bytes()
    found = asked.get("/v1/runs/map/files/items.parquet", headers={"Range": header} if header else {})
    assert found.status_code == status
    if part:
        assert found.content == data[part]
        assert int(found.headers["content-length"]) == len(data[part])
    if status == 206:
        start = part.indices(len(data))[0]
        assert found.headers["content-range"] == f"bytes {start}-{start + len(found.content) - 1}/{len(data)}"
    if status == 416:
        assert found.headers["content-range"] == f"bytes */{len(data)}"
        assert found.headers["content-type"] == "application/problem+json"


def test_a_file_that_the_client_has_is_not_sent_again(asked):
    first = asked.get("/v1/runs/map/files/items.parquet")
    again = asked.get("/v1/runs/map/files/items.parquet", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    stale = {"Range": "bytes=0-3", "If-Range": '"other"'}
    assert asked.get("/v1/runs/map/files/items.parquet", headers=stale).content == first.content
    head = asked.head("/v1/runs/map/files/items.parquet")
    assert (head.headers["content-length"], head.content) == (first.headers["content-length"], b"")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "run.json",
            ".lock",
            "steps/predict/manifest.parquet",
            "tiles/none/classes.tif",
            "tiles/../run.json",
            "tiles",
        ),
        *("..%2fphoto/collection.json", "tiles/..%2f..%2fphoto/collection.json", "/etc/passwd", "qgis/../run.json"),
    ],
)
def test_only_what_a_run_publishes_is_a_file(asked, path):
    found = asked.get(f"/v1/runs/map/files/{path}")
    assert found.status_code == 404
    assert found.headers["content-type"] == "application/problem+json"


def test_files_need_the_token(root, tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    guarded = client(runs=(str(root),), token_file=str(tmp_path / "token"))
    for path in ("files/items.parquet", "wmts", "stac", "tilejson.json"):
        assert guarded.get(f"/v1/runs/map/{path}").status_code == 401
    allowed = guarded.get("/v1/runs/map/files/items.parquet", headers={"Authorization": f"Bearer {TOKEN}"})
    assert allowed.status_code == 200


# -- other sites, compression, rate ------------------------------------------------------------------------------------


def test_pages_of_allowed_sites_may_send_requests(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    asked = client(cors_origins=(SITE,), token_file=str(tmp_path / "token"))
    before = {
        "Origin": SITE,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    preflight = asked.options("/v1/models", headers=before)
    assert preflight.status_code == 204
    assert preflight.headers["access-control-allow-origin"] == SITE
    assert "Authorization" in preflight.headers["access-control-allow-headers"]
    found = asked.get("/v1/models", headers={"Origin": SITE, "Authorization": f"Bearer {TOKEN}"})
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (200, SITE)
    assert found.headers["cross-origin-resource-policy"] == "cross-origin"
    refused = asked.get("/v1/models", headers={"Origin": SITE})  # the page can read why
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, SITE)
    for origin in ("https://evil.example", "null", f"{SITE}.evil.example"):
        other = asked.options("/v1/models", headers=before | {"Origin": origin})
        assert other.status_code in {401, 403}
        assert "access-control-allow-origin" not in other.headers
    assert client(cors_origins=("*",)).get("/v1/models", headers={"Origin": "https://a.example"}).status_code == 200


def test_texts_are_compressed_and_images_are_not(asked):
    plain = asked.get("/openapi.json", headers={"Accept-Encoding": "identity"})
    assert "content-encoding" not in plain.headers
    with asked.stream("GET", "/openapi.json", headers={"Accept-Encoding": "gzip"}) as found:
        raw = b"".join(found.iter_raw())
    assert found.headers["content-encoding"] == "gzip"
    assert "Accept-Encoding" in found.headers["vary"]
    assert int(found.headers["content-length"]) == len(raw) < len(plain.content) / 3
    assert gzip.decompress(raw) == plain.content
    image = asked.post("/v1/preview", headers={"Accept-Encoding": "gzip"}, **form(encoded(image_HWC())))
    assert (image.status_code, image.headers.get("content-encoding")) == (200, None)
    assert "content-encoding" not in asked.get("/openapi.json", headers={"Accept-Encoding": "gzip;q=0"}).headers


def test_a_client_has_a_limit_of_requests(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(web, "monotonic", lambda: now[0])
    asked = client(requests_per_minute=60)
    codes = [asked.get("/v1/models").status_code for _ in range(12)]
    assert codes == [200] * 10 + [429] * 2
    refused = asked.get("/v1/models")
    assert refused.headers["retry-after"] == "1"
    assert asked.get("/healthz").status_code == 200  # for whoever watches the server
    now[0] = 1.0
    assert asked.get("/v1/models").status_code == 200
    assert asked.get("/v1/models").status_code == 429


def test_openapi_states_the_token_schemas_and_problems(tmp_path):
    (tmp_path / "token").write_text(TOKEN)
    guarded = client(token_file=str(tmp_path / "token"))
    said = guarded.get("/openapi.json", headers={"Authorization": f"Bearer {TOKEN}"}).json()
    assert said["components"]["securitySchemes"] == {"token": {"type": "http", "scheme": "bearer"}}
    assert said["security"] == [{"token": []}]
    predict = said["paths"]["/v1/models/{name}/predict"]["post"]
    assert {"multipart/form-data", "image/tiff"} <= set(predict["requestBody"]["content"])
    fields = predict["requestBody"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert {"image", "threshold", "bands", "min_area", "simplify", "layers"} == set(fields)
    assert predict["responses"]["200"]["content"]["application/json"]["schema"]["oneOf"][0]["example"]
    for path, methods in said["paths"].items():
        for operation in methods.values():
            assert {"401", "503"} <= set(operation["responses"]), path
            for status, answer in operation["responses"].items():
                if int(status) >= 400:
                    assert "application/problem+json" in answer["content"], (path, status)
    assert "securitySchemes" not in client().get("/openapi.json").json()["components"]
    assert "ValidationError" not in json.dumps(said)
