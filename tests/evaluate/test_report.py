"""The report's own arithmetic: no NaN in JSON, signs and percentages as people write them."""

import json

import numpy as np
import pytest

from pathflip_jax.evaluate import figures, report


def test_json_holds_no_nan():
    found = report.without_nan({"a": [float("nan"), 1.5, {"b": float("inf")}], "c": "x", 3: (None, True)})
    assert found == {"a": [None, 1.5, {"b": None}], "c": "x", "3": [None, True]}
    json.dumps(found, allow_nan=False)


def test_numbers_as_people_write_them():
    assert [report._figure(x) for x in (0.12345, None)] == ["0.123", "–"]
    assert [report._percent(x) for x in (0.1234, None)] == ["12.3%", "–"]
    assert [report._signed(x) for x in (0.05, -0.05, None)] == ["+0.050", "−0.050", "–"]


def entry(value, low=None, high=None, **more):
    return {"value": value, "low": low, "high": high} | more


def test_the_terminal_gets_every_headline_score():
    other = entry(0.25, 0.1, 0.3)
    found = {
        "compared_to": ["runs/b"],
        "retrieval": {"slide_to_text": {"all": {"gallery": 7, "R@1": entry(0.5, 0.25, 0.75, chance=1 / 7)}}},
        "zero_shot": {
            "classes": {"a": 3, "b": 4},
            "metrics": {"balanced_accuracy": entry(0.8, chance=0.5, majority=0.5, mean_colour=other)},
        },
        "grounding": {
            "auc": entry(0.7, 0.6, 0.8, chance=0.5, no_text=other, difference=entry(-0.05, -0.1, 0.2)),
            "froc": {"score": entry(0.4, 0.3, 0.5, no_text=other)},
        },
        "few_shot": [
            {
                "label": "grade",
                "shots": ["1", "all"],
                "probes": {
                    name: {"all": {"metrics": {"balanced_accuracy": entry(0.9, 0.8, 1.0, chance=0.5)}}}
                    for name in ("linear", "mean patch feature")
                },
            }
        ],
        "language": {
            "captions": {"words": {"ROUGE-L": entry(0.3, 0.2, 0.4, baselines={"text only": other})}},
            "questions": {
                "choices": {"by_likelihood": {"accuracy": entry(0.6, 0.5, 0.7, baselines={"chance": other})}},
                "open": {
                    "metrics": {
                        name: entry(None, baselines={"text only": other}) for name in ("exact match", "ROUGE-L")
                    }
                },
            },
        },
    }
    lines = [" ".join(line.split()) for line in report.in_terminal(found).splitlines()]
    assert lines == [
        "score 95% interval chance baselines",
        "Retrieval, slide to text: R@1 of 7 50.0% 25.0% to 75.0% 14.3%",
        "Zero-shot, 2 classes: balanced accuracy 0.80 - 0.50 majority class 0.50, mean colour 0.25",
        "Grounding: ROC AUC of patches 0.70 0.60 to 0.80 0.50 no text 0.25",
        "Grounding: gain over runs/b -0.05 -0.10 to +0.20 -",
        "Lesion detection: FROC score 0.40 0.30 to 0.50 - no text 0.25",
        "Few-shot: grade, linear probe, all shots: balanced accuracy 0.90 0.80 to 1.00 0.50 raw features 0.90",
        "Captions: ROUGE-L 0.30 0.20 to 0.40 - without the slide 0.25",
        "Multiple choice, by likelihood: accuracy 60.0% 50.0% to 70.0% 25.0%",
        "Open questions: exact match - - - without the slide 25.0%",
        "Open questions: ROUGE-L - - - without the slide 0.25",
    ]
    assert report.in_terminal(found).isascii()


@pytest.mark.parametrize("kind", ["span", "signed_span", "percent_span", "points_span"])
def test_an_interval_that_does_not_exist_is_a_dash(kind):
    write = report.environment().filters[kind]
    assert write(entry(0.5)) == "–" and " to " in write(entry(0.5, 0.25, 0.75))
    assert report.environment().filters["points"](None) == "–"


def test_training_curves_need_a_history():
    assert figures.training_curves([]) is None
    figure = figures.training_curves([{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "val/recall_at_1": 0.5}])
    lines = [line.get_xydata().tolist() for axis in figure.axes for line in axis.lines]
    assert lines == [[[1, 2.0], [2, 1.0]], [[2, 0.5]]]


def test_confusion_shows_every_slide():
    labels, predicted = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0])
    figure = figures.confusion(labels, predicted, ["a", "b", "c"])
    shown = {t.get_position()[::-1]: int(t.get_text()) for t in figure.axes[0].texts}
    assert shown == {(0, 0): 1, (0, 1): 1, (1, 1): 1, (2, 2): 2, (2, 0): 1}
    assert figure.axes[0].images[0].get_array()[2, 2] == pytest.approx(2 / 3)
