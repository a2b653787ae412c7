"""Rows in Parquet files; `Manifest` holds those of a step in columns, so that millions of tiles fit into memory."""

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from upath import UPath

from rayseg.geo.grid import expect_ids
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


REPEATED = ("crs", "grid_image", "sources", "refused")
"""Columns in which many rows have the same text."""
_NAME = "^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$"
"""What `geo.slug` leaves as it is."""
PART = 20_000
"""Rows that are made into dicts, and handed to an engine, at once; what it keeps of each is gone before the next."""


class Manifest(Sequence[Row]):
    """Rows with the same keys, kept as a table; a row is made when it is asked for.

    Args:
        table: a column for every key.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.unify_dictionaries()

    @classmethod
    def of(cls, parts: Iterable[Sequence[Row]]) -> "Manifest":
        """The rows of all parts, in order; of parts that are made one by one only one is there at a time."""
        tables = [_columns(part) for part in parts if part]
        if not tables:
            return cls(pa.table({"id": pa.array([], pa.string())}))
        return cls(pa.concat_tables(tables, promote_options="permissive"))

    @classmethod
    def read(cls, path: UPath) -> "Manifest":
        """What `save` wrote."""
        with path.open("rb") as file:
            return cls(pq.read_table(file, read_dictionary=list(REPEATED)))

    def save(self, path: UPath) -> None:
        """Write a Parquet file, whole or not at all."""
        sink = pa.BufferOutputStream()
        pq.write_table(self.table, sink, row_group_size=PART)
        put(path, memoryview(sink.getvalue()))

    @property
    def ids(self) -> pa.ChunkedArray:
        """The rows' ids."""
        return self.table["id"]

    def expect_ids(self) -> None:
        """Refuse ids that cannot name files, or name the same one.

        Raises:
            DataError: the first such id.
        """
        good = pc.all(pc.match_substring_regex(self.ids, _NAME)).as_py() in {True, None}
        if not good or pc.count_distinct(self.ids).as_py() < len(self):
            expect_ids(self.ids.to_pylist())

    def refused(self) -> list[str]:
        """Ids of the rows that cannot be worked on."""
        if "refused" not in self.table.column_names:
            return []
        said = pc.fill_null(pc.not_equal(self.table["refused"].cast(pa.string()), ""), False)
        found: list[str] = self.ids.filter(said).to_pylist()
        return found

    def only(self, ids: Iterable[str]) -> "Manifest":
        """The rows with some ids."""
        return Manifest(self.table.filter(pc.is_in(self.ids, pa.array(ids, pa.string()))))

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, at: int) -> Row: ...
    @overload
    def __getitem__(self, at: slice) -> list[Row]: ...
    def __getitem__(self, at: int | slice) -> Row | list[Row]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return _rows(self.table.slice(start, max(0, stop - start)))[::step]
        return _rows(self.table.slice(range(len(self))[at], 1))[0]

    def __iter__(self) -> Iterator[Row]:
        for start in range(0, len(self), PART):
            yield from _rows(self.table.slice(start, PART))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]


def _columns(rows: Sequence[Row]) -> pa.Table:
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    return pa.table(
        {
            name: pa.array(values, pa.string()).dictionary_encode() if name in REPEATED else pa.array(values)
            for name, values in columns.items()
        }
    )


def _rows(table: pa.Table) -> list[Row]:
    columns = [_values(column) for column in table.columns]
    return [dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)]


def _values(column: pa.ChunkedArray) -> Sequence[Any]:
    """The column's values; equal ones are one object where the table says which are equal."""
    if not pa.types.is_dictionary(column.type):
        plain: list[Any] = column.to_numpy().tolist()
        return plain
    whole = column.unify_dictionaries().combine_chunks()
    indices = whole.indices.fill_null(len(whole.dictionary)).to_numpy()
    used, where = np.unique(indices, return_inverse=True)
    texts = whole.dictionary.take(pa.array(used[used < len(whole.dictionary)])).to_pylist()
    known = [*texts, None]
    return [known[index] for index in where.tolist()]
