"""A QGIS project of a run: its map, scores and polygons or plots with their colours, and the same styles as .qml.

<run>/qgis/map.qgs                the project, with relative paths: it can be moved with its run
<run>/qgis/classes.vrt, .qml      the classes of all tiles as one raster, and its style
<run>/qgis/scores.vrt, .qml       the scores
<run>/qgis/<product>.fgb, .qml    polygons or plots, in a format that every QGIS reads
"""

from collections.abc import Sequence
from pathlib import PurePosixPath
from xml.sax.saxutils import escape, quoteattr

import pyarrow.parquet as pq
from upath import UPath

from rayseg.errors import DataError
from rayseg.geo.grid import Grid
from rayseg.io import export
from rayseg.io.maps import MappedTile, bands_of
from rayseg.io.masks import table_of
from rayseg.io.pictures import shown_colors
from rayseg.io.sources import crs_of
from rayseg.store import StorePath, put, upath
from rayseg.vision.color import RGB, ClassTable, hex_of

VERSION = "3.22"
"""QGIS that the files are written for: a later one reads them, too."""
RAMP = ((0, (68, 1, 84)), (64, (59, 82, 139)), (127, (33, 145, 140)), (190, (94, 201, 98)), (254, (253, 231, 37)))
"""Score (probability x 254) -> colour: viridis of matplotlib."""
OUTLINE = (230, 81, 0)  # of plots, as on the map of `rayseg view`
_HEAD = "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>\n"


def save(root: StorePath) -> list[str]:
    """Write the project and the styles of a run; return the files, the project first.

    Raises:
        DataError: the run has no map with a CRS.
    """
    folder = upath(root) / "qgis"
    by_grid = {grid: tiles for grid, tiles in export.grids(root).items() if grid.crs}
    if not by_grid:
        raise DataError(f"{root} has images without georeference, which QGIS cannot place; use rayseg export")
    table = table_of(next(iter(by_grid.values()))[0].href)
    layers, files = [], []
    # 1. polygons or plots above the rasters
    for product in export.products(root):
        files += export.write_vectors(product, folder, "fgb")
        style = _vector_style(product, table)
        put(folder / f"{product.stem}.qml", _qml(style))
        layers.append(_layer(product.stem, f"./{product.stem}.fgb", style, "EPSG:4326"))
    # 2. rasters of each grid
    apart = export.suffixes(by_grid)
    for grid, tiles in by_grid.items():
        suffix = apart[grid]
        for name, out in ((export.best_classes(tiles[0]), "classes"), ("scores", "scores")):
            if not (upath(tiles[0].href).parent / f"{name}.tif").exists():  # plots have classes alone
                continue
            export.write_vrt(folder / f"{out}{suffix}.vrt", grid, tiles, name)
            style = _ramp(len(bands_of(tiles[0], name))) if out == "scores" else _paletted(table)
            put(folder / f"{out}{suffix}.qml", _qml(style))
            hidden = out == "scores"
            layers.append(_layer(f"{out}{suffix}", f"./{out}{suffix}.vrt", style, str(grid.crs), hidden=hidden))
            files.append(str(folder / f"{out}{suffix}.vrt"))
    grid, tiles = next(iter(by_grid.items()))
    put(folder / "map.qgs", _project(upath(root).name, layers, grid, tiles))
    return [str(folder / "map.qgs"), *files]


# -- styles ------------------------------------------------------------------------------------------------------------


def _paletted(table: ClassTable | None) -> str:
    """The renderer of classes: their colours and names, the background not painted."""
    shown = shown_colors(table) if table else {}
    entries = "".join(
        f'<paletteEntry value="{value}" label={quoteattr(name)} color="{hex_of(color)}" '
        f'alpha="{255 if value in shown else 0}"/>'
        for value, name, color in (table.classes if table else ())
    )
    return (
        '<pipe><rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor=""><rasterTransparency/>'
        f"<colorPalette>{entries}</colorPalette></rasterrenderer></pipe>"
    )


def _ramp(bands: int) -> str:
    """The renderer of the first score, or of the second of two, by `RAMP`."""
    items = "".join(
        f'<item value="{value}" label="{value / 254:.2f}" color="{hex_of(color)}" alpha="255"/>'
        for value, color in RAMP
    )
    return (
        f'<pipe><rasterrenderer type="singlebandpseudocolor" band="{min(bands, 2)}" opacity="1" alphaBand="-1" '
        'nodataColor="" classificationMin="0" classificationMax="254"><rasterTransparency/><rastershader>'
        '<colorrampshader colorRampType="INTERPOLATED" clip="0" classificationMode="1" minimumValue="0" '
        f'maximumValue="254">{items}</colorrampshader></rastershader></rasterrenderer></pipe>'
    )


def _symbol(name: str, line: RGB, fill: RGB | None) -> str:
    red, green, blue = fill or line
    options = {
        "color": f"{red},{green},{blue},{64 if fill else 0}",
        "outline_color": "{},{},{},255".format(*line),
        "outline_width": "0.35",
        "outline_width_unit": "MM",
        "outline_style": "solid",
        "style": "solid" if fill else "no",
    }
    props = "".join(f'<prop k="{key}" v="{value}"/>' for key, value in options.items())
    return (
        f'<symbol type="fill" name="{name}" alpha="1" clip_to_extent="1" force_rhr="0">'
        f'<layer class="SimpleFill" enabled="1" locked="0" pass="0">{props}</layer></symbol>'
    )


def _vector_style(product: UPath, table: ClassTable | None) -> str:
    """Polygons in the colours of their classes; plots as outlines, with their numbers."""
    with product.open("rb") as stream:
        columns = pq.read_schema(stream).names
    if "number" in columns:
        renderer = f'<renderer-v2 type="singleSymbol"><symbols>{_symbol("0", OUTLINE, None)}</symbols></renderer-v2>'
        return renderer + _labels("number")
    rows = [row for row in table.classes if row[0] in shown_colors(table)] if table else []
    categories = "".join(
        f'<category value="{value}" symbol="{at}" label={quoteattr(name)} render="true"/>'
        for at, (value, name, _) in enumerate(rows)
    )
    symbols = "".join(_symbol(str(at), color, color) for at, (_, _, color) in enumerate(rows))
    return (
        f'<renderer-v2 type="categorizedSymbol" attr="class" enableorderby="0" forceraster="0">'
        f"<categories>{categories}</categories><symbols>{symbols}</symbols></renderer-v2>"
    )


def _labels(column: str) -> str:
    """Labels of a column, from a scale on at which they can be read."""
    return (
        f'<labeling type="simple"><settings calloutType="simple"><text-style fieldName="{column}" fontSize="8" '
        'textColor="38,50,56,255" fontFamily="Sans"><text-buffer bufferDraw="1" bufferSize="0.8" '
        'bufferColor="255,255,255,255"/></text-style><placement placement="1"/>'
        '<rendering scaleVisibility="1" scaleMin="1" scaleMax="10000" drawLabels="1"/></settings></labeling>'
    )


def _qml(style: str) -> bytes:
    body = f'<qgis version="{VERSION}" styleCategories="Symbology|Labeling" labelsEnabled="1">{style}</qgis>'
    return (_HEAD + body + "\n").encode()


# -- the project -------------------------------------------------------------------------------------------------------


def _layer(name: str, source: str, style: str, crs: str, *, hidden: bool = False) -> tuple[str, str]:
    """(the layer, its node in the tree of layers)."""
    raster = PurePosixPath(source).suffix == ".vrt"
    kind, provider = ("raster", "gdal") if raster else ("vector", "ogr")
    geometry = "" if raster else ' geometry="Polygon" labelsEnabled="1"'
    layer = (
        f'<maplayer type="{kind}"{geometry}><id>{escape(name)}</id><datasource>{escape(source)}</datasource>'
        f"<layername>{escape(name)}</layername><srs>{_srs(crs)}</srs><provider>{provider}</provider>{style}</maplayer>"
    )
    checked = "Qt::Unchecked" if hidden else "Qt::Checked"
    node = (
        f'<layer-tree-layer id={quoteattr(name)} name={quoteattr(name)} providerKey="{provider}" '
        f'source={quoteattr(source)} checked="{checked}" expanded="1"/>'
    )
    return layer, node


def _srs(crs: str) -> str:
    known = f"<authid>{escape(crs)}</authid>" if crs.upper().startswith("EPSG:") else ""
    return f"<spatialrefsys><wkt>{escape(crs_of(crs).to_wkt())}</wkt>{known}</spatialrefsys>"


def _project(title: str, layers: Sequence[tuple[str, str]], grid: Grid, tiles: Sequence[MappedTile]) -> bytes:
    left, bottom, right, top = grid.bounds(export.extent_of(tiles))
    extent = f"<xmin>{left}</xmin><ymin>{bottom}</ymin><xmax>{right}</xmax><ymax>{top}</ymax>"
    nodes = "".join(node for _, node in layers)
    text = (
        f'<qgis projectname={quoteattr(title)} version="{VERSION}"><title>{escape(title)}</title>'
        f"<projectCrs>{_srs(str(grid.crs))}</projectCrs><layer-tree-group>{nodes}</layer-tree-group>"
        f'<mapcanvas name="theMapCanvas"><extent>{extent}</extent><destinationsrs>{_srs(str(grid.crs))}'
        f"</destinationsrs></mapcanvas><projectlayers>{''.join(layer for layer, _ in layers)}</projectlayers>"
        '<properties><Paths><Absolute type="bool">false</Absolute></Paths><SpatialRefSys>'
        '<ProjectionsEnabled type="int">1</ProjectionsEnabled></SpatialRefSys></properties></qgis>\n'
    )
    return (_HEAD + text).encode()
