"""The Grad-CAM++ stage over batches of chips against one chip at a time, interleaved, on the same bundle.

One at a time is what the published code does: the library's own context, one image per pass. On a GPU, if there is
one, the same script measures there. Targets: not slower on a CPU, 3 x on a GPU.
"""

import argparse
import tempfile
from pathlib import Path

import numpy as np
from measure import Cost, measured, middle, show


def write_model(prefix: Path, encoder: str) -> None:
    """The bundle of an untrained classifier."""
    from rayseg.models import bundle
    from rayseg.models.bundle import Architecture, Bundle, Scaling
    from rayseg.models.classifier import build_classifier

    options = {"encoder": encoder, "classes": 2}
    described = Bundle(
        name="classifier",
        task="classification",
        architecture=Architecture(factory="classifier", options=options),
        classes=((0, "found", (0, 158, 115)), (1, "other", (0, 0, 0))),
        bands=("red", "green", "blue"),
        dtype="uint8",
        scaling=Scaling(mean=(98.0,) * 3, std=(50.0,) * 3),
        patch=512,
        stride=512,
    )
    bundle.save(prefix, described, build_classifier(**options, weights="none"))


def one_at_a_time(prefix: str, images: list[np.ndarray]) -> list[np.ndarray]:
    """A map per image by pytorch-grad-cam, as in its documentation."""
    import torch
    from pytorch_grad_cam import GradCAMPlusPlus
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    from rayseg.models import bundle

    described, model = bundle.build(prefix)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    maps = []
    with GradCAMPlusPlus(model, [model.stages[-1]]) as cam:
        for image_HWC in images:
            batch = torch.from_numpy(described.normalize(image_HWC.transpose(2, 0, 1)))[None]
            maps.append(cam(batch, [ClassifierOutputTarget(0)])[0])
    return maps


def main() -> None:
    """Interleave both, print the medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chips", type=int, default=32, help="of 512 px (quick: 8)")
    parser.add_argument("--batch", type=int, default=8, help="chips in a pass, as the pipeline has it")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is measured (quick: 1)")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0 takes its own choice")
    parser.add_argument("--encoder", default="mobilenet_v2", help="of segmentation_models_pytorch or timm")
    asked = parser.parse_args()
    import torch

    from rayseg.stages.locate import Cam

    if asked.threads:
        torch.set_num_threads(asked.threads)
    rng = np.random.default_rng(1)
    images = [rng.integers(0, 255, (16, 16, 3), np.uint8).repeat(32, 0).repeat(32, 1) for _ in range(asked.chips)]
    costs: dict[str, list[Cost]] = {"one at a time": [], "stage": []}
    with tempfile.TemporaryDirectory() as prefix:
        write_model(Path(prefix), asked.encoder)
        stage = Cam(prefix, target=0)
        one_at_a_time(prefix, images[:1])
        stage([{"image": image} for image in images[: asked.batch]])  # models and kernels are ready
        for _ in range(asked.rounds):
            with measured() as cost:
                single = one_at_a_time(prefix, images)
            costs["one at a time"].append(cost)
            with measured() as cost:
                batches = [images[at : at + asked.batch] for at in range(0, len(images), asked.batch)]
                batched = [row["cam"] for part in batches for row in stage([{"image": image} for image in part])]
            costs["stage"].append(cost)
    apart = max(float(np.abs(one - other).max()) for one, other in zip(single, batched, strict=True))
    base = middle(costs["one at a time"])
    rows = []
    for kind, found in costs.items():
        cost = middle(found)
        rows.append([kind, cost.wall / asked.chips, base.wall / cost.wall, cost.cpu / asked.chips, base.cpu / cost.cpu])
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    title = f"Grad-CAM++ of {asked.chips} chips, {asked.encoder}, batches of {asked.batch}, {device}"
    show(f"{title}; maps differ by at most {apart:.1e}", ("", "s per chip", "x", "CPU s per chip", "x by CPU s"), rows)


if __name__ == "__main__":
    main()
