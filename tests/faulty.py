"""The command line with stages that meet a fault: run as `python faulty.py predict ...`, with faults in FAULTS.

FAULTS holds `stage:tile:kind:flag` words. As long as the file `flag` is there, the stage, when it comes to the tile,
    kill   kills its own process (SIGKILL)
    hang   never comes back
    pause  writes its process id to `<flag>.pid` and waits until `flag` is gone
    back   has its process's clock a day earlier from then on; `ahead`: later

SEEN is a file to which every stage appends `<stage> <tile>` when it comes to a tile. Both travel with the stages to
other machines. LIMIT is the most bytes of a file that the command may write, -1 for any.
"""

import os
import resource
import signal
import threading
import time
from pathlib import Path

from rayseg.stages import predict, read, write
from rayseg.steps import map as mapping


def meet(stage, row):
    with Path(stage.seen).open("a") as seen:
        seen.write(f"{type(stage).__name__} {row.tile.id}\n")
    for word in stage.faults.split():
        where, which, kind, flag = word.split(":")
        if (where, which) == (type(stage).__name__, row.tile.id) and Path(flag).exists():
            {"kill": kill, "hang": hang, "pause": pause, "back": back, "ahead": ahead}[kind](flag)


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_):
    threading.Event().wait()


def pause(flag):
    Path(f"{flag}.part").write_text(str(os.getpid()))
    Path(f"{flag}.part").rename(f"{flag}.pid")
    while Path(flag).exists():
        time.sleep(0.05)


def back(_, *, seconds=-86400.0):
    real = time.time
    time.time = lambda: real() + seconds


def ahead(flag):
    back(flag, seconds=86400.0)


class Told:
    """A stage that knows its faults wherever it is carried."""

    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.faults, self.seen = os.environ["FAULTS"], os.environ["SEEN"]


class ReadTile(Told, read.ReadTile):
    def __call__(self, rows):
        for row in rows:
            meet(self, row)
        return super().__call__(rows)


class Predict(Told, predict.Predict):
    def _tile(self, row):
        meet(self, row)
        return super()._tile(row)


class WriteTile(Told, write.WriteTile):
    def _write(self, row):
        meet(self, row)
        return super()._write(row)


def main():
    import faulty  # not __main__: Ray's workers import the stages by name

    from rayseg.cli import app

    mapping.ReadTile, mapping.Predict, mapping.WriteTile = faulty.ReadTile, faulty.Predict, faulty.WriteTile
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
    app()


if __name__ == "__main__":
    main()
