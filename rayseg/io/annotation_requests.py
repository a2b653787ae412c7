"""Annotation requests: export chips that need a mask, import the finished masks.

<folder>/chips.geojson     outlines of the chips, EPSG:4326; a chip without georeference has no geometry
<folder>/images/<id>.png   images to draw masks on
<folder>/index.html        all images on one page, with the classes and their colours
<folder>/request.json      ids, sizes and classes for checking the masks
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

from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo.grid import NODATA, Window
from rayseg.io import cog
from rayseg.io.labels import read_mask
from rayseg.io.masks import SUFFIXES, WHITE, only_0_and_255, pixels_of
from rayseg.io.scenes import LabelledImage
from rayseg.io.sources import crs_of, source_of_file
from rayseg.io.stac_write import lonlat_geometry
from rayseg.store import STORE_ERRORS, StorePath, put, upath
from rayseg.vision.color import ClassTable, hex_of

Request = tuple[dict[str, Any], LabelledImage, Window, NDArray[np.uint8]]
"""(row of a chip, its scene, its window in the scene, its image)."""

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


def export(folder: str, chips: Sequence[Request], table: ClassTable) -> str:
    """Write the images, outlines, page and request of chips that need a mask; return the path of the page."""
    root = upath(folder)
    for row, _, _, image_HWC in chips:
        sink = io.BytesIO()
        Image.fromarray(image_HWC).save(sink, "PNG")
        put(root / "images" / f"{row['id']}.png", sink.getvalue())
    keys = ("id", "of", "scene", "col", "row", "width", "height")
    features = [
        {
            "type": "Feature",
            "id": row["id"],
            "geometry": _outline(scene, window),
            "properties": {key: row[key] for key in keys},
        }
        for row, scene, window, _ in chips
    ]
    put(root / "chips.geojson", json.dumps({"type": "FeatureCollection", "features": features}).encode())
    sizes = {row["id"]: [window.height, window.width] for row, _, window, _ in chips}
    rows = zip(table.in_masks, table.names, table.colors, strict=True)
    classes = [{"value": value, "name": name, "color": hex_of(color)} for value, name, color in rows]
    ignore = [*map(hex_of, table.ignore), *table.unlabelled]
    masks = {"classes": classes, "ignore": ignore, "threshold": table.threshold}
    content = {"chips": sizes, "masks": masks, "rows": [row for row, *_ in chips]}
    put(root / "index.html", _page([row["id"] for row, *_ in chips], table).encode())
    # Written last: `load` needs it, so it refuses a partial export.
    put(root / "request.json", json.dumps(content).encode())
    return str(root / "index.html")


def _outline(scene: LabelledImage, window: Window) -> dict[str, Any] | None:
    """A window's outline in EPSG:4326; None for a scene without georeference."""
    if scene.grid.crs is not None:
        return lonlat_geometry(mapping(box(*scene.grid.bounds(window))), crs_of(scene.grid.crs), name=scene.id)[0]
    if scene.image.crs is None or scene.image.gcps:
        return None
    # The mask is in pixels, but its image has a place.
    affine = Affine(*scene.image.transform)
    corners = [affine @ (col, row) for col, row in ((window.col, window.row), (window.col1, window.row1))]
    (left, top), (right, bottom) = corners
    outline = mapping(box(min(left, right), min(bottom, top), max(left, right), max(bottom, top)))
    return lonlat_geometry(outline, crs_of(scene.image.crs), name=scene.id)[0]


def _page(ids: Sequence[str], table: ClassTable) -> str:
    classes = "".join(
        f'<li><span style="background:{hex_of(color)}"></span>{value} {escape(name)} {hex_of(color)}</li>'
        for value, name, color in zip(table.in_masks, table.names, table.colors, strict=True)
    )
    figures = "".join(
        f'<figure><img src="images/{name}.png" alt="" loading="lazy"><figcaption>{escape(name)}</figcaption></figure>'
        for name in ids
    )
    return _PAGE.format(count=len(ids), classes=classes, figures=figures)


def load(folder: StorePath, run: str) -> tuple[int, list[str]]:
    """Import masks into a run, as `<run>/masks/<chip>.tif`; return their number, and the chips still without a mask.

    Args:
        folder: folder of masks, PNG or TIFF, named by their chip's id; class values, palette indices or colours.
        run: the run that requested them.

    Raises:
        ConfigError: the run has requested no masks.
        DataError: there are no masks; or a mask belongs to no requested chip, shares its name with another, differs in
            size from its chip or from the mask already imported, or has a value or colour that is not a class; nothing
            is written then.
    """
    try:
        request = json.loads((upath(run) / "to-label" / "request.json").read_bytes())
    except STORE_ERRORS:
        raise ConfigError(f"{run} has requested no masks; give a run of al-s4gan that waits for masks") from None
    table = ClassTable.from_config(request["masks"])
    files = sorted(path for path in upath(folder).iterdir() if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    if not files:
        raise DataError(f"{folder} holds no masks, expected PNG or TIFF files named by the chips' ids; draw some")
    if unknown := [path.name for path in files if path.stem not in request["chips"]]:
        raise DataError(
            f"{len(unknown)} masks in {folder} belong to no chip that the run requested ({listed(unknown)}); "
            f"remove them; the ids are in {run}/to-label/chips.geojson"
        )
    if twice := [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]:
        raise DataError(f"{folder} holds several masks named {twice[0]}; keep one of each name")
    # all masks are checked before the first is written
    rows = {row["id"]: row for row in request["rows"]}
    checked = {path.stem: _checked(path, request["chips"][path.stem], table, run) for path in files}
    if WHITE not in table.ignore and only_0_and_255([source_of_file(str(path), path.stem) for path in files]):
        known = ", ".join(f"{value} {name}" for value, name in zip(table.in_masks, table.names, strict=True))
        raise DataError(
            f"the masks in {folder} hold only 0 and 255, which leaves pixels open; use the values or colours of the "
            f"classes ({known}), or import them together with a mask that has another class"
        )
    for chip, mask_HW in checked.items():
        row = rows[chip]
        scene = LabelledImage.from_row(row | {"id": row["of"]})
        # Masks of scenes without georeference are stored in pixels of the image.
        grid = scene.grid if scene.grid.crs else pixels_of(scene.image)
        window = Window(row["col"], row["row"], row["width"], row["height"])
        cog.write_classes(_place(run, chip), mask_HW, grid, window, table)
    return len(checked), sorted(chip for chip in request["chips"] if not _place(run, chip).exists())


def _checked(path: Any, size: Sequence[int], table: ClassTable, run: str) -> NDArray[np.uint8]:  # noqa: ANN401 - a UPath
    mask_HW = read_mask(str(path), table)
    if mask_HW.shape != tuple(size):
        raise DataError(
            f"mask {path} is {mask_HW.shape[0]} x {mask_HW.shape[1]} px, its chip {size[0]} x {size[1]}; draw it "
            f"again on {run}/to-label/images/{path.stem}.png"
        )
    if (mask_HW == NODATA).all():
        raise DataError(f"mask {path} has no labelled pixel; draw the classes that the chip shows")
    existing = _place(run, path.stem)
    # The same mask may be imported again, so that an interrupted import can be repeated.
    if existing.exists() and not np.array_equal(cog.read_bands(existing)[0], mask_HW):
        raise DataError(f"the run has another mask of {path.stem} and was trained on it; start a new run to change it")
    return mask_HW


def _place(run: str, chip: str) -> Any:  # noqa: ANN401 - a UPath
    return upath(run) / "masks" / f"{chip}.tif"
