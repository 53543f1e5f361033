"""Tissue masks made elsewhere: outlines in GeoJSON (QuPath, TRIDENT), and masks in PNG, found by slide id.

A mask that belongs to another slide, level or size is refused, as far as its file tells.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image

from data_prep.slides import Slide
from data_prep.tissue_mask import Tissue, affordable, doubt_of, thumbnail, tissue_mask
from pathflip_jax.data.readers.outlines import Polygon, rasterise, read_annotations

SUFFIXES = (".geojson", ".png")  # the first one found counts: the folder `tissue` of records holds both, of one mask
_TISSUE, _IGNORED = "Tissue", "ignore"  # class of outlines without one; start of QuPath's classes such as Ignore*
_BEYOND = 0.01  # share of the slide's edge: masks at a low resolution end a pixel of theirs beyond it
_PICTURE_UM, _PICTURE_PX = 16.0, 256  # um per pixel, and least pixels, at which outlines are compared with the stain
_SCALES = (2, 4, 8, 16, 32, 64, 128)  # usual downsamples, besides those of the slide
_MISSED, _MET = 0.5, 0.6  # share of outlines on stained tissue, and their Dice with it at another scale
_COLOURS = 2  # most colours of a mask saved as RGB


def find_mask(folder: Path, slide_id: str) -> Path | None:
    """File of a slide's mask in a folder; None where there is none."""
    return next((path for suffix in SUFFIXES if (path := folder / f"{slide_id}{suffix}").exists()), None)


def read_given_mask(path: Path, slide: Slide, downsample: float) -> Tissue:
    """Read the mask of a slide at about a downsample from level 0, with a thumbnail of the slide.

    In GeoJSON, tissue is inside the outlines, in level-0 pixels, except in those of classes that begin with "Ignore";
    in PNG, nonzero. Raises ValueError for a mask that does not fit the slide, and for an empty or unreadable one.
    """
    downsample = affordable(slide, downsample)
    shape = -(-slide.height // downsample), -(-slide.width // downsample)
    read = _png_mask if path.suffix.lower() == ".png" else _outlined_mask
    mask, notes = read(path, slide, tuple(map(int, shape)), downsample)
    picture = thumbnail(slide)
    return Tissue(mask, downsample, 0.0, doubt_of(picture), picture, path.name, notes)


def _outlined_mask(
    path: Path, slide: Slide, shape: tuple[int, int], downsample: float
) -> tuple[Bool[np.ndarray, "h w"], tuple[str, ...]]:
    annotations = read_annotations(path, _TISSUE)
    kept = {name: not name.casefold().startswith(_IGNORED) for name in annotations.outlines}
    tissue = [polygon for name, own in annotations.outlines.items() if kept[name] for polygon in own]
    ignored = [polygon for name, own in annotations.outlines.items() if not kept[name] for polygon in own]
    if ignored and not tissue:
        raise ValueError(
            f"{path}: no outline of tissue, only {len(ignored)} of classes that begin with Ignore; outline the tissue, "
            "or leave the slide out"
        )
    if tissue:
        _check_extent(path, tissue, slide)
        _check_level(path, tissue, slide)
    mask = rasterise(tissue, shape, np.zeros(2), downsample)
    if ignored:
        mask &= ~rasterise(ignored, shape, np.zeros(2), downsample)
    note = annotations.note()
    return mask, (f"its mask of tissue: {note}",) if note else ()


def _check_extent(path: Path, polygons: Sequence[Polygon], slide: Slide) -> None:
    """Raise ValueError for outlines that lie beyond the slide."""
    points = np.concatenate([polygon.ring for polygon in polygons])
    size = np.array([slide.width, slide.height])
    first, last = points.min(0), points.max(0)
    if (first >= -_BEYOND * size).all() and (last <= (1 + _BEYOND) * size).all():
        return
    swapped = (last[::-1] <= (1 + _BEYOND) * size).all() and (first >= -_BEYOND * size.max()).all()
    raise ValueError(
        f"{path}: its outlines reach from {first[0]:.0f}, {first[1]:.0f} to {last[0]:.0f}, {last[1]:.0f}, but "
        f"{slide.path.name} has {slide.width} x {slide.height} px at level 0: expected the outlines of this slide, in "
        "level-0 pixels; "
        + ("x and y seem swapped" if swapped else "they are those of another slide, or of another scan of it")
        + "; export them again from this file"
    )


def _check_level(path: Path, polygons: Sequence[Polygon], slide: Slide) -> None:
    """Raise ValueError for outlines that miss the stained tissue, and meet it when they are enlarged.

    Only outlines that lie within a half of both edges can be those of a lower level; for others no pixel is read.
    """
    reach = (np.concatenate([polygon.ring for polygon in polygons]).max(0) / [slide.width, slide.height]).max()
    scales = sorted({*_SCALES, *(round(scale, 4) for scale in slide.image.level_downsamples[1:])})
    scales = [scale for scale in scales if 1 < scale and scale * reach <= 1 + _BEYOND]
    if not scales:
        return
    downsample = min(_PICTURE_UM / slide.mpp, max(slide.width, slide.height) / _PICTURE_PX)
    stained, downsample, *_ = tissue_mask(slide, max(1.0, downsample), keep_ink=True)
    inside = rasterise(polygons, stained.shape, np.zeros(2), downsample)
    if inside.any() and stained[inside].mean() > _MISSED:
        return
    for scale in scales:
        inside = rasterise(polygons, stained.shape, np.zeros(2), downsample / scale)
        if 2 * (inside & stained).sum() > _MET * (inside.sum() + stained.sum()):
            raise ValueError(
                f"{path}: its outlines lie on glass, and on the tissue of {slide.path.name} when enlarged {scale:g} "
                f"times: coordinates of a level with a downsample of {scale:g}; expected level-0 pixels: multiply them "
                f"by {scale:g}, or export them at full resolution"
            )


def _png_mask(
    path: Path, slide: Slide, shape: tuple[int, int], downsample: float
) -> tuple[Bool[np.ndarray, "h w"], tuple[str, ...]]:
    try:
        with Image.open(path) as image:
            values = np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: not a readable PNG ({error}); save the mask again") from None
    if values.ndim == 3:
        colours = np.unique(values.reshape(-1, values.shape[-1])[:: max(1, values[..., 0].size >> 20)], axis=0)
        if len(colours) > _COLOURS:
            raise ValueError(
                f"{path}: a picture of {len(colours)} colours or more, not a mask; expected one channel, in which "
                "tissue is nonzero"
            )
        opaque = values[..., -1:] > 0 if values.shape[-1] in (2, 4) else True
        values = (values[..., : values.shape[-1] - (values.shape[-1] in (2, 4))] * opaque).any(-1)
    rows, columns = values.shape
    _check_size(path, (columns, rows), slide)
    row = ((np.arange(shape[0]) + 0.5) * downsample * rows / slide.height).astype(int)
    column = ((np.arange(shape[1]) + 0.5) * downsample * columns / slide.width).astype(int)
    mask = values[np.minimum(row, rows - 1)][:, np.minimum(column, columns - 1)] != 0
    return mask, ()


def _check_size(path: Path, size: tuple[int, int], slide: Slide) -> None:
    """Raise ValueError for a mask whose sides are not those of the slide, divided by one number and rounded."""
    edges = (slide.width, slide.height)
    least = max(edge / (side + 1) for edge, side in zip(edges, size, strict=True))
    most = min(edge / max(side - 1, 1e-9) for edge, side in zip(edges, size, strict=True))
    if least > most or any(side > edge for edge, side in zip(edges, size, strict=True)):
        width = size[1] * slide.width / slide.height
        raise ValueError(
            f"{path}: a mask of {size[0]} x {size[1]} px, but {slide.path.name} has {slide.width} x {slide.height} px "
            f"at level 0: expected the whole slide, made smaller by one factor (such as {width:.0f} x {size[1]} px); "
            "it is of another slide or of a part of it: export it again from this file"
        )
