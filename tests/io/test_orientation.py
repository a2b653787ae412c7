"""Photos with an EXIF orientation: every reader sees what a person sees."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageOps, PngImagePlugin

from rayseg.geo.grid import Window
from rayseg.io import labelme, labels, mapview, pictures, scenes, untrusted
from rayseg.io.rasters import footprint, grids_of, read, source_of_file
from rayseg.io.stac_read import open_items, source_of
from rayseg.vision.color import ClassTable

STORED = np.random.default_rng(5).integers(0, 255, (40, 60, 3)).astype(np.uint8)
RGB = ("red", "green", "blue")
ALL = range(1, 9)
CUT_SERVER = Path(__file__).parent / "cut_server.py"
TABLE = ClassTable(((0, "land", (0, 0, 0)), (1, "water", (0, 0, 255))))


def photo(path, orientation, image=STORED):
    """Write a photo; return it as seen."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x0132] = "2021:02:03 04:05:06"
    path.parent.mkdir(exist_ok=True, parents=True)
    options = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    Image.fromarray(image).save(path, exif=exif, **options)
    return np.asarray(ImageOps.exif_transpose(Image.open(path)))


def alike(one_HWC, other_HWC):
    """Equal but for the rounding of two JPEG decoders."""
    return one_HWC.shape == other_HWC.shape and np.abs(one_HWC.astype(int) - other_HWC).max() <= 4


@pytest.mark.parametrize("orientation", ALL)
@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
def test_pixels_are_read_as_they_are_seen(tmp_path, orientation, kind):
    seen = photo(tmp_path / f"a.{kind}", orientation)
    source = source_of_file(str(tmp_path / f"a.{kind}"), "a")
    assert (source.height, source.width, source.crs) == (*seen.shape[:2], None)
    [(grid, _)] = grids_of([source])
    image, valid = read([source], grid, footprint(source, grid), bands=RGB)
    assert valid.all()
    assert alike(image.transpose(1, 2, 0), seen)
    part = Window(7, 5, 20, 30)
    assert (read([source], grid, part, bands=RGB)[0] == image[:, 5:35, 7:27]).all()


@pytest.mark.parametrize("orientation", [2, 5, 8])
def test_ingest_pictures_uploads_and_the_map_page_agree(tmp_path, orientation):
    seen = photo(tmp_path / "photos" / "a.jpg", orientation)
    [item] = open_items(labels.ingest_folder(tmp_path / "photos", tmp_path / "cat"))
    assert item.datetime.isoformat() == "2021-02-03T04:05:06+00:00"
    source = source_of(item)
    assert (source.height, source.width) == seen.shape[:2]
    [(grid, _)] = grids_of([source])
    window = footprint(source, grid)
    assert alike(pictures.shown([source], grid, window), seen)
    upload = untrusted.read_image(str(tmp_path / "photos" / "a.jpg"), "jpeg", bands=RGB, max_pixels=10_000)
    assert alike(upload.image_CHW.transpose(1, 2, 0), seen)
    tile = mapview.imagery_tile([source], (0, 0, 0), image=window)
    height, width = (round(256 * side / 60) for side in seen.shape[:2])
    assert (tile[..., 3] > 0).sum() == pytest.approx(height * width, rel=0.02)
    assert alike(tile[1, 1, :3], seen[0, 0])


@pytest.mark.parametrize("orientation", [3, 4, 7])
def test_training_pairs_a_photo_with_the_mask_that_was_drawn_on_it(tmp_path, orientation):
    image = STORED // 8
    image[5:25, 30:50] = 250
    seen = photo(tmp_path / "images" / "a.png", orientation, image)
    (tmp_path / "masks").mkdir()
    Image.fromarray((seen[..., 0] > 200).astype(np.uint8)).save(tmp_path / "masks" / "a.png")
    [one] = scenes.labelled_images(str(tmp_path), table=TABLE)
    pixels, classes = scenes.read_window(one, one.window, bands=RGB, table=TABLE)
    assert (classes == (pixels[0] > 200)).all()
    assert classes.sum() == 400


@pytest.mark.parametrize("orientation", [2, 3, 6])
def test_plots_go_to_annotation_tools_and_back_on_the_photo_as_seen(tmp_path, orientation):
    image = STORED // 8
    image[5:25, 30:50] = 250
    seen = photo(tmp_path / "photos" / "a.jpg", orientation, image)
    rows, cols = np.where(seen[..., 0] > 200)
    box = labelme.shapely.box(cols.min(), rows.min(), cols.max() + 1, rows.max() + 1)
    document = labelme.document(tmp_path / "photos" / "a.jpg", [box], ["field"])
    assert (document["imageHeight"], document["imageWidth"]) == seen.shape[:2]
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "a.json").write_text(json.dumps(document))
    assert labelme.load(str(tmp_path / "json"), str(tmp_path / "photos"), str(tmp_path / "out"), size=32)["field"] == 1
    crop = np.asarray(Image.open(next((tmp_path / "out" / "field").iterdir())))
    assert (crop[..., 0] > 200).mean() > 0.7


def put_exif(path, place, orientation):
    """A picture whose orientation is at an unusual place."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    image, content = Image.fromarray(STORED), exif.tobytes()
    if place == "png after its pixels":
        image.save(path)
        plain, chunk = path.read_bytes(), b"eXIf" + content.removeprefix(b"Exif\x00\x00")
        added = (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        path.write_bytes(plain[:-12] + added + plain[-12:])
    elif place in {"png in a text", "png in a packed text"}:
        texts = PngImagePlugin.PngInfo()
        profile = f"\nexif\n{len(content):8}\n{content.hex()}\n"
        texts.add_text("Raw profile type exif", profile, zip=place == "png in a packed text")
        image.save(path, pnginfo=texts)
    elif place in {"jpg in XMP", "png in XMP"}:
        xmp = f"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
            <rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="{orientation}"/></rdf:RDF>
            </x:xmpmeta>"""
        texts = PngImagePlugin.PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp)
        image.save(
            path, quality=95, subsampling=0, **{"jpg": {"xmp": xmp.encode()}, "png": {"pnginfo": texts}}[place[:3]]
        )
    else:  # with a world file
        photo(path, orientation)
        path.with_suffix(".jgw" if path.suffix == ".jpg" else ".tfw").write_text("2\n0\n0\n-2\n100\n200\n")


@pytest.mark.parametrize("orientation", [2, 6])
@pytest.mark.parametrize(
    "place",
    [
        "png after its pixels",
        "png in a text",
        "png in a packed text",
        "png in XMP",
        "jpg in XMP",
        "jpg with a world file",
        "tif with a world file",
    ],
)
def test_maps_labels_and_uploads_turn_a_photo_alike_wherever_its_orientation_is(tmp_path, place, orientation):
    path = tmp_path / f"a.{place[:3]}"
    put_exif(path, place, orientation)
    seen = STORED[:, ::-1] if orientation == 2 else np.rot90(STORED, -1)
    source = source_of_file(str(path), "a")
    [(grid, _)] = grids_of([source])
    pixels = read([source], grid, footprint(source, grid), bands=RGB)[0].transpose(1, 2, 0)
    labelled = labelme._picture(path)
    assert alike(pixels, labelled)
    assert pixels.shape == seen.shape
    if path.suffix == ".png":
        path.write_bytes(untrusted.without_text(bytearray(path.read_bytes())))
        upload = untrusted.read_image(str(path), "png", bands=RGB, max_pixels=10_000)
        np.testing.assert_array_equal(upload.image_CHW.transpose(1, 2, 0), seen)
    assert np.corrcoef(pixels.ravel(), seen.ravel())[0, 1] > 0.95


@pytest.mark.parametrize("orientation", [1, 3, 6])
@pytest.mark.parametrize("name", ["a.tif", "a.jpg", "a.png", "png after its pixels", "png in a packed text"])
@pytest.mark.parametrize("parts", [True, False])
def test_a_photo_on_the_web_is_turned_as_a_local_one(tmp_path, served, name, orientation, parts):
    url, _ = served
    path = tmp_path / (name if "." in name else "b.png")
    if "." in name:
        photo(path, orientation)
    else:
        put_exif(path, name, orientation)
    if parts:  # a server that answers requests for parts of a file
        process = subprocess.Popen([sys.executable, CUT_SERVER, str(path)], stdout=subprocess.PIPE, text=True)
        url = f"http://127.0.0.1:{int(process.stdout.readline())}/{1 << 30}"
    try:
        pixels = []
        for href in (str(path), f"{url}/{path.name}"):
            source = source_of_file(href, "a")
            [(grid, _)] = grids_of([source])
            pixels.append(read([source], grid, footprint(source, grid), bands=RGB)[0])
        assert np.array_equal(*pixels)
        assert pixels[0].shape == ((3, 60, 40) if orientation == 6 else (3, 40, 60))
    finally:
        if parts:
            process.kill()
            process.wait()
            process.stdout.close()


def test_coordinates_belong_to_stored_pixels(tmp_path):
    photo(tmp_path / "a.jpg", 6)
    (tmp_path / "a.jgw").write_text("2\n0\n0\n-2\n100\n200\n")
    (tmp_path / "a.jpg.aux.xml").write_text("<PAMDataset><SRS>EPSG:32633</SRS></PAMDataset>")
    source = source_of_file(str(tmp_path / "a.jpg"), "a")
    assert (source.height, source.width, source.crs) == (40, 60, "EPSG:32633")


@pytest.mark.parametrize("content", [b"II*\x00\xff\xff\xff\xff", b"MM\x00*", b"II+\x00" + b"\x10" * 8])
def test_a_damaged_directory_is_no_orientation(tmp_path, content):
    photo(tmp_path / "a.png", 1)
    plain = (tmp_path / "a.png").read_bytes()
    bad = len(content).to_bytes(4, "big") + b"eXIf" + content + zlib.crc32(b"eXIf" + content).to_bytes(4, "big")
    (tmp_path / "b.png").write_bytes(plain[:33] + bad + plain[33:])
    with rasterio.open(tmp_path / "b.png") as opened:
        assert source_of_file(str(tmp_path / "b.png"), "b").width == opened.width
