"""Frozen patch encoders: from pixels to one feature vector per patch.

An encoder is a name, a feature width and a call (`PatchEncoder`). The embedded one, `stain_texture`, needs no
download and no network: it lets the entire pipeline run anywhere, and is a baseline that a learned encoder must beat.
`load_encoder` loads learned ones by name: registered ones, in JAX on all devices of one
process (`DeviceEncoder`, `vision_encoders`), and others from timm or a Hugging Face folder, in PyTorch
(`torch_encoders`).
"""

import difflib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from jaxtyping import Float, UInt8

from pathflip_jax.vision.recipes import RECIPES, find_recipe, known_recipe

if TYPE_CHECKING:
    import jax


class PatchEncoder(Protocol):
    """The interface of a patch encoder: uint8 RGB patches in, one float32 row per patch out.

    `name` goes into every record, so that features of two encoders are never mixed. A row depends on its
    patch alone, never on its neighbours in the batch. An encoder may have `recipe_facts() -> dict`, further facts of
    its features for encoder.json, named as in `FeatureRecipe`: weights, transform, pooling, precision.
    """

    name: str
    dim: int

    def __call__(self, patches: UInt8[np.ndarray, "n P P 3"]) -> Float[np.ndarray, "n F"]:
        """Encode a batch of patches."""


class DeviceEncoder(PatchEncoder, Protocol):
    """The interface of a network on all local devices: batches of one size, computed while the next ones are filled.

    It lives in one process, since a TPU admits one and a GPU's memory goes to one. It may have `halve() -> bool`, which
    halves `batch_size` after the device's memory ran out; False where it cannot.
    """

    batch_size: int  # patches per batch, over all local devices

    def dispatch(self, patches: UInt8[np.ndarray, "B P P 3"]) -> "jax.Array":
        """Start encoding a batch of `batch_size` patches; returns [B, F] before the devices have computed it."""


def runs_on_device(name: str) -> bool:
    """Whether an encoder is a `DeviceEncoder`, which one process feeds from several readers of slides."""
    return ":" not in name and find_recipe(name) is not None


def load_encoder(
    name: str, half: bool = False, batch_size: int | None = None, weights: Path | None = None
) -> PatchEncoder:
    """Load the encoder of that name: `stain_texture`, a registered one, `timm:NAME_OR_FOLDER` or `hf:FOLDER`.

    `half` computes in half precision where the encoder is a network; `batch_size` and `weights` are those of a
    registered one (`VisionEncoder`). Raises ValueError for a name that is none of these, and for a registered encoder
    by way of timm or transformers; ImportError when the packages of the `encoders` extra are missing; FileNotFoundError
    when weights or a model folder are.
    """
    if name == StainTexture.name:
        return StainTexture()
    if runs_on_device(name):
        from data_prep.vision_encoders import VisionEncoder  # the readers of slides import no JAX

        return VisionEncoder(known_recipe(name), weights, half, batch_size)
    source, _, model = name.partition(":")
    if source not in ("timm", "hf") or not model:
        close = difflib.get_close_matches(name, (StainTexture.name, *RECIPES), n=1)
        raise ValueError(
            f"unknown encoder {name!r}{f', did you mean {close[0]}?' if close else ''}: expected stain_texture, an "
            "encoder that `pathflip encoders` lists, timm:NAME_OR_FOLDER or hf:FOLDER"
        )
    if recipe := find_recipe(model.removeprefix("hf-hub:").removeprefix("hf_hub:")) or find_recipe(Path(model).name):
        folder = f" --weights {model}" if Path(model).exists() else ""
        raise ValueError(
            f"encoder {name!r}: {recipe.name} is registered, with its own transform and pooling, which {source} does "
            f"not know; pass `--encoder {recipe.name}{folder}` instead"
        )
    if source == "hf" and not Path(model).is_dir():
        raise FileNotFoundError(
            f"encoder {name!r}: {model} is not a folder; download the model first "
            "(`hf download OWNER/NAME --local-dir FOLDER`) and pass its folder"
        )
    try:
        from data_prep import torch_encoders
    except ImportError as error:
        raise ImportError(
            f"encoder {name!r} needs torch ({error}); install it with `pip install pathflip-jax[encoders]`"
        ) from error
    return torch_encoders.HuggingFace(model, half) if source == "hf" else torch_encoders.Timm(model, half)


# Each statistic of a scale, with its centre and spread at the four scales. Measured on real H&E (the Aperio
# sample slide CMU-1-Small-Region at 0.5 um/px, patches of 64 and 256 px), then rounded.
_SCALE_STATISTICS = {
    "variance": ((-0.6, -1.1, -1.9, -2.9), (0.35, 0.5, 0.7, 0.9)),
    "skewness": ((1.4, 1.0, 0.6, 0.3), (1.1, 0.9, 0.7, 0.6)),
    "kurtosis": ((1.7, 1.3, 1.1, 0.9), (0.7, 0.5, 0.4, 0.35)),
    "gradient": ((-2.5, -2.7, -3.2, -3.6), (0.35, 0.4, 0.5, 0.7)),
    "anisotropy": ((0.28, 0.3, 0.35, 0.45), (0.16, 0.18, 0.2, 0.23)),
    "laplacian skewness": ((-1.9, -1.2, -0.7, -0.3), (1.0, 0.8, 0.7, 0.6)),
    "laplacian kurtosis": ((2.5, 1.7, 1.3, 0.8), (0.6, 0.55, 0.45, 0.3)),
    "ridges": ((0.455, 0.463, 0.473, 0.5), (0.012, 0.015, 0.03, 0.07)),
    "dark blobs": ((0.4, 0.38, 0.38, 0.3), (0.07, 0.08, 0.1, 0.13)),
    "light blobs": ((0.21, 0.21, 0.22, 0.22), (0.05, 0.06, 0.08, 0.11)),
    "peaks": ((0.15, 0.15, 0.17, 0.16), (0.03, 0.03, 0.035, 0.12)),
}
_PATTERNS = ((0.13, 0.17, 0.24, 0.43, 0.60, 0.39, 0.25, 0.17, 0.15, 0.26), 0.04)
_CORRELATION = (0.3, 0.4)
_STAIN_LEVELS = ((0.35, 0.30, 0.25), (0.25, 0.2, 0.15))  # haematoxylin, eosin, residual
_STAIN_CONTRAST = ((0.45, 0.22, 0.18), (0.25, 0.12, 0.12))
_EMPTY, _DENSE = (0.15, 0.2), (0.1, 0.15)
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_LIMIT = 5.0

_SCALES, _PATTERN_SCALES = 4, 3
_SMALLEST = 32
_PIXELS_AT_ONCE = 1 << 16  # size of a chunk's work arrays, which fit in the processor's cache
_FILTERED_PIXELS_AT_ONCE = 1 << 15  # the same for the filters, which need some fifteen arrays
_DENSITY = -np.log(np.maximum(np.arange(256), 1) / 255.0).astype(np.float32)


class StainTexture:
    """The embedded encoder: 175 statistics of stain and texture per patch, deterministic, for H&E.

    Stains are separated as scikit-image's `rgb2hed` does (Ruifrok and Johnston 2001), in natural-log optical
    density with black taken as one grey level. Then, for patches of 32 px and more:

    - **stain** (23): mean, standard deviation and five quantiles of haematoxylin, eosin and the residual; the
      shares of empty glass and of dense pixels. These follow the staining.
    - **filters** (88): haematoxylin and eosin, each standardised over the patch so that strong and weak
      staining give the same values, at four scales of a Gaussian pyramid (sigma about 1, 2.2, 4.6 and 9 px):
      variance, skewness, kurtosis; gradient energy and its anisotropy (structure tensor); skewness and
      kurtosis of the Laplacian; the Hessian's share of ridges, dark blobs and light blobs; density of the
      Laplacian's peaks, which is close to nuclei per area at a fine scale.
    - **patterns** (60): uniform rotation-invariant local binary patterns (Ojala et al. 2002, 8 neighbours) of
      both stains at three scales, as square roots of their frequencies.
    - **correlation** (4): of the two stains at each scale: whether nuclei coincide with eosin.

    Every value is centred, divided by a fixed spread and clipped to +-5, so that a linear layer can take the
    groups as they are. Constants come from a real slide; nothing is fitted to a cohort.
    """

    name = "stain_texture"
    dim = 175

    def recipe_facts(self) -> dict[str, str]:
        """Version of the statistics, which changes with any of their values, and their precision."""
        return {"encoder_version": "1", "precision": "float32"}

    def __call__(self, patches: UInt8[np.ndarray, "n P P 3"]) -> Float[np.ndarray, "n F"]:
        """Encode a batch; raises ValueError for anything but uint8 RGB squares of at least 32 px."""
        if patches.ndim != 4 or patches.dtype != np.uint8 or patches.shape[3] != 3 or min(patches.shape[1:3]) < 32:
            raise ValueError(
                f"stain_texture got patches of shape {patches.shape}, {patches.dtype}: expected uint8 [n, P, P, 3] "
                f"with P at least {_SMALLEST}; choose a larger patch size"
            )
        chunk = max(1, _PIXELS_AT_ONCE // patches[0, :, :, 0].size) if len(patches) else 1
        rows = [_describe(patches[i : i + chunk]) for i in range(0, len(patches), chunk)]
        return np.concatenate([np.empty((0, self.dim), np.float32), *rows])


def _describe(patches: np.ndarray) -> np.ndarray:
    number = len(patches)
    density = _DENSITY[patches]
    stains = (density @ _separation()).transpose(3, 0, 1, 2)  # haematoxylin, eosin, residual
    stains = np.maximum(stains, 0, order="C")  # [3, n, P, P]
    groups = [_stain(stains.reshape(3, number, -1))]
    grey = (density[..., 0] + density[..., 1] + density[..., 2]) / np.float32(3)
    groups += [(_mean(grey < 0.15) - _EMPTY[0]) / _EMPTY[1], (_mean(grey > 1.0) - _DENSE[0]) / _DENSE[1]]

    both = stains[:2].reshape(-1, *stains.shape[2:])  # [2n, P, P]
    both -= _mean(both)[:, None, None]
    both /= np.sqrt(_dot(both, both))[:, None, None] + 0.03  # the floor keeps camera noise on empty glass small
    for scale in range(_SCALES):
        both = _blur(_halve(both) if scale else both)
        step = max(1, _FILTERED_PIXELS_AT_ONCE // both[0].size)
        parts = [_statistics(both[i : i + step]) for i in range(0, len(both), step)]
        for name, values in zip(_SCALE_STATISTICS, map(np.concatenate, zip(*parts, strict=True)), strict=True):
            centre, spread = (constants[scale] for constants in _SCALE_STATISTICS[name])
            values = (values - centre) / spread
            groups += [values[:number], values[number:]]
        if scale < _PATTERN_SCALES:
            values = (_patterns(both) - np.array(_PATTERNS[0], np.float32)) / _PATTERNS[1]
            groups += [values[:number], values[number:]]
        first, second = (part - _mean(part)[:, None, None] for part in (both[:number], both[number:]))
        product = np.sqrt(_dot(first, first) * _dot(second, second)) + 1e-3
        groups.append((_dot(first, second) / product - _CORRELATION[0]) / _CORRELATION[1])
    columns = [group.reshape(number, -1) for group in groups]
    return np.clip(np.concatenate(columns, 1), -_LIMIT, _LIMIT).astype(np.float32)


def _stain(stains: np.ndarray) -> np.ndarray:
    """Level and contrast of each stain: [3, n, pixels] to [n, 21]."""
    values = np.sort(stains, axis=2)
    count, number, pixels = values.shape
    # Summed pixel by pixel, and squared with the stains interleaved: features then round as in records of 0.1.0.
    mean = np.add.reduce(np.ascontiguousarray(values.reshape(-1, pixels).T), axis=0) / np.float32(pixels)
    mean = mean.reshape(count, number)
    centred = np.subtract(values, mean[..., None], out=np.empty((number, pixels, count), np.float32).transpose(2, 0, 1))
    contrast = np.sqrt(np.vecdot(centred, centred) / pixels).T
    levels = [mean.T, *((mean + centred[..., int(q * (pixels - 1))]).T for q in _QUANTILES)]
    (centre, spread), (middle, width) = np.float32(_STAIN_LEVELS), np.float32(_STAIN_CONTRAST)
    levels = [(level - centre) / spread for level in levels]
    return np.concatenate([*levels, (contrast - middle) / width], 1)


def _mean(images: np.ndarray) -> np.ndarray:
    return images.mean((1, 2), dtype=np.float32)


def _dot(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mean of the product of two stacks of images."""
    return np.einsum("nij,nij->n", first, second) / np.float32(first[0].size)


@functools.cache
def _separation() -> np.ndarray:
    """Matrix from optical densities of red, green and blue to haematoxylin, eosin and the residual."""
    from skimage.color import hed_from_rgb  # takes 0.2 s, spent only where patches are encoded

    return hed_from_rgb.astype(np.float32)


def _blur(images: np.ndarray) -> np.ndarray:
    from scipy import ndimage  # likewise

    rows = ndimage.gaussian_filter1d(images, 1.0, axis=1, truncate=3.0)
    return ndimage.gaussian_filter1d(rows, 1.0, axis=2, truncate=3.0)


def _halve(images: np.ndarray) -> np.ndarray:
    rows, columns = (size // 2 * 2 for size in images.shape[1:])
    even, odd = images[:, :rows:2], images[:, 1:rows:2]
    return 0.25 * (even[..., :columns:2] + even[..., 1:columns:2] + odd[..., :columns:2] + odd[..., 1:columns:2])


def _statistics(images: np.ndarray) -> list[np.ndarray]:
    """The rows of `_SCALE_STATISTICS`, in their order, of images [n, m, m]."""
    centre = images[:, 1:-1, 1:-1]
    left, right = images[:, 1:-1, :-2], images[:, 1:-1, 2:]
    above, below = images[:, :-2, 1:-1], images[:, 2:, 1:-1]
    across, down = right - left, below - above
    energy_across, energy_down = 0.25 * _dot(across, across), 0.25 * _dot(down, down)
    energy_both = 0.25 * _dot(across, down)
    gradient = energy_across + energy_down

    twice = 2 * centre
    second_across, second_down = right + left - twice, below + above - twice
    mixed = images[:, 2:, 2:] + images[:, :-2, :-2] - images[:, 2:, :-2] - images[:, :-2, 2:]  # 4 times the derivative
    laplacian, difference = second_across + second_down, second_across - second_down
    spread = np.sqrt(difference * difference + 0.25 * mixed * mixed)  # of the Hessian's eigenvalues
    square = laplacian * laplacian
    blobs, ridges = _mean(square), _dot(spread, spread)
    size = np.sqrt(blobs) + 1e-2
    # Much stain is dark: there both eigenvalues of the density are negative, at its bright gaps both positive.
    largest, smallest = np.minimum(laplacian + spread, 0), np.maximum(laplacian - spread, 0)
    dark, light = np.sqrt(_dot(largest, largest)), np.sqrt(_dot(smallest, smallest))
    peaks = (laplacian <= _lowest(laplacian)) & (laplacian < -0.5 * size[:, None, None])

    values = centre - _mean(centre)[:, None, None]
    powers = values * values
    variance = _mean(powers)
    deviation = np.sqrt(variance) + 1e-2
    return [
        np.log(variance + 1e-3),
        _dot(powers, values) / deviation**3,
        np.log(_dot(powers, powers) / deviation**4 + 0.1),
        np.log(gradient + 1e-3),
        np.hypot(energy_across - energy_down, 2 * energy_both) / (gradient + 1e-3),
        _dot(square, laplacian) / size**3,
        np.log(_dot(square, square) / size**4 + 0.1),
        ridges / (ridges + blobs + 1e-3),
        dark / size,
        light / size,
        np.sqrt(_mean(peaks)),
    ]


def _lowest(images: np.ndarray) -> np.ndarray:
    """The minimum over each pixel and its 8 neighbours."""
    rows = images.copy()
    np.minimum(rows[:, 1:], images[:, :-1], out=rows[:, 1:])
    np.minimum(rows[:, :-1], images[:, 1:], out=rows[:, :-1])
    both = rows.copy()
    np.minimum(both[..., 1:], rows[..., :-1], out=both[..., 1:])
    np.minimum(both[..., :-1], rows[..., 1:], out=both[..., :-1])
    return both


def _pattern_table() -> np.ndarray:
    """Code of 8 neighbours to pattern: the number of ones when they are contiguous (uniform), else 9."""
    bits = (np.arange(256)[:, None] >> np.arange(8)) & 1
    changes = (bits != np.roll(bits, 1, axis=1)).sum(1)
    return np.where(changes <= 2, bits.sum(1), 9)


_PATTERNS_OF_CODES = np.eye(10, dtype=np.int64)[_pattern_table()]
_TIE = np.float32(1e-3)  # even areas: equal up to rounding counts as equal
_NEIGHBOURS = ((0, 0), (0, 1), (0, 2), (1, 2), (2, 2), (2, 1), (2, 0), (1, 0))


def _patterns(images: np.ndarray) -> np.ndarray:
    """Square roots of the frequencies of the ten uniform local binary patterns: [n, m, m] to [n, 10]."""
    number, edge = images.shape[:2]
    centre = images[:, 1:-1, 1:-1] - _TIE
    code = np.zeros(centre.shape, np.uint8)
    for bit, (row, column) in enumerate(_NEIGHBOURS):
        brighter = images[:, row : edge - 2 + row, column : edge - 2 + column] >= centre
        code |= brighter.view(np.uint8) << np.uint8(bit)
    codes = code.reshape(number, -1) + 256 * np.arange(number)[:, None]
    count = np.bincount(codes.ravel(), minlength=256 * number).reshape(number, 256) @ _PATTERNS_OF_CODES
    return np.sqrt(count / codes.shape[1]).astype(np.float32)
