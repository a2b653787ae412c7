"""Superpixels of a scene in, clusters of regions out: the labels of a scene without a network.

superpixels of all tiles --> merge over weak borders --> k-means of the regions' colour and texture --> label of each
"""

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from rayseg.engine.ledger import Settled
from rayseg.geo.grid import NODATA, Window
from rayseg.io import segments
from rayseg.io.segments import without_specks
from rayseg.io.tables import concurrently, read_array, write_array
from rayseg.models import bundle
from rayseg.models.bundle import Architecture, Bundle, Provenance, Scaling
from rayseg.models.segment_labels import SegmentLabels
from rayseg.stages.oversegment import borders_path, features_path, grown, segments_path
from rayseg.stages.rows import SceneRow, TileRow
from rayseg.store import upath
from rayseg.vision.color import label_table
from rayseg.vision.region_merging import merged_regions
from rayseg.vision.segment_clusters import cluster_centres, distances

PATCH, STRIDE = 1024, 896
"""Patches of the bundle, in px: regions end at their borders."""

LEAST_CONTRAST = 0.1
"""Contrast below which no smaller one is tried: superpixels that differ by less look alike."""


@dataclass(frozen=True)
class Described:
    """What the bundle of a scene records besides its clusters.

    Attributes:
        models: prefix of bundles.
        method: of the superpixels.
        options: its arguments.
        bands: names, in order.
        dtype: of the imagery.
    """

    models: str
    method: str
    options: Mapping[str, float]
    bands: Sequence[str]
    dtype: str


@dataclass
class ClusterScene:
    """`tiles, scaling -> facts`: regions of a scene's superpixels and their clusters, `<labels>/<scene>.npy`.

    The file has a row (superpixel, label, score) uint32 for each of the scene's superpixels, in ascending order.

    Args:
        clusters: most labels.
        contrast: see `merged_regions`.
        seed: of the first centres.
        labels: prefix of the files.
        superpixels: prefix of the files of `unite`.
        described: what the bundles record.
    """

    _: KW_ONLY
    clusters: int
    contrast: float
    seed: int
    labels: str
    superpixels: str
    described: Described

    def __call__(self, rows: list[SceneRow]) -> list[Settled]:
        """Cluster each scene."""
        return [self._cluster(row) for row in rows]

    def _cluster(self, scene: SceneRow) -> Settled:
        # 1. the superpixels of all tiles and their borders; a superpixel of several tiles is one
        paths = [segments_path(self.superpixels, row.tile.id) for row in scene.tiles]
        rows = np.concatenate(list(concurrently(read_array, map(features_path, paths))))
        borders_M3 = np.concatenate(list(concurrently(read_array, map(borders_path, paths))))
        numbers_N, inverse = np.unique(rows[:, 0].astype(np.int64), return_inverse=True)
        areas_N, means_NF = _means(inverse, rows[:, 1], rows[:, 2:])
        # Borders of superpixels that no tile of the scene shows belong to tiles that could not be read.
        borders_M3 = borders_M3[np.isin(borders_M3[:, :2], numbers_N).all(axis=1)]
        borders_M3[:, :2] = np.searchsorted(numbers_N, borders_M3[:, :2])
        # 2. regions, their centres, and the probability of the nearest one
        regions_N, contrast = self._regions(means_NF, areas_N, borders_M3)
        areas_R, means_RF = _means(regions_N, areas_N, means_NF * areas_N[:, None])
        centres_KF = cluster_centres(means_RF, areas_R, clusters=self.clusters, seed=self.seed)
        effort = {"effort": len(paths)}
        if (count := len(centres_KF)) < 2:
            reason = "all of it is one region, expected at least two that differ: lower superpixels.scale and min_size"
            return Settled("failed", reason, effort)
        variance = float(np.average(distances(means_RF, centres_KF).min(axis=1), weights=areas_R)) / means_RF.shape[1]
        known = self.described
        model = SegmentLabels(
            centres_KF,
            max(variance, 1e-6),
            known.bands,
            method=known.method,
            contrast=contrast,
            options=known.options,
        )
        logits_RK = model.logits(means_RF)
        top_R = 1 / np.exp(logits_RK - logits_RK.max(axis=1, keepdims=True)).sum(axis=1)
        labels_R2 = np.stack([logits_RK.argmax(axis=1), np.rint(top_R * (NODATA - 1))], axis=1)
        # 3. the label of every superpixel
        rows_N3 = np.column_stack([numbers_N, labels_R2[regions_N]]).astype(np.uint32)
        write_array(labels_path(self.labels, scene.id), rows_N3)
        prefix = self._keep(scene.id, model, Scaling.model_validate_json(scene.scaling))
        facts = {"labels": count, "regions": len(areas_R), "contrast": contrast, "bundle": prefix}
        return Settled(facts=effort | facts)

    def _regions(
        self, means_NF: NDArray[np.floating], areas_N: NDArray[np.floating], borders_M3: NDArray[np.integer]
    ) -> tuple[NDArray[np.int64], float]:
        """(region of every superpixel, contrast): with less contrast in a scene that would have too few regions."""
        contrast = self.contrast
        while True:
            regions_N = merged_regions(means_NF, areas_N, borders_M3, contrast=contrast)
            if regions_N.max() + 1 >= min(len(areas_N), max(2, self.clusters // 2)) or contrast < LEAST_CONTRAST:
                return regions_N, contrast
            contrast /= 2

    def _keep(self, scene: str, model: SegmentLabels, scaling: Scaling) -> str:
        (count, features), known = model.get_buffer("centres").shape, self.described
        # The superpixels are part of the model: serving divides its image by the same method.
        options: dict[str, str | int | float] = {"method": known.method, "bands": ",".join(known.bands)}
        options |= {"features": features, "classes": count, "contrast": model.contrast, **known.options}
        bundled = Bundle(
            name=f"labels-{scene}",
            task="segmentation",
            architecture=Architecture(factory="segments", options=options),
            classes=label_table(count).classes[:count],
            bands=tuple(known.bands),
            dtype=known.dtype,
            scaling=scaling,
            patch=PATCH,
            stride=STRIDE,
            provenance=Provenance(config={"clusters": self.clusters, "seed": self.seed}),
        )
        bundle.save(prefix := str(upath(known.models) / scene), bundled, model)
        return prefix


def _means(
    groups_N: NDArray[np.integer], areas_N: NDArray[np.floating], sums_NF: NDArray[np.floating]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(pixels, mean features) of groups of segments."""
    areas = np.bincount(groups_N, areas_N).astype(np.float64)
    sums = np.stack([np.bincount(groups_N, column) for column in sums_NF.T], axis=1)
    return areas, sums / areas[:, None]


@dataclass
class LabelSegments:
    """`tile, labels, near -> classes, scores`: the label of every superpixel, painted.

    classes: (height, width) uint8, 255 where there is no imagery.
    scores: (1, height, width) uint8, the label's probability x 254 rounded, 255 where there is no imagery.

    Args:
        superpixels: prefix of the files of `unite`.
        margin: px around the tile that are labelled too, so that specks at its border are complete.
        sieve: patches of fewer px become part of their largest neighbour.
    """

    superpixels: str
    _: KW_ONLY
    margin: int
    sieve: int
    _last: tuple[str, int, NDArray[np.uint8]] = field(default=("", 0, np.empty((0, 2), np.uint8)), init=False)

    def __call__(self, rows: list[TileRow]) -> list[TileRow]:
        """Label each tile."""
        labelled = []
        for row in rows:
            window = row.tile.window
            around = grown(window, self.margin)
            files = [(Window(*place), segments_path(self.superpixels, name)) for name, *place in row.near]
            numbers_HW = segments.read_segments(files, around)
            seen_HW = numbers_HW > 0
            first, table_N2 = self._table(row.labels)
            # Numbers of a scene's superpixels follow each other, so a table by position finds the labels.
            at_HW = np.where(seen_HW, numbers_HW, first) - np.uint32(first)
            columns = (np.where(seen_HW, column_N[at_HW], NODATA).astype(np.uint8) for column_N in table_N2.T)
            classes_HW, scores_HW = columns
            classes_HW = without_specks(classes_HW, seen_HW, size=self.sieve)
            inner = window.slices(around)
            labelled.append(replace(row, classes=classes_HW[inner], scores=scores_HW[inner][None]))
        return labelled

    def _table(self, labels: str) -> tuple[int, NDArray[np.uint8]]:
        """(first superpixel of a scene, label and score of every superpixel from there)."""
        if self._last[0] != labels:  # tiles of one scene follow each other
            rows_N3 = read_array(labels)
            first = int(rows_N3[0, 0])
            table_N2 = np.full((int(rows_N3[-1, 0]) - first + 1, 2), NODATA, np.uint8)
            table_N2[rows_N3[:, 0] - first] = rows_N3[:, 1:]
            self._last = (labels, first, table_N2)
        return self._last[1:]


def labels_path(prefix: str, scene: str) -> str:
    """The file of the labels of a scene's superpixels."""
    return str(upath(prefix) / f"{scene}.npy")
