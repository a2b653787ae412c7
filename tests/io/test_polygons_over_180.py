"""Polygons of instances on the grid of a map, over 180 degrees too."""

import geopandas
import numpy as np
import pytest
import shapely
from pyproj import Transformer
from shapely.affinity import translate

from rayseg.geo.grid import Grid, Window
from rayseg.io.instances import Polygons

WINDOW = Window(0, 0, 100, 80)
FIELD = shapely.box(30, 20, 90, 60)  # in pixels
DEGREES = {"beyond": (179.9975, -17.0), "before": (-180.0025, 65.0)}  # corners of grids over 180 or -180


def written(path, field, crs):
    frame = geopandas.GeoDataFrame(geometry=[field], crs=crs)
    frame.to_parquet(path) if path.suffix == ".parquet" else frame.to_file(path)
    return Polygons.open(str(path))


def forms_of(beyond):
    """A polygon that counts on beyond 180 in the other ways in which files hold it: name -> (shape, CRS)."""
    west = beyond if shapely.bounds(beyond)[0] > 0 else translate(beyond, 360)
    jumping = shapely.transform(west, lambda xy: np.where([True, False], xy - 360 * (xy[:, :1] > 180), xy))
    low, high = (west.intersection(shapely.box(low, -90, low + 180, 90)) for low in (0, 180))
    forms = {"east": (west, "EPSG:4326"), "west": (translate(west, -360), "OGC:CRS84"), "jump": (jumping, "EPSG:4326")}
    forms["split"] = (shapely.MultiPolygon([low, translate(high, -360)]), "EPSG:4326")
    south = shapely.bounds(west)[1] < 0
    for zone in (60, 1):
        code = f"EPSG:{32700 + zone if south else 32600 + zone}"
        to_zone = Transformer.from_crs("EPSG:4326", code, always_xy=True)
        forms[code] = (shapely.transform(west, lambda xy, to=to_zone: np.stack(to.transform(*xy.T), axis=1)), code)
    return forms


@pytest.mark.parametrize("place", list(DEGREES))
@pytest.mark.parametrize("suffix", ["parquet", "geojson"])
def test_a_polygon_over_180_degrees_is_the_same_however_its_file_counts(tmp_path, place, suffix):
    grid = Grid("EPSG:4326", (5e-5, 5e-5), DEGREES[place])
    affine = grid.transform(Window(0, 0, 1, 1))
    field = shapely.transform(FIELD, lambda xy: np.stack(affine @ xy.T, axis=1))
    expected = np.zeros((80, 100), int)
    expected[20:60, 30:90] = 1
    for name, (form, crs) in forms_of(field).items():
        if suffix == "geojson" and not crs.startswith(("EPSG:4326", "OGC")):
            continue
        found = written(tmp_path / f"{name.replace(':', '')}.{suffix}", form, crs).ids(grid, WINDOW)
        assert (found != expected).sum() == 0, name


def test_polygons_away_from_180_keep_their_exact_place(tmp_path):
    grid = Grid("EPSG:32633", (10.0, 10.0), (500_000.0, 5_000_000.0))
    field = shapely.box(500_300, 4_999_400, 500_900, 4_999_800)
    found = written(tmp_path / "a.parquet", field, "EPSG:32633").ids(grid, WINDOW)
    assert (found[20:60, 30:90] == 1).all()
    assert found.sum() == 40 * 60
