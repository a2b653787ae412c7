"""SAM's automatic masks on one image, and plots by rounds: ours against the published generator and a straight port.

    python benchmarks/sam.py IMAGE [--what generator|rounds|refined|split] [--points 32] [--side 1000]
                                   [--checkpoint FILE --variant vit_b] [--threads 1]

Without a checkpoint the model is a SAM of one small encoder block and the full mask decoder with random weights. Its
outputs are replaced so that the masks are blobs of three sizes around each point, of which half pass the predicted IoU
and two sizes the stability. Both sides do the same work with the same weights. `rounds` is timed twice: with every
point in every round, which gives the masks of the port, and without points that are white already, as in use. `split`
prints the time of embedding, decoding and filtering; `--checkpoint random` is an untrained vit_b or larger.
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
from torch import nn

from rayseg.models import sam as sams
from rayseg.models.sam import SamConfig, SamProposer, load_sam
from rayseg.vision import rle
from rayseg.vision.rounds import Refining, RoundsConfig, alone, find_plots, is_mixed, is_white, whitened


class PointKept(nn.Module):
    """A decoder's transformer whose mask tokens are the encoding of the point's position."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, image, place, tokens):
        decoded, image = self.inner(image, place, tokens)
        decoded[:, 1:5] = tokens[:, 5:6]
        return decoded, image


class PlaceShown(nn.Module):
    """A decoder's upscaling whose channels are the position of each pixel."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        x, y = torch.meshgrid(*[(torch.arange(256) + 0.5) / 256] * 2, indexing="xy")
        self.register_buffer("place", torch.cat([waves(x, y), torch.zeros(7, 256, 256)]))

    def forward(self, image):
        return self.inner(image).copy_(self.place)


def waves(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """25 functions of a place (0..1), whose products with those of another sum up to a bump around it."""
    one = [
        torch.stack(
            [
                torch.ones_like(v),
                *(2**0.5 * w * f(4.2 * k * v) for k, w in ((1, 0.9), (2, 0.6)) for f in (torch.cos, torch.sin)),
            ]
        )
        for v in (x, y)
    ]
    return (one[0][:, None] * one[1][None]).flatten(0, 1)


MASKS = ((0.5, 60), (0.8, 60), (1.2, 30))
"""Of the three masks of a point: radius in distances of points, and how many steps of the stability's offset it is."""


def random_sam(points: int) -> Sam:
    """A SAM whose decoder works as it would, and finds blobs of three sizes around every point."""
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
    decoder = MaskDecoder(transformer_dim=256, transformer=transformer)
    decoder.transformer, decoder.output_upscaling = PointKept(transformer), PlaceShown(decoder.output_upscaling)
    model = Sam(encoder, prompts, decoder).eval()
    with torch.no_grad():
        sides = (torch.arange(48) + 0.5) / 48
        xy = torch.stack(torch.meshgrid(sides, sides, indexing="xy"), dim=-1).reshape(-1, 2)
        seen = prompts._embed_points(xy[:, None] * 1024 - 0.5, torch.ones(len(xy), 1), pad=True)[:, 0]
        seen = torch.cat([seen, torch.ones(len(seen), 1)], dim=1).double()
        wanted = waves(*xy.T).T.double()
        solved = torch.linalg.lstsq(seen, wanted).solution.float()
        top = float((wanted**2).sum(dim=1).mean())
        for k, (radius, steps) in enumerate(MASKS, 1):
            depth = 11.7 * (radius / points) ** 2  # how far the bump has fallen there
            weights = torch.cat([solved * steps / depth / top, torch.zeros(257, 7)], dim=1)
            weights[256, 0] -= (1 - depth) * steps / depth  # channel 0 is one everywhere
            place = nn.Linear(256, 32)
            place.weight.copy_(weights[:256].T)
            place.bias.copy_(weights[256])
            decoder.output_hypernetworks_mlps[k] = place
    return model


@torch.inference_mode()
def half_of_them(model: Sam, image: np.ndarray) -> float:
    """The median predicted IoU of the masks of an image."""
    sides = torch.linspace(64, 960, 6, device=model.device)
    points = torch.stack(torch.meshgrid(sides, sides, indexing="xy"), dim=-1).reshape(-1, 2)
    small = torch.as_tensor(sams.ResizeLongestSide(1024).apply_image(image), device=model.device)
    embedding = model.image_encoder(model.preprocess(small.permute(2, 0, 1)[None].contiguous()))
    return float(sams.decode(model, embedding, points, least_iou=0.0)[1].median())


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
    whole, found, began = image, [], time.process_time()
    for number, one in enumerate(rounds.rounds, 1):
        white = is_white(image)
        if number > 1 and 1 - white.mean() < rounds.left:
            break
        kept = [mask["segmentation"] for mask in generator.generate(image)]
        if one.white is not None:
            kept = [mask for mask in kept if white[mask].mean() < one.white]
        found += kept
        image = whitened(image, [rle.encode(mask) for mask in kept], edges=one.edges)
        print(f"    published, round {number}: {len(kept)} masks, {1 - is_white(image).mean():.0%} left", flush=True)
    print(f"    published, rounds: {time.process_time() - began:.1f} s of CPU; then {len(found)} masks are compared")
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
    """Number of identical masks, and the lowest IoU of any mask with its most similar one."""
    if not one or not other:
        return f"{len(one)} and {len(other)}"
    ious = rle.ious([np.frombuffer(runs, np.int64) for runs in [*one, *other]])[: len(one), len(one) :]
    worst = min(ious.max(axis=1).min(), ious.max(axis=0).min())
    return f"{len(set(one) & set(other))} of {len(set(other))} the same, IoU of the others {worst:.4f} or more"


def split(proposer: SamProposer, image: np.ndarray) -> None:
    """Print the time of the parts of one automatic generation."""
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
    masks = proposer(image, np.ones(image.shape[:2], bool))
    whole = time.perf_counter() - began
    spent["filtering"] = whole - sum(spent.values())
    print(f"{len(masks)} masks in {whole:.1f} s: " + ", ".join(f"{name} {s:.1f} s" for name, s in spent.items()))


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
    proposer = load_sam(config) if asked.checkpoint else SamProposer(random_sam(asked.points).to(device), config)
    if asked.checkpoint in {None, "random"}:
        proposer = replace(proposer, config=config.model_copy(update={"iou": half_of_them(proposer.sam, image)}))
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
        timed("published", lambda: [rle.encode(one["segmentation"]) for one in generator.generate(image)])
    else:
        timed("ours", lambda: find_plots(image, proposer, rounds).proposals.masks)
        timed("ours, every point", lambda: find_plots(image, every_point(proposer), rounds).proposals.masks)
        timed("published", lambda: [rle.encode(mask) for mask in published(generator, image, rounds)])
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
