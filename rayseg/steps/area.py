"""Honest areas: a stratified random sample of a map for a person to label, and estimates from the answers.

Counting pixels does not estimate an area, because a map's errors are not symmetric. The design and the estimators are
those of Olofsson et al. 2014 and Stehman 2014 (strata that are not the map's classes).

<folder>/sample.json     strata with their areas, points, the run      <folder>/index.html   answer with keys 1 to 9
<folder>/points.geojson, points.gpkg, answers.csv (columns id, class)   <folder>/images/<id>.png
"""

import csv
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from shapely.geometry import mapping as geojson
from shapely.geometry import shape

from rayseg.engine import run as runs
from rayseg.errors import ConfigError, DataError, listed
from rayseg.geo import lonlat, region
from rayseg.geo.grid import NODATA, Tile, Window
from rayseg.geo.vector_files import read_frame
from rayseg.io import masks, pictures
from rayseg.io.maps import (
    MappedTile,
    class_probability,
    mapped_tiles,
    pixel_areas_m2,
    pixel_lonlat,
    read_tile,
    top_scores,
)
from rayseg.metrics import Estimate, Z, allocation, regression_mean, slope, stratified_mean, stratified_ratio
from rayseg.stages.write import counted_ground
from rayseg.steps import remap
from rayseg.store import STORE_ERRORS, StorePath, put, read_json, upath
from rayseg.vision.color import ClassTable, hex_of, rgb_of

LEAST = 10
"""Points of a stratum: of fewer, its variance is not known well."""
MOST = 20_000
"""Points of a sample: nobody labels more, and each has a picture."""
AROUND = 64
"""Pixels around a point that its picture shows."""
EDGE = 3
"""Pixels from a class's edge that are a stratum of their own: most errors are there."""
_PARTS = 4  # strata of a class
_ERRORS = {False: 0.02, True: 0.1}  # least expected errors inside and at edges: a confident map is wrong, too

Parts = tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]
_UNREADABLE: tuple[type[Exception], ...] = (*STORE_ERRORS, UnicodeDecodeError)


@dataclass(frozen=True)
class Stratum:
    """A part of the map: a class, within a band of its score, near its edge or not.

    Attributes:
        value: the class in the map.
        sure: whether the score of the class is at least the band's limit.
        edge: whether another class is near.
        area_m2: of its pixels on the ground; pixels where there is no CRS.
        errors: expected share of pixels that are wrong, from their scores.
    """

    value: int
    sure: bool
    edge: bool
    area_m2: float
    errors: float


def sample(
    run: StorePath,
    out: StorePath,
    *,
    per_stratum: int | None = None,
    half_width: float | None = None,
    band: float = 0.8,
    seed: int = 0,
) -> dict[str, Any]:
    """Draw points from every stratum of a run's map, and write what a person needs to label them.

    Strata are the classes, each divided at the score `band`, and again at `EDGE` px from other classes.
    Within a stratum every bit of ground has the same chance.

    Args:
        run: the run.
        out: folder for the sample.
        per_stratum: points of each stratum.
        half_width: in its place, half of the 95 % interval wanted for the share of every class; the number of points
            follows from the scores, by Neyman's allocation.
        band: score that divides a class.
        seed: of the drawing.

    Returns:
        The content of sample.json.

    Raises:
        ConfigError: neither or both of `per_stratum` and `half_width`, values out of range, or `out` holds a sample.
        DataError: the run has no map, or not all of it.
    """
    if (per_stratum is None) == (half_width is None):
        raise ConfigError("give either --per-stratum, a number of points, or --half-width, such as 0.02")
    if half_width is not None and not 0 < half_width < 0.5:
        raise ConfigError(f"--half-width is {half_width:g}, expected a share between 0 and 0.5, such as 0.02")
    if not 0 < band < 1:
        raise ConfigError(f"--band is {band:g}, expected a score between 0 and 1")
    if (upath(out) / "sample.json").exists():
        raise ConfigError(f"{out} already holds a sample, whose answers another would discard; choose another --out")
    key = _key(run)
    # 1. area of every stratum in every tile
    tiles = mapped_tiles(run)
    table = masks.table_of(tiles[0].href) if tiles else None
    if table is None:
        raise DataError(f"{run} has no class map, so there is nothing to sample; finish the run first")
    asked, read = runs.read(str(run)), _reader(run, table, band)
    strata, parts_TH = _strata(tiles, table, read)
    # 2. points of each stratum, then of each of its tiles, then pixels
    counts = points_of(strata, per_stratum, half_width)
    if counts.sum() > MOST:
        raise ConfigError(f"the sample would have {counts.sum():,} points, expected {MOST:,} or fewer; ask for less")
    points = _drawn(tiles, table, parts_TH, counts, read, np.random.default_rng([seed, 0]))
    # 3. in random order, so that a person does not see the map's opinion in it
    order = np.random.default_rng([seed, 1]).permutation(len(points))
    # Answers name the sample that they belong to: two of one map have other points under the same numbers.
    mark = hashlib.sha256(json.dumps([key, points]).encode()).hexdigest()[:6]
    points = [points[index] | {"id": f"{mark}-{at:04d}"} for at, index in enumerate(order)]
    drawn = np.bincount([point["stratum"] for point in points], minlength=len(strata))
    content = {
        "map": f"{asked['pipeline']} of {asked['region']['name']}",
        "key": key,
        "seed": seed,
        "band": band,
        "ground": tiles[0].tile.grid.crs is not None,
        "classes": [{"value": value, "name": name, "color": hex_of(color)} for value, name, color in table.classes],
        "strata": [vars(stratum) | {"points": int(drawn[k])} for k, stratum in enumerate(strata)],
        "points": points,
    }
    _write(upath(out), content, {tile.tile.id: tile for tile in tiles})
    return content


def _reader(run: StorePath, table: ClassTable, band: float) -> Callable[[MappedTile], Parts]:
    """`strata_of` a tile, without ground under several scenes that counts in the tile of another, as in the report."""
    bands = remap.imagery_of(runs.read(str(run)))
    before = {row["id"]: row["before"] for row in remap.tiles_of(str(run)) if row["before"] != "[]"}

    def read(tile: MappedTile) -> Parts:
        strata_HW, score_HW, areas_HW = strata_of(tile, table, band)
        counted_HW = counted_ground(tile.tile, before.get(tile.tile.id, "[]"), bands)
        return strata_HW if counted_HW is None else np.where(counted_HW, strata_HW, -1), score_HW, areas_HW

    return read


def _strata(
    tiles: Sequence[MappedTile], table: ClassTable, read: Callable[[MappedTile], Parts]
) -> tuple[list[Stratum], NDArray[np.float64]]:
    """The strata of a map, four of each class, and their areas in every tile (tiles, strata)."""
    # The order is that of `strata_of`: value, then score, then edge.
    keys = [(value, sure, edge) for value in table.values for sure in (False, True) for edge in (False, True)]
    parts_TH, scores_H = np.zeros((len(tiles), len(keys))), np.zeros(len(keys))
    for at, tile in enumerate(tiles):
        strata_HW, score_HW, areas_HW = read(tile)
        for stratum in range(len(keys)):
            within_HW = strata_HW == stratum
            parts_TH[at, stratum] = float(areas_HW[within_HW].sum())
            scores_H[stratum] += float(score_HW[within_HW] @ areas_HW[within_HW])
    strata = [
        Stratum(value, sure, edge, area, max(1 - score / area if area else 0.0, _ERRORS[edge]))
        for (value, sure, edge), area, score in zip(keys, parts_TH.sum(0).tolist(), scores_H.tolist(), strict=True)
    ]
    return strata, parts_TH


def _drawn(
    tiles: Sequence[MappedTile],
    table: ClassTable,
    parts_TH: NDArray[np.float64],
    counts: NDArray[np.int64],
    read: Callable[[MappedTile], Parts],
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Points of every stratum: first how many in each tile, by its area there, then pixels by their area."""
    draws_TH = np.stack(
        [
            rng.multinomial(count, parts / parts.sum()) if count else np.zeros(len(tiles), np.int64)
            for count, parts in zip(counts, parts_TH.T, strict=True)
        ],
        axis=1,
    )
    points = []
    for tile, draws in zip(tiles, draws_TH, strict=True):
        if not draws.any():
            continue
        strata_HW, score_HW, areas_HW = read(tile)
        for stratum in np.flatnonzero(draws):
            # By area and not by pixel: in degrees pixels get smaller toward the poles.
            rows, cols = np.nonzero(strata_HW == stratum)
            chances = areas_HW[rows, cols] / areas_HW[rows, cols].sum()
            for index in rng.choice(len(rows), min(draws[stratum], len(rows)), replace=False, p=chances):
                row, col = int(rows[index]), int(cols[index])
                score = float(score_HW[row, col])
                points.append(_point(tile, row, col, int(stratum), table.values[stratum // _PARTS], score))
    return points


def strata_of(tile: MappedTile, table: ClassTable, band: float) -> Parts:
    """(stratum of every pixel, -1 for none; score of its class; area of every pixel) of a tile."""
    classes_HW = read_tile(tile, "classes")[0]
    score_HW = top_scores(classes_HW, read_tile(tile, "scores"), table)
    around = 2 * EDGE + 1
    # Where the largest and the smallest class nearby differ, another class is near.
    edge_HW = ndimage.maximum_filter(classes_HW, around) != ndimage.minimum_filter(classes_HW, around)
    positions = np.full(256, -1)
    positions[list(table.values)] = np.arange(len(table.classes))
    of_class_HW = positions[classes_HW]
    strata_HW = np.where(of_class_HW < 0, -1, _PARTS * of_class_HW + 2 * (score_HW >= band) + edge_HW)
    areas_HW = pixel_areas_m2(tile.tile)
    return strata_HW, score_HW, np.ones(classes_HW.shape) if areas_HW is None else areas_HW


def points_of(strata: Sequence[Stratum], per_stratum: int | None, half_width: float | None) -> NDArray[np.int64]:
    """Number of points of each stratum; see `sample`."""
    areas = np.array([stratum.area_m2 for stratum in strata])
    weights = areas / areas.sum()
    if half_width is None:
        return np.where(weights > 0, per_stratum or 0, 0).astype(np.int64)
    errors = np.minimum([stratum.errors for stratum in strata], 0.5)
    deviations = np.sqrt(errors * (1 - errors))
    # Cochran 1977, equation 5.25, for Neyman's allocation: n = (sum of W S)^2 / V
    total = math.ceil(float(weights @ deviations) ** 2 / (half_width / Z) ** 2)
    return allocation(total, weights, deviations, LEAST)


def _point(tile: MappedTile, row: int, col: int, stratum: int, value: int, score: float) -> dict[str, Any]:
    lon, lat = pixel_lonlat(tile.tile, row, col) or (None, None)
    place = {"tile": tile.tile.id, "row": row, "col": col, "lon": lon, "lat": lat}
    return place | {"stratum": stratum, "mapped": value, "score": round(score, 4)}


def _key(run: StorePath) -> str:
    """What identifies the map: the key of the step that made it, and its tiles.

    Raises:
        DataError: the step has not finished, or tiles of it failed: an area without them would be too small.
    """
    done = read_json(upath(run) / "steps" / "predict" / "done.json")
    if not done:
        raise DataError(f"the map of {run} is not finished, so areas would miss a part of it; finish the run first")
    if failed := done["value"].get("troubles"):
        raise DataError(
            f"{run} lacks the failed tiles {listed(failed)}, so areas would be too small; rayseg retry {run}"
        )
    tiles = sorted(tile.tile.id for tile in mapped_tiles(run))
    return f"{done['key']}-{hashlib.sha256(json.dumps(tiles).encode()).hexdigest()[:8]}"


def _write(folder: Any, content: dict[str, Any], tiles: Mapping[str, MappedTile]) -> None:  # noqa: ANN401 - a UPath
    """The files of a sample; sample.json last, so that a partial one is refused."""
    import geopandas
    import shapely

    points = content["points"]
    for point in points:
        tile = tiles[point["tile"]].tile
        corner = (tile.window.col + point["col"] - AROUND, tile.window.row + point["row"] - AROUND)
        window = Window(*corner, 2 * AROUND + 1, 2 * AROUND + 1)
        image = pictures.shown(tiles[point["tile"]].sources, tile.grid, window)
        put(folder / "images" / f"{point['id']}.png", pictures.encoded(image))
    if content["ground"]:
        places = shapely.points([(point["lon"], point["lat"]) for point in points])
        frame = geopandas.GeoDataFrame({"id": [point["id"] for point in points]}, geometry=places, crs=4326)
        put(folder / "points.geojson", frame.to_json().encode())
        sink = io.BytesIO()
        frame.to_file(sink, driver="GPKG", layer="points")
        put(folder / "points.gpkg", sink.getvalue())
    put(folder / "answers.csv", ("id,class\n" + "".join(f"{point['id']},\n" for point in points)).encode())
    text = resources.files("rayseg").joinpath("area.html").read_text()
    page = jinja2.Environment(autoescape=True).from_string(text)
    ids = [point["id"] for point in points]
    put(folder / "index.html", page.render(ids=ids, classes=content["classes"], key=content["key"]).encode())
    put(folder / "sample.json", json.dumps(content, indent=1).encode())


def estimate(
    run: StorePath, folder: StorePath, answers: StorePath, *, regions: StorePath | None = None
) -> dict[str, Any]:
    """Areas and accuracies of a run's map from the answers to its sample.

    `assisted` estimates use the scores of the whole map, by regression on the probability of the class.

    Args:
        run: the run.
        folder: of the sample.
        answers: CSV with the columns id and class (value or name of a class); points without a class are left out.
        regions: file of polygons, of each of which the areas are estimated too.

    Returns:
        `classes`: name -> counted, estimated and assisted area (share and hectares), user's and producer's accuracy;
        `overall`; `answered`; `pooled`: classes of which strata were joined for lack of answers; with `regions` a list
        of `name`, `answered`, `hectares` of the mapped ground (0 off the map) and `classes` as above, without
        accuracies and None for fewer than `LEAST` answers.

    Raises:
        DataError: the sample is of another run or map, an answer is of no point or no class, a class of the map has
            fewer than two answers, or no region is on the map.
    """
    content = _sample_of(run, folder)
    table = [(int(row["value"]), str(row["name"])) for row in content["classes"]]
    given = _answers(answers, [point["id"] for point in content["points"]], table)
    points = [point for point in content["points"] if point["id"] in given]
    joined, pooled = _joined(content["strata"], points, dict(table))
    areas = np.zeros(len(content["strata"]))
    for stratum, row in enumerate(content["strata"]):
        areas[joined[stratum]] += row["area_m2"]
    total = float(areas.sum())
    weights = areas / total
    strata = np.array([joined[point["stratum"]] for point in points])
    mapped = np.array([point["mapped"] for point in points])
    reference = np.array([given[point["id"]] for point in points])
    right = (mapped == reference).astype(float)
    drawn = _Drawn(points, reference, strata, weights)
    whole, parts = _grounds(run, content, points, regions)
    classes = {}
    for at, (value, name) in enumerate(table):
        counted = sum(row["area_m2"] for row in content["strata"] if row["value"] == value) / total
        is_it, is_mapped = (reference == value).astype(float), (mapped == value).astype(float)
        share = stratified_mean(is_it, strata, weights)
        hit = right * is_it
        classes[name] = {
            "counted": {"share": counted, "hectares": counted * total / 1e4 if content["ground"] else None},
            "share": share.to_row(),
            "hectares": share.to_row(total / 1e4) if content["ground"] else None,
            "assisted": drawn.assisted(whole, at, value, total / 1e4 if content["ground"] else None),
            "users_accuracy": stratified_ratio(hit, is_mapped, strata, weights).to_row(),
            "producers_accuracy": stratified_ratio(hit, is_it, strata, weights).to_row(),
        }
    overall = stratified_mean(right, strata, weights).to_row()
    result = {"overall": overall, "classes": classes, "answered": len(points), "pooled": pooled}
    return result | ({"regions": [drawn.of_region(part, table) for part in parts]} if regions else {})


@dataclass(frozen=True)
class Ground:
    """All of a map, or the part of it within a polygon.

    Attributes:
        name: of the polygon; "" for all of the map.
        area_m2: of its mapped ground.
        probability_K: mean probability of each class over it, by area.
        counted_K: share of it that each class has in the map.
        within_N: whether each point lies in it.
        at_NK: probability of each class at the points.
    """

    name: str
    area_m2: float
    probability_K: NDArray[np.float64]
    counted_K: NDArray[np.float64]
    within_N: NDArray[np.bool_]
    at_NK: NDArray[np.float64]


@dataclass(frozen=True)
class _Drawn:
    """The answered points: with their class, their stratum, and the weights of all strata."""

    points: Sequence[Mapping[str, Any]]
    reference_N: NDArray[np.int64]
    strata_N: NDArray[np.int64]
    weights_H: NDArray[np.float64]

    def assisted(self, ground: Ground, at: int, value: int, hectares: float | None) -> dict[str, Any]:
        """Share and hectares of a class, by regression on its probability."""
        is_it = (self.reference_N == value).astype(float)
        mean = float(ground.probability_K[at])
        share = regression_mean(is_it, ground.at_NK[:, at], self.strata_N, self.weights_H, mean=mean)
        return {"share": share.to_row(), "hectares": share.to_row(hectares) if hectares else None}

    def of_region(self, ground: Ground, table: Sequence[tuple[int, str]]) -> dict[str, Any]:
        """Areas of a part of the map, as a domain (Sarndal, Swensson & Wretman 1992, sections 5.8 and 10.3)."""
        hectares, within_N = ground.area_m2 / 1e4, ground.within_N.astype(float)
        count = int(within_N.sum())
        region: dict[str, Any] = {"name": ground.name, "answered": count, "hectares": hectares, "classes": None}
        if count < LEAST:
            return region
        region["classes"] = {}
        for at, (value, name) in enumerate(table):
            is_it, x = (self.reference_N == value).astype(float), ground.at_NK[:, at]
            share = stratified_ratio(is_it * within_N, within_N, self.strata_N, self.weights_H)
            # The slope is that of the whole map: a region has few answers. Its probabilities are known everywhere.
            b = slope(is_it, x, self.strata_N, self.weights_H)
            rest = stratified_ratio((is_it - b * x) * within_N, within_N, self.strata_N, self.weights_H)
            assisted = Estimate(rest.value + b * float(ground.probability_K[at]), rest.error)
            counted = float(ground.counted_K[at])
            region["classes"][name] = {
                "counted": {"share": counted, "hectares": counted * hectares},
                "share": share.to_row(),
                "hectares": share.to_row(hectares),
                "assisted": {"share": assisted.to_row(), "hectares": assisted.to_row(hectares)},
            }
        return region


def _grounds(
    run: StorePath,
    content: Mapping[str, Any],
    points: Sequence[Mapping[str, Any]],
    regions: StorePath | None,
) -> tuple[Ground, list[Ground]]:
    """All of the map, and its parts within polygons that have mapped ground; each tile is read once."""
    table = ClassTable(tuple((row["value"], row["name"], rgb_of(row["color"])) for row in content["classes"]))
    named = [("", None), *(_polygons(regions, grounded=content["ground"]) if regions else ())]
    areas_R, count = np.zeros(len(named)), len(table.classes)
    probability_RK, counted_RK = np.zeros((len(named), count)), np.zeros((len(named), count))
    at_NK, within_RN = np.zeros((len(points), count)), np.zeros((len(named), len(points)), bool)
    by_tile: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for n, point in enumerate(points):
        by_tile[point["tile"]].append((n, point["row"], point["col"]))
    read = _reader(run, table, content["band"])
    for tile in mapped_tiles(run):
        classes_HW, scores_CHW = read_tile(tile, "classes")[0], read_tile(tile, "scores")
        strata_HW, _, areas_HW = read(tile)
        p_KHW = np.stack([class_probability(value, classes_HW, scores_CHW, table) for value in table.values])
        here = by_tile[tile.tile.id]
        for n, row, col in here:
            at_NK[n] = p_KHW[:, row, col]
        # One polygon at a time, in the window that it needs: of a thousand, memory holds one mask.
        for r, inside_HW in _inside(tile.tile, [polygon for _, polygon in named], strata_HW >= 0):
            within_RN[r, [n for n, *_ in here]] = [inside_HW[row, col] for _, row, col in here]
            at = np.flatnonzero(inside_HW)
            ground_P = areas_HW.ravel()[at]
            areas_R[r] += ground_P.sum()
            probability_RK[r] += [p_HW.ravel()[at] @ ground_P for p_HW in p_KHW]
            counted_RK[r] += np.bincount(classes_HW.ravel()[at], ground_P, NODATA + 1)[list(table.values)]
    if regions and not areas_R[1:].any():
        raise DataError(f"no polygon of {regions} meets the map of {run}; give polygons on it")
    over_R1 = np.maximum(areas_R, 1e-9)[:, None]  # a polygon off the map has none
    shares = zip(named, areas_R, probability_RK / over_R1, counted_RK / over_R1, within_RN, strict=True)
    grounds = [Ground(name, float(area), p_K, c_K, within_N, at_NK) for (name, _), area, p_K, c_K, within_N in shares]
    return grounds[0], grounds[1:]


def _inside(
    tile: Tile, polygons: Sequence[dict[str, Any] | None], mapped_HW: NDArray[np.bool_]
) -> Iterator[tuple[int, NDArray[np.bool_]]]:
    """(index, mapped pixels within it) of every polygon that meets a tile; None stands for everywhere."""
    grid, near = tile.grid, region.degrees_around(tile.grid, tile.window) if tile.grid.crs else None
    for index, polygon in enumerate(polygons):
        if polygon is None or near is None:
            yield index, mapped_HW
            continue
        if lonlat.within(shape(polygon), near).is_empty:
            continue
        part = region.part_in_region(polygon, grid, tile.window)
        if not part.empty:
            inside_HW = np.zeros_like(mapped_HW)
            cut = part.slices(tile.window)
            inside_HW[cut] = mapped_HW[cut] & region.kept(polygon, grid, part)[0]
            yield index, inside_HW


def _polygons(path: StorePath, *, grounded: bool) -> list[tuple[str, dict[str, Any]]]:
    """(name, GeoJSON in EPSG:4326) of every polygon of a file: its column name or id, else its number."""
    if not grounded:
        raise DataError(f"regions {path} have a place, but the images of the map have none; leave --regions out")
    try:
        frame = read_frame(path)
    except FileNotFoundError:
        raise DataError(f"regions {path} do not exist; give a file of polygons") from None
    frame = frame.to_crs(4326) if frame.crs else frame
    if wrong := sorted(set(frame.geom_type) - {"Polygon", "MultiPolygon"}):
        raise DataError(f"regions {path} have {', '.join(wrong)}, expected polygons")
    column = next((name for name in ("name", "id") if name in frame), None)
    names = frame[column].astype(str).tolist() if column else [str(n + 1) for n in range(len(frame))]
    return list(zip(names, map(geojson, frame.geometry), strict=True))


def _sample_of(run: StorePath, folder: StorePath) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads((upath(folder) / "sample.json").read_bytes())
    except STORE_ERRORS:
        raise DataError(f"{folder} holds no sample; draw one: rayseg area sample {run} --per-stratum 50") from None
    if content["key"] != _key(run):
        raise DataError(f"the sample {folder} is of another map ({content['map']}), not of {run}; draw one of this run")
    return content


def _answers(path: StorePath, ids: Sequence[str], table: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Class value of every point that has an answer."""
    values = {text: value for value, name in table for text in (str(value), name)}
    try:
        lines = upath(path).read_bytes().decode("utf-8-sig").splitlines()
        rows = list(csv.DictReader(lines, delimiter=";" if lines and ";" in lines[0] else ","))
    except _UNREADABLE as error:
        raise DataError(f"answers {path} cannot be read: {error}; give a CSV with the columns id,class") from None
    if not rows or not {"id", "class"} <= rows[0].keys():
        raise DataError(f"answers {path} have no columns id and class; give the answers.csv of the sample")
    known, seen = set(ids), set()
    given = {}
    for row in rows:
        answer = (row["class"] or "").strip()
        if row["id"] not in known:
            raise DataError(
                f"answers {path} name the point {row['id']}, which is not in this sample; give its answers.csv"
            )
        if row["id"] in seen:
            raise DataError(f"answers {path} name the point {row['id']} twice; keep one answer")
        seen.add(row["id"])
        if answer and answer not in values:
            raise DataError(
                f"answers {path} give point {row['id']} the class {answer!r}, expected one of {listed(list(values))}"
            )
        if answer:
            given[row["id"]] = values[answer]
    return given


def _joined(
    strata: Sequence[Mapping[str, Any]], points: Sequence[Mapping[str, Any]], names: Mapping[int, str]
) -> tuple[list[int], list[str]]:
    """(stratum that each one counts as, classes with such): one of fewer than two answers joins its class's largest."""
    answered = np.bincount([point["stratum"] for point in points], minlength=len(strata))
    joined, pooled = list(range(len(strata))), []
    for first in range(0, len(strata), _PARTS):
        of_class = [k for k in range(first, first + _PARTS) if strata[k]["area_m2"]]
        lacking = [k for k in of_class if answered[k] < 2]
        if not lacking:
            continue
        largest = max(of_class, key=lambda k: (answered[k] >= 2, strata[k]["area_m2"]))
        total = sum(int(answered[k]) for k in {*lacking, largest})
        name = names[strata[first]["value"]]
        if total < 2:
            raise DataError(f"class {name} of the map has {total} answers, expected two or more; answer more points")
        for k in lacking:
            joined[k] = largest
        pooled.append(name)
    return joined, pooled


def _assisted(row: Mapping[str, Any], both: Callable[..., str]) -> str:
    return both(row["hectares"], " ha") if row["hectares"] else f"share {both(row['share'])}"


def text(estimated: Mapping[str, Any]) -> str:
    """The estimates as text lines."""

    def both(row: Mapping[str, float | None] | None, unit: str = "") -> str:
        if row is None or row["value"] is None or row["error"] is None:
            return "-"
        digits = 1 if unit else 3
        return f"{row['value']:,.{digits}f} ± {Z * row['error']:,.{digits}f}{unit}"

    lines = [f"{estimated['answered']} answers; overall accuracy {both(estimated['overall'])} (95 % intervals)"]
    if estimated["pooled"]:
        lines.append(f"strata of too few answers are joined in: {listed(estimated['pooled'])}")
    for name, row in estimated["classes"].items():
        counted = row["counted"]
        area = f"{both(row['hectares'], ' ha')} (counted {counted['hectares']:,.1f} ha), " if row["hectares"] else ""
        lines.append(
            f"  {name}: {area}share {both(row['share'])} (counted {counted['share']:.3f}), user's accuracy "
            f"{both(row['users_accuracy'])}, producer's accuracy {both(row['producers_accuracy'])}"
        )
        lines.append(f"    assisted by scores: {_assisted(row['assisted'], both)}")
    for part in estimated.get("regions", ()):
        few = "" if part["classes"] else f", {LEAST} are needed for an estimate"
        few = few if part["hectares"] else ", not on the map"
        lines.append(f"{part['name']}: {part['hectares']:,.1f} ha, {part['answered']} answers{few}")
        for name, row in (part["classes"] or {}).items():
            counted = row["counted"]["hectares"]
            lines.append(
                f"  {name}: {both(row['hectares'], ' ha')}, assisted by scores {_assisted(row['assisted'], both)} "
                f"(counted {counted:,.1f} ha)"
            )
    return "\n".join(lines)
