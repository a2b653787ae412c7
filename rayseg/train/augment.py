"""Augmentation of batches: images and masks alike, every image with its own luck.

Luck comes from one generator for all images, or from one for each, so that an image meets the same whatever batch it
is in.
"""

from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from rayseg.config import Config, Factors, Range
from rayseg.errors import DataError

Luck = Generator | Sequence[Generator]
Share = Annotated[float, Field(ge=0, le=1)]

# luma and the two chroma axes of NTSC (FCC 1953): hue is an angle in the plane of the last two
_YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))


class Augment(Config):
    """What may happen to a training image, and how often."""

    crop: Literal["centre", "random"] = "centre"
    """Where the window lies that is cut out."""
    covered: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of a window that its mask should cover, where the mask is not empty; only random windows are drawn anew."""
    draws: Annotated[int, Field(gt=0)] = 6
    """Windows drawn until one is covered; the last one is taken anyway."""
    scale: Factors = (1.0, 1.0)
    """Smallest and largest magnification; 0.5 shows twice the ground."""
    flip: Share = 0.5
    """Share of the images mirrored left to right, and of those mirrored top to bottom."""
    quadrants: Share = 0.5
    """Share of the images whose four quadrants are shuffled."""
    rotate: Share = 0.5
    """Share of the images turned by 90, 180 or 270 degrees."""
    jitter: Share = 0.0
    """Share of the images whose colours change by what follows."""
    brightness: Share = 0.3
    """Largest relative change of all values."""
    cast: Share = 0.0
    """Largest relative change of one band."""
    contrast: Share = 0.3
    """Largest relative change of the distance from the image's mean."""
    saturation: Range = (0.7, 1.3)
    """Smallest and largest factor on the distance from grey; three-band images only."""
    hue: Annotated[float, Field(ge=0, le=0.5)] = 0.05
    """Largest turn of the hue in full circles; three-band images only."""
    gamma: Factors = (1.0, 1.0)
    """Smallest and largest exponent on value / 255."""


def augment(
    images_NCHW: Tensor, masks_NMHW: Tensor | None, settings: Augment, luck: Luck, *, size: int
) -> tuple[Tensor, Tensor | None]:
    """Cut out windows and change them; the masks follow.

    Args:
        images_NCHW: any data type; jitter assumes values 0..255.
        masks_NMHW: class of every pixel; resampled by nearest neighbour. The last decides whether a window is covered.
        settings: what may happen.
        luck: on the CPU; decides everything.
        size: side of the result in pixels, even.

    Returns:
        images (N, C, size, size) and masks (N, M, size, size), float32.

    Raises:
        DataError: the images are smaller than `size`.
    """
    images, masks = cut(images_NCHW, masks_NMHW, settings, luck, size=size)
    channels = images.shape[1]
    both = images if masks is None else torch.cat([images, masks], dim=1)
    for turn, share in ((_mirror, settings.flip), (_shuffle, settings.quadrants), (_rotate, settings.rotate)):
        if share:
            both = turn(both, share, luck)
    images = both[:, :channels]
    if settings.jitter:
        images = _jitter(images, settings, luck)
    return images, None if masks is None else both[:, channels:]


def centre(images_NCHW: Tensor, masks_NMHW: Tensor | None, *, size: int) -> tuple[Tensor, Tensor | None]:
    """The middle of the images and masks, float32: what evaluation and relabelling see."""
    return cut(images_NCHW, masks_NMHW, Augment(), Generator(), size=size)


def cut(
    images_NCHW: Tensor, masks_NMHW: Tensor | None, settings: Augment, luck: Luck, *, size: int
) -> tuple[Tensor, Tensor | None]:
    """Windows of `size` pixels: their magnification and place as `settings` says.

    Raises:
        DataError: the images are smaller than `size`.
    """
    height, width = images_NCHW.shape[2:]
    if min(height, width) < size:
        raise DataError(
            f"chips are {height} x {width} px, training takes {size} x {size}: read larger chips or lower size"
        )
    pieces, covers = [], []
    each = zip(images_NCHW, _each(masks_NMHW, len(images_NCHW)), _generators(luck, len(images_NCHW)), strict=True)
    for image, mask, generator in each:
        window = _window(image.shape[1:], mask, settings, generator, size=size)
        pieces.append(resized(image[window].float(), size, smooth=True))
        if mask is not None:
            covers.append(resized(mask[window].float(), size, smooth=False))
    return torch.stack(pieces), torch.stack(covers) if covers else None


def _window(
    shape: tuple[int, ...], mask_MHW: Tensor | None, settings: Augment, generator: Generator, *, size: int
) -> tuple[slice, ...]:
    """A window of the magnification and at the place that `settings` says; drawn anew while its mask is too empty."""
    wanted = (
        settings.covered if settings.crop == "random" and mask_MHW is not None and (mask_MHW[-1] == 1).any() else 0.0
    )
    for _ in range(settings.draws):
        window = _draw(shape, settings, torch.rand(3, generator=generator).tolist(), size=size)
        if not wanted or mask_MHW is None or (mask_MHW[window][-1] == 1).float().mean() > wanted:
            break
    return window


def _draw(shape: tuple[int, ...], settings: Augment, luck: list[float], *, size: int) -> tuple[slice, ...]:
    low, high = settings.scale
    side = min(round(size / (low + luck[0] * (high - low))), *shape)
    spare = [whole - side for whole in shape]
    if settings.crop == "random":
        top, left = map(_within, spare, luck[1:])
    else:
        top, left = (room // 2 for room in spare)
    return slice(None), slice(top, top + side), slice(left, left + side)


def _within(room: int, share: float) -> int:
    """One of 0..room, all equally likely for a share drawn from [0, 1)."""
    return int(share * (room + 1))


def _each(masks_NMHW: Tensor | None, count: int) -> list[Tensor] | list[None]:
    return [None] * count if masks_NMHW is None else list(masks_NMHW)


def _generators(luck: Luck, count: int) -> Sequence[Generator]:
    return [luck] * count if isinstance(luck, Generator) else luck


def _drawn(luck: Luck, count: int, width: int = 1) -> Tensor:
    """(count, width) numbers in [0, 1), a row for every image."""
    if isinstance(luck, Generator):
        return torch.rand(count, width, generator=luck)
    return torch.stack([torch.rand(width, generator=generator) for generator in luck])


def resized(image_CHW: Tensor, size: int, *, smooth: bool) -> Tensor:
    """The image (or mask, not `smooth`) at (size, size), float32 as it is given."""
    if image_CHW.shape[1:] == (size, size):
        return image_CHW
    if smooth:
        return interpolate(image_CHW[None], size=(size, size), mode="bilinear", antialias=True)[0]
    return interpolate(image_CHW[None], size=(size, size), mode="nearest-exact")[0]


def _chosen(images: Tensor, share: float, luck: Luck) -> Tensor:
    """Which of the images it hits: (N, 1, 1, 1) bool on their device."""
    return (_drawn(luck, len(images)) < share).to(images.device)[..., None, None]


def _mirror(images: Tensor, share: float, luck: Luck) -> Tensor:
    for axis in (3, 2):
        images = torch.where(_chosen(images, share, luck), images.flip(axis), images)
    return images


def _shuffle(images: Tensor, share: float, luck: Luck) -> Tensor:
    """Shuffle the four quadrants of the images chosen."""
    count, channels, height, width = images.shape
    order = _drawn(luck, count, 4).argsort(dim=1).to(images.device)
    quarters = images.reshape(count, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 1, 3, 5).flatten(1, 2)
    moved = quarters[torch.arange(count, device=images.device)[:, None], order]
    mixed = moved.reshape(count, 2, 2, channels, height // 2, width // 2).permute(0, 3, 1, 4, 2, 5)
    return torch.where(_chosen(images, share, luck), mixed.reshape(images.shape), images)


def _rotate(images: Tensor, share: float, luck: Luck) -> Tensor:
    turns = _turns(luck, len(images))
    turns = torch.where(_drawn(luck, len(images))[:, 0] < share, turns, 0)
    return torch.stack([torch.rot90(image, int(k), (1, 2)) for image, k in zip(images, turns, strict=True)])


def _turns(luck: Luck, count: int) -> Tensor:
    """(count,) of 1, 2 and 3."""
    if isinstance(luck, Generator):
        return torch.randint(1, 4, (count,), generator=luck)
    return torch.cat([torch.randint(1, 4, (1,), generator=generator) for generator in luck])


def _jitter(images: Tensor, settings: Augment, luck: Luck) -> Tensor:
    """Brightness, cast, contrast, saturation, hue and gamma, in this order, of the images chosen; within 0..255."""
    count, bands = images.shape[:2]

    def between(low: float, high: float, width: int = 1) -> Tensor:
        return low + _drawn(luck, count, width)[..., None, None].to(images.device) * (high - low)

    def around_one(reach: float, width: int = 1) -> Tensor:
        return between(1 - reach, 1 + reach, width)

    changed = images * around_one(settings.brightness) * around_one(settings.cast, bands)
    mean = changed.mean(dim=(1, 2, 3), keepdim=True)
    changed = (changed - mean) * around_one(settings.contrast) + mean
    if bands == 3:
        turn = settings.hue * 2 * torch.pi
        changed = _recolour(changed, between(*settings.saturation), between(-turn, turn))
    changed = changed.clamp(0, 255)
    if settings.gamma != (1.0, 1.0):
        changed = 255 * (changed / 255) ** between(*settings.gamma)
    return torch.where(_chosen(images, settings.jitter, luck), changed, images)


def _recolour(images: Tensor, saturation_N111: Tensor, angle_N111: Tensor) -> Tensor:
    """Stretch and turn the chroma plane of RGB images."""
    to_yiq = torch.tensor(_YIQ, device=images.device)
    luma, chroma_i, chroma_q = torch.einsum("kc,nchw->knhw", to_yiq, images)[:, :, None]
    cos, sin = angle_N111.cos() * saturation_N111, angle_N111.sin() * saturation_N111
    turned = torch.cat([luma, cos * chroma_i - sin * chroma_q, sin * chroma_i + cos * chroma_q], dim=1)
    return torch.einsum("ck,nkhw->nchw", torch.linalg.inv(to_yiq), turned)
