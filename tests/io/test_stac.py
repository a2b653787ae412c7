"""STAC both ways: items become sources, regions are found or refused in words, results are described validly."""

import hashlib
import json
import warnings
from pathlib import Path

import geopandas
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pyproj
import pystac
import pytest
import rasterio
import shapely
import stac_geoparquet.arrow
from affine import Affine
from pystac.validation import JsonSchemaSTACValidator
from rasterio.warp import transform
from shapely.geometry import box, mapping, shape

import rayseg
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Grid, Tile, Window, slug
from rayseg.geo.region import region_names, resolve_region
from rayseg.io import cog, stac_read, stac_write
from rayseg.io.rasters import Source, footprint, grids_of, read
from rayseg.vision.color import ClassTable

UTM = "EPSG:32650"
GRID = Grid(UTM, (10.0, 10.0), (0.0, 0.0))
HERE = Window(50_000, -400_000, 64, 48)
TABLE = ClassTable(((0, "background", (0, 0, 0)), (1, "green plastic", (0, 158, 115))))


def valid_core(row):
    """Core schemas are in pystac; those of the extensions need the network, so they are not looked at here."""
    kind = {"Feature": "ITEM", "Collection": "COLLECTION", "Catalog": "CATALOG"}[row["type"]]
    JsonSchemaSTACValidator().validate_core(row, pystac.STACObjectType[kind], "1.1.0")
    return True


def image(path, *, bands=("red", "green", "blue"), seed=0):
    pixels = np.random.default_rng(seed).integers(1, 250, (len(bands), 48, 64)).astype(np.uint8)
    cog.write_image(path, pixels, GRID, HERE, bands=bands, nodata=0)
    return pixels


def item(name="a", assets=None, *, time="2024-05-01T00:00:00Z", properties=None, where=HERE):
    geometry, bounds = stac_write.lonlat_outline(GRID, where)
    made = pystac.Item(name, geometry, bounds, pystac.utils.str_to_datetime(time), properties or {})
    for key, asset in (assets or {"image": pystac.Asset("./a.tif", media_type="image/tiff")}).items():
        made.add_asset(key, asset)
    return made


def projected(shape=(48, 64), transform=(10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0), code=UTM):
    return {"proj:code": code, "proj:shape": list(shape), "proj:transform": list(transform)}


def tif(href, **fields):
    return pystac.Asset(href, media_type="image/tiff; application=geotiff", extra_fields=fields)


# -- items to sources


def test_an_item_that_says_everything_is_a_source_without_opening_its_file(tmp_path):
    bands = [{"name": name, "data_type": "uint16", "nodata": 0} for name in ("red", "nir")]
    made = item(assets={"image": tif("/nowhere/a.tif", bands=bands)}, properties=projected())
    source = stac_read.source_of(made)
    assert source == Source(
        "a", (("/nowhere/a.tif", ("red", "nir")),), UTM, (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0), 48, 64,
        "uint16", 0.0, "2024-05-01T00:00:00Z",
    )  # fmt: skip
    assert footprint(source, GRID) == HERE


def test_what_an_item_does_not_say_its_file_does(tmp_path):
    pixels = image(tmp_path / "a.tif")
    path = tmp_path / "a.json"
    stac_write.write_item(item(), path)
    [found] = stac_read.open_items(str(path))
    source = stac_read.source_of(found)
    assert source.href == str(path)
    assert source.assets == ((str(tmp_path / "a.tif"), ("red", "green", "blue")),)
    assert (source.crs, source.dtype, source.nodata) == (UTM, "uint8", None)
    assert np.array_equal(read([source], *[GRID, HERE], bands=["blue"])[0], pixels[2:])


def test_older_fields_are_understood_too():
    asset = tif(
        "/x/a.tif",
        **{"eo:bands": [{"name": "B1", "common_name": "red"}], "raster:bands": [{"data_type": "int16", "nodata": -1}]},
    )
    properties = {"proj:epsg": 32650, "proj:shape": [48, 64], "proj:bbox": [500_000, 3_999_520, 500_640, 4_000_000]}
    source = stac_read.source_of(item(assets={"image": asset}, properties=properties))
    assert source.transform == (10.0, 0.0, 500_000.0, 0.0, -10.0, 4_000_000.0)
    assert (source.crs, source.bands, source.dtype, source.nodata) == (UTM, ("red",), "int16", -1.0)


def test_a_nodata_value_that_the_pixel_type_cannot_hold_is_not_kept():
    for dtype, stated, kept in (
        *(("uint16", -9999, None), ("uint8", 1.5, None), ("float32", 1e300, None)),
        *(("int16", -9999, -9999.0), ("uint16", 65535, 65535.0), ("float32", -3.4028235e38, -3.4028235e38)),
    ):
        bands = [{"name": "red", "data_type": dtype, "nodata": stated}]
        made = item(assets={"image": tif("/x/a.tif", bands=bands)}, properties=projected())
        assert stac_read.source_of(made).nodata == kept


def sentinel():
    """Bands in files of their own, in two resolutions, three of them red edge; a picture that repeats bands."""

    def one(name, common, size):
        fields = projected((size, size), (960 / size, 0, 0, 0, -960 / size, 0))
        return tif(f"/s2/{name}.tif", bands=[{"name": name, "eo:common_name": common, "data_type": "uint16"}], **fields)

    visual = [{"name": n, "eo:common_name": c, "data_type": "uint8"} for n, c in (("B04", "red"), ("B03", "green"))]
    assets = {
        "thumbnail": pystac.Asset("/s2/t.png", media_type="image/png", roles=["thumbnail"]),
        "visual": tif("/s2/tci.tif", bands=visual, **projected((96, 96), (10, 0, 0, 0, -10, 0))),
        "B05": one("B05", "rededge", 48),
        "B06": one("B06", "rededge", 48),
        "B03": one("B03", "green", 96),
        "B04": one("B04", "red", 96),
        "granule": pystac.Asset("/s2/g.xml", media_type="application/xml"),
    }
    return item("s2", assets)


def test_bands_in_several_files_are_called_by_common_name_where_only_one_has_it():
    source = stac_read.source_of(sentinel())
    assert source.bands == ("B05", "B06", "green", "red")
    assert source.dtype == "uint16"
    assert (source.height, source.transform[0]) == (96, 10.0)


@pytest.mark.parametrize("bands", [("B04", "B05"), ("red", "B05")])
def test_only_files_with_the_bands_wanted_count(bands):
    source = stac_read.source_of(sentinel(), bands=bands)
    assert set(source.bands) == set(bands)
    assert {href for href, _ in source.assets} == {"/s2/B05.tif", "/s2/B04.tif"}


@pytest.mark.parametrize("stated", ["gsd", "raster:spatial_resolution", "proj:transform", "bands"])
@pytest.mark.parametrize("order", [(60, 20, 10), (10, 20, 60), (20, 10, 60)])
@pytest.mark.parametrize("wanted", [None, ("red",)])
def test_a_band_at_several_resolutions_is_read_from_its_finest_file(stated, order, wanted):
    def one(name, side):
        fields = {"bands": [{"name": name, "data_type": "uint16"}], **projected((9, 9), (60, 0, 0, 0, -60, 0))}
        if stated == "proj:transform":
            fields |= projected((540 // side,) * 2, (side, 0, 0, 0, -side, 0))
        elif stated == "bands":
            fields["bands"][0]["raster:spatial_resolution"] = side
        else:
            fields[stated] = side
        return tif(f"/s2/{name}_{side}m.tif", **fields)

    assets = {f"{name}_{side}m": one(name, side) for name in ("red", "nir") for side in order}
    source = stac_read.source_of(item(assets=assets), bands=wanted)
    expected = [f"/s2/{name}_10m.tif" for name in wanted or ("red", "nir")]
    assert [href for href, _ in source.assets] == expected


def test_files_without_band_names_are_called_by_their_key():
    fields = {"data_type": "uint16", **projected()}
    source = stac_read.source_of(item(assets={"vv": tif("/x/1.tif", **fields), "vh": tif("/x/2.tif", **fields)}))
    assert source.assets == (("/x/1.tif", ("vv",)), ("/x/2.tif", ("vh",)))


def test_items_without_pixels_or_with_other_bands_are_refused():
    with pytest.raises(DataError, match="a has no image asset: found notes"):
        stac_read.source_of(item(assets={"notes": pystac.Asset("/x/a.txt", media_type="text/plain")}))
    with pytest.raises(DataError, match="s2 has none of the bands swir: found B05, B06"):
        stac_read.source_of(sentinel(), bands=["swir"])
    with pytest.raises(DataError, match=r"relative href ./a.tif"):
        stac_read.source_of(item())


SINUSOIDAL = (
    'PROJCS["Sinu",GEOGCS["GCS",DATUM["unknown",SPHEROID["sphere",6371007.181,0]],PRIMEM["Greenwich",0],'
    'UNIT["degree",0.0174532925199433]],PROJECTION["Sinusoidal"],PARAMETER["longitude_of_center",0],'
    'PARAMETER["false_easting",0],PARAMETER["false_northing",0],UNIT["Meter",1]]'
)


@pytest.mark.parametrize("told", ["proj:projjson", "proj:wkt2", "proj:epsg", "nothing", "nonsense"])
def test_a_crs_without_a_code_is_read_in_full_and_else_from_the_file(tmp_path, told):
    image(tmp_path / "a.tif")
    fields = projected() | {"proj:code": "EPSG:None" if told == "nonsense" else None}
    full = pyproj.CRS.from_wkt(SINUSOIDAL)
    fields |= {
        "proj:projjson": {"proj:projjson": full.to_json_dict()},
        "proj:wkt2": {"proj:wkt2": full.to_wkt()},
        "proj:epsg": {"proj:epsg": "32633"},
    }.get(told, {})
    source = stac_read.source_of(item(assets={"image": tif(str(tmp_path / "a.tif"))}, properties=fields))
    expected = {"proj:epsg": "EPSG:32633", "nothing": UTM, "nonsense": UTM}.get(told)
    if expected:
        assert source.crs == expected
    else:
        assert pyproj.CRS.from_wkt(source.crs).coordinate_operation.method_name == "Sinusoidal"


@pytest.mark.parametrize("code", ["EPSG: 32650", " epsg:32650 ", "urn:ogc:def:crs:EPSG::32650", "EPSG:32650+5773"])
def test_a_code_in_another_spelling_is_the_same_crs(tmp_path, code):
    pixels = image(tmp_path / "a.tif")
    made = item(assets={"image": tif(str(tmp_path / "a.tif"))}, properties=projected(code=code))
    source = stac_read.source_of(made)
    if "+" in code:  # a CRS with heights has no code of its own
        assert pyproj.CRS.from_wkt(source.crs).sub_crs_list[0] == pyproj.CRS(UTM)
    else:
        assert source.crs == UTM
    [(grid, _)] = grids_of([source])
    assert slug(grid.name) == grid.name
    assert np.array_equal(read([source], grid, footprint(source, grid), bands=["red", "green", "blue"])[0], pixels)


def test_boxes_of_six_numbers_place_items_and_their_pixels(tmp_path):
    made = item(properties={"proj:code": UTM, "proj:shape": [48, 64]}, assets={"image": tif("/a.tif")})
    made.properties["proj:bbox"] = [500_000, 3_999_520, -5, 500_640, 4_000_000, 30]
    bands = [{"name": "red", "data_type": "uint8"}]
    made.assets["image"].extra_fields["bands"] = bands
    assert footprint(stac_read.source_of(made), GRID) == HERE
    west, south, east, north = made.bbox
    made.bbox = [west, south, -5.0, east, north, 840.0]
    path = tmp_path / "a.json"
    stac_write.write_item(made, path)
    for off, near in ((0.0001, True), (0.01, False)):
        region = mapping(box(east + off, south, east + off + 1, north))
        both = json.loads(path.read_text())
        other = both | {"id": "b", "geometry": region, "bbox": [east + off, south, east + 1, north]}
        (tmp_path / "two.json").write_text(json.dumps({"type": "FeatureCollection", "features": [both, other]}))
        found = stac_read.open_items(str(tmp_path / "two.json"), geometry=region, halo=20)
        assert ("a" in {one.id for one in found}) is near
    with pytest.raises(DataError, match=rf"imagery of .* \[{west:.6g}, {south:.6g}, {east:.6g}, {north:.6g}\]"):
        stac_read.open_items(str(path), geometry=mapping(box(0, 0, 1, 1)))


PLACES = {  # every way in which a catalogue writes the two sides of the antimeridian
    "west": mapping(box(179.2, -11, 179.7, -10)),
    "over": mapping(shapely.Polygon([(179.9, -11), (-179.9, -11), (-179.9, -10), (179.9, -10)])),
    "beyond": mapping(box(180.1, -11, 180.4, -10)),
    "before": mapping(box(-180.09, -11, -179.95, -10)),
    "east": mapping(box(-179.6, -11, -179.2, -10)),
    "far": mapping(box(0, -11, 1, -10)),
}


@pytest.mark.parametrize("suffix", ["json", "parquet"])
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("179,-20,-179,0", {"west", "over", "beyond", "before", "east"}),
        ("-179.98,-20,-179,0", {"over", "beyond", "before", "east"}),
        ("179.5,-20,179.95,0", {"west", "over", "before"}),
        ("180.2,-20,180.3,0", {"beyond"}),
    ],
)
def test_items_over_the_antimeridian_are_found_from_both_sides(tmp_path, text, expected, suffix):
    rows = []
    for name, geometry in PLACES.items():
        made = item(name).to_dict(include_self_link=False)
        rows.append(made | {"geometry": geometry, "bbox": list(shape(geometry).bounds)})
    rows[1]["bbox"] = [179.9, -11, -179.9, -10]
    path = tmp_path / f"items.{suffix}"
    if suffix == "parquet":
        stac_write.write_items_parquet(path, rows)
    else:
        path.write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    region = resolve_region(text).geometry
    assert {one.id for one in stac_read.open_items(str(path), geometry=region)} == expected
    near = {one.id for one in stac_read.open_items(str(path), geometry=mapping(box(179.95, -11, 180, -10)), halo=1)}
    assert {"over", "before"} <= near


def test_an_item_with_a_bbox_and_no_geometry_lies_in_its_bbox(tmp_path):
    boxes = {"here": [10, 40, 11, 41], "over": [179.5, -11, -179.5, -10], "high": [20, 40, -5, 21, 41, 800]}
    rows = [item(name).to_dict(include_self_link=False) | {"bbox": bbox} for name, bbox in boxes.items()]
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": [row | {"geometry": None} for row in rows]}))
    for text, expected in (("10.5,40,12,41", "here"), ("-179.9,-11,-179,-10", "over"), ("20.5,40,22,41", "high")):
        region = resolve_region(text).geometry
        assert [one.id for one in stac_read.open_items(str(path), geometry=region)] == [expected]


@pytest.mark.parametrize("boxes", ["all", "some", "none"])
def test_null_geometries_of_a_table_cost_no_other_item(tmp_path, boxes):
    path = tmp_path / "items.parquet"
    rows = [item(name).to_dict(include_self_link=False) for name in "abc"]
    where = [[10.0, 40.0, 11.0, 41.0], [30.0, 40.0, 31.0, 41.0], [50.0, -41.0, 51.0, -40.0]]
    rows = [row | {"geometry": mapping(box(*place)), "bbox": place} for row, place in zip(rows, where, strict=True)]
    stac_write.write_items_parquet(path, rows)
    table = pq.read_table(path)
    values = {name: table[name].to_pylist() for name in ("geometry", "bbox")}
    values["geometry"][1:] = [None, None]
    values["bbox"] = {"all": values["bbox"], "some": [None, values["bbox"][1], None], "none": [None] * 3}[boxes]
    for name, column in values.items():
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(column, table.schema.field(at).type))
    pq.write_table(table, path)
    assert [one.id for one in stac_read.open_items(str(path))] == ["a", "b", "c"]
    here = stac_read.open_items(str(path), geometry=resolve_region("10.2,40.2,10.4,40.4").geometry)
    lost = {"all": set(), "some": {"c"}, "none": {"b", "c"}}[boxes]
    assert {one.id for one in here if stac_read.BROKEN not in one.properties} == {"a"}
    assert {one.id for one in here if stac_read.BROKEN in one.properties} == lost
    if boxes != "none":
        [second, *_] = stac_read.open_items(str(path), geometry=resolve_region("30.2,40.2,30.4,40.4").geometry)
        assert second.id == "b"


@pytest.mark.parametrize(
    ("crs", "x", "y"), [("EPSG:32718", 4e5, 8e6), ("EPSG:32660", 7e5, 5e6), ("EPSG:4326", 12, -33)]
)
@pytest.mark.parametrize("stated", [True, False])
def test_an_item_without_a_place_takes_that_of_its_pixels_or_is_named(tmp_path, crs, x, y, stated):
    step = 1e-4 if crs == "EPSG:4326" else 10
    affine = Affine(step, 0, x, 0, -step, y)
    with rasterio.open(tmp_path / "a.tif", "w", "GTiff", 8, 8, 1, dtype="uint8", crs=crs, transform=affine) as file:
        file.write(np.ones((1, 8, 8), "uint8"))
        lon, lat = transform(file.crs, "EPSG:4326", [x + 4 * step], [y - 4 * step])
    made = item("a", assets={"image": tif(str(tmp_path / "a.tif"), bands=[{"name": "b1", "data_type": "uint8"}])})
    photo(tmp_path / "p.png")
    bare = item("photo", assets={"image": tif(str(tmp_path / "p.png"), bands=[{"name": "b1", "data_type": "uint8"}])})
    bare.properties |= {"proj:code": None, "proj:shape": [5, 7]}
    gone = item("gone", assets={"image": tif(str(tmp_path / "gone.tif"))})
    if stated:
        made.properties |= {"proj:code": crs, "proj:shape": [8, 8], "proj:transform": list(affine)[:6]}
    rows = [one.to_dict(include_self_link=False) | {"geometry": None, "bbox": None} for one in (made, bare, gone)]
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    here = resolve_region(f"{lon[0] - 1e-4},{lat[0] - 1e-4},{lon[0] + 1e-4},{lat[0] + 1e-4}").geometry
    found = {one.id: one for one in stac_read.open_items(str(tmp_path / "items.json"), geometry=here)}
    assert found.keys() == {"a", "photo", "gone"}
    assert stac_read.source_of(found["a"]).crs == crs
    with pytest.raises(DataError, match=r"photo has no geometry or bbox on Earth .* and no georeference, so it"):
        stac_read.source_of(found["photo"])
    with pytest.raises(DataError, match=r"gone\.tif cannot be read"):
        stac_read.source_of(found["gone"])
    with pytest.raises(DataError, match=r"photo has no|gone\.tif cannot"):
        stac_read.open_items(str(tmp_path / "items.json"), geometry=resolve_region("0,0,1,1").geometry)


METRES = [[[5e5, 4e6], [500640, 4e6], [500640, 4000480], [5e5, 4000480], [5e5, 4e6]]]


@pytest.mark.parametrize(
    ("suffix", "coordinates", "bbox"),
    [
        ("json", METRES, None),
        ("json", METRES, "metres"),
        ("parquet", METRES, "metres"),
        ("json", [], None),
        ("json", [], "right"),
        ("parquet", [], "right"),
        ("json", [[[117, 136], [117.01, 136], [117, 136.01], [117, 136]]], None),
    ],
)
def test_an_item_whose_geometry_is_nowhere_on_earth_lies_where_its_bbox_or_pixels_do(
    tmp_path, suffix, coordinates, bbox
):
    bands = [{"name": "b1", "data_type": "uint8"}]
    good, odd = (item(name, {"image": tif(f"/{name}.tif", bands=bands)}, properties=projected()) for name in "ab")
    rows = [one.to_dict(include_self_link=False) for one in (good, odd)]
    boxes = {"right": odd.bbox, "metres": [5e5, 4e6, 500640, 4000480], None: None}
    rows[1] |= {"geometry": {"type": "Polygon", "coordinates": coordinates}, "bbox": boxes[bbox]}
    path = tmp_path / f"items.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    else:
        pq.write_table(pa.table(stac_geoparquet.arrow.parse_stac_items_to_arrow(rows).read_all()), path)
    here, there = (resolve_region(text).geometry for text in ("116.99,36.13,117.01,36.15", "100,30,101,31"))
    found = stac_read.open_items(str(path), geometry=here)
    assert [one.id for one in found] == ["a", "b"]
    assert np.allclose(shape(found[1].geometry).bounds, shape(good.geometry).bounds, atol=1e-4)
    with pytest.raises(DataError, match="do not overlap"):
        stac_read.open_items(str(path), geometry=there)


@pytest.mark.parametrize(
    "fields",
    [
        {"datetime": None, "start_datetime": "x", "end_datetime": None},
        {"datetime": "9999-12-31T23:59:59-12:00"},
        {"datetime": "0001-01-01T00:00:00+14:00"},
        {"proj:shape": [0, 0], "proj:transform": None, "proj:bbox": [5e5, 3999520, 500640, 4e6]},
    ],
)
def test_an_item_with_an_impossible_time_or_size_fails_alone(tmp_path, fields):
    good, odd = (item(name, {"image": tif(f"/{name}.tif")}, properties=projected()) for name in "ab")
    rows = [one.to_dict(include_self_link=False) for one in (good, odd)]
    rows[1]["properties"] |= fields
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    first, second = stac_read.open_items(str(tmp_path / "items.json"), geometry=good.geometry, halo=8)
    assert (first.id, second.id) == ("a", "b")
    with pytest.raises(DataError, match=r"b .*is not a valid STAC item"):
        stac_read.source_of(second)


def test_numbers_as_names_of_bands_are_names():
    made = item(assets={"image": tif("/a.tif", bands=[{"name": 0}, {"name": 1}], data_type="uint8")})
    made.properties |= projected()
    assert stac_read.source_of(made, bands=["1"]).bands == ("0", "1")


def test_a_catalogue_without_links_is_refused(tmp_path):
    (tmp_path / "catalog.json").write_text(json.dumps({"type": "Catalog", "stac_version": "1.0.0", "id": "c"}))
    with pytest.raises(DataError, match=r"catalog\.json is not STAC: .*links"):
        stac_read.imagery_collection(str(tmp_path / "catalog.json"))


def photo(path):
    with warnings.catch_warnings(), rasterio.open(path, "w", "PNG", 7, 5, 1, dtype="uint8") as file:
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        file.write(np.ones((1, 5, 7), "uint8"))


def test_an_image_without_crs_stays_without(tmp_path):
    photo(tmp_path / "a.png")
    bands = [{"name": "red", "data_type": "uint8"}]
    made = item(
        assets={"image": tif(str(tmp_path / "a.png"), bands=bands)},
        properties={"proj:code": None, "proj:shape": [5, 7]},
    )
    made.geometry, made.bbox = None, None
    source = stac_read.source_of(made)
    assert (source.crs, source.height, source.width) == (None, 5, 7)
    assert grids_of([source])[0][0].crs is None


# -- catalogues


def far(name, degrees):
    return item(name, where=Window(HERE.col, HERE.row + round(degrees * 11_100), 64, 48))


def test_a_catalogue_is_written_added_to_and_read_back(tmp_path):
    root = tmp_path / "cat"
    path = stac_write.write_catalog(
        root, {"imagery": [item("a"), item("b", time="2025-01-01T00:00:00Z")]}, titles={"imagery": "Scenes"}
    )
    files = {file: file.read_bytes() for file in root.rglob("*.json")}
    assert sorted(file.relative_to(root).as_posix() for file in files) == [
        "catalog.json", "imagery/a.json", "imagery/b.json", "imagery/collection.json",
    ]  # fmt: skip
    assert all(valid_core(json.loads(data)) for data in files.values())
    assert [found.id for found in stac_read.open_items(path)] == ["b", "a"]
    assert stac_read.open_items(path)[0].collection_id == "imagery"
    stac_write.write_catalog(root, {"imagery": [item("a"), item("b", time="2025-01-01T00:00:00Z")]})
    assert {file: file.read_bytes() for file in root.rglob("*.json")} == files
    stac_write.write_catalog(root, {"imagery": [far("c", 1)], "chips": [item("d")]})
    assert [found.id for found in stac_read.open_items(path, "imagery")] == ["b", "a", "c"]
    assert [found.id for found in stac_read.open_items(path, "chips")] == ["d"]
    whole = pystac.Catalog.from_file(path)
    assert whole.get_child("imagery").title == "Scenes"
    assert (
        whole.get_child("imagery").extent.spatial.bboxes[0][3] - whole.get_child("imagery").extent.spatial.bboxes[0][1]
        > 0.9
    )
    moved = root.rename(tmp_path / "moved")
    assert len(stac_read.open_items(str(moved / "catalog.json"))) == 4
    assert "file:" not in "".join(file.read_text() for file in moved.rglob("*.json"))


def test_a_catalogue_can_be_on_an_object_store():
    path = stac_write.write_catalog("memory://bucket/cat", {"imagery": [item("a", {"i": tif("s3://b/a.tif")})]})
    assert [found.id for found in stac_read.open_items(str(path))] == ["a"]


def test_items_outside_the_region_stay_out_and_bounds_are_named_when_none_is_left(tmp_path):
    path = stac_write.write_catalog(tmp_path, {"imagery": [far("north", 0), far("south", 2)]})
    lon, lat = shape(far("south", 2).geometry).centroid.coords[0]
    near = mapping(box(lon - 0.001, lat - 0.001, lon + 0.001, lat + 0.001))
    assert [found.id for found in stac_read.open_items(path, geometry=near)] == ["south"]
    with pytest.raises(DataError, match=r"the region \[5, 5, 6, 6\] and the imagery .* \[117, 34"):
        stac_read.open_items(path, geometry=mapping(box(5, 5, 6, 6)))


@pytest.mark.parametrize("names", [["imagery", "truth"], ["chips", "truth"], ["scenes"]])
def test_the_imagery_of_a_catalogue_is_found_by_convention(tmp_path, names):
    path = stac_write.write_catalog(tmp_path, {name: [item(name)] for name in names})
    assert stac_read.imagery_collection(path) == names[0]


def test_a_catalogue_or_collection_that_is_not_there_is_refused_with_the_known_ones(tmp_path):
    path = stac_write.write_catalog(tmp_path, {"summer": [item("a")], "winter": [item("b")]})
    with pytest.raises(ConfigError, match="no collection 'spring', expected one of summer, winter"):
        stac_read.open_items(path, "spring")
    with pytest.raises(ConfigError, match="summer, winter; choose one"):
        stac_read.imagery_collection(path)
    with pytest.raises(ConfigError, match=r"nothing.json does not exist"):
        stac_read.open_items(str(tmp_path / "nothing.json"))
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match=r"broken.json cannot be read as JSON"):
        stac_read.open_items(str(tmp_path / "broken.json"))
    (tmp_path / "other.json").write_text('{"type": "Feature", "id": "x"}')
    with pytest.raises(DataError, match=r"other.json is not a valid STAC item"):
        stac_read.open_items(str(tmp_path / "other.json"))


def test_items_come_from_collections_features_and_parquet_alike(tmp_path):
    stac_write.write_catalog(tmp_path, {"imagery": [item("a"), item("b")]})
    rows = [json.loads((tmp_path / "imagery" / f"{name}.json").read_text()) for name in "ab"]
    (tmp_path / "imagery" / "all.json").write_text(json.dumps({"type": "FeatureCollection", "features": rows}))
    from rayseg.io.stac_write import write_items_parquet

    write_items_parquet(tmp_path / "imagery" / "items.parquet", rows)
    for name in ("collection.json", "all.json", "items.parquet"):
        found = stac_read.open_items(str(tmp_path / "imagery" / name), "imagery")
        assert [one.id for one in found] == ["a", "b"]
        assert found[0].assets["image"].get_absolute_href() == str(tmp_path / "imagery" / "a.tif")


def test_items_of_a_table_that_miss_the_region_are_not_looked_at(tmp_path, monkeypatch):
    """But for those that do not say where they are, or lie on both sides of the antimeridian."""
    from rayseg.io.stac_write import write_items_parquet

    rows = [item("here").to_dict(), item("there", where=Window(50_000, -300_000, 64, 48)).to_dict()]
    around = item("around").to_dict() | {"bbox": [179.0, -10.0, -179.0, 60.0]}
    write_items_parquet(tmp_path / "items.parquet", [*rows, around])
    seen = []
    monkeypatch.setattr(stac_read, "_near", lambda one, area, halo: seen.append(one.id) or True)
    geometry = mapping(box(*rows[0]["bbox"]))
    stac_read.open_items(str(tmp_path / "items.parquet"), geometry=geometry)
    assert set(seen) == {"here", "around"}
    monkeypatch.undo()
    far = mapping(box(10, 10, 11, 11))
    with pytest.raises(DataError, match=r"the region \[10, 10, 11, 11\] and the imagery of .* do not overlap"):
        stac_read.open_items(str(tmp_path / "items.parquet"), geometry=far)


# -- results


def tile_item(tmp_path, grid=GRID, window=HERE, crs=UTM, sources=None):
    tile = Tile(f"{grid.name}_1_2", grid, window)
    folder = tmp_path / "run" / "tiles" / tile.id
    classes = np.zeros((window.height, window.width), np.uint8)
    files = (
        cog.write_classes(folder / "classes.tif", classes, grid, window, TABLE),
        cog.write_scores(folder / "scores.tif", classes[None], grid, window, ["green plastic"]),
    )
    if sources is None:
        times = {"new": "2024-09-01T00:00:00Z", "old": "2024-05-01T00:00:00Z"}
        frame = (crs, (10.0, 0.0, 0.0, 0.0, -10.0, 0.0), 9, 9, "uint8", None)
        sources = [Source(name, (), *frame, time, f"/cat/{name}.json") for name, time in times.items()]
    model = str(tmp_path / "run" / "models" / "cover" / "item.json")
    stac_write.write_tile_item(folder, tile, TABLE, files=files, sources=sources, model=model)
    return folder / f"{tile.id}.json"


def test_a_tiles_item_tells_what_it_is_and_what_it_was_made_of(tmp_path):
    path = tile_item(tmp_path)
    row = json.loads(path.read_text())
    assert valid_core(row)
    properties, classes = row["properties"], row["assets"]["classes"]
    assert properties["proj:code"] == UTM
    assert properties["proj:shape"] == [48, 64]
    assert Affine(*properties["proj:transform"]) == GRID.transform(HERE)
    assert properties["proj:bbox"] == list(GRID.bounds(HERE))
    assert properties["processing:level"] == "L4"
    assert properties["processing:software"] == {"rayseg": rayseg.__version__}
    assert (properties["start_datetime"], properties["end_datetime"]) == (
        "2024-05-01T00:00:00Z",
        "2024-09-01T00:00:00Z",
    )
    fields = ("value", "name", "color_hint", "nodata")
    assert [tuple(map(one.get, fields)) for one in classes["classification:classes"]] == [
        (0, "background", "000000", None), (1, "green_plastic", "009E73", None), (255, "nodata", None, True),
    ]  # fmt: skip
    data = (path.parent / "classes.tif").read_bytes()
    assert classes["file:size"] == len(data)
    assert classes["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
    assert row["assets"]["scores"]["bands"] == [{"name": "green plastic", "data_type": "uint8", "nodata": 255.0}]
    links = [link["href"] for link in row["links"] if link["rel"] == "derived_from"]
    assert links == ["/cat/new.json", "/cat/old.json", "../../models/cover/item.json"]
    assert len(row["stac_extensions"]) == 4
    again = path.read_bytes()
    assert tile_item(tmp_path).read_bytes() == again


def test_a_tiles_item_lies_where_its_pixels_do(tmp_path):
    [found] = stac_read.open_items(str(tile_item(tmp_path)))
    assert shape(found.geometry).is_valid
    lon, lat = shape(found.geometry).centroid.coords[0]
    assert 117.0 < lon < 117.01
    assert 36.13 < lat < 36.15
    source = stac_read.source_of(found)
    assert footprint(source, GRID) == HERE
    assert source.bands == ("class", "green plastic")


def test_a_tile_of_an_image_without_crs_has_no_place_but_a_shape(tmp_path):
    grid = Grid(None, (1.0, 1.0), (0.0, 0.0), "photo")
    row = json.loads(tile_item(tmp_path, grid, Window(512, 0, 30, 20), None).read_text())
    assert valid_core(row)
    assert row["geometry"] is None
    assert "bbox" not in row or row["bbox"] is None
    assert row["properties"]["proj:code"] is None
    assert row["properties"]["proj:shape"] == [20, 30]
    assert row["properties"]["proj:transform"] == [1, 0, 512, 0, 1, 0]


def test_an_outline_is_cut_at_the_antimeridian():
    grid = Grid("EPSG:32660", (1000.0, 1000.0), (0.0, 0.0))
    geometry, bounds = stac_write.lonlat_outline(grid, Window(600, -5000, 300, 200))
    assert geometry["type"] == "MultiPolygon"
    west, _, east, _ = bounds
    assert 170 < west < 180
    assert -180 < east < -170
    assert all(part.is_valid for part in shape(geometry).geoms)


def test_a_grid_nowhere_on_earth_is_refused(tmp_path):
    grid = Grid("EPSG:4326", (512.0, 512.0), (0.0, 0.0))
    with pytest.raises(DataError, match="nowhere on Earth"):
        stac_write.lonlat_outline(grid, Window(0, 0, 512, 512))


def test_a_collection_over_results_has_all_items_in_one_table(tmp_path):
    paths = [tile_item(tmp_path)]
    root = tmp_path / "run"
    stac_write.write_collection(root, stac_write.read_items(map(str, paths)), title="Plastic cover")
    row = json.loads((root / "collection.json").read_text())
    assert valid_core(row)
    assert row["title"] == "Plastic cover"
    assert [link["href"] for link in row["links"]] == ["./tiles/32650_1_2/32650_1_2.json"]
    for name in ("collection.json", "items.parquet"):
        [found] = stac_read.open_items(str(root / name))
        assert found.assets["classes"].get_absolute_href() == str(paths[0].parent / "classes.tif")
    frame = geopandas.read_parquet(root / "items.parquet")
    assert frame.geometry.iloc[0].is_valid


def test_a_table_of_items_in_pieces_is_that_of_all_of_them(tmp_path, monkeypatch):
    """Also where items of one piece have a property or asset that those of another lack."""
    [row] = [json.loads(tile_item(tmp_path).read_text())]
    items = []
    for number in range(7):
        one = json.loads(json.dumps(row)) | {"id": f"t{number}"}
        if number > 3:
            one["properties"] |= {"start_datetime": "2024-01-01T00:00:00Z", "end_datetime": "2024-09-01T00:00:00Z"}
            del one["assets"]["scores"]
        items.append((str(tmp_path / "run" / "tiles" / f"t{number}" / f"t{number}.json"), one))
    files = []
    for many in (2, 100):
        monkeypatch.setattr(stac_write, "_ITEMS", many)
        assert stac_write.write_collection(tmp_path / "run", iter(items), title="t") == 7
        files.append((tmp_path / "run" / "collection.json").read_bytes())
        table = {found.id: found.to_dict() for found in stac_read.open_items(str(tmp_path / "run" / "items.parquet"))}
        files.append(table)
    assert files[:2] == files[2:]
    assert [len(table["t5"]["assets"]) for table in files[1::2]] == [1, 1]


def test_a_collection_over_images_without_place_or_over_nothing_is_valid(tmp_path):
    grid = Grid(None, (1.0, 1.0), (0.0, 0.0), "photo")
    path = tile_item(tmp_path, grid, Window(0, 0, 30, 20), None)
    for hrefs in ([str(path)], []):
        stac_write.write_collection(tmp_path / "run", stac_write.read_items(hrefs), title="t")
        assert valid_core(json.loads((tmp_path / "run" / "collection.json").read_text()))


@pytest.mark.parametrize(
    ("boxes", "expected"),
    [
        ([(179.9, -17, -179.9, -16), (179.5, -18, 179.8, -17)], [179.5, -18, -179.9, -16]),
        ([(170, 0, 180, 1), (-180, 0, -169.3, 2)], [170, 0, -169.3, 2]),
        ([(-100, 0, -95, 1), (100, 0, 105, 1), (0, 0, 5, 1)], [-100, 0, 105, 1]),
        ([(-180, -90, 180, 90)], [-180, -90, 180, 90]),
        ([(-10, 40, 10, 5, 41, 90), (20, 0, 0, 30, 1, 1)], [-10, 0, 30, 41]),
    ],
)
def test_a_collection_reaches_around_its_items_the_narrower_way(tmp_path, boxes, expected):
    for order in (boxes, boxes[::-1]):
        items = [
            (f"{k}.json", {"bbox": list(b), "properties": {}, "assets": {}, "geometry": None})
            for k, b in enumerate(order)
        ]
        stac_write.write_collection(tmp_path / "run", items, title="t")
        collection = json.loads((tmp_path / "run" / "collection.json").read_text())
        assert collection["extent"]["spatial"]["bbox"] == [expected]


# -- regions


def geojson(path, *geometries, **properties):
    features = [{"type": "Feature", "geometry": mapping(g), "properties": properties} for g in geometries]
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return str(path)


def test_a_box_is_a_region():
    region = resolve_region("116.5, 39.5,117,40")
    assert region.name == "116.5, 39.5,117,40"
    assert shape(region.geometry).bounds == (116.5, 39.5, 117, 40)
    across = shape(resolve_region("179,-10,-179,10").geometry)
    assert across.area == pytest.approx(40)
    assert len(across.geoms) == 2


@pytest.mark.parametrize("text", ["40,116,39,117", "1,2,3", "a,b,c,d", "0,0,0,1", "-361,0,1,1", "0,50,1,40"])
def test_a_box_that_cannot_be_meant_is_refused(text):
    with pytest.raises(ConfigError, match=r"south < north|expected west,south,east,north"):
        resolve_region(text)


def test_polygons_in_files_are_regions(tmp_path):
    one, two = box(0, 0, 1, 1), box(2, 2, 3, 3)
    region = resolve_region(geojson(tmp_path / "r.geojson", one, two))
    assert shape(region.geometry).equals(shapely.union(one, two))
    (tmp_path / "bare.json").write_text(json.dumps(mapping(one)))
    assert shape(resolve_region(str(tmp_path / "bare.json")).geometry).equals(one)
    frame = geopandas.GeoDataFrame(geometry=[box(500_000, 4_000_000, 501_000, 4_001_000)], crs=UTM)
    frame.to_parquet(tmp_path / "r.parquet")
    assert shape(resolve_region(str(tmp_path / "r.parquet")).geometry).bounds[0] == pytest.approx(117, abs=1e-3)


def test_files_without_area_are_refused(tmp_path):
    for geometry in (shapely.Point(1, 2), shapely.LineString([(0, 0), (1, 1)])):
        with pytest.raises(DataError, match="has no area"):
            resolve_region(geojson(tmp_path / "r.geojson", geometry))
    with pytest.raises(DataError, match="is empty"):
        resolve_region(geojson(tmp_path / "empty.geojson"))
    (tmp_path / "x.geojson").write_text("{")
    with pytest.raises(DataError, match="is not JSON"):
        resolve_region(str(tmp_path / "x.geojson"))
    (tmp_path / "y.geojson").write_text("{}")
    with pytest.raises(DataError, match="neither a file of polygons nor STAC"):
        resolve_region(str(tmp_path / "y.geojson"))
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match="is not Parquet"):
        resolve_region(str(tmp_path / "x.parquet"))


def test_a_catalogue_is_a_region_with_or_without_collection(tmp_path):
    path = stac_write.write_catalog(tmp_path, {"imagery": [item("a")]})
    region = resolve_region(f"{path}#imagery")
    assert (region.catalog, region.collection, region.geometry) == (path, "imagery", None)
    assert resolve_region(path).collection is None


def test_named_regions_are_found_here_and_may_name_their_imagery(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("stac/regions")
    folder.mkdir(parents=True)
    geojson(folder / "valley.geojson", box(0, 0, 1, 1), catalog="../cat/catalog.json", collection="imagery")
    assert "valley" in region_names()
    region = resolve_region("valley")
    assert region.name == "valley"
    assert region.collection == "imagery"
    assert Path(region.catalog).resolve() == tmp_path / "stac" / "cat" / "catalog.json"
    with pytest.raises(ConfigError, match=r"'vally' is not known: .*catalog.json#collection.*demo.*valley"):
        resolve_region("vally")
    with pytest.raises(ConfigError, match=r"no.geojson does not exist; named regions are .*valley"):
        resolve_region("no.geojson")


# -- real catalogues


@pytest.mark.real
def test_the_specifications_examples_are_read(shared):
    examples = shared / "data" / "stac" / "stac-spec" / "examples"
    assert {found.id for found in stac_read.open_items(str(examples / "catalog.json"))} >= {"CS3-20160503_132131_08"}


@pytest.mark.real
def test_a_providers_item_is_a_source_without_the_network(shared):
    path = shared / "data" / "stac" / "odc-stac" / "tests" / "data"
    [found] = stac_read.open_items(str(path / "S2B_MSIL2A_20190629T212529_R043_T06VVN_20201006T080531_raster_ext.json"))
    source = stac_read.source_of(found, bands=["red", "green", "blue", "nir", "B05"])
    assert source.crs == "EPSG:32606"
    assert (source.height, source.dtype, source.nodata) == (10980, "uint16", 0.0)
    assert set(source.bands) == {"red", "green", "blue", "nir", "B05"}


BANDS_OF_EARTH_SEARCH = ("red", "green", "blue")


@pytest.mark.parametrize(
    "order", [("visual", "", "-jp2"), ("-jp2", "visual", ""), ("", "-jp2", "visual"), ("-jp2", "visual")]
)
def test_bands_of_an_item_with_pictures_and_copies_are_those_with_their_names(tmp_path, order):
    """As Earth Search has them: each band as COG and as JPEG 2000, a picture of three bands, a class map, metadata."""
    place = {"crs": "EPSG:32733", "transform": Affine(10, 0, 400_000, 0, -10, 8_000_000)}
    profile = {"width": 30, "height": 20, "count": 1, "dtype": "uint16", **place}
    stored_CHW = np.random.default_rng(5).integers(1, 3000, (3, 20, 30)).astype("uint16")
    for name, band_HW in zip(BANDS_OF_EARTH_SEARCH, stored_CHW, strict=True):
        for suffix, driver, options in (
            (".tif", "GTiff", {}),
            (".jp2", "JP2OpenJPEG", {"QUALITY": 100, "REVERSIBLE": "YES"}),
        ):
            with rasterio.open(tmp_path / f"{name}{suffix}", "w", driver, **profile, **options) as file:
                file.write(band_HW, 1)
    with rasterio.open(tmp_path / "visual.tif", "w", "GTiff", **profile | {"count": 3, "dtype": "uint8"}) as file:
        file.write((stored_CHW // 16).astype("uint8"))
    bands = [{"name": name, "common_name": name} for name in BANDS_OF_EARTH_SEARCH]
    values = [{"data_type": "uint16", "scale": 0.0001, "offset": -0.1}]
    assets = {
        f"{name}{mark}": {"href": f"./{name}{'.jp2' if mark else '.tif'}", "eo:bands": [band], "raster:bands": values}
        for mark in ("", "-jp2")
        for name, band in zip(BANDS_OF_EARTH_SEARCH, bands, strict=True)
    }
    assets["visual"] = {"href": "./visual.tif", "eo:bands": bands, "roles": ["visual"]}
    kinds = {key: "visual" if key == "visual" else "-jp2" if key.endswith("-jp2") else "" for key in assets}
    ordered = {key: assets[key] for kind in order for key in assets if kinds[key] == kind}
    ordered |= {"thumbnail": {"href": "./t.jpg", "roles": ["thumbnail"]}, "info": {"href": "./info.json"}}
    item = {"type": "Feature", "stac_version": "1.0.0", "id": "s2", "links": [], "geometry": None, "assets": ordered}
    item["properties"] = {"datetime": "2024-05-01T10:00:00+02:00", "proj:epsg": 32733}
    (tmp_path / "item.json").write_text(json.dumps(item))
    [found] = stac_read.open_items(str(tmp_path / "item.json"), None)
    source = stac_read.source_of(found)
    assert (source.bands, source.dtype, source.datetime) == (BANDS_OF_EARTH_SEARCH, "uint16", "2024-05-01T08:00:00Z")
    assert source.units == ((0.0001, -0.1),) * 3
    [(grid, _)] = grids_of([source])
    pixels_CHW, valid_HW = read([source], grid, footprint(source, grid), bands=BANDS_OF_EARTH_SEARCH)
    assert np.array_equal(pixels_CHW, stored_CHW)
    assert valid_HW.all()
