"""A new task is one file and one entry: its scores, table, figure, headline, section and comparison need no more."""

import csv
import importlib.util
import json
import sys

import numpy as np
import pytest

from pathflip_jax import cli
from pathflip_jax.evaluate import run
from pathflip_jax.inference.predictor import Embedding

FILE = '''
"""Label consistency: whether the nearest other slide of a slide is of the same label."""

from pathlib import Path

import numpy as np

from pathflip_jax.evaluate.embeddings import slide_embeddings
from pathflip_jax.evaluate.figures import make_axes
from pathflip_jax.evaluate.task import SHARE, Part, Task, make_headline
from pathflip_jax.evaluate.units import Units
from pathflip_jax.scores import statistics

KEY = "neighbours"


def _predict(setting, labels, run):
    slides = slide_embeddings(run.bags, setting.cohort.slide_ids)
    distance = np.linalg.norm(slides[:, None] - slides, axis=-1) + np.diag(np.full(len(slides), np.inf))
    return labels == labels[distance.argmin(1)]


def _score(setting, labels, predictions):
    weights = statistics.patient_weights(setting.cohort.patients, seed=setting.spec.seed)
    ours, theirs = ([statistics.mean(one) for one in side] for side in (predictions.ours, predictions.theirs))
    entry = statistics.over_runs(ours, theirs, weights, chance=float(np.mean(labels[:, None] == labels)))
    figure, (axis,) = make_axes(3, 2)
    axis.bar(["nearest"], [entry["value"]])
    rows = [
        {"slide_id": slide, "patient_id": patient, "same": int(same)}
        for slide, patient, same in zip(setting.cohort.slide_ids, setting.cohort.patients, predictions.ours[0])
    ]
    return Part({"same": entry}, {KEY: figure}, {KEY: rows}, ["neighbours are made up"])


def _units(evaluation):
    rows = evaluation.rows(KEY)
    same = statistics.mean(np.array([float(row["same"]) for row in rows]))
    keys, patients = [(row["slide_id"],) for row in rows], [row["patient_id"] for row in rows]
    return Units(keys, patients, [""] * len(rows), {"same": [same]})


TASK = Task(
    KEY,
    title="neighbours",
    needs="labels",
    wanted=lambda spec: True,
    read=lambda setting: np.array(setting.cohort.labels),
    embed=lambda setting, labels: setting.cohort.slide_ids,
    predict=_predict,
    score=_score,
    headlines=lambda found: [make_headline("Neighbours of the same label", found[KEY]["same"], kind=SHARE)],
    section=Path(__file__).with_name("neighbours.html"),
    prominence=9,
    paired=lambda evaluation: {(KEY,): lambda: _units(evaluation)},
)
'''
SECTION = """<section id="neighbours"><h2>Neighbours</h2><table><tr>{{ cell(scores.neighbours.same) }}</tr></table>
<img src="{{ images.neighbours }}" alt="Neighbours"></section>
"""


class Labelled:
    """Puts slides of one label near each other."""

    name, config = "labelled", {}

    def encode_slides(self, slides):
        for slide in slides:
            place = np.array([int(slide.slide_id[1:]) % 2, int(slide.slide_id[1:]) / 100])
            yield Embedding(slide.slide_id, place, place[None], np.zeros((1, 2)))


@pytest.fixture
def new_task(tmp_path, monkeypatch):
    """The file, and its entry in the table wherever that is imported."""
    (tmp_path / "neighbours.py").write_text(FILE)
    (tmp_path / "neighbours.html").write_text(SECTION)
    spec = importlib.util.spec_from_file_location("neighbours", tmp_path / "neighbours.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, known in list(sys.modules.items()):
        if name.startswith("pathflip_jax.evaluate.") and isinstance(getattr(known, "TASKS", None), tuple):
            monkeypatch.setattr(known, "TASKS", (*known.TASKS, module.TASK))
    monkeypatch.setattr(run, "load", lambda folder: Labelled())
    monkeypatch.setattr(run, "is_language_run", lambda folder: False)


def test_a_new_task_is_one_file_and_one_entry(new_task, tiny_cohort, tmp_path, capsys):
    command = ["evaluate", "run", "--records", str(tiny_cohort.records), "--slides", str(tiny_cohort.slides)]
    out = tmp_path / "scores"
    assert cli.main([*command, "--out", str(out)]) == 0
    assert any(line.startswith("Neighbours of the same label") and "100.0%" in line
               for line in capsys.readouterr().out.splitlines())  # fmt: skip
    scores = json.loads((out / "scores.json").read_text())
    assert scores["neighbours"]["same"]["value"] == 1 and scores["warnings"][-1] == "neighbours are made up"
    with open(out / "neighbours.csv", newline="") as file:
        assert len(list(csv.DictReader(file))) == scores["slides"] == 6
    page = (out / "report.html").read_text()
    assert page.count("<section") == 2 and page.index('<section id="neighbours">') < page.index('<section id="how">')
    assert "<b>1.000</b>" in page and "Neighbours of the same label" in page
    assert (out / "figures" / "neighbours.png").stat().st_size > 1000
    assert cli.main([*command, "--out", str(tmp_path / "again")]) == 0
    assert cli.main(["compare", str(out), str(tmp_path / "again"), "--out", str(tmp_path / "compared")]) == 0
    (row,) = json.loads((tmp_path / "compared" / "compare.json").read_text())["rows"]
    assert (row["heading"], row["metric"], row["differences"][0]["value"]) == ("neighbours", "same", 0)
