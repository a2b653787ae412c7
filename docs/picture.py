"""Make the README's picture from a finished demo run: part of a scene | chips, CAMs and coarse masks | its map.

python docs/picture.py runs/demo docs/images/demo.png
"""

import sys
from pathlib import Path

import matplotlib.image
import numpy as np

from rayseg.io.maps import mapped_tiles
from rayseg.io.pictures import mosaic
from rayseg.pipelines.gpc import CLASSES
from rayseg.vision.color import ClassTable

SIDE = 480
PART = (slice(20, 20 + SIDE), slice(900, 900 + SIDE))
GAP = 12


def main(run: str, target: str) -> None:
    """Write the picture of `run` to `target`."""
    seen = mosaic(mapped_tiles(run), size=1900, title="")
    cues_HWC = np.asarray(matplotlib.image.imread(Path(run, "steps/pictures/cues.png"))[..., :3] * 255, np.uint8)
    middle = cues_HWC[:, : cues_HWC.shape[1] // 6 * 3]  # the first three chips
    step = middle.shape[0] / SIDE
    rows, cols = (np.arange(SIDE) * step).astype(int), (np.arange(int(middle.shape[1] / step)) * step).astype(int)
    white_gap = np.full((SIDE, GAP, 3), 255, np.uint8)
    scene, classes = seen.imagery()[PART][..., :3], seen.map(ClassTable(CLASSES))[PART][..., :3]
    Path(target).parent.mkdir(parents=True, exist_ok=True)
    picture = np.concatenate([scene, white_gap, middle[rows][:, cols], white_gap, classes], axis=1)
    matplotlib.image.imsave(target, picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
