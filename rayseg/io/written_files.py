"""Files that a stage has written, with size and checksum, so that their STAC item needs no second read."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayseg.store import StorePath, put, upath


@dataclass(frozen=True)
class WrittenFile:
    """Metadata of a file for its STAC asset.

    Attributes:
        name: of the file, without its folder.
        size: bytes.
        checksum: multihash (sha2-256) of the content, as the file extension requires it.
        bands: name, data_type and nodata of each band, as STAC 1.1 has them; empty for a table.
    """

    name: str
    size: int
    checksum: str
    bands: tuple[dict[str, Any], ...] = ()


def write_file(path: StorePath, data: bytes, bands: Sequence[dict[str, Any]] = ()) -> WrittenFile:
    """Write a file whole or not at all; return its description."""
    put(path, data)
    return WrittenFile(upath(path).name, len(data), f"1220{hashlib.sha256(data).hexdigest()}", tuple(bands))


def bands_of(names: Sequence[str], dtype: np.dtype[Any], nodata: float | None) -> list[dict[str, Any]]:
    """Metadata of bands that differ only in their names."""
    same = {"data_type": str(dtype), **({} if nodata is None else {"nodata": float(nodata)})}
    return [{"name": name} | same for name in names]
