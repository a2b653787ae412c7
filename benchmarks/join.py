"""Joining the polygons of a map: seconds and the most memory of the process, in which only this happens.

Each tile of 512 px holds squares of 4 px, 8 px apart; those on its borders are whole only after joining. `MiB before`
is what the process imports; pages of the temporary file count while they are in use.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import measured, peak_mib, show

SIDE, STEP = 512, 8
COLUMNS = 25


def write_parts(folder, tiles):
    """The parts of a map of so many tiles, a file each."""
    from rayseg.geo.grid import Grid, Window
    from rayseg.io import vectors

    grid = Grid("EPSG:32650", (10.0, 10.0), (0.0, 0.0))
    on_N = np.isin((np.arange(SIDE) + STEP // 4) % STEP, range(STEP // 2))  # a square lies across each border
    classes_HW = np.where(np.logical_and.outer(on_N, on_N), 1, 255).astype(np.uint8)
    for number in range(tiles):
        row, col = divmod(number, COLUMNS)
        window = Window(20_000 + col * SIDE, -400_000 + row * SIDE, SIDE, SIDE)
        parts = vectors.polygons_of(classes_HW, np.full_like(classes_HW, 200)[None], grid, window)
        vectors.write_parts(folder / f"{number:05}.parquet", parts)


def join(folder):
    """Seconds, MiB and polygons of the joined parts in a folder."""
    from rayseg.io import vectors
    from rayseg.io.tables import concurrently
    from rayseg.vision.color import ClassTable

    table = ClassTable(((0, "background", (0, 0, 0)), (1, "found", (0, 158, 115))))
    before = peak_mib()
    with measured() as cost:
        parts = concurrently(vectors.read_parts, sorted(folder.glob("*.parquet")))
        count, _ = vectors.write_joined(parts, table, folder.with_suffix(".joined"))
    return [count, cost.wall, cost.cpu, before, peak_mib()]


def main():
    """Write the parts, join them in a process of its own, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, nargs="+", default=[1, 125])
    parser.add_argument("--join", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.join:
        print(json.dumps(join(options.join)))
        return
    rows = []
    for tiles in options.tiles:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "parts"
            folder.mkdir()
            write_parts(folder, tiles)
            words = [sys.executable, __file__, "--join", str(folder)]
            rows.append([tiles, *json.loads(subprocess.run(words, check=True, capture_output=True).stdout)])
    show("Joining polygons", ("tiles", "polygons", "wall s", "CPU s", "MiB before", "MiB at most"), rows)


if __name__ == "__main__":
    main()
