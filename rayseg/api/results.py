"""An opened run: its rasters as lazy arrays, its polygons, ledger and measures as tables; nothing is computed."""

import html
from base64 import b64encode
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rayseg.engine import run as runs
from rayseg.engine.ledger import Ledger
from rayseg.errors import ConfigError, DataError, ModelError, listed
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import masks, qgis, rasters
from rayseg.io.maps import MappedTile, bands_of, mapped_tiles, planned_tiles
from rayseg.io.qgis import OUTLINE
from rayseg.store import StorePath, absolute, upath
from rayseg.vision.color import hex_of

if TYPE_CHECKING:
    import geopandas as gpd
    import pandas as pd
    import xarray as xr

    from rayseg.api.model import Model

PICTURE = 1 << 18
"""Bytes of the map's picture up to which a notebook shows it."""
Raster = Literal["classes", "sieved", "scores"]


class Run:
    """A run in a folder or at a URL, as `rayseg run` and `rayseg predict` leave it.

    Opening reads run.json alone. Rasters are read when their values are needed, and of them only the tiles that a
    selection meets: through the reader of the pipelines, which signs and repeats requests as they do. (A GDAL VRT would
    do without that; an index of tiles, GTI, needs a GDAL of its own.)

    Args:
        root: folder or URL of the run.

    Raises:
        ConfigError: there is no run.

    Example:
        >>> run = rayseg.open("runs/demo")  # doctest: +SKIP
        >>> run.classes.sel(x=slice(448000, 448500), y=slice(4400500, 4400000)).plot()  # doctest: +SKIP
        >>> run.polygons.to_crs(32650).area.sum()  # doctest: +SKIP
    """

    def __init__(self, root: StorePath) -> None:
        self.root = absolute(str(root)).rstrip("/")
        self.request = runs.read(self.root)

    @property
    def pipeline(self) -> str:
        """Name of the pipeline."""
        return str(self.request["pipeline"])

    @property
    def status(self) -> str:
        """done, incomplete, running, killed, or why it ended; as `rayseg status` reports it."""
        return str(runs.status(self.root)["status"])

    @property
    def config(self) -> dict[str, Any]:
        """The settings of the run."""
        return dict(self.request["config"])

    @cached_property
    def tiles(self) -> tuple[MappedTile, ...]:
        """The tiles that have a map.

        Raises:
            DataError: no step of the run has mapped tiles yet.
        """
        return tuple(mapped_tiles(self.root))

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grids of the tiles: one, or one per UTM zone, or one per image without georeference."""
        return tuple(dict.fromkeys(tile.tile.grid for tile in self.tiles))

    @property
    def classes(self) -> "xr.DataArray":
        """Classes, (y, x) uint8, 255 where there is no imagery; attributes name the classes as CF flags.

        Raises:
            DataError: the run has several grids (use `raster`), or no tile has a map.
        """
        return self.raster("classes")

    @property
    def sieved(self) -> "xr.DataArray":
        """Classes with the minimum mapping unit, as the polygons have it; see `classes`, which are as predicted.

        Raises:
            DataError: see `classes`; or the run was made with polygons.min_area=null.
        """
        return self.raster("sieved")

    @property
    def scores(self) -> "xr.DataArray":
        """Scores, (band, y, x) uint8: probability x 254 (`attrs["scale_factor"]`), 255 where there is no imagery.

        Raises:
            DataError: see `classes`.
        """
        return self.raster("scores")

    def raster(self, name: Raster, grid: Grid | None = None) -> "xr.DataArray":
        """A raster of the run as one lazy array on a grid, with CRS and transform as rioxarray sets them.

        Args:
            name: classes, sieved or scores.
            grid: one of `grids`; None takes the only one.

        Raises:
            DataError: the run has several grids and none is given, or no tile has a map.
        """
        import rioxarray  # noqa: F401 - registers `.rio`
        import xarray as xr
        from xarray.core.indexing import LazilyIndexedArray

        if not self.tiles:
            raise DataError(f"{self.root} has no mapped tile; to see why, run rayseg status {self.root}")
        names = ", ".join(each.name for each in self.grids)
        if grid is None and len(self.grids) != 1:
            raise DataError(f"{self.root} has {len(self.grids)} grids ({names}); use raster(name, run.grids[0])")
        grid = grid or self.grids[0]
        tiles = [tile for tile in self.tiles if tile.tile.grid == grid]
        if not tiles:
            raise DataError(f"{self.root} has no tile on the grid {grid.name}; its grids are {names}")
        # 1. the window around all planned tiles, those without imagery included; all files have the bands of the first
        window = tiles[0].tile.window
        for tile, _ in planned_tiles(self.root):
            window = window.union(tile.window) if tile.grid == grid else window
        first = _file_of(tiles[0], name)
        if name == "sieved" and not upath(first).exists():
            raise DataError(f"{self.root} has no sieved.tif, it has polygons.min_area=null; use run.classes")
        bands = bands_of(tiles[0], name)
        # 2. coordinates are centres of pixels
        affine = grid.transform(window)
        x = affine.c + affine.a * (np.arange(window.width) + 0.5)
        y = affine.f + affine.e * (np.arange(window.height) + 0.5)
        variable = xr.Variable(("band", "y", "x"), LazilyIndexedArray(_mosaic(tiles, name, bands, grid, window)))
        plain = xr.DataArray(variable, {"band": list(bands), "y": y, "x": x}, name=name)
        array: xr.DataArray = plain.rio.write_transform(affine).rio.write_nodata(NODATA)
        array = array.rio.write_crs(grid.crs) if grid.crs else array
        if name == "scores":
            return array.assign_attrs(scale_factor=1 / 254, long_name="probability")
        table = masks.table_of(first)
        rows = table.classes if table else ()
        flags = {
            "flag_values": np.array([value for value, _, _ in rows], np.uint8),
            "flag_meanings": " ".join(text.replace(" ", "_") for _, text, _ in rows),
            "flag_colors": " ".join("#{:02X}{:02X}{:02X}".format(*color) for _, _, color in rows),
        }
        return array.isel(band=0, drop=True).assign_attrs(flags)

    @property
    def polygons(self) -> "gpd.GeoDataFrame":
        """The polygons of the classes, joined across tiles, EPSG:4326, with `area_m2`.

        Raises:
            DataError: the run has written none.
        """
        return self._table("polygons")

    @property
    def plots(self) -> "gpd.GeoDataFrame":
        """The plots of a run of `agri`, EPSG:4326.

        Raises:
            DataError: the run has written none.
        """
        return self._table("plots")

    def _table(self, kind: str) -> "gpd.GeoDataFrame":
        """The GeoParquet file of the polygons that a finished step names; plots are those of a run of agri."""
        from rayseg.geo.vector_files import read_frame

        for step in self.request.get("steps", {}).values():
            name = str(step.get("polygons", ""))
            if name.endswith(".parquet") and (kind == "polygons" or self.pipeline == "agri"):
                return read_frame(upath(self.root) / name.rpartition("/")[2])
        raise DataError(f"{self.root} has no {kind}; it is a run of {self.pipeline} and {self.request.get('status')}")

    @property
    def report(self) -> dict[str, Any]:
        """The values of the report: summary, areas, shares, mean IoU, speed; {} before it is written."""
        return dict(self.request.get("steps", {}).get("report", {}))

    @property
    def metrics(self) -> dict[str, Any]:
        """The comparison with truth, as `rayseg evaluate --json` prints it; without truth what the report measures.

        That is the area, the shares of the classes, the change across tile borders (`seams`), and the speed.
        """
        measured = dict(self.request.get("steps", {}).get("evaluate", {}))
        if measured.keys() - {"seconds"}:
            return measured
        names = ("area_m2", "shares", "seams", "pixels_per_second", "km2_per_hour")
        return {name: self.report[name] for name in names if self.report.get(name) is not None}

    @property
    def ledger(self) -> "pd.DataFrame":
        """One row per row of every step: step, id, status, reason, attempt, and seconds of its stages in all."""
        import pandas as pd

        rows = [
            (step.name, record.id, record.status, record.reason, record.attempt, sum(record.seconds.values()))
            for step in sorted(upath(self.root).glob("steps/*"))
            for record in Ledger(str(step / "ledger")).read().values()
        ]
        return pd.DataFrame(rows, columns=["step", "id", "status", "reason", "attempt", "seconds"])

    @property
    def models(self) -> tuple[str, ...]:
        """Prefixes of the trained models, for `rayseg.load_model`."""
        return tuple(str(path.parent) for path in sorted(upath(self.root).glob("models/**/item.json")))

    def load_model(self) -> "Model":
        """The model of the map: one that the run has trained, or that it was given.

        Raises:
            ModelError: no single model made the map, or it is not where it was.
        """
        from rayseg.api.model import Model

        trained, steps = self.models, self.request.get("steps", {})
        # predict trains none, and notes the one that it was given.
        if not trained and (given := steps.get("predict", steps.get("classify", {})).get("bundle")):
            return Model(given)
        if len(trained) != 1:
            trained = tuple(prefix for prefix in trained if prefix.endswith("/segmenter"))
        if not trained:
            known = f"choose one of run.models: {listed(self.models)}" if self.models else "it has trained none"
            if origin := self.config.get("run") or self.config.get("after"):
                known = f"it is made from the run {origin}, open that one"
            raise ModelError(f"{self.root} has no model of its own map; {known}")
        return Model(trained[0])

    def explore(self) -> Any:  # noqa: ANN401 - a widget of lonboard, or a folium map
        """The plots or polygons on an interactive map, in the colours of their classes.

        By lonboard, or by folium where that is not installed.

        Raises:
            ConfigError: neither is installed.
            DataError: the run has written neither plots nor polygons, there are none, or they have no CRS.
        """
        shapes = self.plots if self.pipeline == "agri" else self.polygons
        if shapes.empty:
            raise DataError(f"{self.root} has no polygon to show; look at run.classes or run.scores")
        if shapes.crs is None:
            raise DataError(
                f"{self.root} has images without georeference, which no map can place; use run.polygons.plot()"
            )
        table = masks.table_of(self.tiles[0].href) if self.tiles else None
        colors = {value: color for value, _, color in table.classes} if table and "class" in shapes else {}
        rgb_N3 = np.array([colors.get(value, OUTLINE) for value in shapes.get("class", [0] * len(shapes))], np.uint8)
        try:
            import lonboard
        except ImportError:
            return _on_folium(shapes, [hex_of((r, g, b)) for r, g, b in rgb_N3.tolist()])
        fill_N4 = np.column_stack([rgb_N3, np.full(len(shapes), 120, np.uint8)])
        return lonboard.Map(
            lonboard.PolygonLayer.from_geopandas(
                shapes, get_fill_color=fill_N4, get_line_color=rgb_N3, line_width_min_pixels=1
            )
        )

    def save_qgis(self) -> str:
        """Write a QGIS project of the run, as a finished run has it, with styles of its layers; return its path.

        Raises:
            DataError: the run has no map with a CRS.
        """
        return qgis.save(self.root)[0]

    def __repr__(self) -> str:
        return f"Run({self.root!r}: {self.pipeline}, {self.request.get('status')})"

    def _repr_html_(self) -> str:
        rows = {"pipeline": self.pipeline, "region": self.request["region"]["name"], "status": self.status}
        rows |= {"summary": self.report["summary"]} if self.report else {}
        rows |= {"mean IoU": f"{iou:.3f}"} if (iou := self.report.get("mean_iou")) is not None else {}
        cells = "".join(f"<tr><th>{name}</th><td>{html.escape(str(text))}</td></tr>" for name, text in rows.items())
        picture = upath(self.root) / "report" / "map.png"
        # Small enough for a notebook that is kept with its outputs.
        image = ""
        if picture.exists() and len(content := picture.read_bytes()) <= PICTURE:
            image = (
                f'<img style="max-width: 480px" alt="map" src="data:image/png;base64,{b64encode(content).decode()}">'
            )
        return f"<table><caption>{html.escape(self.root)}</caption>{cells}</table>{image}"


def _on_folium(shapes: "gpd.GeoDataFrame", colors: list[str]) -> Any:  # noqa: ANN401 - a folium map
    try:
        import folium
    except ImportError:
        raise ConfigError("interactive maps need lonboard or folium: pip install 'rayseg[notebook]'") from None
    west, south, east, north = shapes.total_bounds
    whole = folium.Map(tiles=None, control_scale=True)  # without a background map, which would need a network
    fields = [name for name in shapes.columns if name != "geometry"]
    folium.GeoJson(
        shapes.assign(_color=colors).to_json(),
        style_function=lambda row: {"color": row["properties"]["_color"], "weight": 1.2, "fillOpacity": 0.45},
        tooltip=folium.GeoJsonTooltip(fields),
    ).add_to(whole)
    whole.fit_bounds([[south, west], [north, east]])
    return whole


def _file_of(tile: MappedTile, name: Raster) -> str:
    return str(upath(tile.href).parent / f"{name}.tif")


def _mosaic(tiles: list[MappedTile], name: Raster, bands: tuple[str, ...], grid: Grid, window: Window) -> Any:  # noqa: ANN401
    """The tiles' files as one array that xarray reads in parts, (band, row, col) over `window` of `grid`."""
    from xarray.backends.common import BackendArray
    from xarray.core.indexing import ExplicitIndexer, IndexingSupport, explicit_indexing_adapter

    at = np.array([(t.tile.window.row, t.tile.window.row1, t.tile.window.col, t.tile.window.col1) for t in tiles])

    class Mosaic(BackendArray):
        shape = (len(bands), window.height, window.width)
        dtype = np.dtype(np.uint8)

        def __getitem__(self, key: ExplicitIndexer) -> Any:  # noqa: ANN401
            return explicit_indexing_adapter(key, self.shape, IndexingSupport.BASIC, self._part)

        def _part(self, key: tuple[int | slice, ...]) -> np.ndarray:
            """Integers and slices of any step, by the smallest window around them."""
            ranges = [
                range(size)[index] if isinstance(index, slice) else range(index, index + 1)
                for index, size in zip(key, self.shape, strict=True)
            ]
            if not all(map(len, ranges)):
                part = np.empty([len(steps) for steps in ranges], np.uint8)
            else:
                (row, row1), (col, col1) = ((min(steps), max(steps) + 1) for steps in ranges[1:])
                inner = Window(window.col + col, window.row + row, col1 - col, row1 - row)
                whole = _read(inner, [bands[index] for index in ranges[0]])
                part = whole[:, np.array(ranges[1])[:, None] - row, np.array(ranges[2])[None] - col]
            return part[tuple(slice(None) if isinstance(index, slice) else 0 for index in key)]

    def _read(inner: Window, wanted: list[str]) -> np.ndarray:
        meets = (at[:, 0] < inner.row1) & (at[:, 1] > inner.row) & (at[:, 2] < inner.col1) & (at[:, 3] > inner.col)
        sources = [tiles[index].source(name, bands) for index in np.flatnonzero(meets)]
        if not sources:
            return np.full((len(wanted), inner.height, inner.width), NODATA, np.uint8)
        image, valid = rasters.read(sources, grid, inner, bands=wanted, categorical=True)
        return np.where(valid, image, NODATA)

    return Mosaic()
