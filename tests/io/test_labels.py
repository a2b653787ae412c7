"""Folders of images become catalogues or are refused whole; chips and masks come back as arrays."""

import json
import os
import pickle

import numpy as np
import pystac
import pytest
import rasterio
import rasterio.shutil
from affine import Affine
from pyproj import CRS
from rasterio.enums import ColorInterp

from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import Window
from rayseg.io.labels import (
    Chip,
    chips_of,
    ingest_folder,
    ingest_rasters,
    is_images,
    read_chip,
    read_mask,
    sources_of_images,
)
from rayseg.io.rasters import footprint, grids_of, read
from rayseg.io.stac_read import open_items, source_of
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "land", (10, 20, 30)), (1, "water", (0, 0, 250)), (2, "road", (99, 99, 99))))
DRIVERS = {".png": "PNG", ".jpg": "JPEG", ".tif": "GTiff"}


def write(path, image_HWC, *, place=None, alpha=False, palette=None, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.atleast_3d(image_HWC).transpose(2, 0, 1)
    kind = {
        "driver": "GTiff",
        "count": len(image),
        "height": image.shape[1],
        "width": image.shape[2],
        "dtype": image.dtype,
    }
    with rasterio.MemoryFile() as memory:
        with memory.open(**kind, **(place or {})) as dataset:
            if alpha:
                dataset.colorinterp = [
                    *[ColorInterp.gray, ColorInterp.undefined, ColorInterp.undefined][: len(image) - 1],
                    ColorInterp.alpha,
                ]
            dataset.write(image)
            if palette:
                dataset.write_colormap(1, palette)
        with memory.open() as dataset:
            rasterio.shutil.copy(dataset, path, driver=DRIVERS[path.suffix], **options)
    return path


def picture(height=30, width=40, bands=3, seed=0):
    return np.random.default_rng(seed).integers(1, 250, (height, width, bands)).astype(np.uint8)


@pytest.fixture
def folder(tmp_path):
    for label in ("gpc", "nongpc"):
        for stem in ("1", "2"):
            write(tmp_path / "chips" / label / f"{stem}.png", picture(seed=int(stem) + len(label)))
    return tmp_path / "chips"


def test_class_folders_become_labelled_items_that_refer_to_the_images(folder, tmp_path):
    before = sorted(folder.rglob("*"))
    path = ingest_folder(folder, tmp_path / "out", labels="folder")
    assert sorted(folder.rglob("*")) == before
    items = open_items(path, "chips")
    assert sorted(item.id for item in items) == ["gpc-1", "gpc-2", "nongpc-1", "nongpc-2"]
    item = next(item for item in items if item.id == "gpc-2")
    assert item.properties["rayseg:label"] == "gpc"
    assert item.assets["image"].href == str(folder / "gpc" / "2.png")
    assert item.geometry is None
    assert item.properties["proj:code"] is None
    source = source_of(item)
    assert (source.bands, source.dtype, source.crs, source.height, source.width) == (
        ("red", "green", "blue"),
        "uint8",
        None,
        30,
        40,
    )
    assert ingest_folder(folder, tmp_path / "out", labels="folder") == path
    assert len(open_items(path)) == 4


def test_images_without_labels_are_imagery_with_their_own_bands_and_place(tmp_path):
    place = {"crs": "EPSG:32650", "transform": Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    write(tmp_path / "in" / "a.jpg", picture())
    write(tmp_path / "in" / "b.tif", picture(bands=4), place=place | {"photometric": "minisblack", "alpha": "no"})
    write(tmp_path / "in" / "c.png", picture(bands=4), alpha=True)
    (tmp_path / "in" / "notes.txt").write_text("x")
    items = {item.id: item for item in open_items(ingest_folder(tmp_path / "in", tmp_path / "out"), "imagery")}
    assert {name: source_of(item).bands for name, item in items.items()} == {
        "a": ("red", "green", "blue"), "b": ("red", "green", "blue", "nir"), "c": ("red", "green", "blue", "alpha"),
    }  # fmt: skip
    assert items["b"].bbox[0] == pytest.approx(117, abs=1e-3)
    assert items["b"].properties["proj:transform"] == [1, 0, 500_000, 0, -1, 4_000_000]
    assert "rayseg:label" not in items["a"].properties
    assert items["a"].assets["image"].media_type == "image/jpeg"


@pytest.mark.parametrize(("suffix", "world"), [(".jpg", ".JGW"), (".png", ".pgw"), (".tif", ".tfw"), (".jpg", ".wld")])
@pytest.mark.parametrize(("code", "prj"), [(25832, ".prj"), (28992, ".PRJ")])
def test_a_world_file_with_a_prj_beside_it_places_an_image(tmp_path, suffix, world, code, prj):
    image = np.repeat(np.add.outer(10 * np.arange(20), np.arange(30))[..., None], 3, axis=2).astype(np.uint8)
    write(tmp_path / "images" / f"ortho{suffix}", image)
    (tmp_path / f"images/ortho{world}").write_text("0.2\n0\n0\n-0.2\n400000.1\n599999.9\n")
    (tmp_path / f"images/ortho{prj}").write_text(CRS.from_epsg(code).to_wkt("WKT1_ESRI"))
    [source], wrong = sources_of_images(tmp_path / "images")
    assert not wrong
    assert source.crs == f"EPSG:{code}"
    assert source.transform == pytest.approx((0.2, 0, 400_000, 0, -0.2, 600_000))
    [(grid, _)] = grids_of([source])
    pixels, valid = read([source], grid, footprint(source, grid), bands=("red", "green", "blue"))
    assert valid.all()
    assert np.abs(pixels.astype(int) - image.transpose(2, 0, 1)).max() <= (12 if suffix == ".jpg" else 0)
    [item] = open_items(ingest_folder(tmp_path / "images", tmp_path / "cat"))
    assert source_of(item).crs == f"EPSG:{code}"


def test_a_world_file_alone_is_named(tmp_path, caplog):
    write(tmp_path / "images" / "ortho.png", np.ones((20, 30, 3), np.uint8))
    (tmp_path / "images/ortho.pgw").write_text("0.2\n0\n0\n-0.2\n400000.1\n599999.9\n")
    [source], _ = sources_of_images(tmp_path / "images")
    assert source.crs is None
    assert "ortho.png has a world file and no CRS" in caplog.text
    (tmp_path / "images/ortho.prj").write_text("no CRS")
    [], wrong = sources_of_images(tmp_path / "images")
    assert "ortho.prj is not a CRS in WKT" in str(wrong["ortho"])


def test_the_time_of_an_image_is_its_own_or_its_files(tmp_path):
    path = write(tmp_path / "in" / "a.png", picture())
    os.utime(path, (86_400, 86_400))
    with rasterio.open(
        write(tmp_path / "in" / "b.tif", picture(), place={"transform": Affine(2, 0, 5, 0, -2, 9)}), "r+"
    ) as dataset:
        dataset.update_tags(TIFFTAG_DATETIME="2021:11:30 07:17:56")
    [newer, older] = open_items(ingest_folder(tmp_path / "in", tmp_path / "out"))
    assert newer.datetime.isoformat() == "2021-11-30T07:17:56+00:00"
    assert older.datetime.isoformat() == "1970-01-02T00:00:00+00:00"


def refused(call, match, out):
    with pytest.raises(DataError, match=match):
        call()
    assert not out.exists()


def test_one_class_alone_is_refused(folder, tmp_path):
    for path in (folder / "nongpc").iterdir():
        path.unlink()
    refused(
        lambda: ingest_folder(folder, tmp_path / "out", labels="folder"),
        "sub-folders gpc, expected one",
        tmp_path / "out",
    )


def test_a_folder_without_images_is_refused(tmp_path):
    (tmp_path / "in").mkdir()
    for call in (ingest_folder, ingest_rasters):
        refused(lambda call=call: call(tmp_path / "in", tmp_path / "out"), "holds no images", tmp_path / "out")
    refused(lambda: ingest_folder(tmp_path / "no", tmp_path / "out"), "is not a folder", tmp_path / "out")
    with pytest.raises(ConfigError, match="expected folder"):
        ingest_folder(tmp_path / "in", tmp_path / "out", labels="csv")


def test_two_images_of_one_id_are_refused_by_name(folder, tmp_path):
    write(folder / "gpc" / "1.jpg", picture())
    refused(
        lambda: ingest_folder(folder, tmp_path / "out", labels="folder"),
        r"1\.jpg and .*1\.png would both have the id gpc-1",
        tmp_path / "out",
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_corrupt_images_are_named_together_up_to_five(folder, tmp_path, suffix):
    for k in range(7):
        path = write(folder / "gpc" / f"bad{k}{suffix}", picture(200, 200, seed=k))
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"^7 of 11 images are left out of .*bad0.*bad4.*and 2 more; repair") as caught:
        ingest_folder(folder, out, labels="folder")
    assert "bad5" not in str(caught.value)
    assert len(open_items(str(out / "catalog.json"), "chips")) == 4


def test_a_mask_among_the_images_is_left_out(folder, tmp_path):
    write(folder / "gpc" / "mask.png", picture(bands=1)[..., 0] % 2, palette={0: (0, 0, 0), 1: (9, 9, 9)})
    with pytest.raises(DataError, match=r"1 of 5 images are left out of .*mask.png is a palette image"):
        ingest_folder(folder, tmp_path / "out", labels="folder")


def test_without_one_image_that_can_be_decoded_nothing_is_written(folder, tmp_path):
    for path in folder.glob("*/*"):
        path.write_bytes(path.read_bytes()[:60])
    refused(
        lambda: ingest_folder(folder, tmp_path / "out", labels="folder"),
        "4 of 4 images cannot be used, nothing was written",
        tmp_path / "out",
    )


def test_rasters_become_imagery_and_must_have_a_place(tmp_path):
    place = {"crs": "EPSG:32650", "transform": Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    a = write(tmp_path / "in" / "a.tif", picture(bands=2).astype(np.uint16), place=place)
    write(tmp_path / "more" / "b.tif", picture(bands=2).astype(np.uint16), place=place)
    path = ingest_rasters([str(a), str(tmp_path / "more")], tmp_path / "out")
    items = open_items(path, "imagery")
    assert [item.id for item in items] in (["a", "b"], ["b", "a"])
    assert source_of(items[0]).bands == ("b1", "b2")
    c = write(tmp_path / "c.tif", picture())
    refused(
        lambda: ingest_rasters(str(c), tmp_path / "no"),
        r"1 of 1 images .*c.tif has no georeference",
        tmp_path / "no",
    )
    wrong = write(
        tmp_path / "d.tif", picture(), place={"crs": "EPSG:4326", "transform": Affine(512, 0, 15, 0, -512, 47)}
    )
    refused(lambda: ingest_rasters(str(wrong), tmp_path / "no"), r"d.tif lies at .*nowhere on Earth", tmp_path / "no")
    refused(lambda: ingest_rasters(str(tmp_path / "e.tif"), tmp_path / "no"), "e.tif does not exist", tmp_path / "no")


def test_rasters_that_cannot_be_used_are_items_without_a_place_beside_the_others(tmp_path, caplog):
    place = {"crs": "EPSG:32650", "transform": Affine(1, 0, 500_000, 0, -1, 4_000_000)}
    write(tmp_path / "in" / "a.tif", picture(), place=place)
    write(tmp_path / "in" / "bare.tif", picture())
    (tmp_path / "in" / "damaged.tif").write_bytes(b"II*\0nothing")
    items = {item.id: item for item in open_items(ingest_rasters(tmp_path / "in", tmp_path / "out"))}
    assert {name: item.geometry is not None for name, item in items.items()} == {
        "a": True,
        "bare": False,
        "damaged": False,
    }
    assert source_of(items["bare"]).crs is None
    with pytest.raises(DataError, match=r"damaged.tif cannot be read"):
        source_of(items["damaged"])
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 of 3 rasters cannot be mapped")
    assert "bare.tif has no georeference" in said
    assert "damaged.tif cannot be read" in said


def test_images_can_be_used_without_a_catalogue(folder):
    assert is_images(str(folder))
    assert is_images("x/a.TIF")
    assert not is_images("catalog.json")
    assert not is_images("1,2,3,4")
    assert [source.item_id for source in sources_of_images(folder / "gpc")[0]] == ["1", "2"]
    [source], unread = sources_of_images(str(folder / "gpc" / "1.png"))
    assert unread == {}
    [(grid, _)] = grids_of([source])
    assert np.array_equal(
        read([source], grid, Window(0, 0, 40, 30), bands=source.bands)[0].transpose(1, 2, 0), picture(seed=4)
    )


def chip(path):
    [source], _ = sources_of_images(path)
    return Chip(source.item_id, None, source, Window(0, 0, source.width, source.height))


def test_chips_carry_labels_and_survive_rows_and_pickle(folder, tmp_path):
    chips = chips_of(open_items(ingest_folder(folder, tmp_path / "out", labels="folder")))
    assert [(one.id, one.label) for one in chips] == [
        ("gpc-1", "gpc"),
        ("gpc-2", "gpc"),
        ("nongpc-1", "nongpc"),
        ("nongpc-2", "nongpc"),
    ]
    assert chips[0].window == Window(0, 0, 40, 30)
    for one in chips:
        assert Chip.from_row(json.loads(json.dumps(one.to_row())) | {"more": 1}) == one
        assert pickle.loads(pickle.dumps(one)) == one


def test_a_chip_is_cut_and_padded_around_its_middle(tmp_path):
    image = picture(30, 41)
    one = chip(write(tmp_path / "a.png", image))
    pixels, valid = read_chip(one, 20)
    assert np.array_equal(pixels, image[5:25, 10:30])
    assert valid.all()
    pixels, valid = read_chip(one, 64)
    assert pixels.shape == (64, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.array_equal(pixels[17:47, 11:52], image)
    assert valid.sum() == 30 * 41
    assert not pixels[~valid].any()


def test_transparent_pixels_of_a_chip_are_not_valid(tmp_path):
    image = picture(bands=4)
    image[..., 3] = 255
    image[:5, :, 3] = 0
    pixels, valid = read_chip(chip(write(tmp_path / "a.png", image, alpha=True)), 30)
    assert not valid[:5].any()
    assert valid[5:].all()
    assert not pixels[:5].any()


def test_a_grey_chip_is_grey_in_rgb(tmp_path):
    image = picture(bands=1)
    pixels, _ = read_chip(chip(write(tmp_path / "a.png", image)), 30)
    assert np.array_equal(pixels, np.repeat(image[:, 5:35], 3, axis=2))


def test_a_georeferenced_chip_is_read_on_its_own_pixels(tmp_path):
    place = {"crs": "EPSG:32650", "transform": Affine(0.3, 0, 500_000.1, 0, -0.3, 4_000_000.2)}
    image = picture(bands=3)
    path = write(tmp_path / "in" / "x" / "a.tif", image, place=place)
    write(tmp_path / "in" / "y" / "b.tif", image, place=place)
    chips = chips_of(open_items(ingest_folder(path.parents[1], tmp_path / "out", labels="folder")))
    assert np.array_equal(read_chip(chips[0], 30)[0], image[:, 5:35])


def test_deep_pixels_are_refused_with_the_reason(tmp_path):
    path = write(tmp_path / "a.tif", picture().astype(np.uint16))
    with pytest.raises(DataError, match=r"a has uint16 pixels, chips must be uint8, because"):
        read_chip(chip(path), 30)
    item = pystac.Item("a", None, None, pystac.utils.str_to_datetime("2020-01-01T00:00:00Z"), {})
    item.add_asset("image", pystac.Asset(str(path), media_type="image/tiff"))
    with pytest.raises(DataError, match="uint16"):
        chips_of([item])


@pytest.mark.parametrize("kind", ["index", "colour", "palette"])
def test_masks_of_every_kind_are_the_same_classes(tmp_path, kind):
    classes = np.random.default_rng(0).integers(0, 3, (20, 30)).astype(np.uint8)
    colors = np.array(TABLE.colors, np.uint8)
    if kind == "index":
        path = write(tmp_path / "m.png", classes)
    elif kind == "colour":
        path = write(tmp_path / "m.png", colors[classes])
    else:
        path = write(
            tmp_path / "m.png", 7 - classes, palette={7 - k: tuple(color) for k, color in enumerate(TABLE.colors)}
        )
    mask = read_mask(path, TABLE)
    assert mask.dtype == np.uint8
    assert np.array_equal(mask, classes)


def test_a_mask_with_an_unknown_colour_is_refused_by_file_and_colour(tmp_path):
    path = write(tmp_path / "m.png", np.full((4, 4, 3), 77, np.uint8))
    with pytest.raises(DataError, match=r"m.png.*#4D4D4D"):
        read_mask(path, TABLE)


@pytest.mark.real
def test_the_published_chips_are_ingested_and_read(shared, tmp_path):
    chips = chips_of(open_items(ingest_folder(shared / "data" / "gpc" / "train", tmp_path, labels="folder")))
    assert len(chips) == 20
    assert sum(one.label == "gpc" for one in chips) == 10
    for one in chips:
        pixels, valid = read_chip(one, 512)
        assert valid.mean() > 0.99
        assert pixels.std() > 10
    mask = sorted((shared / "data" / "gpc" / "test" / "masks").iterdir())[0]
    values = np.unique(read_mask(mask, ClassTable(((0, "other", (0, 0, 0)), (1, "gpc", (255, 255, 255))))))
    assert values.tolist() == [0, 1]
