"""Published figures, each with its source, for the same benchmark, task, metric and protocol."""

import json
from pathlib import Path

from pathflip_jax.evaluate.tasks import TASKS

FIGURES = Path(__file__).parent / "published.json"


def published(found: dict, task: tuple, metric: str) -> list[dict]:
    """The published rows that match a score of an evaluation, with their source and differences in protocol.

    `found` is the content of scores.json, `task` identifies the score: ("zero_shot", task), ("retrieval", direction),
    ("few_shot", label, probe, shots). A benchmark matches by the name of the benchmark file's task, the task of the
    prompts or the column of labels.
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


def match_published(found: dict) -> list[dict]:
    """The scores of an evaluation that have published rows: {"score", "ours", "rows"}."""
    scores = []
    for task, metrics in (one for known in TASKS if known.key in found for one in known.published(found)):
        for metric, entry in metrics.items():
            if rows := published(found, task, metric):
                words = [name.replace("_", " ") for name in (*task, metric)]
                scores.append({"score": ", ".join(words), "ours": entry["value"], "rows": rows})
    return scores
