"""Every pipeline's default next to its simple baselines on real data, as one table; docs/quality.md has the results.

    python benchmarks/quality.py --data DATA --weights MOBILENET.pth --out DIR [--only gpc agri ...] [--quick]

DATA holds the sets gpc, penang, dubai, landcover and fields; docs/quality.md describes them. The script runs the
product's own commands with its own configurations, one process at a time. Every finished trial is a line of
DIR/rows.jsonl, and is not run again: parts can be run one after another. DIR/pictures shows, for each part, where
the map is best and worst.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import pairwise
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
from rayseg.io.maps import mapped_tiles
from rayseg.metrics import Confusion, percentile_interval

ROOT = Path(__file__).parents[1]
PRODUCT = "rayseg"
PLACES = (450, 850)
"""Columns of the plane of the set `fields` that divide it into three places."""
CHIP = 256
"""Side in px of a chip of `fields`."""
COVERS = {"building": 1, "tree": 2}
"""Classes of the set `penang` that are mapped from yes and no."""
Steps = Mapping[str, Mapping[str, Any]]
Trials = dict[str, Callable[[], list["Row"]]]


@dataclass(frozen=True)
class Row:
    """A method as measured in one trial.

    Attributes:
        part: of the table.
        measured_on: the data, and how it was kept apart.
        measure: its name; higher is better.
        trial: the seed, or the place.
        method: `PRODUCT` or a baseline.
        value: of the measure.
        low, high: 95 % interval over images or places; None without one.
        cpu, wall: seconds; of the product, the whole command without its baselines.
        load: load average over a minute, at the end.
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
    baselines = [
        {"method": method["name"], "value": method["value"], "low": None, "high": None, "cpu": method["seconds"]}
        for method in simple
    ]
    return [Row(**asdict(product) | of) for of in (own, *({"load": load} | row for row in baselines))]


# -- gpc ---------------------------------------------------------------------------------------------------------------


def gpc(bench: Bench, seed: int) -> list[Row]:
    """Five images with masks, learnt from ten chips with netting and ten without."""
    folders = (bench.data / "gpc/train", bench.out / "data/gpc-chips", bench.data / "gpc/test")
    rows = cover(bench, "gpc", f"seed {seed}", *folders, members=5, seed=seed)
    return [*rows, *color_rules(folders[2], rows[0])]


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
    name = f"{part}-{trial}".replace(" ", "-")
    settings = {**learnt, **weights, **seeds, **quick}
    steps, cost = bench.run(name, "gpc", test / "images", settings, config="gpc/small-data")
    found = steps["evaluate"]
    on = f"{found['units']} images, learnt from chips with yes or no"
    row = Row(part, on, "IoU of the cover", trial, PRODUCT, **found["classes"][1]["iou"])
    show_covers(bench, bench.out / "runs" / name, test / "masks", name)
    return rows_of(row, steps, cost)


def color_rules(test: Path, row: Row) -> list[Row]:
    """Two rules that need no chip: green of a fixed strength, and everything."""
    empty = Confusion(np.zeros((2, 2), np.int64))
    sums = {"a* < -2 of CIE Lab": empty, "everything": empty}
    with measured() as cost:
        for path in sorted((test / "images").iterdir()):
            image_HWC = np.array(Image.open(path).convert("RGB"))
            truth_HW = np.array(Image.open(test / "masks" / path.name)).astype(np.uint8)
            marks = (rgb2lab(image_HWC)[..., 1] < -2, np.ones(truth_HW.shape, bool))
            for name, marked_HW in zip(sums, marks, strict=True):
                sums[name] += Confusion.from_arrays(truth_HW, marked_HW.astype(np.uint8), 2)
    found = {name: float(confusion.iou[1]) for name, confusion in sums.items()}
    return [
        Row(**asdict(row) | {"method": name, "value": value, "low": None, "high": None, "cpu": cost.cpu / 2})
        for name, value in found.items()
    ]


def show_covers(bench: Bench, run: Path, truth: Path, name: str) -> None:
    """Image, mask and map of the images with the highest and the lowest IoU."""
    counts = json.loads((run / "steps/evaluate/confusions.json").read_text())["tiles"]
    ious = {tile: float(Confusion(np.array(matrix)).iou[1]) for tile, matrix in counts.items()}
    ranked = sorted((iou, tile) for tile, iou in ious.items() if not np.isnan(iou))
    tiles = {mapped.tile.id: mapped for mapped in mapped_tiles(str(run))}
    for which, (iou, tile) in (("worst", ranked[0]), ("best", ranked[-1])):
        mapped = tiles[tile]
        image_HWC = pictures.shown(mapped.sources, mapped.tile.grid, mapped.tile.window)
        stem = mapped.sources[0].item_id
        mask = next(path for path in truth.iterdir() if path.stem == stem)
        panels = [image_HWC]
        for path in (mask, mapped.href):
            with rasterio.open(path) as file:
                grey_HW = np.select([file.read(1) == 1, file.read(1) == NODATA], [255, 110], 0).astype(np.uint8)
            panels.append(np.repeat(grey_HW[..., None], 3, axis=2))
        save(bench, f"{name}-{which}-{iou:.2f}", np.concatenate(panels, axis=1))


def save(bench: Bench, name: str, image_HWC: np.ndarray) -> None:
    """Write DIR/pictures/<name>.png."""
    (bench.out / "pictures").mkdir(exist_ok=True)
    Image.fromarray(image_HWC).save(bench.out / "pictures" / f"{name}.png")


def penang(bench: Bench) -> Trials:
    """Buildings and trees: every second image gives chips with yes or no, the others are mapped."""
    trials = {}
    for name, value in COVERS.items():
        folder = bench.out / f"data/penang-{name}"
        if not folder.exists():
            divide_penang(bench.data / "penang", folder, value)
        folders = (folder / "chips", folder / "labelled", folder / "test")
        trials[name] = partial(cover, bench, "penang", name, *folders, members=2, seed=1000)
    return trials


def divide_penang(source: Path, folder: Path, value: int) -> None:
    """Chips by label, and images with masks of one class: 0 other, 1 the class, 255 (nodata) not labelled."""
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
            size = {"height": binary_HW.shape[0], "width": binary_HW.shape[1], "count": 1}
            with rasterio.open(
                folder / "test/masks" / f"{path.stem}.tif", "w", dtype="uint8", nodata=NODATA, **size
            ) as file:
                file.write(binary_HW, 1)
        elif share == 0 or share > 0.02:
            shutil.copy(image, folder / "chips" / ("gpc" if share else "nongpc") / image.name)


# -- landcover and al-s4gan --------------------------------------------------------------------------------------------


def landcover(bench: Bench, seed: int) -> list[Row]:
    """Scenes 5 and 6 of Dubai, learnt from scenes 1 to 4 with all masks, by `configs/landcover/dubai-cpu.yaml`."""
    settings = {"segmenter.learning.seed": seed, **({"segmenter.epochs": 2} if bench.quick else {})}
    name, region = f"landcover-{seed}", bench.data / "dubai"
    steps, cost = bench.run(name, "landcover", region, settings, config="landcover/dubai-cpu")
    own, on = steps["validation"], "Dubai, scenes 5 and 6"
    row = Row("landcover", on, "mean IoU", f"seed {seed}", PRODUCT, **own["overall"]["mean_iou"])
    copy_pictures(bench, name, [("worst", own["worst"][0]["picture"])], steps)
    return rows_of(row, steps, cost)


def al_s4gan(bench: Bench, seed: int) -> list[Row]:
    """The same scenes, learnt from 27 masks of chips and all other chips, by `configs/al-s4gan/dubai-cpu.yaml`."""
    quick = {"segmenter.steps": 4, "segmenter.checkpoint": 2, "active.strategy": "random"} if bench.quick else {}
    weights = {"active.classifier.weights": bench.weights, "segmenter.weights": bench.weights}
    name, settings = f"al-s4gan-{seed}", {"seed": seed, **weights, **quick}
    steps, cost = bench.run(name, "al-s4gan", bench.data / "dubai", settings, config="al-s4gan/dubai-cpu")
    own, on = steps["measure"], f"Dubai, chips of scenes 5 and 6, {steps['segmenter']['masks']} masks"
    row = Row("al-s4gan", on, "mean IoU", f"seed {seed}", PRODUCT, own["mean_iou"], own["low"], own["high"])
    copy_pictures(bench, name, [], steps)
    return rows_of(row, steps, cost)


def copy_pictures(bench: Bench, run: str, found: Sequence[tuple[str, str]], steps: Steps) -> None:
    """Copy pictures of a run, and those of its baselines, to DIR/pictures."""
    (bench.out / "pictures").mkdir(exist_ok=True)
    beside = [("beside", path) for _, path, _ in steps.get("baseline", {}).get("pictures", [])]
    for number, (name, path) in enumerate([*found, *beside]):
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


def trials_of(bench: Bench, part: str) -> Trials:
    """The trials of a part, by name."""
    if part in OTHERS:
        return OTHERS[part](bench)
    return {f"seed {seed}": partial(SEEDED[part], bench, seed) for seed in range(1000, 1000 * bench.seeds + 1, 1000)}


def table(rows: Sequence[Row]) -> None:
    """Print all parts, each with its product first, and where a baseline is ahead."""
    lines, behind = [], []
    for part, trial in dict.fromkeys((row.part, row.trial if row.part == "penang" else "") for row in rows):
        own = [row for row in rows if row.part == part and trial in ("", row.trial)]
        means = {}
        for method in dict.fromkeys(row.method for row in own):
            of = [row for row in own if row.method == method]
            means[method] = fmean(row.value for row in of)
            bounds = [[getattr(row, side) for row in of if getattr(row, side) is not None] for side in ("low", "high")]
            interval = f"{fmean(bounds[0]):.3f}-{fmean(bounds[1]):.3f}" if all(bounds) else "–"
            each = " ".join(f"{row.value:.3f}" for row in of) if len(of) > 1 else "–"
            label = f"{part}, {trial}" if trial else part
            head = (label, of[0].measured_on, of[0].measure) if method == PRODUCT else ("", "", "")
            cpu, wall = fmean(row.cpu for row in of), fmean(row.wall for row in of)
            lines.append(
                [*head, method, f"{means[method]:.3f}", each, interval, f"{cpu:.0f}", f"{wall:.0f}" if wall else "–"]
            )
        ahead = {method: value for method, value in means.items() if value >= means[PRODUCT] and method != PRODUCT}
        behind += [
            f"{part} {trial}: {method} {value:.3f}, {PRODUCT} {means[PRODUCT]:.3f}" for method, value in ahead.items()
        ]
    columns = ("part", "measured on", "measure", "method", "mean", "each trial", "95 % interval", "CPU s", "wall s")
    show("Defaults next to simple baselines", columns, lines)
    loads = [row.load for row in rows if row.load]
    print(f"load during the trials {min(loads):.1f} to {max(loads):.1f}" if loads else "")
    print(
        "\n".join(["A baseline is ahead:", *behind]) if behind else "Every default is ahead of each of its baselines."
    )


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
    parser.add_argument("--quick", action="store_true", help="a few steps on little data: shows that the way works")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    few = {"seeds": 1, "places": 1} if asked.quick else {"seeds": asked.seeds, "places": asked.places}
    bench = Bench(asked.data.resolve(), asked.weights.resolve(), asked.out.resolve(), quick=asked.quick, **few)
    known = {(row.part.partition(",")[0], row.trial) for row in bench.rows}
    for part in asked.only:
        for trial, run in trials_of(bench, part).items():
            if (part, trial) not in known:
                print(f"{part}, {trial}", flush=True)
                bench.keep(run())
    table(bench.rows)


if __name__ == "__main__":
    main()
