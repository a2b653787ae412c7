"""Masks from drawn shapes: JSONs of LabelMe or X-AnyLabeling, or a file in COCO's format, become class masks.

<out>/<image>.tif   classes of the pixels of an image, as training and evaluation read them
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import shapely
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from rasterio.features import rasterize
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from rayseg.errors import DataError, listed
from rayseg.geo.grid import NODATA, Grid, Window, slug
from rayseg.io import cog
from rayseg.io.labelme import image_files, read_document
from rayseg.io.sources import gdal, open_file
from rayseg.store import upath
from rayseg.vision.color import ClassTable, label_table

BACKGROUND = "background"
"""Class of pixels under no shape, where a table has it; else they are not labelled."""


class Drawn(NamedTuple):
    """A shape on an image: its class, and a polygon in pixels (y downward) or a mask (height, width) bool."""

    name: str
    shape: BaseGeometry | NDArray[np.bool_]


class _Coco(BaseModel):
    """The keys of a file that are read; others are ignored."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]


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
    shapes, files = dict(listing), image_files(Path(images))
    if twice := [name for name, times in Counter(name for name, _ in listing).items() if times > 1]:
        raise DataError(f"{drawn} has several JSONs or images called {listed(twice)}; rename or merge them")
    if lost := sorted(set(shapes) - set(files)):
        raise DataError(f"{drawn} has shapes of {listed(lost)}, which {images} lacks; give the folder of these images")
    labels = sorted({shape.name for members in shapes.values() for shape in members} - {BACKGROUND})
    known = table or _table_of(labels)
    if unknown := sorted(set(labels) - set(known.names)):
        raise DataError(
            f"{drawn} has the labels {listed(unknown)}, the classes are {listed(known.names)}; correct the labels or "
            "--classes"
        )
    if own := [
        str(files[name])
        for name in shapes
        if (Path(out) / f"{files[name].stem}.tif").resolve() == files[name].resolve()
    ]:
        raise DataError(f"a mask in {out} would replace the image {own[0]}; give another --out")
    masks = {name: _mask(members, files[name], known) for name, members in shapes.items()}
    pixels: Counter[str] = Counter(dict.fromkeys(known.names, 0))
    for name, classes_HW in masks.items():
        height, width = classes_HW.shape
        grid, window = Grid(None, (1.0, 1.0), (0.0, 0.0), name), Window(0, 0, width, height)
        cog.write_classes(upath(out) / f"{files[name].stem}.tif", classes_HW, grid, window, known)
        pixels.update({text: int((classes_HW == value).sum()) for value, text, _ in known.classes})
    return dict(pixels)


def _table_of(labels: Sequence[str]) -> ClassTable:
    colors = label_table(len(labels)).colors
    rows = [(number, name, colors[number - 1]) for number, name in enumerate(labels, 1)]
    return ClassTable(((0, BACKGROUND, (0, 0, 0)), *rows))


def _mask(shapes: Sequence[Drawn], image: Path, table: ClassTable) -> NDArray[np.uint8]:
    with gdal(str(image)), open_file(str(image)) as dataset:
        height, width = dataset.shape
    values = dict(zip(table.names, table.values, strict=True))
    classes_HW = np.full((height, width), values.get(BACKGROUND, NODATA), np.uint8)
    for name, shape in shapes:
        if isinstance(shape, np.ndarray):
            if shape.shape != (height, width):
                raise DataError(f"a mask of {name} has {shape.shape} px, {image} {(height, width)}; export it again")
            classes_HW[shape] = values[name]
        elif not shape.is_empty:
            # A pixel belongs to the shape that its centre lies in.
            classes_HW[rasterize([shape], (height, width), dtype=np.uint8) == 1] = values[name]
    return classes_HW


def _of_labelme(folder: Path) -> Iterator[tuple[str, list[Drawn]]]:
    paths = sorted(folder.glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files; give LabelMe's JSONs, or one file in COCO's format")
    for path in paths:
        content = read_document(path)
        outlines = [shape for shape in content.shapes if shape.shape_type == "polygon" and len(shape.points) > 2]
        if others := Counter(shape.shape_type for shape in content.shapes) - Counter(["polygon"] * len(outlines)):
            raise DataError(f"{path} has shapes of type {listed(others)}, expected polygons; redraw or delete them")
        holes: dict[object, list[BaseGeometry]] = defaultdict(list)
        for shape in outlines:
            if (shape.flags or {}).get("hole"):
                holes[shape.group_id].append(shapely.make_valid(Polygon(shape.points)))
        yield (
            slug(Path(content.imagePath.replace("\\", "/")).stem),
            [
                Drawn(
                    str(shape.label),
                    shapely.make_valid(Polygon(shape.points)).difference(shapely.union_all(holes[shape.group_id])),
                )
                for shape in outlines
                if not (shape.flags or {}).get("hole")
            ],
        )


def _of_coco(path: Path) -> Iterator[tuple[str, list[Drawn]]]:
    try:
        content = _Coco.model_validate(json.loads(path.read_bytes()))
        names = {row["id"]: str(row["name"]) for row in content.categories}
        images = {row["id"]: slug(Path(row["file_name"]).stem) for row in content.images}
        shapes: dict[Any, list[Drawn]] = {image: [] for image in images}
        for row in content.annotations:
            shapes[row["image_id"]].append(Drawn(names[row["category_id"]], _outline(row["segmentation"])))
    except (ValidationError, ValueError, KeyError, TypeError, OSError) as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise DataError(
            f"{path} cannot be read as COCO ({reason}), expected images, categories and annotations with polygons or "
            "uncompressed RLE; export it again"
        ) from None
    yield from ((images[image], members) for image, members in shapes.items())


def _outline(segmentation: Any) -> BaseGeometry | NDArray[np.bool_]:  # noqa: ANN401 - JSON
    """Polygons as one shape, or a run-length code, which goes down the columns, as a mask."""
    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], str):
            raise ValueError("a mask is a compressed RLE")  # noqa: TRY004 - reported with the file's name
        height, width = segmentation["size"]
        counts = np.asarray(segmentation["counts"])
        return np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(width, height).T
    rings = [np.reshape(ring, (-1, 2)) for ring in segmentation if len(ring) >= 6]
    return shapely.union_all([shapely.make_valid(Polygon(ring)) for ring in rings])
