"""Ten histological textures, drawn as amounts of haematoxylin and eosin.

Each function of `TEXTURES` fills a rectangle with one concept: what a pathologist would distinguish by the size, shape,
density and arrangement of nuclei and by the matrix between them. Colour carries as little information as possible:
`slide_image` later sets the mean colour of every area to a draw from one shared distribution. Units are pixels at level
0 and optical densities; everything is a function of the generator passed in, so a slide depends only on its seed.
"""

from collections.abc import Callable

import numpy as np

from data_prep.drawing import Field, along, direction, fibre_axes, fibres, outlines, ramp, ring


def background(field: Field) -> None:
    """Loose connective tissue, the background without any concept: faint mesh, few small nuclei."""
    mesh = np.minimum(np.abs(field.noise(16)), np.abs(field.noise(9)) + 0.1)
    field.e += 0.27 + 0.16 * ramp(mesh, 0.5, 0.0) + 0.03 * field.noise(30) + 0.02 * field.noise(4)
    field.h += 0.10
    field.nuclei("stellate", field.points(26, 0.5), gain=0.85)
    vessels = field.points(130, 0.45)
    radii = outlines(field, vessels, field.rng.uniform(6, 10, len(vessels)), 0.25)
    outer, lumen = ring(vessels, radii, 1.0), ring(vessels, radii, 0.65)
    wall = field.polygons(outer, [1.0] * len(outer))
    opening = field.polygons(lumen, [1.0] * len(lumen))
    field.e += wall * 0.25 - opening * (field.e + 0.22)
    field.h *= 1 - 0.7 * opening
    xy, outward = along(field, vessels, radii, 0.95, 9)
    field.nuclei("flat", xy[::2], outward[::2] + np.pi / 2, 0.9)


def glands(field: Field) -> None:
    """Round to oval glands: an open lumen, one row of basal columnar nuclei set radially, stroma between."""
    field.e += 0.42 + 0.07 * field.noise(7, 3)
    field.h += 0.08
    centres = field.points(66, 0.17)
    radius = field.rng.uniform(21, 31, len(centres)) * field.scale
    radii = outlines(field, centres, radius, 0.45)
    outer, lumen = ring(centres, radii, 1.0), ring(centres, radii, 0.52)
    epithelium = field.polygons(outer + lumen, [1.0] * len(outer) + [0.0] * len(lumen))
    opening = field.polygons(lumen, [1.0] * len(lumen), soft=1.2)
    inside = np.maximum(epithelium, opening)
    field.e += inside * (0.50 - field.e) + epithelium * 0.05 * field.noise(4)
    field.h += epithelium * 0.12
    secretion = ramp(field.noise(9), 0.9, 2.0) * 0.25
    field.e += opening * (0.03 + secretion - field.e)
    field.h *= 1 - opening
    stroma = field.points(17, 0.45)
    field.nuclei("spindle", stroma[field.at(inside, stroma) < 0.05], gain=0.8)
    for factor in (0.86, 0.76):
        xy, outward = along(field, centres, radii, factor, 6.0 if factor > 0.8 else 15.0)
        field.nuclei("columnar", xy, outward, 0.95)


def solid_sheets(field: Field) -> None:
    """Back-to-back large cells with vesicular nuclei and nucleoli, and next to no stroma or lumen."""
    centres, edge = field.cells(16.5)
    field.e += 0.36 + 0.22 * ramp(edge, 1.6, 0.3) + 0.05 * field.noise(5)
    field.h += 0.14
    centres = centres + field.rng.normal(0, 1.0, centres.shape)
    centres = centres[(centres >= 0).all(1) & (centres[:, 0] < field.cols) & (centres[:, 1] < field.rows)]
    dividing = field.rng.random(len(centres)) < 0.04
    field.nuclei("vesicular", centres[~dividing], gain=1.0)
    field.nuclei("pyknotic", centres[dividing], gain=1.2)


def keratin_pearls(field: Field) -> None:
    """Squamous nests: concentric lamellae of keratin with flattened nuclei, in a mosaic of polygonal cells."""
    cells, edge = field.cells(15)
    field.e += 0.46 + 0.04 * field.noise(5) - 0.26 * ramp(edge, 1.5, 0.4)
    field.h += 0.10
    whorl = np.zeros((field.rows, field.cols), np.float32)
    centres = field.points(78, 0.16)
    radius = field.rng.uniform(22, 38, len(centres)) * field.scale
    radii = outlines(field, centres, radius, 0.2)
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
        xy, outward = along(field, centres, radii, factor, gap)
        field.nuclei("flat", xy, outward + np.pi / 2, 0.9)


def papillary_fronds(field: Field) -> None:
    """Branching fronds in clear space: a fibrovascular core, a lining of round clear nuclei that overlap."""
    _, distance = field.band(78 * field.scale)
    distance = distance + 7 + 1.2 * field.noise(9)
    frond = ramp(distance, -0.8, 0.8)
    core = ramp(distance, 13, 15)
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
    septum = ramp(np.abs(distance), 5.5, 3.0)
    u, v = fibre_axes(field, field.rng.uniform(0, np.pi), 34.0, 60.0)
    wisps = fibres(field, u, v, 9.0, 90.0)
    strings = ramp(np.abs(wisps), 0.4, 0.0)
    field.h += (1 - septum) * (0.10 + 0.20 * strings + 0.02 * field.noise(20)) + septum * 0.08
    field.e += (1 - septum) * (0.04 + 0.07 * strings) + septum * (0.50 + 0.06 * field.noise(5))
    xy = field.points(13, 0.4)
    field.nuclei("spindle", xy[field.at(septum, xy) > 0.6], gain=0.8)
    islands = field.points(44, 0.4)
    islands = islands[field.at(np.abs(distance), islands) > 12]
    radii = outlines(field, islands, field.rng.uniform(7, 15, len(islands)), 0.5)
    body = field.polygons(ring(islands, radii, 1.0), [1.0] * len(islands))
    field.e += body * 0.42
    field.h += body * (0.16 - field.h)
    xy = field.points(7.5, 0.3)
    field.nuclei("stellate", xy[field.at(body, xy) > 0.7], gain=1.15)


def lymphoid_aggregates(field: Field) -> None:
    """Crowded small round dark nuclei with hardly any cytoplasm, and a few paler germinal centres."""
    field.e += 0.22 + 0.04 * field.noise(6)
    field.h += 0.16
    middles = field.points(210, 0.3)
    radii = outlines(field, middles, field.rng.uniform(30, 46, len(middles)), 0.2)
    centre = field.polygons(ring(middles, radii, 1.0), [1.0] * len(middles), soft=3)
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
    clump = ramp(field.noise(11) + 0.6 * field.noise(6), -0.6, 1.4)
    _, edge = field.cells(15)
    ghosts = ramp(np.abs(edge - 3.4), 1.5, 0.2)
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
    wall = ramp(edge, 2.7, 1.5)
    corner = ramp(edge, 1.2, 0.4)
    field.e += 0.03 + wall * (0.62 + 0.06 * field.noise(5)) + 0.1 * corner
    field.h += wall * 0.16
    xy = field.points(9, 0.5)
    at = field.at(edge, xy)
    along = direction(edge, xy)
    chosen = (at < 1.8) & (field.rng.random(len(xy)) < 0.5)
    field.nuclei("flat", xy[chosen], along[chosen], 0.9)


def fibrous_stroma(field: Field) -> None:
    """Dense wavy bundles of collagen, all running one way, with thin nuclei that lie along them."""
    u, v = fibre_axes(field, field.rng.uniform(0, np.pi), 16.0, 50.0)
    bundle = fibres(field, u, v, 13.0, 130.0)
    thread = fibres(field, u, v, 3.6, 60.0)
    field.e += np.clip(0.52 + 0.14 * bundle + 0.09 * thread, 0.05, None)
    field.e *= 1 - 0.7 * ramp(-bundle, 1.3, 1.9)
    field.h += 0.08
    xy = field.points(17, 0.45)
    field.nuclei("spindle", xy, direction(u, xy), 0.9)


def ulcer(field: Field) -> None:
    """Fibrinopurulent exudate: a net of fibrin threads full of neutrophils and some red cells."""
    threads = np.maximum(ramp(np.abs(field.noise(13)), 0.32, 0.04), 0.8 * ramp(np.abs(field.noise(8)), 0.30, 0.04))
    field.e += 0.20 + 0.55 * threads + 0.04 * field.noise(3)
    field.h += 0.09
    xy = field.points(9.5, 0.42)
    crowd = field.at(field.noise(40), xy)
    field.nuclei("neutrophil", xy[field.rng.random(len(xy)) < 0.75 + 0.2 * crowd], gain=1.05)
    red = field.points(13, 0.5)
    red = red[field.at(field.noise(55), red) > 0.4]
    radii = np.full((len(red), 12), 3.2)
    field.e += 0.5 * field.polygons(ring(red, radii, 1.0), [1.0] * len(red), soft=0.7)


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
