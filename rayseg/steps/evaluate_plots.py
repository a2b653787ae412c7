"""Compare plots with reference plots: which objects match, how well, by size, with 95 % intervals.

The reference is a folder or collection of masks whose values are ids, or a file of polygons. Plots and reference are
matched by location if both are georeferenced, else by name (file stem or item id). An object that several tiles share
is one object; only pixels that both sides know count.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import find_boundaries

from rayseg.engine.run import Step
from rayseg.errors import DataError
from rayseg.geo.grid import Window
from rayseg.geo.vector_files import SUFFIXES
from rayseg.io import instances, maps, masks
from rayseg.io.instances import UNKNOWN, Ids, Polygons
from rayseg.io.masks import Piece
from rayseg.io.sources import Source
from rayseg.metrics import SIZES, Floats, Objects, object_intervals, object_measures
from rayseg.stages.propose import UNNUMBERED
from rayseg.steps import evaluate
from rayseg.store import upath

Pieces = Mapping[Piece, int]
"""Parts of the prediction, each with the number of its file; files of one number share their ids."""


@dataclass(frozen=True)
class Compared:
    """A part of the prediction and its reference.

    Attributes:
        piece: of the prediction.
        predicted: returns the ids of the prediction in the piece, (height, width) int64.
        truth: returns the ids of the reference there.
    """

    piece: Piece
    predicted: Callable[[], Ids]
    truth: Callable[[], Ids]


TOLERANCE = 2
"""Distance in px up to which a boundary pixel counts as found."""
BLOCK = 256
"""Side in px of the blocks of a georeferenced map that the bootstrap resamples."""
TITLES = {
    "f1": "F1 of objects at IoU .5",
    "precision": "precision",
    "recall": "recall",
    "best_iou": "mean best IoU",
    "pq": "panoptic quality",
    "over_segmentation": "over-segmentation",
    "under_segmentation": "under-segmentation",
    "boundary_f1": f"boundary F1 ({TOLERANCE} px)",
    "covered_iou": "IoU of all plots together",
}


def are_plots(prediction: str, truth: str) -> bool:
    """Whether a run left rasters of plots and the truth holds polygons, or masks that state no classes."""
    if not (upath(prediction) / "run.json").exists():
        return False
    tiles = maps.mapped_tiles(prediction)
    if not tiles or not upath(_plots_of(tiles[0].href)).exists():
        return False
    if truth.lower().endswith(SUFFIXES):
        return True
    references = masks.masks_of(truth, failed={})
    return all(len(mask.bands) == 1 and masks.table_of(mask.assets[0][0]) is None for mask in references)


def evaluate_plots(prediction: str, truth: str) -> dict[str, Any]:
    """Compare plots with reference plots.

    Args:
        prediction: a run of agri, or a folder of masks of ids.
        truth: a folder of masks of ids, `catalog.json#collection`, or a file of polygons.

    Returns:
        JSON values: `objects`, each measure of `metrics.object_measures` as value, low and high; `sizes`, the same
        measures by size, with the limits in px; `counts` of reference, predicted and matched objects; `unit`, `units`
        and `pixels`; `unmatched` names of both sides.

    Raises:
        DataError: nothing matches, or a file cannot be used.
    """
    failed: dict[str, str] = {}
    compared, unmatched = compared_pieces(prediction, truth, failed)
    count = Count()
    for part in compared:
        # A mask that cannot be read fails alone.
        try:
            count.add(part.piece, part.predicted(), part.truth())
        except DataError as error:
            failed[part.piece.tile.id] = str(error)
    if failed and not count.pixels["known"]:
        raise DataError(next(iter(failed.values())))
    pieces = [part.piece for part in compared]
    result = {"prediction": prediction, "truth": truth} | count.summary(pieces) | {"unmatched": unmatched}
    return result | ({"failed": failed, "troubles": failed} if failed else {})


def evaluate_run(step: Step, tiles: Step, truth: str) -> dict[str, Any]:
    """Compare the plots of a run with reference plots, as a step."""
    return evaluate_plots(tiles.root, truth)


def compared_pieces(
    prediction: str, truth: str, failed: dict[str, str] | None = None
) -> tuple[list[Compared], dict[str, Any]]:
    """The parts of a prediction that have a reference, and the names without one; arguments as `evaluate_plots`.

    Masks that cannot be opened are added to `failed`, if it is given and others can be.

    Raises:
        DataError: nothing matches, or a file cannot be used.
    """
    pieces = _pieces(prediction, truth)
    if truth.lower().endswith(SUFFIXES):
        return _by_polygons(pieces, Polygons.open(truth))
    return _by_masks(pieces, masks.masks_of(truth, failed=failed))


def expect_reference(truth: str) -> None:
    """Check that the reference can be opened, before plots are made.

    Raises:
        DataError: it cannot be read, or holds no masks or polygons.
    """
    if truth.lower().endswith(SUFFIXES):
        Polygons.open(truth)
    else:
        masks.masks_of(truth, failed={})


def _plots_of(href: str) -> str:
    """The raster of plots next to a tile's raster of classes."""
    return str(upath(href).parent / "plots.tif")


def _pieces(prediction: str, truth: str) -> Pieces:
    """The pieces of a run, or of the masks in a folder, with ids in place of classes."""
    if not (upath(prediction) / "run.json").exists():
        predicted = masks.masks_of(prediction)
        placed = truth.lower().endswith(SUFFIXES) or any(mask.crs for mask in masks.masks_of(truth, failed={}))
        numbers = {mask: number for number, mask in enumerate(predicted)}
        return {piece: numbers[piece.source] for piece in masks.pieces_of_masks(predicted, placed=placed)}
    tiles = maps.mapped_tiles(prediction)
    if not tiles:
        raise DataError(f"run {prediction} has no mapped tile to compare; see rayseg status {prediction}")
    sources = [
        replace(piece.source, assets=((_plots_of(tile.href), ("plot",)),), dtype="uint32", nodata=UNNUMBERED)
        for piece, tile in zip(masks.pieces_of_tiles(tiles), tiles, strict=True)
    ]
    # All tiles of a run share the numbers of its plots.
    return {replace(piece, source=own): 0 for piece, own in zip(masks.pieces_of_tiles(tiles), sources, strict=True)}


def _predicted(piece: Piece, number: int) -> Ids:
    """Ids of a piece of the prediction."""
    tile = piece.tile
    if tile.grid.crs is not None:
        return instances.read_ids([piece.source], tile.grid, tile.window, numbers=[number])
    own = Window(0, 0, tile.window.width, tile.window.height)
    return instances.read_ids([piece.source], masks.pixels_of(piece.source), own, numbers=[number])


def _by_masks(pieces: Pieces, truth: Sequence[Source]) -> tuple[list[Compared], dict[str, Any]]:
    matches = evaluate.match(list(pieces), truth)
    # Ids are unique in their own mask only: the mask's number makes them so in all.
    numbers = {mask: number for number, mask in enumerate(truth)}
    compared = [
        Compared(
            match.piece,
            partial(_predicted, match.piece, pieces[match.piece]),
            partial(
                instances.read_ids,
                match.truth,
                match.grid,
                match.window,
                numbers=[numbers[mask] for mask in match.truth],
            ),
        )
        for match in matches
    ]
    return compared, evaluate.unmatched(list(pieces), truth, matches)


def _by_polygons(pieces: Pieces, polygons: Polygons) -> tuple[list[Compared], dict[str, Any]]:
    near = {piece: number for piece, number in pieces.items() if polygons.on(piece.tile.grid)}
    if not near:
        raise DataError(
            f"no plots match the polygons in {polygons.where}: plots are predicted on {next(iter(pieces)).tile.grid}; "
            "give polygons with a CRS for georeferenced imagery, and in pixels with a column image for other images"
        )
    compared = [
        Compared(
            piece,
            partial(_predicted, piece, number),
            partial(polygons.ids, piece.tile.grid, piece.tile.window),
        )
        for piece, number in near.items()
    ]
    left = [piece.tile.id for piece in pieces if piece not in near]
    missing = {"count": len(left), "names": left[: evaluate.NAMED]}
    return compared, {"prediction": missing, "truth": {"count": 0, "names": []}}


class Count:
    """Objects and boundaries of all pieces compared so far."""

    def __init__(self) -> None:
        # Numbers 0, 1, ... of ids and units, in the order in which they are first looked up.
        of_truth, of_prediction, self.units = (defaultdict[Any, int](itertools.count().__next__) for _ in range(3))
        self.names = (of_truth, of_prediction)
        self.sizes: tuple[Counter[int], Counter[int]] = (Counter(), Counter())
        self.unit_of: tuple[dict[int, int], dict[int, int]] = ({}, {})
        self.shared: Counter[tuple[int, int]] = Counter()
        self.pixels: dict[str, Counter[int]] = {name: Counter() for name in _PIXELS}

    def add(self, piece: Piece, predicted_HW: Ids, truth_HW: Ids) -> None:
        """Count the objects of a piece; pixels unknown to either side do not count."""
        known_HW = (predicted_HW != UNKNOWN) & (truth_HW != UNKNOWN)
        if not known_HW.any():
            return
        units_HW = self._units(piece)
        # Unknown pixels become background on both sides, so that objects end there.
        sides = [np.where(known_HW, ids_HW, 0) for ids_HW in (truth_HW, predicted_HW)]
        # 1. sizes, and the unit of an object's first pixel
        numbers_HW = []
        for side, ids_HW in enumerate(sides):
            values, first, inverse, counts = np.unique(
                ids_HW, return_index=True, return_inverse=True, return_counts=True
            )
            own = np.array([self.names[side][value] if value else -1 for value in values.tolist()])
            for number, at, count in zip(own.tolist(), first.tolist(), counts.tolist(), strict=True):
                if number >= 0:
                    self.sizes[side][number] += count
                    self.unit_of[side].setdefault(number, int(units_HW.flat[at]))
            numbers_HW.append(own[inverse].reshape(ids_HW.shape))
        # 2. pixels that two objects share
        both_HW = (numbers_HW[0] >= 0) & (numbers_HW[1] >= 0)
        pairs, counts = np.unique(np.stack([ids_HW[both_HW] for ids_HW in numbers_HW]), axis=1, return_counts=True)
        for one, other, count in zip(*pairs.tolist(), counts.tolist(), strict=True):
            self.shared[one, other] += count
        # 3. boundaries and covered pixels
        either_HW = (numbers_HW[0] >= 0) | (numbers_HW[1] >= 0)
        for name, of_HW in {"covered": both_HW, "either": either_HW, "known": known_HW, **_boundaries(sides)}.items():
            totals = np.bincount(units_HW[of_HW])
            self.pixels[name].update({unit: int(total) for unit, total in enumerate(totals) if total})

    def _units(self, piece: Piece) -> NDArray[np.int64]:
        """The bootstrap's unit of every pixel: the image, or the block of `BLOCK` px."""
        window = piece.tile.window
        if piece.tile.grid.crs is None:
            return np.full((window.height, window.width), self.units[piece.image])
        rows, cols = (np.arange(a, b) // BLOCK for a, b in ((window.row, window.row1), (window.col, window.col1)))
        grid = piece.tile.grid.name
        table = {(r, c): self.units[grid, r, c] for r in set(rows.tolist()) for c in set(cols.tolist())}
        return np.array([[table[r, c] for c in cols.tolist()] for r in rows.tolist()])

    def summary(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Measures of everything counted, with intervals over the units."""
        if not self.pixels["known"]:
            raise DataError("plots and reference have no pixel in common; check that they show the same place")
        # Plots over several pieces are counted once, with all of their pixels.
        pixels = [np.array([sizes[k] for k in range(len(sizes))], np.int64) for sizes in self.sizes]
        objects = Objects(
            pixels[0],
            pixels[1],
            np.array(list(self.shared), np.int64).reshape(-1, 2),
            np.array(list(self.shared.values()), np.int64),
        )
        units = tuple(np.array([of[k] for k in range(len(of))], np.int64) for of in self.unit_of)
        sums = objects.sums((units[0], units[1]), len(self.units))
        plain: dict[str, Floats] = {name: sums[name] for name in sums if name.partition(" ")[0] not in SIZES}
        for name, counted in self.pixels.items():
            plain[name] = np.array([counted[k] for k in range(len(self.units))], float)
        total = {name: int(values.sum()) for name, values in plain.items()}
        return {
            "objects": object_intervals(plain),
            "sizes": [_of_size(sums, objects.limits, k) for k in range(len(SIZES))],
            "counts": {name: total[name] for name in ("reference", "predicted", "matched")},
            "unit": "image" if all(piece.tile.grid.crs is None for piece in pieces) else "block",
            "units": len(self.units),
            "pixels": total["known"],
        }


_LINES = ("boundary reference", "boundary matched", "boundary predicted", "boundary hits")
_PIXELS = ("covered", "either", "known", *_LINES)


def _boundaries(sides: Sequence[Ids]) -> dict[str, NDArray[np.bool_]]:
    """Boundary pixels of both sides, and those within `TOLERANCE` of a boundary of the other."""
    # Inner boundaries: a line between two plots belongs to both.
    one_HW, other_HW = (find_boundaries(ids_HW, mode="inner") for ids_HW in sides)
    near_one_HW, near_other_HW = (
        ndimage.distance_transform_edt(~line_HW) <= TOLERANCE if line_HW.any() else line_HW
        for line_HW in (one_HW, other_HW)
    )
    return dict(zip(_LINES, (one_HW, one_HW & near_other_HW, other_HW, other_HW & near_one_HW), strict=True))


def _of_size(sums: Mapping[str, Floats], limits: Floats, at: int) -> dict[str, Any]:
    name = SIZES[at]
    own = {
        key.removeprefix(f"{name} "): values.sum(keepdims=True) for key, values in sums.items() if key.startswith(name)
    }
    # Sizes without objects have no measures rather than NaN, which JSON does not have.
    measures = {key: float(value[0]) for key, value in object_measures(own).items() if not np.isnan(value[0])}
    bounds = [0, *(float(limit) for limit in limits), None]
    counts = {key: int(own[key][0]) for key in ("reference", "predicted", "matched")}
    return {"name": name, "above": bounds[at], "to": bounds[at + 1], **counts, **measures}


def text(result: Mapping[str, Any]) -> str:
    """The result of `evaluate_plots` as aligned tables."""
    counts, units = result["counts"], f"{result['units']:,} {result['unit']}{'s' if result['units'] > 1 else ''}"
    lines = [
        f"{counts['predicted']:,} plots and {counts['reference']:,} reference plots in {units}, {result['pixels']:,} "
        "pixels; 95 % intervals by bootstrap over them",
        "",
        *(f"{title:<28}{evaluate.with_interval(result['objects'][name])}" for name, title in TITLES.items()),
        "",
        f"{'size':<10}{'px':<18}{'reference':>10}{'predicted':>10}{'F1':>8}{'recall':>8}{'precision':>11}",
    ]
    for row in result["sizes"]:
        span = f"up to {row['to']:,.0f}" if row["to"] is not None else f"above {row['above']:,.0f}"
        numbers = [f"{row[name]:.3f}" if name in row else "-" for name in ("f1", "recall", "precision")]
        lines.append(
            f"{row['name']:<10}{span:<18}{row['reference']:>10,}{row['predicted']:>10,}"
            f"{numbers[0]:>8}{numbers[1]:>8}{numbers[2]:>11}"
        )
    if counts["reference"] <= result["units"] < counts["predicted"]:
        lines += ["", "the reference has at most one plot per unit: if its masks hold classes, give --classes"]
    return "\n".join([*lines, *evaluate.remarks(result)])


def table(result: Mapping[str, Any]) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    """The measures as a table of a report: (title, header, rows)."""
    counts = result["counts"]
    title = f"Against {counts['reference']:,} reference plots"
    rows: list[tuple[str, ...]] = [
        (shown, evaluate.with_interval(result["objects"][name])) for name, shown in TITLES.items()
    ]
    return title, ("measure", "value (95 % interval)"), rows
