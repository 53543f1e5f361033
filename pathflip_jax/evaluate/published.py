"""Published figures, each with its source, for evaluations of the same benchmark, task, score and protocol."""

import json
from collections.abc import Iterator
from pathlib import Path

FIGURES = Path(__file__).parent / "published.json"


def published(found: dict, task: tuple, metric: str) -> list[dict]:
    """The published rows that stand beside a score of an evaluation, with their source and what differs.

    `found` is what its scores.json holds, `task` what tells the score apart: ("zero_shot", task), ("retrieval",
    direction), ("few_shot", label, probe, shots). A benchmark matches by the name of the task file's task, the task of
    the prompts or the column of labels.
    """
    kind, *rest = task
    names = {found.get("name", "").lower(), found.get("zero_shot", {}).get("task", "").lower()} - {""}
    names |= {rest[0].lower()} if kind == "few_shot" else set()
    rows = []
    for row in json.loads(FIGURES.read_text(encoding="utf-8"))["rows"]:
        asked = [row[name] for name in ("direction", "probe", "shots") if name in row]
        same = row["task"] == kind and row["metric"] == metric and row["benchmark"].lower() in names
        if same and all(value in rest for value in asked) and row.get("protocol") in (None, found["protocol"]["name"]):
            rows.append({name: row[name] for name in ("model", "value", "source", "differs")})
    return rows


def beside(found: dict) -> list[dict]:
    """Every score of an evaluation that has published rows: what it is, ours, and these rows."""
    scores = []
    for task, metrics in _scores(found):
        for metric, entry in metrics.items():
            if rows := published(found, task, metric):
                words = [name.replace("_", " ") for name in (*task, metric)]
                scores.append({"score": ", ".join(words), "ours": entry["value"], "rows": rows})
    return scores


def _scores(found: dict) -> Iterator[tuple[tuple, dict]]:
    """Every task of an evaluation with its scores by name."""
    if "zero_shot" in found:
        yield ("zero_shot", found["zero_shot"]["task"]), found["zero_shot"]["metrics"]
    for kind in ("retrieval", "region_retrieval"):
        for direction, blocks in found.get(kind, {}).items():
            recalls = {name: entry for name, entry in blocks["all"].items() if name.startswith("R@")}
            yield (kind, direction), recalls
    for block in found.get("few_shot", []):
        for probe, by_shots in block["probes"].items():
            for shots, one in by_shots.items():
                yield ("few_shot", block["label"], probe, shots), one["metrics"]
