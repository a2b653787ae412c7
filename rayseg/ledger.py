"""What became of every row of a step: one small append-only record each, on whatever store the run lives on."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from upath import UPath

from rayseg.store import is_local, put_if_absent, upath

SETTLED = ("done", "empty", "nodata")
MISSING = "not processed"
STATUSES = (*SETTLED, "failed", "quarantined")


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
        folder = upath(self.prefix)
        if not is_local(folder):
            folder.fs.invalidate_cache()  # s3fs would list what it saw before the workers wrote
        if not folder.is_dir():
            return {}
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(_load, (path for path in folder.iterdir() if path.suffix == ".json")))
        found.sort(key=lambda record: (record.id, record.attempt))
        return {record.id: record for record in found}


def with_fact(
    rows: Iterable[dict[str, Any]], records: Mapping[str, Record], fact: str
) -> list[tuple[dict[str, Any], Record]]:
    """(row, its record) of every row of whose result the ledger says `fact`."""
    return [(row, records[row["id"]]) for row in rows if row["id"] in records and fact in records[row["id"]].facts]


def _load(path: UPath) -> Record:
    return Record(**json.loads(path.read_bytes()))


@dataclass(frozen=True)
class Account:
    """A step's rows set against its ledger: done + empty + nodata + failed + quarantined + missing = planned."""

    planned: int
    counts: dict[str, int]
    troubles: dict[str, str]

    @classmethod
    def of(cls, planned: Iterable[str], records: dict[str, Record]) -> "Account":
        """Count the records of the planned ids; `troubles` maps each id that is not settled to the reason."""
        ids = list(planned)
        counts = Counter(records[i].status if i in records else "missing" for i in ids)
        troubles = {i: _trouble(records.get(i)) for i in ids if i not in records or records[i].status not in SETTLED}
        return cls(len(ids), {status: counts[status] for status in (*STATUSES, "missing")}, troubles)

    def __str__(self) -> str:
        parts = [f"{count} {status}" for status, count in self.counts.items() if count]
        return f"{self.planned} planned = {' + '.join(parts) or '0'}"


def _trouble(record: Record | None) -> str:
    return record.reason or record.status if record else MISSING
