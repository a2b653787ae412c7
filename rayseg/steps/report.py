"""Report of a run on one page: mapped area, accuracy and speed. It is the last step of every pipeline.

<run>/report/index.html   everything in one file      <run>/report/map.png   the map over the imagery
"""

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, partial
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import numpy as np
import yaml
from markupsafe import Markup
from PIL import Image

from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Step
from rayseg.io import masks
from rayseg.io.maps import MappedTile, mapped_tiles, seam_score
from rayseg.io.output_grids import overlap_note
from rayseg.io.pictures import Picture, encoded, pictures_of, shown_colors, smaller
from rayseg.metrics import Confusion
from rayseg.steps import certificate, charts
from rayseg.steps import map as mapping
from rayseg.steps.baseline import Comparison
from rayseg.steps.numbers import area, count, counted, duration, measure_text, percent, scale_bar
from rayseg.store import is_local, put, relocated, upath
from rayseg.vision.color import ClassTable, hex_of

_MAGIC = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8": "image/jpeg", b"<": "image/svg+xml"}

Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""(title, header, rows) of a table in the report."""


class MapPicture(TypedDict):
    """Overview of the region: `imagery` and `map` are image files; `metres` is its width, None without georeference.

    `detail` is (imagery, map) at a higher resolution: files next to the page, None where the overview shows all.
    """

    title: str
    imagery: bytes
    map: bytes
    height: int
    width: int
    metres: float | None
    step: float
    detail: tuple[str, str] | None


class ClassShare(TypedDict):
    """Share of a class in the map; `color` is None if not drawn, `area_m2` without georeference."""

    name: str
    color: str | None
    pixels: int
    share: float
    area_m2: float | None


class Stage(TypedDict):
    """Seconds of work of all copies of a stage, and their share of wall time x workers."""

    name: str
    seconds: float
    share: float


class Timing(TypedDict):
    """Time of a step by stage; `idle` = (wall - start) x workers - sum of the stages, None if it is unknown.

    `start` is the time in which the processes of the step began.
    """

    wall: float
    start: float
    workers: int
    stages: list[Stage]
    idle: float | None
    pixels_per_second: float | None
    km2_per_hour: float | None


class Content(TypedDict):
    """Content of a report; None and empty values are not shown.

    `lead` is a sentence or two, `figures` are (label, value, note), `pictures` (title, image file, caption), `tables`
    (title, header, rows), `curves` (title, drawings), `ledgers` the steps of `run.status`, `evaluation` the
    result of `rayseg.steps.evaluate.evaluate`, `certificate` a light, its worst measures, a lead and rows of
    `certificate.rows_of`, `seams` the result of `rayseg.io.maps.seam_score`. `images` is a table with
    a row per image, `files` are (what, path next to the page), `tile_files` tile -> such rows of the first tiles.
    """

    title: str
    lead: str
    figures: list[tuple[str, str, str]]
    maps: list[MapPicture]
    classes: list[ClassShare]
    images: Table | None
    files: list[tuple[str, str]]
    tile_files: dict[str, list[tuple[str, str]]]
    evaluation: dict[str, Any] | None
    certificate: dict[str, Any] | None
    seams: dict[str, Any] | None
    pictures: list[tuple[str, bytes, str]]
    tables: list[tuple[str, tuple[str, ...], list[tuple[str, ...]]]]
    curves: list[tuple[str, list[bytes]]]
    ledgers: dict[str, dict[str, Any]]
    timing: Timing | None
    config: dict[str, Any]
    versions: dict[str, str]
    command: str
    footer: str


def render(content: Content) -> str:
    """Render the report as HTML with embedded pictures."""
    script = resources.files("rayseg").joinpath("report.js").read_text(encoding="utf-8")
    return _template().render(content, script=Markup(script))


@cache
def _template() -> jinja2.Template:
    """The report's template, which takes as long to compile as the rest of a small report."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "area": area,
        "count": count,
        "data_uri": data_uri,
        "duration": duration,
        "is_broad": is_broad,
        "measure": measure_text,
        "percent": percent,
        "scale_bar": scale_bar,
        "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    }
    return environment.from_string(resources.files("rayseg").joinpath("report.html").read_text(encoding="utf-8"))


# -- pictures ----------------------------------------------------------------------------------------------------------


def data_uri(image: bytes) -> str:
    """An image file (PNG, WebP, JPEG, SVG) as a `data:` URI."""
    # By the first bytes: pictures come from runs of all versions.
    kind = next(kind for magic, kind in _MAGIC.items() if image.startswith(magic))
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


STAGES = {
    "ReadTile": "read",
    "ReadGround": "read",
    "ReadAround": "read",
    "Predict": "model",
    "LabelTile": "model",
    "ProposePlots": "model",
    "WriteTile": "write",
    "WritePieces": "write",
}
"""Stage -> its name in the report."""
MOST_MAPS = 4
OVERVIEW, DETAIL = 1400, 4096
"""Longer side in px of the pictures in the page, and of those next to it, which it shows when one zooms in."""
MOST_ROWS = 500
"""Images or tiles in a table."""


@dataclass(frozen=True)
class Extras:
    """Report content that only the pipeline knows.

    Attributes:
        title: of the page; by default the pipeline and the region.
        labels: description of the training data, as a sentence ("Learnt from 96 chips labelled gpc or not.").
        pictures: (title, image file or its path below the run, caption).
        tables: (title, header, rows).
        histories: training -> values of every epoch; by default read from the TensorBoard logs of the run's steps.
        workers: number of copies of all stages together; by default one per stage.
        timed: the step that read the imagery, if another step wrote the tiles.
        baseline: simple methods measured on the same data; if a model is behind one, the first line states it.
        plots: the tiles have plots, which the map shows one by one.
    """

    title: str = ""
    labels: str = ""
    pictures: tuple[tuple[str, bytes | str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    workers: int | None = None
    timed: Step | None = None
    baseline: Comparison | None = None
    plots: bool = False


def write_report(
    step: Step,
    predicted: Step,
    polygons: Step | None = None,
    measured: Step | None = None,
    extras: Extras | None = None,
    *,
    certified: Step | None = None,
) -> dict[str, Any]:
    """Write the run's report, and its figures to `<run>/metrics.json`; return its path and headline figures.

    Args:
        step: the current step.
        predicted: the step that mapped the region.
        polygons: the step that joined its polygons.
        measured: the step that compared the map with truth; a value without `overall` means that there was no truth.
        extras: content that only the pipeline knows.
        certified: the step that measured how stable the map is.
    """
    extras = extras or Extras()
    request, tiles = runs.read(step.root), mapped_tiles(predicted.root, predicted.name)
    content = _content(step.root, extras, request, runs.status(step.root)["steps"])
    table = masks.table_of(tiles[0].href) if tiles else None
    classes = class_shares(tiles, table) if table else []
    evaluation = measured.value if measured and "overall" in measured.value else None
    timing = timing_of(extras.timed or predicted, tiles, workers=extras.workers)
    seams = seam_score(tiles)
    pictures = pictures_of(tiles, size=DETAIL, most=MOST_MAPS, plots=extras.plots)
    behind = extras.baseline.first if extras.baseline else ""
    summary = " ".join(filter(None, [behind, _summary(tiles, classes)]))
    # A tile of several sources shows the first that is valid.
    shared = dict.fromkeys(source for tile in tiles if len(tile.sources) > 1 for source in tile.sources)
    content["lead"] = " ".join(filter(None, [summary, overlap_note(list(shared)), extras.labels]))
    content["figures"] = _figures(classes, evaluation, timing, content["ledgers"][predicted.name], polygons)
    content["maps"] = [_map_picture(step.root, at, one, table) for at, one in enumerate(pictures) if table]
    content["images"] = images_table(tiles, table, measured) if table else None
    content["files"], content["tile_files"] = _files(step.root, tiles)
    content["classes"], content["evaluation"], content["seams"], content["timing"] = classes, evaluation, seams, timing
    if certified:
        known = certified.value
        rows = certificate.rows_of(known)
        content["certificate"] = {
            "light": known["light"],
            "worst": certificate.worst(known),
            "lead": certificate.lead(known),
            "rows": rows,
        }
    content["curves"] = [
        (name, charts.curves(rows)) for name, rows in (extras.histories or charts.histories(step.root)).items()
    ]
    _put_page(step.root, content)
    if pictures and table:
        put(upath(step.root) / "report" / "map.png", encoded(smaller(pictures[0].map(table), OVERVIEW)))
    value = _value(summary, classes, evaluation, timing, seams)
    put(upath(step.root) / "metrics.json", json.dumps(metrics_of(value, evaluation), indent=1).encode())
    return value | ({"certificate": certified.value} if certified else {})


def metrics_of(value: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """The numbers of a report: its headline figures and, with a truth, the measures of all and of each class."""
    numbers = {name: number for name, number in value.items() if name not in {"report", "summary"}}
    if evaluation:
        numbers |= {name: measure["value"] for name, measure in evaluation["overall"].items()}
        for measure in ("iou", "f1", "precision", "recall"):
            numbers[measure] = {row["name"]: row[measure]["value"] for row in evaluation["classes"]}
    return numbers


def write_page(
    root: str, extras: Extras, *, figures: Sequence[tuple[str, str, str]] = (), request: Mapping[str, Any] | None = None
) -> None:
    """Write a report without a map.

    Args:
        root: prefix of the run, or of a sweep.
        extras: content of the report.
        figures: (label, value, note).
        request: content of run.json, for a `root` without this file.
    """
    ledgers = {} if request else runs.status(root)["steps"]
    content = _content(root, extras, request or runs.read(root), ledgers)
    content["figures"] = list(figures)
    _put_page(root, content)


def _content(root: str, extras: Extras, request: Mapping[str, Any], ledgers: dict[str, dict[str, Any]]) -> Content:
    """What every report shows; the parts about a map are empty."""
    baseline = extras.baseline
    shown = [*extras.pictures, *(baseline.pictures if baseline else ())]
    version = request.get("versions", {}).get("rayseg", "")
    began = request.get("started")
    when = f", begun {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if began else ""
    return Content(
        title=extras.title or f"{request['pipeline']}: {request['region']['name']}",
        lead=extras.labels,
        figures=[],
        maps=[],
        classes=[],
        images=None,
        files=_files(root, ())[0],
        tile_files={},
        evaluation=None,
        certificate=None,
        seams=None,
        pictures=[(title, _image(root, image), caption) for title, image, caption in shown],
        tables=[*([baseline.table] if baseline else []), *extras.tables],
        curves=[],
        ledgers=ledgers,
        timing=None,
        config=request["config"],
        versions=request.get("versions", {}),
        command=request.get("command", ""),
        footer=f"rayseg {version}{when}",
    )


def _put_page(root: str, content: Content) -> None:
    """Write the page; it names the run RUN and not by its place, because a run can be moved."""
    put(upath(root) / "report" / "index.html", relocated(render(content), root, "RUN").encode())


def headline(published: Step, note: str = "") -> str:
    """Path of the report, its summary, a note, and a certificate's light if it is amber or red, in one line."""
    value = published.value
    sentences = [value["summary"]]
    if value["measures"]:
        text = ", ".join(f"{name} {measure:.3f}" for name, measure in value["measures"].items())
        sentences.append(f"{text[0].upper()}{text[1:]}.")
    if value["km2_per_hour"] is not None:
        rate = value["km2_per_hour"]
        sentences.append(f"{rate:,.0f} km²/h." if rate >= 10 else f"{rate:.2g} km²/h.")
    sentences += [note] if note else []
    if (certified := value.get("certificate")) and (worst := certificate.worst(certified)):
        sentences.append(f"Certificate: {certified['light']} ({worst}).")
    path, here = upath(published.root) / value["report"], Path.cwd()
    if is_local(path) and here in Path(path.path).parents:
        path = Path(path.path).relative_to(here)
    return f"{path}: {' '.join(sentences)}"


def _value(
    summary: str,
    classes: Sequence[ClassShare],
    evaluation: dict[str, Any] | None,
    timing: Timing,
    seams: dict[str, Any] | None,
) -> dict[str, Any]:
    areas = [row["area_m2"] for row in classes if row["area_m2"] is not None]
    return {
        "report": "report/index.html",
        "summary": summary,
        "area_m2": sum(areas) if areas else None,
        "shares": {row["name"]: row["share"] for row in classes},
        "mean_iou": evaluation["overall"]["mean_iou"]["value"] if evaluation else None,
        "measures": {
            name: measure["value"]
            for name, measure in (_measures(evaluation) if evaluation else ())
            if measure["value"] is not None
        },
        "pixels_per_second": timing["pixels_per_second"],
        "km2_per_hour": timing["km2_per_hour"],
        "idle_seconds": timing["idle"],
        "seams": seams["ratio"] if seams else None,
    }


def is_broad(image: bytes) -> bool:
    """Whether a picture is much wider than high, so that it needs the full width; charts are not."""
    if image.startswith(b"<"):
        return False
    with Image.open(BytesIO(image)) as opened:
        return opened.width > 1.6 * opened.height


# -- figures -----------------------------------------------------------------------------------------------------------


def class_shares(tiles: Sequence[MappedTile], table: ClassTable) -> list[ClassShare]:
    """Pixels, area on the ground and share of area of every class.

    If a tile has no georeference, areas are None and shares are those of pixels.
    """
    pixels: Counter[int] = Counter()
    areas: Counter[int] | None = Counter()
    for tile in tiles:
        pixels.update(tile.counts)
        of_tile = tile.areas
        # One tile without georeference is enough: areas and pixels cannot be added.
        areas = None if areas is None or of_tile is None else areas + Counter(of_tile)
    sizes, painted = (pixels if areas is None else areas), shown_colors(table)
    total = sizes.total() or 1
    return [
        ClassShare(
            name=name,
            color=hex_of(color) if value in painted else None,
            pixels=pixels[value],
            share=sizes[value] / total,
            area_m2=None if areas is None else float(areas[value]),
        )
        for value, name, color in table.classes
    ]


def timing_of(predicted: Step, tiles: Sequence[MappedTile], *, workers: int | None = None) -> Timing:
    """Time of the mapping step by stage, from its ledger and its wall time.

    Args:
        predicted: the step that read the imagery.
        tiles: the mapped tiles, for pixels and area.
        workers: number of copies of all stages together; None means one per stage. Idle is None if the stages worked
            longer than this number of workers allows.
    """
    # Zeros first, so that stages are shown in the order of work.
    seconds: Counter[str] = Counter(dict.fromkeys(STAGES.values(), 0.0))
    count, pixels, square_metres = 0, 0, 0.0
    for records in Ledger(str(predicted.prefix / "ledger")).latest():
        count += len(records)
        for record in records:
            seconds.update({STAGES.get(stage, stage): spent for stage, spent in record.seconds.items()})
    for tile in tiles:
        pixels += sum(tile.counts.values())
        square_metres += sum((tile.areas or {}).values())
    seconds = Counter({stage: spent for stage, spent in seconds.items() if spent})
    wall, workers = predicted.seconds, workers or max(len(seconds), 1)
    # Starting took until the first row was finished, less the time that a row takes.
    noted = predicted.prefix / mapping.FIRST
    first = float(json.loads(noted.read_bytes())["seconds"]) if noted.exists() else 0.0
    start = min(max(first - seconds.total() / max(count, 1), 0.0), wall)
    # Negative if more copies of the stages worked than assumed.
    idle = (wall - start) * workers - seconds.total()
    whole = max((wall - start) * workers, seconds.total()) or 1.0
    return Timing(
        wall=wall,
        start=start,
        workers=workers,
        stages=[Stage(name=name, seconds=spent, share=spent / whole) for name, spent in seconds.items()],
        idle=idle if idle >= 0 else None,
        pixels_per_second=pixels / wall if wall else None,
        km2_per_hour=square_metres / 1e6 / wall * 3600 if wall and square_metres else None,
    )


def _shown(classes: Sequence[ClassShare]) -> list[ClassShare]:
    """Classes to name, the largest first; the background of a single-class map is omitted."""
    # The share of the background is that of the class, turned round.
    background = len(classes) == 2 and classes[0]["color"] is None
    named = list(classes[1:]) if background else list(classes)
    return sorted((row for row in named if row["pixels"] or len(named) == 1), key=lambda row: -row["share"])


def _figures(
    classes: Sequence[ClassShare],
    evaluation: dict[str, Any] | None,
    timing: Timing,
    account: Mapping[str, Any],
    polygons: Step | None,
) -> list[tuple[str, str, str]]:
    """(label, value, note) of the headline figures."""
    areas = [row["area_m2"] for row in classes if row["area_m2"] is not None]
    pixels = f"{count(sum(row['pixels'] for row in classes))} pixels"
    figures = [("mapped", area(sum(areas)), pixels) if areas else ("mapped", pixels, "")]
    for row in _shown(classes)[:2]:
        figures.append((row["name"], percent(row["share"]), area(row["area_m2"]) if areas else ""))
    if polygons and "count" in polygons.value:
        figures.append(("polygons", f"{polygons.value['count']:,}", ""))
    for label, measure in _measures(evaluation) if evaluation else ():
        value, _, bounds = measure_text(measure).partition(" ")
        figures.append((label, value, f"95 %: {bounds.strip('()')}" if bounds else ""))
    # Empty tiles and those without imagery are finished, too.
    settled = sum(account["counts"][status] for status in ("done", "empty", "nodata"))
    figures.append(("tiles", f"{settled:,}", f"of {account['planned']:,} planned"))
    if timing["km2_per_hour"]:
        figures.append(("speed", f"{count(timing['km2_per_hour'])} km²/h", ""))
    elif timing["pixels_per_second"]:
        figures.append(("speed", f"{count(timing['pixels_per_second'])} px/s", ""))
    return figures


def _measures(evaluation: Mapping[str, Any]) -> list[tuple[str, Mapping[str, float | None]]]:
    """The measures to show first: IoU and F1 of the class of a map of one class, then the mean IoU."""
    # The mean with the background hides the class: .67 for .39.
    rows = evaluation["classes"]
    of_class = rows[1] if len(rows) == 2 and rows[0].get("value", 0) == 0 else None
    first = [(f"{name} of {of_class['name']}", of_class[name.lower()]) for name in ("IoU", "F1")] if of_class else []
    return [*first, ("mean IoU", evaluation["overall"]["mean_iou"])]


def _summary(tiles: Sequence[MappedTile], classes: Sequence[ClassShare]) -> str:
    """One sentence, for example: `8.19 km² mapped in 8 tiles: 3.1 % gpc (0.255 km²)`."""
    if not tiles:
        return "Nothing was mapped."
    areas = [row["area_m2"] for row in classes if row["area_m2"] is not None]
    images = {tile.tile.grid.image for tile in tiles} - {None}
    where = counted(len(images), "image") if images else counted(len(tiles), "tile")
    size = area(sum(areas)) if areas else f"{count(sum(row['pixels'] for row in classes))} pixels"
    parts = [
        f"{percent(row['share'])} {row['name']}" + (f" ({area(row['area_m2'])})" if areas else "")
        for row in _shown(classes)[:3]
    ]
    return f"{size} mapped in {where}: {', '.join(parts)}."


def images_table(tiles: Sequence[MappedTile], table: ClassTable, measured: Step | None) -> Table | None:
    """A row per image where the images of a folder were mapped one by one, else None.

    Args:
        tiles: the mapped tiles.
        table: the classes.
        measured: the step that compared the map with truth.
    """
    by_image: dict[str, list[int]] = {}
    for at, tile in enumerate(tiles):
        # Tiles of several images say nothing about one of them.
        if tile.tile.grid.crs and len(tile.sources) != 1:
            return None
        by_image.setdefault(tile.tile.grid.image or tile.sources[0].item_id, []).append(at)
    if len(by_image) < 2:
        return None
    confusions = _confusions(measured)
    of_class = table.binary
    header = ["image", "pixels", *(name for _, name, _ in table.classes[of_class:])]
    header += ([f"IoU of {table.names[1]}"] if of_class else ["mean IoU"]) if confusions else []
    rows = []
    for image, numbers in list(by_image.items())[:MOST_ROWS]:
        members = [tiles[at] for at in numbers]
        shares = class_shares(members, table)
        pixels = sum(row["pixels"] for row in shares)
        row = [image, f"{pixels:,}", *(percent(share["share"]) for share in shares[of_class:])]
        if confusions:
            known = [confusions[member.tile.id] for member in members if member.tile.id in confusions]
            total = sum(known[1:], known[0]) if known else None
            value = None if total is None else float(total.iou[1] if of_class else total.mean_iou)
            row.append("–" if value is None or math.isnan(value) else f"{value:.3f}")
        rows.append(tuple(row))
    more = f", the first {MOST_ROWS} of {len(by_image):,}" if len(by_image) > MOST_ROWS else ""
    return f"Images{more}", tuple(header), rows


def _confusions(measured: Step | None) -> dict[str, Confusion]:
    """Tile -> its counts, as the evaluation of a map stores them."""
    path = measured.prefix / "confusions.json" if measured else None
    if path is None or not path.exists():
        return {}
    return {name: Confusion(np.array(counts)) for name, counts in json.loads(path.read_bytes())["tiles"].items()}


def _files(root: str, tiles: Sequence[MappedTile]) -> tuple[list[tuple[str, str]], dict[str, list[tuple[str, str]]]]:
    """What a run left, as (what it is, its path seen from the page): of the run, and of each of its first tiles."""
    run = upath(root)
    named = [
        ("STAC collection", [run / "collection.json"]),
        ("items of all tiles (GeoParquet)", [run / "items.parquet"]),
        ("polygons (GeoParquet)", [path for path in sorted(run.glob("*.parquet")) if path.name != "items.parquet"]),
        ("QGIS project", [run / "qgis" / "map.qgs"]),
        ("model", sorted(run.glob("models/**/item.json"))),
        ("settings and times", [run / "run.json"]),
    ]
    files = [(what, f"../{path.relative_to(run)}") for what, paths in named for path in paths if path.exists()]
    # The tiles of one run have the same files; thousands of folders are not listed.
    names = (
        sorted(path.name for path in upath(tiles[0].href).parent.iterdir() if path.suffix == ".tif") if tiles else []
    )
    of_tiles = {
        tile.tile.id: [(name, f"../tiles/{tile.tile.id}/{name}") for name in (*names, f"{tile.tile.id}.json")]
        for tile in tiles[:MOST_ROWS]
    }
    return files, of_tiles


# -- pictures and histories --------------------------------------------------------------------------------------------


def _map_picture(root: str, number: int, picture: Picture, table: ClassTable) -> MapPicture:
    """A picture for the page; where it is larger than an overview, its files next to the page, too."""
    layers, detail = {"imagery": picture.imagery(), "map": picture.map(table)}, None
    if max(picture.classes_HW.shape) > OVERVIEW:
        names = [f"map-{number}-{name}.webp" for name in layers]
        for name, layer_HWC in zip(names, layers.values(), strict=True):
            put(upath(root) / "report" / name, encoded(layer_HWC, "webp"))
        detail = (names[0], names[1])
    small = {name: smaller(layer_HWC, OVERVIEW) for name, layer_HWC in layers.items()}
    return MapPicture(
        title=picture.title,
        imagery=encoded(small["imagery"], "webp"),
        map=encoded(small["map"], "webp"),
        height=small["map"].shape[0],
        width=small["map"].shape[1],
        metres=picture.metres,
        step=picture.step,
        detail=detail,
    )


def _image(root: str, image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else (upath(root) / image).read_bytes()
