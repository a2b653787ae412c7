"""Class masks from folders, catalogues and the tiles of runs, read on any window.

Masks are read as class values of one table, uint8 with 255 for "no data" or "not labelled".
"""

import json
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import product
from typing import Any

import numpy as np
import pystac
from numpy.typing import NDArray
from upath import UPath

from rayseg.errors import DataError
from rayseg.geo.grid import NODATA, Grid, Tile, Window, slug
from rayseg.geo.lonlat import turn_of
from rayseg.io import drivers, stac_read
from rayseg.io.maps import MappedTile
from rayseg.io.output_grids import footprint, grids_of
from rayseg.io.rasters import read, source_of_file
from rayseg.io.remote import patient
from rayseg.io.sources import NO_NODATA, Source, from_json, gdal, open_file, part_of_image
from rayseg.io.stac_write import IMAGE
from rayseg.store import split_location, suffix_of, upath
from rayseg.vision.color import RGB, ClassTable, decode

_log = logging.getLogger(__name__)
BLOCK = 2048
BLACK, WHITE = (0, 0, 0), (255, 255, 255)
SUFFIXES = (".png", ".tif", ".tiff")
FULL_SCORE = 254
"""Stored score of the probability 1."""


@dataclass(frozen=True)
class Piece:
    """A part of a class map that is compared at once: a tile of a run, a block of a georeferenced mask, or an image.

    Attributes:
        tile: its window of a grid; without CRS of the pixels of `image`.
        source: the file with its classes; without CRS the file holds the tile's window only.
        image: name by which a mask without georeference is matched.
        size: (height, width) of the whole image or file; None if the file is a part of an image of unknown size.
    """

    tile: Tile
    source: Source
    image: str
    size: tuple[int, int] | None

    def read(self, table: ClassTable) -> NDArray[np.uint8]:
        """Its classes, (height, width) of the tile's window."""
        tile = self.tile
        if tile.grid.crs is not None:
            return read_classes([self.source], tile.grid, tile.window, table)
        pixels = pixels_of(self.source)
        return read_classes([self.source], pixels, footprint(self.source, pixels), table)


def pieces_of_tiles(tiles: Sequence[MappedTile]) -> list[Piece]:
    """The mapped tiles of a run as pieces."""
    pieces = []
    for mapped in tiles:
        tile, window = mapped.tile, mapped.tile.window
        affine, assets = tuple(tile.grid.transform(window))[:6], ((mapped.href, ("class",)),)
        source = Source(tile.id, assets, tile.grid.crs, affine, window.height, window.width, "uint8", NODATA)
        whole = mapped.sources[0] if tile.grid.crs is None else source
        pieces.append(Piece(tile, source, tile.grid.image or tile.id, (whole.height, whole.width)))
    return pieces


def piece_of_row(row: Mapping[str, Any]) -> Piece:
    """The piece of a tile that is not mapped yet; `source` is its imagery."""
    tile = Tile.from_row(row)
    sources = from_json(row["sources"])
    alone = tile.grid.crs is None
    size = (sources[0].height, sources[0].width) if alone else (tile.window.height, tile.window.width)
    return Piece(tile, sources[0], tile.grid.image or tile.id, size)


def pieces_of_masks(masks: Sequence[Source], *, placed: bool) -> list[Piece]:
    """Each mask as one piece; if `placed` and georeferenced, in blocks of `BLOCK` px of its grid."""
    return [piece for mask in masks for piece in _pieces_of(mask, placed=placed)]


def _pieces_of(mask: Source, *, placed: bool) -> list[Piece]:
    size = (mask.height, mask.width)
    if mask.crs is None or not placed:
        part, window = part_of_image(mask), footprint(mask, pixels_of(mask))
        name = f"{mask.item_id}_{window.col}_{window.row}" if part else mask.item_id
        return [Piece(Tile(name, pixels_of(mask), window), mask, mask.item_id, None if part else size)]
    # Blocks lie on multiples of `BLOCK` of the grid, so masks of one grid have the same blocks.
    [(grid, _)] = grids_of([mask])
    extent = footprint(mask, grid)
    blocks = [
        Window(col * BLOCK, row * BLOCK, BLOCK, BLOCK).intersect(extent)
        for row in range(extent.row // BLOCK, -(-extent.row1 // BLOCK))
        for col in range(extent.col // BLOCK, -(-extent.col1 // BLOCK))
    ]
    names = [f"{mask.item_id}_{block.col // BLOCK}_{block.row // BLOCK}" for block in blocks]
    named = zip(names if len(blocks) > 1 else [mask.item_id], blocks, strict=True)
    return [Piece(Tile(name, grid, block), mask, mask.item_id, size) for name, block in named]


def pixels_of(mask: Source) -> Grid:
    """The grid of a file's own pixels, regardless of its georeference."""
    return Grid(None, (1.0, 1.0), (0.0, 0.0), mask.item_id)


def expect_fit(mask: Source, size: tuple[int, int], image: str) -> None:
    """Refuse a mask that is not of its image's size (height, width), or a part of a mask that reaches beyond it."""
    at = part_of_image(mask)
    height, width = (mask.height, mask.width) if at is None else (at[1] + mask.height, at[0] + mask.width)
    if (height, width) != size and (at is None or height > size[0] or width > size[1]):
        reaches = "reaches" if at else "has"
        raise DataError(
            f"image {image} has {size[0]} x {size[1]} px, its mask {mask.assets[0][0]} {reaches} {height} x {width} "
            "px; give both the same size"
        )


def by_image(masks: Sequence[Source]) -> dict[str, tuple[Source, ...]]:
    """Name of an image (as in ids) -> its masks; several are parts of one.

    Raises:
        DataError: two whole masks have one name.
    """
    groups: dict[str, list[Source]] = {}
    for mask in masks:
        groups.setdefault(slug(mask.item_id), []).append(mask)
    for name, group in groups.items():
        if len(group) > 1 and not all(map(part_of_image, group)):
            hrefs = " and ".join(mask.assets[0][0] for mask in group[:2])
            raise DataError(f"{hrefs} are both masks of the image {name}; keep one of them")
    return {name: tuple(group) for name, group in groups.items()}


def masks_of(
    location: str, *, names: Sequence[str] = (), failed: dict[str, str] | None = None, min_score: float = 0.0
) -> list[Source]:
    """The masks in a folder (PNG or TIFF, called by their stem) or in `catalog.json#collection` (by their item's id).

    Of an item with several rasters it is the one called `classes`, else the one whose stored class names fit `names`;
    `catalog.json#collection/asset` names the asset. Masks that cannot be opened are added to `failed` with their
    errors, if it is given and others can be opened.
    With `min_score` the masks are the map of a run: pixels whose class has a lower score there are not labelled.

    Raises:
        DataError: there are no masks, one cannot be opened, an item has several rasters that could be the mask, or
            `min_score` is given and a mask has no scores.
    """
    uri, fragment = split_location(location)
    collection, _, asset = fragment.partition("/")
    if suffix_of(uri) in {".json", ".parquet"}:
        items = stac_read.open_items(uri, collection or None)
        openers: dict[str, Callable[[], Source | None]] = {
            item.id: partial(_mask_of, item, asset, set(names), min_score) for item in items
        }
    elif min_score:
        raise DataError(f"{location} has no scores, but min_score is {min_score:g}; give RUN#classes, or leave it out")
    else:
        openers = {str(path): partial(source_of_file, str(path), path.stem) for path in _mask_files(location)}
    # All masks are tried, so that `failed` names every one that cannot be opened.
    masks, errors = [], dict[str, DataError]()
    for name, opened in openers.items():
        try:
            masks.append(opened())
        except DataError as error:
            errors[name] = error
    kept = [mask for mask in masks if mask]
    if errors and (failed is None or not kept):
        raise next(iter(errors.values()))
    if failed is not None:
        failed |= {name: str(error) for name, error in errors.items()}
    if not kept:
        raster = f"raster {asset}" if asset else "raster"
        raise DataError(f"{uri}#{collection} holds no item with a {raster}, expected masks; correct it")
    return kept


def _mask_files(location: str) -> list[UPath]:
    folder = upath(location)
    entries = drivers.files_in(folder) if folder.is_dir() else []
    files = [path for path in entries if path.suffix.lower() in SUFFIXES]
    kinds = ", ".join(suffix.lstrip(".") for suffix in SUFFIXES)
    if not files:
        drawn = folder.is_dir() and any(path.suffix.lower() == ".json" for path in entries)
        first = f"draw its JSONs into masks (`rayseg labels masks {location} IMAGES --out MASKS`)" if drawn else ""
        give = f"give a folder of {kinds} files, or catalog.json#collection"
        raise DataError(f"{location} holds no masks; {first or give}")
    if twice := [stem for stem, count in Counter(path.stem for path in files).items() if count > 1]:
        raise DataError(f"{location} holds several masks called {twice[0]}; leave one of each name")
    drivers.warn_of_rest(folder, entries, files, f"masks are {kinds}")
    return files


def _mask_of(item: pystac.Item, asset: str, names: set[str], min_score: float) -> Source | None:
    """The item's mask; None when it has no raster (of that name)."""
    if reason := item.properties.get(stac_read.BROKEN):
        raise DataError(f"{reason}.")
    hrefs = {
        key: stac_read.href_of(item, value)
        for key, value in item.assets.items()
        if drivers.kind_of(value.href) and (not asset or key == asset)
    }
    if "classes" in hrefs:
        hrefs = {"classes": hrefs["classes"]}
    if len(hrefs) > 1:
        # Of several rasters the one is meant whose own class names are those that are wanted.
        stored = {key: set(table.names) for key, href in hrefs.items() if (table := table_of(href))}
        fitting = {key for key, own in stored.items() if names and (own <= names or names <= own)}
        hrefs = {key: href for key, href in hrefs.items() if key in fitting} if len(fitting) == 1 else hrefs
    if len(hrefs) > 1:
        raise DataError(f"item {item.id} has the rasters {', '.join(sorted(hrefs))}; choose one with #collection/asset")
    if not hrefs:
        return None
    [(key, href), *_] = hrefs.items()
    mask = replace(source_of_file(href, str(item.properties.get(IMAGE, item.id))), datetime=stac_read.time_of(item))
    if min_score:
        if "scores" not in item.assets:
            raise DataError(
                f"item {item.id} has no scores, but min_score is {min_score:g}; give RUN#classes, or leave it out"
            )
        mask = replace(mask, sure=(stac_read.href_of(item, item.assets["scores"]), min_score))
    nodatas = {*stac_read.nodatas_of(item, item.assets[key], len(mask.bands))} - {None}
    return replace(mask, nodata=nodatas.pop(), nodatas=()) if len(nodatas) == 1 else mask


def whole(masks: Sequence[Source], *, failed: dict[str, str]) -> list[Source]:
    """The masks whose pixels can all be read; the others are added to `failed` with their errors.

    Raises:
        DataError: none can be read.
    """
    for mask in masks:
        extent, bands = footprint(mask, pixels_of(mask)), [name for name in mask.bands if name != "alpha"]
        try:
            for row in range(extent.row, extent.row1, BLOCK):
                part = Window(extent.col, row, extent.width, BLOCK).intersect(extent)
                read([mask], pixels_of(mask), part, bands=bands, categorical=True)
        except DataError as error:
            failed[mask.assets[0][0]] = str(error)
    return _readable(masks, failed)


def two_classes(
    masks: Sequence[Source], table: ClassTable | None, where: str, *, failed: dict[str, str] | None = None
) -> list[Source]:
    """Read 255 as the second class where the only values of the masks are 0 and 255, with a warning.

    Masks with palettes, colours or stored class names are left as they are, and so are all masks if `table` ignores
    white (#FFFFFF) or has not two classes. A file's nodata that is a class of the table is read as this class.

    Args:
        masks: all masks of a location; one alone may lack a class.
        table: the classes; None if any values may occur.
        where: the location, for the warning.
        failed: if given, masks that cannot be read are left out and added with their errors, if others can be.

    Raises:
        DataError: the nodata of a mask of colours occurs in the colour of a class, a mask cannot be read, or some masks
            hold only 0 and 255, others class values.
    """
    masks = _with_all_classes(masks, table, where) if table else masks
    if table is not None and WHITE in table.ignore:
        return list(masks)
    if not only_0_and_255(masks, failed=failed):
        if table is not None and len(table.classes) == 2:
            _expect_one_kind(masks, where, failed)
        return _readable(masks, failed)
    masks = _readable(masks, failed)
    if table is not None and len(table.classes) != 2:
        _log.warning("the masks in %s hold only 0 and 255: 255 is read as not labelled; use class values", where)
        return list(masks)
    # Black and white are the classes' own colours in some tables, whatever their order.
    rows = table.classes if table else ((0, "0", BLACK), (1, "255", WHITE))
    stored = dict(zip(rows, table.in_masks if table else (0, 1), strict=True))
    low, high = sorted(rows, key=lambda row: row[2] == WHITE) if {row[2] for row in rows} == {BLACK, WHITE} else rows
    remedy = "add ignore: ['#FFFFFF'] to the class table" if table else "name it under unlabelled"
    _log.warning(
        "the masks in %s hold only 0 and 255: 0 is read as %s, 255 as %s; if 255 means not labelled, %s",
        *(where, low[1], high[1], remedy),
    )
    # A linear change of the values, as of units: 0 becomes the first class, 255 the second.
    change = (((stored[high] - stored[low]) / NODATA, float(stored[low])),)
    return [replace(mask, change=change * len(mask.bands)) if _is_plain(mask) else mask for mask in masks]


def _with_all_classes(masks: Sequence[Source], table: ClassTable, where: str) -> list[Source]:
    """The masks, without a nodata value that is a class, which `gdal_rasterize` declares; with a warning."""
    named = [_class_of_nodata(mask, table) for mask in masks]
    changed = [(mask.assets[0][0], name) for mask, name in zip(masks, named, strict=True) if name]
    if changed:
        _log.warning(
            "%d of %d masks in %s declare the value of a class as nodata (%s: %s): these pixels are read as this "
            "class; if they are not labelled, give them a value that is not a class",
            *(len(changed), len(masks), where, *changed[0]),
        )
    pairs = zip(masks, named, strict=True)
    return [replace(mask, nodata=NO_NODATA, nodatas=()) if name else mask for mask, name in pairs]


def _class_of_nodata(mask: Source, table: ClassTable) -> str:
    """Name of the class whose value is the mask's nodata; "" if there is none."""
    href, count = mask.assets[0][0], len([name for name in mask.bands if name != "alpha"])
    nodatas = {value for value in (*mask.nodatas, mask.nodata) if value is not None and value != NO_NODATA}
    if not nodatas:
        return ""
    palette = _palette_of(href) or {}
    for value, name, color in zip(table.in_masks, table.names, table.colors, strict=True):
        # a band that is nodata reads 0 where others are valid, so only black is lost to nodata 0
        lost = {value for value in nodatas if value in color and (value or color == BLACK)}
        if count > 1 and lost:
            raise DataError(
                f"mask {href} has nodata {lost.pop():g}, which is in the colour {color} of {name}, expected none or "
                "another; remove it (gdal_edit.py -unsetnodata)"
            )
        if count == 1 and (any(palette.get(int(at)) == color for at in nodatas) if palette else value in nodatas):
            return name
    return ""


def _is_plain(mask: Source) -> bool:
    """Whether a mask has one band of whole numbers without a palette or stored class names."""
    bands = [name for name in mask.bands if name != "alpha"]
    return len(bands) == 1 and np.dtype(mask.dtype).kind in "ui" and _legend(mask.assets[0][0]) == ({}, None)


def _readable(masks: Sequence[Source], failed: Mapping[str, str] | None) -> list[Source]:
    """The masks that have not failed.

    Raises:
        DataError: all have.
    """
    kept = [mask for mask in masks if mask.assets[0][0] not in (failed or {})]
    if masks and not kept:
        raise DataError((failed or {})[masks[0].assets[0][0]])
    return kept


def only_0_and_255(masks: Sequence[Source], *, failed: dict[str, str] | None = None) -> bool:
    """Whether both values and no others occur in the masks of one band; reading ends at the first other value.

    Args:
        masks: the masks.
        failed: if given, a mask that cannot be read is added with its error and counts for nothing.

    Raises:
        DataError: a mask cannot be read.
    """
    seen: set[int] = set()
    for mask in filter(_is_plain, masks):
        seen |= _values_of(mask, failed)
        if not seen <= {0, NODATA}:
            return False
    return seen == {0, NODATA}


def _values_of(mask: Source, failed: dict[str, str] | None) -> set[int]:
    """The values of a mask of one band; reading ends at the block with the first value that is not 0 or 255."""
    # In blocks, as one mask can be larger than memory.
    names, whole = [name for name in mask.bands if name != "alpha"], footprint(mask, pixels_of(mask))
    seen: set[int] = set()
    for row in range(whole.row, whole.row1, BLOCK):
        part = Window(whole.col, row, mask.width, BLOCK).intersect(whole)
        try:
            image_CHW, valid_HW = read([mask], pixels_of(mask), part, bands=names, categorical=True)
        except DataError as error:
            if failed is None:
                raise
            failed[mask.assets[0][0]] = str(error)
            return set()
        seen |= set(np.unique(image_CHW[0][valid_HW]).tolist())
        if not seen <= {0, NODATA}:
            break
    return seen


def _expect_one_kind(masks: Sequence[Source], where: str, failed: dict[str, str] | None) -> None:
    """Refuse a location in which some masks hold only 0 and 255, and others class values without 255.

    A mask with 255 and class values shows that 255 means "not labelled" there. A warning names a location that holds
    only 0 because its other value, 255, is declared as nodata.

    Raises:
        DataError: two such masks, with the remedy.
    """
    of_255, of_values = "", ""
    every: set[int] = set()
    for mask in filter(_is_plain, masks):
        # 255 next to class values settles it for the whole location.
        every |= (seen := _values_of(mask, failed))
        if NODATA in seen and not seen <= {0, NODATA}:
            return
        if NODATA in seen:
            of_255 = of_255 or mask.assets[0][0]
        elif not seen <= {0}:
            of_values = of_values or mask.assets[0][0]
    if of_255 and of_values:
        raise DataError(
            f"{where} mixes two kinds of masks: {of_255} has only 0 and 255, {of_values} has class values, so 255 is "
            "either a class or not labelled; if it is a class, store the value of the class; if not, add ignore: "
            "['#FFFFFF'] to the class table"
        )
    if every == {0} and any(NODATA in {mask.nodata, *mask.nodatas} for mask in masks):
        _log.warning(
            "the masks in %s hold only 0, and declare 255 as nodata: 255 is read as not labelled, one class is left; "
            "if 255 is a class, remove the nodata value (gdal_edit.py -unsetnodata)",
            where,
        )


def read_classes(masks: Sequence[Source], grid: Grid, window: Window, table: ClassTable) -> NDArray[np.uint8]:
    """Class values of `window`, from the first mask (in the order given) that is labelled there.

    A mask may hold class values, palette indices or colours; one on another grid is read by its nearest pixels.
    A palette image that rayseg wrote holds class values, any other is read by its colours.

    Raises:
        DataError: a value or colour is not a class (see `decode`), or a file cannot be read.
    """
    classes_HW = np.full((window.height, window.width), NODATA, np.uint8)
    for mask, turned in product(masks, turns_of(grid)):
        part = footprint(mask, turned).intersect(window)
        target_HW = classes_HW[part.slices(window)]
        if part.empty or (target_HW != NODATA).all():
            continue
        np.copyto(target_HW, _decoded(mask, turned, part, table), where=target_HW == NODATA)
    return classes_HW


def turns_of(grid: Grid) -> tuple[Grid, ...]:
    """The grid, and where its CRS counts turns around the Earth also its pixels a turn to the east and to the west.

    Masks and imagery of one place may count differently, one to 200 degrees and the other from -160.
    """
    if grid.crs is None or grid.divided or (turn := turn_of(grid.crs)) is None:
        return (grid,)
    x, y = grid.origin
    return tuple(replace(grid, origin=(x + way * 360 * turn[1], y)) if way else grid for way in (0, 1, -1))


def meets(mask: Source, grid: Grid, window: Window) -> bool:
    """Whether a mask lies over a window, on whichever turn around the Earth it counts."""
    return any(not footprint(mask, turned).intersect(window).empty for turned in turns_of(grid))


def _decoded(mask: Source, grid: Grid, part: Window, table: ClassTable) -> NDArray[np.uint8]:
    bands = [name for name in mask.bands if name != "alpha"]
    if len(bands) not in {1, 3, 4}:
        raise DataError(f"mask {mask.item_id} has {len(bands)} bands, expected 1 (class or palette) or 3 (colours)")
    image_CHW, valid_HW = read([mask], grid, part, bands=bands, categorical=True)
    whole = bool(valid_HW.all())  # as in most masks, which need no copy by index
    values_CN = image_CHW if whole else image_CHW[:, None, valid_HW]
    values = values_CN.transpose(1, 2, 0) if len(bands) > 1 else values_CN[0]
    if values.dtype.kind not in "ui":
        raise DataError(f"mask {mask.item_id} has {values.dtype} values, expected whole numbers; convert it to uint8")
    try:
        # By the names that the file stores, where it stores some: its numbers may be those of another table.
        decoded = decode(values, _by_name(mask.assets[0][0], table), palette=_palette_of(mask.assets[0][0]))
    except DataError as error:
        raise DataError(f"{mask.assets[0][0]}: {error}") from None
    if mask.sure[0]:
        classes_HW = np.full(valid_HW.shape, NODATA, np.uint8)
        classes_HW[valid_HW] = decoded[valid_HW] if whole else decoded[0]
        return _sure(classes_HW, mask, grid, part, table)
    if whole:
        return decoded
    classes_HW = np.full(valid_HW.shape, NODATA, np.uint8)
    classes_HW[valid_HW] = decoded[0]
    return classes_HW


def _by_name(href: str, table: ClassTable) -> ClassTable:
    """The table for one file: the classes that a file names are read by their names, if the table has them all."""
    own = {name: value for value, name in _legend(href)[0].items()}
    if not own:
        return table
    if not own.keys() <= set(table.names):
        return replace(table, unlabelled=(), stored=())
    free = iter({*range(NODATA)} - {*own.values()})
    return replace(table, unlabelled=(), stored=tuple(own[name] if name in own else next(free) for name in table.names))


def _sure(
    classes_HW: NDArray[np.uint8], mask: Source, grid: Grid, part: Window, table: ClassTable
) -> NDArray[np.uint8]:
    """The classes whose own score is high enough; 255 elsewhere."""
    href, least = mask.sure
    scores = replace(source_of_file(href, mask.item_id), crs=mask.crs, transform=mask.transform)
    scores_CHW, valid_HW = read([scores], grid, part, bands=scores.bands, categorical=True)
    # The map's own classes, in the order of its bands: the table it is read by may have more.
    own = _by_name(mask.assets[0][0], table)
    read_as = dict(zip(own.in_masks, own.values, strict=True))
    values = [read_as.get(value, value) for value in _legend(mask.assets[0][0])[0] or own.in_masks]
    if len(scores_CHW) not in {1, len(values)}:
        raise DataError(
            f"{href} has {len(scores_CHW)} bands, expected 1 or one for each of the {len(values)} classes of "
            f"{mask.assets[0][0]}; give RUN#classes, or leave min_score out"
        )
    if len(scores_CHW) == 1 and len(values) == 2:  # the score of class 1, of which class 0 has the rest
        own_HW = np.where(classes_HW == values[1], scores_CHW[0], FULL_SCORE - scores_CHW[0])
    elif len(scores_CHW) == 1:
        own_HW = scores_CHW[0]
    else:
        band_of = np.zeros(256, np.intp)
        band_of[values] = np.arange(len(values))
        own_HW = np.take_along_axis(scores_CHW, band_of[classes_HW][None], axis=0)[0]
    # Half a step of the stored scores, so that a score that was rounded down counts as reached.
    sure_HW = valid_HW & (own_HW.astype(np.float32) >= least * FULL_SCORE - 0.5)
    return np.where(sure_HW, classes_HW, NODATA).astype(np.uint8)


def expect_names(masks: Sequence[Source], table: ClassTable, where: str) -> None:
    """Refuse maps of runs with classes that the table has not; others are read by their names.

    Raises:
        DataError: a file names a class that is not in the table.
    """
    for mask in masks:
        stored = table_of(mask.assets[0][0])
        if stored and (other := [name for name in stored.names if name not in table.names]):
            raise DataError(
                f"{where} has the classes {', '.join(stored.names)}, but {other[0]} is not among the configured "
                f"classes {', '.join(table.names)}; set classes to those of the masks"
            )


def _palette_of(href: str) -> dict[int, RGB] | None:
    """Colours of a palette image by index; None for any other, and where the indices are class values."""
    names, palette = _legend(href)
    return None if names else palette


def table_of(href: str) -> ClassTable | None:
    """The class table that rayseg wrote into a class raster; None in any other file."""
    names, palette = _legend(href)
    if not names or palette is None:
        return None
    return ClassTable(tuple((value, name, palette[value]) for value, name in sorted(names.items())))


@lru_cache(maxsize=4096)
@patient
def _legend(href: str) -> tuple[dict[int, str], dict[int, RGB] | None]:
    """(class names by value as rayseg stores them, colours of the palette by index) of a raster."""
    with gdal(href), open_file(href) as dataset:
        names = json.loads(dataset.tags(1).get("classes", "{}"))
        try:
            palette = {index: tuple(color[:3]) for index, color in dataset.colormap(1).items()}
        except ValueError:
            palette = None
        bits = dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")
        # GDAL adds this palette to TIFFs of one bit; their values are classes, as in a PNG
        if (dataset.driver, bits, palette) == ("GTiff", "1", {0: BLACK, 1: WHITE}) and not names:
            palette = None
    return {int(value): str(name) for value, name in names.items()}, palette
