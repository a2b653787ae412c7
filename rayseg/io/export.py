"""A run's map in GIS formats: vector files of its polygons or plots, one COG, a VRT over its tiles."""

import json
import mmap
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from xml.sax.saxutils import escape

import pyarrow as pa
import pyarrow.parquet as pq
import rasterio
import rasterio.shutil
import shapely
from rasterio.windows import Window as FileWindow
from upath import UPath

from rayseg.engine.run import read as read_run
from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import NODATA, Grid, Window, slug
from rayseg.io.cog import COG
from rayseg.io.maps import MappedTile, MappedTiles, bands_of, mapped_tiles, read_tile
from rayseg.io.masks import table_of
from rayseg.io.pictures import shown_colors
from rayseg.io.sources import crs_of
from rayseg.store import StorePath, put, read_json, upath
from rayseg.vision.color import ClassTable

DRIVERS = {
    "gpkg": ("GPKG", ".gpkg"),
    "shp": ("ESRI Shapefile", ".shp"),
    "fgb": ("FlatGeobuf", ".fgb"),
    "geojson": ("GeoJSON", ".geojson"),
}
"""Format -> GDAL's driver and the suffix of its files."""
FORMATS = (*DRIVERS, "parquet", "cog")
_ROWS = 1 << 16


def export(root: StorePath, kind: str, out: StorePath | None = None) -> list[str]:
    """Write a run's polygons or plots, or its rasters, in another format; memory does not grow with the run.

    Args:
        root: prefix of the run.
        kind: one of `FORMATS`. "cog" writes the classes (with the minimum mapping unit if the run has one) and the
            scores, one file of each per grid.
        out: folder; by default <root>/export.

    Returns:
        The files.

    Raises:
        ConfigError: the format is unknown, or there is no run.
        DataError: the run has neither polygons nor plots, or no map.
    """
    if kind not in FORMATS:
        known = ", ".join((*FORMATS, "qgis"))
        raise ConfigError(f"format {kind!r} is unknown, expected one of {known}; choose one with --format")
    folder = upath(out) if out else upath(root) / "export"
    # Only for its error: a folder that is not a run has no products to name.
    read_run(str(root))
    if kind == "cog":
        return _rasters(str(root), folder)
    files = []
    for product in products(root):
        if kind == "parquet":
            target = folder / product.name
            put(target, product.read_bytes())
            files.append(str(target))
        else:
            files += write_vectors(product, folder, kind)
    if not files:
        raise DataError(f"{root} has neither polygons nor plots; wait until the run is done, or run its command again")
    return files


def products(root: StorePath) -> list[UPath]:
    """The GeoParquet files of a run: its polygons or its plots."""
    found = []
    for name in ("polygons", "plots"):
        value = read_json(upath(root) / "steps" / name / "done.json").get("value", {}).get("polygons")
        path = upath(root) / str(value).rpartition("/")[2] if value else None
        if path is not None and path.exists():
            found.append(path)
    return found


# -- vectors -----------------------------------------------------------------------------------------------------------


def write_vectors(product: UPath, folder: StorePath, kind: str) -> list[str]:
    """Write a GeoParquet file in a format of `DRIVERS`; return the files.

    Pixel coordinates are turned upward (y = -row), where QGIS shows an image without georeference; GeoJSON keeps them.
    """
    import pyogrio

    driver, suffix = DRIVERS[kind]
    with product.open("rb") as stream, tempfile.TemporaryDirectory() as scratch:
        try:
            file = pq.ParquetFile(stream)
            geo = json.loads(file.schema_arrow.metadata[b"geo"])["columns"]["geometry"]
        except (pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise DataError(f"{product} is damaged: {error}; look at rayseg verify, then rayseg retry") from None
        placed = geo.get("crs", "absent") is not None
        # geo and pandas metadata would be taken for those of another format
        plain = file.schema_arrow.remove_metadata()
        # A column without any value, as the class of plots without classes, has a type that no format knows.
        schema = pa.schema(
            [
                field.with_type(pa.string()) if pa.types.is_null(field.type) else field
                for field in plain
                if field.name != "bbox"
            ]
        )
        batches = (_batch(batch, schema, flip=not placed and kind != "geojson") for batch in file.iter_batches(_ROWS))
        path = Path(scratch) / f"{product.stem}{suffix}"
        try:
            pyogrio.write_arrow(
                pa.RecordBatchReader.from_batches(schema, batches),
                str(path),
                layer=product.stem,
                driver=driver,
                geometry_name="geometry",
                geometry_type="Polygon" if kind == "shp" else "Unknown",
                crs="EPSG:4326" if placed else None,
            )
        except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, RuntimeError, OSError) as error:
            raise DataError(f"{product} cannot be written as {driver}: {error}; choose another --format") from error
        return [_moved(part, upath(folder) / part.name) for part in sorted(Path(scratch).iterdir())]


def _batch(batch: pa.RecordBatch, schema: pa.Schema, *, flip: bool) -> pa.RecordBatch:
    if flip:
        shapes = shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
        up = pa.array(shapely.to_wkb(shapely.transform(shapes, lambda points: points * (1, -1))), pa.binary())
        batch = batch.set_column(batch.schema.get_field_index("geometry"), "geometry", up)
    return pa.RecordBatch.from_arrays([batch[field.name].cast(field.type) for field in schema], schema=schema)


def _moved(part: Path, target: StorePath) -> str:
    with part.open("rb") as file:
        put(target, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    return str(target)


# -- rasters -----------------------------------------------------------------------------------------------------------


def grids(root: StorePath) -> dict[Grid, MappedTiles]:
    """The tiles of a run's map by grid.

    Raises:
        DataError: it has none.
    """
    by_grid = mapped_tiles(root).by_grid()
    if not by_grid:
        raise DataError(f"{root} has no mapped tile; to see why, run rayseg status {root}")
    return by_grid


def suffixes(by_grid: Iterable[Grid]) -> dict[Grid, str]:
    """Suffixes that distinguish the files of each grid: none for one grid, else its name and its scene's."""
    grids = list(by_grid)
    if len(grids) == 1:
        return {grids[0]: ""}
    return {grid: f"_{grid.name}{f'_{slug(grid.image)}' if grid.crs and grid.image else ''}" for grid in grids}


def best_classes(tile: MappedTile) -> str:
    """The raster of classes that people take: "sieved", or "classes" in a run without a minimum mapping unit."""
    return "sieved" if (upath(tile.href).parent / "sieved.tif").exists() else "classes"


def extent_of(tiles: Sequence[MappedTile]) -> Window:
    """The window around tiles of one grid."""
    whole = tiles[0].tile.window
    for tile in tiles:
        whole = whole.union(tile.tile.window)
    return whole


def _rasters(root: str, folder: StorePath) -> list[str]:
    by_grid, files = grids(root), []
    apart = suffixes(by_grid)
    for grid, tiles in by_grid.items():
        for name, out in ((best_classes(tiles[0]), "classes"), ("scores", "scores")):
            target = upath(folder) / f"{out}{apart[grid]}.tif"
            with tempfile.TemporaryDirectory() as scratch:
                plain = Path(scratch) / "whole.tif"
                _write_whole(plain, grid, tiles, name)
                resampling = "MODE" if out == "classes" else "AVERAGE"
                rasterio.shutil.copy(str(plain), str(plain.with_name("cog.tif")), **COG, overview_resampling=resampling)
                files.append(_moved(plain.with_name("cog.tif"), target))
    return files


def _write_whole(path: Path, grid: Grid, tiles: Sequence[MappedTile], name: str) -> None:
    """Write the tiles into one GeoTIFF, one after the other."""
    window, bands = extent_of(tiles), bands_of(tiles[0], name)
    # Without CRS as the tiles themselves: row 10 lies at y = -10.
    affine = grid.transform(window) if grid.crs else rasterio.Affine(1, 0, window.col, 0, -1, -window.row)
    options = {"tiled": True, "blockxsize": 512, "blockysize": 512, "compress": "DEFLATE", "zlevel": 1}
    place = {"crs": crs_of(grid.crs) if grid.crs else None, "transform": affine}
    shape = {"count": len(bands), "height": window.height, "width": window.width, "dtype": "uint8", "nodata": NODATA}
    with rasterio.open(path, "w", driver="GTiff", BIGTIFF="IF_SAFER", **shape, **place, **options) as file:
        file.descriptions = bands
        if table := table_of(tiles[0].href) if name != "scores" else None:
            file.update_tags(1, classes=json.dumps({str(value): text for value, text, _ in table.classes}))
            file.write_colormap(1, {value: (*color, 255) for value, _, color in table.classes})
        for tile in tiles:
            part = tile.tile.window
            at = FileWindow(part.col - window.col, part.row - window.row, part.width, part.height)
            file.write(read_tile(tile, name), window=at)


def write_vrt(path: StorePath, grid: Grid, tiles: Sequence[MappedTile], name: str) -> None:
    """Write a VRT over the tiles' files, with paths relative to it; GDAL reads it as one raster.

    Unlike the palette of a TIFF, that of a VRT has transparency: the background of a binary map is not painted.

    Args:
        path: of the VRT, in a folder of the run.
        grid: of all tiles; with a CRS.
        tiles: some of a run.
        name: classes, sieved or scores.
    """
    with tempfile.TemporaryFile() as file:  # of many tiles it is larger than what memory should hold
        file.writelines(f"{line}\n".encode() for line in _vrt_lines(grid, tiles, name))
        file.flush()
        put(path, memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))


def _vrt_lines(grid: Grid, tiles: Sequence[MappedTile], name: str) -> Iterator[str]:
    window, bands = extent_of(tiles), bands_of(tiles[0], name)
    table = table_of(tiles[0].href) if name != "scores" else None
    yield f'<VRTDataset rasterXSize="{window.width}" rasterYSize="{window.height}">'
    yield f"<SRS>{escape(crs_of(str(grid.crs)).to_wkt())}</SRS>"
    yield f"<GeoTransform>{', '.join(repr(float(v)) for v in grid.transform(window).to_gdal())}</GeoTransform>"
    for band, text in enumerate(bands, 1):
        yield f'<VRTRasterBand dataType="Byte" band="{band}"><Description>{escape(text)}</Description>'
        yield from (f"<NoDataValue>{NODATA}</NoDataValue>", *(_palette(table) if table else ()))
        for tile in tiles:
            part = tile.tile.window
            size = f'xSize="{part.width}" ySize="{part.height}"'
            yield (
                f'<SimpleSource><SourceFilename relativeToVRT="1">{escape(f"../tiles/{tile.tile.id}/{name}.tif")}'
                f"</SourceFilename><SourceBand>{band}</SourceBand>"
                f'<SourceProperties RasterXSize="{part.width}" RasterYSize="{part.height}" DataType="Byte" '
                f'BlockXSize="512" BlockYSize="512"/><SrcRect xOff="0" yOff="0" {size}/>'
                f'<DstRect xOff="{part.col - window.col}" yOff="{part.row - window.row}" {size}/></SimpleSource>'
            )
        yield "</VRTRasterBand>"
    yield "</VRTDataset>"


def _palette(table: ClassTable) -> Iterator[str]:
    shown, colors = shown_colors(table), dict(zip(table.values, table.colors, strict=True))
    names = dict(zip(table.values, table.names, strict=True))
    yield "<ColorInterp>Palette</ColorInterp><CategoryNames>"
    last = max(table.values) + 1
    yield from (f"<Category>{escape(names.get(value, ''))}</Category>" for value in range(last))
    yield "</CategoryNames><ColorTable>"
    for value in range(last):
        red, green, blue = colors.get(value, (0, 0, 0))
        yield f'<Entry c1="{red}" c2="{green}" c3="{blue}" c4="{255 if value in shown else 0}"/>'
    yield "</ColorTable>"
