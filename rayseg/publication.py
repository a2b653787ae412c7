"""The step that every pipeline ends with: what was mapped, how well and how fast, on one page.

<run>/report/index.html   everything in one file      <run>/report/map.png   the map over the imagery
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from upath import UPath

from rayseg import report
from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Step
from rayseg.io import masks
from rayseg.io.maps import MappedTile, mapped_tiles, pixel_area_m2, seam_score
from rayseg.io.pictures import Picture, encoded, pictures_of, shown_colors
from rayseg.report import ClassShare, MapPicture, Stage, Timing
from rayseg.store import is_local, put, upath
from rayseg.vision.color import ClassTable, hex_of

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
"""Stage -> what a report calls it."""
MOST_MAPS = 4
Table = tuple[str, tuple[str, ...], list[tuple[str, ...]]]
"""(title, header, rows) of what a report lists."""


@dataclass(frozen=True)
class Extras:
    """What only the pipeline can tell a report.

    Attributes:
        title: of the page; by default the pipeline and the region.
        labels: what the model learnt from, as a sentence ("Learnt from 96 chips labelled gpc or not.").
        pictures: (title, image file or its path below the run, caption).
        tables: (title, header, rows).
        histories: training -> values of every epoch; by default what the run's steps wrote for TensorBoard.
        workers: copies of all stages together that the map was made with; by default one of each.
        timed: the step that looked at the imagery, if it is not the one that wrote the tiles.
    """

    title: str = ""
    labels: str = ""
    pictures: tuple[tuple[str, bytes | str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    histories: Mapping[str, Sequence[Mapping[str, float]]] = field(default_factory=dict)
    workers: int | None = None
    timed: Step | None = None


def write_report(
    step: Step,
    predicted: Step,
    polygons: Step | None = None,
    measured: Step | None = None,
    extras: Extras | None = None,
) -> dict[str, Any]:
    """Write the run's report; return where it is and its headline figures.

    Args:
        step: this one.
        predicted: the step that mapped the region.
        polygons: the step that joined its polygons.
        measured: the step that compared it with truth; a value without `overall` says there was none.
        extras: what only the pipeline can tell.
    """
    extras = extras or Extras()
    asked, tiles = runs.read(step.root), mapped_tiles(predicted.root, predicted.name)
    table = masks.table_of(tiles[0].href) if tiles else None
    classes = class_shares(tiles, table) if table else []
    evaluation = measured.value if measured and "overall" in measured.value else None
    timing = timing_of(extras.timed or predicted, tiles, workers=extras.workers)
    seams = seam_score(tiles)
    pictures = pictures_of(tiles, most=MOST_MAPS)
    ledgers = runs.status(step.root)["steps"]
    figures = _figures(classes, evaluation, timing, ledgers[predicted.name], polygons)
    summary = _summary(tiles, classes)
    content = report.Content(
        title=extras.title or f"{asked['pipeline']}: {asked['region']['name']}",
        lead=" ".join(filter(None, [summary, extras.labels])),
        figures=figures,
        maps=[_map_picture(picture, table) for picture in pictures if table],
        classes=classes,
        evaluation=evaluation,
        seams=seams,
        pictures=[(title, _image(step.root, image), caption) for title, image, caption in extras.pictures],
        tables=list(extras.tables),
        curves=[(name, report.curves(rows)) for name, rows in (extras.histories or histories(step.root)).items()],
        ledgers=ledgers,
        timing=timing,
        config=asked["config"],
        versions=asked.get("versions", {}),
        command=asked.get("command", ""),
        footer=_footer(asked),
    )
    put(upath(step.root) / "report" / "index.html", report.render(content).encode())
    if pictures and table:
        put(upath(step.root) / "report" / "map.png", encoded(pictures[0].map(table)))
    return _value(summary, classes, evaluation, timing, seams)


def write_page(
    root: str, extras: Extras, *, figures: Sequence[tuple[str, str, str]] = (), asked: Mapping[str, Any] | None = None
) -> None:
    """Write the report of work that mapped nothing.

    Args:
        root: prefix of the run, or of what else was done.
        extras: what there is to tell.
        figures: (label, value, note).
        asked: what run.json says, for `root`s without one.
    """
    ledgers = {} if asked else runs.status(root)["steps"]
    asked = asked or runs.read(root)
    content = report.Content(
        title=extras.title or f"{asked['pipeline']}: {asked['region']['name']}",
        lead=extras.labels,
        figures=list(figures),
        maps=[],
        classes=[],
        evaluation=None,
        seams=None,
        pictures=[(title, _image(root, image), caption) for title, image, caption in extras.pictures],
        tables=list(extras.tables),
        curves=[],
        ledgers=ledgers,
        timing=None,
        config=asked["config"],
        versions=asked.get("versions", {}),
        command=asked.get("command", ""),
        footer=_footer(asked),
    )
    put(upath(root) / "report" / "index.html", report.render(content).encode())


def headline(published: Step) -> str:
    """Where the report is, and in one line what it says."""
    value = published.value
    said = [value["summary"]]
    if value["mean_iou"] is not None:
        said.append(f"Mean IoU {value['mean_iou']:.3f}.")
    if value["km2_per_hour"] is not None:
        rate = value["km2_per_hour"]
        said.append(f"{rate:,.0f} km²/h." if rate >= 10 else f"{rate:.2g} km²/h.")
    return f"{_from_here(upath(published.root) / value['report'])}: {' '.join(said)}"


def _from_here(path: UPath) -> str:
    """The path as short as it can be told from the working folder."""
    here = Path.cwd()
    return str(Path(path.path).relative_to(here)) if is_local(path) and here in Path(path.path).parents else str(path)


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
    """What every class covers; areas are geodesic, tile by tile, and None if a tile has no georeference."""
    pixels: Counter[int] = Counter()
    areas: dict[int, float] | None = dict.fromkeys(table.values, 0.0)
    for tile in tiles:
        pixel_m2 = pixel_area_m2(tile.tile)
        areas = None if pixel_m2 is None else areas
        for value, count in tile.counts.items():
            pixels[value] += count
            if areas is not None and pixel_m2 is not None:
                areas[value] += count * pixel_m2
    total, painted = max(pixels.total(), 1), shown_colors(table)
    return [
        ClassShare(
            name=name,
            color=hex_of(color) if value in painted else None,
            pixels=pixels[value],
            share=pixels[value] / total,
            area_m2=None if areas is None else areas[value],
        )
        for value, name, color in table.classes
    ]


def timing_of(predicted: Step, tiles: Sequence[MappedTile], *, workers: int | None = None) -> Timing:
    """Where the time of the mapping step went, by its ledger and its own clock.

    Args:
        predicted: the step that looked at the imagery.
        tiles: what was made of it, for pixels and area.
        workers: copies of all stages together; None for one of each. Idle is None when the stages worked for longer
            than so many could.
    """
    seconds: Counter[str] = Counter(dict.fromkeys(STAGES.values(), 0.0))
    for record in Ledger(str(predicted.prefix / "ledger")).read().values():
        seconds.update({STAGES.get(stage, stage): spent for stage, spent in record.seconds.items()})
    seconds = Counter({stage: spent for stage, spent in seconds.items() if spent})
    wall, workers = predicted.seconds, workers or max(len(seconds), 1)
    idle = wall * workers - seconds.total()
    whole = max(wall * workers, seconds.total()) or 1.0
    pixels = sum(sum(tile.counts.values()) for tile in tiles)
    areas = [(pixel_area_m2(tile.tile), sum(tile.counts.values())) for tile in tiles]
    square_metres = sum(area * count for area, count in areas if area is not None)
    return Timing(
        wall=wall,
        workers=workers,
        stages=[Stage(name=name, seconds=spent, share=spent / whole) for name, spent in seconds.items()],
        idle=idle if idle >= 0 else None,
        pixels_per_second=pixels / wall if wall else None,
        km2_per_hour=square_metres / 1e6 / wall * 3600 if wall and square_metres else None,
    )


def _shown(classes: Sequence[ClassShare]) -> list[ClassShare]:
    """The classes worth naming, the largest first; not the background of a map of one class."""
    named = list(classes[1:]) if len(classes) == 2 else list(classes)
    return sorted((row for row in named if row["pixels"] or len(named) == 1), key=lambda row: -row["share"])


def _figures(
    classes: Sequence[ClassShare],
    evaluation: dict[str, Any] | None,
    timing: Timing,
    account: Mapping[str, Any],
    polygons: Step | None,
) -> list[tuple[str, str, str]]:
    """(label, value, note) of what is worth knowing first."""
    areas = [row["area_m2"] for row in classes if row["area_m2"] is not None]
    pixels = f"{report.count(sum(row['pixels'] for row in classes))} pixels"
    figures = [("mapped", report.area(sum(areas)), pixels) if areas else ("mapped", pixels, "")]
    for row in _shown(classes)[:2]:
        figures.append((row["name"], report.percent(row["share"]), report.area(row["area_m2"]) if areas else ""))
    if polygons and "count" in polygons.value:
        figures.append(("polygons", f"{polygons.value['count']:,}", ""))
    if evaluation:
        value, _, bounds = report.interval(evaluation["overall"]["mean_iou"]).partition(" ")
        figures.append(("mean IoU", value, f"95 %: {bounds.strip('()')}" if bounds else ""))
    settled = sum(account["counts"][status] for status in ("done", "empty", "nodata"))
    figures.append(("tiles", f"{settled:,}", f"of {account['planned']:,} planned"))
    if timing["km2_per_hour"]:
        figures.append(("speed", f"{report.count(timing['km2_per_hour'])} km²/h", ""))
    elif timing["pixels_per_second"]:
        figures.append(("speed", f"{report.count(timing['pixels_per_second'])} px/s", ""))
    return figures


def _summary(tiles: Sequence[MappedTile], classes: Sequence[ClassShare]) -> str:
    """One sentence, as `8.19 km² mapped in 8 tiles: 3.1 % gpc (0.255 km²).` reads."""
    if not tiles:
        return "Nothing was mapped."
    areas = [row["area_m2"] for row in classes if row["area_m2"] is not None]
    images = {tile.tile.grid.image for tile in tiles} - {None}
    where = _counted(len(images), "image") if images else _counted(len(tiles), "tile")
    size = report.area(sum(areas)) if areas else f"{report.count(sum(row['pixels'] for row in classes))} pixels"
    parts = [
        f"{report.percent(row['share'])} {row['name']}" + (f" ({report.area(row['area_m2'])})" if areas else "")
        for row in _shown(classes)[:3]
    ]
    return f"{size} mapped in {where}: {', '.join(parts)}."


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"


# -- pictures and histories --------------------------------------------------------------------------------------------


def _map_picture(picture: Picture, table: ClassTable) -> MapPicture:
    return MapPicture(
        title=picture.title,
        imagery=encoded(picture.imagery(), "webp"),
        map=encoded(picture.map(table), "webp"),
        height=picture.classes_HW.shape[0],
        width=picture.classes_HW.shape[1],
        metres=picture.metres,
        step=picture.step,
    )


def _image(root: str, image: bytes | str) -> bytes:
    return image if isinstance(image, bytes) else (upath(root) / image).read_bytes()


def histories(root: str) -> dict[str, list[dict[str, float]]]:
    """What the trainings of a local run wrote for TensorBoard: step -> values of every epoch, the last ones written."""
    if not is_local(root):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator  # slow to import

    found = {}
    for folder in sorted(upath(root).glob("steps/**/tensorboard")):
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0}).Reload()
        rows: dict[int, dict[str, float]] = {}
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                rows.setdefault(event.step, {"epoch": float(event.step + 1)})[tag] = event.value
        name = str(folder.parent.relative_to(upath(root) / "steps"))
        found[name] = [rows[epoch] for epoch in sorted(rows)]
    return {name: rows for name, rows in found.items() if rows}


def _footer(asked: Mapping[str, Any]) -> str:
    version = asked.get("versions", {}).get("rayseg", "")
    began = asked.get("started")
    when = f", begun {datetime.fromtimestamp(began, UTC):%Y-%m-%d %H:%M} UTC" if began else ""
    return f"rayseg {version}{when}"
