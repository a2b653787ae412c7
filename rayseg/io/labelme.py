"""Plots out to annotation tools and back: one JSON per image, as LabelMe and X-AnyLabeling read and write it.

The format knows no holes: a polygon is its outer ring. An outline and the holes in it share a `group_id` here, holes
have the flag `hole`; tools that do not know it show them as polygons of their own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import geopandas
import numpy as np
import shapely
from PIL import Image as Picture
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from rayseg.errors import DataError
from rayseg.geo import slug
from rayseg.vision.crops import square_crop

VERSION = "5.5.0"
NAMES = {"1": "field", "0": "nonfield", "field": "field", "nonfield": "nonfield"}
"""Labels in a JSON -> class; a person sets 1 (cultivated) or 0 (not)."""
_KINDS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


def export(plots: str, images: str, out: str) -> int:
    """Write `<out>/<image>.json` for every image of a run's plots.parquet; return how many.

    Args:
        plots: a run, or its plots.parquet, of images without georeference.
        images: folder of these images.
        out: folder of the JSONs; a copy of nothing else.

    Raises:
        DataError: the plots are of georeferenced imagery, or an image cannot be found or read; nothing is written then.
    """
    path = Path(plots) / "plots.parquet" if Path(plots).is_dir() else Path(plots)
    if not path.is_file():
        raise DataError(f"{plots} has no plots.parquet, expected a finished run of agri; run it first")
    table = geopandas.read_parquet(path)
    if "image" not in table:
        raise DataError(f"{path} is of georeferenced imagery, JSONs are of single images; run agri on a folder of them")
    files, named = _files(Path(images)), table["image"].unique().tolist()
    if missing := [name for name in named if slug(name) not in files]:
        few = ", ".join(missing[:5])
        raise DataError(f"{images} lacks {len(missing)} of the {len(named)} images ({few}); give the folder of all")
    found = {
        str(name): document(files[slug(str(name))], rows.geometry, rows["class"].tolist())
        for name, rows in table.groupby("image")
    }
    Path(out).mkdir(parents=True, exist_ok=True)
    for name, content in found.items():
        (Path(out) / f"{name}.json").write_text(json.dumps(content, indent=1))
    return len(found)


def document(image: Path, polygons: Sequence[shapely.Geometry], classes: Sequence[str | None]) -> dict[str, Any]:
    """The JSON of an image: one shape per ring, labelled 1 for a field, else 0; plots without a class are 1.

    Raises:
        DataError: the image cannot be read.
    """
    height, width = _picture(image).shape[:2]
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
        DataError: a JSON or image cannot be read, two JSONs are of one image, a polygon crosses itself or lies outside
            the image, or a label is unknown; nothing is written then.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files; export them with `rayseg labels export`")
    owners: dict[str, Path] = {}
    files, found = _files(Path(images)), []
    for path in paths:
        content = _read(path)
        image = slug(Path(str(content["imagePath"]).replace("\\", "/")).stem)
        if image in owners:
            raise DataError(f"{owners[image]} and {path} are both of the image {image}; keep one of them")
        if image not in files:
            raise DataError(f"{path} is of the image {content['imagePath']}, which is not in {images}; add it")
        owners[image] = path
        found.append((files[image], image, _plots(content, path)))
    counts = dict.fromkeys(sorted(set(NAMES.values())), 0)
    for file, image, plots in found:
        image_HWC = _picture(file)
        for number, (kind, polygon) in enumerate(plots):
            counts[kind] += _write(image_HWC, polygon, Path(out) / kind / f"{image}-{number:04d}.png", size=size)
    return counts


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; export it anew") from None
    wanted = ("shapes", "imagePath", "imageHeight", "imageWidth")
    if not isinstance(content, dict) or any(key not in content for key in wanted):
        raise DataError(f"{path} is no annotation of LabelMe, expected the keys {', '.join(wanted)}; export it anew")
    return content


def _plots(content: Mapping[str, Any], path: Path) -> list[tuple[str, BaseGeometry]]:
    """(class, polygon) of every plot of one JSON, holes taken out."""
    frame = shapely.box(0, 0, content["imageWidth"], content["imageHeight"])
    outlines: list[tuple[str, Polygon, object]] = []
    holes: dict[object, list[Polygon]] = {}
    for number, one in enumerate(content["shapes"]):
        what = f"{path}: shape {number}"
        polygon = _polygon(one, frame, what)
        if (one.get("flags") or {}).get("hole"):
            holes.setdefault(one.get("group_id"), []).append(polygon)
            continue
        label = str(one.get("label"))
        if label not in NAMES:
            raise DataError(f"{what} is labelled {label!r}, expected one of {', '.join(NAMES)}; correct it")
        outlines.append((NAMES[label], polygon, one.get("group_id")))
    return [(kind, polygon.difference(shapely.union_all(holes.get(group, [])))) for kind, polygon, group in outlines]


def _polygon(one: Mapping[str, Any], frame: Polygon, what: str) -> Polygon:
    points = one.get("points", [])
    if one.get("shape_type", "polygon") != "polygon" or len(points) < 3:
        kind = one.get("shape_type", "polygon")
        raise DataError(f"{what} is a {kind} of {len(points)} points, expected a polygon of 3 or more; redraw it")
    polygon = Polygon(points)
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
            return np.asarray(opened.convert("RGB"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}; copy the image anew") from None


def _write(image_HWC: np.ndarray, polygon: BaseGeometry, path: Path, *, size: int) -> bool:
    """Write what the polygon covers; return whether it covers anything, as one that its holes take up does not."""
    mask_HW = np.zeros(image_HWC.shape[:2], np.uint8)
    for part in [] if polygon.is_empty else getattr(polygon, "geoms", [polygon]):
        rings = [np.rint(np.asarray(ring.coords) - 0.5).astype(np.int32) for ring in (part.exterior, *part.interiors)]
        cv2.fillPoly(mask_HW, rings, 1)
    if not mask_HW.any():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    Picture.fromarray(square_crop(image_HWC, mask_HW > 0, size=size)).save(path)
    return True
