"""Drawing primitives of synthetic tissue: noise, cells, closed curves, fibres and stamped nuclei.

A `Field` holds the amounts of haematoxylin and eosin of a rectangle, in optical density; lengths are pixels at level 0.
Nuclei are sprites, drawn once per process and stamped by the thousand, which is why a slide takes only half a second.
"""

from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter
from scipy import ndimage

ANGLES = 24  # orientations a nucleus sprite is drawn in, over half a turn
VARIANTS = 4

# kind: half length, half width, chromatin at the centre, at the rim, depth of the clumps, nucleolus
_NUCLEI = {
    "lymphocyte": (3.9, 3.6, 1.25, 1.25, 0.55, 0.0),
    "columnar": (7.0, 3.1, 1.00, 1.25, 0.30, 0.0),
    "vesicular": (7.2, 6.0, 0.34, 1.10, 0.25, 1.3),
    "clear": (5.4, 4.4, 0.28, 1.15, 0.10, 0.0),
    "squamous": (5.6, 4.4, 0.85, 1.15, 0.35, 0.5),
    "flat": (8.0, 1.7, 1.05, 1.05, 0.15, 0.0),
    "spindle": (9.0, 2.0, 1.05, 1.10, 0.20, 0.0),
    "stellate": (5.0, 2.2, 0.95, 1.00, 0.25, 0.0),
    "centroblast": (5.2, 4.8, 0.42, 0.95, 0.30, 0.6),
}


@lru_cache(maxsize=1)
def _sprites() -> dict[str, np.ndarray]:
    """Nuclei drawn once per process: kind -> float32 [variants * angles, edge, edge], haematoxylin."""
    rng = np.random.default_rng(20260)
    bank = {}
    for kind, (long, short, centre, rim, clumps, nucleolus) in _NUCLEI.items():
        half = int(np.ceil(long * 1.15)) + 1
        y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
        sprites = []
        for _ in range(VARIANTS):
            a, b = long * rng.uniform(0.85, 1.12), short * rng.uniform(0.85, 1.12)
            bend, spot = rng.uniform(-0.15, 0.15), rng.uniform(-0.3, 0.3, 2)
            chromatin = ndimage.gaussian_filter(rng.standard_normal(x.shape), 0.9)
            chromatin = (chromatin / chromatin.std()).astype(np.float32)
            for angle in np.arange(ANGLES) * np.pi / ANGLES:
                u = x * np.cos(angle) + y * np.sin(angle)
                v = -x * np.sin(angle) + y * np.cos(angle) + bend * u * u / a
                radius = np.hypot(u / a, v / b)
                cover = np.clip((1 - radius) * min(a, b) + 0.5, 0, 1)
                depth = centre + (rim - centre) * np.clip((radius - 0.55) / 0.3, 0, 1)
                depth = depth + clumps * 0.35 * chromatin
                near = np.hypot(u - spot[0] * a, v - spot[1] * b)
                depth = np.maximum(depth, nucleolus * np.clip(2.4 - near, 0, 1))
                sprites.append(cover * np.clip(depth, 0.1, 1.7))
        bank[kind] = np.stack(sprites).astype(np.float32)
    bank["neutrophil"] = _lobed(rng, 2.1, 2.3, 3, 1.35)
    bank["debris"] = _lobed(rng, 1.1, 3.0, 3, 1.15)
    bank["pyknotic"] = _lobed(rng, 2.3, 0.6, 2, 1.35)
    return bank


def _lobed(rng: np.random.Generator, radius: float, spread: float, lobes: int, depth: float) -> np.ndarray:
    half = int(np.ceil(radius * 1.3 + spread)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1].astype(np.float32)
    sprites = []
    for _ in range(VARIANTS * ANGLES):
        start, cover = rng.uniform(0, 2 * np.pi), np.zeros_like(x)
        for lobe in range(int(rng.integers(max(1, lobes - 1), lobes + 1))):
            angle = start + lobe * rng.uniform(1.4, 2.2)
            far, r = spread * rng.uniform(0.75, 1.1), radius * rng.uniform(0.7, 1.25)
            cover = np.maximum(
                cover, np.clip(r - np.hypot(x - far * np.cos(angle), y - far * np.sin(angle)) + 0.5, 0, 1)
            )
        sprites.append(cover * depth)
    return np.stack(sprites).astype(np.float32)


class Field:
    """A rectangle of tissue being drawn: `h` and `e`, float32 [rows, cols], with helpers that draw on them.

    `scale` (about 0.9 to 1.1) magnifies arrangements, so that slides differ as patients do.
    """

    def __init__(self, rng: np.random.Generator, rows: int, cols: int, scale: float = 1.0):
        self.rng, self.rows, self.cols, self.scale = rng, rows, cols, scale
        self.h = np.zeros((rows, cols), np.float32)
        self.e = np.zeros((rows, cols), np.float32)

    def noise(self, period: float, stretch: float = 1.0) -> np.ndarray:
        """Smooth noise of unit variance; features about `period` px, `stretch` times longer along x."""
        rows, cols = int(self.rows / period) + 4, int(self.cols / (period * stretch)) + 4
        grid = self.rng.standard_normal((rows, cols)).astype(np.float32)
        box = self.rng.uniform(0, 1, 2)
        box = (box[0], box[1], box[0] + self.cols / (period * stretch), box[1] + self.rows / period)
        return np.asarray(Image.fromarray(grid).resize((self.cols, self.rows), Image.Resampling.BICUBIC, box=box)) * 1.5

    def band(self, wavelength: float) -> tuple[np.ndarray, np.ndarray]:
        """Noise with one dominant wavelength, and its distance in px from the zero line (signed, approximate)."""
        step = max(2.0, wavelength / 10)
        sigma = wavelength / step / 4.6
        rows, cols = int(self.rows / step) + 2, int(self.cols / step) + 2
        white = self.rng.standard_normal((rows, cols)).astype(np.float32)
        field = ndimage.gaussian_filter(white, sigma) - ndimage.gaussian_filter(white, 1.7 * sigma)
        field /= field.std()
        gy, gx = np.gradient(field)
        distance = field / np.maximum(np.hypot(gx, gy), 0.35 * np.hypot(gx, gy).mean()) * step
        return self.grow(field), self.grow(distance)

    def grow(self, small: np.ndarray) -> np.ndarray:
        """Upsample a coarse array to the size of the field."""
        image = Image.fromarray(np.ascontiguousarray(small, np.float32))
        return np.asarray(image.resize((self.cols, self.rows), Image.Resampling.BICUBIC))

    def points(self, spacing: float, jitter: float = 0.35) -> np.ndarray:
        """Jittered hexagonal points [n, 2] (x, y), `spacing` px apart, all inside."""
        spacing = spacing * self.scale
        ys = np.arange(-0.5, self.rows / (spacing * 0.87) + 1)
        xs = np.arange(-0.5, self.cols / spacing + 1)
        x, y = np.meshgrid(xs, ys)
        x = (x + 0.5 * (np.arange(len(ys)) % 2)[:, None]) * spacing
        grid = np.stack([x.ravel(), (y * spacing * 0.87).ravel()], 1)
        grid = grid + self.rng.uniform(-jitter, jitter, grid.shape) * spacing
        return grid[(grid >= 0).all(1) & (grid[:, 0] < self.cols) & (grid[:, 1] < self.rows)]

    def at(self, array: np.ndarray, xy: np.ndarray) -> np.ndarray:
        """Values of `array` under the points."""
        return array[xy[:, 1].astype(int), xy[:, 0].astype(int)]

    def nuclei(self, kind: str, xy: np.ndarray, angle: np.ndarray | float | None = None, gain: float = 1.0) -> None:
        """Stamp nuclei at `xy`, turned by `angle` (radians; None = any), darker where they overlap."""
        bank = _sprites()[kind]
        half = bank.shape[1] // 2
        x, y = np.rint(xy).astype(np.int64).T
        inside = (x >= half) & (y >= half) & (x < self.cols - half) & (y < self.rows - half)
        if not inside.any():
            return
        turn = self.rng.integers(0, ANGLES, len(xy))
        if angle is not None:
            turn = np.broadcast_to(np.rint(np.asarray(angle) / np.pi * ANGLES).astype(int) % ANGLES, len(xy))
        which = self.rng.integers(0, VARIANTS, len(xy)) * ANGLES + turn
        shade = (gain * self.rng.uniform(0.72, 1.2, len(xy))).astype(np.float32)
        offset = np.arange(-half, half + 1)
        at = (y * self.cols + x)[inside][:, None, None] + (offset[:, None] * self.cols + offset)
        stamps = bank[which[inside]] * shade[inside][:, None, None]
        # With indices in one dimension NumPy takes a loop that is ten times as fast.
        np.maximum.at(self.h.reshape(-1), at.reshape(-1), stamps.reshape(-1))

    def cells(self, spacing: float) -> tuple[np.ndarray, np.ndarray]:
        """Polygonal cells about `spacing` px wide: the points [n, 2] and each pixel's distance from a border.

        A Voronoi diagram of jittered points, worked out at half resolution from the 3x3 neighbours.
        """
        spacing = spacing * self.scale
        rows, cols = int(self.rows / spacing) + 5, int(self.cols / spacing) + 5
        seeds = np.indices((rows, cols)).transpose(1, 2, 0) - 1.5 + self.rng.uniform(-0.42, 0.42, (rows, cols, 2))
        seeds = (seeds * spacing).astype(np.float32)  # y, x
        y = np.arange(0.5, self.rows, 2, dtype=np.float32)
        x = np.arange(0.5, self.cols, 2, dtype=np.float32)
        row, col = (y / spacing + 2).astype(int), (x / spacing + 2).astype(int)
        nearest = np.full((len(y), len(x)), 1e9, np.float32)
        second = nearest.copy()
        for dr in (-1, 0, 1):
            for dc in (-1, 0, 1):
                seed = seeds[(row + dr)[:, None], (col + dc)[None]]
                far = np.hypot(seed[..., 0] - y[:, None], seed[..., 1] - x)
                second = np.minimum(second, np.maximum(nearest, far))
                nearest = np.minimum(nearest, far)
        centres = seeds.reshape(-1, 2)[:, ::-1]
        inside = (centres >= 0).all(1) & (centres[:, 0] < self.cols) & (centres[:, 1] < self.rows)
        return centres[inside], self.grow((second - nearest) / 2)

    def polygons(
        self, shapes: list[np.ndarray], values: list[float], base: float = 0.0, soft: float = 1.0
    ) -> np.ndarray:
        """Draw filled polygons [n, 2] one over the other, with soft edges; values lie in [0, 1]."""
        image = Image.new("L", (self.cols, self.rows), int(base * 255))
        draw = ImageDraw.Draw(image)
        for shape, value in zip(shapes, values, strict=True):
            draw.polygon(shape.ravel().tolist(), fill=int(value * 255))
        return np.asarray(image.filter(ImageFilter.GaussianBlur(soft)), np.float32) / 255


def ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    """Linear ramp: 0 at `low`, 1 at `high` (which may be the smaller), constant outside."""
    return np.clip((value - low) / (high - low), 0, 1)


def outlines(field: Field, centres: np.ndarray, radius: np.ndarray, wobble: float) -> np.ndarray:
    """Wobbly closed curves: radii [n, 28] around each centre."""
    angle = np.arange(28) * 2 * np.pi / 28
    shape = np.ones((len(centres), 28))
    for order in (2, 3, 4):
        phase = field.rng.uniform(0, 2 * np.pi, (len(centres), 1))
        shape += wobble / order * field.rng.uniform(0.3, 1.4, (len(centres), 1)) * np.cos(order * angle + phase)
    return radius[:, None] * shape


def ring(centres: np.ndarray, radii: np.ndarray, factor: float) -> list[np.ndarray]:
    """The curves of `outlines` as polygons [28, 2], shrunk by `factor`."""
    angle = np.arange(radii.shape[1]) * 2 * np.pi / radii.shape[1]
    curve = radii[..., None] * factor * np.stack([np.cos(angle), np.sin(angle)], -1)
    return list(centres[:, None] + curve)


def along(field: Field, centres: np.ndarray, radii: np.ndarray, factor: float, gap: float):
    """Points about `gap` px apart along each curve, with the outward direction there."""
    count = np.maximum(3, (radii.mean(1) * factor * 2 * np.pi / gap).astype(int))
    owner = np.repeat(np.arange(len(centres)), count)
    first = np.repeat(np.cumsum(count) - count, count)
    angle = ((np.arange(len(owner)) - first) / count[owner] + field.rng.normal(0, 0.012, len(owner))) * 2 * np.pi
    radius = radii[owner, (angle / (2 * np.pi) * radii.shape[1]).astype(int) % radii.shape[1]] * factor
    radius = radius + field.rng.normal(0, 0.9, len(owner))
    xy = centres[owner] + radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1)
    keep = (xy >= 0).all(1) & (xy[:, 0] < field.cols) & (xy[:, 1] < field.rows)
    return xy[keep], angle[keep]


def direction(surface: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Angle of the level line of `surface` through each point."""
    x, y = xy.astype(int).T
    x, y = np.clip(x, 2, surface.shape[1] - 3), np.clip(y, 2, surface.shape[0] - 3)
    gx, gy = surface[y, x + 2] - surface[y, x - 2], surface[y + 2, x] - surface[y - 2, x]
    return np.arctan2(gy, gx) + np.pi / 2


@lru_cache(maxsize=1)
def _table() -> np.ndarray:
    rng = np.random.default_rng(5)
    table = ndimage.gaussian_filter(rng.standard_normal((512, 512)), 1.5, mode="wrap")
    return (table / table.std()).astype(np.float32)


def fibres(field: Field, u: np.ndarray, v: np.ndarray, across: float, along: float) -> np.ndarray:
    """Noise of unit variance drawn out into fibres about `across` px wide and `along` px long, on the axes (u, v)."""
    shift = field.rng.uniform(0, 512, 2).astype(np.float32)
    row, col = u * np.float32(4.0 / across) + shift[0], v * np.float32(4.0 / along) + shift[1]
    down, right = row - np.floor(row), col - np.floor(col)
    top, left = row.astype(np.intp) & 511, col.astype(np.intp) & 511
    below, beside, table = ((top + 1) & 511) * 512, (left + 1) & 511, _table().reshape(-1)
    top *= 512
    upper = table.take(top + left) * (1 - right) + table.take(top + beside) * right
    lower = table.take(below + left) * (1 - right) + table.take(below + beside) * right
    return upper * (1 - down) + lower * down


def fibre_axes(field: Field, turn: float, swing: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates across and along fibres that run at `turn` radians and swing by about `swing` px over `reach` px."""
    y, x = np.arange(field.rows, dtype=np.float32)[:, None], np.arange(field.cols, dtype=np.float32)
    warp = field.noise(reach * 2) * np.float32(swing / 1.5)
    u = x * np.float32(np.sin(turn)) - y * np.float32(np.cos(turn)) + warp
    v = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))
    return u + 8192, v + 8192
