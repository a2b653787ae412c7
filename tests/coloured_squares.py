"""Images whose classes differ by colour alone, with their masks."""

import numpy as np

from rayseg.models.bundle import Scaling

SCALING = Scaling(mean=(127.0,) * 3, std=(128.0,) * 3)
COLORS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)


def pair(seed, *, values=(0, 1, 2)):
    """An image of squares of 32 px in the colours of their classes, with noise."""
    rng = np.random.default_rng(seed)
    classes_HW = np.kron(rng.choice(values, (3, 4)), np.ones((32, 32))).astype(np.uint8)
    image_HWC = np.clip(COLORS[classes_HW].astype(int) + rng.integers(-30, 31, (96, 128, 3)), 0, 255)
    return image_HWC.transpose(2, 0, 1).astype(np.uint8), classes_HW
