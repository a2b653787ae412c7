"""Output grids, windows, tiles and the lattice of patches.

Positions are whole pixels of a `Grid`, counted from a corner that does not depend on the region,
so a tile's id and its pixels stay the same whatever the region is.
Order everywhere: (row, col), (height, width), (left, bottom, right, top).
"""

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
from affine import Affine

from rayseg.errors import DataError

Bounds = tuple[float, float, float, float]
NODATA = 255
"""In rasters of classes and scores: no imagery, or beyond the region."""
_LONGEST = 160  # bytes of an id that is made of a file's name


@dataclass(frozen=True)
class Window:
    """A rectangle of grid pixels; `col` and `row` of its upper-left pixel may be negative."""

    col: int
    row: int
    width: int
    height: int

    def __str__(self) -> str:
        """As messages name it."""
        return f"columns {self.col} to {self.col1 - 1}, rows {self.row} to {self.row1 - 1}"

    @property
    def col1(self) -> int:
        """First column right of the window."""
        return self.col + self.width

    @property
    def row1(self) -> int:
        """First row below the window."""
        return self.row + self.height

    @property
    def empty(self) -> bool:
        """Whether the window holds no pixel."""
        return self.width <= 0 or self.height <= 0

    def intersect(self, other: "Window") -> "Window":
        """The pixels in both windows (empty when they do not meet)."""
        col, row = max(self.col, other.col), max(self.row, other.row)
        return Window(col, row, max(0, min(self.col1, other.col1) - col), max(0, min(self.row1, other.row1) - row))

    def union(self, other: "Window") -> "Window":
        """The smallest window around both."""
        col, row = min(self.col, other.col), min(self.row, other.row)
        return Window(col, row, max(self.col1, other.col1) - col, max(self.row1, other.row1) - row)

    def slices(self, inside: "Window") -> tuple[slice, slice]:
        """(rows, cols) of this window in an array that covers the window `inside`."""
        row, col = self.row - inside.row, self.col - inside.col
        return slice(row, row + self.height), slice(col, col + self.width)


@dataclass(frozen=True)
class Grid:
    """A north-up pixel grid that covers the whole plane of a CRS, or of one image without georeference.

    Attributes:
        crs: "EPSG:n" or WKT; None for an image's own pixels (then `image` names it, y grows downward).
        resolution: (x, y) pixel size in CRS units, both positive.
        origin: (x, y) of the upper-left corner of pixel (0, 0), in CRS units.
        image: the item whose own pixel grid this is; with a CRS, the scene that is mapped on it alone, if any.
        divided: the grid is one UTM zone of several, which divide the ground between them: see `ground`.
    """

    crs: str | None
    resolution: tuple[float, float]
    origin: tuple[float, float]
    image: str | None = None
    divided: bool = False

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Grid":
        """The grid that `to_row`, and perhaps JSON, made this row of."""
        # JSON has lists, and a grid must be hashable.
        origin, resolution = tuple(row["origin"]), tuple(row["resolution"])
        return cls(row["crs"], resolution, origin, row["image"], row.get("divided", False))

    def to_row(self) -> dict[str, Any]:
        """The grid as plain values; `divided` only where it is, so that all other rows are those of earlier runs."""
        row = asdict(self)
        return row if self.divided else {name: value for name, value in row.items() if name != "divided"}

    @property
    def ground(self) -> Bounds | None:
        """(west, south, east, north) in degrees of a divided grid: its zone's six degrees and hemisphere; else None.

        A pixel belongs to the grid whose ground holds its centre, and a tile to the grids that keep pixels of it.
        """
        return zone_bounds(str(self.crs)) if self.divided else None

    @cached_property
    def name(self) -> str:
        """Short name for ids: the EPSG code, `crs-<hash of WKT>`, or `<image>_px`."""
        if self.crs is None:
            return f"{slug(self.image or 'image')}_px"
        # WKT is too long for a file name.
        if self.crs.upper().startswith("EPSG:"):
            return self.crs[5:]
        return f"crs-{hashlib.sha256(self.crs.encode()).hexdigest()[:8]}"

    def transform(self, window: Window) -> Affine:
        """Affine from (col, row) inside `window` to CRS coordinates; identity-like (y down) without CRS."""
        (x, y), (rx, ry) = self.origin, self.resolution
        if self.crs is None:
            return Affine(rx, 0.0, x + window.col * rx, 0.0, ry, y + window.row * ry)
        return Affine(rx, 0.0, x + window.col * rx, 0.0, -ry, y - window.row * ry)

    def bounds(self, window: Window) -> Bounds:
        """(left, bottom, right, top) of `window` in CRS units; without CRS in pixels, bottom > top."""
        affine = self.transform(window)
        # By the affine and not by origin and size, so that y runs down without a CRS.
        left, top = affine @ (0, 0)
        right, bottom = affine @ (window.width, window.height)
        return left, bottom, right, top

    def window_of(self, bounds: Bounds) -> Window:
        """The smallest window that covers `bounds` (CRS units); edges within 1e-3 px of a pixel edge snap to it."""
        left, bottom, right, top = bounds
        affine = ~self.transform(Window(0, 0, 1, 1))
        (c0, r0), (c1, r1) = affine @ (left, top), affine @ (right, bottom)
        # A thousandth of a pixel: bounds that were projected miss the edge by rounding.
        col, row = math.floor(c0 + 1e-3), math.floor(r0 + 1e-3)
        return Window(col, row, math.ceil(c1 - 1e-3) - col, math.ceil(r1 - 1e-3) - row)


def zone_of(lon: float, lat: float) -> str:
    """The UTM zone (WGS 84, standard six-degree zones) of a place in degrees, as "EPSG:n"."""
    return f"EPSG:{(32600 if lat >= 0 else 32700) + int((lon + 180) // 6) % 60 + 1}"


def zone_bounds(crs: str) -> Bounds:
    """(west, south, east, north) in degrees of the UTM zone "EPSG:n"; it reaches the pole."""
    # 326nn is zone nn of the northern hemisphere, 327nn of the southern one.
    number = int(crs[5:])
    west = (number % 100 - 1) * 6.0 - 180
    return (west, 0.0, west + 6, 90.0) if number < 32700 else (west, -90.0, west + 6, 0.0)


@dataclass(frozen=True)
class Tile:
    """One block of the output grid, without halo: the unit of work, of output and of resume."""

    id: str
    grid: Grid
    window: Window

    def to_row(self) -> dict[str, Any]:
        """The tile as one flat row of plain values."""
        grid, window = self.grid, self.window
        return ({"divided": True} if grid.divided else {}) | {
            "id": self.id,
            "crs": grid.crs,
            "grid_image": grid.image,
            "xres": grid.resolution[0],
            "yres": grid.resolution[1],
            "x0": grid.origin[0],
            "y0": grid.origin[1],
            "col": window.col,
            "row": window.row,
            "width": window.width,
            "height": window.height,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> "Tile":
        """The tile that `to_row` made this row of (further columns are ignored)."""
        # Rows of earlier runs have no column `divided`.
        origin, divided = (row["x0"], row["y0"]), bool(row.get("divided"))
        grid = Grid(row["crs"], (row["xres"], row["yres"]), origin, row["grid_image"], divided)
        return cls(row["id"], grid, Window(row["col"], row["row"], row["width"], row["height"]))


def tile_at(grid: Grid, row: int, col: int, *, size: int, extent: Window) -> Tile:
    """The tile of `size` px in tile row and column (`row`, `col`) of the grid, cut to `extent`.

    Tile borders lie on multiples of `size` of the grid, so ids do not depend on `extent`.
    """
    window = Window(col * size, row * size, size, size).intersect(extent)
    return Tile(f"{grid.name}_{col}_{row}", grid, window)


@dataclass(frozen=True)
class Lattice:
    """The global lattice of model patches of a grid.

    The plane is divided into cells of `stride` px; a patch is a cell and a margin of (patch - stride) / 2 px around it.
    Patch origins are multiples of `stride` plus `offset`. A pixel is predicted by the patch of its own cell, blended
    with those of neighbouring cells within one margin of the cell's border. Nothing depends on the tile.
    """

    patch: int
    stride: int
    offset: int = 0

    @classmethod
    def of(cls, grid: Grid, patch: int, stride: int) -> "Lattice":
        """The lattice of `grid`; an image without georeference starts with a cell, not in the middle of one."""
        return cls.of_cells(patch, stride) if grid.crs is None else cls(patch, stride)

    @classmethod
    def of_cells(cls, patch: int, stride: int) -> "Lattice":
        """The lattice whose cells begin at pixel (0, 0): a tile whose side is a multiple of `stride` is whole cells."""
        return cls(patch, stride, -((patch - stride) // 2))

    @property
    def margin(self) -> int:
        """Pixels of a patch around its cell."""
        return (self.patch - self.stride) // 2

    def cells(self, window: Window) -> list[Window]:
        """Row by row, every cell that `window` holds pixels of."""
        return [self.cell(patch) for patch in self.patches(window) if not self.cell(patch).intersect(window).empty]

    def around(self, cell: Window) -> Window:
        """The patch of a cell."""
        return Window(cell.col - self.margin, cell.row - self.margin, self.patch, self.patch)

    def cell(self, patch: Window) -> Window:
        """The cell in the middle of a patch."""
        return Window(patch.col + self.margin, patch.row + self.margin, self.stride, self.stride)

    def patches(self, window: Window) -> list[Window]:
        """Row by row, every patch that has a weight on some pixel of `window`."""
        return [
            Window(col, row, self.patch, self.patch)
            for row in self._origins(window.row, window.row1)
            for col in self._origins(window.col, window.col1)
        ]

    def _origins(self, start: int, stop: int) -> range:
        # The first origin whose patch reaches beyond `start`, and the last one before `stop`.
        first = (start - self.patch - self.offset) // self.stride + 1
        last = (stop - 1 - self.offset) // self.stride
        return range(first * self.stride + self.offset, last * self.stride + self.offset + 1, self.stride)

    def reach(self, window: Window) -> Window:
        """`window` with the halo that covers all its patches."""
        # Patches come row by row, so the first and the last span all others.
        patches = self.patches(window)
        # The tile of a refused scene is empty, and no patch covers it where patches do not overlap.
        return patches[0].union(patches[-1]) if patches else window

    def weight(self) -> np.ndarray:
        """Blending weight of a patch, (patch, patch) float32, positive everywhere.

        One in the middle, falling linearly over the 2 x margin pixels that it shares with each neighbour;
        where two patches meet their weights add to one.
        """
        if not self.margin:
            return np.ones((self.patch, self.patch), np.float32)
        # From the middle of a pixel: the weights of two neighbours are mirror images and add to one.
        ramp = (np.arange(self.patch, dtype=np.float32) + 0.5) / (2 * self.margin)
        side = np.minimum(1.0, np.minimum(ramp, ramp[::-1])).astype(np.float32)
        return np.outer(side, side)


def slug(text: str) -> str:
    """`text` as an id and file name: letters and digits of any script, emoji, dot, dash and underscore stay.

    Every run of other characters becomes a dash. A name of more than `_LONGEST` bytes is cut and ends with a hash:
    files and folders have further parts in their names, and file systems allow 255 bytes.
    """
    name = _clean(text)
    if len(name.encode()) <= _LONGEST:
        return name
    # A hash, because long names often differ at their end alone.
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    return name.encode()[: _LONGEST - 9].decode(errors="ignore") + f"-{digest}"


def _clean(text: str) -> str:
    kept = ""
    # NFC: macOS stores an accent as a character of its own, other systems do not.
    for letter in unicodedata.normalize("NFC", text):
        # Of ASCII a few characters, beyond it all but spaces (Z), controls and private ones (C).
        stays = letter.isalnum() or letter in "._-" if letter.isascii() else unicodedata.category(letter)[0] not in "ZC"
        kept += letter if stays else " "
    return re.sub(" +", "-", kept).strip(".-") or "x"


def expect_ids(ids: Sequence[str]) -> None:
    """Refuse ids that cannot name files, or name the same one.

    Raises:
        DataError: the first such id.
    """
    # A name that `slug` would change is refused and not renamed: two ids could become one.
    for row_id, count in Counter(ids).items():
        if count > 1 or row_id != _clean(row_id):
            why = "occurs twice" if count > 1 else "cannot be a file name"
            raise DataError(
                f"id {row_id!r} {why}, expected different ones of letters, digits, . _ and -; rename the item"
            )
