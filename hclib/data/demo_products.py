"""The three rendered products of the demo set: a gear, a blister pack and a circuit board.

Each is a scene as `hclib.data.demo_parts` describes it; the split has no effect on a product.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from hclib.data.demo_parts import (
    SIZE,
    Array,
    Colour,
    Flaw,
    Point,
    X,
    Y,
    blot,
    box,
    clouds,
    cover,
    exposed,
    near,
    paint,
    path_distance,
    relief,
    shade,
    shadow,
    turned,
    wander,
)


def _scratch(image: Array, flaw: Flaw, middle: Point, light: float, length: float) -> Array:
    """Cut a scratch: a bright burr beside a dark groove."""
    line = wander(flaw.rng, middle, length, 0.15)
    width, depth = flaw.between(0.5, 1.5), flaw.between(0.14, 0.5)
    burr = line - 1.2 * np.array([np.cos(light), np.sin(light)])
    cut = cover(path_distance(burr) - width) - cover(path_distance(line) - width)
    return image + depth * cut[..., None]


# ------------------------------------------------------------------------------------------------------- gear

TEETH, TIP, ROOT = 15, 107.0, 87.0


def _gear_outline(r: Array, theta: Array, flaw: Flaw | None) -> Array:
    """Return the signed distance to the toothed rim; a broken or bent tooth is part of it."""
    place = (theta / (2 * np.pi) * TEETH) % TEETH
    phase, tip, rise = place % 1 - 0.5, np.full(r.shape, TIP), np.clip((r - ROOT) / (TIP - ROOT), 0, 1)
    if flaw and flaw.kind in ("broken_tooth", "bent_tooth"):
        tooth, side = np.floor(place) == flaw.rng.integers(TEETH), flaw.rng.choice([-1, 1])
        if flaw.kind == "broken_tooth":
            fracture = TIP - flaw.between(5, 18) + side * flaw.between(4, 14) * phase + 0.4 * np.sin(phase * 31)
            tip = np.where(tooth, np.minimum(fracture, TIP), TIP)
        else:
            phase = phase - np.where(tooth, side * flaw.between(0.14, 0.42) * rise, 0)
    flank = (np.abs(phase) - (0.29 - 0.13 * rise)) * (2 * np.pi * r / TEETH)
    return np.maximum(r - tip, np.minimum(r - ROOT, flank))


def draw_gear(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Render a turned steel gear, in any rotation, on a rubber mat."""
    spin, scale, light = rng.uniform(0, 2 * np.pi), rng.normal(1, 0.012), rng.normal(-2.2, 0.12)
    middle, tone = rng.normal(0, 2.0, 2), rng.normal(0.60, 0.015)
    rings, grime = rng.standard_normal(100), clouds(rng, 28)
    mat = 0.17 + 0.004 * clouds(rng, 40) + 0.018 * clouds(rng, 3.2)

    x, y = (X - middle[0]) / scale, (Y - middle[1]) / scale
    r, (u, v) = np.hypot(x, y), turned(x, y, spin)
    drilled = [(52 * np.cos(a), 52 * np.sin(a), 11.0) for a in 0.3 + 2 * np.pi / 5 * np.arange(5)]
    if flaw and flaw.kind == "extra_hole":
        a, away = flaw.rng.uniform(0, 2 * np.pi), flaw.rng.uniform(74, 82)
        drilled.append((away * np.cos(a), away * np.sin(a), flaw.between(3.5, 6.5)))
    open_ = np.minimum(r - 15, box(u - 15, v, 6, 4))  # the bore with its keyway
    for hx, hy, radius in drilled:
        open_ = np.minimum(open_, np.hypot(u - hx, v - hy) - radius)
    solid = np.maximum(_gear_outline(r, np.arctan2(v, u), flaw), -open_)
    metal, web = cover(solid), cover(np.abs(r - 52) - 21, 4)  # the web is turned 3 px deep

    wedge = np.abs(np.cos(np.arctan2(y, x) - light)) ** 6 * np.clip(r / 20, 0, 1)  # a lathe's cut glints so
    steel = tone + 0.24 * wedge + 0.013 * np.interp(r, 1.3 * np.arange(100), rings) + 0.008 * grime - 0.06 * web
    steel = steel + relief(2.6 * np.clip(-solid / 3, 0, 1) - 3 * web, light, 0.22)
    body = shade((0.97, 1.0, 1.04), np.clip(steel, 0.05, 1.1))
    if flaw and flaw.kind in ("scratch", "rust"):
        a, away = flaw.rng.uniform(0, 2 * np.pi), flaw.rng.uniform(30, 88)
        at = middle + away * np.array([np.cos(a), np.sin(a)])
        if flaw.kind == "scratch":
            body = _scratch(body, flaw, at, light, flaw.between(16, 60))
        else:
            rust = cover(blot(flaw.rng, at, flaw.between(5, 15), 0.5), 7)
            rust *= np.clip(0.7 + 0.3 * clouds(flaw.rng, 4), 0, 1)
            body = paint(body, flaw.between(0.25, 0.8) * rust, (0.42, 0.24, 0.12))
    floor = shade((0.95, 1.0, 1.08), mat * shadow(metal, light, 6, 0.55))
    return exposed(paint(floor, metal, body), rng)


# ---------------------------------------------------------------------------------------------------- blister


def _tablet(image: Array, x: Array, y: Array, turn: float, tint: Array, light: float, flaw: Flaw | None) -> Array:
    """Draw one scored tablet; a flaw given here is this tablet's."""
    disc = np.hypot(x, y) - 15.5
    if flaw and flaw.kind == "broken_pill":
        bx, by = turned(x, y, flaw.rng.uniform(0, 2 * np.pi))
        first, second = flaw.rng.uniform(0, 6, 2)
        wave = 1.2 * np.sin(by * 0.33 + first) + 0.5 * np.sin(by * 0.9 + second)
        disc = np.maximum(disc, bx - flaw.between(10, -3) + wave)
    if flaw and flaw.kind == "wrong_colour":
        other = flaw.pick((0.62, 0.75, 0.86), (0.95, 0.84, 0.55), (0.80, 0.86, 0.70))
        tint = tint + flaw.between(0.25, 1.0) * (other - tint)
    body, crown = cover(disc, 1.2), np.clip(-disc / 5, 0, 1)
    score = cover(np.maximum(np.abs(turned(x, y, turn)[1]) - 0.9, disc + 2), 1.2)
    tone = 0.80 + 0.20 * crown + relief(2.2 * crown, light, 0.20) - 0.16 * score
    return paint(shade(image, shadow(body, light, 2.5, 0.45)), body, shade(tint, tone))


def _dome(x: Array, y: Array, light: float) -> Array:
    """Return the brightness that a clear pocket adds: its rim and one glint."""
    r, lx, ly = np.hypot(x, y), np.cos(light), np.sin(light)
    rim = np.clip(1 - np.abs(r - 20.5) / 2.2, 0, 1) * (0.16 * (x * lx + y * ly) / np.maximum(r, 1) + 0.03)
    return rim + 0.30 * np.exp(-((x - 9 * lx) ** 2 + (y - 9 * ly) ** 2) / 9)


def draw_blister(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Render a blister pack of twelve tablets on a bench."""
    tilt, light, shift = rng.normal(0, 0.02), rng.normal(-2.2, 0.15), rng.normal(0, 2, 2)
    turns, seats = rng.uniform(0, np.pi, 12), rng.normal(0, 0.8, (12, 2))
    tint = np.array([0.93, 0.88, 0.84]) + rng.normal(0, 0.006, 3)
    crumple, desk, grain = clouds(rng, 24), clouds(rng, 60), clouds(rng, 2.5)

    u, v = turned(X - shift[0], Y - shift[1], tilt)
    edge = box(u, v, 114, 92, 10)
    foil = 0.60 + 0.02 * np.sin((u + v) * 0.9) * np.sin((u - v) * 0.9) + 0.008 * grain  # embossed
    foil = foil + relief(2.2 * crumple, light, 0.12) + 0.10 * np.clip(1 + edge / 4, 0, 1)
    sheet, card = shade((0.98, 1.0, 1.03), foil), cover(edge)
    chosen = int(flaw.rng.integers(12)) if flaw else -1
    for k in range(12):
        at = shift + turned((k % 4 - 1.5) * 52, (k // 4 - 1) * 54, -tilt)
        window = near(*at, 27)
        x, y = X[window] - at[0] - seats[k, 0], Y[window] - at[1] - seats[k, 1]
        own = flaw if k == chosen else None
        if not (own and own.kind == "missing_pill"):
            sheet[window] = _tablet(sheet[window], x, y, turns[k], tint, light, own)
        sheet[window] += _dome(x, y, light)[..., None]
    bench = shade((0.85, 0.98, 1.12), 0.30 + 0.005 * desk + 0.010 * grain)
    image = paint(shade(bench, shadow(card, light, 5, 0.45)), card, sheet)
    if flaw and flaw.kind == "fibre":
        line, width = wander(flaw.rng, flaw.spot(70), flaw.between(25, 80), 1.6), flaw.between(0.6, 1.4)
        image = shade(image, 1 - 0.35 * cover(path_distance(line + 1.8) - width, 2.5))
        hair = cover(path_distance(line) - width)
        image = paint(image, flaw.between(0.55, 0.95) * hair, (0.16, 0.12, 0.10))
    if flaw and flaw.kind == "tear":
        at, length = flaw.spot(80), flaw.between(12, 44)
        away = np.hypot(X - at[0], Y - at[1]) / (0.55 * length)
        slit = path_distance(wander(flaw.rng, at, length, 0.4, 0.25)) - flaw.between(0.9, 3.2) * (1 - away**2)
        lip = cover(np.abs(slit - 1.2) - 0.6) * (away < 1)
        image = image + flaw.between(0.08, 0.25) * lip[..., None]
        image = paint(image, flaw.between(0.4, 0.9) * cover(slit, 1.5), (0.14, 0.13, 0.13))
    return exposed(image, rng)


# ------------------------------------------------------------------------------------------------------ board

# Parts in board coordinates (pixels from the middle, y down): kind, x, y, half width, half height.
PARTS = (
    ("chip", -38, -30, 36, 20), ("chip", 56, 34, 22, 20),
    ("resistor", 44, -80, 12, 6), ("resistor", 80, -80, 12, 6), ("resistor", 44, -60, 12, 6),
    ("resistor", 80, -60, 12, 6), ("resistor", -88, 20, 6, 12), ("resistor", -68, 20, 6, 12),
    ("ceramic", 34, -28, 6, 10), ("ceramic", 56, -28, 6, 10), ("ceramic", 78, -28, 6, 10),
    ("can", -80, 76, 16, 16), ("can", -40, 76, 16, 16),
)  # fmt: skip
TEXT = (  # the silk-screened name "HC-01", strokes in cells of 1 x 2
    ((0, 0), (0, 2)), ((1, 0), (1, 2)), ((0, 1), (1, 1)),
    ((2.6, 0), (1.6, 0), (1.6, 2), (2.6, 2)), ((3.2, 1), (3.8, 1)),
    ((4.4, 0), (5.4, 0), (5.4, 2), (4.4, 2), (4.4, 0)), ((6, 0.3), (6.3, 0), (6.3, 2)),
)  # fmt: skip
COPPER, PADS, SILK = range(3)
FINE = 3  # the printed layers are drawn once, this much finer than the image


def _pins(kind: str, w: float, h: float) -> list[tuple[float, float]]:
    """Return where the pads of a part lie: two rows for a chip, two ends for the rest."""
    if kind == "chip":
        return [(float(x), side * (h + 4.0)) for side in (-1, 1) for x in np.arange(-w + 6, w - 5, 8)]
    if kind == "can":
        return [(0.0, -h - 1.0), (0.0, h + 1.0)]
    return [(-w, 0.0), (w, 0.0)] if w > h else [(0.0, -h), (0.0, h)]


def _tracks() -> list[list[tuple[float, float]]]:
    """Return the copper tracks as polylines in nested bundles."""
    tracks = [[(-104, -86), (-104, 52), (-92, 64)], [(-98, -86), (-98, 0), (-88, 6)]]
    tracks.append([(96, -76), (104, -68), (104, 60)])
    for i in range(9):  # chip A down, then right to chip B
        x, y = 10 - 8 * i, 8 + 5 * i
        tracks.append([(x, -4), (x, y), (x + 5, y + 5), (20 + 2 * (i % 2), y + 5)])
    for i in range(7):  # chip A up, then right to the resistors
        x, y = -14 - 8 * i, -60 - 5 * i
        tracks.append([(x, -54), (x, y), (x + 5, y - 5), (28, y - 5)])
    for i in range(5):  # chip B down to the edge connector, and up to the ceramics
        x, y = 40 + 8 * i, 2 * i
        tracks.append([(x, 58), (x, 66 + y), (x + 4, 70 + y), (x + 4, 92)])
        tracks.append([(x, 10), (x, 2 - y), (x + 3, -1 - y), (x + 3, -14)])
    return tracks


def _prints() -> list[tuple[float, ...]]:
    """Return all that is printed as boxes: layer, x, y, half width, half height, corner, angle, hollow."""
    boxes = [(PADS, 36 + 7 * k, 97, 2.4, 7, 0.5, 0.0, False) for k in range(8)]  # the edge connector
    strokes = [(COPPER, 1.0, line) for line in _tracks()]
    strokes += [(SILK, 1.2, [(-13 + 6.8 * a, 82 + 8 * b) for a, b in line]) for line in TEXT]
    for layer, width, line in strokes:
        for (ax, ay), (bx, by) in zip(line[:-1], line[1:], strict=True):
            long, angle = np.hypot(bx - ax, by - ay) / 2 + width, np.arctan2(by - ay, bx - ax)
            boxes.append((layer, (ax + bx) / 2, (ay + by) / 2, long, width, width, angle, False))
        if layer == COPPER:
            boxes += [(PADS, x, y, 2.2, 2.2, 2.2, 0.0, False) for x, y in (line[0], line[-1])]
    for kind, x, y, w, h in PARTS:
        half = {"chip": (2.4, 5), "can": (4, 4)}.get(kind, (3.5, h + 1) if w > h else (w + 1, 3.5))
        boxes += [(PADS, x + px, y + py, *half, 0.5, 0.0, False) for px, py in _pins(kind, w, h)]
        if kind != "chip":
            boxes.append((SILK, x, y, w + 5, h + 5, 2, 0.0, True))
    return boxes


@cache
def _layers() -> Array:
    """Return copper, pads and silk screen of the board (3, 768, 768), drawn once in its own coordinates."""
    layers = np.zeros((3, SIZE * FINE, SIZE * FINE))
    at = (np.arange(SIZE * FINE) + 0.5) / FINE - SIZE / 2
    for layer, x, y, w, h, corner, angle, hollow in _prints():
        columns, rows = (slice(*np.searchsorted(at, [c - w - h - 2, c + w + h + 2])) for c in (x, y))
        distance = box(*turned(at[None, columns] - x, at[rows, None] - y, angle), w, h, corner)
        distance = np.abs(distance) - 0.6 if hollow else distance
        part = layers[layer, rows, columns]
        np.maximum(part, cover(distance, 1 / FINE), out=part)
    return layers


def _component(x: Array, y: Array, part: tuple, light: float) -> tuple[Array, Array]:
    """Return the coverage and the colours of one mounted part in its own frame."""
    kind, _, _, w, h = part
    if kind == "can":
        r = np.hypot(x, y)
        vent = cover(np.minimum(np.abs(x), np.abs(y)) - 0.8) * cover(r - w * 0.7)
        tone = 0.62 + relief(3 * np.clip((w - r) / 3, 0, 1), light, 0.18) - 0.18 * vent
        colour, mark = shade((0.95, 0.98, 1.0), tone), cover(np.maximum(r - w + 1, x + w * 0.55))
        return cover(r - w), paint(colour, mark, (0.14, 0.15, 0.20))
    edge = box(x, y, w, h, 1.0)
    bevel = relief(2 * np.clip(-edge / 2, 0, 1), light, 0.12)[..., None]
    if kind == "chip":
        rows = cover(np.maximum(np.abs(np.abs(y) - 4) - 1.6, np.abs(x) - w * 0.55))
        colour = paint(np.array([0.13, 0.13, 0.14]) + bevel, 0.5 * rows * (np.sin(x * 1.9 + y) > -0.3), [0.6] * 3)
        return cover(edge), paint(colour, cover(np.hypot(x + w - 6, y - h + 6) - 2.5), (0.22, 0.22, 0.23))
    body: Colour = (0.10, 0.10, 0.11) if kind == "resistor" else (0.62, 0.48, 0.33)
    inward = w - np.abs(x) if w > h else h - np.abs(y)
    return cover(edge), paint(np.asarray(body) + bevel, cover(inward - 3.5), np.array([0.74, 0.75, 0.76]) + bevel)


def _bare_board(u: Array, v: Array, tint: Array, weave: Array, light: float, flaw: Flaw | None) -> Array:
    """Return the board without its parts (SIZE, SIZE, 3): lacquer, copper, pads, silk screen."""
    from scipy.ndimage import map_coordinates

    at = np.stack([v, u]) * FINE + (SIZE * FINE - 1) / 2
    copper, pads, silk = (map_coordinates(layer, at, order=1) for layer in _layers())
    if flaw and flaw.kind == "misprint":
        smear = cover(np.hypot(u - flaw.rng.uniform(-8, 24), v - 90) - flaw.between(8, 24), 5)
        slip = (round(flaw.between(1, 6)), round(flaw.between(2, 5) * flaw.rng.choice([-1, 1])))
        silk = silk + smear * (flaw.between(0.7, 0.3) * np.roll(silk, slip, (0, 1)) - silk)
    image = tint * (1 + 0.03 * weave)[..., None] + relief(copper, light, 0.03)[..., None]
    image = paint(image, copper, tint * 1.55 + 0.03)
    image = paint(image, pads, np.array([0.78, 0.66, 0.38]) + 0.03 * weave[..., None])
    return paint(image, 0.9 * silk, (0.86, 0.87, 0.85))


def draw_board(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Render a populated circuit board on a tray."""
    tilt, shift, light = rng.normal(0, 0.009), rng.normal(0, 1.5, 2), rng.normal(-2.2, 0.1)
    jitter, tones = rng.normal(0, 0.35, (len(PARTS), 2)), rng.normal(0, 0.008, len(PARTS))
    tint = (np.array([0.07, 0.30, 0.17]) + rng.normal(0, 0.008, 3)) * (1 + 0.05 * clouds(rng, 90)[..., None])
    weave, tray = clouds(rng, 2.2), clouds(rng, 30)
    chance, kind = (flaw.rng, flaw.kind) if flaw else (None, "")

    u, v = turned(X - shift[0], Y - shift[1], tilt)
    card = cover(np.maximum(box(u, v, 113, 107, 4), 4.5 - np.hypot(np.abs(u) - 105, np.abs(v) - 99)))
    tin = shade((1.0, 0.99, 0.96), (0.36 + 0.006 * tray + 0.012 * weave) * shadow(card, light, 5, 0.5))
    image = paint(tin, card, _bare_board(u, v, tint, weave, light, flaw))
    chosen = chance.integers(2, len(PARTS)) if kind in ("missing_part", "turned_part") else -1
    for k, part in enumerate(PARTS):
        place, turn = np.array(part[1:3]) + jitter[k], tilt
        if k == chosen:
            if kind == "missing_part":
                continue
            side, slip = chance.choice([-1, 1], 2), chance.normal()
            turn, place = (
                tilt + side[0] * flaw.between(0.12, 0.9),
                place + (flaw.between(1, 4) * side[1], slip),
            )
        at = shift + turned(*place, -tilt)
        window = near(*at, max(part[3:]) + 12)
        x, y = turned(X[window] - at[0], Y[window] - at[1], turn)
        for px, py in _pins(part[0], *part[3:]) if part[0] == "chip" else ():
            image[window] = paint(image[window], cover(box(x - px, y - py, 1.5, 4.0, 0.5)), (0.70, 0.71, 0.72))
        body, colour = _component(x, y, part, light)
        image[window] = paint(shade(image[window], shadow(body, light, 2.5, 0.5)), body, colour + tones[k])
    if kind == "bridge":
        _, cx, cy, w, h = PARTS[chance.integers(2)]
        px, py = _pins("chip", w, h)[chance.integers((2 * w - 11) // 8)]
        drop = np.hypot((u - cx - px - 4) / 1.5, v - cy - 1.1 * py * chance.choice([-1, 1]))
        solder = cover(drop - flaw.between(2.5, 6.5), 1.5)
        image = paint(image, solder, (0.80 + relief(2 * solder, light, 0.2))[..., None])
    if kind == "scratch":
        image = _scratch(image, flaw, flaw.spot(70), light, flaw.between(24, 90))
    return exposed(image, rng)
