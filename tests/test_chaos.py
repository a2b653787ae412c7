"""Whole runs of every pipeline on Ray, from bucket to bucket, while the store fails: finished, equal, nothing doubled.

Each maps a small demo, with a training of seconds. The first run is undisturbed. The second meets a proxy between the
store and its driver and workers; its keys expire in the middle, and the same command goes on with others.
"""

import uuid
from collections import Counter
from urllib.parse import urlsplit

import pytest
from mortal import TABLE, Command
from shaky import FAULTS, Proxy
from small_world import SMALL_GPC, files
from test_object_store import server  # noqa: F401 - a fixture

from rayseg.engine.ledger import COLUMNS, Ledger
from rayseg.engine.run import status
from rayseg.store import listing, upath

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.e2e,
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
]
SMALL = {
    "gpc": ("--config", "small.yaml"),
    "agri": ("--config", "agri/smoke", "--set", "superpixels.scales=[150]"),
    "superpixel": ("--config", "superpixel/smoke", "--set", "map.tile=256"),
    "landcover": (
        "--config", "landcover/smoke", "--set", "segmenter.epochs=1", "--set", "segmenter.sampling.windows=12",
        "--set", "map.tile=256", "--set", "patch=320", "--set", "stride=256",
    ),
    "al-s4gan": (
        "--config", "al-s4gan/smoke", "--set", "segmenter.steps=6", "--set", "segmenter.checkpoint=3",
        "--set", "segmenter.discriminator.after=3", "--set", "active.classifier.epochs=1", "--set", "map.tile=256",
        "--set", "active.classifier.rates=[[1, 3.0e-3]]", "--set", "active.ratio=0.4",
    ),
}  # fmt: skip
"""Pipeline -> settings of a run of a minute."""
KEPT = (".tif", ".parquet", ".safetensors", ".png")


@pytest.fixture
def bucket(server, demo_region, monkeypatch):  # noqa: F811
    """A bucket with the demo and the catalogue's address in it."""
    keys = {"ACCESS_KEY_ID": "new", "SECRET_ACCESS_KEY": "s", "DEFAULT_REGION": "us-east-1", "ENDPOINT_URL": server}
    for name, value in keys.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    name = f"b{uuid.uuid4().hex[:12]}"
    upath(f"s3://{name}").fs.mkdir(name)
    folder, _, file = demo_region.rpartition("/")
    for path, (_, content) in files(folder).items():
        (upath(f"s3://{name}/demo") / path).write_bytes(content)
    return f"s3://{name}", f"s3://{name}/demo/{file}"


def results(root):
    """Relative path -> bytes of what a run leaves, without the files that hold times."""
    names = [name for name in listing(root) if name.endswith(KEPT) and "/ledger/" not in name and "report/" not in name]
    return {name: (upath(root) / name).read_bytes() for name in names if name != "items.parquet"}


def records(root):
    """Step -> how often each of its rows has a record."""
    ledgers = {path.parent.name: Ledger(str(path)) for path in upath(root).glob("steps/*/ledger")}
    return {step: Counter(ledger._table(COLUMNS.names)["id"].to_pylist()) for step, ledger in ledgers.items()}


def ended(monkeypatch, words, **environment):
    """(exit code, last line) of a command."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with Command(*words) as command:
        code = command.process.wait(1200)
        return code, command.said().strip().splitlines()[-1:]


@pytest.mark.parametrize("pipeline", SMALL)
def test_a_store_that_fails_in_every_way_costs_nothing(pipeline, server, bucket, tmp_path, monkeypatch):  # noqa: F811
    (prefix, region), config = bucket, [*SMALL[pipeline]]
    if config[1] == "small.yaml":
        config[1] = tmp_path / "small.yaml"
        config[1].write_text(SMALL_GPC)
    words = ("run", "pipeline", pipeline, "--region", region, *config)
    with Proxy(urlsplit(server).netloc, every=0) as plain:
        code, said = ended(
            monkeypatch, (*words, "--engine", "inline", "--out", f"{prefix}/whole"), AWS_ENDPOINT_URL=plain.url
        )
        assert code == 0, said
    half = plain.asked // 2
    plan = {"every": 20, "silent": (half // 2, 5), "expired": (half, "old"), "clock": 3600}
    words = (*words, "--out", f"{prefix}/shaken")
    with Proxy(urlsplit(server).netloc, **plan) as proxy:
        code, said = ended(monkeypatch, words, AWS_ENDPOINT_URL=proxy.url, AWS_ACCESS_KEY_ID="old")
        assert (code, "(ExpiredToken)" in said[0]) == (2, True), said
        code, said = ended(monkeypatch, words, AWS_ACCESS_KEY_ID="new")
        assert code == 0, said
    met = Counter(fault for fault, _ in proxy.met)
    assert met.keys() >= {*FAULTS, "silent", "expired"}
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    found, whole = results(f"{prefix}/shaken"), results(f"{prefix}/whole")
    assert found.keys() == whole.keys()
    assert [name for name in whole if found[name] != whole[name]] == []
    assert records(f"{prefix}/shaken") == records(f"{prefix}/whole")
    report = status(f"{prefix}/shaken")
    assert report["status"] == "done"
    assert {name for name, step in report["steps"].items() if step["troubles"]} == set()
    TABLE.append((f"{pipeline}: nothing; the store", f"exit 2, then 0; {dict(met)} of {proxy.asked} requests", "0"))
