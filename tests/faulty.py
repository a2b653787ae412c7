"""The command line with stages that meet a fault: run as `python faulty.py predict ...`, with faults in FAULTS.

FAULTS holds `stage:tile:kind:flag` words. As long as the file `flag` is there, the stage, when it comes to the tile,
    kill   kills its own process (SIGKILL)
    hang   never comes back
    pause  writes its process id to `<flag>.pid` and waits until `flag` is gone

LIMIT is the most bytes of a file that the command may write, -1 for any.
"""

import os
import resource
import signal
import threading
import time
from pathlib import Path

from rayseg import mapping
from rayseg.stages import predict, read, write


def meet(stage, tile):
    for word in os.environ["FAULTS"].split():
        where, which, kind, flag = word.split(":")
        if (where, which) == (stage, tile) and Path(flag).exists():
            {"kill": kill, "hang": hang, "pause": pause}[kind](flag)


def kill(_):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(_):
    threading.Event().wait()


def pause(flag):
    Path(f"{flag}.part").write_text(str(os.getpid()))
    Path(f"{flag}.part").rename(f"{flag}.pid")
    while Path(flag).exists():
        time.sleep(0.05)


class ReadTile(read.ReadTile):
    def _read(self, row):
        meet("ReadTile", row["id"])
        return super()._read(row)


class Predict(predict.Predict):
    def _tile(self, row):
        meet("Predict", row["id"])
        return super()._tile(row)


class WriteTile(write.WriteTile):
    def _write(self, row):
        meet("WriteTile", row["id"])
        return super()._write(row)


def main():
    import faulty  # not __main__: Ray's workers import the stages by name

    from rayseg.cli import app

    mapping.ReadTile, mapping.Predict, mapping.WriteTile = faulty.ReadTile, faulty.Predict, faulty.WriteTile
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LIMIT"]),) * 2)
    app()


if __name__ == "__main__":
    main()
