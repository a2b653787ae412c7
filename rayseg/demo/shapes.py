"""Convex shapes, fractal noise and a canvas to paint them on with soft edges.

Shapes have plan coordinates (row, col), in which lines are straight. The canvas shows them through a gentle bend,
`row + bow_rows[col]`, `col + bow_cols[row]`, so that roads and parcels curve. With such a bend the distance to a line
is the sum of one term per row and one per column, which makes painting cheap.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Color = tuple[float, float, float]

MARGIN = 64  # the bow tables reach this many pixels beyond the world on every side


class Convex(NamedTuple):
    """A convex polygon: (row, col) points clockwise on screen, one margin (pixels) per edge that starts there."""

    points_N2: Points
    margins_N: Points


def convex(points: ArrayLike, margin: float = 0.0) -> Convex:
    """Return the polygon through `points` with the same margin on every edge."""
    points_N2 = np.asarray(points, dtype=np.float64)
    return Convex(points_N2, np.full(len(points_N2), margin))


def rectangle(center: ArrayLike, height: float, width: float, angle: float) -> Convex:
    """Return a rectangle around `center`, its width along `angle` (radians from +col towards +row)."""
    along, across = axes(angle)
    corners_42 = np.array([(-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)])
    return convex(np.asarray(center) + corners_42 @ np.stack([across * (height / 2), along * (width / 2)]))


def axes(angle: float) -> tuple[Points, Points]:
    """Return the unit vectors (row, col) along `angle` and across it, a quarter turn towards +row."""
    return np.array([math.sin(angle), math.cos(angle)]), np.array([math.cos(angle), -math.sin(angle)])


def edges(shape: Convex) -> Points:
    """Return the vectors (N, 2) from every point to the next."""
    return np.concatenate((shape.points_N2[1:], shape.points_N2[:1])) - shape.points_N2


def normals(shape: Convex) -> Points:
    """Return the outward unit normals (N, 2) of the edges."""
    outward_N2 = edges(shape)[:, ::-1] * np.array([-1, 1])
    return np.asarray(outward_N2 / np.maximum(np.hypot(outward_N2[:, :1], outward_N2[:, 1:]), 1e-9))


def area(shape: Convex) -> float:
    """Return the area in square pixels (shoelace formula)."""
    points = shape.points_N2.tolist()
    turns = [r0 * c1 - c0 * r1 for (r0, c0), (r1, c1) in zip(points, points[1:] + points[:1], strict=True)]
    return float(abs(sum(turns))) / 2


def frame(shape: Convex) -> tuple[Points, float, float, float]:
    """Return the centre (2,), the angle of the longest edge, and the extents along and across it."""
    edges_N2 = edges(shape)
    longest = edges_N2[int(np.argmax(np.hypot(edges_N2[:, 0], edges_N2[:, 1])))]
    angle = float(np.arctan2(longest[0], longest[1]))
    along, across = np.ptp(shape.points_N2 @ np.stack(axes(angle), axis=1), axis=0).tolist()
    return shape.points_N2.mean(axis=0), angle, along, across


def clip(shape: Convex, normal: Points, offset: float, margin: float) -> Convex | None:
    """Keep the part with `normal . point <= offset`; the new edge gets `margin`; None if no part remains."""
    sides, points = (shape.points_N2 @ normal - offset).tolist(), shape.points_N2.tolist()
    if max(sides) <= 0:
        return shape
    # Sutherland and Hodgman (1974), for one edge of a convex shape.
    kept: list[tuple[float, float]] = []
    margins: list[float] = []
    for index, ((row, col), own) in enumerate(zip(points, shape.margins_N.tolist(), strict=True)):
        side, following = sides[index], (index + 1) % len(sides)
        if side <= 0:
            kept.append((row, col))
            margins.append(own)
        if (side <= 0) != (sides[following] <= 0):
            share, (next_row, next_col) = side / (side - sides[following]), points[following]
            kept.append((row + (next_row - row) * share, col + (next_col - col) * share))
            margins.append(margin if side <= 0 else own)
    return Convex(np.array(kept), np.array(margins)) if len(kept) > 2 else None


def shrink(shape: Convex, distance: float = 0.0) -> Convex | None:
    """Move every edge inwards by its margin plus `distance`; None where nothing worth painting is left."""
    result: Convex | None = Convex(shape.points_N2, np.zeros(len(shape.points_N2)))
    for normal, point, margin in zip(normals(shape), shape.points_N2, shape.margins_N, strict=True):
        result = result and clip(result, normal, float(normal @ point) - float(margin) - distance, 0.0)
    return result if result is not None and area(result) > 4 else None


def halves(shape: Convex, at: float, *, turn: float = 0.0, margin: float = 0.0) -> list[Convex]:
    """Cut across the longer side at the share `at` of it, `turn` radians askew; both parts get a margin at the cut."""
    _, angle, along, across = frame(shape)
    angle += (0 if along >= across else np.pi / 2) + turn
    normal = np.array([np.sin(angle), np.cos(angle)])
    reach_N = shape.points_N2 @ normal
    offset = float(reach_N.min() + np.ptp(reach_N) * at)
    parts = clip(shape, normal, offset, margin), clip(shape, -normal, -offset, margin)
    return [part for part in parts if part is not None]


def split(
    shape: Convex, rng: np.random.Generator, limit: float, margins: tuple[float, ...], depth: int = 0
) -> list[Convex]:
    """Cut across the longer side until every piece is under `limit` square pixels.

    The cut made at depth d gets the margin `margins[d]`, deeper ones the last: wide roads first, lanes later.
    """
    if area(shape) < limit:
        return [shape]
    turn, at = rng.normal(0, 0.04), rng.uniform(0.4, 0.6)
    parts = halves(shape, at, turn=turn, margin=margins[min(depth, len(margins) - 1)])
    return [piece for part in parts for piece in split(part, rng, limit, margins, depth + 1)]


def scatter(shape: Convex, rng: np.random.Generator, per_hectare: float) -> Points:
    """Return random plan points (N, 2) inside the polygon, about `per_hectare` of them on every 100 m x 100 m."""
    low, high = shape.points_N2.min(axis=0), shape.points_N2.max(axis=0)
    points_N2 = rng.uniform(low, high, (int(np.prod(high - low) * per_hectare / 1e4), 2))
    offsets_N = np.sum(normals(shape) * shape.points_N2, axis=1)
    return np.asarray(points_N2[(points_N2 @ normals(shape).T - offsets_N < -3).all(axis=1)])


def avenue(shape: Convex, rng: np.random.Generator, spacing: float) -> Points:
    """Return plan points along the polygon's edges, one about every `spacing` metres."""
    inner = shrink(shape, 2.5) or shape
    parts = [np.empty((0, 2))]
    for here, way in zip(inner.points_N2, edges(inner), strict=True):
        steps = np.arange(0, 1, spacing / max(spacing, float(np.hypot(*way))))
        parts.append(here + way * steps[:, None] + rng.normal(0, 0.8, (len(steps), 2)))
    points_N2 = np.concatenate(parts)
    return np.asarray(points_N2[rng.random(len(points_N2)) < 0.8])


def fractal(rng: np.random.Generator, height: int, width: int, weights: tuple[float, ...]) -> Floats:
    """Return noise (height, width), mean 0, deviation 1; `weights[k]` is the strength of features 2^k pixels wide."""
    sizes = [(height, width)]
    for _ in weights[1:]:
        sizes.append((-(-sizes[-1][0] // 2) + 2, -(-sizes[-1][1] // 2) + 2))
    noise_HW: Floats = np.zeros(sizes[-1], dtype=np.float32)
    for weight, size in zip(reversed(weights), reversed(sizes), strict=True):
        if noise_HW.shape != size:
            # twice the resolution along rows, then columns (quadratic B-spline), without the outermost coarse pixels
            for _ in range(2):
                middle_HW, edge_HW = noise_HW[1:-1] * np.float32(0.75), noise_HW * np.float32(0.25)
                pairs_H2W = np.stack([middle_HW + edge_HW[:-2], middle_HW + edge_HW[2:]], axis=1)
                noise_HW = pairs_H2W.reshape(-1, noise_HW.shape[1]).T
            noise_HW = noise_HW[: size[0], : size[1]].copy()
        if weight:
            noise_HW += np.float32(weight) * rng.standard_normal(size, dtype=np.float32)
    noise_HW -= noise_HW.mean(dtype=np.float64).astype(np.float32)
    noise_HW /= noise_HW.std(dtype=np.float64).astype(np.float32)
    return noise_HW


@dataclass(frozen=True)
class Bend:
    """The gentle bend between pixel and plan coordinates: two tables that start `MARGIN` pixels before the world."""

    bow_rows: Points
    bow_cols: Points

    def to_pixels(self, points_N2: Points) -> Points:
        """Return where plan points lie in pixels, to about 0.1 pixel (fixed point; the bend is a contraction)."""
        pixels_N2 = points_N2
        for _ in range(4):
            row, col = np.rint(pixels_N2.T).astype(np.intp) + MARGIN
            bow_rows, bow_cols = self.bow_rows.take(col, mode="clip"), self.bow_cols.take(row, mode="clip")
            pixels_N2 = points_N2 - np.stack([bow_rows, bow_cols], axis=-1)
        return pixels_N2

    def outline(self, shape: Convex, step: float = 12.0) -> Points:
        """Return the polygon's outline in pixels (N, 2) (row, col), with a point at least every `step` pixels."""
        parts = []
        for here, way in zip(shape.points_N2, edges(shape), strict=True):
            count = max(1, int(np.hypot(*way) // step))
            parts.append(here + way * (np.arange(count) / count)[:, None])
        return self.to_pixels(np.concatenate(parts))


@dataclass(frozen=True)
class Canvas:
    """One scene being drawn, or a part of it that shares its memory; a part outside the scene is empty.

    Attributes:
        bend: between pixels and plan.
        corner: (row, col) of the first pixel in the world.
        shadow: way (rows, cols) that a shadow falls per metre of height.
        image_CHW: reflectance of red, green and blue, float32, 0..255.
        cover_HW: land cover, uint8.
        netting_HW: share of netting, float32, 0..1.
        road_HW: share of wide roads, float32, 0..1.
        noise: the world's textures, (height, width) float32 each.
        stamps: tree crowns by radius, (share_HW, brightness_HW).
    """

    bend: Bend
    corner: tuple[int, int]
    shadow: tuple[float, float]
    image_CHW: Floats
    cover_HW: NDArray[np.uint8]
    netting_HW: Floats
    road_HW: Floats
    noise: dict[str, Floats]
    stamps: dict[int, tuple[Floats, Floats]]

    def around(self, shape: Convex, pad: float = 2.0) -> Self:
        """Return the part that shows `shape` and `pad` pixels around it."""
        low, high = shape.points_N2.min(axis=0), shape.points_N2.max(axis=0)
        row, col = self.bend.to_pixels((low + high) / 2)
        down, right = (high - low) / 2 + pad + 0.12 * (high - low).max() / 2  # no bend is steeper than 0.12
        return self.window(int(row - down), int(row + down) + 2, int(col - right), int(col + right) + 2)

    def window(self, top: int, bottom: int, left: int, right: int) -> Self:
        """Return the part with the world's rows top..bottom and columns left..right."""
        (row, col), (height, width) = self.corner, self.cover_HW.shape
        top, left = min(max(top - row, 0), height), min(max(left - col, 0), width)
        part = np.s_[..., top : max(bottom - row, top), left : max(right - col, left)]
        return replace(
            self,
            corner=(row + top, col + left),
            image_CHW=self.image_CHW[part],
            cover_HW=self.cover_HW[part],
            netting_HW=self.netting_HW[part],
            road_HW=self.road_HW[part],
            noise={name: noise_HW[part] for name, noise_HW in self.noise.items()},
        )

    def pixels(self) -> tuple[Floats, Floats]:
        """Return the world's row and column of every pixel, float32 (H,) and (W,)."""
        (row, col), (height, width) = self.corner, self.cover_HW.shape
        return np.arange(row, row + height, dtype=np.float32), np.arange(col, col + width, dtype=np.float32)

    def line(self, normal: ArrayLike, offset: float = 0.0) -> Floats:
        """Return `normal . (row, col) - offset` for every pixel, float32 (H, W)."""
        return self.highest(np.asarray(normal, dtype=np.float32)[None], np.array([offset]))

    def highest(self, normals_N2: NDArray[np.floating], offsets_N: Points) -> Floats:
        """Return the largest of `normals_N2 @ (row, col) - offsets_N` for every pixel, float32 (H, W)."""
        (top, left), (height, width) = self.corner, self.cover_HW.shape
        row_H, col_W = self.pixels()
        bow_rows_W = self.bend.bow_rows[left + MARGIN : left + width + MARGIN].astype(np.float32)
        bow_cols_H = self.bend.bow_cols[top + MARGIN : top + height + MARGIN].astype(np.float32)
        down_N1, right_N1 = np.asarray(normals_N2.T[..., None], dtype=np.float32)
        rows_NH = down_N1 * row_H + right_N1 * bow_cols_H - np.asarray(offsets_N[:, None], dtype=np.float32)
        cols_NW = down_N1 * bow_rows_W + right_N1 * col_W
        highest_HW: Floats = rows_NH[0][:, None] + cols_NW[0]
        for rows_H, cols_W in zip(rows_NH[1:], cols_NW[1:], strict=True):
            np.maximum(highest_HW, rows_H[:, None] + cols_W, out=highest_HW)
        return highest_HW

    def distance(self, shape: Convex) -> Floats:
        """Return the signed distance to the polygon's nearest edge line (negative inside), float32 (H, W)."""
        outward_N2 = normals(shape)
        return self.highest(outward_N2, (outward_N2 * shape.points_N2).sum(axis=1))

    def shadow_of(self, shape: Convex, height: float) -> Floats:
        """Return the signed distance to `shape` and the shadow it casts when it stands `height` metres high."""
        way = np.array(self.shadow) * height
        side = np.array([[way[1], -way[0]]]) / max(float(np.hypot(*way)), 1e-6)
        outward_N2 = np.concatenate([normals(shape), side, -side])
        offsets_N = (shape.points_N2 @ outward_N2.T).max(axis=0) + np.maximum(outward_N2 @ way, 0)
        return self.highest(outward_N2, offsets_N)

    def paint(
        self, share_HW: Floats, color: ArrayLike, light_HW: Floats | float = 0.0, cover: int | None = None
    ) -> None:
        """Lay a colour over the image by its share 0..1; where that is over half, set the land cover.

        Args:
            share_HW: 0..1.
            color: (3,) or (3, H, W).
            light_HW: brightness to add, percent.
            cover: land-cover value.
        """
        self.image_CHW[...] += share_HW * (tone(color, light_HW) - self.image_CHW)
        if cover is not None:
            self.cover_HW[share_HW > 0.5] = cover

    def darken(self, share_HW: Floats) -> None:
        """Put the share of every pixel into shadow, which the blue sky lights."""
        self.image_CHW[...] *= 1 - share_HW * np.array([0.66, 0.62, 0.54], dtype=np.float32)[:, None, None]


def tone(color: ArrayLike, light_HW: Floats | float) -> Floats:
    """Return a colour, (3,) or (3, H, W), made brighter by `light_HW` percent."""
    color_CHW = np.asarray(color, dtype=np.float32)
    color_CHW = color_CHW[:, None, None] if color_CHW.ndim == 1 else color_CHW
    return np.asarray(color_CHW * (1 + light_HW * np.float32(0.01)))


def cover_share(distance_HW: Floats, softness: float = 1.0) -> Floats:
    """Turn a signed distance into a pixel share 0..1 with an edge `softness` pixels wide."""
    return np.asarray(np.clip(0.5 - distance_HW / np.float32(softness), 0, 1), dtype=np.float32)


def stripe(distance_HW: Floats, at: float, width: float = 1.0) -> Floats:
    """Return the share of a line `width` pixels wide that runs at signed distance `at`."""
    share_HW = np.float32(0.5 + width / 2) - np.abs(distance_HW - np.float32(at))
    return np.asarray(np.clip(share_HW, 0, 1), dtype=np.float32)
