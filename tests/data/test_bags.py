"""Bags of slides: which of them are of one case, against a plain graph search."""

import numpy as np
import pytest

from pathflip_jax.data.bags import _cases
from pathflip_jax.data.text import SlideText


@pytest.mark.parametrize("slides", [2, 3, 4, 5, 12])
def test_all_slides_of_a_case_are_one_case_however_many(slides):
    names = [f"S{i}" for i in range(slides)]
    for members in ([(name,) for name in names], [(name,) for name in reversed(names)]):
        assert _cases(members, {(name,): [] for name in names}, dict.fromkeys(names, "P1")) == [0] * slides


def test_cases_are_those_of_a_plain_graph_search():
    """Thousands of cohorts of slides in bags, with a case in the records, in the text, in both or in none."""
    rng = np.random.default_rng(0)
    for _ in range(3000):
        slides, cases = int(rng.integers(1, 9)), int(rng.integers(1, 5))
        names = [f"S{i}" for i in range(slides)]
        of = {name: f"P{rng.integers(cases)}" if rng.random() < 0.6 else name for name in names}
        members = list({tuple(sorted(rng.choice(names, int(rng.integers(1, 3))))) for _ in range(slides)})
        told = [f"P{rng.integers(cases)}" if rng.random() < 0.5 else "" for _ in members]
        texts = {bag: [SlideText(bag, case, "x")] for bag, case in zip(members, told, strict=True)}
        found = _cases(members, texts, of)
        keys = [{*bag, case, *(of[name] for name in bag)} - {""} for bag, case in zip(members, told, strict=True)]
        assert _partition(found) == _partition(_search(keys)), (members, told, of)


def _search(keys: list[set[str]]) -> list[int]:
    """The first item that each is connected to, found by walking."""
    groups = [-1] * len(keys)
    for start in range(len(keys)):
        walk = [start] if groups[start] < 0 else []
        while walk:
            here = walk.pop()
            groups[here] = start
            walk += [i for i in range(len(keys)) if groups[i] < 0 and keys[i] & keys[here]]
    return groups


def _partition(groups: list[int]) -> set[frozenset[int]]:
    return {frozenset(i for i, other in enumerate(groups) if other == group) for group in groups}
