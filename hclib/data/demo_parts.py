"""Drawing for the demo set: anti-aliased shapes, light, and the three textures cut from photographs.

Everything is float64 in 0..1; the rounding to 8 bits hides the last-bit differences between processors. A
scene is a function `(rng, split, flaw) -> (256, 256, 3)`. All of its normal variation comes from `rng`, all
of its defect from `flaw.rng`, so that the same `rng` state with and without a flaw shows the same thing,
placed and lit the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 256
Y, X = np.mgrid[0:SIZE, 0:SIZE] - (SIZE - 1) / 2  # pixel centres (SIZE, SIZE), origin in the middle of the image

Array = np.ndarray
Point = Sequence[float]
Colour = Sequence[float]


@dataclass(frozen=True)
class Flaw:
    """Say what is wrong, how badly (0 hard to see, 1 plain), and where its own chance comes from."""

    kind: str
    severity: float
    rng: np.random.Generator

    def between(self, mild: float, bad: float) -> float:
        """Return the value on the way from `mild` to `bad` that the severity asks for."""
        return mild + self.severity * (bad - mild)

    def spot(self, reach: float) -> Array:
        """Return a point (2,), uniform in the square of half side `reach` around the image centre."""
        return self.rng.uniform(-reach, reach, 2)

    def pick(self, *choices: Colour) -> Array:
        """Return one of the colours."""
        return np.asarray(choices[self.rng.integers(len(choices))])


# ------------------------------------------------------------------------------------------- shapes and light


def cover(distance: Array, soft: float = 1.0) -> Array:
    """Return the coverage 0..1 of a shape from its signed distance in pixels, its edge `soft` pixels wide."""
    return np.clip(0.5 - distance / soft, 0.0, 1.0)


def box(x: Array, y: Array, half_width: float, half_height: float, corner: float = 0.0) -> Array:
    """Return the signed distance in pixels to a box around the origin with rounded corners."""
    qx, qy = np.abs(x) - (half_width - corner), np.abs(y) - (half_height - corner)
    return np.hypot(np.maximum(qx, 0), np.maximum(qy, 0)) + np.minimum(np.maximum(qx, qy), 0) - corner


def turned(x: Array | float, y: Array | float, angle: float) -> tuple:
    """Return the coordinates in a frame rotated by `angle` radians."""
    c, s = np.cos(angle), np.sin(angle)
    return c * x + s * y, c * y - s * x


def near(x: float, y: float, reach: float) -> tuple[slice, slice]:
    """Return the slices (rows, columns) of the pixels within about `reach` of the point."""
    row, column, half = round(y + SIZE / 2), round(x + SIZE / 2), int(np.ceil(reach))
    return slice(max(row - half, 0), max(row + half, 0)), slice(max(column - half, 0), max(column + half, 0))


def path_distance(points: Array, reach: float = 24.0) -> Array:
    """Return the distance (SIZE, SIZE) in pixels to a polyline (n, 2); far from it a number over `reach`."""
    square = np.full((SIZE, SIZE), 4 * reach**2)
    for (ax, ay), (bx, by) in zip(points[:-1], points[1:], strict=True):
        dx, dy = bx - ax, by - ay
        window = near((ax + bx) / 2, (ay + by) / 2, reach + 1 + np.hypot(dx, dy) / 2)
        x, y, part = X[window] - ax, Y[window] - ay, square[window]
        t = np.clip((x * dx + y * dy) / (dx * dx + dy * dy), 0, 1)
        np.minimum(part, (x - t * dx) ** 2 + (y - t * dy) ** 2, out=part)
    return np.sqrt(square)


def wander(rng: np.random.Generator, middle: Point, length: float, bend: float, kink: float = 0.0) -> Array:
    """Return a polyline (24, 2) around `middle`: it bends by about `bend` radians, with kinks."""
    drift = bend * np.interp(np.linspace(0, 3, 24), np.arange(4), rng.standard_normal(4))
    angle = rng.uniform(0, 2 * np.pi) + drift + kink * rng.standard_normal(24)
    points = np.cumsum(np.stack([np.cos(angle), np.sin(angle)], axis=1) * (length / 24), axis=0)
    return points - points.mean(axis=0) + middle


@cache
def _spline(cells: int) -> Array:
    """Return the cubic B-spline weights (SIZE, cells + 3) that blow a coarse grid up to the image."""
    a = np.abs(np.linspace(0, cells, SIZE, endpoint=False)[:, None] + 1 - np.arange(cells + 3))
    return np.where(a < 1, 2 / 3 - a**2 + a**3 / 2, np.where(a < 2, (2 - a) ** 3 / 6, 0.0))


def clouds(rng: np.random.Generator, grain: float) -> Array:
    """Return smooth noise (SIZE, SIZE), mean 0 and variance about 1, its bumps about `grain` pixels wide."""
    cells = max(1, round(SIZE / grain))
    weights = _spline(cells)
    return 2.1 * weights @ rng.standard_normal((cells + 3, cells + 3)) @ weights.T


def blot(rng: np.random.Generator, centre: Point, radius: float, rough: float = 0.35) -> Array:
    """Return the signed distance, roughly, to an irregular patch."""
    edge = 1 + rough * clouds(rng, max(8.0, radius * 0.8))
    return np.hypot(X - centre[0], Y - centre[1]) - radius * edge


def paint(image: Array, alpha: Array, colour: Colour | Array) -> Array:
    """Return `image` (H, W, 3) with `colour` laid over it where `alpha` (H, W) covers."""
    return image + alpha[..., None] * (np.asarray(colour) - image)


def shade(image: Array | Colour, factor: Array) -> Array:
    """Return `image` (H, W, 3), or one colour, times `factor` (H, W)."""
    return np.asarray(image) * factor[..., None]


def relief(height: Array, light: float, strength: float) -> Array:
    """Return the brightness offset of a height field (pixels) lit from direction `light` (radians)."""
    gy, gx = np.gradient(height)
    return -strength * (np.cos(light) * gx + np.sin(light) * gy)


def shadow(alpha: Array, light: float, reach: float, depth: float) -> Array:
    """Return the factor by which an object of coverage `alpha` darkens what lies under it."""
    from scipy.ndimage import gaussian_filter

    shift = (round(-np.sin(light) * reach), round(-np.cos(light) * reach))
    return 1 - depth * gaussian_filter(np.roll(alpha, shift, (0, 1)), max(reach, 1) * 0.7)


def exposed(image: Array, rng: np.random.Generator, gain: float = 0.05) -> Array:
    """Return the image as a camera takes it: exposure, uneven light, vignette, white balance, noise."""
    level, across, down = rng.uniform(-gain, gain, 3)
    lit = 1 + level + across * X / SIZE + down * Y / SIZE - 0.10 * (X**2 + Y**2) / SIZE**2
    balance = 1 + rng.uniform(-0.007, 0.007, 3)
    return image * lit[..., None] * balance + 0.007 * rng.standard_normal(image.shape)


# -------------------------------------------------------------------------------------- photographed textures

BORDER = 0.56  # share of a photograph's columns that is cut up for training; the rest is for testing


@cache
def _photograph(name: str) -> Array:
    """Return a photograph as spline coefficients (H, W), 0..1; the brick wall is straightened first."""
    import skimage.data
    from scipy.ndimage import gaussian_filter, map_coordinates, spline_filter

    grey = getattr(skimage.data, name)() / 255.0
    grey = spline_filter(grey - gaussian_filter(grey, 60) + grey.mean(), order=3)  # without its slow shading
    if name != "brick":
        return grey
    # The wall recedes: a column of bricks is 30 px wide at the photograph's top edge and 42 px at its bottom.
    shrink, (y, x) = 30 / 42, np.mgrid[0:600, 0:512] * 1.0
    scale = 1 / (1 / shrink + (1 - 1 / shrink) * y / 600)
    rows, columns = 511 * (scale - shrink) / (1 - shrink), 252 - 4 * (1 - y / 600) + (x - 256) * scale
    wall = map_coordinates(grey, [rows, columns], order=3, mode="mirror", prefilter=False)
    return spline_filter(wall, order=3)


def _crop(rng: np.random.Generator, name: str, split: str, side: float, turn: float) -> Array:
    """Cut a turned, scaled square out of the training or the test part of a photograph (SIZE, SIZE)."""
    from scipy.ndimage import map_coordinates

    photo = _photograph(name)
    rows, columns = photo.shape
    side, angle = side * rng.uniform(0.94, 1.06), rng.uniform(-turn, turn)
    half = side / 2 * (np.cos(angle) + abs(np.sin(angle))) + 1
    left, right = (0, BORDER * columns) if split == "train" else (BORDER * columns, columns)
    cx, cy = rng.uniform(left + half, right - half), rng.uniform(half, rows - half)
    u, v = turned(X, Y, angle)
    at = [cy + v * side / SIZE, cx + u * side / SIZE]
    return map_coordinates(photo, at, order=3, mode="mirror", prefilter=False)


def _tinted(grey: Array, *stops: tuple[float, float, float, float]) -> Array:
    """Return a grey image in the colours that the stops (grey, red, green, blue) give to its levels."""
    level, *channels = zip(*stops, strict=True)
    return np.stack([np.interp(grey, level, channel) for channel in channels], axis=-1)


def draw_brick(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Return a brick wall, cut from the photograph and tinted."""
    grey, warm = _crop(rng, "brick", split, 190, 0.035).T, rng.normal(0, 0.012)  # courses run across
    mortar = ((0.50, 0.62, 0.47, 0.39), (0.75, 0.84, 0.80, 0.74))
    image = _tinted(grey, (0.1, 0.26, 0.12, 0.09), (0.36, 0.60 + warm, 0.30, 0.22), *mortar)
    image = shade(image, 1 + 0.03 * clouds(rng, 50) + 0.025 * clouds(rng, 2.5))
    if flaw is None:
        return exposed(image, rng)
    at, chance = flaw.spot(85), flaw.rng
    if flaw.kind == "crack":
        line = path_distance(wander(chance, at, flaw.between(35, 150), 0.5, 0.35))
        gap = cover(line - flaw.between(0.5, 1.6) * (1 + 0.4 * clouds(chance, 9)), 1.4)
        image = paint(image, flaw.between(0.25, 0.9) * gap, (0.10, 0.06, 0.05))
    elif flaw.kind == "efflorescence":
        bloom = cover(blot(chance, at, flaw.between(9, 30), 0.5), flaw.between(6, 18))
        bloom *= np.clip(0.65 + 0.35 * clouds(chance, 5), 0, 1)
        image = paint(image, flaw.between(0.12, 0.75) * bloom, (0.90, 0.88, 0.85))
    elif flaw.kind == "hole":
        edge = blot(chance, at, flaw.between(3, 13), 0.3)
        pit = cover(edge, 2) * (0.85 + 0.15 * clouds(chance, 4))
        image = paint(image, flaw.between(0.3, 0.92) * pit, (0.13, 0.07, 0.06))
        lip = cover(np.abs(edge - 0.5) - 0.7, 1.5) * np.clip((Y - at[1]) / 12, 0, 1)
        image = image + 0.25 * lip[..., None]
    elif flaw.kind == "paint":
        line = path_distance(wander(chance, at, flaw.between(12, 90), 1.5))
        spray = cover(line - flaw.between(2.5, 6.0), flaw.between(5, 2.5))
        image = paint(image, flaw.between(0.15, 0.9) * spray, flaw.pick((0.15, 0.3, 0.65), (0.12, 0.45, 0.3)))
    return exposed(image, rng)


def draw_grass(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Return a lawn, cut from the photograph and tinted; blades stick out of what lies on it."""
    grey, warm = _crop(rng, "grass", split, 170, 0.15), rng.normal(0, 0.012)
    light = ((0.6, 0.50 + warm, 0.62, 0.27), (0.9, 0.84, 0.90, 0.62))
    image = _tinted(grey, (0.1, 0.06, 0.10, 0.04), (0.42, 0.28 + warm, 0.42, 0.14), *light)
    image = shade(image, 1 + 0.03 * clouds(rng, 45))
    if flaw is None:
        return exposed(image, rng, 0.08)
    at, chance = flaw.spot(80), flaw.rng
    if flaw.kind == "bald_patch":
        soil = shade((0.36, 0.27, 0.18), 1 + 0.16 * clouds(chance, 3) + 0.12 * clouds(chance, 9))
        bare = cover(blot(chance, at, flaw.between(10, 34), 0.3), 12)
        image = paint(image, bare * np.clip(flaw.between(2.2, 3.6) - 4.5 * grey, 0, 1), soil)
    elif flaw.kind == "yellowing":
        sick = flaw.between(0.3, 0.95) * cover(blot(chance, at, flaw.between(14, 40), 0.35), 22)
        straw = _tinted(grey, (0.1, 0.16, 0.12, 0.06), (0.45, 0.66, 0.55, 0.25), (0.9, 0.98, 0.92, 0.7))
        image = paint(image, sick, straw)
    elif flaw.kind == "litter":
        u, v = turned(X - at[0], Y - at[1], chance.uniform(0, np.pi))
        shape = box(u + 0.15 * v, v, flaw.between(7, 17), flaw.between(5, 12), 1) + 0.8 * clouds(chance, 12)
        scrap = cover(shape) * np.clip(flaw.between(2.6, 4.2) - 4.0 * grey, 0, 1)
        paper = shade((0.86, 0.87, 0.88), 1 + 0.05 * clouds(chance, 14) - 0.2 * cover(np.abs(u) - 0.8))
        image = paint(shade(image, shadow(scrap, -2.3, 3, 0.4)), scrap, paper)
    elif flaw.kind == "wire":
        line = wander(chance, at, flaw.between(40, 130), 1.2)
        above = np.clip(flaw.between(2.4, 4.0) - 4.0 * grey, 0, 1)
        image = shade(image, 1 - 0.3 * above * cover(path_distance(line + 2) - 1.5, 3))
        wire = flaw.between(0.6, 1.0) * above * cover(path_distance(line) - flaw.between(0.9, 1.8))
        image = paint(image, wire, flaw.pick((0.62, 0.12, 0.10), (0.10, 0.10, 0.12)))
    return exposed(image, rng, 0.08)


def draw_gravel(rng: np.random.Generator, split: str, flaw: Flaw | None) -> Array:
    """Return a bed of gravel, cut from the photograph and tinted."""
    grey, hue, patches = _crop(rng, "gravel", split, 176, 0.12), clouds(rng, 16), clouds(rng, 50)
    image = _tinted(grey, (0.0, 0.04, 0.04, 0.05), (0.45, 0.47, 0.44, 0.41), (0.9, 0.94, 0.92, 0.88))
    image = image * (1 + 0.03 * patches[..., None] + 0.018 * hue[..., None] * np.array([1.0, 0.0, -1.0]))
    if flaw is None:
        return exposed(image, rng, 0.08)
    at, chance = flaw.spot(80), flaw.rng
    away = np.hypot(X - at[0], Y - at[1])
    if flaw.kind == "oil":
        wet = cover(blot(chance, at, flaw.between(12, 36), 0.35), 9)
        image = image * (1 - flaw.between(0.22, 0.68) * wet[..., None] * np.array([0.92, 0.97, 1.0]))
    elif flaw.kind == "weed":
        for _ in range(round(flaw.between(2, 8))):
            blade = wander(chance, at + chance.normal(0, 5, 2), flaw.between(14, 40), 0.4)
            width = flaw.between(1.0, 2.4) * np.clip(1.2 - away / 40, 0.2, 1)
            image = shade(image, 1 - 0.3 * cover(path_distance(blade + 2) - width, 3))
            leaf = flaw.between(0.6, 0.95) * cover(path_distance(blade) - width)
            image = paint(image, leaf, np.array([0.30, 0.46, 0.16]) * chance.uniform(0.85, 1.15))
    elif flaw.kind == "sand":
        sand = shade((0.64, 0.55, 0.42), 1 + 0.05 * clouds(chance, 2.2) + 0.04 * clouds(chance, 15))
        fill = cover(blot(chance, at, flaw.between(14, 36), 0.3), 10)
        image = paint(image, fill * np.clip(flaw.between(1.5, 3.4) - 4.0 * grey, 0, 1), sand)
    elif flaw.kind == "bottle_cap":
        radius = flaw.between(6, 14)
        edge = away - radius * (1 + 0.06 * np.sin(21 * np.arctan2(Y - at[1], X - at[0])))
        cap, worn = (
            cover(edge),
            0.9 + relief(3 * np.clip(-edge / 3, 0, 1), -2.2, 0.25) + 0.1 * clouds(chance, 20),
        )
        tint = flaw.pick((0.66, 0.14, 0.12), (0.15, 0.3, 0.6), (0.72, 0.6, 0.2))
        image = paint(shade(image, shadow(cap, -2.3, 3, 0.5)), cap, shade(tint, worn))
    return exposed(image, rng, 0.08)
