"""Gather the polygon parts of many tiles in few files, so that the process that joins them does not open each."""

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from rayseg.engine.ledger import Settled
from rayseg.io import vectors
from rayseg.io.tables import concurrently


class GatherParts:
    """`id, paths -> facts`: the parts of several tiles or blocks of one grid, in order, in `<target>/<id>.parquet`.

    Args:
        root: prefix of the run; paths are relative to it.
        target: prefix of the files that are written.
        skip: classes that are left out.
    """

    def __init__(self, root: str, target: str, *, skip: Sequence[int] = ()) -> None:
        self.root, self.target, self.skip = root, target, tuple(skip)

    def __call__(self, rows: list[dict[str, Any]]) -> list[Settled]:
        """Gather the parts of each row.

        Raises:
            DataError: a tile has no parts where its record says so.
        """
        return [self._gather(row["id"], json.loads(row["paths"])) for row in rows]

    def _gather(self, name: str, paths: Sequence[str]) -> Settled:
        tables = concurrently(lambda path: vectors.read_parts(f"{self.root}/{path}", skip=self.skip), paths)
        parts = pa.concat_tables(list(tables))
        vectors.write_parts(f"{self.target}/{name}.parquet", parts)
        return Settled(facts={"parts": len(parts)})
