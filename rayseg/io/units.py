"""Scale, offset and processing baseline of scenes that one network sees: convert them to one unit, or refuse them."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from rayseg.errors import DataError
from rayseg.io.sources import STORED, Source, source_of_file

Unit = tuple[float, float]
"""(scale, offset) from stored values to physical ones."""
BASELINE = 4.0
"""From this Sentinel-2 processing baseline on, stored values are 1000 higher (BOA_ADD_OFFSET, RADIO_ADD_OFFSET)."""
_PRODUCT = re.compile(r"S2[A-D]_.*_N(\d{4})(?![0-9A-Za-z])", re.IGNORECASE)
_NUMBER = re.compile(r"N?(\d\d)\.?(\d\d)|(\d\d?(?:\.\d+)?)", re.IGNORECASE)
_SHIFT = 8  # an integer type may lose an eighth of its range to a conversion, not more


def baseline_text(text: str) -> str:
    """A Sentinel-2 processing baseline ("05.09", "0509", "N0509") as "05.09"; a plain number as it is, else ""."""
    match = _NUMBER.fullmatch(text)
    return (match[3] or f"{match[1]}.{match[2]}") if match else ""


def baseline_in(name: str) -> str:
    """The processing baseline in the name of a Sentinel-2 product (`S2A_..._N0400_...`), "" if there is none."""
    match = _PRODUCT.search(name)
    return baseline_text(match[1]) if match else ""


def units_of(source: Source, bands: Sequence[str]) -> tuple[Unit, ...]:
    """(scale, offset) of each of `bands`, empty if the source does not state them."""
    own = _by_band(source)
    return tuple(own[band] for band in bands if band in own)


def common_units(sources: Sequence[Source], bands: Sequence[str] = ()) -> dict[str, Unit]:
    """Band -> the (scale, offset) to convert all sources to; empty if none states any.

    It is the unit whose zero has the highest stored value, so that a conversion never cuts off low values.
    """
    own = [_by_band(source) for source in sources]
    names = bands or sorted({name for units in own for name in units})
    stated = {name: {units[name] for units in own if name in units} for name in names}
    return {name: min(units, key=lambda unit: (unit[1] / unit[0], unit)) for name, units in stated.items() if units}


def converted(source: Source, units: Mapping[str, Unit]) -> Source:
    """The source, its values converted to `units` (band -> scale, offset) when they are read.

    It stays as it is if it states no units, or if its integer type cannot hold converted values.
    """
    if not source.units:
        return source
    goals = tuple(units.get(band, own) for band, own in zip(source.bands, source.units, strict=False))
    changes = tuple(_change(own, goal) for own, goal in zip(source.units, goals, strict=True))
    if not all(_holds(source.dtype, *change) for change in changes):
        return source
    return source if set(changes) == {STORED} else replace(source, units=goals, change=changes)


def expect_one_unit(sources: Sequence[Source], bands: Sequence[str] = ()) -> None:
    """Refuse sources whose stored values of a band mean different things.

    Args:
        sources: that one network sees; see `converted`.
        bands: those that it sees; () for all.

    Raises:
        DataError: scale or offset differ, only some sources state them, or Sentinel-2 scenes without stated offsets are
            from both sides of processing baseline 04.00, or only some state their baseline; the message names two.
    """
    ordered = sorted(sources, key=lambda source: source.item_id)
    # 1. Sentinel-2 scenes whose offset only their processing baseline determines
    known = [(source, baseline) for source in ordered if (baseline := _baseline(source)) is not None]
    old = [f"{source.item_id} is from Sentinel-2 processing baseline {b:05.2f}" for source, b in known if b < BASELINE]
    new = [f"{source.item_id} from {baseline:05.2f}" for source, baseline in known if baseline >= BASELINE]
    if old and new:
        raise DataError(
            f"{old[0]}, {new[0]}, expected one side of 04.00, whose stored values are 1000 higher; select scenes of "
            "one side, or state raster:bands with scale and offset"
        )
    stated = {source.item_id for source, _ in known}
    mute = [s.item_id for s in ordered if not s.units and s.item_id not in stated and s.dtype != "uint8"]
    if known and mute:  # 8-bit pictures of any baseline have no offset
        raise DataError(
            f"{known[0][0].item_id} is from Sentinel-2 processing baseline {known[0][1]:05.2f}, {mute[0]} states none, "
            "expected the baseline of all or of no scenes of a run, as values are 1000 higher from 04.00 on; state "
            "s2:processing_baseline, or raster:bands with scale and offset, in its item, or map them in two runs"
        )
    # 2. the same scale and offset for each band
    first: dict[str, Source] = {}
    for source in ordered:
        for band in bands or source.bands:
            if band not in source.bands or band == "alpha":
                continue
            other = first.setdefault(band, source)
            here, there = (_by_band(one).get(band) for one in (source, other))
            if here != there and not (here and there and np.allclose(here, there, rtol=1e-6, atol=1e-12)):
                raise DataError(
                    f"{other.item_id} states {band} as {_text(there)}, {source.item_id} as {_text(here)}, expected one "
                    "scale and offset for all scenes of a run; convert the scenes, state both in their items, or map "
                    "them in two runs"
                )


def _baseline(source: Source) -> float | None:
    """The Sentinel-2 processing baseline, by the item, its id or a file's path (`_N0400_`); None with stated units."""
    if source.units:
        return None
    names = (source.item_id, *(href for href, _ in source.assets))
    text = source.baseline or next((number for name in names if (number := baseline_in(name))), "")
    return float(text) if text else None


def with_dtype_of(source: Source, bands: Sequence[str]) -> Source:
    """The source with the pixel type of `bands` as its own, if that is known to be one."""
    own = dict(reversed([*zip(source.bands, source.dtypes, strict=False)]))
    dtypes = {own[band] for band in bands if band in own}
    return replace(source, dtype=dtypes.pop()) if len(dtypes) == 1 and "" not in dtypes else source


def expect_one_dtype(source: Source, bands: Sequence[str], *, model: str = "") -> None:
    """Refuse bands of several pixel types, which are not read into one image.

    Args:
        source: imagery.
        bands: those that are read.
        model: name of the model that needs the bands. Without one, files are opened for types that are unknown.

    Raises:
        DataError: the types differ; the message names bands and types, and how to choose.
    """
    if not source.dtypes:
        return
    hrefs = [href for href, names in source.assets for _ in names]
    # Only a file knows a type that its item does not state.
    types: dict[str, list[str]] = {}
    for name, href, dtype in zip(source.bands, hrefs, source.dtypes, strict=True):
        if name in bands and (dtype or not model):
            types.setdefault(dtype or source_of_file(href, source.item_id).dtype, []).append(name)
    if len(types) > 1:
        listing = "; ".join(f"{', '.join(names)} of {dtype}" for dtype, names in types.items())
        most = max(types.values(), key=len)
        remedy = f"choose bands, as --set bands=[{','.join(most)}]"
        if model:
            remedy = f"as model {model} needs them all, save them in one type"
        raise DataError(f"{source.item_id} has bands of several pixel types ({listing}), expected one type; {remedy}")


def _by_band(source: Source) -> dict[str, Unit]:
    """Band -> (scale, offset); the first band with a name counts."""
    return dict(reversed([*zip(source.bands, source.units, strict=False)]))


def _change(own: Unit, goal: Unit) -> Unit:
    """(factor, addend) from values stored in one unit to values stored in the other."""
    factor, addend = own[0] / goal[0], (own[1] - goal[1]) / goal[0]
    # 0.1 / 0.0001 is not a whole number in binary: without rounding, pixels would be off by one.
    return (1.0 if math.isclose(factor, 1, rel_tol=1e-9) else factor), round(addend, 9)


def _holds(dtype: str, factor: float, addend: float) -> bool:
    kind = np.dtype(dtype)
    return kind.kind == "f" or (factor == 1 and abs(addend) <= np.iinfo(kind).max / _SHIFT)


def _text(unit: Unit | None) -> str:
    return f"stored x {unit[0]:g} + offset {unit[1]:g}" if unit else "stored, without scale and offset"
