"""The arithmetic of maps: windows, spreading, shares; the model stands in as a function."""

from types import SimpleNamespace

import numpy as np
import pytest

from pathflip_jax.grounding import maps

GRID = np.stack(np.meshgrid(np.arange(7), np.arange(5)), -1).reshape(-1, 2) * 256


@pytest.mark.parametrize("window", [1, 3, 5])
def test_windows_hold_the_neighbours(window):
    coords = np.random.default_rng(0).permutation(GRID)[:25]  # holes, and no order
    found = maps.window_slots(coords, 256, window)
    for i, row in enumerate(found):
        near = np.flatnonzero(np.abs(coords - coords[i]).max(1) <= window // 2 * 256)
        assert sorted(row[row >= 0]) == near.tolist()
        assert row[0] == i


def test_windows_of_overlapping_patches_are_as_wide():
    coords = np.stack(np.meshgrid(np.arange(9), np.arange(9)), -1).reshape(-1, 2) * 128
    found = maps.window_slots(coords, 256, 3)[40]
    assert np.abs(coords[found[found >= 0]] - coords[40]).max() <= 256 + 128


@pytest.mark.parametrize("context", [1, 7, 16, 1000])
def test_window_regions_come_back_in_the_order_of_patches(context):
    values = np.random.default_rng(0).normal(size=(len(GRID), 3))
    passes = []

    def encode(slots):
        assert slots.shape[0] == 1 and slots.shape[1] <= context
        passes.append(slots[0][slots[0, :, 0] >= 0][:, 0])
        means = np.stack([values[s[s >= 0]].mean(0) if (s >= 0).any() else np.zeros(3) for s in slots[0]])
        return SimpleNamespace(regions=np.pad(means, ((0, 5), (0, 0)))[None])  # padded, as the real one is

    slots = maps.window_slots(GRID, 256, 3)
    found = maps.window_regions(encode, slots, context)
    assert found == pytest.approx(np.stack([values[s[s >= 0]].mean(0) for s in slots]))
    assert sorted(np.concatenate(passes)) == list(range(len(GRID)))
    if context == 7:  # every pass reaches over the whole slide
        assert all(np.ptp(GRID[p, 1]) >= 3 * 256 for p in passes)


@pytest.mark.parametrize("context", [1, 8, 1000])
def test_window_slides_come_back_in_the_order_of_patches(context):
    values = np.random.default_rng(0).normal(size=(len(GRID), 3))

    def encode(slots):
        assert slots.shape[0] <= context and slots.shape[1] == 1
        means = np.stack([values[s[0][s[0] >= 0]].mean(0) for s in slots])
        return SimpleNamespace(slide=np.pad(means, ((0, 3), (0, 0))))

    slots = maps.window_slots(GRID, 256, 3)
    expected = np.stack([values[s[s >= 0]].mean(0) for s in slots])
    assert maps.window_slides(encode, slots, context) == pytest.approx(expected)


def test_spread_and_shares():
    slots = np.array([[3, 0, -1], [1, 2, 4]])
    assert maps.copy_to_patches(np.array([[10.0, 20.0]]), slots, 5).tolist() == [[10, 20, 20, 10, 20]]
    attention = np.zeros((2, 2, 3, 4))  # heads, queries, regions and slots with padding
    attention[:, :, 0] = [0.6, 0.2, 0.1, 0.1]  # what the padding got does not count
    attention[:, :, 1] = [0.1, 0.2, 0.7, 0.0]
    found = maps.patch_shares(attention, slots, 5)
    assert found == pytest.approx([0.5, 0.3, 0.6, 1.5, 2.1], rel=1e-6)


def test_uniform_attention_is_nought():
    assert maps.log_ratio(np.full((2, 8), 1 / 8)) == pytest.approx(np.zeros((2, 8)))
    assert np.isfinite(maps.log_ratio(np.array([[0.0, 1.0]]))).all()
