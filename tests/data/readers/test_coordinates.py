"""Invalid coordinates and patch sizes: each kind of fault is found, and valid grids of any tool are accepted."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers.coordinates import (
    coordinate_fault,
    duplicate_coordinates_fault,
    integer_coords,
    most_frequent_gap,
    patch_size_fault,
    repetition_fault,
    step_fault,
)


def grid(columns=6, rows=5, step=512, start=(1000, 2000)):
    """Patches in rows, as `step` pixels apart."""
    cells = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), -1).reshape(-1, 2)
    return (cells * step + start).astype(np.int32)


GRIDS = st.builds(
    grid, st.integers(4, 9), st.integers(4, 9), st.sampled_from([256, 448, 512, 1024]),
    st.tuples(st.integers(0, 3000), st.integers(0, 3000)),
)  # fmt: skip


def faults(coords, patch_size, width, height, step=0.0):
    return coordinate_fault(coords, patch_size, width, height) or step_fault(coords, patch_size, step, width, height)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.integers(0, 400), st.sampled_from([1, 2, 4]), st.randoms(use_true_random=False))
def test_sound_grids_have_no_fault(coords, margin, overlapping, rng):
    """Patches may overlap, be thinned out, and reach over every edge of the slide by less than one of them."""
    step = most_frequent_gap(coords).size
    rows = rng.sample(range(len(coords)), len(coords) // 2)
    width, height = (int(edge) + step // 2 for edge in coords.max(axis=0))
    for places in (coords, coords[rows], coords - coords.min(axis=0) - min(margin, step - 1)):
        patch_size = step * overlapping
        assert not faults(places, patch_size, width, height, step=step)
        assert not faults(places, step, width + margin, height)
        assert not faults(places, patch_size, 0, 0)
        assert not duplicate_coordinates_fault(places) and not patch_size_fault(patch_size, 0.5, 10 * width, height)


@settings(max_examples=60, deadline=None)
@given(GRIDS, st.sampled_from([2, 4, 8, 16]))
def test_places_of_another_slide_axis_or_level_are_named_with_what_fits(coords, factor):
    step = most_frequent_gap(coords).size
    width, height = 2 * coords[:, 0].max() + 9000, coords[:, 1].max() + step
    assert "divided by" in coordinate_fault(coords * 32, step, width, height)
    far = coords + [int(height), 0]
    assume(far[:, 0].max() < width)
    assert "with x and y exchanged they would fit" in coordinate_fault(far[:, ::-1], step, width, height)
    level = coords // factor
    said = step_fault(level, step, step, width, height)
    assert f"multiplied by {factor} the coordinates would fit, so they belong to another level" in said
    said = step_fault(level - level % (step // factor), step, 0.0, factor * width, factor * height)
    assert "belong to another level" in said and "--patch-size" in said
    assert not step_fault(level, step, step / factor, width, height), "the file says that they overlap"
    assert not step_fault(level, step, 0.0, 0, 0), "nothing tells overlap from another level"


@pytest.mark.parametrize("columns", [4, 40, 400])
def test_counted_in_patches(columns):
    cells = grid(columns, columns // 2, 1, (3, 5))
    assert "in steps of 1 between patches of 256 px: they are counted in patches" in coordinate_fault(cells, 256, 0, 0)
    assert "not in pixels at level 0" in coordinate_fault(grid(40, 40, 5, (0, 0)), 256, 0, 0)
    assert "counted in patches" in coordinate_fault(grid(2, 1, 1), 256, 0, 0), "a biopsy of two"
    assert not coordinate_fault(grid(2, 1, 8), 256, 0, 0)


def test_patches_outside_on_the_left_or_above():
    coords = grid(start=(-511, -1))
    assert not coordinate_fault(coords, 512, 5000, 5000)
    for start in ((-513, 0), (0, -9000)):
        assert "left of or above the slide" in coordinate_fault(grid(start=start), 512, 0, 0)
    assert "not negative" in coordinate_fault(coords, 0, 0, 0), "of unknown size"


def test_a_slide_of_which_only_one_patch_is_beyond():
    coords = np.concatenate([grid(), [[90_000, 2000]]])
    assert "1 of 31 patches lie beyond the slide, which is 60000 x 20000" in coordinate_fault(
        coords, 512, 60_000, 20_000
    )
    assert "another slide" in coordinate_fault(coords * 400, 512, 60_000, 20_000)


@settings(max_examples=40, deadline=None)
@given(st.integers(5, 30), st.data())
def test_repeated_places(patches, data):
    coords, features = grid()[:patches], np.random.default_rng(0).random((patches, 3))
    assert not duplicate_coordinates_fault(coords, features)
    again = data.draw(st.lists(st.integers(0, patches - 1), min_size=1, unique=True))
    rows = np.array(data.draw(st.permutations([*range(patches), *again])))
    said = duplicate_coordinates_fault(coords[rows], features[rows])
    assert said.startswith(f"{len(again)} of {patches} coordinates occur more than once") and "appended to" in said
    other = features[rows] + np.arange(len(rows))[:, None]
    assert "two extractions in one file" in duplicate_coordinates_fault(coords[rows], other)
    assert duplicate_coordinates_fault(coords[rows]).startswith(f"{len(again)} of {patches} coordinates")


def test_features_alone_that_are_there_twice():
    features = np.random.default_rng(0).random((20, 3))
    assert "its 20 patches occur twice" in repetition_fault(np.concatenate([features, features]))
    for sound in (features, np.ones((40, 3)), np.concatenate([features, features[:19]]), features[:2]):
        assert not repetition_fault(sound)


@pytest.mark.parametrize(
    ("patch_size", "mpp", "size", "said"),
    [
        (3, 0, (0, 0), "of 3 px; expected 16 to 65536 px"),
        (10**6, 0, (0, 0), "of 1000000 px"),
        (512, 352.8, (0, 0), "180634 um; expected 4 to 10000 um"),
        (16, 0.01, (0, 0), "0.16 um"),
        (1024, 0.5, (300, 500), "on a slide of 300 x 500"),
        (256, 0.5, (200, 200), ""),
        (0, 352.8, (0, 0), ""),
        (16, 0.25, (0, 0), ""),
    ],
)
def test_impossible_patch_sizes(patch_size, mpp, size, said):
    fault = patch_size_fault(patch_size, mpp, *size)
    assert (said in fault) if said else not fault


def test_whole_numbers():
    coords = grid().astype(np.float32)
    assert integer_coords(coords + np.float32(0.01), 30, "slide x").dtype == np.int32
    for wrong, said in (
        (coords + 0.4, "fractions, such as 1000.4, 2000.4; expected whole pixels"),
        (coords / 60_000, "of 30 patches are fractions"),
        (np.concatenate([coords, coords], axis=1), "expected two numbers, x and y"),
        (coords[:4], "one was cut short"),
        (coords * np.nan, "NaN"),
        (coords.astype(np.float16), "float16, which is exact up to 2048 only"),
    ):
        with pytest.raises(ValueError, match=said):
            integer_coords(wrong, 30, "slide x")


def test_the_commonest_gap_is_that_of_most_neighbours():
    """Not the smallest: two pieces of tissue are seldom in step."""
    coords = np.concatenate([grid(step=256, start=(0, 0)), grid(step=256, start=(2000, 7))])
    assert most_frequent_gap(coords) == (256, 98)
    assert most_frequent_gap(coords[:1]) == (0, 0)
