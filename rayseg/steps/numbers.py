"""Numbers as text: areas, shares, counts, times and measures, for people."""

import math
from collections.abc import Mapping


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


def counted(number: int, what: str) -> str:
    """`1 tile`, `1,024 tiles`."""
    return f"{number:,} {what}{'s' * (number != 1)}"
