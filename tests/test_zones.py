"""Ground of several UTM zones is mapped once: by tiles, by areas and by polygons, whatever the order of the imagery."""

import re
from dataclasses import dataclass, replace

import geopandas
import numpy as np
import pytest
import rasterio
import shapely
from affine import Affine
from pyproj import CRS, Geod, Transformer
from rasterio.enums import ColorInterp
from shapely.geometry import mapping
from small_world import rayseg
from tiny_maps import TABLE, Bright, described

from rayseg.engine.ledger import Settled
from rayseg.errors import DataError
from rayseg.geo.grid import Grid, Tile, zone_bounds, zone_of
from rayseg.geo.lonlat import polygons_in, transformer, turn_of
from rayseg.geo.region import on_grid, pixels_inside, resolve_region
from rayseg.io import labels, vectors
from rayseg.io.maps import mapped_tiles, pixel_area_m2, pixel_areas_m2
from rayseg.io.output_grids import beyond_utm, expect_mappable, grids_of
from rayseg.io.rasters import footprint, read, source_of_file
from rayseg.io.sources import Source, outline_of
from rayseg.models.segmenter import Probabilities
from rayseg.stages.predict import Predict
from rayseg.stages.read import ReadTile, tile_rows
from rayseg.stages.rows import TileRow
from rayseg.stages.write import WriteTile

GEOD = Geod(ellps="WGS84")


def scene(path, crs, bounds, *, side, bright, dtype="uint8"):
    """A scene over `bounds` (degrees, east perhaps beyond 180) and a little around; bright(lon, lat) is class 1."""
    if crs == "EPSG:4326":
        left, bottom, right, top = bounds
    else:
        west, south, east, north = bounds
        edge = shapely.segmentize(shapely.box(west, south, east, north), 0.05)
        xs, ys = Transformer.from_crs("EPSG:4326", crs, always_xy=True).transform(*shapely.get_coordinates(edge).T)
        left, bottom, right, top = xs.min(), ys.min(), xs.max(), ys.max()
    left, top = np.floor(left / side) * side, np.ceil(top / side) * side
    width, height = int(np.ceil((right - left) / side)), int(np.ceil((top - bottom) / side))
    cols, rows = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(left + cols * side, top - rows * side)
    value = np.where(bright(lon % 360, lat), 220, 60).astype(dtype)
    profile = {"driver": "GTiff", "count": 3, "height": height, "width": width, "dtype": dtype, "crs": crs}
    with rasterio.open(path, "w", **profile, transform=Affine(side, 0, left, 0, -side, top)) as file:
        file.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue]
        file.write(np.stack([value] * 3))
    return source_of_file(str(path), path.stem)


@dataclass
class Mapped:
    tiles: dict
    polygons: object
    files: dict


def mapped(folder, sources, text, *, size=256, dtype="uint8"):
    """The class map of a region, tile by tile, and its polygons."""
    geometry = resolve_region(text).geometry if text else None
    bundle = described(patch=32, stride=16, dtype=dtype)
    predict = Predict("", batch=4, device="cpu")
    predict.__dict__["_loaded"] = (bundle, Probabilities(Bright()).eval())
    write = WriteTile(str(folder), TABLE, bands=("cover",), geometry=geometry, model="m.json")
    stages = (ReadTile(bundle.bands, patch=bundle.patch, stride=bundle.stride), predict, write)
    tiles, parts, files = {}, [], {}
    for row in tile_rows(sources, geometry, size=size, halo=48):
        done = TileRow.from_row(row)
        tile = done.tile
        for stage in stages:
            done = done if isinstance(done, Settled) else stage([done])[0]
        assert done.status in {"done", "empty", "nodata"}, done.reason
        if done.status != "nodata":
            assert tile.id not in tiles
            with rasterio.open(folder / tile.id / "classes.tif") as file:
                tiles[tile.id] = tile, file.read(1)
            parts.append(vectors.read_parts(folder / tile.id / "parts.parquet"))
            files[tile.id] = tiles[tile.id][1].tobytes()
    return Mapped(tiles, vectors.join_parts(parts, TABLE), files)


def area_of(text):
    return sum(
        abs(GEOD.geometry_area_perimeter(shapely.segmentize(part, 0.01))[0])
        for part in shapely.get_parts(shapely.geometry.shape(resolve_region(text).geometry))
    )


def check_once(found, text):
    """Areas of tiles add to the region's; the centre of every mapped pixel lies in the zone of its tile."""
    total = 0.0
    for tile, classes in found.tiles.values():
        seen = classes != 255
        total += seen.sum() * pixel_area_m2(tile)
        rows, cols = np.nonzero(seen)
        xs, ys = tile.grid.transform(tile.window) @ (cols + 0.5, rows + 0.5)
        lon, lat = Transformer.from_crs(tile.grid.crs, "EPSG:4326", always_xy=True).transform(xs, ys)
        west, south, east, north = zone_bounds(tile.grid.crs)
        off = 1e-6  # the seam of a grid is a line of chords
        assert (((lon - west + 180) % 360 - 180 > -off) & ((lon - east + 180) % 360 - 180 < off)).all()
        assert ((lat > south - off) & (lat < north + off)).all()
    assert total == pytest.approx(area_of(text), rel=1e-3)


def test_a_region_over_three_zones_and_the_antimeridian_is_mapped_once(tmp_path):
    def bright(lon, lat):
        band = (abs(lat - 50.2) < 0.03) & (lon > 173.6) & (lon < 180.4)
        disk = np.hypot((lon - 180) * 0.64, lat - 50.4) < 0.08
        return band | disk | (np.hypot((lon - 176) * 0.64, lat - 50.4) < 0.05)

    text = "173.5,50.1,-179.5,50.6"
    sources = [
        scene(tmp_path / "a.tif", "EPSG:32659", (173, 50, 174.4, 50.7), side=500, bright=bright),
        scene(tmp_path / "b.tif", "EPSG:32660", (173.8, 50, 180.2, 50.7), side=500, bright=bright),
        scene(tmp_path / "c.tif", "EPSG:32601", (179.6, 50, 181, 50.7), side=500, bright=bright),
    ]
    assert [grid.crs for grid, _ in grids_of(sources)] == ["EPSG:32601", "EPSG:32659", "EPSG:32660"]
    (tmp_path / "out").mkdir()
    found = mapped(tmp_path / "out", sources, text)
    check_once(found, text)
    cover = found.polygons[found.polygons["name"] == "cover"]
    assert len(cover) == 3
    band, over, _ = (cover.iloc[at] for at in np.argsort(-cover["area_m2"].to_numpy()))
    expected = area_of("173.6,50.17,-179.6,50.23")
    assert band["area_m2"] == pytest.approx(expected, rel=0.02)
    assert band.geometry.is_valid
    assert len(shapely.get_parts(band.geometry)) == len(shapely.get_parts(over.geometry)) == 2  # cut at 180 alone
    again = mapped(tmp_path / "out", sources[::-1], text)
    assert again.files == found.files
    assert again.polygons.equals(found.polygons)


FIELDS = {"west": 11.9925, "over": 11.998, "east": 12.0035}
"""Western edges of three fields of 0.0045 x 0.0045 degrees, south of the equator, around the seam at 12 E."""


SETTINGS = {
    "as it is": ("map.tile=64", "patch=96", "stride=64", "superpixels.least=60", "superpixels.reduce=1"),
    "enlarged": ("map.tile=256", "patch=384", "stride=256", "superpixels.least=960", "enlarge={}"),
}


@pytest.mark.more
@pytest.mark.e2e
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_plot_over_a_seam_has_one_number_one_outline_and_its_own_area(tmp_path, kind):
    """agri: instances, not classes."""

    def bright(lon, lat):
        inside = np.zeros(lon.shape, bool)
        for west in FIELDS.values():
            inside |= (lon > west) & (lon < west + 0.0045) & (abs(lat + 20.005) < 0.00225)
        return inside

    (tmp_path / "in").mkdir()
    scene(tmp_path / "in/a.tif", "EPSG:32732", (11.99, -20.009, 12.003, -20.001), side=10, bright=bright)
    scene(tmp_path / "in/b.tif", "EPSG:32733", (11.996, -20.009, 12.011, -20.001), side=10, bright=bright)
    region = f"{labels.ingest_rasters(tmp_path / 'in', tmp_path / 'cat')}#imagery"
    words = [word for setting in ("proposer=felzenszwalb", *SETTINGS[kind]) for word in ("--set", setting)]
    found = rayseg(
        "run", "pipeline", "agri", "--region", region, "--out", tmp_path / "run", "--engine", "inline", *words
    )
    assert found.exit_code == 0, found.output
    plots = geopandas.read_parquet(tmp_path / "run/plots.parquet")
    assert plots["number"].is_unique
    middles = {name: shapely.Point(west + 0.00225, -20.005) for name, west in FIELDS.items()}
    numbers = {}
    for name, west in FIELDS.items():
        [plot] = plots[plots.covers(middles[name].buffer(0.0005))].itertuples()
        field = shapely.box(west, -20.00725, west + 0.0045, -20.00275)
        smooth = 0.03 * (kind == "enlarged")  # edges are drawn between the pixels
        assert plot.geometry.symmetric_difference(field).area < (0.08 + smooth) * field.area, name
        assert plot.area_m2 == pytest.approx(abs(GEOD.geometry_area_perimeter(field)[0]), rel=0.09 + smooth), name
        numbers[name] = plot.number
    assert len(set(numbers.values())) == 3
    held = {name: set() for name in FIELDS}
    for path in (tmp_path / "run/tiles").glob("*/plots.tif"):
        with rasterio.open(path) as file:
            shown = set(np.unique(file.read(1)).tolist())
        for name, number in numbers.items():
            held[name] |= {path.parent.name[:5]} if number in shown else set()
    assert held == {"west": {"32732"}, "over": {"32732", "32733"}, "east": {"32733"}}


@pytest.mark.parametrize(
    ("text", "sources", "dtype"),
    [
        ("5.9,-0.1,6.1,0.1", [("EPSG:32631", 200), ("EPSG:32732", 300)], "uint16"),  # four zones meet
        ("-66.1,-33.1,-65.9,-33", [("EPSG:32719", 60), ("EPSG:4326", 0.001)], "float32"),
        ("179.95,-17,-179.95,-16.9", [("EPSG:32760", 100), ("EPSG:3857", 120)], "uint8"),
    ],
)
def test_ground_at_a_seam_is_counted_once_in_every_hemisphere(tmp_path, text, sources, dtype):
    west, south, east, north = map(float, text.split(","))
    east += 360 * (east < west)
    low, high = south - 0.05, north + 0.05
    around = ((west - 0.3, low, east + 0.05, high), (west - 0.05, low, east + 0.3, high))  # centres in two zones
    at = [(west + east) / 2 % 360, (south + north) / 2]

    def bright(lon, lat):
        return np.hypot(lon - at[0], (lat - at[1]) / np.cos(np.radians(at[1]))) < 0.03

    made = [
        scene(tmp_path / f"{k}.tif", crs, around[k], side=side, bright=bright, dtype=dtype)
        for k, (crs, side) in enumerate(sources)
        if crs != "EPSG:3857"
    ]
    if "EPSG:3857" in dict(sources):  # which counts on from one side only
        made += [
            scene(tmp_path / f"{k}.tif", "EPSG:3857", part, side=120, bright=bright, dtype=dtype)
            for k, part in (("w", (179.9, low, 179.999, high)), ("e", (-179.999, low, -179.9, high)))
        ]
    (tmp_path / "out").mkdir()
    found = mapped(tmp_path / "out", made, text, dtype=dtype, size=128)
    check_once(found, text)
    [disk] = found.polygons[found.polygons["name"] == "cover"].itertuples()
    assert disk.area_m2 == pytest.approx(np.pi * 0.03**2 * area_of(text) / area_in_degrees(text), rel=0.1)
    inside = sum(int((classes == 1).sum()) for _, classes in found.tiles.values())
    assert disk.pixels == inside


def area_in_degrees(text):
    """Square degrees of the equator: longitudes shrink with the cosine, and the disks above are drawn so too."""
    shapes = shapely.geometry.shape(resolve_region(text).geometry)
    return shapes.area / np.cos(np.radians(shapes.centroid.y))


# -- planning


def planned(crs, x, y, side, size):
    """The description of a square scene; no file is opened to plan."""
    affine = (side, 0.0, x, 0.0, -side, y)
    return Source(f"{crs[5:]}_{x:.0f}_{y:.0f}", (("/none.tif", ("b1",)),), crs, affine, size, size, "uint8")


ZONES = (1, 2, 9, 14, 22, 33, 43, 47, 54, 59, 60)


@pytest.mark.parametrize("text", ["60,-10,150,55", "-170,5,-50,75", "-180,-80,180,84"])
def test_the_tiles_of_continents_and_of_the_world_are_planned_with_what_lies_in_them(text):
    sources = []
    for number in ZONES:
        for zone, north in (("326", 7_000_000), ("326", 3_000_000), ("327", 9_000_000)):
            sources.append(planned(f"EPSG:{zone}{number:02}", 250_000, north, 1000.0, 500))
    region = shapely.geometry.shape(resolve_region(text).geometry)
    rows = tile_rows(sources, mapping(region), size=256, halo=64)
    assert len({row["id"] for row in rows}) == len(rows)
    ground = {}
    for row in rows:
        tile = Tile.from_row(row)
        left, bottom, right, top = tile.grid.bounds(tile.window)
        to_degrees = Transformer.from_crs(tile.grid.crs, "EPSG:4326", always_xy=True)
        lon, lat = to_degrees.transform((left + right) / 2, (bottom + top) / 2)
        ground[row["id"]] = region.distance(shapely.Point(lon, lat))
        west, _, east, _ = zone_bounds(tile.grid.crs)
        assert west - 0.5 < lon < east + 0.5 or abs(lon) > 179.5
    assert max(ground.values()) < 3
    centres = [
        shapely.Point(number * 6 - 183, lat)
        for number in (1, 2, 9, 14, 22, 33, 43, 47, 54, 59, 60)
        for lat in (60.9, 24.8, -11.3)
    ]
    whole = {row["id"].split("_")[0] for row in rows}
    well = [point for point in centres if region.buffer(-2).contains(point)]
    zones = {f"32{6 if point.y > 0 else 7}{int((point.x + 183) / 6):02}" for point in well}
    assert zones <= whole


# -- rasters that fit nowhere

GEOSTATIONARY = "+proj=geos +h=35785831 +lon_0=0 +sweep=y +ellps=WGS84"


def test_a_raster_that_fits_no_common_grid_fails_alone():
    field = planned("EPSG:32633", 400_000, 5_000_000, 10.0, 100)
    tilted = planned("EPSG:32634", 400_000, 5_000_000, 10.0, 100)
    disk = replace(planned("EPSG:4326", 0, 0, 1, 1), item_id="disk", crs=CRS.from_user_input(GEOSTATIONARY).to_wkt())
    disk = replace(disk, transform=(50_000.0, 0, -5_500_000.0, 0, -50_000.0, 5_500_000.0), height=220, width=220)
    world = replace(planned("EPSG:4326", -180, 90, 1.0, 1), item_id="world", height=180, width=360)
    cap = replace(planned("EPSG:3413", -2e6, 2e6, 10_000.0, 400), item_id="cap")
    for odd in (disk, world, cap):
        assert list(beyond_utm([field, odd])) == list(beyond_utm([odd, field])) == [odd.item_id]
        assert odd.item_id in str(beyond_utm([field, odd])[odd.item_id])
        expect_mappable(odd, tile=2048)  # it can be mapped alone
    refused = beyond_utm([field, tilted, disk, world, cap])
    assert set(refused) == {"disk", "world", "cap"}
    assert len(grids_of([field, tilted])) == 2


@pytest.mark.parametrize(
    ("crs", "side", "why"),
    [
        ("+proj=sinu +R=6371007.181", 2e5, "reaches beyond the edge of the Earth"),
        (
            "+proj=lcc +lat_1=49 +lat_2=44 +lat_0=46 +lon_0=3",
            4e5,
            "cannot be placed .*: its outline in degrees crosses",
        ),
    ],
)
def test_a_raster_that_leaves_the_earth_or_crosses_itself_fails_alone(crs, side, why):
    field = planned("EPSG:32633", 400_000, 5_000_000, 10.0, 100)
    wide = replace(field, item_id="wide", crs=CRS.from_user_input(crs).to_wkt())
    wide = replace(wide, transform=(4e5, 0, -2e7, 0, -side, side * 50))
    for imagery in ([field, wide], [wide, field]):
        refused = beyond_utm(imagery)
        assert list(refused) == ["wide"]
        assert re.match(f"wide {why}", str(refused["wide"]))


@pytest.mark.parametrize(
    "steps", [(0.0, 0.0, 0.0), (10.0, 0.0, 0.0), (10.0, 10.0, 10.0), (np.nan, 0, -9), (np.inf, 0, -9)]
)
def test_a_raster_whose_pixels_have_no_area_fails_alone(steps):
    field = planned("EPSG:32633", 400_000, 5_000_000, 10.0, 100)
    flat = replace(field, item_id="flat", transform=(steps[0], steps[1], 4e5, steps[1], steps[2], 5e6))
    with pytest.raises(DataError, match=r"flat cannot be placed by its transform .*: expected finite numbers"):
        expect_mappable(flat, tile=2048)
    assert list(beyond_utm([field, flat])) == list(beyond_utm([flat, field])) == ["flat"]


@pytest.mark.parametrize(("side", "west"), [(0.25, -180.125), (1.0, -180.5), (1.0, -0.5), (2.5, -1.25)])
def test_a_world_registered_on_the_centres_of_its_pixels_ends_at_the_poles(side, west):
    """The first and the last row reach half a pixel beyond the poles."""
    width, height = round(360 / side), round(180 / side) + 1
    transform = (side, 0.0, west, 0.0, -side, 90 + side / 2)
    world = Source("w", (("w.tif", ("b1",)),), "EPSG:4326", transform, height, width, "uint8")
    expect_mappable(world, tile=4096)
    [(grid, _)] = grids_of([world])
    tile = Tile("w", grid, footprint(world, grid))
    areas_H = pixel_areas_m2(tile)[:, 0]
    assert areas_H.sum() * width == pytest.approx(510.066e12, rel=1e-3)
    frame = vectors.join_parts(
        [vectors.polygons_of(np.ones((height, width), np.uint8), None, tile.grid, tile.window)], TABLE
    )
    assert frame["area_m2"].sum() == pytest.approx(510.066e12, rel=1e-3)
    assert frame.total_bounds == pytest.approx((-180, -90, 180, 90))
    with pytest.raises(DataError, match="nowhere on Earth"):
        expect_mappable(replace(world, transform=(side, 0.0, west, 0.0, -side, 90 + 2 * side)), tile=4096)


@pytest.mark.more
def test_superpixels_of_one_network_over_a_seam_are_counted_once(tmp_path):
    """A bright band over two zones: one label on both sides, no pixel beyond its zone, areas of the ground."""

    def bright(lon, lat):
        return abs(lat - 50.2) < 0.008

    scene(tmp_path / "a.tif", "EPSG:32632", (11.93, 50.17, 12.02, 50.23), side=30, bright=bright)
    scene(tmp_path / "b.tif", "EPSG:32633", (11.98, 50.17, 12.07, 50.23), side=30, bright=bright)
    catalog = labels.ingest_rasters([tmp_path / "a.tif", tmp_path / "b.tif"], tmp_path / "cat")
    words = ("run", "pipeline", "superpixel", "--region", catalog, "--out", tmp_path / "run", "--engine", "inline")
    assert rayseg(*words, "--set", "shared=true").exit_code == 0
    tiles = {mapped.tile.grid.crs: mapped for mapped in mapped_tiles(tmp_path / "run")}
    assert tiles.keys() == {"EPSG:32632", "EPSG:32633"}
    ground = area_of("11.9266,50.1686,12.0738,50.2296")  # both scenes, each a pixel around its box
    assert sum(sum(mapped.areas.values()) for mapped in tiles.values()) == pytest.approx(ground, rel=0.01)
    for crs, mapped in tiles.items():
        with rasterio.open(mapped.href) as file:
            classes_HW = file.read(1)
        rows, cols = np.nonzero(classes_HW != 255)
        xs, ys = mapped.tile.grid.transform(mapped.tile.window) @ (cols + 0.5, rows + 0.5)
        lon, lat = Transformer.from_crs(crs, "EPSG:4326", always_xy=True).transform(xs, ys)
        assert (lon < 12 + 1e-6).all() if crs == "EPSG:32632" else (lon > 12 - 1e-6).all()
        values = classes_HW[rows, cols]
        assert set(values[abs(lat - 50.2) < 0.006]) == {1}
        assert set(values[abs(lat - 50.2) > 0.01]) == {0}


@pytest.mark.parametrize("crs", ["EPSG:4326", "EPSG:4167", "EPSG:4284", "EPSG:3857", "EPSG:3395", "EPSG:3832"])
@pytest.mark.parametrize(
    ("west", "east", "south"),
    [
        (178.5, 182.0, -19.0),
        (-182.0, -178.5, 63.0),
        (200.0, 202.0, -19.0),
        (178.5, 180.0, 10.0),
        (-180.0, -179.0, 10.0),
    ],
)
def test_a_scene_near_or_beyond_the_end_of_a_turn_is_whole_in_every_zone(tmp_path, crs, west, east, south):
    """Compared pixel by pixel with the longitude that the scene stores."""
    origin, step = (turn_of(crs)) or (0.0, 1.0)
    side = 0.02 * step
    _, [bottom] = transformer("EPSG:4326", crs).transform([0.0], [south])
    left, width = origin + west * step, round((east - west) / 0.02)
    top = bottom + 50 * side
    values = np.broadcast_to(np.arange(width) + 1, (1, 50, width)).astype("uint16")
    profile = {"driver": "GTiff", "count": 1, "height": 50, "width": width, "dtype": "uint16", "crs": crs}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, transform=Affine(side, 0, left, 0, -side, top)) as file:
        file.write(values)
    source, total = source_of_file(str(tmp_path / "a.tif"), "a"), 0.0
    lat = np.mean(transformer(crs, "EPSG:4326").transform([left, left], [bottom, top])[1])
    for zone in {zone_of((lon + 180) % 360 - 180, lat) for lon in np.linspace(west + 0.01, east - 0.01, 8)}:
        grid = Grid(zone, (2000.0, 2000.0), (0.0, 0.0), divided=True)
        window = footprint(source, grid)
        pixels, valid = read([source], grid, window, bands=source.bands)
        cols, rows = np.meshgrid(np.arange(window.width) + 0.5, np.arange(window.height) + 0.5)
        lon, lat_HW = transformer(zone, crs).transform(*(grid.transform(window) @ (cols, rows)))
        lon = (lon - origin) / step
        col = (lon + 360 * np.rint(((west + east) / 2 - lon) / 360) - west) / 0.02
        inside = (col > 0.5) & (col < width - 0.5) & (lat_HW > bottom + side) & (lat_HW < top - side)
        assert valid[inside].all()
        assert np.abs(pixels[0][inside] - (col[inside] + 0.5)).max() < 1.1
        kept = pixels_inside(on_grid(None, grid, window), grid, window)
        total += (valid & kept).sum() * 4e6
    parts = polygons_in(outline_of(source))
    expected = sum(abs(GEOD.geometry_area_perimeter(shapely.segmentize(part, 0.02))[0]) for part in parts)
    assert total == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("crs", ["EPSG:26931", "EPSG:2056", "EPSG:3375", "EPSG:32633"])
def test_a_plane_about_another_axis_counts_no_turns(crs):
    assert turn_of(crs) is None


def test_a_scene_of_an_oblique_mercator_keeps_its_place_in_utm(tmp_path):
    """EPSG:26931 (Alaska zone 1): its x is no longitude times a step."""
    affine, pixels_HW = Affine(100, 0, 600_000, 0, -100, 700_000), np.arange(1, 2501, dtype="uint16").reshape(50, 50)
    profile = {"driver": "GTiff", "count": 1, "height": 50, "width": 50, "dtype": "uint16", "crs": "EPSG:26931"}
    with rasterio.open(tmp_path / "a.tif", "w", **profile, transform=affine) as file:
        file.write(pixels_HW[None])
    source, grid = source_of_file(str(tmp_path / "a.tif"), "a"), Grid("EPSG:32608", (100.0, 100.0), (0.0, 0.0))
    window = footprint(source, grid)
    pixels, valid = read([source], grid, window, bands=source.bands, categorical=True)
    cols, rows = np.meshgrid(np.arange(window.width) + 0.5, np.arange(window.height) + 0.5)
    xs, ys = transformer("EPSG:32608", "EPSG:26931").transform(*(grid.transform(window) @ (cols, rows)))
    col, row = ~affine @ (xs, ys)
    inside = (col > 1) & (col < 49) & (row > 1) & (row < 49)
    assert inside.sum() > 2000
    assert valid[inside].all()
    down, across = np.divmod(pixels[0][inside].astype(int) - 1, 50)
    assert np.abs(across + 0.5 - col[inside]).max() < 1.1
    assert np.abs(down + 0.5 - row[inside]).max() < 1.1


@pytest.mark.parametrize("south", [-19.0, 40.0])
@pytest.mark.parametrize("pairs", [((200, 202), (-160, -158)), ((178, 182), (-182, -178)), ((177, 182), (-180, -178))])
def test_ground_on_two_turns_of_one_grid_is_divided_and_not_counted_twice(tmp_path, south, pairs):
    sources = []
    for number, (west, east) in enumerate(pairs):
        profile = {"driver": "GTiff", "count": 1, "height": 20, "width": (east - west) * 20, "dtype": "uint8"}
        place = {"crs": "EPSG:4326", "transform": Affine(0.05, 0, west, 0, -0.05, south + 1)}
        with rasterio.open(tmp_path / f"{number}.tif", "w", **profile, **place) as file:
            file.write(np.ones((1, 20, (east - west) * 20), "uint8"))
        sources.append(source_of_file(str(tmp_path / f"{number}.tif"), str(number)))
    total = 0.0
    for grid, members in grids_of(sources):
        windows = [footprint(source, grid) for source in members]
        window = windows[0].union(windows[-1])
        _, valid = read(members, grid, window, bands=("b1",))
        kept = pixels_inside(on_grid(None, grid, window), grid, window)
        total += (valid & kept).sum() * grid.resolution[0] * grid.resolution[1]
    ground = shapely.union_all([outline_of(source) for source in sources])
    expected = sum(
        abs(GEOD.geometry_area_perimeter(shapely.segmentize(part, 0.02))[0]) for part in shapely.get_parts(ground)
    )
    assert total == pytest.approx(expected, rel=0.05)
    # On one turn they share their grid.
    assert grids_of(sources[:1])[0][0].crs == "EPSG:4326"
