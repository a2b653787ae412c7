"""Imagery as 8-bit RGB, scaled the same everywhere, for plot proposals and super-resolution."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayseg.config import Config
from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Lattice
from rayseg.io.sources import Source
from rayseg.stages.read import read_reach
from rayseg.stages.rows import TileRow
from rayseg.vision.proposals import Image


class ImageConfig(Config):
    """Bands and values of the imagery; one setting for all tiles, so that no tile gets its own contrast stretch."""

    bands: Annotated[tuple[str, ...], Field(min_length=1, max_length=3)] = ("red", "green", "blue")
    """Three names, or one for grey."""
    dtype: Literal["uint8", "int8", "uint16", "int16", "uint32", "int32", "float16", "float32", "float64"] = "uint8"
    """Data type, as numpy names it."""
    low: float = 0.0
    """Stored value that is black."""
    high: float = 255.0
    """Stored value that is white."""

    @model_validator(mode="after")
    def _can_be_scaled(self) -> "ImageConfig":
        if len(self.bands) == 2:
            raise ValueError("2 bands are neither grey nor colour, name one or three")
        if self.high <= self.low:
            raise ValueError(f"high {self.high:g} must be above low {self.low:g}")
        return self


@dataclass
class ReadGround:  # ledgers of earlier runs have stages under their class names
    """`tile, sources -> image, valid, reach, incomplete, unread`: read the tile with its halo as 8-bit RGB.

    image: (height, width, 3) uint8 over the window `reach`, stored values low..high scaled to 0..255; one band is
    grey. valid: (height, width) bool. Nodata and unreadable pixels are handled as in `ReadTile`.

    Args:
        image: bands and values of the imagery.
        patches: lattice of the patches, which defines the halo.
    """

    image: ImageConfig
    patches: Lattice

    def __call__(self, rows: list[TileRow]) -> list[TileRow | Settled]:
        """Read each tile."""
        results = []
        for row in rows:
            cells = self.patches.cells(row.tile.window)
            reach = self.patches.around(cells[0]).union(self.patches.around(cells[-1]))
            result = read_reach(row, reach, self.image.bands)
            if isinstance(result, TileRow):
                result = replace(result, image=eight_bit(result.image, self.image))
            results.append(result)
        return results


def eight_bit(image_CHW: NDArray[Any], kind: ImageConfig) -> Image:
    """Values low..high as 0..255, (height, width, 3) uint8; a single band three times."""
    low, high = kind.low, kind.high
    if not (image_CHW.dtype == np.uint8 and (low, high) == (0, 255)):
        scaled = (image_CHW.astype(np.float32) - low) * (255 / (high - low))
        image_CHW = np.rint(np.clip(np.nan_to_num(scaled), 0, 255)).astype(np.uint8)
    return np.ascontiguousarray(image_CHW.repeat(3 // len(image_CHW), axis=0).transpose(1, 2, 0))


def check_source(source: Source, kind: ImageConfig) -> None:
    """Refuse imagery without these bands or of another data type.

    Raises:
        DataError: the source lacks a band, or has another data type.
    """
    if any(band not in source.bands for band in kind.bands) or np.dtype(source.dtype) != np.dtype(kind.dtype):
        raise DataError(
            f"{source.item_id} has the bands {', '.join(source.bands)} of {source.dtype}, expected "
            f"{', '.join(kind.bands)} of {kind.dtype}; name one band or three with --set 'image.bands=[...]', the "
            "type with image.dtype and the values that are black and white with image.low and image.high"
        )
