"""Maps made stage by stage in this process, by networks of one layer."""

import numpy as np
import rasterio
import torch
from small_world import BANDS, SCALING

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.io import vectors
from rayseg.io.rasters import footprint, grids_of
from rayseg.models.bundle import Architecture, Bundle
from rayseg.models.segmenter import Probabilities
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile
from rayseg.vision.color import ClassTable

TABLE = ClassTable(((0, "none", (0, 0, 0)), (1, "cover", (0, 158, 115))))


class Wide(torch.nn.Module):
    """A network that sees 21 px around each pixel, and zeros beyond its patch, as real ones do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.conv = torch.nn.Conv2d(3, 1, 21, padding=10)
        torch.nn.init.normal_(self.conv.weight, std=0.05)

    def forward(self, images_NCHW):
        return self.conv(images_NCHW)


class Bright(torch.nn.Module):
    """A network that marks what is above the mean in its first band."""

    def forward(self, images_NCHW):
        return images_NCHW[:, :1]


def described(bands=BANDS, *, dtype="uint8", patch=64, stride=48, scaling=SCALING):
    """The bundle of such a network."""
    options = {"architecture": "unet", "encoder": "mobilenet_v2"}
    return Bundle(
        name="wide",
        task="segmentation",
        architecture=Architecture(factory="segmenter", options=options),
        classes=TABLE.classes,
        bands=bands,
        dtype=dtype,
        scaling=scaling,
        patch=patch,
        stride=stride,
    )


def mapped(folder, sources, *, size, bundle=None, network=None, halo=None):
    """(tiles, {grid: (classes_HW, scores_HW)} over the sources' extents, polygons) of a map in tiles of `size` px.

    Raises:
        DataError: a tile failed.
    """
    bundle, network = bundle or described(), network or Wide()
    rows = tile_rows(sources, None, size=size, halo=bundle.patch + bundle.stride if halo is None else halo)
    write = WriteTile(str(folder), TABLE, bands=("cover",), geometry=None, model="m.json")
    predict = Predict("", batch=2, device="cpu")
    predict.__dict__["_loaded"] = (bundle, Probabilities(network).eval().to(memory_format=torch.channels_last))
    stages = (ReadTile(bundle.bands, patch=bundle.patch, stride=bundle.stride), predict, write)
    extents, found, parts = {}, {}, []
    for grid, its in grids_of(sources):
        window = footprint(its[0], grid)
        for source in its[1:]:
            window = window.union(footprint(source, grid))
        extents[grid] = window
        found[grid] = np.full((2, window.height, window.width), 255, np.uint8)
    for row in rows:
        done = TileRow.from_row(row)
        tile = done.tile
        for stage in stages:
            done = done if isinstance(done, Settled) else stage([done])[0]
        if done.status == "nodata":
            continue
        if done.status == "failed":
            raise DataError(done.reason)
        place = (slice(None), *tile.window.slices(extents[tile.grid]))
        assert (found[tile.grid][place] == 255).all(), "a pixel in two tiles"
        for band, name in enumerate(("classes", "scores")):
            with rasterio.open(folder / tile.id / f"{name}.tif") as file:
                found[tile.grid][band][place[1:]] = file.read(1)
        parts.append(vectors.read_parts(folder / tile.id / "parts.parquet"))
    return len(rows), found, vectors.join_parts(parts, TABLE)
