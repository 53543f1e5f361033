"""Ten histological textures, drawn as amounts of haematoxylin and eosin.

Each function of `TEXTURES` fills a rectangle with one concept: what a pathologist would tell apart by
the size, shape, density and arrangement of nuclei and by the matrix between them. Colour carries as
little as possible: `synthetic` brings the mean colour of every area to a draw from one shared
distribution afterwards. Units are pixels at level 0 and optical densities; everything is a function
of the generator that comes in, so a slide depends on nothing but its seed.
"""

from collections.abc import Callable
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
        """Bring a coarse array to the size of the field."""
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
        np.maximum.at(self.h.reshape(-1), at, bank[which[inside]] * shade[inside][:, None, None])

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


def _ramp(value: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip((value - low) / (high - low), 0, 1)


def _outlines(field: Field, centres: np.ndarray, radius: np.ndarray, wobble: float) -> np.ndarray:
    """Wobbly closed curves: radii [n, 28] around each centre."""
    angle = np.arange(28) * 2 * np.pi / 28
    shape = np.ones((len(centres), 28))
    for order in (2, 3, 4):
        phase = field.rng.uniform(0, 2 * np.pi, (len(centres), 1))
        shape += wobble / order * field.rng.uniform(0.3, 1.4, (len(centres), 1)) * np.cos(order * angle + phase)
    return radius[:, None] * shape


def _ring(centres: np.ndarray, radii: np.ndarray, factor: float) -> list[np.ndarray]:
    angle = np.arange(radii.shape[1]) * 2 * np.pi / radii.shape[1]
    curve = radii[..., None] * factor * np.stack([np.cos(angle), np.sin(angle)], -1)
    return list(centres[:, None] + curve)


def _along(field: Field, centres: np.ndarray, radii: np.ndarray, factor: float, gap: float):
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


def background(field: Field) -> None:
    """Loose connective tissue, the ground that carries none of the concepts: faint mesh, few small nuclei."""
    mesh = np.minimum(np.abs(field.noise(16)), np.abs(field.noise(9)) + 0.1)
    field.e += 0.27 + 0.16 * _ramp(mesh, 0.5, 0.0) + 0.03 * field.noise(30) + 0.02 * field.noise(4)
    field.h += 0.10
    field.nuclei("stellate", field.points(26, 0.5), gain=0.85)
    vessels = field.points(130, 0.45)
    radii = _outlines(field, vessels, field.rng.uniform(6, 10, len(vessels)), 0.25)
    outer, lumen = _ring(vessels, radii, 1.0), _ring(vessels, radii, 0.65)
    wall = field.polygons(outer, [1.0] * len(outer))
    opening = field.polygons(lumen, [1.0] * len(lumen))
    field.e += wall * 0.25 - opening * (field.e + 0.22)
    field.h *= 1 - 0.7 * opening
    xy, outward = _along(field, vessels, radii, 0.95, 9)
    field.nuclei("flat", xy[::2], outward[::2] + np.pi / 2, 0.9)


def glands(field: Field) -> None:
    """Round to oval glands: an open lumen, one row of basal columnar nuclei set radially, stroma between."""
    field.e += 0.42 + 0.07 * field.noise(7, 3)
    field.h += 0.08
    centres = field.points(66, 0.17)
    radius = field.rng.uniform(21, 31, len(centres)) * field.scale
    radii = _outlines(field, centres, radius, 0.45)
    outer, lumen = _ring(centres, radii, 1.0), _ring(centres, radii, 0.52)
    epithelium = field.polygons(outer + lumen, [1.0] * len(outer) + [0.0] * len(lumen))
    opening = field.polygons(lumen, [1.0] * len(lumen), soft=1.2)
    inside = np.maximum(epithelium, opening)
    field.e += inside * (0.50 - field.e) + epithelium * 0.05 * field.noise(4)
    field.h += epithelium * 0.12
    secretion = _ramp(field.noise(9), 0.9, 2.0) * 0.25
    field.e += opening * (0.03 + secretion - field.e)
    field.h *= 1 - opening
    stroma = field.points(17, 0.45)
    field.nuclei("spindle", stroma[field.at(inside, stroma) < 0.05], gain=0.8)
    for factor in (0.86, 0.76):
        xy, outward = _along(field, centres, radii, factor, 6.0 if factor > 0.8 else 15.0)
        field.nuclei("columnar", xy, outward, 0.95)


def solid_sheets(field: Field) -> None:
    """Back-to-back large cells with vesicular nuclei and nucleoli, and next to no stroma or lumen."""
    centres, edge = field.cells(16.5)
    field.e += 0.36 + 0.22 * _ramp(edge, 1.6, 0.3) + 0.05 * field.noise(5)
    field.h += 0.14
    centres = centres + field.rng.normal(0, 1.0, centres.shape)
    centres = centres[(centres >= 0).all(1) & (centres[:, 0] < field.cols) & (centres[:, 1] < field.rows)]
    dividing = field.rng.random(len(centres)) < 0.04
    field.nuclei("vesicular", centres[~dividing], gain=1.0)
    field.nuclei("pyknotic", centres[dividing], gain=1.2)


def keratin_pearls(field: Field) -> None:
    """Squamous nests: concentric lamellae of keratin with flattened nuclei, in a mosaic of polygonal cells."""
    cells, edge = field.cells(15)
    field.e += 0.46 + 0.04 * field.noise(5) - 0.26 * _ramp(edge, 1.5, 0.4)
    field.h += 0.10
    whorl = np.zeros((field.rows, field.cols), np.float32)
    centres = field.points(78, 0.16)
    radius = field.rng.uniform(22, 38, len(centres)) * field.scale
    radii = _outlines(field, centres, radius, 0.2)
    warp = field.noise(14) * 1.4
    for (cx, cy), r, curve in zip(centres, radius, radii, strict=True):
        reach = int(r * 1.35)
        x0, x1, y0, y1 = (
            max(0, int(cx) - reach),
            min(field.cols, int(cx) + reach),
            max(0, int(cy) - reach),
            min(field.rows, int(cy) + reach),
        )
        y, x = np.mgrid[y0:y1, x0:x1].astype(np.float32)
        turn = np.arctan2(y - cy, x - cx) % (2 * np.pi)
        limit = np.interp(turn, np.arange(29) * 2 * np.pi / 28, np.append(curve, curve[0])).astype(np.float32)
        rho = np.hypot(x - cx, y - cy) / limit
        rings = np.cos(2 * np.pi * (rho * r + warp[y0:y1, x0:x1]) / 5.6)
        cover = np.clip((1 - rho) * r * 0.5 + 0.5, 0, 1)
        part = (slice(y0, y1), slice(x0, x1))
        field.e[part] += cover * (0.66 + 0.30 * rings - field.e[part])
        field.h[part] *= 1 - 0.8 * cover
        whorl[part] = np.maximum(whorl[part], cover)
    cells = cells[field.at(whorl, cells) < 0.3]
    field.nuclei("squamous", cells, gain=0.95)
    for factor, gap in ((0.98, 11), (0.78, 20)):
        xy, outward = _along(field, centres, radii, factor, gap)
        field.nuclei("flat", xy, outward + np.pi / 2, 0.9)


def papillary_fronds(field: Field) -> None:
    """Branching fronds in clear space: a fibrovascular core, a lining of round clear nuclei that overlap."""
    _, distance = field.band(78 * field.scale)
    distance = distance + 7 + 1.2 * field.noise(9)
    frond = _ramp(distance, -0.8, 0.8)
    core = _ramp(distance, 13, 15)
    field.e += frond * (0.42 + 0.05 * field.noise(4)) + core * (0.12 + 0.10 * field.noise(5, 2)) + 0.02
    field.h += frond * 0.12 - core * 0.05
    lining = field.points(6.6, 0.3)
    depth = field.at(distance, lining)
    field.nuclei("clear", lining[(depth > 3.5) & (depth < 12)], gain=1.0)
    inner = field.points(16, 0.5)
    inner = inner[field.at(distance, inner) > 17]
    field.nuclei("spindle", inner, gain=0.75)


def mucin_pools(field: Field) -> None:
    """Lakes of pale stringy mucin with floating strips and clusters of small cells, thin septa between."""
    _, distance = field.band(120 * field.scale)
    septum = _ramp(np.abs(distance), 5.5, 3.0)
    u, v = _fibre_axes(field, field.rng.uniform(0, np.pi), 34.0, 60.0)
    wisps = _fibres(field, u, v, 9.0, 90.0)
    strings = _ramp(np.abs(wisps), 0.4, 0.0)
    field.h += (1 - septum) * (0.10 + 0.20 * strings + 0.02 * field.noise(20)) + septum * 0.08
    field.e += (1 - septum) * (0.04 + 0.07 * strings) + septum * (0.50 + 0.06 * field.noise(5))
    xy = field.points(13, 0.4)
    field.nuclei("spindle", xy[field.at(septum, xy) > 0.6], gain=0.8)
    islands = field.points(44, 0.4)
    islands = islands[field.at(np.abs(distance), islands) > 12]
    radii = _outlines(field, islands, field.rng.uniform(7, 15, len(islands)), 0.5)
    body = field.polygons(_ring(islands, radii, 1.0), [1.0] * len(islands))
    field.e += body * 0.42
    field.h += body * (0.16 - field.h)
    xy = field.points(7.5, 0.3)
    field.nuclei("stellate", xy[field.at(body, xy) > 0.7], gain=1.15)


def lymphoid_aggregates(field: Field) -> None:
    """Crowded small round dark nuclei with hardly any cytoplasm, and a few paler germinal centres."""
    field.e += 0.22 + 0.04 * field.noise(6)
    field.h += 0.16
    middles = field.points(210, 0.3)
    radii = _outlines(field, middles, field.rng.uniform(30, 46, len(middles)), 0.2)
    centre = field.polygons(_ring(middles, radii, 1.0), [1.0] * len(middles), soft=3)
    field.e += 0.10 * centre
    xy = field.points(8.6, 0.33)
    pale = field.at(centre, xy)
    xy = xy[(pale < 0.5) | (field.rng.random(len(xy)) < 0.25)]
    field.nuclei("lymphocyte", xy[field.rng.random(len(xy)) < 0.94], gain=1.0)
    xy = field.points(12.5, 0.3)
    field.nuclei("centroblast", xy[field.at(centre, xy) > 0.5], gain=0.9)


def necrosis(field: Field) -> None:
    """Granular debris: shadows of cells, crumbs of chromatin, no whole nucleus anywhere."""
    grain = 0.8 * field.noise(2.6) + 0.8 * field.noise(5)
    clump = _ramp(field.noise(11) + 0.6 * field.noise(6), -0.6, 1.4)
    _, edge = field.cells(15)
    ghosts = _ramp(np.abs(edge - 3.4), 1.5, 0.2)
    field.e += np.clip(0.40 + 0.085 * grain + 0.24 * clump + 0.09 * ghosts, 0.08, None)
    field.h += 0.10 + 0.08 * clump + 0.02 * grain
    xy = field.points(11, 0.5)
    dusty = field.at(clump, xy) > 0.35
    field.nuclei("debris", xy[dusty], gain=0.75)
    field.nuclei("pyknotic", field.points(38, 0.5), gain=0.7)


def fat(field: Field) -> None:
    """Large empty polygonal cells in a net of thin membranes, nuclei pressed into the corners."""
    _, edge = field.cells(38)
    edge = edge + 0.4 * field.noise(12)
    wall = _ramp(edge, 2.7, 1.5)
    corner = _ramp(edge, 1.2, 0.4)
    field.e += 0.03 + wall * (0.62 + 0.06 * field.noise(5)) + 0.1 * corner
    field.h += wall * 0.16
    xy = field.points(9, 0.5)
    at = field.at(edge, xy)
    along = _direction(edge, xy)
    chosen = (at < 1.8) & (field.rng.random(len(xy)) < 0.5)
    field.nuclei("flat", xy[chosen], along[chosen], 0.9)


def _direction(surface: np.ndarray, xy: np.ndarray) -> np.ndarray:
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


def _fibres(field: Field, u: np.ndarray, v: np.ndarray, across: float, along: float) -> np.ndarray:
    """Noise of unit variance drawn out into fibres about `across` px wide and `along` px long, on the axes (u, v)."""
    shift = field.rng.uniform(0, 512, 2).astype(np.float32)
    row, col = u * np.float32(4.0 / across) + shift[0], v * np.float32(4.0 / along) + shift[1]
    top, left = row.astype(np.int32), col.astype(np.int32)
    down, right = row - top, col - left
    top, left = top & 511, left & 511
    below, beside, table = (top + 1) & 511, (left + 1) & 511, _table()
    upper = table[top, left] * (1 - right) + table[top, beside] * right
    lower = table[below, left] * (1 - right) + table[below, beside] * right
    return upper * (1 - down) + lower * down


def _fibre_axes(field: Field, turn: float, swing: float, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates across and along fibres that run at `turn` radians and swing by about `swing` px over `reach` px."""
    y, x = np.arange(field.rows, dtype=np.float32)[:, None], np.arange(field.cols, dtype=np.float32)
    warp = field.noise(reach * 2) * np.float32(swing / 1.5)
    u = x * np.float32(np.sin(turn)) - y * np.float32(np.cos(turn)) + warp
    v = x * np.float32(np.cos(turn)) + y * np.float32(np.sin(turn))
    return u + 8192, v + 8192


def fibrous_stroma(field: Field) -> None:
    """Dense wavy bundles of collagen, all running one way, with thin nuclei that lie along them."""
    u, v = _fibre_axes(field, field.rng.uniform(0, np.pi), 16.0, 50.0)
    bundle = _fibres(field, u, v, 13.0, 130.0)
    thread = _fibres(field, u, v, 3.6, 60.0)
    field.e += np.clip(0.52 + 0.14 * bundle + 0.09 * thread, 0.05, None)
    field.e *= 1 - 0.7 * _ramp(-bundle, 1.3, 1.9)
    field.h += 0.08
    xy = field.points(17, 0.45)
    field.nuclei("spindle", xy, _direction(u, xy), 0.9)


def ulcer(field: Field) -> None:
    """Fibrinopurulent exudate: a net of fibrin threads full of neutrophils and some red cells."""
    threads = np.maximum(_ramp(np.abs(field.noise(13)), 0.32, 0.04), 0.8 * _ramp(np.abs(field.noise(8)), 0.30, 0.04))
    field.e += 0.20 + 0.55 * threads + 0.04 * field.noise(3)
    field.h += 0.09
    xy = field.points(9.5, 0.42)
    crowd = field.at(field.noise(40), xy)
    field.nuclei("neutrophil", xy[field.rng.random(len(xy)) < 0.75 + 0.2 * crowd], gain=1.05)
    red = field.points(13, 0.5)
    red = red[field.at(field.noise(55), red) > 0.4]
    radii = np.full((len(red), 12), 3.2)
    field.e += 0.5 * field.polygons(_ring(red, radii, 1.0), [1.0] * len(red), soft=0.7)


TEXTURES: dict[str, Callable[[Field], None]] = {
    "glands": glands,
    "keratin pearls": keratin_pearls,
    "papillary fronds": papillary_fronds,
    "mucin pools": mucin_pools,
    "solid sheets": solid_sheets,
    "necrosis": necrosis,
    "lymphoid aggregates": lymphoid_aggregates,
    "fat": fat,
    "fibrous stroma": fibrous_stroma,
    "ulcer": ulcer,
}
