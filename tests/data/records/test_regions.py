"""Regions: every patch in exactly one, given by coords // edge, whatever the mpp or the order in the file."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.readers.features import SlideFeatures
from pathflip_jax.data.records.regions import cut_regions, patch_slots, region_edge


def make_slide(columns=40, rows=24, patch=256, mpp=0.5, keep=0.7, seed=0, **changes):
    rng = np.random.default_rng(seed)
    grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    coords = (rng.permutation(grid)[: max(1, int(keep * len(grid)))] * patch).astype(np.int32)
    values = {"slide_id": "S", "case_id": "", "features": np.ones((len(coords), 2), np.float32), "coords": coords}
    return SlideFeatures(**(values | {"patch_size": patch, "mpp": mpp} | changes))


@pytest.mark.parametrize(
    ("patch", "mpp", "edge"),
    [
        (256, 0.5, 4096),  # the paper: 16 x 16 patches at 20x
        (256, 0.499, 4096),
        (512, 0.2525, 8192),
        (224, 0.5, 18 * 224),
        (512, 0.5, 8 * 512),
        (256, 0.0, 16 * 256),
    ],
)
def test_an_edge_is_the_nearest_whole_number_of_patches(patch, mpp, edge):
    assert region_edge(patch, mpp) == edge
    full = make_slide(3 * edge // patch, 2 * edge // patch, patch, mpp, keep=1.0)
    regions = cut_regions(full)
    assert set(np.diff(regions.rows)) == {patch_slots(patch, mpp)} == {(edge // patch) ** 2}
    assert regions.grid.tolist() == [[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]


def test_an_edge_in_pixels_is_taken_as_it_is():
    assert region_edge(256, 0.25, edge_px=1000) == 1000
    assert patch_slots(256, 0.25, edge_px=1000) == 16
    assert cut_regions(make_slide(8, 1, keep=1.0), edge_px=1000).grid[:, 0].tolist() == [0, 1]


@given(
    st.integers(1, 50), st.integers(1, 50), st.sampled_from([0.0, 0.25, 0.499, 1.0]),
    st.sampled_from([300.0, 512.0, 2048.0]), st.integers(0, 99),
)  # fmt: skip
def test_every_patch_is_in_the_region_of_its_corner(columns, rows, mpp, edge_um, seed):
    slide = make_slide(columns, rows, mpp=mpp, seed=seed)
    order, bounds, grid = cut_regions(slide, edge_um=edge_um)
    edge = region_edge(slide.patch_size, mpp, edge_um)
    assert sorted(order) == list(range(len(slide.features)))
    assert bounds[0] == 0 and bounds[-1] == len(order) and (np.diff(bounds) > 0).all()
    cells = {}
    for i, (x, y) in enumerate(slide.coords.tolist()):
        cells.setdefault((y // edge, x // edge), set()).add(i)
    assert grid.tolist() == [[column, row] for row, column in sorted(cells)]
    found = [set(order[a:b].tolist()) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    assert found == [cells[key] for key in sorted(cells)]


def test_the_order_in_the_file_does_not_matter():
    slide = make_slide()
    shuffled = np.random.default_rng(1).permutation(len(slide.features))
    other = replace(slide, coords=slide.coords[shuffled], features=slide.features[shuffled])
    first, second = cut_regions(slide), cut_regions(other)
    assert (slide.coords[first.order] == other.coords[second.order]).all()
    assert (first.rows == second.rows).all() and (first.grid == second.grid).all()


def test_a_slide_is_cut_alike_with_the_mpp_that_records_keep():
    """Records keep mpp in float32: 0.4 patches more or less must not decide an edge."""
    for mpp in np.random.default_rng(0).uniform(0.1, 1.1, 1000).tolist():
        um = 2.5 * 256 * mpp  # half way between two and three patches
        assert region_edge(256, mpp, um) == region_edge(256, float(np.float32(mpp)), um)


def test_scan_takes_patches_as_they_come():
    regions = cut_regions(make_slide(coords=None, features=np.ones((600, 2), np.float32)), "scan")
    assert regions.rows.tolist() == [0, 256, 512, 600] and regions.order.tolist() == list(range(600))
    assert (regions.grid == -1).all() and patch_slots(0, 0.0, "scan") == 256


@pytest.mark.parametrize(
    ("changes", "how", "message"),
    [
        ({"coords": None}, {}, "slide S: .*no coordinates.*'scan'"),
        ({"patch_size": 0}, {}, "slide S: patch size is 0.*pass patch_size or edge_px"),
        ({}, {"cut": "rings"}, "'rings'.*grid, scan"),
        ({}, {"edge_um": 0.0}, "edge_um is 0.0"),
        ({}, {"edge_px": 0}, "edge_px is 0"),
        ({}, {"cut": "scan", "patches_per_region": 0}, "at least 1"),
    ],
)
def test_what_cannot_be_cut_says_why(changes, how, message):
    with pytest.raises(ValueError, match=message):
        cut_regions(make_slide(**changes), **how)


@given(st.integers(0, 2**32 - 1))
def test_patches_come_by_region_then_row_by_row(seed):
    rng = np.random.default_rng(seed)
    coords = np.unique(rng.integers(-100, 2**31 - 300, (60, 2), dtype=np.int64) // rng.choice([1, 10**7]), axis=0)
    coords = rng.permutation(coords).astype(np.int32)
    slide = make_slide(coords=coords, features=np.ones((len(coords), 2), np.float32), patch_size=256, mpp=0.0)
    regions = cut_regions(slide, edge_px=4096)
    cells = np.maximum(coords, 0) // 4096
    expected = np.lexsort((coords[:, 0], coords[:, 1], cells[:, 0], cells[:, 1]))
    assert (regions.order == expected).all()
    assert (np.repeat(regions.grid, np.diff(regions.rows), axis=0) == cells[expected]).all()
