"""Which grid images are mapped on, and which of them counts where several show one place."""

import numpy as np
import pytest
import rasterio
from affine import Affine
from pyproj import CRS
from small_world import rayseg

from rayseg.io.output_grids import grids_of, overlap_note
from rayseg.io.sources import Source


@pytest.mark.parametrize("crs", ["EPSG:32718", "EPSG:4326"])
def test_which_of_overlapping_images_counts_is_stated(crs):
    step = 10.0 if crs != "EPSG:4326" else 1e-4
    x, y = (4e5, 8e6) if crs != "EPSG:4326" else (-75.0, -18.0)

    def at(name, col, time):
        return Source(
            name,
            ((f"{name}.tif", ("b1",)),),
            crs,
            (step, 0, x + col * step, 0, -step, y),
            64,
            64,
            "uint8",
            datetime=time,
        )

    old, new, far = at("a", 0, "2020-01-01T00:00:00Z"), at("b", 32, "2024-01-01T00:00:00Z"), at("c", 500, None)
    beside = at("d", 564, None)  # shares an edge with c
    assert overlap_note([far, beside]) == ""
    note = overlap_note([old, new, far, beside])
    assert note.startswith(
        "2 of 4 images overlap; where they do the newest is used, in the order b (2024-01-01T00:00:00Z), a (2020"
    )
    assert grids_of([old, new, far])[0][1][0] is new
    same = overlap_note([at("z", 0, None), at("y", 10, None), at("x", 20, None)])
    order = "x (no date), y (no date), z (no date)"
    assert same == f"3 of 3 images overlap; where they do the first by name is used, in the order {order}."
    mixed = overlap_note([old, new, at("0", 40, "2024-01-01T00:00:00Z")])
    assert "the newest, of equal times the first by name is used, in the order 0 (2024" in mixed


def test_ingest_names_a_crs_without_a_code_and_what_overlaps(tmp_path):
    plane = CRS.from_user_input("+proj=tmerc +lat_0=40 +lon_0=15.3 +x_0=400000 +datum=WGS84").to_wkt()
    crs = plane.replace("unknown", "Town grid", 1)
    for name, x in (("a", 0), ("b", 100)):
        place = Affine(10, 0, x, 0, -10, 0)
        with rasterio.open(
            tmp_path / f"{name}.tif", "w", "GTiff", 64, 64, 1, dtype="uint8", crs=crs, transform=place
        ) as file:
            file.write(np.ones((1, 64, 64), "uint8"))
    line = rayseg("ingest", "rasters", tmp_path, "--out", tmp_path / "cat").stderr
    assert "2 images, Town grid, pixels of 10" in line
    assert "2 of 2 images overlap; where they do the" in line
