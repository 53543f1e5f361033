"""Findings about a run's training: validation at chance, memorised slides, a best checkpoint that is the first."""

from collections.abc import Iterable

import numpy as np

from pathflip_jax.monitoring.metrics import CHANCE, STDERR, VALIDATION, with_chance

IN_A_ROW = 3  # consecutive validations that must agree before a finding is reported
LOSS = VALIDATION + "loss"
AT_CHANCE = (
    f"validation is at chance: {{name}} was within one standard error of chance in {IN_A_ROW} validations in a row. "
    "Check that each report belongs to its slide (pathflip doctor), then train longer or raise optim.learning_rate"
)
MEMORISING = (
    f"the validation loss rose in {IN_A_ROW} validations in a row while the training loss fell: the model learns its "
    "training slides by heart. Draw a smaller random part of each slide per step (lower data.regions and "
    "data.patch_slots), raise optim.weight_decay, lower train.steps or add slides"
)
STILL_LEARNING = ". As long as {name} rises, it also learns what slides have in common; do not lower train.steps then"
BEST_IS_FIRST = (
    "the best checkpoint is that of the first validation: further training did not improve the score on the validation "
    "slides. Lower optim.learning_rate, or validate earlier (lower train.eval_every)"
)


class Findings:
    """Findings about the rows of a metrics.jsonl, in order; the same for a resumed run as for an uninterrupted one."""

    def __init__(self, select: str, rows: Iterable[dict] = ()):
        self.select, self.reported = select, []
        self._losses: list[float] = []  # of the steps since the last validation
        self._training: list[float] = []  # mean training loss before each validation
        self._validations: list[dict] = []
        for row in rows:
            self.add(row)

    def add(self, row: dict) -> list[str]:
        """New findings after one more row, each reported once."""
        self._losses.append(row.get("loss", np.nan))
        if LOSS not in row:
            return []
        self._training.append(float(np.mean(self._losses)))
        self._validations.append(row)
        self._losses = []
        found = []
        if name := self._at_chance():
            found.append(AT_CHANCE.format(name=name))
        if self._memorises():
            ranks = self._ranks()
            found.append(MEMORISING + (STILL_LEARNING.format(name=ranks) if ranks in row else ""))
        new = [finding for finding in found if finding not in self.reported]
        self.reported += new
        return new

    def _at_chance(self) -> str:
        last, name = self._validations[-IN_A_ROW:], self._ranks()
        if len(last) < IN_A_ROW or not all({name, name + CHANCE, name + STDERR} <= row.keys() for row in last):
            return ""
        return name if all(abs(row[name] - row[name + CHANCE]) <= row[name + STDERR] for row in last) else ""

    def _ranks(self) -> str:
        """The score of ranks to look at: the one that selects, if it has a standard error."""
        chosen = self.select + STDERR in self._validations[-1]
        return self.select if chosen else VALIDATION + "mean_reciprocal_rank"

    def _memorises(self) -> bool:
        losses = [row[LOSS] for row in self._validations[-IN_A_ROW - 1 :]]
        if len(losses) <= IN_A_ROW:
            return False
        return bool(np.all(np.diff(losses) > 0) and np.all(np.diff(self._training[-IN_A_ROW - 1 :]) < 0))

    def summary(self, best: dict | None, folder) -> list[str]:
        """Lines for the end of a run: its findings, then the best validation score with its chance, step and folder."""
        lines = list(self.reported)
        if best is None or not self._validations:
            return [
                *lines,
                "no validation: the model was not evaluated on held-out slides; set data.val_split to do so",
            ]
        if len(self._validations) >= IN_A_ROW and best["step"] == self._validations[0]["step"]:
            lines.append(BEST_IS_FIRST)
        row = next((row for row in self._validations if row["step"] == best["step"]), {})
        score = with_chance(row | {self.select: best["value"]}, self.select)
        return [*lines, f"best validation: {self.select} {score} at step {best['step']}, saved in {folder}"]
