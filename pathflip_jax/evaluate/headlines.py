"""The headline scores of an evaluation: one or two for each part, as its report and the terminal show them."""

from collections.abc import Iterator
from typing import NamedTuple

from pathflip_jax.scores.statistics import TEXT_ONLY

SCORE, SHARE, GAIN = "score", "share", "gain"  # written as 0.87, as 87.0%, as +0.05


class Headline(NamedTuple):
    """One score with its interval, and what it stands beside; None for what there is not."""

    name: str
    value: float | None
    low: float | None
    high: float | None
    chance: float | None = None
    others: dict[str, float | None] = {}
    kind: str = SCORE


def headlines(found: dict) -> list[Headline]:
    """The headline scores of what scores.json holds, in the order of the report."""
    return [*_retrieval(found), *_zero_shot(found), *_grounding(found), *_few_shot(found), *_language(found)]


def _headline(name: str, entry: dict, others: dict | None = None, kind: str = SCORE) -> Headline:
    values = (entry[key] for key in ("value", "low", "high"))
    return Headline(name, *values, entry.get("chance"), others or {}, kind)


def _values(entry: dict, names: dict[str, str]) -> dict[str, float | None]:
    """The values of baselines by what a reader calls them; a baseline is a number or has an interval of its own."""
    known = {said: entry[name] for name, said in names.items() if name in entry}
    return {said: other["value"] if isinstance(other, dict) else other for said, other in known.items()}


def _retrieval(found: dict) -> Iterator[Headline]:
    for key, name in (("retrieval", "Retrieval"), ("region_retrieval", "Retrieval of regions")):
        for direction, galleries in found.get(key, {}).items():
            block = galleries.get("of_100", galleries["all"])
            title = f"{name}, {direction.replace('_', ' ')}: R@1 of {block['gallery']}"
            yield _headline(title, block["R@1"], kind=SHARE)


def _zero_shot(found: dict) -> Iterator[Headline]:
    if "zero_shot" in found:
        task, entry = found["zero_shot"], found["zero_shot"]["metrics"]["balanced_accuracy"]
        others = _values(entry, {"majority": "majority class", "mean_colour": "mean colour"})
        yield _headline(f"Zero-shot, {len(task['classes'])} classes: balanced accuracy", entry, others)


def _grounding(found: dict) -> Iterator[Headline]:
    if "grounding" not in found:
        return
    names = {"no_text": "no text", "mean_colour": "mean colour"}
    if entry := found["grounding"].get("auc"):
        yield _headline("Grounding: ROC AUC of patches", entry, _values(entry, names))
        if "difference" in entry:
            name = f"Grounding: gain over {', '.join(found['compared_to'])}"
            yield _headline(name, entry["difference"], kind=GAIN)
    if lesions := found["grounding"].get("froc"):
        yield _headline("Lesion detection: FROC score", lesions["score"], _values(lesions["score"], names))


def _few_shot(found: dict) -> Iterator[Headline]:
    for block in found.get("few_shot", []):
        shots = block["shots"][-1]
        entry, floor = (
            block["probes"][probe][shots]["metrics"]["balanced_accuracy"] for probe in ("linear", "mean patch feature")
        )
        name = f"Few-shot: {block['label']}, linear probe, {shots} shots: balanced accuracy"
        yield _headline(name, entry, {"raw features": floor["value"]})


def _language(found: dict) -> Iterator[Headline]:
    spoken = found.get("language", {})
    captions, questions = spoken.get("captions", {}), spoken.get("questions", {})
    if "concepts" in captions:
        yield _beside("Captions: F1 of the concepts asserted", captions["concepts"]["f1"])
    if "words" in captions:
        yield _beside("Captions: ROUGE-L", captions["words"]["ROUGE-L"])
    for how, block in questions.get("choices", {}).items():
        yield _beside(f"Multiple choice, {how.replace('_', ' ')}: accuracy", block["accuracy"], SHARE)
    if "open" in questions:
        for metric in ("exact match", "ROUGE-L"):
            kind = SHARE if metric == "exact match" else SCORE
            yield _beside(f"Open questions: {metric}", questions["open"]["metrics"][metric], kind)


def _beside(name: str, entry: dict, kind: str = SCORE) -> Headline:
    """A headline of what `scores.beside` returned."""
    values = {other: found["value"] for other, found in entry["baselines"].items()}
    chance = values.pop("chance", None)
    others = {"without the slide" if other == TEXT_ONLY else other: value for other, value in values.items()}
    return _headline(name, entry | {"chance": chance}, others, kind)
