"""A run's report: one HTML file that needs nothing else, made of plain values and pictures."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any, TypedDict

import jinja2
import yaml

_INK = "#80868b"  # reads on light and on dark
_MAGIC = {b"\x89PNG": "image/png", b"RIFF": "image/webp", b"\xff\xd8": "image/jpeg", b"<": "image/svg+xml"}


class MapPicture(TypedDict):
    """The region from afar: `imagery` and `map` are image files; `metres` is its width, None without georeference."""

    title: str
    imagery: bytes
    map: bytes
    height: int
    width: int
    metres: float | None
    step: float


class ClassShare(TypedDict):
    """How much of the map is of a class; `color` is None if it is not painted, `area_m2` without georeference."""

    name: str
    color: str | None
    pixels: int
    share: float
    area_m2: float | None


class Stage(TypedDict):
    """Seconds that all copies of a stage worked, and their share of wall time x workers."""

    name: str
    seconds: float
    share: float


class Timing(TypedDict):
    """Where the time of a step went; `idle` = wall x workers - sum of the stages, None when it cannot be told."""

    wall: float
    workers: int
    stages: list[Stage]
    idle: float | None
    pixels_per_second: float | None
    km2_per_hour: float | None


class Content(TypedDict):
    """What a report shows; what is None or empty is left out.

    `lead` is a sentence or two, `figures` are (label, value, note), `pictures` (title, image file, caption), `tables`
    (title, header, rows), `curves` (title, drawings), `ledgers` the steps of `run.status`, `evaluation` the
    result of `rayseg.evaluation.evaluate`, `seams` that of `rayseg.io.maps.seam_score`.
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
    """The report as HTML text, with all pictures inside."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {
        "area": area,
        "count": count,
        "data_uri": data_uri,
        "duration": duration,
        "interval": interval,
        "percent": percent,
        "scale_bar": scale_bar,
        "yaml": _yaml,
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


def interval(measure: Mapping[str, float | None]) -> str:
    """`0.712 (0.661–0.752)`; a dash where the measure is not defined."""
    if measure["value"] is None:
        return "–"
    low, high = measure["low"], measure["high"]
    return f"{measure['value']:.3f}" + (f" ({low:.3f}–{high:.3f})" if low is not None and high is not None else "")


def _digits(number: float, digits: int = 3) -> str:
    """At least `digits` significant digits, thousands apart."""
    if number == 0 or abs(number) >= 10**digits:
        return f"{number:,.0f}"
    return f"{number:,.{max(0, digits - 1 - math.floor(math.log10(abs(number))))}f}"


def scale_bar(metres: float) -> tuple[str, float]:
    """(label, share of the picture's width) of a bar of 1, 2 or 5 x 10^n metres, a quarter of the width at most."""
    power = 10.0 ** math.floor(math.log10(metres / 4))
    length = max(factor * power for factor in (1, 2, 5) if factor * power <= metres / 4)
    return (f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"), length / metres


# -- pictures ----------------------------------------------------------------------------------------------------------


def data_uri(image: bytes) -> str:
    """An image file (PNG, WebP, JPEG, SVG) as a `data:` URI."""
    kind = next(kind for magic, kind in _MAGIC.items() if image.startswith(magic))
    return f"data:{kind};base64,{base64.b64encode(image).decode()}"


def curves(history: Sequence[Mapping[str, float]]) -> list[bytes]:
    """A training's values per epoch as SVG drawings: one of the losses, one of the measures.

    Args:
        history: name -> value of every epoch, in order; a name may be missing in some. `epoch` counts them.
    """
    names = list(dict.fromkeys(name for row in history for name in row if name != "epoch"))
    losses = [name for name in names if "loss" in name]
    return [_drawn(history, part) for part in (losses, [name for name in names if name not in losses]) if part]


def _drawn(history: Sequence[Mapping[str, float]], names: Sequence[str]) -> bytes:
    from matplotlib.figure import Figure  # drawn at the end of a run, imported then
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(4.8, 2.8), layout="constrained")
    axes = figure.subplots()
    for name in names:
        points = [(row.get("epoch", at), row[name]) for at, row in enumerate(history, 1) if name in row]
        axes.plot(*zip(*points, strict=True), label=name.replace("_", " "), linewidth=1.6, marker=".", markersize=4)
    axes.set_xlabel("epoch", color=_INK)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _finished(figure, axes)


def learning_curves(lines: Mapping[str, Sequence[tuple[float, ...]]], *, across: str, up: str) -> bytes:
    """Lines of a measure over the number of labels, as an SVG drawing.

    Args:
        lines: name -> points (x, y), or (x, y, low, high) where there is an interval.
        across: what x is.
        up: what y is.
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
    """The drawing in the report's colours, as SVG."""
    from matplotlib import rc_context

    axes.tick_params(colors=_INK, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=9)
    sink = io.BytesIO()
    with rc_context({"svg.hashsalt": "rayseg"}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    return sink.getvalue()


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
