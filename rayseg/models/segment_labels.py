"""The clusters of a scene's superpixels as a model of images: a bundle of the pipeline `superpixel`."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rayseg.errors import ConfigError
from rayseg.vision.region_merging import borders, merged_regions
from rayseg.vision.segment_clusters import distances, pixel_features, segment_sums
from rayseg.vision.superpixels import METHODS


class SegmentLabels(nn.Module):
    """Superpixels of each image, merged into regions -> logits of the clusters, the same within a region.

    Their softmax is the posterior of equally likely spherical Gaussians of one variance around the centres.

    Args:
        centres_KF: of the clusters.
        variance: mean squared distance of regions to their centre, per feature.
        bands: names of the images' bands.
        method: of the superpixels, a name in `METHODS`.
        contrast: see `merged_regions`.
        options: arguments of the method.
    """

    def __init__(
        self,
        centres_KF: NDArray[np.floating],
        variance: float,
        bands: Sequence[str],
        *,
        method: str,
        contrast: float,
        options: Mapping[str, float],
    ) -> None:
        super().__init__()
        self.bands, self.method, self.contrast, self.options = tuple(bands), method, contrast, dict(options)
        self.register_buffer("centres", torch.from_numpy(np.asarray(centres_KF, np.float32)))
        self.register_buffer("variance", torch.tensor(variance, dtype=torch.float32))

    def forward(self, images_NCHW: Tensor) -> Tensor:
        """Logits_NKHW of images scaled to 0..1."""
        return torch.stack([self._logits(image.float().cpu().numpy()) for image in images_NCHW]).to(images_NCHW.device)

    def _logits(self, image_CHW: NDArray[np.float32]) -> Tensor:
        # The steps of the pipeline, on one patch: superpixels, regions, labels.
        image_HWC = np.clip(image_CHW.transpose(1, 2, 0), 0, 1)
        segments_HW = METHODS[self.method](image_HWC, **self.options)
        features_HWF = pixel_features(image_HWC, self.bands)
        sums_N = segment_sums(features_HWF, segments_HW)
        # `borders` takes 0 for no segment.
        borders_M3 = borders(segments_HW + 1) - (1, 1, 0)
        regions_N = merged_regions(sums_N[:, 1:] / sums_N[:, :1], sums_N[:, 0], borders_M3, contrast=self.contrast)
        regions_HW = regions_N[segments_HW]
        sums_R = segment_sums(features_HWF, regions_HW)
        logits_RK = self.logits(sums_R[:, 1:] / sums_R[:, :1]).astype(np.float32)
        return torch.from_numpy(logits_RK)[torch.from_numpy(regions_HW)].permute(2, 0, 1)

    def logits(self, means_NF: NDArray[np.floating]) -> NDArray[np.float64]:
        """Logits (N, K) of regions with these mean features."""
        return -distances(means_NF, self.get_buffer("centres").cpu().numpy()) / (2 * float(self.get_buffer("variance")))


def build_segments(
    method: str,
    *,
    bands: str,
    features: int,
    classes: int,
    contrast: float,
    weights: str = "none",
    **options: float,
) -> SegmentLabels:
    """Build the module for a bundle, with centres of zeros.

    Args:
        method: of the superpixels.
        bands: names of the bands, with commas between them.
        features: number of features of a superpixel.
        classes: number of clusters.
        contrast: see `merged_regions`.
        weights: "none"; the centres come from the bundle.
        options: arguments of the method.

    Raises:
        ConfigError: the method is unknown.
    """
    if method not in METHODS:
        raise ConfigError(f"superpixels.method is {method!r}, expected one of {sorted(METHODS)}; choose one of them")
    if weights != "none":
        raise ConfigError(
            f"weights are {weights!r}, expected 'none': the clusters of superpixels have no pretrained ones"
        )
    return SegmentLabels(
        np.zeros((classes, features)), 1.0, bands.split(","), method=method, contrast=contrast, options=options
    )
