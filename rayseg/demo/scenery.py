"""What stands and grows in the drawn landscape: roads, buildings, trees, crops, netting, bare earth, running tracks.

All random draws happen before anything is clipped, so a thing that two scenes share looks the same in both. Colours are
reflectances 0..255 (red, green, blue), lengths are metres = pixels, angles radians from +col towards +row; land-cover
values are `URBAN` .. `UNKNOWN` below.
"""

import numpy as np
from numpy.typing import NDArray

from rayseg.demo.shapes import (
    Canvas,
    Color,
    Convex,
    Floats,
    View,
    area,
    axes,
    clip,
    convex,
    cover_share,
    distance,
    edges,
    frame,
    normals,
    rectangle,
    shrink,
    split,
    stripe,
    swept,
)

URBAN, AGRICULTURE, RANGELAND, FOREST, WATER, BARREN, UNKNOWN = range(7)

# name: colour, cover, strength of the rows, distance between rows, is it cultivated
CROPS: dict[str, tuple[Color, int, float, float, bool]] = {
    "wheat": ((104, 128, 70), AGRICULTURE, 7, 5.0, True),
    "winter-wheat": ((82, 122, 92), AGRICULTURE, 9, 4.0, True),
    "maize": ((66, 94, 52), AGRICULTURE, 8, 4.5, True),
    "rape": ((172, 166, 74), AGRICULTURE, 6, 6.0, True),
    "stubble": ((182, 162, 118), AGRICULTURE, 10, 5.5, True),
    "ploughed": ((128, 102, 78), AGRICULTURE, 12, 4.0, True),
    "harrowed": ((152, 124, 96), AGRICULTURE, 8, 6.5, True),
    "vegetables": ((96, 116, 70), AGRICULTURE, 24, 8.0, True),
    "tunnels": ((158, 170, 168), AGRICULTURE, 34, 9.0, True),
    "fallow": ((128, 128, 88), RANGELAND, 0, 5.0, False),
    "scrub": ((112, 114, 76), RANGELAND, 0, 5.0, False),
    "bare": ((176, 152, 120), BARREN, 0, 5.0, False),
}
SOILS: list[Color] = [(176, 150, 118), (164, 136, 106), (188, 168, 138), (154, 132, 110)]
NETS: list[Color] = [(86, 146, 124), (98, 154, 138), (92, 144, 144), (112, 146, 130), (92, 124, 112), (76, 140, 114)]
ROOFS: list[Color] = [(142, 84, 66), (120, 104, 92), (150, 146, 140), (172, 112, 84), (104, 106, 108), (84, 116, 158)]
HALLS: list[Color] = [(86, 122, 164), (90, 148, 130), (204, 204, 200), (150, 152, 152), (142, 98, 82), (82, 138, 112)]
FLATS: list[Color] = [(150, 144, 134), (122, 118, 114), (176, 166, 150), (96, 128, 84), (108, 106, 106), (92, 138, 118)]
COURTS: list[Color] = [(80, 140, 120), (70, 128, 136), (88, 146, 116)]


def tone(color: Color, brightness_HW: Floats) -> Floats:
    """Return `color` shifted by `brightness_HW` (in percent), (3, H, W)."""
    return np.asarray(color, dtype=np.float32)[:, None, None] * (1 + brightness_HW * np.float32(0.01))[None]


def ground(canvas: Canvas, shape: Convex, color: Color, cover: int, *, mottle: float = 5) -> View | None:
    """Fill the polygon with an uneven surface; return its view."""
    view = canvas.view(shape)
    if view is not None:
        uneven_HW = mottle * canvas.texture("soft", view) + mottle * canvas.texture("fine", view)
        canvas.paint(view, cover_share(distance(view, shape)), tone(color, uneven_HW), cover)
    return view


def roads(canvas: Canvas, shape: Convex, rng: np.random.Generator) -> None:
    """Paint the block's half of the roads around it: pavement, asphalt or concrete, lane marks and cars."""
    traffic_N = rng.integers(0, 9, len(shape.margins_N)) // np.where(shape.margins_N < 6, 4, 1)
    cars = [_car(shape, edge, rng) for edge, count in enumerate(traffic_N) for _ in range(count)]
    inner = shrink(shape) or shape
    for normal, point, way, margin in zip(normals(shape), shape.points_N2, edges(shape), shape.margins_N, strict=True):
        ends = np.array([point, point + way, point + way - normal * (margin + 3), point - normal * (margin + 3)])
        view = canvas.view(convex(ends))
        if view is not None:
            _road(canvas, view, shape, inner, (normal, float(normal @ point), float(margin)))
    for car, color in cars:
        box(canvas, car, 0, color)


def _road(
    canvas: Canvas, view: View, shape: Convex, inner: Convex, edge: tuple[NDArray[np.float64], float, float]
) -> None:
    normal, offset, margin = edge
    edge_HW = view.line(normal, offset)
    share_HW = cover_share(distance(view, shape) - 0.6) * cover_share(-edge_HW - (margin + 3))
    share_HW *= 1 - cover_share(distance(view, inner) + 1.5)
    surface_HW = 4 * canvas.texture("fine", view) + 5 * canvas.texture("soft", view)
    if margin < 6:
        canvas.paint(view, share_HW, tone((164, 158, 146), surface_HW), URBAN)
        return
    canvas.paint(view, share_HW * cover_share(edge_HW + margin), tone((150, 146, 132), surface_HW), URBAN)
    lane_HW = share_HW * cover_share(-edge_HW - margin)
    canvas.paint(view, lane_HW, tone((104, 104, 106), surface_HW), URBAN)
    dashes_HW = np.asarray(np.sin(view.line((normal[1], -normal[0]), 0) * 0.55) > 0, dtype=np.float32)
    canvas.paint(view, share_HW * stripe(edge_HW, -margin / 2, 0.4) * dashes_HW * 0.6, (205, 205, 200))
    canvas.paint(view, share_HW * stripe(edge_HW, 0.0, 0.8) * 0.5, (206, 190, 130))
    np.maximum(canvas.road_HW[view.rows, view.cols], lane_HW, out=canvas.road_HW[view.rows, view.cols])


def _car(shape: Convex, edge: int, rng: np.random.Generator) -> tuple[Convex, Color]:
    start, way = shape.points_N2[edge], edges(shape)[edge]
    inwards = -normals(shape)[edge] * shape.margins_N[edge] * rng.choice([0.3, 0.72])
    center = start + way * rng.uniform(0.05, 0.95) + inwards
    colors: list[Color] = [
        (220, 220, 220),
        (60, 62, 66),
        (150, 40, 36),
        (196, 196, 200),
        (60, 80, 130),
        (210, 208, 200),
    ]
    body = rectangle(center, 2.0, 4.6, float(np.arctan2(*way)))
    return body, colors[rng.integers(len(colors))]


def box(canvas: Canvas, shape: Convex, height: float, color: Color, *, cover: int | None = None) -> None:
    """Put a plain box of `height` metres on the ground, with its shadow if it is not flat."""
    way = np.array(canvas.shadow) * height
    view = canvas.view(shape, pad=2 + height * 1.5)
    if view is not None:
        if height:
            canvas.darken(view, cover_share(swept(view, shape, way), 1.5))
        canvas.paint(view, cover_share(distance(view, shape)), color, cover)


def building(
    canvas: Canvas, shape: Convex, height: float, color: Color, rng: np.random.Generator, *, style: str
) -> None:
    """Put up a building with a `gable`, `flat` or `ribbed` roof, its details and its shadow."""
    center, angle, length, depth = frame(shape)
    along, across = axes(angle)
    places_K2 = rng.uniform(-0.36, 0.36, (int(rng.integers(1, 6)) if style == "flat" else 0, 2))
    view = canvas.view(shape, pad=2 + height * 1.1)
    if view is None:
        return
    canvas.darken(view, cover_share(swept(view, shape, np.array(canvas.shadow) * height), 1.5))
    inside_HW, over_HW = distance(view, shape), view.line(across, float(across @ center))
    if style == "gable":
        lit = float(across @ np.array(canvas.shadow)) * 16
        shading_HW = np.where(over_HW > 0, -lit, lit).astype(np.float32) + 6 * stripe(over_HW, 0, 1)
    elif style == "ribbed":
        shading_HW = np.asarray(5 * np.sin(view.line(along, 0) * 1.6), dtype=np.float32)
        shading_HW += 14 * stripe(over_HW, 0, 1.5) + 5 * np.sign(over_HW)
    else:
        shading_HW = 16 * stripe(inside_HW, -0.8, 1.2)
    shading_HW = shading_HW + 3 * canvas.texture("fine", view) + 4 * canvas.texture("cells", view)
    canvas.paint(view, cover_share(inside_HW), tone(color, shading_HW), URBAN)
    for u, v in places_K2:
        box(canvas, rectangle(center + along * (length * u) + across * (depth * v), 3, 4, angle), 2.5, (168, 166, 160))


def trees(canvas: Canvas, points_N2: NDArray[np.float64], rng: np.random.Generator) -> None:
    """Stamp a tree crown with its shadow at every plan point."""
    radii_N = rng.integers(2, 6, len(points_N2))
    brightness_N1, hue_N3 = rng.uniform(0.8, 1.25, (len(points_N2), 1)), rng.normal(0, 5, (len(points_N2), 3))
    tints_N3 = np.array([64, 84, 50]) * brightness_N1 + hue_N3
    pixels_N2 = np.rint(canvas.bend.to_pixels(points_N2)).astype(int)
    for (row, col), radius, tint in zip(pixels_N2, radii_N, tints_N3, strict=True):
        share_HW, light_HW = canvas.stamps[int(radius)]
        down, right = np.rint(np.array(canvas.shadow) * radius * 1.3).astype(int)
        for view, cut in [_stamp(canvas, row + down, col + right, share_HW.shape[0])]:
            if view is not None:
                canvas.darken(view, share_HW[cut] * 0.8)
        for view, cut in [_stamp(canvas, row, col, share_HW.shape[0])]:
            if view is not None:
                canvas.paint(view, share_HW[cut], tone(tint, light_HW[cut]))


def _stamp(canvas: Canvas, row: int, col: int, side: int) -> tuple[View | None, tuple[slice, slice]]:
    top, left = row - side // 2, col - side // 2
    view = canvas.window(top, top + side, left, left + side)
    if view is None:
        return None, (slice(0), slice(0))
    first_row, first_col = view.rows.start - top, view.cols.start + canvas.left - left
    rows = slice(first_row, first_row + view.rows.stop - view.rows.start)
    return view, (rows, slice(first_col, first_col + view.cols.stop - view.cols.start))


def scatter(shape: Convex, rng: np.random.Generator, per_hectare: float) -> NDArray[np.float64]:
    """Return random plan points (N, 2) inside the polygon, about `per_hectare` of them on every 100 m x 100 m."""
    low, high = shape.points_N2.min(axis=0), shape.points_N2.max(axis=0)
    points_N2 = rng.uniform(low, high, (int(np.prod(high - low) * per_hectare / 1e4), 2))
    offsets_N = np.sum(normals(shape) * shape.points_N2, axis=1)
    inside_N = (points_N2 @ normals(shape).T - offsets_N < -3).all(axis=1)
    return np.asarray(points_N2[inside_N])


def avenue(shape: Convex, rng: np.random.Generator, spacing: float) -> NDArray[np.float64]:
    """Return plan points along the polygon's edges, one about every `spacing` metres."""
    inner = shrink(shape, 2.5) or shape
    parts = [np.empty((0, 2))]
    for here, there in zip(inner.points_N2, np.roll(inner.points_N2, -1, axis=0), strict=True):
        steps = np.arange(0, 1, spacing / max(spacing, float(np.hypot(*(there - here)))))
        parts.append(here + (there - here) * steps[:, None] + rng.normal(0, 0.8, (len(steps), 2)))
    points_N2 = np.concatenate(parts)
    return np.asarray(points_N2[rng.random(len(points_N2)) < 0.8])


def crop(canvas: Canvas, shape: Convex, name: str, rng: np.random.Generator) -> None:
    """Paint one farm plot: rows along its longer side, tramlines, a headland, uneven growth."""
    color, cover, strength, period, cultivated = CROPS[name]
    shift = rng.normal(0, 5, 3) + rng.normal(0, 7)
    _, angle, _, _ = frame(shape)
    tram, phase = rng.uniform(16, 24), rng.uniform(0, 6)
    view = canvas.view(shape)
    if view is None:
        return
    inside_HW, over_HW = distance(view, shape), view.line(axes(angle)[1], 0)
    wave_HW = np.where(inside_HW > -7, inside_HW, over_HW + 0.4 * canvas.texture("cells", view))
    rows_HW = np.asarray(np.sin(wave_HW * (2 * np.pi / period) + phase), dtype=np.float32) * strength
    rows_HW += (5 if cultivated else 9) * canvas.texture("soft", view) + 4 * canvas.texture("fine", view)
    rows_HW += (2 if cultivated else 6) * canvas.texture("cells", view)
    if cultivated and name != "tunnels":
        rows_HW -= 10 * np.asarray(np.abs(np.mod(over_HW + phase, tram) - 2) < 0.7, dtype=np.float32)
    red, green, blue = np.array(color) + shift
    canvas.paint(view, cover_share(inside_HW, 1.5), tone((red, green, blue), rows_HW), cover)


def sheet(canvas: Canvas, shape: Convex, color: Color, soil: Color, rng: np.random.Generator) -> None:
    """Lay green netting over the polygon: strips with seams, folds and creases, dust, holes, a ragged outline."""
    _, angle, _, _ = frame(shape)
    strip, offset, fold = rng.uniform(6, 12), rng.uniform(0, 9), rng.uniform(5, 11)
    ragged, torn, dusty = rng.uniform(1.5, 4.5), rng.uniform(1.3, 2.2), rng.uniform(0.05, 0.3)
    shades_K = rng.normal(0, 6, 64).astype(np.float32)
    view = canvas.view(shape, pad=12)
    if view is None:
        return
    lumps_HW, cells_HW, soft_HW = (canvas.texture(name, view) for name in ("lumps", "cells", "soft"))
    along, across = axes(angle)
    across_HW = (view.line(across, offset) + 0.8 * lumps_HW) / np.float32(strip)
    along_HW = view.line(along, 0)
    seam_HW = np.abs(np.mod(across_HW, 1) - 0.5) * np.float32(strip)
    light_HW = shades_K[np.floor(across_HW).astype(int) % 64] - 16 * np.clip(1.2 - seam_HW, 0, 1)
    light_HW += 5 * np.sin(along_HW * np.float32(6.28 / fold) + 1.5 * lumps_HW + 0.7 * cells_HW)
    light_HW += 15 * np.clip(1 - np.abs(lumps_HW + 0.4 * cells_HW) * 9, 0, 1) + slope(canvas, lumps_HW) * 14
    light_HW += 4 * canvas.texture("fine", view) + 6 * soft_HW
    dust_HW = np.clip(np.float32(dusty) * (1 + soft_HW + 0.5 * cells_HW), 0, 0.55)
    holes_HW = np.clip((cells_HW - np.float32(torn)) * 3, 0, 1)
    share_HW = cover_share(distance(view, shape) + np.float32(ragged) * lumps_HW + 2, 1.5) * (1 - holes_HW)
    canvas.paint(view, share_HW, tone(color, light_HW) * (1 - dust_HW) + tone(soil, light_HW * 0.5) * dust_HW, BARREN)
    np.maximum(canvas.netting_HW[view.rows, view.cols], share_HW, out=canvas.netting_HW[view.rows, view.cols])


def slope(canvas: Canvas, height_HW: Floats) -> Floats:
    """Return how much a surface faces the sun: its fall along the shadow's way."""
    down_HW, right_HW = (np.gradient(height_HW, axis=axis) if height_HW.shape[axis] > 1 else 0 for axis in (0, 1))
    return np.asarray(down_HW * canvas.shadow[0] + right_HW * canvas.shadow[1], dtype=np.float32) * -1


def earth(canvas: Canvas, shape: Convex, rng: np.random.Generator) -> Color:
    """Bare a construction site's ground: soil, heaps, tracks of lorries; return the soil's colour."""
    soil = SOILS[rng.integers(len(SOILS))]
    tracks = [(rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2)) for _ in range(5)]
    view = ground(canvas, shape, soil, BARREN, mottle=6)
    if view is None:
        return soil
    share_HW = cover_share(distance(view, shape))
    lumps_HW = canvas.texture("lumps", view)
    canvas.paint(view, share_HW * 0.6, tone(soil, slope(canvas, lumps_HW) * 30 + 6 * canvas.texture("cells", view)))
    low, high = shape.points_N2.min(axis=0), shape.points_N2.max(axis=0)
    for angle, where in tracks:
        normal = axes(angle)[0]
        way_HW = view.line(normal, float(normal @ (low + (high - low) * where))) + 9 * canvas.texture("soft", view)
        wheels_HW = stripe(np.abs(way_HW), 1.8, 1.4)
        canvas.paint(view, share_HW * wheels_HW * 0.35, (206, 190, 164))
    return soil


def piece(shape: Convex, rng: np.random.Generator, parts: int) -> list[Convex]:
    """Cut the polygon into about `parts` pieces without lanes between them."""
    return split(shape, rng, area(shape) / parts * 1.45, (0.0,))


def stadium(view: View, shape: Convex, length: float, radius: float) -> Floats:
    """Return the signed distance to a running track's outer edge, laid along the longer side of `shape`."""
    center, angle, along, across = frame(shape)
    angle += 0 if along >= across else np.pi / 2
    along_way, across_way = axes(angle)
    along_HW = np.abs(view.line(along_way, float(along_way @ center)))
    across_HW = view.line(across_way, float(across_way @ center))
    beyond_HW = np.maximum(along_HW - np.float32(length / 2), 0)
    return np.asarray(np.hypot(beyond_HW, across_HW), dtype=np.float32) - np.float32(radius)


def half(shape: Convex, at: float) -> tuple[Convex, Convex]:
    """Cut across the longer side at the share `at` of it."""
    _, angle, along, across = frame(shape)
    angle += 0 if along >= across else np.pi / 2
    normal = axes(angle)[0]
    reach = shape.points_N2 @ normal
    offset = float(reach.min() + np.ptp(reach) * at)
    return clip(shape, normal, offset, 0.0) or shape, clip(shape, -normal, -offset, 0.0) or shape
