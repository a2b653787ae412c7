"""A simulated annotator on a map that a model is partly wrong about: mean IoU over the number of clicks.

    python benchmarks/correct.py --data DATA --out DIR [--only dubai penang] [--seeds 3]

dubai: a model of scenes 1 to 4, clicks on scenes 5 and 6. penang: a model of 11 images, clicks on the other 44. The
model is a linear head on frozen features (`network: linear`), and clicks are corrected as by `rayseg correct`, with
its defaults. Clicks are drawn in rounds, at up to 0.05 % of the pixels: where the map is confidently wrong (the surest
fifth of wrong pixels drawn at random), anywhere at random, or by entropy (the least sure of 20 times as many pixels).

Measured on one pixel of every square of 8 x 8 px, in the images that are clicked. Beside it what the same linear
head reaches with all masks of these images. `--fold N` takes scene N of 1 to 4 for clicks and the others for the
model: the settings were chosen so. DIR/rows.jsonl keeps every figure, DIR/<set>.png the best and the worst image.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from measure import measured, show
from PIL import Image
from torch import nn

from rayseg.config import load
from rayseg.io import class_tables, masks, rasters, scenes
from rayseg.metrics import Confusion, mean_interval
from rayseg.models.correction import features
from rayseg.stages.embed import SQUARE
from rayseg.steps.models import input_scaling
from rayseg.train import frozen
from rayseg.train.correction import CorrectionConfig, Known, fit_correction
from rayseg.vision.color import IGNORE, ClassTable

ENCODER = "tf_efficientnet_lite0"
PENANG = (
    (1, "building", (230, 159, 0)),
    (2, "tree", (0, 158, 115)),
    (3, "water", (0, 114, 178)),
    (4, "road", (204, 121, 167)),
)
EVERY = 2
"""Of the squares in a row and in a column, each so many-th is looked at."""
STRATEGIES = ("confident errors", "random", "entropy")
MOST_SHARE = 5e-4
"""Clicks as a share of the pixels of the images."""


@dataclass
class Picture:
    """An image and its squares: features (N, F), logits (N, K), classes (N,) with 255 where not labelled."""

    name: str
    size: tuple[int, int]
    features: np.ndarray
    logits: np.ndarray
    classes: np.ndarray


def pairs_of(data, name):
    """{scene: [(name, image_CHW, classes_HW)]} and the class table of a data set."""
    if name == "dubai":
        table = class_tables.read_table("dubai")
        found = {}
        for scene in sorted((data / "dubai").iterdir()):
            labelled = scenes.labelled_images(str(scene), table=table)
            found[scene.name[-1]] = [
                (
                    image.id,
                    rasters.read([image.image], image.grid, image.window, bands=image.image.bands)[0],
                    masks.read_classes(image.masks, image.grid, image.window, table),
                )
                for image in labelled
            ]
        return found, table
    table = ClassTable(tuple((value - 1, title, color) for value, title, color in PENANG))
    files = sorted((data / "penang/masks").glob("*"))
    images = {path.stem: path for path in (data / "penang/images").glob("*")}
    parts = {"model": [], "clicked": []}
    for at, path in enumerate(files):
        mask_HW = np.asarray(Image.open(path)).astype(np.int64)
        classes_HW = np.where(mask_HW == 0, IGNORE, mask_HW - 1).astype(np.uint8)
        image = np.asarray(Image.open(images[path.stem]).convert("RGB")).transpose(2, 0, 1)
        parts["model" if at % 5 == 0 else "clicked"].append((path.stem, image, classes_HW))
    return parts, table


def squares_of(base, scaling, name, image_CHW, classes_HW):
    """The `Picture` of an image."""
    height, width = (side // 32 * 32 for side in classes_HW.shape)
    image = torch.from_numpy(scaling.normalize(image_CHW[:, :height, :width]))[None]
    with torch.inference_mode():
        features_Fhw, logits_Khw = (part[0, :, ::EVERY, ::EVERY] for part in features(base, image))
    apart = SQUARE * EVERY
    classes = classes_HW[SQUARE // 2 : height : apart, SQUARE // 2 : width : apart].ravel()
    size = (features_Fhw.shape[1], features_Fhw.shape[2])
    flat = (part.flatten(1).T.numpy().astype(np.float16) for part in (features_Fhw, logits_Khw))
    return Picture(name, size, *flat, classes)


def mean_iou(pictures, predictions, classes):
    """Mean IoU of all images together."""
    pairs = zip(pictures, predictions, strict=True)
    parts = [Confusion.from_arrays(p.classes, q.astype(np.uint8), classes) for p, q in pairs]
    matrix = sum(part.matrix for part in parts)
    return Confusion(matrix).mean_iou


def corrected(model, picture):
    """Logits of an image's squares."""
    columns = torch.cat([model.weight_KF, model.axes_DF])
    with torch.inference_mode():
        units = torch.from_numpy(picture.features.astype(np.float32)) @ columns.T
        moved = model.moved(units.T[None, :, None])[0, :, 0].T.numpy()
    return picture.logits.astype(np.float32) + moved


def chosen(strategy, logits, classes, taken, count, rng):
    """Positions of `count` further clicks."""
    with np.errstate(divide="ignore", invalid="ignore"):
        p = torch.from_numpy(logits).softmax(dim=1).numpy()
    open_N = np.flatnonzero((classes != IGNORE) & ~taken)
    if strategy == "random":
        return rng.permutation(open_N)[:count]
    if strategy == "entropy":
        drawn = rng.permutation(open_N)[: 20 * count]
        entropy = -(p[drawn] * np.log(np.maximum(p[drawn], 1e-9))).sum(axis=1)
        return drawn[np.argsort(-entropy)[:count]]
    wrong = open_N[p[open_N].argmax(axis=1) != classes[open_N]]
    drawn = rng.permutation(wrong)[: 5 * count]
    return drawn[np.argsort(-p[drawn].max(axis=1))[:count]]


def joined(pictures, name):
    """One attribute of all images."""
    return np.concatenate([getattr(picture, name) for picture in pictures])


def simulate(pictures, classes, strategy, budgets, seed, settings):
    """([mean IoU of each budget], last maps, positions of the clicks)."""
    rng, truth = np.random.default_rng(seed), joined(pictures, "classes")
    everything, given = joined(pictures, "features"), joined(pictures, "logits").astype(np.float32)
    own = rng.permutation(len(truth))[:6000]
    kept = known(everything, given, truth, own)
    taken, logits, reached, order = np.zeros(len(truth), bool), given, [], []
    for budget in budgets:
        new = chosen(strategy, logits, truth, taken, budget - len(order), rng)
        order += new.tolist()
        taken[new] = True
        rest = own[~taken[own]]
        kept = known(everything, given, truth, rest)
        clicks = known(everything, given, truth, np.array(order))
        model, _ = fit_correction(nn.Linear(1, 1), clicks, kept, settings, 0.5)
        maps = [corrected(model, picture) for picture in pictures]
        logits = np.concatenate(maps)
        reached.append(mean_iou(pictures, [part.argmax(axis=1) for part in maps], classes))
    return reached, [part.argmax(axis=1) for part in maps], order


def known(everything, given, truth, at):
    """Some squares as `fit_correction` takes them."""
    ones = np.ones(len(at), np.float32)
    return Known(everything[at].astype(np.float32), given[at], truth[at].astype(np.int64), ones)


def with_masks(pictures, base_samples, classes, colors, seed):
    """Mean IoU of linear heads that learn from all masks of the images: with the model's own images, and without."""
    rng, truth = np.random.default_rng(seed), joined(pictures, "classes")
    width = base_samples.features_NF.shape[1]
    drawn = rng.permutation(np.flatnonzero(truth != IGNORE))[:40_000]
    own = joined(pictures, "features")[drawn, :width].astype(np.float32), truth[drawn]
    reached = []
    for before in ((base_samples.features_NF, base_samples.classes_N), (own[0][:0], own[1][:0])):
        samples = frozen.Samples(*(np.concatenate(pair) for pair in zip(before, own, strict=True)), colors)
        net = nn.Module()
        net.first = nn.Linear(width, classes)
        frozen.fit_linear(net, samples)
        weight, bias = net.first.weight.data.numpy(), net.first.bias.data.numpy()
        maps = [(p.features[:, :width].astype(np.float32) @ weight.T + bias).argmax(axis=1) for p in pictures]
        reached.append(mean_iou(pictures, maps, classes))
    return reached


def draw(path, images, pictures, before, after, order, table):
    """Imagery with clicks, map before, map after, truth; of the image that gained most, and of that which lost most."""
    starts = np.cumsum([0, *(len(picture.classes) for picture in pictures)])
    rights = [
        [(m == p.classes)[p.classes != IGNORE].mean() for p, m in zip(pictures, maps, strict=True)]
        for maps in (before, after)
    ]
    gains = np.nan_to_num(np.array(rights[1]) - np.array(rights[0]))
    colors = np.full((256, 3), 255, np.uint8)
    for value, _, color in table.classes:
        colors[value] = color
    rows = []
    for at in (int(gains.argmax()), int(gains.argmin())):
        picture, (_, image_CHW, _) = pictures[at], images[at]
        height, width = picture.size
        seen = image_CHW[:3, :: SQUARE * EVERY, :: SQUARE * EVERY][:, :height, :width].transpose(1, 2, 0).copy()
        for place in order:
            if starts[at] <= place < starts[at + 1]:
                row, col = divmod(place - starts[at], width)
                seen[max(0, row - 1) : row + 2, max(0, col - 1) : col + 2] = colors[picture.classes[place - starts[at]]]
        panels = [seen, *(colors[values.reshape(height, width)] for values in (before[at], after[at], picture.classes))]
        gap = np.full((height, 4, 3), 255, np.uint8)
        row = np.concatenate([part for panel in panels for part in (panel, gap)][:-1], axis=1)
        rows.append(np.asarray(Image.fromarray(row).resize((1000, round(1000 * height / row.shape[1])))))
    Image.fromarray(np.concatenate(rows)).save(path)


def run(name, given, settings):
    """All trials of a data set."""
    parts, table = pairs_of(given.data, name)
    classes, scaling = len(table.classes), input_scaling(ENCODER)
    held = {"dubai": ("5", "6"), "penang": ("clicked",)}[name] if not given.fold else (given.fold,)
    learnt = [
        pair for scene, pairs in parts.items() for pair in pairs if scene not in (*held, *("56" if given.fold else ""))
    ]
    images = [pair for scene in held for pair in parts[scene]]
    # 1. the model, and the squares of the images
    base = frozen.untrained(ENCODER, "packaged", scaling, classes=classes, lab=True)
    samples = frozen.sample(base, ((image, mask) for _, image, mask in learnt), len(learnt), scaling)
    frozen.fit_linear(base, samples)
    pictures = [squares_of(base, scaling, *image) for image in images]
    pixels = sum(len(picture.classes) for picture in pictures) * (SQUARE * EVERY) ** 2
    budgets = [count for count in (10, 30, 100, 300, 1000, 3000) if count < MOST_SHARE * pixels]
    budgets.append(round(MOST_SHARE * pixels))
    before = [picture.logits.argmax(axis=1) for picture in pictures]
    start = mean_iou(pictures, before, classes)
    # 2. all masks
    together, alone = with_masks(pictures, samples, classes, base.widths[-1], 0)
    lines = [{"set": name, "method": "model", "clicks": 0, "mean_iou": start}]
    lines += [
        {"set": name, "method": f"all masks, {way}", "mean_iou": value}
        for way, value in (("with the model's", together), ("alone", alone))
    ]
    # 3. clicks
    rows = [
        ["model, no clicks", f"{start:.3f}"],
        ["all masks and the model's", f"{together:.3f}"],
        ["all masks alone", f"{alone:.3f}"],
    ]
    for strategy in STRATEGIES:
        trials = []
        for seed in range(given.seeds):
            with measured() as cost:
                reached, after, order = simulate(pictures, classes, strategy, budgets, seed, settings)
            trials.append(reached)
            lines += [
                {"set": name, "method": strategy, "seed": seed, "clicks": count, "mean_iou": value, "cpu": cost.cpu}
                for count, value in zip(budgets, reached, strict=True)
            ]
            if strategy == STRATEGIES[0] and seed == 0:
                draw(given.out / f"{name}.png", images, pictures, before, after, order, table)
        texts = []
        for values in zip(*trials, strict=True):
            mean, *ends = mean_interval(values)
            texts.append(f"{mean:.3f}" + (f" ({ends[0]:.3f}-{ends[1]:.3f})" if ends else ""))
        rows.append([strategy, *texts])
    with (given.out / "rows.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    shares = [f"{count:,} ({count / pixels:.4%})" for count in budgets]
    blank = ["", *[""] * (len(budgets) - 1)]
    rows = [row + blank[: len(budgets) + 1 - len(row)] for row in rows]
    show(f"{name}: mean IoU by number of clicks (share of {pixels / 1e6:.1f} Mpx)", ["clicks", *shares], rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=["dubai", "penang"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fold", help="1 to 4: a scene of dubai that is clicked instead of 5 and 6")
    parser.add_argument("--set", action="append", default=[], help="a setting of the head, such as reach=0.5")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    settings = load(CorrectionConfig, None, given.set)
    for name in given.only:
        run(name, given, settings)


if __name__ == "__main__":
    main()
