"""Rows through stages, in this process or on Ray Data, with every row's fate in a ledger.

    rows minus ledger -> read (CPU) -> model (GPU actors) -> write (CPU) -> ledger record

A stage is any picklable callable from a list of rows to a list of rows; a row is a dict with an `id`. A stage that
gives a row a `status` settles it: later stages do not see it. An error that a row's data cause, or a stage that does
not come back from it, settles that row alone as failed; without room for results the run ends. Both engines call the
same guarded stages (`guard`) on the same batches, so they give the same bytes.
"""

import contextlib
import multiprocessing
import pickle
import signal
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import pyarrow as pa
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rayseg.config import ray_address
from rayseg.engine import cluster
from rayseg.engine.cluster import Size, handing_out, sizes_now
from rayseg.engine.ledger import SETTLED, Account, Fate, Ledger, Record
from rayseg.engine.manifest import PART, Manifest
from rayseg.engine.run import Engine
from rayseg.engine.work import STOPPED, Guarded, Row, Rows, Work, ahead
from rayseg.errors import Stalled
from rayseg.store import put, upath

if TYPE_CHECKING:  # Ray takes a second to import; the inline engine does without
    import ray.data

__all__ = ["Row", "Work", "run"]

MOST_HUNG = 3
"""Rows in succession that may hang before the run ends: what they all need does not answer."""


def run(
    rows: Sequence[Row],
    works: Sequence[Work],
    ledger: Ledger,
    engine: Engine,
    *,
    title: str = "tiles",
    stall_seconds: float = 1800.0,
) -> Account:
    """Send the rows that the ledger does not know yet through the stages; return the account of all rows.

    Args:
        rows: one flat dict each, with a unique `id`; the order is the order of work.
        works: the stages.
        ledger: where each row's fate is looked up and recorded.
        engine: inline or Ray; with `retry`, failed and quarantined rows are worked on again.
        title: what the rows are, for the progress line.
        stall_seconds: a row on which one stage works for longer is left behind and settled as failed.

    Raises:
        Stalled: three rows in succession hang, the engine itself does, or the cluster stays too small for the stages.
        StoreFull: there is no room for a result; what is done is in the ledger.
        ConfigError: the stages need more CPUs than the machine or cluster has.
    """
    ids, fates = [], ledger.fates()
    with _progress(title, len(rows)) as settled:
        for start in range(0, len(rows), PART):
            ids.append(_ids(rows, start))
            known = fates.among(ids[-1].to_pylist())
            attempts = {i: fate.attempt + 1 for i, fate in known.items() if engine.retry and fate.status not in SETTLED}
            passed = len(known) - len(attempts)
            settled(passed, 0)
            if passed < len(ids[-1]):
                part = rows[start : start + PART]
                todo = [row for row in part if row["id"] not in known or row["id"] in attempts]
                guarded = _guarded(works, ledger, attempts, stall_seconds)
                _run_part(todo, guarded, engine, stall_seconds * (1 + len(works)), settled)
                ledger.compact()
    return ledger.account(ids)


def _ids(rows: Sequence[Row], start: int) -> pa.StringArray:
    """Ids of the rows of a part, without the rows where that is possible."""
    if isinstance(rows, Manifest):
        return rows.ids.slice(start, PART).combine_chunks()
    return pa.array([row["id"] for row in rows[start : start + PART]], pa.string())


def _guarded(works: Sequence[Work], ledger: Ledger, attempts: dict[str, int], patience: float) -> list[Guarded]:
    last = len(works) - 1
    return [Guarded(work, ledger if at == last else None, attempts, patience) for at, work in enumerate(works)]


def _run_part(
    rows: list[Row], guarded: list[Guarded], engine: Engine, patience: float, settled: Callable[[int, int], None]
) -> None:
    if engine.kind == "ray":
        cluster.connect(engine.address)  # here: Ray's processes end with the thread that started them
        shared = ray_address(engine.address) != "local"
        made = _on_ray(rows, guarded, sizes_now([guard.work for guard in guarded], shared=shared, patience=patience))
    else:
        made = _inline(rows, guarded)
    coming = ahead(made, patience)
    with contextlib.closing(coming):
        for row in _watched(coming):
            settled(1, row["status"] not in SETTLED)


def _watched(rows: Rows) -> Rows:
    """The same rows, until one says that going on is of no use."""
    hung: list[str] = []
    for row in rows:
        if row["status"] == STOPPED:
            raise row["error"]
        hung = [*hung, row["id"]] if row.get("hung") else []
        if len(hung) == MOST_HUNG:
            raise Stalled(
                f"{', '.join(hung)} hang one after the other ({row['reason']}): look for what they wait for, "
                "then give the same command again to go on"
            )
        yield row


def _inline(rows: list[Row], guarded: list[Guarded]) -> Rows:
    """Every stage in a thread of its own, a few batches ahead of the next, in order.

    If this process was killed here before, the rows that were under way then come first, in another process.
    """
    ledger = guarded[-1].ledger
    assert ledger is not None
    under_way = upath(ledger.prefix) / ".under-way.part"  # swept with what is half written
    suspects = rows[: sum(2 * guard.work.batch + 1 for guard in guarded) + 2] if under_way.exists() else []
    put(under_way, b"")
    try:
        yield from _apart(suspects, guarded, ledger)
        stream = (row for row in rows[len(suspects) :])
        for guard in guarded:
            stream = ahead(_map(stream, guard))
        yield from stream
    finally:
        under_way.unlink(missing_ok=True)


def _apart(rows: list[Row], guarded: list[Guarded], ledger: Ledger) -> Rows:
    """One row after the other in a child process; one that kills it is quarantined, and the next have another."""
    child = None
    for row in rows:
        child = child or _child(guarded)
        try:
            child.send(row)
            yield child.recv()
        except (EOFError, ConnectionError):
            child = None
            yield _quarantine(row, guarded, ledger, "killed")


def _child(guarded: list[Guarded]) -> "Connection[Row, Row]":
    """The connection to a new process that sends back what becomes of rows; it ends with the connection."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=_answer, args=(there, guarded), daemon=True).start()
    there.close()
    return here


def _answer(asked: "Connection[Row, Row]", guarded: list[Guarded]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what interrupts the command reaches its children too
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            asked.send(_through(asked.recv(), guarded))


def _quarantine(row: Row, guarded: list[Guarded], ledger: Ledger, how: str) -> Row:
    reason = f"its process died twice ({how}); its neighbours are not affected"
    ledger.write(Record(row["id"], "quarantined", reason, guarded[-1].attempts.get(row["id"], 1)))
    return {"id": row["id"], "status": "quarantined"}


def _map(rows: Rows, guard: Guarded) -> Rows:
    """The rows after a stage; none are taken any more after one that ends the run."""
    batch: list[Row] = []
    with contextlib.closing(rows):
        for row in rows:
            batch.append(dict(row))
            if len(batch) == guard.work.batch:
                yield from (done := guard(batch))
                if any(row.get("status") == STOPPED for row in done):
                    return
                batch = []
        if batch:
            yield from guard(batch)


def _on_ray(rows: list[Row], guarded: list[Guarded], placed: list[Size]) -> Rows:
    """Rows through Ray Data; those lost with a dying process once more, each in a process of its own."""
    ledger = guarded[-1].ledger
    assert ledger is not None
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # named arguments for retries come with Ray 2.64, which is not supported yet
        dataset = _dataset(rows, guarded, placed)
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in _unpack(batch):
            seen.add(row["id"])
            yield row
    unseen = [row for row in rows if row["id"] not in seen]
    recorded = ledger.fates().among(row["id"] for row in unseen) if unseen else {}
    lost = [row for row in unseen if not _recorded(row["id"], recorded, guarded[-1].attempts)]
    yield from _one_by_one(lost, guarded, ledger, placed)


def _recorded(row_id: str, recorded: dict[str, Fate], attempts: dict[str, int]) -> bool:
    return row_id in recorded and recorded[row_id].attempt >= attempts.get(row_id, 1)


def _dataset(rows: list[Row], guarded: list[Guarded], placed: list[Size]) -> "ray.data.Dataset":
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1
    context.target_max_block_size = 32 << 20
    batch = guarded[0].work.batch
    source = _source([rows[start : start + batch] for start in range(0, len(rows), batch)])
    count = -(-len(rows) // batch)
    dataset = ray.data.read_datasource(source, override_num_blocks=count, num_cpus=handing_out(guarded[0].work))
    for guard, size in zip(guarded, placed, strict=True):
        needs = {"batch_size": guard.work.batch, "batch_format": "pyarrow", "num_cpus": size.cpus}
        needs |= {"num_gpus": size.gpus} if size.gpus else {}
        if guard.work.model or size.gpus:
            pool = ray.data.ActorPoolStrategy(size=size.copies)
            needs |= {
                "fn_constructor_args": (guard,),
                "compute": pool,
                "max_task_retries": 2,
                "max_restarts": -1,  # ends, as rows have two retries; an actor gone for good would take all rows along
            }
            dataset = dataset.map_batches(Carried, **needs)
        else:
            dataset = dataset.map_batches(Carried(guard), max_retries=2, **needs)
    return dataset


class Carried:
    """A guarded stage on Ray Data's tables: rows travel pickled in one binary column, whatever their arrays' shapes."""

    def __init__(self, guard: Guarded) -> None:
        self.guard = guard

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table of the rows after the stage."""
        return _pack(self.guard(_unpack(table)))


def _pack(rows: list[Row]) -> pa.Table:
    return pa.table({"row": pa.array([pickle.dumps(row, protocol=5) for row in rows], pa.large_binary())})


def _unpack(table: pa.Table) -> list[Row]:
    return [pickle.loads(value.as_buffer()) for value in table["row"]]  # our own rows, from the cell before


def _source(parts: list[list[Row]]) -> "ray.data.Datasource":
    """Rows as read tasks of one batch each, so that work starts, and is lost, in small pieces."""
    import ray.data
    from ray.data.block import BlockMetadata

    class Rows(ray.data.Datasource):  # type: ignore[misc]
        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ray.data.ReadTask]:
            """One task per batch, whatever parallelism is asked for."""
            return [ray.data.ReadTask(partial(_tables, part), metadata(part)) for part in parts]

        def estimate_inmemory_data_size(self) -> int | None:
            """Unknown."""
            return None

    def metadata(part: list[Row]) -> BlockMetadata:
        return BlockMetadata(num_rows=len(part), size_bytes=1000 * len(part), input_files=None, exec_stats=None)

    return Rows()


def _tables(part: list[Row]) -> list[pa.Table]:
    return [_pack(part)]


def _one_by_one(rows: list[Row], guarded: list[Guarded], ledger: Ledger, placed: list[Size]) -> Rows:
    """Each row in a process of its own; one that kills even that is quarantined, unless its machine went with it."""
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    cpus, gpus = max(size.cpus for size in placed), max(size.gpus for size in placed)
    remote = ray.remote(max_retries=0, max_calls=1, num_cpus=cpus, num_gpus=gpus)(_through)
    coming = [(row, 2) for row in rows]
    while coming:
        row, tries = coming.pop(0)
        try:
            yield ray.get(remote.remote(row, guarded))
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            if tries == 1 or not isinstance(error, NodeDiedError):
                yield _quarantine(row, guarded, ledger, type(error).__name__)
                continue
            coming.append((row, tries - 1))


def _through(row: Row, guarded: list[Guarded]) -> Row:
    rows = [row]
    for guard in guarded:
        rows = guard(rows)
    return rows[0]


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress line on stderr: rows settled, failed, time left; called with how many more there are of both."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    failures = TextColumn("{task.fields[failed]} failed")
    with Progress(*columns, failures, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, failed=0)

        def settled(rows: int, failed: int) -> None:
            bar.update(task, advance=rows, failed=bar.tasks[task].fields["failed"] + failed)

        yield settled
