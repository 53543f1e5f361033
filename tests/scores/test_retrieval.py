"""Retrieval against slow loops that sort, shuffle and draw galleries."""

import numpy as np
import pytest

from pathflip_jax.scores import retrieval


@pytest.fixture
def pairs():
    rng = np.random.default_rng(0)
    text = rng.normal(size=(40, 8))
    slide = text + rng.normal(scale=1.2, size=text.shape)
    cases = [f"C{i // 2}" if i < 10 else f"C{i}" for i in range(40)]
    return slide, text, cases


def slow_rank(slide, text, cases, i):
    cosine = [slide[i] @ t / np.linalg.norm(slide[i]) / np.linalg.norm(t) for t in text]
    kept = [j for j in range(len(text)) if j == i or cases[j] != cases[i]]
    return sorted(kept, key=lambda j: -cosine[j]).index(i) + 1, len(kept)


def test_ranks_equal_a_sort(pairs):
    slide, text, cases = pairs
    ranks = retrieval.rank(slide, text, cases)
    expected = [slow_rank(slide, text, cases, i) for i in range(40)]
    assert retrieval.expected_rank(ranks).tolist() == [r for r, _ in expected]
    assert retrieval.gallery_sizes(ranks).tolist() == [n for _, n in expected]
    for k in (1, 5, 10):
        assert retrieval.recall(ranks, k).tolist() == [float(r <= k) for r, _ in expected]
        assert retrieval.chance(ranks, k) == pytest.approx(np.mean([k / n for _, n in expected]))


def test_slides_of_one_case_neither_help_nor_hurt(pairs):
    slide, text, _ = pairs
    slide, text = slide.copy(), text.copy()
    text[1] = slide[0] * 3  # the other report of patient 0 fits slide 0 perfectly
    alone = retrieval.rank(slide, text, [str(i) for i in range(40)])
    together = retrieval.rank(slide, text, ["0", "0"] + [str(i) for i in range(2, 40)])
    assert alone.above[0] == together.above[0] + 1
    assert together.others[0] == 38


def test_one_embedding_for_all_scores_chance():
    same = np.ones((20, 4))
    ranks = retrieval.rank(same, same + 1e-9, [str(i) for i in range(20)])
    for k in (1, 5, 10):
        assert retrieval.recall(ranks, k) == pytest.approx(np.full(20, k / 20))
        assert retrieval.recall(ranks, k, gallery=10) == pytest.approx(np.full(20, min(k / 10, 1)))
    assert retrieval.expected_rank(ranks) == pytest.approx(np.full(20, 10.5))
    assert retrieval.chance_median_rank(ranks) == 10.5


def test_ties_are_the_mean_over_their_orders():
    ranks = retrieval.Ranks(np.array([2]), np.array([3]), np.array([9]))
    orders = np.arange(3, 7)  # the ranks that the right one can take
    for k in range(1, 11):
        assert retrieval.recall(ranks, k)[0] == pytest.approx(np.mean(orders <= k))
    assert retrieval.expected_rank(ranks)[0] == pytest.approx(orders.mean())


def test_a_drawn_gallery_equals_the_mean_of_many_draws():
    ranks = retrieval.Ranks(np.array([4, 0, 11]), np.array([0, 2, 5]), np.array([29, 29, 24]))
    rng = np.random.default_rng(0)
    drawn = np.empty((3, 20_000))
    for i, (above, tied, others) in enumerate(zip(*ranks, strict=True)):
        for draw in range(drawn.shape[1]):
            key = np.concatenate([np.full(above, 2.0), np.full(tied, 1.0), np.zeros(others - above - tied)])
            kept = rng.choice(key, 9, replace=False)
            drawn[i, draw] = 1 + (kept == 2).sum() + rng.integers(0, (kept == 1).sum() + 1)
    for k in (1, 5):
        assert retrieval.recall(ranks, k, gallery=10) == pytest.approx((drawn <= k).mean(1), abs=0.015)
    assert retrieval.expected_rank(ranks, gallery=10) == pytest.approx(drawn.mean(1), abs=0.05)
    assert retrieval.chance(ranks, 1, gallery=10) == pytest.approx(0.1)


def test_a_gallery_larger_than_the_split_keeps_the_split():
    ranks = retrieval.Ranks(np.array([3]), np.array([0]), np.array([9]))
    assert retrieval.recall(ranks, 4, gallery=100) == retrieval.recall(ranks, 4) == [1.0]
    assert retrieval.recall(ranks, 3, gallery=100) == [0.0]
    assert retrieval.gallery_sizes(ranks, 100) == [10]


def test_zero_embeddings_do_not_divide_by_zero():
    found = retrieval.normalise(np.zeros((2, 3)))
    assert np.array_equal(found, np.zeros((2, 3)))


def test_the_caption_of_another_patient_word_for_word_is_no_miss(pairs):
    """Rows 20 and 21 have one caption: whichever stands higher, both are right, so neither is in the other's way."""
    slide, text, cases = pairs
    text = text.copy()
    text[21] = text[20]
    captions = [f"Report {i}." for i in range(40)]
    captions[21] = " REPORT  20."
    related = retrieval.relate(cases, captions)
    assert np.flatnonzero(retrieval.shared_captions(related)).tolist() == [20, 21]
    ranks, by_case = retrieval.rank(slide, text, related), retrieval.rank(slide, text, cases)
    assert by_case.tied[20] == by_case.tied[21] == 1 and by_case.others[20] == 39
    assert ranks.tied[20] == ranks.tied[21] == 0 and ranks.others[20] == 38
    rest = [i for i in range(40) if i not in (20, 21)]
    for ours, theirs in zip(ranks, by_case, strict=True):
        assert ours[rest].tolist() == theirs[rest].tolist()


def test_captions_of_one_patient_alone_are_not_shared(pairs):
    related = retrieval.relate(["a", "a", "b"], ["x", "X", "y"])
    assert not retrieval.shared_captions(related).any()
    assert retrieval.relate(["x", "y"], ["y", "x"]).size == len(np.unique(retrieval.relate(["x", "y"], ["y", "x"])))
