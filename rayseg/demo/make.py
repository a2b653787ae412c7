"""The demo region: two drawn scenes of a landscape with everything the pipelines look for, in the user's cache folder.

Collections of its catalogue: `imagery` (two RGB scenes that abut, 1 m, EPSG:32650, nodata 0), `chips` (small
images labelled gpc or nongpc: all that gpc learns from) and `truth` (netting, land cover, farm plots: to measure with).
"""

import shutil
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import geopandas as gpd
import numpy as np
import pystac
from numpy.typing import NDArray
from shapely.geometry import Polygon, box, mapping
from shapely.ops import unary_union

from rayseg.demo.landscape import Scene, World, draw, plan
from rayseg.demo.scenery import CROPS
from rayseg.demo.shapes import Convex, convex, normals
from rayseg.errors import ConfigError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import cog, stac_write
from rayseg.io.sources import crs_of
from rayseg.store import cache_dir
from rayseg.vision.color import ClassTable

VERSION = 1
SEED = 7
"""Of the landscape."""
GRID = Grid("EPSG:32650", (1.0, 1.0), (500_000.0, 4_400_000.0))
SCENES = ("west", "east")
DATES = ("2024-05-12T03:10:00Z", "2024-09-21T06:40:00Z")
BANDS = ("red", "green", "blue")
LABEL = "rayseg:label"  # property of a chip's item
TITLES = {
    "": "Two drawn scenes of a landscape; not a real place",
    "imagery": "Two RGB scenes of 1 m pixels that abut; nodata is 0",
    "chips": "Small images with a label each: gpc where 5 to 60 % is green netting, nongpc where there is none",
    "truth": "What the scenes really show: netting, land cover and farm plots",
}
GPC = ClassTable(((0, "background", (0, 0, 0)), (1, "gpc", (0, 158, 115))))
LANDCOVER = ClassTable(
    (
        (0, "urban", (0, 255, 255)),
        (1, "agriculture", (255, 255, 0)),
        (2, "rangeland", (255, 0, 255)),
        (3, "forest", (0, 255, 0)),
        (4, "water", (0, 0, 255)),
        (5, "barren", (255, 255, 255)),
        (6, "unknown", (0, 0, 0)),
    )
)
LOOKALIKES = ("sport", "industry", "park", "site")


class Half(NamedTuple):
    """One scene ready to be written: where it lies on `GRID`, its pixels, and which of them were seen at all."""

    name: str
    taken: str
    window: Window
    corners: Convex
    scene: Scene
    seen_HW: NDArray[np.bool_]


class Spot(NamedTuple):
    """Where one chip is cut: its upper-left pixel inside a scene, its label, its number among those of the label."""

    row: int
    col: int
    label: str
    number: int


def ensure(*, size: int = 2048, chips: tuple[int, int] = (48, 48)) -> str:
    """Return the path of the demo's catalogue; draw and write it first when it is not in the cache yet.

    Args:
        size: height and width of each of the two scenes in pixels (metres), at least 512.
        chips: how many chips with and without netting.

    Raises:
        ConfigError: `size` is too small to hold the landscape, or it has no room for that many chips.
    """
    if size < 512:
        raise ConfigError(f"The demo's scenes were asked to be {size} px wide, but need at least 512; raise `size`.")
    folder = cache_dir() / f"demo-v{VERSION}-{size}-{SEED}-{chips[0]}x{chips[1]}"
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder)
        with tempfile.TemporaryDirectory(
            prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
        ) as made:
            _build(Path(made) / "demo", size=size, chips=chips)
            _publish(Path(made) / "demo", folder)
    return str(folder / "catalog.json")


def _publish(made: Path, folder: Path) -> None:
    """Move the finished demo to its place; when another process was faster, theirs stays."""
    try:
        made.rename(folder)
    except OSError:
        if not (folder / "catalog.json").exists():
            raise


def _sweep(folder: Path, *, older_than_s: float = 3600) -> None:
    """Remove what a killed generation left beside `folder`."""
    for left in folder.parent.glob(f".{folder.name}.*"):
        if time.time() - left.stat().st_mtime > older_than_s:
            shutil.rmtree(left, ignore_errors=True)


def _build(folder: Path, *, size: int, chips: tuple[int, int]) -> None:
    """Draw both scenes and write catalogue, collections and files under `folder`."""
    world, side = plan(size=size, seed=SEED), min(256, size // 4)
    found: dict[str, list[pystac.Item]] = {"imagery": [], "chips": [], "truth": []}
    for index in (0, 1):
        half = _half(world, index)
        counts = chips[0] // 2 + chips[0] % 2 * (1 - index), chips[1] // 2 + chips[1] % 2 * (1 - index)
        found["imagery"].append(_imagery(folder, half))
        found["chips"] += [_chip(folder, half, spot, side) for spot in _spots(world, half, side, counts)]
        found["truth"].append(_truth(folder, half))
    found["truth"].append(_farm(folder, world))
    stac_write.write_catalog(folder, found, titles=TITLES)


def _item(item_id: str, window: Window, area: Polygon, taken: str) -> pystac.Item:
    """Return an item over `window` of `GRID` whose footprint is `area` (CRS of the grid)."""
    geometry, bbox = stac_write.lonlat_geometry(mapping(area), crs_of(str(GRID.crs)), name=item_id)
    item = pystac.Item(item_id, geometry, bbox, datetime.fromisoformat(taken), {"gsd": 1.0})
    item.ext.add("proj")
    item.ext.proj.apply(code=GRID.crs, shape=[window.height, window.width], transform=list(GRID.transform(window))[:6])
    return item


def _imagery(folder: Path, half: Half) -> pystac.Item:
    item = _item(f"demo-{half.name}", half.window, _ground(half.corners.points_N2), half.taken)
    _add_image(item, folder / "imagery", half.scene.image_HWC, half.window, half.seen_HW)
    return item


def _chip(folder: Path, half: Half, spot: Spot, side: int) -> pystac.Item:
    window = Window(half.window.col + spot.col, half.window.row + spot.row, side, side)
    item = _item(f"{spot.label}-{half.name}-{spot.number:02d}", window, box(*GRID.bounds(window)), half.taken)
    item.properties[LABEL] = spot.label
    item.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, f"../imagery/demo-{half.name}.json", pystac.MediaType.JSON))
    cut = np.s_[spot.row : spot.row + side, spot.col : spot.col + side]
    _add_image(item, folder / "chips", half.scene.image_HWC[cut], window, half.seen_HW[cut])
    return item


def _add_image(
    item: pystac.Item, folder: Path, image_HWC: NDArray[np.uint8], window: Window, seen_HW: NDArray[np.bool_]
) -> None:
    image_CHW = image_HWC.transpose(2, 0, 1)
    cog.write_image(folder / f"{item.id}.tif", image_CHW, GRID, window, bands=BANDS, nodata=0, valid_HW=seen_HW)
    fields = {"bands": [{"name": name, "data_type": "uint8", "nodata": 0} for name in BANDS]}
    asset = pystac.Asset(f"./{item.id}.tif", media_type=stac_write.COG_TYPE, roles=["data"], extra_fields=fields)
    item.add_asset("image", asset)


def _truth(folder: Path, half: Half) -> pystac.Item:
    """Write what a scene really shows: netting and land cover, 255 where the scene has no data."""
    item = _item(f"truth-{half.name}", half.window, _ground(half.corners.points_N2), half.taken)
    item.stac_extensions.append(stac_write.CLASSIFICATION)
    masks = {"gpc": (half.scene.netting_HW, GPC), "landcover": (half.scene.cover_HW, LANDCOVER)}
    for key, (classes_HW, table) in masks.items():
        seen_HW = np.where(half.seen_HW, classes_HW, np.uint8(NODATA))
        cog.write_classes(folder / "truth" / f"{item.id}-{key}.tif", seen_HW, GRID, half.window, table)
        fields = {
            "bands": [{"name": "class", "data_type": "uint8", "nodata": NODATA}],
            "classification:classes": stac_write.classes_field(table),
        }
        href = f"./{item.id}-{key}.tif"
        item.add_asset(key, pystac.Asset(href, media_type=stac_write.COG_TYPE, roles=["labels"], extra_fields=fields))
    return item


def _farm(folder: Path, world: World) -> pystac.Item:
    """Write the farm plots of both scenes, as GeoParquet in the grid's CRS and as GeoJSON in EPSG:4326."""
    plots = _plots(world)
    item = _item("truth-plots", Window(0, 0, 2 * world.size, world.size), box(*plots.total_bounds), DATES[0])
    plots.to_parquet(folder / "truth" / "plots.parquet")
    plots.to_crs("EPSG:4326").to_file(folder / "truth" / "plots.geojson", driver="GeoJSON")
    item.add_asset("plots", pystac.Asset("./plots.parquet", media_type=stac_write.PARQUET_TYPE, roles=["labels"]))
    geojson = pystac.Asset("./plots.geojson", media_type=pystac.MediaType.GEOJSON, roles=["labels"])
    item.add_asset("plots_geojson", geojson)
    return item


# -- what is where -----------------------------------------------------------------------------------------------------


def _half(world: World, index: int) -> Half:
    window, corners = Window(index * world.size, 0, world.size, world.size), _corners(world.size, index)
    return Half(SCENES[index], DATES[index], window, corners, draw(world, index), _seen(window, corners))


def _corners(size: int, index: int) -> Convex:
    """Return what a scene saw, in (row, col) of the world: slanted margins outside, none where the scenes meet."""
    margin = size / 64
    outer, inwards = (0, 1) if index == 0 else (2 * size, -1)
    points = [
        (1.7 * margin, outer + inwards * margin),
        (0.9 * margin, size),
        (size - 0.7 * margin, size),
        (size - 1.3 * margin, outer + inwards * 1.8 * margin),
    ]
    return convex(points if index == 0 else points[::-1])


def _seen(window: Window, corners: Convex) -> NDArray[np.bool_]:
    rows_H1 = np.arange(window.row, window.row1)[:, None] + 0.5
    cols_1W = np.arange(window.col, window.col1)[None] + 0.5
    seen_HW = np.ones((window.height, window.width), dtype=bool)
    for normal, point in zip(normals(corners), corners.points_N2, strict=True):
        seen_HW &= normal[0] * rows_H1 + normal[1] * cols_1W <= normal @ point
    return seen_HW


def _spots(world: World, half: Half, side: int, counts: tuple[int, int]) -> list[Spot]:
    """Choose where to cut chips with and without netting in one scene, as far apart as there is room for."""
    rng = world.rng(6, half.window.col)
    netting_HW, unseen_HW = _sums(half.scene.netting_HW & half.seen_HW), _sums(~half.seen_HW)
    chosen: list[Spot] = []
    for wanted, kinds in ((counts[0], ("nets",)), (counts[1], LOOKALIKES)):
        low, high = (0.05, 0.6) if kinds == ("nets",) else (0.0, 0.0)
        corners_N2 = _candidates(world, half, side, kinds, rng)
        share_N = _inside(netting_HW, corners_N2, side) / side**2
        fits_N = (_inside(unseen_HW, corners_N2, side) == 0) & (share_N >= low) & (share_N <= high)
        picked = _apart(corners_N2[fits_N], wanted, side)
        if len(picked) < wanted:
            found = f"has room for {len(picked)} chips of one class"
            raise ConfigError(f"The demo's {half.name} scene {found}, {wanted} were requested; request fewer.")
        label = "gpc" if high else "nongpc"
        chosen += [Spot(int(row), int(col), label, number) for number, (row, col) in enumerate(picked)]
    return chosen


def _candidates(
    world: World, half: Half, side: int, kinds: tuple[str, ...], rng: np.random.Generator
) -> NDArray[np.intp]:
    """Return upper-left corners (N, 2) to try: near blocks of these kinds and anywhere, by turns."""
    centers_N2 = np.array([block.shape.points_N2.mean(axis=0) for block in world.blocks if block.kind in kinds])
    near_N2 = centers_N2 - np.array([0, half.window.col]) - side / 2
    rounds = []
    for _ in range(40):
        jittered_N2 = near_N2 + rng.uniform(-0.35, 0.35, near_N2.shape) * side
        inside_N = ((jittered_N2 >= 0) & (jittered_N2 <= world.size - side)).all(axis=1)
        anywhere_N2 = rng.uniform(0, world.size - side, (int(inside_N.sum()), 2))
        rounds.append(rng.permutation(np.concatenate([jittered_N2[inside_N], anywhere_N2])))
    return np.concatenate(rounds).astype(np.intp)


def _apart(corners_N2: NDArray[np.intp], wanted: int, side: int) -> list[NDArray[np.intp]]:
    """Take corners in their order whose squares overlap least: none at all first, then up to 15, 35, 60 and 90 %."""
    picked: list[NDArray[np.intp]] = []
    for most in (0.0, 0.15, 0.35, 0.6, 0.9):
        for corner in corners_N2:
            if len(picked) == wanted:
                return picked
            gaps_N2 = np.clip(side - np.abs(np.array(picked).reshape(-1, 2) - corner), 0, None)
            if (gaps_N2.prod(axis=1) <= most * side**2).all():
                picked.append(corner)
    return picked


def _sums(mask_HW: NDArray[np.bool_] | NDArray[np.uint8]) -> NDArray[np.int32]:
    return np.pad(mask_HW.cumsum(axis=1, dtype=np.int32).cumsum(axis=0, dtype=np.int32), ((1, 0), (1, 0)))


def _inside(sums_HW: NDArray[np.int32], corners_N2: NDArray[np.intp], side: int) -> NDArray[np.int64]:
    top, left = corners_N2.T
    bottom, right = top + side, left + side
    counts_N = sums_HW[bottom, right] - sums_HW[top, right] - sums_HW[bottom, left] + sums_HW[top, left]
    return np.asarray(counts_N, dtype=np.int64)


def _plots(world: World) -> gpd.GeoDataFrame:
    """Return the farm plots in sight as polygons in the grid's CRS: plot, crop, cultivated."""
    seen = unary_union([_ground(_corners(world.size, index).points_N2) for index in (0, 1)])
    rows = []
    for number, block in enumerate(world.blocks):
        for part, (parcel, crop) in enumerate(block.parcels):
            # a pixel is drawn around its centre, half a pixel from its corner
            polygon = _ground(world.bend.outline(parcel) + 0.5).intersection(seen)
            if polygon.geom_type == "Polygon" and polygon.area > 200:
                rows.append((f"{number:03d}-{part:02d}", crop, CROPS[crop][4], polygon))
    return gpd.GeoDataFrame(rows, columns=["plot", "crop", "cultivated", "geometry"], crs=GRID.crs)


def _ground(points_N2: NDArray[np.float64]) -> Polygon:
    """Return (row, col) points of the world, counted from pixel corners, as a polygon in the grid's CRS."""
    (left, top), (x_size, y_size) = GRID.origin, GRID.resolution
    return Polygon(np.stack([left + points_N2[:, 1] * x_size, top - points_N2[:, 0] * y_size], axis=1))
