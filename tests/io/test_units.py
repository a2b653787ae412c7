"""Scenes whose stored values mean different things: converted to one unit as they are read, or refused by name."""

from dataclasses import replace

import numpy as np
import pystac
import pytest
import rasterio
from affine import Affine

from rayseg.errors import DataError
from rayseg.io.labels import ingest_rasters
from rayseg.io.rasters import footprint, grids_of, read, source_of_file
from rayseg.io.stac_read import open_items, source_of
from rayseg.io.units import common_units, converted, expect_one_dtype, expect_one_unit, units_of, with_dtype_of

SOUTH = "EPSG:32722"
GROUND = np.random.default_rng(4).uniform(0.02, 0.4, (2, 24, 30))


def write(path, image, *, crs=SOUTH, size=10.0, nodata=None, scales=None, offsets=None):
    place = {"crs": crs, "transform": Affine(size, 0, 300_000, 0, -size, 7_400_000)}
    shape = {"count": len(image), "height": image.shape[1], "width": image.shape[2]}
    with rasterio.open(path, "w", driver="GTiff", dtype=image.dtype, nodata=nodata, **shape, **place) as dataset:
        dataset.write(image)
        if scales:
            dataset.scales, dataset.offsets = scales, offsets
    return str(path)


def item(name, assets, **properties):
    """`assets`: key -> (href, fields)."""
    found = pystac.Item(name, None, None, pystac.utils.str_to_datetime("2022-03-01T00:00:00Z"), properties)
    for key, (href, fields) in assets.items():
        found.add_asset(key, pystac.Asset(href, media_type="image/tiff", roles=["data"], extra_fields=fields))
    return found


def pixels_of(source, bands):
    [(grid, _)] = grids_of([source])
    return read([source], grid, footprint(source, grid), bands=bands)


def test_scenes_of_two_offsets_are_read_in_one_unit_in_any_band_order(tmp_path):
    """STAC 1.1 bands, raster:bands in the other order, int16."""
    new = np.rint(GROUND * 10_000 + 1000).astype(np.int16)
    old = np.rint(GROUND[::-1] * 10_000).astype(np.int16)
    unit = {"raster:scale": 0.0001, "raster:offset": -0.1}
    bands = {"bands": [{"name": name, "data_type": "int16", **unit} for name in ("red", "nir")]}
    rows = {"eo:bands": [{"name": "nir"}, {"name": "red"}], "raster:bands": [{"scale": 0.0001, "offset": 0}] * 2}
    one = source_of(item("new", {"image": (write(tmp_path / "new.tif", new), bands)}))
    two = source_of(item("old", {"image": (write(tmp_path / "old.tif", old), rows)}))
    units = common_units([two, one])
    assert units == {"red": (0.0001, -0.1), "nir": (0.0001, -0.1)}
    changed = [converted(source, units) for source in (one, two)]
    assert changed[0] == one
    expect_one_unit(changed)
    with pytest.raises(DataError, match=r"new states nir as stored x 0\.0001 \+ offset -0\.1, old as .* offset 0,"):
        expect_one_unit([two, one])
    first, second = (pixels_of(source, ["nir", "red"])[0] for source in changed)
    assert (first == second).all()
    assert first.dtype == np.int16
    assert (first == new[::-1]).all()


def test_scale_and_offset_of_a_files_own_tags_are_converted_too(tmp_path):
    """float32 of 30 m in the north, through ingest; nodata stays nodata."""
    for name, scale, offset in (("a", 0.5, 0.0), ("b", 0.25, 3.0)):
        image = ((GROUND - offset) / scale).astype(np.float32)
        image[:, 3, 4] = -7
        written = {"crs": "EPSG:32650", "size": 30.0, "nodata": -7}
        write(tmp_path / f"{name}.tif", image, scales=[scale] * 2, offsets=[offset] * 2, **written)
    catalogue = ingest_rasters([tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "catalogue")
    sources = [source_of(found) for found in open_items(catalogue)]
    assert {source.item_id: units_of(source, ["b1"]) for source in sources} == {"a": ((0.5, 0),), "b": ((0.25, 3),)}
    a, b = (pixels_of(converted(source, {"b1": (0.5, 0.0)}), ["b1"]) for source in sources)
    assert np.allclose(a[0], b[0], atol=1e-5)
    assert a[0][0, 3, 4] == b[0][0, 3, 4] == 0
    assert not a[1][3, 4]
    assert b[1].sum() == 24 * 30 - 1


def test_conversion_clips_to_the_type_and_is_refused_where_the_type_cannot_hold_it(tmp_path):
    low = np.full((1, 4, 4), 40, np.uint16)
    source = replace(source_of_file(write(tmp_path / "a.tif", low), "a"), units=((0.0001, 0.0),))
    assert (pixels_of(converted(source, {"b1": (0.0001, 0.01)}), ["b1"])[0] == 0).all()
    assert converted(source, {"b1": (0.00275, -0.2)}) == source
    byte = replace(source, dtype="uint8")
    assert converted(byte, {"b1": (0.0001, -0.1)}) == byte


def test_sentinel_2_scenes_from_both_sides_of_baseline_0400_are_refused_by_name(tmp_path):
    href = write(tmp_path / "a.tif", np.ones((2, 8, 8), np.uint16))
    baselines = {"old": "03.01", "new": "05.09", "newer": "05.11"}
    sources = {
        name: source_of(item(name, {"image": (href, {})}, **{"s2:processing_baseline": text}))
        for name, text in baselines.items()
    }
    with pytest.raises(DataError, match=r"old is from Sentinel-2 processing baseline 03\.01, new from 05\.09"):
        expect_one_unit(list(sources.values()))
    expect_one_unit([sources["new"], sources["newer"]])
    applied = {"s2:processing_baseline": "05.09", "earthsearch:boa_offset_applied": True}
    expect_one_unit([sources["old"], source_of(item("applied", {"image": (href, {})}, **applied))])
    stated = {"raster:bands": [{"scale": 0.0001, "offset": -0.1}] * 2}
    # Earth Search states the offset that it has already subtracted.
    harmonised = source_of(item("h", {"image": (href, stated)}, **applied))
    assert units_of(harmonised, ["b1"]) == ((0.0001, 0.0),)


def test_the_baseline_stands_in_a_products_name_too(tmp_path):
    bare = source_of_file(write(tmp_path / "a.tif", np.ones((2, 8, 8), np.uint16)), "a")
    old = replace(bare, item_id="S2A_MSIL2A_20210704T101031_N0301_R022_T33UUP")
    new = replace(bare, item_id="S2B_MSIL2A_20220704T101559_N0400_R065_T33UUP")
    with pytest.raises(DataError, match=r"_R022_T33UUP is from Sentinel-2 processing baseline 03\.01, S2B.* 04\.00"):
        expect_one_unit([new, old])
    stated = replace(new, units=((0.0001, -0.1),) * 2)
    with pytest.raises(DataError, match=r"stored, without scale and offset"):
        expect_one_unit([old, stated])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ({"processing:version": "02.14"}, {"processing:version": "05.09", "platform": "Sentinel-2B"}),
        ({"s2:processing_baseline": "N0214"}, {"s2:processing_baseline": 5.09}),
        ({"sentinel:processing_baseline": "0214"}, {"title": "S2B_MSIL2A_20230704T101559_N0509_R065_T33UUP.SAFE"}),
        ({"s2:product_uri": "S2A_MSIL2A_20180704T101559_N0214_R065.SAFE"}, {"s2:processing_baseline": "05.09"}),
    ],
)
def test_every_spelling_of_a_baseline_counts(tmp_path, old, new):
    href = write(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint16))
    sources = [source_of(item(name, {"image": (href, {})}, **way)) for name, way in (("a", old), ("b", new))]
    with pytest.raises(
        DataError, match=r"a is from Sentinel-2 processing baseline 02\.14, b from 05\.09, expected one"
    ):
        expect_one_unit(sources)
    assert [source.baseline for source in sources] in (["02.14", "05.09"], ["02.14", "5.09"])


def test_a_version_of_another_satellite_is_no_baseline(tmp_path):
    href = write(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint16))
    for other in ({"constellation": "landsat", "processing:version": "02.14"}, {"processing:version": "2.1"}):
        assert source_of(item("a", {"image": (href, {})}, **other)).baseline == ""


def test_the_baseline_stands_in_a_files_path_or_a_short_id_too(tmp_path):
    folders = [tmp_path / name for name in ("S2A_33UUP_20180704_N0214_L2A", "S2A_MSIL2A_20230704_N0509.SAFE")]
    for folder in folders:
        folder.mkdir()
    hrefs = [write(folder / "B04.tif", np.ones((1, 8, 8), np.uint16)) for folder in folders]
    with pytest.raises(DataError, match=r"x is from .* 02\.14, y from 05\.09"):
        expect_one_unit([source_of_file(href, name) for href, name in zip(hrefs, "xy", strict=True)])


@pytest.mark.parametrize("stated", ["02.14", "05.09"])
def test_scenes_without_a_baseline_do_not_mix_with_scenes_that_have_one(tmp_path, stated):
    href = write(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint16))
    mute, known = (
        source_of(item(name, {"image": (href, {})}, **way))
        for name, way in (("a", {}), ("b", {"s2:processing_baseline": stated}))
    )
    with pytest.raises(DataError, match=rf"b is from Sentinel-2 processing baseline {stated}, a states none, expected"):
        expect_one_unit([mute, known])
    expect_one_unit([replace(mute, dtype="uint8"), replace(known, dtype="uint8")])


def test_the_tags_of_every_file_of_an_item_count(tmp_path):
    """One asset a band, and an item that states neither types nor units."""
    tags = {"scales": [0.01], "offsets": [-5.0]}
    hrefs = {name: write(tmp_path / f"{name}.tif", np.ones((1, 8, 8), np.int16), **tags) for name in ("red", "nir")}
    found = source_of(item("a", {name: (href, {"bands": [{"name": name}]}) for name, href in hrefs.items()}))
    assert found.units == ((0.01, -5.0),) * 2


def test_units_nodata_and_type_of_an_item_hold_for_its_assets_that_state_none(tmp_path):
    """STAC 1.1 common metadata; a band's own fields count before the asset's, and those before the item's."""
    image = np.full((1, 8, 8), 3000, np.int16)
    image[0, 0] = -5
    href = write(tmp_path / "a.tif", image)
    common = {"raster:scale": 0.0001, "raster:offset": -0.1, "nodata": -5, "data_type": "int16", "scale": "1:25000"}
    assets = {
        "red": (href, {"bands": [{"name": "red"}]}),
        "nir": (href, {"raster:scale": 0.01, "bands": [{"name": "nir", "nodata": 7}]}),
        "blue": (href, {"raster:scale": 0.01, "eo:bands": [{"name": "blue"}], "raster:bands": [{"scale": 2.0}]}),
    }
    source = source_of(item("a", assets, **common))
    assert source.bands == ("red", "nir", "blue")
    assert source.units == ((0.0001, -0.1), (0.01, -0.1), (2.0, -0.1))
    assert source.nodatas == (-5.0, 7.0, -5.0)
    assert source.dtype == "int16"
    pixels, valid = pixels_of(converted(source, {"red": (0.0001, 0.0)}), ["red"])
    assert not valid[0].any()
    assert (pixels[0, 1:] == 2000).all()
    other = source_of(item("b", {"red": (href, {"bands": [{"name": "red"}]})}))
    with pytest.raises(DataError, match=r"a states red as stored x 0\.0001 \+ offset -0\.1, b as stored, without"):
        expect_one_unit([source, other], ["red"])


@pytest.mark.parametrize(("text", "value"), [("0", 0.0), ("65535", 65535.0), (7, 7.0), ("nan", None), (None, None)])
def test_nodata_is_a_number_as_text_too(tmp_path, text, value):
    href = write(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint16))
    assert source_of(item("a", {"image": (href, {"raster:bands": [{"nodata": text}]})})).nodata == value


def test_nodata_that_is_no_number_is_refused(tmp_path):
    href = write(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint16))
    with pytest.raises(DataError, match="a states the nodata value 'black', expected a number or nan; correct"):
        source_of(item("a", {"image": (href, {"raster:bands": [{"nodata": "black"}]})}))


def test_scenes_that_state_nothing_do_not_mix_with_scenes_that_do(tmp_path):
    bare = source_of_file(write(tmp_path / "a.tif", np.ones((2, 8, 8), np.uint16)), "a")
    stated = replace(bare, item_id="b", units=((0.0001, 0.0), (0.0001, -0.1)))
    with pytest.raises(DataError, match=r"a states b1 as stored, without scale and offset, b as stored x 0\.0001"):
        expect_one_unit([stated, bare])
    with pytest.raises(DataError, match=r"b2 as"):
        expect_one_unit([stated, bare], ["b2"])
    expect_one_unit([bare, replace(bare, item_id="c")])


def test_each_band_has_its_own_nodata_value(tmp_path):
    """Two files of one item on another grid than the output's, and one VRT."""
    red, nir = np.full((1, 20, 20), 500, np.int16), np.full((1, 20, 20), 700, np.int16)
    red[0, 5:9], nir[0, 12:15] = -1, -9999
    hrefs = [write(tmp_path / f"{name}.tif", image) for name, image in (("red", red), ("nir", nir))]
    assets = {
        name: (href, {"bands": [{"name": name, "data_type": "int16", "nodata": nodata}]})
        for name, href, nodata in (("red", hrefs[0], -1), ("nir", hrefs[1], -9999))
    }
    source = source_of(item("a", assets))
    assert source.nodatas == (-1.0, -9999.0)
    image, valid = pixels_of(source, ["nir", "red"])
    assert valid.sum() == 400 - 7 * 20
    assert set(np.unique(image)) == {0, 500, 700}
    half = replace(grids_of([source])[0][0], resolution=(4.0, 4.0))
    image, valid = read([source], half, footprint(source, half), bands=["red", "nir"])
    assert set(np.unique(image[:, valid])) <= {500, 700}


def mixed_vrt(folder):
    """A VRT of band p of uint8 and band q of uint16, whose nodata 65535 p cannot hold."""
    p = np.full((20, 20), 50, np.uint8)
    q = np.full((20, 20), 5000, np.uint16)
    q[:4] = 65535
    write(folder / "p.tif", p[None])
    write(folder / "q.tif", q[None])
    bands = "".join(
        f'<VRTRasterBand dataType="{kind}" band="{band}"><Description>{name}</Description>{nodata}<SimpleSource>'
        f'<SourceFilename relativeToVRT="1">{name}.tif</SourceFilename></SimpleSource></VRTRasterBand>'
        for band, name, kind, nodata in (
            (1, "p", "Byte", ""),
            (2, "q", "UInt16", "<NoDataValue>65535</NoDataValue>"),
        )
    )
    with rasterio.open(folder / "p.tif") as file:
        place = ",".join(map(str, file.transform.to_gdal()))
        text = (
            f'<VRTDataset rasterXSize="20" rasterYSize="20"><SRS>{file.crs}</SRS><GeoTransform>{place}</GeoTransform>'
        )
    (folder / "a.vrt").write_text(f"{text}{bands}</VRTDataset>")
    return folder / "a.vrt"


@pytest.mark.parametrize("by", ["file", "item"])
def test_a_file_whose_bands_differ_in_pixel_type_is_read_band_by_band(tmp_path, by):
    path = mixed_vrt(tmp_path)
    source = source_of_file(str(path), "a") if by == "file" else source_of(item("a", {"image": (str(path), {})}))
    assert source.dtypes == ("uint8", "uint16")
    assert [with_dtype_of(source, bands).dtype for bands in (["p"], ["q"], ["p", "q"])] == ["uint8", "uint16", "uint8"]
    for band, dtype, value, count in (("p", "uint8", 50, 400), ("q", "uint16", 5000, 320)):
        image, valid = pixels_of(with_dtype_of(source, [band]), [band])
        assert (image.dtype, valid.sum()) == (dtype, count)
        assert (image[0][valid] == value).all()
    message = r"a has bands of several pixel types \(p of uint8; q of uint16\), expected one type; "
    with pytest.raises(DataError, match=message + r"as model m needs them all"):
        expect_one_dtype(source, ["p", "q"], model="m")
    with pytest.raises(DataError, match=message + r"choose bands, as --set bands=\[p\]"):
        expect_one_dtype(source, ["p", "q"])
    with pytest.raises(DataError, match=r"a\.vrt has (bands of uint16 and uint8|uint16 pixels where uint8)"):
        pixels_of(source, ["p", "q"])


def test_a_nodata_value_that_a_warp_would_not_heed_is_refused(tmp_path):
    source = with_dtype_of(source_of_file(str(mixed_vrt(tmp_path)), "a"), ["q"])
    grid = replace(grids_of([source])[0][0], resolution=(4.0, 4.0))
    with pytest.raises(DataError, match="a nodata value that the first cannot hold, which is not warped"):
        read([source], grid, footprint(source, grid), bands=["q"])


def test_a_file_whose_bands_differ_in_nodata_is_read_band_by_band(tmp_path):
    image = np.full((2, 20, 20), 9, np.uint8)
    image[0, :4], image[1, 10:] = 0, 200
    write(tmp_path / "a.tif", image)
    text = (tmp_path / "a.vrt", ["0", "200"])
    bands = "".join(
        f'<VRTRasterBand dataType="Byte" band="{band}"><NoDataValue>{value}</NoDataValue><SimpleSource>'
        f'<SourceFilename relativeToVRT="1">a.tif</SourceFilename><SourceBand>{band}</SourceBand></SimpleSource>'
        "</VRTRasterBand>"
        for band, value in enumerate(text[1], 1)
    )
    with rasterio.open(tmp_path / "a.tif") as dataset:
        wkt, place = dataset.crs.to_wkt(), ", ".join(map(str, dataset.transform.to_gdal()))
    text[0].write_text(
        f'<VRTDataset rasterXSize="20" rasterYSize="20"><SRS>{wkt}</SRS><GeoTransform>{place}</GeoTransform>'
        f"{bands}</VRTDataset>"
    )
    source = source_of_file(str(text[0]), "a")
    assert source.nodatas == (0.0, 200.0)
    image, valid = pixels_of(source, list(source.bands))
    assert valid.all()
    assert (image[0] == 0).sum() == 80
    assert (image[1] == 0).sum() == 200


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan, -3.4028235e38])
def test_pixels_that_are_no_number_are_nodata_and_cost_no_neighbour(tmp_path, dtype, bad):
    image = GROUND.astype(dtype)
    image[:, 7, 9] = bad
    image[1, 2, 2] = bad
    pixels, valid = pixels_of(source_of_file(write(tmp_path / "a.tif", image), "a"), ["b1", "b2"])
    assert valid.sum() == 24 * 30 - 1
    assert not valid[7, 9]
    assert np.isfinite(pixels).all()
    assert pixels[1, 2, 2] == 0


@pytest.mark.parametrize("unit", [(0.0, 0.0), (float("nan"), 0.0), (1e-4, float("inf"))])
def test_a_scale_that_gives_no_value_is_refused_by_name(tmp_path, unit):
    image = np.full((2, 24, 30), 7, np.uint16)
    scales, offsets = ((1e-4, unit[0]), (0.0, unit[1]))
    path = write(tmp_path / "odd.tif", image, scales=scales, offsets=offsets)
    with pytest.raises(
        DataError, match=r"odd.tif states the scale .* expected finite numbers and a scale other than 0"
    ):
        source_of_file(path, "odd")
    plain = write(tmp_path / "plain.tif", image)
    bands = [{"name": "red", "data_type": "uint16", "raster:scale": unit[0], "raster:offset": unit[1]}, {"name": "nir"}]
    with pytest.raises(DataError, match="odd states the scale"):
        source_of(item("odd", {"image": (plain, {"bands": bands})}))
