"""Recognize PNG, JPEG and TIFF by their bytes, and refuse files that are also a second format, without decoding."""

import re

from rayseg.io.drivers import SIGNATURES
from rayseg.io.untrusted import DRIVERS, Kind
from rayseg.serve.problems import Problem

_SIGNATURES: dict[bytes, Kind] = {
    signature: kind for signature, driver in SIGNATURES.items() for kind, name in DRIVERS.items() if name == driver
}
_ENDS = {"png": b"IEND\xaeB`\x82", "jpeg": b"\xff\xd9"}
_MARKUP = re.compile(rb"<(?:svg|html|script|\?php|!doctype|vrtdataset)[\s/>]", re.IGNORECASE)
_MARKUP_WITHIN, _PDF_WITHIN = 1445, 1024  # bytes: how far browsers sniff, and how far PDF readers search
_ZIP_END = re.compile(rb"PK\x05\x06(?=.{8}(.{4}).{6})", re.DOTALL)  # group 1: size of the directory
_ZIP_END_WITHIN = 22 + 65_535  # bytes: the end record and its longest comment


def kind_of(data: bytes) -> Kind:
    """The format of an upload.

    Raises:
        Problem: 415 for another format or a file of two formats, 422 for a truncated PNG or JPEG.
    """
    kind = next((kind for signature, kind in _SIGNATURES.items() if data.startswith(signature)), None)
    if kind is None:
        start = f"begins with {repr(data[:12])[1:]}" if data else "is empty"
        raise Problem(415, f"the upload {start}, expected an image; send a PNG, JPEG or GeoTIFF")
    # The four letters of a ZIP end record are in the noise of 1 image in 65,000: a directory must precede it.
    ends = [*_ZIP_END.finditer(data, max(0, len(data) - _ZIP_END_WITHIN))]
    directory = data.find(b"PK\x01\x02") if ends else -1
    second = {
        "a ZIP archive": any(not any(end[1]) or 0 <= directory < end.start() for end in ends),
        "a PDF": data.find(b"%PDF-", 0, _PDF_WITHIN + 4) >= 0,
        "markup": _MARKUP.search(data, 0, _MARKUP_WITHIN),
    }
    for name in (name for name, matches in second.items() if matches):
        raise Problem(415, f"the upload is both an image and {name}; send a plain PNG, JPEG or GeoTIFF")
    if kind in _ENDS:
        end = data.rfind(_ENDS[kind]) + len(_ENDS[kind])
        if end < len(_ENDS[kind]):
            raise Problem(422, f"the {kind.upper()} is truncated; send the whole file")
        if data[end:].strip(b"\x00"):  # cameras pad with zeros
            raise Problem(415, f"the {kind.upper()} ends {len(data) - end} bytes before the upload does; send it alone")
    return kind
