"""Correct a run's map by clicks: features of the clicks, a head fitted to them, a bundle that maps the region anew."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayseg.engine import run as runs
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Manifest, Row
from rayseg.engine.run import Step
from rayseg.errors import DataError, listed
from rayseg.io.clicks import Click, Clicked, expect_inside, expect_of, identity, placed, read_clicks
from rayseg.io.maps import mapped_tiles
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance
from rayseg.models.correction import Corrected
from rayseg.stages.embed import Drawn, Embed
from rayseg.stages.read import ReadTile
from rayseg.steps import map as mapping
from rayseg.steps import models, remap
from rayseg.steps.map import MapConfig
from rayseg.store import absolute, put, upath
from rayseg.train.correction import CorrectionConfig, Known, fit_correction

DRAWN = 6_000
"""Pixels of the map that are to stay as they are, of all tiles together."""
TILES = 48
"""Tiles that they are drawn from, besides those with clicks."""
CLICKS = "clicks.geojson"


def base_of(root: str) -> str:
    """Prefix of the bundle that a run's map is from; of a corrected map, of the bundle before all corrections.

    Raises:
        ConfigError: no single model made the map.
    """
    content = runs.read(root)
    if content["pipeline"] == "correct":
        return str(content["steps"]["model"]["bundle"])
    return str(remap.map_settings(root)["model"])


def clicks_for(root: str, path: str) -> tuple[list[Click], dict[str, Clicked]]:
    """The clicks of a file and those that a corrected run was made with, and their pixels in each tile.

    Raises:
        ConfigError: clicks of another run, or of a class that the map does not have; the run has not finished.
        DataError: a click lies outside of the map or on none of its pixels, or there are none.
    """
    origin = remap.origin_of(root)
    clicks = read_clicks(path)
    expect_of(clicks, identity(root), origin.table, root)
    tiles = mapped_tiles(root)
    expect_inside(clicks, tiles)
    before = upath(root) / "steps" / "clicks" / CLICKS
    earlier = read_clicks(before) if runs.read(root)["pipeline"] == "correct" else []
    together = [*earlier, *clicks]
    return together, placed(together, tiles, origin.table)


def list_clicks(step: Step, origin: tuple[str, str], path: str, checksum: str) -> dict[str, Any]:
    """Keep the clicks in the run: their file can change, or go.

    Args:
        step: the current step.
        origin: prefix of the run that is corrected, and the key of the step that made its map.
        path: of the file with clicks.
        checksum: of that file.
    """
    del checksum  # for the key alone
    clicks, clicked = clicks_for(origin[0], path)
    # A corrected run is another run, and its clicks count in the next correction.
    features = [click.feature() for click in clicks]
    for feature in features:
        feature["properties"] = {name: value for name, value in feature["properties"].items() if name != "run"}
    content = {"type": "FeatureCollection", "features": features}
    put(step.prefix / CLICKS, json.dumps(content, default=str).encode())
    return {"clicks": len(clicks), "pixels": sum(len(one.rows_N) for one in clicked.values()), "tiles": sorted(clicked)}


def embed(step: Step, root: str, model: Step, clicks: Step, config: MapConfig) -> dict[str, Any]:
    """Write the features of all clicks and of pixels of the map; `<step>/features/<tile>.npz`."""
    table = remap.origin_of(root).table
    clicked = placed(read_clicks(clicks.prefix / CLICKS), mapped_tiles(root), table)
    rows = mapping.kept_manifest(step, lambda: Manifest.of([_rows(root, clicked)]))
    described = bundle.description(model.value["bundle"])
    count = -(-DRAWN // len(rows))
    works = [
        Work(ReadTile(described.bands, patch=described.patch, stride=described.stride)),
        Work(
            Embed(model.value["bundle"], str(step.prefix / "features"), clicked, count=count),
            cpus=1.0,
            gpus=1.0,
            model=True,
        ),
    ]
    return mapping.through(step, rows, works, patience=config.stall_seconds)


def _rows(root: str, clicked: dict[str, Clicked]) -> list[Row]:
    """Rows of the tiles with clicks, and of others spread over the map."""
    mapped = {tile.tile.id for tile in mapped_tiles(root)}
    rows = [row for row in remap.tiles_of(root) if row["id"] in mapped]
    spread = {rows[int(at)]["id"] for at in np.linspace(0, len(rows) - 1, min(TILES, len(rows)))}
    return [row for row in rows if row["id"] in clicked or row["id"] in spread]


def fit(step: Step, model: Step, clicks: Step, embedded: Step, root: str, settings: CorrectionConfig) -> dict[str, Any]:
    """Fit the head; models/<name of the model> is the corrected bundle.

    Args:
        step: the current step.
        model: the segmenter before all corrections.
        clicks: the listed clicks.
        embedded: features of the clicks and of the map.
        root: the run that is corrected.
        settings: of the head.

    Raises:
        DataError: a tile with clicks cannot be read.
    """
    troubles, folder = embedded.value["troubles"], embedded.prefix / "features"
    # A tile with hardly any imagery has no file.
    written = {path.stem for path in folder.glob("*.npz")} - troubles.keys()
    if lost := [name for name in clicks.value["tiles"] if name not in written]:
        reason = troubles.get(lost[0], "it has no imagery now")
        raise DataError(f"tiles {listed(lost)} have clicks and cannot be read: {reason}; fix the imagery first")
    names = [name for name in mapping.read_manifest(embedded).ids.to_pylist() if name in written]
    parts = [Drawn.unpack((folder / f"{name}.npz").read_bytes()) for name in names]
    clicked, kept = known_of(parts)
    described, base = bundle.build(model.value["bundle"])
    corrected, right = fit_correction(base, clicked, kept, settings, described.threshold)
    parent = str(upath(model.value["bundle"]) / "item.json")
    whole = corrected_bundle(described, corrected, settings).of((parent,), {"clicks right": right[1]})
    kept_in = models.keep_model(step, whole, corrected)
    return {"bundle": kept_in, "run": absolute(root), "squares": len(clicked.classes_N), "right": right}


def known_of(parts: Sequence[Drawn]) -> tuple[Known, Known]:
    """(clicks, pixels of the map) of all tiles."""
    names = ("features_NF", "logits_NK", "values_N", "weights_N")
    columns = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
    clicked_N = columns[2] >= 0
    clicks, kept = (Known(*(column[taken_N] for column in columns)) for taken_N in (clicked_N, ~clicked_N))
    return clicks, kept


def corrected_bundle(described: Bundle, corrected: Corrected, settings: CorrectionConfig) -> Bundle:
    """The description of a corrected segmenter: that of the segmenter, with another architecture and origin."""
    options = {**described.architecture.options, "of": described.architecture.factory, **corrected.sizes}
    architecture = Architecture(factory="corrected", options=options)
    provenance = Provenance(config=settings.model_dump(mode="json"))
    changed = {"architecture": architecture, "provenance": provenance, "sha256": ""}
    return described.model_copy(update=changed)
