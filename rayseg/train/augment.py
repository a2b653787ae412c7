"""Augmentation of batches: images and masks alike, each image with its own random numbers.

They come from one generator for all images, or from one for each; the latter makes an image's augmentation independent
of its batch. The order of draws is fixed: it decides what a seed gives.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from rayseg.config import Config, Factors, Range, added
from rayseg.errors import DataError
from rayseg.models.bundle import Scaling
from rayseg.train.labels import UNKNOWN

Rng = Generator | Sequence[Generator]
Fill = Sequence[float] | None
Share = Annotated[float, Field(ge=0, le=1)]

# Luma and the two chroma axes of NTSC (FCC 1953): hue is an angle in the plane of the last two.
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))

_CUT_AREA = (0.02, 0.4)  # of a rectangle of CutMix, relative to the image; as in UniMatch (Yang et al. 2023)
_CUT_RATIO = 0.3  # its least height relative to its width; the inverse is the largest


class Augment(Config):
    """Which augmentations a training image gets, and how often."""

    crop: Literal["centre", "random"] = "centre"
    """Place of the window that is cut out."""
    covered: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a random window that its mask should cover, if the mask is not empty; else the window is drawn again."""
    draws: Annotated[int, Field(gt=0)] = 6
    """Most windows drawn until one is covered; the last one is used anyway."""
    scale: Factors = (1.0, 1.0)
    """Smallest and largest magnification; at 0.5 a window shows twice the width and height."""
    pad: bool = added(default=False)
    """Extend images that are smaller than the window, or become so by a magnification below 1, to the right and below:
    by values that the network sees as 0, in masks by "not labelled". By default a window ends at the image's edge."""
    flip: Share = 0.5
    """Share of the images mirrored left to right, and of those mirrored top to bottom."""
    mirror: Literal["both", "horizontal"] = added(default="both")
    """Whether flips mirror top to bottom, too."""
    quadrants: Share = 0.5
    """Share of the images whose four quadrants are shuffled."""
    rotate: Share = 0.5
    """Share of the images turned by 90, 180 or 270 degrees."""
    jitter: Share = 0.0
    """Share of the images whose colours change as set below."""
    brightness: Share = 0.3
    """Largest relative change of all values."""
    cast: Share = 0.0
    """Largest relative change of one band."""
    contrast: Share = 0.3
    """Largest relative change of the distance from the image's mean."""
    saturation: Range = (0.7, 1.3)
    """Smallest and largest factor on the distance from grey; three-band images only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Largest hue shift in full circles; three-band images only."""
    gamma: Factors = (1.0, 1.0)
    """Smallest and largest exponent on value / 255."""

    def fill(self, scaling: Scaling) -> Fill:
        """The value of each band that extends images, None if they are not extended."""
        if not self.pad:
            return None
        return tuple((mean - scaling.offset) / scaling.scale for mean in scaling.mean)


def augment(
    images_NCHW: Tensor, masks_NMHW: Tensor | None, settings: Augment, rng: Rng, *, size: int, fill: Fill = None
) -> tuple[Tensor, Tensor | None]:
    """Cut out windows and augment them; the masks follow.

    Args:
        images_NCHW: any data type; jitter assumes values 0..255.
        masks_NMHW: class of every pixel; resampled by nearest neighbour. The last decides whether a window is covered.
        settings: which augmentations, and how often.
        rng: one generator on the CPU, or one per image.
        size: side of the result in pixels, even.
        fill: value of each band that extends images; None refuses images smaller than `size`.

    Returns:
        images (N, C, size, size) and masks (N, M, size, size), float32.

    Raises:
        DataError: the images are smaller than `size`.
    """
    images, masks = cut(images_NCHW, masks_NMHW, settings, rng, size=size, fill=fill)
    channels = images.shape[1]
    # Images and masks as one tensor, so both get the same geometry.
    both = images if masks is None else torch.cat([images, masks], dim=1)
    if settings.flip:
        for axis in (3, 2) if settings.mirror == "both" else (3,):
            both = torch.where(_chosen(both, settings.flip, rng), both.flip(axis), both)
    if settings.quadrants:
        both = _shuffle_quadrants(both, settings.quadrants, rng)
    if settings.rotate:
        both = _rotate(both, settings.rotate, rng)
    images = both[:, :channels]
    if settings.jitter:
        images = _jitter(images, settings, rng)
    return images, None if masks is None else both[:, channels:]


def centre(images_NCHW: Tensor, settings: Augment, scaling: Scaling, *, size: int) -> Tensor:
    """The network's input without augmentation: the middle of the images, extended by `settings`, normalised."""
    middle, _ = cut(images_NCHW, None, Augment(), Generator(), size=size, fill=settings.fill(scaling))
    return scaling.normalize(middle)


def cut(
    images_NCHW: Tensor, masks_NMHW: Tensor | None, settings: Augment, rng: Rng, *, size: int, fill: Fill = None
) -> tuple[Tensor, Tensor | None]:
    """Windows of `size` px, with magnification and place from `settings`; `fill` as in `augment`.

    Raises:
        DataError: the images are smaller than `size`, and `fill` is None.
    """
    height, width = images_NCHW.shape[2:]
    if min(height, width) < size and fill is None:
        raise DataError(
            f"chips are {height} x {width} px, training needs {size} x {size}; read larger chips, lower size, or set "
            "augment.pad=true"
        )
    images, masks = [], []
    for number, image in enumerate(images_NCHW):
        mask = None if masks_NMHW is None else masks_NMHW[number]
        # An image at a time: windows differ in side, so they are resized before they are stacked.
        generator = rng if isinstance(rng, Generator) else rng[number]
        window = _window(image.shape[1:], mask, settings, generator, size=size, beyond=fill is not None)
        images.append(_filled(image[window].float(), window, size, fill, smooth=True))
        if mask is not None:
            unknown = None if fill is None else [float(UNKNOWN)] * len(mask)
            masks.append(_filled(mask[window].float(), window, size, unknown, smooth=False))
    return torch.stack(images), torch.stack(masks) if masks else None


def _filled(part_CHW: Tensor, window: tuple[slice, ...], size: int, fill: Fill, *, smooth: bool) -> Tensor:
    """The part of a window that lies in the image at its place in (C, size, size), the rest is `fill`."""
    sides = [part.stop - part.start for part in window[1:]]
    inside = part_CHW.shape[1:]
    if fill is None or list(inside) == sides:
        return resized(part_CHW, (size, size), smooth=smooth)
    height, width = (max(1, round(size * seen / side)) for seen, side in zip(inside, sides, strict=True))
    whole = torch.tensor(fill, device=part_CHW.device)[:, None, None].repeat(1, size, size)
    whole[:, :height, :width] = resized(part_CHW, (height, width), smooth=smooth)
    return whole


def _window(
    shape: tuple[int, ...], mask_MHW: Tensor | None, settings: Augment, generator: Generator, *, size: int, beyond: bool
) -> tuple[slice, ...]:
    """A window with magnification and place from `settings`; drawn again while its mask covers too little of it.

    It lies in the image, or reaches `beyond` its right and lower edge where the image is smaller.
    """
    random = settings.crop == "random"
    # An object can be covered only where the mask has one.
    wanted = settings.covered if random and mask_MHW is not None and (mask_MHW[-1] == 1).any() else 0.0
    low, high = settings.scale
    for _ in range(settings.draws):
        # Three numbers are drawn in any case, so that settings do not change the random numbers that follow.
        magnification, *place = torch.rand(3, generator=generator).tolist()
        side = round(size / (low + magnification * (high - low)))
        side = side if beyond else min(side, *shape)
        spare = [max(whole - side, 0) for whole in shape]
        if random:  # one of 0..most, all equally likely
            top, left = (int(share * (most + 1)) for share, most in zip(place, spare, strict=True))
        else:
            top, left = (most // 2 for most in spare)
        window = slice(None), slice(top, top + side), slice(left, left + side)
        if not wanted or mask_MHW is None or (mask_MHW[window][-1] == 1).float().mean() > wanted:
            break
    return window


def _drawn(rng: Rng, count: int, width: int = 1) -> Tensor:
    """(count, width) numbers in [0, 1), a row for every image."""
    if isinstance(rng, Generator):
        return torch.rand(count, width, generator=rng)
    return torch.stack([torch.rand(width, generator=generator) for generator in rng])


def resized(image_CHW: Tensor, size: tuple[int, int], *, smooth: bool) -> Tensor:
    """The image (`smooth`: bilinear) or mask (nearest neighbour) of shape (C, *size), float32."""
    if image_CHW.shape[1:] == size:
        return image_CHW
    if smooth:
        return interpolate(image_CHW[None], size=size, mode="bilinear", antialias=True)[0]
    return interpolate(image_CHW[None], size=size, mode="nearest-exact")[0]


def _chosen(images: Tensor, share: float, rng: Rng) -> Tensor:
    """Which images are changed: (N, 1, 1, 1) bool on their device."""
    return (_drawn(rng, len(images)) < share).to(images.device)[..., None, None]


def _shuffle_quadrants(images: Tensor, share: float, rng: Rng) -> Tensor:
    count, channels, height, width = images.shape
    # Sorting random numbers gives a random permutation of the quadrants for each image.
    order = _drawn(rng, count, 4).argsort(dim=1).to(images.device)
    quarters = images.reshape(count, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = quarters[torch.arange(count, device=images.device)[:, None], order]
    mixed = moved.reshape(count, 2, 2, channels, height // 2, width // 2).permute(0, 3, 1, 4, 2, 5)
    return torch.where(_chosen(images, share, rng), mixed.reshape(images.shape), images)


def _rotate(images: Tensor, share: float, rng: Rng) -> Tensor:
    # Quarter turns 1, 2 and 3 are drawn for all images, then which images turn at all.
    if isinstance(rng, Generator):
        turns = torch.randint(1, 4, (len(images),), generator=rng)
    else:
        turns = torch.cat([torch.randint(1, 4, (1,), generator=generator) for generator in rng])
    turns = torch.where(_drawn(rng, len(images))[:, 0] < share, turns, 0)
    return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])


def _jitter(images: Tensor, settings: Augment, rng: Rng) -> Tensor:
    """Brightness, cast, contrast, saturation, hue and gamma, in this order, of the images chosen; within 0..255."""
    count, bands = images.shape[:2]

    def between(low: float, high: float, width: int = 1) -> Tensor:
        return low + _drawn(rng, count, width)[..., None, None].to(images.device) * (high - low)

    level, cast, contrast = settings.brightness, settings.cast, settings.contrast
    changed = images * between(1 - level, 1 + level) * between(1 - cast, 1 + cast, bands)
    # Draws are made for all images, whether they are changed or not: the sequence stays the same.
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = (changed - mean) * between(1 - contrast, 1 + contrast) + mean
    if bands == 3:
        turn = settings.hue * 2 * torch.pi
        stretch, angle = between(*settings.saturation), between(-turn, turn)
        # Stretch and rotate the chroma plane.
        to_yiq = torch.tensor(_YIQ, device=images.device)
        luma, chroma_i, chroma_q = torch.einsum("kc,nchw->knhw", to_yiq, changed)[:, :, None]
        cos, sin = angle.cos() * stretch, angle.sin() * stretch
        turned = torch.cat([luma, cos * chroma_i - sin * chroma_q, sin * chroma_i + cos * chroma_q], dim=1)
        changed = torch.einsum("ck,nkhw->nchw", torch.linalg.inv(to_yiq), turned)
    changed = changed.clamp(0, 255)
    if settings.gamma != (1.0, 1.0):
        changed = 255 * (changed / 255) ** between(*settings.gamma)
    return torch.where(_chosen(images, settings.jitter, rng), changed, images)


def cut_mix(images_NCHW: Tensor, classes_NHW: Tensor, rng: Generator, *, share: float) -> tuple[Tensor, Tensor]:
    """CutMix (Yun et al. 2019): a share of the images gets a rectangle, with its classes, of another one.

    Args:
        images_NCHW: square.
        classes_NHW: of their pixels.
        rng: on the CPU.
        share: of the images.
    """
    size = images_NCHW.shape[-1]
    chosen, area, ratio, top, left = torch.rand(5, len(images_NCHW), 1, generator=rng)
    # The ratio of the sides is drawn evenly on a logarithmic scale: 2 : 1 is as likely as 1 : 2.
    area, ratio = _CUT_AREA[0] + area * (_CUT_AREA[1] - _CUT_AREA[0]), _CUT_RATIO ** (2 * ratio - 1)

    def span(place: Tensor, length: Tensor) -> Tensor:
        side = (size * length.sqrt()).round().clamp(max=size)
        at = torch.arange(size) - (place * (size - side)).round()
        return (at >= 0) & (at < side)

    rows, columns = span(top, area * ratio), span(left, area / ratio)
    inside_NHW = ((chosen < share)[..., None] & rows[:, :, None] & columns[:, None]).to(classes_NHW.device)
    # The other image is that at the mirrored position of the batch.
    images = torch.where(inside_NHW[:, None], images_NCHW.flip(0), images_NCHW)
    return images, torch.where(inside_NHW, classes_NHW.flip(0), classes_NHW)
