"""Pen ink detection: marker of any colour, distinguished from stained tissue by its dye and its evenness.

Each dye absorbs red, green and blue in characteristic proportions (Beer-Lambert: optical densities, OD). Haematoxylin
and eosin absorb green most, so tissue lies in the wedge between the two: a dye that absorbs red more than green (blue,
green), or blue alone (yellow, orange), is not tissue. Red, pink and purple pens lie within the wedge. They are one dye
without structure, so their proportions are spatially constant, and they have no cell-sized structure; blood and dense
lymphocytes have both variations.
"""

from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import Bool, Float, UInt8
from scipy import ndimage

PIXEL_UM = 8.0  # resolution of ink detection, at which nuclei and their surroundings mix
_GLASS_BRIGHT, _GLASS_PALE, _GLASS_SHARE = 190, 0.1, 0.002  # glass: brighter, paler, a larger share of the image
_WHITE = 245.0  # assumed for glass where a slide shows none
_STROKE_PX = 3  # a stroke of at least 24 um; scattered bluish pixels of tissue are not a stroke
_SMALLEST_PX = 80  # 0.005 mm2: a dot of a pen; smaller ones are dirt, or tissue
_EVEN_PX = 3  # extent of even ink: 24 um
_EVEN_OD, _ONE_DYE = 0.06, 0.05  # standard deviations, of OD and of the proportions, in ink within the wedge
# Strong red pen, by OD in blue: it absorbs more over tissue than next to it, and less red than haematoxylin would add.
_RED_PEN, _AS_MUCH, _NO_HAEMATOXYLIN = 0.6, 0.95, 0.45
_ROWS = 1024  # rows of the image at a time, since floats take four times its memory

Look = Callable[[int, int], float]  # amount of structure at a row and column of the image, in grey levels
Piece = tuple[np.ndarray, np.ndarray]  # rows and columns
_STRUCTURE = 4.0  # grey levels, at the size of cells: grain and compression in ink stay below
_LOOKS, _MOST_PIECES = 12, 64  # points of a component examined closely, and components examined
# Fraction of points without structure that marks pen: with a colour outside the wedge, as parts of it cover tissue, and
# with a colour within it.
_OUTSIDE_SHARE, _WITHIN_SHARE = 0.25, 0.5
_BLUE_PEN, _CLEAR_SHARE = 1.4, 0.3  # OD in red over green, above that of any haematoxylin, and the share of a component


def find_ink(picture: UInt8[np.ndarray, "h w 3"], look: Look) -> Bool[np.ndarray, "h w"]:
    """Mask of pen marks on an image with pixels of `PIXEL_UM`; `look` decides where colour is inconclusive."""
    glass = _glass(picture)
    strong, weak, doubtful = (np.zeros(picture.shape[:2], bool) for _ in range(3))
    for rows, inner, density in _densities(picture, glass):
        for found, part in zip((strong, weak, doubtful), _classes(density), strict=True):
            found[rows] = part[inner]
    ink = np.zeros_like(strong)
    for piece, inside, density in _pieces(_strokes(strong), picture, glass):
        if _has_ink_colour(density) or _is_smooth(inside, look, _OUTSIDE_SHARE):
            ink[piece] = True
    if ink.any():
        ink = ndimage.binary_propagation(ink, mask=weak | strong)
    within, dyes = np.zeros_like(ink), []
    for piece, inside, density in _pieces(_strokes(doubtful & ~ink), picture, glass):
        if _is_one_dye(density) and _is_smooth(inside, look, _WITHIN_SHARE):
            within[piece] = True
            dyes.append(np.median(density, 0))
    ink |= _grown(within, _EVEN_PX // 2 + 1)  # the even area ends before the stroke
    reds = [dye for dye in dyes if dye[2] > _RED_PEN]
    if reds:
        ink = ndimage.binary_propagation(ink, mask=ink | _over_tissue(picture, glass, np.median(reds, 0)))
    return _grown(ink, 1)  # the blurred rim of strokes


def _grown(mask: Bool[np.ndarray, "h w"], pixels: int) -> Bool[np.ndarray, "h w"]:
    return ndimage.binary_dilation(mask, iterations=pixels) if mask.any() else mask


def _glass(picture: UInt8[np.ndarray, "h w 3"]) -> Float[np.ndarray, "3"]:
    """Colour of bare glass: a scanner's white is often tinted."""
    some = picture[:: max(1, len(picture) // 1024), :: max(1, picture.shape[1] // 1024)].reshape(-1, 3)
    largest, smallest = some.max(1).astype(np.float32), some.min(1).astype(np.float32)
    bare = some[(smallest > _GLASS_BRIGHT) & (largest - smallest < _GLASS_PALE * largest)]
    return np.median(bare, 0) if len(bare) > _GLASS_SHARE * len(some) else np.full(3, _WHITE)


def _densities(
    picture: UInt8[np.ndarray, "h w 3"], glass: Float[np.ndarray, "3"]
) -> Iterator[tuple[slice, slice, Float[np.ndarray, "3 rows w"]]]:
    """OD in red, green and blue, in blocks of rows with a margin: the rows, their position in the block, and OD."""
    for top in range(0, len(picture), _ROWS):
        first, last = max(0, top - _EVEN_PX), min(len(picture), top + _ROWS + _EVEN_PX)
        light = np.maximum(picture[first:last].astype(np.float32), 1) / glass.astype(np.float32)
        rows = slice(top, min(top + _ROWS, len(picture)))
        yield rows, slice(top - first, rows.stop - first), -np.log10(light).transpose(2, 0, 1)


def _classes(density: Float[np.ndarray, "3 h w"]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks of ink by colour, of ink next to it, and of areas even and strong enough to be ink in the wedge."""
    red, green, blue = density
    strong = (red > 0.25) & (red > 1.15 * green) & (blue < 1.3 * red)  # blue, violet-blue, turquoise, green
    strong |= (red > 0.7) & (red > 0.95 * green) & (blue < red)  # dark blue, and blue over tissue
    strong |= (blue > 0.3) & (blue > 1.8 * green) & (red < 0.25 * green + 0.02)  # yellow, orange; DAB absorbs red, too
    weak = (red > 0.12) & (red > green) & (blue < 1.3 * red)
    weak |= (red > 0.5) & (red > 0.88 * green) & (blue < red)
    weak |= (blue > 0.15) & (blue > 1.5 * green) & (red < 0.3 * green + 0.02)
    highest, lowest = density.max(0), density.min(0)
    doubtful = (highest > 0.35) & (highest - lowest > 0.3) & (green > 0.3) & (1.15 * green > red) & ~strong
    spread = np.sqrt(np.maximum(_mean(highest**2) - _mean(highest) ** 2, 0))
    return strong, weak, doubtful & (spread < _EVEN_OD * np.maximum(1, highest))


def _mean(values: np.ndarray) -> np.ndarray:
    return ndimage.uniform_filter(values, _EVEN_PX, mode="nearest")


def _strokes(mask: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Mask without areas thinner than a stroke or smaller than a pen dot."""
    if not mask.any():
        return mask
    mask = ndimage.binary_opening(mask, np.ones((_STROKE_PX, _STROKE_PX), bool))
    pieces, _ = ndimage.label(mask)
    large = np.bincount(pieces.ravel()) >= _SMALLEST_PX
    large[0] = False
    return large[pieces]


def _pieces(
    mask: Bool[np.ndarray, "h w"], picture: UInt8[np.ndarray, "h w 3"], glass: Float[np.ndarray, "3"]
) -> Iterator[tuple[Piece, Piece, Float[np.ndarray, "n 3"]]]:
    """Largest components of a mask, the half of each that is farthest from its rim, and OD in the component."""
    pieces, _ = ndimage.label(mask)
    sizes = np.bincount(pieces.ravel())[1:]
    places = ndimage.find_objects(pieces)
    for number in np.argsort(-sizes, kind="stable")[:_MOST_PIECES]:
        top, left = (side.start for side in places[number])
        own = pieces[places[number]] == number + 1
        depth = ndimage.distance_transform_edt(np.pad(own, 1))[1:-1, 1:-1]
        row, column = np.nonzero(own)
        inner = depth[own] >= np.median(depth[own])
        piece = row + top, column + left
        density = -np.log10(np.maximum(picture[piece].astype(np.float32), 1) / glass)
        yield piece, (piece[0][inner], piece[1][inner]), density


def _has_ink_colour(density: Float[np.ndarray, "n 3"]) -> bool:
    """Whether much of a component has a colour that no tissue stain has: plain blue, green, yellow or orange."""
    red, green, blue = density.T
    return bool(((red > _BLUE_PEN * green) | (blue > 1.8 * green)).mean() > _CLEAR_SHARE)


def _is_one_dye(density: Float[np.ndarray, "n 3"]) -> bool:
    """Whether red and blue are absorbed in the same proportion to green throughout a component."""
    return bool((density[:, ::2] / density[:, 1:2]).std(0).max() < _ONE_DYE)


def _over_tissue(picture: np.ndarray, glass: np.ndarray, dye: Float[np.ndarray, "3"]) -> Bool[np.ndarray, "h w"]:
    """Mask of areas where red pen may cover tissue."""
    found = np.zeros(picture.shape[:2], bool)
    for rows, inner, (red, green, blue) in _densities(picture, glass):
        more = (blue > _AS_MUCH * dye[2]) & (green > _AS_MUCH * dye[1]) & (red < _NO_HAEMATOXYLIN * green)
        found[rows] = more[inner]
    return found


def _is_smooth(piece: Piece, look: Look, share: float) -> bool:
    """Whether at least that fraction of a component's points has no cell-sized structure."""
    at = np.linspace(0, len(piece[0]) - 1, _LOOKS).round().astype(int)
    seen = [look(int(row), int(column)) for row, column in zip(piece[0][at], piece[1][at], strict=True)]
    return np.mean(np.array(seen) < _STRUCTURE) >= share
