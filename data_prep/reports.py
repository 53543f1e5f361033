"""Reports of synthetic slides: facts about a slide, in the language of pathology reports.

Training and held-out slides are described by different sentences. The held-out ones use the same words in other phrases
and sentence templates, so that a score on them measures meaning rather than recall of a template, while a tokenizer
trained on the training reports covers their words.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence

import numpy as np

from data_prep.layout import CONCEPTS, OTHERS, TUMORS, Layout
from data_prep.phrasings import ABSENT, CASE, DIAGNOSIS, NAMES, PIECES, PRESENT, SPECIMEN, STAGE, WHERE

Names = Mapping[str, Mapping[str, Sequence[str]]]  # of each concept, by use: "train", "test", "prompt"


def extent_word(share: float) -> str:
    """Word for the extent of a concept that fills `share` of the tissue."""
    return "focal" if share < 0.10 else "moderate" if share < 0.22 else "extensive"


def case_facts(rng: np.random.Generator) -> dict[str, object]:
    """Patient-level facts, the same for every slide: size, stage, nodes, age, margin, proliferation."""
    cm = rng.uniform(0.6, 7.5)
    stage = "1a 1b 2 2 3 4a".split()[int(np.searchsorted([1, 2, 3.3, 4.5, 6], cm))]
    nodes = int(rng.integers(8, 26))
    positive = int(rng.choice([0, 0, 1, 2, 4, 6]))
    return {
        "cm": f"{cm:.1f}",
        "cm2": f"{cm * rng.uniform(0.5, 0.9):.1f}",
        "t": stage,
        "n": "0" if positive == 0 else "1" if positive < 4 else "2",
        "nodes": nodes,
        "positive": positive,
        "age": int(rng.integers(34, 88)),
        "mm": int(rng.integers(1, 15)),
        "ki": int(rng.integers(2, 17)) * 5,
    }


class Sentences:
    """Sentences about concepts, drawn from the phrasings of one split: "test" for held-out ones, else training ones.

    `names` holds the names of every concept as `phrasings.NAMES` does.
    """

    def __init__(self, rng: np.random.Generator, names: Names, split: str) -> None:
        """Take the generator that every draw comes from."""
        self._rng, self._names = rng, names
        self._use = "test" if split == "test" else "train"

    def say(self, frames: Mapping[str, Sequence[str]], **words: object) -> str:
        """One of the split's frames, with the words filled in."""
        listed = frames[self._use]
        return listed[int(self._rng.integers(len(listed)))].format(**words)

    def findings(self, extent: Mapping[str, float], place: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """A sentence on each concept present, by its share of the tissue, and for some of them one on its location."""
        found, places = [], []
        for concept, share in extent.items():
            found.append(self.say(PRESENT[extent_word(share)], **self._name(concept)))
            if place[concept] and self._rng.random() < 0.3:
                places.append(self.say(WHERE, side=place[concept], **self._name(concept)))
        return found, places

    def denials(self, missing: Iterable[str]) -> list[str]:
        """A sentence denying each concept, by the first two of its training names."""
        return [self.say(ABSENT, **self._name(concept, choices=2)) for concept in missing]

    def _name(self, concept: str, choices: int | None = None) -> dict[str, str]:
        names = self._names[concept]["train" if choices else self._use][:choices]
        return _inflect(names[int(self._rng.integers(len(names)))])


def write_report(rng: np.random.Generator, layout: Layout, label: str, case: dict[str, object], split: str) -> str:
    """Write a report of 5 to 10 sentences about a slide, true in every statement about tissue.

    `split` is "test" for held-out phrasings; anything else draws from the training phrasings.
    """
    sentences = Sentences(rng, NAMES, split)
    findings, places = sentences.findings(layout.extent, layout.place)
    absent = [concept for concept in OTHERS if concept not in layout.extent]
    missing = [str(concept) for concept in rng.permutation(absent)[: int(rng.integers(1, 3))]]
    if rng.random() < 0.25:
        missing.append(str(rng.choice([concept for concept in TUMORS if concept not in layout.extent])))
    denials = sentences.denials(missing)
    kinds = [SPECIMEN, STAGE, *[DIAGNOSIS] * int(rng.random() < 0.8), *[CASE] * int(rng.integers(0, 3))]
    kinds = [kinds[i] for i in rng.permutation(len(kinds))]
    words = {**case, "pieces": PIECES[layout.pieces], "label": label}
    remarks = [sentences.say(kind, **words) for kind in kinds]
    # Findings, one negation and one remark are always included; the rest fills up to 5 to 10 sentences.
    length = max(len(findings) + 2, int(rng.integers(6, 11)))
    wanted = [*findings, *denials[:1], *remarks[:1], *places[:1], *remarks[1:], *denials[1:]]
    kept = list(dict.fromkeys(wanted))[:length]
    return " ".join(kept[i] for i in rng.permutation(len(kept)))


def _inflect(name: str) -> dict[str, str]:
    many, name = name.startswith("+"), name.removeprefix("+")
    return {
        "n": name,
        "N": name[0].upper() + name[1:],
        "b": name.removeprefix("an ").removeprefix("a "),
        "is": "are" if many else "is",
        "makes": "make" if many else "makes",
    }


def grounding_texts(names: Names = NAMES) -> dict[str, list[str]]:
    """Concept -> texts for grounding it; no training report contains any of them."""
    return {concept: [name.removeprefix("+") for name in listed["prompt"]] for concept, listed in names.items()}


def questions(slide_id: str, present: Collection[str], turns: int = 5) -> list[dict]:
    """SlideInstruct conversations on the presence of each concept: `turns` questions each, in random order."""
    order = np.random.default_rng([*slide_id.encode()]).permutation(CONCEPTS).tolist()
    rows = []
    for number, first in enumerate(range(0, len(order), turns)):
        talk = []
        for turn, concept in enumerate(order[first : first + turns]):
            asked = f"Is there evidence of {concept}?\nA. Yes\nB. No"
            talk.append({"from": "human", "value": asked if turn else f"<image>\n{asked}"})
            talk.append({"from": "gpt", "value": "A" if concept in present else "B"})
        rows.append({"id": f"{slide_id}-{number}", "image": slide_id, "conversations": talk})
    return rows


def concept_phrasings(names: Names = NAMES) -> dict[str, list[str]]:
    """Concept -> all its phrasings in any report or prompt, for detecting the concepts that a text asserts.

    Each name is accompanied by its head, the words before "with" ("fronds" of "fronds with papillary architecture"),
    unless another concept's name contains it too: a text may recombine heads and attributes.
    """
    plain = {
        concept: [name.removeprefix("+") for texts in lists.values() for name in texts]
        for concept, lists in names.items()
    }
    phrasings = {}
    for concept, own in plain.items():
        others = " ".join(name for other, texts in plain.items() if other != concept for name in texts)
        heads = [name.partition(" with ")[0] for name in own]
        heads = [head for head in heads if head.removeprefix("an ").removeprefix("a ") not in others]
        phrasings[concept] = list(dict.fromkeys([*own, *heads]))
    return phrasings


def class_prompts() -> dict[str, list[str]]:
    """Class label -> prompt ensemble for zero-shot classification; no training report contains any of its texts."""
    prompts = {}
    for concept, label in TUMORS.items():
        names = grounding_texts()[concept]
        prompts[label] = [
            f"A section of {label}.",
            f"Resection specimen with {label}.",
            *(f"The section shows {label} with {name}." for name in names[:3]),
            *(f"Tumor with {name}." for name in names[:3]),
        ]
    return prompts
