"""Throughput of `rayseg serve` against a bare FastAPI with the same model in one process; an open loop; an overload.

All servers get the same PNG of one patch and return its mask as PNG, in closed loops of 1, 8 and 32 clients, in turn:
FastAPI, and rayseg in three forms (`merged`, the default: API and model in one process behind HAProxy; `haproxy`: an
API of its own behind HAProxy; `split`: the same behind Ray Serve's own proxy). The open loops send requests at random
times, independent of responses, at .8 and at three times the capacity.
Targets: .98 x images/s, median at 1 client at most 5 ms longer; at .8 of the capacity p99 at most 2 x the median; under
overload, p99 of accepted requests at most 3 x that of a server at rest, and constant memory.
"""

import argparse
import asyncio
import io
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.request import urlopen

import numpy as np
from measure import show
from small_models import MEAN, STD, save_segmenter

PATCH = 256
CLIENTS = (1, 8, 32)


def write_world(folder: Path, encoder: str) -> None:
    """Write a bundle whose network marks about half of an image, and a PNG of one patch."""
    from PIL import Image

    image_HWC = np.random.default_rng(1).integers(60, 180, (8, 8, 3), np.uint8).repeat(32, 0).repeat(32, 1)
    Image.fromarray(image_HWC).save(folder / "image.png")
    save_segmenter(folder / "bench", image_HWC.transpose(2, 0, 1), patch=PATCH, stride=PATCH, encoder=encoder)


def bare(folder: Path, port: int) -> None:
    """The baseline: FastAPI, PIL and PyTorch in one process."""
    import torch
    import uvicorn
    from fastapi import FastAPI, Response, UploadFile
    from PIL import Image

    from rayseg.models import bundle

    _, model = bundle.build(folder / "bench")
    model = model.to(memory_format=torch.channels_last)
    app = FastAPI()

    @app.post("/v1/models/bench/predict")
    def predict(image: UploadFile):
        pixels_HWC = np.array(Image.open(image.file).convert("RGB"))
        batch = (torch.from_numpy(pixels_HWC.transpose(2, 0, 1)[None].copy()).float() - MEAN) / STD
        with torch.inference_mode():
            mask_HW = (model(batch.contiguous(memory_format=torch.channels_last))[0, 0].sigmoid() > 0.5).numpy()
        sink = io.BytesIO()
        Image.fromarray(mask_HW.astype(np.uint8) * 255).save(sink, "PNG")
        return Response(sink.getvalue(), media_type="image/png")

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="error")


# -- servers ----------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def server(words: list[str], port: int, **variables: str):
    """A server in its own process, ready to answer; ended afterwards."""
    process = subprocess.Popen([sys.executable, *words], stderr=subprocess.DEVNULL, env=os.environ | variables)
    try:
        for _ in range(240):
            with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/openapi.json", timeout=5):  # a 404 is an OSError
                break
            time.sleep(0.5)
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(90)


@contextmanager
def ours(folder: Path, *settings: str, **variables: str):
    port = free_port()
    words = ["-m", "rayseg", "serve", "--models", str(folder / "bench"), "--port", str(port)]
    words += [part for text in settings for part in ("--set", text)]
    with server(words, port, **variables) as process:
        yield port, process


@contextmanager
def theirs(folder: Path, *_: str):
    port = free_port()
    with server([__file__, "--bare", str(folder), "--port", str(port)], port) as process:
        yield port, process


def below(pid: int) -> list[int]:
    """A process and its descendants."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            children.setdefault(int(path.read_text().rpartition(") ")[2].split()[1]), []).append(int(path.parent.name))
    found = [pid]
    for one in found:  # grows while it is read
        found += children.get(one, [])
    return found


def used(pid: int) -> float:
    """Processor time (s) of a process and its descendants."""
    ticks = 0
    for one in below(pid):
        with suppress(OSError):
            ticks += sum(map(int, Path(f"/proc/{one}/stat").read_text().rpartition(") ")[2].split()[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def held(pid: int) -> dict[str, float]:
    """Memory (PSS, MiB) of a process and its descendants, by kind of process."""
    found = Counter()
    for one in below(pid):
        with suppress(OSError, StopIteration):
            lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
            found[_called(one)] += int(next(line for line in lines if line.startswith("Pss:")).split()[1]) / 1024
    return dict(found)


def _called(pid: int) -> str:
    words = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip()
    known = (
        "Server",
        "Models",
        "Api",
        "haproxy",
        "ProxyActor",
        "ServeController",
        "rayseg.serve.child",
        "rayseg serve",
    )
    return next((name for name in known if name in words), "the rest of Ray")


def tree_mib(pid: int) -> float:
    """Memory (PSS, MiB) of a process and its descendants."""
    return sum(held(pid).values())


# -- clients ----------------------------------------------------------------------------------------------------------


async def one(session, url: str, data: bytes) -> tuple[int, float]:
    """(status, seconds) of a request."""
    import aiohttp

    form = aiohttp.FormData()
    form.add_field("image", data, filename="image.png", content_type="image/png")
    began = time.perf_counter()
    try:
        async with session.post(url, data=form, headers={"Accept": "image/png"}) as answer:
            await answer.read()
            return answer.status, time.perf_counter() - began
    except aiohttp.ClientError:
        return 0, time.perf_counter() - began


async def closed(port: int, data: bytes, clients: int, seconds: float) -> tuple[list[float], float]:
    """(seconds of every response, images per second) of clients that send a request after each response."""
    import aiohttp

    url, found, end = f"http://127.0.0.1:{port}/v1/models/bench/predict", [], time.perf_counter() + seconds

    async def client(session):
        while time.perf_counter() < end:
            found.append(await one(session, url, data))

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(one(session, url, data) for _ in range(2)))
        began = time.perf_counter()
        await asyncio.gather(*(client(session) for _ in range(clients)))
        spent = time.perf_counter() - began
    wrong = Counter(status for status, _ in found if status != 200)
    if wrong:
        print(f"  responses other than 200: {dict(wrong)}")
    good = [took for status, took in found if status == 200]
    return good, len(good) / spent


async def opened(port: int, data: bytes, rate: float, seconds: float) -> list[tuple[int, float]]:
    """(status, seconds) of requests that arrive at random at a given rate."""
    import aiohttp

    url, tasks, end = f"http://127.0.0.1:{port}/v1/models/bench/predict", [], time.perf_counter() + seconds
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        due = time.perf_counter()
        while due < end:
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            tasks.append(asyncio.create_task(one(session, url, data)))
            due += random.expovariate(rate)
        return await asyncio.gather(*tasks)


def ms(values: list[float], share: float) -> float:
    return float(np.quantile(values, share) * 1000) if values else float("nan")


FORMS = {
    "FastAPI": theirs,
    "merged": ours,
    "haproxy": lambda folder, *settings: ours(folder, "api_replicas=1", *settings),
    "split": lambda folder, *settings: ours(folder, "api_replicas=1", *settings, RAY_SERVE_ENABLE_HA_PROXY="0"),
}


def compare(folder: Path, data: bytes, seconds: float, rounds: int, names: list[str]) -> None:
    """Closed loops against all servers in turn; ratios are taken within a round, and their median is shown."""
    rates: dict[tuple[str, int], list[float]] = defaultdict(list)
    taken: dict[tuple[str, int], list[list[float]]] = defaultdict(list)
    spent: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(rounds):
        # The load of other work drifts, so every other round goes the other way.
        for name in names if turn % 2 == 0 else names[::-1]:
            with FORMS[name](folder, "replicas=1", "queue=64") as (port, process):
                asyncio.run(closed(port, data, 2, 5))
                for clients in CLIENTS:
                    before = used(process.pid)
                    took, rate = asyncio.run(closed(port, data, clients, seconds))
                    cpu = 1000 * (used(process.pid) - before) / max(1, len(took))
                    at = f"{name}, {clients} clients, load {os.getloadavg()[0]:.1f}"
                    print(f"  {at}: {rate:.2f} images/s, p50 {ms(took, 0.5):.1f} ms, CPU {cpu:.0f} ms", flush=True)
                    rates[name, clients].append(rate)
                    taken[name, clients].append(took)
                    spent[name, clients].append(cpu)
    rows = []
    for clients in CLIENTS:
        for name in names:
            times = [rate / base for rate, base in zip(rates[name, clients], rates[names[0], clients], strict=True)]
            middle = (np.median([ms(took, share) for took in taken[name, clients]]) for share in (0.5, 0.99))
            row = [clients, name, *(f"{value:.1f}" for value in middle)]
            row += [f"{np.median(rates[name, clients]):.1f}", f"{np.median(times):.2f}"]
            rows.append([*row, f"{np.median(spent[name, clients]):.0f}"])
    columns = ["clients", "server", "p50 ms", "p99 ms", "images/s", f"x {names[0]}", "CPU ms/image"]
    show(f"closed loop, one patch, {rounds} rounds in turn", columns, rows)


def steady(folder: Path, data: bytes, seconds: float, names: list[str]) -> None:
    """An open loop at .8 of the capacity, which the same server has just shown."""
    rows = []
    for name in names:
        with FORMS[name](folder, "replicas=1", "queue=64") as (port, _):
            _, capacity = asyncio.run(closed(port, data, 8, seconds))
            found = asyncio.run(opened(port, data, 0.8 * capacity, 3 * seconds))
        good = [took for status, took in found if status == 200]
        half, most = ms(good, 0.5), ms(good, 0.99)
        codes = dict(Counter(status for status, _ in found))
        rows.append([name, f"{capacity:.1f}", f"{half:.1f}", f"{most:.1f}", f"{most / half:.2f}", codes])
    columns = ["server", "capacity, images/s", "p50 ms", "p99 ms", "p99 / p50", "responses"]
    show(f"open loop at .8 x capacity, load {os.getloadavg()[0]:.1f}", columns, rows)


async def health(port: int, until: asyncio.Event) -> list[float]:
    """Seconds of requests for the server's state, every 20 ms: what its event loop makes others wait."""
    import aiohttp

    found = []
    async with aiohttp.ClientSession() as session:
        while not until.is_set():
            began = time.perf_counter()
            async with session.get(f"http://127.0.0.1:{port}/healthz") as answer:
                await answer.read()
            found.append(time.perf_counter() - began)
            await asyncio.sleep(0.02)
    return found


def waits(folder: Path, data: bytes, seconds: float, names: list[str]) -> None:
    """How long other requests wait at rest, while the first request loads the model, and beside predictions."""

    async def beside(work) -> list[float]:
        done = asyncio.Event()
        asked = asyncio.create_task(health(port, done))
        await work
        done.set()
        return await asked

    rows = []
    for name in names:
        with FORMS[name](folder, "replicas=1", "queue=64") as (port, _):
            work = {"first": closed(port, data, 1, 1), "rest": asyncio.sleep(3)}
            work |= {f"{clients} clients": closed(port, data, clients, seconds) for clients in CLIENTS}
            for what, doing in work.items():
                took = asyncio.run(beside(doing))
                rows.append([name, what, len(took), *(f"{ms(took, share):.1f}" for share in (0.5, 0.99, 1.0))])
    columns = ["server", "beside", "requests", "p50 ms", "p99 ms", "most ms"]
    show(f"GET /healthz every 20 ms, load {os.getloadavg()[0]:.1f}", columns, rows)


def overload(folder: Path, data: bytes, seconds: float, queue: int) -> None:
    """An open loop at three times the capacity."""
    with ours(folder, "replicas=1", f"queue={queue}") as (port, process):
        rest, _ = asyncio.run(closed(port, data, 1, 10))
        _, capacity = asyncio.run(closed(port, data, queue, 8))
        before = tree_mib(process.pid)
        found = asyncio.run(opened(port, data, 3 * capacity, seconds))
        after = tree_mib(process.pid)
        again, _ = asyncio.run(closed(port, data, 1, 5))
    good = [took for status, took in found if status == 200]
    refused = [took for status, took in found if status == 503]
    rows = [
        ["capacity, images/s", f"{capacity:.1f}"],
        ["sent, images/s", f"{len(found) / seconds:.1f}"],
        ["responses", str(dict(Counter(status for status, _ in found)))],
        ["at rest, p50 / p99 ms", f"{ms(rest, 0.5):.1f} / {ms(rest, 0.99):.1f}"],
        ["accepted, p50 / p99 ms", f"{ms(good, 0.5):.1f} / {ms(good, 0.99):.1f}"],
        ["accepted p99 / at rest p99", f"{ms(good, 0.99) / ms(rest, 0.99):.2f}"],
        ["refused, p50 / p99 ms", f"{ms(refused, 0.5):.1f} / {ms(refused, 0.99):.1f}"],
        ["accepted, images/s", f"{len(good) / seconds:.1f}"],
        ["memory before / after, MiB", f"{before:.0f} / {after:.0f}"],
        ["afterwards at rest, p50 ms", f"{ms(again, 0.5):.1f}"],
    ]
    show(f"open loop at 3 x capacity for {seconds:g} s, queue={queue}", ["", ""], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--encoder", default="mobilenet_v2")
    parser.add_argument("--seconds", type=float, default=8.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--overload", type=float, default=60.0)
    parser.add_argument("--queue", type=int, default=2)
    parser.add_argument("--only", choices=["compare", "steady", "waits", "overload"])
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=[*FORMS])
    arguments = parser.parse_args()
    if arguments.bare:
        bare(arguments.bare, arguments.port)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(folder, arguments.encoder)
        data = (folder / "image.png").read_bytes()
        if arguments.only in {None, "compare"}:
            compare(folder, data, arguments.seconds, arguments.rounds, arguments.forms)
        if arguments.only in {None, "steady"}:
            steady(folder, data, arguments.seconds, arguments.forms)
        if arguments.only in {None, "waits"}:
            waits(folder, data, arguments.seconds, [name for name in arguments.forms if name != "FastAPI"])
        if arguments.only in {None, "overload"}:
            overload(folder, data, arguments.overload, arguments.queue)


if __name__ == "__main__":
    os.environ.setdefault("RAYSEG_CACHE", tempfile.gettempdir())
    main()
