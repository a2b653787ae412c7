"""A run in GIS formats: the same polygons and pixels, and a QGIS project that QGIS draws in our colours."""

import json
import shutil
import subprocess
import sys
import warnings
import xml.etree.ElementTree as ET
from pathlib import Path

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from fake_run import GPC, UTM, blobs, make, picture
from rio_cogeo.cogeo import cog_validate
from small_world import refused

import rayseg as public
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid
from rayseg.io import cog, export, maps, qgis
from rayseg.io.cog import read_bands
from rayseg.io.polygonize import polygonize
from rayseg.store import upath

PIXELS = Grid(None, (1.0, 1.0), (0.0, 0.0))
RENDER = Path(__file__).with_name("render_qgis.py")


def finished(root, *, grid=UTM, column=None):
    """A run with 130 x 150 px of two classes in tiles of 64 px, scores and polygons."""
    map_HW = blobs(130, 150)
    make(root, {"scene": (picture(map_HW), map_HW, (0, 0))}, grid=grid)
    for tile in maps.mapped_tiles(root):
        values_HW = read_bands(tile.href)[0]
        scores_HW = np.where(values_HW == 255, 255, np.where(values_HW == 1, 200, 20)).astype(np.uint8)
        path = Path(tile.href).with_name("scores.tif")
        cog.write_scores(path, scores_HW[None], tile.tile.grid, tile.tile.window, ["gpc"])
    polygonize(str(root), str(root / "gpc.parquet"))
    if column:
        frame = gpd.read_parquet(root / "gpc.parquet")
        frame.assign(**{column: range(1, len(frame) + 1)}).to_parquet(root / "gpc.parquet")
    done = root / "steps" / "polygons" / "done.json"
    done.parent.mkdir(parents=True)
    done.write_text(json.dumps({"value": {"polygons": "gpc.parquet"}}))
    return map_HW


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("export") / "run"
    return root, finished(root)


@pytest.mark.parametrize("kind", ["gpkg", "shp", "fgb", "geojson", "parquet"])
def test_polygons_are_the_same_in_every_format(run, tmp_path, kind):
    root, _ = run
    paths = export.export(root, kind, tmp_path)
    [path] = [path for path in paths if path.endswith(kind)]
    frame = gpd.read_parquet(path) if kind == "parquet" else gpd.read_file(path)
    expected = gpd.read_parquet(root / "gpc.parquet")
    assert frame.crs.to_epsg() == 4326
    assert len(frame) == len(expected) > 5
    order = ["area_m2", "pixels"]
    frame, expected = (part.sort_values(order, ignore_index=True) for part in (frame, expected))
    assert frame["pixels"].tolist() == expected["pixels"].tolist()
    assert frame["name"].tolist() == expected["name"].tolist()
    assert (shapely.area(shapely.symmetric_difference(frame.geometry.values, expected.geometry.values)) < 1e-12).all()


def test_polygons_of_an_image_lie_over_the_image_in_a_gis(tmp_path):
    root = tmp_path / "run"
    finished(root, grid=PIXELS)
    [path] = export.export(root, "gpkg", tmp_path / "out")
    frame = gpd.read_file(path)
    west, south, east, north = frame.total_bounds
    assert (west >= 0, east <= 150, south >= -130, north <= 0) == (True,) * 4
    tiles = {tile.tile.window.row: tile for tile in maps.mapped_tiles(root)}
    with rasterio.open(tiles[64].href) as file:
        assert file.bounds.top == -64
    with pytest.raises(DataError, match="images without georeference"):
        qgis.save(root)


def test_one_cog_holds_all_tiles(run, tmp_path):
    root, map_HW = run
    classes, scores = export.export(root, "cog", tmp_path)
    for path in (classes, scores):
        assert cog_validate(path, strict=True)[:2] == (True, [])
    with rasterio.open(classes) as file:
        assert np.array_equal(file.read(1), map_HW)
        assert file.crs.to_epsg() == 32650
        assert file.colormap(1)[1][:3] == GPC.colors[1]
        assert json.loads(file.tags(1)["classes"]) == {"0": "background", "1": "gpc"}
    with rasterio.open(scores) as file:
        assert np.array_equal(file.read(1) == 200, map_HW == 1)


def test_what_cannot_be_exported_is_one_sentence(run, tmp_path):
    root, _ = run
    with pytest.raises(ConfigError, match="'kml' is unknown, expected one of gpkg, shp"):
        export.export(root, "kml", tmp_path)
    make(tmp_path / "run", {"scene": (picture(blobs(64, 64)), blobs(64, 64), (0, 0))})
    with pytest.raises(DataError, match="neither polygons nor plots"):
        export.export(tmp_path / "run", "gpkg")
    (tmp_path / "run/steps/polygons").mkdir(parents=True)
    (tmp_path / "run/steps/polygons/done.json").write_text('{"value": {"poly')  # of a power failure
    with pytest.raises(DataError, match="neither polygons nor plots"):
        export.export(tmp_path / "run", "gpkg")


def test_a_vrt_holds_all_tiles_and_paints_no_background(run):
    root, map_HW = run
    qgis.save(root)
    with rasterio.open(root / "qgis" / "classes.vrt") as file:
        assert np.array_equal(file.read(1), map_HW)
        assert file.colormap(1)[0][3] == 0
        assert file.colormap(1)[1] == (*GPC.colors[1], 255)
        assert file.nodata == 255


def test_a_moved_project_finds_its_files(run, tmp_path):
    root, map_HW = run
    public.open(str(root)).save_qgis()
    moved = tmp_path / "elsewhere"
    shutil.copytree(root, moved)
    project = ET.parse(moved / "qgis" / "map.qgs").getroot()
    sources = [node.text for node in project.iter("datasource")]
    assert sources == ["./gpc.fgb", "./classes.vrt", "./scores.vrt"]
    assert str(root) not in (moved / "qgis" / "map.qgs").read_text() + (moved / "qgis" / "classes.vrt").read_text()
    for source in sources:
        assert (moved / "qgis" / source).with_suffix(".qml").exists()
    with rasterio.open(moved / "qgis" / "classes.vrt") as file:
        assert np.array_equal(file.read(1), map_HW)


def test_the_colours_of_all_styles_are_those_of_the_class_table(run):
    root, _ = run
    qgis.save(root)
    palette = ET.parse(root / "qgis" / "classes.qml").getroot().iter("paletteEntry")
    assert [(node.get("value"), node.get("label"), node.get("color"), node.get("alpha")) for node in palette] == [
        ("0", "background", "#000000", "0"),
        ("1", "gpc", "#009E73", "255"),
    ]
    assert "outline_color" in (style := (root / "qgis" / "gpc.qml").read_text())
    assert "0,158,115,255" in style


def _qgis():
    """A Python that has QGIS, or ""."""
    python = shutil.which("python3", path="/usr/bin") or ""
    words = [python, "-c", "import qgis.core"]
    return python if python and not subprocess.run(words, check=False, capture_output=True).returncode else ""


@pytest.mark.more
def test_qgis_draws_the_classes_in_their_colours(tmp_path):
    if not (python := _qgis()):
        pytest.skip("QGIS is not installed")
    root = tmp_path / "run"
    map_HW = finished(root, column="number")
    qgis.save(root)
    png = tmp_path / "map.png"
    words = [python, str(RENDER), str(root / "qgis" / "map.qgs"), str(png), "classes"]
    env = {"PATH": "/usr/bin", "HOME": str(tmp_path)}  # without the paths of this Python
    said = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True, env=env)
    found = json.loads(said.stdout.splitlines()[-1])
    assert found["crs"] == "EPSG:32650"
    assert set(found["layers"]) == {"gpc", "classes", "scores"}
    assert all(layer["valid"] for layer in found["layers"].values())
    assert found["layers"]["gpc"]["count"] == len(gpd.read_parquet(root / "gpc.parquet"))
    with rasterio.open(png) as image:
        pixels_CN = image.read([1, 2, 3]).reshape(3, -1)
    cover = (GPC.colors[1] == pixels_CN.T).all(axis=1).sum()
    rest = (pixels_CN.T == 255).all(axis=1).sum()
    # the image is square, the map 150 x 130: white is background, too, as it is transparent
    assert cover / 600**2 == pytest.approx((map_HW == 1).mean() * 130 / 150, rel=0.03)
    assert cover + rest > 0.99 * 600**2


def test_an_interactive_map_has_the_colours_of_the_classes(run, monkeypatch):
    folium = pytest.importorskip("folium")
    root, _ = run
    state = json.loads((root / "run.json").read_text())
    steps = {
        "polygons": {"polygons": "gpc.parquet"},
        "report": {"area_m2": 1.0, "shares": {"gpc": 0.2}, "summary": "S."},
    }
    (root / "run.json").write_text(json.dumps(state | {"steps": steps}))
    opened = public.open(str(root))
    assert opened.metrics == {"area_m2": 1.0, "shares": {"gpc": 0.2}}
    monkeypatch.setitem(sys.modules, "lonboard", None)
    shown = opened.explore()
    assert isinstance(shown, folium.Map)
    assert "#009E73" in shown.get_root().render()
    monkeypatch.undo()
    lonboard = pytest.importorskip("lonboard")
    warnings.simplefilter("ignore")  # of lonboard's own use of pandas
    [layer] = lonboard.Map.layers.get(opened.explore())
    assert shapely.box(*opened.polygons.total_bounds).area > 0
    assert layer.get_fill_color.to_pylist()[0] == [*GPC.colors[1], 120]
    # a map in which nothing was found
    monkeypatch.setattr(type(opened), "polygons", opened.polygons.iloc[:0])
    with pytest.raises(DataError, match="has no polygon to show"):
        opened.explore()


@pytest.mark.parametrize("suffix", ["gpkg", "fgb", "shp"])
def test_a_class_raster_becomes_polygons_in_formats_of_others(run, tmp_path, suffix):
    root, map_HW = run
    [classes, _] = export.export(root, "cog", tmp_path)
    count = polygonize(classes, str(tmp_path / f"cover.{suffix}"))
    frame = gpd.read_file(tmp_path / f"cover.{suffix}")
    assert len(frame) == count
    assert frame["pixels"].sum() == (map_HW == 1).sum()


@pytest.mark.parametrize("kind", ["gpkg", "fgb", "shp", "geojson"])
def test_a_column_without_any_value_is_written_as_empty_text(tmp_path, kind):
    frame = gpd.GeoDataFrame({"id": ["a"], "class": [None]}, geometry=[shapely.box(10, 20, 11, 21)], crs=4326)
    frame.to_parquet(tmp_path / "plots.parquet")
    assert pq.read_schema(tmp_path / "plots.parquet").field("class").type == pa.null()
    paths = export.write_vectors(upath(tmp_path / "plots.parquet"), tmp_path / "out", kind)
    read = gpd.read_file(paths[0] if kind != "shp" else next(path for path in paths if path.endswith(".shp")))
    assert read["id"].tolist() == ["a"]
    assert read["class"].isna().all()


def test_a_target_that_cannot_be_written_is_named(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    for kind, name in (("gpkg", "gpc.gpkg"), ("cog", "classes.tif"), ("parquet", "gpc.parquet")):
        said = refused(2, "export", run[0], "--format", kind, "--out", tmp_path / "file" / "x")
        assert f"{tmp_path}/file/x/{name} cannot be used (Not a directory)" in said
    assert "qgis; choose one with --format" in refused(2, "export", run[0], "--format", "kml")
