"""The process that opens uploads: no network, three drivers, limited memory; it may die of what it reads.

A message is two lengths (8 bytes each), a header as JSON, and bytes: the file, or its pixels and packed validity.
"""

import json
import resource
import shutil
import struct
import sys
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import numpy as np

from rayseg.errors import DataError
from rayseg.io.untrusted import Pixels, TooLarge, read_image

_MEMORY = 6 << 30


def send(stream: IO[bytes], header: dict[str, Any], *parts: bytes | memoryview) -> None:
    """Write one message: a header, and what follows it as one run of bytes."""
    text = json.dumps(header).encode()
    stream.write(struct.pack(">QQ", len(text), sum(len(part) for part in parts)) + text)
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray]:
    """Read one message.

    Raises:
        EOFError: the other side is gone.
    """
    lengths = stream.read(16)
    if len(lengths) < 16:
        raise EOFError
    header, body = struct.unpack(">QQ", lengths)
    text, data = stream.read(header), bytearray(body)
    if len(text) < header or _read_into(stream, data) < body:
        raise EOFError
    return json.loads(text), data


def _read_into(stream: IO[bytes], data: bytearray) -> int:
    view, done = memoryview(data), 0
    while done < len(data):
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    return done


def _answer(path: Path, asked: dict[str, Any], data: bytearray, out: IO[bytes]) -> None:
    path.write_bytes(data)
    try:
        found = read_image(str(path), asked["kind"], bands=asked["bands"], max_pixels=asked["max_pixels"])
    except TooLarge as error:
        send(out, {"too_large": str(error)})
    except (DataError, MemoryError, ValueError) as error:
        text = str(error).replace(str(path), "the upload")
        send(out, {"error": text or "the image needs more memory than it may have; send a part of it"})
    else:
        _send_pixels(found, out)
    finally:
        path.unlink()


def _send_pixels(found: Pixels, out: IO[bytes]) -> None:
    header: dict[str, Any] = {
        "source": found.source.to_row() | {"assets": [{"href": "", "bands": list(found.source.bands)}]},
        "grid": asdict(found.grid),
        "window": asdict(found.window),
    }
    if found.image_CHW is None or found.valid_HW is None:
        send(out, header)
        return
    image_CHW = np.ascontiguousarray(found.image_CHW)
    header |= {"dtype": str(image_CHW.dtype), "shape": image_CHW.shape}
    send(out, header, image_CHW.data.cast("B"), np.packbits(found.valid_HW).tobytes())


def main(folder: str) -> None:
    """Answer requests until stdin ends; then whoever asked is gone, and the folder goes too."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            asked, data = receive(sys.stdin.buffer)
        except EOFError:
            return shutil.rmtree(folder, ignore_errors=True)
        _answer(Path(folder) / f"upload.{asked['kind']}", asked, data, sys.stdout.buffer)


if __name__ == "__main__":
    main(sys.argv[1])
