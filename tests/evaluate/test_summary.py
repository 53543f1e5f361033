"""What the summary says of a retrieval in which several patients have one caption."""

import numpy as np

from pathflip_jax.evaluate.run import _rank_both_ways
from pathflip_jax.evaluate.summary import DIRECTIONS, say_twins
from pathflip_jax.scores import retrieval


def test_captions_of_several_patients_are_counted_with_the_score_that_they_would_cost():
    """Slides 0 and 1 have one caption, and each slide stands where its text does: only the twins can miss."""
    images = np.eye(4)
    images[1] = images[0] * 2
    related = retrieval.relate(["a", "b", "c", "d"], ["Fat.", "fat.", "Mucin.", "Gland."])
    ranks, with_twins = _rank_both_ways(DIRECTIONS, images, images, related)
    (said,) = say_twins("slides", 4, ranks, with_twins, DIRECTIONS)
    assert said.startswith("2 of 4 captions of slides are those of another patient's too, word for word")
    for direction in DIRECTIONS.values():
        assert f"{direction} 0.750 without the rule, 1.000 with it" in said


def test_nothing_is_said_where_no_caption_is_anothers_or_nothing_is_masked():
    images = np.eye(3)
    related = retrieval.relate(["a", "a", "b"], ["Fat.", "Fat.", "Mucin."])
    ranks, with_twins = _rank_both_ways(DIRECTIONS, images, images, related)
    assert with_twins is None and say_twins("slides", 3, ranks, with_twins, DIRECTIONS) == []
    ranks, with_twins = _rank_both_ways(DIRECTIONS, images, images, None)
    assert with_twins is None and ranks["slide_to_text"].others.tolist() == [2, 2, 2]
