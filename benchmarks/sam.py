"""SAM's automatic masks on one image, and plots by rounds: ours against the published generator and a straight port.

    python benchmarks/sam.py IMAGE [--what generator|rounds|refined|split] [--points 32] [--side 1000]
                                   [--checkpoint FILE --variant vit_b] [--threads 1]

Without a checkpoint the model is a SAM of one small encoder block with the full mask decoder and random weights, and
thresholds are set by what it says of the image: half of its masks pass each, a mask is 1 % of the image. What is
compared is the same work by the same weights. `rounds` is timed twice: asking every point in every round, which gives
the masks of the port, and asking none that is white already, as it is used. `split` only says how long embedding,
decoding and filtering take; `--checkpoint random` is a vit_b or larger that has learnt nothing.
"""

import argparse
import time
from dataclasses import replace
from functools import partial

import cv2
import numpy as np
import torch
from measure import Cost, measured, show
from PIL import Image
from scipy import ndimage
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from rayseg.models import sam as sams
from rayseg.models.sam import SamConfig, SamProposer, load_sam
from rayseg.vision import masks
from rayseg.vision.rounds import Refining, RoundsConfig, alone, find_plots, is_mixed, is_white, whitened


def random_sam() -> Sam:
    torch.manual_seed(0)
    encoder = ImageEncoderViT(
        depth=1,
        embed_dim=96,
        num_heads=3,
        out_chans=256,
        norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        use_rel_pos=True,
        window_size=14,
    )
    prompts = PromptEncoder(
        embed_dim=256, image_embedding_size=(64, 64), input_image_size=(1024, 1024), mask_in_chans=16
    )
    transformer = TwoWayTransformer(depth=2, embedding_dim=256, mlp_dim=2048, num_heads=8)
    model = Sam(encoder, prompts, MaskDecoder(transformer_dim=256, transformer=transformer)).eval()
    with torch.no_grad():
        for name, weights in transformer.named_parameters():
            weights.mul_(6 if "proj.weight" in name else 1)  # so that points differ in what they mark
    return model


@torch.inference_mode()
def thresholds(model: Sam, image: np.ndarray) -> dict[str, float]:
    """Set the model's threshold so that a mask is 1 % of the image; those that half of the masks pass."""
    proposer = SamProposer(model, SamConfig(half=False))
    resized = sams.ResizeLongestSide(1024).apply_image(image)
    sides = np.linspace(60, 960, 8)
    points = torch.as_tensor(np.stack(np.meshgrid(sides, sides), axis=-1).reshape(-1, 2), device=model.device)
    logits, ious = sams.decode(model, proposer._embedded(resized), points, least_iou=0.0)
    model.mask_threshold = float(torch.quantile(logits.flatten()[::97].cpu(), 0.99))
    offset = float(logits.std()) / 10
    stable = sams.amg.calculate_stability_score(logits, model.mask_threshold, offset)
    return {"iou": float(ious.median()), "stability": float(stable.nan_to_num().median()), "offset": offset}


def generator_of(model: Sam, config: SamConfig) -> SamAutomaticMaskGenerator:
    return SamAutomaticMaskGenerator(
        model,
        points_per_side=config.points,
        pred_iou_thresh=config.iou,
        stability_score_thresh=config.stability,
        stability_score_offset=config.offset,
        box_nms_thresh=config.nms,
    )


def published(generator: SamAutomaticMaskGenerator, image: np.ndarray, rounds: RoundsConfig) -> list[np.ndarray]:
    """The published rounds: every point of every round, masks as arrays, IoU pixel by pixel."""
    whole, found = image, []
    for number, one in enumerate(rounds.rounds, 1):
        white = is_white(image)
        if number > 1 and 1 - white.mean() < rounds.left:
            break
        kept = [mask["segmentation"] for mask in generator.generate(image)]
        if one.white is not None:
            kept = [mask for mask in kept if white[mask].mean() < one.white]
        found += kept
        image = whitened(image, [masks.encode(mask) for mask in kept], edges=one.edges)
        print(f"    published, round {number}: {len(kept)} masks, {1 - is_white(image).mean():.0%} left", flush=True)
    plots = parted(survivors(found, rounds.duplicate), rounds.least)
    return refined(generator, whole, plots, rounds.refining, rounds.least) if rounds.refining else plots


def refined(
    generator: SamAutomaticMaskGenerator, image: np.ndarray, plots: list[np.ndarray], how: Refining, least: int
) -> list[np.ndarray]:
    """The published refinement: automatic masks once more inside masks that look mixed."""
    fresh = []
    for mask in plots:
        if mask.sum() <= how.least or not is_mixed(alone(image, mask), mask, how):
            continue
        left, top, width, height = cv2.boundingRect(mask.astype(np.uint8))
        cut = np.s_[top : top + height, left : left + width]
        crop = np.ascontiguousarray(alone(image[cut], mask[cut]))
        for one in generator.generate(crop):
            if is_white(crop)[one["segmentation"]].mean() < how.white:
                placed = np.zeros_like(mask)
                placed[cut] = one["segmentation"]
                fresh.append(placed)
    fresh = parted(survivors(fresh, how.duplicate), 1)
    return parted(survivors(plots + fresh, how.overlap), least)


def survivors(found: list[np.ndarray], threshold: float) -> list[np.ndarray]:
    left, again = list(range(len(found))), True
    while again:
        again, dropped = False, set()
        for i in left:
            for j in left:
                if i == j or i in dropped or j in dropped:
                    continue
                if np.logical_and(found[i], found[j]).sum() / np.logical_or(found[i], found[j]).sum() > threshold:
                    again = True
                    if found[i].sum() <= found[j].sum():
                        dropped.add(i)
                        break
                    dropped.add(j)
        left = [k for k in left if k not in dropped]
    return [found[k] for k in left]


def parted(found: list[np.ndarray], least: int) -> list[np.ndarray]:
    parts = []
    for mask in found:
        labels, count = ndimage.label(mask)
        parts += [labels == k for k in range(1, count + 1) if (labels == k).sum() >= least]
    return parts


def every_point(proposer: SamProposer):
    return lambda image, open_HW: proposer(image, np.ones_like(open_HW))


def alike(one: list[bytes], other: list[bytes]) -> str:
    return f"{len(set(one) & set(other))} of {len(set(one))} and {len(set(other))} the same"


def split(proposer: SamProposer, image: np.ndarray) -> None:
    """How long the parts of one automatic generation take."""
    spent = {"decoding": 0.0, "embedding": 0.0}

    def timed(name, function):
        def call(*args, **kwargs):
            began = time.perf_counter()
            result = function(*args, **kwargs)
            spent[name] += time.perf_counter() - began
            return result

        return call

    sams.decode = timed("decoding", sams.decode)
    proposer.sam.image_encoder.forward = timed("embedding", proposer.sam.image_encoder.forward)
    began = time.perf_counter()
    found = proposer(image, np.ones(image.shape[:2], bool))
    whole = time.perf_counter() - began
    spent["filtering"] = whole - sum(spent.values())
    print(f"{len(found)} masks in {whole:.1f} s: " + ", ".join(f"{name} {s:.1f} s" for name, s in spent.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("image")
    parser.add_argument("--what", choices=("generator", "rounds", "refined", "split"), default="rounds")
    parser.add_argument("--checkpoint")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cv2.setNumThreads(asked.threads)
    with Image.open(asked.image) as opened:
        image = np.asarray(opened.convert("RGB").resize((asked.side, asked.side), Image.Resampling.LANCZOS))
    config = SamConfig(variant=asked.variant, checkpoint=asked.checkpoint or "", points=asked.points)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    proposer = load_sam(config) if asked.checkpoint else SamProposer(random_sam().to(device), config)
    if asked.checkpoint in {None, "random"}:
        limits = thresholds(proposer.sam, image)
        print({name: round(value, 3) for name, value in limits.items()}, round(proposer.sam.mask_threshold, 3))
        proposer = replace(proposer, config=config.model_copy(update=limits))
    if asked.what == "split":
        split(proposer, image)
        return
    proposer(image, np.ones(image.shape[:2], bool)) if device == "cuda" else None  # compiled, and warm
    compare(proposer, image, asked.what)


def compare(proposer: SamProposer, image: np.ndarray, what: str) -> None:
    generator = generator_of(proposer.sam, proposer.config)
    rounds = RoundsConfig() if what == "refined" else RoundsConfig(refining=None)
    rows: list[tuple[str, Cost, list[bytes]]] = []

    def timed(name, work):
        with measured() as cost:
            found = work()
        rows.append((name, cost, [runs.tobytes() for runs in found]))

    if what == "generator":
        timed("ours", lambda: proposer(image, np.ones(image.shape[:2], bool)).masks)
        timed("published", lambda: [masks.encode(one["segmentation"]) for one in generator.generate(image)])
    else:
        timed("ours", lambda: find_plots(image, proposer, rounds).proposals.masks)
        timed("ours, every point", lambda: find_plots(image, every_point(proposer), rounds).proposals.masks)
        timed("published", lambda: [masks.encode(mask) for mask in published(generator, image, rounds)])
    _, last, expected = rows[-1]
    table = [
        (name, len(found), f"{cost.wall:.1f}", f"{cost.cpu:.1f}", f"{last.wall / cost.wall:.2f}",
         f"{last.cpu / cost.cpu:.2f}", alike(found, expected))
        for name, cost, found in rows
    ]  # fmt: skip
    size = f"{image.shape[1]} x {image.shape[0]} px, {proposer.config.points} points a side"
    show(f"{what}, {size}", ("which", "masks", "s", "CPU s", "x", "x by CPU", "masks against the published"), table)
    size = 500 * np.mean([len(runs) for runs in rows[0][2]]) / 2**20 if rows[0][2] else 0.0
    print(f"500 such masks are {size:.1f} MiB as runs, {500 * image.shape[0] * image.shape[1] / 2**20:.0f} as arrays")


if __name__ == "__main__":
    main()
