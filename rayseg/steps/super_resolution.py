"""Super-resolution of the imagery before mapping, as a step of a pipeline."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from rayseg.engine.flow import Work
from rayseg.engine.manifest import Manifest, Row
from rayseg.engine.run import Step
from rayseg.errors import DataError
from rayseg.geo.grid import Tile
from rayseg.geo.region import Region
from rayseg.io import stac_write
from rayseg.io.sources import Source, from_json
from rayseg.models.super_resolution import EnlargeConfig
from rayseg.stages.enlarge import BANDS, EnlargeTiles, WriteLarger, larger, lattice_of
from rayseg.stages.read import tile_rows
from rayseg.stages.to_rgb import ImageConfig, ReadGround, check_source
from rayseg.steps import map as mapping
from rayseg.steps.map import MapConfig
from rayseg.store import upath

MOST = 400_000_000
"""Maximum number of pixels of an image that is enlarged in one piece."""


def tiles_to_enlarge(
    region: Region, how: EnlargeConfig, image: ImageConfig, config: MapConfig, *, halo: int
) -> tuple[Sequence[Row], Sequence[Row]]:
    """Plan the enlarging: (rows to enlarge, rows of the tiles of the enlarged imagery).

    Input tiles are sized so that the output has `tile` px; images without georeference are enlarged whole. If the
    region names tiles of the enlarged imagery, only the input of these tiles and `halo` px around them is enlarged. The
    sources of a tile are the enlarged images, which do not exist yet.

    Raises:
        RaysegError: there is no imagery, its kind differs from the configuration, an image is too large, or a requested
            tile does not exist.
    """
    # 1. the size of the tiles that become tiles of `config.tile` px
    sources, _ = mapping.imagery(region, config)
    side = max([1, *(max(source.height, source.width) for source in sources if source.crs is None)])
    if (side * how.factor) ** 2 > MOST:
        raise DataError(
            f"an image of {region.name} without georeference is {side} px long, too much to make {how.factor} times "
            f"larger in one piece (at most {int(MOST**0.5) // how.factor}); cut it, or leave enlarge out"
        )
    size = max(config.tile // how.factor, 1 if any(source.crs for source in sources) else side)
    # 2. what is enlarged, and the tiles of the result, which exist only as rows so far
    sized, check = config.model_copy(update={"tile": size}), partial(check_source, kind=image)
    rows = mapping.tiles_of(replace(region, tiles=()), sized, check, halo=lattice_of(how).patch)
    kept = [row for row in rows if not row["refused"]]
    coming = [_source(larger(Tile.from_row(row), how.factor)) for row in kept]
    tiles = Manifest.of([tile_rows(coming, region.geometry, size=config.tile, halo=halo)])
    if not region.tiles:
        return rows, tiles
    tiles = mapping.requested_tiles(tiles, region, size=config.tile)
    # 3. only what the named tiles need
    needed = {source.item_id for tile in tiles for source in from_json(tile["sources"])}
    return [row for row, source in zip(kept, coming, strict=True) if source.item_id in needed], tiles


def _source(tile: Tile) -> Source:
    """The enlarged image of a tile, as a source."""
    affine, window = tuple(tile.grid.transform(tile.window))[:6], tile.window
    return Source(tile.id, ((f"{tile.id}.tif", BANDS),), tile.grid.crs, affine, window.height, window.width, "uint8")


def enlarge(
    step: Step,
    region: Region,
    how: EnlargeConfig | None,
    image: ImageConfig,
    config: MapConfig,
    halo: int,
    *,
    tiles: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """Enlarge the imagery and write the collection `enlarged` in the run; do nothing if `how` is None.

    Args:
        step: the current step.
        region: the region to map.
        how: the network; None disables enlarging.
        image: kind of the imagery.
        config: location of the imagery and tile size.
        halo: px around a tile of the enlarged imagery that are read with it.
        tiles: rows to enlarge, if they are already planned.

    Returns:
        `imagery`: path of the collection; `items`: number of items; see `map.through`.
    """
    if how is None:
        return {}
    rows = mapping.kept_manifest(
        step, lambda: tiles_to_enlarge(region, how, image, config, halo=halo)[0] if tiles is None else tiles
    )
    folder = upath(step.root) / "enlarged"
    works = [
        Work(ReadGround(image, lattice_of(how))),
        Work(EnlargeTiles(how), cpus=1.0, gpus=1.0 if how.weights else 0.0, model=True),
        Work(WriteLarger(str(folder), factor=how.factor)),
    ]
    account = mapping.through(step, rows, works, patience=config.stall_seconds)
    # Rows without data wrote no item.
    items = [str(folder / record.facts["item"]) for record in mapping.ledger_of(step).read().values() if record.facts]
    stac_write.write_collection(
        folder, stac_write.read_items(sorted(items)), title=f"{region.name}, {how.factor} times larger"
    )
    return {"imagery": str(folder / "collection.json"), "items": len(items), **account}
