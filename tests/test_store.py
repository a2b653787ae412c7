import errno
import os
import pickle
import threading
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import pytest
from botocore.exceptions import ClientError, NoCredentialsError
from pydantic import BaseModel
from s3fs.errors import translate_boto_error
from upath import UPath

from rayseg.errors import ConfigError, StoreFull, StoreRefused
from rayseg.store import (
    STORE_ERRORS,
    Location,
    cache_dir,
    checksum,
    is_local,
    listing,
    put,
    put_file,
    put_if_absent,
    recorded,
    relocated,
    sentence,
    sweep,
    synced_once,
    upath,
    within,
)


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


@pytest.mark.parametrize("write", [put, put_if_absent])
@pytest.mark.parametrize(
    ("number", "raised"), [(errno.ENOSPC, StoreFull), (errno.EDQUOT, StoreFull), (errno.EIO, OSError)]
)
def test_a_failed_write_leaves_no_partial_file(monkeypatch, tmp_path, write, number, raised):
    def half(path, data):
        path.touch()
        raise OSError(number, "it fails")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(raised, match="it fails"):
        write(tmp_path / "a" / "b", b"123")
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]


def test_a_sweep_removes_the_files_of_killed_writers_and_nothing_else(tmp_path):
    for name in (".b.01234567.part", "b", ".hidden", "c.part"):
        put(tmp_path / "a" / name, b"1")
    sweep(tmp_path)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"b", ".hidden", "c.part"}
    sweep("memory://nowhere")


def test_locations_are_absolute_paths(monkeypatch, tmp_path):
    class Places(BaseModel):
        at: Location | None = None

    monkeypatch.chdir(tmp_path)
    for text, placed in {
        "a/catalog.json#truth": f"{tmp_path}/a/catalog.json#truth",
        "#truth/gpc": "#truth/gpc",
        "s3://bucket/a#b": "s3://bucket/a#b",
        "/a/b": "/a/b",
    }.items():
        assert Places(at=text).at == placed
        assert Places(at=placed).at == placed
    assert Places().at is None


def test_errors_of_the_aws_client_get_a_remedy():
    assert "Unable to locate credentials; check AWS_PROFILE" in sentence(NoCredentialsError())
    assert sentence(OSError("gone")) == "gone"


@pytest.fixture
def synced(monkeypatch):
    """What the operating system was asked to write to the disk, in order."""
    found = []
    monkeypatch.setattr(os, "fsync", lambda number: found.append(Path(f"/proc/self/fd/{number}").readlink()))
    return found


def test_a_file_is_synced_before_its_name_and_then_every_folder_with_a_new_name(tmp_path, synced):
    put(tmp_path / "a" / "b" / "c", b"1")
    assert synced[0].name.startswith(".c.")
    assert set(synced[1:]) == {tmp_path / "a" / "b", tmp_path / "a", tmp_path}
    synced.clear()
    assert put_if_absent(tmp_path / "a" / "d", b"1")
    assert [path.name[:3] for path in synced] == [".d.", "a"]


def test_the_files_of_a_stage_are_recorded_and_its_folders_synced_once_when_it_ends(tmp_path, synced):
    with recorded() as files, synced_once():
        for name in "ab":
            put(tmp_path / "t" / name, name.encode())
        assert tmp_path / "t" not in synced
    assert Counter(synced)[tmp_path / "t"] == Counter(synced)[tmp_path] == 1
    assert within(files, str(tmp_path)) == {f"t/{name}": (1, checksum(name.encode())) for name in "ab"}
    assert listing(tmp_path) == {"t/a": 1, "t/b": 1}


def test_a_listing_names_files_by_their_path_from_the_prefix(folder):
    put(folder / "a" / "b", b"22")
    put(folder / "c", b"1")
    put(folder / ".lock", b"")
    assert listing(folder) == {"a/b": 2, "c": 1}


def test_a_path_is_replaced_wherever_texts_name_it_and_longer_names_stay():
    value = {"/a/run": ["/a/run", "/a/run/x", "see /a/run: gone", "/a/run2/x", "/a/run.old", "/a/run-b"], "n": 1}
    moved = {"/a/run": ["<run>", "<run>/x", "see <run>: gone", "/a/run2/x", "/a/run.old", "/a/run-b"], "n": 1}
    assert relocated(value, "/a/run", "<run>") == moved
    assert relocated(moved, "<run>", "/a/run") == value


def test_a_refused_request_names_object_permission_and_remedy(monkeypatch):
    async def refused(*_, **__):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("s3fs.S3FileSystem._call_s3", refused)
    said = "s3://b/k: Access Denied; the keys in use need s3:PutObject there: .* AWS_PROFILE"
    with pytest.raises(PermissionError, match=said):
        put("s3://b/k", b"1")
    with pytest.raises(PermissionError, match=r"s3://b/k: .* s3:GetObject"):
        upath("s3://b/k").read_bytes()


REFUSED = {
    "NoSuchBucket": (ConfigError, r"s3://b/k cannot be used: .* has no bucket 'b'; correct its name"),
    "ExpiredToken": (StoreRefused, "the session token has expired .* AWS_SESSION_TOKEN, then run the same command"),
    "RequestTimeTooSkewed": (StoreRefused, "the clock of this machine differs from the store's"),
    "InternalError": (OSError, "^.Errno .* code InternalError$"),
}


@pytest.mark.parametrize("code", REFUSED)
def test_missing_buckets_and_refused_keys_are_errors_of_the_settings(monkeypatch, code):
    """Not missing files: for those, functions have an answer of their own."""

    async def fails(*_, **__):
        raise translate_boto_error(ClientError({"Error": {"Code": code, "Message": f"code {code}"}}, "PutObject"))

    monkeypatch.setattr("s3fs.S3FileSystem._call_s3", fails)
    kind, said = REFUSED[code]
    for call in (lambda: put("s3://b/k", b"1"), lambda: upath("s3://b/k").exists()):
        with pytest.raises(kind, match=said) as caught:
            call()
        assert pickle.loads(pickle.dumps(caught.value)).args == caught.value.args
    assert isinstance(StoreRefused("x"), STORE_ERRORS)


@pytest.mark.skipif(find_spec("gcsfs") is not None, reason="gcsfs is installed")
def test_a_google_store_without_its_package_has_a_remedy():
    with pytest.raises(
        ConfigError, match=r"pip install gcsfs; or use .* AWS_ENDPOINT_URL=https://storage.googleapis.com"
    ):
        put("gs://b/k", b"1")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("foo://a/b", "foo:// is not a store that is known, expected s3://"),
        ("http://localhost/b", "http://localhost/b is a web address, which is not written to"),
        ("s3:///b", "s3:///b names no bucket, expected s3://BUCKET/PATH"),
    ],
)
def test_a_target_that_no_store_has_is_an_error_of_the_settings(path, said):
    with pytest.raises(ConfigError, match=said):
        put(path, b"1")
