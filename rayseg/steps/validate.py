"""Map labelled images tile by tile, as a region is mapped, and compare the tiles with the images' masks."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from rayseg.engine.flow import Work
from rayseg.engine.manifest import Row, write_rows
from rayseg.engine.run import Step
from rayseg.geo.grid import Tile
from rayseg.io import scenes
from rayseg.io.pictures import encoded
from rayseg.io.scenes import LabelledImage
from rayseg.metrics import Confusion
from rayseg.models import bundle
from rayseg.models.bundle import Bundle
from rayseg.stages.compare import CompareTile, pictured
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.steps import estimate, evaluate
from rayseg.steps import map as mapping
from rayseg.steps.evaluate import Compared
from rayseg.steps.map import MapConfig
from rayseg.store import put
from rayseg.vision.color import ClassTable

WORST = 6
"""Tiles that the report shows."""


def tiles_of(images: Sequence[LabelledImage], described: Bundle, config: MapConfig) -> list[Row]:
    """Rows of the tiles of labelled images."""
    sources = [scenes.image_on(image) for image in images]
    rows = tile_rows(sources, None, size=config.tile, halo=described.patch + described.stride)
    return [row | {"refused": ""} for row in rows]


def compare_images(
    step: Step,
    model: Step,
    images: Sequence[LabelledImage],
    table: ClassTable,
    config: MapConfig,
    *,
    count: int | None = None,
) -> dict[str, Any]:
    """Predict labelled images and compare them with their masks; `<step>/tiles` has the map.

    Args:
        step: the current step.
        model: the step that provides the model.
        images: with masks.
        table: the classes.
        config: settings of the map.
        count: number of tiles; None for all.

    Returns:
        As `evaluate.evaluate`, and `worst`: id, share of right pixels and picture of the tiles with the smallest share.
    """
    described, prefix = bundle.description(model.value["bundle"]), str(step.prefix / "tiles")
    # 1. predict and compare tile by tile
    rows = tiles_of(images, described, config)
    # A few tiles for a probe, spread over all images.
    rows = estimate.spread(rows, count) if count else rows
    write_rows(step.manifest, rows)
    works = [
        Work(ReadTile(described.bands, patch=described.patch, stride=described.stride)),
        Work(mapping.predictor(model, config), cpus=1.0, gpus=1.0, model=True),
        Work(CompareTile(prefix, images, table)),
    ]
    account = mapping.through(step, rows, works, patience=config.stall_seconds)
    compared = [
        Compared(row["id"], row["grid_image"], Confusion(np.array(record.facts["confusion"])), 0)
        for row, record in mapping.rows_with(step, "confusion")
    ]
    # 2. picture the tiles with the smallest share of right pixels
    by_id, worst = {row["id"]: Tile.from_row(row) for row in rows}, []
    labelled = [tile for tile in compared if tile.confusion.pixels]
    for tile in sorted(labelled, key=lambda tile: tile.confusion.overall_accuracy)[:WORST]:
        path = f"steps/{step.name}/worst/{tile.id}.webp"
        picture_HWC = pictured(prefix, by_id[tile.id], images, table)
        put(step.prefix / "worst" / f"{tile.id}.webp", encoded(picture_HWC, "webp"))
        worst.append({"id": tile.id, "right": tile.confusion.overall_accuracy, "picture": path})
    # Each tile is cut from an image that has a mask, so none is unmatched.
    none = {"count": 0, "names": []}
    measures = evaluate.summary(compared, table) | {"prediction": "", "truth": ""}
    return measures | account | {"unmatched": {"prediction": none, "truth": none}, "worst": worst}
