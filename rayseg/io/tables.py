"""Many small files read at once, and tables that are larger than memory."""

import io
import mmap
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayseg.errors import DataError
from rayseg.store import StorePath, put, upath

A = TypeVar("A")
B = TypeVar("B")
THREADS = 16
_ALIGNMENT = 64  # bytes, of Arrow's buffers


def concurrently(
    read: Callable[[A], B], inputs: Iterable[A], *, ahead: int = 16 * THREADS, threads: int = THREADS
) -> Iterator[B]:
    """The results of `read` in the order of its inputs, from several threads; at most `ahead` of them wait."""
    waiting = iter(inputs)
    with ThreadPoolExecutor(threads) as pool:
        # In batches: `map` takes all of its inputs at once.
        while batch := list(islice(waiting, ahead)):
            yield from pool.map(read, batch)


def attempted(
    read: Callable[[A], B], inputs: Sequence[A], *, threads: int = THREADS
) -> tuple[list[tuple[A, B]], list[tuple[A, DataError]]]:
    """(input, result) of every input in order, and (input, error) of those for which `read` raises DataError."""

    # Errors are collected, so that one message names several damaged files.
    def attempt(entry: A) -> B | DataError:
        try:
            return read(entry)
        except DataError as error:
            return error

    pairs = list(zip(inputs, concurrently(attempt, inputs, threads=threads), strict=True))
    results = [(entry, result) for entry, result in pairs if not isinstance(result, DataError)]
    return results, [(entry, result) for entry, result in pairs if isinstance(result, DataError)]


def content(path: StorePath) -> bytes:
    """The bytes of a small file; on an object store by one request, where opening it takes a second one."""
    target = upath(path)
    data: bytes = target.fs.cat_file(target.path)
    return data


def write_array(path: StorePath, values: NDArray[Any]) -> None:
    """Write an array as a NumPy file, whole or not at all."""
    sink = io.BytesIO()
    np.save(sink, values, allow_pickle=False)
    put(path, sink.getvalue())


def read_array(path: StorePath) -> NDArray[Any]:
    """Read the array that `write_array` wrote."""
    values: NDArray[Any] = np.load(io.BytesIO(content(path)), allow_pickle=False)
    return values


class Spool:
    """Tables in a temporary file without a name: it vanishes with the context, and if the process is killed."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, int]] = []

    def __enter__(self) -> "Spool":
        self._file = tempfile.TemporaryFile()
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()  # tables that are mapped stay readable

    def add(self, table: pa.Table) -> None:
        """Append a table."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        data = sink.getvalue()
        self._parts.append((self._file.tell(), data.size))
        self._file.write(memoryview(data))
        self._file.write(b"\0" * (-data.size % _ALIGNMENT))

    def tables(self) -> list[pa.Table]:
        """All tables, mapped into memory: only the parts in use take space."""
        if not self._parts:
            return []
        self._file.flush()
        whole = pa.py_buffer(mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ))
        return [pa.ipc.open_stream(whole.slice(start, size)).read_all() for start, size in self._parts]
