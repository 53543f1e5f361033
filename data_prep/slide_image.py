"""Rendering of a layout to a slide file: stains, colours and the pyramid.

Colour is made uninformative here. Every area is stained toward a target drawn from one distribution shared by all
concepts and the background, so that the mean colour of a patch carries almost no information about the concept; only
texture does.
"""

import os
from pathlib import Path

import numpy as np
import tifffile
from PIL import Image, ImageFilter
from scipy import ndimage

from data_prep.drawing import Field
from data_prep.layout import STEP, Layout
from data_prep.tissue import TEXTURES, background

MPP = 0.5
DOWNSAMPLES = (1, 4, 16)
TILE = 256

# Optical density per unit of haematoxylin and of eosin in red, green, blue (Ruifrok and Johnston 2001, roughly).
_STAINS = np.array([[0.65, 0.70, 0.29], [0.09, 0.95, 0.16]], np.float32)
# Target amounts of stain of areas, whatever they contain.
_TARGET_H, _TARGET_E = (0.12, 0.34), (0.18, 0.46)
_OWN_COLOUR = 0.12  # the share of an area's own colour that is kept, so that fat stays paler than a lymph follicle


def render(layout: Layout, rng: np.random.Generator) -> np.ndarray:
    """Draw the slide: uint8 [height, width, 3]."""
    stains = _STAINS * rng.uniform(0.93, 1.07, _STAINS.shape).astype(np.float32)
    stains *= rng.uniform(0.85, 1.2, (2, 1)).astype(np.float32)
    scale = rng.uniform(0.92, 1.1)
    ground = Field(rng, layout.height, layout.width, scale)
    background(ground)
    # Slide-wide properties are drawn before the areas, so that they do not depend on them.
    thickness = np.clip((ground.grow(layout.tissue) - 0.42) / 0.16, 0, 1) * (1 + 0.06 * ground.noise(150))
    white = rng.uniform(236, 250) - rng.uniform(0, 5, 3)
    grain = rng.integers(-3, 4, (layout.height, layout.width), np.int8)
    blur = rng.uniform(0.4, 0.8)
    _stain(ground.h, ground.e, np.argwhere(layout.tissue > 0.9) * STEP, stains, rng)
    for area in layout.areas:
        rows, cols = (np.flatnonzero((area.field > 0.05).any(axis)) for axis in (1, 0))
        top, bottom, left, right = rows[0], rows[-1] + 1, cols[0], cols[-1] + 1
        part = area.field[top:bottom, left:right]
        field = Field(rng, (bottom - top) * STEP, (right - left) * STEP, scale * rng.uniform(0.95, 1.05))
        TEXTURES[area.concept](field)
        _stain(field.h, field.e, np.argwhere(part > 0.9) * STEP, stains, rng)
        cover = np.clip((field.grow(part) - 0.42) / 0.16, 0, 1)
        here = (slice(top * STEP, bottom * STEP), slice(left * STEP, right * STEP))
        ground.h[here] += cover * (field.h - ground.h[here])
        ground.e[here] += cover * (field.e - ground.e[here])
    ground.h *= thickness
    ground.e *= thickness
    image = np.empty((layout.height, layout.width, 3), np.uint8)
    for channel in range(3):
        light = np.exp(-(ground.h * stains[0, channel] + ground.e * stains[1, channel])) * np.float32(white[channel])
        image[..., channel] = np.clip(light + grain, 0, 255)
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(blur)))


def _stain(h: np.ndarray, e: np.ndarray, inside: np.ndarray, stains: np.ndarray, rng: np.random.Generator) -> None:
    """Restain an area in place so that its mean colour is that of an even film with target amounts of stain.

    Two unknowns (one strength per stain) are solved for two means (red and green) on a sample of the
    pixels; blue follows. First the slow variation inside the area is partly levelled.
    """
    for layer in (h, e):
        np.clip(layer, 0, None, out=layer)
        small = layer[: layer.shape[0] // 16 * 16, : layer.shape[1] // 16 * 16]
        small = small.reshape(small.shape[0] // 16, 16, -1, 16).mean((1, 3))
        slow = ndimage.gaussian_filter(small, 2.0, mode="nearest")
        level = np.clip(slow.mean() / np.maximum(slow, 1e-3), 0.5, 2.0) ** 0.6
        layer *= np.asarray(
            Image.fromarray(level.astype(np.float32)).resize(layer.shape[::-1], Image.Resampling.BICUBIC)
        )
    amounts = np.array([rng.uniform(*_TARGET_H), rng.uniform(*_TARGET_E)], np.float32)
    wanted = -(amounts @ stains)[:2]
    pick = inside[rng.integers(0, len(inside), 5000)] + rng.integers(0, STEP, (5000, 2))
    pick = np.minimum(pick, np.array(h.shape) - 1)
    sample = h[pick[:, 0], pick[:, 1]], e[pick[:, 0], pick[:, 1]]

    def miss(strength: np.ndarray) -> np.ndarray:
        new = [_restain(layer, s) for layer, s in zip(sample, strength, strict=True)]
        light = [np.exp(-(new[0] * stains[0, c] + new[1] * stains[1, c])).mean() for c in range(2)]
        return np.log(np.array(light)) - wanted

    strength = np.zeros(2)
    wanted = wanted + _OWN_COLOUR * miss(strength)
    for _ in range(8):
        error = miss(strength)
        a, c = (miss(strength + [0.02, 0]) - error) / 0.02
        b, d = (miss(strength + [0, 0.02]) - error) / 0.02
        scale = a * d - b * c
        if abs(scale) < 1e-6:
            break
        step = np.array([d * error[0] - b * error[1], a * error[1] - c * error[0]]) / scale
        strength = np.clip(strength - np.clip(step, -0.6, 0.6), -2.0, 2.0)
    h[:], e[:] = _restain(h, strength[0]), _restain(e, strength[1])


def _restain(layer: np.ndarray, strength: float) -> np.ndarray:
    """Change the amount of a stain: mostly by contrast, partly by an even film."""
    return np.maximum(layer * np.float32(np.exp(0.75 * strength)) + np.float32(0.22 * strength), 0)


def write_slide(path: Path, image: np.ndarray) -> None:
    """Write a tiled pyramidal TIFF (JPEG, 256 px tiles) that OpenSlide reads with its mpp, atomically."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    base = Image.fromarray(image)
    try:
        with tifffile.TiffWriter(partial) as out:
            for downsample in DOWNSAMPLES:
                level = image if downsample == 1 else np.asarray(base.reduce(downsample))
                out.write(
                    level,
                    photometric="rgb",
                    tile=(TILE, TILE),
                    compression="jpeg",
                    compressionargs={"level": 87},
                    resolution=(1e4 / (MPP * downsample), 1e4 / (MPP * downsample)),
                    resolutionunit="CENTIMETER",
                    subfiletype=0 if downsample == 1 else 1,
                    metadata=None,
                    software="pathflip_jax",
                    maxworkers=1,
                )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
