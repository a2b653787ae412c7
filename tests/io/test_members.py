"""Catalogues as others write them: addresses are found, and a broken member is lost alone and with its name."""

import json
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.rpc import RPC
from rasterio.warp import transform_bounds
from shapely.geometry import box, mapping

from rayseg.errors import ConfigError, DataError
from rayseg.geo.region import Region, resolve_region
from rayseg.io import remote, stac_read
from rayseg.io.labels import ingest_rasters
from rayseg.io.stac_catalog import resolved
from rayseg.io.stac_read import BROKEN, imagery_collection, open_items, source_of
from rayseg.io.units import expect_one_dtype
from rayseg.steps import map as mapping_steps
from rayseg.steps.map import MapConfig
from rayseg.store import absolute, split_location, suffix_of, upath

PLACE = {"crs": "EPSG:32718", "transform": Affine(10, 0, 400_000, 0, -10, 8_000_000)}


def image(path, *, dtype="uint8", value=7):
    with rasterio.open(path, "w", "GTiff", 8, 8, 1, dtype=dtype, **PLACE) as file:
        file.write(np.full((1, 8, 8), value, dtype))
        west, south, east, north = transform_bounds(file.crs, "EPSG:4326", *file.bounds)
    return [west, south, east, north]


def item(name="a", href="./a.tif", *, bounds=(-76.0, -18.1, -75.9, -18.0), **fields):
    row = {
        "type": "Feature", "stac_version": "1.0.0", "id": name, "geometry": mapping(box(*bounds)), "bbox": list(bounds),
        "properties": {"datetime": "2021-06-01T10:00:00Z"}, "links": [],
        "assets": {"image": {"href": href, "type": "image/tiff; application=geotiff", "roles": ["data"]}},
    }  # fmt: skip
    return row | fields


def write(path, row):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row))
    return str(path)


def catalog(name, *links, kind="Catalog"):
    linked = [{"rel": rel, "href": href} for rel, href in links]
    extent = {"spatial": {"bbox": [[-180, -90, 180, 90]]}, "temporal": {"interval": [[None, None]]}}
    return {"type": kind, "stac_version": "1.0.0", "id": name, "description": "d", "links": linked} | (
        {"license": "other", "extent": extent} if kind == "Collection" else {}
    )


# -- where long edges of outlines lead

WIDE_CCW = [(-100, -15), (100, -15), (100, 15), (-100, 15)]
NARROW_CCW = [(-178, 20), (178, 20), (178, 22), (-178, 22)]  # of a scene 178..182, wound the wrong way


@pytest.mark.parametrize(
    ("ring", "bbox", "inside", "outside"),
    [
        (NARROW_CCW, [178, 20, -178, 22], "179,20.5,-179,21", "0,20.5,1,21"),  # west > east: it crosses
        (WIDE_CCW, [100, -15, -100, 15], "120,0,121,1", "0,0,1,1"),
        (WIDE_CCW, [-100, -15, 100, 15], "0,0,1,1", "120,0,121,1"),
        (None, [-150, -15, 150, 15], "0,0,1,1", "170,0,-170,1"),
        (None, [150, -15, 0, -150, 15, 90], "170,0,-170,1", "0,0,1,1"),
    ],
)
def test_the_box_of_an_item_settles_where_its_outline_crosses(tmp_path, ring, bbox, inside, outside):
    row = item(bounds=(0, 0, 1, 1), bbox=bbox, geometry=None)
    if ring:
        row["geometry"] = {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}
    path = write(tmp_path / "i.json", row)  # there is no file
    assert [one.id for one in open_items(path, geometry=resolve_region(inside).geometry)] == ["a"]
    with pytest.raises(DataError, match="do not overlap"):
        open_items(path, geometry=resolve_region(outside).geometry)


# -- addresses

NAMES = ["a b.tif", "50%.tif", "shot #3.tif", "why?.tif", "北京 é.TIF", "100%25.tif", "a+b&c=d.tif"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("spelling", ["plain", "escaped", "absolute", "file", "file escaped"])
def test_an_href_is_found_however_it_is_spelled(tmp_path, name, spelling):
    folder = tmp_path / "in #1" / "50% of it"
    folder.mkdir(parents=True)
    image(folder / name)
    href = {
        "plain": f"./50% of it/{name}",
        "escaped": f"./50%25%20of%20it/{quote(name)}",
        "absolute": str(folder / name),
        "file": f"file://{folder / name}",
        "file escaped": (folder / name).as_uri(),
    }[spelling]
    [found] = open_items(write(tmp_path / "in #1" / "items.json", item(href=href)))
    source = source_of(found)
    assert source.assets[0][0] == str(folder / name)
    assert source.crs == PLACE["crs"]


@pytest.mark.parametrize("folder", ["shots #3", "50%", "a b/ü?", "x.json"])
def test_what_ingest_prints_is_found_in_any_folder(tmp_path, folder):
    (tmp_path / folder).mkdir(parents=True)
    image(tmp_path / folder / "a.tif")
    printed = ingest_rasters(tmp_path / folder, tmp_path / folder / "cat")
    place, collection = split_location(f"{printed}#imagery")
    assert (place, collection) == (printed, "imagery")
    assert source_of(open_items(place, collection)[0]).assets[0][0] == str(tmp_path / folder / "a.tif")


@pytest.mark.parametrize(
    ("text", "place", "fragment"),
    [
        ("/a/catalog.json#imagery", "/a/catalog.json", "imagery"),
        ("/shots #3/catalog.json", "/shots #3/catalog.json", ""),
        ("s3://b/k #1/items.PARQUET#c/asset", "s3://b/k #1/items.PARQUET", "c/asset"),
        ("https://h/v1#a,b&datetime=2020-01-01/2021-01-01", "https://h/v1", "a,b&datetime=2020-01-01/2021-01-01"),
        ("https://h/c.json?sig=a%2Fb#c", "https://h/c.json?sig=a%2Fb", "c"),
        ("#truth/classes", "", "truth/classes"),
        ("masks #2", "masks #2", ""),
    ],
)
def test_a_fragment_is_told_from_a_sign_in_a_name(text, place, fragment):
    assert split_location(text) == (place, fragment)


def test_file_urls_and_suffixes(tmp_path):
    (tmp_path / "a b#c.tif").touch()
    for text in (f"file://localhost{tmp_path}/a%20b%23c.tif", f"file:{tmp_path}/a%20b%23c.tif"):
        assert absolute(text) == str(tmp_path / "a b#c.tif")
        assert upath(text).exists()
    assert suffix_of("https://h/a.TIF?X-Amz-Signature=a.b/c.png") == ".tif"
    assert suffix_of("/x/a.b?c.JP2") == ".jp2"


@pytest.mark.parametrize("query", ["sv=2021&sig=x%2Fy%2Bz%3D", "X-Amz-Credential=k%2F2021%2Fs3&X-Amz-Signature=0a"])
def test_signed_queries_reach_the_server_as_they_are(tmp_path, served, query):
    url, asked = served
    image(tmp_path / "a.tif")
    write(tmp_path / "c d.json", item(href=f"{url}/a.tif?{query}"))
    [found] = open_items(f"{url}/c d.json?{query}")
    assert source_of(found).crs == PLACE["crs"]
    assert f"/c%20d.json?{query}" in asked
    assert [path for path in asked if path.startswith("/a.tif")] == [f"/a.tif?{query}"] * sum(
        "a.tif" in p for p in asked
    )


def test_a_catalogue_on_the_web_with_names_of_all_kinds_is_read(tmp_path, served):
    url, _ = served
    (tmp_path / "sub dir #1").mkdir()
    image(tmp_path / "sub dir #1" / "é.tif")
    write(tmp_path / "sub dir #1" / "a.json", item(href="./é.tif"))
    write(tmp_path / "catalog.json", catalog("c", ("item", "./sub%20dir%20%231/a.json")))
    [found] = open_items(f"{url}/catalog.json")
    assert source_of(found).assets == ((f"{url}/sub%20dir%20%231/é.tif", ("b1",)),)


# -- broken members


def geometry(kind, coordinates):
    return {"geometry": {"type": kind, "coordinates": coordinates}}


@pytest.mark.parametrize(
    "broken",
    [
        item("bad", properties={}),
        item("bad", properties={"datetime": "yesterday"}),
        item("bad", properties={"datetime": None, "start_datetime": "2021-01-01T00:00:00Z"}),
        item("bad", **geometry("Polygon", [[[0, 0], [1, 1]]])),
        item("bad", **geometry("Polygon", [[[-100, 0], [100, 0], [-100, 5], [100, 5], [-100, 0]]])),
        item("bad", assets=["a.tif"]),
        item("bad", links=None),
        item("bad", bbox=["west", 0, 1, 1]),
        item("bad", type="Collection"),
        item("bad", properties={"datetime": "2021-06-01T10:00:00Z", "proj:shape": "8x8", "proj:epsg": 32718}),
        item("bad", href="./none.tif"),
        {"id": "bad"},
    ],
)
def test_one_broken_item_is_lost_alone_and_named(tmp_path, broken):
    image(tmp_path / "a.tif")
    rows = [item("good"), broken]
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": rows})
    for region in (Region("r", catalog=path), Region("r", mapping(box(-77, -19, -75, -17)), catalog=path)):
        sources, unread = mapping_steps.imagery(region, MapConfig())
        assert [source.item_id for source in sources] == ["good"]
        assert list(unread) == ["bad"]
        assert "bad" in str(unread["bad"]) or "none.tif" in str(unread["bad"])


def test_members_that_are_no_objects_and_ids_that_occur_twice_keep_names_of_their_own(tmp_path):
    image(tmp_path / "a.tif")
    rows = [item("a"), item("a", properties={}), "a.tif", item("", properties={}), item("a", assets=3)]
    items = open_items(write(tmp_path / "items.json", {"type": "FeatureCollection", "features": rows}))
    assert sorted(one.id for one in items) == ["a", "a-2", "a-3", "item-3", "item-4"]
    assert [one.id for one in items if BROKEN not in one.properties] == ["a"]


def test_items_of_one_id_are_items_of_their_own_and_one_listed_twice_is_one(tmp_path, caplog):
    image(tmp_path / "a.tif")
    image(tmp_path / "b.tif")
    rows = [item("a"), item("a", href="./b.tif"), item("a"), item("a", href="./none.tif")]
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": rows})
    sources, unread = mapping_steps.imagery(Region("r", catalog=path), MapConfig())
    assert {source.item_id: Path(source.assets[0][0]).name for source in sources} == {"a": "a.tif", "a-2": "b.tif"}
    assert "none.tif" in str(unread["a-3"])
    assert "has several items called a, one of them is called a-2 here" in caplog.text


def test_items_of_one_id_in_folders_of_their_own_are_two_whose_relative_hrefs_look_alike(tmp_path):
    for day, value in (("2021", 7), ("2022", 9)):
        (tmp_path / day).mkdir()
        image(tmp_path / day / "a.tif", value=value)
        write(tmp_path / day / "tile.json", item("T18", properties={"datetime": f"{day}-06-01T00:00:00Z"}))
    links = [{"rel": "item", "href": f"./{day}/tile.json"} for day in ("2021", "2022", "2021")]
    root = write(tmp_path / "c.json", {"type": "Catalog", "id": "c", "stac_version": "1.0.0", "links": links})
    sources, _ = mapping_steps.imagery(Region("r", catalog=root), MapConfig())
    assert sorted(Path(source.assets[0][0]).parent.name for source in sources) == ["2021", "2022"]


def test_an_id_may_be_a_number_and_an_item_without_one_is_named(tmp_path):
    image(tmp_path / "a.tif")
    rows = [item(7), item("a"), item(None)]
    path = tmp_path / "items.json"
    path.write_text("\ufeff" + json.dumps({"type": "FeatureCollection", "features": rows}))  # as Windows writes
    sources, unread = mapping_steps.imagery(Region("r", catalog=str(path)), MapConfig())
    assert [source.item_id for source in sources] == ["7", "a"]
    assert "item-3" in unread
    assert "it has no id" in str(unread["item-3"])


def test_a_broken_item_elsewhere_is_no_part_of_a_region(tmp_path):
    image(tmp_path / "a.tif")
    rows = [item("a"), item("far", bounds=(10, 10, 11, 11), properties={}), item("near", properties={})]
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": rows})
    assert {one.id for one in open_items(path, geometry=mapping(box(-77, -19, -75, -17)))} == {"a", "near"}
    with pytest.raises(DataError, match=r"far of .* is not a valid STAC item"):
        open_items(path, geometry=mapping(box(9, 9, 12, 12)))


@pytest.mark.parametrize(
    ("rel", "href", "content", "name"),
    [
        ("item", "./items/lost.json", None, "lost"),
        ("item", "./half.json", '{"type": "Fea', "half"),
        ("child", "./gone/collection.json", None, "gone"),
        ("child", "./half/catalog.json", "<html>", "half"),
        ("child", "./other.json", '{"type": "Catalog", "id": "no links"}', "other"),
        ("item", "./list.json", "[1, 2]", "list"),
    ],
)
def test_a_child_that_cannot_be_read_costs_no_other(tmp_path, rel, href, content, name):
    image(tmp_path / "a.tif")
    write(tmp_path / "deep" / "a.json", item(href="../a.tif"))
    write(tmp_path / "deep" / "catalog.json", catalog("deep", ("item", "a.json"), ("child", "../catalog.json")))
    path = write(tmp_path / "catalog.json", catalog("c", ("child", "./deep/catalog.json"), (rel, href)))
    if content is not None:
        (tmp_path / href).parent.mkdir(exist_ok=True)
        (tmp_path / href).write_text(content)
    assert imagery_collection(path) is None
    items = {one.id: one for one in open_items(path)}
    assert items.keys() == {"a", name}
    assert source_of(items["a"]).crs == PLACE["crs"]
    with pytest.raises(DataError, match=href.removeprefix("./")):
        source_of(items[name])


def test_a_server_that_fails_for_one_member_costs_no_other(tmp_path, served, monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0,))
    url, asked = served
    image(tmp_path / "a.tif")
    write(tmp_path / "a.json", item())
    write(tmp_path / "catalog.json", catalog("c", ("item", "./a.json"), ("item", "./busy.json")))
    items = {one.id: one for one in open_items(f"{url}/catalog.json")}
    assert items.keys() == {"a", "busy"}
    assert asked.count("/busy.json") == 2  # a busy server is asked again


def test_the_imagery_is_taken_beside_a_collection_that_cannot_be_read(tmp_path, caplog):
    image(tmp_path / "a.tif")
    write(tmp_path / "imagery" / "a.json", item(href="../a.tif"))
    write(tmp_path / "imagery" / "collection.json", catalog("imagery", ("item", "a.json"), kind="Collection"))
    links = [("child", f"./{name}/collection.json") for name in ("imagery", "truth")]
    path = write(tmp_path / "catalog.json", catalog("c", *links))
    assert imagery_collection(path) == "imagery"
    assert "truth/collection.json does not exist" in caplog.text
    with pytest.raises(ConfigError, match=r"no collection 'truth', expected one of imagery.*truth/collection.json"):
        open_items(path, "truth")


# -- items of other tools


@pytest.mark.parametrize(("lon", "lat"), [(15.0, 42.0), (-70.0, -33.0), (179.0, 65.0)])
def test_a_sensor_model_alone_is_named_with_the_remedy(tmp_path, lon, lat):
    with rasterio.open(tmp_path / "r.tif", "w", "GTiff", 8, 8, 1, dtype="uint16") as file:
        file.write(np.ones((1, 8, 8), "uint16"))
        file.rpcs = RPC(
            height_off=100,
            height_scale=500,
            lat_off=lat,
            lat_scale=0.01,
            line_off=4,
            line_scale=4,
            long_off=lon,
            long_scale=0.01,
            samp_off=4,
            samp_scale=4,
            err_bias=0,
            err_rand=0,
            line_num_coeff=[0, 0, -1, *[0] * 17],
            samp_num_coeff=[0, 1, *[0] * 18],
            line_den_coeff=[1, *[0] * 19],
            samp_den_coeff=[1, *[0] * 19],
        )
    ways = [lambda: ingest_rasters(tmp_path / "r.tif", tmp_path / "cat"), lambda: source_of_item(tmp_path)]
    # Items that state everything, but for a place, do not hide the sensor model.
    place = {"type": "Point", "coordinates": [lon, lat]}
    for geometry in (None, place):
        for code in ({"proj:code": None}, {"proj:epsg": None}, {}):
            fields = code | {"proj:shape": [8, 8], "proj:transform": [1, 0, 0, 0, 1, 0]}
            ways.append(lambda fields=fields, geometry=geometry: stating(tmp_path, fields, geometry))
    for use in ways:
        with pytest.raises(DataError, match=r"r\.tif has RPCs .*orthorectify it first, with gdalwarp -rpc"):
            use()
    assert not (tmp_path / "cat").exists()


def stating(folder, properties, geometry):
    row = item(href="./r.tif") | {"geometry": geometry}
    row["properties"] = row["properties"] | properties
    row["assets"]["image"] |= {"roles": ["data"], "bands": [{"name": "pan", "data_type": "uint16"}]}
    if geometry is None:
        row.pop("bbox", None)
    return source_of(open_items(write(folder / "stating.json", row))[0])


def source_of_item(folder):
    return source_of(open_items(write(folder / "r.json", item(href="./r.tif")))[0])


def bands(*rows, version="1.0.0", dtype="uint8", field="eo:bands"):
    asset = {"href": "/x/a.tif", "type": "image/tiff; application=geotiff", "roles": ["data"], field: list(rows)}
    frame = {"proj:epsg": 32718, "proj:shape": [8, 8], "proj:transform": [10, 0, 0, 0, -10, 0]}
    if field == "eo:bands":
        asset["raster:bands"] = [{"data_type": dtype}] * len(rows)
    properties = {"datetime": "2021-06-01T10:00:00Z", **frame}
    return item(assets={"asset": asset}, properties=properties, stac_version=version)


@pytest.mark.parametrize(
    ("row", "names"),
    [
        (bands({"name": "b1", "description": "red"}, {"name": "b2", "description": "Nir"}), ("red", "nir")),
        (bands({"name": "B4", "common_name": "red"}, {"name": "B8", "common_name": "nir"}), ("red", "nir")),
        (bands({"name": "b1", "description": "gray"}, {"name": "b2", "description": "undefined"}), ("b1", "b2")),
        (bands({"name": "b1", "description": "red"}, {"name": "b2", "description": "red"}), ("b1", "b2")),
        (bands({"name": "soil", "description": "red"}), ("soil",)),
        (
            bands({"name": "1", "eo:common_name": "green", "data_type": "uint8"}, version="1.1.0", field="bands"),
            ("green",),
        ),
        (
            bands({"name": "Band 3", "description": "blue", "data_type": "uint8"}, version="1.1.0", field="bands"),
            ("blue",),
        ),
    ],
)
def test_bands_have_the_names_that_items_of_all_versions_give_them(tmp_path, row, names):
    [found] = open_items(write(tmp_path / "a.json", row))
    assert source_of(found).bands == names


def test_names_of_bands_are_mapped_by_a_setting(tmp_path):
    path = write(tmp_path / "a.json", bands({"name": "b1"}, {"name": "b2"}))
    [source], _ = mapping_steps.imagery(Region("r", catalog=path), MapConfig(bands={"nir": "b2"}))
    assert source.bands == ("b1", "nir")
    [swapped], _ = mapping_steps.imagery(Region("r", catalog=path), MapConfig(bands={"b1": "b2"}))
    assert swapped.bands == ("own b1", "b1")
    _, unread = mapping_steps.imagery(Region("r", catalog=path), MapConfig(bands={"red": "b2", "nir": "b2"}))
    assert "gives bands of a one name" in str(unread["a"])
    assert "bands" not in MapConfig().model_dump()  # keys of steps stay what they were


@pytest.mark.parametrize("stated", [True, False])
def test_bands_of_several_pixel_types_are_refused_with_the_way_to_choose(tmp_path, stated):
    image(tmp_path / "r.tif", dtype="int16")
    image(tmp_path / "n.tif", dtype="int16")
    image(tmp_path / "c.tif", dtype="uint8")
    assets = {
        key: {"href": f"./{key[0]}.tif", "type": "image/tiff", "roles": ["data"]}
        | ({"raster:bands": [{"data_type": dtype}]} if stated else {})
        for key, dtype in (("red", "int16"), ("nir", "int16"), ("clouds", "uint8"))
    }
    [found] = open_items(write(tmp_path / "a.json", item(assets=assets)))
    source = source_of(found)
    assert stac_read.Source.from_row(source.to_row()) == source
    expect_one_dtype(source, ["red", "nir"])
    with pytest.raises(DataError, match=r"red, nir of int16; clouds of uint8.*--set bands=\[red,nir\]"):
        expect_one_dtype(source, source.bands)


@pytest.mark.parametrize("stated", [True, False])
@pytest.mark.parametrize(
    ("left", "right", "here", "elsewhere"),
    [
        (-100.0, 100.0, "0,0,10,5", "150,0,160,5"),
        (-179.5, 179.5, "0,0,10,5", None),
        (170.0, 190.0, "-175,0,-172,5", "0,0,10,5"),
        (95.0, 265.0, "-175,0,-172,5", "0,0,10,5"),
    ],
)
def test_an_item_of_long_edges_lies_where_its_pixels_do(tmp_path, left, right, here, elsewhere, stated):
    width = int(2 * (right - left))
    profile = {"driver": "GTiff", "count": 1, "height": 60, "width": width, "dtype": "uint8", "crs": "EPSG:4326"}
    affine = Affine((right - left) / width, 0, left, 0, -0.5, 15)
    with rasterio.open(tmp_path / "w.tif", "w", **profile, transform=affine) as file:
        file.write(np.ones((1, 60, width), "uint8"))
    west, east = left, (right + 180) % 360 - 180
    row = item(bounds=(min(west, east), -15, max(west, east), 15), href=str(tmp_path / "w.tif"))  # as most tools do
    if stated:
        row["properties"] |= {"proj:code": "EPSG:4326", "proj:shape": [60, width], "proj:transform": list(affine)[:6]}
    path = write(tmp_path / "w.json", row)
    assert open_items(path, geometry=resolve_region(here).geometry)
    if elsewhere:
        with pytest.raises(DataError, match="do not overlap"):
            open_items(path, geometry=resolve_region(elsewhere).geometry)


@pytest.mark.parametrize("folder", ["a%20b", "50%", "a b"])
@pytest.mark.parametrize("href", ["./x%20y.tif", "./x y.tif"])
def test_percent_signs_of_a_folder_stay_while_those_of_an_href_are_decoded(tmp_path, folder, href):
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "x y.tif").write_bytes(b"")
    assert resolved(href, str(tmp_path / folder / "i.json")) == str(tmp_path / folder / "x y.tif")
