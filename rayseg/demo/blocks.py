"""How each kind of block in the drawn landscape is filled.

A painter takes the canvas, the block's inner polygon and the block's own random generator, and draws all it needs from
the generator before anything is clipped.
"""

from collections.abc import Callable

import numpy as np

from rayseg.demo.scenery import (
    BARREN,
    COURTS,
    FLATS,
    FOREST,
    HALLS,
    NETS,
    RANGELAND,
    ROOFS,
    URBAN,
    WATER,
    avenue,
    box,
    building,
    crop,
    earth,
    ground,
    half,
    piece,
    scatter,
    sheet,
    stadium,
    tone,
    trees,
)
from rayseg.demo.shapes import (
    Canvas,
    Color,
    Convex,
    area,
    axes,
    cover_share,
    distance,
    frame,
    rectangle,
    shrink,
    split,
    stripe,
)


def fields(canvas: Canvas, shape: Convex, parcels: tuple[tuple[Convex, str], ...], rng: np.random.Generator) -> None:
    """Farm plots side by side on grass, a hedge along part of the edge."""
    ground(canvas, shrink(shape) or shape, (120, 122, 82), RANGELAND)
    for parcel, name in parcels:
        crop(canvas, parcel, name, rng)
    hedge_N2 = avenue(shape._replace(margins_N=shape.margins_N + 1), rng, 9)
    trees(canvas, hedge_N2[: rng.integers(0, len(hedge_N2) + 1)], rng)


def _houses(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """Small houses with pitched roofs, each on its lot, among trees."""
    ground(canvas, inner, (140, 132, 108), URBAN)
    for lot in split(inner, rng, 760, (2.5, 1.0, 0.4)):
        roof = ROOFS[rng.integers(len(ROOFS))]
        size, height, built = rng.uniform(1.6, 4.5), rng.uniform(4, 7), rng.random() < 0.88
        footprint = shrink(lot, size)
        if built and footprint is not None and area(footprint) > 50:
            building(canvas, footprint, height, roof, rng, style="gable")
    trees(canvas, scatter(inner, rng, 14), rng)


def _city(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
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


def _industry(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """Large halls on concrete, some with roofs as green as netting."""
    ground(canvas, inner, (158, 152, 142), URBAN)
    for lot in split(inner, rng, 6500, (5.0, 3.0)):
        footprint = shrink(lot, rng.uniform(4, 8))
        color, height = HALLS[rng.integers(len(HALLS))], rng.uniform(7, 13)
        if footprint is not None and area(footprint) > 200:
            building(canvas, footprint, height, color, rng, style="ribbed")
    trees(canvas, avenue(inner, rng, 12), rng)


def _sport(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """A running track around a lined pitch, green courts with white lines, a school."""
    ground(canvas, inner, (150, 146, 134), URBAN)
    track, rest = half(inner, rng.uniform(0.55, 0.65))
    _track(canvas, track, rng)
    courts, school = half(rest, 0.55)
    color = COURTS[rng.integers(len(COURTS))]
    surround: Color = (150, 92, 78) if rng.random() < 0.5 else (70, 118, 84)
    ground(canvas, shrink(courts, 4) or courts, surround, URBAN)
    for court in split(shrink(courts, 6) or courts, rng, 620, (2.0,)):
        _court(canvas, shrink(court, 0.5) or court, color)
    footprint = shrink(school, 8)
    if footprint is not None:
        building(canvas, footprint, 14, ROOFS[rng.integers(len(ROOFS))], rng, style="flat")
    trees(canvas, avenue(inner, rng, 9), rng)


def _track(canvas: Canvas, shape: Convex, rng: np.random.Generator) -> None:
    _, _, along, across = frame(shape)
    radius = min(along, across) * 0.42
    length, turf = max(max(along, across) - 2.3 * radius, 8), rng.choice([(74, 128, 84), (88, 146, 112), (92, 118, 66)])
    view = canvas.view(shape)
    if view is None:
        return
    edge_HW = stadium(view, shape, length, radius)
    fine_HW = canvas.texture("fine", view)
    canvas.paint(view, cover_share(edge_HW), tone((164, 88, 74), 3 * fine_HW), URBAN)
    for lane in range(4):
        canvas.paint(view, stripe(edge_HW, -1.2 - 2.4 * lane, 0.3), (214, 206, 200))
    field_HW = cover_share(edge_HW + 11)
    center, angle, along, across = frame(shape)
    angle += 0 if along >= across else np.pi / 2
    down, _ = axes(angle)
    pitch = rectangle(center, 1.15 * (radius - 11), length + 0.6 * radius, angle)
    mown_HW = 5 * np.sign(np.sin(view.line(down, 0) * 0.55)) + 3 * fine_HW
    canvas.paint(view, field_HW, tone(turf, mown_HW))
    line_HW = distance(view, pitch)
    middle_HW = view.line(down, float(center @ down))
    marks_HW = np.maximum(stripe(line_HW, 0, 1), stripe(middle_HW, 0, 1) * cover_share(line_HW))
    marks_HW = np.maximum(marks_HW, stripe(stadium(view, shape, 0, 8), 0, 1))
    canvas.paint(view, marks_HW * field_HW * 0.85, (226, 228, 222))


def _court(canvas: Canvas, shape: Convex, color: Color) -> None:
    view = canvas.view(shape)
    if view is None:
        return
    center, angle, _, _ = frame(shape)
    edge_HW = distance(view, shape)
    canvas.paint(view, cover_share(edge_HW), tone(color, 3 * canvas.texture("fine", view)), URBAN)
    along, _ = axes(angle)
    net_HW = stripe(view.line(along, float(along @ center)), 0, 1) * cover_share(edge_HW + 2)
    canvas.paint(view, np.maximum(stripe(edge_HW, -2.5, 1), net_HW) * 0.9, (228, 230, 226))


def _park(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """A meadow with a pond under algae, winding paths, groups of trees."""
    grass = [(104, 132, 76), (96, 136, 90), (118, 134, 82)][rng.integers(3)]
    algae = [(84, 126, 104), (72, 112, 92), (96, 138, 112), (62, 84, 84)][rng.integers(4)]
    center, angle, _, across = frame(inner)
    spot = center + rng.uniform(-0.12, 0.12, 2) * across
    wide, high = across * rng.uniform(0.2, 0.34), across * rng.uniform(0.14, 0.26)
    bend = rng.uniform(8, 16)
    view = ground(canvas, inner, grass, RANGELAND, mottle=6)
    if view is not None:
        soft_HW = canvas.texture("soft", view)
        down, over = axes(angle)
        path_HW = view.line(over, float(over @ center))
        path_HW = path_HW + np.float32(bend) * soft_HW + np.float32(across * 0.3)
        canvas.paint(view, stripe(path_HW, 0, 2.5) * cover_share(distance(view, inner)), (190, 180, 160))
        along_HW = view.line(down, float(down @ spot))
        over_HW = view.line(over, float(over @ spot))
        shore_HW = (np.hypot(along_HW / wide, over_HW / high) - 1) * min(wide, high) + 3 * canvas.texture("lumps", view)
        shore_HW = np.asarray(shore_HW, dtype=np.float32)
        canvas.paint(view, cover_share(shore_HW - 2, 3), (140, 128, 98))
        scum_HW = 9 * soft_HW + 7 * canvas.texture("lumps", view) + 2 * canvas.texture("fine", view)
        canvas.paint(view, cover_share(shore_HW, 1.5), tone(algae, scum_HW), WATER)
    dry = [p for p in scatter(inner, rng, 28) if np.hypot(*(p - spot)) > 1.15 * max(wide, high)]
    trees(canvas, np.array(dry).reshape(-1, 2), rng)


def _range(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """Rough pasture: patches of dry grass and green, shrubs."""
    dry, green = (146, 134, 92), (106, 122, 72)
    view = ground(canvas, inner, dry, RANGELAND, mottle=5)
    if view is not None:
        patches_HW = np.clip(0.5 + 0.5 * canvas.texture("soft", view) + 0.25 * canvas.texture("cells", view), 0, 1)
        color_CHW = tone(green, 6 * canvas.texture("cells", view) + 5 * canvas.texture("fine", view))
        canvas.paint(view, patches_HW * cover_share(distance(view, inner)), color_CHW)
    trees(canvas, scatter(inner, rng, rng.uniform(8, 30)), rng)


def _forest(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """A closed canopy with a ragged edge."""
    hue = np.array([58, 82, 50]) * rng.uniform(0.88, 1.2) + rng.normal(0, 3, 3)
    ground(canvas, inner, (106, 116, 76), RANGELAND)
    view = canvas.view(inner)
    if view is not None:
        edge_HW = distance(view, inner) + 3 + 3 * canvas.texture("lumps", view) + 2 * canvas.texture("cells", view)
        light_HW = canvas.texture("canopy", view) + 7 * canvas.texture("soft", view) + 4 * canvas.texture("fine", view)
        canvas.darken(view, cover_share(edge_HW - 3, 3) * 0.5)
        canvas.paint(view, cover_share(edge_HW, 2), tone((hue[0], hue[1], hue[2]), light_HW), FOREST)


def _site(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """A construction site without netting: bare earth, a pit, huts, a shell."""
    earth(canvas, inner, rng)
    for lot in piece(inner, rng, 3):
        _works(canvas, lot, rng)


def _nets(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """A construction site whose bare earth lies largely under green netting."""
    soil = earth(canvas, inner, rng)
    color = tuple(np.array(NETS[rng.integers(len(NETS))]) + rng.normal(0, 5, 3))
    work, covered = half(shrink(inner, 3) or inner, rng.uniform(0.18, 0.45))
    lots = piece(covered, rng, int(rng.integers(2, 5)))
    laid = rng.random(len(lots)) < 0.78
    laid[int(np.argmax([area(lot) for lot in lots]))] = True
    for lot, here in zip(lots, laid, strict=True):
        inset, lighter = rng.uniform(1.0, 5), rng.normal(0, 6)
        shape = shrink(lot, inset)
        if here and shape is not None:
            sheet(canvas, shape, (color[0] + lighter, color[1] + lighter, color[2] + lighter), soil, rng)
    _works(canvas, work, rng)
    trees(canvas, scatter(inner, rng, rng.uniform(0, 6)), rng)


def _works(canvas: Canvas, inner: Convex, rng: np.random.Generator) -> None:
    """Building work: a sunken pit or a rising shell, rows of huts, heaps of material."""
    huts, shell = half(inner, rng.uniform(0.3, 0.5))
    pit, height = rng.random() < 0.4, rng.uniform(6, 24)
    floor = shrink(shell, rng.uniform(7, 11))
    if floor is not None and area(floor) > 100:
        if pit:
            ground(canvas, floor, (112, 94, 76), BARREN, mottle=8)
        else:
            building(canvas, floor, height, (162, 160, 154), rng, style="ribbed")
    _, angle, _, _ = frame(huts)
    for point in scatter(huts, rng, 22):
        color: Color = [(74, 116, 176), (214, 214, 210), (180, 150, 116), (150, 84, 66)][rng.integers(4)]
        box(canvas, rectangle(point, rng.uniform(2.5, 5), rng.uniform(5, 13), angle), 3.0, color)


Painter = Callable[[Canvas, Convex, np.random.Generator], None]
PAINTERS: dict[str, Painter] = {
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
