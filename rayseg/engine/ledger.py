"""The result of every row of a step: one small append-only record each, on the store of the run.

<ledger>/<id>.<attempt>.json         a record
<ledger>/records-<hash>.parquet      many records in one file
"""

import hashlib
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from upath import UPath

from rayseg.store import HERE, Files, is_local, put, put_if_absent, relocated, upath

SETTLED = ("done", "empty", "nodata")
MISSING = "not processed"
WITHDRAWN = "missing"
"""Status of a row whose result was lost: the row counts as one without a record."""
STATUSES = (*SETTLED, "failed", "quarantined")
MOST_LOOSE = 10_000
"""Records in files of their own, above which `compact` joins them into one file (docs/scale.md)."""
COLUMNS = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "status", "reason")),
        ("attempt", pa.int32()),
        *((name, pa.string()) for name in ("seconds", "facts", "files")),
    ]
)
"""Schema of the joined records; `seconds`, `facts` and `files` are JSON. Earlier versions have no `files`."""
_log = logging.getLogger(__name__)


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
    """The result of one row.

    Attributes:
        id: of the tile (or chip).
        status: one of `STATUSES`; "empty" is imagery in which nothing was detected, "nodata" is no imagery at all.
        reason: why the row failed or was quarantined.
        attempt: 1, and one more for every retry; the highest counts.
        seconds: run time of each stage.
        facts: properties of the result from the last stage (pixels per class, number of polygons).
        files: that the stages wrote for the row, by their paths relative to the run.
    """

    id: str
    status: str
    reason: str = ""
    attempt: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    files: Files = field(default_factory=dict)


class Fate(NamedTuple):
    """The part of a record that decides whether its row is processed."""

    status: str
    reason: str
    attempt: int


class Fates:
    """The fates of all rows of a ledger in about 50 bytes each, so that those of a global map fit into memory.

    Args:
        tables: of every file, with the columns id, status, reason, attempt; of several records of an id the highest
            attempt counts, and of equal ones that in the last file.
    """

    def __init__(self, tables: Sequence[pa.Table]) -> None:
        records = pa.concat_tables(tables)
        ids = records["id"].cast(pa.binary()).to_numpy().astype(np.bytes_)
        attempts = records["attempt"].to_numpy().astype(np.int32)
        # sorted by id, then attempt: of each id the last one counts
        order = np.lexsort((attempts, ids))
        ids = ids[order]
        last = np.append(ids[1:] != ids[:-1], True) if len(ids) else np.zeros(0, bool)
        self._ids, order = ids[last], order[last]
        self._attempts = attempts[order]
        self._files = np.repeat(np.arange(len(tables), dtype=np.int32), [len(table) for table in tables])[order]
        # Dictionary encoding: there are five statuses, and few different reasons.
        self._statuses = records["status"].take(order).combine_chunks().dictionary_encode()
        self._reasons = records["reason"].take(order).combine_chunks().dictionary_encode()

    def __len__(self) -> int:
        return len(self._ids)

    def among(self, ids: Iterable[str]) -> dict[str, Fate]:
        """The fates of those of the ids that have one."""
        names, at = self._find(ids)
        rows = pa.array(at)
        statuses, reasons = (column.take(rows).to_pylist() for column in (self._statuses, self._reasons))
        attempts = self._attempts[at].tolist()
        return {name: Fate(*fate) for name, *fate in zip(names, statuses, reasons, attempts, strict=True)}

    def files_of(self, ids: Iterable[str]) -> dict[str, int]:
        """The numbers of the tables with the records that count, of those of the ids that have one."""
        names, at = self._find(ids)
        return dict(zip(names, self._files[at].tolist(), strict=True))

    def _find(self, ids: Iterable[str]) -> tuple[list[str], NDArray[np.int64]]:
        """Those of the ids that have a fate, and their places."""
        names = list(ids)
        if not len(self) or not names:
            return [], np.zeros(0, np.int64)
        # binary search in the sorted ids; an id beyond the last one is compared with the last one
        keys = np.array([name.encode() for name in names], np.bytes_)
        at = np.minimum(np.searchsorted(self._ids, keys), len(self) - 1)
        known = np.flatnonzero(self._ids[at] == keys)
        return [names[index] for index in known], at[known]


@dataclass(eq=False)
class Ledger:
    """The records below one prefix."""

    prefix: str

    @property
    def root(self) -> str:
        """Prefix of the run that the ledger is part of."""
        return self.prefix.rpartition("/steps/")[0] or self.prefix

    def write(self, record: Record) -> bool:
        """Add a record unless this attempt has one already; return whether it was added.

        Paths of the run in its reason and facts are stored relative to the run.
        """
        path = upath(self.prefix) / f"{record.id}.{record.attempt}.json"
        row = asdict(record)
        row |= {name: relocated(row[name], self.root, HERE) for name in ("reason", "facts")}
        # put-if-absent: a row that two processes finish has one record
        return put_if_absent(path, json.dumps(row, sort_keys=True).encode())

    def _record_of(self, row: dict[str, Any]) -> Record:
        values = {key: json.loads(row[key]) for key in ("seconds", "facts", "files")}
        return Record(**relocated(row | values, HERE, self.root))

    def read(self) -> dict[str, Record]:
        """The latest record of every id, ids sorted."""
        # Loose records first: those that `compact` deletes meanwhile are in a joined file by then.
        loose = _loaded(self._paths(".json"))
        rows = pa.concat_tables([loose, *map(_columns_of, self._paths(".parquet"))]).to_pylist()
        rows.sort(key=lambda row: (row["id"], row["attempt"]))
        return {row["id"]: self._record_of(row) for row in rows}

    def fates(self) -> Fates:
        """The latest fate of every id."""
        # Loose records first: those that `compact` deletes meanwhile are in a joined file by then.
        return _fates_of(_loaded(self._paths(".json")), self._paths(".parquet"))

    def account(self, ids: Iterable[pa.StringArray]) -> "Account":
        """The account of the ids, which come in parts that fit into memory one at a time."""
        fates, total = self.fates(), Account.of((), {})
        for part in ids:
            names = part.to_pylist()
            total += Account.of(names, fates.among(names))
        return replace(total, troubles=relocated(total.troubles, HERE, self.root))

    def latest(self, damaged: list[UPath] | None = None) -> Iterator[list[Record]]:
        """The latest record of every id, those of one file at a time; unreadable files go to `damaged`."""
        loose, files = _loaded(self._paths(".json"), damaged), self._paths(".parquet")
        fates = _fates_of(loose, files)
        for table in chain([loose], (_columns_of(path, damaged=damaged) for path in files)):
            known = fates.among(table["id"].to_pylist())
            yield [self._record_of(row) for row in table.to_pylist() if row["attempt"] == known[row["id"]].attempt]

    def records(self, parts: Iterable[Iterable[str]]) -> Iterator[dict[str, Record]]:
        """The latest records of the ids of each part in turn; the records of two files are in memory at a time.

        A run writes its rows part by part (`manifest.PART`) and joins their records after each, so that the ids of a
        part are in few files.
        """
        # Loose records first: those that `compact` deletes meanwhile are in a joined file by then.
        loose = _loaded(self._paths(".json"))
        files, kept = self._paths(".parquet"), lru_cache(maxsize=2)(_columns_of)
        fates = _fates_of(loose, files)
        for part in parts:
            wanted: dict[int, list[str]] = defaultdict(list)
            for row_id, number in fates.files_of(part).items():
                wanted[number].append(row_id)
            latest: dict[str, Record] = {}
            for number, ids in wanted.items():
                attempts = fates.among(ids)
                table = kept(files[number - 1]) if number else loose
                rows = table.filter(pc.is_in(table["id"], pa.array(ids, pa.string()))).to_pylist()
                latest |= {
                    row["id"]: self._record_of(row) for row in rows if row["attempt"] == attempts[row["id"]].attempt
                }
            yield latest

    def compact(self, most: int = MOST_LOOSE) -> None:
        """Join the records of more than `most` files into one; only the process that runs the step may call it.

        Readers see every record at any moment: the joined file is written before the others are deleted.
        """
        loose = self._paths(".json")
        if len(loose) <= most:
            return
        # Named by its records: a process that was killed after the write writes the same file again.
        content = hashlib.sha256("\n".join(sorted(path.name for path in loose)).encode()).hexdigest()[:16]
        # Written in memory first: the store needs the whole object for one atomic put.
        sink = pa.BufferOutputStream()
        pq.write_table(_loaded(loose), sink)
        put(upath(self.prefix) / f"records-{content}.parquet", memoryview(sink.getvalue()))
        if is_local(self.prefix):
            with ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda path: path.unlink(missing_ok=True), loose))
        else:  # a thousand names a request, where the store can
            upath(self.prefix).fs.rm([path.path for path in loose])

    def _paths(self, suffix: str) -> list[UPath]:
        folder = upath(self.prefix)
        if not is_local(folder):
            folder.fs.invalidate_cache()  # s3fs lists what it saw before the workers wrote
        return [path for path in folder.iterdir() if path.suffix == suffix] if folder.is_dir() else []


def with_fact(
    rows: Iterable[dict[str, Any]], records: Mapping[str, Record], fact: str
) -> list[tuple[dict[str, Any], Record]]:
    """(row, its record) of every row whose record has the fact."""
    return [(row, records[row["id"]]) for row in rows if row["id"] in records and fact in records[row["id"]].facts]


def _loaded(paths: list[UPath], damaged: list[UPath] | None = None) -> pa.Table:
    """The records of some files as a table of `COLUMNS`; files that `compact` has deleted meanwhile are left out.

    So are files without a readable record, which a power failure or a fault of the disk leaves; they go to `damaged`.
    """
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(_load, paths))
    if damaged is not None:
        damaged += [path for path, row in zip(paths, rows, strict=True) if row == {}]
    return pa.Table.from_pylist([row for row in rows if row], schema=COLUMNS)


def _load(path: UPath) -> dict[str, Any] | None:
    """The record in a file; {} if it cannot be read, None if there is no file."""
    try:
        row = asdict(Record(**json.loads(path.read_bytes())))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {}
    return row | {key: json.dumps(row[key]) for key in ("seconds", "facts", "files")}


def _fates_of(loose: pa.Table, files: Sequence[UPath]) -> Fates:
    """The fates of the loose records and of those of all files; number 0 is that of the loose ones."""
    names = ["id", "status", "reason", "attempt"]
    with ThreadPoolExecutor(8) as pool:
        return Fates([loose.select(names), *pool.map(lambda path: _columns_of(path, names), files)])


def _columns_of(path: UPath, columns: Sequence[str] = COLUMNS.names, damaged: list[UPath] | None = None) -> pa.Table:
    """Columns of a file of joined records; no rows if it cannot be read, and the file goes to `damaged`."""
    if "facts" not in columns:
        # The few bytes of these columns alone; where that fails, the whole file shows what is wrong.
        with suppress(pa.ArrowInvalid, OSError), path.open("rb") as opened:
            return pq.read_table(opened, columns=list(columns)).select(columns)
    data = path.read_bytes()  # its errors are those of the store, the next ones those of the content
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read([name for name in columns if name in file.schema_arrow.names])
    except (pa.ArrowInvalid, OSError):
        if damaged is not None:
            damaged.append(path)
        return COLUMNS.empty_table().select(columns)
    if "files" in columns and "files" not in table.column_names:
        table = table.append_column("files", pa.array(["{}"] * len(table), pa.string()))
    return table.select(columns)


@dataclass(frozen=True)
class Account:
    """The rows of a step against its ledger: done + empty + nodata + failed + quarantined + missing = planned."""

    planned: int
    counts: dict[str, int]
    troubles: dict[str, str]

    @classmethod
    def of(cls, planned: Iterable[str], records: Mapping[str, Record] | Mapping[str, Fate]) -> "Account":
        """Count the records of the planned ids; `troubles` maps each id that is not settled to the reason."""
        counts, troubles = Counter[str](), {}
        for row in planned:
            record = records.get(row)
            record = None if record and record.status == WITHDRAWN else record
            counts[record.status if record else WITHDRAWN] += 1
            if not record or record.status not in SETTLED:
                troubles[row] = record.reason or record.status if record else MISSING
        return cls(counts.total(), {status: counts[status] for status in (*STATUSES, WITHDRAWN)}, troubles)

    def __add__(self, other: "Account") -> "Account":
        counts = {status: count + other.counts[status] for status, count in self.counts.items()}
        return Account(self.planned + other.planned, counts, self.troubles | other.troubles)

    def __str__(self) -> str:
        parts = [f"{count} {status}" for status, count in self.counts.items() if count]
        return f"{self.planned} planned = {' + '.join(parts) or '0'}"
