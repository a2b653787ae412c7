"""Compare labels without names: how well two maps agree on what belongs together (AMI, FMI, ARE).

Prediction and truth are matched as in `evaluate`: by location if both are georeferenced, else by name.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import masks, rasters
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.io.masks import Piece
from rayseg.io.rasters import footprint
from rayseg.io.sources import Source
from rayseg.metrics import agreement
from rayseg.steps.evaluate import Match, failed_name, match
from rayseg.store import suffix_of, upath
from rayseg.vision.color import label_table, rgb_of

Pairs = Counter[tuple[int, int]]
_UNSEEN = -1  # outside the range of colour codes; 255 is pure blue


def agreement_of_rasters(prediction: str, truth: str) -> dict[str, Any]:
    """Compare two label maps of any values or colours, per image; georeferenced ones by place, as one.

    Args:
        prediction: a raster, a folder of rasters, `catalog.json#collection`, or a run.
        truth: the same, without runs.

    Returns:
        As `agreement_of_run`.

    Raises:
        DataError: nothing matches, no pixel is labelled in both, or no raster of a side can be read.
    """
    if (upath(prediction) / "run.json").exists():
        return agreement_of_run(prediction, truth)
    failed: dict[str, str] = {}
    ours, theirs = (_rasters_of(location, failed) for location in (prediction, truth))
    if len(ours) == len(theirs) == 1:  # two files are meant for each other, whatever their names
        theirs = [replace(theirs[0], item_id=ours[0].item_id)]
    pieces = masks.pieces_of_masks(ours, placed=any(source.crs for source in theirs))

    def pairs(matched: Match) -> Pairs:
        # Without a CRS, pixels are matched by their position in the whole image.
        piece, grid = matched.piece, matched.piece.tile.grid
        place = (grid, piece.tile.window)
        if grid.crs is None:
            pixels = masks.pixels_of(piece.source)
            place = (pixels, footprint(piece.source, pixels))
        codes_HW = _codes([piece.source], *place)
        return _code_pairs(_codes(matched.truth, matched.grid, matched.window), codes_HW)

    return _agreement(match(pieces, theirs), pairs, truth, failed)


def _rasters_of(location: str, failed: dict[str, str]) -> list[Source]:
    if upath(location).is_file() and suffix_of(location) in masks.SUFFIXES:
        return [rasters.source_of_file(location, upath(location).stem)]
    return masks.masks_of(location, failed=failed)


def _agreement(
    matches: Sequence[Match], pairs: Callable[[Match], Pairs], truth: str, failed: dict[str, str]
) -> dict[str, Any]:
    """The measures of all matches; a raster that cannot be read fails alone, as `failed` and `troubles`."""
    counts: dict[str, Pairs] = defaultdict(Counter)
    for matched in matches:
        grid = matched.piece.tile.grid
        try:
            counts[grid.image or grid.name] += pairs(matched)
        except DataError as error:
            failed[failed_name(matched, error)] = str(error)
    if failed and not any(counts.values()):
        raise DataError(next(iter(failed.values())))
    return _of_scenes(counts, truth) | ({"failed": failed, "troubles": failed} if failed else {})


def agreement_of_run(
    root: str, truth: str, *, step: str = "predict", unlabelled: Sequence[str | int] = ()
) -> dict[str, Any]:
    """Compare the label maps of a run with masks, per scene.

    Args:
        root: the run.
        truth: a folder of masks or `catalog.json#collection`; single-band masks may hold any values, three-band masks
            any colours.
        step: name of the step that made the map.
        unlabelled: values or colours ("#RRGGBB") of the masks that are excluded, in addition to nodata and to 255 in
            single-band masks.

    Returns:
        JSON values: `scenes`: name -> `pixels`, `ami`, `fmi`, `are`; and `mean` of the three over the scenes.

    Raises:
        DataError: nothing matches, or no pixel is labelled in both.
    """
    tiles = mapped_tiles(root, step)
    failed: dict[str, str] = {}
    sources, skipped = _truth(truth, unlabelled, failed)
    # A mask of 0 and 255 is a mask of two classes, unless 255 is excluded.
    sources = sources if NODATA in unlabelled else masks.two_classes(sources, None, truth, failed=failed)
    matches = match(masks.pieces_of_tiles(tiles), sources)
    return _agreement(matches, lambda matched: _pairs(*_coded(matched, skipped)), truth, failed)


def _of_scenes(counts: Mapping[str, Pairs], truth: str) -> dict[str, Any]:
    scenes = {name: _measured(pairs) for name, pairs in sorted(counts.items()) if pairs}
    if not scenes:
        raise DataError(f"{truth} and the map have no labelled pixel in common; check that they show the same place")
    mean = {name: float(np.mean([scene[name] for scene in scenes.values()])) for name in ("ami", "fmi", "are")}
    return {"scenes": scenes, "mean": mean}


def coded_parts(
    tiles: Sequence[MappedTile], truth: str, unlabelled: Sequence[str | int], *, most: int
) -> Iterator[tuple[str, NDArray[np.int64], NDArray[np.uint8]]]:
    """Of tiles with truth, evenly spread: (tile id, value of its masks or -1 for none, label or 255 for none)."""
    sources, skipped = _truth(truth, unlabelled)
    matches = match(masks.pieces_of_tiles(tiles), sources)
    for at in sorted({round(at) for at in np.linspace(0, len(matches) - 1, min(most, len(matches)))}):
        yield matches[at].piece.tile.id, *_coded(matches[at], skipped)


def agreement_of(codes_HW: NDArray[np.int64], labels_HW: NDArray[np.uint8]) -> dict[str, float]:
    """`pixels` that are known in both, `ami`, `fmi` and `are` of the labels with a mask, as `coded_parts` gives them.

    Raises:
        DataError: there is no such pixel.
    """
    return _measured(_pairs(codes_HW, labels_HW))


def expect_truth(pieces: Sequence[Piece], truth: str, *, unlabelled: Sequence[str | int] = ()) -> None:
    """Check that the truth can be compared with the map, before the map is made.

    Args:
        pieces: of the planned map.
        truth: as `agreement_of_run` takes it.
        unlabelled: the same.

    Raises:
        DataError: there are no masks, a mask cannot be opened, no mask matches a piece, or a mask and its
            image differ in size.
        ConfigError: an excluded colour is invalid.
    """
    sources, _ = _truth(truth, unlabelled)
    match(pieces, sources)


def _truth(
    truth: str, unlabelled: Sequence[str | int], failed: dict[str, str] | None = None
) -> tuple[list[Source], set[int]]:
    """(the masks, the codes of the excluded values or colours)."""
    skipped = {value if isinstance(value, int) else _code(rgb_of(value)) for value in unlabelled} | {_UNSEEN}
    return masks.masks_of(truth, names=("landcover",), failed={} if failed is None else failed), skipped


def _measured(pairs: Pairs) -> dict[str, float]:
    # Dense indices: codes of colours reach 2^24.
    codes, labels = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    table = np.zeros((len(codes), len(labels)), np.int64)
    for (code, label), count in pairs.items():
        table[codes.index(code), labels.index(label)] = count
    return {"pixels": int(table.sum())} | agreement(table)


def _coded(matched: Match, skipped: set[int]) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """(value in the mask, -1 for none; label, 255 for none) of every pixel."""
    labels_HW = matched.piece.read(label_table(NODATA - 1))
    codes_HW = _codes(matched.truth, matched.grid, matched.window)
    return np.where(np.isin(codes_HW, list(skipped)), _UNSEEN, codes_HW), labels_HW


def _codes(sources: Sequence[Source], grid: Grid, window: Window) -> NDArray[np.int64]:
    """Value or colour at every pixel of a window, -1 for none."""
    codes_HW = np.full((window.height, window.width), _UNSEEN, np.int64)
    # The preferred mask is first, so it is written last.
    for mask in reversed(sources):
        bands = [name for name in mask.bands if name != "alpha"]
        image_CHW, valid_HW = rasters.read([mask], grid, window, bands=bands[:3], categorical=True)
        if len(image_CHW) == 3:
            of_mask_HW = _code(image_CHW)
        else:  # 255 is nodata by convention
            of_mask_HW = np.where(image_CHW[0] == NODATA, _UNSEEN, image_CHW[0].astype(np.int64))
        codes_HW = np.where(valid_HW, of_mask_HW, codes_HW)
    return codes_HW


def _pairs(codes_HW: NDArray[np.int64], labels_HW: NDArray[np.uint8]) -> Pairs:
    """(value in the mask, label) -> pixels."""
    return _code_pairs(codes_HW, np.where(labels_HW == NODATA, _UNSEEN, labels_HW.astype(np.int64)))


def _code_pairs(codes_HW: NDArray[np.int64], others_HW: NDArray[np.int64]) -> Pairs:
    """(value, other value) -> pixels that have both."""
    seen = (others_HW != _UNSEEN) & (codes_HW != _UNSEEN)
    others, positions = np.unique(others_HW[seen], return_inverse=True)
    # Encode a pair in one integer: np.unique then counts the pairs in one call.
    width = max(len(others), 1)
    both, counts = np.unique(codes_HW[seen] * width + positions, return_counts=True)
    keys = zip(*np.divmod(both, width), strict=True)
    return Counter({(int(code), int(others[at])): int(count) for (code, at), count in zip(keys, counts, strict=True)})


def _code(color: Sequence[int] | NDArray[np.integer]) -> Any:  # noqa: ANN401 - a number for each pixel given
    red, green, blue = (np.asarray(part, np.int64) for part in color)
    # One number per colour, so that values and colours are counted alike.
    codes = (red << 16) | (green << 8) | blue
    return int(codes) if codes.ndim == 0 else codes


def agreement_text(scores: Mapping[str, Any]) -> str:
    """The measures as one sentence."""
    mean, count = scores["mean"], len(scores["scenes"])
    over = f" (mean of {count} scenes)" if count > 1 else ""
    measures = f"AMI {mean['ami']:.3f}, FMI {mean['fmi']:.3f}, ARE {mean['are']:.3f}"
    more = f" Not compared: {'; '.join(scores['failed'].values())}." if scores.get("failed") else ""
    return f"Against the truth{over}: {measures}; FMI and ARE reward one label for everything, AMI does not.{more}"
