"""Imagery as what looks for plots sees it: 8-bit RGB, scaled the same everywhere."""

from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayseg.config import Config
from rayseg.errors import DataError
from rayseg.geo.grid import Lattice, Tile
from rayseg.io.sources import Source
from rayseg.stages.read import read_reach
from rayseg.vision.proposals import Image

Row = dict[str, Any]


class ImageConfig(Config):
    """What the imagery is: the same for all of it, so that no tile is stretched by itself."""

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


class ReadGround:
    """`sources, <tile> -> image, valid, reach`: the tile's imagery with what its patches see around it, as 8-bit RGB.

    image: (height, width, 3) uint8 over the window `reach`, scaled from low..high as it is stored, the same for every
    tile; one band is grey. valid: (height, width) bool. A tile without valid pixels is settled as "nodata"; what cannot
    be read counts as without imagery, as in `ReadTile`.

    Args:
        image: what the imagery is.
        patches: how the grid is cut.
    """

    def __init__(self, image: ImageConfig, patches: Lattice) -> None:
        self.image, self.patches = image, patches

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Read each tile."""
        return [self._read(row) for row in rows]

    def _read(self, row: Row) -> Row:
        if row.get("refused"):
            raise DataError(row["refused"])
        cells = self.patches.cells(Tile.from_row(row).window)
        reach = self.patches.around(cells[0]).union(self.patches.around(cells[-1]))
        found = read_reach(row, reach, self.image.bands)
        return found if "status" in found else found | {"image": eight_bit(found["image"], self.image)}


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
        DataError: what was found and what to set.
    """
    if any(band not in source.bands for band in kind.bands) or np.dtype(source.dtype) != np.dtype(kind.dtype):
        raise DataError(
            f"{source.item_id} has the bands {', '.join(source.bands)} of {source.dtype}, expected "
            f"{', '.join(kind.bands)} of {kind.dtype}: name one band or three with --set 'image.bands=[...]', the "
            "type with image.dtype and the values that are black and white with image.low and image.high"
        )
