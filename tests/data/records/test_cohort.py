"""Traits of a cohort: decided by the majority, whatever the order; without a majority, all are named."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pathflip_jax.data.records.cohort import NoMajorityError, Traits, majority_cohort


def slide(name="S0", encoder="uni", width=8, patch_size=256, mpp=0.5):
    return Traits(name, f"{name}.h5", encoder, width, "float16", "grid", patch_size, mpp)


def test_the_first_slide_decides_nothing():
    odd = slide("A", "conch", 9, 512)
    cohort = majority_cohort([odd, *(slide(f"B{i}") for i in range(3))])
    assert (cohort.common["encoder"].value, cohort.common["feature_dim"].value, cohort.size.value) == ("uni", 8, 128.0)
    assert not cohort.objection(slide("B9"))
    for wrong, message in (
        (odd, "slide A has encoder 'conch', 3 of 4 slides have 'uni'"),
        (odd._replace(encoder="uni"), "slide A has feature_dim 9, 3 of 4 slides have 8"),
        (slide("A", patch_size=512), "slide A has patches of 256 um, 3 of 4 slides have 128 um"),
    ):
        assert cohort.objection(wrong).startswith(message), cohort.objection(wrong)


def test_an_encoder_without_a_name_agrees_with_any():
    cohort = majority_cohort([slide("A", ""), slide("B", ""), slide("C", "uni")])
    assert cohort.common["encoder"].value == "uni" and not cohort.objection(slide("D", ""))
    assert cohort.objection(slide("D", "conch"))
    assert not majority_cohort([slide("A", ""), slide("B", "")]).objection(slide("C", "uni"))


def test_no_majority_names_all_sides_with_counts():
    with pytest.raises(
        NoMajorityError, match=r"no majority among 4 slides: 2 with feature_dim 8 \(A, B\); 2 with .* 9 \(C, D\)"
    ):
        majority_cohort([slide("A"), slide("B"), slide("C", width=9), slide("D", width=9)])
    sizes = [slide(f"S{i}", patch_size=size) for i, size in enumerate((224, 224, 256, 512, 1024))]
    with pytest.raises(NoMajorityError, match=r"no majority among 5 slides: 2 with patch size in um 112 \(S0, S1\)"):
        majority_cohort(sizes)


def test_scanners_of_two_resolutions_are_one_cohort():
    cohort = majority_cohort([slide("A", patch_size=512, mpp=0.25), slide("B"), slide("C", patch_size=507, mpp=0.2527)])
    assert cohort.pixels_of(0.25) == 512 and cohort.pixels_of(0.5) == 256 and cohort.pixels_of(0) == 0
    assert not cohort.objection(slide("D", mpp=0.46))  # nominal and measured resolution
    unknown = slide("D", patch_size=512, mpp=0)
    assert not cohort.objection(unknown) and "mpp is not known" in cohort.objection(unknown._replace(patch_size=1024))
    assert not cohort.objection(slide("D", patch_size=0))


def test_pixels_are_compared_where_no_mpp_is_known():
    cohort = majority_cohort([slide("A", mpp=0), slide("B", mpp=0), slide("C", mpp=0, patch_size=512)])
    assert cohort.unit == "px" and cohort.pixels_of(0) == 256
    assert cohort.objection(slide("C", mpp=0, patch_size=512)) and not cohort.objection(slide("D", mpp=0.25))


sides = st.lists(
    st.tuples(st.sampled_from(["", "uni", "conch"]), st.sampled_from([8, 9]), st.sampled_from([128, 256])),
    min_size=1,
    max_size=9,
)


@settings(max_examples=80, deadline=None)
@given(sides, st.randoms(use_true_random=False))
def test_the_majority_decides_in_any_order(values, rng: random.Random):
    slides = [slide(f"S{i}", *value) for i, value in enumerate(values)]

    def most(column):
        held = [value[column] for value in values if value[column]]
        value, count = max(Counter(held).items(), key=lambda item: item[1], default=("", 1))
        return value if 2 * count > len(held) else None

    expected = [most(column) for column in range(3)]
    for _ in range(3):
        rng.shuffle(slides)
        if None in expected:
            with pytest.raises(NoMajorityError):
                majority_cohort(slides)
            continue
        cohort = majority_cohort(slides)
        assert [cohort.common["encoder"].value, cohort.common["feature_dim"].value, cohort.size.value * 2] == expected
        for own in slides:
            alike = own.encoder in ("", expected[0]) and (own.feature_dim, own.patch_size) == tuple(expected[1:])
            assert bool(cohort.objection(own)) is not alike


def test_one_slide_speaks_for_as_many_as_are_like_it():
    kinds = [slide("A", patch_size=256), slide("B", patch_size=270), slide("C", "", patch_size=0), slide("D", "conch")]
    every = [kind for kind, count in zip(kinds, (3, 2, 4, 1), strict=True) for _ in range(count)]
    assert majority_cohort(kinds, (3, 2, 4, 1)) == majority_cohort(every) != majority_cohort(kinds)
    with pytest.raises(NoMajorityError, match="no majority among 8 slides"):
        majority_cohort([slide("A"), slide("B", width=9)], (4, 4))
