"""Separable resampling of images and position tables, as matrices over one axis.

A matrix [outputs, inputs] times an axis resamples it. The filters are those of Pillow, of torchvision and of PyTorch's
`interpolate`, which each published encoder uses in its own way.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
from jaxtyping import Float


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel (IEEE Trans. ASSP 29, 1981)."""
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


# Half width and kernel of each filter.
_FILTERS: dict[str, tuple[int, Callable[[np.ndarray], np.ndarray]]] = {
    "bilinear": (1, _triangle),
    "bicubic": (2, lambda x: _cubic(x, -0.5)),
}


@cache
def antialiased(inputs: int, outputs: int, kind: str) -> Float[np.ndarray, "outputs inputs"]:
    """Matrix of a resampling whose filter widens as the image shrinks: Pillow's, and PyTorch's with antialias.

    `kind` is bilinear or bicubic. Weights beyond the border are dropped and the rest rescaled to sum to one.
    """
    half, kernel = _FILTERS[kind]
    scale = inputs / outputs
    width = max(scale, 1.0)
    centres = (np.arange(outputs) + 0.5)[:, None] * scale
    positions = np.arange(inputs)[None]
    first = np.maximum((centres - half * width + 0.5).astype(int), 0)
    last = np.minimum((centres + half * width + 0.5).astype(int), inputs)
    weights = kernel((positions + 0.5 - centres) / width) * ((positions >= first) & (positions < last))
    return weights / weights.sum(1, keepdims=True)


@cache
def plain_bicubic(inputs: int, outputs: int, scale: float) -> Float[np.ndarray, "outputs inputs"]:
    """Matrix of PyTorch's bicubic interpolation without antialias: four taps, repeated at the border.

    Its kernel has a = -0.75, the antialiased one -0.5. `scale` is inputs per output; DINOv2's is not the ratio of the
    sizes (`positions`).
    """
    centres = (np.arange(outputs) + 0.5) * scale - 0.5
    first = np.floor(centres).astype(int)
    matrix = np.zeros((outputs, inputs))
    for tap in range(-1, 3):
        weights = _cubic(centres - (first + tap), -0.75)
        np.add.at(matrix, (np.arange(outputs), np.clip(first + tap, 0, inputs - 1)), weights)
    return matrix
