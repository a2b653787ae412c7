"""Labelled images: folders of images described as STAC, and chips read as arrays.

Images are not copied; the catalogue refers to them by absolute paths.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeVar

import numpy as np
import pystac
import shapely
from numpy.typing import NDArray
from rasterio.io import DatasetReader
from rasterio.windows import Window as FileWindow
from shapely.geometry import mapping
from upath import UPath

from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Window, slug
from rayseg.io.drivers import KINDS, MOSAICS, TIFF, files_in, kind_of, warn_of_rest
from rayseg.io.masks import pixels_of, read_classes
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.remote import patient
from rayseg.io.sources import PIXELS, Source, crs_of, gdal, open_file, part_of_image, ring_of, source_of_file
from rayseg.io.stac_read import source_of
from rayseg.io.stac_write import PROJECTION, lonlat_geometry, write_catalog
from rayseg.io.tables import attempted
from rayseg.io.times import UNKNOWN, in_utc, utc_text
from rayseg.io.units import expect_one_unit
from rayseg.store import StorePath, is_local, suffix_of, upath
from rayseg.vision.color import ClassTable
from rayseg.vision.crops import middle

T = TypeVar("T")
_log = logging.getLogger(__name__)
LABEL = "rayseg:label"
PART = "rayseg:part"
PARTS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
"""Folder above those of classes -> part of the images in it."""
_KINDS = ", ".join(suffix.lstrip(".") for suffix in (*KINDS, *MOSAICS))
_TIMES = {
    "EXIF_DateTimeOriginal": "EXIF_OffsetTimeOriginal",
    "TIFFTAG_DATETIME": "",
    "EXIF_DateTime": "EXIF_OffsetTime",
}
"""Tags with the time of an image, the preferred one first, and with its zone."""
_EXIF_DATE = re.compile(r"^(\d{4}):(\d\d):(\d\d)[ T]+")
_STRIP = 1024  # rows decoded at once when an image is checked
_THREADS = 4
Files = list[tuple[str | None, UPath]]
"""(class, image file) each; the class is None without labels."""


@dataclass(frozen=True)
class Chip:
    """A labelled training image.

    Attributes:
        id: `<class>-<stem>` if it comes from a folder.
        label: name of its class, None without a label.
        source: its file.
        window: the whole image on its own grid.
        part: train, validation or test, if its data set states it.
    """

    id: str
    label: str | None
    source: Source
    window: Window
    part: str = ""

    def to_row(self) -> dict[str, Any]:
        """The chip as one flat row of plain values; the source as JSON."""
        window = self.window
        place = {"col": window.col, "row": window.row, "width": window.width, "height": window.height}
        return {"id": self.id, "label": self.label, "source": json.dumps(self.source.to_row()), **place}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Chip":
        """The chip of a row from `to_row`; further columns are ignored."""
        window = Window(row["col"], row["row"], row["width"], row["height"])
        return cls(row["id"], row["label"], Source.from_row(json.loads(row["source"])), window)


# -- ingest -----------------------------------------------------------------------------------------------------------


def ingest_folder(folder: StorePath, out: StorePath, *, labels: str | None = None, bands: Sequence[str] = ()) -> str:
    """Describe a folder of PNG, JPEG or GeoTIFF images, with or without georeference, as a STAC catalogue.

    With `labels="folder"` each sub-folder is a class, and its images (or those of its sub-folder `img`) become items
    `<class>-<stem>` of the collection `chips` with the property `rayseg:label`. Class folders may lie in folders called
    `train`, `val` and `test`: items `<folder>-<class>-<stem>` with the property `rayseg:part`. Otherwise the images of
    the folder become items `<stem>` of the collection `imagery`. `sources.band_names` names the bands. An
    image's time is its own tag, taken as UTC, else its file's time.

    Args:
        folder: of the images.
        out: folder of the catalogue.
        labels: None, or "folder".
        bands: names of the bands of every image, in their order; by default those of the files.

    Returns:
        Path of the catalogue.

    Raises:
        ConfigError: `labels` is neither None nor "folder".
        DataError: there are no images, only one class, two images of one id, or none that can be decoded; nothing is
            written then. If some cannot be decoded, the catalogue of the others is written first.
    """
    if labels not in {None, "folder"}:
        raise ConfigError(f"labels is {labels!r}, expected folder (classes are sub-folders) or nothing")
    files: Files = [(None, path) for path in _images_in(upath(folder))] if not labels else _by_class(upath(folder))
    if not files:
        raise DataError(f"{folder} holds no images ({_KINDS}); {_layout_of(upath(folder))}")
    names = _ids(files)
    # All images are read before anything is written: a half catalogue would be a data set.

    def described(path: UPath, label: str | None) -> pystac.Item:
        item = _item(_named(_decoded(_path(path), names[path]), bands), label)
        if part := _part_of(path, label):
            item.properties[PART] = PARTS[part]
        return item

    items, errors = _each(files, described)
    if not items:
        raise _unusable(errors, len(files))
    catalogue = write_catalog(out, {"chips" if labels else "imagery": items})
    if errors:
        raise DataError(
            f"{len(errors)} of {len(files)} images are left out of {catalogue}: "
            f"{listed(errors.values(), separator='; ')}; repair them and run the same command, or use it as it is"
        )
    return catalogue


def _layout_of(folder: UPath) -> str:
    """What to do with a folder that holds no image itself."""
    inner = next((folder / name for name in ("images", "img") if (folder / name).is_dir()), None)
    if inner is None:
        return "if sub-folders are classes, add --labels folder"
    if not (folder / "masks").is_dir():
        return f"give its sub-folder {inner}"
    return f"to train with its masks, use landcover with --set labelled.source={folder}; for images alone, give {inner}"


def ingest_rasters(paths: StorePath | Sequence[StorePath], out: StorePath, *, bands: Sequence[str] = ()) -> str:
    """Describe georeferenced rasters as the collection `imagery` of a STAC catalogue, items `<stem>`.

    If some rasters can be opened and placed on Earth, the others become items without geometry, with a warning; a map
    of the catalogue reports these as failed.

    Args:
        paths: rasters, or folders of them.
        out: folder of the catalogue.
        bands: names of the bands of every raster, in their order; by default those of the files.

    Returns:
        Path of the catalogue.

    Raises:
        DataError: there are no rasters, two have one name, or none can be opened and placed on Earth; nothing is
            written then.
    """
    places = [paths] if isinstance(paths, str) or not isinstance(paths, Sequence) else paths
    files: Files = [(None, path) for path in _rasters_in(places)]
    names = _ids(files)

    def describe(path: UPath, _: str | None) -> pystac.Item:
        source = _named(_described(_path(path), names[path]), bands)
        if source.crs is None:
            raise DataError(f"{path} has no georeference; ingest it with `ingest folder`")
        return _item(source, None)

    items, errors = _each(files, describe)
    if not items:
        raise _unusable(errors, len(files))
    if errors:
        _log.warning(
            "%d of %d rasters cannot be mapped, their items have no geometry: %s",
            *(len(errors), len(files), listed(errors.values(), separator="; ")),
        )
    for path in errors:  # only the modification time of these files is known
        item = pystac.Item(names[path], None, None, datetime.fromtimestamp(path.stat().st_mtime, UTC), {})
        _, kind = kind_of(path) or ("", TIFF)
        item.add_asset("image", pystac.Asset(_path(path), media_type=kind, roles=["data"]))
        items.append(item)
    return write_catalog(out, {"imagery": items})


def is_images(text: str) -> bool:
    """Whether `text` is an image file or a folder, rather than a region or a catalogue."""
    path = upath(text)
    if kind_of(text):
        return True
    return path.protocol not in {"http", "https"} and path.is_dir()  # the web has no folders


def sources_of_images(location: StorePath) -> tuple[list[Source], dict[str, DataError]]:
    """The images of a folder, or one image, as sources named by their stem; and the errors of files that do not open.

    A folder of scenes (see `image_folders`) gives the images of all scenes, named `<scene>-<stem>`.

    Raises:
        DataError: there are no images, or two have one name.
    """
    files: Files = [
        (scene.replace("/", "-") or None, path)
        for scene, folder in image_folders(location).items()
        for path in _images_in(folder / "images")
    ] or [(None, path) for path in _rasters_in([location])]
    names = _ids(files)
    sources, errors = _each(files, lambda path, _: _described(_path(path), names[path]))
    return sources, {names[path]: error for path, error in errors.items()}


def image_folders(location: StorePath) -> dict[str, UPath]:
    """Scene -> its folder, for every folder at or below a location with a sub-folder `images`; "" is the location."""
    root = upath(location)
    scenes = sorted((path.parent for path in root.glob("**/images")), key=str) if root.is_dir() else []
    return {str(path.relative_to(root)) if path != root else "": path for path in scenes}


def _rasters_in(paths: Sequence[StorePath]) -> list[UPath]:
    images = []
    for path in map(upath, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist; give an image ({_KINDS}) or a folder of images")
        images += _images_in(path) if path.is_dir() else [path]
    if not images:
        raise DataError(f"{', '.join(map(str, paths))} holds no images ({_KINDS}); give a folder that does")
    return images


def _images_in(folder: UPath) -> list[UPath]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder of images")
    shown = files_in(folder)
    images = [path for path in shown if suffix_of(path) in KINDS] or [path for path in shown if kind_of(path)]
    if images:
        warn_of_rest(folder, shown, images, f"images are {_KINDS}; a folder's mosaics only if it has no others")
    return images


def _by_class(folder: UPath) -> Files:
    """The images of all sub-folders, each with its sub-folder's name as class."""
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a folder with a sub-folder of images for each class")
    # A part without folders of classes, as LiSegAgr's `val`, has no labels.
    named = [folder / name for name in PARTS if (folder / name).is_dir()]
    parts = [part for part in named if not _images_in(part) and any(inner.is_dir() for inner in part.iterdir())]
    if parts:
        return [file for part in parts for file in _by_class(part)]
    classes = sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    # The code of Cao & Huang keeps images in a folder below that of the class.
    inner = {name: folder / name / "img" for name in classes}
    images = {name: _images_in(inner[name] if inner[name].is_dir() else folder / name) for name in classes}
    # Folders without images, such as one of documents, are not classes.
    filled = [name for name in classes if images[name]]
    if len(filled) < 2:
        raise DataError(
            f"{folder} has images in the sub-folders {', '.join(filled) or 'none'}, expected one sub-folder for each "
            "of at least two classes; sort the images into them"
        )
    return [(name, image) for name in filled for image in images[name]]


def _part_of(path: UPath, label: str | None) -> str:
    """Name of the folder above that of an image's class, if it is one of `PARTS`."""
    folder = path.parents[1] if path.parent.name == "img" else path.parent
    return folder.parent.name if label and folder.parent.name in PARTS else ""


def _ids(files: Files) -> dict[UPath, str]:
    """The id of each image, all different."""
    owners: dict[str, UPath] = {}
    for label, path in files:
        name = slug("-".join(filter(None, [_part_of(path, label), label, path.stem])))
        if name in owners:
            raise DataError(f"{owners[name]} and {path} would both have the id {name}; rename one of them")
        owners[name] = path
    return {path: name for name, path in owners.items()}


def _each(files: Files, make: Callable[[UPath, str | None], T]) -> tuple[list[T], dict[UPath, DataError]]:
    """`make(image, class)` of every image in order, and the errors of those that fail."""
    made, failed = attempted(lambda entry: make(entry[1], entry[0]), files, threads=_THREADS)
    return [result for _, result in made], {path: error for (_, path), error in failed}


def _unusable(errors: dict[UPath, DataError], count: int) -> DataError:
    reasons = listed(errors.values(), separator="; ")
    return DataError(f"{len(errors)} of {count} images cannot be used, nothing was written: {reasons}")


def _path(path: UPath) -> str:
    return str(path.absolute()) if is_local(path) else str(path)


def _described(href: str, name: str) -> Source:
    with gdal(href), open_file(href) as dataset:
        taken = _taken(dataset, href)
    source = source_of_file(href, name, datetime=taken)
    if source.crs is None and source.transform != PIXELS and part_of_image(source) is None:
        _log.warning(
            "%s has a world file and no CRS: it is mapped in its own pixels; to place it, write its CRS in WKT to %s",
            *(href, upath(href).with_suffix(".prj")),
        )
    return source if source.crs else replace(source, transform=PIXELS)


@patient
def _decoded(href: str, name: str) -> Source:
    """The image as a source; it is decoded once in full, to detect damage before anything is written."""
    source = _described(href, name)
    if "palette" in source.bands:
        raise DataError(f"{href} is a palette image, which masks are, expected RGB or grey; convert it to RGB")
    with gdal(href), open_file(href) as dataset:
        # Strip by strip: an image may be larger than memory.
        for row in range(0, dataset.height, _STRIP):
            dataset.read(window=FileWindow(0, row, dataset.width, min(_STRIP, dataset.height - row)))
    return source


def _named(source: Source, bands: Sequence[str]) -> Source:
    """The source with these names of its bands; without any, with its own."""
    if not bands:
        return source
    [(href, own)] = source.assets
    if len(bands) != len(own) or len(set(bands)) != len(bands):
        raise DataError(
            f"{href} has {len(own)} bands ({', '.join(own)}), --bands names {', '.join(bands)}; give a different name "
            "for each"
        )
    return replace(source, assets=((href, tuple(bands)),))


def _taken(dataset: DatasetReader, href: str) -> str:
    """Acquisition time: the image's own tag, in its zone if it has one, else in UTC; without a tag the file's time."""
    tags = dataset.tags()
    for tag, zone in _TIMES.items():
        text = _EXIF_DATE.sub(r"\1-\2-\3T", tags.get(tag, "").strip())
        try:
            return utc_text(text + tags.get(zone, "").strip())
        except ValueError:
            continue
    return utc_text(datetime.fromtimestamp(int(upath(href).stat().st_mtime), UTC))


def _item(source: Source, label: str | None) -> pystac.Item:
    """The item of one image file."""
    [(href, names)] = source.assets
    properties: dict[str, Any] = {"proj:code": None, "proj:shape": [source.height, source.width]}
    geometry, bbox = None, None
    if source.crs is not None:
        outline = ring_of(source)
        edges = mapping(shapely.segmentize(outline, outline.length / 32))  # straight edges curve in EPSG:4326
        geometry, bbox = lonlat_geometry(edges, crs_of(source.crs), name=href)
        code = source.crs.upper().startswith("EPSG:")
        properties |= {"proj:code": source.crs} if code else {"proj:wkt2": source.crs}
        # Ground control points have no exact affine transform.
        properties |= {} if source.gcps else {"proj:transform": list(source.transform)}
    if label:
        properties[LABEL] = label
    taken = in_utc(source.datetime) if source.datetime else UNKNOWN
    item = pystac.Item(source.item_id, geometry, bbox, taken, properties, stac_extensions=[PROJECTION])
    nodatas = source.nodatas or (source.nodata,) * len(names)
    units = [{"raster:scale": scale, "raster:offset": offset} for scale, offset in source.units] or [{}] * len(names)
    bands = [
        {"name": name, "data_type": source.dtype, **({} if nodata is None else {"nodata": nodata}), **unit}
        for name, nodata, unit in zip(names, nodatas, units, strict=True)
    ]
    _, kind = kind_of(href) or ("", TIFF)
    item.add_asset("image", pystac.Asset(href, media_type=kind, roles=["data"], extra_fields={"bands": bands}))
    return item


# -- chips ------------------------------------------------------------------------------------------------------------


def chips_of(items: Iterable[pystac.Item]) -> list[Chip]:
    """Items of training images as chips, ordered by id; the label is the property `rayseg:label`.

    Raises:
        DataError: an image is not uint8, or cannot be opened.
    """
    chips = []
    for item in sorted(items, key=lambda item: item.id):
        source = source_of(item)
        _expect_bytes(source)
        [(grid, _)] = grids_of([source])
        part = str(item.properties.get(PART, ""))
        chips.append(Chip(item.id, item.properties.get(LABEL), source, footprint(source, grid), part))
    expect_one_unit([chip.source for chip in chips])
    return chips


def read_chip(chip: Chip, size: int) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Read the middle of a chip in RGB.

    Args:
        chip: from `chips_of`.
        size: height and width in px; a smaller chip is padded with zeros, a larger chip is cropped.

    Returns:
        (image_HWC uint8 with three channels, valid_HW bool, False where padded, transparent or nodata). An image with
        a single band is grey.

    Raises:
        DataError: the chip has no red, green and blue, is not uint8, or cannot be read.
    """
    source = chip.source
    _expect_bytes(source)
    visible = [name for name in source.bands if name != "alpha"]
    # Networks expect three channels: a grey band is repeated.
    bands = visible * 3 if len(visible) == 1 else ["red", "green", "blue"]
    [(grid, _)] = grids_of([source])
    image_CHW, valid_HW = read([source], grid, middle(chip.window, size), bands=bands)
    return np.ascontiguousarray(image_CHW.transpose(1, 2, 0)), valid_HW


def read_mask(path: StorePath, table: ClassTable) -> NDArray[np.uint8]:
    """Read a mask of class values, palette indices or colours as class values (height, width), 255 = not labelled.

    Raises:
        DataError: a value or colour is not a class, or the file cannot be read.
    """
    mask = source_of_file(str(path), upath(path).stem)
    return read_classes([mask], pixels_of(mask), Window(0, 0, mask.width, mask.height), table)


def _expect_bytes(source: Source) -> None:
    if source.dtype != "uint8":
        raise DataError(
            f"{source.item_id} has {source.dtype} pixels, chips must be uint8, because objects are segmented in 8-bit "
            "colours; scale the image to 0..255 first"
        )
