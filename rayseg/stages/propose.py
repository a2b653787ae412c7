"""Tiles through a proposer, patch by patch, and the plots of a whole region back into tiles."""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.engine.manifest import Row, write_rows
from rayseg.geo import region
from rayseg.geo.grid import NODATA, Lattice, Window
from rayseg.io import cog, plot_joins, stac_write
from rayseg.stages.read import read_reach
from rayseg.stages.rows import ABSENT, TileRow
from rayseg.stages.write import facts_of
from rayseg.store import upath
from rayseg.vision.color import ClassTable
from rayseg.vision.instances import painted
from rayseg.vision.proposals import Propose, SuperpixelProposer
from rayseg.vision.rounds import RoundsConfig, find_plots

if TYPE_CHECKING:  # torch takes seconds to import; reading and writing do without
    from rayseg.models.sam import SamConfig

UNNUMBERED = 2**32 - 1


@dataclass
class ProposePlots:
    """`tile, image, valid, reach -> patches, pieces`: plots of each patch, and the part of each in the patch's cell.

    patches: rows for `plot_joins.join_pieces`, with `pixels`: valid pixels in the patch, and `coverage`: share of them
    that plots cover after each round. pieces: rows of `plot_joins.pieces_of` with round, refined, predicted_iou and
    stability.

    Args:
        proposer: "sam", "felzenszwalb" or "boundaries".
        sam: settings of "sam".
        superpixels: settings of "felzenszwalb".
        rounds: settings of the method.
        patches: lattice of the patches.
        geometry: the region, GeoJSON in EPSG:4326, or None.
        boundaries: the proposer "boundaries".
    """

    proposer: Literal["sam", "felzenszwalb", "boundaries"]
    _: KW_ONLY
    sam: "SamConfig"
    superpixels: SuperpixelProposer
    rounds: RoundsConfig
    patches: Lattice
    geometry: dict[str, Any] | None
    boundaries: Propose | None = None

    @cached_property
    def _propose(self) -> Propose:
        if self.boundaries:
            return self.boundaries
        if self.proposer == "felzenszwalb":
            return self.superpixels
        from rayseg.models.sam import load_sam

        return load_sam(self.sam)

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Find the plots of each tile."""
        from rayseg.models.cpu import threads

        with threads():
            return [self._tile(row) for row in rows]

    def _tile(self, row: TileRow) -> TileRow:
        tile, reach = row.tile, row.reach
        inside_HW, drawn_HW = region.kept(self.geometry, tile.grid, reach)
        drawn_HW = inside_HW if drawn_HW is None else drawn_HW
        patches: list[Row] = []
        pieces: list[Row] = []
        for cell in self.patches.cells(tile.window):
            of_cell = cell.intersect(tile.window)
            if not row.valid[of_cell.slices(reach)].any():
                continue
            # 1. Find plots in the patch, cut to its valid pixels.
            window = _tight(row.valid, self.patches.around(cell), reach)
            cut = window.slices(reach)
            valid_HW = row.valid[cut]
            plots = find_plots(row.image[cut], self._propose, self.rounds, valid_HW)
            labels_HW, kept = painted(plots.proposals.masks, valid_HW.shape, where_HW=valid_HW, least=self.rounds.least)
            # 2. Keep the whole patch, by which plots are joined later, and the pieces in its cell.
            place = {"cell_row": cell.row // self.patches.stride, "cell_col": cell.col // self.patches.stride}
            size = {"col": window.col, "row": window.row, "width": window.width, "height": window.height}
            counted = {"pixels": int(valid_HW.sum()), "coverage": list(plots.coverage)}
            patches.append(place | size | {"labels": plot_joins.packed(labels_HW)} | counted)
            own_HW = np.where(drawn_HW[of_cell.slices(reach)], plot_joins.labels_of(patches[-1], of_cell), 0)
            if tile.grid.divided:  # a plot of which a seam leaves no pixel here is another zone's
                own_HW[~np.isin(own_HW, own_HW[inside_HW[of_cell.slices(reach)]])] = 0
            for label, piece in plot_joins.pieces_of(own_HW.astype(np.int32), of_cell):
                at = kept[label - 1]
                scores = {
                    "predicted_iou": float(plots.proposals.iou_N[at]),
                    "stability": float(plots.proposals.stability_N[at]),
                    "round": int(plots.round_N[at]),
                    "refined": bool(plots.refined_N[at]),
                }
                pieces.append(place | {"label": label} | piece | scores)
        return replace(row, image=ABSENT, valid=ABSENT, patches=tuple(patches), pieces=tuple(pieces))


def _tight(valid_HW: NDArray[np.bool_], patch: Window, reach: Window) -> Window:
    """The part of a patch around its valid pixels; a proposer needs no pixels beyond the edge of the imagery."""
    rows_cols = patch.slices(reach)
    rows = np.flatnonzero(valid_HW[rows_cols].any(axis=1))
    cols = np.flatnonzero(valid_HW[rows_cols].any(axis=0))
    width, height = int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1)
    return Window(patch.col + int(cols[0]), patch.row + int(rows[0]), width, height)


@dataclass
class WritePieces:
    """`tile, patches, pieces -> facts`: write `<prefix>/<tile>.patches.parquet` and `.pieces.parquet`.

    A tile without plots is settled as "empty".
    """

    prefix: str

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Write each tile."""
        for row in rows:
            write_rows(pieces_path(self.prefix, row.tile.id, "patches"), row.patches)
            write_rows(pieces_path(self.prefix, row.tile.id, "pieces"), row.pieces)
        return [row.settled("done" if row.pieces else "empty", {"pieces": len(row.pieces)}) for row in rows]


def pieces_path(prefix: str, tile: str, name: Literal["patches", "pieces", "numbers"]) -> str:
    """The file of a tile's table."""
    return str(upath(prefix) / f"{tile}.{name}.parquet")


@dataclass
class ReadPlots:
    """`tile, sources -> numbers, valid`: the number of the plot at every pixel (0 for none), and where imagery is.

    Args:
        proposed: prefix of the tables of patches.
        joined: prefix of the tables of numbers.
        bands: of the imagery.
        stride: of the patches.
    """

    proposed: str
    joined: str
    bands: Sequence[str]
    _: KW_ONLY
    stride: int

    def __call__(self, rows: list[TileRow]) -> list[TileRow | Settled]:
        """Read the plots of each tile."""
        return [self._read(row) for row in rows]

    def _read(self, row: TileRow) -> TileRow | Settled:
        tile = row.tile
        # Read again for its valid pixels alone, which the patches do not keep.
        result = read_reach(row, tile.window, self.bands)
        if isinstance(result, Settled):
            return result
        # Labels of a patch -> numbers of the joined plots.
        numbers: dict[plot_joins.Place, dict[int, int]] = {}
        for piece in plot_joins.read_table(pieces_path(self.joined, tile.id, "numbers")):
            numbers.setdefault(plot_joins.cell_of(piece), {})[piece["label"]] = piece["number"]
        numbers_HW = np.zeros((tile.window.height, tile.window.width), np.uint32)
        for patch in plot_joins.read_table(pieces_path(self.proposed, tile.id, "patches")):
            cell = Window(patch["cell_col"] * self.stride, patch["cell_row"] * self.stride, self.stride, self.stride)
            part = cell.intersect(tile.window)
            labels_HW = plot_joins.labels_of(patch, part)
            numbers_HW[part.slices(tile.window)] = plot_joins.numbered(
                labels_HW, numbers.get(plot_joins.cell_of(patch), {})
            )
        return replace(result, image=ABSENT, numbers=numbers_HW)


@dataclass
class WritePlots:
    """`tile, sources, numbers, valid -> facts`: write classes.tif, plots.tif and, last, the tile's item.

    classes.tif: 0 background, else the class of the plot, 255 no data. plots.tif: number of the plot as in the table of
    plots, 0 for none, 2^32 - 1 for no data.

    Args:
        prefix: folder of the folders `<tile id>/`.
        table: the classes.
        classes: class of every plot number that has one.
        unclassified: class of the other plots.
        geometry: the region, GeoJSON in EPSG:4326, or None.
        model: href of the classifier's item, if there is one.
    """

    prefix: str
    table: ClassTable
    _: KW_ONLY
    classes: Mapping[int, int]
    unclassified: int
    geometry: dict[str, Any] | None
    model: str | None

    def __call__(self, rows: list[TileRow]) -> list[Settled]:
        """Write each tile."""
        return [self._write(row) for row in rows]

    def _write(self, row: TileRow) -> Settled:
        tile = row.tile
        # 1. the class of every plot, inside the region
        area = region.on_grid(self.geometry, tile.grid, tile.window)
        valid_HW = row.valid & region.pixels_inside(area, tile.grid, tile.window)
        values, inverse = np.unique(row.numbers, return_inverse=True)
        named = np.array([self.classes.get(int(v), self.unclassified) if v else 0 for v in values], np.uint8)
        classes_HW = np.where(valid_HW, named[inverse].reshape(valid_HW.shape), NODATA).astype(np.uint8)
        numbers_HW = np.where(valid_HW, row.numbers, np.uint32(UNNUMBERED)).astype(np.uint32)
        facts = facts_of(classes_HW, tile)
        if not facts["counts"]:
            return row.settled("nodata")
        # 2. the rasters, then the item: a folder without an item is not a tile
        folder = upath(self.prefix) / tile.id
        classes = cog.write_classes(folder / "classes.tif", classes_HW, tile.grid, tile.window, self.table)
        plots = cog.write_image(
            folder / "plots.tif",
            numbers_HW[None],
            tile.grid,
            tile.window,
            bands=("plot",),
            nodata=UNNUMBERED,
            overviews="MODE",
        )
        item = stac_write.item_of(
            tile.id,
            tile.grid,
            tile.window,
            folder=folder,
            files=(classes, plots),
            sources=row.sources,
            model=self.model,
            table=self.table,
        )
        facts["item"] = stac_write.packed(stac_write.write_item(item, folder / f"{tile.id}.json"))
        facts["coverage"] = 1 - facts["counts"].get("0", 0) / sum(facts["counts"].values())
        return row.settled("empty" if set(facts["counts"]) == {"0"} else "done", facts)
