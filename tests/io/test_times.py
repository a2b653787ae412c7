"""Times are instants: their zone decides which is newer, and not their text."""

import json
from datetime import datetime, timedelta, timezone

import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine
from shapely.geometry import box, mapping

from rayseg.geo.grid import Grid, Window
from rayseg.io import stac_read, stac_write
from rayseg.io.labels import ingest_rasters
from rayseg.io.rasters import grids_of
from rayseg.io.sources import Source
from rayseg.io.times import utc_text

GRID = Grid("EPSG:32719", (10.0, 10.0), (0.0, 0.0))


@pytest.mark.parametrize(
    ("text", "utc"),
    [
        ("2021-06-01T12:00:00+02:00", "2021-06-01T10:00:00Z"),
        ("2021-06-01T00:30:00+05:45", "2021-05-31T18:45:00Z"),
        ("2020-12-31T20:00:00-10:00", "2021-01-01T06:00:00Z"),
        ("2021-06-01T12:00:00.9+02:00", "2021-06-01T10:00:00.900000Z"),
        ("2021-06-01", "2021-06-01T00:00:00Z"),
        ("2021-06-01 10:00:00", "2021-06-01T10:00:00Z"),
    ],
)
def test_every_spelling_becomes_utc(text, utc):
    assert utc_text(text) == utc


def test_a_datetime_of_any_zone_becomes_utc():
    assert utc_text(datetime(2021, 6, 1, 12, tzinfo=timezone(timedelta(hours=-3)))) == "2021-06-01T15:00:00Z"
    assert utc_text(datetime(2021, 6, 1)) == "2021-06-01T00:00:00Z"


def row(name, time, **properties):
    """A STAC item as JSON whose pixels are one band of GRID."""
    frame = {"proj:code": GRID.crs, "proj:shape": [8, 8], "proj:transform": [10, 0, 0, 0, -10, 0]}
    image = {"href": f"/x/{name}.tif", "type": "image/tiff", "bands": [{"name": "b", "data_type": "uint8"}]}
    place = {"geometry": mapping(box(0, 0, 1, 1)), "bbox": [0, 0, 1, 1], "links": []}
    head = {"type": "Feature", "stac_version": "1.1.0", "id": name, **place}
    return head | {"properties": {"datetime": time, **frame, **properties}, "assets": {"image": image}}


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        ("2021-06-01T11:00:00Z", "2021-06-01T12:00:00+02:00"),
        ("2020-12-31T23:00:00-04:00", "2021-01-01T02:00:00Z"),
        ("2021-06-01T09:00:00Z", "2021-06-01T12:59:59+04:00"),
        ("2021-06-01T09:00:00.9Z", "2021-06-01T09:00:00Z"),
        ("2021-06-01T09:00:00.90001Z", "2021-06-01T11:00:00.9+02:00"),
        ("2021-06-01T09:00:01Z", "2021-06-01T09:00:00.9Z"),
    ],
)
def test_the_newest_scene_is_first_whatever_the_zones_are(tmp_path, newer, older):
    (tmp_path / "a.json").write_text(
        json.dumps({"type": "FeatureCollection", "features": [row("a", older), row("b", newer)]})
    )
    items = stac_read.open_items(str(tmp_path / "a.json"))
    assert [item.id for item in items] == ["b", "a"]
    [(_, sources)] = grids_of([stac_read.source_of(item) for item in items][::-1])
    assert [source.item_id for source in sources] == ["b", "a"]


def test_fractions_of_a_second_stay_in_the_times_of_results(tmp_path):
    frame = (GRID.crs, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 8, 8, "uint8", None)
    times = ["2021-06-01T11:00:00.500000Z", "2021-06-01T11:00:00Z", "2021-06-01T10:59:59.900000Z"]
    sources = [Source(str(at), (), *frame, time) for at, time in enumerate(times)]
    item = stac_write.item_of("t", GRID, Window(0, 0, 8, 8), folder=tmp_path, files=[], sources=sources)
    properties = item.to_dict()["properties"]
    assert (properties["start_datetime"], properties["end_datetime"]) == (times[2], times[0])
    assert properties["datetime"] == times[0]
    for at, time in enumerate(times[1::-1]):  # the second is added to what is there
        made = pystac.Item(str(at), None, None, pystac.utils.str_to_datetime(time), {})
        stac_write.write_catalog(tmp_path / "cat", {"imagery": [made]})
    collection = json.loads((tmp_path / "cat/imagery/collection.json").read_text())
    assert collection["extent"]["temporal"]["interval"] == [[times[1], times[0]]]


def test_an_interval_counts_from_its_start(tmp_path):
    times = {"start_datetime": "2021-01-01T01:00:00+02:00", "end_datetime": "2021-12-31T00:00:00+02:00"}
    rows = [row("year", None, **times), row("day", "2020-12-31T23:30:00Z")]
    (tmp_path / "a.json").write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    assert [item.id for item in stac_read.open_items(str(tmp_path / "a.json"))] == ["day", "year"]


def test_results_and_collections_are_written_in_utc(tmp_path):
    frame = (GRID.crs, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 8, 8, "uint8", None)
    times = ["2021-06-01T12:00:00+02:00", "2021-06-01T11:00:00Z", "2021-05-31T23:00:00-09:00"]
    sources = [Source(str(at), (), *frame, time) for at, time in enumerate(times)]
    item = stac_write.item_of("t", GRID, Window(0, 0, 8, 8), folder=tmp_path, files=[], sources=sources)
    properties = item.to_dict()["properties"]
    names = ("start_datetime", "datetime", "end_datetime")
    assert [properties[name] for name in names] == ["2021-06-01T08:00:00Z"] + ["2021-06-01T11:00:00Z"] * 2
    zone = timezone(timedelta(hours=5))
    made = [
        pystac.Item(str(at), None, None, datetime(2021, 6, 1, hour, tzinfo=tz), {})
        for at, (hour, tz) in enumerate([(4, zone), (0, timezone.utc), (6, zone)])  # noqa: UP017
    ]
    stac_write.write_catalog(tmp_path / "cat", {"imagery": made})
    row = json.loads((tmp_path / "cat/imagery/collection.json").read_text())
    assert row["extent"]["temporal"]["interval"] == [["2021-05-31T23:00:00Z", "2021-06-01T01:00:00Z"]]


@pytest.mark.parametrize(
    ("tags", "utc"),
    [
        ({"TIFFTAG_DATETIME": "2021:11:30 07:17:56"}, "2021-11-30T07:17:56Z"),
        ({"TIFFTAG_DATETIME": "2021-11-30T07:17:56+08:00"}, "2021-11-29T23:17:56Z"),
        ({"EXIF_DateTimeOriginal": "2021:11:30 07:17:56", "EXIF_OffsetTimeOriginal": "-03:00"}, "2021-11-30T10:17:56Z"),
        (
            {"EXIF_DateTimeOriginal": "0000:00:00 00:00:00", "EXIF_DateTime": "2020:01:02 03:04:05"},
            "2020-01-02T03:04:05Z",
        ),
    ],
)
def test_an_image_is_taken_at_the_time_in_its_tags(tmp_path, tags, utc):
    place = {"crs": GRID.crs, "transform": Affine(10, 0, 300_000, 0, -10, 7_000_000)}
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", 8, 8, 1, dtype="uint8", **place) as file:
        file.write(np.ones((1, 8, 8), np.uint8))
        file.update_tags(**tags)
    [item] = stac_read.open_items(ingest_rasters(tmp_path / "a.tif", tmp_path / "cat"))
    assert item.to_dict()["properties"]["datetime"] == utc
