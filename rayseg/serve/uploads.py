"""Decode uploads in child processes, which are killed when they take too long and replaced when they die."""

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from queue import LifoQueue

import numpy as np

from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, Window
from rayseg.io.sources import Source
from rayseg.io.units import Unit
from rayseg.io.untrusted import ImageTooLarge, gdal_environment
from rayseg.serve import child, file_type

SECONDS = 30.0


@dataclass(frozen=True, eq=False)
class Image:
    """An upload as a tile of its own grid.

    Attributes:
        tile: the whole image.
        image_CHW: values as stored, 0 where not valid.
        valid_HW: bool.
    """

    tile: Tile
    image_CHW: np.ndarray
    valid_HW: np.ndarray


class _Child:
    """One process, and the folder to which it may write."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.folder = tempfile.mkdtemp(prefix="rayseg-upload-")
        command = [sys.executable, "-m", "rayseg.serve.child", self.folder]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream:
                stream.close()
        shutil.rmtree(self.folder, ignore_errors=True)


class DecoderPool:
    """Child processes that decode images; thread-safe.

    Args:
        count: number of processes; each starts at first use.
        max_pixels: maximum pixels of an image.
        seconds: time limit for one image.
    """

    def __init__(self, count: int, *, max_pixels: int, seconds: float = SECONDS) -> None:
        self.max_pixels, self.seconds = max_pixels, seconds
        # Credentials and other variables of the parent stay out of the child.
        kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH", "LANG", "TMPDIR") if name in os.environ}
        self._environment = kept | gdal_environment() | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        self._idle: LifoQueue[_Child | None] = LifoQueue()
        for _ in range(count):
            self._idle.put(None)
        # Threads of its own: an upload that waits for a child must not occupy those of other work.
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="decoder")

    async def decode(
        self,
        data: bytes,
        *,
        bands: Sequence[str] = (),
        units: Mapping[str, Unit] | None = None,
        numbers: Sequence[int] = (),
    ) -> tuple[Source, Image | None]:
        """`read` without blocking the event loop or its shared threads."""
        read = partial(self.read, data, bands=bands, units=units, numbers=numbers)
        return await asyncio.get_running_loop().run_in_executor(self._threads, read)

    def read(
        self,
        data: bytes,
        *,
        bands: Sequence[str] = (),
        units: Mapping[str, Unit] | None = None,
        numbers: Sequence[int] = (),
    ) -> tuple[Source, Image | None]:
        """Decode an upload: (metadata, pixels); pixels are None if it lacks one of `bands`.

        Values are converted to `units`, band -> (scale, offset), as `units.converted` does. `numbers` says which bands
        of the file are `bands`, counted from 1; without it their names do.

        Raises:
            Problem: it is not a PNG, JPEG or GeoTIFF, or a file of two formats.
            ImageTooLarge: it has too many pixels.
            DataError: it cannot be decoded, or not within the limits of time and memory.
        """
        # 1. the child's answer
        limits = {"bands": list(bands), "max_pixels": self.max_pixels, "units": dict(units or {})}
        limits["numbers"] = list(numbers)
        request = {"kind": file_type.kind_of(data), **limits}
        with self._child() as worker:
            assert worker.process.stdin is not None
            assert worker.process.stdout is not None
            watchdog = threading.Timer(self.seconds, worker.process.kill)
            watchdog.start()
            try:
                child.send(worker.process.stdin, request, data)
                header, body = child.receive(worker.process.stdout)
            except (EOFError, OSError) as error:
                worker.end()
                raise DataError(
                    f"the image was not decoded within {self.seconds:g} s and the memory limit; save it again as a "
                    "plain image, or send a part of it"
                ) from error
            finally:
                watchdog.cancel()
        # 2. its errors
        if "too_large" in header:
            raise ImageTooLarge(header["too_large"])
        if "error" in header:
            raise DataError(header["error"])
        # 3. metadata and pixels; no pickles, so that a compromised child can send nothing else
        source = Source.from_row(header["source"])
        if "dtype" not in header:
            return source, None
        row = header["grid"]
        grid = Grid(row["crs"], tuple(row["resolution"]), tuple(row["origin"]), row["image"])
        shape, dtype = tuple(header["shape"]), np.dtype(header["dtype"])
        image_CHW = np.frombuffer(body, dtype, count=int(np.prod(shape))).reshape(shape)
        # Packed bits follow the pixels.
        bits = np.unpackbits(np.frombuffer(body, np.uint8, offset=image_CHW.nbytes), count=shape[1] * shape[2])
        return source, Image(Tile("upload", grid, Window(**header["window"])), image_CHW, bits.reshape(shape[1:]) > 0)

    @contextmanager
    def _child(self) -> Iterator[_Child]:
        """A child process for one request."""
        worker = self._idle.get()
        try:
            # It died idle or was killed by the watchdog: replace it.
            if worker and worker.process.poll() is not None:
                worker.end()
                worker = None
            worker = worker or _Child(self._environment)
            yield worker
        finally:
            self._idle.put(worker)

    def close(self) -> None:
        """End the processes and threads."""
        self._threads.shutdown()
        for _ in range(self._idle.qsize()):
            if worker := self._idle.get():
                worker.end()
            self._idle.put(None)
