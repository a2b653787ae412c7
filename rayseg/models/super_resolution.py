"""Enlarging images by a super-resolution network, or by bicubic interpolation."""

from collections.abc import Callable
from typing import Annotated

import cv2
import numpy as np
import torch
from pydantic import Field
from torch import nn

from rayseg.config import Config
from rayseg.errors import ModelError
from rayseg.models.encoders import read_state
from rayseg.store import Location
from rayseg.vision.proposals import Image

Enlarge = Callable[[Image], Image]
_WRAPPERS = {"module", "_orig_mod", "model", "net", "network", "net_g", "generator", "params", "params_ema"}


class EnlargeConfig(Config):
    """How imagery is enlarged."""

    weights: Location | None = None
    """File of a super-resolution network that spandrel supports, such as Real-ESRGAN; by default bicubic."""
    factor: Annotated[int, Field(ge=2, le=8)] = 4
    """Factor of width and height; must equal the network's factor."""
    stride: Annotated[int, Field(gt=0)] = 192
    """Side in px of the windows that are enlarged at once."""
    margin: Annotated[int, Field(ge=2)] = 40
    """Pixels around each window as context; Real-ESRGAN's general x4v3 uses 34."""


def load_enlarger(config: EnlargeConfig, *, device: str | None = None) -> Enlarge:
    """A callable that enlarges an RGB uint8 image (H, W, 3) by `config.factor`.

    Args:
        config: network and factor.
        device: torch device; by default the GPU if there is one.

    Raises:
        ModelError: the file is missing or damaged, or is not a network for RGB images with this factor.
    """
    if config.weights is None:
        factor = config.factor

        def interpolated(image_HWC: Image) -> Image:
            size = (image_HWC.shape[1] * factor, image_HWC.shape[0] * factor)
            return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_CUBIC), np.uint8)

        return interpolated
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    network = load_network(config.weights, config.factor).to(chosen)

    @torch.inference_mode()
    def enlarged(image_HWC: Image) -> Image:
        # uint8 travels to the device: a quarter of the bytes of float32.
        pixels = torch.from_numpy(image_HWC).to(chosen).permute(2, 0, 1)[None].float() / 255
        larger_CHW = network(pixels)[0].clamp(0, 1).mul(255).round().byte()
        return np.ascontiguousarray(larger_CHW.permute(1, 2, 0).cpu().numpy())

    return enlarged


def load_network(path: str, factor: int) -> nn.Module:
    """The network in a file, in evaluation mode.

    Raises:
        ModelError: the file is missing or damaged, or is not a network for RGB images with this factor.
    """
    from spandrel import (  # imports dozens of networks, rarely needed
        ImageModelDescriptor,
        ModelLoader,
        UnsupportedModelError,
    )

    state = read_state(path)
    # The network may be one part of what was trained: `generator.*`, `module.net_g.*`.
    inner = state
    while part := {key.partition(".")[2]: t for key, t in inner.items() if key.partition(".")[0] in _WRAPPERS}:
        inner = part
    loader = ModelLoader(device="cpu")
    try:
        try:
            loaded = loader.load_from_state_dict(state)
        except UnsupportedModelError:
            loaded = loader.load_from_state_dict(inner)
    except (UnsupportedModelError, RuntimeError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(
            f"{path} contains no network that spandrel supports ({reason}); give one such as realesr-general-x4v3.pth, "
            "or leave enlarge.weights out to interpolate"
        ) from None
    # A file of another factor would load, and every tile would have the wrong size.
    channels = (loaded.input_channels, loaded.output_channels)
    if not isinstance(loaded, ImageModelDescriptor) or channels != (3, 3) or loaded.scale != factor:
        raise ModelError(
            f"{path} is a {loaded.architecture.name} from {channels[0]} to {channels[1]} channels with factor "
            f"{loaded.scale}, expected from 3 to 3 with factor {factor}; give another file or set enlarge.factor"
        )
    network: nn.Module = loaded.model.eval().float()
    return network
