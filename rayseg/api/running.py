"""Run a pipeline: regions by name, and what `rayseg run` and `rayseg.run` have in common.

Heavy imports happen inside the functions, so that the command line starts at once.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from rayseg.errors import ConfigError, RunIncomplete, listed
from rayseg.pipelines import pipeline_of

if TYPE_CHECKING:
    from rayseg.api.results import Run
    from rayseg.config import Config
    from rayseg.engine.run import Engine
    from rayseg.engine.run import Run as RunState
    from rayseg.geo.region import Region

REGIONS = (
    "demo, a name under stac/regions, a file of polygons (GeoJSON, GeoParquet, GeoPackage, ...), "
    "west,south,east,north, catalog.json#collection, a folder of images, or a run, for its imagery and extent"
)
MOST_NAMED = 5
"""Failed rows that a message names."""


def run(
    pipeline: str,
    region: str,
    *,
    config: str | Mapping[str, Any] | None = None,
    set: Mapping[str, Any] | None = None,  # noqa: A002 - the name of the command's option
    out: str | None = None,
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
    tiles: str | None = None,
) -> "Run":
    """Run a pipeline as `rayseg run pipeline` does: the same folder, the same results; a second call resumes.

    Args:
        pipeline: gpc, agri, superpixel, landcover or al-s4gan; or predict, with `config={"model": PREFIX}`.
        region: what --region takes: demo, a file of polygons, west,south,east,north, a catalogue, a folder of images.
        config: a YAML file, a name of `rayseg config list`, or the settings that differ from the defaults.
        set: single settings by their path, for example `{"map.tile": 1024}`; they precede `config`.
        out: folder or URL of the run; by default runs/PIPELINE-REGION.
        engine: ray, or inline for this process alone.
        address: Ray cluster to join; by default RAY_ADDRESS, else a private Ray.
        tiles: process only these tiles, ids separated by commas.

    Returns:
        The finished run, as `rayseg.open` returns it.

    Raises:
        ConfigError: the pipeline, region, a setting or `out` is invalid; nothing was written.
        DataError: imagery, labels or masks cannot be used.
        RunIncomplete: tiles failed; all others are finished, and the message names the command for these.

    Example:
        >>> run = rayseg.run("gpc", region="demo", config="gpc/smoke", out="runs/demo")  # doctest: +SKIP
        >>> run.classes.plot()  # doctest: +SKIP
    """
    import json

    from rayseg.api.results import Run
    from rayseg.config import load
    from rayseg.engine.run import Engine

    path, values = (config, {}) if config is None or isinstance(config, str) else (None, config)
    overrides = [f"{key}={json.dumps(value)}" for key, value in (*values.items(), *(set or {}).items())]
    resolved = load(pipeline_of(pipeline).Config, path, overrides)
    where = out or default_out(pipeline, region)
    _, finished = execute(where, pipeline, resolved, area_of(region, tiles), Engine(engine, address))
    expect_complete(finished, where)
    return Run(where)


def default_out(pipeline: str, region: str) -> str:
    """Folder of a run that names none."""
    from rayseg.geo.grid import slug

    return f"runs/{pipeline}-{slug(region)}"


def execute(out: str, pipeline: str, config: "Config", region: "Region", engine: "Engine") -> tuple[str, "RunState"]:
    """Run a pipeline, or resume it; return its headline (path of the report and its summary), and the finished run."""
    from rayseg.engine import cluster
    from rayseg.engine.run import Run

    if engine.kind == "ray":
        # Before the check, which can take minutes: a wrong address fails at once.
        cluster.expect_reachable(engine.address)
    # The check reads catalogues and loads models, so it is called for a new run only.
    module = pipeline_of(pipeline)
    check = partial(module.check, config, region)
    with Run.open(out, pipeline=pipeline, config=config, region=region, engine=engine, check=check) as run:
        headline: str = module.run(config, run, region, run.plan)
    return headline, run


def expect_complete(run: "RunState", out: str) -> None:
    """Check that no row of a finished run failed.

    Raises:
        RunIncomplete: rows failed; the message names some of them, and the command that processes these again.
    """
    if run.troubles:
        named = [f"{step} {row} ({why})" for step, rows in run.troubles.items() for row, why in rows.items()]
        kind = "row" if len(run.troubles) > 1 else "tile"  # scenes and tiles, or the tiles of two steps
        counted = f"{len(named)} {kind}{'s' * (len(named) > 1)} failed"
        first = listed(named, most=MOST_NAMED, separator="; ")
        raise RunIncomplete(f"{counted}: {first}; fix the cause, then: rayseg retry {out}")


def region_of(text: str) -> "Region":
    """The region that --region names.

    Raises:
        ConfigError: the text names no region.
        DataError: a file that it names has no area.
    """
    from rayseg.geo.region import Region, resolve_region

    text = text.strip()
    if not text:
        raise ConfigError(f"the region is empty, expected {REGIONS}")
    if text == "demo":  # drawn on its first use, into the cache folder
        from rayseg.demo import make

        return Region("demo", catalog=make.ensure())
    return resolve_region(text)


def area_of(text: str, tiles: str | None = None) -> "Region":
    """A region or images, restricted to the tiles that --tiles names, with absolute paths.

    Folders and image files are images, everything else is a region; so is a folder with the name of a region.
    """
    from rayseg.geo.region import Region, region_names
    from rayseg.io import labels
    from rayseg.store import absolute, upath

    text = text.strip()
    # A folder named like a region, for example ./demo, must not hide the region.
    named = text == "demo" or text in region_names()
    images = text and labels.is_images(text)
    if images and not named and (upath(text) / "run.json").exists():
        area = _area_of_run(text)
    else:
        area = Region(text, images=text) if images and not named else region_of(text)
    # run.json stores the area: it has to be valid when another folder is the working folder.
    return replace(
        area,
        catalog=area.catalog and absolute(area.catalog),
        images=area.images and absolute(area.images),
        tiles=tuple(filter(None, (tile.strip() for tile in (tiles or "").split(",")))),
    )


def _area_of_run(root: str) -> "Region":
    """The imagery and the extent that a run mapped, in all of its tiles."""
    from rayseg.engine.run import read
    from rayseg.geo.region import Region
    from rayseg.store import split_location

    request = read(root)
    area = Region(**request["region"] | {"tiles": ()})
    imagery = (request["config"].get("map") or {}).get("imagery")
    if not imagery:
        return area
    catalog, collection = split_location(imagery)
    return replace(area, catalog=catalog, collection=collection or None, images=None)
