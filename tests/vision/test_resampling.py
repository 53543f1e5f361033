"""Resampling of images and position tables against Pillow and PyTorch, and the transform of pixels."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from PIL import Image
from skimage import data

from pathflip_jax.vision.config import Transform, VisionConfig
from pathflip_jax.vision.positions import fitted
from pathflip_jax.vision.recipes import RECIPES
from pathflip_jax.vision.resampling import antialiased, plain_bicubic
from pathflip_jax.vision.transform import transformed

KINDS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
TRANSFORM = Transform(resize=224, crop=224, kind="bilinear", mean=(0, 0, 0), std=(1, 1, 1))
GRIDS = ((37, 16), (14, 28), (16, 37))


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="PyTorch is not installed")


def cut(size: int) -> np.ndarray:
    """Corner of a stained section."""
    return np.tile(data.immunohistochemistry(), (2, 2, 1))[:size, :size]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("before", "after"), [(512, 224), (256, 224), (100, 224), (225, 224), (7, 3), (3, 7), (1, 2)])
def test_matrix_is_the_resampling_of_pillow(kind, before, after):
    columns = np.random.default_rng(0).normal(size=(4, before)).astype(np.float32)
    theirs = np.asarray(Image.fromarray(columns).resize((after, 4), KINDS[kind]))
    np.testing.assert_allclose(columns @ antialiased(before, after, kind).T, theirs, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (256, 224), (448, 448), (225, 224)])
@pytest.mark.parametrize("size", [224, 256, 512, 300, 100])
def test_pixels_are_those_of_pillow(kind, resize, crop, size):
    """torchvision's Resize and CenterCrop of a Pillow image are these calls."""
    transform = replace(TRANSFORM, resize=resize, crop=crop, kind=kind)
    patch = cut(size)
    margin = int(round((resize - crop) / 2.0))
    theirs = Image.fromarray(patch).resize((resize, resize), KINDS[kind])
    theirs = np.asarray(theirs.crop((margin, margin, margin + crop, margin + crop)))
    ours = np.asarray(jax.jit(transformed, static_argnums=1)(patch[None], transform))[0] * 255
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_pixels_are_normalised_by_channel():
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    ours = transformed(cut(224)[None], replace(TRANSFORM, mean=mean, std=std))
    assert ours.shape == (1, 224, 224, 3) and ours.dtype == np.float32
    np.testing.assert_allclose(ours[0], (cut(224) / 255 - mean) / std, atol=1e-6)


def test_bicubic_overshoot_is_clipped():
    edge = np.zeros((1, 112, 112, 3), np.uint8)
    edge[:, :, 56:] = 255
    unclipped = antialiased(112, 224, "bicubic") @ edge[0, 0, :, 0]
    assert unclipped.min() < -1 and unclipped.max() > 256
    ours = np.asarray(transformed(edge, replace(TRANSFORM, kind="bicubic")))
    assert ours.min() == 0 and ours.max() == 1


def test_patches_of_a_batch_do_not_mix():
    patches = np.stack([cut(256), cut(300)[44:, 44:]])
    transform = RECIPES["gigapath"].transform
    together = transformed(patches, transform)
    np.testing.assert_array_equal(together[1:], transformed(patches[1:], transform))


@pytest.mark.parametrize(("before", "after"), GRIDS)
def test_tables_are_those_of_pytorch(torch, before, after):
    """timm's way has antialias; transformers' has none; Meta's gives a scale that is not the ratio of the sizes."""
    table = np.random.default_rng(0).normal(size=(1 + before**2, 8)).astype(np.float32)
    grid = torch.from_numpy(table[1:].reshape(1, before, before, 8)).permute(0, 3, 1, 2)
    config = VisionConfig(width=8, depth=1, heads=1, hidden=8, patch=14, image=14 * after, grid=before)
    scale = (after + 0.1) / before
    calls = {
        "antialias": {"size": (after, after), "antialias": True},
        "bicubic": {"size": (after, after), "antialias": False},
        "offset": {"scale_factor": (scale, scale), "antialias": False},
    }
    found = {}
    for resize, call in calls.items():
        theirs = torch.nn.functional.interpolate(grid, mode="bicubic", align_corners=False, **call)
        ours = np.asarray(fitted(table, replace(config, resize=resize)))
        np.testing.assert_array_equal(ours[0], table[0])
        np.testing.assert_allclose(ours[1:], theirs.permute(0, 2, 3, 1).reshape(-1, 8), atol=1e-5)
        found[resize] = ours
    assert np.abs(found["antialias"] - found["bicubic"]).max() > 0.1
    assert np.abs(found["offset"] - found["bicubic"]).max() > 0.005


def test_a_table_of_the_right_size_stays():
    table = np.random.default_rng(0).normal(size=(5 + 16, 8)).astype(np.float32)
    config = VisionConfig(width=8, depth=1, heads=1, hidden=8, patch=14, image=56, prefix_positions=5)
    assert fitted(table, config) is table and fitted(table, replace(config, grid=4)) is table


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_rows_of_prefix_tokens_are_spared(prefix):
    table = np.random.default_rng(0).normal(size=(prefix + 16, 8)).astype(np.float32)
    config = VisionConfig(width=8, depth=1, heads=1, hidden=8, patch=14, image=84, grid=4, prefix_positions=prefix)
    larger = np.asarray(fitted(table, config))
    assert larger.shape == (prefix + 36, 8)
    np.testing.assert_array_equal(larger[:prefix], table[:prefix])
    bare = fitted(table[prefix:], replace(config, prefix_positions=0))
    np.testing.assert_array_equal(larger[prefix:], bare)


def test_rows_of_the_table_are_rows_of_the_image():
    """A table that grows along y alone still does after resampling."""
    table = np.repeat(np.arange(4, dtype=np.float32), 4)[:, None] * np.ones(8, np.float32)
    config = VisionConfig(width=8, depth=1, heads=1, hidden=8, patch=14, image=112, grid=4, prefix_positions=0)
    larger = np.asarray(fitted(table, config)).reshape(8, 8, 8)
    np.testing.assert_allclose(larger, larger[:, :1] * np.ones((1, 8, 1)), atol=1e-6)
    assert (np.diff(larger[:, 0, 0]) > 0).all()


def test_constants_stay_constant():
    for before, after in GRIDS:
        for matrix in (
            antialiased(before, after, "bicubic"),
            antialiased(before, after, "bilinear"),
            plain_bicubic(before, after, before / (after + 0.1)),
        ):
            assert matrix.shape == (after, before)
            np.testing.assert_allclose(matrix.sum(1), 1)
