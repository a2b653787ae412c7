"""Catalogues behind a STAC API on loopback: pages are followed to their end, and to an end."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rayseg.errors import ConfigError, DataError
from rayseg.io import remote, stac_catalog, stac_read

CORE = "https://api.stacspec.org/v1.0.0/"
CONFORMS = [CORE + part for part in ("core", "item-search", "item-search#query", "collections")]
SQUARE = {"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]]}


def feature(number):
    return {
        "type": "Feature", "stac_version": "1.0.0", "id": f"item-{number}", "collection": "scenes",
        "geometry": SQUARE, "bbox": [0, 0, 1, 1], "links": [], "assets": {"image": {"href": f"https://h/{number}.tif"}},
        "properties": {"datetime": f"2020-01-{number % 28 + 1:02d}T00:00:00Z"},
    }  # fmt: skip


class Api(ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.items, self.asked, self.endless, self.broken, self.wait = 25, [], False, 0, ""
        self.url = f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        links = [{"rel": rel, "href": self.server.url, "type": "application/json"} for rel in ("self", "root")]
        search = {"rel": "search", "href": f"{self.server.url}search", "type": "application/geo+json", "method": "POST"}
        self.answer(
            {"type": "Catalog", "id": "api", "stac_version": "1.0.0", "description": "d", "conformsTo": CONFORMS,
             "links": [*links, search]}
        )  # fmt: skip

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append(asked)
        if self.server.broken:
            self.server.broken -= 1
            self.answer({"code": "Unavailable"}, 503)
            return
        start = asked.get("token", 0)
        rows = [feature(n) for n in range(start, min(start + 10, self.server.items))]
        after = start if self.server.endless else start + 10
        more = after < self.server.items
        link = {"rel": "next", "href": f"{self.server.url}search", "method": "POST", "body": asked | {"token": after}}
        self.answer({"type": "FeatureCollection", "features": rows, "links": [link] if more else []})

    def answer(self, row, status=200):
        content = json.dumps(row).encode()
        self.send_response(status)
        if status != 200 and self.server.wait:
            self.send_header("Retry-After", self.server.wait)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def api():
    server = Api()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_all_pages_are_followed_and_the_question_is_asked_whole(api):
    question = "scenes&datetime=2020-01-01/2020-02-01&query=eo:cloud_cover<20,eo:cloud_cover>=0.5,platform=s2a&limit=10"
    found = stac_read.open_items(api.url, question, geometry=SQUARE)
    assert {item.id for item in found} == {f"item-{n}" for n in range(25)}
    first = api.asked[0]
    assert first["collections"] == ["scenes"]
    assert first["intersects"]["type"] == "Polygon"
    assert first["datetime"].startswith("2020-01-01T00:00:00Z/2020-02-01")
    assert first["query"] == {"eo:cloud_cover": {"lt": 20, "gte": 0.5}, "platform": {"eq": "s2a"}}
    assert len(api.asked) == 3


def test_an_api_without_an_end_is_left(api):
    api.endless = True
    with pytest.raises(DataError, match="does not end"):
        stac_read.open_items(api.url, "scenes", geometry=SQUARE)
    assert len(api.asked) <= 5


def test_an_api_with_more_items_than_can_be_mapped_is_left(api, monkeypatch):
    monkeypatch.setattr(stac_catalog, "MOST_ITEMS", 15)
    with pytest.raises(DataError, match="the limit is 15"):
        stac_read.open_items(api.url, "scenes", geometry=SQUARE)


def test_a_busy_api_is_asked_again(api):
    api.broken = 1
    assert len(stac_read.open_items(api.url, "scenes", geometry=SQUARE)) == 25


def test_the_wait_that_a_busy_api_requests_counts_and_one_that_stays_busy_is_named(api, monkeypatch):
    pauses = []
    monkeypatch.setattr(remote.patiently, "__kwdefaults__", {"pause": pauses.append})
    api.broken, api.wait = 1, "7"
    assert len(stac_read.open_items(api.url, "scenes", geometry=SQUARE)) == 25
    assert pauses == [7.0]
    api.broken, api.wait = 99, ""
    with pytest.raises(DataError, match=r"STAC API .* cannot be searched: .*Unavailable"):
        stac_read.open_items(api.url, "scenes", geometry=SQUARE)
    assert pauses[1:] == list(stac_catalog.API_WAITS)


def test_a_region_without_items_and_words_that_are_none_are_refused(api):
    api.items = 0
    with pytest.raises(DataError, match="holds no items"):
        stac_read.open_items(api.url, "scenes", geometry=SQUARE)
    with pytest.raises(ConfigError, match="is not a search parameter"):
        stac_read.open_items(api.url, "scenes&clouds=3", geometry=SQUARE)
    with pytest.raises(ConfigError, match="is not a condition"):
        stac_read.open_items(api.url, "scenes&query=cloudless", geometry=SQUARE)


@pytest.mark.parametrize(
    "text",
    [
        "nonsense",
        "2020-13-01",
        "2020-01-01/2020-02-01/2020-03-01",
        "yesterday/..",
        "2020-02-31",
        "2020-01-01T25:00:00Z",
    ],
)
def test_a_datetime_that_is_not_a_time_is_refused_before_the_search(text):
    with pytest.raises(ConfigError, match=f"datetime={text} is not a time, expected 2020"):
        stac_catalog._parameters(f"scenes&datetime={text}")


@pytest.mark.parametrize(
    "text", ["2020", "2020-06", "../2020-06-30", "2020-01-01T00:00:00Z/2020-06-30T12:00:00.5+02:00"]
)
def test_times_as_the_api_takes_them_are_passed_on(text):
    assert stac_catalog._parameters(f"scenes&datetime={text}") == (["scenes"], {"datetime": text})
