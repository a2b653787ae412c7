"""Tiles of a scene in, superpixels out: each tile with an overlap, by which neighbours are joined afterwards."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

import numpy as np
from pydantic import Field
from upath import UPath

from rayseg.config import Config, added
from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Lattice, Tile, Window
from rayseg.io import segments
from rayseg.io.tables import read_array, write_array
from rayseg.models.bundle import Scaling
from rayseg.stages.read import read_reach
from rayseg.stages.rows import TileRow
from rayseg.store import upath
from rayseg.vision.fill import mirrored
from rayseg.vision.region_merging import borders, summed
from rayseg.vision.segment_clusters import pixel_features, segment_sums
from rayseg.vision.segments import agreeing, counted, united
from rayseg.vision.superpixels import METHODS


class SuperpixelConfig(Config):
    """How a scene is divided into superpixels before the training."""

    method: Literal["felzenszwalb", "halved", "slic", "watershed"] = "halved"
    """felzenszwalb is the paper's; halved is the same at half the resolution, in a fraction of the time; slic and
    watershed give superpixels of similar size."""
    scale: Annotated[float, Field(gt=0)] | None = None
    """felzenszwalb, halved: larger means larger superpixels; null takes the pipeline's own."""
    sigma: Annotated[float, Field(ge=0)] = 0.5
    """felzenszwalb, halved: width in px of the Gaussian that smooths the scene first."""
    min_size: Annotated[int, Field(gt=0)] = 64
    """felzenszwalb, halved: least pixels of a superpixel."""
    merge: Annotated[float, Field(ge=0)] | None = added(default=None)
    """network: segments alone: neighbours merge where their border is weaker than this, in squared units of CIELAB per
    px; larger means larger regions, 0 merges none; null takes 1200."""
    spacing: Annotated[int, Field(gt=1)] = 14
    """slic, watershed: distance of superpixels in px."""
    overlap: Annotated[int, Field(ge=2)] = 64
    """Pixels around a tile in which its superpixels are compared with its neighbours'."""

    def options(self, *, scale: float) -> dict[str, float]:
        """Arguments of the method; `scale` where the configuration has none."""
        if self.method in {"felzenszwalb", "halved"}:
            return {"scale": self.scale or scale, "sigma": self.sigma, "min_size": self.min_size}
        return {"spacing": self.spacing}


@dataclass
class ReadAround:
    """`tile, sources -> image, valid, reach, incomplete, unread`: read the tile's pixels and those around it.

    Like `ReadTile`, over a window with a margin; with a lattice, over all its patches on that window.

    Args:
        bands: names, in order.
        margin: px around the tile.
        lattice: (patch, stride) of patches that must be whole.
    """

    bands: Sequence[str]
    _: KW_ONLY
    margin: int
    lattice: tuple[int, int] | None = None

    def __call__(self, rows: list[TileRow]) -> list[TileRow | Settled]:
        """Read each tile."""
        reaches = [grown(row.tile.window, self.margin) for row in rows]
        if self.lattice:
            lattices = [Lattice.of(row.tile.grid, *self.lattice) for row in rows]
            reaches = [lattice.reach(reach) for lattice, reach in zip(lattices, reaches, strict=True)]
        return [read_reach(row, reach, self.bands) for row, reach in zip(rows, reaches, strict=True)]


@dataclass
class Divide:
    """`tile, scaling, image, valid, reach -> facts`: write the superpixels of the tile and its overlap, `part_path`.

    They are numbered from 1 in the tile; 0 is nodata. A tile fails if any pixel in its reach cannot be read: its
    neighbours would not agree with it after a retry.

    Args:
        prefix: folder of the files.
        method: a name in `METHODS`.
        options: its arguments.
        described: names of the bands, to write what clusters are made of: the sums of the superpixels' features over
            the tile, `features_path`, and their borders, `borders_path`; () writes neither.
    """

    prefix: str
    method: str
    options: Mapping[str, float]
    described: Sequence[str] = ()

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Divide each tile."""
        return [self._divide(row) for row in rows]

    def _divide(self, row: TileRow) -> Settled:
        if reason := row.incomplete or row.unread:
            raise DataError(reason)
        tile, valid = row.tile, row.valid
        scaling = Scaling.model_validate_json(row.scaling)
        image_CHW = np.clip(scaling.normalize(mirrored(row.image, valid)), 0, 1)
        labels_HW = METHODS[self.method](image_CHW.transpose(1, 2, 0), **self.options)
        # Numbers without gaps from 1; where every pixel is valid, unique begins with 0.
        _, gapless = np.unique(np.where(valid, labels_HW + 1, 0), return_inverse=True)
        numbers = gapless.reshape(valid.shape).astype(np.uint32) + np.uint32(valid.all())
        part = part_path(self.prefix, tile.id)
        segments.write_segments(part, numbers, tile.grid, row.reach)
        if self.described:
            inner = tile.window.slices(row.reach)
            features_HWF = pixel_features(image_CHW.transpose(1, 2, 0), self.described)[inner]
            write_array(features_path(part), segment_sums(features_HWF, numbers[inner]))
            write_array(borders_path(part), borders(numbers[inner]))
        return Settled(facts={"segments": int(numbers.max())})


def grown(window: Window, margin: int) -> Window:
    """The window with a margin on every side."""
    return Window(window.col - margin, window.row - margin, window.width + 2 * margin, window.height + 2 * margin)


def part_path(prefix: str, tile_id: str) -> UPath:
    """The file in which `Divide` keeps the superpixels of a tile with its overlap."""
    return upath(prefix) / "parts" / f"{tile_id}.tif"


def features_path(segments: UPath) -> UPath:
    """The file of the pixels and sums of features of every superpixel, next to the file of the superpixels."""
    return segments.with_suffix(".features.npy")


def borders_path(segments: UPath) -> UPath:
    """The file of the borders between superpixels, rows of `region_merging.borders`."""
    return segments.with_suffix(".borders.npy")


def segments_path(prefix: str, tile_id: str) -> UPath:
    """The file in which `unite` keeps the superpixels of a tile."""
    return upath(prefix) / f"{tile_id}.tif"


def unite(prefix: str, tiles: Sequence[tuple[Tile, int]], overlap: int, *, described: bool = False) -> None:
    """Write the superpixels of all tiles to `segments_path`, numbered without gaps; join those that neighbours share.

    Every file is written each time, because an added tile shifts the numbers of the tiles after it.

    Args:
        prefix: folder of the parts that `Divide` wrote.
        tiles: (tile, number of its superpixels).
        overlap: px around each tile that its part also holds.
        described: write the features and borders, too, renumbered: rows of number, pixels and sums, and the borders
            in the tile and with its right and lower neighbour.
    """

    def part_of(tile: Tile, window: Window) -> np.ndarray:
        """Segments of `window`, numbered as in the tile's part."""
        return segments.read_segments([(grown(tile.window, overlap), part_path(prefix, tile.id))], window)

    # 1. Compare each tile with its right and its lower neighbour, over the pixels that both divided.
    starts: dict[tuple[Grid, str, int], list[int]] = {}
    for at, (tile, _) in enumerate(tiles):
        starts.setdefault((tile.grid, "col", tile.window.col), []).append(at)
        starts.setdefault((tile.grid, "row", tile.window.row), []).append(at)
    right, below = np.s_[:, overlap - 1 : overlap + 1], np.s_[overlap - 1 : overlap + 1, :]
    pairs, crossed = {}, defaultdict(list)
    for at, (tile, _) in enumerate(tiles):
        window = tile.window
        # Tiles at the seam of a divided grid are cut, so neighbours need not begin in the same row.
        for border, key, line in (
            (right, ("col", window.col1), Window(window.col1, window.row, 1, window.height)),
            (below, ("row", window.row1), Window(window.col, window.row1, window.width, 1)),
        ):
            for neighbour in starts.get((tile.grid, *key), ()):
                other = tiles[neighbour][0]
                if other.window.intersect(line).empty:
                    continue
                zone = grown(window, overlap).intersect(grown(other.window, overlap))
                one_HW, other_HW = part_of(tile, zone), part_of(other, zone)
                pairs[at, neighbour] = agreeing(one_HW, other_HW, border)
                crossed[at].append((neighbour, *_facing(one_HW, other_HW, window, other.window, zone)))
    # 2. Number the segments of all tiles without gaps.
    tables = united([count for _, count in tiles], pairs)
    for at, (tile, _) in enumerate(tiles):
        part, path = part_path(prefix, tile.id), segments_path(prefix, tile.id)
        segments.write_segments(path, tables[at][part_of(tile, tile.window)], tile.grid, tile.window)
        if described:
            # Sums are of the tile without its overlap, so that no pixel counts twice.
            sums = read_array(features_path(part))
            seen = np.flatnonzero(sums[1:, 0]) + 1
            write_array(features_path(path), np.concatenate([tables[at][seen, None], sums[seen]], axis=1))
            inside_M3 = read_array(borders_path(part))
            rows = [np.column_stack([tables[at][inside_M3[:, :2]], inside_M3[:, 2]])]
            rows += [
                np.column_stack([tables[at][pairs_M2[:, 0]], tables[neighbour][pairs_M2[:, 1]], lengths_M])
                for neighbour, pairs_M2, lengths_M in crossed[at]
            ]
            write_array(borders_path(path), summed(np.concatenate(rows)))


def _facing(
    one_HW: np.ndarray, other_HW: np.ndarray, window: Window, other: Window, zone: Window
) -> tuple[np.ndarray, np.ndarray]:
    """(pairs of segments that face each other across the border of two tiles, px of each), numbered as in the parts."""
    row, col = max(window.row, other.row), max(window.col, other.col)
    # One pixel on each side of the border.
    if other.col == window.col1:
        height = min(window.row1, other.row1) - row
        ones, others = (Window(window.col1 + step, row, 1, height) for step in (-1, 0))
    else:
        width = min(window.col1, other.col1) - col
        ones, others = (Window(col, window.row1 + step, width, 1) for step in (-1, 0))
    ones_P, others_P = one_HW[ones.slices(zone)], other_HW[others.slices(zone)]
    seen = (ones_P > 0) & (others_P > 0)
    return counted(ones_P[seen], others_P[seen])
