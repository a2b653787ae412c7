"""Write finished tiles to the store."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import pyarrow as pa
from upath import UPath

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo import region
from rayseg.geo.grid import NODATA, Tile
from rayseg.io import cog, maps, rasters, stac_write, vectors
from rayseg.io.remote import Passing
from rayseg.io.sources import Source, from_json
from rayseg.io.written_files import WrittenFile, write_file
from rayseg.stages.read import read_reach
from rayseg.stages.rows import TileRow
from rayseg.store import is_local, upath
from rayseg.vision.color import ClassTable


class WriteTile:
    """`tile, sources, classes, scores -> facts`: classes.tif, scores.tif, parts.parquet and, last, the item.

    Pixels outside the region become nodata; a tile without any data is settled as "nodata", a tile of background
    alone (class 0 of a binary table) as "empty". A second call writes the same bytes. A tile with an unreadable part is
    written and settled as "failed", so that a retry maps it again; unreadable pixels around a tile go to the facts as
    `unread`.

    Args:
        prefix: below which `<tile id>/` is written.
        table: the classes.
        bands: names of the score bands: one per class; or one alone, of class 1 against 0 in a binary table, of each
            pixel's own class in a larger one.
        geometry: the region, GeoJSON in EPSG:4326, or None.
        model: href of the model's item; the item of a row's own `bundle` takes precedence.
        imagery: names of the bands of the imagery, to find the ground that scenes in `before` count.
    """

    def __init__(
        self,
        prefix: str,
        table: ClassTable,
        *,
        bands: tuple[str, ...],
        geometry: dict[str, Any] | None,
        model: str,
        imagery: Sequence[str] = (),
    ) -> None:
        self.prefix, self.table, self.bands = prefix, table, bands
        self.geometry, self.model, self.imagery = geometry, model, imagery
        self._of_top = len(bands) == 1 and not table.binary

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Write each tile."""
        return [self._write(row) for row in rows]

    def _write(self, row: TileRow) -> Settled:
        # 1. the part inside the region; polygons at a seam are drawn beyond it and cut later
        tile = row.tile
        inside, drawn = region.kept(self.geometry, tile.grid, tile.window)
        classes = np.where(inside, row.classes, NODATA).astype(np.uint8)
        scores = np.where(inside, row.scores, NODATA).astype(np.uint8)
        facts = facts_of(classes, tile, counted_HW=counted_ground(tile, row.before, self.imagery))
        if not facts["counts"]:
            return row.settled("nodata")
        folder = upath(self.prefix) / tile.id
        parts = (
            self._parts(row, classes, scores)
            if drawn is None
            else self._parts(row, np.where(drawn, row.classes, NODATA).astype(np.uint8), row.scores, inside)
        )
        # 2. the files, then the item: a folder without an item is not a tile
        files = (
            cog.write_classes(folder / "classes.tif", classes, tile.grid, tile.window, self.table),
            self._scores(row, folder / "scores.tif", scores),
            vectors.write_parts(folder / "parts.parquet", parts),
        )
        model = str(upath(row.bundle) / "item.json") if row.bundle else self.model
        item = stac_write.write_tile_item(folder, tile, self.table, files=files, sources=row.sources, model=model)
        facts |= {"parts": len(parts), "item": stac_write.packed(item)}  # publishing opens none of these files again
        background = self.table.binary and set(facts["counts"]) == {"0"}
        return row.settled("empty" if background else "done", facts)

    def _scores(self, row: TileRow, path: UPath, scores: np.ndarray) -> WrittenFile:
        if row.scores_file and np.array_equal(scores, row.scores):
            return write_file(path, upath(row.scores_file).read_bytes(), cog.score_bands(self.bands))
        return cog.write_scores(path, scores, row.tile.grid, row.tile.window, self.bands)

    def _parts(self, row: TileRow, classes: np.ndarray, scores: np.ndarray, kept: np.ndarray | None = None) -> pa.Table:
        per_class = np.broadcast_to(scores, (len(self.table.classes), *classes.shape)) if self._of_top else scores
        values = self.table.values
        return vectors.polygons_of(classes, per_class, row.tile.grid, row.tile.window, values=values, kept_HW=kept)


def counted_ground(tile: Tile, before: str, bands: Sequence[str]) -> np.ndarray | None:
    """Where a tile's ground counts, because no scene that counts first has data, (height, width) bool; None for all.

    Args:
        tile: the tile.
        before: scenes over it that count its ground first, as JSON (`TileRow.before`).
        bands: names of the bands of the imagery.

    Raises:
        DataError: a scene is gone or cannot be read now, or the bands are unknown.
    """
    if before == "[]":
        return None
    window = tile.window
    counted_HW = np.ones((window.height, window.width), bool)
    for source in from_json(before):
        try:
            counted_HW &= ~rasters.read([source], tile.grid, window, bands=bands)[1]
        except DataError as error:
            # A retry can read the scene, which may have a map here.
            gone = any(is_local(href) and not upath(href).exists() for href, _ in source.assets)
            if gone or isinstance(error, Passing) or not bands:
                raise
            counted_HW &= ~_readable(tile, source, bands)
    return counted_HW


def _readable(tile: Tile, source: Source, bands: Sequence[str]) -> np.ndarray:
    """Where a damaged scene has data in a tile: it is mapped there alone."""
    with suppress(DataError):
        seen = read_reach(TileRow(tile, json.dumps([source.to_row()])), tile.window, bands)
        if isinstance(seen, TileRow):
            return seen.valid
    return np.zeros((tile.window.height, tile.window.width), bool)


def facts_of(classes_HW: np.ndarray, tile: Tile, *, counted_HW: np.ndarray | None = None) -> dict[str, Any]:
    """Pixels per class, and how often neighbouring valid pixels differ, for the ledger.

    counts: class value (text) -> pixels, nodata left out; areas: the same in square metres on the ground, if the tile
    has a CRS, of pixels that are counted; pairs: neighbouring valid pixels; changes: those of two classes.

    Args:
        classes_HW: the map.
        tile: of it.
        counted_HW: bool, where the ground is not that of another tile; None for everywhere.
    """
    # Pairs across tile borders are counted later, from few borders: see `maps.seam_score`.
    values, counts = np.unique(classes_HW[classes_HW != NODATA], return_counts=True)
    pairs = changes = 0
    for one, other in ((classes_HW[1:], classes_HW[:-1]), (classes_HW[:, 1:], classes_HW[:, :-1])):
        valid = (one != NODATA) & (other != NODATA)
        pairs += int(valid.sum())
        changes += int((valid & (one != other)).sum())
    areas = maps.class_areas(tile, classes_HW if counted_HW is None else np.where(counted_HW, classes_HW, NODATA))
    return {
        "counts": {str(v): int(c) for v, c in zip(values, counts, strict=True)},
        **({} if areas is None else {"areas": {str(value): round(area, 3) for value, area in areas.items()}}),
        "pairs": pairs,
        "changes": changes,
    }
