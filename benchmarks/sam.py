"""Four rounds of SAM on one image: ours against the published generator and a straight port of its rounds.

    python benchmarks/sam.py IMAGE [--checkpoint FILE --variant vit_b] [--side 1000] [--points 32] [--split]

Without a checkpoint the model is a SAM of one small encoder block with the full mask decoder and random weights,
whose predicted IoU and stability mean nothing: thresholds are set so that some masks pass. What is compared is the
same work on the same weights. `--split` only says how long embedding, decoding and filtering take.
"""

import argparse
import time
from functools import partial

import numpy as np
import torch
from PIL import Image
from segment_anything import SamAutomaticMaskGenerator
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from rayseg.models import sam as sams
from rayseg.models.sam import SamConfig, SamProposer, load_sam
from rayseg.vision import masks
from rayseg.vision.rounds import RoundsConfig, find_plots, in_rounds, is_white, whitened


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
        for mlp in model.mask_decoder.output_hypernetworks_mlps:
            mlp.layers[-1].weight.mul_(100)
    return model


def published(model: Sam, image: np.ndarray, config: SamConfig, rounds: RoundsConfig) -> int:
    """The published rounds: every point of every round, masks as arrays, IoU pixel by pixel. Returns masks left."""
    generator = SamAutomaticMaskGenerator(
        model,
        points_per_side=config.points,
        pred_iou_thresh=config.iou,
        stability_score_thresh=config.stability,
        box_nms_thresh=config.nms,
    )
    found: list[np.ndarray] = []
    for number, one in enumerate(rounds.rounds, 1):
        white = is_white(image)
        if number > 1 and 1 - white.mean() < rounds.left:
            break
        kept = [mask["segmentation"] for mask in generator.generate(image)]
        if one.white is not None:
            kept = [mask for mask in kept if white[mask].mean() < one.white]
        found += kept
        image = whitened(image, [masks.encode(mask) for mask in kept], edges=one.edges)
        print(f"    published, round {number}: {len(kept)} masks")
    return len(_survivors(found, rounds.duplicate))


def _survivors(found: list[np.ndarray], threshold: float) -> list[int]:
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
    return left


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
    parser.add_argument("--checkpoint")
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--split", action="store_true")
    asked = parser.parse_args()
    with Image.open(asked.image) as opened:
        image = np.asarray(opened.convert("RGB").resize((asked.side, asked.side), Image.Resampling.LANCZOS))
    limits = {} if asked.checkpoint not in {None, "random"} else {"iou": 0.0, "stability": 0.5}
    config = SamConfig(variant=asked.variant, checkpoint=asked.checkpoint or "", points=asked.points, **limits)
    proposer = load_sam(config) if asked.checkpoint else SamProposer(random_sam(), config)
    if asked.split:
        split(proposer, image)
        return
    rounds = RoundsConfig(refining=None)
    began = time.process_time()
    plots = find_plots(image, proposer, rounds)
    ours = time.process_time() - began
    print(f"ours: {ours:.1f} s of CPU, {len(plots.proposals)} plots, {np.bincount(plots.round_N)[1:]} by round")
    first = in_rounds(image, proposer, rounds.rounds[:1], left=0.0)
    print(f"    ours, round 1: {len(first.proposals)} masks")
    began = time.process_time()
    left = published(proposer.sam, image, config, rounds)
    theirs = time.process_time() - began
    print(f"published: {theirs:.1f} s of CPU, {left} masks; {theirs / ours:.1f} times as long")


if __name__ == "__main__":
    main()
