import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from botocore.exceptions import NoCredentialsError
from upath import UPath

from rayseg.engine import flow
from rayseg.engine.flow import Work
from rayseg.engine.ledger import Ledger, Settled
from rayseg.engine.run import Engine
from rayseg.engine.work import Entry, StageRunner
from rayseg.errors import DataError, RunIncomplete, Stalled, StoreFull
from rayseg.store import upath

HERE = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
INLINE = Engine("inline")
RAY = Engine("ray")
ENGINES = [pytest.param(INLINE, id="inline"), pytest.param(RAY, id="ray", marks=[pytest.mark.ray])]
# Inline and, on Ray, test_every_row_is_accounted_for... and test_engines_give_the_same_bytes prove the same.
MORE_ON_RAY = [ENGINES[0], pytest.param(RAY, id="ray", marks=[pytest.mark.ray, pytest.mark.more])]


@dataclass(frozen=True, eq=False)
class Numbered:
    """A row and what the stages add."""

    id: str
    n: int
    value: Any = None

    @classmethod
    def from_row(cls, row):
        return cls(row["id"], row["n"])


run = partial(flow.run, record=Numbered.from_row)


class Draw:
    """id, n -> value"""

    def __init__(self, *, bad: str = "", deadly: str = "", nodata: str = "", hanging: str = "") -> None:
        self.bad, self.deadly, self.nodata, self.hanging = bad, deadly, nodata, hanging

    def __call__(self, rows):
        return [self._draw(row) for row in rows]

    def _draw(self, row):
        if row.id == self.bad:
            raise DataError("the file is damaged")
        if row.id == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)
        if row.id == self.hanging:
            time.sleep(3600)
        if row.id == self.nodata:
            return Settled("nodata")
        return replace(row, value=np.full((3, 1 + row.n % 4), row.n, np.float32))


class Double:
    """value -> value"""

    def __call__(self, rows):
        return [replace(row, value=row.value * 2) for row in rows]


class Keep:
    """id, value -> facts"""

    def __init__(self, folder, full: str = "") -> None:
        self.folder, self.full = folder, full

    def __call__(self, rows):
        return [self._keep(row) for row in rows]

    def _keep(self, row):
        if row.id == self.full:
            raise StoreFull("no room for results")
        (self.folder / row.id).write_bytes(row.value.tobytes())
        return Settled(facts={"sum": float(row.value.sum())})


def rows_of(count):
    return [{"id": f"t{n}", "n": n} for n in range(count)]


def works(folder, **draw):
    return [Work(Draw(**draw)), Work(Double(), batch=4, cpus=1, model=True), Work(Keep(folder))]


@pytest.fixture(autouse=True)
def _ray_when_asked(request):
    if request.node.get_closest_marker("ray"):
        request.getfixturevalue("local_ray")


@pytest.fixture
def place(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out", Ledger(str(tmp_path / "ledger"))


@pytest.mark.parametrize("engine", ENGINES)
def test_every_row_is_accounted_for_and_a_bad_one_harms_no_neighbour(engine, place):
    out, ledger = place
    account = run(rows_of(9), works(out, bad="t3", nodata="t5"), ledger, engine)
    assert account.planned == 9
    assert account.counts["done"] == 7
    assert account.counts["nodata"] == 1
    assert account.troubles == {"t3": "Draw: the file is damaged"}
    assert {path.name for path in out.iterdir()} == {f"t{n}" for n in range(9)} - {"t3", "t5"}
    assert ledger.read()["t4"].facts == {"sum": 4 * 2 * 3.0}
    assert set(ledger.read()["t4"].seconds) == {"Draw", "Double", "Keep"}


@pytest.mark.parametrize("engine", MORE_ON_RAY)
def test_a_second_run_works_only_on_what_is_left(engine, place):
    out, ledger = place
    run(rows_of(4), works(out), ledger, engine)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    account = run(rows_of(6), works(out), ledger, engine)
    assert account.counts["done"] == 6
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


def test_rows_are_worked_on_in_parts_and_their_records_put_together(monkeypatch, place):
    out, ledger = place
    monkeypatch.setattr(flow, "PART", 4)
    monkeypatch.setattr(Ledger.compact, "__defaults__", (2,))
    account = run(rows_of(10), works(out, bad="t3"), ledger, INLINE)
    assert (account.planned, account.counts["done"]) == (10, 9)
    assert account.troubles == {"t3": "Draw: the file is damaged"}
    assert sorted(path.suffix for path in UPath(ledger.prefix).iterdir()) == [".json", ".json", ".parquet", ".parquet"]
    assert run(rows_of(10), works(out), ledger, Engine("inline", retry=True)).counts["done"] == 10
    assert ledger.read()["t3"].attempt == 2


def test_a_ledger_may_be_on_an_object_store(tmp_path):
    ledger = Ledger(f"memory://{tmp_path.name}/ledger")
    for _ in range(2):
        assert not run(rows_of(3), [Work(Draw()), Work(Double())], ledger, INLINE).troubles
    assert {path.name for path in UPath(ledger.prefix).iterdir()} == {f"t{n}.1.json" for n in range(3)}


def test_failed_rows_are_tried_again_only_when_asked(place):
    out, ledger = place
    run(rows_of(3), works(out, bad="t1"), ledger, INLINE)
    assert run(rows_of(3), works(out), ledger, INLINE).troubles
    assert not run(rows_of(3), works(out), ledger, Engine("inline", retry=True)).troubles
    assert ledger.read()["t1"].attempt == 2


@pytest.mark.ray
def test_engines_give_the_same_bytes(tmp_path):
    results = []
    for name, engine in (("a", INLINE), ("b", RAY)):
        (tmp_path / name).mkdir()
        run(rows_of(11), works(tmp_path / name), Ledger(str(tmp_path / f"ledger-{name}")), engine)
        results.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert results[0] == results[1]
    assert len(results[0]) == 11


@pytest.mark.ray
@pytest.mark.chaos
def test_a_row_that_kills_its_process_is_quarantined_and_the_rest_is_done(place):
    out, ledger = place
    account = run(rows_of(6), works(out, deadly="t2"), ledger, RAY)
    assert account.counts["done"] == 5
    assert account.counts["quarantined"] == 1
    assert "process died" in account.troubles["t2"]


@pytest.mark.parametrize("engine", MORE_ON_RAY)
def test_a_row_that_hangs_is_failed_alone_and_mended_by_a_retry(engine, place):
    out, ledger = place
    stages = [Work(Draw(hanging="t1")), Work(Double(), batch=4, cpus=1, model=True), Work(Keep(out))]
    seconds = 5 if engine.kind == "ray" else 1  # Ray's processes take seconds to start
    account = run(rows_of(6), stages, ledger, engine, stall_seconds=seconds)
    assert account.troubles == {"t1": f"Draw: no progress for {seconds} s"}
    assert account.counts["done"] == 5
    assert not run(rows_of(6), works(out), ledger, Engine(engine.kind, retry=True)).troubles


def test_a_row_that_hangs_in_a_batch_harms_no_neighbour(place):
    out, ledger = place
    account = run(rows_of(6), [Work(Draw(hanging="t1"), batch=4), Work(Keep(out))], ledger, INLINE, stall_seconds=1)
    assert list(account.troubles) == ["t1"]
    assert account.counts["done"] == 5


def test_what_a_hanging_stage_does_later_is_not_seen(place):
    _, ledger = place

    def late(rows):
        time.sleep(1.2)
        return [Settled("nodata")]

    run(rows_of(1), [Work(late)], ledger, INLINE, stall_seconds=0.8)
    time.sleep(0.6)
    assert ledger.read()["t0"].status == "failed"


def test_when_every_row_hangs_the_run_ends_with_how_to_go_on(place):
    _, ledger = place

    def hang(rows):
        time.sleep(3600)

    with pytest.raises(Stalled, match=r"t0, t1, t2 timed out .*, then run the same command"):
        run(rows_of(9), [Work(hang)], ledger, INLINE, stall_seconds=0.1)
    assert ledger.read().keys() >= {"t0", "t1", "t2"}


def test_an_engine_that_hangs_ends_the_run_with_how_to_go_on(monkeypatch, place):
    _, ledger = place

    def hang(entries, runners):
        yield replace(entries[0], row=Settled())
        time.sleep(3600)

    monkeypatch.setattr(flow, "_inline", hang)
    with pytest.raises(RunIncomplete, match=r"no row was finished for 0 s.*run the same command"):
        run(rows_of(3), [Work(Double())], ledger, INLINE, stall_seconds=0.1)


@pytest.mark.parametrize("engine", MORE_ON_RAY)
def test_without_room_the_run_ends_and_no_row_is_failed(engine, place):
    out, ledger = place
    with pytest.raises(StoreFull, match="no room for results"):
        run(rows_of(6), [Work(Draw()), Work(Keep(out, full="t3"))], ledger, engine)
    assert {record.status for record in ledger.read().values()} <= {"done"}
    assert "t3" not in ledger.read()
    assert not run(rows_of(6), works(out), ledger, engine).troubles


def test_without_room_for_the_ledger_the_run_ends(monkeypatch, place):
    out, ledger = place

    def full(*_):
        raise StoreFull("no room for records")

    monkeypatch.setattr(Ledger, "write", full)
    with pytest.raises(StoreFull, match="no room for records"):
        run(rows_of(2), works(out), ledger, INLINE)


def test_when_a_run_ends_early_no_stage_is_at_work_any_more(place):
    out, ledger = place
    at_work = []

    def slow(rows):
        at_work.append(rows[0].id)
        time.sleep(0.1)
        at_work.remove(rows[0].id)
        return rows

    with pytest.raises(StoreFull) as ended:  # keeps the traceback, and with it every generator of the run
        run(rows_of(9), [Work(Draw()), Work(slow), Work(slow), Work(Keep(out, full="t1"))], ledger, INLINE)
    assert at_work == []
    assert ended.traceback


@pytest.mark.parametrize("error", [TimeoutError("late"), NoCredentialsError()])
def test_errors_of_stores_settle_the_row_at_fault(place, error):
    _, ledger = place

    def fail(rows):
        raise error

    account = run(rows_of(1), [Work(fail)], ledger, INLINE)
    assert account.troubles == {"t0": f"function: {type(error).__name__}: {error}"}


class Wrong:
    """A stage with a fault."""

    def __call__(self, rows):
        return rows + 1


@pytest.mark.parametrize("engine", MORE_ON_RAY)
def test_a_fault_of_the_program_is_not_taken_for_bad_data_and_ends_the_run_at_once(place, engine):
    out, ledger = place
    with pytest.raises(TypeError, match="can only concatenate list") as ended:
        run(rows_of(40), [*works(out)[:2], Work(Wrong())], ledger, engine)
    assert "in Wrong:" in ended.value.__notes__[0]
    assert "return rows + 1" in ended.value.__notes__[0]
    assert ledger.read() == {}


def test_rows_that_were_under_way_are_not_blamed_for_a_fault_of_the_program(place):
    out, ledger = place
    (upath(ledger.prefix) / ".under-way.part").parent.mkdir(parents=True, exist_ok=True)
    (upath(ledger.prefix) / ".under-way.part").touch()
    with pytest.raises(TypeError, match="can only concatenate list"):
        run(rows_of(2), [*works(out)[:2], Work(Wrong())], ledger, INLINE)
    assert ledger.read() == {}


def test_rows_and_their_stages_survive_pickling_before_and_after_work(place):
    runner = StageRunner(works(place[0])[1], None, {}, 60)
    for _ in range(2):
        again = pickle.loads(pickle.dumps(runner))
        [entry] = pickle.loads(pickle.dumps(again([Entry("t1", Numbered("t1", 1, 2))])))
        assert (entry.id, entry.row.value, set(entry.seconds)) == ("t1", 4, {"Double"})
        runner = again


def test_a_row_that_is_settled_before_the_first_stage_passes_all_stages(place):
    out, ledger = place

    def record(row):
        return Settled("failed", "no bands") if row["id"] == "t1" else Numbered.from_row(row)

    assert run(rows_of(3), works(out), ledger, INLINE, record=record).troubles == {"t1": "no bands"}
    assert ledger.read()["t1"].seconds == {}


def test_a_stage_that_drops_a_row_is_a_fault_of_the_program(place):
    with pytest.raises(TypeError, match="Drop returned 1 rows for 2"):
        run(rows_of(2), [Work(Drop(), batch=2)], place[1], INLINE)


class Drop:
    """A stage with a fault."""

    def __call__(self, rows):
        return rows[1:]


def test_stages_survive_pickling(tmp_path):
    for work in works(tmp_path):
        assert pickle.loads(pickle.dumps(work)).name == work.name


TWICE = """
import sys
from pathlib import Path
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Engine
from test_flow import rows_of, run, works

for name in ("first", "second"):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    account = run(rows_of(3), works(folder), Ledger(f"{folder}-ledger"), Engine("ray"))
    print(name, account)
"""


DEADLY = """
import sys
from pathlib import Path
from rayseg.engine.ledger import Ledger
from rayseg.engine.run import Engine
from test_flow import rows_of, run, works

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    ledger = Ledger(str(folder / "ledger"))
    account = run(rows_of(20), works(folder / "out", deadly="t7"), ledger, Engine("inline"))
    print(account, account.troubles)
"""


def test_inline_a_row_that_kills_the_process_is_found_by_the_next(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "deadly.py").write_text(DEADLY)
    environment = os.environ | {"PYTHONPATH": HERE}
    command = [sys.executable, str(tmp_path / "deadly.py"), str(tmp_path)]
    first, second = (
        subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=240)
        for _ in range(2)
    )
    assert first.returncode == -signal.SIGKILL
    assert second.stdout.startswith("20 planned = 19 done + 1 quarantined {'t7': 'its process died twice (killed)"), (
        second
    )
    assert len(list((tmp_path / "out").iterdir())) == 19
    left = [path for path in (tmp_path / "ledger").glob(".*") if path.suffix != ".part"]
    assert not left  # what was half written when it was killed goes when a run ends


@pytest.mark.more  # a Ray of its own
@pytest.mark.ray
def test_one_private_ray_serves_all_flows_of_a_process(tmp_path):
    """With two CPUs, as on a small machine: reading, model and writing must fit beside each other."""
    environment = os.environ | {"PYTHONPATH": HERE, "RAY_OVERRIDE_RESOURCES": '{"CPU": 2}'}
    done = subprocess.run(
        [sys.executable, "-c", TWICE, str(tmp_path)],
        check=False,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.stdout.splitlines() == ["first 3 planned = 3 done", "second 3 planned = 3 done"], done.stderr[-2000:]
