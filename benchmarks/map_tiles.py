"""Map tiles of a run of 10,000 tiles: 8 clients that each ask for one tile after the other, by layer and zoom.

The run is made of 16 class maps (links) and scenes of 2,048 px (copies with a place of their own), so that it is there
within minutes. Target: p99 of every zoom at most 300 ms on two cores.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from pathlib import Path

import mercantile
import numpy as np
import rasterio
from measure import show
from serve import free_port, ms, server, used

SCENE = 2048


def write_run(root: Path, across: int, size: int) -> None:
    """Write a run of across x across tiles of some px, and its imagery."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rayseg.engine.ledger import Ledger, Record
    from rayseg.geo.grid import Grid, Tile, Window
    from rayseg.io import cog
    from rayseg.io.rasters import source_of_file
    from rayseg.stages.read import tile_rows
    from rayseg.vision.color import ClassTable

    rng, grid = np.random.default_rng(0), Grid("EPSG:32650", (2.0, 2.0), (0.0, 0.0))
    corner = Window(2048 * 122, -2048 * 1074, SCENE, SCENE)
    table = ClassTable(((0, "background", (0, 0, 0)), (1, "field", (0, 158, 115)), (2, "wood", (200, 100, 0))))
    # 1. imagery: one picture, at many places
    root.mkdir()
    image_CHW = rng.integers(40, 200, (3, SCENE // 4, SCENE // 4), np.uint8).repeat(4, 1).repeat(4, 2)
    first = root / "scene.tif"
    cog.write_image(first, image_CHW, grid, corner, bands=("red", "green", "blue"))
    count, sources = -(-across * size // SCENE), []
    for row in range(count):
        for col in range(count):
            path = root / f"scene-{row}-{col}.tif"
            shutil.copy(first, path)
            place = Window(corner.col + col * SCENE, corner.row + row * SCENE, SCENE, SCENE)
            with rasterio.open(path, "r+", IGNORE_COG_LAYOUT_BREAK="YES") as dataset:
                dataset.transform = grid.transform(place)
            sources.append(source_of_file(str(path), path.stem))
    # 2. class maps: 16 files under many names
    rows = tile_rows(sources, None, size=size, halo=0)
    (root / "steps/predict").mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist(rows), root / "steps/predict/manifest.parquet")
    ledger, files = Ledger(str(root / "steps/predict/ledger")), []
    for at, row in enumerate(rows):
        tile = Tile.from_row(row)
        path = root / "tiles" / tile.id / "classes.tif"
        path.parent.mkdir(parents=True)
        if at < 16:
            classes_HW = rng.integers(0, 3, (size // 16, size // 16), np.uint8).repeat(16, 0).repeat(16, 1)
            cog.write_classes(path, classes_HW, tile.grid, tile.window, table)
            values, counts = np.unique(classes_HW, return_counts=True)
            files.append((path, {str(v): int(c) for v, c in zip(values, counts, strict=True)}))
        else:
            path.hardlink_to(files[at % 16][0])
        counts = files[at % 16][1]
        facts = {"counts": counts, "areas": {value: 4.0 * pixels for value, pixels in counts.items()}}
        facts |= {"pairs": 1, "changes": 0}
        ledger.write(Record(tile.id, "done", seconds={"Predict": 1.0}, facts=facts))
    about = {"pipeline": "predict", "region": {"name": "made"}, "config": {"predict": {"tile": size}, "seed": 1}}
    about |= {"status": "done", "steps": {}, "command": "rayseg predict", "versions": {"rayseg": "0.1.0"}}
    (root / "run.json").write_text(json.dumps(about))


def places(bounds: list[float], zoom: int, count: int) -> list[tuple[int, int]]:
    """(x, y) of web tiles as people look at them: walks of neighbours from random places."""
    west, south, east, north = bounds
    found, draw = [], random.Random(zoom)
    while len(found) < count:
        tile = mercantile.tile(draw.uniform(west, east), draw.uniform(south, north), zoom)
        found += [(tile.x + dx, tile.y + dy) for dy in range(2) for dx in range(4)]
    return found[:count]


async def asked(port: int, layer: str, zoom: int, wanted: list[tuple[int, int]], clients: int) -> list[float]:
    """Seconds of each answer; a 503 counts as infinite."""
    import aiohttp

    waiting, taken = list(wanted), []

    async def client(session):
        while waiting:
            x, y = waiting.pop()
            began = time.perf_counter()
            url = f"http://127.0.0.1:{port}/v1/runs/run/tiles/{zoom}/{x}/{y}.png?layer={layer}"
            async with session.get(url) as answer:
                await answer.read()
            taken.append(time.perf_counter() - began if answer.status in {200, 204} else float("inf"))

    async with aiohttp.ClientSession() as session:
        await asyncio.gather(*(client(session) for _ in range(clients)))
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--across", type=int, default=100, help="Tiles of the run along each side.")
    parser.add_argument("--size", type=int, default=512, help="px of a tile of the run along each side.")
    parser.add_argument("--count", type=int, default=200, help="Web tiles of each layer and zoom.")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--keep", type=Path, help="Folder of the run, made if it is not there.")
    arguments = parser.parse_args()
    folder = arguments.keep or Path(tempfile.mkdtemp())
    if not (folder / "run").exists():
        folder.mkdir(exist_ok=True)
        write_run(folder / "run", arguments.across, arguments.size)
    port = free_port()
    rows = []
    with server(["-m", "rayseg", "view", str(folder / "run"), "--no-browser", "--port", str(port)], port) as process:
        import httpx

        began = time.perf_counter()
        run = httpx.get(f"http://127.0.0.1:{port}/v1/runs/run", timeout=300).json()
        print(f"  first description {time.perf_counter() - began:.1f} s, imagery from zoom {run['minzoom']}")
        asyncio.run(asked(port, "classes", 8, places(run["bounds"], 8, 1), 1))  # begins the mosaic
        time.sleep(60)
        for layer in ("classes", "imagery"):
            for zoom in range(8, 19):
                if layer == "imagery" and zoom < run["minzoom"]:
                    continue
                before, wanted = used(process.pid), places(run["bounds"], zoom, arguments.count)
                taken = asyncio.run(asked(port, layer, zoom, wanted, arguments.clients))
                cpu = 1000 * (used(process.pid) - before) / len(taken)
                load = os.getloadavg()[0]
                shown = [f"{ms(taken, share):.0f}" for share in (0.5, 0.99)]
                rows.append([layer, zoom, len(taken), *shown, f"{cpu:.1f}", f"{load:.1f}"])
                print(" ", *rows[-1], flush=True)
    columns = ["layer", "zoom", "web tiles", "p50 ms", "p99 ms", "CPU ms/tile", "load"]
    show(f"{arguments.across**2:,} tiles, {arguments.clients} clients", columns, rows)
    if not arguments.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    os.environ.setdefault("RAYSEG_CACHE", tempfile.gettempdir())
    main()
