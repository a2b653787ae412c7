"""Images whose classes differ by colour alone, with their masks; settings of a training of seconds on them."""

import numpy as np

from rayseg.models.bundle import Scaling
from rayseg.train.augment import Augment
from rayseg.train.batches import Chips
from rayseg.train.learning import Learning
from rayseg.train.s4gan import S4ganConfig

SCALING = Scaling(mean=(127.0,) * 3, std=(128.0,) * 3)
COLORS = np.array([(200, 40, 40), (40, 200, 40), (40, 40, 200)], np.uint8)


def pair(seed, *, values=(0, 1, 2)):
    """An image of squares of 32 px in the colours of their classes, with noise."""
    rng = np.random.default_rng(seed)
    classes_HW = np.kron(rng.choice(values, (3, 4)), np.ones((32, 32))).astype(np.uint8)
    image_HWC = np.clip(COLORS[classes_HW].astype(int) + rng.integers(-30, 31, (96, 128, 3)), 0, 255)
    return image_HWC.transpose(2, 0, 1).astype(np.uint8), classes_HW


GROUND_SCALING = Scaling(mean=(110.0, 100.0, 90.0), std=(40.0, 40.0, 40.0))
SEMI_SUPERVISED = S4ganConfig(
    architecture="unet",
    encoder="test_resnet",
    weights="none",
    size=32,
    steps=6,
    checkpoint=2,
    rate=1e-3,
    head_rate=3.0,
    bias_rate=3.0,
    learning=Learning(batch=4, optimizer="adamw"),
    augment=Augment(crop="random"),
)


def chips_on_ground(count, *colors, seed, masks=True, size=48):
    """Brown ground with a square in each of the colours, classes 1, 2, ...; 0 ground, 255 along the left edge."""
    rng = np.random.default_rng(seed)
    images = rng.normal((130, 100, 70), 10, (count, size, size, 3))
    classes = np.zeros((count, size, size), np.uint8)
    for k in range(count):
        for value, color in enumerate(colors, 1):
            top, left = rng.integers(0, size // 2, 2)
            classes[k, top : top + size // 3, left : left + size // 3] = value
            images[k][classes[k] == value] = color
    classes[:, :, :2] = 255
    images_NHWC = images.clip(0, 255).astype(np.uint8)
    ids = tuple(f"s{seed}-{k}" for k in range(count))
    read_mask = classes.__getitem__ if masks else None
    return Chips(ids, (0,) * count, images_NHWC.__getitem__, read_mask, classes=1 + len(colors))
