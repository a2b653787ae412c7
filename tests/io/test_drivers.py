"""Few formats are opened, by content and not by name, and mosaics only of images next to them."""

import shutil

import geopandas
import numpy as np
import pytest
import rasterio
import scipy.io
from affine import Affine
from PIL import Image
from shapely.geometry import box
from small_world import rayseg, refused

from rayseg.errors import DataError
from rayseg.io.labels import ingest_folder, ingest_rasters
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.sources import source_of_file
from rayseg.io.stac_read import open_items, source_of
from rayseg.serve.file_type import kind_of

PLACE = {"crs": "EPSG:32733", "transform": Affine(20, 0, 500_000, 0, -20, 8_000_000)}


def image(path, driver="GTiff", *, bands=3, size=16, value=0, **place):
    pixels = np.random.default_rng(value).integers(1, 255, (bands, size, size)).astype(np.uint8)
    lossless = {"QUALITY": 100, "REVERSIBLE": "YES"} if driver == "JP2OpenJPEG" else {}
    with rasterio.open(path, "w", driver, size, size, bands, dtype="uint8", **(place or PLACE), **lossless) as file:
        file.write(pixels)
    return pixels


def vrt(path, *names, relative=1, tag="SourceFilename", extra=""):
    """A VRT that shows the first band of some files."""
    sources = "".join(
        f'<SimpleSource><{tag} relativeToVRT="{relative}">{name}</{tag}><SourceBand>1</SourceBand></SimpleSource>'
        for name in names
    )
    path.write_text(
        f'<VRTDataset rasterXSize="16" rasterYSize="16"><SRS>EPSG:32733</SRS><GeoTransform>500000,20,0,8000000,0,-20'
        f'</GeoTransform>{extra}<VRTRasterBand dataType="Byte" band="1">{sources}</VRTRasterBand></VRTDataset>'
    )
    return path


def pixels_of(path):
    source = source_of_file(str(path), "x")
    [(grid, _)] = grids_of([source])
    return read([source], grid, footprint(source, grid), bands=source.bands)[0]


@pytest.mark.parametrize(
    ("name", "driver"),
    [("a.TIF", "GTiff"), ("b.JP2", "JP2OpenJPEG"), ("c.PNG", "PNG"), ("d.tiff", "PNG"), ("e.img", "GTiff")],
)
def test_the_usual_formats_are_opened_whatever_the_name_is(tmp_path, name, driver):
    expected = image(tmp_path / name, driver)
    assert np.array_equal(pixels_of(tmp_path / name), expected)


@pytest.mark.parametrize(("driver", "name"), [("HFA", "a.img"), ("ENVI", "b.bin"), ("HFA", "c.tif"), ("BMP", "d.jp2")])
def test_other_formats_are_shut_whatever_the_name_is(tmp_path, driver, name):
    image(tmp_path / name, driver, bands=1)
    with pytest.raises(DataError, match=rf"{name} cannot be read: it is damaged, or not a GeoTIFF.*--allow-driver"):
        source_of_file(str(tmp_path / name), "x")


def test_a_driver_is_opened_when_it_is_allowed(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYSEG_ALLOW_DRIVER", "")
    expected = image(tmp_path / "a.img", "HFA")
    said = refused(3, "ingest", "rasters", tmp_path / "a.img", "--out", tmp_path / "cat")
    assert "--allow-driver HFA" in said
    found = rayseg("ingest", "rasters", tmp_path / "a.img", "--out", tmp_path / "cat", "--allow-driver", "HFA")
    [item] = open_items(found.stdout.strip())
    assert np.array_equal(pixels_of(source_of(item).assets[0][0]), expected)


def netcdf(path, *names):
    file = scipy.io.netcdf_file(path, "w")
    file.createDimension("y", 4)
    file.createDimension("x", 5)
    for name in names:
        file.createVariable(name, "f4", ("y", "x"))[:] = 1
    file.close()


@pytest.mark.parametrize("names", [("red", "nir"), ("t2m", "precip", "wind")])
def test_a_file_of_several_datasets_names_them(tmp_path, monkeypatch, names):
    netcdf(tmp_path / "two.nc", *names)
    with pytest.raises(DataError, match="--allow-driver netCDF"):
        source_of_file(str(tmp_path / "two.nc"), "x")
    monkeypatch.setenv("RAYSEG_ALLOW_DRIVER", "netCDF")
    with pytest.raises(
        DataError, match=rf"no bands of its own but {len(names)} datasets \({', '.join(names)}\).*gdal_translate"
    ):
        source_of_file(str(tmp_path / "two.nc"), "x")


# -- mosaics


def test_a_vrt_of_images_next_to_it_is_read(tmp_path):
    (tmp_path / "tiles").mkdir()
    expected = image(tmp_path / "tiles/a.tif")
    vrt(tmp_path / "inner.vrt", "tiles/a.tif")
    for name in (vrt(tmp_path / "m.VRT", "tiles/a.tif"), vrt(tmp_path / "outer.vrt", "inner.vrt")):
        assert np.array_equal(pixels_of(name)[0], expected[0])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{folder}/a.tif", "expected images relative to the VRT"),
        ("/vsicurl/http://127.0.0.1:9/a.tif", "expected images relative to the VRT"),
        ("https://127.0.0.1:9/a.tif", "expected images relative to the VRT"),
        ('NETCDF:"two.nc":red', "expected images relative to the VRT"),
        ("&lt;VRTDataset/&gt;", "expected images relative to the VRT"),
        ("hidden.tif", "hidden.tif, which is not an image"),
    ],
)
def test_a_vrt_of_anything_else_is_refused_before_it_is_opened(tmp_path, name, said):
    image(tmp_path / "a.tif")
    netcdf(tmp_path / "hidden.tif", "red")
    path = vrt(tmp_path / "m.vrt", name.format(folder=tmp_path))
    with pytest.raises(DataError, match=said):
        source_of_file(str(path), "x")


def test_a_vrt_is_refused_for_what_is_deeper_in_it(tmp_path):
    image(tmp_path / "a.tif")
    netcdf(tmp_path / "n.tif", "red")
    vrt(tmp_path / "inner.vrt", "n.tif")
    with pytest.raises(DataError, match="which is not an image"):
        source_of_file(str(vrt(tmp_path / "outer.vrt", "inner.vrt")), "x")
    with pytest.raises(DataError, match="expected images relative"):
        source_of_file(str(vrt(tmp_path / "cwd.vrt", "a.tif", relative=0)), "x")
    warped = "<GDALWarpOptions><SourceDataset relativeToVRT='0'>/etc/a.tif</SourceDataset></GDALWarpOptions>"
    with pytest.raises(DataError, match=r"SourceDataset\), expected images relative"):
        source_of_file(str(vrt(tmp_path / "warped.vrt", "a.tif", extra=warped)), "x")
    with pytest.raises(DataError, match="deeper than 5"):
        source_of_file(str(vrt(tmp_path / "loop.vrt", "loop.vrt")), "x")


@pytest.mark.parametrize("tag", ["sourcefilename", "SOURCEFILENAME", "SourceFilename"])
@pytest.mark.parametrize("root", ["", ' xmlns="urn:x"'])
def test_a_vrt_is_looked_at_as_gdal_reads_its_names(tmp_path, tag, root):
    """Without regard to case and namespaces: good files are read, others refused."""
    expected = image(tmp_path / "a.tif")
    image(tmp_path / "evil.tif", "ENVI", bands=1)
    paths = [vrt(tmp_path / f"{name}.vrt", f"{name}.tif", tag=tag) for name in ("a", "evil")]
    for path in paths:
        spelt = path.read_text().replace("<VRTDataset", f"<VRTDataset{root}")
        path.write_text(spelt.replace("relativeToVRT", "RelativeToVrt"))
    assert np.array_equal(pixels_of(paths[0])[0], expected[0])
    with pytest.raises(DataError, match=r"names .*evil\.tif, which is not an image"):
        source_of_file(str(paths[1]), "x")


@pytest.mark.parametrize("signature", [b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"\xff\x4f\xff\x51"])
def test_a_vrt_behind_the_signature_of_an_image_is_refused(tmp_path, signature):
    image(tmp_path / "evil.tif", "ENVI", bands=1)
    inner = vrt(tmp_path / "inner.tif", "evil.tif")
    inner.write_bytes(signature + inner.read_bytes())
    with pytest.raises(DataError, match=r"inner\.tif is not a VRT"):
        source_of_file(str(vrt(tmp_path / "outer.vrt", "inner.tif")), "x")


def test_a_file_that_a_vrt_names_in_an_attribute_is_refused(tmp_path):
    image(tmp_path / "evil.tif", "ENVI", bands=1)
    path = vrt(tmp_path / "m.vrt", "a.tif")
    text = path.read_text()
    source = f'<SimpleSource sourceFilename="{tmp_path / "evil.tif"}"><SourceBand>1</SourceBand></SimpleSource>'
    path.write_text(text[: text.index("<SimpleSource>")] + source + "</VRTRasterBand></VRTDataset>")
    with pytest.raises(DataError, match=r"evil\.tif' \(sourcefilename\), expected images relative"):
        source_of_file(str(path), "x")


STEP = "<ProcessingSteps><Step><Algorithm>{}</Algorithm>{}</Step></ProcessingSteps>"
NAMING = {
    "geolocation array": '<Metadata domain="GEOLOCATION"><MDI key="X_DATASET">evil.tif</MDI></Metadata>',
    "its key as an element": "<Metadata><MDI><key>Y_DATASET</key>evil.tif</MDI></Metadata>",
    "processing step": STEP.format("LocalScaleOffset", '<Argument name="gain_dataset_filename_1">evil.tif</Argument>'),
    "overview": '<Metadata domain="OVERVIEWS"><MDI key="OVERVIEW_FILE">evil.tif</MDI></Metadata>',
    "elevation of RPCs": "<GDALWarpOptions><RPCTransformer><DEMPath>evil.tif</DEMPath></RPCTransformer>"
    "</GDALWarpOptions>",
    "warp option": '<GDALWarpOptions><Option name="RPC_DEM">evil.tif</Option></GDALWarpOptions>',
    "root of paths": '<OpenOptions><OOI key="ROOT_PATH">elsewhere</OOI></OpenOptions>',
    "character reference": '<Metadata><MDI key="&#88;_DATASET">evil.tif</MDI></Metadata>',
}
NAMED = {
    "input of a processed VRT": '<Input><SourceFilename relativeToVRT="1">{}</SourceFilename></Input>',
    "source of a warped VRT": '<GDALWarpOptions><SourceDataset relativeToVRT="1">{}</SourceDataset></GDALWarpOptions>',
    "band of a pansharpened VRT": '<PansharpeningOptions><PanchroBand><SourceFilename relativeToVRT="1">{}'
    "</SourceFilename></PanchroBand></PansharpeningOptions>",
    "overview of a band": '<Overview><SourceFilename relativeToVRT="1">{}</SourceFilename></Overview>',
}


@pytest.mark.parametrize("how", NAMING)
def test_a_vrt_that_names_further_files_is_refused(tmp_path, how):
    image(tmp_path / "a.tif")
    netcdf(tmp_path / "evil.tif", "red")
    with pytest.raises(DataError, match=r"m\.vrt names .*expected images relative to the VRT"):
        source_of_file(str(vrt(tmp_path / "m.vrt", "a.tif", extra=NAMING[how])), "x")


@pytest.mark.parametrize("how", NAMED)
def test_the_files_of_every_kind_of_vrt_are_looked_at(tmp_path, how):
    image(tmp_path / "a.tif")
    netcdf(tmp_path / "evil.tif", "red")
    with pytest.raises(DataError, match=r"names .*evil\.tif, which is not an image"):
        source_of_file(str(vrt(tmp_path / "m.vrt", "a.tif", extra=NAMED[how].format("evil.tif"))), "x")
    good = vrt(tmp_path / "good.vrt", "a.tif", extra=NAMED[how].format("a.tif") if "overview" in how else "")
    assert pixels_of(good).shape == (1, 16, 16)


def test_a_vrt_of_absolute_paths_is_read_when_it_is_allowed(tmp_path, monkeypatch):
    expected = image(tmp_path / "a.tif")
    path = vrt(tmp_path / "m.vrt", str(tmp_path / "a.tif"), relative=0)
    monkeypatch.setenv("RAYSEG_ALLOW_DRIVER", "VRT")
    assert np.array_equal(pixels_of(path)[0], expected[0])


def index(path, *names):
    shapes = [box(500_000, 8_000_000 - 320, 500_320, 8_000_000)] * len(names)
    geopandas.GeoDataFrame({"location": list(names)}, geometry=shapes, crs=PLACE["crs"]).to_file(path, driver="GPKG")
    return path


def test_a_tile_index_of_images_is_read_and_no_other(tmp_path):
    expected = image(tmp_path / "a.tif")
    netcdf(tmp_path / "n.tif", "red")
    assert np.array_equal(pixels_of(index(tmp_path / "m.gti.gpkg", str(tmp_path / "a.tif"))), expected)
    with pytest.raises(DataError, match="which is not an image"):
        source_of_file(str(index(tmp_path / "n.gti.gpkg", str(tmp_path / "n.tif"))), "x")
    with pytest.raises(DataError, match="expected images"):
        source_of_file(str(index(tmp_path / "s.gti.gpkg", 'NETCDF:"n.tif":red')), "x")
    with pytest.raises(DataError, match="expected images"):
        source_of_file(str(index(tmp_path / "z.gti.gpkg", "/vsizip/a.zip/a.tif")), "x")


@pytest.mark.parametrize("setting", ["LOCATION_FIELD", "OVERVIEW_0_DATASET", "location_field"])
def test_a_tile_index_that_names_files_elsewhere_is_refused(tmp_path, setting):
    image(tmp_path / "a.tif")
    netcdf(tmp_path / "n.tif", "red")
    path = index(tmp_path / "m.gti.gpkg", str(tmp_path / "a.tif"))
    frame = geopandas.read_file(path).assign(other=[str(tmp_path / "n.tif")])
    frame.to_file(path, driver="GPKG", layer_metadata={setting: "other"})
    with pytest.raises(DataError, match=rf"m\.gti\.gpkg names files by {setting}, expected its column location"):
        source_of_file(str(path), "x")


@pytest.mark.parametrize("start", ["{url}/", "/vsicurl/{url}/"])
def test_files_of_a_tile_index_on_the_web_are_looked_at(tmp_path, served, start):
    url, asked = served
    expected = image(tmp_path / "a.tif")
    netcdf(tmp_path / "evil.tif", "red")
    start = start.format(url=url)
    assert np.array_equal(pixels_of(index(tmp_path / "m.gti.gpkg", f"{start}a.tif")), expected)
    with pytest.raises(DataError, match=r"names .*evil\.tif, which is not an image"):
        source_of_file(str(index(tmp_path / "n.gti.gpkg", f"{start}a.tif", f"{start}evil.tif")), "x")
    assert "/evil.tif" in asked


# -- folders


def test_what_a_folder_leaves_out_is_counted_and_named(tmp_path, caplog):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, driver in (("a.TIF", "GTiff"), ("b.jp2", "JP2OpenJPEG"), ("c.JPG", "JPEG")):
        image(folder / name, driver)
    for name in ("readme.txt", "d.nc", "a.tfw", "c.JPG.aux.xml", ".hidden"):
        (folder / name).touch()
    (folder / "more").mkdir()
    vrt(folder / "all.vrt", "a.TIF")
    shutil.rmtree(tmp_path / "cat", ignore_errors=True)
    assert {item.id for item in open_items(ingest_rasters(folder, tmp_path / "cat"))} >= {"a", "b"}
    assert "4 of 7 entries" in caplog.text
    assert all(name in caplog.text for name in ("readme.txt", "d.nc", "more", "all.vrt"))
    assert not any(name in caplog.text for name in ("a.tfw", "hidden", "aux.xml"))


def test_a_folder_of_mosaics_alone_gives_them(tmp_path):
    (tmp_path / "in/tiles").mkdir(parents=True)
    expected = image(tmp_path / "in/tiles/a.tif")
    vrt(tmp_path / "in/m.vrt", "tiles/a.tif")
    [item] = open_items(ingest_folder(tmp_path / "in", tmp_path / "cat"))
    assert np.array_equal(pixels_of(source_of(item).assets[0][0])[0], expected[0])


def test_pages_of_a_tiff_beyond_the_first_are_named(tmp_path, caplog):
    first, second = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8))
    first.save(tmp_path / "b.tif", save_all=True, append_images=[second])
    source_of_file(str(tmp_path / "b.tif"), "x")
    assert "b.tif holds 2 images, only the first is read" in caplog.text


def test_uploads_have_the_formats_of_one_table():
    assert kind_of(b"II+\x00" + bytes(20)) == "tiff"
    with pytest.raises(Exception, match="expected an image"):
        kind_of(b"\x00\x00\x00\x0cjP  " + bytes(20))
