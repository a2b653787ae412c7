"""Tables of rows in Parquet files: the manifest of a step, and lists of chips, patches or plots.

A table stays in columns, with one copy of each repeated text, so that the manifest of millions of tiles fits into
memory; rows become dicts only when they are used.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rayseg.geo.grid import expect_ids
from rayseg.store import HERE, StorePath, put, upath

Row = dict[str, Any]
"""A flat row of a Parquet table."""
REPEATED = ("crs", "grid_image", "sources", "refused")
"""Columns in which many rows have the same text."""
_NAME = "^[A-Za-z0-9_]([A-Za-z0-9._-]*[A-Za-z0-9_])?$"
"""What `grid.slug` leaves unchanged of ASCII; other names take the longer way over `expect_ids`."""
PART = 20_000
"""Rows that are held as dicts at the same time; an engine processes one part after the other."""


def write_rows(path: StorePath, rows: Sequence[Row], *, root: str | None = None) -> None:
    """Write rows with the same columns as a Parquet file, or nothing; no rows give a file with the column `id`.

    Args:
        path: of the file.
        rows: the rows.
        root: prefix of the run; hrefs of sources below it are kept relative to it, so that a moved run finds them.
    """
    table = (rows if isinstance(rows, Manifest) else Manifest.of([rows])).table
    table = _rerooted(table, f"{root}/", f"{HERE}/") if root else table
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, row_group_size=PART, compression="zstd")
    put(path, memoryview(sink.getvalue()))


def read_rows(path: StorePath, *, columns: Sequence[str] | None = None, root: str | None = None) -> "Manifest":
    """The rows of a file, with all of their columns or some.

    Args:
        path: of the file.
        columns: names; by default all.
        root: prefix of the run now, for rows that were written with one.

    Raises:
        FileNotFoundError: there is no such file.
        pyarrow.ArrowInvalid: it is not a Parquet file.
    """
    with upath(path).open("rb") as file:
        # Dictionary columns stay encoded, so that repeated texts are in memory once.
        table = pq.read_table(file, columns=columns, read_dictionary=list(REPEATED))
    return Manifest(_rerooted(table, f"{HERE}/", f"{root}/") if root else table)


def _rerooted(table: pa.Table, old: str, new: str) -> pa.Table:
    """The table with the hrefs of sources (JSON text) that begin with `old` beginning with `new`."""
    at = table.schema.get_field_index("sources")
    if at < 0:
        return table
    prefixes = [json.dumps(prefix)[:-1] for prefix in (old, new)]  # with the quote mark where an href begins
    column = table.column(at)
    # Only the distinct texts of the dictionary are replaced, not one per row.
    chunks = [
        pa.DictionaryArray.from_arrays(chunk.indices, pc.replace_substring(chunk.dictionary, *prefixes))
        for chunk in column.chunks
    ]
    return table.set_column(at, table.field(at), pa.chunked_array(chunks, column.type))


class Manifest(Sequence[Row]):
    """Rows with the same keys, kept as a table.

    Args:
        table: a column for every key.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table.unify_dictionaries()

    @classmethod
    def of(cls, parts: Iterable[Sequence[Row]]) -> "Manifest":
        """The rows of all parts, in order; an iterator of parts keeps only one part in memory as dicts."""
        tables = [_table(part) for part in parts if part]
        if not tables:
            return cls(pa.table({"id": pa.array([], pa.string())}))
        # Permissive: a column that is all null in one part has the null type there.
        return cls(pa.concat_tables(tables, promote_options="permissive"))

    @property
    def ids(self) -> pa.ChunkedArray:
        """The rows' ids."""
        return self.table["id"]

    def expect_ids(self) -> None:
        """Refuse ids that are not file names, and ids that occur twice.

        Raises:
            DataError: the first such id.
        """
        # Both checks run on the columns; ids become Python strings only to name the faulty one.
        good = pc.all(pc.match_substring_regex(self.ids, _NAME)).as_py() in {True, None}
        if not good or pc.count_distinct(self.ids).as_py() < len(self):
            expect_ids(self.ids.to_pylist())

    def refused(self) -> list[str]:
        """Ids of the rows that cannot be mapped."""
        if "refused" not in self.table.column_names:
            return []
        refused = pc.fill_null(pc.not_equal(self.table["refused"].cast(pa.string()), ""), False)
        ids: list[str] = self.ids.filter(refused).to_pylist()
        return ids

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


def in_parts(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """The rows in lists of `PART`, for `Manifest.of`."""
    waiting = iter(rows)
    while part := list(islice(waiting, PART)):
        yield part


def _table(rows: Sequence[Row]) -> pa.Table:
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
    """The column's values; equal ones of a dictionary column are one object."""
    if pa.types.is_dictionary(column.type):
        whole = column.unify_dictionaries().combine_chunks()
        indices = whole.indices.fill_null(len(whole.dictionary)).to_numpy()
        used, where = np.unique(indices, return_inverse=True)
        texts = [*whole.dictionary.take(pa.array(used[used < len(whole.dictionary)])).to_pylist(), None]
        return [texts[index] for index in where.tolist()]
    # NumPy is ten times faster, but has no integer null and no nested list.
    exact = column.null_count or pa.types.is_nested(column.type)
    values: list[Any] = column.to_pylist() if exact else column.to_numpy().tolist()
    return values
