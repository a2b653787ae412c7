"""Make the map that people take away: no units below a minimum area, polygons with simple outlines.

classes.tif of a tile stays as it was predicted; sieved.tif next to it and the polygons have the minimum mapping unit.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, Any

from pydantic import Field

from rayseg.config import Config
from rayseg.engine.flow import Work
from rayseg.engine.manifest import Manifest, Row, in_parts
from rayseg.engine.run import Run, Step
from rayseg.errors import ConfigError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.geo.region import Region
from rayseg.io import maps
from rayseg.stages.generalize import BLOCK, Generalize, GeneralRow, around, blocks_of, pixel_area, with_margin
from rayseg.steps import map as mapping

PATIENCE = 1800.0
"""Timeout in seconds of one tile."""
MOST_PIXELS = 340**2
"""Largest minimum mapping unit in px: a tile is read with a margin of 2,042 px around its block for it."""


class PolygonsConfig(Config):
    """Settings of the polygons; with both at null, polygons follow the pixels of the map as it was predicted."""

    min_area: Annotated[float, Field(gt=0)] | None = 25.0
    """Minimum mapping unit in m2 (px without CRS): smaller units and holes take the class around them; or null."""
    simplify: Annotated[float, Field(gt=0)] | None = 1.5
    """Tolerance of outlines in m (px without CRS); common outlines of neighbours stay common; or null."""


def generalized(run: Run, predicted: Step, config: PolygonsConfig, region: Region) -> Step:
    """The step whose tiles have the polygons to join: `predicted` itself if the settings leave its map as it is.

    Args:
        run: the run.
        predicted: the step that mapped the region.
        config: settings.
        region: the region.
    """
    if config.min_area is None and config.simplify is None:
        return predicted
    return run.step("generalize", generalize, predicted, config, region)


def expect_small(tiles: Iterable[Row], config: PolygonsConfig) -> None:
    """Refuse a minimum mapping unit of so many pixels that a tile's margin would fill the memory.

    Args:
        tiles: rows of the planned tiles; the first of each CRS and resolution is looked at.
        config: settings.

    Raises:
        ConfigError: `min_area` has more than `MOST_PIXELS` pixels of a tile.
    """
    if config.min_area is None:
        return
    # Tiles of one grid have pixels of one size, so one of each kind is enough.
    first: dict[tuple[Any, ...], Row] = {}
    for row in tiles:
        if not row.get("refused"):
            first.setdefault((row["crs"], row["xres"], row["yres"]), row)
    for tile in map(Tile.from_row, first.values()):
        area = pixel_area(tile.grid, tile.window.row // BLOCK, tile.window.col // BLOCK)
        if config.min_area > MOST_PIXELS * area:
            unit = "m2" if tile.grid.crs else "px"
            raise ConfigError(
                f"polygons.min_area is {config.min_area:.10g} {unit}, {config.min_area / area:,.0f} px of tile "
                f"{tile.id}, expected at most {MOST_PIXELS:,} px ({MOST_PIXELS * area:.6g} {unit}); lower it"
            )


def generalize(step: Step, predicted: Step, config: PolygonsConfig, region: Region) -> dict[str, Any]:
    """Sieve the map of every tile and draw its polygons; see `Generalize`.

    Args:
        step: the current step.
        predicted: the step that mapped the region.
        config: settings.
        region: the region.
    """
    tiles = maps.mapped_tiles(predicted.root, predicted.name)
    rows = mapping.kept_manifest(step, lambda: Manifest.of(in_parts(_rows(tiles, config.min_area))))
    kept: dict[str, Any] = {
        name: predicted.value[name] for name in ("bundle", "classes", "skip") if name in predicted.value
    }
    if not tiles:
        return kept
    # A step of its own: another minimum area does not predict again.
    stage = Generalize(
        mapping.tiles_prefix(step),
        str(step.prefix / "blocks"),
        mapping.table_of(predicted),
        bands=maps.bands_of(tiles[0], "scores"),
        min_area=config.min_area,
        simplify=config.simplify,
        geometry=region.geometry,
    )
    done = mapping.through(step, rows, [Work(stage)], patience=PATIENCE, record=GeneralRow.from_row)
    return {**kept, **done}


def _rows(tiles: Sequence[maps.MappedTile], min_area: float | None) -> Iterator[Row]:
    """The row of every tile: each block goes to the first tile that it meets."""
    # 1. the tiles of every block of a grid
    meeting: dict[tuple[Grid, int, int], list[Tile]] = defaultdict(list)
    for mapped in tiles:
        for block in blocks_of(mapped.tile.window):
            meeting[mapped.tile.grid, *block].append(mapped.tile)
    # 2. rows with what lies within the margin of their tile and blocks
    for mapped in tiles:
        tile = mapped.tile
        own = [at for at in blocks_of(tile.window) if meeting[tile.grid, *at][0].id == tile.id]
        row = GeneralRow(tile, tuple(Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK) for row, col in own), ())
        reach = with_margin(tile.grid, around(row), min_area)
        near = {
            other.id: (other.id, other.window.col, other.window.row, other.window.width, other.window.height)
            for at in blocks_of(reach)
            for other in meeting.get((tile.grid, *at), ())
            if not other.window.intersect(reach).empty
        }
        yield GeneralRow(tile, row.blocks, tuple(near.values())).to_row()
