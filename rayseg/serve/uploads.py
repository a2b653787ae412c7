"""Uploads become pixels in child processes, which are ended when they take too long and replaced when they die."""

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import LifoQueue
from typing import Any

import numpy as np

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.sources import Source
from rayseg.io.untrusted import TooLarge, closed
from rayseg.serve import child, file_type

SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Image:
    """An upload as a tile of its own grid.

    Attributes:
        tile: the whole image.
        image_CHW: values as they are stored, 0 where not valid.
        valid_HW: bool.
    """

    tile: Tile
    image_CHW: np.ndarray
    valid_HW: np.ndarray


class _Child:
    """One process, and the folder it may write to."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="rayseg-upload-")
        words = [sys.executable, "-m", "rayseg.serve.child", self.folder]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class Readers:
    """A few child processes that read images; safe to be asked from several threads.

    Args:
        count: processes; each is started when it is first needed.
        max_pixels: most pixels of an image.
        seconds: after which a read is given up.
    """

    def __init__(self, count: int, *, max_pixels: int, seconds: float = SECONDS) -> None:
        self.max_pixels, self.seconds = max_pixels, seconds
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "TMPDIR") if name in os.environ}
        self._environment = kept | closed() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._idle: LifoQueue[_Child | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)

    def read(self, data: bytes, *, bands: Sequence[str] = ()) -> tuple[Source, Image | None]:
        """What an upload says of itself, and its pixels; no pixels where it lacks one of `bands`.

        Raises:
            Refused: it is no PNG, JPEG or GeoTIFF, or something else besides.
            TooLarge: it has too many pixels.
            DataError: it cannot be read.
        """
        kind = file_type.kind_of(data, max_pixels=self.max_pixels)
        header, body = self._ask({"kind": kind, "bands": list(bands), "max_pixels": self.max_pixels}, data)
        if "too_large" in header:
            raise TooLarge(header["too_large"])
        if "error" in header:
            raise DataError(header["error"])
        source = Source.from_row(header["source"])
        if "dtype" not in header:
            return source, None
        row = header["grid"]
        grid = Grid(row["crs"], tuple(row["resolution"]), tuple(row["origin"]), row["image"])
        shape, dtype = tuple(header["shape"]), np.dtype(header["dtype"])
        size = int(np.prod(shape)) * dtype.itemsize
        image_CHW = np.frombuffer(body, dtype, count=int(np.prod(shape))).reshape(shape)
        bits = np.unpackbits(np.frombuffer(body, np.uint8, offset=size), count=shape[1] * shape[2])
        return source, Image(Tile("upload", grid, Window(**header["window"])), image_CHW, bits.reshape(shape[1:]) > 0)

    def _ask(self, asked: dict[str, Any], data: bytes) -> tuple[dict[str, Any], bytearray]:
        with self._one() as one:
            assert one.process.stdin is not None
            assert one.process.stdout is not None
            watch = threading.Timer(self.seconds, one.process.kill)
            watch.start()
            try:
                child.send(one.process.stdin, asked, data)
                return child.receive(one.process.stdout)
            except (EOFError, OSError) as error:
                one.end()
                raise DataError(
                    f"the image could not be read within {self.seconds:g} s and the memory it may take; "
                    "save it anew, or send a part of it"
                ) from error
            finally:
                watch.cancel()

    @contextmanager
    def _one(self) -> Iterator[_Child]:
        """A child that nobody else asks meanwhile."""
        one = self._idle.get()
        try:
            if one and one.process.poll() is not None:
                one.end()
                one = None
            one = one or _Child(self._environment)
            yield one
        finally:
            self._idle.put(one)

    def close(self) -> None:
        """End the processes."""
        for _ in range(self._idle.qsize()):
            if one := self._idle.get():
                one.end()
            self._idle.put(None)
