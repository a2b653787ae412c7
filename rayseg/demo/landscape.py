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

from rayseg.demo.scenery import BARREN, CROPS, PAINTERS, RANGELAND, UNKNOWN, WATER, Parcels, Rng, fields, roads
from rayseg.demo.shapes import (
    MARGIN,
    Bend,
    Canvas,
    Color,
    Convex,
    Floats,
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


TEXTURES = {
    "fine": (1.0, 0.5),
    "cells": (0.0, 0.3, 1.0, 0.6),
    "lumps": (0.0, 0.0, 0.3, 1.0, 0.8),
    "soft": (0.0, 0.0, 0.0, 0.3, 0.6, 1.0, 1.2),
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
    parcels: Parcels


@dataclass(frozen=True)
class World:
    """The plan of a landscape, before any pixel is drawn; `river_W` is the river's middle row at every column."""

    size: int
    seed: int
    bend: Bend
    blocks: tuple[Block, ...]
    river_W: Floats
    noise: dict[str, Floats]

    def rng(self, *key: int) -> Rng:
        """Return the generator that belongs to `key` alone, whatever was drawn before."""
        return np.random.default_rng([self.seed, *key])


class Scene(NamedTuple):
    """One drawn half: image_HWC uint8 (never 0 in all bands), cover_HW uint8 (0..6), netting_HW uint8 0/1."""

    image_HWC: NDArray[np.uint8]
    cover_HW: NDArray[np.uint8]
    netting_HW: NDArray[np.uint8]


def plan(*, size: int, seed: int) -> World:
    """Lay out a world of `size` x 2 `size` pixels: bend, roads, blocks and what fills them, river, textures."""
    rng = np.random.default_rng([seed, 0])
    # 1. the bend and the river
    bend = Bend(_waves(rng, 2 * size + 2 * MARGIN, 13.0), _waves(rng, size + 2 * MARGIN, 13.0))
    swing_W = _waves(rng, 2 * size, size * 0.12, longest=size * 1.6)
    river_W = (size * rng.uniform(0.4, 0.6) + swing_W).astype(np.float32)
    # 2. blocks between roads, wide roads first
    side = min(185.0, max(110.0, size / 4.5))
    outline = convex([(-40, -40), (-40, 2 * size + 40), (size + 40, 2 * size + 40), (size + 40, -40)])
    shapes = split(outline, rng, side**2 * 1.4, (10.0, 10.0, 8.0, 7.0, 6.0, 4.0, 4.0, 3.0))
    # 3. a kind for every block, plots with crops for the fields
    blocks = []
    odds = np.array([0.5 if name == "tunnels" else 1.0 if crop[4] else 0.7 for name, crop in CROPS.items()])
    for number, (shape, kind) in enumerate(zip(shapes, _kinds(shapes, river_W, size, rng), strict=True)):
        own, inner = np.random.default_rng([seed, 1, number]), shrink(shape, 3)
        lots = split(inner, own, own.uniform(4000, 8500), (1.8, 1.2, 0.8)) if kind == "fields" and inner else []
        plots = [plot for lot in lots if (plot := shrink(lot, 0.6)) is not None and area(plot) > 400]
        crops = own.choice(list(CROPS), len(plots), p=odds / odds.sum())
        blocks.append(Block(shape, kind, tuple(zip(plots, map(str, crops), strict=True))))
    noise = {name: fractal(rng, size, 2 * size, weights) for name, weights in TEXTURES.items()}
    return World(size, seed, bend, tuple(blocks), river_W, noise)


def _waves(rng: Rng, length: int, height: float, longest: float = 1400.0) -> NDArray[np.float64]:
    turns_W = np.arange(length) * 2 * np.pi
    waves = [np.sin(turns_W / (longest * share) + rng.uniform(0, 6.28)) * share**1.3 for share in (1.0, 0.62, 0.37)]
    return np.asarray(sum(waves) * height / 2)


def _kinds(shapes: list[Convex], river_W: Floats, size: int, rng: Rng) -> list[str]:
    """Give every block its kind: quotas per scene, town around a centre, green along the river."""
    centers_N2 = np.array([shape.points_N2.mean(axis=0) for shape in shapes])
    towns_K2 = np.array(
        [(rng.uniform(0.15, 0.85) * size, (k * 0.5 + rng.uniform(0.12, 0.38)) * 2 * size) for k in range(2)]
    )
    reach_N = np.min(np.hypot(*(centers_N2[:, None] - towns_K2).transpose(2, 0, 1)), axis=1)
    # Noise mixes the rings of town and countryside.
    reach_N += rng.normal(0, size * 0.06, len(shapes))
    kinds = np.full(len(shapes), "", dtype=object)
    # blocks that reach within 42 pixels of the river's middle
    columns = [np.clip(shape.points_N2[:, 1].astype(int), 0, len(river_W) - 1) for shape in shapes]
    offsets = [shape.points_N2[:, 0] - river_W[cols] for shape, cols in zip(shapes, columns, strict=True)]
    river_N = np.array([offset_N.min() < 42 and offset_N.max() > -42 for offset_N in offsets])
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


def draw(world: World, half: int) -> Scene:
    """Draw one half of the world (0 left, 1 right) under its own light."""
    light, size, left = LIGHTS[half], world.size, half * world.size
    # 1. a canvas of grass with the world's textures; `slope` is positive where a surface faces the sun
    noise = {name: noise_HW[:, left : left + size] for name, noise_HW in world.noise.items()}
    noise["canopy"] = _canopy(world.rng(5), size, light.shadow)
    down_HW, right_HW = np.gradient(noise["lumps"])
    noise["slope"] = np.asarray(down_HW * light.shadow[0] + right_HW * light.shadow[1], dtype=np.float32) * -1
    image_CHW = np.array([118, 122, 84], dtype=np.float32)[:, None, None] * (1 + 0.06 * noise["fine"])
    cover_HW = np.full((size, size), RANGELAND, dtype=np.uint8)
    netting_HW, road_HW = np.zeros((2, size, size), dtype=np.float32)
    stamps = {radius: _crown(radius, light.shadow) for radius in range(2, 7)}
    canvas = Canvas(world.bend, (0, left), light.shadow, image_CHW, cover_HW, netting_HW, road_HW, noise, stamps)
    # 2. roads and blocks, over them the river and clouds
    for number, block in enumerate(world.blocks):
        rng, inner = world.rng(2, number), shrink(block.shape)
        if not canvas.around(block.shape, pad=8).cover_HW.size:
            continue
        roads(canvas, block.shape, rng)
        if block.kind == "fields":
            fields(canvas, block.shape, block.parcels, rng)
        elif inner is not None:
            PAINTERS[block.kind](canvas, inner, rng)
    _river(canvas, world.river_W[left : left + size])
    _clouds(canvas, world.rng(3, half))
    # 3. the picture that a camera takes of this reflectance: haze, blur, noise, never 0 in all bands
    rng, image_HWC = world.rng(4, half), np.empty((size, size, 3), dtype=np.uint8)
    grain_HW = rng.standard_normal((size, size), dtype=np.float32) * np.float32(light.noise)
    for band, (gain, haze) in enumerate(zip(light.gains, light.haze, strict=True)):
        seen_HW = ndimage.gaussian_filter(image_CHW[band], light.blur, truncate=3)
        seen_HW = seen_HW * np.float32(gain * (1 - light.haze_share)) + np.float32(haze * light.haze_share)
        seen_HW += grain_HW + rng.standard_normal((size, size), dtype=np.float32) * np.float32(light.noise * 0.4)
        image_HWC[..., band] = np.clip(np.rint(seen_HW), 1, 255)
    return Scene(image_HWC, cover_HW, (netting_HW > 0.5).astype(np.uint8))


def _crown(radius: int, shadow: tuple[float, float]) -> tuple[Floats, Floats]:
    rng = np.random.default_rng([radius])
    row_HW, col_HW = np.mgrid[-radius - 1 : radius + 2, -radius - 1 : radius + 2].astype(np.float32)
    ragged_HW = rng.normal(0, 0.55, row_HW.shape)
    share_HW = cover_share((np.hypot(row_HW, col_HW) - radius + ragged_HW).astype(np.float32), 1.5)
    light_HW = -26 * (row_HW * shadow[0] + col_HW * shadow[1]) / radius + rng.normal(0, 7, row_HW.shape)
    return share_HW, light_HW.astype(np.float32)


def _canopy(rng: Rng, size: int, shadow: tuple[float, float], spacing: int = 7, cells: int = 48) -> Floats:
    """Return the brightness (percent) of a closed canopy: a dome per cell of a jittered grid, lit from one side."""
    place_2KK = rng.uniform(0.1, 0.9, (2, cells, cells)) * spacing
    radius_KK, tint_KK = rng.uniform(3.2, 5.8, (cells, cells)), rng.normal(0, 9, (cells, cells))
    at = np.arange(cells * spacing, dtype=np.float32)
    # A pixel shows the highest of the domes around it.
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
    # The grid of trees repeats every 336 pixels.
    repeats = -(-size // (cells * spacing))
    return np.asarray(np.tile(light_HW, (repeats, repeats))[:size, :size], dtype=np.float32)


def _river(canvas: Canvas, middle_W: Floats) -> None:
    """Let the river flow over everything but the main roads, which become bridges."""
    left = canvas.corner[1]
    part = canvas.window(int(middle_W.min()) - 60, int(middle_W.max()) + 60, left, left + len(middle_W))
    soft_HW, lumps_HW, land_HW = part.noise["soft"], part.noise["lumps"], 1 - part.road_HW
    fall_W = np.hypot(1, np.gradient(middle_W)).astype(np.float32)
    shore_HW = np.abs(part.pixels()[0][:, None] - middle_W) / fall_W - (20 + 3 * soft_HW) + 1.5 * lumps_HW
    part.paint(cover_share(shore_HW - 6, 5) * land_HW, (172, 160, 128), 6 * lumps_HW, BARREN)
    light_HW = 5 * soft_HW + 2 * part.noise["fine"] - 6 * np.clip(shore_HW / 20 + 1, 0, 1)
    part.paint(cover_share(shore_HW, 2) * land_HW, (72, 94, 86), light_HW, WATER)


def _clouds(canvas: Canvas, rng: Rng) -> None:
    """Drift two small clouds and their shadows over places without netting; their land cover is unknown."""
    size, shadow = len(canvas.cover_HW), np.array(canvas.shadow)
    radius = size * 0.035
    reach = int(radius * 2.6)
    for spots_K2 in rng.uniform(0.15, 0.85, (2, 24, 2)) * size + np.array([0, canvas.corner[1]]):
        # Netting under a cloud would be a label that no pixel shows, so other places are tried.
        parts = [canvas.window(r - reach, r + reach, c - reach, c + reach) for r, c in spots_K2.astype(int).tolist()]
        clear = [(part, spot) for part, spot in zip(parts, spots_K2, strict=True) if not part.netting_HW.any()]
        for part, spot in clear[:1]:
            row_H, col_W = part.pixels()
            row_H1, col_1W = row_H[:, None] - np.float32(spot[0]), col_W[None] - np.float32(spot[1])
            billow_HW = 0.25 * part.noise["soft"] + 0.12 * part.noise["lumps"]
            # First the shadow on the ground, then the cloud over it.
            for way in (shadow * radius * 0.9, np.zeros(2)):
                gap_HW = np.hypot((row_H1 - way[0]) / radius, (col_1W - way[1]) / (radius * 1.3)) - 0.7
                veil_HW = np.clip(-1.6 * (gap_HW + billow_HW), 0, 0.95).astype(np.float32)
                if way.any():
                    part.darken(veil_HW * np.float32(0.8))
                else:
                    part.paint(veil_HW, (226, 228, 232), cover=UNKNOWN)
