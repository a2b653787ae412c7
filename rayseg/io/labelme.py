"""Export plots to annotation tools and import the edited labels: one JSON per image, in the format of LabelMe.

X-AnyLabeling reads and writes it too. The format has no holes: a polygon is its outer ring. Here an outline and its
holes share a `group_id`, and holes have the flag `hole`; other tools show them as separate polygons.
"""

import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import geopandas
import numpy as np
import shapely
from PIL import Image as Picture
from PIL import ImageOps
from pydantic import BaseModel, Field, FiniteFloat, ValidationError
from rasterio.transform import array_bounds
from shapely.geometry import Polygon
from shapely.geometry.base import BaseGeometry

from rayseg.errors import DataError, listed
from rayseg.geo.grid import Window, slug
from rayseg.geo.lonlat import polygons_in, within
from rayseg.geo.vector_files import read_frame
from rayseg.io.maps import planned_tiles
from rayseg.io.plot_joins import mask_of
from rayseg.io.sources import gdal, open_file
from rayseg.store import is_local, upath
from rayseg.vision.crops import square_crop

_log = logging.getLogger(__name__)
VERSION = "5.5.0"
NAMES = {"1": "field", "0": "nonfield", "field": "field", "nonfield": "nonfield"}
"""Label in a JSON -> class; annotators set 1 (cultivated) or 0 (not)."""
_Model = TypeVar("_Model", bound=BaseModel)
_KINDS = (".jpg", ".jpeg", ".png", ".tif", ".tiff")


class _Shape(BaseModel):
    label: str | int | None = None
    points: list[tuple[FiniteFloat, FiniteFloat]] = []
    group_id: str | int | None = None
    shape_type: str = "polygon"
    flags: dict[str, Any] | None = None


class Document(BaseModel):
    """The keys of a JSON that are read; others are ignored."""

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
        images: folder of the images of the run, or the run; a georeferenced image gets the plots inside it, cut at its
            edge.
        out: folder of the JSONs.

    Raises:
        DataError: the image of a plot cannot be found or read, or a JSON of other content exists, which may hold
            labels; nothing is written then.
    """
    path = Path(plots) / "plots.parquet" if Path(plots).is_dir() else Path(plots)
    if not path.is_file():
        raise DataError(f"{plots} has no plots.parquet, expected a finished run of agri; run it first")
    table = read_frame(path)
    files = image_files(Path(images))
    # 1. the plots of every image: by its name, or all that it covers; a plot in several images is in each
    if "image" in table:
        plots_of = {str(name): rows for name, rows in table.groupby("image")}
        if missing := [name for name in plots_of if slug(name) not in files]:
            raise DataError(
                f"{images} lacks {len(missing)} of the {len(plots_of)} images ({listed(missing)}); give the "
                "folder of all images"
            )
    else:
        plots_of = {name: rows for name, file in files.items() if len(rows := _on_image(table, file))}
        if outside := set(table.index).difference(*(rows.index for rows in plots_of.values())):
            raise DataError(
                f"{len(outside)} of the {len(table)} plots are outside all images in {images}; give the folder of all "
                "images"
            )
    # 2. their JSONs, written when all are known to be new or unchanged
    texts = {
        Path(out) / f"{name}.json": json.dumps(
            document(files[slug(name)], rows.geometry, rows["class"].tolist()), indent=1
        )
        for name, rows in plots_of.items()
    }
    if existing := [path for path, text in texts.items() if path.exists() and path.read_text() != text]:
        raise DataError(f"{existing[0]} exists and may hold labels; give another --out")
    Path(out).mkdir(parents=True, exist_ok=True)
    for path, text in texts.items():
        path.write_text(text)
    return len(texts)


def _on_image(table: geopandas.GeoDataFrame, file: Path) -> geopandas.GeoDataFrame:
    """The parts of georeferenced plots inside an image, of at least one pixel, in pixels rounded to a thousandth."""
    with gdal(str(file)), open_file(str(file)) as image:
        crs, to_pixels, frame = image.crs, ~image.transform, shapely.box(0, 0, image.width, image.height)
        bounds = array_bounds(image.height, image.width, image.transform)
    if crs is None:
        return table.iloc[:0]
    placed_in = table.to_crs(crs.to_wkt()).geometry
    if crs.is_geographic:  # an image may count on beyond 180 degrees, plots are cut there
        west, south, east, north = bounds
        wide = (west - 1, south - 1, east + 1, north + 1)
        placed_in = geopandas.GeoSeries([within(plot, wide) for plot in placed_in], index=table.index)
    # The inverse of the affine transform maps coordinates of the CRS to pixels.
    pixels = placed_in.affine_transform(to_pixels.to_shapely()).set_precision(1e-3)
    placed = table.set_geometry(pixels.set_crs(None, allow_override=True))
    cut = geopandas.clip(placed, frame, keep_geom_type=True).sort_index()
    return cut[cut.area >= 1]


def document(image: Path, polygons: Sequence[BaseGeometry], classes: Sequence[str | None]) -> dict[str, Any]:
    """The JSON of an image: one shape per ring, labelled 1 for a field and 0 otherwise; plots without a class get 1.

    Raises:
        DataError: the image cannot be read, or is smaller than its plots.
    """
    height, width = _picture(image).shape[:2]
    if (shapely.total_bounds(polygons)[2:] > (width, height)).any():  # without plots the bounds are NaN
        raise DataError(
            f"a plot extends beyond {image} of {width} x {height} px; give the images of the run; with enlarge, those "
            "in RUN/enlarged"
        )
    # LabelMe has no polygons with holes or parts: each ring is a shape, and a group is one plot.
    shapes = [
        {
            "label": "0" if kind == "nonfield" else "1",
            "points": [[float(x), float(y)] for x, y in ring.coords[:-1]],
            "group_id": group,
            "shape_type": "polygon",
            "flags": {"hole": True} if hole else {},
        }
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


def load(folder: str, images: str, out: str, *, size: int = 224) -> dict[str, int]:
    """Crop labelled plots from their images to `<out>/<class>/<image>-<number>.png`; return plots per class.

    A ring that crosses itself becomes its parts; a shape without an area is left out, with a warning. Points of a JSON
    whose image was resized, as LiSegAgr does to 1000 x 1000 px, are scaled to the pixels of the image.

    Args:
        folder: folder of JSONs.
        images: folder of the images they name, or the run that mapped them.
        out: folder of class folders, the input of `ingest folder --labels folder`.
        size: side of a crop in px.

    Raises:
        DataError: a JSON or image cannot be read, two JSONs belong to one image, an image has another shape than its
            JSON says, a polygon lies outside the image, a label is unknown, or crops of an image exist; nothing is
            written then.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files; export them with `rayseg labels export`")
    # 1. the labelled plots of every image
    owners: dict[str, Path] = {}
    files, labelled = image_files(Path(images)), []
    for path in paths:
        content = read_document(path)
        image = slug(Path(content.imagePath.replace("\\", "/")).stem)
        if image in owners:
            raise DataError(f"{owners[image]} and {path} both belong to the image {image}; keep one of them")
        if image not in files:
            raise DataError(f"{path} belongs to the image {content.imagePath}, which is not in {images}; add it")
        owners[image] = path
        labelled.append(_Labelled(image, files[image], _plots(content, path, files[image])))
    # 2. nothing is overwritten
    kinds = sorted(set(NAMES.values()))
    # Any crop counts, also of other classes: a plot may have changed its class.
    existing = [
        path for entry in labelled for kind in kinds for path in (Path(out) / kind).glob(f"{entry.name}-[0-9]*.png")
    ]
    if existing:
        raise DataError(f"{existing[0]} already exists and may hold other labels; remove it or give another --out")
    # 3. one crop per plot
    counts = dict.fromkeys(kinds, 0)
    for entry in labelled:
        image_HWC = _picture(entry.file)
        for number, (kind, polygon) in enumerate(entry.plots):
            counts[kind] += _write(image_HWC, polygon, Path(out) / kind / f"{entry.name}-{number:04d}.png", size=size)
    return counts


def polygons_of(folder: str) -> geopandas.GeoDataFrame:
    """The shapes labelled as fields in a folder of JSONs, in pixels of the JSON's image, with the column `image`.

    Holes are cut out; a ring that crosses itself becomes its parts.

    Raises:
        DataError: there are no JSONs, or one cannot be read.
    """
    paths = sorted(Path(folder).glob("*.json"))
    if not paths:
        raise DataError(f"{folder} holds no .json files, expected one of LabelMe for each image; export them there")
    names, polygons = [], []
    for path in paths:
        content = read_document(path)
        outlines = [shape for shape in content.shapes if shape.shape_type == "polygon" and len(shape.points) > 2]
        holes: dict[object, list[BaseGeometry]] = {}
        for shape in outlines:
            # Holes come first, as a hole may precede its outline.
            if (shape.flags or {}).get("hole"):
                holes.setdefault(shape.group_id, []).append(shapely.make_valid(Polygon(shape.points)))
        for shape in outlines:
            if not (shape.flags or {}).get("hole") and NAMES.get(str(shape.label)) == "field":
                whole = shapely.make_valid(Polygon(shape.points))
                polygons.append(whole.difference(shapely.union_all(holes.get(shape.group_id, []))))
                names.append(slug(Path(content.imagePath.replace("\\", "/")).stem))
    return geopandas.GeoDataFrame({"image": names}, geometry=polygons)


def read_document(path: Path) -> Document:
    """The shapes of a JSON, and the image that they are drawn on.

    Raises:
        DataError: the file cannot be read, or is not LabelMe's.
    """
    return read_json(path, Document, "LabelMe annotation")


def read_json(path: Path, model: type[_Model], what: str) -> _Model:
    """The content of a JSON file as `model`; `what` names the format.

    Raises:
        DataError: the file cannot be read, or does not have the keys of `model`.
    """
    try:
        return model.model_validate(json.loads(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = " ".join(str(part) for part in first["loc"]) or "its content"
        raise DataError(
            f"{path} is not a {what}: {place}, {first['msg'][0].lower()}{first['msg'][1:]}; correct it or "
            "export it again"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as JSON: {error}; export it again") from None


def _plots(content: Document, path: Path, image: Path) -> list[tuple[str, BaseGeometry]]:
    """(class, polygon without its holes) of every plot of one JSON."""
    height, width = _picture(image).shape[:2]  # decoded here too, to detect a damaged image before anything is written
    scale = scale_to_image((content.imageHeight, content.imageWidth), (height, width), path, image)
    frame = shapely.box(0, 0, width, height)
    outlines: list[tuple[str, BaseGeometry, object]] = []
    holes: dict[object, list[BaseGeometry]] = {}
    for number, shape in enumerate(content.shapes):
        where = f"{path}: shape {number}"
        polygon = _polygon(shape, scale, frame, where)
        if polygon.is_empty:
            _log.warning("%s has no area, expected a polygon: it is left out", where)
            continue
        if (shape.flags or {}).get("hole"):
            holes.setdefault(shape.group_id, []).append(polygon)
            continue
        if str(shape.label) not in NAMES:
            raise DataError(
                f"{where} has the label {str(shape.label)!r}, expected one of {', '.join(NAMES)}; correct it"
            )
        outlines.append((NAMES[str(shape.label)], polygon, shape.group_id))
    # Holes last: a JSON may list a hole before its outline.
    return [(kind, polygon.difference(shapely.union_all(holes.get(group, [])))) for kind, polygon, group in outlines]


def scale_to_image(
    stated: tuple[int | None, int | None], size: tuple[int, int], path: Path, image: Path
) -> tuple[float, float]:
    """Factors (x, y) from a JSON's pixels to those of its image; a warning where they are not 1.

    Args:
        stated: height and width of the image as the JSON has them, None where it does not.
        size: height and width of the image.
        path: of the JSON, for messages.
        image: file of the image, for messages.

    Raises:
        DataError: the image has another shape than the JSON states.
    """
    height, width = size
    stated = (stated[0] or height, stated[1] or width)
    if stated == size:
        return 1.0, 1.0
    # LiSegAgr's script resizes every image to a square; other tools keep the shape of an image.
    if stated[0] != stated[1] and abs(stated[0] * width - stated[1] * height) > max(*stated, *size):
        raise DataError(
            f"{path} expects an image of {stated[1]} x {stated[0]} px, {image} has {width} x {height}, another shape; "
            "give the image that was labelled"
        )
    _log.warning(
        "%s is of an image of %d x %d px, %s has %d x %d: points are scaled",
        path,
        stated[1],
        stated[0],
        image,
        width,
        height,
    )
    return width / stated[1], height / stated[0]


def _polygon(shape: _Shape, scale: tuple[float, float], frame: Polygon, where: str) -> BaseGeometry:
    """The shape in pixels of its image, valid; empty without an area."""
    if shape.shape_type != "polygon" or len(shape.points) < 3:
        raise DataError(
            f"{where} is a {shape.shape_type} of {len(shape.points)} points, expected a polygon of 3 or more; redraw it"
        )
    polygon = Polygon([(x * scale[0], y * scale[1]) for x, y in shape.points])
    if not frame.buffer(0.5).covers(shapely.box(*polygon.bounds)):
        box = ", ".join(f"{value:g}" for value in polygon.bounds)
        raise DataError(f"{where} spans {box}, beyond the image of {frame.bounds[2]:g} x {frame.bounds[3]:g}; move it")
    if polygon.is_valid:
        return polygon
    # Of what a crossing ring leaves only areas count, not its lines and points.
    return shapely.union_all(polygons_in(shapely.make_valid(polygon)))


def image_files(folder: Path) -> dict[str, Path]:
    """Name of an image -> its file, of a folder of images, or of the imagery that a run mapped."""
    if (folder / "run.json").exists():
        # Of a run the images are those that its tiles name: plots carry the names of its items.
        sources = {source for _, sources in planned_tiles(folder) for source in sources}
        mapped = {slug(source.item_id): source.assets[0][0] for source in sources}
        if remote := [href for href in mapped.values() if not is_local(href)]:
            raise DataError(f"{folder} mapped {remote[0]}, expected local images; give a folder with copies of them")
        return {name: Path(upath(mapped[name]).path) for name in sorted(mapped)}
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give the folder of the run's images")
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _KINDS and not path.name.startswith("."):
            name = slug(path.stem)
            if name in images:
                raise DataError(f"{images[name]} and {path} have the same name {name}; rename one of them")
            images[name] = path
    return images


def _picture(path: Path) -> np.ndarray:
    try:
        with Picture.open(path) as opened:
            if opened.mode[0] in "IF":  # 16 bits or more, which Pillow clips at 255
                raise DataError(f"{path} has pixels of mode {opened.mode}, expected 8 bits; convert the images")
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, Picture.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be read: {error}; copy the image again") from None


def _write(image_HWC: np.ndarray, polygon: BaseGeometry, path: Path, *, size: int) -> bool:
    """Write the crop of a polygon; return False for a polygon without a pixel, such as one filled by its holes."""
    if polygon.is_empty:
        return False
    left, top, right, bottom = polygon.bounds
    col, row = math.floor(left), math.floor(top)
    height, width = image_HWC.shape[:2]
    # Polygons may extend beyond the image by half a pixel.
    window = Window(col, row, math.ceil(right) - col, math.ceil(bottom) - row).intersect(Window(0, 0, width, height))
    mask_HW = mask_of(polygon, window)
    if not mask_HW.any():
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_HWC = image_HWC[window.slices(Window(0, 0, width, height))]
    Picture.fromarray(square_crop(cut_HWC, mask_HW, size=size)).save(path)
    return True
