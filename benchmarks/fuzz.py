"""Damaged, random and lying uploads at a running `rayseg serve`: no 500, no hang, no dead replica, memory flat.

python benchmarks/fuzz.py --files FOLDER_OF_DAMAGED_FILES --requests 5000
schemathesis run http://127.0.0.1:PORT/openapi.json       while --hold keeps the server up
"""

import argparse
import asyncio
import io
import random
import struct
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from measure import show
from serve import held, ours, write_world

PATHS = ("/v1/preview", "/v1/models/bench/predict", "/v1/unsupervised")


def lying(kind: str, chance: random.Random, whole: dict[str, bytes]) -> bytes:
    """An image whose header, middle or end is not what it should be."""
    data = bytearray(whole[kind])
    if kind == "png" and chance.random() < 0.5:
        size = struct.pack(">II", chance.choice([0, 1, 65, 1 << 20, (1 << 31) - 1]), chance.choice([0, 1, 1 << 24]))
        data[16:24] = size
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    for _ in range(chance.choice([1, 4, 32])):
        data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)


def whole_images() -> dict[str, bytes]:
    """A PNG, a JPEG and a TIFF that are as they should be."""
    from PIL import Image

    image, found = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)), {}
    for kind in ("png", "jpeg", "tiff"):
        sink = io.BytesIO()
        image.save(sink, kind, **({"compression": "tiff_adobe_deflate"} if kind == "tiff" else {}))
        found[kind] = sink.getvalue()
    return found


async def attack(port: int, uploads: list[tuple[str, bytes]]) -> tuple[Counter, float, list[str]]:
    """(answers by kind of upload and status, slowest seconds, what failed with 5xx other than 503)."""
    import aiohttp

    found, slowest, wrong = Counter(), 0.0, []
    queue = iter(enumerate(uploads))

    async def client(session):
        nonlocal slowest
        for number, (kind, data) in queue:
            form = aiohttp.FormData()
            form.add_field("image", data, filename="image")
            path = PATHS[2] if number % 50 == 0 else PATHS[number % 2]
            if path == PATHS[2]:
                form.add_field("iterations", "2")
            began = time.perf_counter()
            try:
                async with session.post(f"http://127.0.0.1:{port}{path}", data=form) as answer:
                    body = await answer.read()
                    status = answer.status
            except (aiohttp.ClientError, TimeoutError) as error:
                status, body = 0, repr(error).encode()
            slowest = max(slowest, time.perf_counter() - began)
            found[kind, status] += 1
            if status == 0 or (status >= 500 and status != 503):
                wrong.append(f"{kind} {path} {status} {body[:200]!r}")

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(120)) as session:
        await asyncio.gather(*(client(session) for _ in range(6)))
    return found, slowest, wrong


def made(count: int, seed: int, damaged: list[bytes]) -> list[tuple[str, bytes]]:
    """Kind and bytes of the uploads, in random order."""
    chance, images = random.Random(seed), whole_images()
    uploads = [("damaged file", data) for data in damaged]
    while len(uploads) < count:
        kind = chance.choice(["random bytes", "lying png", "lying jpeg", "lying tiff", "whole"])
        if kind == "random bytes":
            start = chance.choice(
                [b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"MM\0*", b"<svg", b"PK\x03\x04"]
            )
            uploads.append((kind, start + chance.randbytes(chance.choice([0, 10, 1000, 100_000]))))
        elif kind == "whole":
            uploads.append((kind, images[chance.choice(list(images))]))
        else:
            uploads.append((kind, lying(kind.split()[1], chance, images)))
    chance.shuffle(uploads)
    return uploads


def fuzz(port: int, pid: int, uploads: list[tuple[str, bytes]], rounds: int) -> None:
    """The same uploads again and again; what was answered, and what each process holds after each round."""
    asyncio.run(attack(port, uploads[:100]))
    memory, all_found, all_wrong = [held(pid)], Counter(), []
    for _ in range(rounds):
        began = time.perf_counter()
        found, slowest, wrong = asyncio.run(attack(port, uploads))
        all_found += found
        all_wrong += wrong
        memory.append(held(pid))
        said = f"{len(uploads)} uploads in {time.perf_counter() - began:.0f} s, slowest {slowest:.1f} s"
        print(f"{said}; {len(wrong)} wrong, {sum(memory[-1].values()):.0f} MiB", flush=True)
    show("answers", ["upload", "status", "count"], [[*what, count] for what, count in sorted(all_found.items())])
    rows = [[name, *(f"{one.get(name, 0):.0f}" for one in memory)] for name in sorted(set().union(*memory))]
    rows.append(["all", *(f"{sum(one.values()):.0f}" for one in memory)])
    show("memory, MiB", ["process", *(f"after {k * len(uploads)}" for k in range(rounds + 1))], rows)
    print(f"wrong: {all_wrong[:5] or 'none'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=Path, help="Folder of damaged rasters.")
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=1, help="How often all of them are sent.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hold", type=float, default=0.0, help="Seconds to stay up afterwards, for schemathesis.")
    asked = parser.parse_args()
    damaged = [path.read_bytes() for path in sorted(asked.files.iterdir())] if asked.files else []
    with tempfile.TemporaryDirectory() as name:
        write_world(Path(name), "mobilenet_v2")
        with ours(Path(name), "max_pixels=1000000") as (port, process):
            fuzz(port, process.pid, made(asked.requests, asked.seed, damaged), asked.rounds)
            if asked.hold:
                print(f"http://127.0.0.1:{port}/openapi.json for {asked.hold:g} s", flush=True)
                time.sleep(asked.hold)


if __name__ == "__main__":
    main()
