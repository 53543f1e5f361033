"""Settings that earlier versions lacked, and what those versions did.

`BEFORE` is the one table of what was meant before a setting existed; whoever adds a setting adds a line.
"""

from collections.abc import Iterable
from typing import Any

AS_NOW = object()  # it makes no difference to what a run learns: a run that began without it takes today's value

# Setting -> the value that means what versions before it did. For runs and config files that lack it.
BEFORE: dict[str, Any] = {
    "data.caption_share": 1.0,
    "data.embeddings": "",
    "data.max_unknown_share": 1.0,  # such texts were trained on
    "data.no_slide_share": 0.0,
    "data.row_step": AS_NOW,  # how texts are packed into rows
    "data.sentence_orders": 1,
    "loss.negatives_at_once": AS_NOW,  # the same loss
    "mesh.region": AS_NOW,  # the same loss
    "train.deterministic": AS_NOW,
    "train.keep_every": 0,
    "train.preemptions_per_day": 0.0,
    "train.select_margin": 0.0,
    "train.wandb_project": "",
}


class UnknownSettings(ValueError):
    """Settings that no version up to this one has; `names` are those."""

    def __init__(self, message: str, names: Iterable[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def before(section: str, names: Iterable[str]) -> dict[str, Any]:
    """Values that versions without these settings worked by, where stated and where they make a difference."""
    stated = ((name, BEFORE.get(f"{section}.{name}", AS_NOW)) for name in names)
    return {name: value for name, value in stated if value is not AS_NOW}
