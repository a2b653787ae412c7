"""The map of an earlier run, decided again from the scores that it kept."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from scipy.ndimage import distance_transform_edt

from rayseg.errors import DataError
from rayseg.geo import region
from rayseg.geo.grid import NODATA
from rayseg.io.cog import read_bands
from rayseg.stages.predict import above
from rayseg.stages.rows import TileRow
from rayseg.store import upath
from rayseg.vision.color import ClassTable


@dataclass(frozen=True)
class Decision:
    """How classes follow from the classes and scores of an earlier map.

    Attributes:
        table: the classes of the earlier map.
        threshold: probability above which a pixel of a binary map gets class 1; None keeps the classes.
        merged: value -> value of the class that takes its pixels.
        dropped: values whose pixels get the likeliest of the classes that are left, merged ones with their sums.
        renumbered: value of a class that is left -> its value in the new map.
    """

    table: ClassTable
    threshold: float | None = None
    merged: Mapping[int, int] = field(default_factory=dict)
    dropped: tuple[int, ...] = ()
    renumbered: Mapping[int, int] = field(default_factory=dict)

    @property
    def left(self) -> ClassTable:
        """The classes of the new map."""
        rows = [row for row in self.table.classes if row[0] in self._kept]
        return replace(self.table, classes=tuple((self.renumbered.get(v, v), name, color) for v, name, color in rows))

    @property
    def _kept(self) -> list[int]:
        return [value for value in self.table.values if value not in {*self.merged, *self.dropped}]

    def apply(self, classes_HW: np.ndarray, scores_CHW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Decide again; a merged class has the sum of its members' scores.

        Args:
            classes_HW: (height, width) uint8, 255 for nodata.
            scores_CHW: (bands, height, width) uint8, probability x 254, 255 for nodata; a band per class, or one.

        Returns:
            (classes, scores) in the same form; of several bands those of the remaining classes.
        """
        valid_HW = classes_HW != NODATA
        if self.threshold is not None:
            classes_HW = np.where(valid_HW, above(scores_CHW[0], self.threshold), NODATA).astype(np.uint8)
        if len(scores_CHW) == 1 and not self.dropped:
            return self._renamed(classes_HW), scores_CHW
        bands = {value: scores_CHW[index].astype(np.int16) for index, (value, _, _) in enumerate(self.table.classes)}
        for member, target in self.merged.items():
            bands[target] = bands[target] + bands[member]
        left = np.stack([np.minimum(bands[value], NODATA - 1) for value in self._kept])
        likeliest_HW = np.array(self._kept)[left.argmax(axis=0)]
        classes_HW = np.where(np.isin(classes_HW, self.dropped), likeliest_HW, classes_HW).astype(np.uint8)
        return self._renamed(classes_HW), np.where(valid_HW, left, NODATA).astype(np.uint8)

    def _renamed(self, classes_HW: np.ndarray) -> np.ndarray:
        targets = np.arange(256, dtype=np.uint8)
        for value in self.table.values:
            kept = self.merged.get(value, value)
            targets[value] = self.renumbered.get(kept, kept)
        renamed: np.ndarray = targets[classes_HW]
        return renamed


class Reclassify:
    """`tile -> classes, scores`: read a tile's map from an earlier run, and decide again.

    Args:
        prefix: below which the earlier run has `<tile id>/`.
        decision: how the new classes follow.
        geometry: the earlier run's region, GeoJSON in EPSG:4326, or None.
        failed: id -> reason, of tiles that have no map there.
    """

    def __init__(
        self, prefix: str, decision: Decision, *, geometry: dict[str, Any] | None, failed: Mapping[str, str]
    ) -> None:
        self.prefix, self.decision, self.geometry, self.failed = prefix, decision, geometry, failed

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Decide each tile again.

        Raises:
            DataError: a tile has no map, or its files cannot be read.
        """
        return [self._tile(row) for row in rows]

    def _tile(self, row: TileRow) -> TileRow:
        if reason := self.failed.get(row.tile.id):
            raise DataError(reason)
        folder = upath(self.prefix) / row.tile.id
        classes_HW, scores_CHW = read_bands(folder / "classes.tif")[0], read_bands(folder / "scores.tif")
        inside_HW, drawn_HW = region.kept(self.geometry, row.tile.grid, row.tile.window)
        if drawn_HW is not None:
            # Pixels that a seam between zones cuts are not in the files; polygons are drawn over them and cut.
            rows_HW, cols_HW = distance_transform_edt(~inside_HW, return_distances=False, return_indices=True)
            at = np.where(drawn_HW & ~inside_HW, [rows_HW, cols_HW], np.indices(inside_HW.shape))
            classes_HW, scores_CHW = classes_HW[at[0], at[1]], scores_CHW[:, at[0], at[1]]
        classes_HW, decided_CHW = self.decision.apply(classes_HW, scores_CHW)
        # Scores that stay are copied and not encoded again, which takes longer than all else.
        same = drawn_HW is None and decided_CHW is scores_CHW
        file = str(folder / "scores.tif") if same else ""
        return replace(row, classes=classes_HW, scores=decided_CHW, scores_file=file)
