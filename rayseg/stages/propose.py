"""Tiles through a proposer, patch by patch, and the plots of a whole region back into tiles."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.manifest import write_rows
from rayseg.errors import DataError
from rayseg.geo import region
from rayseg.geo.grid import NODATA, Lattice, Tile, Window
from rayseg.io import cog, plot_joins, stac_write
from rayseg.io.sources import Source, from_json
from rayseg.stages.read import incomplete, read_reach
from rayseg.stages.write import facts_of
from rayseg.store import upath
from rayseg.vision.color import ClassTable
from rayseg.vision.instances import painted
from rayseg.vision.proposals import Propose, SuperpixelProposer
from rayseg.vision.rounds import Plots, RoundsConfig, find_plots

if TYPE_CHECKING:  # torch takes seconds to import; who reads and writes does without
    from rayseg.models.sam import SamConfig

Row = dict[str, Any]
UNNUMBERED = 2**32 - 1


class ProposePlots:
    """`image, valid, reach, <tile> -> patches, pieces`: what each patch of the tile finds, and its cell's share of it.

    patches: rows for `plot_joins.join`, with `pixels`: valid ones that the patch sees, and `coverage`: share of these
    that is covered after each round. pieces: rows of `plot_joins.pieces_of` with round, refined, predicted_iou and
    stability.

    Args:
        proposer: "sam" or "felzenszwalb".
        sam: settings of the one.
        superpixels: settings of the other.
        rounds: settings of the method.
        patches: how the grid is cut.
        geometry: the region, GeoJSON in EPSG:4326, or None.
    """

    def __init__(
        self,
        proposer: Literal["sam", "felzenszwalb"],
        *,
        sam: "SamConfig",
        superpixels: SuperpixelProposer,
        rounds: RoundsConfig,
        patches: Lattice,
        geometry: dict[str, Any] | None,
    ) -> None:
        self.proposer, self.sam, self.superpixels = proposer, sam, superpixels
        self.rounds, self.patches, self.geometry = rounds, patches, geometry

    @cached_property
    def _propose(self) -> Propose:
        if self.proposer == "felzenszwalb":
            return self.superpixels
        from rayseg.models.sam import load_sam

        return load_sam(self.sam)

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Look at each tile."""
        from rayseg.models.cpu import threads

        with threads():
            return [self._tile(row) for row in rows]

    def _tile(self, row: Row) -> Row:
        tile, reach = Tile.from_row(row), row["reach"]
        inside_HW = region.pixels_inside(region.on_grid(self.geometry, tile.grid), tile.grid, reach)
        patches, pieces = [], []
        for cell in self.patches.cells(tile.window):
            of_cell = cell.intersect(tile.window)
            if not row["valid"][of_cell.slices(reach)].any():
                continue
            window = _tight(row["valid"], self.patches.around(cell), reach)
            cut = window.slices(reach)
            valid_HW = row["valid"][cut]
            found = find_plots(row["image"][cut], self._propose, self.rounds, valid_HW)
            labels_HW, kept = painted(found.proposals.masks, valid_HW.shape, where_HW=valid_HW, least=self.rounds.least)
            place = {"cell_row": cell.row // self.patches.stride, "cell_col": cell.col // self.patches.stride}
            size = {"col": window.col, "row": window.row, "width": window.width, "height": window.height}
            counted = {"pixels": int(valid_HW.sum()), "coverage": list(found.coverage)}
            patches.append(place | size | {"labels": plot_joins.packed(labels_HW)} | counted)
            own_HW = np.where(inside_HW[of_cell.slices(reach)], plot_joins.labels_of(patches[-1], of_cell), 0)
            pieces += [
                place | {"label": label} | piece | _scores(found, kept[label - 1])
                for label, piece in plot_joins.pieces_of(own_HW.astype(np.int32), of_cell)
            ]
        rest = {key: value for key, value in row.items() if key not in {"image", "valid", "reach"}}
        return rest | {"patches": patches, "pieces": pieces}


def _tight(valid_HW: NDArray[np.bool_], patch: Window, reach: Window) -> Window:
    """The part of a patch around its valid pixels: beyond the edge of the imagery there is nothing to look at."""
    rows_cols = patch.slices(reach)
    rows = np.flatnonzero(valid_HW[rows_cols].any(axis=1))
    cols = np.flatnonzero(valid_HW[rows_cols].any(axis=0))
    width, height = int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1)
    return Window(patch.col + int(cols[0]), patch.row + int(rows[0]), width, height)


def _scores(found: Plots, at: int) -> Row:
    return {
        "predicted_iou": float(found.proposals.iou_N[at]),
        "stability": float(found.proposals.stability_N[at]),
        "round": int(found.round_N[at]),
        "refined": bool(found.refined_N[at]),
    }


class WritePieces:
    """`patches, pieces -> facts`: kept as `<prefix>/<tile>.patches.parquet` and `.pieces.parquet`.

    A tile in which nothing was found is settled as "empty"; what could not be read around it goes to the facts as
    `unread`.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Write each tile."""
        return [self._write(row) for row in rows]

    def _write(self, row: Row) -> Row:
        for name in ("patches", "pieces"):
            write_rows(pieces_path(self.prefix, row["id"], name), row[name])
        facts = {"pieces": len(row["pieces"])} | {key: row[key] for key in ("unread",) if key in row}
        kept = {"id": row["id"], "seconds": row["seconds"], "facts": facts}
        return kept | ({} if row["pieces"] else {"status": "empty"}) | incomplete(row)


def pieces_path(prefix: str, tile: str, name: Literal["patches", "pieces", "numbers"]) -> str:
    """Where a table of a tile is."""
    return str(upath(prefix) / f"{tile}.{name}.parquet")


class ReadPlots:
    """`<tile> -> numbers, valid`: the number of the plot at every pixel of the tile (0 for none), and where it is seen.

    Args:
        proposed: where the tables of patches are.
        joined: where the tables of numbers are.
        bands: of the imagery.
        stride: of the patches.
    """

    def __init__(self, proposed: str, joined: str, bands: Sequence[str], *, stride: int) -> None:
        self.proposed, self.joined, self.bands, self.stride = proposed, joined, tuple(bands), stride

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Put each tile together."""
        return [self._read(row) for row in rows]

    def _read(self, row: Row) -> Row:
        if row.get("refused"):
            raise DataError(row["refused"])
        tile = Tile.from_row(row)
        row = read_reach(row, tile.window, self.bands)
        if "status" in row:
            return row
        numbers: dict[plot_joins.Place, dict[int, int]] = {}
        for one in plot_joins.read_table(pieces_path(self.joined, tile.id, "numbers")):
            numbers.setdefault(plot_joins.place_of(one), {})[one["label"]] = one["number"]
        numbers_HW = np.zeros((tile.window.height, tile.window.width), np.uint32)
        for patch in plot_joins.read_table(pieces_path(self.proposed, tile.id, "patches")):
            cell = Window(patch["cell_col"] * self.stride, patch["cell_row"] * self.stride, self.stride, self.stride)
            part = cell.intersect(tile.window)
            labels_HW = plot_joins.labels_of(patch, part)
            numbers_HW[part.slices(tile.window)] = plot_joins.numbered(
                labels_HW, numbers.get(plot_joins.place_of(patch), {})
            )
        return {key: value for key, value in row.items() if key != "image"} | {"numbers": numbers_HW}


class WritePlots:
    """`numbers, valid, <tile> -> facts`: the tile as classes.tif, plots.tif and, last, its item.

    classes.tif: 0 background, else the class of the plot, 255 no data. plots.tif: number of the plot as in the table of
    plots, 0 for none, 2^32 - 1 for no data.

    Args:
        prefix: below which `<tile id>/` is written.
        table: the classes.
        classes: class of every plot number that has one.
        unclassified: class of the others.
        geometry: the region, GeoJSON in EPSG:4326, or None.
        model: href of the classifier's item, if there is one.
    """

    def __init__(
        self,
        prefix: str,
        table: ClassTable,
        *,
        classes: Mapping[int, int],
        unclassified: int,
        geometry: dict[str, Any] | None,
        model: str | None,
    ) -> None:
        self.prefix, self.table, self.classes = prefix, table, dict(classes)
        self.unclassified, self.geometry, self.model = unclassified, geometry, model

    def __call__(self, rows: list[Row]) -> list[Row]:
        """Write each tile."""
        return [self._write(row) for row in rows]

    def _write(self, row: Row) -> Row:
        tile = Tile.from_row(row)
        area = region.on_grid(self.geometry, tile.grid)
        valid_HW = row["valid"] & region.pixels_inside(area, tile.grid, tile.window)
        values, inverse = np.unique(row["numbers"], return_inverse=True)
        named = np.array([self.classes.get(int(v), self.unclassified) if v else 0 for v in values], np.uint8)
        classes_HW = np.where(valid_HW, named[inverse].reshape(valid_HW.shape), NODATA).astype(np.uint8)
        numbers_HW = np.where(valid_HW, row["numbers"], np.uint32(UNNUMBERED)).astype(np.uint32)
        kept, facts = {key: row[key] for key in ("id", "seconds")}, facts_of(classes_HW)
        if not facts["counts"]:
            return kept | {"status": "nodata"} | incomplete(row)
        folder = upath(self.prefix) / tile.id
        cog.write_classes(folder / "classes.tif", classes_HW, tile.grid, tile.window, self.table)
        cog.write_image(
            folder / "plots.tif",
            numbers_HW[None],
            tile.grid,
            tile.window,
            bands=("plot",),
            nodata=UNNUMBERED,
            overviews="MODE",
        )
        self._describe(tile, from_json(row["sources"]))
        facts["coverage"] = 1 - facts["counts"].get("0", 0) / sum(facts["counts"].values())
        kept |= {"status": "empty" if set(facts["counts"]) == {"0"} else "done", "facts": facts}
        return kept | incomplete(row)

    def _describe(self, tile: Tile, sources: list[Source]) -> None:
        folder = upath(self.prefix) / tile.id
        item = stac_write.item_of(
            tile.id,
            tile.grid,
            tile.window,
            folder=folder,
            files=("classes.tif", "plots.tif"),
            sources=sources,
            model=self.model,
            table=self.table,
        )
        stac_write.write_item(item, folder / f"{tile.id}.json")
