"""Rasters as the world sends them: mapped where they lie, or refused in a sentence, never at a neighbour's cost."""

import json
import warnings
from dataclasses import replace

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from affine import Affine
from rasterio.control import GroundControlPoint
from rasterio.errors import NotGeoreferencedWarning
from rasterio.transform import from_gcps
from rasterio.warp import transform
from small_world import BANDS, GRID, catalogue, damage, mosaic, rayseg, refused, scene, window_at
from tiny_maps import Bright, described, mapped

from rayseg.errors import DataError, ModelError, RaysegError
from rayseg.geo.region import Region
from rayseg.io import labels
from rayseg.io.output_grids import beyond_utm, expect_mappable
from rayseg.io.rasters import grids_of, source_of_file
from rayseg.io.stac_read import open_items, source_of
from rayseg.models.bundle import Scaling
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig


def write(path, image_CHW, **place):
    """A plain GeoTIFF."""
    count, height, width = image_CHW.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": image_CHW.dtype}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path, "w", **profile, **place) as file:
            file.write(image_CHW)
    return path


def plain(height=50, width=50, dtype="uint8"):
    return np.full((3, height, width), 90, dtype)


SINUSOIDAL = "+proj=sinu +R=6371007.181"
"""The CRS of MODIS: a raster of the whole Earth reaches beyond the map's round edge."""

# -- what cannot be mapped --------------------------------------------------------------------------------------------


@pytest.fixture
def model(tiny_model):
    return tiny_model


@pytest.fixture
def odd(tmp_path):
    """A folder with one good scene and one of every kind that cannot be mapped beside it; id -> what is said."""
    folder = tmp_path / "odd"
    folder.mkdir()
    scene(folder / "good.tif")
    utm = {"crs": "EPSG:32650", "transform": Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    (folder / "header.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    (folder / "empty.tif").write_bytes(b"")
    write(folder / "grey.tif", plain()[:1], **utm)
    write(folder / "deep.tif", plain(dtype="uint16"), **utm)
    write(folder / "complex.tif", plain(dtype="complex64"), **utm)
    write(folder / "bare.tif", plain())
    write(folder / "wrong.tif", plain(), crs="EPSG:4326", transform=Affine(512, 0, 15, 0, -512, 47))
    write(folder / "pole.tif", plain(), crs="EPSG:3031", transform=Affine(100, 0, 0, 0, -100, 0))
    write(folder / "flat.tif", plain(), crs="EPSG:32650", transform=Affine(0, 0, 500_000, 0, 0, 4_000_000))
    write(folder / "sinus.tif", plain(), crs=SINUSOIDAL, transform=Affine(800_000, 0, -2e7, 0, -400_000, 1e7))
    return folder, {
        "header": "header.tif cannot be read",
        "empty": "empty.tif cannot be read",
        "grey": "needs the bands red, green, blue, grey has b1",
        "deep": "needs the bands red, green, blue, deep has b1, b2, b3",
        "complex": "has complex pixels (complex64)",
        "bare": "has no georeference, other imagery of the region has",
        "wrong": "nowhere on Earth",
        "pole": "no UTM zone",
        "flat": "expected finite numbers that give a pixel two sides",
        "sinus": "reaches beyond the edge of the Earth",
    }


@pytest.mark.parametrize("ingested", [pytest.param(True, marks=pytest.mark.more), False])
def test_each_scene_that_cannot_be_mapped_is_named_and_no_other_is_lost(odd, model, tmp_path, ingested):
    folder, reasons = odd
    imagery = labels.ingest_rasters(folder, tmp_path / "cat") if ingested else folder
    out = tmp_path / "run"
    found = rayseg("predict", model, imagery, "--out", out, "--engine", "inline")
    assert found.exit_code == 3
    assert "10 tiles failed" in found.stderr
    report = json.loads(rayseg("status", out, "--json").stdout)["steps"]["predict"]
    assert report["counts"]["done"] == 1
    assert report["counts"]["failed"] == len(reasons) == len(report["troubles"])
    for name, reason in reasons.items():
        assert reason in report["troubles"][name]
    assert (mosaic(out) != 255).any()


def test_nothing_but_scenes_that_cannot_be_mapped_is_refused_at_the_door(odd, model, tmp_path):
    folder, _ = odd
    for name in ("good", "bare", "pole", "sinus"):  # without the first the others are imagery of their own
        (folder / f"{name}.tif").unlink()
    said = refused(3, "predict", model, folder, "--out", tmp_path / "run", "--engine", "inline")
    assert "none of the 7 scenes" in said
    assert not (tmp_path / "run").exists()
    assert "complex pixels" in refused(3, "predict", model, folder / "complex.tif", "--out", tmp_path / "run")
    assert "deep has b1" in refused(4, "predict", model, folder / "deep.tif", "--out", tmp_path / "run")


def test_a_header_that_claims_too_much_is_refused_before_it_is_planned(tmp_path):
    source = replace(source_of_file(str(write(tmp_path / "a.tif", plain())), "a"), height=1 << 31, width=1 << 31)
    with pytest.raises(DataError, match=r"claims 2147483648 x 2147483648 px, more than 4,194,304 tiles"):
        expect_mappable(source, tile=2048)


def test_another_planet_is_refused_in_words(tmp_path):
    moon = 'GEOGCS["Moon",DATUM["D_Moon",SPHEROID["Moon",1737400,0]],PRIMEM["M",0],UNIT["Degree",0.0174532925199433]]'
    path = write(tmp_path / "moon.tif", plain(), crs=moon, transform=Affine(0.01, 0, 15, 0, -0.01, 47))
    with pytest.raises(DataError, match=r"moon cannot be placed on Earth by its CRS Moon.*another planet"):
        expect_mappable(source_of_file(str(path), "moon"), tile=2048)
    said = refused(3, "ingest", "rasters", path, "--out", tmp_path / "cat")
    assert "another planet" in said


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.more  # pipelines/test_predict.py: a damaged tile is mended by a retry; here: one of two scenes
def test_a_tile_of_a_good_and_a_damaged_scene_is_mapped_where_it_can_be_and_mended_by_a_retry(model, tmp_path):
    imagery = catalogue(
        tmp_path / "in", left={"width": 90, "height": 90}, right={"col": 90, "width": 90, "height": 90, "margin": 0}
    )
    words = ("--engine", "inline", "--set", "map.tile=128")
    assert rayseg("predict", model, imagery, "--out", tmp_path / "sound", *words).exit_code == 0
    whole = damage(tmp_path / "in/right.tif")
    out = tmp_path / "run"
    found = rayseg("predict", model, imagery, "--out", out, *words)
    assert found.exit_code == 3
    assert "right.tif cannot be read" in found.stderr
    sound, part = mosaic(tmp_path / "sound")[0], mosaic(out)[0]
    assert ((part != 255) == (sound != 255))[:, :90].all()
    assert (part[:, 90:] == 255).all()
    assert (part == sound)[:, :50].all()  # where no patch sees the damaged scene
    (tmp_path / "in/right.tif").write_bytes(whole)
    assert rayseg("retry", out, "--engine", "inline").exit_code == 0
    mended = mosaic(out)[0]
    failed_before = {record["id"] for record in ledger(out) if record["attempt"] == 2}
    assert failed_before
    assert (mended[:, 90:] == sound[:, 90:]).all()


def ledger(root):
    return [json.loads(path.read_text()) for path in (root / "steps/predict/ledger").glob("*.json")]


def test_damage_in_a_halo_costs_no_tile_and_is_noted(model, tmp_path):
    imagery = catalogue(tmp_path / "in", left={"width": 90, "height": 90}, right={"col": 90, "width": 90, "margin": 0})
    damage(tmp_path / "in/right.tif")
    area = window_at(20, 20, 60, 50)
    left, bottom, right, top = GRID.bounds(area)
    region = tmp_path / "area.geojson"
    lons, lats = transform(GRID.crs, "EPSG:4326", [left, right], [bottom, top])
    box = [[[lons[i], lats[j]] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]]
    region.write_text(json.dumps({"type": "Polygon", "coordinates": box}))
    out = tmp_path / "run"
    words = ("--engine", "inline", "--set", f"map.imagery={imagery}", "--set", "map.tile=30")
    assert rayseg("predict", model, region, "--out", out, *words).exit_code == 0
    noted = [record["facts"]["unread"] for record in ledger(out) if "unread" in record["facts"]]
    assert noted
    assert all("right.tif cannot be read" in why for why in noted)


# -- regions and contracts --------------------------------------------------------------------------------------------


def test_a_scene_in_the_halo_of_a_region_is_seen(tmp_path):
    imagery = catalogue(tmp_path / "in", left={"width": 90}, right={"col": 90, "width": 90}, far={"col": 900})
    left, bottom, right, top = GRID.bounds(window_at(20, 20, 60, 60))
    lons, lats = transform(GRID.crs, "EPSG:4326", [left, right], [bottom, top])
    box = {
        "type": "Polygon",
        "coordinates": [[[lons[i], lats[j]] for i, j in ((0, 0), (1, 0), (1, 1), (0, 1), (0, 0))]],
    }
    assert [item.id for item in open_items(imagery, geometry=box)] == ["left"]
    assert {item.id for item in open_items(imagery, geometry=box, halo=64)} == {"left", "right"}
    rows = mapping.tiles_for(Region("r", box, imagery), described(), MapConfig(tile=64))
    seen = {source["item_id"] for row in rows for source in json.loads(row["sources"])}
    assert seen == {"left", "right"}
    nowhere = {"type": "Polygon", "coordinates": [[[lon + 0.03, lat] for lon, lat in box["coordinates"][0]]]}
    with pytest.raises(DataError, match="do not overlap"):
        open_items(imagery, geometry=nowhere, halo=64)


def test_scale_and_offset_of_the_imagery_are_part_of_the_contract(tmp_path):
    with rasterio.open(write(tmp_path / "a.tif", plain(dtype="int16"), crs=GRID.crs, transform=TEN), "r+") as file:
        file.scales, file.offsets = (1e-4,) * 3, (-0.1,) * 3
        file.descriptions = BANDS
    [item] = open_items(labels.ingest_rasters(tmp_path / "a.tif", tmp_path / "cat"))
    source = source_of(item)
    assert source.units == ((1e-4, -0.1),) * 3
    assert type(source).from_row(json.loads(json.dumps(source.to_row()))) == source
    per_band = {"mean": (0.1,) * 3, "std": (0.1,) * 3}
    for scaling, fits in (
        (Scaling(scale=1e-4, offset=-0.1, **per_band), True),
        (Scaling(**per_band), True),  # takes what is stored
        (Scaling(scale=1e-4, **per_band), False),
    ):
        bundle = described(dtype="int16", scaling=scaling)
        if fits:
            bundle.check_contract(source.bands, source.dtype, units=source.units)
        else:
            with pytest.raises(ModelError, match=r"x 0.0001 \+ 0, a declares red as stored x 0.0001 \+ -0.1"):
                bundle.check_contract(source.bands, source.dtype, units=source.units, source="a")


def test_scale_and_offset_of_an_item_are_read_per_band():
    def units(**fields):
        item = pystac.Item("i", None, None, pystac.utils.str_to_datetime("2020-01-01T00:00:00Z"), {})
        item.add_asset("image", pystac.Asset("/x.tif", media_type="image/tiff", roles=["data"], extra_fields=fields))
        item.properties |= {"proj:code": "EPSG:32650", "proj:shape": [5, 5], "proj:transform": list(TEN)[:6]}
        return source_of(item).units

    named = [{"name": "red", "data_type": "uint16"}, {"name": "nir", "data_type": "uint16"}]
    assert units(bands=named) == ()
    assert units(bands=[named[0] | {"raster:scale": 0.5, "raster:offset": 2}, named[1]]) == ((0.5, 2.0), (1.0, 0.0))
    assert units(bands=named, **{"raster:scale": 0.5}) == ((0.5, 0.0), (0.5, 0.0))
    older = [{"data_type": "uint16", "scale": 0.1, "offset": -1}] * 2
    assert units(**{"eo:bands": named, "raster:bands": older}) == ((0.1, -1.0),) * 2


# -- places -----------------------------------------------------------------------------------------------------------

TEN = Affine(10, 0, 500_000, 0, -10, 4_000_000)


def marked(path, affine, *, crs, gcps=False):
    """A scene of 120 x 160 px with a bright square around pixel (row 40, col 100); return its (lon, lat)."""
    image_CHW = np.full((3, 120, 160), 60, np.uint8)
    image_CHW[:, 32:48, 92:108] = 220
    corners = [(0, 0), (0, 160), (120, 0), (120, 160), (60, 80)]
    points = [GroundControlPoint(row, col, *(affine @ (col, row))) for row, col in corners]
    write(path, image_CHW, crs=crs, **({"gcps": points} if gcps else {"transform": affine}))
    x, y = affine @ (100, 40)
    [lon], [lat] = transform(crs, "EPSG:4326", [x], [y])
    return lon, lat


def test_scenes_of_two_zones_over_the_antimeridian_rotated_or_with_control_points_are_mapped_where_they_lie(tmp_path):
    over = Affine(10, 0, 500_000 + 269_200, 0, -10, 4_000_000)  # 180 E is about 769,900 m east in zone 60 at 36 N
    places = {
        "west": marked(tmp_path / "west.tif", TEN, crs="EPSG:32650"),
        "east": marked(tmp_path / "east.tif", TEN, crs="EPSG:32651"),
        "south": marked(tmp_path / "south.tif", Affine(10, 0, 400_000, 0, -10, 6_000_000), crs="EPSG:32735"),
        "over": marked(tmp_path / "over.tif", over, crs="EPSG:32660"),
        "turned": marked(
            tmp_path / "turned.tif", TEN @ Affine.translation(900, 0) @ Affine.rotation(30), crs="EPSG:32650"
        ),
        "points": marked(tmp_path / "points.tif", TEN @ Affine.translation(0, 900), crs="EPSG:32650", gcps=True),
        "degrees": marked(tmp_path / "degrees.tif", Affine(1e-4, 0, 10, 0, -1e-4, 50), crs="EPSG:4326"),
    }
    items = {item.id: item for item in open_items(labels.ingest_rasters(tmp_path, tmp_path / "cat"))}
    assert items["over"].geometry["type"] == "MultiPolygon"
    west, _, east, _ = items["over"].bbox
    assert west > 179 > -179 > east
    sources = [source_of(item) for item in items.values()]
    assert beyond_utm(sources) == {}
    _, found, polygons = mapped(tmp_path / "out", sources, size=64, network=Bright())
    assert {grid.crs for grid in found} == {f"EPSG:{zone}" for zone in (32601, 32632, 32650, 32651, 32660, 32735)}
    squares = polygons[polygons["name"] == "cover"]
    assert len(squares) == len(places)
    lons, lats = shapely.get_coordinates(shapely.centroid(squares.geometry.to_numpy())).T
    for name, (lon, lat) in places.items():
        off = np.hypot((lons - lon) * np.cos(np.radians(lat)), lats - lat) * 111_320
        nearest = squares.iloc[int(off.argmin())]
        pixel = 11.2 if name == "degrees" else 10
        assert off.min() < pixel, name
        assert nearest["area_m2"] == pytest.approx(256 * (7.96 * 11.12 if name == "degrees" else 100), rel=0.12), name


@pytest.mark.parametrize(("west", "turn"), [(179.98, 0), (179.98, 360), (-180.02, 0)])
def test_control_points_in_degrees_on_both_sides_of_180_are_refused_with_the_remedy(tmp_path, west, turn):
    """GDAL asks for 180.01 at -179.99, where there is nothing."""

    def points(west):
        lons = [(row, col, west + 8e-4 * col) for row in (0, 50) for col in (0, 50)]
        return [GroundControlPoint(row, col, x - turn * (x > 180), -16 - 8e-4 * row) for row, col, x in lons]

    write(tmp_path / "points.tif", plain(), crs="EPSG:4326", gcps=points(west))
    with pytest.raises(DataError, match=r"points.tif has control points in degrees on both sides of 180, .* UTM"):
        source_of_file(str(tmp_path / "points.tif"), "points")
    write(tmp_path / "points.tif", plain(), crs="EPSG:4326", gcps=points(170.0))
    assert source_of_file(str(tmp_path / "points.tif"), "points").gcps


def test_one_scene_over_the_antimeridian_has_polygons_on_both_sides(tmp_path):
    image_CHW = np.full((3, 60, 400), 220, np.uint8)
    write(tmp_path / "a.tif", image_CHW, crs="EPSG:32660", transform=Affine(10, 0, 768_000, 0, -10, 4_000_000))
    source = source_of_file(str(tmp_path / "a.tif"), "a")
    _, found, polygons = mapped(tmp_path / "out", [source], size=100, network=Bright())
    [(classes_HW, _)] = found.values()
    assert (classes_HW == 1).all()
    [whole] = polygons.geometry
    assert whole.geom_type == "MultiPolygon"
    assert sorted(part.bounds[0] > 0 for part in whole.geoms) == [False, True]
    assert polygons["area_m2"].sum() == pytest.approx(60 * 400 * 100, rel=5e-3)


def test_degrees_beyond_a_second_turn_are_refused_in_words(tmp_path):
    path = write(tmp_path / "a.tif", plain(), crs="EPSG:4326", transform=Affine(0.1, 0, 378, 0, -0.1, 10))
    with pytest.raises(DataError, match=r"a reaches 378 E 10 N, nowhere on Earth"):
        expect_mappable(source_of_file(str(path), "a"), tile=2048)


# -- real ones --------------------------------------------------------------------------------------------------------

REFUSED = {
    "sentinel_data_0": "nowhere on Earth",
    "cog_nonearth": "another planet",
    "slc": "complex pixels",
    "corrupt": "cannot be read",
}


@pytest.mark.more  # io/test_rasters.py: made files of each kind; here: regions of several
@pytest.mark.real
def test_every_real_raster_is_mapped_as_it_lies_or_refused_in_one_sentence(shared, tmp_path):
    folder = shared / "data" / "rasters"
    paths = [p for p in sorted(folder.glob("*/*.tif")) if p.parent.name != "corrupt" and p.stem != "cog_world"]
    assert len(paths) > 30
    for path in paths:
        if path.stem in REFUSED:
            with pytest.raises(RaysegError, match=REFUSED[path.stem]):
                check_mapped(path, tmp_path / path.stem)
        else:
            check_mapped(path, tmp_path / path.stem)


def check_mapped(path, out):
    """Map a raster by its own first three bands, and compare place and validity with the file."""
    source = source_of_file(str(path), path.stem)
    bands = tuple(name for name in source.bands if name != "alpha")[:3]
    expect_mappable(source, tile=2048)
    scaling = Scaling(mean=(0.0,) * len(bands), std=(1.0,) * len(bands))
    bundle = described(bands, dtype=source.dtype, patch=512, stride=480, scaling=scaling)
    _, found, _ = mapped(out, [source], size=1024, bundle=bundle, network=Bright())
    [(grid, (classes_HW, _))] = found.items()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(path) as file:
            valid_HW = file.dataset_mask() > 0
            if file.dtypes[0].startswith("float"):
                valid_HW &= ~np.isnan(file.read([file.indexes[source.bands.index(name)] for name in bands])).all(axis=0)
    if len(grids_of([source])) == 1 and classes_HW.shape == valid_HW.shape:
        assert np.array_equal(classes_HW != 255, valid_HW), path.name
    else:  # on another grid: as much ground as there was
        assert source.gcps or source.transform[1], path.name
        with rasterio.open(path) as file:
            affine = from_gcps(file.gcps[0]) if source.gcps else file.transform
        pixels = [affine @ (source.width / 2 + col, source.height / 2 + row) for col, row in ((0, 0), (1, 0), (0, 1))]
        xs, ys = (np.array(side) for side in transform(source.crs, grid.crs, *zip(*pixels, strict=True)))
        area = abs(np.linalg.det([xs[1:] - xs[0], ys[1:] - ys[0]]))
        ground = (classes_HW != 255).sum() * grid.resolution[0] ** 2
        assert ground == pytest.approx(area * valid_HW.sum(), rel=0.1), path.name


@pytest.mark.more  # test_each_scene_that_cannot_be_mapped_...: made files; here: real ones
@pytest.mark.real
def test_a_region_of_good_and_corrupt_files_ends_with_every_bad_one_named(shared, model, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    scene(folder / "good.tif")
    bad = sorted((shared / "data" / "rasters" / "corrupt").iterdir())
    for path in bad:
        (folder / path.name).symlink_to(path)
    out = tmp_path / "run"
    assert rayseg("predict", model, folder, "--out", out, "--engine", "inline").exit_code == 3
    records = ledger(out)
    assert {record["id"] for record in records if record["status"] == "failed"} == {path.stem for path in bad}
    assert all(record["id"] in record["reason"] for record in records if record["status"] == "failed")
    assert [record["status"] for record in records if record["status"] != "failed"] == ["done"]
