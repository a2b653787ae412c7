"""What is sent back for an image: a coloured mask, a GeoTIFF with scores, polygons, or what each class covers."""

import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image

from rayseg.geo.grid import Tile
from rayseg.io import cog, vectors
from rayseg.io.maps import pixel_area_m2
from rayseg.io.pictures import painted, shown_colors
from rayseg.vision.color import ClassTable, hex_of

NODATA = 255
PNG, TIFF, GEOJSON, JSON = "image/png", "image/tiff", "application/geo+json", "application/json"


@dataclass(frozen=True, eq=False)
class Result:
    """What was found in an image.

    Attributes:
        name: of the model.
        tile: the image.
        table: the classes.
        classes_HW: uint8, 255 without imagery.
        scores_CHW: uint8, probability x 254, 255 without imagery; one band for class 1 against 0, else one per class;
            None where nothing scores.
        seconds: the work took.
    """

    name: str
    tile: Tile
    table: ClassTable
    classes_HW: np.ndarray
    scores_CHW: np.ndarray | None
    seconds: float


def png(result: Result) -> bytes:
    """The mask as a palette image: indices are class values, what is not painted is see-through."""
    return palette_png(result.classes_HW, {value: color for value, _, color in result.table.classes},
                       opaque=set(shown_colors(result.table)))  # fmt: skip


def palette_png(values_HW: np.ndarray, colors: Mapping[int, tuple[int, int, int]], *, opaque: set[int]) -> bytes:
    """Values (height, width) uint8 as a PNG with a palette, see-through where not `opaque`."""
    image, sink = PIL.Image.fromarray(values_HW, "P"), io.BytesIO()
    image.putpalette([part for value in range(256) for part in colors.get(value, (0, 0, 0))])
    seen = bytes(255 if value in opaque else 0 for value in range(256))
    image.save(sink, "PNG", transparency=seen, compress_level=3)
    return sink.getvalue()


def picture(image_CHW: np.ndarray, valid_HW: np.ndarray) -> bytes:
    """The first three bands (or the first alone, as grey) as a PNG, see-through where not valid."""
    bands_CHW = image_CHW[:3] if len(image_CHW) >= 3 else np.repeat(image_CHW[:1], 3, axis=0)
    shown_HW4 = np.dstack([painted(bands_CHW, valid_HW), np.where(valid_HW, 255, 0).astype(np.uint8)])
    sink = io.BytesIO()
    PIL.Image.fromarray(shown_HW4).save(sink, "PNG", compress_level=1)
    return sink.getvalue()


def tiff(result: Result) -> bytes:
    """Classes and scores as bands of one Cloud Optimized GeoTIFF."""
    scores_CHW = result.classes_HW[None][:0] if result.scores_CHW is None else result.scores_CHW
    names = result.table.names if len(scores_CHW) != 1 else result.table.names[-1:]
    names = names[: len(scores_CHW)]
    place = (result.tile.grid, result.tile.window)
    return cog.scored_classes(result.classes_HW, scores_CHW, *place, table=result.table, names=names)


def geojson(result: Result) -> bytes:
    """Polygons in EPSG:4326, or in pixels (y downward) of an image without georeference."""
    skip = None if result.scores_CHW is not None else ()
    grid, window = result.tile.grid, result.tile.window
    parts = vectors.polygons_of(result.classes_HW, result.scores_CHW, grid, window, skip=skip)
    text: str = vectors.join([parts], result.table).to_json(drop_id=True)
    return text.encode()


def summary(result: Result) -> dict[str, Any]:
    """Pixels, share, area and mean score of every class."""
    values, counts = np.unique(result.classes_HW[result.classes_HW != NODATA], return_counts=True)
    pixels = dict(zip(values.tolist(), counts.tolist(), strict=True))
    total, area, painted = max(sum(pixels.values()), 1), pixel_area_m2(result.tile), shown_colors(result.table)
    rows = [
        {
            "value": value,
            "name": name,
            "color": hex_of(color),
            "painted": value in painted,
            "pixels": pixels.get(value, 0),
            "share": pixels.get(value, 0) / total,
            "area_m2": None if area is None else pixels.get(value, 0) * area,
            "score_mean": mean_score(result, value),
        }
        for value, name, color in result.table.classes
    ]
    crs = result.tile.grid.crs
    return {
        "model": result.name,
        "width": result.tile.window.width,
        "height": result.tile.window.height,
        "crs": crs if crs is None or crs.upper().startswith("EPSG:") else "WKT",
        "pixels": sum(pixels.values()),
        "seconds": round(result.seconds, 3),
        "classes": rows,
    }


def mean_score(result: Result, value: int) -> float | None:
    """Mean probability of a class over the pixels that were given to it; None where there are none."""
    here_HW = result.classes_HW == value
    if result.scores_CHW is None or not here_HW.any():
        return None
    scores_HW = result.scores_CHW[min(value, len(result.scores_CHW) - 1)]
    mean = float(scores_HW[here_HW].mean()) / vectors.TOP
    return 1 - mean if len(result.scores_CHW) == 1 and value == 0 else mean


WRITERS: dict[str, Callable[[Result], bytes]] = {
    JSON: lambda result: json.dumps(summary(result)).encode(),
    PNG: png,
    TIFF: tiff,
    GEOJSON: geojson,
}


def chosen(accept: str, offered: Sequence[str]) -> str | None:
    """The media type of `offered` that an Accept header likes best (RFC 9110, 12.5.1); None if it takes none of them.

    Of equally liked ones the first offered.
    """
    ranges = [_range(part) for part in accept.split(",") if part.strip()] or [("*/*", 1.0)]

    def liking(media: str) -> float:
        fits = [(len(name) - 2 * name.count("*"), q) for name, q in ranges if _fits(name, media)]
        return max(fits)[1] if fits else 0.0

    best = max(offered, key=liking)
    return best if liking(best) > 0 else None


def _range(part: str) -> tuple[str, float]:
    name, *parameters = (piece.strip().lower() for piece in part.split(";"))
    for parameter in parameters:
        if parameter.startswith("q="):
            try:
                return name, min(1.0, max(0.0, float(parameter[2:])))
            except ValueError:
                return name, 0.0
    return name, 1.0


def _fits(name: str, media: str) -> bool:
    return name in {media, "*/*", media.split("/")[0] + "/*"}
