"""Files, wherever they are: whole-object writes that are there or not, on disk or on an object store."""

import os
import shutil
import uuid
from pathlib import Path

from upath import UPath

StorePath = str | Path | UPath


def upath(path: StorePath) -> UPath:
    """The path or URI as a UPath; `file:` URIs become plain local paths."""
    text = str(path)
    return UPath(text.removeprefix("file://") if text.startswith("file://") else path)


def is_local(path: StorePath) -> bool:
    """Whether `path` is on this machine's file system."""
    return upath(path).protocol in {"", "file", "local"}


def absolute(path: StorePath) -> str:
    """The path as it is understood from any working folder."""
    return str(Path(upath(path).path).absolute()) if is_local(path) else str(upath(path))


def put(path: StorePath, data: bytes) -> None:
    """Write `data` so that a reader sees all of it or nothing: temp + rename on disk, one PUT elsewhere."""
    target = upath(path)
    if not is_local(target):
        target.write_bytes(data)
        return
    temporary = _beside(target)
    temporary.write_bytes(data)
    temporary.replace(target.path)


def put_file(path: StorePath, source: Path) -> None:
    """Move the local file `source` to `path`, whole or not at all."""
    target = upath(path)
    if not is_local(target):
        target.fs.put_file(str(source), target.path)
        source.unlink()
        return
    temporary = _beside(target)
    shutil.move(source, temporary)
    temporary.replace(target.path)


def put_if_absent(path: StorePath, data: bytes) -> bool:
    """Write `data` unless `path` is there already; return whether it was written. Atomic against other writers."""
    target = upath(path)
    if not is_local(target):
        try:
            target.fs.pipe_file(target.path, data, mode="create")
        except FileExistsError:
            return False
        return True
    temporary = _beside(target)
    temporary.write_bytes(data)
    try:
        os.link(temporary, target.path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _beside(target: UPath) -> Path:
    """A fresh hidden name in the folder of `target`, which is made if need be."""
    path = Path(target.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.part")


def cache_dir() -> Path:
    """Where demo data and downloads are kept: RAYSEG_CACHE, else `rayseg` in the user's cache folder."""
    if chosen := os.environ.get("RAYSEG_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayseg"
