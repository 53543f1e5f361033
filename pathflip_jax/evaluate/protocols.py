"""Evaluation protocols by name: `strict`, and `paper` with the published script's arithmetic.

`paper` follows the evaluation scripts of the PathFLIP follow-up (github.com/cyclexfy/PathFLIP2, src/eval, commit
939e349); those of PathFLIP itself are not published. The notes of a protocol, by task, are printed in the report.
"""

from typing import NamedTuple

STRICT, PAPER = "strict", "paper"
PROTOCOLS = (STRICT, PAPER)


class Attention(NamedTuple):
    """Training settings of attention MIL: AdamW for some rounds, of which the best is kept.

    A round is an epoch of at least `least_steps` steps. With `l2` the decay is added to the gradient, as in PyTorch's
    Adam.
    """

    hidden: int = 128
    learning_rate: float = 1e-3
    decay: float = 1e-2
    l2: bool = False
    dropout: float = 0.25
    batch: int = 16
    rounds: int = 20
    least_steps: int = 20


class Protocol(NamedTuple):
    """The choices of a protocol: prompts, masking, training of attention MIL and selection of its epoch."""

    name: str
    ensemble: bool  # all texts of a class, not only the first
    mask_cases: bool  # exclude other slides of the patient from a query's gallery
    published_f1: bool  # add F1 of the second of two classes
    test_chooses: bool  # keep the epoch with the best test AUC
    attention: Attention
    notes: dict[str, list[str]]  # by task

    def words(self, tasks) -> list[str]:
        """The notes on these tasks for the report."""
        return [note for task in tasks for note in self.notes.get(task, [])]


def read_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError listing the known names."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    if name == STRICT:
        return Protocol(name, True, True, False, False, Attention(), {})
    trained = Attention(learning_rate=1e-4, decay=1e-4, l2=True, batch=4, rounds=300, least_steps=1)
    return Protocol(name, False, False, True, True, trained, _NOTES)


_NOTES = {
    "zero_shot": [
        "Zero-shot: one text per class (the first), as in the published script; no ensemble.",
        "“F1 as published” is that of the second class where there are two, else weighted by class size. For two "
        "classes it rewards predicting the second class more often; it is not a weighted F1.",
    ],
    "retrieval": [
        "Retrieval: other slides of the same patient stay in the gallery and count as wrong, which is harder than "
        "strict, not easier. Here ties are scored as if ordered at random; the script keeps the order of its sort. It "
        "samples patches at random; here all patches of a slide are used.",
    ],
    "few_shot": [
        "Optimistic: attention MIL keeps the epoch with the best score on the test slides, which does not estimate its "
        "performance on new slides. The published script does not say which score it uses; here it is the AUC.",
        "Attention MIL is trained with the script's settings (hidden 128, Adam 1e-4 with decay 1e-4, dropout 0.25, 300 "
        "epochs, batches of 4 slides). The script draws shots from the test table if it has no training table; here "
        "they always come from the training split. Its dropout stays active during testing; here it is off.",
    ],
}
