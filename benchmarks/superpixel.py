"""Speed and quality of the pipeline `superpixel`; docs/benchmarks.md has the results.

    python benchmarks/superpixel.py scenes DATA --out DIR [--side 768]
    python benchmarks/superpixel.py quality IMAGES MASKS --out DIR [--epochs 4] [--seeds ...] [--only NAME ...]
    python benchmarks/superpixel.py speed IMAGE --out DIR [--epochs 1] [--size 2048] [--only-default]
    python benchmarks/superpixel.py memory --out DIR [--side 20000] [--tile 2048]

IMAGES and MASKS are folders of RGB files of the same names, as `scenes` cuts them from its data.
`speed` compares the whole process with a straight port of the published loop (a list of pixels per superpixel, a vote
in Python, one patch a step, the image read at every step, softmax summed as uint8 for all classes), on the same
network in plain PyTorch; `port` is its quality.
"""

import argparse
import json
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import rasterio
import rasterio.features
import torch
from PIL import Image
from sklearn.metrics.cluster import contingency_matrix
from torch import nn

from rayseg.config import load_values
from rayseg.engine.run import Engine, Run, Step
from rayseg.geo.region import Region
from rayseg.metrics import agreement
from rayseg.models import unsupervised
from rayseg.pipelines import superpixel
from rayseg.vision.color import rgb_of
from rayseg.vision.segment_clusters import simple_clusters

SEGMENTS = "k-means of segments"
PAPER = {
    "superpixels": {"method": "felzenszwalb"},
    "network": {
        "network": "deepnet",
        "reduce": 1,
        "recalibrate": False,
        "patches": None,
        "start": None,
        "merge_to": None,
    },
    "scaling": "range",
}
BASELINE = {"reduce": 1, "start": None, "merge_to": None}
SETTINGS: dict[str, dict] = {
    SEGMENTS: {},
    "default": {},
    "port": {},
    "regions of 400": {"superpixels": {"merge": 400}},
    "regions of 2000": {"superpixels": {"merge": 2000}},
    "no regions": {"superpixels": {"merge": 0}},
    "6 labels": {"network": {"merge_to": 6}},
    "network unmerged": {"network": {"network": "deepnet", "merge_to": None}},
    "network": {"network": {"network": "deepnet"}},
    "network, own start": {"network": {"network": "deepnet", "start": None}},
    "paper": PAPER,
    **{
        f"{network} {labels}": {"network": {"network": network, "labels": labels, **BASELINE}}
        for labels in (6, 8, 32)
        for network in ("kmeans", "isodata")
    },
    **{name: {"superpixels": {"method": name}} for name in ("felzenszwalb", "slic", "watershed")},
}
PARTS = ((0, 0, 1024), (1200, 1200, 768), (200, 1500, 512), (1500, 200, 768))
"""(column, row, side) of the parts of a DeepGlobe scene."""
SAME_NETWORKS = {"network": "network unmerged"}
"""Settings that differ only in merging reuse the networks of another run, if they exist."""


def mapped(
    out: Path, values: dict, images: str, truth: str | None = None, unlabelled: tuple = ()
) -> tuple[dict, float]:
    """(the run's steps, seconds) of the pipeline over a folder of images."""
    config = load_values(superpixel.Config, values | {"truth": truth, "unlabelled": unlabelled})
    region = Region(images, images=images)
    started = time.perf_counter()
    with Run.open(str(out), pipeline="superpixel", config=config, region=region, engine=Engine("inline")) as run:
        superpixel.run(config, run, region)
    return {step.name: step for step in run.steps}, time.perf_counter() - started


def scenes(asked: argparse.Namespace) -> None:
    """Cut the scenes of the table: three images of each of Dubai's six, four parts of each of DeepGlobe's three."""
    for kind in ("images", "masks"):
        (asked.out / kind).mkdir(parents=True, exist_ok=True)
        suffix = "jpg" if kind == "images" else "png"
        for number in range(1, 7):
            for part in (1, 5, 9) if number % 2 else (2, 4, 7):
                source = asked.data / f"dubai/tile{number}/{kind}/image_part_00{part}.{suffix}"
                side = asked.side if part % 2 else 512
                image = Image.open(source).convert("RGB")
                box = (0, 0, min(side, image.width), min(side, image.height))
                image.crop(box).save(asked.out / kind / f"dubai{number}_{part}.png")
        for number in (1, 3, 4):
            whole = Image.open(asked.data / f"landcover/{kind}/{number}.{suffix}").convert("RGB")
            for part, (col, row, side) in enumerate(PARTS):
                place = whole.crop((col, row, col + side, row + side))
                place.save(asked.out / kind / f"landcover{number}_{part}.png")


# -- quality -----------------------------------------------------------------------------------------------------------


def quality(asked: argparse.Namespace) -> None:
    """AMI, FMI and ARE of every setting: mean over scenes and seeds, 95 % bootstrap over scenes."""
    for name in asked.only or SETTINGS:
        for seed in asked.seeds:
            if name in {"port", SEGMENTS}:
                without_run(asked, name, seed)
                continue
            values = json.loads(json.dumps(SETTINGS[name]))
            values["network"] = {"epochs": asked.epochs, "seed": seed} | values.get("network", {})
            out = folder(asked, name, seed)
            lender = folder(asked, SAME_NETWORKS[name], seed) if name in SAME_NETWORKS else None
            config = load_values(superpixel.Config, values | {"truth": asked.masks, "unlabelled": asked.unlabelled})
            print(name, seed, json.dumps(_measured(out, config, asked.images, lender)), flush=True)
    table(asked)


def folder(asked: argparse.Namespace, name: str, seed: int) -> Path:
    return asked.out / f"{name.replace(' ', '-')}-{seed}"


def _measured(out: Path, config: superpixel.Config, images: str, lender: Path | None = None) -> dict:
    """Mean agreement with the truth by the pipeline's own steps, without its reports."""
    region = Region(images, images=images)
    with Run.open(str(out), pipeline="superpixel", config=config, region=region, engine=Engine("inline")) as run:
        listed = run.step("scenes", superpixel.list_scenes, region, config)
        divided = run.step("superpixels", superpixel.divide, listed, config)
        trained = run.step("networks", _trained, listed, divided, config, str(lender or ""))
        predicted = run.step("predict", superpixel.label, listed, trained, region, config, divided=divided)
        return run.step("evaluate", superpixel.measure, predicted, region, config).value["mean"]


def _trained(step: Step, listed: Step, divided: Step, config: superpixel.Config, lender: str) -> dict:
    """Train, resuming from the checkpoints of another run of the same training."""
    for path in Path(lender).glob("steps/networks/*/*/checkpoint.pt") if lender else []:
        target = Path(str(step.prefix), *path.parts[-3:])
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    return superpixel.train(step, listed, divided, config)


def without_run(asked: argparse.Namespace, name: str, seed: int) -> None:
    """Measures of the maps of the straight port or of the baseline, stored next to those of a run."""
    skipped = [_code(np.array(rgb_of(value))) for value in asked.unlabelled]
    scenes, spent = {}, {"superpixels": 0.0, "networks": 0.0}
    for path in sorted(Path(asked.images).iterdir()):
        if name == "port":
            labels_HW, parts = port(str(path), epochs=asked.epochs, seed=seed, quick=True)
        else:
            started = time.perf_counter()
            labels_HW = simple_clusters(np.array(Image.open(path).convert("RGB")), seed=seed)
            parts = {"superpixels": time.perf_counter() - started, "training": 0.0}
        with rasterio.open(Path(asked.masks) / path.name) as file:
            codes_HW = _code(file.read()[:3])
        seen = ~np.isin(codes_HW, skipped)
        scenes[path.stem] = {"pixels": int(seen.sum())} | agreement(contingency_matrix(codes_HW[seen], labels_HW[seen]))
        spent = {
            step: spent[step] + parts[part] for step, part in (("superpixels", "superpixels"), ("networks", "training"))
        }
    mean = {measure: float(np.mean([scene[measure] for scene in scenes.values()])) for measure in ("ami", "fmi", "are")}
    steps = folder(asked, name, seed) / "steps"
    for step, seconds in spent.items():
        _kept(steps / step / "done.json", {"seconds": seconds})
    _kept(steps / "evaluate" / "agreement.json", {"scenes": scenes, "mean": mean})
    print(name, seed, json.dumps(mean), flush=True)


def _code(image_CHW: np.ndarray) -> np.ndarray:
    red, green, blue = image_CHW.astype(np.int64)
    return (red << 16) | (green << 8) | blue


def _kept(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def table(asked: argparse.Namespace) -> None:
    """Results of the existing runs, as a Markdown table."""
    print("| setting | AMI | FMI | ARE | superpixels s | training s |\n|---|---|---|---|---|---|")
    for name in SETTINGS:
        found = sorted(asked.out.glob(f"{name.replace(' ', '-')}-20[0-9]*/steps/evaluate/agreement.json"))
        if not found:
            continue
        scenes = [json.loads(path.read_text())["scenes"] for path in found]
        cells = [
            _interval(np.array([[one[m] for one in run.values()] for run in scenes])) for m in ("ami", "fmi", "are")
        ]
        times = [
            np.mean([json.loads((path.parents[1] / step / "done.json").read_text())["seconds"] for path in found])
            for step in ("superpixels", "networks")
        ]
        print(f"| {name} ({len(found)} seeds) | {' | '.join(cells)} | {times[0]:.1f} | {times[1]:.1f} |")
    ami = {name: _amis(asked, name) for name in ("default", SEGMENTS)}
    if all(len(values) for values in ami.values()):
        # One mean per place: crops of a place are not independent.
        print(f"AMI of default - {SEGMENTS}: {_interval((ami['default'] - ami[SEGMENTS])[None])}")


def _amis(asked: argparse.Namespace, name: str) -> np.ndarray:
    """Mean AMI over seeds of every place: the scenes' names up to their first underscore."""
    places: dict[str, list[float]] = {}
    for path in sorted(asked.out.glob(f"{name.replace(' ', '-')}-20[0-9]*/steps/evaluate/agreement.json")):
        for scene, measures in json.loads(path.read_text())["scenes"].items():
            places.setdefault(scene.partition("_")[0], []).append(measures["ami"])
    return np.array([np.mean(values) for _, values in sorted(places.items())])


def _interval(values_SN: np.ndarray) -> str:
    mean_N = values_SN.mean(axis=0)
    draws = np.random.default_rng(0).integers(0, len(mean_N), (2000, len(mean_N)))
    low, high = np.quantile(mean_N[draws].mean(axis=1), [0.025, 0.975])
    return f"{mean_N.mean():.3f} ({low:.3f}-{high:.3f})"


# -- speed -------------------------------------------------------------------------------------------------------------


def speed(asked: argparse.Namespace) -> None:
    """Seconds of the whole process, and of the straight port; on a busy machine CPU seconds are more reliable."""
    asked.out.mkdir(parents=True, exist_ok=True)
    image = str(asked.out / "scene.tif")
    _cut(asked.image, image, asked.size)
    settings = {"default": {}, "paper": PAPER | {"network": PAPER["network"] | {"epochs": asked.epochs}}}
    for name, values in list(settings.items())[: 1 if asked.only_default else 2]:
        before = time.process_time()
        steps, seconds = mapped(asked.out / name, values, image)
        parts = {step.name: round(step.seconds, 1) for step in steps.values()}
        spent = time.process_time() - before
        print(f"{name}: {seconds:.1f} s in all, {spent:.1f} s of CPU {json.dumps(parts)}", flush=True)
    before = time.process_time()
    _, parts = port(image, epochs=asked.epochs)
    print(f"straight port: {time.process_time() - before:.1f} s of CPU {json.dumps(parts)}", flush=True)


def _cut(source: str, target: str, size: int) -> None:
    with rasterio.open(source) as file:
        pixels = file.read(window=rasterio.windows.Window(0, 0, size, size))
    profile = {"driver": "GTiff", "count": len(pixels), "dtype": pixels.dtype, "compress": "lzw"}
    with rasterio.open(target, "w", height=pixels.shape[1], width=pixels.shape[2], **profile) as file:
        file.write(pixels)


class DeepNet(nn.Sequential):
    """The published network in PyTorch's own layers."""

    def __init__(self, bands: int, classes: int) -> None:
        layers: list[nn.Module] = []
        for inside, before, after in ((bands, 0, 1), (64, 0, 1), (64, 0, 0), (64, 1, 0), (64, 1, 0)):
            layers += [nn.Upsample(scale_factor=2)] * before
            layers += [nn.Conv2d(inside, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] * after
        super().__init__(*layers, nn.Conv2d(64, classes, 1), nn.BatchNorm2d(classes))


def port(
    path: str, *, epochs: int, seed: int = 2021, quick: bool = False, classes: int = 32, patch: int = 512
) -> tuple[np.ndarray, dict[str, float]]:
    """(label map, seconds of its parts) of the published process, step by step; patches fit into small scenes.

    `quick` votes by a segment reduction instead, which gives the same labels: where quality is measured, not speed.
    """
    from skimage.segmentation import felzenszwalb

    started = time.perf_counter()
    with rasterio.open(path) as file:
        image = file.read().transpose(1, 2, 0)
    segments = felzenszwalb(image, scale=32, sigma=0.5, min_size=64)
    divided = time.perf_counter()
    height, width = segments.shape
    patch = min(patch, height // 4 * 4, width // 4 * 4)
    rows, cols = ([*range(0, side - patch, 448), side - patch] for side in (height, width))
    corners = [(row, col) for row in rows for col in cols]
    torch.manual_seed(seed)
    net = DeepNet(image.shape[2], classes).train()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    loss_of = nn.CrossEntropyLoss()
    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        for number in rng.permutation(len(corners)):
            row, col = corners[number]
            optimizer.zero_grad()
            logits = net(_read(path, row, col, patch))[0].permute(1, 2, 0).reshape(-1, classes)
            labels = logits.detach().argmax(1).numpy()
            inside = segments[row : row + patch, col : col + patch].ravel()
            if quick:
                segment = torch.from_numpy(np.unique(inside, return_inverse=True)[1])
                labels = unsupervised.vote(torch.from_numpy(labels), segment, classes).numpy()
            else:
                for one in [np.where(inside == number)[0] for number in np.unique(inside)]:
                    values, counts = np.unique(labels[one], return_counts=True)
                    labels[one] = values[counts.argmax()]
            loss_of(logits, torch.from_numpy(labels)).backward()
            optimizer.step()
    trained = time.perf_counter()
    sums = np.zeros((classes, height, width), np.uint8)
    net.eval()
    with torch.no_grad():
        for row, col in corners:
            shares = net(_read(path, row, col, patch)).softmax(1)[0].numpy()
            sums[:, row : row + patch, col : col + patch] += (shares * 63).astype(np.uint8)
    labels_HW = rasterio.features.sieve(sums.argmax(0).astype(np.uint8), 20, connectivity=4)
    ended = time.perf_counter()
    parts = {"superpixels": divided - started, "training": trained - divided, "map": ended - trained}
    return labels_HW, {name: round(seconds, 1) for name, seconds in {**parts, "in all": ended - started}.items()}


def _read(path: str, row: int, col: int, patch: int) -> torch.Tensor:
    with rasterio.open(path) as file:
        image = file.read()[:, row : row + patch, col : col + patch]
    return torch.from_numpy(image.astype(np.float32) / 255)[None]


# -- memory ------------------------------------------------------------------------------------------------------------


def memory(asked: argparse.Namespace) -> None:
    """Peak memory of the process on a generated scene of `side` px."""
    asked.out.mkdir(parents=True, exist_ok=True)
    image = asked.out / f"made-{asked.side}.tif"
    if not image.exists():
        _made(image, asked.side)
    print(f"before: {_peak():.2f} GiB", flush=True)
    values = {
        "network": {"network": asked.network, "epochs": 1, "patches": asked.patches, "memory": 128 << 20}
        | {"reduce": asked.reduce},
        "map": {"tile": asked.tile},
        "superpixels": {"method": asked.method},
    }
    steps, seconds = mapped(asked.out / f"run-{asked.side}", values, str(image))
    print(json.dumps({step.name: round(step.seconds, 1) for step in steps.values()}))
    print(f"{asked.side} x {asked.side}: peak {_peak():.2f} GiB, {seconds:.0f} s", flush=True)


def _made(path: Path, side: int) -> None:
    """Fields of 300 px in one of nine colours, with noise, row of blocks by row of blocks."""
    rng = np.random.default_rng(0)
    colors = rng.integers(30, 220, (9, 3))
    place = {"height": side, "width": side, "count": 3, "dtype": "uint8", "tiled": True, "compress": "deflate"}
    with rasterio.open(path, "w", driver="GTiff", **place) as file:
        for row in range(0, side, 300):
            height = min(300, side - row)
            kinds = rng.integers(0, 9, -(-side // 300)).repeat(300)[:side]
            pixels = colors[kinds].T[:, None] + rng.integers(-12, 12, (3, height, side))
            window = rasterio.windows.Window(0, row, side, height)
            file.write(pixels.clip(1, 255).astype(np.uint8), window=window)


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for name, function in (
        ("scenes", scenes),
        ("quality", quality),
        ("table", table),
        ("speed", speed),
        ("memory", memory),
    ):
        command = commands.add_parser(name)
        command.set_defaults(function=function)
        command.add_argument("--out", type=Path, required=True)
        command.add_argument("--epochs", type=int, default=4)
        if name == "scenes":
            command.add_argument("data", type=Path)
            command.add_argument("--side", type=int, default=768)
        if name == "quality":
            command.add_argument("images")
            command.add_argument("masks")
            command.add_argument("--seeds", type=int, nargs="+", default=[2021, 2022, 2023])
            command.add_argument("--only", nargs="*", choices=list(SETTINGS))
            command.add_argument("--unlabelled", nargs="*", default=["#9B9B9B", "#000000"])
        if name == "speed":
            command.add_argument("image")
            command.add_argument("--size", type=int, default=2048)
            command.add_argument("--only-default", action="store_true")
        if name == "memory":
            command.add_argument("--side", type=int, default=20000)
            command.add_argument("--tile", type=int, default=2048)
            command.add_argument("--patches", type=int, default=16)
            command.add_argument("--reduce", type=int, default=2)
            command.add_argument("--method", default="halved")
            command.add_argument("--network", default="segments")
    asked = parser.parse_args()
    asked.function(asked)


if __name__ == "__main__":
    main()
