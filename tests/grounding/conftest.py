"""Groundings made by hand: patches and scores with no model behind them."""

import numpy as np
import pytest

from pathflip_jax.grounding.maps import Grounding

GRID = np.stack(np.meshgrid(np.arange(12), np.arange(9)), -1).reshape(-1, 2)


@pytest.fixture
def made():
    """Make a `Grounding` of coords [N, 2] and scores [C, N]; its texts are "text 0", "text 1", ..."""

    def make(coords, scores, patch_size=64, mpp=0.5, **changes):
        coords, scores = np.asarray(coords, np.int32), np.atleast_2d(np.asarray(scores, np.float32))
        texts = tuple(f"text {i}" for i in range(len(scores)))
        values = {"width": 0, "height": 0, "method": "slide", "region_scores": scores[:, :1]}
        return Grounding("S1", texts, scores, coords=coords, patch_size=patch_size, mpp=mpp, **(values | changes))

    return make


@pytest.fixture
def grid():
    """Columns and rows of 12 x 9 patches [108, 2]."""
    return GRID


@pytest.fixture
def hot():
    """Scores of the grid: 1 in the cells (column, row) named, 0 elsewhere."""

    def scores(cells):
        return np.array([float(tuple(cell) in cells) for cell in GRID.tolist()])

    return scores
