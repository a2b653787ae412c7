"""What became of every row of a step: one small append-only record each, on whatever store the run lives on.

<ledger>/<id>.<attempt>.json         a record
<ledger>/records-<hash>.parquet      many of them in one file, once there are many
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from upath import UPath

from rayseg.store import is_local, put, put_if_absent, upath

SETTLED = ("done", "empty", "nodata")
MISSING = "not processed"
STATUSES = (*SETTLED, "failed", "quarantined")
MOST_LOOSE = 10_000
"""Records that may lie about one by one before they are put together."""


@dataclass(frozen=True)
class Settled:
    """The result of a row that needs no further stage; a stage returns it in the row's place.

    Attributes:
        status: "done", "empty", "nodata" or "failed", see `Record`.
        reason: why it failed.
        facts: about the result, for the ledger.
    """

    status: str = "done"
    reason: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Record:
    """The fate of one row.

    Attributes:
        id: the tile (or chip).
        status: one of `STATUSES`; "empty" is imagery in which nothing was found, "nodata" is no imagery at all.
        reason: why it failed or was quarantined.
        attempt: 1, and one more for every retry; the highest counts.
        seconds: per stage.
        facts: what the last stage says of the result (counts per class, files, checksums).
    """

    id: str
    status: str
    reason: str = ""
    attempt: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Fate(NamedTuple):
    """What of a record decides whether its row is worked on."""

    status: str
    reason: str
    attempt: int


class Fates:
    """Fates of all rows of a ledger, 50 bytes or so each: those of a planet fit into memory.

    Args:
        records: columns id, status, reason, attempt; of an id several times the highest attempt counts.
    """

    def __init__(self, records: pa.Table) -> None:
        ids = records["id"].cast(pa.binary()).to_numpy().astype(np.bytes_)
        attempts = records["attempt"].to_numpy().astype(np.int32)
        order = np.lexsort((attempts, ids))
        ids = ids[order]
        last = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, bool)
        self._ids, order = ids[last], order[last]
        self._attempts = attempts[order]
        self._statuses = records["status"].take(order).combine_chunks().dictionary_encode()
        self._reasons = records["reason"].take(order).combine_chunks().dictionary_encode()

    def __len__(self) -> int:
        return len(self._ids)

    def among(self, ids: Iterable[str]) -> dict[str, Fate]:
        """The fates of those of the ids that have one."""
        asked = list(ids)
        if not len(self) or not asked:
            return {}
        keys = np.array([name.encode() for name in asked], np.bytes_)
        at = np.minimum(np.searchsorted(self._ids, keys), len(self) - 1)
        found = np.flatnonzero(self._ids[at] == keys)
        rows = pa.array(at[found])
        statuses, reasons = (column.take(rows).to_pylist() for column in (self._statuses, self._reasons))
        attempts = self._attempts[at[found]].tolist()
        names = (asked[index] for index in found)
        return {name: Fate(*fate) for name, *fate in zip(names, statuses, reasons, attempts, strict=True)}


class Ledger:
    """The records below one prefix."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def write(self, record: Record) -> bool:
        """Add a record unless this attempt has one already; return whether it was added."""
        path = upath(self.prefix) / f"{record.id}.{record.attempt}.json"
        return put_if_absent(path, json.dumps(asdict(record), sort_keys=True).encode())

    def read(self) -> dict[str, Record]:
        """The latest record of every id, ids sorted."""
        found = [_of_row(row) for row in self._table(COLUMNS.names).to_pylist()]
        found.sort(key=lambda record: (record.id, record.attempt))
        return {record.id: record for record in found}

    def fates(self) -> Fates:
        """The latest fate of every id."""
        return Fates(self._table(["id", "status", "reason", "attempt"]))

    def account(self, ids: Iterable[pa.StringArray]) -> "Account":
        """What became of the rows of some ids, given in parts of which one fits into memory."""
        fates, total = self.fates(), Account.of((), {})
        for part in ids:
            names = part.to_pylist()
            total += Account.of(names, fates.among(names))
        return total

    def compact(self, most: int = MOST_LOOSE) -> None:
        """Put records together if more than `most` lie about; only for the one who has the rows worked on.

        Readers find every record at any moment: the file of all is there before the others go.
        """
        loose = self._paths(".json")
        if len(loose) <= most:
            return
        content = hashlib.sha256("\n".join(sorted(path.name for path in loose)).encode()).hexdigest()[:16]
        sink = pa.BufferOutputStream()
        pq.write_table(_loaded(loose), sink)
        put(upath(self.prefix) / f"records-{content}.parquet", memoryview(sink.getvalue()))
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(_remove, loose))

    def _table(self, columns: list[str]) -> pa.Table:
        loose = _loaded(self._paths(".json"))  # first: those that go meanwhile are in a file then
        parts = [loose.select(columns)]
        for path in self._paths(".parquet"):
            with path.open("rb") as file:
                parts.append(pq.read_table(file, columns=columns))
        return pa.concat_tables(parts)

    def _paths(self, suffix: str) -> list[UPath]:
        folder = upath(self.prefix)
        if not is_local(folder):
            folder.fs.invalidate_cache()  # s3fs would list what it saw before the workers wrote
        return [path for path in folder.iterdir() if path.suffix == suffix] if folder.is_dir() else []


def with_fact(
    rows: Iterable[dict[str, Any]], records: Mapping[str, Record], fact: str
) -> list[tuple[dict[str, Any], Record]]:
    """(row, its record) of every row of whose result the ledger says `fact`."""
    return [(row, records[row["id"]]) for row in rows if row["id"] in records and fact in records[row["id"]].facts]


COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "status", "reason")),
        ("attempt", pa.int32()),
        *((name, pa.string()) for name in ("seconds", "facts")),
    ]
)


def _loaded(paths: list[UPath]) -> pa.Table:
    """The records of some files as a table; of those that are there."""
    with ThreadPoolExecutor(8) as pool:
        rows = [row for row in pool.map(_load, paths) if row]
    return pa.Table.from_pylist(rows, schema=COLUMNS)


def _load(path: UPath) -> dict[str, Any] | None:
    try:
        row = json.loads(path.read_bytes())
    except FileNotFoundError:  # put together with others meanwhile
        return None
    return asdict(Record(**row)) | {key: json.dumps(row.get(key, {})) for key in ("seconds", "facts")}


def _of_row(row: dict[str, Any]) -> Record:
    return Record(**row | {key: json.loads(row[key]) for key in ("seconds", "facts")})


def _remove(path: UPath) -> None:
    path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Account:
    """A step's rows set against its ledger: done + empty + nodata + failed + quarantined + missing = planned."""

    planned: int
    counts: dict[str, int]
    troubles: dict[str, str]

    @classmethod
    def of(cls, planned: Iterable[str], records: Mapping[str, Record] | Mapping[str, Fate]) -> "Account":
        """Count the records of the planned ids; `troubles` maps each id that is not settled to the reason."""
        ids = list(planned)
        counts = Counter(records[i].status if i in records else "missing" for i in ids)
        troubles = {i: _trouble(records.get(i)) for i in ids if i not in records or records[i].status not in SETTLED}
        return cls(len(ids), {status: counts[status] for status in (*STATUSES, "missing")}, troubles)

    def __add__(self, other: "Account") -> "Account":
        counts = {status: count + other.counts[status] for status, count in self.counts.items()}
        return Account(self.planned + other.planned, counts, self.troubles | other.troubles)

    def __str__(self) -> str:
        parts = [f"{count} {status}" for status, count in self.counts.items() if count]
        return f"{self.planned} planned = {' + '.join(parts) or '0'}"


def _trouble(record: Record | Fate | None) -> str:
    return record.reason or record.status if record else MISSING
