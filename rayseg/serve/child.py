"""The child process that decodes uploads: no network, three GDAL drivers, limited memory; a crash ends only itself.

A message on stdin or stdout is two lengths (8 bytes each), a JSON header, and bytes: the file, or its pixels and
packed validity.
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
from rayseg.io.untrusted import ImageTooLarge, Pixels, read_image, without_text

_MEMORY = 6 << 30  # bytes of address space


def send(stream: IO[bytes], header: dict[str, Any], *parts: bytes | memoryview) -> None:
    """Write one message: a header, then `parts` as one run of bytes."""
    text = json.dumps(header).encode()
    stream.write(struct.pack(">QQ", len(text), sum(len(part) for part in parts)) + text)
    for part in parts:
        stream.write(part)
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], bytearray]:
    """Read one message: (header, bytes).

    Raises:
        EOFError: the other process closed the stream.
    """
    lengths = stream.read(16)
    if len(lengths) < 16:
        raise EOFError
    header, body = struct.unpack(">QQ", lengths)
    text, data = stream.read(header), bytearray(body)
    view, done = memoryview(data), 0
    while done < body:  # into one buffer: an image is not copied
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            break
        done += count
    if len(text) < header or done < body:
        raise EOFError
    return json.loads(text), data


def _send_pixels(pixels: Pixels, out: IO[bytes]) -> None:
    header: dict[str, Any] = {
        "source": pixels.source.to_row() | {"assets": [{"href": "", "bands": list(pixels.source.bands)}]},
        "grid": asdict(pixels.grid),
        "window": asdict(pixels.window),
    }
    if pixels.image_CHW is None or pixels.valid_HW is None:
        send(out, header)
        return
    # One band of validity as bits: an eighth of the bytes.
    image_CHW = np.ascontiguousarray(pixels.image_CHW)
    header |= {"dtype": str(image_CHW.dtype), "shape": image_CHW.shape}
    send(out, header, image_CHW.data.cast("B"), np.packbits(pixels.valid_HW).tobytes())


def main(folder: str) -> None:
    """Answer requests until the parent closes stdin, then remove the folder."""
    # Set before any upload arrives, so that no upload can raise them.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        _answer(Path(folder))
    finally:
        # Also when the parent was killed: its end of the pipes is closed then.
        shutil.rmtree(folder, ignore_errors=True)


def _answer(folder: Path) -> None:
    out = sys.stdout.buffer
    while True:
        try:
            request, data = receive(sys.stdin.buffer)
        except EOFError:
            return
        path = folder / f"upload.{request['kind']}"
        path.write_bytes(without_text(data) if request["kind"] == "png" else data)
        try:
            units = {band: (scale, offset) for band, (scale, offset) in request["units"].items()}
            limits = {"bands": request["bands"], "max_pixels": request["max_pixels"], "units": units}
            limits["numbers"] = request["numbers"]
            _send_pixels(read_image(str(path), request["kind"], **limits), out)
        except ImageTooLarge as error:
            send(out, {"too_large": str(error)})
        except (DataError, MemoryError, ValueError) as error:
            # Clients do not learn paths of the server.
            text = str(error).replace(str(path), "the upload")
            send(out, {"error": text or "the image needs more memory than allowed; send a part of it"})
        finally:
            path.unlink()


if __name__ == "__main__":
    main(sys.argv[1])
