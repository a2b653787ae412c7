"""Files that a stage has written, described while their content is at hand: nobody reads them again for their item."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayseg.store import StorePath, put, upath


@dataclass(frozen=True)
class WrittenFile:
    """What the STAC asset of a file says of it.

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
    """The bands of a raster that are alike but for their names."""
    same = {"data_type": str(dtype), **({} if nodata is None else {"nodata": float(nodata)})}
    return [{"name": name} | same for name in names]
