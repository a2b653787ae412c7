"""Masks from drawn shapes: JSONs of LabelMe or X-AnyLabeling, or a file in COCO's format, become class masks.

<out>/<image>.tif   classes of the pixels of an image, as training and evaluation read them
"""

import logging
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import BaseModel
from rasterio.features import rasterize
from shapely import affinity
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from rayseg.errors import DataError, listed
from rayseg.geo.grid import NODATA, Grid, Window, slug
from rayseg.io import cog
from rayseg.io.labelme import image_files, read_document, read_json, scale_to_image
from rayseg.io.sources import gdal, open_file
from rayseg.store import upath
from rayseg.vision.color import ClassTable, label_table

_log = logging.getLogger(__name__)
BACKGROUND = "background"
"""Class of pixels under no shape, where a table has it; else they are not labelled."""


class Runs(NamedTuple):
    """A mask as lengths of runs down the columns, of pixels outside and inside in turn; size is (height, width)."""

    size: tuple[int, int]
    counts: tuple[int, ...]


class Drawn(NamedTuple):
    """A shape on an image: where it stands, its class, and a polygon in pixels (y downward) or a mask."""

    where: str
    name: str
    shape: BaseGeometry | Runs


class DrawnImage(NamedTuple):
    """An image's name, its height and width as `path` states them, and the shapes on it."""

    name: str
    path: Path
    stated: tuple[int | None, int | None]
    shapes: list[Drawn]


class _CocoImage(BaseModel):
    id: int | str
    file_name: str
    height: int | None = None
    width: int | None = None


class _CocoCategory(BaseModel):
    id: int | str
    name: str


class _CocoAnnotation(BaseModel):
    id: int | str | None = None
    image_id: int | str
    category_id: int | str
    segmentation: Any = None


class _Coco(BaseModel):
    """The keys of a file that are read; others are ignored."""

    images: list[_CocoImage]
    annotations: list[_CocoAnnotation]
    categories: list[_CocoCategory]


def write_masks(drawn: str, images: str, out: str, *, table: ClassTable | None = None) -> dict[str, int]:
    """Draw the shapes of every image into a mask, later ones over earlier ones; return the pixels of each class.

    Args:
        drawn: folder of JSONs of LabelMe or X-AnyLabeling, or a JSON file in COCO's format.
        images: folder of the images.
        out: folder of the masks.
        table: the classes; by default background, and the labels in alphabetical order.

    Raises:
        DataError: a file cannot be read, a shape has no known class, or an image is missing; nothing is written then.
    """
    listing = list(_of_coco(Path(drawn)) if Path(drawn).is_file() else _of_labelme(Path(drawn)))
    names, files = [entry.name for entry in listing], image_files(Path(images))
    if twice := [name for name, times in Counter(names).items() if times > 1]:
        raise DataError(f"{drawn} has several JSONs or images called {listed(twice)}; rename or merge them")
    if lost := sorted(set(names) - set(files)):
        raise DataError(f"{drawn} has shapes of {listed(lost)}, which {images} lacks; give the folder of these images")
    labels = sorted({shape.name for entry in listing for shape in entry.shapes} - {BACKGROUND})
    known = table or _table_of(labels)
    if unknown := sorted(set(labels) - set(known.names)):
        raise DataError(
            f"{drawn} has the labels {listed(unknown)}, the classes are {listed(known.names)}; correct the labels or "
            "--classes"
        )
    if own := [
        str(files[name]) for name in names if (Path(out) / f"{files[name].stem}.tif").resolve() == files[name].resolve()
    ]:
        raise DataError(f"a mask in {out} would replace the image {own[0]}; give another --out")
    # All are checked before the first is drawn: an image that does not fit leaves no half-written folder.
    fitted = [_fitted(entry, files[entry.name]) for entry in listing]
    pixels: Counter[str] = Counter(dict.fromkeys(known.names, 0))
    for name, ((height, width), shapes) in zip(names, fitted, strict=True):
        classes_HW = _mask(shapes, (height, width), known)
        grid, window = Grid(None, (1.0, 1.0), (0.0, 0.0), name), Window(0, 0, width, height)
        cog.write_classes(upath(out) / f"{files[name].stem}.tif", classes_HW, grid, window, known)
        pixels.update({text: int((classes_HW == value).sum()) for value, text, _ in known.classes})
    return dict(pixels)


def _table_of(labels: Sequence[str]) -> ClassTable:
    colors = label_table(len(labels)).colors
    rows = [(number, name, colors[number - 1]) for number, name in enumerate(labels, 1)]
    return ClassTable(((0, BACKGROUND, (0, 0, 0)), *rows))


def _fitted(entry: DrawnImage, image: Path) -> tuple[tuple[int, int], list[Drawn]]:
    """Size (height, width) of the image, and the shapes that cover a part of it, in its pixels."""
    with gdal(str(image)), open_file(str(image)) as dataset:
        height, width = dataset.shape
    scale = scale_to_image(entry.stated, (height, width), entry.path, image)
    # Tools let people draw beyond the image; a shape that is wholly outside is a mistake worth a word.
    frame, shapes = shapely.box(0, 0, width, height), []
    for where, name, shape in entry.shapes:
        fitted: BaseGeometry | Runs = shape
        if isinstance(shape, Runs):
            if shape.size != (height, width):
                raise DataError(f"{where}: its mask has {shape.size} px, {image} {(height, width)}; export it again")
            covers = sum(shape.counts[1::2]) > 0
        else:
            scaled = affinity.scale(shape, *scale, origin=(0, 0))
            fitted, covers = scaled, scaled.intersection(frame).area > 0
        if covers:
            shapes.append(Drawn(where, name, fitted))
        else:
            _log.warning(
                "%s (%s) covers nothing of %s, %d x %d px: it is left out; correct or delete it",
                where,
                name,
                image,
                width,
                height,
            )
    return (height, width), shapes


def _mask(shapes: Sequence[Drawn], size: tuple[int, int], table: ClassTable) -> NDArray[np.uint8]:
    values = dict(zip(table.names, table.values, strict=True))
    classes_HW = np.full(size, values.get(BACKGROUND, NODATA), np.uint8)
    for _, name, shape in shapes:
        if isinstance(shape, Runs):
            inside_N = np.repeat(np.arange(len(shape.counts)) % 2 == 1, shape.counts)
            classes_HW[inside_N.reshape(size[::-1]).T] = values[name]
        else:
            # A pixel belongs to the shape that its centre lies in.
            classes_HW[rasterize([shape], size, dtype=np.uint8) == 1] = values[name]
    return classes_HW


def _of_labelme(folder: Path) -> Iterator[DrawnImage]:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files; give LabelMe's JSONs, or one file in COCO's format")
    for path in paths:
        content = read_document(path)
        outlines = [
            (f"{path}: shape {number}", shape)
            for number, shape in enumerate(content.shapes)
            if shape.shape_type == "polygon" and len(shape.points) > 2
        ]
        if others := Counter(shape.shape_type for shape in content.shapes) - Counter(["polygon"] * len(outlines)):
            raise DataError(f"{path} has shapes of type {listed(others)}, expected polygons; redraw or delete them")
        # LabelMe has no rings with holes: a flag marks them, a group id joins them to their outline.
        holes: dict[object, list[BaseGeometry]] = defaultdict(list)
        for _, shape in outlines:
            if (shape.flags or {}).get("hole"):
                holes[shape.group_id].append(shapely.make_valid(Polygon(shape.points)))
        shapes = [
            Drawn(
                where,
                str(shape.label),
                shapely.make_valid(Polygon(shape.points)).difference(shapely.union_all(holes[shape.group_id])),
            )
            for where, shape in outlines
            if not (shape.flags or {}).get("hole")
        ]
        name = slug(Path(content.imagePath.replace("\\", "/")).stem)
        yield DrawnImage(name, path, (content.imageHeight, content.imageWidth), shapes)


def _of_coco(path: Path) -> Iterator[DrawnImage]:
    content = read_json(path, _Coco, "COCO file")
    names = {row.id: row.name for row in content.categories}
    shapes: dict[int | str, list[Drawn]] = {row.id: [] for row in content.images}
    for number, row in enumerate(content.annotations):
        where = f"{path}: annotation {number if row.id is None else row.id}"
        for what, key, known in (("image", row.image_id, shapes), ("category", row.category_id, names)):
            if key not in known:
                raise DataError(f"{where} has the unknown {what} id {key}, expected one of {listed(known)}; correct it")
        shapes[row.image_id].append(Drawn(where, names[row.category_id], _outline(row.segmentation, where)))
    for image in content.images:
        yield DrawnImage(slug(Path(image.file_name).stem), path, (image.height, image.width), shapes[image.id])


def _outline(segmentation: Any, where: str) -> BaseGeometry | Runs:  # noqa: ANN401 - JSON
    """Polygons as one shape, or a run-length code."""
    expected = "expected polygons or an uncompressed RLE; export it again"
    if not segmentation:
        raise DataError(f"{where} has no segmentation, a box alone is no outline; {expected}")
    if isinstance(segmentation, dict) and isinstance(segmentation.get("counts"), str):
        raise DataError(f"{where} has a compressed RLE, {expected}")
    try:
        if isinstance(segmentation, dict):
            height, width = (int(side) for side in segmentation["size"])
            counts = tuple(int(count) for count in segmentation["counts"])
            # Counts that do not fill the image would shift every row after the first.
            if min(counts) < 0 or sum(counts) != height * width:
                raise DataError(f"{where} has an RLE of {sum(counts)} px, its size is {height} x {width}; {expected}")
            return Runs((height, width), counts)
        rings = [np.reshape(np.asarray(ring, float), (-1, 2)) for ring in segmentation if len(ring) >= 6]
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{where} has a segmentation that is neither polygons nor an RLE; {expected}") from None
    return shapely.union_all([shapely.make_valid(Polygon(ring)) for ring in rings])
