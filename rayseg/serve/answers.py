"""Response bodies: class maps as PNG, GeoTIFF, polygons or statistics; instance masks as PNG, polygons or runs."""

import csv
import io
import json
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import geopandas
import numpy as np
import pandas
import PIL.Image

from rayseg.geo.grid import Tile, Window
from rayseg.io import cog, vectors
from rayseg.io.maps import class_areas, pixel_areas_m2
from rayseg.io.pictures import painted, shown_colors
from rayseg.stages.generalize import outlined, sieved
from rayseg.stages.predict import above
from rayseg.vision import instances, rle
from rayseg.vision.color import ClassTable, hex_of, label_table

NODATA = 255
PNG, TIFF, GEOJSON, JSON = "image/png", "image/tiff", "application/geo+json", "application/json"
CSV = "text/csv"
PARTS = "multipart/form-data"
"""All media types of a result in one response, each as a field of that name: browsers read it by `formData()`."""
_INSTANCE_COLORS = np.array(label_table(60).colors, np.uint8)


@dataclass(frozen=True, eq=False)
class Result:
    """The class map of an image.

    Attributes:
        name: of the model.
        tile: the image.
        table: the classes.
        classes_HW: uint8, 255 without imagery.
        scores_CHW: uint8, probability x 254, 255 without imagery; one band for class 1 of a binary model, else one per
            class; None for labels without scores.
        seconds: run time of the prediction.
        simplify: tolerance of the outlines of polygons in m (px without CRS); None keeps those of pixels.
        layers: of a GeoTIFF, all or classes.
        warning: about the image, for people; "" for none.
    """

    name: str
    tile: Tile
    table: ClassTable
    classes_HW: np.ndarray
    scores_CHW: np.ndarray | None
    seconds: float
    simplify: float | None = None
    layers: str = "all"
    warning: str = ""


def decided(result: Result, threshold: float | None, min_area: float | None) -> Result:
    """The map with another threshold, and without units that are too small.

    Args:
        result: of a model of one class, if there is a threshold.
        threshold: probability above which a pixel is of the class, by its stored score, as `rayseg remap` applies it.
        min_area: m2 (px without CRS) of the smallest unit, as `polygons.min_area` of runs.
    """
    classes_HW, scores_CHW, grid, window = result.classes_HW, result.scores_CHW, result.tile.grid, result.tile.window
    if threshold is not None and scores_CHW is not None:
        classes_HW = np.where(classes_HW == NODATA, NODATA, above(scores_CHW[0], threshold)).astype(np.uint8)
    if min_area is not None:
        # Nodata around it: units at the border of an array are kept, as they may be larger than what is seen of them.
        around = Window(window.col - 1, window.row - 1, window.width + 2, window.height + 2)
        classes_HW = sieved(np.pad(classes_HW, 1, constant_values=NODATA), grid, around, min_area)[1:-1, 1:-1]
    return replace(result, classes_HW=classes_HW)


def png(result: Result) -> bytes:
    """The map as a palette image: indices are class values, the background is transparent."""
    colors = {value: color for value, _, color in result.table.classes}
    return palette_png(result.classes_HW, colors, opaque=set(shown_colors(result.table)))


def palette_png(values_HW: np.ndarray, colors: Mapping[int, tuple[int, int, int]], *, opaque: set[int]) -> bytes:
    """Values (height, width) uint8 as a PNG with a palette, transparent where not `opaque`."""
    image, sink = PIL.Image.fromarray(values_HW, "P"), io.BytesIO()
    # The palette has 256 entries, so that an index is a class value.
    image.putpalette([part for value in range(256) for part in colors.get(value, (0, 0, 0))])
    alpha = bytes(255 if value in opaque else 0 for value in range(256))
    image.save(sink, "PNG", transparency=alpha, compress_level=3)
    return sink.getvalue()


def rgba_png(image_HW4: np.ndarray, *, compress_level: int = 1) -> bytes:
    """An image (height, width, 4) uint8 as a PNG."""
    sink = io.BytesIO()
    PIL.Image.fromarray(image_HW4).save(sink, "PNG", compress_level=compress_level)
    return sink.getvalue()


def picture(image_CHW: np.ndarray, valid_HW: np.ndarray) -> bytes:
    """The first three bands (or the first one as grey) as a PNG, transparent where not valid."""
    bands_CHW = image_CHW[:3] if len(image_CHW) >= 3 else np.repeat(image_CHW[:1], 3, axis=0)
    return rgba_png(np.dstack([painted(bands_CHW, valid_HW), np.where(valid_HW, 255, 0).astype(np.uint8)]))


def tiff(result: Result) -> bytes:
    """Classes and scores as bands of one Cloud Optimized GeoTIFF, or the classes alone with their colours."""
    if result.layers == "classes":
        return cog.classes_file(result.classes_HW, result.tile.grid, result.tile.window, result.table)
    # Labels without scores have no score bands.
    scores_CHW = result.classes_HW[None][:0] if result.scores_CHW is None else result.scores_CHW
    names = result.table.names if len(scores_CHW) != 1 else result.table.names[-1:]
    grid, window = result.tile.grid, result.tile.window
    return cog.scored_classes(
        result.classes_HW, scores_CHW, grid, window, table=result.table, names=names[: len(scores_CHW)]
    )


def geojson(result: Result) -> bytes:
    """Polygons in EPSG:4326, or in pixels (y downward) for an image without georeference."""
    skip = None if result.scores_CHW is not None else ()
    grid, window = result.tile.grid, result.tile.window
    if result.simplify is None:
        parts = [vectors.polygons_of(result.classes_HW, result.scores_CHW, grid, window, skip=skip)]
    else:
        parts = outlined(result.classes_HW, result.scores_CHW, grid, window, result.simplify)
    text: str = vectors.join_parts(parts, result.table).to_json(drop_id=True)
    return text.encode()


def summary(result: Result) -> bytes:
    """Pixels, area, share of the area (of the pixels without CRS) and mean score of every class as JSON."""
    values, counts = np.unique(result.classes_HW[result.classes_HW != NODATA], return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    areas, shown = class_areas(result.tile, result.classes_HW), shown_colors(result.table)
    # Shares are of area: pixels differ in size in degrees and in Web Mercator.
    sizes = pixels if areas is None else areas
    total = sum(sizes.values()) or 1
    rows = [
        {
            "value": value,
            "name": name,
            "color": hex_of(color),
            "painted": value in shown,
            "pixels": pixels.get(value, 0),
            "share": sizes.get(value, 0) / total,
            "area_m2": None if areas is None else areas.get(value, 0.0),
            "score_mean": mean_score(result, value),
        }
        for value, name, color in result.table.classes
    ]
    crs = result.tile.grid.crs
    content = {
        "model": result.name,
        "width": result.tile.window.width,
        "height": result.tile.window.height,
        "crs": crs if crs is None or crs.upper().startswith("EPSG:") else "WKT",
        "pixels": sum(pixels.values()),
        "seconds": round(result.seconds, 3),
        "classes": rows,
    }
    return json.dumps(content | ({"warning": result.warning} if result.warning else {})).encode()


def mean_score(result: Result, value: int) -> float | None:
    """Mean probability of a class over its pixels; None without scores or pixels."""
    mask_HW = result.classes_HW == value
    if result.scores_CHW is None or not mask_HW.any():
        return None
    scores_HW = result.scores_CHW[min(value, len(result.scores_CHW) - 1)]
    mean = float(scores_HW[mask_HW].mean()) / vectors.TOP
    # A binary model has one band, the probability of class 1.
    return 1 - mean if len(result.scores_CHW) == 1 and value == 0 else mean


WRITERS: dict[str, Callable[[Result], bytes]] = {JSON: summary, PNG: png, TIFF: tiff, GEOJSON: geojson}


def parts(bodies: Mapping[str, bytes]) -> tuple[bytes, str]:
    """(body, media type) of a response with a field per media type (RFC 7578)."""
    boundary = uuid.uuid4().hex
    head = '--{}\r\nContent-Disposition: form-data; name="{}"; filename="result"\r\nContent-Type: {}\r\n\r\n'
    fields = [head.format(boundary, media, media).encode() + body + b"\r\n" for media, body in bodies.items()]
    return b"".join(fields) + f"--{boundary}--\r\n".encode(), f"{PARTS}; boundary={boundary}"


# -- classes of whole images -------------------------------------------------------------------------------------------

Classified = Mapping[str, Any]
"""`model`, `class` (value), `name`, `score`, and `probabilities`: name -> probability."""


def classified(name: str, table: ClassTable, p_K: Sequence[float]) -> Classified:
    """The most probable class of an image, and the probability of each."""
    best = int(np.argmax(p_K))
    value, title, _ = table.classes[best]
    shares = {named: round(p, 6) for named, p in zip(table.names, p_K, strict=True)}
    return {"model": name, "class": value, "name": title, "score": round(p_K[best], 6), "probabilities": shares}


def classified_csv(classified: Classified) -> bytes:
    """Header and one row: class, name, score, and the probability of each class."""
    columns = {name: classified[name] for name in ("class", "name", "score")}
    columns |= {f"p_{name}": p for name, p in classified["probabilities"].items()}
    sink = io.StringIO()
    writer = csv.DictWriter(sink, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerow(columns)
    return sink.getvalue().encode()


def rgb_png(image_HWC: np.ndarray) -> bytes:
    """An image (height, width, 3) uint8 as a PNG."""
    sink = io.BytesIO()
    PIL.Image.fromarray(image_HWC).save(sink, "PNG")
    return sink.getvalue()


# -- instance masks ----------------------------------------------------------------------------------------------------

Masks = Sequence[dict[str, Any]]
"""Of each mask `runs` (int array), predicted `iou` and `stability`."""


def instances_png(tile: Tile, masks: Masks) -> bytes:
    """Every mask in its own colour, smaller ones on top; transparent elsewhere."""
    shape = (tile.window.height, tile.window.width)
    numbers_HW, _ = instances.painted([mask["runs"] for mask in masks], shape, where_HW=np.ones(shape, bool), least=1)
    colors = np.concatenate([[[0, 0, 0, 0]], np.insert(_INSTANCE_COLORS, 3, 255, axis=1)]).astype(np.uint8)
    # Colours repeat after 60 masks; 0 is transparent.
    index_HW = np.where(numbers_HW > 0, (numbers_HW - 1) % len(_INSTANCE_COLORS) + 1, 0)
    return rgba_png(colors[index_HW], compress_level=3)


def instances_json(tile: Tile, masks: Masks) -> bytes:
    """Box, area, scores and runs of every mask."""
    areas_HW, (height, width) = pixel_areas_m2(tile), (tile.window.height, tile.window.width)

    def area_of(runs: np.ndarray) -> float | None:
        return None if areas_HW is None else float(areas_HW[rle.decode(runs, (height, width)) > 0].sum())

    things = [
        {
            "id": number,
            "bbox": list(rle.box(mask["runs"], width)),
            "pixels": rle.area(mask["runs"]),
            "area_m2": area_of(mask["runs"]),
            "predicted_iou": round(mask["iou"], 4),
            "stability": round(mask["stability"], 4),
            "runs": mask["runs"].tolist(),
        }
        for number, mask in enumerate(masks, 1)
    ]
    return json.dumps({"width": width, "height": height, "things": things}).encode()


def instances_geojson(tile: Tile, masks: Masks) -> bytes:
    """One polygon per mask in EPSG:4326, or in pixels without georeference; polygons can overlap."""
    shape = (tile.window.height, tile.window.width)
    frames = []
    for number, mask in enumerate(masks, 1):
        # Each mask alone: masks that overlap stay whole.
        mask_HW = rle.decode(mask["runs"], shape).astype(np.uint8)
        frame = vectors.join_parts([vectors.polygons_of(mask_HW, None, tile.grid, tile.window)], label_table(3))
        frame = frame.drop(columns=["class", "name", "score_mean"])
        frames.append(frame.assign(id=number, predicted_iou=mask["iou"], stability=mask["stability"]))
    if not frames:
        return b'{"type": "FeatureCollection", "features": []}'
    whole: geopandas.GeoDataFrame = pandas.concat(frames, ignore_index=True)
    text: str = whole.to_json(drop_id=True)
    return text.encode()


INSTANCE_WRITERS: dict[str, Callable[[Tile, Masks], bytes]] = {
    JSON: instances_json,
    PNG: instances_png,
    GEOJSON: instances_geojson,
}
