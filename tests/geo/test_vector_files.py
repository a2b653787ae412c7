"""Vector files: few formats are opened, and a row without a geometry costs no other."""

import json
import re

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from shapely.geometry import Point, Polygon, box, shape
from small_world import refused

import rayseg
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Window
from rayseg.geo.region import resolve_region
from rayseg.geo.vector_files import read_frame
from rayseg.io.instances import Polygons

DRIVERS = {".geojson": "GeoJSON", ".gpkg": "GPKG", ".fgb": "FlatGeobuf", ".shp": "ESRI Shapefile", ".parquet": None}
SQUARES = [box(k, -k, k + 0.5, 0.5 - k) for k in range(4)]


def write(path, shapes, crs="EPSG:4326", **columns):
    frame = geopandas.GeoDataFrame(columns, geometry=shapes, crs=crs)
    options = {"SPATIAL_INDEX": "NO"} if path.suffix == ".fgb" else {}  # which takes no null geometry
    if path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_file(path, driver=DRIVERS[path.suffix], **options)
    return path


@pytest.mark.parametrize("suffix", DRIVERS)
@pytest.mark.parametrize("lost", [(0,), (1, 3)])
def test_rows_without_a_geometry_are_left_out_and_named(tmp_path, caplog, suffix, lost):
    shapes = [None if at in lost else square for at, square in enumerate(SQUARES)]
    path = write(tmp_path / f"plots{suffix}", shapes, id=["a", "b", "c", "d"])
    frame = read_frame(path)
    kept = [at for at in range(4) if at not in lost]
    assert [one.equals(SQUARES[at]) for one, at in zip(frame.geometry, kept, strict=True)] == [True] * len(kept)
    assert f"{len(lost)} of 4 rows of {path} have no geometry and are left out: " in caplog.text
    assert all(f"{at + 1} (id {'abcd'[at]})" in caplog.text for at in lost)
    plots = Polygons.open(str(path))
    ids_HW = plots.ids(Grid("EPSG:4326", (0.25, 0.25), (0.0, 0.5)), Window(0, 0, 16, 16))
    assert np.bincount(ids_HW.ravel()).tolist()[1:] == [4] * len(kept)


@pytest.mark.parametrize("suffix", [".geojson", ".parquet"])
def test_a_region_is_that_of_the_rows_that_have_a_geometry(tmp_path, caplog, suffix):
    path = write(tmp_path / f"r{suffix}", [SQUARES[0], None, SQUARES[2], Polygon()])
    assert shape(resolve_region(str(path)).geometry).area == pytest.approx(0.5)
    assert "2 of 4 rows of" in caplog.text
    none = write(tmp_path / f"none{suffix}", [None, None])
    with pytest.raises(DataError, match="is empty, expected a polygon"):
        resolve_region(str(none))


KML = """<?xml version="1.0"?><kml xmlns="http://www.opengis.net/kml/2.2"><Placemark><Polygon><outerBoundaryIs><LinearRing>
<coordinates>0,0 1,0 1,1 0,0</coordinates></LinearRing></outerBoundaryIs></Polygon></Placemark></kml>"""
TOPOLOGY = {
    "type": "Topology",
    "arcs": [[[0, 0], [1, 0], [1, 1], [0, 0]]],
    "objects": {"a": {"type": "Polygon", "arcs": [[0]]}},
}
ESRI = {
    "geometryType": "esriGeometryPolygon",
    "features": [{"geometry": {"rings": [[[0, 0], [0, 1], [1, 1], [0, 0]]]}}],
}
OTHERS = {
    "a.kml": KML,
    "b.geojson": KML,
    "c.geojson": json.dumps(TOPOLOGY),
    "d.json": json.dumps(ESRI),
    "e.gpkg": "<OGRVRTDataSource><OGRVRTLayer name='a'><SrcDataSource>/etc/a.shp</SrcDataSource></OGRVRTLayer>",
    "f.shp": "id,wkt\n1,POINT(0 0)\n",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_formats_are_shut_whatever_the_name_is(tmp_path, name):
    (tmp_path / name).write_text(OTHERS[name])
    for read in (read_frame, lambda path: Polygons.open(str(path))):
        with pytest.raises(DataError, match=r"not a GeoJSON, GeoPackage, .*--allow-driver"):
            read(tmp_path / name)


def test_another_format_is_opened_when_its_driver_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "a.kml").write_text(KML)
    monkeypatch.setenv("RAYSEG_ALLOW_DRIVER", "libkml")
    assert [one.area for one in read_frame(tmp_path / "a.kml").geometry] == [0.5]


def test_lines_and_points_among_polygons_are_counted(tmp_path, caplog):
    path = write(tmp_path / "a.gpkg", [SQUARES[0], Point(3, 3)])
    assert len(Polygons.open(str(path)).frame) == 1
    assert "1 of 2 rows of" in caplog.text


def test_a_file_of_several_layers_says_which_is_read(tmp_path, caplog):
    for layer, polygon in (("fields", SQUARES[0]), ("roads", SQUARES[1])):
        geopandas.GeoDataFrame(geometry=[polygon], crs="EPSG:4326").to_file(tmp_path / "a.gpkg", layer=layer)
    assert read_frame(tmp_path / "a.gpkg").geometry.tolist() == [SQUARES[0]]
    assert "a.gpkg has the layers fields, roads, only fields is read" in caplog.text


def test_a_region_file_of_another_format_is_refused_in_one_sentence(tmp_path):
    (tmp_path / "r.json").write_text(json.dumps(TOPOLOGY))
    said = refused(3, "predict", "model", tmp_path / "r.json", "--out", tmp_path / "run")
    assert "r.json is neither a file of polygons nor STAC: " in said
    assert not (tmp_path / "run").exists()


def damaged(tmp_path, kind):
    """A file of squares with this damage."""
    suffix = f".{kind.partition(' ')[0]}"
    path = write(tmp_path / f"damaged{suffix}", SQUARES, id=["a", "b", "c", "d"])
    content = path.read_bytes()
    if "without" in kind:
        path.with_suffix(f".{kind[-3:]}").unlink()
    elif "half" in kind:
        path.write_bytes(content[: len(content) // 2])
    elif "ends early" in kind:
        path.write_bytes(content[:-6])
    elif "head" in kind:
        path.write_bytes(content[:8])
    elif "open ring" in kind:
        path.write_text(json.dumps({"type": "Polygon", "coordinates": [[[1, 2], [3, 4]]]}))
    elif "NaN" in kind:
        path.write_text(content.decode().replace("1.5", "NaN"))
    else:  # geometries that are not WKB
        table = pq.read_table(path)
        other = pa.array([b"\x01\x02nonsense"] * 4, pa.binary())
        at = table.schema.get_field_index("geometry")
        pq.write_table(table.set_column(at, "geometry", other).replace_schema_metadata(table.schema.metadata), path)
    return path


DAMAGES = [
    *("parquet half", "parquet ends early", "parquet not WKB", "gpkg half", "fgb half", "fgb head", "fgb ends early"),
    *("geojson half", "geojson ends early", "geojson open ring", "geojson NaN", "shp without shx", "shp half"),
]


@pytest.mark.parametrize("kind", [kind for kind in DAMAGES if kind != "shp half"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore:Non closed ring")
def test_a_damaged_file_is_named_in_one_sentence(tmp_path, kind):
    path = damaged(tmp_path, kind)
    for read in (read_frame, Polygons.open, lambda path: resolve_region(str(path))):
        with pytest.raises(DataError, match=re.escape(str(path))):
            read(str(path))


def test_rows_beyond_the_end_of_a_shapefile_are_named(tmp_path, caplog):
    frame = read_frame(damaged(tmp_path, "shp half"))
    assert 0 < len(frame) < 4
    assert f"{4 - len(frame)} of 4 rows of" in caplog.text


def test_damaged_results_of_a_run_are_named(tmp_path):
    """By the Python API and by exports."""
    root = tmp_path / "run"
    (root / "steps" / "polygons").mkdir(parents=True)
    damaged(tmp_path, "parquet half").rename(root / "gpc.parquet")
    (root / "steps/polygons/done.json").write_text(json.dumps({"value": {"polygons": "gpc.parquet"}}))
    steps = {"polygons": {"polygons": "<run>/gpc.parquet"}}
    (root / "run.json").write_text(json.dumps({"pipeline": "gpc", "status": "done", "region": {}, "steps": steps}))
    with pytest.raises(DataError, match=r"gpc\.parquet cannot be read"):
        rayseg.open(root).polygons  # noqa: B018
    assert "gpc.parquet is damaged" in refused(3, "export", root, "--format", "gpkg", "--out", tmp_path / "out")
    (root / "gpc.parquet").rename(tmp_path / "plots.parquet")
    assert "plots.parquet cannot be read" in refused(3, "labels", "export", tmp_path, tmp_path, "--out", tmp_path / "x")
