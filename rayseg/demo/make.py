"""The demo region: two drawn scenes of a landscape with everything the pipelines look for, in the user's cache folder.

Collections of its catalogue: `imagery` (two adjacent RGB scenes, 1 m, EPSG:32650, nodata 0), `chips` (small images
labelled gpc or nongpc: all that gpc learns from) and `truth` (netting, land cover and farm plots: the reference).
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
import shapely
from numpy.typing import NDArray
from shapely import Polygon, box
from shapely.geometry import mapping
from shapely.geometry.base import BaseGeometry
from skimage.transform import integral_image, integrate

from rayseg.demo.landscape import Scene, World, draw, plan
from rayseg.demo.scenery import CROPS
from rayseg.errors import ConfigError
from rayseg.geo.grid import NODATA, Grid, Window
from rayseg.io import cog, stac_write
from rayseg.io.sources import crs_of
from rayseg.store import cache_dir
from rayseg.vision.color import ClassTable

VERSION = 1
"""Of the drawing: a demo of another version in the cache is not used."""
SEED = 7
GRID = Grid("EPSG:32650", (1.0, 1.0), (500_000.0, 4_400_000.0))
SCENES = ("west", "east")
DATES = ("2024-05-12T03:10:00Z", "2024-09-21T06:40:00Z")
BANDS = ("red", "green", "blue")
LABEL = "rayseg:label"  # property of a chip's item
TITLES = {
    "": "Two drawn scenes of a landscape; not a real place",
    "imagery": "Two adjacent RGB scenes of 1 m pixels; nodata is 0",
    "chips": "Small images with a label each: gpc where 5 to 60 % is green netting, nongpc where there is none",
    "truth": "Reference data of the scenes: netting, land cover and farm plots",
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
    """One scene ready to be written: its window of `GRID`, outline, pixels, and which of them have data.

    `area` has coordinates (row, col) of the world, counted from pixel corners.
    """

    name: str
    taken: str
    window: Window
    area: Polygon
    scene: Scene
    seen_HW: NDArray[np.bool_]


def ensure(*, size: int = 2048, chips: tuple[int, int] = (48, 48)) -> str:
    """Return the path of the demo's catalogue; draw and write it first when the cache does not hold it.

    Args:
        size: height and width of each of the two scenes in pixels (metres), at least 512.
        chips: number of chips with and without netting.

    Raises:
        ConfigError: the scenes are smaller than 512 px, or too small for that many chips.
    """
    if size < 512:
        raise ConfigError(f"the demo's size is {size} px, expected at least 512; raise `size`")
    # The name holds everything that the pixels depend on, so that a cached demo is never out of date.
    folder = cache_dir() / f"demo-v{VERSION}-{size}-{SEED}-{chips[0]}x{chips[1]}"
    if folder.exists():
        return str(folder / "catalog.json")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for abandoned in folder.parent.glob(f".{folder.name}.*"):  # of processes that were killed
        if time.time() - abandoned.stat().st_mtime > 3600:
            shutil.rmtree(abandoned, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True) as draft:
        _build(Path(draft) / "demo", size=size, chips=chips)
        try:
            (Path(draft) / "demo").rename(folder)
        except OSError:  # when another process was faster, its demo stays
            if not (folder / "catalog.json").exists():
                raise
    return str(folder / "catalog.json")


def _build(folder: Path, *, size: int, chips: tuple[int, int]) -> None:
    """Draw both scenes and write catalogue, collections and files under `folder`."""
    world, side, margin = plan(size=size, seed=SEED), min(256, size // 4), size / 64
    items: dict[str, list[pystac.Item]] = {"imagery": [], "chips": [], "truth": []}
    areas = []
    for index, (name, taken) in enumerate(zip(SCENES, DATES, strict=True)):
        # 1. what a scene shows: slanted margins outside, none where the scenes meet
        window = Window(index * size, 0, size, size)
        outer, inwards = (0, margin) if index == 0 else (2 * size, -margin)
        rows = (1.7 * margin, 0.9 * margin, size - 0.7 * margin, size - 1.3 * margin)
        corners = list(zip(rows, (outer + inwards, size, size, outer + 1.8 * inwards), strict=True))
        areas.append(Polygon(corners if index == 0 else corners[::-1]))  # counterclockwise on the ground
        row_H1, col_1W = np.ogrid[window.row : window.row1, window.col : window.col1]
        seen_HW = shapely.contains_xy(areas[-1], row_H1 + 0.5, col_1W + 0.5)
        half = Half(name, taken, window, areas[-1], draw(world, index), seen_HW)
        # 2. its image, its chips, its truth
        imagery = _item(f"demo-{name}", window, _placed(half.area), taken)
        _add_image(imagery, folder / "imagery", half, np.s_[:, :])
        counts = (chips[0] + 1 - index) // 2, (chips[1] + 1 - index) // 2
        items["imagery"].append(imagery)
        items["chips"] += [
            _chip(folder, half, corner, side, f"{label}-{name}-{number:02d}", label)
            for label, corners in zip(("gpc", "nongpc"), _corners(world, half, side, counts), strict=True)
            for number, corner in enumerate(corners)
        ]
        items["truth"].append(_truth(folder, half))
    items["truth"].append(_farm(folder, world, shapely.union_all(areas)))
    stac_write.write_catalog(folder, items, titles=TITLES)


def _item(item_id: str, window: Window, area: BaseGeometry, taken: str) -> pystac.Item:
    """Return an item over `window` of `GRID` whose footprint is `area` (CRS of the grid)."""
    geometry, bbox = stac_write.lonlat_geometry(mapping(area), crs_of(str(GRID.crs)), name=item_id)
    item = pystac.Item(item_id, geometry, bbox, datetime.fromisoformat(taken), {"gsd": 1.0})
    item.ext.add("proj")
    item.ext.proj.apply(code=GRID.crs, shape=[window.height, window.width], transform=list(GRID.transform(window))[:6])
    return item


def _placed(shape: BaseGeometry) -> BaseGeometry:
    """Return a polygon of (row, col) of the world, counted from pixel corners, in the grid's CRS."""
    (left, top), (x_size, y_size) = GRID.origin, GRID.resolution
    return shapely.transform(shape, lambda points_N2: points_N2[:, ::-1] * (x_size, -y_size) + (left, top))


def _chip(folder: Path, half: Half, corner: NDArray[np.intp], side: int, item_id: str, label: str) -> pystac.Item:
    row, col = map(int, corner)
    window = Window(half.window.col + col, half.window.row + row, side, side)
    item = _item(item_id, window, box(*GRID.bounds(window)), half.taken)
    item.properties[LABEL] = label
    item.add_link(pystac.Link(pystac.RelType.DERIVED_FROM, f"../imagery/demo-{half.name}.json", pystac.MediaType.JSON))
    _add_image(item, folder / "chips", half, np.s_[row : row + side, col : col + side])
    return item


def _add_image(item: pystac.Item, folder: Path, half: Half, part: tuple[slice, slice]) -> None:
    image_CHW, seen_HW = half.scene.image_HWC[part].transpose(2, 0, 1), half.seen_HW[part]
    row, col = part[0].start or 0, part[1].start or 0
    window = Window(half.window.col + col, half.window.row + row, *seen_HW.shape[::-1])
    cog.write_image(folder / f"{item.id}.tif", image_CHW, GRID, window, bands=BANDS, nodata=0, valid_HW=seen_HW)
    fields = {"bands": [{"name": name, "data_type": "uint8", "nodata": 0} for name in BANDS]}
    asset = pystac.Asset(f"./{item.id}.tif", media_type=stac_write.COG_TYPE, roles=["data"], extra_fields=fields)
    item.add_asset("image", asset)


def _truth(folder: Path, half: Half) -> pystac.Item:
    """Write a scene's netting and land cover, 255 where the scene has no data."""
    item = _item(f"truth-{half.name}", half.window, _placed(half.area), half.taken)
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


def _farm(folder: Path, world: World, seen: BaseGeometry) -> pystac.Item:
    """Write the visible farm plots of both scenes, as GeoParquet in the grid's CRS and as GeoJSON in EPSG:4326."""
    rows = []
    for number, block in enumerate(world.blocks):
        for part, (parcel, crop) in enumerate(block.parcels):
            # a pixel is drawn around its centre, half a pixel from its corner
            polygon = _placed(Polygon(world.bend.outline(parcel) + 0.5)).intersection(_placed(seen))
            if polygon.geom_type == "Polygon" and polygon.area > 200:
                rows.append((f"{number:03d}-{part:02d}", crop, CROPS[crop][4], polygon))
    plots = gpd.GeoDataFrame(rows, columns=["plot", "crop", "cultivated", "geometry"], crs=GRID.crs)
    item = _item("truth-plots", Window(0, 0, 2 * world.size, world.size), box(*plots.total_bounds), DATES[0])
    plots.to_parquet(folder / "truth" / "plots.parquet")
    plots.to_crs("EPSG:4326").to_file(folder / "truth" / "plots.geojson", driver="GeoJSON")
    item.add_asset("plots", pystac.Asset("./plots.parquet", media_type=stac_write.PARQUET_TYPE, roles=["labels"]))
    geojson = pystac.Asset("./plots.geojson", media_type=pystac.MediaType.GEOJSON, roles=["labels"])
    item.add_asset("plots_geojson", geojson)
    return item


def _corners(world: World, half: Half, side: int, counts: tuple[int, int]) -> list[list[NDArray[np.intp]]]:
    """Choose upper-left pixels (row, col) of chips with and without netting in one scene, overlapping least."""
    rng, chosen = world.rng(6, half.window.col), []
    netting_HW, unseen_HW = integral_image(half.scene.netting_HW & half.seen_HW), integral_image(~half.seen_HW)
    for wanted, kinds, (low, high) in zip(counts, (("nets",), LOOKALIKES), ((0.05, 0.6), (0.0, 0.0)), strict=True):
        # 1. candidates near blocks of these kinds and anywhere, by turns
        centers_N2 = [block.shape.points_N2.mean(axis=0) for block in world.blocks if block.kind in kinds]
        near_N2 = np.array(centers_N2) - (0, half.window.col) - side / 2
        rounds = []
        for _ in range(40):
            jittered_N2 = near_N2 + rng.uniform(-0.35, 0.35, near_N2.shape) * side
            jittered_N2 = jittered_N2[((jittered_N2 >= 0) & (jittered_N2 <= world.size - side)).all(axis=1)]
            anywhere_N2 = rng.uniform(0, world.size - side, jittered_N2.shape)
            rounds.append(rng.permutation(np.concatenate([jittered_N2, anywhere_N2])))
        corners_N2 = np.concatenate(rounds).astype(np.intp)
        # 2. those with data everywhere and the share of netting that the label promises
        share_N = integrate(netting_HW, corners_N2, corners_N2 + side - 1) / side**2
        unseen_N = integrate(unseen_HW, corners_N2, corners_N2 + side - 1)
        fitting = corners_N2[(unseen_N == 0) & (share_N >= low) & (share_N <= high)]
        # 3. in their order those that overlap not at all, then up to 15, 35, 60 and 90 %
        picked: list[NDArray[np.intp]] = []
        for most in (0.0, 0.15, 0.35, 0.6, 0.9):
            for corner in fitting:
                gaps_N2 = np.clip(side - np.abs(np.array(picked).reshape(-1, 2) - corner), 0, None)
                if len(picked) < wanted and (gaps_N2.prod(axis=1) <= most * side**2).all():
                    picked.append(corner)
        if len(picked) < wanted:
            raise ConfigError(
                f"the demo's {half.name} scene has room for {len(picked)} chips of one class, expected {wanted}; "
                "ask for fewer chips or a larger `size`"
            )
        chosen.append(picked)
    return chosen
