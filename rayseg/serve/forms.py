"""Requests about an image: one multipart form with the file and, for some requests, further fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.datastructures import UploadFile

from rayseg.config import Config, load_values
from rayseg.serve.answers import TIFF
from rayseg.serve.problems import Problem

MAX_PROMPTS = 64
IMAGES = ("image/png", "image/jpeg", TIFF, "application/octet-stream")
"""Media types of a body that is an image alone."""
_TEXTS = {"network", "layers"}  # fields that are text; the others are JSON


@dataclass(frozen=True)
class Form:
    """A form: the bytes of its image, and its other fields as text."""

    image: bytes
    fields: dict[str, str]


class Options(Config):
    """Settings of a prediction."""

    threshold: Annotated[float, Field(ge=0, le=1)] | None = None
    """Probability above which a pixel is of the class, for models of one class; default: the model's own."""
    bands: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(max_length=100)] = ()
    """Numbers of the image's bands (from 1) in the order of the model's; default: bands by name."""
    min_area: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Smallest unit of the map in m2 (px without CRS), as `polygons.min_area` of runs; default: all."""
    simplify: Annotated[float, Field(gt=0, le=1e4)] | None = None
    """Tolerance of the outlines of polygons in m (px without CRS), as `polygons.simplify` of runs; default: none."""
    layers: Literal["all", "classes"] = "all"
    """Bands of a GeoTIFF: classes and scores, or the classes alone with their colours."""


class Bands(Config):
    """Settings of a classification."""

    bands: Annotated[tuple[Annotated[int, Field(ge=1, le=1000)], ...], Field(max_length=100)] = ()
    """As of `Options`."""


class Unsupervised(Config):
    """Settings of unsupervised segmentation."""

    network: Literal["v1", "v2", "deepnet"] = "v1"
    """Recipe of the network."""
    iterations: Annotated[int, Field(ge=1, le=200)] = 32
    """Training steps."""
    min_labels: Annotated[int, Field(ge=2, le=32)] = 4
    """Training ends when fewer labels remain."""


class Automatic(Config):
    """Settings of Segment Anything's automatic mask generation."""

    points: Annotated[int, Field(ge=1, le=64)] = 16
    """Points on each side of the grid of prompts."""
    iou: Annotated[float, Field(ge=0, le=1)] = 0.88
    """Predicted IoU above which a mask is kept."""
    stability: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Stability score from which a mask is kept."""


class Prompts(Config):
    """Prompts of Segment Anything in pixels of the image: one mask per box, one mask for all points together."""

    points: Annotated[tuple[tuple[float, float], ...], Field(max_length=MAX_PROMPTS)] = ()
    """(x, y) of points."""
    labels: Annotated[tuple[Literal[0, 1], ...], Field(max_length=MAX_PROMPTS)] = ()
    """1 for a point on the object, 0 for a point outside it; default: all 1."""
    boxes: Annotated[tuple[tuple[float, float, float, float], ...], Field(max_length=MAX_PROMPTS)] = ()
    """(left, top, right, bottom) of boxes."""


async def read(request: Request, known: Mapping[str, Any]) -> Form:
    """Read an image and the fields `known`: a form, or the image as the body and the fields in the address.

    Raises:
        Problem: 415, the body is neither; 422, it has no image, or further fields.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    fields = dict(request.query_params)
    if kind in IMAGES:
        _expect_known(fields, known)
        return Form(await request.body(), fields)
    if kind != "multipart/form-data":
        raise Problem(
            415,
            f"Content-Type is {kind or 'missing'}, expected multipart/form-data with a file `image`, or as the "
            f"type of an image alone: {', '.join(IMAGES)}",
        )
    # Limits of the parser: one file, few fields, 1 MiB per field; bytes are counted by the middleware.
    async with request.form(max_files=1, max_fields=10, max_part_size=1 << 20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise Problem(422, f"the form has {', '.join(form) or 'no fields'}, expected a file named image")
        fields |= {name: value for name, value in form.items() if isinstance(value, str)}
        _expect_known({**dict.fromkeys(form.keys() - {"image"}, ""), **fields}, known)
        return Form(await image.read(), fields)


def _expect_known(fields: Mapping[str, str], known: Mapping[str, Any]) -> None:
    if unknown := fields.keys() - known.keys():
        names = ", ".join(["image", *known])
        raise Problem(422, f"the request has the unknown field {min(unknown)[:60]!r}, expected: {names}; leave it out")


def media_type(accept: str, offered: Sequence[str]) -> str:
    """The media type of `offered` that an Accept header prefers (RFC 9110, 12.5.1); the first of equal ones.

    Raises:
        Problem: 406, the header accepts none of them.
    """
    ranges: list[tuple[str, float]] = []
    for part in accept.split(",") if accept.strip(", ") else ["*/*"]:
        name, *parameters = (piece.strip().lower() for piece in part.split(";"))
        weight = next((text[2:] for text in parameters if text.startswith("q=")), "1")
        try:
            ranges.append((name, min(1.0, max(0.0, float(weight)))))
        except ValueError:
            ranges.append((name, 0.0))

    def quality(media: str) -> float:
        # The most specific range that matches decides: a wildcard counts as two characters fewer.
        matches = {media, "*/*", media.split("/")[0] + "/*"}
        fits = [(len(name) - 2 * name.count("*"), q) for name, q in ranges if name in matches]
        return max(fits)[1] if fits else 0.0

    best = max(offered, key=quality)
    if quality(best) > 0:
        return best
    raise Problem(406, f"Accept is {accept[:100]!r}, this request is answered as: {', '.join(offered)}")


def options(kind: type[Config], fields: Mapping[str, str]) -> dict[str, Any]:
    """Validated settings of `kind` from fields of a form, as plain values; fields are text or JSON.

    Raises:
        Problem: 422, a field is not JSON.
        ConfigError: a field is unknown or invalid.
    """
    values: dict[str, Any] = {}
    for name, text in fields.items():
        try:
            values[name] = text if name in _TEXTS else json.loads(text)
        except (ValueError, RecursionError):
            raise Problem(422, f"the field {name} is {text[:40]!r}, expected JSON") from None
    return load_values(kind, values).model_dump()


def prompts(fields: Mapping[str, str]) -> dict[str, Any]:
    """Validated `Prompts` as plain values, with one label per point.

    Raises:
        Problem: 422, there is no prompt, or the number of labels differs from that of points.
    """
    given = options(Prompts, fields)
    points, labels = given["points"], given["labels"]
    if not points and not given["boxes"]:
        raise Problem(422, "the form has neither points nor boxes; send points [[x, y]] or boxes [[x0, y0, x1, y1]]")
    if labels and len(labels) != len(points):
        raise Problem(422, f"{len(points)} points have {len(labels)} labels; send one label per point")
    return given | {"labels": labels or (1,) * len(points)}


def expect_inside(prompts: Mapping[str, Any], width: int, height: int) -> None:
    """Refuse prompts outside the image and empty boxes.

    Raises:
        Problem: 422, it names the first one.
    """
    # A box is two corners.
    corners = [*prompts["points"], *(box[:2] for box in prompts["boxes"]), *(box[2:] for box in prompts["boxes"])]
    for x, y in corners:
        if not (0 <= x <= width and 0 <= y <= height):
            raise Problem(422, f"({x:g}, {y:g}) is outside the image of {width} x {height} px; send points inside it")
    for x0, y0, x1, y1 in prompts["boxes"]:
        if x0 >= x1 or y0 >= y1:
            raise Problem(422, f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) is empty; send left, top, right, bottom")
