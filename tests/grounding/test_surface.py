"""Surfaces: every score on its own level-0 pixels, overlaps averaged, smoothing that does not fade at the edge."""

import numpy as np
import pytest

from pathflip_jax.grounding.surface import make_surface, smooth_covered, smooth_patches


def value_at(surface, text, x, y):
    column, row = np.floor((np.array([x, y]) - surface.origin) / surface.downsample).astype(int)
    return surface.values[text, row, column]


@pytest.mark.parametrize("patch_size", [64, 100, 224, 512])
@pytest.mark.parametrize("offset", [(0, 0), (1037, 51), (-30, 12)])
def test_each_patch_has_its_score_where_it_lies(patch_size, offset, made):
    grid = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2)
    grid = np.random.default_rng(0).permutation(grid)[:20]
    coords = grid * patch_size + offset
    scores = np.random.default_rng(1).normal(size=(3, 20))
    surface = make_surface(made(coords, scores, patch_size), smooth=0)
    for patch, (x, y) in enumerate(coords):
        for inside in ((0.1, 0.1), (0.9, 0.5), (0.99, 0.99)):
            at = (x + inside[0] * patch_size, y + inside[1] * patch_size)
            assert value_at(surface, 2, *at) == pytest.approx(scores[2, patch], abs=1e-6)
    rows, columns = surface.values.shape[1:]
    assert np.isfinite(surface.values[0]).sum() == 20 * 16  # a quarter of a patch a pixel, no patch twice
    assert surface.origin == tuple(coords.min(0))
    assert (columns, rows) == tuple((coords.max(0) + patch_size - coords.min(0)) * 4 / patch_size)


def test_overlapping_patches_are_averaged(made):
    surface = make_surface(made([[0, 0], [32, 0]], [[1.0, 3.0]]), smooth=0)
    assert [value_at(surface, 0, x, 10) for x in (5, 40, 80)] == [1.0, 2.0, 3.0]


def test_a_large_slide_has_a_surface_of_bounded_size(made):
    coords = np.stack(np.meshgrid(np.arange(0, 1000, 9), np.arange(0, 700, 7)), -1).reshape(-1, 2) * 256
    surface = make_surface(made(coords, np.arange(len(coords)), 256), longest=512)
    assert max(surface.values.shape) <= 512
    assert np.isfinite(surface.values).any()
    far = make_surface(made([[0, 0], [2**30, 2**30]], [[1.0, 2.0]], 16), longest=512)
    assert max(far.values.shape) <= 512 and np.isfinite(far.values).sum() == 2


def test_smoothing_keeps_a_constant_and_its_holes(made):
    coords = np.array([[x, y] for x in range(6) for y in range(6) if (x, y) != (2, 3)]) * 64
    rough, smooth = (make_surface(made(coords, [[0.7] * 35]), smooth=s).values for s in (0, 1.5))
    assert np.array_equal(np.isnan(rough), np.isnan(smooth)) and np.isnan(rough).any()
    assert smooth[np.isfinite(smooth)] == pytest.approx(0.7, abs=1e-6)


def test_smoothing_is_the_weighted_mean_of_covered_pixels():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((9, 11)) < 0.7, rng.normal(size=(9, 11)), np.nan)
    found = smooth_covered(values, 1.2)
    rows, columns = np.mgrid[:9, :11]
    for row, column in zip(*np.nonzero(np.isfinite(values)), strict=True):
        away = [np.abs(rows - row), np.abs(columns - column)]
        weight = np.exp(-(away[0] ** 2 + away[1] ** 2) / (2 * 1.2**2)) * np.isfinite(values)
        weight *= (away[0] <= 4) & (away[1] <= 4)  # three standard deviations, rounded
        assert found[row, column] == pytest.approx((weight * np.nan_to_num(values)).sum() / weight.sum(), abs=1e-9)


def test_what_has_no_surface_is_named(made):
    with pytest.raises(ValueError, match=r"S1: the size of its patches is unknown.*patch_size"):
        make_surface(made([[0, 0]], [[1.0]], patch_size=0))
    with pytest.raises(ValueError, match="smooth -1"):
        make_surface(made([[0, 0]], [[1.0]]), smooth=-1)


@pytest.mark.parametrize("smooth", [0.5, 1.2])
def test_smoothed_patches_are_the_weighted_means_of_their_neighbours(smooth):
    rng = np.random.default_rng(0)
    coords, scores = rng.integers(0, 1000, (60, 2)), rng.normal(size=(2, 60))
    distance = np.linalg.norm(coords[:, None] - coords, axis=-1) / 64
    weight = np.exp(-(distance**2) / (2 * smooth**2)) * (distance <= 3 * smooth)
    expected = scores @ weight.T / weight.sum(1)
    assert smooth_patches(scores, coords, 64, smooth) == pytest.approx(expected)
    assert smooth_patches(scores, coords, 64, 0) is scores
