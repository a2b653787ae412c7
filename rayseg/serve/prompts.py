"""Things in images without training: Segment Anything's masks, and labels by a network trained on the image itself."""

import io
import json
from collections.abc import Callable, Sequence
from typing import Any

import geopandas
import numpy as np
import pandas
import PIL.Image

from rayseg.errors import DataError
from rayseg.geo.grid import Tile, Window
from rayseg.io import vectors
from rayseg.io.maps import pixel_area_m2
from rayseg.io.untrusted import TooLarge
from rayseg.models import bundle
from rayseg.models.sam import SamConfig, SamProposer
from rayseg.models.sam_bundle import prompted
from rayseg.models.unsupervised import segment
from rayseg.serve.answers import GEOJSON, JSON, NODATA, PNG
from rayseg.serve.uploads import Image
from rayseg.vision import rle
from rayseg.vision.color import label_table
from rayseg.vision.fill import filled
from rayseg.vision.instances import painted
from rayseg.vision.superpixels import halved

_LEAST_SIDE, _MULTIPLE = 16, 4  # px; deepnet halves an image twice
_MOST_TRAINED = 1 << 20
_COLORS = np.array(label_table(60).colors, np.uint8)


def load(prefix: str) -> SamProposer:
    """The Segment Anything model of a bundle, on the GPU if there is one."""
    import torch

    described, model = bundle.build(prefix)
    variant: Any = described.architecture.options["variant"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return SamProposer(model.to(device), SamConfig(variant=variant, checkpoint="random"))


def found(model: SamProposer, image: Image, asked: dict[str, Any]) -> list[dict[str, Any]]:
    """What a Segment Anything model finds: runs, predicted IoU and stability of every mask.

    Args:
        model: of `load`.
        image: red, green and blue, uint8.
        asked: of `questions.prompts` or `questions.automatic`.
    """
    image_HWC = np.ascontiguousarray(image.image_CHW.transpose(1, 2, 0))
    if "boxes" in asked:
        proposals = prompted(model.sam, image_HWC, **asked)
    else:
        proposals = SamProposer(model.sam, model.config.model_copy(update=asked))(image_HWC, image.valid_HW)
    return [
        {"runs": runs, "iou": float(iou), "stability": float(stability)}
        for runs, iou, stability in zip(proposals.masks, proposals.iou_N, proposals.stability_N, strict=True)
        if len(runs)
    ]


def labels(image: Image, asked: dict[str, Any]) -> np.ndarray:
    """Labels (height, width) uint8 of an image by a network trained on it, 255 where not valid.

    What is not valid is filled with the mirror image of what is, has no vote and no target, as in `superpixel`.

    Raises:
        DataError: the image is too small for the network's layers, or nothing of it is valid.
        TooLarge: training on so many pixels would take more memory than a server should.
    """
    height, width = image.valid_HW.shape
    if min(height, width) < _LEAST_SIDE:
        raise DataError(
            f"the image has {width} x {height} px, labels need {_LEAST_SIDE} on each side; send a larger one"
        )
    if height * width > _MOST_TRAINED:
        raise TooLarge(
            f"the image has {width} x {height} px, labels are made of {_MOST_TRAINED:,} at most; send a part"
        )
    beyond = ((0, -height % _MULTIPLE), (0, -width % _MULTIPLE))
    valid_HW = np.pad(image.valid_HW, beyond)
    image_HWC = filled(np.pad(image.image_CHW.transpose(1, 2, 0), (*beyond, (0, 0))), valid_HW)
    superpixels_HW = np.where(valid_HW, 0 if asked["network"] == "v2" else halved(image_HWC), -1)
    labels_HW = segment(image_HWC, superpixels_HW, **asked)[:height, :width]
    return np.where(image.valid_HW, labels_HW, NODATA).astype(np.uint8)


# -- answers -----------------------------------------------------------------------------------------------------------


def _png(tile: Tile, rows: Sequence[dict[str, Any]]) -> bytes:
    """Every thing in a colour of its own, the smaller over the larger; see-through elsewhere."""
    numbers_HW, _ = _painted(tile.window, rows)
    colors = np.concatenate([[[0, 0, 0, 0]], np.insert(_COLORS, 3, 255, axis=1)]).astype(np.uint8)
    index_HW = np.where(numbers_HW > 0, (numbers_HW - 1) % len(_COLORS) + 1, 0)
    sink = io.BytesIO()
    PIL.Image.fromarray(colors[index_HW]).save(sink, "PNG", compress_level=3)
    return sink.getvalue()


def _painted(window: Window, rows: Sequence[dict[str, Any]]) -> tuple[np.ndarray, list[int]]:
    shape = (window.height, window.width)
    return painted([row["runs"] for row in rows], shape, where_HW=np.ones(shape, bool), least=1)


def _json(tile: Tile, rows: Sequence[dict[str, Any]]) -> bytes:
    area, width = pixel_area_m2(tile), tile.window.width
    things = [
        {
            "id": number,
            "bbox": list(rle.box(row["runs"], width)),
            "pixels": rle.area(row["runs"]),
            "area_m2": None if area is None else rle.area(row["runs"]) * area,
            "predicted_iou": round(row["iou"], 4),
            "stability": round(row["stability"], 4),
            "runs": row["runs"].tolist(),
        }
        for number, row in enumerate(rows, 1)
    ]
    return json.dumps({"width": width, "height": tile.window.height, "things": things}).encode()


def _geojson(tile: Tile, rows: Sequence[dict[str, Any]]) -> bytes:
    """A polygon for every thing, whole, in EPSG:4326 or in pixels; things may overlap."""
    shape = (tile.window.height, tile.window.width)
    frames = []
    for number, row in enumerate(rows, 1):
        classes_HW = rle.decode(row["runs"], shape).astype(np.uint8)
        frame = vectors.join([vectors.polygons_of(classes_HW, None, tile.grid, tile.window)], label_table(3))
        frame = frame.drop(columns=["class", "name", "score_mean"])
        frames.append(frame.assign(id=number, predicted_iou=row["iou"], stability=row["stability"]))
    if not frames:
        return b'{"type": "FeatureCollection", "features": []}'
    whole: geopandas.GeoDataFrame = pandas.concat(frames, ignore_index=True)
    text: str = whole.to_json(drop_id=True)
    return text.encode()


WRITERS: dict[str, Callable[[Tile, Sequence[dict[str, Any]]], bytes]] = {JSON: _json, PNG: _png, GEOJSON: _geojson}
