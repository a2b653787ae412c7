from types import SimpleNamespace

import numpy as np
import pytest
import torch

from rayseg.train import probe
from rayseg.train.batches import Chips
from rayseg.train.learning import Learner

torch.set_num_threads(1)  # tiny networks, and often a busy machine


def drawn_chips(count, *, size=32, seed=0):
    """Noisy brown ground; class 0 has a green square somewhere, which is its mask."""
    rng = np.random.default_rng(seed)
    images = rng.normal((120, 100, 80), 12, (count, size, size, 3)).clip(0, 255).astype(np.uint8)
    masks = np.zeros((count, size, size), np.uint8)
    labels = [k % 2 for k in range(count)]
    for k in range(0, count, 2):
        top, left = rng.integers(0, size // 2, 2)
        masks[k, top : top + size // 2, left : left + size // 2] = 1
        images[k][masks[k] == 1] = rng.normal((60, 160, 90), 12, (int(masks[k].sum()), 3)).clip(0, 255)
    return Chips.of_arrays([f"chip{k}" for k in range(count)], labels, images, masks)


@pytest.fixture(autouse=True)
def _same_luck_every_time():
    torch.manual_seed(0)


@pytest.fixture
def chips():
    return drawn_chips(12)


@pytest.fixture
def held_out():
    return drawn_chips(8, seed=1)


@pytest.fixture
def stood_for(monkeypatch):
    """A function: training -> (steps made, steps that it stands for) when it is cut short; time is told in steps."""
    made = []
    step = Learner.step
    monkeypatch.setattr(Learner, "step", lambda *given, **named: made.append(1) or step(*given, **named))
    monkeypatch.setattr(probe, "time", SimpleNamespace(perf_counter=lambda: float(len(made))))

    def count(train):
        made.clear()
        with probe.taken() as taken:
            train()
        return len(made), len(made) + taken.left_out

    count.also = lambda: made.append(1)
    return count
