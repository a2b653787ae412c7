"""Make a new map from the classes and scores that a finished run kept, without its model and its imagery."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from shapely.geometry import mapping as geojson
from shapely.geometry import shape

from rayseg.config import Config
from rayseg.engine import run as runs
from rayseg.engine.flow import Work
from rayseg.engine.ledger import SETTLED, Fate, Fates, Ledger
from rayseg.engine.manifest import PART, Manifest, Row, read_rows
from rayseg.engine.run import Step
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import Lattice
from rayseg.geo.region import Region, resolve_region
from rayseg.io import masks
from rayseg.io.maps import bands_of, mapped_tiles
from rayseg.io.stac_write import lonlat_outline
from rayseg.stages.propose import ProposePlots
from rayseg.stages.reclassify import Decision, Reclassify
from rayseg.stages.refine import Refine
from rayseg.stages.to_rgb import ImageConfig, ReadGround
from rayseg.stages.write import WriteTile
from rayseg.steps import map as mapping
from rayseg.steps.scenes import mapped_before
from rayseg.store import absolute, upath
from rayseg.vision.color import ClassTable
from rayseg.vision.proposals import SuperpixelProposer
from rayseg.vision.rounds import Round, RoundsConfig


class ClassRules(Config):
    """Which classes become one, and which are left out."""

    merge: dict[str, tuple[str, ...]] = Field(default_factory=dict)
    """Name of the new class -> the classes that it takes; it has the value and the colour of the first."""
    drop: tuple[str, ...] = ()
    """Classes that are left out: their pixels get the likeliest of the others."""


class RefineConfig(Config):
    """Segments of the imagery, each of which gets one class: that of its mean scores."""

    proposer: Literal["sam", "felzenszwalb"] = "felzenszwalb"
    """Segment Anything, or superpixels, which need no weights."""
    sam: dict[str, Any] = Field(default_factory=dict)
    """Settings of Segment Anything, as `sam` of agri."""
    superpixels: SuperpixelProposer = SuperpixelProposer(scales=(30.0, 60.0, 150.0), reduce=1, least=60, contrast=0.2)
    """Settings of the superpixels."""
    image: ImageConfig = ImageConfig()
    """Bands and values of the imagery."""
    patch: Annotated[int, Field(gt=0)] = 1152
    """Side in px of the window in which segments are found."""
    stride: Annotated[int, Field(gt=0)] = 1024
    """Side in px of the cells of these windows; a divisor of the run's `map.tile`, so that tiles do not matter."""

    @model_validator(mode="after")
    def _whole_cells(self) -> "RefineConfig":
        if self.stride >= self.patch or (self.patch - self.stride) % 2:
            raise ValueError(f"patch {self.patch} must be above stride {self.stride} by an even number")
        return self


@dataclass(frozen=True)
class Origin:
    """The map that another one is made from.

    Attributes:
        root: prefix of its run.
        table: its classes.
        bands: names of its score bands.
        model: href of the model's item; "" if there is none.
        imagery: names of the imagery's bands, if scenes of the run share ground; () if they share one map.
    """

    root: str
    table: ClassTable
    bands: tuple[str, ...]
    model: str
    imagery: tuple[str, ...] = ()


def region_of(root: str) -> Region:
    """The region of a run."""
    values = runs.read(root)["region"]
    return Region(**values | {"tiles": tuple(values["tiles"])})


def polygons_of(root: str) -> dict[str, Any]:
    """The settings of a run's polygons; earlier runs have polygons that follow the pixels."""
    content = runs.read(root)
    old = {"min_area": None, "simplify": None}
    return dict(content["config"].get("polygons", {} if "generalize" in content.get("steps", {}) else old))


def map_settings(root: str) -> dict[str, Any]:
    """The settings of `rayseg predict` that map a run's region again with its model, and take its tiles over.

    Raises:
        ConfigError: `root` is not a run, or no model made its map.
    """
    content = runs.read(root)
    bundle = content.get("steps", {}).get(mapping.SCORED, {}).get("bundle")
    if not bundle or content["pipeline"] not in {"predict", "gpc", "landcover", "al-s4gan", "correct"}:
        raise ConfigError(
            f"run {root} of {content['pipeline']}, {content['status']}, has no map by a single model; give a finished "
            "run of gpc, landcover, al-s4gan, predict or correct"
        )
    return {"model": bundle, "map": content["config"]["map"], "polygons": polygons_of(root), "earlier": root}


def origin_of(root: str) -> Origin:
    """The map of a finished run.

    Raises:
        ConfigError: `root` is not a run, has not finished, or has no map of classes.
    """
    content, status = runs.read(root), runs.status(root)["status"]
    if status not in {"done", "incomplete"}:
        raise ConfigError(f"run {root} is {status}, expected a finished run; finish it by its own command first")
    tiles = mapped_tiles(root) if content["pipeline"] != "agri" else []
    table = masks.table_of(tiles[0].href) if tiles else None
    if table is None:
        raise ConfigError(
            f"run {root} of {content['pipeline']} has no tile with classes and scores, expected a map of classes; "
            "name another run"
        )
    bundle = content["steps"][mapping.SCORED].get("bundle")
    model = str(upath(bundle) / "item.json") if bundle else ""
    return Origin(root, table, bands_of(tiles[0], "scores"), model, imagery_of(content))


def imagery_of(content: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the bands of a run's imagery, of its run.json; () if its scenes share one map."""
    steps = content.get("steps", {})
    # A run that was made from another one keeps the names.
    return tuple(steps.get(mapping.SCORED, {}).get("imagery") or steps.get("scenes", {}).get("bands", ()))


def decision_of(origin: Origin, rules: ClassRules, threshold: float | None) -> Decision:
    """How the new classes follow from the map.

    Raises:
        ConfigError: a class is unknown or named twice, fewer than two remain, or the scores do not suffice.
    """
    names, values = origin.table.names, {name: value for value, name, _ in origin.table.classes}
    members = [name for group in rules.merge.values() for name in group]
    asked = [*members, *rules.drop]
    if unknown := sorted(set(asked) - set(names)):
        raise ConfigError(f"classes {listed(unknown)} are not in {origin.root}, its classes are {listed(names)}")
    if twice := sorted({name for name in asked if asked.count(name) > 1}):
        raise ConfigError(f"classes names {listed(twice)} twice, expected every class once; correct merge and drop")
    if short := [name for name, group in rules.merge.items() if len(group) < 2]:
        raise ConfigError(f"classes.merge has one class for {listed(short)}, expected two or more; correct it")
    binary = len(origin.bands) == 1 and origin.table.binary
    if threshold is not None and not binary:
        raise ConfigError(
            f"threshold is for maps with one score band, of one class against a background; {origin.root} has the "
            f"bands {listed(origin.bands)}; leave it out"
        )
    if rules.drop and len(origin.bands) < len(names):
        raise ConfigError(
            f"{origin.root} has one score band ({origin.bands[0]}), expected one per class to know the likeliest other "
            f"class of the pixels of {listed(rules.drop)}; leave classes.drop out"
        )
    renamed = {values[group[0]]: name for name, group in rules.merge.items()}
    decision = Decision(
        ClassTable(tuple((v, renamed.get(v, name), color) for v, name, color in origin.table.classes)),
        threshold,
        {values[name]: values[group[0]] for group in rules.merge.values() for name in group[1:]},
        tuple(values[name] for name in rules.drop),
    )
    if asked and len(decision.left.classes) < 2:
        raise ConfigError(f"{len(decision.left.classes)} class would remain of {listed(names)}, expected two or more")
    if decision.left.binary and len(names) > 2:
        # Of two classes 0 would stand for a background, which it is not here.
        free = next(value for value in range(1, 255) if value not in decision.left.values)
        return replace(decision, renumbered={0: free})
    return decision


def refining(origin: Origin, decision: Decision, config: RefineConfig, region: Region) -> list[Work]:
    """The stages that read the imagery, find its segments, and give each a class; the map is decided between them.

    Raises:
        ConfigError: the run's tiles are not whole cells, or its threshold is not known.
        ModelError: the weights of Segment Anything are missing or damaged.
    """
    from rayseg.models.sam import SamConfig, checkpoint_state  # torch, which a map without segments does not need

    tile = runs.read(origin.root)["config"]["map"]["tile"]
    if tile % config.stride:
        raise ConfigError(
            f"refine.stride is {config.stride}, expected a divisor of {tile}, the map.tile of {origin.root}; set it "
            "and refine.patch"
        )
    threshold = decision.threshold
    if len(origin.bands) == 1 and origin.table.binary and threshold is None:
        threshold = mapping.threshold_of(origin.root)
        if threshold is None:
            raise ConfigError(f"the model of {origin.root} is gone, and its threshold with it; give --set threshold")
    sam = SamConfig.model_validate(config.sam)
    if config.proposer == "sam" and sam.checkpoint != "random":
        checkpoint_state(sam)
    patches = Lattice.of_cells(config.patch, config.stride)
    propose = ProposePlots(
        config.proposer,
        sam=sam,
        superpixels=config.superpixels,
        rounds=RoundsConfig(rounds=(Round(),), refining=None),
        patches=patches,
        geometry=region.geometry,
    )
    gpus = 1.0 if config.proposer == "sam" else 0.0
    return [
        Work(ReadGround(config.image, patches)),
        Work(propose, cpus=1.0, gpus=gpus, model=True),
        Work(Refine(config.stride, decision.left.values, threshold)),
    ]


def tiles_of(root: str) -> Manifest:
    """The rows of a run's tiles that have imagery, also of those that failed there."""
    rows = read_rows(upath(root) / "steps" / mapping.SCORED / "manifest.parquet", root=root)
    fates, scenes = _fates(root), _ledger(root, "scenes").read() | _ledger(root, "networks").read()

    def parts() -> Iterator[list[Row]]:
        for start in range(0, len(rows), PART):
            part = rows[start : start + PART]
            empty = {tile for tile, fate in fates.among(row["id"] for row in part).items() if fate.status == "nodata"}
            kept = [row for row in part if row["id"] not in empty]
            # Rows of `diff` have the files of its earlier map in `before`, and those of the later one in `after`.
            yield [
                row | {"before": "[]" if "after" in row else mapped_before(scenes, row.get("before", "[]"))}
                for row in kept
            ]

    return Manifest.of(parts())


def failures_of(root: str, ids: Iterable[str]) -> dict[str, str]:
    """Why some of a run's tiles have no map, by id."""
    names = list(ids)
    fates, missing = _fates(root).among(names), Fate("missing", "it was not mapped", 1)
    return {
        name: f"{fate.status} in {root}: {fate.reason}; first: rayseg retry {root}"
        for name in names
        if (fate := fates.get(name, missing)).status not in SETTLED
    }


def _fates(root: str) -> Fates:
    return _ledger(root, mapping.SCORED).fates()


def _ledger(root: str, step: str) -> Ledger:
    return Ledger(str(upath(root) / "steps" / step / "ledger"))


def area_inside(region: Region, inside: str | None) -> dict[str, Any] | None:
    """The part of a region within the polygons of another, GeoJSON in EPSG:4326; None for everything.

    Raises:
        ConfigError: `inside` names no polygons.
        DataError: the two do not meet.
    """
    if not inside:
        return region.geometry
    area = resolve_region(inside).geometry
    if area is None:
        raise ConfigError(f"inside is {inside}, a catalogue without an area; give a file of polygons, or a box")
    if region.geometry is None:
        return area
    both = shape(area).intersection(shape(region.geometry))
    if not both.area:
        raise DataError(f"inside {inside} does not meet the region {region.name}; give polygons within it")
    return dict(geojson(both))


def expect_inside(root: str, geometry: dict[str, Any] | None, inside: str | None) -> None:
    """Check that polygons can cut a run's map, and meet it.

    Raises:
        ConfigError: the map has no georeference.
        DataError: the polygons meet none of its tiles.
    """
    if not inside or geometry is None:
        return
    tiles = [mapped.tile for mapped in mapped_tiles(root)]
    if any(tile.grid.crs is None for tile in tiles):
        raise ConfigError(f"inside is {inside}, but images of {root} have no georeference; leave it out")
    area, ground = shape(geometry), [lonlat_outline(tile.grid, tile.window)[0] for tile in tiles]
    if not any(outline and shape(outline).intersects(area) for outline in ground):
        raise DataError(
            f"inside {inside} lies within {tuple(round(side, 4) for side in area.bounds)} degrees and meets no tile of "
            f"{root}; give polygons on its map, longitude first"
        )


def expect_apart(out: str, *roots: str) -> None:
    """Check that a run's output is neither one of the runs that it reads nor inside of it, and that these are runs.

    Raises:
        ConfigError: it is; or a part of a run is named.
    """
    if part := next((root for root in roots if "#" in root), None):
        raise ConfigError(f"{part} names a part of a run, expected the run; leave {part[part.index('#') :]} out")
    for root in map(absolute, roots):
        if f"{absolute(out)}/".startswith(f"{root.rstrip('/')}/"):
            raise ConfigError(f"--out {out} is, or lies in, {root}, which is only read; choose another --out")


def reclassify_tiles(
    step: Step,
    region: Region,
    origin: tuple[str, str],
    rules: ClassRules,
    threshold: float | None,
    inside: str | None,
    stall_seconds: float,
    *refine: RefineConfig,
    tiles: Sequence[Row] | None = None,
) -> dict[str, Any]:
    """Decide every tile again; results are in tiles/<id>/, the status of each tile is in the step's ledger.

    Args:
        step: the current step.
        region: the run's.
        origin: prefix of the run, and the key of the step that made its map: a run that is made again is read again.
        rules: which classes are merged or left out.
        threshold: of a binary map, or None.
        inside: polygons outside of which is nodata, or None.
        stall_seconds: timeout of one tile.
        refine: segments that get one class each; one, or none, which keeps the keys of runs without.
        tiles: rows of the tiles, if they are already planned.
    """
    known, geometry = origin_of(origin[0]), area_inside(region, inside)
    decision = decision_of(known, rules, threshold)
    table = decision.left
    bands = known.bands if len(known.bands) == 1 else table.names
    rows = mapping.kept_manifest(step, lambda: tiles_of(known.root) if tiles is None else tiles)
    failed = failures_of(known.root, rows.ids.to_pylist())
    prefix = mapping.tiles_prefix(step)
    works = [Work(Reclassify(str(upath(known.root) / "tiles"), decision, geometry=region.geometry, failed=failed))]
    for config in refine:
        read, propose, follow = refining(known, decision, config, region)
        works = [read, propose, *works, follow]
    works.append(
        Work(WriteTile(prefix, table, bands=bands, geometry=geometry, model=known.model, imagery=known.imagery))
    )
    done = mapping.through(step, rows, works, patience=stall_seconds)
    return {"classes": table.classes, "run": known.root, "imagery": known.imagery, **done}
