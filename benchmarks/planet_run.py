"""A mapped run of very many tiles on a local S3 server, made from facts: the driver's part can be measured alone.

The ledger of the map has all that `WriteTile` records of a tile: pixels and areas of classes, changes, the packed item,
sizes and checksums of the files. Of the tiles' files none is kept: the server answers every `classes.tif` with one
small raster. The polygons lie in the files that the workers of the step `polygons` gather, `PER_TILE` parts a tile, one
of which continues in the next tile.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import shapely
from measure import measured, peak_mib, served, show

SIDE, PER_TILE = 2048, 4
CLASSES = ((0, "background", (0, 0, 0)), (1, "found", (0, 158, 115)))
BUCKET = "s3://planet"
ZONES = (31, 32, 33)
SERVER = """
import sys
from pathlib import Path
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
moto = DomainDispatcherApplication(create_backend_app)
raster = Path(sys.argv[2]).read_bytes()
def app(environ, start):
    if not environ["PATH_INFO"].endswith("/classes.tif"):
        return moto(environ, start)
    first, last = 0, len(raster) - 1
    if wanted := environ.get("HTTP_RANGE"):
        begin, _, end = wanted.removeprefix("bytes=").partition("-")
        first, last = int(begin), min(int(end or last), last)
    part = raster[first : last + 1]
    headers = [("Content-Length", str(len(part))), ("Accept-Ranges", "bytes"), ("ETag", '"one"')]
    headers += [("Content-Range", f"bytes {first}-{last}/{len(raster)}")] if wanted else []
    start("206 Partial Content" if wanted else "200 OK", headers)
    return [] if environ["REQUEST_METHOD"] == "HEAD" else [part]
run_simple("127.0.0.1", int(sys.argv[1]), app, threaded=True)
"""


def raster(path: Path):
    """A map of one tile, with overviews."""
    from upath import UPath

    from rayseg.geo.grid import Grid, Window
    from rayseg.io import cog
    from rayseg.vision.color import ClassTable

    classes_HW = np.random.default_rng(0).integers(0, 2, (32, 32), np.uint8).repeat(64, axis=0).repeat(64, axis=1)
    grid = Grid("EPSG:32631", (0.5, 0.5), (0.0, 0.0))
    cog.write_classes(UPath(path), classes_HW, grid, Window(0, 0, SIDE, SIDE), ClassTable(CLASSES))


def _item(tile, sources):
    """The item of a tile as JSON text, to be filled in for others of its grid."""
    from rayseg.io import stac_write
    from rayseg.io.written_files import WrittenFile
    from rayseg.vision.color import ClassTable

    bands = ({"name": "class", "data_type": "uint8", "nodata": 255.0},)
    files = [
        WrittenFile(name, 31_415, "1220" + "0" * 64, bands * name.endswith(".tif"))
        for name in ("classes.tif", "scores.tif", "parts.parquet")
    ]
    return stac_write.item_of(
        tile.id, tile.grid, tile.window, folder=f"{BUCKET}/run/tiles/{tile.id}", files=files, sources=sources,
        model=f"{BUCKET}/run/models/m/item.json", table=ClassTable(CLASSES),
    ).to_dict(include_self_link=False, transform_hrefs=False)  # fmt: skip


def _zone(zone, count):
    """Tiles of a zone in rows, and their scene, which is not there."""
    from rayseg.geo.grid import Grid, Window, tile_at
    from rayseg.io.sources import Source

    grid, wide = Grid(f"EPSG:{32600 + zone}", (0.5, 0.5), (0.0, 0.0)), int(np.ceil(np.sqrt(count)))
    extent = Window(200 * SIDE, -5000 * SIDE, wide * SIDE, -(-count // wide) * SIDE)
    tiles = (
        tile_at(grid, extent.row // SIDE + at // wide, extent.col // SIDE + at % wide, size=SIDE, extent=extent)
        for at in range(count)
    )
    side = wide * 1024.0
    place = (grid.crs, (side / 1000, 0.0, 204_800.0, 0.0, -side / 1000, 5_120_000.0), 1000, 1000, "uint8", None)
    source = Source(
        f"scene-{zone}", ((f"{BUCKET}/scene.tif", ("red", "green", "blue")),), *place, "2025-06-01T00:00:00Z"
    )
    return tiles, source


def _shapes():
    """(1, parts) of a tile at the origin: two within, two that touch each other over the border between two tiles."""
    boxes = [(300, 300, 420, 380), (900, 1200, 1000, 1333), (0, 600, 60, 700), (1980, 600, 2048, 700)]
    return np.array(boxes, float)


def parts_of(tiles):
    """The parts of some tiles of one grid, as `polygons_of` makes them."""
    from rayseg.io import vectors

    boxes_B4, count = _shapes(), len(tiles)
    left, top = (np.repeat([getattr(tile.window, name) for tile in tiles], PER_TILE) for name in ("col", "row"))
    west, north, east, south = np.tile(boxes_B4, (count, 1)).T + np.stack([left, top, left, top])
    pixels = ((east - west) * (south - north)).astype(np.int64)
    columns = {
        "class": np.ones(len(left), np.uint8), "geometry": shapely.to_wkb(shapely.box(west, north, east, south)),
        "pixels": pixels, "score_sum": pixels * 200, "first_row": north, "first_col": west, "col": left, "row": top,
        "col1": left + SIDE, "row1": top + SIDE, "edge": np.tile([False, False, True, True], count),
    }  # fmt: skip
    schema = vectors.no_parts(tiles[0].grid).schema
    return pa.Table.from_arrays([pa.array(columns[field.name]).cast(field.type) for field in schema], schema=schema)


def put_run(count):
    """The manifest and ledger of the map, and the gathered parts, of a run of `count` tiles."""
    from rayseg.engine.ledger import COLUMNS
    from rayseg.engine.manifest import PART, Manifest, write_rows
    from rayseg.io import stac_write
    from rayseg.steps import map as mapping
    from rayseg.store import upath

    root, rows, ledger = f"{BUCKET}/run", [], []
    predict = upath(root) / "steps" / "predict"
    gathered = []
    facts = {"counts": {"0": 4_000_000, "1": 194_304}, "areas": {"0": 1e6, "1": 48_576.0}, "pairs": 8_384_512}
    rest = {"status": "done", "reason": "", "attempt": 1, "files": "{}"}
    seconds = json.dumps({"ReadTile": 0.4, "Predict": 3.1, "WriteTile": 0.6})
    number = 0

    def flush():
        nonlocal ledger, number
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(ledger, schema=COLUMNS), sink)
        upath(predict / "ledger" / f"records-{number:06d}.parquet").write_bytes(sink.getvalue().to_pybytes())
        ledger, number = [], number + 1

    for zone in ZONES:
        tiles, source = _zone(zone, count // len(ZONES))
        text, item, waiting, known = json.dumps([source.to_row()]), None, [], []
        for at, tile in enumerate(tiles):
            item = item or _item(tile, [source])
            moved = 1e-5 * at
            west, south, east, north = (round(side + moved, 7) for side in item["bbox"])
            ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
            own = item | {"id": tile.id, "bbox": [west, south, east, north]}
            own["geometry"] = {"type": "Polygon", "coordinates": [ring]}
            changed = facts | {"changes": 12_345 + at % 999, "parts": PER_TILE, "item": stac_write.packed(own)}
            names = [f"tiles/{tile.id}/{name}" for name in ("classes.tif", "scores.tif", "parts.parquet")]
            files = json.dumps({name: [31_415, f"{at:032x}"] for name in [*names, f"tiles/{tile.id}/{tile.id}.json"]})
            ledger.append(rest | {"id": tile.id, "seconds": seconds, "facts": json.dumps(changed), "files": files})
            known.append(tile.to_row() | {"sources": text, "refused": ""})
            waiting.append(tile)
            if len(ledger) == PART:
                flush()
        rows.append(Manifest.of([known]).table)
        gathered += waiting
    if ledger:
        flush()
    write_rows(predict / "manifest.parquet", Manifest(pa.concat_tables(rows)), root=root)
    put_gathered(mapping, root, gathered)
    put_scene(upath(f"{BUCKET}/scene.tif"))
    request = {"pipeline": "predict", "region": {"name": "planet"}, "config": {}, "status": "done", "reason": ""}
    upath(f"{root}/run.json").write_text(json.dumps(request | {"steps": {}}))


def put_gathered(mapping, root, tiles):
    """What the workers of the step `polygons` leave: files of `GATHERED` tiles each, their rows and their records."""
    from rayseg.engine.ledger import COLUMNS
    from rayseg.engine.manifest import Manifest, write_rows
    from rayseg.io.vectors import tile_order, write_parts
    from rayseg.store import upath

    step, rows, grids = upath(root) / "steps" / "polygons", [], {}
    for tile in tiles:
        grids.setdefault(tile.grid, []).append(tile)
    for grid, some in sorted(grids.items(), key=lambda entry: tile_order(entry[0], 0, 0)):
        some.sort(key=lambda tile: tile_order(grid, tile.window.row, tile.window.col))
        for start in range(0, len(some), mapping.GATHERED):
            part = some[start : start + mapping.GATHERED]
            paths = json.dumps([f"tiles/{tile.id}/parts.parquet" for tile in part])
            rows.append({"id": f"parts-{len(rows):06d}", "paths": paths})
            write_parts(step / "parts" / f"{rows[-1]['id']}.parquet", parts_of(part))
    write_rows(step / "manifest.parquet", Manifest.of([rows]))
    plain = {"status": "done", "reason": "", "attempt": 1, "seconds": "{}", "facts": "{}", "files": "{}"}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"id": row["id"]} | plain for row in rows], schema=COLUMNS), sink)
    (step / "ledger" / "records-0.parquet").write_bytes(sink.getvalue().to_pybytes())


def put_scene(path):
    """Imagery of a zone, seen from afar."""
    from PIL import Image

    with tempfile.NamedTemporaryFile(suffix=".tif") as file:
        Image.fromarray(np.full((1000, 1000, 3), 90, np.uint8)).save(file.name)
        path.write_bytes(Path(file.name).read_bytes())


def part(name: str) -> dict[str, float]:
    """Seconds and peak memory of one of the driver's parts, in this process."""
    from rayseg.engine import run as runs
    from rayseg.engine.run import Engine, Step
    from rayseg.steps import map as mapping
    from rayseg.steps import report

    # The run has no model.
    mapping.bundle.description = lambda _prefix: SimpleNamespace(classes=CLASSES)
    root, engine = f"{BUCKET}/run", Engine("inline")
    predicted = Step("predict", root, "key", engine, {"bundle": f"{root}/models/m"}, 3600.0)
    parts = {
        "join": lambda: mapping.join_polygons(Step("polygons", root, "key", engine), predicted, "found"),
        "publish": lambda: mapping.publish(Step("publish", root, "key", engine), predicted, "Planet"),
        "report": lambda: report.write_report(Step("report", root, "key", engine), predicted),
        "status": lambda: runs.status(root)["steps"]["predict"]["counts"],
        "verify": lambda: {"damaged": len(runs.verify(root)["damaged"])},
    }
    with measured() as cost:
        result = parts[name]()
    shown = {key: value for key, value in result.items() if not isinstance(value, dict | list)}
    return {"wall": cost.wall, "cpu": cost.cpu, "MiB": peak_mib(), "result": str(shown)[:300]}


def environment(address: str) -> dict[str, str]:
    """Variables by which a process finds the server."""
    return os.environ | {
        "AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": address,
    }  # fmt: skip


def show_driver(count: int, asked: list[str]) -> None:
    """Make a run and measure each part in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        raster(Path(name) / "classes.tif")
        with served(SERVER, Path(name) / "classes.tif") as address:
            os.environ.update(environment(address))
            from rayseg.store import upath

            upath(BUCKET).fs.mkdir(BUCKET)
            with measured() as making:
                put_run(count)
            print(f"made {count:,} tiles in {making.wall:.0f} s", flush=True)
            for one in asked:
                # for py-spy or cProfile: the same line in another terminal
                code = f"import json, planet_run; print(json.dumps(planet_run.part({one!r})))"
                words, here = [sys.executable, "-W", "ignore", "-c", code], Path(__file__).parent
                done = subprocess.run(words, check=False, capture_output=True, text=True, cwd=here)
                print(one, done.stdout.strip() or done.stderr[-3000:], f"load {os.getloadavg()[0]:.1f}", flush=True)
                if not done.returncode:
                    found = json.loads(done.stdout.splitlines()[-1])
                    rows.append([one, found["wall"], found["cpu"], found["MiB"], found["result"].replace("|", "/")])
    show(f"The driver of a run of {count:,} tiles", ("part", "s", "CPU s", "peak MiB", "result"), rows)
