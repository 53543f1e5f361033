import csv
import itertools
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pathflip_jax.data.texts.captions import draw_given, draw_merges, sample_subcaptions, split_sentences

DATA = Path(os.environ.get("PATHFLIP_TEST_DATA", Path(__file__).parents[3].parent / "shared" / "data"))

# Each text with "|" where a sentence ends.
CASES = [
    "The tumor is 1.8 cm.| It is pT2b.| No node is involved.",
    "Margin of 0.4 cm.| H&E stain of 2.5 x 3.0 cm, e.g. with CD20.",
    "Solid vs. glandular growth.| See Fig. 2 and Figs. 3-5.| Node No. 3 is free.",
    "Is it invasive?| No.| The margin is free!",
    "1. Carcinoma.\n|2. Margins are free.\n|3. No nodes",
    "Findings: 1. Carcinoma of the breast.| 2. Margins are free.| 3. Nodes (0/3).",
    "a) Carcinoma in situ.\n|b) Fat.",
    "- a tumor\n|- necrosis of 3 cm\n\n|• fat\n|* mucin",
    "Diagnosis:\nCarcinoma\n|Grade: 2\n|Margins: free of tumor",
    "The tumor is\nlarge and measures\n1.8 cm.|\nFat is seen.",
    "Dr. J. Smith and A. B. Miller saw it.| Hepatitis B. Miller wrote that.",
    "Hepatitis B.| The liver is fatty.| The stage is I.| Tumor is seen.",
    "It is N.S.A.B.P. grade 2, after i.e. the U.S. system.| The end.",
    "all is lower case. |the margin is 0.3 cm. |approx. 2 cm of fat",
    "Margins are free.|The tumor has p.G12V and c.35G>T.",
    'Seen in the "duct."| Staining for p53 (approx. 5%).| pT2 pN0.| p53 is lost.',
    "The score is 3+3=6.| Ki-67 is 24.58%.| The 1p/19q status is unknown.",
    "Smith et al. describe it.| St. Gallen criteria apply...| Really?!| Yes.",
    "Largest node (No. 5) is 1.1 cm.| Nodes No. 10, No. 11 and Nos. 12 are free.",
    "Left levels I, II.| Extranodal extension is seen.",
    "One paragraph\n\n|another one",
    "Viewed at approx. 40x, cf. Table 2, resp. vol. 3, p. 7.| Done.",
]


@pytest.mark.parametrize("case", CASES)
def test_sentences_end_where_a_reader_ends_them(case):
    assert split_sentences(case.replace("|", "")) == [" ".join(part.split()) for part in case.split("|")]


def test_a_text_of_nothing_has_no_sentences():
    assert split_sentences("") == split_sentences(" \n\t ") == []
    assert split_sentences("***") == ["***"]


def squeezed(text):
    return "".join(text.split())


@given(st.text() | st.text(alphabet="aA bB1.2!?\n\"'():;,-• \t\u00a0é", max_size=80))
def test_nothing_but_white_space_is_lost(text):
    sentences = split_sentences(text)
    assert squeezed("".join(sentences)) == squeezed(text)
    assert all(sentence and sentence == " ".join(sentence.split()) for sentence in sentences)


@given(
    st.lists(
        st.sampled_from(
            ["The tumor is 1.8 cm wide.", "Stage pT2b.", "No nodes vs. many.", "Is H&E used?", "It is 0.4."]
        )
    )
)
def test_joined_sentences_are_split_where_they_were_joined(sentences):
    assert split_sentences(" ".join(sentences)) == sentences


@given(st.decimals(0, 999, places=2), st.sampled_from(["cm", "mm", "%", "x"]))
def test_no_decimal_is_cut(number, unit):
    assert len(split_sentences(f"The tumor measures {number} {unit} and more. Fat is seen {number}.")) == 2


@pytest.fixture(scope="module")
def captions():
    path = DATA / "text" / "SlideBench-Caption-TCGA.csv"
    if not path.exists():
        pytest.skip(f"no real captions: {path} is absent, set PATHFLIP_TEST_DATA")
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return [row["Caption"] for row in csv.DictReader(stream)]


def test_real_captions(captions):
    assert len(captions) == 732
    split = [split_sentences(caption) for caption in captions]
    assert 0.5 < np.mean([len(sentences) < 8 for sentences in split]) < 0.65  # as counted in STACK
    decimals = [len(re.findall(r"\d\.\d", caption)) for caption in captions]
    assert 0.2 < np.mean(np.array(decimals) > 0) < 0.3
    for caption, sentences, count in zip(captions, split, decimals, strict=True):
        assert squeezed("".join(sentences)) == squeezed(caption)
        assert sum(len(re.findall(r"\d\.\d", sentence)) for sentence in sentences) == count
        for sentence in sentences:
            assert re.match(r'["(]?[A-Z0-9]', sentence), sentence  # in this prose every sentence begins so
            assert re.search(r'[.?!]["”)]*$', sentence), sentence
            inner = re.sub(r"(Nos?|vs|e\.g|i\.e|N\.S\.A\.B\.P)\. ", "", sentence)
            assert not re.search(r"[a-z0-9)]\. [A-Z]", inner), sentence


def possible(n, most):
    return sum(math.comb(n, m) for m in range(1, most + 1))


@given(st.integers(1, 12), st.integers(0, 30), st.integers(0, 2**32), st.integers(1, 4))
def test_draws_go_round_before_they_repeat(n, k, seed, most):
    merges = draw_merges(n, k, np.random.default_rng(seed), most)
    assert len(merges) == k
    for merge in merges:
        assert 1 <= len(merge) <= most and list(merge) == sorted(set(merge)) and 0 <= merge[0] <= merge[-1] < n
    for start in range(0, k, possible(n, most)):
        part = merges[start : start + possible(n, most)]
        assert len(set(part)) == len(part)
    if k >= n:
        assert set(itertools.chain(*merges)) == set(range(n))


def test_draws_follow_the_released_scheme():
    rng = np.random.default_rng(0)
    merges = np.array([draw_merges(20, 8, rng) for _ in range(1500)], dtype=object)
    lengths = np.array([[len(merge) for merge in row] for row in merges])
    assert np.allclose([(lengths == m).mean() for m in (1, 2, 3)], 1 / 3, atol=0.02)
    spans = np.array([[merge[-1] - merge[0] + 1 for merge in row] for row in merges])
    assert (spans[:, ::2] == lengths[:, ::2]).all()  # half of the draws take neighbours
    apart = spans[:, 1::2][lengths[:, 1::2] > 1]
    assert apart.mean() > 8  # the others take sentences from anywhere
    uses = np.bincount([i for row in merges for merge in row for i in merge], minlength=20)
    assert uses.min() > 0.6 * uses.max()  # the ends have fewer neighbours, no sentence is starved


def test_subcaptions_are_whole_sentences():
    sentences = ["One is 1.8 cm.", "Two.", "Three."]
    drawn = sample_subcaptions(sentences, 8, np.random.default_rng(3))
    assert len(drawn) == 8
    for text in drawn:
        parts = split_sentences(text)
        assert parts == [sentence for sentence in sentences if sentence in parts]
    assert sample_subcaptions(sentences, 8, np.random.default_rng(3)) == drawn
    assert sample_subcaptions(["Only."], 3, np.random.default_rng(0)) == ["Only."] * 3


def test_given_subcaptions_all_come_before_any_again():
    drawn = draw_given(3, 8, np.random.default_rng(0))
    assert [sorted(drawn[i : i + 3]) for i in (0, 3)] == [[(0,), (1,), (2,)]] * 2 and len(drawn) == 8
    assert len(set(draw_given(20, 8, np.random.default_rng(0)))) == 8


def test_nothing_to_draw_from_is_an_error():
    for draw in (draw_merges, draw_given):
        with pytest.raises(ValueError, match="draw"):
            draw(0, 8, np.random.default_rng(0))
