"""Findings about a run's fit, from rows as metrics.jsonl holds them."""

import pytest

from pathflip_jax.training.findings import AT_CHANCE, BEST_IS_FIRST, MEMORISING, STILL_LEARNING, Findings

MRR = "val/mean_reciprocal_rank"
BY_HEART = MEMORISING + STILL_LEARNING.format(name=MRR)


def row(step, loss, held_out, score=0.5):
    values = {"val/loss": held_out, MRR: score, f"{MRR}_chance": 0.1, f"{MRR}_stderr": 0.05}
    return {"step": step, "loss": loss} | values


MEMORISED = [row(1, 3.0, 3.7), row(2, 2.5, 3.8), row(3, 2.0, 4.0), row(4, 1.8, 4.5), row(5, 1.7, 4.6)]


def test_a_run_that_memorises_is_told_once_and_again_at_the_end():
    findings = Findings(MRR)
    assert [findings.add(row) for row in MEMORISED] == [[], [], [], [BY_HEART], []]
    lines = findings.summary({"step": 1, "value": 0.5}, "run/best")
    assert lines[:2] == [BY_HEART, BEST_IS_FIRST]
    assert lines[2] == f"best validation: {MRR} 0.500 (chance 0.100) at step 1, saved in run/best"


@pytest.mark.parametrize("losses", [(3, 3, 3, 3, 3), (3.0, 2.5, 2.6, 1.8, 1.7)])
def test_without_a_falling_training_loss_nothing_is_memorised(losses):
    findings = Findings(MRR)
    assert not any(findings.add(row | {"loss": loss}) for row, loss in zip(MEMORISED, losses, strict=True))


def test_validation_within_a_standard_error_of_chance_is_told_after_three():
    findings = Findings(MRR)
    found = [findings.add(row(step, 3.0, 3.7, score)) for step, score in enumerate((0.2, 0.12, 0.08, 0.14, 0.1))]
    assert found == [[], [], [], [AT_CHANCE.format(name=MRR)], []]


def test_a_resumed_run_does_not_repeat_findings():
    findings = Findings(MRR, MEMORISED[:4])
    assert findings.add(MEMORISED[4]) == [] and findings.reported == [BY_HEART]


def test_a_run_without_ranks_is_not_sent_to_look_at_them():
    findings = Findings("val/loss", [{key: row[key] for key in ("step", "loss", "val/loss")} for row in MEMORISED])
    assert findings.reported == [MEMORISING]


def test_a_run_without_validation_says_so():
    findings = Findings(MRR, [{"step": 1, "loss": 2.0}])
    assert findings.summary(None, "run/best")[0].startswith("no validation")
