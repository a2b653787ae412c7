"""Compare a map with reference masks: confusion matrix per tile or image, metrics with 95 % intervals, seams.

Prediction and truth are matched by location if both are georeferenced, else by name (file stem or item id).
"""

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from rayseg.engine import run as runs
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, ModelError, listed
from rayseg.geo.grid import Grid, Tile, Window, slug
from rayseg.geo.region import Region
from rayseg.io import maps, masks, rasters
from rayseg.io.class_tables import Classes, read_table
from rayseg.io.maps import pixel_area_m2, pixel_areas_m2
from rayseg.io.masks import Piece
from rayseg.io.rasters import footprint
from rayseg.io.sources import Source, part_of_image
from rayseg.io.tables import attempted
from rayseg.io.times import time_order
from rayseg.metrics import Confusion, percentile_interval, resampled
from rayseg.models import bundle
from rayseg.steps.map import SCORED
from rayseg.store import put, upath
from rayseg.vision.color import IGNORE, ClassTable, hex_of

STRIP = 1024
NAMED = 20
_MOST_PARTS = 16  # of a pixel along each side
_SAME_AREA = 1.01  # ratio of the areas of two pixels that count as equal; within UTM zones they differ by .2 %
OVERALL = {"overall_accuracy": "overall accuracy", "mean_iou": "mean IoU", "fw_iou": "frequency-weighted IoU"}
PER_CLASS = ("iou", "f1", "precision", "recall")


@dataclass(frozen=True)
class Match:
    """A piece of the prediction and its reference masks.

    Attributes:
        piece: of the prediction.
        truth: masks that overlap the piece, the preferred one first.
        grid: grid on which the masks are read.
        window: of the piece on this grid.
        parts: pixels of this grid along each side of a pixel of the piece.
    """

    piece: Piece
    truth: tuple[Source, ...]
    grid: Grid
    window: Window
    parts: int = 1


@dataclass(frozen=True)
class Compared:
    """Result of one match.

    Attributes:
        id: of the tile or image.
        image: without georeference, the image that contains the piece; the bootstrap resamples whole images then, else
            tiles.
        confusion: of the pixels labelled in both, classes in the table's order.
        unseen: number of pixels labelled only in the truth.
        areas: of the same pixels in square metres, where pixels of the comparison differ in area; else None.
        parts: pixels counted along each side of a pixel of the map (see `Match`).
    """

    id: str
    image: str | None
    confusion: Confusion
    unseen: int
    areas: Confusion | None = None
    parts: int = 1


def evaluate(prediction: str, truth: str, *, classes: str | None = None) -> dict[str, Any]:
    """Compare a prediction with its truth.

    Args:
        prediction: a run, a folder of masks (PNG or TIFF), or `catalog.json#collection`.
        truth: a folder of masks or `catalog.json#collection`; they may hold class values, palette indices or colours.
        classes: YAML file with a class table, or its name under configs/classes; by default that of the run's
            configuration, or the one stored in the prediction.

    Returns:
        JSON values: `overall` and, per class, `iou`, `f1`, `precision` and `recall`, each as value, low, high (95 %
        bootstrap over tiles or images; None where it is not defined); `confusion` (rows truth, columns prediction);
        `units` (number of resampled units; `unit` is tile or image); `pixels` of the map compared; `not_evaluated`,
        those with truth but without prediction; `unmatched` names of both sides; `seams` of a run; `failed`, error of
        each mask that cannot be read or contains a value that is not a class. Where pixels differ in area by more than
        1 % (several resolutions or latitudes), measures are of areas, and `confusion`, `reference` and `predicted` in
        square metres (`counted` is then "m2"); else these three count the pixels of the comparison, which are smaller
        than the map's where a mask is finer. `coarser`: a mask with pixels of another size than the map's, and the
        size of the pixels of the comparison. A mask more than 16 times finer than the map, along each side, is sampled
        at 16 x 16 places of each pixel.

    Raises:
        DataError: nothing matches, two images differ in size, or no mask can be compared.
        ConfigError: no class table is given or stored.
    """
    table = read_table(classes) if classes else None
    failed: dict[str, str] = {}
    # A run knows its tiles, classes and scenes; other predictions are folders of masks.
    if (upath(prediction) / "run.json").exists():
        return _of_run(prediction, truth, table, failed=failed)[0] | {"failed": failed}
    names = table.names if table else ()
    predicted = masks.masks_of(prediction, names=names, failed=failed)
    table = table or _stored_table(predicted[0], prediction)
    predicted = masks.two_classes(predicted, table, prediction, failed=failed)
    reference = masks.two_classes(masks.masks_of(truth, names=table.names, failed=failed), table, truth, failed=failed)
    # Georeferenced predictions are cut into pieces only if the truth can be matched by place.
    placed = any(mask.crs for mask in reference)
    compared, rest = _compare_all(masks.pieces_of_masks(predicted, placed=placed), reference, table, failed)
    return {"prediction": prediction, "truth": truth} | summary(compared, table) | rest | {"failed": failed}


def expect_masks(region: Region, truth: str | None, names: Sequence[str]) -> None:
    """Check that the truth has masks, before the map is made.

    Args:
        region: see `Region.located`.
        truth: location of the masks, or None.
        names: of the classes.

    Raises:
        RaysegError: see `masks_of`.
    """
    if located := region.located(truth):
        masks.masks_of(located, names=names, failed={})


def compare_truth(step: Step, predicted: Step, region: Region, truth: str | None) -> dict[str, Any]:
    """Compare a run's map with its truth, as a step; return an empty result without a truth."""
    located = region.located(truth)
    return evaluate_run(step, predicted, located) if located else {}


def evaluate_run(step: Step, predicted: Step, truth: str) -> dict[str, Any]:
    """Compare a run's map with its truth; `<step>/confusions.json` stores the counts of each tile.

    Masks that cannot be compared are `troubles` of the step.
    """
    failed: dict[str, str] = {}
    result, compared = _of_run(predicted.root, truth, None, predicted.name, failed=failed)
    tiles = {part.id: part.confusion.matrix.tolist() for part in compared}
    # Counts per tile, so that intervals can be computed again without the masks.
    content = {"classes": [row["value"] for row in result["classes"]], "tiles": tiles}
    put(step.prefix / "confusions.json", json.dumps(content).encode())
    return result | ({"failed": failed, "troubles": failed} if failed else {})


def _of_run(
    root: str,
    truth: str,
    table: ClassTable | None,
    step: str = "predict",
    *,
    failed: dict[str, str],
) -> tuple[dict[str, Any], list[Compared]]:
    tiles = maps.mapped_tiles(root, step)
    if not tiles:
        raise DataError(f"run {root} has no mapped tile to compare; to see why, run rayseg status {root}")
    pieces = masks.pieces_of_tiles(tiles)
    table = table or table_of_masks(root, _stored_table(pieces[0].source, root))
    reference = masks.two_classes(masks.masks_of(truth, names=table.names, failed=failed), table, truth, failed=failed)
    compared, rest = _compare_all(pieces, reference, table, failed)
    result = {"prediction": root, "truth": truth} | summary(compared, table) | rest
    return result | {"seams": maps.seam_score(tiles)}, compared


def table_of_masks(root: str, mapped: ClassTable) -> ClassTable:
    """The table that masks of a run's truth are read by: in them its classes may have other values than in its map.

    Those of the run's configuration count, else those of the masks that its model learnt from.

    Args:
        root: prefix of the run.
        mapped: the classes of its map.
    """
    content = runs.read(root)
    given = content["config"].get("classes")
    if isinstance(given, dict) and given.get("classes"):
        table = Classes.model_validate(given).table
        if table.names == mapped.names:
            return table
    # The model knows the values of the masks that it learnt from.
    made = content.get("steps", {}).get(SCORED, {})
    if origin := made.get("run"):  # made from another run
        return table_of_masks(origin, mapped)
    with suppress(ConfigError, ModelError, KeyError):
        described = bundle.description(made["bundle"])
        if tuple(name for _, name, _ in described.classes) == mapped.names:
            return replace(mapped, stored=described.in_masks, unlabelled=described.unlabelled)
    return mapped


def _stored_table(mask: Source, where: str) -> ClassTable:
    table = masks.table_of(mask.assets[0][0])
    if table is None:
        raise ConfigError(f"{where} does not state the classes of its masks; give a class table with --classes")
    return table


# -- which truth belongs to what --------------------------------------------------------------------------------------


def match(pieces: Sequence[Piece], truth: Sequence[Source]) -> list[Match]:
    """Match each piece with the masks that cover it; pieces without a mask are left out.

    Raises:
        DataError: nothing matches (the message lists the first names of both sides), or two images differ in size.
    """
    # The newest mask comes first; the inner sort makes the order independent of the input for equal dates.
    newest = sorted(
        sorted(truth, key=lambda mask: mask.item_id), key=lambda mask: time_order(mask.datetime), reverse=True
    )
    placed = [mask for mask in newest if mask.crs is not None]
    bare = not any(piece.tile.grid.crs for piece in pieces)
    named = masks.by_image([mask for mask in newest if bare or mask.crs is None])
    # Footprints are projected once per grid, not once per piece.
    near: dict[Grid, list[tuple[Source, Window]]] = {}
    matches = []
    for piece in pieces:
        grid = piece.tile.grid
        if grid.crs is None or not placed:
            group = named.get(slug(piece.image), ())
            matches += [_by_name(piece, group)] if group else []
            continue
        if grid not in near:
            near[grid] = [(mask, footprint(mask, turned)) for mask in placed for turned in masks.turns_of(grid)]
        over = tuple(dict.fromkeys(m for m, window in near[grid] if not window.intersect(piece.tile.window).empty))
        matches += [Match(piece, over, grid, piece.tile.window)] if over else []
    if not matches:
        images, references = dict.fromkeys(piece.image for piece in pieces), [mask.item_id for mask in truth]
        raise DataError(
            f"no prediction matches a reference mask: predictions are {listed(images)}, masks are "
            f"{listed(references)}; masks without georeference need the name of their image"
        )
    return matches


def _by_name(piece: Piece, truth: Sequence[Source]) -> Match:
    window = piece.tile.window
    # The mask has no georeference, so its pixels are counted from the upper-left corner of the image.
    if piece.tile.grid.crs is not None:
        window = Window(0, 0, window.width, window.height)
    for mask in truth:
        if piece.size or part_of_image(mask) is None:
            least = (max(window.row1, mask.height), max(window.col1, mask.width))
            masks.expect_fit(mask, piece.size or least, piece.image)
    return Match(piece, tuple(truth), masks.pixels_of(truth[0]), window)


# -- counting ----------------------------------------------------------------------------------------------------------


def _compare_all(
    pieces: Sequence[Piece], truth: Sequence[Source], table: ClassTable, failed: dict[str, str]
) -> tuple[list[Compared], dict[str, Any]]:
    """(every match that can be compared, `unmatched` and `coarser` of the result); masks that cannot are `failed`."""
    sides = {mask: _side_m(mask) for mask in truth}
    matches = [_divided(matched, sides) for matched in match(pieces, truth)]
    # Pixels of two sizes are weighted by their ground, as shares and scores are of area.
    by_area = _differ_in_area(matches)
    # Few threads: each holds the rasters of a tile.
    results, errors = attempted(partial(compare, table=table, by_area=by_area), matches, threads=4)
    if errors and not results:
        raise errors[0][1]
    for matched, error in errors:
        failed[failed_name(matched, error)] = str(error)
    compared = [result for _, result in results]
    return compared, {
        "unmatched": unmatched(pieces, truth, matches),
        "coarser": _coarser(matches, sides, by_area=by_area),
    }


def _side_m(mask: Source) -> float | None:
    """Side of a mask's pixels on the ground in metres; None without CRS."""
    if mask.crs is None:
        return None
    [(grid, _)] = rasters.grids_of([mask])
    return math.sqrt(pixel_area_m2(Tile("", grid, footprint(mask, grid))) or 1.0)


def _divided(matched: Match, sides: Mapping[Source, float | None]) -> Match:
    """A match on parts of the map's pixels if a mask is finer: each pixel of the mask then counts by its area.

    A mask more than `_MOST_PARTS` times finer is sampled at the centres of as many parts.
    """
    finest = min((side for mask in matched.truth if (side := sides[mask])), default=None)
    here_m2 = pixel_area_m2(matched.piece.tile) if matched.grid.crs else None
    if finest is None or here_m2 is None or math.sqrt(here_m2) < _SAME_AREA * finest:
        return matched
    ratio = math.sqrt(here_m2) / finest
    # A whole number of parts for each pixel of both, where there is one.
    whole = (parts for parts in range(math.ceil(ratio - 0.01), _MOST_PARTS + 1) if _is_whole(parts / ratio))
    parts = next(whole, min(2 * math.ceil(ratio), _MOST_PARTS))
    grid, window = matched.grid, matched.window
    finer = replace(grid, resolution=(grid.resolution[0] / parts, grid.resolution[1] / parts))
    within = Window(window.col * parts, window.row * parts, window.width * parts, window.height * parts)
    return replace(matched, grid=finer, window=within, parts=parts)


def _is_whole(number: float) -> bool:
    return abs(number - round(number)) < 0.01


def _differ_in_area(matches: Sequence[Match]) -> bool:
    """Whether pixels that are compared differ in area by more than `_SAME_AREA`; False if one has no CRS."""
    ends: dict[Grid, list[Window]] = defaultdict(list)
    for matched in matches:
        ends[matched.grid].append(matched.window)
    areas: list[float] = []
    for grid, windows in ends.items():
        if grid.crs is None:
            return False
        for window in (min(windows, key=lambda one: one.row), max(windows, key=lambda one: one.row1)):
            areas_HW = pixel_areas_m2(Tile("", grid, window))
            areas += [] if areas_HW is None else [float(areas_HW.min()), float(areas_HW.max())]
    return bool(areas) and max(areas) > _SAME_AREA * min(areas)


def _coarser(matches: Sequence[Match], sides: Mapping[Source, float | None], *, by_area: bool) -> str:
    """A mask whose pixels differ in size from those that it is compared on, as a remark; "" if there is none."""
    first = {mask: matched for matched in reversed(matches) for mask in matched.truth}
    counted = "" if by_area else "; the pixels of the classes and of the confusion are these"
    for mask, matched in first.items():
        there, here_m2 = sides[mask], pixel_area_m2(matched.piece.tile)
        if there is None or here_m2 is None or matched.grid.crs is None:
            continue
        if not 1 / _SAME_AREA < there**2 / here_m2 < _SAME_AREA:
            return (
                f"{mask.assets[0][0]} has pixels of {there:.3g} m, the map of {math.sqrt(here_m2):.3g} m; they are "
                f"compared on pixels of {math.sqrt(here_m2) / matched.parts:.3g} m{counted}"
            )
    return ""


def failed_name(matched: Match, error: DataError) -> str:
    """The file of a match that an error names, else the id of its tile."""
    hrefs = [source.assets[0][0] for source in (matched.piece.source, *matched.truth)]
    return next((href for href in hrefs if href in str(error)), matched.piece.tile.id)


def unmatched(pieces: Sequence[Piece], truth: Sequence[Source], matches: Sequence[Match]) -> dict[str, Any]:
    """Count and first names of pieces without a reference mask, and of masks without a piece."""
    known = {matched.piece.tile.id for matched in matches}
    used = {mask.item_id for matched in matches for mask in matched.truth}
    left = {
        "prediction": [piece.tile.id for piece in pieces if piece.tile.id not in known],
        "truth": [mask.item_id for mask in truth if mask.item_id not in used],
    }
    return {side: {"count": len(names), "names": names[:NAMED]} for side, names in left.items()}


def compare(matched: Match, table: ClassTable, *, by_area: bool = False) -> Compared:
    """Compute the confusion matrix of a match, strip by strip; with `by_area` also that of its ground."""
    # Class values become positions in the table; everything else is ignored.
    positions = np.full(256, IGNORE, np.uint8)
    positions[list(table.values)] = np.arange(len(table.classes))
    predicted_HW = positions[matched.piece.read(table)]
    count, tile, parts = len(table.classes), matched.piece.tile, matched.parts
    confusion, areas = (Confusion(np.zeros((count, count), dtype)) for dtype in (np.int64, np.float64))
    unseen, height = 0, max(1, STRIP // parts**2)
    for row in range(0, len(predicted_HW), height):
        rows_HW = predicted_HW[row : row + height].repeat(parts, axis=0).repeat(parts, axis=1)
        strip = Window(matched.window.col, matched.window.row + row * parts, matched.window.width, len(rows_HW))
        pair = positions[masks.read_classes(matched.truth, matched.grid, strip, table)], rows_HW
        confusion += Confusion.from_arrays(*pair, count, ignore=IGNORE)
        weights_HW = pixel_areas_m2(Tile("", matched.grid, strip)) if by_area else None
        if weights_HW is not None:
            areas += Confusion.from_arrays(*pair, count, ignore=IGNORE, weights=weights_HW)
        # Counted, because a map that leaves difficult places out would look better.
        unseen += int(((pair[0] != IGNORE) & (rows_HW == IGNORE)).sum())
    image = None if tile.grid.crs else matched.piece.image
    return Compared(tile.id, image, confusion, unseen, areas if by_area and tile.grid.crs else None, parts)


def summary(compared: Sequence[Compared], table: ClassTable) -> dict[str, Any]:
    """Metrics of the summed confusion matrix, with intervals over the units that contain labelled pixels."""
    by_area = bool(compared) and all(part.areas for part in compared)
    empty = Confusion(np.zeros((len(table.classes),) * 2, np.float64 if by_area else np.int64))
    # Tiles of one image are correlated: without georeference the bootstrap resamples whole images.
    merged: dict[str, Confusion] = {}
    for part in compared:
        unit = part.image or part.id
        merged[unit] = merged.get(unit, empty) + (part.areas or part.confusion)
    units = [confusion for confusion in merged.values() if confusion.matrix.any()]
    if not units:
        raise DataError("prediction and truth have no labelled pixel in common; check that they show the same place")
    total = sum(units[1:], units[0])
    # One draw for all measures: their intervals then belong together.
    draws = resampled(units) if len(units) > 1 else []
    overall = {name: _measures(total, draws, name)[0] for name in OVERALL}
    per_class = {name: _measures(total, draws, name) for name in PER_CLASS}
    rows = [
        {"value": value, "name": name, "color": hex_of(color)}
        | {"reference": int(total.matrix[k].sum()), "predicted": int(total.matrix[:, k].sum())}
        | {measure: per_class[measure][k] for measure in PER_CLASS}
        for k, (value, name, color) in enumerate(table.classes)
    ]
    return {
        "unit": "image" if all(part.image for part in compared) else "tile",
        "units": len(units),
        "pixels": round(sum(part.confusion.pixels / part.parts**2 for part in compared)),
        **({"counted": "m2"} if by_area else {}),
        "not_evaluated": round(sum(part.unseen / part.parts**2 for part in compared)),
        "overall": overall,
        "classes": rows,
        "confusion": total.matrix.tolist(),
    }


def _measures(total: Confusion, draws: Sequence[Confusion], name: str) -> list[dict[str, float | None]]:
    """Value, low and high of a metric (one entry per class for per-class metrics); no interval without draws."""
    values_K = np.atleast_1d(getattr(total, name))
    drawn_NK = np.array([np.atleast_1d(getattr(draw, name)) for draw in draws]).reshape(-1, len(values_K))
    rows = [(value, *percentile_interval(drawn_N)) for value, drawn_N in zip(values_K, drawn_NK.T, strict=True)]
    return [
        {
            key: None if math.isnan(part) else float(part)
            for key, part in zip(("value", "low", "high"), row, strict=True)
        }
        for row in rows
    ]


# -- for people --------------------------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """The result of `evaluate` as aligned tables."""
    units = f"{result['units']:,} {result['unit']}{'s' if result['units'] > 1 else ''}"
    whole = result.get("counted") == "units"
    counted = f"{result['pixels']:,} units compared" if whole else f"{result['pixels']:,} pixels compared in {units}"
    lines = [f"{counted}; 95 % intervals by bootstrap over them", ""]
    lines += [f"{title:<24}{with_interval(result['overall'][name])}" for name, title in OVERALL.items()]
    width = max([5, *(len(row["name"]) for row in result["classes"])]) + 2
    last = {"units": "truth", "m2": "truth m2"}.get(result.get("counted", ""), "truth px")
    lines += ["", f"{'class':<{width}}" + "".join(f"{name:<22}" for name in PER_CLASS) + f"{last:>14}"]
    for row in result["classes"]:
        measures = "".join(f"{with_interval(row[name]):<22}" for name in PER_CLASS)
        lines.append(f"{row['name']:<{width}}{measures}{row['reference']:>14,}")
    if whole:
        lines += ["", "confusion (rows: truth, columns: predicted, in the order above)"]
        lines += ["".join(f"{count:>8,}" for count in counts) for counts in result["confusion"]]
    return "\n".join([*lines, *remarks(result)])


def with_interval(measure: Mapping[str, float | None]) -> str:
    """A measure with its interval."""
    if measure["value"] is None:
        return "-"
    bounds = f" ({measure['low']:.3f}-{measure['high']:.3f})" if measure["low"] is not None else ""
    return f"{measure['value']:.3f}{bounds}"


def remarks(result: Mapping[str, Any]) -> list[str]:
    """Remarks on pixels, names and seams that the tables do not show."""
    lines = [result["coarser"]] if result.get("coarser") else []
    if result.get("counted") == "m2":
        lines.append("pixels differ in area: all measures are of areas")
    classes = result.get("classes", [])
    shown = [row["name"] for row in classes if row.get("reference")]
    if len(shown) == 1 < len(classes):  # as of masks that are transparent, or nodata, where there is nothing
        lines.append(f"the truth shows {shown[0]} alone: what it leaves unlabelled is not compared")
    if result.get("not_evaluated"):
        lines.append(f"{result['not_evaluated']:,} pixels with truth have no prediction and are not counted")
    for side, other in (("prediction", "truth"), ("truth", "prediction")):
        if count := result["unmatched"][side]["count"]:
            lines.append(f"{count} of the {side} without {other}: {listed(result['unmatched'][side]['names'])}")
    lines += [f"not compared: {message}" for message in result.get("failed", {}).values()]
    if (seams := result.get("seams")) and seams["ratio"] is not None:
        lines.append(f"seams: class changes {seams['ratio']:.2f} times as often over tile borders as inside tiles")
    return ["", *lines] if lines else []
