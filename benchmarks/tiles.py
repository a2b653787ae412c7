"""The tiles of a country: from a catalogue of scenes to the manifest of a run, in a fresh process.

Scenes of 10 km at 0.5 m cover a country with a ragged border, in the UTM zone of each; a tile is 2048 px. Planned is
by `mapping.manifest`, as a run does it: items are read and chosen, tiles laid out and clipped with the border, the
manifest is written and read back. Targets for 600,000 tiles: 60 s, 2 GiB.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
from measure import measured, peak_mib, show

SIDE = 10_000.0
RESOLUTION = 0.5
TILE = 2048
CENTRE = (3.0, 47.0)  # two zones and a half


def border(tiles: int) -> dict:
    """A ragged star of 2,000 corners about as large as so many tiles, with a lake, GeoJSON in EPSG:4326."""
    radius_m = math.sqrt(tiles * (TILE * RESOLUTION) ** 2 / math.pi)
    angles = np.linspace(0, 2 * math.pi, 2000, endpoint=False)
    wobble = 1 + 0.12 * np.sin(3 * angles) + 0.05 * np.sin(17 * angles) + 0.01 * np.sin(211 * angles)
    outer = _ring(radius_m * wobble, angles)
    lake = _ring(np.full(60, radius_m / 8), np.linspace(0, 2 * math.pi, 60, endpoint=False))
    return {"type": "Polygon", "coordinates": [outer, lake[::-1]]}


def _ring(radii_m: np.ndarray, angles: np.ndarray) -> list[list[float]]:
    lats = CENTRE[1] + radii_m * np.sin(angles) / 111_200
    lons = CENTRE[0] + radii_m * np.cos(angles) / (111_300 * math.cos(math.radians(CENTRE[1])))
    points = np.round(np.stack([lons, lats], axis=1), 6).tolist()
    return [*points, points[0]]


def write_catalogue(folder: Path, geometry: dict, *, count: int) -> tuple[str, int]:
    """`items.parquet` over the scenes that touch the border's box, each in its zone, and others; (path, how many)."""
    import shapely
    from rasterio.warp import transform_bounds
    from stac_geoparquet.arrow import parse_stac_items_to_arrow, to_parquet

    area = shapely.geometry.shape(geometry)
    west, south, east, north = area.bounds
    items = []
    for zone in range(int((west + 180) // 6), int((east + 180) // 6) + 1):
        code = f"EPSG:{32601 + zone}"
        edges = max(west, zone * 6 - 180), south, min(east, zone * 6 - 174), north
        left, bottom, right, top = transform_bounds("EPSG:4326", code, *edges, densify_pts=21)
        for x in np.arange(left // SIDE, right // SIDE + 1) * SIDE:
            for y in np.arange(bottom // SIDE, top // SIDE + 1) * SIDE:
                box = transform_bounds(code, "EPSG:4326", x, y, x + SIDE, y + SIDE, densify_pts=5)
                if area.intersects(shapely.box(*box)) and edges[0] <= (box[0] + box[2]) / 2 < edges[2]:
                    items.append(_item(f"{code[5:]}_{x:.0f}_{y:.0f}", code, x, y + SIDE, box))
    table = pa.table(parse_stac_items_to_arrow(items))
    copies = [table] + [_elsewhere(table, at) for at in range(1, -(-count // len(table)))]
    to_parquet(pa.concat_tables(copies), folder / "items.parquet")
    return str(folder / "items.parquet"), sum(map(len, copies))


def _elsewhere(table: pa.Table, at: int) -> pa.Table:
    """The same scenes south of the equator, under other ids."""
    import pyarrow.compute as pc

    ids = pc.binary_join_element_wise(table["id"], str(at), "-")
    edges = {name: pc.struct_field(table["bbox"], name) for name in ("xmin", "ymin", "xmax", "ymax")}
    edges |= {"ymin": pc.negate(edges["ymax"]), "ymax": pc.negate(edges["ymin"])}
    boxes = [pa.StructArray.from_arrays([column.combine_chunks() for column in edges.values()], list(edges))]
    table = table.set_column(table.column_names.index("id"), "id", ids)
    return table.set_column(table.column_names.index("bbox"), "bbox", boxes)


def _item(item_id: str, code: str, left: float, top: float, box: tuple[float, ...]) -> dict:
    import shapely

    pixels = int(SIDE / RESOLUTION)
    bands = [{"name": name, "eo:common_name": name, "data_type": "uint8"} for name in ("red", "green", "blue", "nir")]
    asset = {"href": f"https://host.example/imagery/2025/{item_id}.tif", "type": "image/tiff", "roles": ["data"]}
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [],
        "id": item_id,
        "geometry": json.loads(shapely.to_geojson(shapely.box(*box))),
        "bbox": list(box),
        "properties": {
            "datetime": datetime(2025, 6, 1, tzinfo=UTC).isoformat(),
            "proj:code": code,
            "proj:shape": [pixels, pixels],
            "proj:transform": [RESOLUTION, 0.0, left, 0.0, -RESOLUTION, top],
        },
        "links": [],
        "assets": {"image": asset | {"bands": bands}},
    }


def plan(catalogue: str, region: str, out: str) -> dict[str, float]:
    """Plan as a run does; seconds (of planning, and with the imports), processor seconds, peak MiB, tiles."""
    with measured() as whole:
        from rayseg.engine.run import Engine, Step
        from rayseg.geo.region import Region
        from rayseg.models.bundle import Architecture, Bundle, Scaling
        from rayseg.steps import map as mapping

        described = Bundle(
            name="segmenter",
            task="segmentation",
            architecture=Architecture(factory="segmenter", options={}),
            classes=((0, "background", (0, 0, 0)), (1, "found", (0, 158, 115))),
            bands=("red", "green", "blue"),
            dtype="uint8",
            scaling=Scaling(mean=(100.0,) * 3, std=(50.0,) * 3),
            patch=512,
            stride=384,
        )
        area = Region("country", geometry=json.loads(Path(region).read_text()), catalog=catalogue)
        with measured() as planning:
            rows = mapping.manifest(Step("predict", out, "", Engine()), area, described, mapping.MapConfig(tile=TILE))
    zones = len({row["crs"] for row in rows})
    costs = {"seconds": planning.wall, "cpu": planning.cpu, "with imports": whole.wall}
    return costs | {"peak MiB": peak_mib(), "tiles": len(rows), "zones": zones}


def main() -> None:
    """Write the catalogue, plan in a fresh process, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiles", type=int, default=600_000, help="about how many (quick: 6000)")
    parser.add_argument("--items", type=int, default=0, help="about how many in the catalogue, others are elsewhere")
    parser.add_argument("--plan", nargs=3, metavar=("CATALOGUE", "REGION", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.plan:
        print(json.dumps(plan(*asked.plan)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder, geometry = Path(name), border(asked.tiles)
        catalogue, scenes = write_catalogue(folder, geometry, count=asked.items)
        (folder / "region.json").write_text(json.dumps(geometry))
        words = [sys.executable, __file__, "--plan", catalogue, str(folder / "region.json"), str(folder / "run")]
        found = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
        size = (folder / "run/steps/predict/manifest.parquet").stat().st_size / 2**20
    row = [found[key] for key in ("tiles", "zones", "seconds", "cpu", "with imports", "peak MiB")]
    columns = ("scenes", "tiles", "zones", "seconds", "CPU s", "s with imports", "peak MiB", "manifest MiB")
    show("The tiles of a country", columns, [[scenes, *row, size]])


if __name__ == "__main__":
    main()
