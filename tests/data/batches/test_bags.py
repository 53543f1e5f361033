"""Bags of slides: their cases, against a plain graph search, and shared captions."""

import numpy as np
import pytest

from pathflip_jax.data.batches.bags import _cases, _shared_captions
from pathflip_jax.data.texts.cases import Sources
from pathflip_jax.data.texts.text import SlideText


@pytest.mark.parametrize("slides", [2, 3, 4, 5, 12])
def test_all_slides_of_a_case_are_one_case_however_many(slides):
    names = [f"S{i}" for i in range(slides)]
    for members in ([(name,) for name in names], [(name,) for name in reversed(names)]):
        assert _cases(members, {(name,): [] for name in names}, dict.fromkeys(names, "P1")) == [0] * slides


def test_cases_are_those_of_a_plain_graph_search():
    """Thousands of cohorts: slides in bags, whose case or patient the table, the records, the text say, or nobody."""
    rng = np.random.default_rng(0)
    for _ in range(2500):
        slides = [f"S{i}" for i in range(int(rng.integers(1, 9)))]
        cases = {slide: int(rng.integers(5)) for slide in slides}  # case c is of patient c // 2
        rows = {slide: row(slide, cases[slide], rng) for slide in slides if rng.random() < 0.5}
        of = {slide: said_of(slide, cases[slide], rows, rng) or slide for slide in slides}
        members = list({tuple(sorted({*rng.choice(slides, int(rng.integers(1, 3)))})) for _ in slides})
        told = []
        for first, *more in members:
            case = said_of(first, cases[first], rows, rng)
            told.append("" if more or (first not in rows and case != of[first] != first) else case)  # never at odds
        texts = {bag: [SlideText(bag, case, "x")] for bag, case in zip(members, told, strict=True)}
        found = _cases(members, texts, of, Sources(rows))
        keys = []
        for bag, case in zip(members, told, strict=True):
            names = [name for slide in bag for name in (of[slide], *list(rows.get(slide, {}).values())[1:])]
            keys.append({*bag, case, *names} - {""})
        keys += [{*values.values()} - {""} for values in rows.values()]
        assert partition(found) == partition(search(keys)[: len(members)]), (members, told, of, rows)


def test_slides_are_of_one_patient_by_way_of_a_slide_of_another_split():
    rows = {"A": ("C1", ""), "B": ("", "P1"), "X": ("C1", "P1")}
    rows = {slide: {"slide_id": slide, "case_id": c, "patient_id": p} for slide, (c, p) in rows.items()}
    members = [("A",), ("B",)]
    assert _cases(members, dict.fromkeys(members, ()), {"A": "A", "B": "B"}, Sources(rows)) == [0, 0]


def row(slide: str, case: int, rng) -> dict[str, str]:
    """A row of a slide table that says the case, the patient, both or nothing."""
    named = {"case_id": f"C{case}", "patient_id": f"P{case // 2}"}
    return {"slide_id": slide} | {name: value if rng.random() < 0.6 else "" for name, value in named.items()}


def said_of(slide: str, case: int, rows, rng) -> str:
    """Case of a slide in records or a text: one that some row has too, one that its own row gives, or ""."""
    stated = [name for name in list(rows.get(slide, {}).values())[1:] if name] or [f"C{case}"]
    return str(rng.choice(stated)) if rng.random() < 0.6 else ""


def search(keys: list[set[str]]) -> list[int]:
    """The first item that each is connected to, found by walking."""
    groups = [-1] * len(keys)
    for start in range(len(keys)):
        walk = [start] if groups[start] < 0 else []
        while walk:
            here = walk.pop()
            groups[here] = start
            walk += [i for i in range(len(keys)) if groups[i] < 0 and keys[i] & keys[here]]
    return groups


def partition(groups: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, other in enumerate(groups) if other == group) for group in groups}


def test_captions_of_several_cases_are_numbered_and_counted(caplog):
    captions = ["A  gland.", "a gland.", "a gland.", "Fat.", "Fat.", "Mucin."]
    members = [(f"S{i}",) for i in range(6)]
    grouped = {bag: [SlideText(bag, "", caption)] for bag, caption in zip(members, captions, strict=True)}
    cases = [0, 1, 2, 3, 3, 4]  # both slides with "Fat." are of one case
    assert _shared_captions(members, grouped, cases) == [[5], [5], [5], [], [], []]
    assert "1 captions occur verbatim in several cases (3 of 6 slides; 3 have 'a gland.')" in (caplog.text)
    caplog.clear()
    assert _shared_captions(members[2:], grouped, cases[2:]) == [[], [], [], []] and caplog.text == ""


def test_captions_do_not_chain(caplog):
    """Of three slides with two texts each the first and the last share none: they stay negatives of each other."""
    members = [("A",), ("B",), ("C",)]
    texts = {("A",): ["x", "y"], ("B",): ["y", "z"], ("C",): ["z", "w"]}
    grouped = {bag: [SlideText(bag, "", caption) for caption in own] for bag, own in texts.items()}
    first, middle, last = _shared_captions(members, grouped, [0, 1, 2])
    assert set(first) & set(middle) and set(middle) & set(last) and not set(first) & set(last)
