"""The formats that GDAL may open. Each further driver is code that reads untrusted bytes, so they are few.

GDAL recognises formats by content and not by name, and opens the files that a mosaic (VRT, GTI) names with any driver.
Therefore the files of a mosaic are checked before the mosaic is opened.
"""

import logging
import posixpath
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from xml.etree import ElementTree  # expat, which limits the expansion of entities

from aiohttp import ClientError
from rasterio.drivers import raster_driver_extensions
from rasterio.env import ensure_env_with_credentials
from rasterio.io import DatasetReader
from upath import UPath

from rayseg.errors import DataError, listed
from rayseg.io import remote
from rayseg.io.tables import concurrently
from rayseg.store import STORE_ERRORS, allowed_drivers, is_local, suffix_of, upath, web_url

_log = logging.getLogger(__name__)
TIFF = "image/tiff; application=geotiff"
KINDS = {
    ".tif": ("GTiff", TIFF),
    ".tiff": ("GTiff", TIFF),
    ".png": ("PNG", "image/png"),
    ".jpg": ("JPEG", "image/jpeg"),
    ".jpeg": ("JPEG", "image/jpeg"),
    ".jp2": ("JP2OpenJPEG", "image/jp2"),
    ".j2k": ("JP2OpenJPEG", "image/jp2"),
}
"""Suffix -> (driver, media type) of images."""
MOSAICS = {".vrt": ("VRT", "application/x-gdal-vrt"), ".gti.gpkg": ("GTI", "application/x-gdal-gti")}
"""The same of files that name images."""
_SIDECARS = (".aux.xml", ".ovr", ".msk", ".tfw", ".tifw", ".jgw", ".jpgw", ".pgw", ".pngw", ".j2w", ".wld", ".prj")
"""Ends of the names of files that GDAL reads with an image."""
DRIVERS = ("GTiff", "PNG", "JPEG", "JP2OpenJPEG")
SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    **dict.fromkeys((b"II*\x00", b"MM\x00*", b"II+\x00", b"MM\x00+"), "GTiff"),
    **dict.fromkeys((b"\x00\x00\x00\x0cjP  ", b"\xff\x4f\xff\x51"), "JP2OpenJPEG"),
}
"""First bytes -> driver."""
_FAULTS: tuple[type[Exception], ...] = (*STORE_ERRORS, ClientError)
_HEAD = 1024  # bytes by which GDAL recognizes formats
_DEEPEST = 5  # mosaics of mosaics
_PATHS = {"sourcefilename", "sourcedataset"}
_FILES = re.compile(
    r"(?i)[xyz]_dataset|\w*_filename\w*|overview_file|dempath|rpc_dem\w*|cutline_dsname|open_?options|ooi|root_path"
)
"""Elements, attributes and keys by which a VRT names further files: geolocation arrays, terms of processing steps,
overviews, elevation models, and options that move the root of relative paths."""
_INDEX_FILES = re.compile(r"(?i)location_field|overview_\d+_(dataset|layer)|(spatial_)?sql")
"""Settings by which a tile index names files elsewhere than in its column location."""
_WEB = (
    *(("/vsicurl/https://", "https://"), ("/vsicurl/http://", "http://"), ("/vsis3/", "s3://")),
    *((start, start) for start in ("https://", "http://", "s3://")),
)
"""How a tile index names files on the web -> how they are opened."""
_TEXTS = {"metadata", "mdi", "srs", "description", "category", "unittype", "categorynames", "geotransform", "gcplist"}
_FOREIGN = re.compile(r"^\s*([/\\~<]|[A-Za-z]\w*:)|://|/vsi")


def kind_of(path: object) -> tuple[str, str] | None:
    """(driver, media type) of an image or a mosaic by its name; None for any other file."""
    name = str(path).lower().partition("?")[0] if "://" in str(path) else str(path).lower()
    mosaic = next((kind for suffix, kind in MOSAICS.items() if name.endswith(suffix)), None)
    return mosaic or KINDS.get(suffix_of(name))


def files_in(folder: UPath) -> list[UPath]:
    """The entries of a folder by name, without hidden ones such as those of macOS next to each file."""
    return sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda path: str(path.name))


def warn_of_rest(folder: UPath, entries: Sequence[UPath], kept: Sequence[UPath], expected: str) -> None:
    """Warn of a folder's entries that are neither kept nor read by GDAL with one that is."""
    rest = [path.name for path in entries if path not in kept and not path.name.lower().endswith(_SIDECARS)]
    if rest:
        _log.warning(
            "%d of %d entries of %s are left out: %s (%s)",
            *(len(rest), len(rest) + len(kept), folder, listed(rest), expected),
        )


def opened(href: str, drivers: tuple[str, ...] = ()) -> DatasetReader:
    """The file, open by one of some drivers, or of `DRIVERS` and those that the user allows; inside `sources.gdal`.

    Raises:
        DataError: it is a mosaic of other files than images next to it, or has no bands of its own.
        rasterio.errors.RasterioIOError: none of the drivers opens it.
    """
    kind = kind_of(href)
    allowed = drivers or (*DRIVERS, *allowed_drivers())
    if kind and kind in MOSAICS.values() and not drivers:
        if kind[0] not in allowed:
            # A local file that has changed is checked again.
            stamp = upath(href).stat().st_mtime_ns if is_local(href) and upath(href).exists() else 0
            _expect_images(href, stamp, 0)
        allowed = (kind[0],)
    signed = gdal_name(remote.signed(href))
    dataset: DatasetReader = ensure_env_with_credentials(DatasetReader)(signed, driver=list(allowed))
    try:
        _expect_bands(dataset, href)
    except DataError:
        dataset.close()
        raise
    return dataset


def gdal_name(href: str) -> str:
    """The name by which GDAL reads a path or URL; rasterio's own would lose what follows "#"."""
    if is_local(href):
        return str(upath(href).path)
    if href.startswith("s3://"):
        return f"/vsis3/{href.removeprefix('s3://')}"
    return f"/vsicurl/{web_url(href).replace('#', '%23')}"


def unknown(href: str) -> str:
    """What to do with a file that no driver opens."""
    by_name = raster_driver_extensions().get(suffix_of(href).lstrip("."))
    driver = by_name if by_name and by_name not in (*DRIVERS, "VRT", *allowed_drivers()) else "NAME"
    return (
        "it is damaged, or not a GeoTIFF, PNG, JPEG, JPEG 2000, VRT or GTI (.gti.gpkg); convert it to GeoTIFF, or, if "
        f"you trust where it is from, allow its GDAL driver with --allow-driver {driver}"
    )


def _expect_bands(dataset: DatasetReader, href: str) -> None:
    if dataset.count == 0:
        names = [name.rpartition(":")[2] for name in dataset.subdatasets]
        raise DataError(
            f"{href} has no bands of its own but {len(names)} datasets ({listed(names, most=8)}); write the one to map "
            f"as GeoTIFF, with gdal_translate {dataset.subdatasets[0] if names else href} NEW.tif"
        )
    if any(dataset.tags(ns=domain) for domain in ("OVERVIEWS", "PROXY_OVERVIEW_REQUEST")):
        raise DataError(f"{href} refers to other files for its overviews; save it as one plain image")


# -- mosaics ----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _expect_images(href: str, stamp: int, depth: int) -> None:
    """Refuse a mosaic of other files than images, and a VRT whose files are not named relative to it.

    Args:
        href: of the mosaic.
        stamp: modification time of the outermost mosaic; a changed file is not found in the cache.
        depth: number of mosaics around it.

    Raises:
        DataError: the first such file, with the remedy.
    """
    sources = list(_files_of_index(href) if kind_of(href) == MOSAICS[".gti.gpkg"] else _files_of_vrt(href))
    for source, head in zip(sources, concurrently(_head, sources), strict=True):
        if b"<VRTDataset" in head.partition(b"\0")[0]:  # as GDAL recognises a VRT, whatever precedes it
            if depth == _DEEPEST:
                raise DataError(f"{href} is a mosaic of mosaics, deeper than {_DEEPEST}; build it from the images")
            _expect_images(source, stamp, depth + 1)
        elif head and not any(head.startswith(signature) for signature in SIGNATURES):
            raise DataError(f"{href} names {source}, which is not an image: {unknown(source)}")


def _head(href: str) -> bytes:
    """The first bytes of a file; none if a local file is missing, which is an error of reading and not of format."""
    target = upath(remote.signed(href))
    try:
        return bytes(target.fs.cat_file(target.path, start=0, end=_HEAD))
    except _FAULTS as error:
        if is_local(href):
            return b""
        raise DataError(f"{href} cannot be read: {error}") from None


def _files_of_vrt(href: str) -> Iterator[str]:
    data = upath(remote.signed(href)).read_bytes()
    if re.search(rb"<!(DOCTYPE|ENTITY)", data):
        raise DataError(f"{href} is an XML file with a document type; build the VRT with gdalbuildvrt")
    try:
        root = ElementTree.fromstring(data)
    except ElementTree.ParseError as error:
        raise DataError(f"{href} is not a VRT: {error}; build it with gdalbuildvrt") from None
    for element in root.iter():
        # GDAL ignores namespaces and case, and takes an attribute for an element of its name.
        tag, text = element.tag.rpartition("}")[2], (element.text or "").strip()
        attributes = {name.lower(): value for name, value in element.items()}
        path = tag.lower() in _PATHS and bool(text)
        named = [(name, value) for name, value in attributes.items() if name in _PATHS]
        if path and [value for name, value in element.items() if name.lower() == "relativetovrt"] != ["1"]:
            named.append((tag, text))
        words = (tag, text, (element.tail or "").strip(), *attributes, *attributes.values())
        named += [(tag, word) for word in words if word.lower() not in _PATHS and _FILES.fullmatch(word)]
        if tag.lower() not in _TEXTS:
            named += [(name, value) for name, value in ((tag, text), *attributes.items()) if _FOREIGN.search(value)]
        if named:
            raise DataError(
                f"{href} names {named[0][1][:200]!r} ({named[0][0]}), expected images relative to the VRT; build it in "
                "their folder with gdalbuildvrt, or, if you trust where it is from, add --allow-driver VRT"
            )
        if path:
            scheme, sign, place = href.rpartition("://")
            yield scheme + sign + posixpath.normpath(posixpath.join(posixpath.dirname(place), text))


def _files_of_index(href: str) -> Iterator[str]:
    """The files of a tile index, as paths and URLs."""
    import pyogrio  # few files are tile indexes

    # A remote index is read by its bytes: GDAL would look for files next to it.
    content = str(upath(href).path) if is_local(href) else upath(remote.signed(href)).read_bytes()
    layers = pyogrio.list_layers(content)
    if len(layers) != 1:
        raise DataError(f"{href} has {len(layers)} layers, expected one; build it with gdaltindex")
    settings = pyogrio.read_info(content).get("layer_metadata") or {}
    if other := sorted(name for name in settings if _INDEX_FILES.fullmatch(name)):
        raise DataError(f"{href} names files by {', '.join(other)}, expected its column location only; build it again")
    table = pyogrio.read_dataframe(content, read_geometry=False)
    if "location" not in table:
        raise DataError(f"{href} has no column location; build it with gdaltindex")
    for name in dict.fromkeys(table["location"]):
        # Paths of GDAL's virtual file systems reach any file or address, so only those of the web are let
        # through.
        web = next((f"{scheme}{name[len(start) :]}" for start, scheme in _WEB if name.startswith(start)), "")
        if not web and (name.startswith("/vsi") or ":" in name):
            raise DataError(
                f"{href} names {name!r}, expected images; if you trust where it is from, add --allow-driver GTI"
            )
        yield web or posixpath.join(posixpath.dirname(gdal_name(href)) if is_local(href) else "", name)
