"""Run a pipeline: regions by name, and what `rayseg run` and `rayseg.run` have in common.

Heavy imports happen inside the functions, so that the command line starts at once.
"""

from collections.abc import Iterable, Mapping
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
    from rayseg.engine.run import Engine

    path, values = (config, {}) if config is None or isinstance(config, str) else (None, config)
    where = out or default_out(pipeline, region)
    settings = (*values.items(), *(set or {}).items())
    return _finished(where, pipeline, path, settings, area_of(region, tiles), Engine(engine, address))


def remap(
    run: "str | Run",
    *,
    out: str,
    set: Mapping[str, Any],  # noqa: A002
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
) -> "Run":
    """Make a new map from the scores of a finished run, as `rayseg remap` does; no model runs.

    Args:
        run: a finished run, or its folder or URL.
        out: folder or URL of the new run.
        set: what changes: `threshold`, `classes.merge`, `classes.drop`, `inside`, `polygons.min_area`, ...
        engine: ray, or inline for this process alone.
        address: Ray cluster to join.

    Returns:
        The new run.

    Raises:
        ConfigError: `run` has no map of classes and scores, a setting is invalid, or nothing is to change.
        RunIncomplete: see `rayseg.run`.

    Example:
        >>> rayseg.remap("runs/demo", set={"threshold": 0.9}, out="runs/sure").polygons  # doctest: +SKIP
    """
    return _derived("remap", (run,), out, set, engine, address)


def correct(
    run: "str | Run",
    *,
    out: str,
    clicks: str | None = None,
    train: bool = False,
    set: Mapping[str, Any] | None = None,  # noqa: A002
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
) -> "Run":
    """Make a new map that follows clicks where the old one is wrong, as `rayseg correct` does.

    Args:
        run: the finished run, or its folder or URL; it is only read.
        out: folder or URL of the new run.
        clicks: file of points and short lines with a property `class`; by default those that `rayseg view` kept.
        train: fine-tune the model on the corrected map, too, in a run `<out>-trained`, which is returned.
        set: settings that differ from the defaults, for example `{"head.reach": 0.5}`.
        engine: ray, or inline for this process alone.
        address: Ray cluster to join.

    Returns:
        The new run; `models/segmenter` below it is the corrected model.

    Raises:
        ConfigError: no single model made the map, a click is of another run or class, or a setting is invalid.
        DataError: there are no clicks, or one is not on the map.
        RunIncomplete: see `rayseg.run`.

    Example:
        >>> rayseg.correct("runs/demo", clicks="wrong.geojson", out="runs/right").classes  # doctest: +SKIP
    """
    values = {**(set or {}), **({"clicks": clicks} if clicks else {})}
    new = _derived("correct", (run,), out, values, engine, address)
    return _derived("train", (new,), f"{out.rstrip('/')}-trained", None, engine, address) if train else new


def refresh(
    run: "str | Run",
    *,
    out: str,
    set: Mapping[str, Any] | None = None,  # noqa: A002
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
) -> "Run":
    """Map a run's region again, as `rayseg refresh` does; tiles of unchanged imagery and model are copied.

    Args:
        run: a finished run, or its folder or URL.
        out: folder or URL of the new run.
        set: settings that differ, for example `{"map.imagery": CATALOGUE}` or `{"model": PREFIX}`.
        engine: ray, or inline for this process alone.
        address: Ray cluster to join.

    Returns:
        The new run.

    Raises:
        ConfigError: `run` has no map by a single model, or a setting is invalid.
        RunIncomplete: see `rayseg.run`.

    Example:
        >>> rayseg.refresh("runs/2025", set={"map.imagery": "2026/catalog.json"}, out="runs/2026")  # doctest: +SKIP
    """
    return _derived("refresh", (run,), out, set, engine, address)


def diff(
    before: "str | Run",
    after: "str | Run",
    *,
    out: str,
    set: Mapping[str, Any] | None = None,  # noqa: A002
    engine: Literal["ray", "inline"] = "ray",
    address: str | None = None,
) -> "Run":
    """Compare the maps of two runs, as `rayseg diff` does: which class became which.

    Args:
        before: the earlier run, or its folder or URL.
        after: the run that it is compared with.
        out: folder or URL of the comparison, a run whose classes and polygons are the changes.
        set: settings that differ from the defaults.
        engine: ray, or inline for this process alone.
        address: Ray cluster to join.

    Returns:
        The comparison.

    Raises:
        ConfigError: a run has no map of classes, the two cannot be compared, or a setting is invalid.
        RunIncomplete: see `rayseg.run`.

    Example:
        >>> rayseg.diff("runs/2025", "runs/2026", out="runs/changes").polygons  # doctest: +SKIP
    """
    return _derived("diff", (before, after), out, set, engine, address)


def _derived(
    command: str,
    runs: "tuple[str | Run, ...]",
    out: str,
    values: Mapping[str, Any] | None,
    engine: Literal["ray", "inline"],
    address: str | None,
) -> "Run":
    from rayseg.api.results import Run
    from rayseg.engine.run import Engine

    roots = [run.root if isinstance(run, Run) else str(run) for run in runs]
    pipeline, settings, region = derived(command, out, *roots)
    return _finished(out, pipeline, None, (*settings.items(), *(values or {}).items()), region, Engine(engine, address))


def derived(command: str, out: str, *roots: str) -> "tuple[str, dict[str, Any], Region]":
    """(pipeline, settings, region) of a command that makes a run from others.

    Args:
        command: remap, refresh, diff; correct, with the clicks that the server keeps next to the run; or train, which
            fine-tunes the model of a corrected run.
        out: prefix of the new run.
        roots: prefixes of the runs.

    Raises:
        ConfigError: a root is not a run that the command can read, or `out` lies in one.
    """
    from rayseg.geo.region import Region
    from rayseg.steps import remap as source

    source.expect_apart(out, *roots)
    region = source.region_of(roots[-1])
    if command == "diff":
        return "diff", {"before": roots[0], "after": roots[1]}, Region(region.name)
    if command == "refresh":
        return "predict", source.map_settings(roots[0]), region
    if command == "train":
        from rayseg.steps.fine_tune import training_of

        return "landcover", training_of(roots[0]), area_of(roots[0])
    if command == "correct":
        from rayseg.io.clicks import beside

        kept = source.map_settings(roots[0])
        settings = {"clicks": beside(roots[0]), "map": kept["map"], "polygons": kept["polygons"]}
        return "correct", {"run": roots[0]} | settings, region
    polygons = {f"polygons.{key}": value for key, value in source.polygons_of(roots[0]).items()}
    return "remap", {"run": roots[0]} | polygons, region


def _finished(
    out: str, pipeline: str, config: str | None, settings: Iterable[tuple[str, Any]], region: "Region", engine: "Engine"
) -> "Run":
    import json

    from rayseg.api.results import Run
    from rayseg.config import load

    resolved = load(pipeline_of(pipeline).Config, config, [f"{key}={json.dumps(value)}" for key, value in settings])
    _, finished = execute(out, pipeline, resolved, region, engine)
    expect_complete(finished, out)
    return Run(out)


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
