"""Protocols by name: the strict one, and the published script's arithmetic with what is optimistic in it.

`paper` follows the evaluation scripts of the PathFLIP follow-up (github.com/cyclexfy/PathFLIP2, src/eval, commit
939e349); those of PathFLIP itself are not published. What these scripts leave open is said in the notes.
"""

from typing import NamedTuple

from pathflip_jax.evaluate.tasks.probes import Attention

STRICT, PAPER = "strict", "paper"
PROTOCOLS = (STRICT, PAPER)


class Protocol(NamedTuple):
    """What a protocol decides: prompts, masking, how attention MIL is trained and where its epoch is chosen."""

    name: str
    ensemble: bool  # all texts of a class, not its first alone
    mask_cases: bool  # other slides of the patient leave a query's gallery
    published_f1: bool  # F1 of the second of two classes
    test_chooses: bool  # the epoch with the best test AUC is kept
    attention: Attention
    notes: dict[str, list[str]]  # by task

    def words(self, tasks) -> list[str]:
        """What the report says of the protocol for these tasks."""
        return [note for task in tasks for note in self.notes.get(task, [])]


def read_protocol(name: str) -> Protocol:
    """The protocol of that name. Raises ValueError naming those that there are."""
    if name not in PROTOCOLS:
        raise ValueError(f"protocol {name!r}: expected one of {', '.join(PROTOCOLS)}")
    if name == STRICT:
        return Protocol(name, True, True, False, False, Attention(), {})
    trained = Attention(learning_rate=1e-4, decay=1e-4, l2=True, batch=4, rounds=300, least_steps=1)
    return Protocol(name, False, False, True, True, trained, _NOTES)


_NOTES = {
    "zero_shot": [
        "Zero-shot: one text per class (the first), as the published script has; no ensemble.",
        "“F1 as published” is that of the second class where there are two, else weighted by class size. For two "
        "classes it rewards a model that says the second class more often; it is no weighted F1.",
    ],
    "retrieval": [
        "Retrieval: other slides of the same patient stay in the gallery and count as wrong, which is harder than "
        "strict, not easier. Ties count as any order here; the script takes them in the order of its sorting. It draws "
        "patches at random; here all patches of a slide are seen.",
    ],
    "few_shot": [
        "Optimistic: attention MIL keeps the epoch that does best on the test slides. This is no estimate of what the "
        "probe reaches on new slides. Which score chooses is not in the published script; here it is the AUC.",
        "Attention MIL is trained with the script's settings (hidden 128, Adam 1e-4 with decay 1e-4, dropout 0.25, 300 "
        "epochs, batches of 4 slides). The script draws shots from the test table where it has no table for training; "
        "here they come from the training split always. Its dropout stays on while it tests; here it does not.",
    ],
}
