"""What OpenAPI says of requests about an image, of results and of problems."""

from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI

from rayseg.serve.answers import CSV, GEOJSON, JSON, PARTS, PNG, TIFF
from rayseg.serve.forms import IMAGES, Automatic, Options, Unsupervised
from rayseg.serve.problems import MEDIA_TYPE

Responses = dict[int | str, dict[str, Any]]

IMAGE: dict[str, Any] = {}
PREDICT = Options.model_json_schema()["properties"]
UNSUPERVISED = Unsupervised.model_json_schema()["properties"]
AUTO = Automatic.model_json_schema()["properties"]
_JSON_ARRAY = {"type": "string", "contentMediaType": JSON, "description": "JSON array"}
PROMPT = {"points": _JSON_ARRAY, "labels": _JSON_ARRAY, "boxes": _JSON_ARRAY}
_NUMBER_OR_NONE = {"type": ["number", "null"]}
_PROBLEM = {
    "type": "object",
    "required": ["type", "title", "status", "detail"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string", "description": "One sentence: what, found, expected, what to do."},
        "request_id": {"type": "string"},
    },
    "example": {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no model 'roads'; served models: demo-segmenter",
        "request_id": "f2a9c1",
    },
}
_CLASS = {
    "type": "object",
    "properties": {
        "value": {"type": "integer"},
        "name": {"type": "string"},
        "color": {"type": "string", "example": "#009E73"},
        "painted": {"type": "boolean", "description": "Whether the PNG shows it."},
        "pixels": {"type": "integer"},
        "share": {"type": "number", "description": "Of the area; of the pixels without CRS."},
        "area_m2": _NUMBER_OR_NONE,
        "score_mean": _NUMBER_OR_NONE,
    },
}
_SUMMARY = {
    "type": "object",
    "description": "Of a segmentation.",
    "required": ["model", "width", "height", "pixels", "classes"],
    "properties": {
        "model": {"type": "string"},
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "crs": {"type": ["string", "null"]},
        "pixels": {"type": "integer", "description": "With imagery."},
        "seconds": {"type": "number"},
        "classes": {"type": "array", "items": _CLASS},
    },
    "example": {
        "model": "demo-segmenter",
        "width": 512,
        "height": 512,
        "crs": "EPSG:32650",
        "pixels": 262144,
        "seconds": 1.2,
        "classes": [
            {
                "value": 1,
                "name": "gpc",
                "color": "#009E73",
                "painted": True,
                "pixels": 52428,
                "share": 0.2,
                "area_m2": 52428.0,
                "score_mean": 0.91,
            }
        ],
    },
}
_CLASSIFIED = {
    "type": "object",
    "description": "Of a classification.",
    "required": ["model", "class", "name", "score", "probabilities"],
    "properties": {
        "model": {"type": "string"},
        "class": {"type": "integer"},
        "name": {"type": "string"},
        "score": {"type": "number"},
        "probabilities": {"type": "object", "additionalProperties": {"type": "number"}},
    },
}
_OBJECTS = {
    "type": "object",
    "required": ["width", "height", "things"],
    "properties": {
        "width": {"type": "integer"},
        "height": {"type": "integer"},
        "things": {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "id": {"type": "integer"},
                    "bbox": {"type": "array", "items": {"type": "number"}},
                    "pixels": {"type": "integer"},
                    "area_m2": _NUMBER_OR_NONE,
                    "predicted_iou": {"type": "number"},
                    "stability": {"type": "number"},
                    "runs": {"type": "array", "items": {"type": "integer"}, "description": "Starts and ends."},
                },
            },
        },
    },
}


def problems_of(*statuses: int) -> Responses:
    """Responses with problem documents."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    return {status: {"description": "A problem (RFC 9457).", "content": content} for status in statuses}


_REFUSALS = problems_of(400, 401, 403, 404, 406, 408, 413, 415, 421, 422, 429, 503)


def _results(schema: Mapping[str, Any], *media: str) -> Responses:
    content: dict[str, Any] = {JSON: {"schema": schema}} | {name: {} for name in media}
    return {200: {"description": "The result in the media type of Accept.", "content": content}, **_REFUSALS}


MAPS = _results({"oneOf": [_SUMMARY, _CLASSIFIED]}, PNG, TIFF, GEOJSON, CSV, PARTS)
LABELS = _results(_SUMMARY, PNG, TIFF, GEOJSON, PARTS)
OBJECTS = _results(_OBJECTS, PNG, GEOJSON, PARTS)
PICTURE: Responses = {200: {"description": "The image.", "content": {PNG: {}}}, **_REFUSALS}


def described(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The request with an image and further fields: a form, or the image as the body and the fields in the address."""
    image = {"type": "string", "format": "binary", "description": "PNG, JPEG or GeoTIFF"}
    schema = {"type": "object", "required": ["image"], "properties": {"image": image, **fields}}
    content: dict[str, Any] = {"multipart/form-data": {"schema": schema}}
    content |= {name: {"schema": {"type": "string", "format": "binary"}} for name in IMAGES}
    return {"requestBody": {"required": True, "content": content}}


def describe(app: FastAPI, *, token: bool) -> None:
    """Add the schema of problems, the refusals that every address knows, and the token if one is required."""
    plain = app.openapi

    def whole() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = plain()
        components = schema.setdefault("components", {})
        components.setdefault("schemas", {})["Problem"] = _PROBLEM
        # FastAPI's own errors of validation are problems, too.
        for name in ("HTTPValidationError", "ValidationError"):
            components["schemas"].pop(name, None)
        common = {str(status): content for status, content in problems_of(400, 403, 421, 429, 503).items()}
        common |= {str(status): content for status, content in problems_of(401).items()} if token else {}
        for path, methods in schema["paths"].items():
            for operation in methods.values():
                invalid = {"422": problems_of(422)[422]} if "422" in operation["responses"] else {}
                operation["responses"] = common | operation["responses"] | invalid
                if path == "/healthz":
                    operation["security"] = []
        if token:
            components["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
            schema["security"] = [{"token": []}]
        return schema

    app.openapi = whole  # type: ignore[method-assign]
