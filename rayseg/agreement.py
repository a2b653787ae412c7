"""Label maps without names against reference masks: adjusted mutual information, Fowlkes-Mallows, adapted Rand error.

What the reference's values mean does not matter, only which pixels share one.
"""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.errors import DataError
from rayseg.evaluation import Match, match
from rayseg.geo.grid import NODATA
from rayseg.io import masks, rasters
from rayseg.io.maps import mapped_tiles
from rayseg.io.masks import Piece
from rayseg.io.sources import Source
from rayseg.metrics import agreement
from rayseg.vision.color import label_table, rgb_of

Pairs = Counter[tuple[int, int]]
_UNSEEN = -1  # no colour's code: that of pure blue is 255


def agreement_of_run(
    root: str, truth: str, *, step: str = "predict", unlabelled: Sequence[str | int] = ()
) -> dict[str, Any]:
    """Compare the label maps of a run with masks, scene by scene.

    Args:
        root: the run.
        truth: a folder of masks or `catalog.json#collection`; masks of one band hold any values, of three any colours.
        step: the step that mapped.
        unlabelled: values or colours ("#RRGGBB") of the masks that are not counted, as nodata is not, nor 255 in masks
            of one band.

    Returns:
        JSON values: `scenes`: name -> `pixels`, `ami`, `fmi`, `are`; and `mean` of the three over the scenes.

    Raises:
        DataError: nothing matches, or no pixel is labelled in both.
    """
    tiles = mapped_tiles(root, step)
    sources, skipped = _truth(truth, unlabelled)
    counts: dict[str, Pairs] = defaultdict(Counter)
    for found in match(masks.pieces_of_tiles(tiles), sources):
        counts[found.piece.tile.grid.image or found.piece.tile.grid.name] += _pairs(found, skipped)
    scenes = {name: _measured(pairs) for name, pairs in sorted(counts.items()) if pairs}
    if not scenes:
        raise DataError(f"{truth} and the map have no labelled pixel in common: check that they show the same place")
    mean = {name: float(np.mean([scene[name] for scene in scenes.values()])) for name in ("ami", "fmi", "are")}
    return {"scenes": scenes, "mean": mean}


def expect_truth(pieces: Sequence[Piece], truth: str, *, unlabelled: Sequence[str | int] = ()) -> None:
    """Refuse, before there is a map, a truth with which it could not be compared.

    Args:
        pieces: of the map to be.
        truth: as `agreement_of_run` takes it.
        unlabelled: the same.

    Raises:
        DataError: there are no masks, one cannot be opened, none is of a piece, or one has another size than its image.
        ConfigError: a colour that is not counted is none.
    """
    sources, _ = _truth(truth, unlabelled)
    match(pieces, sources)


def _truth(truth: str, unlabelled: Sequence[str | int]) -> tuple[list[Source], set[int]]:
    """(the masks, the codes of their values or colours that are not counted)."""
    skipped = {value if isinstance(value, int) else _code(rgb_of(value)) for value in unlabelled} | {_UNSEEN}
    return masks.masks_of(truth, names=("landcover",)), skipped


def _measured(pairs: Pairs) -> dict[str, float]:
    codes, labels = (sorted({pair[side] for pair in pairs}) for side in (0, 1))
    table = np.zeros((len(codes), len(labels)), np.int64)
    for (code, label), count in pairs.items():
        table[codes.index(code), labels.index(label)] = count
    return {"pixels": int(table.sum())} | agreement(table)


def _pairs(found: Match, skipped: set[int]) -> Pairs:
    """(value in the mask, label) -> pixels."""
    labels_HW = found.piece.read(label_table(NODATA - 1))
    codes_HW = np.full(labels_HW.shape, _UNSEEN, np.int64)
    for mask in reversed(found.truth):
        bands = [name for name in mask.bands if name != "alpha"]
        image_CHW, valid_HW = rasters.read([mask], found.grid, found.window, bands=bands[:3], categorical=True)
        of_mask_HW = _code(image_CHW) if len(image_CHW) == 3 else _values(image_CHW[0])
        codes_HW = np.where(valid_HW, of_mask_HW, codes_HW)
    seen = (labels_HW != NODATA) & ~np.isin(codes_HW, list(skipped))
    both, counts = np.unique(codes_HW[seen] * (NODATA + 1) + labels_HW[seen], return_counts=True)
    keys = zip(*np.divmod(both, NODATA + 1), strict=True)
    return Counter({(int(code), int(label)): int(count) for (code, label), count in zip(keys, counts, strict=True)})


def _values(mask_HW: NDArray[Any]) -> NDArray[np.int64]:
    return np.where(mask_HW == NODATA, _UNSEEN, mask_HW.astype(np.int64))


def _code(color: Sequence[int] | NDArray[np.integer]) -> Any:  # noqa: ANN401 - a number for each pixel given
    red, green, blue = (np.asarray(part, np.int64) for part in color)
    codes = (red << 16) | (green << 8) | blue
    return int(codes) if codes.ndim == 0 else codes


def text(found: Mapping[str, Any]) -> str:
    """The measures as one sentence."""
    mean, count = found["mean"], len(found["scenes"])
    over = f" (mean of {count} scenes)" if count > 1 else ""
    return f"Against the truth{over}: AMI {mean['ami']:.3f}, FMI {mean['fmi']:.3f}, ARE {mean['are']:.3f}."
