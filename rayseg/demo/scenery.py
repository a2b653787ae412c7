"""Everything in the drawn landscape: roads, buildings, trees, crops, netting, and the kinds of blocks made of them.

All random draws happen before anything is clipped, so an object that two scenes share looks the same in both. Colours
are reflectances 0..255 (red, green, blue), lengths are metres = pixels, angles radians from +col towards +row,
brightness is in percent.
"""

from collections.abc import Callable

import numpy as np

from rayseg.demo import shapes
from rayseg.demo.shapes import (
    Canvas,
    Color,
    Convex,
    Floats,
    Points,
    area,
    avenue,
    axes,
    cover_share,
    frame,
    halves,
    rectangle,
    scatter,
    shrink,
    split,
    stripe,
    tone,
)

URBAN, AGRICULTURE, RANGELAND, FOREST, WATER, BARREN, UNKNOWN = range(7)
Rng = np.random.Generator
Parcels = tuple[tuple[Convex, str], ...]

# name: colour, cover, strength of the rows, distance between rows, cultivated
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
# roofs, courts, turf, ponds and crops have greens close to these, so that no colour alone finds netting
NETS: list[Color] = [(86, 146, 124), (98, 154, 138), (92, 144, 144), (112, 146, 130), (92, 124, 112), (76, 140, 114)]
ROOFS: list[Color] = [(142, 84, 66), (120, 104, 92), (150, 146, 140), (172, 112, 84), (104, 106, 108), (84, 116, 158)]
HALLS: list[Color] = [(86, 122, 164), (90, 148, 130), (204, 204, 200), (150, 152, 152), (142, 98, 82), (82, 138, 112)]
FLATS: list[Color] = [(150, 144, 134), (122, 118, 114), (176, 166, 150), (96, 128, 84), (108, 106, 106), (92, 138, 118)]
COURTS: list[Color] = [(80, 140, 120), (70, 128, 136), (88, 146, 116)]
TURF: list[Color] = [(74, 128, 84), (88, 146, 112), (92, 118, 66)]
GRASS: list[Color] = [(104, 132, 76), (96, 136, 90), (118, 134, 82)]
ALGAE: list[Color] = [(84, 126, 104), (72, 112, 92), (96, 138, 112), (62, 84, 84)]
CARS: list[Color] = [
    (220, 220, 220), (60, 62, 66), (150, 40, 36), (196, 196, 200), (60, 80, 130), (210, 208, 200)
]  # fmt: skip
HUTS: list[Color] = [(74, 116, 176), (214, 214, 210), (180, 150, 116), (150, 84, 66)]


# -- objects -----------------------------------------------------------------------------------------------------------


def ground(canvas: Canvas, shape: Convex, color: Color, cover: int, *, mottle: float = 5) -> tuple[Canvas, Floats]:
    """Fill the polygon with an uneven surface; return its part of the canvas and its share of the pixels there."""
    part = canvas.around(shape)
    inside_HW = cover_share(part.distance(shape))
    part.paint(inside_HW, color, mottle * part.noise["soft"] + mottle * part.noise["fine"], cover)
    return part, inside_HW


def roads(canvas: Canvas, shape: Convex, rng: Rng) -> None:
    """Paint the block's half of the roads around it: pavement, asphalt or concrete, lane marks and cars."""
    ways_N2, normals_N2 = shapes.edges(shape), shapes.normals(shape)
    # 1. where the cars stand, in one of two lanes
    cars = []
    for edge, count in enumerate(rng.integers(0, 9, len(ways_N2)) // np.where(shape.margins_N < 6, 4, 1)):
        for _ in range(count):
            inwards = -normals_N2[edge] * shape.margins_N[edge] * rng.choice([0.3, 0.72])
            center = shape.points_N2[edge] + ways_N2[edge] * rng.uniform(0.05, 0.95) + inwards
            car = rectangle(center, 2.0, 4.6, float(np.arctan2(*ways_N2[edge])))
            cars.append((car, CARS[rng.integers(len(CARS))]))
    # 2. one strip per edge, between the block's outline and its inner polygon
    inner = shrink(shape) or shape
    for normal, point, way, margin in zip(normals_N2, shape.points_N2, ways_N2, shape.margins_N, strict=True):
        inwards = normal * (margin + 3)
        part = canvas.around(shapes.convex([point, point + way, point + way - inwards, point - inwards]))
        edge_HW = part.line(normal, float(normal @ point))
        share_HW = cover_share(part.distance(shape) - 0.6) * cover_share(-edge_HW - (float(margin) + 3))
        share_HW *= 1 - cover_share(part.distance(inner) + 1.5)
        surface_HW = 4 * part.noise["fine"] + 5 * part.noise["soft"]
        if margin < 6:
            part.paint(share_HW, (164, 158, 146), surface_HW, URBAN)
            continue
        part.paint(share_HW * cover_share(edge_HW + float(margin)), (150, 146, 132), surface_HW, URBAN)
        lane_HW = share_HW * cover_share(-edge_HW - float(margin))
        part.paint(lane_HW, (104, 104, 106), surface_HW, URBAN)
        dashes_HW = np.asarray(np.sin(part.line((normal[1], -normal[0])) * 0.55) > 0, dtype=np.float32)
        part.paint(share_HW * stripe(edge_HW, -float(margin) / 2, 0.4) * dashes_HW * 0.6, (205, 205, 200))
        part.paint(share_HW * stripe(edge_HW, 0.0, 0.8) * 0.5, (206, 190, 130))
        np.maximum(part.road_HW, lane_HW, out=part.road_HW)
    for car, color in cars:
        part = canvas.around(car)
        part.paint(cover_share(part.distance(car)), color)


def box(canvas: Canvas, shape: Convex, height: float, color: Color) -> None:
    """Put a plain box of `height` metres on the ground, with its shadow."""
    part = canvas.around(shape, pad=2 + height * 1.5)
    part.darken(cover_share(part.shadow_of(shape, height), 1.5))
    part.paint(cover_share(part.distance(shape)), color)


def building(canvas: Canvas, shape: Convex, height: float, color: Color, rng: Rng, *, style: str) -> None:
    """Put up a building with a `gable`, `flat` or `ribbed` roof, its details and its shadow."""
    center, angle, length, depth = frame(shape)
    along, across = axes(angle)
    # All random numbers are drawn before anything is painted: a building that is cut off leaves the others alike.
    vents_K2 = rng.uniform(-0.36, 0.36, (int(rng.integers(1, 6)) if style == "flat" else 0, 2))
    part = canvas.around(shape, pad=2 + height * 1.1)
    part.darken(cover_share(part.shadow_of(shape, height), 1.5))
    inside_HW, over_HW = part.distance(shape), part.line(across, float(across @ center))
    if style == "gable":
        lit = float(across @ np.array(canvas.shadow)) * 16
        light_HW = np.where(over_HW > 0, -lit, lit).astype(np.float32) + 6 * stripe(over_HW, 0, 1)
    elif style == "ribbed":
        light_HW = np.asarray(5 * np.sin(part.line(along) * 1.6), dtype=np.float32)
        light_HW += 14 * stripe(over_HW, 0, 1.5) + 5 * np.sign(over_HW)
    else:
        light_HW = 16 * stripe(inside_HW, -0.8, 1.2)
    light_HW = light_HW + 3 * part.noise["fine"] + 4 * part.noise["cells"]
    part.paint(cover_share(inside_HW), color, light_HW, URBAN)
    for u, v in vents_K2:
        box(canvas, rectangle(center + along * (length * u) + across * (depth * v), 3, 4, angle), 2.5, (168, 166, 160))


def trees(canvas: Canvas, points_N2: Points, rng: Rng) -> None:
    """Stamp a tree crown with its shadow at every plan point."""
    # Stamps of few sizes are drawn once; a crown of its own for each tree would take minutes.
    radii_N = rng.integers(2, 6, len(points_N2))
    brightness_N1, hue_N3 = rng.uniform(0.8, 1.25, (len(points_N2), 1)), rng.normal(0, 5, (len(points_N2), 3))
    tints_N3 = np.array([64, 84, 50]) * brightness_N1 + hue_N3
    pixels_N2 = np.rint(canvas.bend.to_pixels(points_N2)).astype(int)
    for pixel, radius, tint in zip(pixels_N2, radii_N, tints_N3, strict=True):
        share_HW, light_HW = canvas.stamps[int(radius)]
        side, fall = len(share_HW), np.rint(np.array(canvas.shadow) * radius * 1.3).astype(int)
        for corner, is_shadow in ((pixel + fall - side // 2, True), (pixel - side // 2, False)):
            top, left = corner.tolist()
            part = canvas.window(top, top + side, left, left + side)
            (row, col), (height, width) = part.corner, part.cover_HW.shape
            cut = np.s_[row - top : row - top + height, col - left : col - left + width]
            if is_shadow:
                part.darken(share_HW[cut] * 0.8)
            else:
                part.paint(share_HW[cut], tint, light_HW[cut])


def crop(canvas: Canvas, shape: Convex, name: str, rng: Rng) -> None:
    """Paint one farm plot: rows along its longer side, tramlines, a headland, uneven growth."""
    color, cover, strength, period, cultivated = CROPS[name]
    shift = rng.normal(0, 5, 3) + rng.normal(0, 7)
    tram, phase = rng.uniform(16, 24), rng.uniform(0, 6)
    part = canvas.around(shape)
    inside_HW, over_HW, noise = part.distance(shape), part.line(axes(frame(shape)[1])[1]), part.noise
    wave_HW = np.where(inside_HW > -7, inside_HW, over_HW + 0.4 * noise["cells"])
    light_HW = np.asarray(np.sin(wave_HW * (2 * np.pi / period) + phase), dtype=np.float32) * strength
    light_HW += (5 if cultivated else 9) * noise["soft"] + 4 * noise["fine"]
    light_HW += (2 if cultivated else 6) * noise["cells"]
    if cultivated and name != "tunnels":
        light_HW -= 10 * np.asarray(np.abs(np.mod(over_HW + phase, tram) - 2) < 0.7, dtype=np.float32)
    part.paint(cover_share(inside_HW, 1.5), np.array(color) + shift, light_HW, cover)


def sheet(canvas: Canvas, shape: Convex, color: Points, soil: Color, rng: Rng) -> None:
    """Lay green netting over the polygon: strips with seams, folds and creases, dust, holes, a ragged outline."""
    strip, offset, fold = rng.uniform(6, 12), rng.uniform(0, 9), rng.uniform(5, 11)
    ragged, torn, dusty = rng.uniform(1.5, 4.5), rng.uniform(1.3, 2.2), rng.uniform(0.05, 0.3)
    shades_K = rng.normal(0, 6, 64).astype(np.float32)
    part, (along, across) = canvas.around(shape, pad=12), axes(frame(shape)[1])
    lumps_HW, cells_HW, soft_HW = (part.noise[name] for name in ("lumps", "cells", "soft"))
    # 1. brightness: strips of different shades, dark seams, wavy folds, bright creases, humps lit by the sun
    across_HW = (part.line(across, offset) + 0.8 * lumps_HW) / np.float32(strip)
    seam_HW = np.abs(np.mod(across_HW, 1) - 0.5) * np.float32(strip)
    light_HW = shades_K[np.floor(across_HW).astype(int) % 64] - 16 * np.clip(1.2 - seam_HW, 0, 1)
    light_HW += 5 * np.sin(part.line(along) * np.float32(6.28 / fold) + 1.5 * lumps_HW + 0.7 * cells_HW)
    light_HW += 15 * np.clip(1 - np.abs(lumps_HW + 0.4 * cells_HW) * 9, 0, 1) + part.noise["slope"] * 14
    light_HW += 4 * part.noise["fine"] + 6 * soft_HW
    # 2. the share of netting, without its holes, and the dust on it
    dust_HW = np.clip(np.float32(dusty) * (1 + soft_HW + 0.5 * cells_HW), 0, 0.55)
    holes_HW = np.clip((cells_HW - np.float32(torn)) * 3, 0, 1)
    share_HW = cover_share(part.distance(shape) + np.float32(ragged) * lumps_HW + 2, 1.5) * (1 - holes_HW)
    dusty_CHW = tone(color, light_HW) * (1 - dust_HW) + tone(soil, light_HW * 0.5) * dust_HW
    part.paint(share_HW, dusty_CHW, cover=BARREN)
    np.maximum(part.netting_HW, share_HW, out=part.netting_HW)


def earth(canvas: Canvas, shape: Convex, rng: Rng) -> Color:
    """Bare a construction site's ground: soil, heaps, tracks of lorries; return the soil's colour."""
    soil = SOILS[rng.integers(len(SOILS))]
    tracks = [(rng.uniform(0, np.pi), rng.uniform(0.2, 0.8, 2)) for _ in range(5)]
    part, inside_HW = ground(canvas, shape, soil, BARREN, mottle=6)
    part.paint(inside_HW * 0.6, soil, part.noise["slope"] * 30 + 6 * part.noise["cells"])
    low, high = shape.points_N2.min(axis=0), shape.points_N2.max(axis=0)
    for angle, share in tracks:
        normal = axes(angle)[0]
        way_HW = part.line(normal, float(normal @ (low + (high - low) * share))) + 9 * part.noise["soft"]
        part.paint(inside_HW * stripe(np.abs(way_HW), 1.8, 1.4) * 0.35, (206, 190, 164))
    return soil


# -- kinds of blocks ---------------------------------------------------------------------------------------------------


def fields(canvas: Canvas, shape: Convex, parcels: Parcels, rng: Rng) -> None:
    """Farm plots side by side on grass, a hedge along part of the edge."""
    ground(canvas, shrink(shape) or shape, (120, 122, 82), RANGELAND)
    for parcel, name in parcels:
        crop(canvas, parcel, name, rng)
    hedge_N2 = avenue(shape._replace(margins_N=shape.margins_N + 1), rng, 9)
    trees(canvas, hedge_N2[: rng.integers(0, len(hedge_N2) + 1)], rng)


def _houses(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """Small houses with pitched roofs, each on its lot, among trees."""
    ground(canvas, inner, (140, 132, 108), URBAN)
    for lot in split(inner, rng, 760, (2.5, 1.0, 0.4)):
        roof = ROOFS[rng.integers(len(ROOFS))]
        footprint, height = shrink(lot, rng.uniform(1.6, 4.5)), rng.uniform(4, 7)
        if rng.random() < 0.88 and footprint is not None and area(footprint) > 50:
            building(canvas, footprint, height, roof, rng, style="gable")
    trees(canvas, scatter(inner, rng, 14), rng)


def _city(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """Tall flat-roofed buildings on lawns and paving."""
    ground(canvas, inner, (138, 136, 130), URBAN)
    for lot in split(inner, rng, 3600, (4.0, 3.0, 2.0)):
        lawn, footprint = shrink(lot, 2.5), shrink(lot, rng.uniform(7, 11))
        color, height = FLATS[rng.integers(len(FLATS))], rng.uniform(9, 30)
        if lawn is not None and rng.random() < 0.6:
            ground(canvas, lawn, (98, 114, 72), URBAN)
        if footprint is not None and area(footprint) > 150:
            building(canvas, footprint, height, color, rng, style="flat")
    trees(canvas, np.concatenate([scatter(inner, rng, 12), avenue(inner, rng, 8)]), rng)


def _industry(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """Large halls on concrete, some with roofs as green as netting."""
    ground(canvas, inner, (158, 152, 142), URBAN)
    for lot in split(inner, rng, 6500, (5.0, 3.0)):
        footprint = shrink(lot, rng.uniform(4, 8))
        color, height = HALLS[rng.integers(len(HALLS))], rng.uniform(7, 13)
        if footprint is not None and area(footprint) > 200:
            building(canvas, footprint, height, color, rng, style="ribbed")
    trees(canvas, avenue(inner, rng, 12), rng)


def _sport(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """A running track around a lined pitch, green courts with white lines, a school."""
    ground(canvas, inner, (150, 146, 134), URBAN)
    field, rest = halves(inner, rng.uniform(0.55, 0.65))
    courts, school = halves(rest, 0.55)
    # 1. the track and its pitch along the longer side of the field
    center, angle, length, depth = frame(field)
    angle += 0 if length >= depth else np.pi / 2
    along, across = axes(angle)
    radius = min(length, depth) * 0.42
    straight, turf = max(max(length, depth) - 2.3 * radius, 8), rng.choice(TURF)
    part = canvas.around(field)
    along_HW, over_HW = part.line(along, float(along @ center)), part.line(across, float(across @ center))
    fine_HW = part.noise["fine"]
    beyond_HW = np.maximum(np.abs(along_HW) - np.float32(straight / 2), 0)
    edge_HW = np.asarray(np.hypot(beyond_HW, over_HW), dtype=np.float32) - np.float32(radius)
    part.paint(cover_share(edge_HW), (164, 88, 74), 3 * fine_HW, URBAN)
    for lane in range(4):
        part.paint(stripe(edge_HW, -1.2 - 2.4 * lane, 0.3), (214, 206, 200))
    turf_HW = cover_share(edge_HW + 11)
    part.paint(turf_HW, turf, 5 * np.sign(np.sin(part.line(along) * 0.55)) + 3 * fine_HW)
    pitch_HW = part.distance(rectangle(center, 1.15 * (radius - 11), straight + 0.6 * radius, angle))
    marks_HW = np.maximum(stripe(pitch_HW, 0, 1), stripe(along_HW, 0, 1) * cover_share(pitch_HW))
    marks_HW = np.maximum(marks_HW, stripe(np.hypot(along_HW, over_HW) - np.float32(8), 0, 1))
    part.paint(marks_HW * turf_HW * 0.85, (226, 228, 222))
    # 2. the courts
    color = COURTS[rng.integers(len(COURTS))]
    surround: Color = (150, 92, 78) if rng.random() < 0.5 else (70, 118, 84)
    ground(canvas, shrink(courts, 4) or courts, surround, URBAN)
    for lot in split(shrink(courts, 6) or courts, rng, 620, (2.0,)):
        court = shrink(lot, 0.5) or lot
        part, (center, angle, *_) = canvas.around(court), frame(court)
        edge_HW, along = part.distance(court), axes(angle)[0]
        part.paint(cover_share(edge_HW), color, 3 * part.noise["fine"], URBAN)
        net_HW = stripe(part.line(along, float(along @ center)), 0, 1) * cover_share(edge_HW + 2)
        part.paint(np.maximum(stripe(edge_HW, -2.5, 1), net_HW) * 0.9, (228, 230, 226))
    # 3. the school
    footprint = shrink(school, 8)
    if footprint is not None:
        building(canvas, footprint, 14, ROOFS[rng.integers(len(ROOFS))], rng, style="flat")
    trees(canvas, avenue(inner, rng, 9), rng)


def _park(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """A meadow with a pond under algae, winding paths, groups of trees."""
    grass, algae = GRASS[rng.integers(len(GRASS))], ALGAE[rng.integers(len(ALGAE))]
    center, angle, _, depth = frame(inner)
    along, across = axes(angle)
    pond = center + rng.uniform(-0.12, 0.12, 2) * depth
    wide, high = depth * rng.uniform(0.2, 0.34), depth * rng.uniform(0.14, 0.26)
    winding = rng.uniform(8, 16)
    part, inside_HW = ground(canvas, inner, grass, RANGELAND, mottle=6)
    soft_HW, lumps_HW = part.noise["soft"], part.noise["lumps"]
    path_HW = part.line(across, float(across @ center)) + np.float32(winding) * soft_HW + np.float32(depth * 0.3)
    part.paint(stripe(path_HW, 0, 2.5) * inside_HW, (190, 180, 160))
    # The pond is an ellipse with a shore of mud, rough by noise.
    along_HW, over_HW = part.line(along, float(along @ pond)), part.line(across, float(across @ pond))
    shore_HW = (np.hypot(along_HW / wide, over_HW / high) - 1) * min(wide, high) + 3 * lumps_HW
    shore_HW = np.asarray(shore_HW, dtype=np.float32)
    part.paint(cover_share(shore_HW - 2, 3), (140, 128, 98))
    part.paint(cover_share(shore_HW, 1.5), algae, 9 * soft_HW + 7 * lumps_HW + 2 * part.noise["fine"], WATER)
    points_N2 = scatter(inner, rng, 28)
    trees(canvas, points_N2[np.hypot(*(points_N2 - pond).T) > 1.15 * max(wide, high)], rng)


def _range(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """Rough pasture: patches of dry grass and green, shrubs."""
    part, inside_HW = ground(canvas, inner, (146, 134, 92), RANGELAND, mottle=5)
    patches_HW = np.clip(0.5 + 0.5 * part.noise["soft"] + 0.25 * part.noise["cells"], 0, 1)
    part.paint(patches_HW * inside_HW, (106, 122, 72), 6 * part.noise["cells"] + 5 * part.noise["fine"])
    trees(canvas, scatter(inner, rng, rng.uniform(8, 30)), rng)


def _forest(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """A closed canopy with a ragged edge."""
    hue = np.array([58, 82, 50]) * rng.uniform(0.88, 1.2) + rng.normal(0, 3, 3)
    part, _ = ground(canvas, inner, (106, 116, 76), RANGELAND)
    edge_HW = part.distance(inner) + 3 + 3 * part.noise["lumps"] + 2 * part.noise["cells"]
    light_HW = part.noise["canopy"] + 7 * part.noise["soft"] + 4 * part.noise["fine"]
    part.darken(cover_share(edge_HW - 3, 3) * 0.5)
    part.paint(cover_share(edge_HW, 2), hue, light_HW, FOREST)


def _site(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """A construction site without netting: bare earth, a pit, huts, a shell."""
    earth(canvas, inner, rng)
    # About three lots: halving ends between half the limit and the limit.
    for lot in split(inner, rng, area(inner) / 3 * 1.45, (0.0,)):
        _works(canvas, lot, rng)


def _nets(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """A construction site whose bare earth lies largely under green netting, its largest piece always."""
    soil = earth(canvas, inner, rng)
    color = np.array(NETS[rng.integers(len(NETS))]) + rng.normal(0, 5, 3)
    work, covered = halves(shrink(inner, 3) or inner, rng.uniform(0.18, 0.45))
    lots = split(covered, rng, area(covered) / int(rng.integers(2, 5)) * 1.45, (0.0,))
    laid = rng.random(len(lots)) < 0.78
    laid[int(np.argmax([area(lot) for lot in lots]))] = True
    for lot, here in zip(lots, laid, strict=True):
        shape, lighter = shrink(lot, rng.uniform(1.0, 5)), rng.normal(0, 6)
        if here and shape is not None:
            sheet(canvas, shape, color + lighter, soil, rng)
    _works(canvas, work, rng)
    trees(canvas, scatter(inner, rng, rng.uniform(0, 6)), rng)


def _works(canvas: Canvas, inner: Convex, rng: Rng) -> None:
    """Building work: a sunken pit or a rising shell, rows of huts, heaps of material."""
    huts, shell = halves(inner, rng.uniform(0.3, 0.5))
    pit, height = rng.random() < 0.4, rng.uniform(6, 24)
    floor = shrink(shell, rng.uniform(7, 11))
    if floor is not None and area(floor) > 100:
        if pit:
            ground(canvas, floor, (112, 94, 76), BARREN, mottle=8)
        else:
            building(canvas, floor, height, (162, 160, 154), rng, style="ribbed")
    for point in scatter(huts, rng, 22):
        color = HUTS[rng.integers(len(HUTS))]
        box(canvas, rectangle(point, rng.uniform(2.5, 5), rng.uniform(5, 13), frame(huts)[1]), 3.0, color)


PAINTERS: dict[str, Callable[[Canvas, Convex, Rng], None]] = {
    "houses": _houses,
    "city": _city,
    "industry": _industry,
    "sport": _sport,
    "park": _park,
    "range": _range,
    "forest": _forest,
    "site": _site,
    "nets": _nets,
}
