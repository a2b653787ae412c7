"""Report of a run on one page: mapped area, accuracy and speed. It is the last step of every pipeline.

<run>/report/index.html   everything in one file      <run>/report/map.png   the map over the imagery
"""

import base64
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypedDict

import jinja2
import yaml
from upath import UPath

from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Step
from rayseg.io import masks
from rayseg.io.maps import MappedTile, mapped_tiles, seam_score
from rayseg.io.output_grids import overlap_note
from rayseg.io.pictures import encoded, pictures_of, shown_colors
from rayseg.steps.baseline import Comparison
from rayseg.store import is_local, put, relocated, upath
from rayseg.vision.color import ClassTable, hex_of

_INK = "#80868b"  # readable on a light and on a dark background
_MAGIC = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8": "image/jpeg", b"<": "image/svg+xml"}


class MapPicture(TypedDict):
    """Overview of the region: `imagery` and `map` are image files; `metres` is its width, None without georeference."""

    title: str
    imagery: bytes
    map: bytes
    height: int
    width: int
    metres: float | None
    step: float


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
    """Time of a step by stage; `idle` = wall x workers - sum of the stages, None if it is unknown."""

    wall: float
    workers: int
    stages: list[Stage]
    idle: float | None
    pixels_per_second: float | None
    km2_per_hour: float | None


class Content(TypedDict):
    """Content of a report; None and empty values are not shown.

    `lead` is a sentence or two, `figures` are (label, value, note), `pictures` (title, image file, caption), `tables`
    (title, header, rows), `curves` (title, drawings), `ledgers` the steps of `run.status`, `evaluation` the
    result of `rayseg.steps.evaluate.evaluate`, `seams` that of `rayseg.io.maps.seam_score`.
    """

    title: str
    lead: str
    figures: list[tuple[str, str, str]]
    maps: list[MapPicture]
    classes: list[ClassShare]
    evaluation: dict[str, Any] | None
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
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "area": area,
        "count": count,
        "data_uri": data_uri,
        "duration": duration,
        "measure": measure_text,
        "percent": percent,
        "scale_bar": scale_bar,
        "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True),
    }
    template = resources.files("rayseg").joinpath("report.html").read_text(encoding="utf-8")
    return environment.from_string(template).render(content)


# -- numbers for people ------------------------------------------------------------------------------------------------


def area(square_metres: float | None) -> str:
    """`0.262 km²`, `4,310 m²`; a dash for None."""
    if square_metres is None:
        return "–"
    if square_metres < 10_000:
        return f"{_digits(square_metres)} m²"
    return f"{_digits(square_metres / 1e6)} km²"


def percent(share: float) -> str:
    """`12.3 %`, `3.1 %`, `0.012 %`."""
    return f"{_digits(share * 100, 2 if 0 < share < 0.1 else 3)} %"


def count(number: float) -> str:
    """`1,024`, `4.19 million`."""
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if abs(number) >= size:
            return f"{_digits(number / size)} {name}"
    return f"{number:,.0f}"


def duration(seconds: float) -> str:
    """`4.2 s`, `12 min 30 s`, `2 h 05 min`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60) if seconds >= 3600 else int(seconds // 60)
    if seconds < 3600:
        return f"{minutes} min {int(seconds % 60):02d} s"
    return f"{minutes // 60:,} h {minutes % 60:02d} min"


def measure_text(measure: Mapping[str, float | None]) -> str:
    """`0.712 (0.661–0.752)`; a dash where the measure is not defined."""
    if measure["value"] is None:
        return "–"
    low, high = measure["low"], measure["high"]
    return f"{measure['value']:.3f}" + (f" ({low:.3f}–{high:.3f})" if low is not None and high is not None else "")


def _digits(number: float, digits: int = 3) -> str:
    """At least `digits` significant digits, with thousands separators."""
    if number == 0 or abs(number) >= 10**digits:
        return f"{number:,.0f}"
    return f"{number:,.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}"


def scale_bar(metres: float) -> tuple[str, float]:
    """(label, share of the picture's width) of a bar of 1, 2 or 5 x 10^n metres, a quarter of the width at most."""
    # The largest of 1, 2 and 5 that fits: such lengths are read at a glance.
    power = 10.0 ** math.floor(math.log10(metres / 4))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= metres / 4)
    return (f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"), length / metres


# -- pictures ----------------------------------------------------------------------------------------------------------


def data_uri(image: bytes) -> str:
    """An image file (PNG, WebP, JPEG, SVG) as a `data:` URI."""
    # By the first bytes: pictures come from runs of all versions.
    kind = next(kind for magic, kind in _MAGIC.items() if image.startswith(magic))
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def curves(history: Sequence[Mapping[str, float]]) -> list[bytes]:
    """A training's values per epoch as SVG drawings: one of the losses, one of the measures.

    Args:
        history: per epoch, name -> value, in order; epochs may lack names. `epoch` is the number of the epoch.
    """
    from matplotlib.figure import Figure  # drawn at the end of a run, imported then
    from matplotlib.ticker import MaxNLocator

    names = list(dict.fromkeys(name for row in history for name in row if name != "epoch"))
    # Losses and measures have different scales, so each gets axes of its own.
    losses = [name for name in names if "loss" in name]
    drawings = []
    for part in filter(None, (losses, [name for name in names if name not in losses])):
        figure = Figure(figsize=(4.8, 2.8), layout="constrained")
        axes = figure.subplots()
        for name in part:
            points = [(row.get("epoch", at), row[name]) for at, row in enumerate(history, 1) if name in row]
            axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.6, marker=".", markersize=4)
        axes.set_xlabel("epoch", color=_INK)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        drawings.append(_finished(figure, axes))
    return drawings


def learning_curves(lines: Mapping[str, Sequence[tuple[float, ...]]], *, across: str, up: str) -> bytes:
    """Draw a metric over the number of labels, as SVG.

    Args:
        lines: name -> points (x, y), or (x, y, low, high) with an interval.
        across: label of the x axis.
        up: label of the y axis.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        x, y, *bounds = zip(*sorted(points), strict=True)
        [line] = axes.plot(x, y, label=name, linewidth=1.6, marker=".", markersize=6)
        if bounds:
            axes.fill_between(x, bounds[0], bounds[1], color=line.get_color(), alpha=0.15, linewidth=0)
    axes.set_xlabel(across, color=_INK)
    axes.set_ylabel(up, color=_INK)
    return _finished(figure, axes)


def _finished(figure: Any, axes: Any) -> bytes:  # noqa: ANN401 - matplotlib's own
    """Style the figure in the report's colours and save it as SVG."""
    from matplotlib import rc_context

    axes.tick_params(colors=_INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    sink = io.BytesIO()
    # A fixed salt and no date: the same data give the same bytes.
    with rc_context({"svg.hashsalt": "rayseg"}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return sink.getvalue()


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
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""(title, header, rows) of a table in the report."""


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
    """

    title: str = ""
    labels: str = ""
    pictures: tuple[tuple[str, bytes | str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    workers: int | None = None
    timed: Step | None = None
    baseline: Comparison | None = None


def write_report(
    step: Step,
    predicted: Step,
    polygons: Step | None = None,
    measured: Step | None = None,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """Write the run's report; return its path and headline figures.

    Args:
        step: the current step.
        predicted: the step that mapped the region.
        polygons: the step that joined its polygons.
        measured: the step that compared the map with truth; a value without `overall` means that there was no truth.
        extras: content that only the pipeline knows.
    """
    extras = extras or Extras()
    request, tiles = runs.read(step.root), mapped_tiles(predicted.root, predicted.name)
    content = _content(step.root, extras, request, runs.status(step.root)["steps"])
    table = masks.table_of(tiles[0].href) if tiles else None
    classes = class_shares(tiles, table) if table else []
    evaluation = measured.value if measured and "overall" in measured.value else None
    timing = timing_of(extras.timed or predicted, tiles, workers=extras.workers)
    seams = seam_score(tiles)
    pictures = pictures_of(tiles, most=MOST_MAPS)
    behind = extras.baseline.first if extras.baseline else ""
    summary = " ".join(filter(None, [behind, _summary(tiles, classes)]))
    # A tile of several sources shows the first that is valid.
    shared = dict.fromkeys(source for tile in tiles if len(tile.sources) > 1 for source in tile.sources)
    content["lead"] = " ".join(filter(None, [summary, overlap_note(list(shared)), extras.labels]))
    content["figures"] = _figures(classes, evaluation, timing, content["ledgers"][predicted.name], polygons)
    content["maps"] = [
        MapPicture(
            title=picture.title,
            imagery=encoded(picture.imagery(), "webp"),
            map=encoded(picture.map(table), "webp"),
            height=picture.classes_HW.shape[0],
            width=picture.classes_HW.shape[1],
            metres=picture.metres,
            step=picture.step,
        )
        for picture in pictures
        if table
    ]
    content["classes"], content["evaluation"], content["seams"], content["timing"] = classes, evaluation, seams, timing
    content["curves"] = [(name, curves(rows)) for name, rows in (extras.histories or histories(step.root)).items()]
    _put_page(step.root, content)
    if pictures and table:
        put(upath(step.root) / "report" / "map.png", encoded(pictures[0].map(table)))
    return _value(summary, classes, evaluation, timing, seams)


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
    return Content(
        title=extras.title or f"{request['pipeline']}: {request['region']['name']}",
        lead=extras.labels,
        figures=[],
        maps=[],
        classes=[],
        evaluation=None,
        seams=None,
        pictures=[(title, _image(root, image), caption) for title, image, caption in shown],
        tables=[*([baseline.table] if baseline else []), *extras.tables],
        curves=[],
        ledgers=ledgers,
        timing=None,
        config=request["config"],
        versions=request.get("versions", {}),
        command=request.get("command", ""),
        footer=_footer(request),
    )


def _put_page(root: str, content: Content) -> None:
    """Write the page; it names the run RUN and not by its place, because a run can be moved."""
    put(upath(root) / "report" / "index.html", relocated(render(content), root, "RUN").encode())


def headline(published: Step) -> str:
    """Path of the report and its summary, in one line."""
    value = published.value
    sentences = [value["summary"]]
    if value["mean_iou"] is not None:
        sentences.append(f"Mean IoU {value['mean_iou']:.3f}.")
    if value["km2_per_hour"] is not None:
        rate = value["km2_per_hour"]
        sentences.append(f"{rate:,.0f} km²/h." if rate >= 10 else f"{rate:.2g} km²/h.")
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
        "pixels_per_second": timing["pixels_per_second"],
        "km2_per_hour": timing["km2_per_hour"],
        "idle_seconds": timing["idle"],
        "seams": seams["ratio"] if seams else None,
    }


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
    for record in Ledger(str(predicted.prefix / "ledger")).read().values():
        seconds.update({STAGES.get(stage, stage): spent for stage, spent in record.seconds.items()})
    seconds = Counter({stage: spent for stage, spent in seconds.items() if spent})
    wall, workers = predicted.seconds, workers or max(len(seconds), 1)
    # Negative if more copies of the stages worked than assumed.
    idle = wall * workers - seconds.total()
    whole = max(wall * workers, seconds.total()) or 1.0
    pixels = sum(sum(tile.counts.values()) for tile in tiles)
    square_metres = sum(sum((tile.areas or {}).values()) for tile in tiles)
    return Timing(
        wall=wall,
        workers=workers,
        stages=[Stage(name=name, seconds=spent, share=spent / whole) for name, spent in seconds.items()],
        idle=idle if idle >= 0 else None,
        pixels_per_second=pixels / wall if wall else None,
        km2_per_hour=square_metres / 1e6 / wall * 3600 if wall and square_metres else None,
    )


def _shown(classes: Sequence[ClassShare]) -> list[ClassShare]:
    """Classes to name, the largest first; the background of a single-class map is omitted."""
    # The share of the background is that of the class, turned round.
    named = list(classes[1:]) if len(classes) == 2 else list(classes)
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
    if evaluation:
        value, _, bounds = measure_text(evaluation["overall"]["mean_iou"]).partition(" ")
        figures.append(("mean IoU", value, f"95 %: {bounds.strip('()')}" if bounds else ""))
    # Empty tiles and those without imagery are finished, too.
    settled = sum(account["counts"][status] for status in ("done", "empty", "nodata"))
    figures.append(("tiles", f"{settled:,}", f"of {account['planned']:,} planned"))
    if timing["km2_per_hour"]:
        figures.append(("speed", f"{count(timing['km2_per_hour'])} km²/h", ""))
    elif timing["pixels_per_second"]:
        figures.append(("speed", f"{count(timing['pixels_per_second'])} px/s", ""))
    return figures


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


def counted(number: int, what: str) -> str:
    """`1 tile`, `1,024 tiles`."""
    return f"{number:,} {what}{'s' * (number != 1)}"


# -- pictures and histories --------------------------------------------------------------------------------------------


def _image(root: str, image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else (upath(root) / image).read_bytes()


def histories(root: str) -> dict[str, list[dict[str, float]]]:
    """Read the TensorBoard logs of a local run: step -> values of every epoch; the last value written wins."""
    if not is_local(root):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # slow to import

    by_training = {}
    for folder in sorted(upath(root).glob("steps/**/tensorboard")):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        rows: dict[int, dict[str, float]] = {}
        for tag in (tag for tag in events.Tags()["scalars"] if not tag.startswith("learning_rate")):
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {"epoch": float(event.step + 1)})[tag] = event.value
        name = str(folder.parent.relative_to(upath(root) / "steps"))
        # A stage of a training has a folder below that of the training.
        name += next((_trained_on(path) for path in folder.parents[:2] if (path / "setup.json").exists()), "")
        by_training[name] = [rows[epoch] for epoch in sorted(rows)]
    return {name: rows for name, rows in by_training.items() if rows}


def _trained_on(folder: UPath) -> str:
    """How many processes trained under a prefix, and on what, as " (...)"."""
    setup = json.loads((folder / "setup.json").read_bytes())
    count, device = setup["workers"], "GPU" if setup["gpu"] else "CPU"
    if not count:
        return f" (in the command's process, {device})"
    return f" ({count} worker{'s' * (count > 1)} of Ray Train, {device})"


def _footer(request: Mapping[str, Any]) -> str:
    version = request.get("versions", {}).get("rayseg", "")
    began = request.get("started")
    when = f", begun {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if began else ""
    return f"rayseg {version}{when}"
