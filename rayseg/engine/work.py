"""Stages that cannot lose a row: what goes wrong with a row settles that row, in words, and none of its neighbours."""

import time
import traceback
import weakref
from collections.abc import Callable, Generator
from concurrent.futures import Future, wait
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from typing import Any

from rayseg.engine.ledger import Ledger, Record
from rayseg.errors import RaysegError, Stalled, StoreFull
from rayseg.store import STORE_ERRORS, public

Row = dict[str, Any]
Rows = Generator[Row, None, None]
Stage = Callable[[list[Row]], list[Row]]

# What a row's data can cause; anything else is a fault of the program and ends the run.
BAD_DATA = (RaysegError, ValueError, ArithmeticError, LookupError, RuntimeError, MemoryError)
DATA_ERRORS: tuple[type[Exception], ...] = BAD_DATA + STORE_ERRORS
STOPPED = "stopped"
"""Status of a row after which the run ends, with `error`: no room, or a fault of the program. No ledger has it."""
ENDING = 30.0
"""Seconds that a stage at work has to end when the run ends early; Python does not survive some that are cut off."""


@dataclass(frozen=True)
class Work:
    """A stage and what one copy of it needs.

    Attributes:
        stage: the callable.
        batch: rows it is given at once.
        cpus: logical CPUs of one copy.
        gpus: GPUs of one copy, if the machine has any; 0 for a stage that never uses one.
        model: whether it keeps state worth keeping (a loaded model): then it lives in actors, as it does on a GPU.
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


class Hand:
    """A thread that makes one call after the other; unlike an executor's, it can be left behind when one hangs."""

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None] = SimpleQueue()
        Thread(target=_serve, args=(self._calls,), daemon=True).start()
        weakref.finalize(self, self._calls.put, None)

    def submit(self, function: Callable[..., Any], *arguments: object) -> "Future[Any]":
        """Make the call when those before are done."""
        future: Future[Any] = Future()
        self._calls.put((future, function, arguments))
        return future


def _serve(calls: "SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]") -> None:
    while (call := calls.get()) is not None:
        future, function, arguments = call
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is raised again where the result is asked for
            future.set_exception(error)
        del call, future, function, arguments  # nothing is kept alive while waiting


class Guarded:
    """A stage that cannot lose a row: errors settle the row that caused them; the last one writes the ledger.

    Args:
        work: the stage.
        ledger: the last stage's; None for the others.
        attempts: row -> number of its attempt, where that is not the first.
        patience: seconds after which a call that has not come back is left behind and its row failed.
    """

    def __init__(self, work: Work, ledger: Ledger | None, attempts: dict[str, int], patience: float) -> None:
        self.work = work
        self.ledger = ledger
        self.attempts = attempts
        self.patience = patience
        self._hand: Hand | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hand": None}

    def __call__(self, rows: list[Row]) -> list[Row]:
        """The rows after the stage, in their order; settled ones pass by."""
        started = time.perf_counter()
        waiting = [row for row in rows if "status" not in row]
        after = {row["id"]: row for row in self._attempt(waiting)} if waiting else {}
        share = (time.perf_counter() - started) / max(len(waiting), 1)
        for row in after.values():
            row["seconds"] = row.get("seconds", {}) | {self.work.name: round(share, 4)}
        result = [after.get(row["id"], row) for row in rows]
        return [self._settle(row) for row in result] if self.ledger else result

    def _attempt(self, rows: list[Row]) -> list[Row]:
        """Run the stage; a batch that fails is tried row by row, to find the row at fault."""
        found = self._in_time(rows)
        if not isinstance(found, BaseException):
            return found
        if isinstance(found, StoreFull) or not isinstance(found, DATA_ERRORS):
            error = self._portable(found)
            return [_kept(row) | {"status": STOPPED, "error": error} for row in rows]
        if len(rows) > 1:
            return [done for row in rows for done in self._attempt([row])]
        reason = str(found) if isinstance(found, RaysegError) else f"{type(found).__name__}: {found}"
        told = {"reason": public(f"{self.work.name}: {reason}"), "hung": isinstance(found, Stalled)}
        return [_kept(rows[0]) | {"status": "failed"} | told]

    def _in_time(self, rows: list[Row]) -> list[Row] | BaseException:
        """What the stage makes of the rows, or what it raises."""
        self._hand = self._hand or Hand()
        call = self._hand.submit(self.work.stage, [dict(row) for row in rows])  # its own: it may go on for ever
        wait([call], self.patience)
        if not call.done():
            self._hand = None
            return Stalled(f"no progress for {self.patience:g} s")
        if error := call.exception():
            return error
        result: list[Row] = call.result()
        if {row["id"] for row in result} != {row["id"] for row in rows}:
            return TypeError(f"{self.work.name} did not give back the rows it was given")
        return result

    def _portable(self, error: BaseException) -> BaseException:
        """The error as it can be raised in another process, where it came from as a note."""
        if isinstance(error, RaysegError):
            return error
        trace = "".join(traceback.format_exception(error))
        plain = all(isinstance(part, str | int | float) for part in error.args)
        known = plain and type(error).__module__ == "builtins" and not isinstance(error, SystemExit)
        told = error if known else RuntimeError(f"{type(error).__name__}: {error}")
        told.add_note(f"in {self.work.name}:\n{trace}")
        return told

    def _settle(self, row: Row) -> Row:
        assert self.ledger is not None
        status = row.setdefault("status", "done")
        attempt = self.attempts.get(row["id"], 1)
        if status == STOPPED:
            return row
        settled = {"id": row["id"], "status": status, "reason": row.get("reason", ""), "hung": row.get("hung", False)}
        try:
            self.ledger.write(
                Record(row["id"], status, settled["reason"], attempt, row["seconds"], row.get("facts", {}))
            )
        except StoreFull as error:
            return {"id": row["id"], "status": STOPPED, "error": error}
        return settled


def _kept(row: Row) -> Row:
    return {key: row[key] for key in ("id", "seconds") if key in row}


def ahead(rows: Rows, patience: float | None = None) -> Rows:
    """The same rows, each made in another thread while the one before is used.

    Closed early, it waits for what is under way: no stage is at work any more when the process ends.

    Raises:
        Stalled: the next row does not come within `patience` seconds.
    """
    hand, stalled = Hand(), False
    coming = hand.submit(next, rows, None)
    try:
        while True:
            stalled = not wait([coming], patience).done
            if stalled:
                raise Stalled(
                    f"nothing was finished for {patience:.0f} s; what is done is in the ledger: "
                    "look for a hanging tile, then give the same command again to go on"
                )
            if (row := coming.result()) is None:
                return
            coming = hand.submit(next, rows, None)
            yield row
    finally:
        if wait([coming], 0 if stalled else ENDING).done:
            rows.close()
