"""The polygons of a class raster, or of all tiles of a run, in one file; `io/vectors` joins them across tiles."""

import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from rayseg.engine.ledger import Ledger
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import NODATA, Tile, Window
from rayseg.io import export, seams
from rayseg.io.cog import read_bands
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.io.masks import table_of
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.rasters import read
from rayseg.io.sources import source_of_file
from rayseg.io.tables import concurrently
from rayseg.io.vectors import join_parts, polygons_of, read_parts, tile_order, write_geojson, write_joined
from rayseg.store import upath
from rayseg.vision.color import ClassTable

_BLOCK = 2048
_UNNAMED = ClassTable(((0, "0", (0, 0, 0)),))


def polygonize(raster: str, out: str) -> int:
    """Write the polygons of a class raster, or of all tiles of a run, in a format of `export.DRIVERS` or as GeoParquet.

    A raster of unnamed or of two classes has no polygons of class 0.

    Returns:
        How many polygons there are.

    Raises:
        ConfigError: `out` ends otherwise.
        DataError: `raster` is neither, or has no single band of uint8.
    """
    target = upath(out)
    kinds = {suffix: kind for kind, (_, suffix) in export.DRIVERS.items()} | {".parquet": "parquet"}
    if target.suffix.lower() not in kinds:
        raise ConfigError(f"{out} ends in {target.suffix or 'nothing'}, expected {', '.join(sorted(kinds))}")
    parts, table, begins = _parts_of_run(raster) if upath(raster).is_dir() else _parts_of_raster(raster)
    kind = kinds[target.suffix.lower()]
    if kind == "parquet":
        return write_joined(parts, table, target, begins)[0]
    if kind == "geojson":
        frame = join_parts(parts, table, begins)
        write_geojson(frame, target)
        return len(frame)
    with tempfile.TemporaryDirectory() as scratch:
        plain = upath(scratch) / f"{target.stem}.parquet"
        count, _ = write_joined(parts, table, plain, begins)
        export.write_vectors(plain, target.parent, kind)
    return count


def _parts_of_run(root: str) -> tuple[Iterable[pa.Table], ClassTable, seams.Begins]:
    """The parts that a run left of its generalized map or of its tiles, or else those of its class maps."""
    tiles = mapped_tiles(root)
    begins = seams.begins_of(mapped.tile for mapped in tiles)
    table = (table_of(tiles[0].href) if tiles else None) or _UNNAMED
    grids, generalized = {mapped.tile.id: mapped.tile.grid for mapped in tiles}, upath(root) / "steps" / "generalize"
    # The polygons of a generalized map are drawn by blocks; of other maps by tiles, or not at all.
    blocks = [
        (tile_order(grids[record.id], row, col), f"{generalized}/blocks/{name}.parquet")
        for record in Ledger(str(generalized / "ledger")).read().values()
        for name, (row, col, _) in record.facts.get("blocks", {}).items()
    ]
    if blocks:
        return concurrently(read_parts, [path for _, path in sorted(blocks)]), table, begins

    def parts_of(mapped: MappedTile) -> pa.Table:
        path = upath(mapped.href).parent / "parts.parquet"
        if path.exists():
            return read_parts(path)
        return polygons_of(read_bands(mapped.href)[0], None, mapped.tile.grid, mapped.tile.window)

    ordered = sorted(tiles, key=lambda one: tile_order(one.tile.grid, one.tile.window.row, one.tile.window.col))
    return concurrently(parts_of, ordered), table, begins


def _parts_of_raster(path: str) -> tuple[Iterable[pa.Table], ClassTable, seams.Begins]:
    source = source_of_file(path, upath(path).stem)
    if len(source.bands) != 1 or source.dtype != "uint8":
        found = f"{len(source.bands)} bands of {source.dtype}"
        raise DataError(f"{path} is not a class raster: one band of uint8 was expected, {found} found")
    table = table_of(path)
    skip = (0,) if table is None or table.binary else ()
    [(grid, _)] = grids_of([source])
    extent = footprint(source, grid)

    def parts_of(window: Window) -> pa.Table:
        classes, valid = read([source], grid, window, bands=source.bands, categorical=True)
        return polygons_of(np.where(valid, classes[0], NODATA), None, grid, window, skip=skip)

    # Blocks as tiles: memory does not grow with the raster.
    blocks = (
        Window(col, row, _BLOCK, _BLOCK).intersect(extent)
        for row in range(extent.row, extent.row1, _BLOCK)
        for col in range(extent.col, extent.col1, _BLOCK)
    )
    return map(parts_of, blocks), table or _UNNAMED, seams.begins_of([Tile("", grid, extent)])
