"""Compare the maps of two runs: which class became which, on how much ground."""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np

from rayseg.engine.flow import Work
from rayseg.engine.manifest import Manifest, Row
from rayseg.engine.run import Step
from rayseg.errors import ConfigError
from rayseg.geo.grid import NODATA, Grid
from rayseg.geo.region import Region
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.io.sources import Source, from_json
from rayseg.stages.compare_maps import BAND, ComparedRow, CompareMaps
from rayseg.stages.read import rows_by_grid, rows_on
from rayseg.stages.write import WriteTile
from rayseg.steps import map as mapping
from rayseg.steps.remap import failures_of, origin_of, tiles_of
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
    # A table of all pairs of values: one look-up per pixel, whatever the number of classes.
    codes = np.full((256, 256), UNCHANGED_VALUE, np.uint8)
    codes[NODATA, :] = codes[:, NODATA] = ALONE
    codes[NODATA, NODATA] = NODATA
    rows = [(UNCHANGED_VALUE, UNCHANGED, (225, 225, 225)), (ALONE, "in one map only", (150, 150, 150))]
    for code, ((old, old_name, _), (new, new_name, _)) in enumerate(pairs, ALONE + 1):
        codes[old, new] = code
        rows.append((code, f"{old_name} to {new_name}", colors[code - ALONE - 1]))
    return ClassTable(tuple(rows)), codes


def list_tiles(before: str, after: str, *, size: int) -> Manifest:
    """The rows of all tiles that one of two maps covers, with the imagery and the files of both maps.

    Raises:
        DataError: two images have one name.
    """
    old, new = ({tile.href: tile for tile in mapped_tiles(root)} for root in (before, after))
    tiles = new | old
    files = [tile.source("classes", (BAND,)) for tile in tiles.values()]
    placed = [file for file in files if file.crs is not None]
    # The tiles of an image without CRS lie on the image's own grid, in both maps.
    by_image: dict[Grid, list[Source]] = {}
    for tile, file in zip(tiles.values(), files, strict=True):
        if file.crs is None:
            by_image.setdefault(tile.tile.grid, []).append(file)

    def parts() -> Iterator[list[Row]]:
        yield from rows_by_grid(placed, None, size=size, halo=0)
        for grid, members in by_image.items():
            yield rows_on(grid, members, None, size, 0)

    rows = Manifest.of([_row(row, old, new) for row in part] for part in parts())
    rows.expect_ids()
    return rows


def _row(row: Row, old: Mapping[str, MappedTile], new: Mapping[str, MappedTile]) -> Row:
    """A row with the files of either map, and with the imagery of both, that of the later map first."""
    files = from_json(row["sources"])
    before, after = ([file for file in files if file.assets[0][0] in tiles] for tiles in (old, new))
    imagery = [source for file in after for source in new[file.assets[0][0]].sources]
    imagery += [source for file in before for source in old[file.assets[0][0]].sources]
    each_once = list({source.assets: source for source in imagery}.values())
    return row | {"sources": _text(each_once), "before": _text(before), "after": _text(after)}


def _text(sources: Sequence[Source]) -> str:
    return json.dumps([source.to_row() for source in sources])


def expect_comparable(before: str, after: str) -> None:
    """Check that both maps have a georeference, or neither has.

    Raises:
        ConfigError: only one has.
    """
    placed = {root: any(tile.tile.grid.crs for tile in mapped_tiles(root)) for root in (before, after)}
    if placed[before] != placed[after]:
        bare = before if placed[after] else after
        raise ConfigError(f"{bare} has images without georeference, the other run has none; compare runs of one kind")


def unmapped(root: str) -> str:
    """A sentence on the tiles of a run that have no map; "" if all have one."""
    failed = failures_of(root, tiles_of(root).ids.to_pylist())
    return f"{len(failed):,} tiles of {root} have no map; their ground is in one map only." if failed else ""


def compare_tiles(
    step: Step, region: Region, maps: tuple[str, str], keys: tuple[str, str], size: int, stall_seconds: float
) -> dict[str, Any]:
    """Compare all tiles; results are in tiles/<id>/, the status of each tile is in the step's ledger.

    Args:
        step: the current step.
        region: the region, for its name.
        maps: prefixes of the two runs.
        keys: of the steps that made the maps, so that a run that is made again is compared again.
        size: side of a tile in px.
        stall_seconds: timeout of one tile.
    """
    before, after = (origin_of(root) for root in maps)
    table, codes = changes_of(before.table, after.table)
    works = [
        Work(CompareMaps(codes)),
        Work(WriteTile(mapping.tiles_prefix(step), table, bands=("change",), geometry=region.geometry, model="")),
    ]
    rows = mapping.kept_manifest(step, lambda: list_tiles(*maps, size=size))
    done = mapping.through(step, rows, works, patience=stall_seconds, record=ComparedRow.from_row)
    return {"classes": table.classes, "skip": [UNCHANGED_VALUE], **done}
