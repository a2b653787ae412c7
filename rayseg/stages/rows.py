"""What travels through the stages: one frozen record per tile, chip, scene or group of plots.

A manifest is a Parquet table of flat rows. `flow.run` turns each into a record (`from_row`), every stage returns the
record with more fields (`dataclasses.replace`), and the last stage returns a `Settled` for the ledger. Any stage may
return a `Settled` earlier. Only rows of Parquet tables stay dicts: manifests, patches and pieces.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.sources import Source, from_json

ABSENT: NDArray[Any] = np.empty(0)
"""An array that no stage has added yet, or that no later stage needs."""

_NOWHERE = Window(0, 0, 0, 0)


def _absent() -> NDArray[Any]:  # dataclasses refuse arrays as defaults
    return ABSENT


@dataclass(frozen=True, eq=False)
class TileRow:
    """A tile, its imagery, and what the stages have added.

    Attributes:
        tile: the tile.
        sources_json: its sources as JSON, first valid wins; text, because many tiles share it.
        refused: why its scene cannot be mapped; "" if it can.
        bundle: prefix of the network of its own scene; "" where one model maps all tiles.
        labels: file of the label of every superpixel; "" where a model labels pixels.
        near: (id, col, row, width, height) of the tile and of those next to it whose superpixels are known.
        scaling: JSON of the `Scaling` of its scene to 0..1; "" where the model defines it.
        before: scenes over the tile that count its ground first, as JSON; `[]` where scenes share one map.
        image: (bands, height, width) in the imagery's dtype, or (height, width, 3) uint8 RGB, over `reach`.
        valid: (height, width) bool over `reach`, where there is imagery.
        reach: window of `image` and `valid`: the tile with the halo that its patches need.
        incomplete: why a part of the tile cannot be read; "" if all of it can.
        unread: why a part of the halo cannot be read; "" if all of it can.
        inputs: what the tile was made from, as `read.inputs_of` has it; "" if unknown.
        batch: patches per batch after a lack of GPU memory; 0 if memory sufficed.
        classes: (height, width) uint8, 255 where there is no imagery.
        scores: (bands, height, width) uint8, probability x 254, 255 where there is no imagery.
        scores_file: file of an earlier map with exactly these scores; "" if there is none.
        patches: rows of `plot_joins.join_pieces` for every patch of the tile.
        pieces: rows of `plot_joins.pieces_of` for every plot in a patch's cell.
        numbers: (height, width) uint32, number of the plot at every pixel, 0 for none.
    """

    tile: Tile
    sources_json: str
    refused: str = ""
    bundle: str = ""
    labels: str = ""
    near: tuple[tuple[str, int, int, int, int], ...] = ()
    scaling: str = ""
    before: str = "[]"
    image: NDArray[Any] = field(default_factory=_absent)
    valid: NDArray[Any] = field(default_factory=_absent)
    reach: Window = _NOWHERE
    incomplete: str = ""
    unread: str = ""
    inputs: str = ""
    batch: int = 0
    bf16: bool = False
    classes: NDArray[Any] = field(default_factory=_absent)
    scores: NDArray[Any] = field(default_factory=_absent)
    scores_file: str = ""
    patches: tuple[Row, ...] = ()
    pieces: tuple[Row, ...] = ()
    numbers: NDArray[Any] = field(default_factory=_absent)

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "TileRow":
        """The record of a row of `read.tile_rows`."""
        scaling, before = row.get("scaling", ""), row.get("before", "[]")
        return cls(Tile.from_row(row), row["sources"], row.get("refused") or "", scaling=scaling, before=before)

    @property
    def sources(self) -> list[Source]:
        """The tile's imagery, first valid wins."""
        return from_json(self.sources_json)

    def settled(self, status: str = "done", facts: Mapping[str, Any] | None = None) -> Settled:
        """The tile's result: "failed" if a part of the tile cannot be read, so that a retry reads it again.

        Args:
            status: "done", "empty" or "nodata".
            facts: about the files written, None if there are none; `unread`, `inputs`, `batch` and `bf16` are added.
        """
        known = {"unread": self.unread, "inputs": self.inputs, "batch": self.batch, "bf16": self.bf16}
        added = {name: value for name, value in known.items() if value}
        whole = {**facts, **added} if facts is not None else {}
        # The files are written nevertheless: a retry replaces them.
        if self.incomplete:
            return Settled("failed", f"a part of the tile cannot be read: {self.incomplete}", whole)
        return Settled(status, facts=whole)


@dataclass(frozen=True, eq=False)
class ChipRow:
    """A chip, (size, size) px, and what the stages have added.

    Attributes:
        id: of the chip.
        listed: its row in the table of chips: flat, because pipelines list different columns.
        image: (size, size, 3) uint8 RGB.
        valid: (size, size) bool, where there is imagery.
        cam: (size, size) float32, Grad-CAM++ in 0..1.
        certainty: softmax score of the class that the map is of.
        superpixels: (size, size) int32.
        objects: (size, size) uint8, labels of an unsupervised segmentation.
        mask: (size, size), the coarse mask: 0, 1, 255 for open.
    """

    id: str
    listed: Row
    image: NDArray[Any] = field(default_factory=_absent)
    valid: NDArray[Any] = field(default_factory=_absent)
    cam: NDArray[Any] = field(default_factory=_absent)
    certainty: float = 0.0
    superpixels: NDArray[Any] = field(default_factory=_absent)
    objects: NDArray[Any] = field(default_factory=_absent)
    mask: NDArray[Any] = field(default_factory=_absent)

    @classmethod
    def from_row(cls, row: Row) -> "ChipRow":
        """The record of a row of a table of chips."""
        return cls(row["id"], row)


@dataclass(frozen=True)
class SceneRow:
    """A scene with a network of its own, or all scenes that share one.

    Attributes:
        id: of the scene.
        tiles: its tiles.
        scaling: JSON of the `Scaling` of its values to 0..1; "" before it is known.
    """

    id: str
    tiles: tuple[TileRow, ...]
    scaling: str = ""

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "SceneRow":
        """The record of a row whose tiles are JSON."""
        tiles = tuple(TileRow.from_row(tile) for tile in json.loads(row["tiles"]))
        return cls(row["id"], tiles, row.get("scaling", ""))


@dataclass(frozen=True, eq=False)
class PlotsRow:
    """A group of plots of one grid, and what the stages have added.

    Attributes:
        id: of the group.
        grid: of the plots' geometries.
        sources_json: imagery the plots may lie in, as JSON.
        numbers: of the plots; after `CutPlots` of those that can be read.
        plots: their outlines in grid pixels, WKB.
        crops: (plots, size, size, 3) uint8.
        unread: how many plots cannot be read, and why; "" if all can.
        classes: rows of number, class (value) and score (0..1).
    """

    id: str
    grid: Grid
    sources_json: str
    numbers: tuple[int, ...]
    plots: tuple[bytes, ...] = ()
    crops: NDArray[Any] = field(default_factory=_absent)
    unread: str = ""
    classes: tuple[Row, ...] = ()

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "PlotsRow":
        """The record of a row whose grid is JSON."""
        grid = Grid.from_row(json.loads(row["grid"]))
        return cls(row["id"], grid, row["sources"], tuple(row["numbers"]), tuple(row["plots"]))
