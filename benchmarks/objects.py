"""Objects v1 on chips of 512 px against a straight port of the published loop, interleaved, chip by chip.

The port follows the method in plain PyTorch and numpy: contiguous tensors, a Python loop over the
superpixels for the vote. Both are given the same superpixels. Quality is the adjusted mutual information (AMI) between
the two results, next to that between two seeds of the port. On a GPU, if there is one, the same script measures there.
Targets: 2.5 x on a CPU, 10 x on a GPU, AMI no lower than between two seeds.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from measure import Cost, measured, show

NAMES = ("port", "rayseg")


def port(image_HWC: np.ndarray, superpixels_HW: np.ndarray, *, seed: int, iterations: int, device: str) -> np.ndarray:
    """The published loop: network, argmax, vote in every superpixel, cross-entropy, SGD."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    model = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        *(nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.ReLU(inplace=True)),
        *(nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(inplace=True)),
        *(nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32)),
    ).to(device)
    image = torch.from_numpy(image_HWC.transpose(2, 0, 1).astype(np.float32) / 255)[None].to(device)
    members = [np.where(superpixels_HW.ravel() == label)[0] for label in np.unique(superpixels_HW)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    model.train()
    for _ in range(iterations):
        optimizer.zero_grad()
        output = model(image)[0].permute(1, 2, 0).reshape(-1, 32)
        target = output.argmax(1).cpu().numpy()
        for pixels in members:
            labels, counts = np.unique(target[pixels], return_counts=True)
            target[pixels] = labels[counts.argmax()]
        loss = nn.functional.cross_entropy(output, torch.from_numpy(target).to(device))
        loss.backward()
        optimizer.step()
        if len(np.unique(target)) < 4:
            break
    return target.reshape(superpixels_HW.shape)


def chips(folder: str | None, *, count: int, size: int) -> Iterator[np.ndarray]:
    """The middle of images in a folder, or drawn landscapes, (size, size, 3) uint8."""
    from PIL import Image

    if folder is None:
        rng = np.random.default_rng(1)
        for _ in range(count):
            fields = rng.integers(40, 200, (size // 32, size // 32, 3)).repeat(32, axis=0).repeat(32, axis=1)
            yield np.clip(fields + rng.normal(0, 8, fields.shape), 0, 255).astype(np.uint8)
        return
    paths = sorted(path for path in Path(folder).rglob("*") if path.suffix.lower() in {".png", ".jpg", ".jpeg"})
    for path in paths[:count]:
        image_HWC = np.array(Image.open(path).convert("RGB"))
        row, col = ((side - size) // 2 for side in image_HWC.shape[:2])
        yield image_HWC[max(row, 0) :, max(col, 0) :][:size, :size]


def main() -> None:
    """Run both on every chip, in turn, for every number of threads."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="folder of real chips; without it they are drawn")
    parser.add_argument("--chips", type=int, default=4, help="how many (quick: 1)")
    parser.add_argument("--size", type=int, default=512, help="side of a chip in px (quick: 128)")
    parser.add_argument("--iterations", type=int, default=64, help="training steps (quick: 8)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="of PyTorch, one table row each")
    parser.add_argument("--seeds", type=int, default=2, help="of the port for the AMI; 1 leaves it out")
    asked = parser.parse_args()
    import torch
    from sklearn.metrics import adjusted_mutual_info_score

    from rayseg.models import unsupervised
    from rayseg.vision.superpixels import felzenszwalb

    device = "cuda" if torch.cuda.is_available() else "cpu"

    def ours(image_HWC: np.ndarray, superpixels_HW: np.ndarray, *, seed: int) -> np.ndarray:
        return unsupervised.segment(
            image_HWC, superpixels_HW, network="v1", iterations=asked.iterations, seed=seed, device=device
        )

    def theirs(image_HWC: np.ndarray, superpixels_HW: np.ndarray, *, seed: int) -> np.ndarray:
        return port(image_HWC, superpixels_HW, seed=seed, iterations=asked.iterations, device=device)

    runs: dict[str, Callable[..., np.ndarray]] = dict(zip(NAMES, (theirs, ours), strict=True))
    images = [(image, felzenszwalb(image)) for image in chips(asked.images, count=asked.chips, size=asked.size)]
    for run in runs.values():
        run(images[0][0][:64, :64], felzenszwalb(images[0][0][:64, :64]), seed=0)  # kernels are ready
    rows, results = [], []
    for threads in asked.threads:
        torch.set_num_threads(threads)
        costs: dict[str, list[Cost]] = {name: [] for name in NAMES}
        for image, superpixels in images:
            for name, run in runs.items():
                with measured() as cost:
                    labels = run(image, superpixels, seed=1943)
                costs[name].append(cost)
                if threads == asked.threads[0]:
                    results.append(labels)
                print(f"{threads} threads, {name}: {cost}, {len(np.unique(labels))} labels", flush=True)
        wall, cpu = ([sum(getattr(cost, key) for cost in costs[name]) for name in NAMES] for key in ("wall", "cpu"))
        rows.append([threads, *(value / len(images) for value in wall), wall[0] / wall[1], cpu[0] / cpu[1]])
    columns = ("threads", "port, s per chip", "rayseg, s per chip", "x", "x by CPU s")
    count = f"{len(images)} chips of {asked.size} px, {asked.iterations} iterations, {device}"
    show(f"Objects v1: {count}", columns, rows)
    if asked.seeds > 1:
        table = []
        for at, (image, superpixels) in enumerate(images):
            base, mine = (labels.ravel() for labels in results[2 * at : 2 * at + 2])
            others = [theirs(image, superpixels, seed=seed).ravel() for seed in range(asked.seeds - 1)]
            between = [adjusted_mutual_info_score(base, other) for other in others]
            across = [adjusted_mutual_info_score(mine, other) for other in (base, *others)]
            table.append([at, float(np.mean(between)), float(np.mean(across))])
        table.append(["mean", *(float(np.mean([row[column] for row in table])) for column in (1, 2))])
        show("AMI", ("chip", "two seeds of the port", "rayseg and the port"), table)


if __name__ == "__main__":
    main()
