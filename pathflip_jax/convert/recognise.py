"""Checkpoint identification by tensor names, and an account of every tensor."""

import csv
import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from pathflip_jax.convert.families import CONVERSIONS

FINETUNE = "finetune"  # the stage after alignment, whose checkpoints hold both a language model and a PathFLIP
# Tensors that together identify a model, the most specific set first.
KNOWN_BY = {FINETUNE: ("path_proj_llm.weight", "path_proj.weight", "query_tokens")} | {
    name: family.known_by for name, family in reversed(CONVERSIONS.items())
}
TITLES = {name: family.title for name, family in CONVERSIONS.items()} | {FINETUNE: "PathFLIP's finetune stage"}
# Identifying tensors of other models' weights that are common in pathology.
OTHERS = {
    "a CLIP-like model (CONCH, PLIP, KEEP, QuiltNet)": (
        "visual.trunk.",
        "visual.transformer.",
        "vision_model.",
        "text.",
    ),
    "a BERT on its own": ("bert.embeddings.", "embeddings.word_embeddings."),
    "a vision transformer (a patch encoder)": ("patch_embed.", "blocks.0.", "cls_token"),
    "a language model": ("model.layers.", "layers.0.self_attn", "lm_head.", "embed_tokens."),
    "an attention MIL": ("attention_a.", "attention_net.", "classifiers."),
}


def recognise(names: Iterable[str]) -> str:
    """Family of a `state_dict` by its names, or FINETUNE. Raises ValueError naming the model it resembles instead."""
    names = set(names)
    for family, known in KNOWN_BY.items():
        if names.issuperset(known):
            return family
    part = {
        family: [name for name in known if name not in names]
        for family, known in KNOWN_BY.items()
        if names.intersection(known)
    }
    if part:
        family = min(part, key=lambda family: len(part[family]))
        raise ValueError(
            f"incomplete checkpoint: its {len(names)} tensors include some of {TITLES[family]}, but not "
            f"{', '.join(part[family])}; pass the whole checkpoint"
        )
    like = next((what for what, starts in OTHERS.items() if any(n.startswith(starts) for n in names)), None)
    raise ValueError(
        f"the checkpoint of another project{f', it looks like {like}' if like else ''}: {len(names)} tensors such as "
        f"{', '.join(sorted(names)[:3])}; expected the tensor names of {', '.join(TITLES.values())}"
    )


class Tensor(NamedTuple):
    """Tensor of a checkpoint, or one that it lacks, and its use in the conversion."""

    name: str
    shape: str
    state: Literal["used", "unused", "filled"]
    why: str


def account(
    state: Mapping[str, np.ndarray], wanted: Iterable[str], why_unused: Callable[[str], str | None]
) -> list[Tensor]:
    """Account of every tensor of a checkpoint that `to_jax` has accepted."""
    wanted, rows = set(wanted), []
    for name, tensor in state.items():
        shape = "x".join(map(str, tensor.shape)) or "scalar"
        rows.append(Tensor(name, shape, "used" if name in wanted else "unused", why_unused(name) or ""))
    for name in sorted(wanted - set(state)):
        rows.append(
            Tensor(
                name, "", "filled", "not in the checkpoint: filled with a neutral value, on which no embedding depends"
            )
        )
    return rows


def summary(rows: list[Tensor]) -> str:
    """Summary of the rows by state, of the unused ones by reason."""
    lines = [f"tensors used {sum(row.state == 'used' for row in rows)}"]
    counts = Counter((row.state, row.why) for row in rows if row.state != "used")
    lines += [f"{state} {count}: {why}" for (state, why), count in counts.items()]
    return "\n".join(lines)


def write_rows(path: Path, rows: list[Tensor]) -> None:
    """Write the rows as CSV."""
    # Imported here: benchmarks/step.py makes checkpoints without the data packages installed.
    from pathflip_jax.data.storage.atomic_files import atomic_file

    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(Tensor._fields)
    writer.writerows(rows)
    with atomic_file(path) as file:
        file.write(text.getvalue().encode())
