"""Intervals by case: they cover where mosaics share cases, and reduce to independent mosaics where they do not."""

import numpy as np
import pytest

from pathflip_jax.scores import statistics


@pytest.fixture
def intervals(benchmark_modules):
    return benchmark_modules("real_tissue_parts.intervals")


def test_without_shared_cases_the_interval_is_that_of_independent_slides(intervals):
    values = np.random.default_rng(0).normal(size=200)
    found = intervals.by_case([statistics.mean(values)], [[str(i), f"other {i}"] for i in range(200)])
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(1.96 * values.std() / np.sqrt(200), rel=1e-3)


def test_influences_of_a_mean_are_known(intervals):
    values = np.array([1.0, 2.0, np.nan, 6.0])
    found = intervals.influences(statistics.mean(values), 4)
    assert found == pytest.approx([(1 - 3) / 3, (2 - 3) / 3, 0, (6 - 3) / 3], abs=1e-5)


def test_mosaics_that_share_cases_are_not_independent(intervals):
    """Means of eight of 65 case effects: intervals of 95% cover the truth, those of independent mosaics do not."""
    rng, covered, naive = np.random.default_rng(0), 0, 0
    for _ in range(150):
        effects = rng.normal(size=65)
        cases = [rng.choice(65, 8, replace=False) for _ in range(100)]
        values = np.array([effects[listed].mean() for listed in cases])
        found = intervals.by_case([statistics.mean(values)], [[str(i) for i in listed] for listed in cases])
        covered += found.low <= 0 <= found.high
        naive += abs(values.mean()) < 1.96 * values.std() / 10
    assert covered >= 0.87 * 150
    assert naive < 0.6 * 150


def test_a_paired_difference_has_its_own_interval(intervals):
    values = np.random.default_rng(1).normal(size=50)
    cases = [[str(i % 20)] for i in range(50)]
    gain = intervals.by_case([statistics.mean(values + 0.5)], cases, [statistics.mean(values)])
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.5, 0.5, 0.5), abs=1e-6)


def test_seeds_add_their_spread(intervals):
    values = np.zeros(30)
    cases = [[str(i)] for i in range(30)]
    found = intervals.by_case([statistics.mean(values), statistics.mean(values + 1.0)], cases)
    assert found.by_run == pytest.approx([0, 1]) and found.value == pytest.approx(0.5)
    assert found.high - found.value == pytest.approx(1.96 * 0.5, rel=1e-2)


def test_an_interval_stays_within_the_bounds_of_its_score(intervals):
    values = np.array([1.0] * 29 + [0.0])
    cases = [[str(i)] for i in range(30)]
    found = intervals.by_case([statistics.mean(values)], cases, bounds=(0, 1))
    assert found.low < found.value < found.high == 1.0
