"""Labels without a meaning given one by a person: a class map from a run and a table of labels and classes."""

import csv
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from rayseg.engine.run import read
from rayseg.errors import DataError
from rayseg.geo.grid import NODATA
from rayseg.io import cog, masks, stac_write
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.store import StorePath, upath
from rayseg.vision.color import ClassTable, label_table, rgb_of

Key = tuple[str, int]  # scene ("" for every scene), label
Assigned = dict[Key, str]


def assign(run: str, table: str, out: str) -> dict[str, Any]:
    """Write the class map of a run of labels as a catalogue whose masks training and evaluation read.

    Args:
        run: with label maps in `tiles/`.
        table: CSV file with the columns `label` and `class`, and if labels differ by scene (unless the run is `shared`)
            `scene`; `color` (#RRGGBB)
            may give a class its colour. Labels that are not in it become 255, "not labelled".
        out: where `catalog.json` and its collection `classes` go.

    Returns:
        `catalog`; `tiles`; `classes`: name -> pixels; `unassigned`: pixels of labels that are not in the table.

    Raises:
        DataError: the run maps classes that have names, or nothing; the table cannot be read, has no such columns,
            names a scene or label that is not there, or gives a label two classes.
    """
    tiles = mapped_tiles(run)
    labels = _labels_of(tiles, run)
    assigned, classes = read_table(table)
    _expect_known(assigned, tiles, labels, run)
    folder, pixels, found = upath(out) / "classes", dict.fromkeys(classes.names, 0), []
    unassigned = 0
    for tile in tiles:
        lookup = _lookup(assigned, classes, tile.tile.grid.image or "")
        labels_HW = masks.pieces_of_tiles([tile])[0].read(label_table(NODATA - 1))
        classes_HW = lookup[labels_HW]
        written = cog.write_classes(
            folder / tile.tile.id / "classes.tif", classes_HW, tile.tile.grid, tile.tile.window, classes
        )
        for value, name, _ in classes.classes:
            pixels[name] += int((classes_HW == value).sum())
        unassigned += int(((classes_HW == NODATA) & (labels_HW != NODATA)).sum())
        item = stac_write.item_of(
            tile.tile.id, tile.tile.grid, tile.tile.window,
            folder=folder / tile.tile.id, files=[written], sources=tile.sources, table=classes,
        )  # fmt: skip
        item.assets["classes"].href = f"./{tile.tile.id}/classes.tif"
        found.append(item)
    catalogue = stac_write.write_catalog(
        out, {"classes": found}, titles={"classes": f"Classes given to the labels of {run}"}
    )
    return {"catalog": catalogue, "tiles": len(tiles), "classes": pixels, "unassigned": unassigned}


def read_table(path: StorePath) -> tuple[Assigned, ClassTable]:
    """(class of every label, the classes in the order in which they first occur) of a CSV file."""
    try:
        rows = list(csv.DictReader(io.StringIO(upath(path).read_text())))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"label table {path} cannot be read: {error}; give a CSV file with label,class") from None
    if not rows or not {"label", "class"} <= set(rows[0]):
        has = ", ".join(name for name in rows[0] if name) if rows else "no rows"
        raise DataError(f"label table {path} has {has}, expected the columns label and class: add them")
    assigned: Assigned = {}
    colors: dict[str, str] = {}
    for number, row in enumerate(rows, 2):
        key, name = _key(row, f"{path} line {number}"), (row["class"] or "").strip()
        if not name or assigned.get(key, name) != name:
            raise DataError(
                f"label table {path} line {number} gives label {key[1]} the class {name!r}, expected one class"
            )
        assigned[key] = name
        colors[name] = colors.get(name) or (row.get("color") or "").strip()
    own = label_table(len(colors)).colors
    table = tuple((k, name, rgb_of(text) if text else own[k]) for k, (name, text) in enumerate(colors.items()))
    return assigned, ClassTable(table)


def _key(row: Mapping[str, Any], where: str) -> Key:
    text = (row["label"] or "").strip().removeprefix("label").strip()
    if not text.isdigit() or int(text) >= NODATA:
        raise DataError(f"{where} has the label {row['label']!r}, expected a number from 0 to {NODATA - 1}: correct it")
    return (row.get("scene") or "").strip(), int(text)


def _lookup(assigned: Assigned, table: ClassTable, scene: str) -> np.ndarray:
    """Class value of every label, (256,) uint8; what is said of the scene goes before what is said of all scenes."""
    values = dict(zip(table.names, table.values, strict=True))
    lookup = np.full(256, NODATA, np.uint8)
    for (named, label), name in sorted(assigned.items()):
        if named in {"", scene}:
            lookup[label] = values[name]
    return lookup


def _labels_of(tiles: list[MappedTile], run: str) -> set[int]:
    """The labels that a run's maps may hold."""
    table = masks.table_of(tiles[0].href) if tiles else None
    if table is None:
        raise DataError(f"run {run} has no tile with a label: let it get that far, or give another run")
    if table.names != label_table(len(table.names)).names:
        raise DataError(
            f"run {run} maps {', '.join(table.names[:5])}, expected labels without a meaning: "
            "give a run of the pipeline superpixel"
        )
    return set(table.values)


def _expect_known(assigned: Assigned, tiles: list[MappedTile], labels: set[int], run: str) -> None:
    scenes = {tile.tile.grid.image or "" for tile in tiles}
    for scene, label in assigned:
        if scene and scene not in scenes:
            raise DataError(
                f"run {run} has no scene {scene!r}, it has {', '.join(sorted(scenes)[:5])}: correct the table"
            )
        if label not in labels:
            raise DataError(
                f"run {run} has no label {label}, its labels are 0 to {max(labels, default=0)}: correct the table"
            )
    apart = len(scenes) > 1 and not read(run)["config"]["shared"]
    if apart and not all(scene for scene, _ in assigned):
        raise DataError(
            f"labels of {run} mean something else in each of its {len(scenes)} scenes, the table has rows without "
            "scene: add the column scene, or map with --set shared=true"
        )
