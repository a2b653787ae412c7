"""Compare the maps of two runs: which class became which, on how much ground."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from rayseg.engine import run as runs
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Manifest, Row
from rayseg.engine.run import Step
from rayseg.errors import ConfigError
from rayseg.geo.grid import NODATA
from rayseg.geo.region import Region
from rayseg.io.maps import mapped_tiles
from rayseg.io.sources import Source, from_json
from rayseg.stages.compare_maps import BAND, ComparedRow, CompareMaps
from rayseg.stages.read import rows_by_grid
from rayseg.stages.write import WriteTile
from rayseg.steps import map as mapping
from rayseg.steps.remap import origin_of
from rayseg.vision.color import UNCHANGED, ClassTable, label_table

UNCHANGED_VALUE, ALONE = 0, 1
"""Classes of the comparison: the same class in both maps; mapped in one of them only."""
MOST_CLASSES = 250


def changes_of(before: ClassTable, after: ClassTable) -> tuple[ClassTable, np.ndarray]:
    """The classes of a comparison, and (256, 256) uint8: class before, class after -> class of the comparison.

    Classes are compared by their names.

    Raises:
        ConfigError: the maps have too many classes.
    """
    pairs = [(old, new) for old, new in product(before.classes, after.classes) if old[1] != new[1]]
    if len(pairs) > MOST_CLASSES:
        raise ConfigError(
            f"the maps have {len(before.names)} and {len(after.names)} classes, {len(pairs)} possible changes, "
            f"expected at most {MOST_CLASSES}; merge classes first: rayseg remap"
        )
    colors = label_table(len(pairs)).colors
    codes = np.full((256, 256), UNCHANGED_VALUE, np.uint8)
    codes[NODATA, :] = codes[:, NODATA] = ALONE
    codes[NODATA, NODATA] = NODATA
    rows = [(UNCHANGED_VALUE, UNCHANGED, (225, 225, 225)), (ALONE, "in one map only", (150, 150, 150))]
    for code, ((old, old_name, _), (new, new_name, _)) in enumerate(pairs, ALONE + 1):
        codes[old, new] = code
        rows.append((code, f"{old_name} to {new_name}", colors[code - ALONE - 1]))
    return ClassTable(tuple(rows)), codes


def name_runs(step: Step, before: str, after: str) -> dict[str, Any]:
    """Name the two runs; the value changes when one of them is made again."""
    return {root: runs.key_of(root, "predict") for root in (before, after)}


def list_tiles(before: str, after: str, *, size: int) -> Manifest:
    """The rows of all tiles that one of two maps covers, with the imagery and the files of both maps."""
    tiles = [tile for root in (after, before) for tile in mapped_tiles(root)]
    imagery = {tile.href: tile.sources for tile in tiles}
    files = [tile.source("classes", (BAND,)) for tile in tiles]

    def parts() -> Iterator[list[Row]]:
        for rows in rows_by_grid(files, None, size=size, halo=0):
            yield [row | {"maps": row["sources"], "sources": _imagery(row["sources"], imagery)} for row in rows]

    return Manifest.of(parts())


def _imagery(maps_json: str, imagery: Mapping[str, Sequence[Source]]) -> str:
    """The imagery of some tiles as JSON, that of the map after first, each scene once."""
    found = [source for file in from_json(maps_json) for source in imagery[file.assets[0][0]]]
    return json.dumps([source.to_row() for source in {source.assets: source for source in found}.values()])


def compare_tiles(
    step: Step, region: Region, named: Step, maps: tuple[str, str], size: int, stall_seconds: float
) -> dict[str, Any]:
    """Compare all tiles; results are in tiles/<id>/, the status of each tile is in the step's ledger."""
    before, after = (origin_of(root) for root in maps)
    table, codes = changes_of(before.table, after.table)
    works = [
        Work(CompareMaps(before.root, codes)),
        Work(WriteTile(mapping.tiles_prefix(step), table, bands=("change",), geometry=region.geometry, model="")),
    ]
    rows = mapping.kept_manifest(step, lambda: list_tiles(*maps, size=size))
    done = mapping.through(step, rows, works, patience=stall_seconds, record=ComparedRow.from_row)
    return {"classes": table.classes, "skip": [UNCHANGED_VALUE], **done}
