"""What is asked about an image: one multipart form with the file and, for some questions, a few fields."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import Request
from pydantic import Field
from starlette.datastructures import UploadFile

from rayseg.config import Config, load_values
from rayseg.serve.answers import GEOJSON, JSON, PNG, TIFF, chosen
from rayseg.serve.problems import MEDIA_TYPE, Refused

MOST_PROMPTS = 64


@dataclass(frozen=True)
class Asked:
    """A form: the bytes of its image, and its other fields as text."""

    image: bytes
    fields: dict[str, str]


class Unsupervised(Config):
    """How an image is divided into labels."""

    network: Literal["v1", "v2", "deepnet"] = "v1"
    """Recipe of the network."""
    iterations: Annotated[int, Field(ge=1, le=200)] = 32
    """Training steps."""
    min_labels: Annotated[int, Field(ge=2, le=32)] = 4
    """Training ends when fewer labels are left."""


class Automatic(Config):
    """How Segment Anything looks for things."""

    points: Annotated[int, Field(ge=1, le=64)] = 16
    """Points on each side of the grid of prompts."""
    iou: Annotated[float, Field(ge=0, le=1)] = 0.88
    """Predicted IoU above which a mask is kept."""
    stability: Annotated[float, Field(ge=0, le=1)] = 0.95
    """Stability from which a mask is kept."""


class Prompts(Config):
    """What Segment Anything is shown, in pixels of the image; each box alone, all points together."""

    points: Annotated[tuple[tuple[float, float], ...], Field(max_length=MOST_PROMPTS)] = ()
    """(x, y) of points."""
    labels: Annotated[tuple[Literal[0, 1], ...], Field(max_length=MOST_PROMPTS)] = ()
    """1 for a point on the thing, 0 for one beside it; by default all are 1."""
    boxes: Annotated[tuple[tuple[float, float, float, float], ...], Field(max_length=MOST_PROMPTS)] = ()
    """(left, top, right, bottom) of boxes."""


async def read(request: Request) -> Asked:
    """The form of a request.

    Raises:
        Refused: it is no form, or has no image.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise Refused(415, f"the request is {kind or 'of no type'}, expected multipart/form-data with a file `image`")
    async with request.form(max_files=1, max_fields=10, max_part_size=1 << 20) as form:
        image = form.get("image")
        if not isinstance(image, UploadFile):
            raise Refused(422, f"the form has {', '.join(form) or 'nothing'}, expected a file named image")
        return Asked(await image.read(), {name: value for name, value in form.items() if isinstance(value, str)})


def media_type(accept: str, offered: Sequence[str]) -> str:
    """The media type to answer in.

    Raises:
        Refused: 406, none of those offered is accepted.
    """
    if found := chosen(accept, offered):
        return found
    raise Refused(406, f"Accept is {accept[:100]!r}, this can be answered as: {', '.join(offered)}")


def unsupervised(fields: Mapping[str, str]) -> dict[str, Any]:
    """`Unsupervised`, checked, as plain values."""
    return load_values(Unsupervised, _parsed(fields, {"network"})).model_dump()


def automatic(fields: Mapping[str, str]) -> dict[str, Any]:
    """`Automatic`, checked, as plain values."""
    return load_values(Automatic, _parsed(fields, set())).model_dump()


def prompts(fields: Mapping[str, str]) -> dict[str, Any]:
    """`Prompts`, checked, as plain values; labels are as many as points.

    Raises:
        Refused: 422, there is nothing to look at, or labels do not fit.
    """
    found = load_values(Prompts, _parsed(fields, set()))
    if not found.points and not found.boxes:
        raise Refused(422, "there is neither a point nor a box; send points [[x, y]] or boxes [[x0, y0, x1, y1]]")
    if found.labels and len(found.labels) != len(found.points):
        raise Refused(422, f"{len(found.points)} points have {len(found.labels)} labels; send one for each")
    return found.model_copy(update={"labels": found.labels or (1,) * len(found.points)}).model_dump()


def expect_inside(asked: Mapping[str, Any], width: int, height: int) -> None:
    """Refuse prompts beside the image, and boxes without inside."""
    corners = [*asked["points"], *(box[:2] for box in asked["boxes"]), *(box[2:] for box in asked["boxes"])]
    for x, y in corners:
        if not (0 <= x <= width and 0 <= y <= height):
            raise Refused(422, f"({x:g}, {y:g}) is beside the image of {width} x {height} px; send points inside it")
    for x0, y0, x1, y1 in asked["boxes"]:
        if x0 >= x1 or y0 >= y1:
            raise Refused(422, f"the box ({x0:g}, {y0:g}, {x1:g}, {y1:g}) holds nothing; send left, top, right, bottom")


def _parsed(fields: Mapping[str, str], texts: set[str]) -> dict[str, Any]:
    """Fields as JSON values, but for those that are texts."""
    values: dict[str, Any] = {}
    for name, text in fields.items():
        try:
            values[name] = text if name in texts else json.loads(text)
        except (ValueError, RecursionError):
            raise Refused(422, f"the field {name} is {text[:40]!r}, expected JSON") from None
    return values


# -- as OpenAPI says it ------------------------------------------------------------------------------------------------

IMAGE: dict[str, Any] = {}
UNSUPERVISED = Unsupervised.model_json_schema()["properties"]
AUTO = Automatic.model_json_schema()["properties"]
_PAIRS = {"type": "string", "contentMediaType": JSON, "description": "JSON array"}
PROMPT = {"points": _PAIRS, "labels": _PAIRS, "boxes": _PAIRS}


def described(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The request body of a question, for OpenAPI."""
    image = {"type": "string", "format": "binary", "description": "PNG, JPEG or GeoTIFF"}
    schema = {"type": "object", "required": ["image"], "properties": {"image": image, **fields}}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


def problems_of(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Answers that are problems, for OpenAPI."""
    content = {MEDIA_TYPE: {"schema": {"type": "object"}}}
    return {status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses}


ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {"description": "The answer as Accept asks for it.", "content": {m: {} for m in (JSON, PNG, TIFF, GEOJSON)}},
    **problems_of(400, 401, 403, 404, 406, 413, 415, 421, 422, 503),
}
