"""Every pipeline's default next to its simple baselines on real data, as one table; docs/quality.md has the results.

    python benchmarks/quality.py --data DATA --weights MOBILENET.pth --out DIR [--only gpc agri ...] [--quick]

DATA holds the sets gpc, penang, dubai, landcover and fields; docs/quality.md describes them. The script runs the
product's own commands with its own configurations, one process at a time: one trial of each part, then the next of
each, as long as `--minutes` allow. Every finished trial is a line of DIR/rows.jsonl, and is not run again. DIR/pictures
holds pictures of the maps: of gpc, penang and superpixel the best and the worst image, of the others those of the
reports.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import rasterio
import superpixel
from measure import Cost, measured, show
from PIL import Image
from skimage.color import rgb2lab

from rayseg.geo.grid import NODATA
from rayseg.io import pictures
from rayseg.io.maps import MappedTile, mapped_tiles
from rayseg.metrics import Confusion, percentile_interval
from rayseg.vision.color import mean_color

ROOT = Path(__file__).parents[1]
PRODUCT = "rayseg"
PLACES, CHIP = (450, 850), 256
"""Columns that divide the plane of the set `fields` into three places, and the side in px of its chips."""
COVERS = {"building": 1, "tree": 2}
"""Classes of the set `penang` that are mapped from yes and no."""
Steps = Mapping[str, Mapping[str, Any]]
Panels = Callable[[MappedTile, np.ndarray], list[np.ndarray]]
Trials = dict[str, Callable[[], list["Row"]]]


@dataclass(frozen=True)
class Row:
    """A method as measured in one trial, of one seed or place; higher is better.

    `low` and `high` bound a 95 % interval over images or places. `cpu` and `wall` are seconds, of the product those of
    the whole command without its baselines; `load` is the load average at the end.
    """

    part: str
    measured_on: str
    measure: str
    trial: str
    method: str
    value: float
    low: float | None = None
    high: float | None = None
    cpu: float = 0.0
    wall: float = 0.0
    load: float = 0.0


@dataclass(frozen=True)
class Bench:
    """Where the data is, where results go, and how much is run."""

    data: Path
    weights: Path
    out: Path
    seeds: int
    places: int
    quick: bool

    @cached_property
    def rows(self) -> list[Row]:
        """The trials that have finished."""
        path = self.out / "rows.jsonl"
        return [Row(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []

    def keep(self, rows: Sequence[Row]) -> None:
        """Record the rows of a trial."""
        with (self.out / "rows.jsonl").open("a") as file:
            file.writelines(f"{json.dumps(asdict(row))}\n" for row in rows)
        self.rows.extend(rows)

    def command(self, *words: object) -> Cost:
        """Run a command of rayseg; its output goes to DIR/commands.log."""
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "rayseg", *map(str, words)]
        with (self.out / "commands.log").open("a") as log, measured() as cost:
            print(*command, file=log, flush=True)
            subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=log, stderr=log)
        return cost

    def run(
        self, name: str, pipeline: str, region: Path, settings: Mapping[str, object], *, config: str | None = None
    ) -> tuple[Steps, Cost]:
        """Run a pipeline by a configuration of the product; return its steps' values and its cost."""
        out = self.out / "runs" / name
        words: list[object] = ["--config", ROOT / "configs" / f"{config}.yaml"] if config else []
        words += [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        cost = self.command("run", "pipeline", pipeline, "--region", region, "--engine", "inline", *words, "--out", out)
        return json.loads((out / "run.json").read_text())["steps"], cost


def rows_of(product: Row, steps: Steps, cost: Cost) -> list[Row]:
    """The product's row, and those of the baselines that the run itself measured."""
    simple = steps.get("baseline", {}).get("methods", [])
    spent, load = sum(method["seconds"] for method in simple), os.getloadavg()[0]
    own = {"cpu": cost.cpu - spent, "wall": cost.wall, "load": load}
    same, none = (product.part, product.measured_on, product.measure, product.trial), (None, None)
    baselines = [Row(*same, one["name"], one["value"], *none, one["seconds"], load=load) for one in simple]
    return [replace(product, **own), *baselines]


# -- gpc ---------------------------------------------------------------------------------------------------------------


def gpc(bench: Bench, seed: int) -> list[Row]:
    """Five images with masks, learnt from ten chips with netting and ten without."""
    folders = (bench.data / "gpc/train", bench.out / "data/gpc-chips", bench.data / "gpc/test")
    return cover(bench, "gpc", f"seed {seed}", *folders, members=5, seed=seed)


def cover(
    bench: Bench, part: str, trial: str, chips: Path, labelled: Path, test: Path, *, members: int, seed: int
) -> list[Row]:
    """IoU of the cover in images with masks, by `configs/gpc/small-data.yaml`."""
    if not labelled.exists():
        bench.command("ingest", "folder", chips, "--labels", "folder", "--out", labelled)
    quick = {"segmenter.warm_up.epochs": 1, "classifier.epochs": 1, "members": 1} if bench.quick else {}
    seeds = {"classifier.learning.seed": seed, "segmenter.learning.seed": seed, "members": members}
    weights = {"classifier.weights": bench.weights, "segmenter.weights": bench.weights}
    learnt = {"chips.source": f"{labelled}/catalog.json#chips", "truth": test / "masks"}
    name = f"{part.partition(',')[0]}-{trial}".replace(" ", "-")
    settings = {**learnt, **weights, **seeds, **quick}
    steps, cost = bench.run(name, "gpc", test / "images", settings, config="gpc/small-data")
    found = steps["evaluate"]
    on = f"{found['units']} images, learnt from chips with yes or no"
    row = Row(part, on, "IoU of the cover", trial, PRODUCT, **found["classes"][1]["iou"])
    show_covers(bench, name, test / "masks")
    return [*rows_of(row, steps, cost), *color_rules(test, row)]


def color_rules(test: Path, row: Row) -> list[Row]:
    """Two rules that need no chip: green of a fixed strength, and everything."""
    empty = Confusion(np.zeros((2, 2), np.int64))
    sums = {"a* < -2 of CIE Lab": empty, "everything": empty}
    with measured() as cost:
        for path in sorted((test / "images").iterdir()):
            image_HWC = np.array(Image.open(path).convert("RGB"))
            truth_HW = np.array(Image.open(test / "masks" / f"{path.stem}.png")).astype(np.uint8)
            marks = (rgb2lab(image_HWC)[..., 1] < -2, np.ones(truth_HW.shape, bool))
            for name, marked_HW in zip(sums, marks, strict=True):
                sums[name] += Confusion.from_arrays(truth_HW, marked_HW.astype(np.uint8), 2)
    same, none = (row.part, row.measured_on, row.measure, row.trial), (None, None)
    return [Row(*same, name, float(total.iou[1]), *none, cost.cpu / 2) for name, total in sums.items()]


def show_covers(bench: Bench, name: str, truth: Path) -> None:
    """Image, mask and map of the images with the highest and the lowest IoU."""
    run = bench.out / "runs" / name
    counts = json.loads((run / "steps/evaluate/confusions.json").read_text())["tiles"]
    scored = [(float(Confusion(np.array(counts[m.tile.id])).iou[1]), m) for m in mapped_tiles(str(run))]

    def panels(mapped: MappedTile, image_HWC: np.ndarray) -> list[np.ndarray]:
        del image_HWC
        classes = [file_of(path) for path in (truth / f"{mapped.sources[0].item_id}.png", mapped.href)]
        greys = [np.select([band_HW == 1, band_HW == NODATA], [255, 110], 0).astype(np.uint8) for band_HW in classes]
        return [np.repeat(grey_HW[..., None], 3, axis=2) for grey_HW in greys]

    best_and_worst(bench, name, [pair for pair in scored if not np.isnan(pair[0])], panels)


def file_of(path: Path | str) -> np.ndarray:
    """The first band of a raster."""
    with rasterio.open(path) as file:
        return file.read(1)


def best_and_worst(bench: Bench, name: str, scored: Sequence[tuple[float, MappedTile]], panels: Panels) -> None:
    """Write DIR/pictures/<name>-best-<score>.png and -worst-: the image, and panels of the same place."""
    ranked = sorted(scored, key=lambda pair: pair[0])
    for which, (score, mapped) in (("worst", ranked[0]), ("best", ranked[-1])):
        image_HWC = pictures.shown(mapped.sources, mapped.tile.grid, mapped.tile.window)
        whole_HWC = np.concatenate([image_HWC, *panels(mapped, image_HWC)], axis=1)
        Image.fromarray(whole_HWC).save(bench.out / "pictures" / f"{name}-{which}-{score:.2f}.png")


def penang(bench: Bench) -> Trials:
    """Buildings and trees: every second image gives chips with yes or no, the others are mapped."""
    trials = {}
    for name, value in COVERS.items():
        folder = bench.out / f"data/penang-{name}"
        if not folder.exists():
            divide_penang(bench.data / "penang", folder, value)
        folders = (folder / "chips", folder / "labelled", folder / "test")
        trials[name] = partial(cover, bench, f"penang, {name}", name, *folders, members=2, seed=1000)
    return trials


def divide_penang(source: Path, folder: Path, value: int) -> None:
    """Chips by label, and images with masks of one class: 0 other, 1 the class, 255 not labelled."""
    paths = sorted((source / "masks").iterdir(), key=lambda path: int(path.stem))
    for kind in ("chips/gpc", "chips/nongpc", "test/images", "test/masks"):
        (folder / kind).mkdir(parents=True)
    for at, path in enumerate(paths):
        mask_HW = np.array(Image.open(path))
        image = next((source / "images").glob(f"{path.stem}.*"))
        share = float((mask_HW == value).mean())
        if at % 2:
            shutil.copy(image, folder / "test/images" / image.name)
            binary_HW = np.select([mask_HW == value, mask_HW == 0], [1, NODATA], 0).astype(np.uint8)
            Image.fromarray(binary_HW).save(folder / "test/masks" / f"{path.stem}.png")
        elif share == 0 or share > 0.02:
            shutil.copy(image, folder / "chips" / ("gpc" if share else "nongpc") / image.name)


# -- landcover and al-s4gan --------------------------------------------------------------------------------------------


def landcover(bench: Bench, seed: int) -> list[Row]:
    """Scenes 5 and 6 of Dubai, learnt from scenes 1 to 4 with all masks, by `configs/landcover/dubai-cpu.yaml`."""
    # One scene is mapped: the validation measures all images of scenes 5 and 6 itself.
    name, scenes = f"landcover-{seed}", bench.data / "dubai"
    settings = {"labelled.source": scenes, "segmenter.learning.seed": seed}
    settings |= {"segmenter.head.steps": 20} if bench.quick else {}
    steps, cost = bench.run(name, "landcover", scenes / "tile6", settings, config="landcover/dubai-cpu")
    own, on = steps["validation"], "Dubai, scenes 5 and 6"
    row = Row("landcover", on, "mean IoU", f"seed {seed}", PRODUCT, **own["overall"]["mean_iou"])
    copy_pictures(bench, name, [("worst", own["worst"][0]["picture"])], steps)
    return rows_of(row, steps, cost)


def al_s4gan(bench: Bench, seed: int) -> list[Row]:
    """The same scenes, learnt from 27 masks of chips and all other chips, by `configs/al-s4gan/dubai-cpu.yaml`."""
    quick = {"segmenter.head.steps": 20, "active.strategy": "random"} if bench.quick else {}
    name, scenes = f"al-s4gan-{seed}", bench.data / "dubai"
    settings = {"pool.images": scenes, "seed": seed, **quick}
    steps, cost = bench.run(name, "al-s4gan", scenes / "tile6", settings, config="al-s4gan/dubai-cpu")
    own, on = steps["measure"], f"Dubai, chips of scenes 5 and 6, {steps['segmenter']['masks']} masks"
    row = Row("al-s4gan", on, "mean IoU", f"seed {seed}", PRODUCT, own["mean_iou"], own["low"], own["high"])
    copy_pictures(bench, name, [], steps)
    return rows_of(row, steps, cost)


def copy_pictures(bench: Bench, run: str, found: Sequence[tuple[str, str]], steps: Steps) -> None:
    """Copy pictures of a run, and those of its baselines, to DIR/pictures."""
    baselines = [("baselines", path) for _, path, _ in steps.get("baseline", {}).get("pictures", [])]
    for number, (name, path) in enumerate([*found, *baselines]):
        source = bench.out / "runs" / run / path
        shutil.copy(source, bench.out / "pictures" / f"{run}-{number}-{name}{source.suffix}")


# -- superpixel --------------------------------------------------------------------------------------------------------


def superpixels(bench: Bench, seed: int) -> list[Row]:
    """AMI on thirty crops of Dubai's and DeepGlobe's scenes by the code's defaults, and of k-means of segments."""
    # 1. the crops
    crops, skipped = bench.out / "data/crops", ("#9B9B9B", "#000000")
    if not crops.exists():
        superpixel.scenes(argparse.Namespace(data=bench.data, out=crops, side=768))
        for kind in ("images", "masks") if bench.quick else ():
            for path in sorted((crops / kind).iterdir())[2:]:
                path.unlink()
    # 2. the product and the baseline on all of them: the run's own baseline sees four
    settings = {"network.seed": seed, "truth": crops / "masks", "unlabelled": json.dumps(skipped), "baseline": False}
    steps, cost = bench.run(f"superpixel-{seed}", "superpixel", crops / "images", settings)
    simple = argparse.Namespace(
        images=crops / "images", masks=crops / "masks", out=bench.out / "runs", unlabelled=skipped
    )
    with measured() as simple_cost:
        superpixel.without_run(simple, superpixel.SEGMENTS, seed)
    kept = superpixel.folder(simple, superpixel.SEGMENTS, seed) / "steps/evaluate/agreement.json"
    # 3. intervals over crops
    rows = []
    scenes = (steps["evaluate"]["scenes"], json.loads(kept.read_text())["scenes"])
    mapped = mapped_tiles(str(bench.out / "runs" / f"superpixel-{seed}"))
    scored = [(scenes[0][str(tile.tile.grid.image)]["ami"], tile) for tile in mapped]
    best_and_worst(
        bench,
        f"superpixel-{seed}",
        scored,
        lambda tile, image_HWC: [mean_color(image_HWC, np.minimum(file_of(tile.href), NODATA - 1))],
    )
    for name, found, spent in zip((PRODUCT, superpixel.SEGMENTS), scenes, (cost, simple_cost), strict=True):
        values_N = np.array([scene["ami"] for scene in found.values()])
        draws = np.random.default_rng(0).integers(0, len(values_N), (2000, len(values_N)))
        bounds = percentile_interval(values_N[draws].mean(axis=1))
        on = f"{len(values_N)} crops of Dubai and DeepGlobe, no labels"
        costs = (spent.cpu, spent.wall, os.getloadavg()[0])
        rows.append(Row("superpixel", on, "AMI", f"seed {seed}", name, float(values_N.mean()), *bounds, *costs))
    return rows


# -- agri --------------------------------------------------------------------------------------------------------------


def agri(bench: Bench) -> Trials:
    """Plots of 15 chips that do not overlap: without labels, and learnt from the drawn plots of other places."""
    layout = json.loads((bench.data / "fields/layout.json").read_text())
    offsets, apart = layout["offset_px"], layout["non_overlapping"]
    trials = {"no labels": partial(agri_trial, bench, "no labels", apart, [])}
    for place, (low, high) in list(enumerate(pairwise((-np.inf, *PLACES, np.inf)), 1))[: bench.places]:
        test = [name for name in apart if low <= offsets[name][0] + CHIP / 2 < high]
        corners_N2 = np.array([offsets[name] for name in test])
        far = [name for name in offsets if (np.abs(corners_N2 - offsets[name]).max(axis=1) >= CHIP).all()]
        trials[f"place {place}"] = partial(agri_trial, bench, f"place {place}", test, far)
    return trials


def agri_trial(bench: Bench, trial: str, test: Sequence[str], learn: Sequence[str]) -> list[Row]:
    """F1 of objects by `configs/agri/small-data.yaml`, or without anything to learn from by superpixels."""
    name = f"agri-{trial}".replace(" ", "-")
    data = bench.out / "data" / name
    for kind, names in (("test", test), ("learn", learn)):
        for half in ("images", "masks"):
            (data / kind / half).mkdir(parents=True, exist_ok=True)
            for chip in names:
                shutil.copy(bench.data / "fields" / half / f"{chip}.png", data / kind / half)
    quick = {"boundaries.segmenter.epochs": 1, "boundaries.segmenter.sampling.windows": 16} if bench.quick else {}
    chosen = {"boundaries.source": data / "learn", **quick} if learn else {"proposer": "felzenszwalb"}
    settings = {"truth": data / "test/masks", **chosen}
    steps, cost = bench.run(name, "agri", data / "test/images", settings, config="agri/small-data" if learn else None)
    part = "agri, boundaries" if learn else "agri, no labels"
    on = "fields, chips of places that were left out" if learn else f"fields, {len(test)} chips"
    row = Row(part, on, "F1 of objects", trial, PRODUCT, **steps["evaluate"]["objects"]["f1"])
    copy_pictures(bench, name, [], steps)
    return rows_of(row, steps, cost)


# -- the table ---------------------------------------------------------------------------------------------------------

SEEDED = {"gpc": gpc, "landcover": landcover, "al-s4gan": al_s4gan, "superpixel": superpixels}
OTHERS = {"penang": penang, "agri": agri}


def table(rows: Sequence[Row]) -> None:
    """Print all parts, each with its product first, and where a baseline is ahead."""
    lines, behind = [], []
    for part in dict.fromkeys(row.part for row in rows):
        methods: dict[str, list[Row]] = {}
        for row in rows:
            if row.part == part:
                methods.setdefault(row.method, []).append(row)
        means = {method: fmean(row.value for row in of) for method, of in methods.items()}
        for method, of in methods.items():
            bounds = [[getattr(row, side) for row in of if getattr(row, side) is not None] for side in ("low", "high")]
            interval = f"{fmean(bounds[0]):.3f}-{fmean(bounds[1]):.3f}" if all(bounds) else "–"
            each = " ".join(f"{row.value:.3f}" for row in of) if len(of) > 1 else "–"
            head = (part, of[0].measured_on, of[0].measure) if method == PRODUCT else ("", "", "")
            spent = (f"{fmean(row.cpu for row in of):.0f}", f"{fmean(row.wall for row in of):.0f}")
            lines.append([*head, method, f"{means[method]:.3f}", each, interval, *spent])
            if method != PRODUCT and means[method] >= means[PRODUCT]:
                behind.append(f"{part}: {method} {means[method]:.3f}, {PRODUCT} {means[PRODUCT]:.3f}")
    columns = ("part", "measured on", "measure", "method", "mean", "each trial", "95 % interval", "CPU s", "wall s")
    show("Defaults next to simple baselines", columns, lines)
    loads = [row.load for row in rows if row.load]
    print(f"load during the trials {min(loads):.1f} to {max(loads):.1f}" if loads else "")
    print("\n".join(["A baseline is ahead:", *behind] if behind else ["Every default is ahead of its baselines."]))


def trials_in_turn(bench: Bench, parts: Sequence[str]) -> list[tuple[str, str, Callable[[], list[Row]]]]:
    """(part, trial, what runs it): the first trial of every part, then the second of every part that has one."""
    trials = []
    for part in parts:
        seeds = range(1000, 1000 * bench.seeds + 1, 1000) if part in SEEDED else ()
        of = {f"seed {seed}": partial(SEEDED[part], bench, seed) for seed in seeds} or OTHERS[part](bench)
        trials.append([(part, name, run) for name, run in of.items()])
    return [one for one in chain(*zip_longest(*trials)) if one]


def main() -> None:
    """Run the trials that have no row yet, then print the table of all rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=ROOT / "../shared/data", help="folder of the data sets")
    weights = ROOT / "../shared/weights/mobilenet_v2_imagenet_from_tflite_int8.pth"
    parser.add_argument("--weights", type=Path, default=weights, help="MobileNetV2 trained on ImageNet")
    parser.add_argument("--out", type=Path, required=True, help="folder of runs, rows and pictures")
    parser.add_argument(
        "--only", nargs="+", choices=[*SEEDED, *OTHERS], default=[*SEEDED, *OTHERS], help="parts to run"
    )
    parser.add_argument("--seeds", type=int, default=3, help="trials of each part with seeds")
    parser.add_argument("--places", type=int, default=3, help="places of agri that are left out in turn, at most 3")
    parser.add_argument("--minutes", type=float, default=80, help="after which no other trial starts")
    parser.add_argument("--quick", action="store_true", help="a few steps on little data: shows that the way works")
    asked = parser.parse_args()
    (asked.out / "pictures").mkdir(parents=True, exist_ok=True)
    few = {"seeds": 1, "places": 1} if asked.quick else {"seeds": asked.seeds, "places": asked.places}
    bench = Bench(asked.data.resolve(), asked.weights.resolve(), asked.out.resolve(), quick=asked.quick, **few)
    known = {(row.part.partition(",")[0], row.trial) for row in bench.rows}
    started, left = time.monotonic(), []
    for part, trial, run in trials_in_turn(bench, asked.only):
        if (part, trial) in known:
            continue
        if time.monotonic() - started > 60 * asked.minutes:
            left.append(f"{part}, {trial}")
            continue
        print(f"{part}, {trial}", flush=True)
        bench.keep(run())
    table(bench.rows)
    print(f"Not run within {asked.minutes:g} minutes: {'; '.join(left)}" if left else "All trials were run.")


if __name__ == "__main__":
    main()
