"""How far the driver and the ledger carry: many actors with tiles of fixed duration, and the tiles of a planet.

`actors`: nodes with logical GPUs on this machine. The model sleeps for `--seconds` a tile and computes nothing, so 64
actors fit on two cores, so the distribution of tiles is measured. Efficiency is the time that the sleeping
takes by itself, over that from the first record to the last; tiles/s are also given of the middle three fifths of
all, when nothing starts or ends. `planet`: tiles in 60 zones are planned by the stages of
a run and kept as its manifest; some run through stages that do nothing (in this process, every tile with its record);
the ledger is filled up with records of the others but some, put together as `flow.run` does it; then the same call
goes on, over all of them. `driver`: what one process does after the map of so many tiles,
on an S3 server. Each part is a process of its own. Targets: 0.9 at 64 actors; memory that does not grow
with what is done.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from measure import machine, measured, peak_mib, show
from planet_run import show_driver

SIZE, HALO = 2048, 896


class Nothing:
    """A stage that gives its rows back."""

    def __call__(self, rows: list[dict]) -> list[dict]:
        return rows


class Sleep:
    """A model that takes its time."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, rows: list[dict]) -> list[dict]:
        time.sleep(self.seconds * len(rows))
        return rows


# -- actors -----------------------------------------------------------------------------------------------------------


def actors(count: int, tiles: int, seconds: float, per_node: int, out: Path) -> dict[str, float]:
    """Seconds until the first record, from it to the last, and the driver's peak MiB."""
    from ray.cluster_utils import Cluster

    from rayseg.engine import flow
    from rayseg.engine.run import Engine
    from rayseg.engine.work import Work

    rows = [{"id": f"t{number}", "sources": "x" * 1000} for number in range(tiles)]
    works = [Work(Nothing()), Work(Sleep(seconds), cpus=0.1, gpus=1.0, model=True), Work(Nothing())]
    ledger = timed(str(out / "ledger"))
    os.environ["RAY_TMPDIR"] = str(out)  # or the cluster's address is left where every other Ray finds it
    here = {"object_store_memory": 128 << 20}
    quiet = here | {"include_dashboard": False, "temp_dir": str(out / "ray"), "num_cpus": 0}
    quiet["_system_config"] = {"idle_worker_killing_time_threshold_ms": 30_000}  # as cluster/Dockerfile has it
    cluster = Cluster(initialize_head=True, head_node_args=quiet)
    for start in range(0, count, per_node):
        cluster.add_node(num_cpus=8, num_gpus=min(per_node, count - start), **here)
    started = time.time()
    with measured() as whole:
        account = flow.run(rows, works, ledger, Engine("ray", cluster.address), record=dict, stall_seconds=600)
    assert account.counts["done"] == tiles, account
    ends = sorted(ledger.written.values())
    early, late = (ends[len(ends) * tenth // 10] for tenth in (2, 8))
    result = {
        "start": ends[0] - started, "span": ends[-1] - ends[0], "middle": 0.6 * tiles / (late - early),
        "wall": whole.wall, "driver MiB": peak_mib(),
    }  # fmt: skip
    import ray

    ray.shutdown()
    cluster.shutdown()
    return result


def timed(prefix: str):
    """A ledger that knows by file when its records were written, before they are put together."""
    from rayseg.engine.ledger import Ledger

    class Timed(Ledger):
        written: dict[str, float] = {}  # noqa: RUF012 - there is one

        def compact(self, *most: int) -> None:
            files = (entry for entry in os.scandir(self.prefix) if entry.name.endswith(".json"))
            self.written |= {entry.name: entry.stat().st_mtime for entry in files}
            super().compact(*most)

    return Timed(prefix)


# -- a planet ---------------------------------------------------------------------------------------------------------


def planet(tiles: int, out: Path) -> dict[str, float]:
    """Lay out so many tiles in 60 zones, one scene each, and keep them as a manifest."""
    from rayseg.engine.manifest import Manifest, write_rows
    from rayseg.io.sources import Source
    from rayseg.stages.read import rows_by_grid

    side = int(np.ceil(np.sqrt(tiles / 60)))
    sources = [
        Source(
            f"z{zone}", ((f"https://host.example/{zone}.tif", ("red", "green", "blue")),), f"EPSG:{32601 + zone}",
            (0.5, 0.0, 500_224.0, 0.0, -0.5, 5_000_192.0), side * SIZE, side * SIZE, "uint8",
        )
        for zone in range(60)
    ]  # fmt: skip
    with measured() as cost:
        parts = rows_by_grid(sources, None, size=SIZE, halo=HALO)
        rows = Manifest.of([row | {"refused": ""} for row in part] for part in parts)
        rows.expect_ids()
        write_rows(_path(out), rows)
    return {"tiles": len(rows), "wall": cost.wall, "driver MiB": peak_mib()}


def _path(out: Path):
    from upath import UPath

    return UPath(out / "manifest.parquet")


def settle(rest: int, out: Path) -> dict[str, float]:
    """Records of the tiles that have none but for the last `rest`, put together by the part as a run leaves them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from rayseg.engine.ledger import COLUMNS, Ledger
    from rayseg.engine.manifest import PART, read_rows

    ledger = Ledger(str(out / "ledger"))
    ids = read_rows(_path(out)).ids
    known, seconds = len(ledger.fates()), json.dumps({"Nothing": 0.0001})
    facts = json.dumps({"counts": {"0": 4_000_000, "1": 194_304}, "pairs": 8_384_512, "changes": 12_345})
    Path(ledger.prefix).mkdir(exist_ok=True)
    for start in range(known, len(ids) - rest, PART):
        names = ids[start : min(start + PART, len(ids) - rest)].to_pylist()
        columns = [names, *([value] * len(names) for value in ("done", "", 1, seconds, facts))]
        pq.write_table(pa.table(columns, schema=COLUMNS), f"{ledger.prefix}/records-{start:08d}.parquet")
    return {"records": len(ledger.fates()), "driver MiB": peak_mib()}


def resume(count: int, out: Path) -> dict[str, float]:
    """The tiles of the manifest, or its first `count`, through stages that do nothing, minus what is in the ledger."""
    from rayseg.engine import flow
    from rayseg.engine.ledger import Ledger
    from rayseg.engine.manifest import Manifest, read_rows
    from rayseg.engine.run import Engine
    from rayseg.engine.work import Work

    with measured() as reading:
        rows = read_rows(_path(out))
    rows = Manifest(rows.table.slice(0, count)) if count else rows
    ledger = Ledger(str(out / "ledger"))
    with measured() as fates:
        before = len(ledger.fates())
    with measured() as cost:
        works = [Work(Nothing()), Work(Nothing()), Work(Nothing())]
        account = flow.run(rows, works, ledger, Engine("inline"), record=dict)
    assert account.counts["done"] == len(rows), account
    return {
        "tiles": len(rows), "left": len(rows) - before, "manifest": reading.wall, "ledger": fates.wall,
        "wall": cost.wall, "driver MiB": peak_mib(),
    }  # fmt: skip


# -- both -------------------------------------------------------------------------------------------------------------

PARTS = {"actors": actors, "planet": planet, "settle": settle, "resume": resume}


def part(name: str, *values: float, out: Path) -> dict[str, float]:
    """The result of one of `PARTS`, run in a process of its own."""
    words = [sys.executable, __file__, "--part", name, *map(str, values), str(out)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    print(name, values, {key: round(value, 2) for key, value in found.items()}, machine(), flush=True)
    return found


def show_actors(counts: list[int], tiles: int, seconds: float, per_node: int) -> None:
    """A row for every number of actors."""
    rows = []
    for count in counts:
        given = tiles * count // max(counts)
        with tempfile.TemporaryDirectory(dir="/tmp", prefix="sc") as name:
            found = part("actors", count, given, seconds, per_node, out=Path(name))
        ideal = (given - 1) * seconds / count
        rows.append([count, given, found["start"], found["span"], given / found["span"], found["middle"],
                     ideal / found["span"], found["driver MiB"]])  # fmt: skip
    columns = ("actors", "tiles", "s to the first", "s from it to the last", "tiles/s",
               "of those in the middle", "efficiency", "driver MiB")  # fmt: skip
    show(f"Tiles of {seconds:g} s, nodes of {per_node} actors", columns, rows)


def show_planet(tiles: int, run: int) -> None:
    """A row each for planning, for running some tiles, and for resuming at the end."""
    with tempfile.TemporaryDirectory() as name:
        out = Path(name)
        planned = part("planet", tiles, out=out)
        begun = part("resume", run, out=out)
        part("settle", run, out=out)
        ended = part("resume", 0, out=out)
        sizes = [path.stat().st_size for path in out.glob("ledger/*.parquet")]
        manifest = _path(out).stat().st_size
    rows = [
        ["planned", planned["tiles"], planned["wall"], planned["driver MiB"]],
        ["the first of them run", begun["left"], begun["wall"], begun["driver MiB"]],
        ["all read, the last of them run", ended["left"], ended["wall"], ended["driver MiB"]],
    ]
    show(f"A planet of {planned['tiles']:,} tiles", ("", "tiles worked on", "s", "driver MiB"), rows)
    print(f"manifest {manifest / 2**20:.0f} MiB, ledger {sum(sizes) / 2**20:.0f} MiB in {len(sizes)} files; "
          f"read in {ended['manifest']:.1f} and {ended['ledger']:.1f} s")  # fmt: skip


def main() -> None:
    """Both, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("actors", "planet", "driver"), help="one of them")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 8, 64], help="numbers of model actors")
    parser.add_argument("--tiles", type=int, default=20_000, help="for the most actors, fewer for fewer (quick: 600)")
    parser.add_argument("--seconds", type=float, default=2.0, help="that a tile takes an actor")
    parser.add_argument("--per-node", type=int, default=8, help="logical GPUs of a node")
    parser.add_argument("--planet", type=int, default=5_000_000, help="about how many tiles (quick: 50000)")
    parser.add_argument("--run", type=int, default=60_000, help="of these are run, twice (quick: 5000)")
    parser.add_argument(
        "--driver", type=int, default=600_000, help="tiles of a mapped run on S3, more than 4096 (quick: 6000)"
    )
    parser.add_argument(
        "--of", nargs="+", default=["join", "publish", "report", "status", "verify"], help="of the driver"
    )
    parser.add_argument("--part", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.part:
        name, *values, out = asked.part
        numbers = [float(value) if "." in value else int(value) for value in values]
        print(json.dumps(PARTS[name](*numbers, Path(out))))
        return
    if asked.only in {None, "actors"}:
        show_actors(asked.actors, asked.tiles, asked.seconds, asked.per_node)
    if asked.only in {None, "planet"}:
        show_planet(asked.planet, asked.run)
    if asked.only in {None, "driver"}:
        show_driver(asked.driver, asked.of)


if __name__ == "__main__":
    main()
