"""Every kind of raster on docs/rasters.md, made and handled: the page's table is written from the checks below.

`python tests/test_raster_kinds.py` rewrites the table after a check has changed.
"""

import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from shapely.geometry import mapping
from tiny_maps import described

from rayseg.errors import DataError, ModelError
from rayseg.geo.grid import Tile
from rayseg.geo.region import resolve_region
from rayseg.io.labels import ingest_folder, ingest_rasters, sources_of_images
from rayseg.io.maps import pixel_areas_m2
from rayseg.io.output_grids import beyond_utm, expect_mappable, out_of_scale
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.sources import source_of_file
from rayseg.io.stac_read import open_items, source_of
from rayseg.io.units import common_units, converted, expect_one_dtype, expect_one_unit
from rayseg.stages.read import tile_rows

PAGE = Path(__file__).parents[1] / "docs" / "rasters.md"
UTM = {"crs": "EPSG:32736", "transform": Affine(10, 0, 600_000, 0, -10, 8_000_000)}
KINDS = []


def kind(raster, handling):
    """Add a check as a row of the page."""

    def add(check):
        KINDS.append((raster, handling, check))
        return check

    return add


def write(path, pixels_CHW, driver="GTiff", *, place=UTM, **profile):
    """A raster file; its pixels."""
    count, height, width = pixels_CHW.shape
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        with rasterio.open(
            path, "w", driver, width, height, count, dtype=pixels_CHW.dtype, **place, **profile
        ) as file:  # fmt: skip
            file.write(pixels_CHW)
    return pixels_CHW


def noise(*shape, dtype="uint8"):
    return np.random.default_rng(3).integers(1, 120, shape or (3, 12, 20)).astype(dtype)


def handled(*paths):
    """(grid, pixels_CHW, valid_HW) of the rasters together, as a run reads them."""
    sources = [source_of_file(str(path), path.stem) for path in paths]
    for source in sources:
        expect_mappable(source, tile=2048)
    for error in beyond_utm(sources).values():
        raise error
    [(grid, members)] = grids_of(sources)
    window = footprint(members[0], grid)
    for member in members[1:]:
        window = window.union(footprint(member, grid))
    return grid, *read(members, grid, window, bands=members[0].bands)


def refused(folder, match, *paths):
    with pytest.raises(DataError, match=match):
        handled(*(paths or (folder / "a.tif",)))


def on_its_own_grid(path, expected_CHW):
    grid, pixels_CHW, valid_HW = handled(path)
    with rasterio.open(path) as file:
        assert grid.resolution == (file.transform.a, -file.transform.e)
    assert np.array_equal(pixels_CHW, expected_CHW)
    assert valid_HW.all()


# -- bands and pixels


@kind(
    "8- or 16-bit, signed or float, any number of bands",
    "mapped on its own grid; bands are named by description, colour interpretation, or b1, b2, ...",
)
def _(folder):
    for count, dtype in ((1, "uint8"), (5, "uint16"), (2, "int16"), (7, "float32"), (1, "int8")):
        on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(count, 12, 20, dtype=dtype)))
        assert source_of_file(str(folder / "a.tif"), "a").dtype == dtype
    assert source_of_file(str(folder / "a.tif"), "a").bands == ("b1",)
    with rasterio.open(folder / "a.tif", "r+") as file:
        file.descriptions = ("swir",)
    assert source_of_file(str(folder / "a.tif"), "a").bands == ("swir",)


@kind("3 or 4 bands of uint8 without names", "named red, green, blue and nir")
def _(folder):
    for count in (3, 4):
        write(folder / "a.tif", noise(count, 12, 20), photometric="minisblack")
        assert source_of_file(str(folder / "a.tif"), "a").bands == ("red", "green", "blue", "nir")[:count]


@kind("one file per band, bands of several resolutions", "one item with several assets, resampled to the finest grid")
def _(folder):
    fine = write(folder / "fine.tif", noise(1, 12, 20))
    write(
        folder / "coarse.tif",
        np.full((1, 6, 10), 50, "uint8"),
        place=UTM | {"transform": UTM["transform"] @ Affine.scale(2)},
    )
    [item] = open_items(ingest_rasters(folder / "fine.tif", folder / "cat"))
    item.assets["coarse"] = item.assets["image"].clone()
    item.assets["coarse"].href = str(folder / "coarse.tif")
    for asset in item.assets.values():
        asset.extra_fields = {}
    item.properties = {"datetime": None}
    source = source_of(item)
    [(grid, _)] = grids_of([source])
    pixels_CHW, _ = read([source], grid, footprint(source, grid), bands=["coarse", "image"])
    assert grid.resolution == (10, 10)
    assert np.array_equal(pixels_CHW[1:], fine)
    assert (pixels_CHW[0] == 50).all()


@kind(
    "bands of several pixel types in one item (Sentinel-2 with all assets)",
    "refused where all bands are taken: choose with `bands=[...]`",
)
def _(folder):
    write(folder / "a.tif", noise(1, 12, 20))
    write(folder / "b.tif", noise(1, 12, 20, dtype="uint16"))
    [item] = open_items(ingest_rasters(folder / "a.tif", folder / "cat"))
    item.assets["scl"] = item.assets["image"].clone()
    item.assets["scl"].href = str(folder / "b.tif")
    for asset in item.assets.values():
        asset.extra_fields = {}
    with pytest.raises(DataError, match=r"image of uint8; scl of uint16.*--set bands=\[image\]"):
        expect_one_dtype(source_of(item), ["image", "scl"])


@kind(
    "palette", "one band called `palette`; `ingest folder` and models of red, green, blue refuse it: convert it to RGB"
)
def _(folder):
    with rasterio.open(folder / "a.tif", "w", "GTiff", 20, 12, 1, dtype="uint8", photometric="palette", **UTM) as file:
        file.write(noise(1, 12, 20))
        file.write_colormap(1, {1: (255, 0, 0)})
    assert source_of_file(str(folder / "a.tif"), "a").bands == ("palette",)
    with pytest.raises(DataError, match="convert it to RGB"):
        ingest_folder(folder, folder / "cat")
    with pytest.raises(ModelError, match="needs the bands red, green, blue"):
        described().check_contract(("palette",), "uint8")


@kind("complex (SLC)", "refused: convert it to amplitude or intensity")
def _(folder):
    for dtype in ("complex64", "complex128"):
        write(folder / "a.tif", noise(1, 12, 20).astype(dtype))
        refused(folder, "convert it to amplitude or intensity")


@kind(
    "nodata value (also one for each band), NaN, infinity, values beyond 1e30, internal mask, external `.msk`, alpha "
    "(also 16-bit)",
    "nodata there",
)
def _(folder):
    path = folder / "a.tif"
    hole = (slice(None), slice(0, 4), slice(5, 9))

    def holes(expected=16):
        _, pixels_CHW, valid_HW = handled(path)
        assert (~valid_HW).sum() == expected
        assert (~valid_HW[0:4, 5:9]).all()
        assert not pixels_CHW[:1, ~valid_HW].any()

    for dtype, value, nodata in (("uint8", 200, 200), ("int16", -9, -9), ("float32", np.nan, None)):
        pixels = noise(1, 12, 20, dtype=dtype)
        pixels[hole] = value
        write(path, pixels, nodata=nodata)
        holes()
    for value in (np.inf, -np.inf, -3.4e38):
        pixels = noise(1, 12, 20, dtype="float32")
        pixels[hole] = value
        write(path, pixels)
        holes()
    for internal in (True, False):
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=internal):
            write(path, noise())
            with rasterio.open(path, "r+") as file:
                mask = np.full((12, 20), 255, np.uint8)
                mask[hole[1:]] = 0
                file.write_mask(mask)
        holes()
    (folder / "a.tif.msk").unlink()
    for dtype, top in (("uint8", 255), ("uint16", 65535)):
        pixels = np.concatenate([noise(3, 12, 20, dtype=dtype), np.full((1, 12, 20), top, dtype)])
        pixels[3, 0:4, 5:9] = 0
        write(path, pixels, photometric="rgb", ALPHA="YES")
        holes()


@kind("nodata everywhere", "mapped: every tile has the status `nodata`")
def _(folder):
    write(folder / "a.tif", np.zeros((3, 12, 20), "uint8"), nodata=0)
    assert not handled(folder / "a.tif")[2].any()


@kind("striped, tiled, COG; one pixel wide; smaller than a patch", "mapped; the pixels do not depend on the tiling")
def _(folder):
    for shape, profile in (
        ((3, 12, 20), {}),
        ((1, 40, 40), {"tiled": True, "blockxsize": 16, "blockysize": 16}),
        ((2, 9, 1), {}),
    ):
        on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(*shape), **profile))
    on_its_own_grid(folder / "b.tif", write(folder / "b.tif", noise(3, 40, 40), "COG"))


# -- places


@kind("geographic or projected CRS, with or without EPSG code", "mapped on its own grid")
def _(folder):
    local = "+proj=laea +lat_0=-20 +lon_0=30 +datum=WGS84 +units=m"
    places = (
        ("EPSG:4326", 1e-4, 15, 47),
        ("EPSG:32736", 10, 6e5, 8e6),
        (local, 5, 1e4, -2e4),
        ("EPSG:2193", 2, 1.6e6, 5.4e6),
    )
    for crs, step, x, y in places:
        place = {"crs": crs, "transform": Affine(step, 0, x, 0, -step, y)}
        on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(), place=place))


@kind("south-up, or columns from east to west", "mapped on its own grid: a flip moves whole pixels")
def _(folder):
    stored = write(folder / "a.tif", noise(), place=UTM | {"transform": Affine(10, 0, 600_000, 0, 10, 7_999_880)})
    grid, pixels_CHW, valid_HW = handled(folder / "a.tif")
    assert grid.crs == "EPSG:32736"
    assert np.array_equal(pixels_CHW, stored[:, ::-1])
    assert valid_HW.all()


@kind("rotated", "warped to UTM at the finer side of its pixels, bilinear")
def _(folder):
    place = UTM | {"transform": UTM["transform"] @ Affine.rotation(30) @ Affine.scale(1, 2)}
    write(folder / "a.tif", np.full((1, 30, 60), 90, "uint8"), place=place)
    grid, pixels_CHW, valid_HW = handled(folder / "a.tif")
    assert (grid.crs, grid.resolution) == ("EPSG:32736", (10, 10))
    assert (pixels_CHW[0, valid_HW] == 90).all()
    assert valid_HW.sum() == pytest.approx(30 * 60 * 2, rel=0.05)


@kind("ground control points only", "the same, interpolated twice")
def _(folder):
    affine = UTM["transform"] @ Affine.rotation(20)
    points = [GroundControlPoint(r, c, *(affine @ (c, r))) for r, c in ((0, 0), (0, 60), (30, 0), (30, 60), (15, 30))]
    write(folder / "a.tif", np.full((1, 30, 60), 90, "uint8"), place={"crs": UTM["crs"], "gcps": points})
    grid, pixels_CHW, valid_HW = handled(folder / "a.tif")
    assert grid.crs == "EPSG:32736"
    assert (pixels_CHW[0, valid_HW] == 90).mean() > 0.9
    assert valid_HW.sum() * grid.resolution[0] ** 2 == pytest.approx(30 * 60 * 100, rel=0.1)


@kind(
    "RPCs (a model of the sensor) only",
    "refused: orthorectify it, for example with `gdalwarp -rpc -to RPC_DEM=DEM.tif`",
)
def _(folder):
    write(folder / "a.tif", noise(1, 12, 20), place={})
    names = [f"{kind}_coeff" for kind in ("line_num", "line_den", "samp_num", "samp_den")]
    numbers = {f"{name}_{part}": 1.0 for name in ("height", "lat", "line", "long", "samp") for part in ("off", "scale")}
    with rasterio.open(folder / "a.tif", "r+") as file:
        file.rpcs = RPC(**numbers, **{name: [1.0] * 20 for name in names}, err_bias=0, err_rand=0)
    refused(folder, "has RPCs .*gdalwarp -rpc")


@kind("across the antimeridian in UTM", "mapped on its own grid; outlines and polygons are cut at 180 degrees")
def _(folder):
    place = {"crs": "EPSG:32760", "transform": Affine(1000, 0, 750_000, 0, -1000, 8_000_000)}
    on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(1, 30, 100), place=place))
    [item] = open_items(ingest_rasters(folder / "a.tif", folder / "cat"))
    assert item.geometry["type"] == "MultiPolygon"


@kind("longitudes from 0 to 360, or a little beyond 180", "mapped on its own grid; regions find it on every turn")
def _(folder):
    place = {"crs": "EPSG:4326", "transform": Affine(10, 0, 0, 0, -10, 60)}
    on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(1, 12, 36), place=place))
    [row] = tile_rows(
        [source_of_file(str(folder / "a.tif"), "a")], resolve_region("-20,0,-10,10").geometry, size=9, halo=0
    )
    assert row["col"] == 27


@kind("latitudes beyond the poles, longitudes beyond a second turn", "refused: outside the Earth")
def _(folder):
    for x, y in ((15, 99), (378, 10)):
        write(folder / "a.tif", noise(), place={"crs": "EPSG:4326", "transform": Affine(0.1, 0, x, 0, -0.1, y)})
        refused(folder, "nowhere on Earth")


@kind(
    "several scenes that share CRS, resolution and alignment",
    "one grid, no resampling; the map equals that of their mosaic",
)
def _(folder):
    whole = noise(3, 12, 40)
    for name, part, col in (("a", whole[..., :20], 0), ("b", whole[..., 20:], 20)):
        write(folder / f"{name}.tif", part, place=UTM | {"transform": UTM["transform"] @ Affine.translation(col, 0)})
    _, pixels_CHW, valid_HW = handled(folder / "a.tif", folder / "b.tif")
    assert np.array_equal(pixels_CHW, whole)
    assert valid_HW.all()


@kind(
    "several scenes that do not",
    "UTM zones at the finest pixels of their scenes; each keeps its own six degrees: docs/decisions/0017",
)
def _(folder):
    write(folder / "a.tif", noise())
    write(folder / "b.tif", noise(), place={"crs": "EPSG:32735", "transform": Affine(5, 0, 4e5, 0, -5, 8e6)})
    grids = grids_of([source_of_file(str(folder / f"{name}.tif"), name) for name in "ab"])
    assert [grid.crs for grid, _ in grids] == ["EPSG:32735", "EPSG:32736"]


@kind(
    "geostationary or orthographic disk, world in Mollweide, Robinson, Goode or another plane with an edge",
    "mapped on its own grid if it is alone: pixels in space are nodata, outlines and areas are of the part on Earth",
)
def _(folder):
    for text, top, share in (("+proj=ortho +lat_0=50 +lon_0=-170", 7e6, 0.5), ("+proj=moll", 9.1e6, 1)):
        right = top * 2 * share
        place = {"crs": CRS.from_user_input(text), "transform": Affine(right / 10, 0, -right, 0, -top / 6, top)}
        write(folder / "a.tif", noise(1, 12, 20), place=place)
        grid, _, valid_HW = handled(folder / "a.tif")
        areas_HW = pixel_areas_m2(Tile("", grid, footprint(source_of_file(str(folder / "a.tif"), "a"), grid)))
        assert not valid_HW[0, 0]
        assert areas_HW[valid_HW].sum() == pytest.approx(share * 510.0656e12, rel=0.004)


@kind(
    "pixels of centimetres next to scenes of metres in one region",
    "refused where the common grid would have more than four million tiles of a scene in the region: of the finest "
    "scene and that one, the one whose pixels differ more from those of all scenes, of two scenes the finer one",
)
def _(folder):
    write(folder / "b.tif", noise())
    place = {"transform": Affine(0.01, 0, 6e5, 0, -0.01, 8e6)}
    write(folder / "a.tif", noise(), place=UTM | place)
    fine, coarse = (source_of_file(str(folder / f"{name}.tif"), name) for name in "ab")
    coarse = replace(coarse, width=10_980, height=10_980)  # as Sentinel-2 has
    others = [replace(fine, item_id=name) for name in "cd"]
    near = mapping(shapely.box(33.94, -18.09, 33.95, -18.08))
    assert list(out_of_scale([coarse, fine], None, tile=2048)) == ["a"]
    assert list(out_of_scale([coarse, fine, *others], None, tile=2048)) == ["b"]
    assert not out_of_scale([coarse, fine, *others], near, tile=2048)
    assert len(tile_rows([coarse, fine], near, size=2048, halo=64)) < 3000


@kind(
    "polar scene, geostationary disk or world among others on another grid",
    "refused: no UTM zone holds it; mapped if it is alone",
)
def _(folder):
    write(folder / "b.tif", noise())
    place = {"crs": "EPSG:3031", "transform": Affine(100, 0, 0, 0, -100, 0)}
    on_its_own_grid(folder / "a.tif", write(folder / "a.tif", noise(), place=place))
    refused(folder, "no UTM zone", folder / "a.tif", folder / "b.tif")


@kind(
    "no georeference",
    "`ingest rasters` refuses it, `ingest folder` accepts it; `predict` maps it in its own pixels; GDAL and QGIS place "
    "its tiles by pixel (row 10 at y = -10)",
)
def _(folder):
    pixels = write(folder / "a.tif", noise(), place={})
    with pytest.raises(DataError, match="has no georeference; ingest it with `ingest folder`"):
        ingest_rasters(folder / "a.tif", folder / "cat")
    assert len(open_items(ingest_folder(folder, folder / "cat"))) == 1
    grid, found, _ = handled(folder / "a.tif")
    assert grid.crs is None
    assert np.array_equal(found, pixels)


@kind(
    "photo with an orientation in EXIF or XMP, without CRS",
    "rotated as viewers show it: plots, masks and maps fit what annotation tools show",
)
def _(folder):
    picture = Image.new("RGB", (20, 12))
    exif = picture.getexif()
    exif[0x0112] = 6
    picture.save(folder / "a.jpg", exif=exif)
    [source], _ = sources_of_images(folder / "a.jpg")
    assert (source.width, source.height) == (12, 20)


@kind("no georeference among scenes that have one", "refused: map it in a separate run")
def _(folder):
    write(folder / "b.tif", noise())
    write(folder / "a.tif", noise(), place={})
    refused(folder, "other imagery of the region has", folder / "a.tif", folder / "b.tif")


@kind("georeference of another planet", "refused")
def _(folder):
    moon = 'GEOGCS["Moon",DATUM["D_Moon",SPHEROID["Moon",1737400,0]],PRIMEM["M",0],UNIT["Degree",0.0174532925199433]]'
    write(folder / "a.tif", noise(), place={"crs": moon, "transform": Affine(0.01, 0, 15, 0, -0.01, 47)})
    refused(folder, "another planet")


# -- files


@kind(
    "incomplete header (tags, masks and overviews included), even if all pixels are there",
    "refused, or all its tiles fail",
)
def _(folder):
    write(folder / "b.tif", noise(3, 40, 40), "COG")
    whole = (folder / "b.tif").read_bytes()
    for size in (0, 8, 100):
        (folder / "a.tif").write_bytes(whole[:size])
        refused(folder, "a.tif cannot be read")


@kind("header that claims more than four million tiles", "refused")
def _(folder):
    side, band = 2**31 - 1, '<VRTRasterBand dataType="Byte" band="1"/>'
    (folder / "a.vrt").write_text(f'<VRTDataset rasterXSize="{side}" rasterYSize="{side}">{band}</VRTDataset>')
    refused(folder, "claims 2147483647 x 2147483647 px", folder / "a.vrt")


@kind("NetCDF, HDF, GRIB and all other formats", "refused; `--allow-driver NAME` opens what GDAL's driver NAME reads")
def _(folder):
    write(folder / "a.tif", noise(), "HFA")
    refused(folder, "not a GeoTIFF.*--allow-driver")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAYSEG_ALLOW_DRIVER", "HFA")
        on_its_own_grid(folder / "a.tif", noise())


@kind("JPEG 2000, PNG and JPEG, in any case of their suffixes", "mapped")
def _(folder):
    exact = {"QUALITY": 100, "REVERSIBLE": "YES"}
    for name, driver, options in (("a.JP2", "JP2OpenJPEG", exact), ("b.Png", "PNG", {})):
        on_its_own_grid(folder / name, write(folder / name, noise(3, 40, 40), driver, **options))
    sources, wrong = sources_of_images(folder)
    assert [source.item_id for source in sources] == ["a", "b"]
    assert not wrong


@kind("VRT of images, named by their place next to it", "mapped; of absolute or remote files refused")
def _(folder):
    pixels = write(folder / "a.tif", noise(1, 12, 20))
    for relative, name in ((1, "a.tif"), (0, folder / "a.tif"), (1, "/vsicurl/http://h/a.tif")):
        source = f'<SourceFilename relativeToVRT="{relative}">{name}</SourceFilename><SourceBand>1</SourceBand>'
        band = f'<VRTRasterBand dataType="Byte" band="1"><SimpleSource>{source}</SimpleSource></VRTRasterBand>'
        place = "<SRS>EPSG:32736</SRS><GeoTransform>600000,10,0,8000000,0,-10</GeoTransform>"
        (folder / "m.vrt").write_text(f'<VRTDataset rasterXSize="20" rasterYSize="12">{place}{band}</VRTDataset>')
        if name == "a.tif":
            on_its_own_grid(folder / "m.vrt", pixels)
        else:
            refused(folder, "expected images relative to the VRT", folder / "m.vrt")


@kind("TIFF of several pages", "the first is mapped, with a warning")
def _(folder):
    pages = [Image.new("L", (20, 12), color) for color in (50, 90)]
    pages[0].save(folder / "a.tif", save_all=True, append_images=pages[1:])
    assert (handled(folder / "a.tif")[1] == 50).all()


# -- values


@kind(
    "scale and offset that differ from those in the model, or between scenes of one network",
    "converted as they are read; refused, with both values, if an integer type cannot hold the result",
)
def _(folder):
    sources = []
    for name, scale in (("a", 0.1), ("b", 0.05)):
        write(folder / f"{name}.tif", np.full((1, 12, 20), 10, "float32"))
        with rasterio.open(folder / f"{name}.tif", "r+") as file:
            file.scales = (scale,)
        sources.append(source_of_file(str(folder / f"{name}.tif"), name))
    units = common_units(sources, ("b1",))
    one = [converted(source, units) for source in sources]
    [(grid, _)] = grids_of(one)
    first, second = (read([source], grid, footprint(source, grid), bands=["b1"])[0].mean() for source in one)
    assert first == 2 * second


@kind(
    "some scenes state scale and offset, others not; Sentinel-2 from both sides of baseline 04.00 (by item or "
    "product name) without stated offsets",
    "refused, with the names of two scenes",
)
def _(folder):
    for name in "ab":
        write(folder / f"{name}.tif", noise(1, 12, 20))
    one, other = (source_of_file(str(folder / f"{name}.tif"), name) for name in "ab")
    stated = [one, replace(other, units=((0.1, 0.0),))]
    baselines = [replace(one, baseline="03.01"), replace(other, baseline="05.09")]
    for sources in (stated, baselines):
        with pytest.raises(DataError, match=r"\ba\b.*\bb\b"):
            expect_one_unit(sources)


@kind(
    "STAC item that states another place or size than its file has, or leaves out the file's scale and offset",
    "its tiles fail, with both named",
)
def _(folder):
    write(folder / "a.tif", noise(1, 12, 20))
    source = source_of_file(str(folder / "a.tif"), "a")
    for fields in ({"crs": "EPSG:32737"}, {"transform": (10.0, 0.0, 6e5 + 100, 0.0, -10.0, 8e6)}, {"width": 19}):
        wrong = replace(source, **fields)
        [(grid, _)] = grids_of([wrong])
        with pytest.raises(DataError, match=r"a\.tif has .*, its item a states"):
            read([wrong], grid, footprint(wrong, grid), bands=["b1"])
    [(grid, _)] = grids_of([source])
    with rasterio.open(folder / "a.tif", "r+") as file:
        file.scales = (0.1,)
    with pytest.raises(DataError, match=r"a\.tif has values stored x 0\.1"):
        read([source], grid, footprint(source, grid), bands=["b1"])


@cache
def table():
    """The table of the page."""
    rows = [f"| {raster} | {handling} |" for raster, handling, _ in KINDS]
    return "\n".join(["| raster | handling |", "|---|---|", *rows])


@pytest.mark.parametrize(
    ("raster", "check"), [pytest.param(raster, check, id=raster[:50]) for raster, _, check in KINDS]
)
def test_the_raster_is_handled_as_the_page_says(raster, check, tmp_path):
    check(tmp_path)


def test_the_page_has_the_rows_that_are_checked_and_no_others():
    assert table() in PAGE.read_text()
    assert PAGE.read_text().count("\n| ") == f"\n{table()}".count("\n| ")


if __name__ == "__main__":
    PAGE.write_text(re.sub(r"\| raster \|.*?\n(?=\n)", lambda _: table() + "\n", PAGE.read_text(), flags=re.DOTALL))
