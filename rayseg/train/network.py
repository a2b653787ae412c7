"""The network of a segmenter's training: what its configuration says, and how it is built."""

from typing import Annotated

from pydantic import Field
from torch import nn

from rayseg.config import Config
from rayseg.models.segmenter import build_segmenter
from rayseg.train import session


class NetworkConfig(Config):
    """A segmenter, before it has learnt anything."""

    architecture: str
    """A name of segmentation_models_pytorch; or deeplab, our own DeepLabv3+."""
    encoder: str
    """A name of segmentation_models_pytorch or of timm."""
    weights: session.Weights = "imagenet"
    """Of the encoder: "imagenet", "none", or a file."""
    reduce: Annotated[int, Field(gt=0)] = 1
    """Side in pixels of the squares whose mean the network sees as one pixel."""

    def options(self, *, classes: int = 1, channels: int) -> dict[str, str | int | float]:
        """Arguments of `build_segmenter`, as a bundle keeps them."""
        return {
            "architecture": self.architecture,
            "encoder": self.encoder,
            "classes": classes,
            "channels": channels,
            "reduce": self.reduce,
        }

    def build(self, *, classes: int = 1, channels: int, weights: str | None = None) -> nn.Module:
        """The network, in training mode; `weights` take the place of its own.

        Raises:
            ConfigError: the architecture or the encoder is unknown, or they do not go together.
            ModelError: the weights are not to be had or do not fit.
        """
        return build_segmenter(
            self.architecture,
            self.encoder,
            classes=classes,
            channels=channels,
            weights=weights or self.weights,
            reduce=self.reduce,
        )
