"""What an upload is by its bytes, and files that are two things at once."""

import io
import time
import zipfile

import numpy as np
import pytest
from PIL import PngImagePlugin
from tiny_server import encoded, image_HWC

from rayseg.serve.file_type import kind_of
from rayseg.serve.problems import Refused


def zipped(data):
    """The data with a ZIP archive behind it."""
    sink = io.BytesIO(data)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("a.txt", "hidden")
    return sink.getvalue()


def noted(text):
    """A text that a PNG holds beside its pixels."""
    info = PngImagePlugin.PngInfo()
    info.add_text("note", text)
    return info


VRT = b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "empty"),
        (b"hello", "no kind that is known"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG"),
        (VRT, "a VRT"),
        (b"<?xml version='1.0'?><VRTDataset/>", "XML"),
        (b"%PDF-1.7", "a PDF"),
        (b"GIF89a", "a GIF"),
        (b"RIFF    WEBP", "a WebP"),
        (zipped(b""), "a ZIP archive"),
        (zipped(encoded(image_HWC())), "ZIP archive at once"),
        (zipped(encoded(image_HWC(), "JPEG")), "ZIP archive at once"),
        (zipped(encoded(image_HWC(), "TIFF")), "ZIP archive at once"),
        (encoded(image_HWC()) + b"<script>alert(1)</script>", "bytes before the upload does"),
        (encoded(image_HWC(), "JPEG") + b"<html>", "bytes before the upload does"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"\0", "ZIP archive at once"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"x" * 65_535, "ZIP archive at once"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"PK\5\6" + b"x" * 40, "ZIP archive at once"),
        (zipped(encoded(image_HWC(), "JPEG")) + b"\0", "ZIP archive at once"),
        (encoded(image_HWC(), "TIFF") + b"PK\5\6" + b"\0" * 18, "ZIP archive at once"),
        (encoded(image_HWC(), "PNG", pnginfo=noted(zipped(b"").decode("latin-1"))), "ZIP archive at once"),
        (encoded(image_HWC(), "JPEG", comment=zipped(b"")), "ZIP archive at once"),
        (b"II*\0" + b"%PDF-1.7" + b"\0" * 100, "a PDF at once"),
        (b"II*\0".ljust(1023, b"\0") + b"%PDF-1.7", "a PDF at once"),
        (b"II*\0".ljust(1400, b"\0") + b"<html>", "markup at once"),
        (b"II*\0<script>alert(1)</script>" + b"\0" * 100, "markup at once"),
    ],
)
def test_what_is_no_image_or_more_than_one_is_refused(data, words):
    with pytest.raises(Refused, match=words) as refusal:
        kind_of(data, max_pixels=1 << 20)
    assert refusal.value.status == 415


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95})])
def test_images_are_not_taken_for_something_else(kind, options):
    """Noise holds any few bytes at some time."""
    for seed in range(10):
        noise_HWC = np.random.default_rng(seed).integers(0, 256, (600, 700, 3), np.uint8)
        assert kind_of(encoded(noise_HWC, kind, **options), max_pixels=1 << 20) == kind.lower()


def test_an_image_may_carry_its_description_as_xml():
    told = '<?xml version="1.0" encoding="UTF-8"?><OME><Image ID="Image:0"/></OME>'
    assert kind_of(encoded(image_HWC(), "TIFF", description=told), max_pixels=1 << 20) == "tiff"
    assert kind_of(encoded(image_HWC(), "PNG", pnginfo=noted(told)), max_pixels=1 << 20) == "png"


@pytest.mark.parametrize("chance", [b"PK\5\6", b"PK\1\2", b"<svg", b"<xml", b"%PDF"])
def test_a_few_bytes_make_no_other_file(chance):
    """Those by which one begins or ends are in noise, too; nothing could open it by them."""
    data = encoded(np.random.default_rng(0).integers(1, 256, (300, 300, 3), np.uint8), "TIFF")
    for at in (100, len(data) - 60_000, len(data) - 21, len(data) - 4):
        there = data[:at] + chance + data[at + len(chance) :]
        assert kind_of(there, max_pixels=1 << 20) == "tiff"
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(there))


def test_many_ends_of_no_archive_take_no_longer_than_one():
    data = b"II*\0" + b"x" * (1 << 26) + (b"PK\5\6" + b"x" * 18) * 2900
    began = time.process_time()
    assert kind_of(data, max_pixels=1 << 20) == "tiff"
    assert time.process_time() - began < 3


def test_previews_that_cameras_append_are_no_second_file():
    jpeg = encoded(image_HWC(), "JPEG")
    assert kind_of(jpeg + jpeg + b"\0\0", max_pixels=1 << 20) == "jpeg"
    assert kind_of(jpeg + b"\xff\xd8\xff\xda\x00\x02\xff\xd9" * 20_000, max_pixels=1 << 20) == "jpeg"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_images_that_are_cut_off_are_refused(kind):
    with pytest.raises(Refused, match="cut off"):
        kind_of(encoded(image_HWC(), kind)[:-40], max_pixels=1 << 20)
