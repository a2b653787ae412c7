"""Records of rows: each counts once, in a file of its own or joined with others."""

from dataclasses import asdict

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayseg.engine.ledger import COLUMNS, WITHDRAWN, Account, Fate, Ledger, Record


@pytest.fixture
def ledger(tmp_path):
    found = Ledger(str(tmp_path / "ledger"))
    for number in range(20):
        found.write(Record(f"t{number}", "done", seconds={"Read": 0.5}, facts={"counts": {"1": number}}))
    found.write(Record("bad", "failed", "the file is damaged"))
    return found


def files(ledger, pattern):
    return sorted(path.name for path in ledger._paths(pattern))


def test_joined_records_are_the_same_records(ledger):
    before = ledger.read()
    ledger.compact(most=20)
    assert files(ledger, ".json") == []
    assert len(files(ledger, ".parquet")) == 1
    assert ledger.read() == before
    assert before["t7"].facts == {"counts": {"1": 7}}


def test_few_records_are_left_as_they_are(ledger):
    ledger.compact(most=21)
    assert len(files(ledger, ".json")) == 21


def test_the_latest_attempt_counts_wherever_it_lies(ledger):
    ledger.compact(most=0)
    ledger.write(Record("bad", "done", attempt=2))
    for _ in range(2):
        assert ledger.read()["bad"].attempt == 2
        assert ledger.fates().among(["bad", "t1", "other"]) == {"bad": Fate("done", "", 2), "t1": Fate("done", "", 1)}
        ledger.compact(most=0)
    assert len(files(ledger, ".parquet")) == 2


def test_records_come_in_parts_wherever_they_lie(ledger):
    before = ledger.read()
    ledger.compact(most=0)
    ledger.write(Record("t3", "done", attempt=2, facts={"counts": {}}))
    ledger.write(Record("bad", "failed", "again", attempt=2))
    ledger.compact(most=1)
    ledger.write(Record("bad", "done", attempt=3))
    parts = [["t1", "t3", "bad"], [], ["none"], ["t2", "t19"]]
    found = list(ledger.records(parts))
    assert [list(part) for part in map(sorted, found)] == [["bad", "t1", "t3"], [], [], ["t19", "t2"]]
    assert found[0] == {name: ledger.read()[name] for name in ("bad", "t1", "t3")}
    assert (found[0]["bad"].attempt, found[0]["t3"].attempt, found[0]["t1"]) == (3, 2, before["t1"])


def test_a_record_that_is_written_again_counts_once(ledger):
    ledger.compact(most=0)
    ledger.write(Record("t3", "done"))
    assert len(ledger.fates()) == 21
    assert len(ledger.read()) == 21


def test_readers_find_records_that_are_joined_meanwhile(ledger, monkeypatch):
    paths = ledger._paths

    def late(suffix):
        found = paths(suffix)
        if suffix == ".json":
            monkeypatch.setattr(ledger, "_paths", paths)
            ledger.compact(most=0)
        return found

    monkeypatch.setattr(ledger, "_paths", late)
    assert len(ledger.read()) == 21


def test_accounts_of_parts_add_up(ledger):
    ids = [f"t{number}" for number in range(22)] + ["bad"]
    parts = [pa.array(ids[:9]), pa.array(ids[9:])]
    found = ledger.account(parts)
    assert found == Account.of(ids, ledger.read())
    assert str(found) == "23 planned = 20 done + 1 failed + 2 missing"
    assert found.troubles == {"t20": "not processed", "t21": "not processed", "bad": "the file is damaged"}


def test_an_empty_ledger_has_no_fates(tmp_path):
    empty = Ledger(str(tmp_path / "none"))
    assert empty.fates().among(["a"]) == {}
    assert empty.read() == {}
    assert empty.account([]).planned == 0


def test_damaged_records_count_as_missing_and_are_named(tmp_path):
    found = Ledger(str(tmp_path / "ledger"))
    for name in "abc":
        found.write(Record(name, "done", files={"tiles/x": (1, "f")}))
    found.compact(2)
    for name in "de":
        found.write(Record(name, "done"))
    (tmp_path / "ledger" / "d.1.json").write_bytes(bytes(40))
    assert sorted(found.read()) == ["a", "b", "c", "e"]
    assert found.read()["a"].files == {"tiles/x": [1, "f"]}
    [joined] = (tmp_path / "ledger").glob("*.parquet")
    joined.write_bytes(joined.read_bytes()[:-9])
    damaged = []
    assert [[record.id for record in part] for part in found.latest(damaged)] == [["e"], []]
    assert {path.name for path in damaged} == {"d.1.json", joined.name}


def test_the_latest_records_come_from_all_files(tmp_path):
    found = Ledger(str(tmp_path / "ledger"))
    for name in "ab":
        found.write(Record(name, "failed", "why"))
    found.compact(1)
    found.write(Record("a", "done", attempt=2))
    assert [[(r.id, r.attempt) for r in part] for part in found.latest()] == [[("a", 2)], [("b", 1)]]


def test_joined_records_of_earlier_versions_have_no_files(tmp_path):
    rows = [asdict(Record("a", "done")) | {"seconds": "{}", "facts": "{}"}]
    table = pa.Table.from_pylist(rows, schema=pa.schema([field for field in COLUMNS if field.name != "files"]))
    (tmp_path / "ledger").mkdir()
    pq.write_table(table, tmp_path / "ledger" / "records-0.parquet")
    assert Ledger(str(tmp_path / "ledger")).read() == {"a": Record("a", "done")}


def test_a_withdrawn_row_counts_as_not_processed(tmp_path):
    found = Ledger(str(tmp_path / "ledger"))
    found.write(Record("a", "done"))
    found.write(Record("a", WITHDRAWN, "tiles/a: missing", 2))
    account = found.account([pa.array(["a", "b"])])
    assert account.counts["missing"] == 2
    assert account.troubles == {"a": "not processed", "b": "not processed"}
