"""Run rows through stages, in this process or on Ray Data; a ledger records the result of every row.

    rows minus ledger -> read (CPU) -> model (GPU actors) -> write (CPU) -> ledger record

A stage is any picklable callable from a list of records to a list of records, one for each and in order. A stage
settles a row by returning a `Settled` in its place; later stages do not see that row. An error that a row's data cause,
or a call that does not return in time, fails that row alone; without space for results the run ends. Both engines call
the same stages (`StageRunner`) on the same batches, so they give the same bytes.
"""

import contextlib
import logging
import multiprocessing
import pickle
import signal
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rayseg.config import ray_address
from rayseg.engine import cluster, progress
from rayseg.engine.cluster import Size, sizes_now, source_cpus
from rayseg.engine.ledger import SETTLED, WITHDRAWN, Account, Ledger, Record, Settled
from rayseg.engine.manifest import PART, Manifest, Row
from rayseg.engine.run import Engine
from rayseg.engine.work import Entries, Entry, StageRunner, Work, ahead
from rayseg.errors import Stalled
from rayseg.store import put, upath

if TYPE_CHECKING:  # Ray takes a second to import; the inline engine does without
    import ray.data

__all__ = ["Row", "Work", "run"]

MOST_HUNG = 3
"""Consecutive rows that time out before the run ends: the cause is then probably one that all rows share."""


def run(
    rows: Sequence[Row],
    works: Sequence[Work],
    ledger: Ledger,
    engine: Engine,
    *,
    record: Callable[[Row], Any],
    title: str = "tiles",
    stall_seconds: float = 1800.0,
    first: Callable[[], None] | None = None,
) -> Account:
    """Run the stages on the rows without a record in the ledger; return the account of all rows.

    Args:
        rows: flat rows, each with a unique `id`; the order is the order of work.
        works: the stages.
        ledger: records the result of every row.
        engine: inline or Ray; with `retry`, failed and quarantined rows are processed again.
        record: row -> what the first stage takes, or a `Settled`, which no stage sees.
        title: noun for the rows in the progress line.
        stall_seconds: time limit of one stage for one call; a row that exceeds it fails.
        first: called once, when the first row is finished.

    Raises:
        Stalled: three rows in a row time out, the engine itself does, or the cluster stays too small for the stages.
        StoreFull: there is no space for a result; finished rows are in the ledger.
        ConfigError: the stages need more CPUs than the machine or cluster has.
    """
    ids, fates = [], ledger.fates()
    with progress.shown(title, len(rows)) as advance:
        failed = 0

        def settled(rows: int, failures: int) -> None:
            nonlocal failed
            failed += failures
            advance(rows, f"{failed} failed")

        # Rows become records in parts, so that memory does not grow with the region.
        for start in range(0, len(rows), PART):
            if isinstance(rows, Manifest):  # its ids cost no dicts, so a finished part is passed at once
                ids.append(rows.ids.slice(start, PART).combine_chunks())
            else:
                ids.append(pa.array([row["id"] for row in rows[start : start + PART]], pa.string()))
            known = fates.among(ids[-1].to_pylist())
            again = {WITHDRAWN} if not engine.retry else {WITHDRAWN, "failed", "quarantined"}
            attempts = {row_id: fate.attempt + 1 for row_id, fate in known.items() if fate.status in again}
            finished = len(known) - len(attempts)
            settled(finished, 0)
            if finished < len(ids[-1]):
                part = (row for row in rows[start : start + PART] if row["id"] not in known or row["id"] in attempts)
                entries = [Entry(row["id"], record(row)) for row in part]
                runners = [StageRunner(work, None, attempts, stall_seconds) for work in works]
                # Only the last stage writes records: a row is finished when all stages are.
                runners[-1].ledger = ledger
                _run_part(entries, runners, engine, stall_seconds * (1 + len(works)), settled, first)
                first = None
                # Between two parts no stage writes records.
                ledger.compact()
    return ledger.account(ids)


def _run_part(
    entries: list[Entry],
    runners: list[StageRunner],
    engine: Engine,
    patience: float,
    settled: Callable[[int, int], None],
    first: Callable[[], None] | None,
) -> None:
    """Run the stages on the entries; end early on an error of the program, a full store, or three hangs in a row."""
    if engine.kind == "ray":
        cluster.connect(engine.address)  # in this thread: Ray's processes end with the thread that started them
        shared = ray_address(engine.address) != "local"
        sizes = sizes_now([runner.work for runner in runners], shared=shared, patience=patience)
        results = ahead(_on_ray(entries, runners, sizes), patience)
    else:
        results = ahead(_inline(entries, runners), patience)
    hung: list[str] = []
    with contextlib.closing(results):
        for number, entry in enumerate(results):
            if entry.error:
                raise entry.error
            if first and not number:
                first()
            # Only consecutive timeouts count; a single slow row fails alone.
            hung = [*hung, entry.id] if entry.hung else []
            if len(hung) == MOST_HUNG:
                raise Stalled(
                    f"{', '.join(hung)} timed out one after the other ({entry.row.reason}); fix the cause, then run "
                    "the same command to resume"
                )
            settled(1, entry.row.status not in SETTLED)


# -- inline ------------------------------------------------------------------------------------------------------------


def _inline(entries: list[Entry], runners: list[StageRunner]) -> Entries:
    """Run every stage in its own thread, a few batches ahead of the next one, in order.

    If an earlier process was killed, the rows that it was processing run first, in a child process.
    """
    ledger = _ledger_of(runners)
    under_way = upath(ledger.prefix) / ".under-way.part"  # the suffix makes the sweep of partial files remove it
    suspects = entries[: sum(2 * runner.work.batch + 1 for runner in runners) + 2] if under_way.exists() else []
    # The file outlives a killed process only; `finally` removes it in all other cases.
    put(under_way, b"")
    try:
        yield from _isolated(suspects, runners)
        stream = (entry for entry in entries[len(suspects) :])
        for runner in runners:
            stream = ahead(_map(stream, runner))
        yield from stream
    finally:
        under_way.unlink(missing_ok=True)


def _ledger_of(runners: list[StageRunner]) -> Ledger:
    assert runners[-1].ledger is not None
    return runners[-1].ledger


def _map(entries: Entries, runner: StageRunner) -> Entries:
    """The entries after a stage; it takes no more after one that ends the run."""
    batch: list[Entry] = []
    with contextlib.closing(entries):
        for entry in entries:
            batch.append(entry)
            if len(batch) == runner.work.batch:
                yield from (done := runner(batch))
                if any(entry.error for entry in done):
                    return
                batch = []
        if batch:
            yield from runner(batch)


def _isolated(entries: list[Entry], runners: list[StageRunner]) -> Entries:
    """Run the entries one by one in a child process; quarantine one that kills it and start a new child."""
    spawn, connection = multiprocessing.get_context("spawn"), None
    for entry in entries:
        if connection is None:
            connection, other = spawn.Pipe()
            spawn.Process(target=_answer, args=(other, runners), daemon=True).start()  # ends with the connection
            # The parent closes the child's end, so that `recv` raises EOFError when the child dies.
            other.close()
        try:
            connection.send(entry)
            yield connection.recv()
        except (EOFError, ConnectionError):
            connection = None
            yield _quarantine(entry, runners, "killed")


def _answer(connection: "Connection[Entry, Entry]", runners: list[StageRunner]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt of the command also reaches its children
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            connection.send(_through(connection.recv(), runners))


def _through(entry: Entry, runners: list[StageRunner]) -> Entry:
    for runner in runners:
        [entry] = runner([entry])
    return entry


def _quarantine(entry: Entry, runners: list[StageRunner], cause: str) -> Entry:
    reason = f"its process died twice ({cause}); its neighbours are not affected"
    attempt = runners[-1].attempts.get(entry.id, 1)
    _ledger_of(runners).write(Record(entry.id, "quarantined", reason, attempt))
    return Entry(entry.id, Settled("quarantined", reason))


# -- Ray ---------------------------------------------------------------------------------------------------------------


def _on_ray(entries: list[Entry], runners: list[StageRunner], sizes: list[Size]) -> Entries:
    """Run the entries on Ray Data; run those lost with a dying process again, each in its own process."""
    seen = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # named arguments for retries come with Ray 2.64, which is not supported yet
        dataset = _dataset(entries, runners, sizes)
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        for entry in _unpack(table):
            seen.add(entry.id)
            yield entry
    unseen = [entry for entry in entries if entry.id not in seen]
    attempts = runners[-1].attempts
    # A row whose process died after its record was written is not lost.
    fates = _ledger_of(runners).fates().among(entry.id for entry in unseen) if unseen else {}
    lost = [e for e in unseen if e.id not in fates or fates[e.id].attempt < attempts.get(e.id, 1)]
    yield from _one_by_one(lost, runners, sizes)


def _dataset(entries: list[Entry], runners: list[StageRunner], sizes: list[Size]) -> "ray.data.Dataset":
    import ray.data

    # Rows of a lost process are processed again. After the import, which sets the level of its own.
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    context.max_errored_blocks = -1  # `_one_by_one` runs the rows of a lost block again
    context.target_max_block_size = 32 << 20  # larger blocks need 2-5 times their size in memory
    batch = runners[0].work.batch
    source = _source([entries[start : start + batch] for start in range(0, len(entries), batch)])
    count = -(-len(entries) // batch)
    dataset = ray.data.read_datasource(source, override_num_blocks=count, num_cpus=source_cpus(runners[0].work))
    for runner, size in zip(runners, sizes, strict=True):
        needs = {"batch_size": runner.work.batch, "batch_format": "pyarrow", "num_cpus": size.cpus}
        needs |= {"num_gpus": size.gpus} if size.gpus else {}
        if runner.work.model or size.gpus:
            pool = ray.data.ActorPoolStrategy(min_size=size.copies, max_size=size.most, initial_size=size.copies)
            needs |= {
                "fn_constructor_args": (runner,),
                "compute": pool,
                "max_task_retries": 2,
                "max_restarts": -1,  # rows have two retries, so this ends; an actor lost for good would lose all rows
            }
            dataset = dataset.map_batches(OnTables, **needs)
        else:
            dataset = dataset.map_batches(OnTables(runner), max_retries=2, **needs)
    return dataset


class OnTables:
    """A stage on Ray Data's tables: entries travel pickled in one binary column, whatever their arrays' shapes."""

    def __init__(self, runner: StageRunner) -> None:
        self.runner = runner

    def __call__(self, table: pa.Table) -> pa.Table:
        """The table of the entries after the stage."""
        return _pack(self.runner(_unpack(table)))


def _pack(entries: list[Entry]) -> pa.Table:
    return pa.table({"row": pa.array([pickle.dumps(entry, protocol=5) for entry in entries], pa.large_binary())})


def _unpack(table: pa.Table) -> list[Entry]:
    return [pickle.loads(value.as_buffer()) for value in table["row"]]  # safe: `_pack` of this run wrote them


def _source(parts: list[list[Entry]]) -> "ray.data.Datasource":
    """Entries as read tasks of one batch each, so that work starts early and a lost task costs one batch."""
    import ray.data
    from ray.data.block import BlockMetadata

    class Parts(ray.data.Datasource):  # type: ignore[misc]
        def get_read_tasks(self, parallelism: int, *_: object, **__: object) -> list[ray.data.ReadTask]:
            """One task per batch, whatever parallelism is requested."""
            return [ray.data.ReadTask(lambda part=part: [_pack(part)], metadata(len(part))) for part in parts]

        def estimate_inmemory_data_size(self) -> int | None:
            """Unknown."""
            return None

    def metadata(count: int) -> BlockMetadata:
        return BlockMetadata(num_rows=count, size_bytes=1000 * count, input_files=None, exec_stats=None)

    return Parts()


def _one_by_one(entries: list[Entry], runners: list[StageRunner], sizes: list[Size]) -> Entries:
    """Run each entry in its own process; quarantine one that kills it, unless its machine failed."""
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    cpus, gpus = max(size.cpus for size in sizes), max(size.gpus for size in sizes)
    remote = ray.remote(max_retries=0, max_calls=1, num_cpus=cpus, num_gpus=gpus)(_through)
    waiting = [(entry, 2) for entry in entries]
    while waiting:
        entry, tries = waiting.pop(0)
        try:
            yield ray.get(remote.remote(entry, runners))
        except (WorkerCrashedError, OutOfMemoryError, NodeDiedError) as error:
            # A failed machine is not the row's fault, so the row gets a second try.
            if tries == 1 or not isinstance(error, NodeDiedError):
                yield _quarantine(entry, runners, type(error).__name__)
                continue
            waiting.append((entry, tries - 1))
