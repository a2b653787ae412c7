"""A certificate of a map: what was measured on a sample of its own tiles at the end of the run, and a traffic light.

<run>/certificate.json   the measures, their limits and lights; `Certificate` says what they mean
"""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.engine import cluster
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Record
from rayseg.engine.manifest import Manifest, Row
from rayseg.engine.run import Engine, Step
from rayseg.errors import DataError
from rayseg.geo.grid import Tile, Window
from rayseg.geo.region import Region
from rayseg.io import masks
from rayseg.io.maps import MappedTile, mapped_tiles, read_tile, seam_score, top_scores
from rayseg.io.sources import Source
from rayseg.models import bundle
from rayseg.models.bundle import Bundle, Precision
from rayseg.models.input_statistics import LEAST
from rayseg.stages.certify import Certify, Place
from rayseg.steps import map as mapping
from rayseg.steps.evaluate import match, table_of_masks
from rayseg.steps.numbers import counted
from rayseg.store import put, read_json, upath
from rayseg.vision.color import IGNORE, ClassTable

PLACES = 64
"""Places whose imagery, and whose truth, is looked at."""
MOST = 16
"""Of these, places that are mapped again, at most."""
SECONDS, SHARE = 6.0, 0.04
"""Time after which no further place is mapped again: the longer of seconds and a share of the run's time so far."""
LEAST_CHANGES = 50
"""Changes of class at tile borders, the greater of found and expected, below which a seam score is chance."""
BINS = 15
"""Of the expected calibration error, as in Guo et al. 2017."""
SEED = 0
PATIENCE = 1800.0
"""Timeout in seconds of one place."""

LIMITS: dict[str, tuple[float, float]] = {
    "retiled": (0.0, 0.0),
    "brightness": (0.05, 0.15),
    "contrast": (0.05, 0.15),
    "shift": (0.03, 0.10),
    "brightness_of_class": (0.30, 0.60),
    "contrast_of_class": (0.30, 0.60),
    "shift_of_class": (0.20, 0.50),
    "seams": (1.25, 2.0),
    "far": (0.15, 0.50),
    "calibration": (0.05, 0.15),
}
"""Measure -> (green up to, amber up to); above it is red. See docs/certificate.md."""
LIGHTS = ("green", "amber", "red")


def certify(step: Step, predicted: Step, region: Region, truth: str | None = None) -> dict[str, Any]:
    """Measure a finished map on a sample of its own places, write `<run>/certificate.json` and return its content.

    Args:
        step: the current step.
        predicted: the step that mapped the region with a bundle.
        region: of the run.
        truth: location of reference masks, or None; see `Region.located`.

    Returns:
        `light`, `lights` (measure -> green, amber or red; those that are not known are left out), `limits`, and the
        measures of `LIMITS`, None where they are not known, with the reasons in `unknown`; `places`, `again` and
        `pixels` that were looked at; `seconds` and `share_of_run`.
    """
    began = time.perf_counter()
    prefix, tiles = predicted.value["bundle"], mapped_tiles(predicted.root, predicted.name)
    described = bundle.description(prefix)
    # The time of the steps before sets how long the sample may take.
    done = [read_json(path) for path in upath(step.root).glob("steps/*/done.json")]
    before = float(sum(step_done.get("seconds", 0.0) for step_done in done))
    rows = mapping.kept_manifest(step, lambda: Manifest.of([list(_places(tiles, described))]))
    precision: Precision = "bf16" if any(tile.record.facts.get("bf16") for tile in tiles) else "fp32"
    seconds = max(SECONDS, SHARE * before)
    certify_places = Certify(prefix, mapping.tiles_prefix(step), precision=precision, seconds=seconds)
    stage = Work(certify_places, cpus=1.0, gpus=1.0, model=True)
    mapping.through(_near(step), rows, [stage], patience=PATIENCE, record=Place.from_row)
    records = list(mapping.ledger_of(step).read().values())
    measures, unknown = stability(records)
    measures |= _seams(tiles, unknown) | _far(records, described, unknown)
    table = table_of_masks(step.root, mapping.table_of(predicted))
    measures |= _calibration(rows, tiles, region.located(truth), table, unknown)
    content = judged(measures) | {
        "unknown": unknown,
        "places": len(rows),
        "again": sum("pixels" in record.facts for record in records),
        "pixels": sum(record.facts.get("pixels", 0) for record in records),
        "seconds": (spent := round(time.perf_counter() - began, 2)),
        "share_of_run": round(spent / (before + spent), 4),
    }
    put(upath(step.root) / "certificate.json", json.dumps(content, indent=1).encode())
    return content


def judged(measures: Mapping[str, float | None]) -> dict[str, Any]:
    """The measures with their lights: the worst of them is that of the map, "unknown" without any."""
    lights = {
        name: LIGHTS[int(np.searchsorted(limits, value, side="left"))]
        for name, limits in LIMITS.items()
        if (value := measures.get(name)) is not None
    }
    worst = max(lights.values(), key=LIGHTS.index, default="unknown")
    # Without a place mapped again a green light would speak of nothing but borders.
    light = "unknown" if worst == "green" and "retiled" not in lights else worst
    return {"light": light, **{name: measures.get(name) for name in LIMITS}, "lights": lights, "limits": LIMITS}


def _near(step: Step) -> Step:
    """The step on the engine that measures soonest: this process, unless a cluster has the GPUs."""
    if step.engine.kind == "ray":
        import ray

        cluster.connect(step.engine.address)
        # On a GPU bits differ from those of a CPU, so places go where the tiles were.
        if ray.cluster_resources().get("GPU"):
            return step
    return replace(step, engine=Engine("inline", retry=step.engine.retry))


# -- the sample --------------------------------------------------------------------------------------------------------


def _places(tiles: Sequence[MappedTile], described: Bundle) -> Iterator[Row]:
    """Rows of `PLACES` squares of half a stride, drawn by pixels; the first ones may be mapped again."""
    if not tiles:
        return
    rng, side = np.random.default_rng(SEED), max(1, described.stride // 2)
    pixels = np.array([sum(tile.counts.values()) for tile in tiles], float)
    chosen = rng.choice(len(tiles), PLACES, p=pixels / pixels.sum())
    for number, index in enumerate(chosen.tolist()):
        tile, window = tiles[index].tile, tiles[index].tile.window
        height, width = min(side, window.height), min(side, window.width)
        row, col = (int(rng.integers(0, room + 1)) for room in (window.height - height, window.width - width))
        at = Tile(f"place-{number:02d}", tile.grid, Window(window.col + col, window.row + row, width, height))
        sources = json.dumps([source.to_row() for source in tiles[index].sources])
        yield Place(at, tile, sources, number < MOST).to_row()


# -- the measures ------------------------------------------------------------------------------------------------------


def stability(records: Sequence[Record]) -> tuple[dict[str, float | None], dict[str, str]]:
    """Shares of pixels that change, of all and of those of the class, and why measures are not known."""
    facts = [record.facts for record in records if "pixels" in record.facts]
    if not facts:
        why = next((record.reason for record in records if record.reason), "no place has imagery")
        return {}, dict.fromkeys(("retiled", "brightness", "contrast", "shift"), f"no place was mapped again: {why}")
    pixels = sum(row["pixels"] for row in facts)
    measures: dict[str, float | None] = {}
    for name in ("retiled", "brightness", "contrast", "shift"):
        # The worse of two changes counts: brighter imagery may be harmless where darker is not.
        measures[name] = (
            max(sum(parts) for parts in zip(*(row["changed"][name] for row in facts), strict=True)) / pixels
        )
        ways = [row["of_class"][name] for row in facts if "of_class" in row and name in row["of_class"]]
        sums = [np.sum(pairs, axis=0) for pairs in zip(*ways, strict=True)]
        if sums and all(whole > 0 for _, whole in sums):
            measures[f"{name}_of_class"] = max(float(part / whole) for part, whole in sums)
    return measures, {}


def _seams(tiles: Sequence[MappedTile], unknown: dict[str, str]) -> dict[str, float | None]:
    seams = seam_score(tiles)
    expected = seams["inside"] * seams["pairs"] if seams else 0
    if not seams or seams["ratio"] is None or max(seams["changes"], expected) < LEAST_CHANGES:
        unknown["seams"] = f"fewer than {LEAST_CHANGES} changes of class at borders of tiles, found and expected"
        return {}
    return {"seams": seams["ratio"]}


def _far(records: Sequence[Record], described: Bundle, unknown: dict[str, str]) -> dict[str, float | None]:
    far = [record.facts["far"] for record in records if "far" in record.facts]
    if not far:
        unknown["far"] = (
            f"the model has no statistics of its training imagery: fewer than {LEAST} windows of it, or the model is "
            "imported or of an earlier version"
            if described.statistics is None
            else "no imagery"
        )
        return {}
    return {"far": sum(far) / len(far)}


def _calibration(
    rows: Sequence[Row], tiles: Sequence[MappedTile], truth: str | None, table: ClassTable, unknown: dict[str, str]
) -> dict[str, float | None]:
    """The expected calibration error at the places that have truth."""
    if not truth:
        unknown["calibration"] = "no truth was given for the map"
        return {}
    try:
        reference = masks.two_classes(masks.masks_of(truth, names=table.names), table, truth)
        confidence, right = _judged_pixels([Place.from_row(row) for row in rows], tiles, reference, table)
    except DataError as error:
        unknown["calibration"] = str(error)
        return {}
    if not len(right):
        unknown["calibration"] = "no place has truth"
        return {}
    return {"calibration": calibration_error(confidence, right)}


def _judged_pixels(
    places: Sequence[Place], tiles: Sequence[MappedTile], reference: Sequence[Source], table: ClassTable
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Score of the class of every pixel with truth at the places, and whether the class is right."""
    by_id = {tile.tile.id: tile for tile in tiles}
    of = {place.of.id: by_id[place.of.id] for place in places}
    matches = {one.piece.tile.id: one for one in match(masks.pieces_of_tiles(list(of.values())), reference)}
    scores, right = [np.zeros(0)], [np.zeros(0, bool)]
    for place in places:
        if (matched := matches.get(place.of.id)) is None:
            continue
        window, whole = place.at.window, place.of.window
        here = window.slices(whole)
        classes_HW = read_tile(by_id[place.of.id], "classes")[0][here]
        scores_CHW = read_tile(by_id[place.of.id], "scores")[:, *here]
        # A mask without georeference counts its pixels from a corner of its own.
        col, row = matched.window.col + window.col - whole.col, matched.window.row + window.row - whole.row
        at = Window(col, row, window.width, window.height)
        truth_HW = masks.read_classes(matched.truth, matched.grid, at, table)
        both_HW = np.isin(truth_HW, table.values) & (classes_HW != IGNORE)
        scores.append(top_scores(classes_HW, scores_CHW, table)[both_HW])
        right.append((truth_HW == classes_HW)[both_HW])
    return np.concatenate(scores), np.concatenate(right)


def calibration_error(confidence_N: NDArray[np.float64], right_N: NDArray[np.bool_]) -> float:
    """Expected calibration error: mean distance of confidence and accuracy in bins (Guo et al. 2017, equation 3)."""
    bins_N = np.minimum((confidence_N * BINS).astype(np.int64), BINS - 1)
    gaps_B = np.bincount(bins_N, weights=confidence_N - right_N, minlength=BINS)
    return float(np.abs(gaps_B).sum() / len(right_N))


# -- for people --------------------------------------------------------------------------------------------------------

_SENTENCES = {
    "retiled": ("same in other tiles", "{:.2%} of the pixels differ in a bit when mapped in other tiles and order"),
    "brightness": ("brightness ± 20 %", "{:.1%} of the pixels change their class"),
    "contrast": ("contrast ± 20 %", "{:.1%} of the pixels change their class"),
    "shift": ("shift by half a stride", "{:.1%} of the pixels change their class"),
    "brightness_of_class": ("brightness, of the class", "{:.0%} of the pixels with the class in either map"),
    "contrast_of_class": ("contrast, of the class", "{:.0%} of the pixels with the class in either map"),
    "shift_of_class": ("shift, of the class", "{:.0%} of the pixels with the class in either map"),
    "seams": ("seams", "the class changes {:.2f} times as often at borders of tiles as inside them"),
    "far": ("unlike the training imagery", "{:.0%} of the places"),
    "calibration": ("calibration", "scores are off by {:.3f} on average (expected calibration error)"),
}
_LEADS = {
    "green": "The map is stable. Whether it is right is what its accuracy says.",
    "amber": "Look into the measures that are amber before you rely on the map.",
    "red": "Do not rely on the map before the measures that are red are explained.",
    "unknown": "Too little could be measured.",
}


def rows_of(content: Mapping[str, Any]) -> list[dict[str, str]]:
    """The measures for the report: name, light ("not known" without one), value and limits as text."""
    rows = []
    for name, (title, sentence) in _SENTENCES.items():
        value, (green, amber) = content[name], content["limits"][name]
        if value is None and name not in content["unknown"]:
            continue  # of binary maps alone
        words = sentence.format(value) if value is not None else content["unknown"][name]
        limits = "none" if not amber else f"{green:g}, {amber:g}"
        light = content["lights"].get(name, "not known")
        rows.append({"title": title, "light": light, "value": words, "limits": limits})
    return rows


def worst(content: Mapping[str, Any]) -> str:
    """The measures that make the light amber or red, as text; empty for another light."""
    if content["light"] not in LIGHTS[1:]:
        return ""
    return ", ".join(name.replace("_", " ") for name, light in content["lights"].items() if light == content["light"])


def lead(content: Mapping[str, Any]) -> str:
    """What the light means, and what it was measured on."""
    again, looked_at = (counted(content[name], "place") for name in ("again", "places"))
    return (
        f"{_LEADS[content['light']]} Measured on {again} with {content['pixels']:,} pixels, mapped again, and the "
        f"imagery of {looked_at}, in {content['seconds']:.1f} s ({content['share_of_run']:.1%} of the run's time)."
    )
