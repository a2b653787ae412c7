"""Convex shapes, fractal noise and a canvas to paint them on with soft edges: what a drawn landscape is made of.

Shapes live in plan coordinates (row, col) in which lines are straight; a canvas sees them through a gentle bend,
`row + bow_rows[col]`, `col + bow_cols[row]`, so that roads and parcels curve. The bend keeps the distance to a line
the sum of one term per row and one per column, which is what makes painting cheap.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float32]
Color = tuple[float, float, float]

_CORNERS_42 = np.array([(-1.0, -1.0), (-1.0, 1.0), (1.0, 1.0), (1.0, -1.0)])
SLOPE = 0.12  # no bend is steeper than this
MARGIN = 64  # the bow tables reach this many pixels beyond the world on every side


class Convex(NamedTuple):
    """A convex polygon: (row, col) points clockwise on screen, one margin (pixels) per edge that starts there."""

    points_N2: NDArray[np.float64]
    margins_N: NDArray[np.float64]


def convex(points: ArrayLike, margin: float = 0.0) -> Convex:
    """Return the polygon through `points` with the same margin on every edge."""
    points_N2 = np.asarray(points, dtype=np.float64)
    return Convex(points_N2, np.full(len(points_N2), margin))


def rectangle(center: ArrayLike, height: float, width: float, angle: float) -> Convex:
    """Return a rectangle around `center`, its width along `angle` (radians from +col towards +row)."""
    along, across = axes(angle)
    return convex(np.asarray(center) + _CORNERS_42 @ np.stack([across * (height / 2), along * (width / 2)]))


def axes(angle: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the unit vectors (row, col) along `angle` and across it, a quarter turn towards +row."""
    return np.array([math.sin(angle), math.cos(angle)]), np.array([math.cos(angle), -math.sin(angle)])


def edges(shape: Convex) -> NDArray[np.float64]:
    """Return the way (N, 2) from every point to the next."""
    points_N2 = shape.points_N2
    return np.concatenate((points_N2[1:], points_N2[:1])) - points_N2


def normals(shape: Convex) -> NDArray[np.float64]:
    """Return the outward unit normals (N, 2) of the edges."""
    outward_N2 = edges(shape)[:, ::-1] * np.array([-1, 1])
    length_N1 = np.hypot(outward_N2[:, :1], outward_N2[:, 1:])
    return np.asarray(outward_N2 / np.maximum(length_N1, 1e-9))


def area(shape: Convex) -> float:
    """Return the area in square pixels (shoelace)."""
    points = shape.points_N2.tolist()
    turns = [r0 * c1 - c0 * r1 for (r0, c0), (r1, c1) in zip(points, points[1:] + points[:1], strict=True)]
    return float(abs(sum(turns))) / 2


def frame(shape: Convex) -> tuple[NDArray[np.float64], float, float, float]:
    """Return the centre (2,), the angle of the longest edge, and the extents along and across it."""
    edges_N2 = edges(shape)
    longest = edges_N2[int(np.argmax(np.hypot(edges_N2[:, 0], edges_N2[:, 1])))]
    angle = float(np.arctan2(longest[0], longest[1]))
    reach_N2 = shape.points_N2 @ np.stack(axes(angle), axis=1)
    along, across = (reach_N2.max(axis=0) - reach_N2.min(axis=0)).tolist()
    return shape.points_N2.mean(axis=0), angle, along, across


def clip(shape: Convex, normal: NDArray[np.float64], offset: float, margin: float) -> Convex | None:
    """Keep the part with `normal . point <= offset`; the new edge gets `margin`; None where nothing is left."""
    sides, points = (shape.points_N2 @ normal - offset).tolist(), shape.points_N2.tolist()
    if max(sides) <= 0:
        return shape
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


def split(
    shape: Convex, rng: np.random.Generator, limit: float, margins: tuple[float, ...], depth: int = 0
) -> list[Convex]:
    """Cut across the longer side until every piece is under `limit` square pixels.

    The cut made at depth d gets the margin `margins[d]`, deeper ones the last: wide roads first, lanes later.
    """
    if area(shape) < limit:
        return [shape]
    _, angle, along, across = frame(shape)
    angle += (0 if along >= across else np.pi / 2) + rng.normal(0, 0.04)
    normal = np.array([np.sin(angle), np.cos(angle)])
    reach = shape.points_N2 @ normal
    offset = float(reach.min() + np.ptp(reach) * rng.uniform(0.4, 0.6))
    margin = margins[min(depth, len(margins) - 1)]
    halves = clip(shape, normal, offset, margin), clip(shape, -normal, -offset, margin)
    return [piece for half in halves if half is not None for piece in split(half, rng, limit, margins, depth + 1)]


def fractal(rng: np.random.Generator, height: int, width: int, weights: tuple[float, ...]) -> Floats:
    """Return noise (height, width), mean 0, deviation 1; `weights[k]` is the strength of features 2^k pixels wide."""
    sizes = [(height, width)]
    for _ in weights[1:]:
        sizes.append((-(-sizes[-1][0] // 2) + 2, -(-sizes[-1][1] // 2) + 2))
    noise_HW: Floats = np.zeros(sizes[-1], dtype=np.float32)
    for weight, size in zip(reversed(weights), reversed(sizes), strict=True):
        noise_HW = noise_HW if noise_HW.shape == size else _double(noise_HW)[: size[0], : size[1]]
        if weight:
            noise_HW += np.float32(weight) * rng.standard_normal(size, dtype=np.float32)
    noise_HW -= noise_HW.mean(dtype=np.float64).astype(np.float32)
    noise_HW /= noise_HW.std(dtype=np.float64).astype(np.float32)
    return noise_HW


def _double(coarse_HW: Floats) -> Floats:
    """Return twice the resolution along rows and columns (quadratic B-spline), without the outermost coarse pixels."""
    rows, cols = (2 * (side - 2) for side in coarse_HW.shape)
    tall_HW = np.empty((rows, coarse_HW.shape[1]), dtype=np.float32)
    fine_HW = np.empty((rows, cols), dtype=np.float32)
    middle_HW, edge_HW = coarse_HW[1:-1] * np.float32(0.75), coarse_HW * np.float32(0.25)
    np.add(middle_HW, edge_HW[:-2], out=tall_HW[0::2])
    np.add(middle_HW, edge_HW[2:], out=tall_HW[1::2])
    middle_HW, edge_HW = tall_HW[:, 1:-1] * np.float32(0.75), tall_HW * np.float32(0.25)
    np.add(middle_HW, edge_HW[:, :-2], out=fine_HW[:, 0::2])
    np.add(middle_HW, edge_HW[:, 2:], out=fine_HW[:, 1::2])
    return fine_HW


class View(NamedTuple):
    """A window of a canvas: its slices, and the plan coordinates' terms per row and per column."""

    rows: slice
    cols: slice
    row_H: Floats
    col_W: Floats
    bow_rows_W: Floats
    bow_cols_H: Floats

    def line(self, normal: ArrayLike, offset: float) -> Floats:
        """Return `normal . (row, col) - offset` for every pixel, float32 (H, W)."""
        return self.highest(np.asarray(normal, dtype=np.float32)[None], np.array([offset]))

    def highest(self, normals_N2: NDArray[np.floating], offsets_N: NDArray[np.floating]) -> Floats:
        """Return the largest of `normals_N2 @ (row, col) - offsets_N` for every pixel, float32 (H, W)."""
        down_N1, right_N1 = np.asarray(normals_N2.T[..., None], dtype=np.float32)
        rows_NH = down_N1 * self.row_H + right_N1 * self.bow_cols_H - np.asarray(offsets_N[:, None], dtype=np.float32)
        cols_NW = down_N1 * self.bow_rows_W + right_N1 * self.col_W
        highest_HW: Floats = rows_NH[0][:, None] + cols_NW[0]
        for rows_H, cols_W in zip(rows_NH[1:], cols_NW[1:], strict=True):
            np.maximum(highest_HW, rows_H[:, None] + cols_W, out=highest_HW)
        return highest_HW


@dataclass(frozen=True)
class Bend:
    """The gentle bend between pixel and plan coordinates: two tables that start `MARGIN` pixels before the world."""

    bow_rows: NDArray[np.float64]
    bow_cols: NDArray[np.float64]

    def to_pixels(self, points_N2: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return where plan points lie in pixels, to about 0.1 pixel (fixed point; the bend is a contraction)."""
        pixels_N2 = points_N2
        for _ in range(4):
            row, col = np.rint(pixels_N2.T).astype(np.intp) + MARGIN
            bow_rows, bow_cols = self.bow_rows.take(col, mode="clip"), self.bow_cols.take(row, mode="clip")
            pixels_N2 = points_N2 - np.stack([bow_rows, bow_cols], axis=1)
        return pixels_N2

    def shift(self, row: float, col: float) -> tuple[float, float]:
        """Return how far plan point (row, col) lies from its pixel: plan minus pixel, to about 0.1 pixel."""
        down = across = 0.0
        for _ in range(4):
            at_col = min(max(round(col - across) + MARGIN, 0), len(self.bow_rows) - 1)
            at_row = min(max(round(row - down) + MARGIN, 0), len(self.bow_cols) - 1)
            down, across = float(self.bow_rows[at_col]), float(self.bow_cols[at_row])
        return down, across

    def outline(self, shape: Convex, step: float = 12.0) -> NDArray[np.float64]:
        """Return the polygon's outline in pixels (N, 2) (row, col), with a point at least every `step` pixels."""
        parts = []
        for here, there in zip(shape.points_N2, np.roll(shape.points_N2, -1, axis=0), strict=True):
            count = max(1, int(np.hypot(*(there - here)) // step))
            parts.append(here + (there - here) * (np.arange(count) / count)[:, None])
        return self.to_pixels(np.concatenate(parts))


@dataclass(frozen=True)
class Canvas:
    """One scene being drawn: reflectance image_CHW (0..255), land cover, share of netting and of road.

    `left` is its first column in the world; `noise` holds the world's textures cut to the scene; `shadow` is the way
    (rows, cols) a shadow falls per metre of height; `stamps` are its tree crowns by radius, (share_HW, brightness_HW).
    """

    bend: Bend
    left: int
    shadow: tuple[float, float]
    noise: dict[str, Floats]
    image_CHW: Floats
    cover_HW: NDArray[np.uint8]
    netting_HW: Floats
    road_HW: Floats
    stamps: dict[int, tuple[Floats, Floats]] = field(default_factory=dict)

    def view(self, shape: Convex, pad: float = 2.0) -> View | None:
        """Return the window that holds `shape` and `pad` pixels around it, None outside the canvas."""
        (top, left), (bottom, right) = shape.points_N2.min(axis=0).tolist(), shape.points_N2.max(axis=0).tolist()
        if right < self.left - MARGIN or left > self.left + self.cover_HW.shape[1] + MARGIN:
            return None
        down, across = self.bend.shift((top + bottom) / 2, (left + right) / 2)
        reach = pad + SLOPE * max(bottom - top, right - left) / 2
        rows = int(top - down - reach), int(bottom - down + reach) + 2
        return self.window(*rows, int(left - across - reach), int(right - across + reach) + 2)

    def window(self, top: int, bottom: int, left: int, right: int) -> View | None:
        """Return what of the world's rows top..bottom, columns left..right lies on the canvas, None if nothing."""
        height, width = self.cover_HW.shape
        top, bottom = max(top, 0), min(bottom, height)
        left, right = max(left, self.left), min(right, self.left + width)
        if top >= bottom or left >= right:
            return None
        row_H, col_W = np.arange(top, bottom, dtype=np.float32), np.arange(left, right, dtype=np.float32)
        bow_rows_W = self.bend.bow_rows[left + MARGIN : right + MARGIN].astype(np.float32)
        bow_cols_H = self.bend.bow_cols[top + MARGIN : bottom + MARGIN].astype(np.float32)
        return View(
            slice(top, bottom), slice(left - self.left, right - self.left), row_H, col_W, bow_rows_W, bow_cols_H
        )

    def texture(self, name: str, view: View) -> Floats:
        """Return the named texture in `view`."""
        return self.noise[name][view.rows, view.cols]

    def paint(self, view: View, alpha_HW: Floats, color: Color | Floats, cover: int | None = None) -> None:
        """Lay `color` ((3,) or (3, H, W)) over the image by the share `alpha_HW`; over half, set the land cover."""
        color_C11 = np.asarray(color, dtype=np.float32)
        color_C11 = color_C11[:, None, None] if color_C11.ndim == 1 else color_C11
        window_CHW = self.image_CHW[:, view.rows, view.cols]
        window_CHW += alpha_HW * (color_C11 - window_CHW)
        if cover is not None:
            self.cover_HW[view.rows, view.cols][alpha_HW > 0.5] = cover

    def darken(self, view: View, alpha_HW: Floats, depth: float = 1.0) -> None:
        """Put the window into shadow by the share `alpha_HW`; a shadow is lit by the blue sky."""
        loss_C = np.array([0.66, 0.62, 0.54], dtype=np.float32) * np.float32(depth)
        self.image_CHW[:, view.rows, view.cols] *= 1 - alpha_HW * loss_C[:, None, None]


def distance(view: View, shape: Convex) -> Floats:
    """Return the signed distance to the polygon's nearest edge line (negative inside), float32 (H, W)."""
    outward_N2 = normals(shape)
    return view.highest(outward_N2, (outward_N2 * shape.points_N2).sum(axis=1))


def swept(view: View, shape: Convex, way: NDArray[np.float64]) -> Floats:
    """Return the signed distance to the area the polygon passes over when moved by `way`: its cast shadow."""
    side = np.array([[way[1], -way[0]]]) / max(float(np.hypot(*way)), 1e-6)
    outward_N2 = np.concatenate([normals(shape), side, -side])
    return view.highest(outward_N2, (shape.points_N2 @ outward_N2.T).max(axis=0) + np.maximum(outward_N2 @ way, 0))


def cover_share(distance_HW: Floats, softness: float = 1.0) -> Floats:
    """Turn a signed distance into a pixel share 0..1 with an edge `softness` pixels wide."""
    return np.asarray(np.clip(0.5 - distance_HW / np.float32(softness), 0, 1), dtype=np.float32)


def stripe(distance_HW: Floats, at: float, width: float = 1.0) -> Floats:
    """Return the share of a line `width` pixels wide that runs at signed distance `at`."""
    share_HW = np.float32(0.5 + width / 2) - np.abs(distance_HW - np.float32(at))
    return np.asarray(np.clip(share_HW, 0, 1), dtype=np.float32)
