"""Name unsupervised labels: write a class map from a run and a table of labels and classes filled in by hand."""

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from rayseg.engine.run import read
from rayseg.errors import DataError, listed
from rayseg.geo.grid import NODATA
from rayseg.io import cog, masks, stac_write
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.store import StorePath, upath
from rayseg.vision.color import ClassTable, label_table, rgb_of

Key = tuple[str, int]  # scene ("" for every scene), label
Assigned = dict[Key, str]


def assign(run: str, table: str, out: str) -> dict[str, Any]:
    """Write the class map of a run of unnamed labels as a catalogue whose masks training and evaluation read.

    Args:
        run: a run with label maps in `tiles/`.
        table: CSV file with the columns `label` and `class`, and `scene` if labels differ by scene (unless the run is
            `shared`); `color` (#RRGGBB) is optional. Labels that it lacks become 255, "not labelled".
        out: folder of `catalog.json` and its collection `classes`.

    Returns:
        `catalog`; `tiles`; `classes`: name -> pixels; `unassigned`: pixels of labels that the table lacks; `areas` and
        `unassigned_m2`: the same in square metres on the ground, where ground under several scenes counts once; None
        if an image has no CRS.

    Raises:
        DataError: the run maps named classes, or nothing; the table cannot be read, lacks a column, has an unknown
            scene or label, or gives a label two classes.
    """
    tiles = mapped_tiles(run)
    labels = _labels_of(tiles, run)
    assigned, classes = read_table(table)
    _expect_known(assigned, tiles, labels, run)
    folder, pixels, items = upath(out) / "classes", dict.fromkeys(classes.names, 0), []
    unassigned, values = 0, dict(zip(classes.names, classes.values, strict=True))
    ground: dict[int, float] | None = dict.fromkeys((*classes.values, NODATA), 0.0)  # 255: of labels without a class
    for tile in tiles:
        # One look-up by value for all pixels of a tile; labels that the table lacks stay 255.
        lookup = np.full(256, NODATA, np.uint8)
        for (scene, label), name in sorted(assigned.items()):  # rows of a scene come after rows of all scenes
            if scene in {"", tile.tile.grid.image or ""}:
                lookup[label] = values[name]
        labels_HW = masks.pieces_of_tiles([tile])[0].read(label_table(NODATA - 1))
        classes_HW = lookup[labels_HW]
        written = cog.write_classes(
            folder / tile.tile.id / "classes.tif", classes_HW, tile.tile.grid, tile.tile.window, classes
        )
        for value, name, _ in classes.classes:
            pixels[name] += int((classes_HW == value).sum())
        unassigned += int(((classes_HW == NODATA) & (labels_HW != NODATA)).sum())
        areas = tile.areas  # as the report has them: pixels of two scenes differ in size
        if ground is not None and areas is not None:
            for label, square_metres in areas.items():
                ground[int(lookup[label])] += square_metres
        else:
            ground = None
        item = stac_write.item_of(
            tile.tile.id, tile.tile.grid, tile.tile.window,
            folder=folder / tile.tile.id, files=[written], sources=tile.sources, table=classes,
        )  # fmt: skip
        # Relative, so that the catalogue can be moved.
        item.assets["classes"].href = f"./{tile.tile.id}/classes.tif"
        items.append(item)
    titles = {"classes": f"Classes given to the labels of {run}"}
    catalogue = stac_write.write_catalog(out, {"classes": items}, titles=titles)
    return {
        "catalog": catalogue,
        "tiles": len(tiles),
        "classes": pixels,
        "unassigned": unassigned,
        "areas": ground and {name: ground[value] for name, value in values.items()},
        "unassigned_m2": ground and ground[NODATA],
    }


def read_table(path: StorePath) -> tuple[Assigned, ClassTable]:
    """Read a CSV file: (class of every label, the classes in order of first occurrence)."""
    try:
        content = upath(path).read_text(encoding="utf-8-sig")  # as spreadsheets write it
        rows = list(csv.DictReader(io.StringIO(content), skipinitialspace=True))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"label table {path} cannot be read: {error}; give a CSV file with the columns label and class"
        ) from None
    if not rows or not {"label", "class"} <= set(rows[0]):
        has = ", ".join(name for name in rows[0] if name) if rows else "no rows"
        raise DataError(f"label table {path} has {has}, expected the columns label and class; add them")
    assigned: Assigned = {}
    colors: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        text, name = (row["label"] or "").strip().removeprefix("label").strip(), (row["class"] or "").strip()
        if not text.isdigit() or int(text) >= NODATA:
            raise DataError(
                f"label table {path} line {number} has the label {row['label']!r}, expected a number from 0 to "
                f"{NODATA - 1}; correct it"
            )
        key = ((row.get("scene") or "").strip(), int(text))
        # A repeated row is allowed as long as it has the same class.
        if not name or assigned.get(key, name) != name:
            raise DataError(
                f"label table {path} line {number} gives label {key[1]} the class {name!r}, expected one class; "
                "correct it"
            )
        assigned[key] = name
        colors[name] = colors.get(name) or (row.get("color") or "").strip()
    # Classes without a colour get the one of the label with their number.
    own = label_table(len(colors)).colors
    table = tuple((k, name, rgb_of(text) if text else own[k]) for k, (name, text) in enumerate(colors.items()))
    return assigned, ClassTable(table)


def _labels_of(tiles: Sequence[MappedTile], run: str) -> set[int]:
    """The labels that a run's maps may hold."""
    table = masks.table_of(tiles[0].href) if tiles else None
    if table is None:
        raise DataError(f"run {run} has no labelled tile; let it map at least one, or give another run")
    # Maps of named classes need no names.
    if table.names != label_table(len(table.names)).names:
        raise DataError(
            f"run {run} maps {listed(table.names)}, expected unnamed labels; give a run of the pipeline superpixel"
        )
    return set(table.values)


def _expect_known(assigned: Assigned, tiles: Sequence[MappedTile], labels: set[int], run: str) -> None:
    scenes = {tile.tile.grid.image or "" for tile in tiles}
    for scene, label in assigned:
        if scene and scene not in scenes:
            raise DataError(
                f"the table has the scene {scene!r}, run {run} has {listed(sorted(scenes))}; correct the table"
            )
        if label not in labels:
            raise DataError(
                f"the table has the label {label}, run {run} has 0 to {max(labels, default=0)}; correct the table"
            )
    # Label 3 of one scene is not label 3 of another, unless one network maps all scenes.
    apart = len(scenes) > 1 and not read(run)["config"]["shared"]
    if apart and not all(scene for scene, _ in assigned):
        raise DataError(
            f"the {len(scenes)} scenes of {run} have labels of their own, the table has rows without scene; fill in "
            "the column scene, or map with --set shared=true"
        )
