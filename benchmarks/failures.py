"""A map whose process is killed again and again: `kill -9` every 20 s until it is done, the same command each time.

The same scene and network by `rayseg predict` and by the plain loop of predict.py, which has no record of what it did
and begins anew. First each runs undisturbed. `extra` is the time from each command's first tile on, compared with that
of the undisturbed run: what the kills cost beyond the restarts themselves, whose seconds have a column of their own.
Targets: rayseg byte-equal, at most 10 % extra. The loop gets as many commands as rayseg needed.

`--cpu` counts the processor seconds of the command's process, not those of the clock: on a busy machine, whose load
changes, a start alone may take longer than 20 s. With Ray other processes compute: it is for inline and the loop.
"""

import argparse
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from measure import show
from predict import write_world

RECORDS = {"loop": "*/tile.json", "inline": "steps/predict/ledger/*.json", "ray": "steps/predict/ledger/*.json"}


@dataclass
class Tries:
    """The commands that one way needed.

    Attributes:
        starts: seconds of each from its begin to its first new tile.
        works: seconds of each from its first new tile to its end.
        tiles: new tiles of each.
        done: whether the last one ended by itself.
    """

    starts: list[float] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    tiles: list[int] = field(default_factory=list)
    done: bool = False


def clock(pid: int, *, cpu: bool) -> float:
    """Seconds of the clock, or of the processors that a living process has used."""
    if not cpu:
        return time.monotonic()
    used = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, used)) / os.sysconf("SC_CLK_TCK")


def tries(kind: str, folder: Path, out: Path, *, every: float | None, most: int, cpu: bool) -> Tries:
    """Run a command again and again, and kill it after `every` seconds, until it ends by itself."""
    found = Tries()
    # a tile of 1024 px is about a second of work: what a kill costs is what is under way
    words = ["-m", "rayseg", "predict", folder / "model", folder / "imagery/catalog.json#imagery"]
    words += ["--out", out, "--engine", kind, "--set", "map.tile=1024"]
    loop = f"from pathlib import Path; from predict import loop; loop(Path({str(folder)!r}), Path({str(out)!r}))"
    while not found.done and len(found.starts) < most:
        if kind == "loop":  # it cannot go on
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
        command = [sys.executable, *(["-c", loop] if kind == "loop" else map(str, words))]
        known, first = records(kind, out), 0.0
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": Path(__file__).parent}
        with subprocess.Popen(command, **quiet, start_new_session=True) as process:
            began = now = clock(process.pid, cpu=cpu)
            while process.poll() is None:
                with contextlib.suppress(IndexError, ValueError, OSError):  # it has just ended
                    now = clock(process.pid, cpu=cpu)
                first = first or (now if records(kind, out) > known else 0.0)
                if every and now - began > every:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, signal.SIGKILL)
                    process.wait()
                time.sleep(0.05)
            found.done = process.returncode == 0
        found.starts.append((first or now) - began)
        found.works.append(now - first if first else 0.0)
        found.tiles.append(records(kind, out) - known)
        if kind == "ray":
            time.sleep(3)  # Ray's processes end with their driver, but not at once
    return found


def records(kind: str, out: Path) -> int:
    """Finished tiles."""
    return len(list(out.glob(RECORDS[kind])))


def same(out: Path, whole: Path) -> bool:
    """Whether two runs left the same bytes."""
    names = [path.relative_to(whole) for path in [*whole.glob("tiles/*/*.*"), whole / "polygons.parquet"]]
    return all((out / name).read_bytes() == (whole / name).read_bytes() for name in names if name.suffix != ".json")


def main() -> None:
    """Run each way undisturbed and killed; print what it took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=5, help="tiles of 2048 px across")
    parser.add_argument("--rows", type=int, default=3, help="tiles down")
    parser.add_argument("--every", type=float, default=20.0, help="seconds until a kill")
    parser.add_argument("--engines", nargs="+", default=["inline", "ray"], choices=["inline", "ray"])
    parser.add_argument("--cpu", action="store_true", help="count processor seconds")
    asked = parser.parse_args()
    rows, most = [], 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(
            folder, columns=asked.columns, rows=asked.rows, architecture="deeplabv3plus", encoder="mobilenet_v2"
        )
        for kind in [*asked.engines, "loop"]:
            whole = tries(kind, folder, folder / f"{kind}-whole", every=None, most=1, cpu=asked.cpu)
            killed = tries(kind, folder, folder / f"{kind}-killed", every=asked.every, most=most, cpu=asked.cpu)
            # the first tile of each command is work, too
            tile = whole.works[0] / max(whole.tiles[0] - 1, 1)
            extra = (sum(killed.works) + tile * (len(killed.works) - 1)) / whole.works[0] - 1
            most = len(killed.starts)
            equal = same(folder / f"{kind}-killed", folder / f"{kind}-whole") if kind != "loop" else "-"
            left = f"{sum(killed.tiles)} of {whole.tiles[0]}"
            lost = f"{killed.tiles[-1]} of {whole.tiles[0]} kept"
            cost = [sum(whole.starts + whole.works), sum(killed.starts + killed.works)]
            kills = [len(killed.starts) - killed.done, sum(killed.starts)]
            ends = [f"{extra:+.1%}", str(equal), left] if killed.done else ["never done", "-", lost]
            rows.append([kind, *cost, *kills, *ends])
            print(killed, flush=True)
    columns = ("", "undisturbed s", "killed s", "kills", "of it restarts s", "extra", "bytes equal", "tiles")
    show(f"kill -9 every {asked.every:g} s{' of CPU' if asked.cpu else ''}", columns, rows)


if __name__ == "__main__":
    main()
