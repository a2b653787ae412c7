"""A landscape seen from above, drawn from a seed: two scenes side by side with all that the pipelines look for.

The world is `size` rows by 2 x `size` columns of 1 m pixels. Roads cut it into blocks, every block gets a kind (town,
fields, construction site ...), and each half is drawn as a scene of its own, with its own sun, haze, colours, blur and
noise. The same seed gives the same pixels.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from rayseg.demo import blocks
from rayseg.demo.scenery import BARREN, CROPS, RANGELAND, UNKNOWN, WATER, roads, tone
from rayseg.demo.shapes import (
    MARGIN,
    Bend,
    Canvas,
    Color,
    Convex,
    Floats,
    View,
    area,
    convex,
    cover_share,
    fractal,
    shrink,
    split,
)

# kind: share of a scene's blocks, and where it likes to lie (0 countryside .. 1 town centre, None anywhere)
KINDS: dict[str, tuple[float, float | None]] = {
    "nets": (0.16, None),
    "sport": (0.05, None),
    "site": (0.03, None),
    "park": (0.06, None),
    "city": (0.10, 1.0),
    "industry": (0.08, 0.8),
    "houses": (0.12, 0.6),
    "fields": (0.27, 0.3),
    "range": (0.05, 0.2),
    "forest": (0.08, 0.0),
}


class Light(NamedTuple):
    """How one scene was taken: shadow per metre of height (rows, cols), gains, haze colour and share, blur, noise."""

    shadow: tuple[float, float]
    gains: Color
    haze: Color
    haze_share: float
    blur: float
    noise: float


LIGHTS = (
    Light((-0.75, -0.45), (0.98, 0.97, 0.95), (128, 138, 150), 0.06, 0.55, 2.2),
    Light((-0.50, 0.85), (0.90, 0.85, 0.77), (166, 160, 148), 0.15, 0.75, 3.2),
)


class Block(NamedTuple):
    """One block between roads; `parcels` are its farm plots with their crops (fields only), margins taken off."""

    shape: Convex
    kind: str
    parcels: tuple[tuple[Convex, str], ...]


@dataclass(frozen=True)
class World:
    """The plan of a landscape, before any pixel is drawn; `river_W` is the river's middle row at every column."""

    size: int
    seed: int
    bend: Bend
    blocks: tuple[Block, ...]
    river_W: Floats
    noise: dict[str, Floats]

    def rng(self, *key: int) -> np.random.Generator:
        """Return the generator that belongs to `key` alone, whatever was drawn before."""
        return _rng(self.seed, *key)


class Scene(NamedTuple):
    """One drawn half: image_HWC uint8 (never 0 in all bands), cover_HW uint8 (0..6), netting_HW uint8 0/1."""

    image_HWC: NDArray[np.uint8]
    cover_HW: NDArray[np.uint8]
    netting_HW: NDArray[np.uint8]


def _rng(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(key)))


def plan(*, size: int, seed: int) -> World:
    """Lay out a world of `size` x 2 `size` pixels: bend, roads, blocks and what fills them, river, textures."""
    rng = _rng(seed, 0)
    bend = Bend(_waves(rng, 2 * size + 2 * MARGIN, 13.0), _waves(rng, size + 2 * MARGIN, 13.0))
    columns_W = np.arange(2 * size)
    swing_W = _waves(rng, 2 * size, size * 0.12, longest=size * 1.6)
    river_W = (size * rng.uniform(0.4, 0.6) + swing_W + 0 * columns_W).astype(np.float32)
    side = min(185.0, max(110.0, size / 4.5))
    outline = convex([(-40, -40), (-40, 2 * size + 40), (size + 40, 2 * size + 40), (size + 40, -40)])
    shapes = split(outline, rng, side**2 * 1.4, (10.0, 10.0, 8.0, 7.0, 6.0, 4.0, 4.0, 3.0))
    kinds = _kinds(shapes, river_W, size, rng)
    parcels = [
        _parcels(s, _rng(seed, 1, i)) if k == "fields" else ()
        for i, (s, k) in enumerate(zip(shapes, kinds, strict=True))
    ]
    filled = tuple(Block(*fields) for fields in zip(shapes, kinds, parcels, strict=True))
    textures = {
        "fine": (1.0, 0.5),
        "cells": (0.0, 0.3, 1.0, 0.6),
        "lumps": (0.0, 0.0, 0.3, 1.0, 0.8),
        "soft": (0.0, 0.0, 0.0, 0.3, 0.6, 1.0, 1.2),
    }
    noise = {name: fractal(rng, size, 2 * size, weights) for name, weights in textures.items()}
    return World(size, seed, bend, filled, river_W, noise)


def _waves(rng: np.random.Generator, length: int, height: float, longest: float = 1400.0) -> NDArray[np.float64]:
    at = np.arange(length)
    waves = [
        np.sin(at * 2 * np.pi / (longest * share) + rng.uniform(0, 6.28)) * share**1.3 for share in (1.0, 0.62, 0.37)
    ]
    return np.asarray(sum(waves) * height / 2)


def _kinds(shapes: list[Convex], river_W: Floats, size: int, rng: np.random.Generator) -> list[str]:
    """Give every block its kind: quotas per scene, town around a centre, green along the river."""
    centers_N2 = np.array([shape.points_N2.mean(axis=0) for shape in shapes])
    towns_K2 = np.array(
        [(rng.uniform(0.15, 0.85) * size, (k * 0.5 + rng.uniform(0.12, 0.38)) * 2 * size) for k in range(2)]
    )
    reach_N = np.min(np.hypot(*(centers_N2[:, None] - towns_K2).transpose(2, 0, 1)), axis=1) + rng.normal(
        0, size * 0.06, len(shapes)
    )
    kinds = np.full(len(shapes), "", dtype=object)
    river_N = np.array([_touches(shape, river_W) for shape in shapes])
    kinds[river_N] = rng.choice(["park", "forest", "range"], int(river_N.sum()))
    for side in (centers_N2[:, 1] < size, centers_N2[:, 1] >= size):
        free = np.flatnonzero(side & (kinds == ""))
        counts = {kind: max(1, round(share * len(free))) for kind, (share, _) in KINDS.items()}
        anywhere = [kind for kind, (_, likes) in KINDS.items() if likes is None for _ in range(counts[kind])]
        chosen = rng.permutation(free)[: len(anywhere)]
        kinds[chosen] = anywhere
        rest = np.setdiff1d(free, chosen)
        ordered = [kind for kind, (_, likes) in KINDS.items() if likes is not None for _ in range(counts[kind])]
        positions = np.linspace(0, len(ordered) - 1, len(rest)).round().astype(int)
        kinds[rest[np.argsort(reach_N[rest])]] = np.array(ordered, dtype=object)[positions]
    return [str(kind) for kind in kinds]


def _touches(shape: Convex, river_W: Floats, reach: float = 42) -> bool:
    columns = np.clip(shape.points_N2[:, 1].astype(int), 0, len(river_W) - 1)
    offset_N = shape.points_N2[:, 0] - river_W[columns]
    return bool(offset_N.min() < reach and offset_N.max() > -reach)


def _parcels(shape: Convex, rng: np.random.Generator) -> tuple[tuple[Convex, str], ...]:
    inner = shrink(shape, 3)
    pieces = [] if inner is None else split(inner, rng, rng.uniform(4000, 8500), (1.8, 1.2, 0.8))
    shrunk = [parcel for piece in pieces if (parcel := shrink(piece, 0.6)) is not None and area(parcel) > 400]
    names = rng.choice(list(CROPS), len(shrunk), p=_crop_odds())
    return tuple((parcel, str(name)) for parcel, name in zip(shrunk, names, strict=True))


def _crop_odds() -> list[float]:
    weights = [0.7 if not cultivated else 0.5 if name == "tunnels" else 1.0 for name, (*_, cultivated) in CROPS.items()]
    return [weight / sum(weights) for weight in weights]


def draw(world: World, half: int) -> Scene:
    """Draw one half of the world (0 left, 1 right) under its own light."""
    canvas = _canvas(world, half)
    for index, block in enumerate(world.blocks):
        rng = world.rng(2, index)
        if canvas.view(block.shape, pad=8) is None:
            continue
        roads(canvas, block.shape, rng)
        inner = shrink(block.shape)
        if block.kind == "fields":
            blocks.fields(canvas, block.shape, block.parcels, rng)
        elif inner is not None:
            blocks.PAINTERS[block.kind](canvas, inner, rng)
    _river(canvas, world)
    _clouds(canvas, world.rng(3, half))
    image_HWC = _expose(canvas.image_CHW, LIGHTS[half], world.rng(4, half))
    return Scene(image_HWC, canvas.cover_HW, (canvas.netting_HW > 0.5).astype(np.uint8))


def _canvas(world: World, half: int) -> Canvas:
    left, size = half * world.size, world.size
    noise = {name: noise_HW[:, left : left + size] for name, noise_HW in world.noise.items()}
    noise["canopy"] = _canopy(world.rng(5), size, LIGHTS[half].shadow)
    image_CHW = np.empty((3, size, size), dtype=np.float32)
    image_CHW[:] = np.array([118, 122, 84], dtype=np.float32)[:, None, None] * (1 + 0.06 * noise["fine"])
    cover_HW = np.full((size, size), RANGELAND, dtype=np.uint8)
    netting_HW, road_HW = np.zeros((2, size, size), dtype=np.float32)
    stamps = {radius: _crown(radius, LIGHTS[half].shadow) for radius in range(2, 7)}
    return Canvas(world.bend, left, LIGHTS[half].shadow, noise, image_CHW, cover_HW, netting_HW, road_HW, stamps)


def _crown(radius: int, shadow: tuple[float, float]) -> tuple[Floats, Floats]:
    rng = _rng(radius)
    row_HW, col_HW = np.mgrid[-radius - 1 : radius + 2, -radius - 1 : radius + 2].astype(np.float32)
    ragged_HW = rng.normal(0, 0.55, row_HW.shape)
    share_HW = cover_share((np.hypot(row_HW, col_HW) - radius + ragged_HW).astype(np.float32), 1.5)
    light_HW = -26 * (row_HW * shadow[0] + col_HW * shadow[1]) / radius + rng.normal(0, 7, row_HW.shape)
    return share_HW, light_HW.astype(np.float32)


def _canopy(
    rng: np.random.Generator, size: int, shadow: tuple[float, float], spacing: int = 7, cells: int = 48
) -> Floats:
    """Return the brightness (percent) of a closed canopy: a dome per cell of a jittered grid, lit from one side."""
    place_2KK = rng.uniform(0.1, 0.9, (2, cells, cells)) * spacing
    radius_KK, tint_KK = rng.uniform(3.2, 5.8, (cells, cells)), rng.normal(0, 9, (cells, cells))
    at = np.arange(cells * spacing, dtype=np.float32)
    best_HW, light_HW = np.full((2, cells * spacing, cells * spacing), -30, dtype=np.float32)
    for down, right in [(i, j) for i in (-1, 0, 1) for j in (-1, 0, 1)]:
        row_KK, col_KK, reach_KK, hue_KK = (
            np.roll(a, (-down, -right), (0, 1)).astype(np.float32).repeat(spacing, 0).repeat(spacing, 1)
            for a in (place_2KK[0] + down * spacing, place_2KK[1] + right * spacing, radius_KK, tint_KK)
        )
        row_KK, col_KK = (at % spacing)[:, None] - row_KK, (at % spacing)[None] - col_KK
        height_HW = reach_KK**2 - row_KK**2 - col_KK**2
        shade_HW = -22 * (row_KK * shadow[0] + col_KK * shadow[1]) / reach_KK + hue_KK + 0.7 * np.minimum(height_HW, 12)
        light_HW = np.where(height_HW > np.maximum(best_HW, 0), shade_HW, light_HW)
        best_HW = np.maximum(best_HW, height_HW)
    repeats = -(-size // (cells * spacing))
    return np.asarray(np.tile(light_HW, (repeats, repeats))[:size, :size], dtype=np.float32)


def _river(canvas: Canvas, world: World) -> None:
    """Let the river flow over everything but the main roads, which become bridges."""
    middle_W = world.river_W[canvas.left : canvas.left + world.size]
    view = canvas.window(int(middle_W.min()) - 60, int(middle_W.max()) + 60, canvas.left, canvas.left + world.size)
    if view is None:
        return
    fall_W = np.hypot(1, np.gradient(middle_W)).astype(np.float32)
    shore_HW = np.abs(view.row_H[:, None] - middle_W) / fall_W - (20 + 3 * canvas.texture("soft", view))
    shore_HW = shore_HW + 1.5 * canvas.texture("lumps", view)
    land_HW = 1 - canvas.road_HW[view.rows, view.cols]
    soft_HW, lumps_HW = canvas.texture("soft", view), canvas.texture("lumps", view)
    canvas.paint(view, cover_share(shore_HW - 6, 5) * land_HW, tone((172, 160, 128), 6 * lumps_HW), BARREN)
    water_CHW = tone(
        (72, 94, 86), 5 * soft_HW + 2 * canvas.texture("fine", view) - 6 * np.clip(shore_HW / 20 + 1, 0, 1)
    )
    canvas.paint(view, cover_share(shore_HW, 2) * land_HW, water_CHW, WATER)


def _clouds(canvas: Canvas, rng: np.random.Generator, count: int = 2) -> None:
    """Drift a few small clouds and their shadows over places without netting; their land cover is unknown."""
    size = canvas.cover_HW.shape[0]
    radius = size * 0.035
    for _ in range(count):
        spots_K2 = rng.uniform(0.15, 0.85, (24, 2)) * size + np.array([0, canvas.left])
        for row, col in spots_K2:
            reach = int(radius * 2.6)
            view = canvas.window(int(row) - reach, int(row) + reach, int(col) - reach, int(col) + reach)
            if view is not None and not canvas.netting_HW[view.rows, view.cols].any():
                _cloud(canvas, view, (row, col), radius)
                break


def _cloud(canvas: Canvas, view: View, center: tuple[float, float], radius: float) -> None:
    billow_HW = 0.25 * canvas.texture("soft", view) + 0.12 * canvas.texture("lumps", view)
    row_HW, col_HW = view.row_H[:, None] - np.float32(center[0]), view.col_W[None] - np.float32(center[1])
    down, right = np.array(canvas.shadow) * radius * 0.9
    for share, offset in ((0.8, (down, right)), (1.0, (0.0, 0.0))):
        gap_HW = np.hypot((row_HW - offset[0]) / radius, (col_HW - offset[1]) / (radius * 1.3)) - 0.7
        veil_HW = np.clip(-1.6 * (gap_HW + billow_HW), 0, 0.95).astype(np.float32)
        if offset[0]:
            canvas.darken(view, veil_HW * np.float32(share))
        else:
            canvas.paint(view, veil_HW, (226, 228, 232), UNKNOWN)


def _expose(image_CHW: Floats, light: Light, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Turn reflectance into the picture a camera would bring back: (H, W, 3) uint8, never 0 in all bands."""
    height, width = image_CHW.shape[1:]
    image_HWC = np.empty((height, width, 3), dtype=np.uint8)
    grain_HW = rng.standard_normal((height, width), dtype=np.float32) * np.float32(light.noise)
    for band, (gain, haze) in enumerate(zip(light.gains, light.haze, strict=True)):
        seen_HW = ndimage.gaussian_filter(image_CHW[band], light.blur, truncate=3)
        seen_HW = seen_HW * np.float32(gain * (1 - light.haze_share)) + np.float32(haze * light.haze_share)
        seen_HW += grain_HW + rng.standard_normal((height, width), dtype=np.float32) * np.float32(light.noise * 0.4)
        image_HWC[..., band] = np.clip(np.rint(seen_HW), 1, 255)
    return image_HWC
