"""Imagery made larger before anything is looked for in it, as a step of a pipeline."""

from dataclasses import replace
from functools import partial
from typing import Any

from rayseg import flow, mapping
from rayseg.errors import DataError
from rayseg.flow import Row, Work
from rayseg.geo import Region
from rayseg.io import items
from rayseg.mapping import MapConfig
from rayseg.models.enlarge import EnlargeConfig
from rayseg.run import Step
from rayseg.stages.enlarge import EnlargeTiles, WriteLarger, lattice_of
from rayseg.stages.ground import ImageConfig, ReadGround, check_source
from rayseg.store import upath

MOST = 400_000_000
"""Pixels of the largest image that is kept in one piece."""


def plan(region: Region, how: EnlargeConfig, image: ImageConfig, config: MapConfig) -> list[Row]:
    """The rows of all that is to be enlarged: tiles that come out at `tile` px, images without georeference whole.

    Raises:
        RaysegError: there is no imagery, it is of another kind than configured, or an image is too large.
    """
    sources, _ = mapping.imagery(region, config)
    side = max([1, *(max(source.height, source.width) for source in sources if source.crs is None)])
    if (side * how.factor) ** 2 > MOST:
        raise DataError(
            f"an image of {region.name} without georeference is {side} px long, too much to make {how.factor} times "
            f"larger in one piece (at most {int(MOST**0.5) // how.factor}); cut it, or leave enlarge out"
        )
    size = max(config.tile // how.factor, 1 if any(source.crs for source in sources) else side)
    sized, check = config.model_copy(update={"tile": size}), partial(check_source, kind=image)
    return mapping.tiles_of(replace(region, tiles=()), sized, check, halo=lattice_of(how).patch)


def enlarge(
    step: Step, region: Region, how: EnlargeConfig | None, image: ImageConfig, config: MapConfig
) -> dict[str, Any]:
    """The imagery made larger, if it is to be, as a collection `enlarged` below the run."""
    if how is None:
        return {}
    rows = mapping.kept_manifest(step, partial(plan, region, how, image, config))
    folder, ledger = upath(step.root) / "enlarged", mapping.ledger_of(step)
    works = [
        Work(ReadGround(image, lattice_of(how))),
        Work(EnlargeTiles(how), cpus=1.0, gpus=1.0 if how.weights else 0.0, model=True),
        Work(WriteLarger(str(folder), factor=how.factor)),
    ]
    account = flow.run(rows, works, ledger, step.engine, stall_seconds=config.stall_seconds)
    made = [str(folder / record.facts["item"]) for record in ledger.read().values() if record.facts]
    items.write_collection(folder, sorted(made), title=f"{region.name}, {how.factor} times larger")
    found = {"imagery": str(folder / "collection.json"), "items": len(made)}
    return found | {"account": account.counts, "troubles": account.troubles}
