"""Bytes of a run before it is begun: what tiles will be read from files, and what a probe wrote, grown to the whole."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayseg.geo.grid import Tile, Window
from rayseg.io import rasters
from rayseg.io.sources import Source
from rayseg.store import STORE_ERRORS, upath

Row = dict[str, Any]
FRAME = 64 << 10
"""Bytes of a file beside the tiles that are taken to be there however many tiles there are."""
MOST_SIZES = 32
"""Files that are asked for their size."""


def bytes_read(tiles: Sequence[Row], *, margin: int) -> int | None:
    """Bytes of the files that the tiles and `margin` px around them touch, from the sizes of some of the files.

    A pixel that several scenes hold counts once for each: which is read is known only when it is.
    """
    pixels: Counter[Source] = Counter()
    known: dict[str, Source] = {}
    for row in tiles:
        tile = Tile.from_row(row)
        around = _around(tile.window, margin)
        for text in map(json.dumps, json.loads(row["sources"])):
            source = known.setdefault(text, Source.from_row(json.loads(text)))
            part = rasters.footprint(source, tile.grid)
            share = _area(part.intersect(around)) / max(_area(part), 1)
            pixels[source] += round(share * source.height * source.width)
    every = max(1, len(pixels) // MOST_SIZES)
    some = [source for at, source in enumerate(pixels) if at % every == 0]
    sizes = [_size(source) for source in some]
    if not some or None in sizes:
        return None
    of_files = sum(size for size in sizes if size is not None)
    return round(of_files / sum(source.height * source.width for source in some) * pixels.total())


UNSIZED: tuple[type[Exception], ...] = (ValueError, TypeError, *STORE_ERRORS)
"""What asking for the size of a file raises where nobody says it."""


def _size(source: Source) -> int | None:
    try:
        return sum(int(upath(href).stat().st_size) for href, _ in source.assets)
    except UNSIZED:
        return None


def _around(window: Window, margin: int) -> Window:
    side = 2 * margin
    return Window(window.col - margin, window.row - margin, window.width + side, window.height + side)


def _area(window: Window) -> int:
    return 0 if window.empty else window.width * window.height


def bytes_written(root: Path, growth: float, growths: Mapping[str, float]) -> int:
    """Bytes of the whole run, told from a probe's: all grow but the report and the frames of files beside the tiles.

    Args:
        root: of the probe.
        growth: tiles of the run for each of the probe, by their pixels.
        growths: the same of folders that grow otherwise.
    """
    total = 0.0
    for path in root.rglob("*"):
        size = path.stat().st_size if path.is_file() else 0
        part = path.relative_to(root)
        made = next((folder for folder in growths if part.is_relative_to(folder)), part.parts[0])
        fixed = 0 if made in {"tiles", *growths} else size if made == "report" else min(size, FRAME)
        total += fixed + (size - fixed) * growths.get(made, growth)
    return round(total)
