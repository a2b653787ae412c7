"""Make the picture of docs/correct.md from a finished demo run: part of a scene with clicks | map | corrected map.

python docs/clicks.py runs/demo docs/images/correct.png

The clicks are simulated: at places drawn at random among the wrong pixels inside of areas of wrong pixels. The
clicks and the corrected run are left next to the run, as clicks.geojson and corrected.
"""

import json
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
from scipy.ndimage import binary_erosion

import rayseg
from rayseg.engine.run import read
from rayseg.io import masks
from rayseg.io.maps import mapped_tiles, pixel_lonlat, read_tile
from rayseg.io.pictures import mosaic

SIDE, GAP, COUNT = 480, 12, 20
"""Pixels of a panel and between panels; clicks."""


def main(run: str, target: str) -> None:
    """Write the picture of `run` and its correction to `target`."""
    # 1. clicks inside wrong areas of the first tiles
    tiles = mapped_tiles(run)
    table = masks.table_of(tiles[0].href)
    catalog = read(run)["region"]["catalog"]
    truth, rng = masks.masks_of(f"{catalog}#truth/gpc", names=table.names), np.random.default_rng(0)
    wrong = []
    for tile in tiles:
        truth_HW = masks.read_classes(truth, tile.tile.grid, tile.tile.window, table)
        wrong_HW = binary_erosion((read_tile(tile, "classes")[0] != truth_HW) & (truth_HW != 255), iterations=2)
        wrong += [(tile, row, col, int(truth_HW[row, col])) for row, col in np.argwhere(wrong_HW).tolist()]
    chosen = [wrong[at] for at in rng.choice(len(wrong), COUNT, replace=False)]
    features = [
        {
            "type": "Feature",
            "geometry": {"type": "Point", "coordinates": pixel_lonlat(tile.tile, row, col)},
            "properties": {"class": table.names[value]},
        }
        for tile, row, col, value in chosen
    ]
    clicks = Path(run).parent / "clicks.geojson"
    clicks.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    # 2. the corrected run
    out = Path(run).parent / "corrected"
    rayseg.correct(run, clicks=str(clicks), out=str(out), engine="inline")
    # 3. around the tile with most clicks, at full resolution
    counts = [sum(tile is other for other, *_ in chosen) for tile in tiles]
    shown = tiles[int(np.argmax(counts))]
    rows, cols = zip(*[(row, col) for tile, row, col, _ in chosen if tile is shown], strict=True)
    height, width = shown.tile.window.height, shown.tile.window.width
    top = int(np.clip(np.median(rows) - SIDE / 2, 0, height - SIDE))
    left = int(np.clip(np.median(cols) - SIDE / 2, 0, width - SIDE))
    part = (slice(top, top + SIDE), slice(left, left + SIDE))
    views = [
        mosaic(
            [next(tile for tile in mapped_tiles(root) if tile.tile.id == shown.tile.id)],
            size=max(height, width),
            title="",
        )
        for root in (run, str(out))
    ]
    panels = [views[0].imagery()[part][..., :3].copy(), *(view.map(table)[part][..., :3].copy() for view in views)]
    for panel in panels:
        for row, col in zip(rows, cols, strict=True):
            at = (
                slice(max(0, row - top - 4), max(0, row - top + 5)),
                slice(max(0, col - left - 4), max(0, col - left + 5)),
            )
            panel[at] = (255, 80, 0)
    gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    matplotlib.image.imsave(target, np.concatenate([panels[0], gap, panels[1], gap, panels[2]], axis=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
