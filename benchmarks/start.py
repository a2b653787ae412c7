"""From `rayseg predict` to the first finished tile, in a fresh process: seconds until the ledger has a record.

The scene is one tile of 512 px and the network small, so the time is that of imports, of Ray's start and of the model.
Targets on two free cores: ray 12 s, inline 4 s.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measure import Cost, middle, show, tree_seconds
from small_models import save_segmenter

PROGRAM = "from rayseg.cli import app; app()"


def write_world(folder: Path) -> tuple[str, str]:
    """A scene of 512 px without georeference and the bundle of a small network; where they are."""
    import numpy as np
    from PIL import Image

    (folder / "images").mkdir()
    image_HWC = np.random.default_rng(1).integers(0, 255, (8, 8, 3), np.uint8).repeat(64, axis=0).repeat(64, axis=1)
    Image.fromarray(image_HWC).save(folder / "images/scene.png")
    save_segmenter(folder / "model", None, patch=640, stride=512, encoder="mobilenet_v2")
    return str(folder / "model"), str(folder / "images")


def first_tile(model: str, images: str, out: Path, engine: str) -> tuple[Cost, float]:
    """The cost up to the first record, and the seconds of the whole command."""
    words = [sys.executable, "-c", PROGRAM, "predict", model, images, "--out", str(out), "--engine", engine]
    started, used = time.time(), 0.0
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not used and process.poll() is None:
        time.sleep(0.02)
        used = tree_seconds(process.pid) if any(out.glob("steps/predict/ledger/*.json")) else 0.0
    if process.wait():
        raise SystemExit(f"{' '.join(words[3:])} ended with {process.returncode}")
    [record] = out.glob("steps/predict/ledger/*.json")
    return Cost(record.stat().st_mtime - started, used), time.time() - started


def main() -> None:
    """Interleave the engines, print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (quick: 1)")
    asked = parser.parse_args()
    found: dict[str, list[tuple[Cost, float]]] = {"inline": [], "ray": []}
    with tempfile.TemporaryDirectory() as name:
        world = write_world(Path(name))
        for number in range(asked.rounds):
            for engine, costs in found.items():
                costs.append(first_tile(*world, Path(name) / f"{engine}-{number}", engine))
                print(f"{engine}: {costs[-1]}, load {os.getloadavg()[0]:.1f}", flush=True)
    rows = []
    for engine, costs in found.items():
        cost = middle([one for one, _ in costs])
        least = min(one.wall for one, _ in costs)
        rows.append([engine, cost.wall, least, cost.cpu, middle([Cost(whole, 0) for _, whole in costs]).wall])
    columns = ("engine", "s to the first tile", "least", "CPU s to it, of all processes", "s of the command")
    show(f"Start to the first tile, {asked.rounds} rounds", columns, rows)


if __name__ == "__main__":
    main()
