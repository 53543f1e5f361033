"""Import of language-stage exports, a PEFT adapter on its decoder or a whole decoder, as the original run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from pathflip_jax.convert.decoder_folders import weights_hash
from pathflip_jax.convert.exported import ALIGNER
from pathflip_jax.convert.recognise import Tensor, write_rows
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.inference.language_export import read_language_export
from pathflip_jax.inference.language_run import describe_language_run, read_aligner
from pathflip_jax.llm.shape import Shape
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.runs import checkpoints as checkpoint
from pathflip_jax.runs import files
from pathflip_jax.runs import folder as runs_folder

TENSORS = "tensors.csv"


class AlignerParts(NamedTuple):
    """Aligner of a language run: model, settings and vocabulary, to be written as a separate run."""

    model: Any
    settings: dict
    words: Any


def convert_language(source: str | Path, out: str | Path, *, decoder_folder: str | Path | None = None) -> list[str]:
    """Restore a run of the language stage from `pathflip export --to peft` or `--to huggingface`; returns notes.

    An adapter's base is `decoder_folder`, else the folder that it names; a whole decoder needs none. The folder is
    written atomically. Raises FileNotFoundError and ValueError for parts that are missing or of other models.
    """
    found = read_language_export(source, decoder_folder)
    aligner = AlignerParts(*found.aligner[:3])
    write_language_run(out, aligner, found.shape, found.params, found.settings, found.decoder, found.aligner.tensors)
    return found.notes


def write_language_run(
    out: str | Path,
    aligner: AlignerParts,
    shape: Shape,
    params: Mapping[str, np.ndarray],
    settings: dict,
    decoder: str | Path,
    rows: list[Tensor],
) -> None:
    """Write a run of the language stage, aligner in `out`/aligner, from trained parameters and a decoder's folder."""
    with atomic_folder(out) as part:
        runs_folder.save_run(part / ALIGNER, *aligner)
        lm = {"aligner": str(Path(out).resolve() / ALIGNER), "decoder": str(Path(decoder).resolve()), "start": ""}
        lm |= {"aligner_hash": read_aligner(str(part / ALIGNER)).hash, "decoder_hash": weights_hash(decoder)}
        found = settings | {"lm": {"start_hash": ""} | settings["lm"] | lm}
        describe_language_run(part, shape, found, DecoderTokenizer(decoder))
        with checkpoint.Checkpoints(part, keep=2, facts={"config": found}) as checkpoints:
            checkpoints.save_best(0, jax.device_put(dict(params)), {})
        (part / files.CHECKPOINTS).rmdir()
        write_rows(part / TENSORS, rows)
