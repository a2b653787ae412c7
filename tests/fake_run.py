"""A run as `predict` leaves it, made of arrays: imagery, manifest, ledger, tiles."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.run import Engine, Step
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io import cog
from rayseg.io.rasters import source_of_file
from rayseg.stages.read import tile_rows
from rayseg.vision.color import ClassTable

GPC = ClassTable(((0, "background", (0, 0, 0)), (1, "gpc", (0, 158, 115))))
UTM = Grid("EPSG:32650", (2.0, 2.0), (0.0, 0.0))
CORNER = Window(2048 * 122, -2048 * 1074, 0, 0)  # near the zone's meridian, on a corner of tiles
NODATA = 255


def blobs(height, width, *, seed=0, share=0.25):
    """A (height, width) uint8 mask of 0 and 1 in soft shapes."""
    rng = np.random.default_rng(seed)
    rows, cols = np.mgrid[:height, :width]
    waves = [rng.uniform(0.5, 3, 2) * 6.28 / max(height, width) for _ in range(6)]
    field = sum(np.sin(rows * a + cols * b + rng.uniform(0, 6)) for a, b in waves)
    return (field > np.quantile(field, 1 - share)).astype(np.uint8)


def picture(mask_HW, *, seed=0):
    """An RGB image (3, height, width) uint8 in which the mask is green on brown; never 0."""
    rng = np.random.default_rng(seed)
    base = np.where(mask_HW[None], np.array([60, 150, 90])[:, None, None], np.array([150, 120, 95])[:, None, None])
    return np.clip(base + rng.normal(0, 9, (3, *mask_HW.shape)), 1, 255).astype(np.uint8)


def make(root, images, *, size=64, grid=UTM, table=GPC, fates=None):
    """Write a run at `root` and return its finished `predict` step.

    images: id -> (image_CHW, classes_HW, (row, col) from CORNER, ignored without CRS); fates: tile id -> (status,
    reason) of tiles that are not done.
    """
    root.mkdir(parents=True, exist_ok=True)
    sources, classes = [], {}
    for name, (image_CHW, classes_HW, (row, col)) in images.items():
        own = grid if grid.crs else Grid(None, (1.0, 1.0), (0.0, 0.0), name)
        window = place(classes_HW, row, col) if grid.crs else Window(0, 0, *classes_HW.shape[::-1])
        path = root.parent / f"{name}.tif"
        cog.write_image(path, image_CHW, own, window, bands=("red", "green", "blue"))
        sources.append(source_of_file(str(path), name))
        classes[name] = (window, classes_HW)
    rows = tile_rows(sources, None, size=size, halo=0)
    predict = root / "steps" / "predict"
    predict.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), predict / "manifest.parquet")
    for row in rows:
        _tile(root, Tile.from_row(row), classes, table, (fates or {}).get(row["id"]))
    asked = {"pipeline": "gpc", "region": {"name": "demo"}, "config": {"predict": {"tile": size}, "seed": 1337}}
    about = {"status": "running", "command": "rayseg run pipeline gpc --region demo", "versions": {"rayseg": "0.1.0"}}
    (root / "run.json").write_text(json.dumps(asked | about))
    return Step("predict", str(root), "key", Engine("inline"), {"bundle": str(root / "models" / "gpc")}, 12.5)


def place(classes_HW, row, col):
    """The window of an array whose upper-left pixel is (row, col) from CORNER."""
    return Window(CORNER.col + col, CORNER.row + row, *classes_HW.shape[::-1])


def _tile(root, tile, classes, table, fate):
    ledger = Ledger(str(root / "steps" / "predict" / "ledger"))
    if fate:
        ledger.write(Record(tile.id, fate[0], fate[1], seconds={"ReadTile": 0.1}))
        return
    classes_HW = np.full((tile.window.height, tile.window.width), NODATA, np.uint8)
    for name, (window, values_HW) in classes.items():
        part = window.intersect(tile.window)
        if not part.empty and tile.grid.image in {None, name}:
            classes_HW[part.slices(tile.window)] = values_HW[part.slices(window)]
    cog.write_classes(root / "tiles" / tile.id / "classes.tif", classes_HW, tile.grid, tile.window, table)
    seconds = {"ReadTile": 0.2, "Predict": 1.5, "WriteTile": 0.3}
    ledger.write(Record(tile.id, "done", seconds=seconds, facts=facts(classes_HW)))


def facts(classes_HW):
    values, counts = np.unique(classes_HW[classes_HW != NODATA], return_counts=True)
    pairs = changes = 0
    for one, other in ((classes_HW[1:], classes_HW[:-1]), (classes_HW[:, 1:], classes_HW[:, :-1])):
        valid = (one != NODATA) & (other != NODATA)
        pairs, changes = pairs + int(valid.sum()), changes + int((valid & (one != other)).sum())
    return {
        "counts": {str(v): int(c) for v, c in zip(values, counts, strict=True)},
        "pairs": pairs,
        "changes": changes,
    }
