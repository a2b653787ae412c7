"""The map that people take away: the same in every tiling, its polygons without gaps, classes.tif as it was."""

import geopandas as gpd
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from scipy.ndimage import gaussian_filter

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.run import Engine, Step
from rayseg.errors import ConfigError
from rayseg.geo.grid import Grid, Tile, Window, tile_at
from rayseg.geo.region import Region
from rayseg.io import cog
from rayseg.stages import generalize as stage
from rayseg.steps import generalize
from rayseg.steps import map as mapping
from rayseg.steps.generalize import PolygonsConfig
from rayseg.vision.color import ClassTable

UTM = Grid("EPSG:32650", (2.0, 2.0), (0.0, 0.0))
PHOTO = Grid(None, (1.0, 1.0), (0.0, 0.0), "photo")
THREE = ClassTable(((0, "a", (0, 0, 0)), (1, "b", (0, 158, 115)), (2, "c", (230, 159, 0))))
TWO = ClassTable(THREE.classes[:2])
NODATA = 255


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    for module in (stage, generalize):
        monkeypatch.setattr(module, "BLOCK", 96)
    stage.pixel_area.cache_clear()
    yield
    stage.pixel_area.cache_clear()


def blobs(height, width, seed=0, classes=3):
    field = gaussian_filter(np.random.default_rng(seed).random((height, width)), 1.5)
    map_HW = np.digitize(field, np.quantile(field, np.linspace(0, 1, classes + 1)[1:-1])).astype(np.uint8)
    map_HW[:20, :30] = NODATA
    return map_HW


def predicted(root, classes_HW, corner, *, size, grid=UTM, table=THREE):
    """A finished map in tiles of `size` px; `corner` is the (col, row) of its first pixel."""
    extent = Window(*corner, *classes_HW.shape[::-1])
    scores_CHW = np.random.default_rng(1).integers(0, 255, (3 if len(table.values) > 2 else 1, *classes_HW.shape))
    scores_CHW = np.where(classes_HW == NODATA, NODATA, scores_CHW).astype(np.uint8)
    step, rows = Step("predict", str(root), "k", Engine("inline"), {"bundle": "m"}), []
    for row in range(extent.row // size, -(-extent.row1 // size)):
        for col in range(extent.col // size, -(-extent.col1 // size)):
            tile = tile_at(grid, row, col, size=size, extent=extent)
            cut, folder = tile.window.slices(extent), root / "tiles" / tile.id
            values, pixels = np.unique(classes_HW[cut][classes_HW[cut] != NODATA], return_counts=True)
            rows.append(tile.to_row() | {"sources": "[]"})
            facts = {"counts": dict(zip(map(str, values), map(int, pixels), strict=True))} if len(values) else {}
            Ledger(str(step.prefix / "ledger")).write(Record(tile.id, "done" if facts else "nodata", facts=facts))
            if facts:
                cog.write_classes(folder / "classes.tif", classes_HW[cut], grid, tile.window, table)
                names = [f"s{band}" for band in range(len(scores_CHW))]
                cog.write_scores(folder / "scores.tif", scores_CHW[:, *cut], grid, tile.window, names)
    pq.write_table(pa.Table.from_pylist(rows), str(step.manifest))
    return step


def made(monkeypatch, root, classes_HW, corner, config, *, table=THREE, **options):
    """(sieved map, bytes of the GeoParquet file, its frame)."""
    described = type("Described", (), {"classes": table.classes})
    monkeypatch.setattr(mapping.bundle, "description", lambda _: described)
    mapped = predicted(root, classes_HW, corner, table=table, **options)
    step = Step("generalize", str(root), "k", Engine("inline"))
    value = generalize.generalize(step, mapped, config, Region("r"))
    assert value["troubles"] == {}
    done = Step("generalize", str(root), "k", Engine("inline"), value)
    mapping.join_polygons(Step("polygons", str(root), "k", Engine("inline")), done, "all")
    extent = Window(*corner, *classes_HW.shape[::-1])
    sieved_HW = np.full(classes_HW.shape, NODATA, np.uint8)
    for row in mapping.read_manifest(mapped):
        tile = Tile.from_row(row)
        path = root / "tiles" / tile.id / "sieved.tif"
        if path.exists():
            with rasterio.open(path) as file:
                sieved_HW[tile.window.slices(extent)] = file.read(1)
    file = root / "all.parquet"
    return sieved_HW, file.read_bytes(), gpd.read_parquet(file)


@pytest.mark.parametrize(("grid", "table"), [(UTM, THREE), (PHOTO, TWO)], ids=["utm", "pixels"])
def test_raster_and_polygons_are_the_same_in_every_tiling(tmp_path, monkeypatch, grid, table):
    classes_HW = blobs(150, 170, classes=len(table.values))
    corner = (120_000, -1_100_017) if grid.crs else (0, 0)
    settings = PolygonsConfig(min_area=80.0 if grid.crs else 20.0, simplify=3.0)
    results = [
        made(monkeypatch, tmp_path / str(size), classes_HW, corner, settings, size=size, grid=grid, table=table)
        for size in (1000, 96, 55)
    ]
    sieved_HW, content, frame = results[0]
    assert 0.005 < (sieved_HW != classes_HW).mean() < 0.2
    assert frame.geometry.is_valid.all()
    for other_HW, other, _ in results[1:]:
        assert np.array_equal(other_HW, sieved_HW)
        assert other == content


def test_neighbours_share_their_outlines_and_no_polygon_is_below_the_minimum(tmp_path, monkeypatch):
    classes_HW = blobs(200, 200, 4)
    sieved_HW, _, frame = made(
        monkeypatch, tmp_path, classes_HW, (120_000, -1_100_000), PolygonsConfig(min_area=100.0, simplify=4.0), size=70
    )
    assert frame["pixels"].min() >= 25
    assert frame["pixels"].sum() == (sieved_HW != NODATA).sum()
    # no overlaps, and no gaps: the holes of all polygons together are those of nodata
    utm = frame.to_crs(32650)
    whole = shapely.union_all(utm.geometry.buffer(1e-6))
    assert utm.area.sum() == pytest.approx(whole.area, rel=1e-6)
    assert utm.area.sum() == pytest.approx((classes_HW != NODATA).sum() * 4, rel=2e-3)
    assert len(shapely.get_parts(whole)) == 1
    assert shapely.get_num_interior_rings(whole) == 0
    raw = made(
        monkeypatch, tmp_path / "raw", sieved_HW, (120_000, -1_100_000), PolygonsConfig(simplify=None), size=200
    )[2]
    assert shapely.get_num_coordinates(frame.geometry).sum() < 0.6 * shapely.get_num_coordinates(raw.geometry).sum()


def test_without_a_minimum_only_outlines_change_and_no_raster_is_written(tmp_path, monkeypatch):
    classes_HW = blobs(100, 100, 2)
    place = (120_000, -1_100_000)
    _, _, simple = made(monkeypatch, tmp_path / "s", classes_HW, place, PolygonsConfig(min_area=None), size=64)
    _, _, plain = made(
        monkeypatch, tmp_path / "p", classes_HW, place, PolygonsConfig(min_area=0.1, simplify=None), size=64
    )
    assert not list(tmp_path.glob("s/tiles/*/sieved.tif"))
    assert simple[["class", "pixels", "score_mean"]].equals(plain[["class", "pixels", "score_mean"]])
    assert (shapely.get_num_coordinates(simple.geometry) <= shapely.get_num_coordinates(plain.geometry)).all()


def test_the_map_as_predicted_stays(tmp_path, monkeypatch):
    classes_HW = blobs(100, 90, 7)
    made(monkeypatch, tmp_path, classes_HW, (120_000, -1_100_000), PolygonsConfig(min_area=400.0), size=1000)
    [file] = tmp_path.glob("tiles/*/classes.tif")
    with rasterio.open(file) as dataset:
        assert np.array_equal(dataset.read(1), classes_HW)


@pytest.mark.parametrize(
    ("grid", "most", "message"),
    [
        (Grid("EPSG:32650", (0.1, 0.1), (0.0, 0.0)), 1_150, r"is 10000 m2, 999,448 px of tile t, .* \(1156.64 m2\)"),
        (
            PHOTO,
            115_600,
            r"is 115601 px, 115,601 px of tile t, expected at most 115,600 px \(115600 px\)",
        ),
    ],
    ids=["utm", "pixels"],
)
def test_a_minimum_area_whose_margin_would_fill_the_memory_is_refused(grid, most, message):
    rows = [Tile("t", one, Window(4_000_000, 0, 512, 512)).to_row() for one in (UTM, grid)]
    too_large = 10_000.0 if grid.crs else most + 1.0
    generalize.expect_small(rows, PolygonsConfig(min_area=most))
    generalize.expect_small(rows, PolygonsConfig(min_area=None))
    generalize.expect_small([rows[1] | {"refused": "no imagery"}], PolygonsConfig(min_area=too_large))
    with pytest.raises(ConfigError, match=message):
        generalize.expect_small(rows, PolygonsConfig(min_area=too_large))
    reach = stage.with_margin(PHOTO, Window(0, 0, 96, 96), generalize.MOST_PIXELS)
    assert reach.col == -2042
