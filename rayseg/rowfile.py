"""Flat rows in Parquet files: what steps hand on to each other."""

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rayseg.store import StorePath, put, upath

Row = dict[str, Any]


def write_rows(path: StorePath, rows: Sequence[Row]) -> None:
    """Write rows that have the same columns; without any the file has the one column `id`."""
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(list(rows)) if rows else pa.table({"id": pa.array([], pa.string())})
    pq.write_table(table, sink, compression="zstd")
    put(path, sink.getvalue().to_pybytes())


def read_rows(path: StorePath, *, columns: Sequence[str] | None = None) -> list[Row]:
    """The rows of a file, all of their columns or some.

    Raises:
        FileNotFoundError: there is none.
        pyarrow.ArrowInvalid: it is no Parquet file.
    """
    found: list[Row] = pq.read_table(io.BytesIO(upath(path).read_bytes()), columns=columns).to_pylist()
    return found


def read_ids(path: StorePath) -> list[str]:
    """The column `id` of a file."""
    return [row["id"] for row in read_rows(path, columns=["id"])]
