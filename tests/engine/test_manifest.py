"""Rows in columns are the same rows."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayseg.engine import manifest
from rayseg.engine.manifest import Manifest, read_rows, write_rows
from rayseg.errors import DataError


def row(number, **more):
    return {"id": f"t{number}", "crs": "EPSG:32631", "col": number, "xres": 0.5, "sources": "[]", "refused": ""} | more


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch):
    monkeypatch.setattr(manifest, "PART", 3)


def test_rows_come_back_as_they_were_given(tmp_path):
    parts = [[row(n) for n in range(5)], [], [row(5, crs=None), row(6, sources="[{}]", refused="no bands")]]
    rows = [one for part in parts for one in part]
    found = Manifest.of(parts)
    write_rows(tmp_path / "manifest.parquet", found)
    for kept in (found, read_rows(tmp_path / "manifest.parquet")):
        assert len(kept) == 7
        assert list(kept) == rows
        assert kept == rows
        assert (kept[6], kept[-1], kept[2:6], kept[5:]) == (rows[6], rows[6], rows[2:6], rows[5:])
        assert kept.refused() == ["t6"]
        assert list(kept.only(["t3", "t9"])) == [rows[3]]


def test_tables_of_any_columns_come_back_as_they_were_given(tmp_path):
    """As chosen chips, groups of plots and patches are listed."""
    rows = [
        {"id": "a", "score": None, "taken": None, "rank": 1, "numbers": [1, 2], "plots": [b"x"], "right": True},
        {"id": "b", "score": 0.5, "taken": "c", "rank": None, "numbers": [], "plots": [], "right": False},
    ]
    write_rows(tmp_path / "table.parquet", rows)
    assert list(read_rows(tmp_path / "table.parquet")) == rows
    assert list(read_rows(tmp_path / "table.parquet", columns=["id"])) == [{"id": "a"}, {"id": "b"}]
    write_rows(tmp_path / "empty.parquet", [])
    assert list(read_rows(tmp_path / "empty.parquet")) == []


@pytest.mark.parametrize("columns", [{}, {"compression": "zstd"}])
def test_files_of_earlier_versions_are_read(tmp_path, columns):
    rows = [row(number) for number in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "manifest.parquet", **columns)
    assert read_rows(tmp_path / "manifest.parquet") == rows


def test_a_file_that_is_missing_or_no_table_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_rows(tmp_path / "nowhere.parquet")
    (tmp_path / "text.parquet").write_text("no table at all")
    with pytest.raises(pa.ArrowInvalid):
        read_rows(tmp_path / "text.parquet")


def test_equal_texts_are_one_object():
    kept = Manifest.of([[row(n, sources="[1, 2]") for n in range(3)]])
    assert len({id(one["sources"]) for one in kept[0:3]}) == 1


def test_there_may_be_no_rows():
    assert list(Manifest.of([[]])) == []
    assert Manifest.of([]).refused() == []


@pytest.mark.parametrize(("ids", "why"), [(("a", "a"), "occurs twice"), (("a", "b/c"), "cannot be a file name")])
def test_ids_that_cannot_be_files_are_refused(ids, why):
    with pytest.raises(DataError, match=why):
        Manifest.of([[{"id": name} for name in ids]]).expect_ids()


def test_ids_that_can_be_files_are_not():
    Manifest.of([[{"id": name} for name in ("EPSG-32631_1_-2", "_x", "a.b-c")]]).expect_ids()


def test_sources_below_the_run_are_found_where_the_run_is_now(tmp_path):
    def rows(*folders):
        sources = [json.dumps([{"href": f"{folder}/a.tif"}]) for folder in folders]
        return [{"id": f"t{number}", "sources": source, "refused": ""} for number, source in enumerate(sources)]

    path = tmp_path / "manifest.parquet"
    write_rows(path, rows("/é/run/enlarged", "/é/run-2", "/data"), root="/é/run")
    assert read_rows(path, root="/moved") == rows("/moved/enlarged", "/é/run-2", "/data")
    write_rows(path, rows("/data"))
    assert read_rows(path, root="/moved") == rows("/data")
    write_rows(path, [], root="/é/run")
    assert len(read_rows(path, root="/moved")) == 0
