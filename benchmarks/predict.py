"""Pixels per second of prediction: the engines inline and ray against a plain PyTorch loop, interleaved.

All three read windows of one generated scene, cut patches on the same lattice, run the same network in as many threads
as PyTorch takes by itself, blend, and write classes.tif, scores.tif (COG) and polygons per tile. The loop is what one
would write by hand with rasterio, PyTorch and geopandas: one process, one tile after another. The clock starts when
the model is loaded and the first tile comes to it, and ends when the last tile is recorded.
`-bf16` are the same with `map.precision: bf16`, on CPUs that multiply bfloat16 natively.
Targets: inline 2.5 x the loop, ray 2.2 x.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from measure import Cost, measured, middle, show, tree_seconds
from small_models import MEAN, STD, save_segmenter

KINDS = ("loop", "inline", "ray", "inline-bf16", "ray-bf16")
TILE, PATCH, STRIDE, MARGIN = 2048, 640, 512, 64
LEFT, TOP = 500_000 // TILE * TILE, 5_000_000 // TILE * TILE  # 1 m pixels: the scene begins with a tile


def write_world(folder: Path, *, columns: int, rows: int, architecture: str, encoder: str) -> None:
    """`scene.tif`, its catalogue, and the bundle of a network that marks about half of it."""
    from rasterio.transform import from_origin

    from rayseg.io import labels

    scene_CHW = _landscape(rows * TILE, columns * TILE)
    _write_cog(folder / "scene.tif", scene_CHW, from_origin(LEFT, TOP, 1, 1), compress="DEFLATE")
    labels.ingest_rasters([str(folder / "scene.tif")], str(folder / "imagery"))
    sample_CHW = scene_CHW[:, :PATCH, :PATCH]
    where = {"patch": PATCH, "stride": STRIDE}
    save_segmenter(folder / "model", sample_CHW, **where, encoder=encoder, architecture=architecture)


def _landscape(height: int, width: int) -> np.ndarray:
    """Plain fields of 128 px, (3, height, width) uint8: an untrained network makes a calm map of them."""
    colors = np.random.default_rng(1).integers(60, 180, (3, height // 128, width // 128), np.uint8)
    return colors.repeat(128, axis=1).repeat(128, axis=2)


# -- the loop ---------------------------------------------------------------------------------------------------------


def loop(folder: Path, out: Path) -> None:
    """Predict the scene tile by tile, in plain PyTorch; everything on one page, as in a notebook."""
    import rasterio
    import torch
    from rasterio.windows import Window

    from rayseg.models import bundle

    _, model = bundle.build(folder / "model")
    model = model.to(memory_format=torch.channels_last)
    ramp = np.minimum(1, (np.arange(PATCH, dtype=np.float32) + 0.5) / (2 * MARGIN))
    weight = np.outer(np.minimum(ramp, ramp[::-1]), np.minimum(ramp, ramp[::-1])).astype(np.float32)
    (out / "begun").touch()
    with rasterio.open(folder / "scene.tif") as scene:
        for row in range(0, scene.height, TILE):
            for col in range(0, scene.width, TILE):
                # the tile with a ring of cells around it; beyond the scene the image is mirrored
                halo = STRIDE + MARGIN
                top, left = max(0, row - halo), max(0, col - halo)
                bottom, right = min(scene.height, row + TILE + halo), min(scene.width, col + TILE + halo)
                window = Window(left, top, right - left, bottom - top)
                image, valid = scene.read(window=window), scene.dataset_mask(window=window)
                gaps = [(top - row + halo, row + TILE + halo - bottom), (left - col + halo, col + TILE + halo - right)]
                image = np.pad(image, [(0, 0), *gaps], mode="symmetric")
                total = np.zeros((TILE, TILE), np.float32)
                weights = np.zeros((TILE, TILE), np.float32)
                for y in range(-STRIDE, TILE + 1, STRIDE):
                    for x in range(-STRIDE, TILE + 1, STRIDE):
                        # the cell of this patch begins one margin in; patches without imagery in it are left out
                        y0, x0 = y + halo, x + halo
                        inside = row + y + MARGIN + STRIDE > 0 and row + y + MARGIN < scene.height
                        inside &= col + x + MARGIN + STRIDE > 0 and col + x + MARGIN < scene.width
                        if not inside or y >= TILE or x >= TILE or y + PATCH <= 0 or x + PATCH <= 0:
                            continue
                        patch = (image[:, y0 : y0 + PATCH, x0 : x0 + PATCH].astype(np.float32) - MEAN) / STD
                        batch = torch.from_numpy(patch[None]).to(memory_format=torch.channels_last)
                        with torch.inference_mode():
                            found = model(batch).sigmoid()[0, 0].numpy()
                        r0, r1, c0, c1 = max(0, y), min(TILE, y + PATCH), max(0, x), min(TILE, x + PATCH)
                        cut = weight[r0 - y : r1 - y, c0 - x : c1 - x]
                        total[r0:r1, c0:c1] += cut * found[r0 - y : r1 - y, c0 - x : c1 - x]
                        weights[r0:r1, c0:c1] += cut
                mean = total / weights
                valid = valid[row - top : row - top + TILE, col - left : col - left + TILE] > 0
                classes = np.where(valid, mean > 0.5, 255).astype(np.uint8)
                scores = np.where(valid, np.rint(mean * 254), 255).astype(np.uint8)
                place = scene.window_transform(Window(col, row, TILE, TILE))
                _write_tile(out / f"{row}_{col}", classes, scores, place)


def _write_tile(folder: Path, classes: np.ndarray, scores: np.ndarray, place: object) -> None:
    import geopandas
    from rasterio.features import shapes
    from shapely.geometry import shape

    folder.mkdir()
    colors = {0: (0, 0, 0, 255), 1: (0, 158, 115, 255)}
    _write_cog(folder / "classes.tif", classes[None], place, nodata=255, colors=colors, overview_resampling="MODE")
    _write_cog(folder / "scores.tif", scores[None], place, nodata=255, overview_resampling="AVERAGE", predictor="YES")
    found = [(shape(outline), int(value)) for outline, value in shapes(classes, mask=classes != 255, transform=place)]
    polygons = {"class": [value for _, value in found], "geometry": [outline for outline, _ in found]}
    geopandas.GeoDataFrame(polygons, crs="EPSG:32631").to_parquet(folder / "polygons.parquet", compression="zstd")
    (folder / "tile.json").write_text(json.dumps({"pixels": int((classes == 1).sum())}))


def _write_cog(
    path: Path,
    image_CHW: np.ndarray,
    place: object,
    *,
    nodata: int | None = None,
    colors: dict | None = None,
    **options,
) -> None:
    import rasterio
    import rasterio.shutil

    size = {"count": len(image_CHW), "height": image_CHW.shape[1], "width": image_CHW.shape[2], "dtype": "uint8"}
    with rasterio.open("", "w", driver="MEM", crs="EPSG:32631", transform=place, nodata=nodata, **size) as memory:
        memory.write(image_CHW)
        if colors:
            memory.write_colormap(1, colors)
        defaults = {"compress": "DEFLATE", "blocksize": 512, "level": 6}
        rasterio.shutil.copy(memory, path, driver="COG", **(defaults | options))


# -- the engines ------------------------------------------------------------------------------------------------------


def engine(kind: str, folder: Path, out: Path) -> None:
    """The steps of `rayseg predict` up to the mapped tiles."""
    from rayseg.engine.run import Engine, Run
    from rayseg.geo.region import Region
    from rayseg.pipelines.predict import Config
    from rayseg.stages.predict import Predict
    from rayseg.steps import map as mapping

    class Marked(Predict):
        """Leaves a mark when its model is loaded and the first tile is there."""

        def __call__(self, rows: list[dict]) -> list[dict]:
            assert self._loaded
            Path(mark).touch(exist_ok=True)
            return super().__call__(rows)

    mark = str(out / "begun")
    mapping.Predict = Marked
    kind, _, precision = kind.partition("-")
    config = Config(model=str(folder / "model"), map=mapping.MapConfig(precision=precision or "fp32"))
    region = Region("scene", catalog=str(folder / "imagery/catalog.json"))
    with Run.open(str(out / "run"), pipeline="predict", config=config, region=region, engine=Engine(kind)) as run:
        model = run.step("model", mapping.load_model, config.model)
        run.step("predict", mapping.predict_region, region, model, config.map)


def child(kind: str, folder: Path, out: Path) -> dict[str, float]:
    """Wall and processor seconds from the first tile's begin to the last one's end, in this fresh process."""
    from rayseg.engine import tuning

    tuning.prepare()
    marks: list[tuple[float, float]] = []

    def watch() -> None:
        while not (out / "begun").exists():
            time.sleep(0.02)
        marks.append((time.time(), tree_seconds()))

    out.mkdir()
    threading.Thread(target=watch, daemon=True).start()
    if kind == "loop":
        loop(folder, out)
    else:
        engine(kind, folder, out)
    pattern = "*/tile.json" if kind == "loop" else "run/steps/predict/ledger/*.json"
    end = max(path.stat().st_mtime for path in out.glob(pattern))
    return {"wall": end - marks[0][0], "cpu": tree_seconds() - marks[0][1]}


def differing(folder: Path, loops: Path, run: Path) -> float:
    """Share of the pixels whose class is not the loop's."""
    import rasterio

    wrong, count = 0, 0
    for path in sorted(run.glob("run/tiles/*/classes.tif")):
        with rasterio.open(path) as ours:
            row, col = round(TOP - ours.transform.f), round(ours.transform.c - LEFT)
            with rasterio.open(loops / f"{row}_{col}/classes.tif") as theirs:
                wrong += int((ours.read(1) != theirs.read(1)).sum())
                count += ours.width * ours.height
    return wrong / count


def main() -> None:
    """Interleave the three in fresh processes, print the medians and the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=5, help="tiles of 2048 px across (quick: 2)")
    parser.add_argument("--rows", type=int, default=3, help="tiles down (quick: 1)")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (quick: 1)")
    parser.add_argument("--architecture", default="deeplabv3plus", help="of segmentation_models_pytorch")
    parser.add_argument("--encoder", default="mobilenet_v2", help="of segmentation_models_pytorch or timm")
    parser.add_argument("--kinds", nargs="+", default=[*KINDS], choices=KINDS, help="what is measured, the loop first")
    parser.add_argument("--child", nargs=3, metavar=("KIND", "FOLDER", "OUT"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(child(asked.child[0], *map(Path, asked.child[1:]))))
        return
    costs: dict[str, list[Cost]] = {kind: [] for kind in asked.kinds}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(
            folder, columns=asked.columns, rows=asked.rows, architecture=asked.architecture, encoder=asked.encoder
        )
        for number in range(asked.rounds):
            for kind, found in costs.items():
                words = [sys.executable, __file__, "--child", kind, name, str(folder / f"{kind}-{number}")]
                with measured() as whole:
                    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
                found.append(Cost(**json.loads(done.stdout)))
                print(f"{kind}: {found[-1]}, the whole process {whole.wall:.1f} s, load {os.getloadavg()[0]:.1f}")
        wrong = {kind: differing(folder, folder / "loop-0", folder / f"{kind}-0") for kind in costs if kind != "loop"}
    pixels = asked.columns * asked.rows * TILE**2 / 1e6
    base = middle(costs["loop"])
    rows = []
    for kind, found in costs.items():
        cost = middle(found)
        ratios = [mine.wall / theirs.wall for mine, theirs in zip(costs["loop"], found, strict=True)]
        span = f"{min(ratios):.2f}-{max(ratios):.2f}"
        ratio = [base.wall / cost.wall, span, base.cpu / cost.cpu]
        rows.append([kind, pixels / cost.wall, *ratio, cost.cpu, f"{wrong.get(kind, 0.0):.1e}"])
    title = f"Prediction of {pixels:.0f} Mpx, {asked.architecture} on {asked.encoder}, {asked.rounds} rounds"
    show(title, ("", "Mpx/s", "x the loop", "in the rounds", "x by CPU s", "CPU s", "pixels not the loop's"), rows)


if __name__ == "__main__":
    main()
