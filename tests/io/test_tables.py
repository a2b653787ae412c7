"""Files read by several threads in order, and tables kept on disk."""

import threading

import pyarrow as pa
import pytest

from rayseg.io.tables import THREADS, Spool, concurrently, content


def test_results_come_in_order_from_threads_that_work_at_the_same_time():
    together = threading.Barrier(THREADS, timeout=20)

    def read(number):
        if number < THREADS:
            together.wait()
        return number * 2

    assert list(concurrently(read, range(1000))) == [number * 2 for number in range(1000)]


def test_inputs_are_taken_a_few_ahead_of_what_is_used():
    taken = []
    results = concurrently(lambda number: number, (taken.append(n) or n for n in range(100_000)))
    assert next(results) == 0
    assert len(taken) <= 16 * THREADS
    results.close()


def test_an_error_of_one_input_is_raised_where_its_result_is_due():
    def read(number):
        if number == 3:
            raise FileNotFoundError(number)
        return number

    results = concurrently(read, range(9))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(FileNotFoundError):
        next(results)


def test_tables_come_back_as_they_were_also_after_the_spool_is_closed():
    tables = [pa.table({"a": list(range(n)), "b": ["x" * n] * n}) for n in (3, 0, 70)]
    with Spool() as spool:
        assert spool.tables() == []
        for table in tables:
            spool.add(table)
        found = spool.tables()
    assert [one.equals(other) for one, other in zip(found, tables, strict=True)] == [True] * 3


def test_the_content_of_a_file_is_read_wherever_it_is(tmp_path):
    (tmp_path / "a[1].txt").write_bytes(b"one")
    assert content(tmp_path / "a[1].txt") == b"one"
    with pytest.raises(FileNotFoundError):
        content(tmp_path / "b.txt")
