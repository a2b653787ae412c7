"""De-duplicating masks: runs and one product against a straight port of the published loops.

    python benchmarks/masks.py [--count 400] [--side 1000] [--loops 24]

The loops compare masks pixel by pixel, each pair up to twice. They run on `--loops` of the masks and their time is
extrapolated by the number of comparisons; `--loops 0` runs them on all. Times are CPU times.
"""

import argparse
import time

import numpy as np

from rayseg.vision import rle


def ellipses(count: int, side: int) -> np.ndarray:
    """(count, side, side) bool; every tenth is almost equal to the one before."""
    rng, (rows, cols) = np.random.default_rng(0), np.mgrid[:side, :side]
    found = np.zeros((count, side, side), bool)
    for k in range(count):
        near = k % 10 == 9
        (row, col), (a, b) = rng.uniform(0, side, 2), rng.uniform(side / 40, side / 9, 2)
        found[k] = np.roll(found[k - 1], 2, axis=0) if near else ((rows - row) / a) ** 2 + ((cols - col) / b) ** 2 <= 1
    return found


def by_loops(masks_NHW: np.ndarray, threshold: float) -> tuple[list[int], int]:
    """The masks that the published loops keep, and the number of pairs they compare pixel by pixel."""
    left, again, compared = list(range(len(masks_NHW))), True, 0
    while again:
        again, dropped = False, set()
        for i in left:
            for j in left:
                if i == j or i in dropped or j in dropped:
                    continue
                compared += 1
                both = np.logical_and(masks_NHW[i], masks_NHW[j]).sum()
                either = np.logical_or(masks_NHW[i], masks_NHW[j]).sum()
                if both / either > threshold:
                    again = True
                    if masks_NHW[i].sum() <= masks_NHW[j].sum():
                        dropped.add(i)
                        break
                    dropped.add(j)
        left = [k for k in left if k not in dropped]
    return left, compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--side", type=int, default=1000)
    parser.add_argument("--loops", type=int, default=24)
    asked = parser.parse_args()
    masks_NHW = ellipses(asked.count, asked.side)
    runs = [rle.encode(mask_HW) for mask_HW in masks_NHW]
    size = sum(one.nbytes for one in runs) * 500 / len(runs)
    began = time.process_time()
    kept = rle.survivors(runs, 0.8)
    ours = time.process_time() - began

    part = asked.loops or asked.count
    began = time.process_time()
    expected, compared = by_loops(masks_NHW[:part], 0.8)
    loops = time.process_time() - began
    assert expected == rle.survivors(runs[:part], 0.8), "the survivors differ"
    whole = len(kept) * (len(kept) - 1) + asked.count - len(kept)  # every pair of the last pass, at least
    print(f"{asked.count} masks of {asked.side} x {asked.side}: {len(kept)} survive")
    print(f"runs and one product: {ours:.3f} s; 500 such masks take {size / 2**20:.2f} MiB")
    print(f"loops on {part}: {loops:.2f} s for {compared} comparisons, the same survivors")
    print(f"loops on all, at {loops / compared * 1000:.2f} ms a comparison: at least {loops / compared * whole:.0f} s,")
    print(f"{loops / compared * whole / ours:,.0f} times as long")


if __name__ == "__main__":
    main()
