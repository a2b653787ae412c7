"""The application on Ray Serve: the same pixels, batches over requests, a replica that dies, an end in good order."""

import json
import os
import signal
import threading
import time

import httpx
import numpy as np
import psutil
import pytest
from small_world import segmenter
from tiny_server import client, encoded, form, image_HWC, serving

pytestmark = pytest.mark.ray
TIFF = {"Accept": "image/tiff"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    segmenter(root / "one")
    segmenter(root / "three", classes=3)
    return root


@pytest.fixture(scope="module")
def server(models):
    """(process, address)."""
    with serving(models, "replicas=1", "queue=6", f"log_file={models / 'log'}") as started:
        yield started


def ask(address, name="one", image=None, timeout=120):
    path = f"{address}/v1/models/{name}/predict"
    return httpx.post(path, headers=TIFF, timeout=timeout, **form(encoded(image_HWC() if image is None else image)))


def together(count, function):
    """What `function(k)` returns for every k < count, called at once."""
    found = [None] * count
    workers = [threading.Thread(target=lambda k=k: found.__setitem__(k, function(k))) for k in range(count)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return found


def test_requests_that_share_batches_get_the_pixels_they_get_alone(server, models):
    _, address = server
    here = client(models)
    images = [image_HWC(150, 170, seed=k) for k in range(4)]
    names = ["one", "three", "one", "three"]
    found = together(4, lambda k: ask(address, names[k], images[k]))
    assert [one.status_code for one in found] == [200] * 4
    for name, image, one in zip(names, images, found, strict=True):
        alone = here.post(f"/v1/models/{name}/predict", headers=TIFF, **form(encoded(image)))
        assert one.content == alone.content


def test_an_error_of_the_contract_is_the_same_problem(server):
    _, address = server
    grey = ask(address, image=np.zeros((40, 40), np.uint8))
    assert grey.status_code == 422
    assert "needs the bands" in grey.json()["detail"]
    assert httpx.get(f"{address}/nothing").headers["content-type"] == "application/problem+json"


def test_malformed_headers_are_a_problem_under_one_id(server, models):
    _, address = server
    # HAProxy itself refuses what is not HTTP, with a text of its own.
    assert httpx.get(f"{address}/v1/models", headers={"Host": "["}).status_code == 400
    for headers in ({"Origin": "http://["}, {"X-Request-ID": "a b"}, {"X-Request-ID": b"\xe9"}):
        found = httpx.get(f"{address}/v1/models", headers=headers)
        assert (found.status_code, found.headers["x-frame-options"]) == (400, "DENY"), found.text
        name = found.json()["request_id"]
        assert [value for key, value in found.headers.raw if key.lower() == b"x-request-id"] == [name.encode("latin-1")]
        assert f'"request_id": {json.dumps(name)}' in (models / "log").read_text()


@pytest.mark.more  # test_safety.py and test_isolation.py: full queues of one process
def test_more_than_the_queue_holds_is_refused_at_once_and_the_rest_is_answered(server):
    _, address = server
    big = image_HWC(600, 600)
    found = together(14, lambda _: ask(address, image=big))
    codes = sorted(one.status_code for one in found)
    assert codes.count(200) >= 6
    assert set(codes) == {200, 503}
    refused = [one for one in found if one.status_code == 503]
    assert all(int(one.headers["retry-after"]) >= 1 for one in refused)
    assert all(one.headers["content-type"] == "application/problem+json" for one in refused)
    assert max(one.elapsed.total_seconds() for one in refused) < min(
        one.elapsed.total_seconds() for one in found if one.status_code == 200
    )


def replica_pids(process, deployment="Server"):
    """Processes of a deployment that belong to the server."""
    below = psutil.Process(process.pid).children(recursive=True)
    return [one.pid for one in below if f"ray::ServeReplica:rayseg:{deployment}" in " ".join(one.cmdline())]


@pytest.mark.more  # test_safety.py: a reader that dies is replaced
def test_a_replica_that_is_killed_costs_only_what_it_worked_on(server):
    process, address = server
    [before] = replica_pids(process)
    big = image_HWC(900, 900)
    killer = threading.Timer(2.0, os.kill, (before, signal.SIGKILL))
    killer.start()
    found = together(3, lambda _: ask(address, image=big))
    killer.join()
    assert {one.status_code for one in found} <= {200, 503}
    assert any(one.status_code == 503 and "retry" in one.json()["detail"] for one in found)
    deadline = time.monotonic() + 60
    while (again := ask(address)).status_code != 200:
        assert time.monotonic() < deadline, again.text
        time.sleep(0.5)


def test_nothing_but_the_servers_own_ports_listens_for_http_on_other_addresses(server):
    process, address = server
    mine = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {at.laddr for one in mine for at in one.net_connections("inet") if at.status == psutil.CONN_LISTEN}
    assert ("127.0.0.1", int(address.rpartition(":")[2])) in listening
    # HAProxy's statistics and metrics; ports of Ray's own processes are a matter of Ray.
    assert {8404, 9101}.isdisjoint(at.port for at in listening)
    assert not [at for at in listening if 30_000 <= at.port <= 31_000 and at.ip != "127.0.0.1"]


@pytest.mark.more
def test_an_api_of_its_own_returns_the_same_pixels(models):
    with serving(models, "replicas=1", "api_replicas=1") as (_, address):
        here = client(models)
        for name in ("one", "three"):
            alone = here.post(f"/v1/models/{name}/predict", headers=TIFF, **form(encoded(image_HWC())))
            assert ask(address, name).content == alone.content


@pytest.mark.more
def test_a_request_whose_replica_of_the_api_is_killed_is_a_problem_or_answered_by_another(models):
    with serving(models, "replicas=1", "api_replicas=2", "preload=true") as (process, address):
        assert httpx.get(f"{address}/readyz", timeout=30).json() == {"status": "ready"}
        pids = replica_pids(process, "Api")
        assert len(pids) == 2

        def kill():
            for pid in pids:
                os.kill(pid, signal.SIGKILL)

        killer = threading.Timer(1.0, kill)
        killer.start()
        found = ask(address, image=image_HWC(900, 900))
        killer.join()
        kinds = {200: "image/tiff", 503: "application/problem+json"}
        assert found.headers["content-type"] == kinds[found.status_code]
        assert found.status_code == 200 or int(found.headers["retry-after"]) >= 1
        deadline = time.monotonic() + 60
        while (again := ask(address)).status_code != 200:
            assert time.monotonic() < deadline, again.text
            time.sleep(0.5)


def test_sigterm_refuses_at_once_and_answers_what_was_accepted(server):
    process, address = server
    found, refused = [], []
    worker = threading.Thread(target=lambda: found.append((ask(address, image=image_HWC(900, 900)), time.monotonic())))
    worker.start()
    while "rayseg_requests_in_progress 1.0" not in httpx.get(f"{address}/metrics").text:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    while process.poll() is None:
        try:
            refused.append(httpx.get(f"{address}/v1/models", timeout=3).status_code)
        except httpx.TransportError as error:
            refused.append(type(error).__name__)
        time.sleep(0.1)
    ended = time.monotonic()
    worker.join()
    assert found[0][0].status_code == 200
    assert process.wait(1) == 0
    assert set(refused) <= {503, "ConnectError", "ReadError", "RemoteProtocolError"}, refused
    assert 503 in refused
    assert ended - found[0][1] < 20  # 2.5 s on a quiet machine, 11 s at a load of 30: Ray ends its processes
