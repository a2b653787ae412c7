"""Chips that wait for a mask: exported to be drawn on, and finished masks taken back.

<folder>/chips.geojson     where they are, EPSG:4326; without georeference a chip has no geometry
<folder>/images/<id>.png   what to draw on
<folder>/index.html        all of them on one page, with the classes and their colours
<folder>/request.json      the ids, sizes and classes that masks are checked by
"""

import io
import json
from collections import Counter
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from affine import Affine
from numpy.typing import NDArray
from PIL import Image
from shapely.geometry import box, mapping

from rayseg.errors import ConfigError, DataError
from rayseg.geo.grid import NODATA, Window
from rayseg.io import cog
from rayseg.io.labels import read_mask
from rayseg.io.masks import SUFFIXES, pixels_of
from rayseg.io.scenes import LabelledImage
from rayseg.io.sources import crs_of
from rayseg.io.stac_write import lonlat_geometry
from rayseg.store import STORE_ERRORS, StorePath, put, upath
from rayseg.vision.color import ClassTable, hex_of

Asked = tuple[dict[str, Any], LabelledImage, Window, NDArray[np.uint8]]
"""(row of a chip, its scene, its window there, its image)."""

_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Chips to label</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;margin:2rem;color-scheme:light dark}}
.chips{{display:grid;grid-template-columns:repeat(auto-fill,minmax(180px,1fr));gap:1rem}}
figure{{margin:0}}img{{width:100%;image-rendering:pixelated}}figcaption{{font-size:.8rem;overflow-wrap:anywhere}}
li span{{display:inline-block;width:1em;height:1em;margin-right:.5em;border:1px solid #8888}}</style>
<h1>{count} chips to label</h1>
<p>Draw a mask for each image of the folder <code>images</code>: a PNG of the same name and size, in the colours below
or with their numbers as pixel values; 255 leaves a pixel open. Then: <code>rayseg labels import MASKS RUN</code>.</p>
<ul>{classes}</ul>
<div class="chips">{figures}</div>
</html>
"""


def export(folder: str, chips: Sequence[Asked], table: ClassTable) -> str:
    """Write what is needed to draw masks of chips; return the path of the page."""
    root = upath(folder)
    for row, _, _, image_HWC in chips:
        put(root / "images" / f"{row['id']}.png", _png(image_HWC))
    features = [_feature(row, one, window) for row, one, window, _ in chips]
    put(root / "chips.geojson", json.dumps({"type": "FeatureCollection", "features": features}).encode())
    asked = {row["id"]: [window.height, window.width] for row, _, window, _ in chips}
    classes = [{"value": value, "name": name, "color": hex_of(color)} for value, name, color in table.classes]
    ignore = [hex_of(color) for color in table.ignore]
    masks = {"classes": classes, "ignore": ignore, "threshold": table.threshold}
    content = {"chips": asked, "masks": masks, "rows": [row for row, *_ in chips]}
    put(root / "index.html", _page(chips, table).encode())
    put(root / "request.json", json.dumps(content).encode())
    return str(root / "index.html")


def _png(image_HWC: NDArray[np.uint8]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image_HWC).save(sink, "PNG")
    return sink.getvalue()


def _feature(row: dict[str, Any], one: LabelledImage, window: Window) -> dict[str, Any]:
    said = {key: row[key] for key in ("id", "of", "scene", "col", "row", "width", "height")}
    return {"type": "Feature", "id": row["id"], "geometry": _outline(one, window), "properties": said}


def _outline(one: LabelledImage, window: Window) -> dict[str, Any] | None:
    """The chip's outline in EPSG:4326; None where the scene lies nowhere."""
    if one.grid.crs is not None:
        return lonlat_geometry(mapping(box(*one.grid.bounds(window))), crs_of(one.grid.crs), name=one.id)[0]
    if one.image.crs is None or one.image.gcps:
        return None
    affine = Affine(*one.image.transform)
    corners = [affine @ (col, row) for col, row in ((window.col, window.row), (window.col1, window.row1))]
    (left, top), (right, bottom) = corners
    outline = mapping(box(min(left, right), min(bottom, top), max(left, right), max(bottom, top)))
    return lonlat_geometry(outline, crs_of(one.image.crs), name=one.id)[0]


def _page(chips: Sequence[Asked], table: ClassTable) -> str:
    classes = "".join(
        f'<li><span style="background:{hex_of(color)}"></span>{value} {escape(name)} {hex_of(color)}</li>'
        for value, name, color in table.classes
    )
    figures = "".join(
        f'<figure><img src="images/{row["id"]}.png" alt="" loading="lazy"><figcaption>{escape(row["id"])}</figcaption>'
        "</figure>"
        for row, *_ in chips
    )
    return _PAGE.format(count=len(chips), classes=classes, figures=figures)


def load(folder: StorePath, run: str) -> tuple[int, list[str]]:
    """Take masks back into a run, as `<run>/masks/<chip>.tif`; return how many, and which chips still wait.

    Args:
        folder: of masks, PNG or TIFF, called by their chip's id; class values, palette indices or colours.
        run: that asked for them.

    Raises:
        ConfigError: the run has asked for nothing.
        DataError: there are no masks, one is of no chip that was asked for, called as another is, of another size,
            already there with other classes, or holds a value or colour that is no class; nothing is written then.
    """
    asked = _asked(run)
    table = ClassTable.from_config(asked["masks"])
    files = sorted(path for path in upath(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise DataError(f"{folder} holds no masks, expected PNG or TIFF files called by the chips' ids; draw some")
    if unknown := [path.name for path in files if path.stem not in asked["chips"]]:
        raise DataError(
            f"{len(unknown)} masks in {folder} are of no chip that the run asked for ({', '.join(unknown[:5])}); "
            f"take them away, the ids are in {run}/to-label/chips.geojson"
        )
    if twice := [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]:
        raise DataError(f"{folder} holds several masks called {twice[0]}; leave one of each name")
    rows = {row["id"]: row for row in asked["rows"]}
    checked = {path.stem: _checked(path, asked["chips"][path.stem], table, run) for path in files}
    for chip, mask_HW in checked.items():
        _write(rows[chip], mask_HW, table, run)
    return len(checked), sorted(chip for chip in asked["chips"] if not _place(run, chip).exists())


def _asked(run: str) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((upath(run) / "to-label" / "request.json").read_bytes())
    except STORE_ERRORS:
        raise ConfigError(f"{run} has asked for no masks; give a run of al-s4gan that waits for some") from None
    return content


def _checked(path: Any, size: Sequence[int], table: ClassTable, run: str) -> NDArray[np.uint8]:  # noqa: ANN401 - a UPath
    mask_HW = read_mask(str(path), table)
    if mask_HW.shape != tuple(size):
        raise DataError(
            f"mask {path} is {mask_HW.shape[0]} x {mask_HW.shape[1]} px, its chip {size[0]} x {size[1]}; draw it anew "
            f"on {run}/to-label/images/{path.stem}.png"
        )
    if (mask_HW == NODATA).all():
        raise DataError(f"mask {path} has no labelled pixel; draw the classes that the chip shows")
    there = _place(run, path.stem)
    if there.exists() and not np.array_equal(cog.read_bands(there)[0], mask_HW):
        raise DataError(
            f"the run has another mask of {path.stem}, and has learnt from it; begin a new run to change it"
        )
    return mask_HW


def _place(run: str, chip: str) -> Any:  # noqa: ANN401 - a UPath
    return upath(run) / "masks" / f"{chip}.tif"


def _write(row: dict[str, Any], mask_HW: NDArray[np.uint8], table: ClassTable, run: str) -> None:
    one = LabelledImage.from_row(row | {"id": row["of"]})
    window = Window(row["col"], row["row"], row["width"], row["height"])
    grid = one.grid if one.grid.crs else pixels_of(one.image)
    cog.write_classes(_place(run, row["id"]), mask_HW, grid, window, table)
