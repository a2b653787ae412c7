"""Publishing a mapped region from an S3 server: collection.json, items.parquet and the joined polygons.

Small tiles of a run, with their items, parts and ledger, are put on a moto server. Each way then publishes them in a
fresh process and the files are compared: this checkout, and with --against another one, such as that of an earlier
version, which may read files of each tile. The server is on this machine; --latency adds the time that a request to a
real one takes, during which it does not compute.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import shapely
from measure import measured, peak_mib, served, show

SIDE = 64
CLASSES = ((0, "background", (0, 0, 0)), (1, "found", (0, 158, 115)))
BUCKET = "s3://publishing"


SERVER = """
import sys, time
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
app = DomainDispatcherApplication(create_backend_app)
def slow(environ, start):
    time.sleep(float(sys.argv[2]))
    return app(environ, start)
run_simple("127.0.0.1", int(sys.argv[1]), slow, threaded=True)
"""


def polygons(kind_HW, grid):
    """The parts of a tile at the grid's origin."""
    from rayseg.geo.grid import Window
    from rayseg.io import vectors

    classes_HW = kind_HW.astype(np.uint8)
    return vectors.polygons_of(classes_HW, classes_HW[None] * 200, grid, Window(0, 0, SIDE, SIDE))


def moved(parts, window):
    """The parts of the same pixels in another tile."""
    shift = {"col": window.col, "first_col": window.col, "col1": window.col}
    shift |= {"row": window.row, "first_row": window.row, "row1": window.row}
    place = np.array([window.col, window.row])
    outlines = shapely.transform(shapely.from_wkb(parts["geometry"]), lambda points: points + place)
    columns = [
        pc.add(parts[name], shift[name]) if name in shift else parts[name]
        for name in parts.column_names
        if name != "geometry"
    ]
    columns.insert(parts.column_names.index("geometry"), pa.array(shapely.to_wkb(outlines)))
    return pa.Table.from_arrays(columns, schema=parts.schema)


def put_run(root, count):
    """The manifest, ledger, items and parts of a run of `count` tiles in rows of 200."""
    from rayseg.engine.ledger import COLUMNS
    from rayseg.geo.grid import Grid, Window, tile_at
    from rayseg.io import stac_write
    from rayseg.io.sources import Source
    from rayseg.io.written_files import WrittenFile
    from rayseg.store import upath
    from rayseg.vision.color import ClassTable

    grid, table = Grid("EPSG:32650", (10.0, 10.0), (0.0, 0.0)), ClassTable(CLASSES)
    extent = Window(320 * SIDE, -6250 * SIDE, 200 * SIDE, -(-count // 200) * SIDE)
    place = (grid.crs, (10.0, 0.0, 2e5, 0.0, -10.0, 4e6), 10_000, 20_000, "uint8", None)
    sources = [Source("scene", (("s3://i/scene.tif", ("red",)),), *place, "2025-06-01T00:00:00Z", "s3://i/scene.json")]
    text = json.dumps([source.to_row() for source in sources])
    kinds = [np.kron(np.random.default_rng(seed).integers(0, 2, (4, 4)), np.ones((16, 16))) for seed in range(16)]
    bands = ({"name": "class", "data_type": "uint8", "nodata": 255.0},)
    at_origin = [polygons(kind, grid) for kind in kinds]
    rows, records, objects = [], [], {}
    for number in range(count):
        at = divmod(number, 200)
        tile = tile_at(grid, extent.row // SIDE + at[0], extent.col // SIDE + at[1], size=SIDE, extent=extent)
        parts = moved(at_origin[number * 7 % 16], tile.window)
        sink = pa.BufferOutputStream()
        pq.write_table(parts, sink, compression="zstd")
        folder = f"{root}/tiles/{tile.id}"
        files = [
            WrittenFile(name, number, "1220" + "0" * 64, bands * name.endswith(".tif"))
            for name in ("classes.tif", "scores.tif", "parts.parquet")
        ]
        item = stac_write.item_of(
            tile.id, grid, tile.window,
            folder=folder, files=files, sources=sources, model=f"{root}/models/m/item.json", table=table,
        ).to_dict(include_self_link=False, transform_hrefs=False)  # fmt: skip
        objects[f"{folder}/parts.parquet"] = sink.getvalue().to_pybytes()
        objects[f"{folder}/{tile.id}.json"] = json.dumps(item, indent=2).encode()
        facts = {"counts": {"0": 1}, "pairs": 1, "changes": 0, "parts": len(parts), "item": stac_write.packed(item)}
        rows.append(tile.to_row() | {"sources": text, "refused": ""})
        records.append(
            {
                "id": tile.id,
                "status": "done",
                "reason": "",
                "attempt": 1,
                "seconds": "{}",
                "facts": json.dumps(facts),
                "files": "{}",
            }
        )
    for name, rows_of, schema in (("manifest", rows, None), ("ledger/records-0", records, COLUMNS)):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows_of, schema=schema), sink)
        objects[f"{root}/steps/predict/{name}.parquet"] = sink.getvalue().to_pybytes()
    upath(root).fs.pipe(objects)


def publish(root):
    """Publish the run as its steps do; seconds of both steps, processor seconds, peak MiB."""
    try:
        from rayseg.engine.run import Engine, Step
        from rayseg.steps import map as mapping
    except ImportError:  # an earlier version
        from rayseg.run import Engine, Step

        from rayseg import mapping

    # An earlier version reads the bundle by `load`.
    mapping.bundle.description = mapping.bundle.load = lambda _prefix: SimpleNamespace(classes=CLASSES)
    predicted = Step("predict", root, "key", Engine("inline"), {"bundle": f"{root}/models/m"})
    if hasattr(mapping, "qgis"):  # its project opens a tile, and this run has no rasters
        mapping.qgis.save = lambda _root: None
    with measured() as joining:
        polygons = mapping.join_polygons(Step("polygons", root, "key", Engine("inline")), predicted, "found")
    with measured() as publishing:
        items = mapping.publish(Step("publish", root, "key", Engine("inline")), predicted, "Published")
    seconds = {"join": joining.wall, "publish": publishing.wall, "cpu": joining.cpu + publishing.cpu}
    return seconds | {"peak MiB": peak_mib(), "result": polygons | items}


def contents(root):
    """What was published, as values that can be compared; with each file's bytes."""
    from rayseg.store import upath

    data = {name: (upath(root) / name).read_bytes() for name in ("collection.json", "items.parquet", "found.parquet")}
    tables = {name: pq.read_table(pa.BufferReader(data[name])) for name in data if name.endswith(".parquet")}
    return data, tables | {"collection.json": json.loads(data["collection.json"])}


def main():
    """Put the run, publish it each way in a process of its own, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=20_000)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds of each request")
    parser.add_argument("--against", type=Path, help="another checkout")
    parser.add_argument("--publish", metavar="ROOT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.publish:
        print(json.dumps(publish(options.publish)))
        return
    os.environ |= {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
    with served(SERVER, options.latency) as address, tempfile.TemporaryDirectory() as folder:
        os.environ["AWS_ENDPOINT_URL"] = address
        from rayseg.store import upath

        upath(BUCKET).fs.mkdir(BUCKET)
        put_run(f"{BUCKET}/run", options.tiles)
        checkouts = [Path(__file__).parents[1], *([options.against] if options.against else [])]
        found, rows = [], []
        for checkout in checkouts:
            where = os.environ | {"PYTHONPATH": str(checkout.resolve())}
            words = [sys.executable, __file__, "--publish", f"{BUCKET}/run"]
            result = json.loads(
                subprocess.run(words, check=True, capture_output=True, text=True, env=where, cwd=folder).stdout
            )
            found.append((result.pop("result"), *contents(f"{BUCKET}/run")))
            both = result["join"] + result["publish"]
            rows.append(
                [
                    "against" if rows else "this",
                    *(result[key] for key in ("join", "publish")),
                    both,
                    result["cpu"],
                    result["peak MiB"],
                ]
            )
    show(f"Publishing {options.tiles} tiles", ("version", "join s", "publish s", "both s", "CPU s", "peak MiB"), rows)
    if options.against:
        (result, data, values), (other, other_data, other_values) = found
        print(f"this is {rows[1][3] / rows[0][3]:.1f} x as fast; results equal: {result == other}")
        for name in data:
            same = (
                "bytes" if data[name] == other_data[name] else "values" if values[name] == other_values[name] else "NOT"
            )
            print(f"{name}: equal {same}")


if __name__ == "__main__":
    main()
