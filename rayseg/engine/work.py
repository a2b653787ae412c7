"""Run one stage so that no row is lost: an error fails only the row that caused it."""

import time
import traceback
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rayseg.engine.ledger import Ledger, Record, Settled
from rayseg.errors import RaysegError, Stalled, StoreFull, StoreRefused
from rayseg.store import STORE_ERRORS, Files, public, recorded, synced_once, within

Stage = Callable[[list[Any]], list[Any]]
"""Records -> for each, in order, the record with what the stage adds, or a `Settled`."""

# Errors that a row's data can cause; any other error is a fault of the program and ends the run.
BAD_DATA = (RaysegError, ValueError, ArithmeticError, LookupError, RuntimeError, MemoryError)
DATA_ERRORS: tuple[type[Exception], ...] = BAD_DATA + STORE_ERRORS
ENDING = 30.0
"""Seconds that a working stage gets to finish when the run ends early; killing some threads crashes Python."""


@dataclass(frozen=True)
class Work:
    """A stage and the resources of one copy of it.

    Attributes:
        stage: the callable.
        batch: rows per call.
        cpus: logical CPUs of one copy.
        gpus: GPUs of one copy, if the machine has any; 0 for a stage that never uses one.
        model: whether the stage keeps a loaded model; it then runs in actors, as it does on a GPU.
    """

    stage: Stage
    batch: int = 1
    cpus: float = 0.25
    gpus: float = 0.0
    model: bool = False

    @property
    def name(self) -> str:
        """The stage's name in timings and messages."""
        return type(self.stage).__name__


@dataclass(frozen=True, eq=False)
class Entry:
    """A row of the manifest between two stages.

    Attributes:
        id: of the row.
        row: what the next stage takes; a `Settled` passes all stages.
        seconds: stage -> seconds spent on this row.
        hung: whether a stage did not finish it in time.
        error: what ends the run: no space on the store, or a fault of the program. Such a row has no record.
        files: that the stages have written for the row.
    """

    id: str
    row: Any
    seconds: dict[str, float] = field(default_factory=dict)
    hung: bool = False
    error: BaseException | None = None
    files: Files = field(default_factory=dict)


Entries = Generator[Entry, None, None]


class WorkerThread:
    """A thread that runs calls in order; unlike an executor's thread, it can be abandoned when it hangs."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        Thread(target=_serve, args=(self._calls,), daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
        """Queue a call; it starts when the earlier ones have returned."""
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        return future


def _serve(calls: "SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]") -> None:
    while (call := calls.get()) is not None:
        future, function, arguments = call
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - the caller raises it again, whatever it is
            future.set_exception(error)
        del call, future, function, arguments  # an idle thread must not keep a row's arrays alive


class StageRunner:
    """Entries -> entries after one stage; the last stage's runner writes the ledger.

    Args:
        work: the stage.
        ledger: the last stage's; None for the others.
        attempts: row -> number of its attempt, where it is not the first.
        patience: seconds after which a call is abandoned and its row fails.
    """

    def __init__(self, work: Work, ledger: Ledger | None, attempts: dict[str, int], patience: float) -> None:
        self.work = work
        self.ledger = ledger
        self.attempts = attempts
        self.patience = patience
        self._thread: WorkerThread | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Threads cannot be pickled; the copy starts its own at the first call.
        return self.__dict__ | {"_thread": None}

    def __call__(self, entries: list[Entry]) -> list[Entry]:
        """The entries after the stage, in order; it does not see settled ones."""
        started = time.perf_counter()
        waiting = [entry for entry in entries if not (entry.error or isinstance(entry.row, Settled))]
        after = {entry.id: entry for entry in self._attempt(waiting)} if waiting else {}
        # A batch is timed as a whole: its rows get equal shares.
        share = {self.work.name: round((time.perf_counter() - started) / max(len(waiting), 1), 4)}
        done = [
            replace(after[entry.id], seconds=entry.seconds | share) if entry.id in after else entry for entry in entries
        ]
        return [self._record(entry) for entry in done] if self.ledger else done

    def _attempt(self, entries: list[Entry]) -> list[Entry]:
        """Run the stage; if a batch fails, run it row by row to find the row at fault."""
        result = self._in_time([entry.row for entry in entries])
        if not isinstance(result, BaseException):
            rows, files = result
            return [
                replace(entry, row=row, files=entry.files | files) for entry, row in zip(entries, rows, strict=True)
            ]
        if isinstance(result, StoreFull | StoreRefused) or not isinstance(result, DATA_ERRORS):
            error = self._portable(result)
            return [replace(entry, row=None, error=error) for entry in entries]
        # A batch error does not name its row: single rows isolate it.
        if len(entries) > 1:
            return [done for entry in entries for done in self._attempt([entry])]
        # Own messages are complete sentences; other errors need their type to be understood.
        reason = str(result) if isinstance(result, RaysegError) else f"{type(result).__name__}: {result}"
        failed = Settled("failed", public(f"{self.work.name}: {reason}"))
        return [replace(entries[0], row=failed, hung=isinstance(result, Stalled))]

    def _in_time(self, rows: list[Any]) -> tuple[list[Any], Files] | BaseException:
        """The rows after the stage and the files it wrote, or the error it raises."""
        self._thread = self._thread or WorkerThread()
        call = self._thread.submit(_recording, self.work.stage, list(rows))
        wait([call], self.patience)
        if not call.done():
            self._thread = None  # it may never return
            return Stalled(f"no progress for {self.patience:g} s")
        if error := call.exception():
            return error
        result: tuple[list[Any], Files] = call.result()
        if len(result[0]) != len(rows):
            return TypeError(f"{self.work.name} returned {len(result[0])} rows for {len(rows)}; return one for each")
        return result

    def _portable(self, error: BaseException) -> BaseException:
        """The error in a form that another process can unpickle and raise; its traceback becomes a note."""
        if isinstance(error, RaysegError):
            return error
        trace = "".join(traceback.format_exception(error))
        plain = all(isinstance(part, str | int | float) for part in error.args)
        known = plain and type(error).__module__ == "builtins" and not isinstance(error, SystemExit)
        portable = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        portable.add_note(f"in {self.work.name}:\n{trace}")
        return portable

    def _record(self, entry: Entry) -> Entry:
        """Write the entry's result to the ledger; return what the progress line needs of it."""
        assert self.ledger is not None
        if entry.error:
            return entry
        result = entry.row if isinstance(entry.row, Settled) else Settled()
        attempt = self.attempts.get(entry.id, 1)
        files = within(entry.files, self.ledger.root)
        record = Record(entry.id, result.status, result.reason, attempt, entry.seconds, result.facts, files)
        try:
            self.ledger.write(record)
        except (StoreFull, StoreRefused) as error:
            return Entry(entry.id, None, error=error)
        return Entry(entry.id, Settled(result.status, result.reason), hung=entry.hung)


def _recording(stage: Stage, rows: list[Any]) -> tuple[list[Any], Files]:
    with recorded() as files, synced_once():
        return stage(rows), files


def ahead(entries: Entries, patience: float | None = None) -> Entries:
    """The same entries; a thread computes the next one while the caller uses the current one.

    When it is closed early it waits for the call under way, so no stage is running when the process ends.

    Raises:
        Stalled: the next entry does not come within `patience` seconds.
    """
    thread, stalled = WorkerThread(), False
    call = thread.submit(next, entries, None)
    try:
        while True:
            stalled = not wait([call], patience).done
            if stalled:
                raise Stalled(
                    f"no row was finished for {patience:.0f} s; finished rows are in the ledger; "
                    "look for a hanging tile, then run the same command to resume"
                )
            if (entry := call.result()) is None:
                return
            call = thread.submit(next, entries, None)
            yield entry
    finally:
        # A generator that is executing cannot be closed: close it only when the call has returned.
        if wait([call], 0 if stalled else ENDING).done:
            entries.close()
