"""Simulated samples of a map with known truth: do the intervals of `rayseg area` hold, and what do strata save?

    area.py RUN --truth MASKS [--draws 1000] [--per-stratum 50]

Each draw takes points from the strata of `rayseg area sample` and answers them from the truth. Printed for each class:
the true share, that of counting pixels, the mean of the estimates, how many of their 95 % intervals hold the truth, and
the half-width as a share of that of a simple random sample of as many points; then the same of the estimates that are
assisted by scores.
"""

import argparse

import numpy as np

from rayseg.io import masks
from rayseg.io.maps import class_probability, mapped_tiles, read_tile
from rayseg.metrics import Z, regression_mean, stratified_mean
from rayseg.steps import area, evaluate


def pixels_of(run, truth, band):
    """(class table; stratum, score, true class and class probabilities of every labelled pixel)."""
    tiles = mapped_tiles(run)
    table = masks.table_of(tiles[0].href)
    reference = masks.two_classes(masks.masks_of(truth, names=table.names), table, truth)
    by_id = {tile.tile.id: tile for tile in tiles}
    strata, scores, classes, chances = [], [], [], []
    for found in evaluate.match(masks.pieces_of_tiles(tiles), reference):
        strata_HW, score_HW, _ = area.strata_of(by_id[found.piece.tile.id], table, band)
        truth_HW = masks.read_classes(found.truth, found.grid, found.window, table)
        known = (strata_HW >= 0) & (truth_HW != 255)
        strata.append(strata_HW[known])
        scores.append(score_HW[known])
        classes.append(truth_HW[known])
        tile = by_id[found.piece.tile.id]
        read = read_tile(tile, "classes")[0], read_tile(tile, "scores")
        chances.append(np.stack([class_probability(value, *read, table)[known] for value in table.values], axis=1))
    return table, *map(np.concatenate, (strata, scores, classes, chances))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--truth", required=True)
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--per-stratum", type=int)
    parser.add_argument("--half-width", type=float)
    parser.add_argument("--band", type=float, default=0.8)
    given = parser.parse_args()
    table, strata, scores, classes, chances_NK = pixels_of(given.run, given.truth, given.band)
    sizes = np.bincount(strata, minlength=4 * len(table.classes))
    weights = sizes / sizes.sum()
    described = []
    for k, size in enumerate(sizes):
        errors = 1 - float(scores[strata == k].mean()) if size else 0.0
        least = area._ERRORS[bool(k % 2)]
        described.append(area.Stratum(table.values[k // 4], k % 4 > 1, k % 2 > 0, float(size), max(errors, least)))
    counts = np.minimum(area.points_of(described, given.per_stratum, given.half_width), sizes)
    total = int(counts.sum())
    parts = int((counts > 0).sum())
    print(f"{given.run}: {len(strata):,} labelled pixels, {total} points in {parts} strata, {given.draws} draws")
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(strata == k) for k in range(len(sizes))]
    marks = np.repeat(np.arange(len(sizes)), counts)
    estimates = {(value, way): [] for value in table.values for way in ("", "assisted")}
    means_K = chances_NK.mean(axis=0)
    for _ in range(given.draws):
        drawn = np.concatenate([rng.choice(part, count) for part, count in zip(members, counts, strict=True) if count])
        for k, value in enumerate(table.values):
            is_it = (classes[drawn] == value).astype(float)
            estimates[value, ""].append(stratified_mean(is_it, marks, weights))
            assisted = regression_mean(is_it, chances_NK[drawn, k], marks, weights, mean=float(means_K[k]))
            estimates[value, "assisted"].append(assisted)
    print(f"{'class':20} {'true':>7} {'counted':>8} {'mean':>7} {'covered':>8} {'half-width':>11} {'of simple':>10}")
    for (value, way), found_all in estimates.items():
        name = f"{table.names[table.values.index(value)]} {way}"
        true = float((classes == value).mean())
        counted = float(sum(sizes[k] for k in range(len(sizes)) if table.values[k // 4] == value) / sizes.sum())
        values = np.array([found.value for found in found_all])
        halves = Z * np.array([found.error for found in found_all])
        simple = Z * np.sqrt(true * (1 - true) / total)
        covered = float((np.abs(values - true) <= halves).mean())
        print(
            f"{name:20} {true:7.4f} {counted:8.4f} {values.mean():7.4f} {100 * covered:7.1f}% {halves.mean():11.4f} "
            f"{halves.mean() / simple:10.2f}"
        )


if __name__ == "__main__":
    main()
