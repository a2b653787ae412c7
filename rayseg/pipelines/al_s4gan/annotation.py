"""Chips that people must label: what is missing, and its export for drawing.

A run without enough labels exports the chips that need one and ends; after `rayseg labels import` it resumes.
"""

from collections.abc import Sequence

from rayseg.engine.manifest import Row
from rayseg.errors import RunIncomplete
from rayseg.io import annotation_requests
from rayseg.pipelines.al_s4gan import chip_pixels
from rayseg.store import upath
from rayseg.vision.color import ClassTable


def known_labels(root: str, rows: Sequence[Row], table: ClassTable) -> list[str]:
    """Labels of chips.

    Raises:
        RunIncomplete: some chips have none; their images are exported.
    """
    drawn = drawn_prefix(root)
    labels = [chip_pixels.label_of(row, table, drawn) for row in rows]
    # All missing labels at once: people draw in one session.
    if missing := [row for row, label in zip(rows, labels, strict=True) if not label]:
        request(root, missing, table)
    return labels


def expect_masks(root: str, rows: Sequence[Row], table: ClassTable) -> None:
    """Check that every chip has a mask, from the beginning or drawn since.

    Raises:
        RunIncomplete: some chips have none; their images are exported.
    """
    drawn = drawn_prefix(root)
    missing = [row for row in rows if row["masks"] == "[]" and not chip_pixels.drawn_path(drawn, row["id"]).exists()]
    if missing:
        request(root, missing, table)


def drawn_prefix(root: str) -> str:
    """Folder of a run for masks that people drew."""
    return str(upath(root) / "masks")


def request(root: str, rows: Sequence[Row], table: ClassTable) -> None:
    """Export chips for drawing and end the run.

    Raises:
        RunIncomplete: always; the message names the export and the way to import masks.
    """
    # With their place, so that the masks can be drawn in a GIS too.
    images = [(row, *chip_pixels.placed(row), chip_pixels.image_of(row)) for row in rows]
    page = annotation_requests.export(f"{root}/to-label", images, table)
    raise RunIncomplete(
        f"{len(rows)} chips need masks, see {page}; draw them, then: rayseg labels import MASKS {root}, and run the "
        "same command again to resume"
    )
