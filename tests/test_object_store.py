"""Runs and files on a real S3 server process, alone and behind a proxy that fails.

The same against any other server, such as MinIO: RAYSEG_TEST_S3=http://127.0.0.1:9000, with AWS_ACCESS_KEY_ID and
AWS_SECRET_ACCESS_KEY.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from urllib.parse import urlsplit

import pytest
from mortal import until
from shaky import FAULTS, Proxy
from small_world import catalogue, files, rayseg, refused, segmenter

from rayseg.config import Config
from rayseg.engine import lease
from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger, Record
from rayseg.engine.run import Run
from rayseg.errors import ConfigError, RunIncomplete
from rayseg.geo.region import Region
from rayseg.io import remote
from rayseg.store import put_if_absent, s3_options, upath

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning",
    "ignore::pytest.PytestUnraisableExceptionWarning",  # s3fs leaves its connections open
)


@pytest.fixture(scope="module")
def server():
    if given := os.environ.get("RAYSEG_TEST_S3"):
        yield given
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            break
        time.sleep(0.1)
    yield f"http://127.0.0.1:{port}"
    process.kill()
    process.wait()


@pytest.fixture
def bucket(server, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    for name, value in (("ACCESS_KEY_ID", "k"), ("SECRET_ACCESS_KEY", "s"), ("DEFAULT_REGION", "us-east-1")):
        if f"AWS_{name}" not in os.environ:
            monkeypatch.setenv(f"AWS_{name}", value)
    name = f"b{uuid.uuid4().hex[:12]}"
    upath(f"s3://{name}").fs.mkdir(name)
    return f"s3://{name}"


def upload(folder, prefix):
    for name, (_, content) in files(folder).items():
        (upath(prefix) / name).write_bytes(content)


def below(prefix):
    """Name -> bytes of everything that a run keeps but run.json and done.json, which hold times."""
    root = upath(prefix)
    root.fs.invalidate_cache()
    names = root.fs.find(root.path)
    kept = [n for n in names if n.endswith((".tif", "parts.parquet", "polygons.parquet")) or "/tiles/" in n]
    return {name.removeprefix(root.path): root.fs.cat_file(name) for name in kept}


def test_only_one_of_many_writers_puts_a_record(bucket):
    won = []
    writers = [
        threading.Thread(target=lambda n=n: won.append(n) if put_if_absent(f"{bucket}/record", bytes([n])) else None)
        for n in range(8)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert len(won) == 1
    assert upath(f"{bucket}/record").read_bytes() == bytes(won)


@pytest.fixture
def quick(monkeypatch):
    """Beats of a second: the store counts whole seconds."""
    monkeypatch.setattr(lease, "BEAT", 1.0)


def opened(root):
    return Run.open(root, pipeline="p", config=Config(), region=Region("r"))


def test_of_two_drivers_one_works_and_the_other_says_who_does(bucket, quick):
    root = f"{bucket}/run"
    with opened(root):
        with pytest.raises(ConfigError, match=rf"another driver works on {root} \(process {os.getpid()} on "):
            opened(root).__enter__()
        assert runs.status(root)["status"] == "running"
    assert lease.holder_of(root) is None
    assert runs.status(root)["status"] == "done"


def test_a_driver_that_misses_three_beats_is_taken_over_and_ends(bucket, quick):
    root = f"{bucket}/run"

    def fails(etag):
        raise OSError("no network")

    with lease.held(root) as first:
        put, first._put = first._put, fails
        began = time.monotonic()
        with lease.held(root) as second:
            assert time.monotonic() - began > 2
            # It sees so by itself before its next beat, as after a break of the network or a suspended machine.
            with pytest.raises(RunIncomplete, match="another driver took over"):
                first.expect_held()
            first.lost, first._put = None, put
            until(lambda: first.lost, 60)
            assert first.lost.owner == second.owner
            with pytest.raises(RunIncomplete, match="another driver took over"):
                first.expect_held()
        assert lease.holder_of(root) is None


def test_a_killed_driver_of_this_machine_shows_as_killed_and_is_taken_over_at_once(bucket):
    root = f"{bucket}/run"
    script = (
        "import os; from rayseg.engine.run import Run; from rayseg.config import Config; "
        "from rayseg.geo.region import Region; "
        f"it = Run.open({root!r}, pipeline='p', config=Config(), region=Region('r')); it.__enter__(); "
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    assert runs.status(root)["status"] == "killed"
    began = time.monotonic()
    with opened(root):
        assert time.monotonic() - began < lease.BEAT
        assert runs.status(root)["status"] == "running"


def test_an_answer_that_is_lost_does_not_cost_the_lease(bucket, quick):
    """The first try of a conditional PUT succeeds, the second one fails because of the first."""
    with lease.held(f"{bucket}/run") as it:
        path = upath(f"{bucket}/run") / ".driver"
        path.fs.pipe_file(path.path, b"by an earlier try", Metadata={"owner": it.owner})
        time.sleep(2.5)
        assert it.lost is None
        assert lease.holder_of(f"{bucket}/run").pid == os.getpid()


@pytest.mark.chaos
def test_a_ledger_behind_a_failing_proxy_has_every_record_once(server, bucket, monkeypatch):
    ledger = Ledger(f"{bucket}/ledger")
    with Proxy(urlsplit(server).netloc, every=3) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for number in range(24):
            ledger.write(Record(f"t{number}", "done", facts={"n": number}))
        found = ledger.read()
    assert {fault for fault, _ in proxy.met} == set(FAULTS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert {record.facts["n"] for record in found.values()} == set(range(24))
    assert len(list(upath(f"{bucket}/ledger").iterdir())) == 24


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world")
    catalogue(root / "imagery", scene={})
    segmenter(root / "model")
    return root


@pytest.fixture
def placed(world, bucket):
    """Imagery, catalogue and model in the bucket; the catalogue made there."""
    upload(world / "imagery", f"{bucket}/imagery")
    upload(world / "model", f"{bucket}/model")
    found = rayseg("ingest", "rasters", f"{bucket}/imagery/scene.tif", "--out", f"{bucket}/cat")
    assert found.exit_code == 0, found.output
    return bucket


def predict(bucket, out, *more):
    words = ("--engine", "inline", "--set", "map.tile=128", *more)
    return rayseg("predict", f"{bucket}/model", f"{bucket}/cat/catalog.json#imagery", "--out", out, *words)


@pytest.mark.chaos
def test_a_run_from_bucket_to_bucket_is_that_on_a_disk_also_behind_a_failing_proxy(
    server, world, placed, tmp_path, monkeypatch
):
    plain = predict(placed, f"{placed}/run")
    assert plain.exit_code == 0, plain.output
    with Proxy(urlsplit(server).netloc, every=11) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        shaken = predict(placed, f"{placed}/shaken")
    assert shaken.exit_code == 0, shaken.output
    assert {fault for fault, _ in proxy.met} == set(FAULTS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    found = {name: content for name, content in below(f"{placed}/run").items() if not name.endswith(".json")}
    again = {name: content for name, content in below(f"{placed}/shaken").items() if not name.endswith(".json")}
    assert again == found
    assert any(name.endswith("classes.tif") for name in found)
    status = json.loads(rayseg("status", f"{placed}/shaken", "--json").stdout)["steps"]["predict"]
    assert status["troubles"] == {}
    assert sum(status["counts"][kind] for kind in ("done", "empty", "nodata")) == status["planned"]
    written = status["counts"]["done"] + status["counts"]["empty"]
    assert written == len([name for name in found if name.endswith("classes.tif")])
    local = rayseg("predict", world / "model", world / "imagery/cat/catalog.json#imagery", "--out", tmp_path / "run",
                   "--engine", "inline", "--set", "map.tile=128")  # fmt: skip
    assert local.exit_code == 0, local.output
    rasters = list((tmp_path / "run").glob("tiles/*/*.tif"))
    assert len(rasters) == 3 * written  # classes, scores, classes without specks
    for path in rasters:
        assert found[f"/{path.relative_to(tmp_path / 'run')}"] == path.read_bytes()


def test_a_missing_bucket_is_an_error_before_any_work(world, bucket):
    words = ("predict", world / "model", world / "imagery/cat/catalog.json#imagery", "--engine", "inline")
    said = refused(2, *words, "--out", "s3://no-such-bucket-here/run")
    assert "has no bucket 'no-such-bucket-here'; correct its name" in said
    away = "s3://no-such-bucket-here"
    for words in (
        ("status", f"{away}/run"),
        ("retry", f"{away}/run"),
        ("verify", f"{away}/run"),
        ("predict", f"{away}/model", world / "imagery/cat/catalog.json#imagery", "--out", f"{bucket}/run"),
        ("predict", world / "model", f"{away}/catalog.json#imagery", "--out", f"{bucket}/run"),
        ("ingest", "rasters", f"{away}/a.tif", "--out", f"{bucket}/cat"),
        ("ingest", "folder", away, "--out", f"{bucket}/cat"),
        ("ingest", "rasters", world / "imagery/scene.tif", "--out", f"{away}/cat"),
        ("models", "list", away),
        ("models", "show", f"{away}/model"),
    ):
        assert "has no bucket 'no-such-bucket-here'" in refused(2, *words), words


def test_urls_with_secrets_are_refused_and_not_repeated(world, tmp_path):
    words = ("predict", world / "model", "--engine", "inline", "--out", tmp_path / "run")
    said = refused(2, *words, "https://127.0.0.1:9/catalog.json?sig=SECRET#imagery")
    assert "SECRET" not in said
    assert not (tmp_path / "run").exists()


def test_gdal_and_s3fs_use_the_same_settings(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_NO_SIGN_REQUEST", "YES")
    assert s3_options() == {"endpoint_url": "http://127.0.0.1:9", "anon": True}
    assert upath("s3://b/k").storage_options == s3_options()
    asked = remote.settings("s3://b/k")
    assert asked["AWS_S3_ENDPOINT"] == "127.0.0.1:9"
    assert (asked["AWS_HTTPS"], asked["AWS_NO_SIGN_REQUEST"]) == ("NO", "YES")
    assert "AWS_S3_ENDPOINT" not in remote.settings("https://example.org/a.tif")
