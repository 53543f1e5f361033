"""Boxes: one for each connected area above the threshold, in level-0 pixels, its outline around the same patches."""

import numpy as np
import pytest
from skimage import measure

from pathflip_jax.data.readers.outlines import contains
from pathflip_jax.grounding.boxes import find_boxes, split_threshold, thresholds_of
from pathflip_jax.grounding.surface import make_surface


def test_boxes_are_the_areas_and_small_ones_are_dropped(made, grid, hot):
    offset, size = (1000, 333), 128
    block = {(x, y) for x in (2, 3, 4) for y in (1, 2)}
    ring = {(x, y) for x in (7, 8, 9) for y in (4, 5, 6)} - {(8, 5)}
    found = made(grid * size + offset, hot(block | ring | {(0, 8)}), size, mpp=0.25)
    surface = make_surface(found, smooth=0)
    small, large = sorted(find_boxes(found, surface, 0.5), key=lambda box: box.patches)
    assert small[:5] == ("text 0", 1000 + 2 * 128, 333 + 128, 3 * 128, 2 * 128)
    assert (small.patches, small.score, small.peak) == (6, 1.0, 1.0)
    assert small.area_mm2 == pytest.approx(6 * (128 * 0.25 / 1000) ** 2)
    assert large.patches == 8 and len(large.outline) == 1 and len(large.outline[0].holes) == 1
    assert len(find_boxes(found, surface, 0.5, min_patches=1)) == 3
    centres = found.coords + size / 2
    assert contains(list(large.outline), centres).tolist() == hot(ring).astype(bool).tolist()


def test_outlines_hold_what_lies_above_the_threshold(made, grid):
    """Against scikit-image's labels and a point test, on a random map with holes and diagonals."""
    rng = np.random.default_rng(0)
    found = made(grid * 64, rng.normal(size=(2, len(grid))))
    surface = make_surface(found, smooth=0.7)
    for text in range(2):
        boxes = [box for box in find_boxes(found, surface, 0.1, min_patches=0) if box.text == f"text {text}"]
        labels = measure.label(np.nan_to_num(surface.values[text], nan=-9) > 0.1, connectivity=2)
        regions = measure.regionprops(labels)
        assert len(boxes) == len(regions) > 2
        expected = sorted((r.bbox[1] * 16, r.bbox[0] * 16, r.bbox[3] * 16, r.bbox[2] * 16) for r in regions)
        assert sorted((b.x, b.y, b.x + b.width, b.y + b.height) for b in boxes) == expected
        rows, columns = np.nonzero(np.isfinite(surface.values[text]))
        centres = np.stack([columns, rows], 1) * 16 + 8.0
        held = contains([polygon for box in boxes for polygon in box.outline], centres)
        assert held.tolist() == (surface.values[text][rows, columns] > 0.1).tolist()
        assert [box.peak for box in boxes] == sorted((box.peak for box in boxes), reverse=True)
        assert all(0.1 < box.score <= box.peak for box in boxes)


def test_each_text_has_its_threshold(made, grid, hot):
    found = made(grid * 64, np.stack([hot({(1, 1), (1, 2), (2, 2)}), 10 * hot({(5, 5), (6, 5)})]))
    surface = make_surface(found, smooth=0)
    assert [b.text for b in find_boxes(found, surface, 2.0)] == ["text 1"]
    assert [b.text for b in find_boxes(found, surface, (0.5, 20.0))] == ["text 0"]
    both = find_boxes(found, surface)  # each by its own half maximum
    assert [(b.text, b.patches) for b in both] == [("text 0", 3), ("text 1", 2)]
    with pytest.raises(ValueError, match="threshold nan"):
        thresholds_of(surface, float("nan"))


def test_a_map_of_one_value_has_no_area(made, grid):
    found = made(grid * 64, np.full(len(grid), 0.3), mpp=0)
    surface = make_surface(found)
    assert split_threshold(surface.values[0]) == pytest.approx(0.3)
    assert [b for b in find_boxes(found, make_surface(found, smooth=0))] == []


def test_without_mpp_an_area_is_not_known(made, grid, hot):
    found = made(grid * 64, hot({(1, 1), (1, 2)}), mpp=0)
    (box,) = find_boxes(found, make_surface(found, smooth=0), 0.5)
    assert box.area_mm2 is None and box.patches == 2
