"""Plots out to annotation tools and back: one JSON per image, as LabelMe and X-AnyLabeling read and write it.

The format knows no holes: a polygon is its outer ring. An outline and the holes in it share a `group_id` here, holes
have the flag `hole`; tools that do not know it show them as polygons of their own.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import geopandas
import numpy as np
import shapely
from PIL import Image as Picture
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from rayseg.errors import DataError
from rayseg.geo.grid import Window, slug
from rayseg.io.plot_joins import mask_of
from rayseg.io.sources import gdal, open_file
from rayseg.vision.crops import square_crop

VERSION = "5.5.0"
NAMES = {"1": "field", "0": "nonfield", "field": "field", "nonfield": "nonfield"}
"""Labels in a JSON -> class; a person sets 1 (cultivated) or 0 (not)."""
_KINDS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class _Shape(BaseModel):
    label: str | int | None = None
    points: list[tuple[FiniteFloat, FiniteFloat]] = []
    group_id: str | int | None = None
    shape_type: str = "polygon"
    flags: dict[str, Any] | None = None


class _Document(BaseModel):
    """What is read of a JSON; it holds more."""

    shapes: list[_Shape]
    imagePath: Annotated[str, Field(min_length=1)]
    imageHeight: int | None = None
    imageWidth: int | None = None


@dataclass(frozen=True)
class _Labelled:
    """An image and its plots: (class, polygon) each."""

    name: str
    file: Path
    plots: list[tuple[str, BaseGeometry]]


def export(plots: str, images: str, out: str) -> int:
    """Write `<out>/<image>.json` for every image of a run's plots.parquet; return how many.

    Args:
        plots: a run, or its plots.parquet.
        images: folder of the images it was run on; georeferenced ones get the plots on their ground, cut at their edge.
        out: folder of the JSONs; a copy of nothing else.

    Raises:
        DataError: the image of a plot cannot be found or read, or a JSON is there already that is another, for someone
            may have labelled it; nothing is written then.
    """
    path = Path(plots) / "plots.parquet" if Path(plots).is_dir() else Path(plots)
    if not path.is_file():
        raise DataError(f"{plots} has no plots.parquet, expected a finished run of agri; run it first")
    table = geopandas.read_parquet(path)
    files = _files(Path(images))
    by_image = _by_name(table, files, images) if "image" in table else _by_ground(table, files, images)
    found = {
        Path(out) / f"{name}.json": json.dumps(
            document(files[slug(name)], rows.geometry, rows["class"].tolist()), indent=1
        )
        for name, rows in by_image.items()
    }
    if there := [path for path, text in found.items() if path.exists() and path.read_text() != text]:
        raise DataError(f"{there[0]} is there already and may hold labels; give another --out")
    Path(out).mkdir(parents=True, exist_ok=True)
    for path, text in found.items():
        path.write_text(text)
    return len(found)


def _by_name(table: geopandas.GeoDataFrame, files: dict[str, Path], images: str) -> dict[str, geopandas.GeoDataFrame]:
    """Image -> its plots, as the table names it."""
    found = {str(name): rows for name, rows in table.groupby("image")}
    if missing := [name for name in found if slug(name) not in files]:
        few = ", ".join(missing[:5])
        raise DataError(f"{images} lacks {len(missing)} of the {len(found)} images ({few}); give the folder of all")
    return found


def _by_ground(table: geopandas.GeoDataFrame, files: dict[str, Path], images: str) -> dict[str, geopandas.GeoDataFrame]:
    """Image -> the plots on its ground; a plot on the ground of several is in each."""
    found = {name: rows for name, file in files.items() if len(rows := _on_image(table, file))}
    if missing := set(table.index).difference(*(rows.index for rows in found.values())):
        count = f"{len(missing)} of the {len(table)} plots"
        raise DataError(f"{count} are on the ground of no image in {images}; give the folder of all images")
    return found


def _on_image(table: geopandas.GeoDataFrame, file: Path) -> geopandas.GeoDataFrame:
    """What of georeferenced plots lies in an image, in its pixels to a thousandth; of a plot at least one pixel."""
    with gdal(str(file)), open_file(str(file)) as image:
        crs, to_pixels, frame = image.crs, ~image.transform, shapely.box(0, 0, image.width, image.height)
    if crs is None:
        return table.iloc[:0]
    pixels = table.to_crs(crs.to_wkt()).geometry.affine_transform(to_pixels.to_shapely()).set_precision(1e-3)
    placed = table.set_geometry(pixels.set_crs(None, allow_override=True))
    cut = geopandas.clip(placed, frame, keep_geom_type=True).sort_index()
    return cut[cut.area >= 1]


def document(image: Path, polygons: Sequence[BaseGeometry], classes: Sequence[str | None]) -> dict[str, Any]:
    """The JSON of an image: one shape per ring, labelled 1 for a field, else 0; plots without a class are 1.

    Raises:
        DataError: the image cannot be read, or is smaller than its plots.
    """
    height, width = _picture(image).shape[:2]
    if (shapely.total_bounds(polygons)[2:] > (width, height)).any():  # of no plots it is nan
        raise DataError(
            f"a plot reaches beyond {image}, {width} x {height} px; give the images it was found in, of a run with "
            "enlarge those in RUN/enlarged"
        )
    shapes = [
        _shape(ring, "0" if kind == "nonfield" else "1", group, hole=hole)
        for group, (geometry, kind) in enumerate(zip(polygons, classes, strict=True))
        for part in getattr(geometry, "geoms", [geometry])
        for hole, ring in [(False, part.exterior), *((True, inner) for inner in part.interiors)]
    ]
    return {
        "version": VERSION,
        "flags": {},
        "shapes": shapes,
        "imagePath": image.name,
        "imageData": None,
        "imageHeight": height,
        "imageWidth": width,
    }


def _shape(ring: shapely.LinearRing, label: str, group: int, *, hole: bool) -> dict[str, Any]:
    points = [[float(x), float(y)] for x, y in ring.coords[:-1]]
    flags = {"hole": True} if hole else {}
    return {"label": label, "points": points, "group_id": group, "shape_type": "polygon", "flags": flags}


def load(folder: str, images: str, out: str, *, size: int = 224) -> dict[str, int]:
    """Cut labelled plots out of their images, as `<out>/<class>/<image>-<number>.png`; return plots per class.

    Args:
        folder: of JSONs.
        images: folder of the images they name.
        out: folder of class folders, as `ingest folder --labels folder` reads it.
        size: side of a crop in px.

    Raises:
        DataError: a JSON or image cannot be read, two JSONs are of one image, an image is not of the size its JSON
            says, a polygon crosses itself or lies outside the image, a label is unknown, or there are crops of an image
            already; nothing is written then.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files; export them with `rayseg labels export`")
    owners: dict[str, Path] = {}
    files, found = _files(Path(images)), []
    for path in paths:
        content = _read(path)
        image = slug(Path(content.imagePath.replace("\\", "/")).stem)
        if image in owners:
            raise DataError(f"{owners[image]} and {path} are both of the image {image}; keep one of them")
        if image not in files:
            raise DataError(f"{path} is of the image {content.imagePath}, which is not in {images}; add it")
        owners[image] = path
        found.append(_Labelled(image, files[image], _plots(content, path, files[image])))
    kinds = sorted(set(NAMES.values()))
    there = [old for one in found for kind in kinds for old in (Path(out) / kind).glob(f"{one.name}-[0-9]*.png")]
    if there:
        raise DataError(f"{there[0]} is there already, maybe of other labels; remove it or give another --out")
    counts = dict.fromkeys(kinds, 0)
    for one in found:
        image_HWC = _picture(one.file)
        for number, (kind, polygon) in enumerate(one.plots):
            counts[kind] += _write(image_HWC, polygon, Path(out) / kind / f"{one.name}-{number:04d}.png", size=size)
    return counts


def _read(path: Path) -> _Document:
    try:
        return _Document.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"]) or "its content"
        raise DataError(
            f"{path} is no annotation of LabelMe: {place}, {first['msg'][0].lower()}{first['msg'][1:]}; mend it or "
            "export it anew"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not JSON that can be read: {error}; export it anew") from None


def _plots(content: _Document, path: Path, image: Path) -> list[tuple[str, BaseGeometry]]:
    """(class, polygon) of every plot of one JSON, holes taken out."""
    height, width = _picture(image).shape[:2]  # decoded here too, so that a damaged one is known before any writing
    if (content.imageHeight or height, content.imageWidth or width) != (height, width):
        raise DataError(
            f"{path} is of an image of {content.imageWidth} x {content.imageHeight} px, {image} has {width} x "
            f"{height}; give the image it was drawn on"
        )
    frame = shapely.box(0, 0, width, height)
    outlines: list[tuple[str, Polygon, object]] = []
    holes: dict[object, list[Polygon]] = {}
    for number, one in enumerate(content.shapes):
        what = f"{path}: shape {number}"
        polygon = _polygon(one, frame, what)
        if (one.flags or {}).get("hole"):
            holes.setdefault(one.group_id, []).append(polygon)
            continue
        if str(one.label) not in NAMES:
            raise DataError(f"{what} is labelled {str(one.label)!r}, expected one of {', '.join(NAMES)}; correct it")
        outlines.append((NAMES[str(one.label)], polygon, one.group_id))
    return [(kind, polygon.difference(shapely.union_all(holes.get(group, [])))) for kind, polygon, group in outlines]


def _polygon(one: _Shape, frame: Polygon, what: str) -> Polygon:
    if one.shape_type != "polygon" or len(one.points) < 3:
        raise DataError(
            f"{what} is a {one.shape_type} of {len(one.points)} points, expected a polygon of 3 or more; redraw it"
        )
    polygon = Polygon(one.points)
    if not polygon.is_valid:
        raise DataError(f"{what} is no simple polygon ({shapely.is_valid_reason(polygon)}); redraw it")
    if not frame.buffer(0.5).covers(polygon):
        box = ", ".join(f"{value:g}" for value in polygon.bounds)
        raise DataError(f"{what} reaches {box}, beyond the image of {frame.bounds[2]:g} x {frame.bounds[3]:g}; move it")
    return polygon


def _files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder of images; give the one the plots were found in")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _KINDS and not path.name.startswith("."):
            name = slug(path.stem)
            if name in found:
                raise DataError(f"{found[name]} and {path} are both called {name}; rename one of them")
            found[name] = path
    return found


def _picture(path: Path) -> np.ndarray:
    try:
        with Picture.open(path) as opened:
            if opened.mode[0] in "IF":  # 16 bits or more, which Pillow cuts off at 255
                raise DataError(f"{path} has pixels of kind {opened.mode}, crops are of 8 bits; give 8-bit images")
            return np.asarray(opened.convert("RGB"))
    except (OSError, SyntaxError, Picture.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the image anew") from None


def _write(image_HWC: np.ndarray, polygon: BaseGeometry, path: Path, *, size: int) -> bool:
    """Write what the polygon covers; return whether it covers anything, as one that its holes take up does not."""
    if polygon.is_empty:
        return False
    left, top, right, bottom = polygon.bounds
    col, row = math.floor(left), math.floor(top)
    height, width = image_HWC.shape[:2]
    window = Window(col, row, math.ceil(right) - col, math.ceil(bottom) - row).intersect(Window(0, 0, width, height))
    mask_HW = mask_of(polygon, window)
    if not mask_HW.any():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_HWC = image_HWC[window.slices(Window(0, 0, width, height))]
    Picture.fromarray(square_crop(cut_HWC, mask_HW, size=size)).save(path)
    return True
