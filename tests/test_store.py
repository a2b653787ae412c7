import threading

import pytest
from upath import UPath

from rayseg.store import cache_dir, is_local, put, put_file, put_if_absent, upath


@pytest.fixture(params=["local", "memory"])
def folder(request, tmp_path):
    if request.param == "local":
        return UPath(tmp_path)
    return UPath(f"memory://{tmp_path.name}")


def test_put_replaces_whole_objects_and_leaves_nothing_else(folder):
    put(folder / "a" / "b", b"1")
    put(folder / "a" / "b", b"22")
    assert (folder / "a" / "b").read_bytes() == b"22"
    assert [path.name for path in (folder / "a").iterdir()] == ["b"]


def test_put_file_moves_it(folder, tmp_path):
    (tmp_path / "source").write_bytes(b"x" * 10)
    put_file(folder / "c" / "d", tmp_path / "source")
    assert (folder / "c" / "d").read_bytes() == b"x" * 10
    assert not (tmp_path / "source").exists()


def test_only_the_first_of_many_writers_wins(tmp_path):
    won = []

    def write(number):
        if put_if_absent(tmp_path / "record", bytes([number])):
            won.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (tmp_path / "record").read_bytes() == bytes(won)
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_file_uris_are_local_paths(tmp_path):
    assert str(upath(f"file://{tmp_path}/x")) == f"{tmp_path}/x"
    assert is_local(tmp_path)
    assert not is_local("s3://bucket/x")


def test_the_cache_folder_can_be_chosen(monkeypatch, tmp_path):
    monkeypatch.setenv("RAYSEG_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
