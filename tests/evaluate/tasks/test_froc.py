"""FROC against the challenge's definition, counted by brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.readers.outlines import Polygon
from pathflip_jax.evaluate.tasks import froc

RATES = (0.25, 0.5, 1, 2, 4, 8)


def disc(shape, y, x, radius):
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    return (rows - y) ** 2 + (columns - x) ** 2 <= radius**2


def test_lesions_are_widened_joined_and_measured():
    """8 um a pixel: widened by 37.5 um; 275 um are 34 pixels. Every distance is measured anew, one by one."""
    mask = disc((140, 200), 40, 40, 20) & ~disc((140, 200), 40, 40, 8)  # a ring: its hole is filled
    mask |= disc((140, 200), 40, 70, 6)  # within 75 um of the ring: the same lesion
    mask |= disc((140, 200), 100, 150, 5)  # isolated tumor cells: (5 + 4.7) * 2 < 34 pixels
    mask |= disc((140, 200), 100, 40, 15)
    found = froc.lesions_of_mask(mask, 32.0, 0.25)
    inside = np.argwhere(mask)
    expected = np.zeros(mask.shape, bool)
    for row, column in np.argwhere(~mask):
        expected[row, column] = np.sqrt(((inside - (row, column)) ** 2).sum(1)).min() * 8 < 37.5
    expected |= mask | disc((140, 200), 40, 40, 20)
    drawn = np.zeros(mask.shape, bool)
    for area in found.areas:
        drawn[area.row : area.row + area.mask.shape[0], area.column : area.column + area.mask.shape[1]] |= area.mask
    assert (drawn == expected).all()
    assert sorted(area.counts for area in found.areas) == [False, True, True]


def test_outlines_become_the_same_lesions_at_any_scale():
    square = Polygon(np.array([[4000, 4000], [6000, 4000], [6000, 5000], [4000, 5000], [4000, 4000]], float))
    for mpp in (0.25, 0.5, 1.0):
        polygon = Polygon(square.ring * 0.25 / mpp)
        found = froc.read_lesions([polygon], int(20_000 * 0.25 / mpp), int(10_000 * 0.25 / mpp), mpp)
        (area,) = found.areas
        assert found.downsample * mpp == 8.0 and area.counts
        assert area.mask.sum() * 64 == pytest.approx((500 + 64) * (250 + 64), rel=0.03)  # 37.5 um are 4 whole pixels
    assert froc.read_lesions([], 10**6, 10**6, 0.25).areas == ()


def test_detections_are_the_peaks_of_a_map():
    coords = np.stack(np.meshgrid(np.arange(20), np.arange(20)), -1).reshape(-1, 2) * 100
    scores = np.exp(-(((coords - (400, 400)) / 300) ** 2).sum(1)) + 0.5 * np.exp(
        -(((coords - (1500, 1200)) / 300) ** 2).sum(1)
    )
    found = froc.detect(scores, coords, 100)
    assert found.points[0].tolist() == [450, 450] and found.points[1].tolist() == [1550, 1250]
    distances = np.linalg.norm(found.points[:, None] - found.points, axis=-1) + 1e9 * np.eye(len(found.points))
    assert distances.min() > 300 and (np.diff(found.scores) <= 0).all()


def brute_force(slides, rates=RATES):
    """The challenge's score: count at every threshold, join the counts by straight lines, read off the rates.

    Each slide: how many lesions, and its detections as (lesion hit or None or "isolated", score).
    """
    thresholds = sorted({score for _, detections in slides for _, score in detections}, reverse=True)
    total = sum(count for count, _ in slides)
    points = [(0.0, 0.0)]
    for threshold in thresholds:
        false = sum(hit is None and score >= threshold for _, found in slides for hit, score in found)
        right = sum(
            any(hit == lesion and score >= threshold for hit, score in found)
            for count, found in slides
            for lesion in range(count)
        )
        points.append((false / len(slides), right / total))
    read = []
    for rate in rates:
        below = [p for p in points if p[0] <= rate][-1]
        above = [p for p in points if p[0] > rate][:1]
        if above:
            share = (rate - below[0]) / (above[0][0] - below[0])
            read.append(below[1] + share * (above[0][1] - below[1]))
        else:
            read.append(below[1])
    return sum(read) / len(read)


def strip(count):
    """A slide of lesions side by side, squares of 10 x 10 pixels at columns 0, 20, 40, ...; the last is isolated."""
    areas = [froc.Lesion(0, 20 * i, np.ones((10, 10), bool), i < count) for i in range(count + 1)]
    return froc.Lesions(tuple(areas), 16.0)


detections = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 6)), max_size=12)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), detections), min_size=1, max_size=5))
def test_the_score_is_the_challenges(drawn):
    """Hits, double hits, hits on isolated cells, ties and slides with no lesion at all."""
    if not any(count for count, _ in drawn):
        drawn = [(1, drawn[0][1]), *drawn[1:]]
    found, counted = [], []
    for count, listed in drawn:
        points = np.array([(16.0 * (20 * place + 5), 80.0) for place, _ in listed]).reshape(-1, 2)
        scores = np.array([float(score) for _, score in listed])
        found.append(froc.match(strip(count), froc.Detections(points, scores)))
        kinds = [place if place < count else "isolated" if place == count else None for place, _ in listed]
        counted.append((count, list(zip(kinds, scores, strict=True))))
    ones = np.ones((1, len(found)))
    assert froc.sensitivity(found)(ones)[0] == pytest.approx(brute_force(counted))
    assert froc.sensitivity(found, [2])(ones)[0] == pytest.approx(brute_force(counted, [2]))
    twice = np.ones((1, len(found)))
    twice[0, 0] = 2  # a drawn slide counts as often as it was drawn
    if any(count for count, _ in counted):
        assert froc.sensitivity(found)(twice)[0] == pytest.approx(brute_force([counted[0], *counted]))


def test_a_perfect_map_and_a_blind_one():
    hits = froc.Found(np.array([3.0, 2.0]), np.array([1.0]))
    misses = froc.Found(np.full(2, -np.inf), np.array([1.0, 0.5]))
    assert froc.sensitivity([hits])(np.ones((1, 1)))[0] == 1
    assert froc.sensitivity([misses])(np.ones((1, 1)))[0] == 0
    with pytest.raises(ValueError, match="no slide has a lesion"):
        froc.sensitivity([froc.Found(np.zeros(0), np.array([1.0]))])
