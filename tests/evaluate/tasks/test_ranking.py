"""Retrieval with captions shared by several patients: counted, and their effect on R@1 reported."""

import numpy as np

from pathflip_jax.evaluate.tasks.ranking import Queries, rank_both_ways, warn_of_duplicates
from pathflip_jax.evaluate.tasks.retrieval import DIRECTIONS
from pathflip_jax.scores import retrieval

QUERIES = Queries("slides", DIRECTIONS, ["S0", "S1", "S2", "S3"], ["a", "b", "c", "d"])


def test_captions_of_several_patients_are_counted_with_the_score_that_they_would_cost():
    """Slides 0 and 1 have one caption, and each slide stands where its text does: only these two can miss."""
    images = np.eye(4)
    images[1] = images[0] * 2
    related = retrieval.relate(["a", "b", "c", "d"], ["Fat.", "fat.", "Mucin.", "Gland."])
    (said,) = warn_of_duplicates(QUERIES, rank_both_ways(DIRECTIONS, images, images, related))
    assert said.startswith("2 of 4 captions of slides are word for word those of another patient too")
    for direction in DIRECTIONS.values():
        assert f"{direction} 0.750 without the rule, 1.000 with it" in said


def test_nothing_is_said_where_no_caption_is_anothers_or_nothing_is_masked():
    images = np.eye(3)
    related = retrieval.relate(["a", "a", "b"], ["Fat.", "Fat.", "Mucin."])
    ranked = rank_both_ways(DIRECTIONS, images, images, related)
    assert ranked.with_duplicates is None and warn_of_duplicates(QUERIES, ranked) == []
    ranked = rank_both_ways(DIRECTIONS, images, images, None)
    assert ranked.with_duplicates is None and ranked.ranks["slide_to_text"].others.tolist() == [2, 2, 2]
