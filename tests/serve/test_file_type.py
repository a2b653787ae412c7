"""The format of an upload by its bytes, and files of two formats."""

import io
import time
import zipfile

import numpy as np
import pytest
from PIL import PngImagePlugin
from tiny_server import encoded, image_HWC

from rayseg.serve.file_type import kind_of
from rayseg.serve.problems import Problem


def zipped(data):
    """The data with a ZIP archive behind it."""
    sink = io.BytesIO(data)
    with zipfile.ZipFile(sink, "a") as archive:
        archive.writestr("a.txt", "hidden")
    return sink.getvalue()


def noted(text):
    """A text chunk of a PNG."""
    info = PngImagePlugin.PngInfo()
    info.add_text("note", text)
    return info


VRT = b'<VRTDataset rasterXSize="9" rasterYSize="9"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "begins with 'hello', expected an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "<svg xmlns="),
        (VRT, "<VRTDataset"),
        (b"<?xml version='1.0'?><VRTDataset/>", "<.xml"),
        (b"%PDF-1.7", "%PDF-1.7"),
        (b"GIF89a", "GIF89a"),
        (b"RIFF    WEBP", "RIFF"),
        (zipped(b""), "begins with 'PK"),
        (zipped(encoded(image_HWC())), "both an image and a ZIP archive"),
        (zipped(encoded(image_HWC(), "JPEG")), "both an image and a ZIP archive"),
        (zipped(encoded(image_HWC(), "TIFF")), "both an image and a ZIP archive"),
        (encoded(image_HWC()) + b"<script>alert(1)</script>", "bytes before the upload does"),
        (encoded(image_HWC(), "JPEG") + b"<html>", "bytes before the upload does"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"\0", "both an image and a ZIP archive"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"x" * 65_535, "both an image and a ZIP archive"),
        (zipped(encoded(image_HWC(), "TIFF")) + b"PK\5\6" + b"x" * 40, "both an image and a ZIP archive"),
        (zipped(encoded(image_HWC(), "JPEG")) + b"\0", "both an image and a ZIP archive"),
        (encoded(image_HWC(), "TIFF") + b"PK\5\6" + b"\0" * 18, "both an image and a ZIP archive"),
        (encoded(image_HWC(), "PNG", pnginfo=noted(zipped(b"").decode("latin-1"))), "both an image and a ZIP archive"),
        (encoded(image_HWC(), "JPEG", comment=zipped(b"")), "both an image and a ZIP archive"),
        (b"II*\0" + b"%PDF-1.7" + b"\0" * 100, "both an image and a PDF"),
        (b"II*\0".ljust(1023, b"\0") + b"%PDF-1.7", "both an image and a PDF"),
        (b"II*\0".ljust(1400, b"\0") + b"<html>", "both an image and markup"),
        (b"II*\0<script>alert(1)</script>" + b"\0" * 100, "both an image and markup"),
    ],
)
def test_other_formats_and_files_of_two_formats_are_refused(data, words):
    with pytest.raises(Problem, match=words) as refusal:
        kind_of(data)
    assert refusal.value.status == 415


@pytest.mark.parametrize(("kind", "options"), [("TIFF", {}), ("PNG", {"compress_level": 1}), ("JPEG", {"quality": 95})])
def test_images_are_not_mistaken_for_other_formats(kind, options):
    """Noise contains any short byte sequence at some point."""
    for seed in range(10):
        noise_HWC = np.random.default_rng(seed).integers(0, 256, (600, 700, 3), np.uint8)
        assert kind_of(encoded(noise_HWC, kind, **options)) == kind.lower()


def test_an_image_may_carry_its_description_as_xml():
    told = '<?xml version="1.0" encoding="UTF-8"?><OME><Image ID="Image:0"/></OME>'
    assert kind_of(encoded(image_HWC(), "TIFF", description=told)) == "tiff"
    assert kind_of(encoded(image_HWC(), "PNG", pnginfo=noted(told))) == "png"


@pytest.mark.parametrize("chance", [b"PK\5\6", b"PK\1\2", b"<svg", b"<xml", b"%PDF"])
def test_a_few_bytes_are_not_a_second_format(chance):
    """Noise contains the signatures of other formats; no program opens the file by them alone."""
    data = encoded(np.random.default_rng(0).integers(1, 256, (300, 300, 3), np.uint8), "TIFF")
    for at in (100, len(data) - 60_000, len(data) - 21, len(data) - 4):
        there = data[:at] + chance + data[at + len(chance) :]
        assert kind_of(there) == "tiff"
        with pytest.raises(zipfile.BadZipFile):
            zipfile.ZipFile(io.BytesIO(there))


def test_many_end_records_without_an_archive_are_checked_in_linear_time():
    data = b"II*\0" + b"x" * (1 << 26) + (b"PK\5\6" + b"x" * 18) * 2900
    began = time.process_time()
    assert kind_of(data) == "tiff"
    assert time.process_time() - began < 3


def test_previews_that_cameras_append_are_accepted():
    jpeg = encoded(image_HWC(), "JPEG")
    assert kind_of(jpeg + jpeg + b"\0\0") == "jpeg"
    assert kind_of(jpeg + b"\xff\xd8\xff\xda\x00\x02\xff\xd9" * 20_000) == "jpeg"


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_truncated_images_are_refused(kind):
    with pytest.raises(Problem, match="truncated"):
        kind_of(encoded(image_HWC(), kind)[:-40])
