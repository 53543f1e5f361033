"""Export of language-stage runs: the adapter for PEFT, or the whole decoder for transformers.

The folder also holds the parts that turn slides into decoder inputs, so that `pathflip convert` restores the same run
from it: the projector as `projector.safetensors`, with the names of a torch.nn.Linear, the aligner as a separate export
in `aligner/`, and shape and settings of the run in `pathflip_language.json`. `generation_config.json` holds the tokens
at which the run's answers end.
"""

from pathlib import Path

import jax
import numpy as np

from pathflip_jax.convert.decoder import save_decoder
from pathflip_jax.convert.decoder_folders import PROJECTOR, read_object, write_tensors
from pathflip_jax.convert.exported import ALIGNER, LANGUAGE, without_paths
from pathflip_jax.convert.lora import save_peft
from pathflip_jax.convert.versions import this_version
from pathflip_jax.data.storage import json_files
from pathflip_jax.data.storage.atomic_folders import atomic_folder
from pathflip_jax.export.huggingface import read_about
from pathflip_jax.export.language_card import language_card, read_language_scores
from pathflip_jax.export.pytorch import write_export
from pathflip_jax.inference.language_export import is_language_export
from pathflip_jax.inference.language_run import assemble
from pathflip_jax.inference.load import load
from pathflip_jax.llm.adapter import SlideLanguageModel, split_names
from pathflip_jax.llm.prompts import stop_ids
from pathflip_jax.llm.tokenizer import DecoderTokenizer
from pathflip_jax.model.parameters import flatten
from pathflip_jax.runs import files
from pathflip_jax.runs.places import find_run

GENERATION = "generation_config.json"


def export_peft(run: str | Path, out: str | Path, which: str = "best", *, decoder: str = "", aligner: str = "") -> None:
    """Write the adapter of a run as a PEFT folder; `decoder` and `aligner` as `assemble` takes them.

    The folder is written atomically. Raises ValueError for a run that trained no adapter, or more of its decoder than
    the adapter.
    """
    _refuse_export(run)
    model, config, tokenizer = assemble(run, which, decoder=decoder, aligner=aligner)
    trains = split_names(config["lm"]["trains"])
    if model.decoder.lora is None or "decoder" in trains:
        why = "no adapter" if model.decoder.lora is None else "the decoder as well as the adapter"
        raise ValueError(
            f"{run}: trained {config['lm']['trains']} ({why}); export its whole decoder with --to huggingface"
        )
    with atomic_folder(out) as part:
        save_peft(flatten(model.decoder), model.decoder.lora, part, decoder or str(config["lm"]["decoder"]))
        _complete(part, run, model, config, tokenizer, aligner)


def export_decoder(
    run: str | Path,
    out: str | Path,
    which: str = "best",
    *,
    decoder: str = "",
    aligner: str = "",
    scores: str | Path | None = None,
    about: str | Path | None = None,
) -> None:
    """Write the decoder of a run, its adapter merged in, as a folder for transformers; otherwise as `export_peft`.

    Its model card shows the `scores` of an evaluation of this run, and the text `about` the training data, each as
    `export_huggingface` takes them.
    """
    _refuse_export(run)
    found = None if scores is None else read_language_scores(scores, run)
    described = None if about is None else read_about(about)
    model, config, tokenizer = assemble(run, which, decoder=decoder, aligner=aligner)
    with atomic_folder(out) as part:
        save_decoder(model.decoder, part, source=decoder or config["lm"]["decoder"])
        _complete(part, run, model, config, tokenizer, aligner)
        (part / "README.md").write_text(language_card(config, found, described), encoding="utf-8")


def _refuse_export(run: str | Path) -> None:
    if is_language_export(home := find_run(run)):
        raise ValueError(f"{run}: an export already; copy {home}, or make it a run with `pathflip convert` first")


def _complete(
    part: Path, run: str | Path, model: SlideLanguageModel, config: dict, tokenizer: DecoderTokenizer, aligner: str
) -> None:
    """Add the files that the language model needs besides its decoder."""
    _save_projector(model, part)
    source = load(aligner or config["lm"]["aligner"])  # for settings and vocabulary; model holds the trained parameters
    (part / ALIGNER).mkdir()
    write_export(part / ALIGNER, model.aligner, source.config, source.tokenizer)
    write_generation(part, tokenizer, config["data"]["template"])
    about = {"version": this_version(), "settings": without_paths(config)}
    shape = json_files.read_json(files.run_folder(run) / files.MODEL)
    json_files.write_json(part / LANGUAGE, about | {"shape": shape})


def write_generation(folder: Path, tokenizer: DecoderTokenizer, template: str) -> None:
    """Set end and padding tokens in generation_config.json, keeping its other entries."""
    path = folder / GENERATION
    before = read_object(path) if path.is_file() else {}
    ends = {"eos_token_id": list(stop_ids(tokenizer, template)), "pad_token_id": tokenizer.pad_id}
    json_files.write_json(path, before | ends)


def _save_projector(model: SlideLanguageModel, out: Path) -> None:
    tensors = {
        "weight": np.ascontiguousarray(np.asarray(model.projector.kernel[...]).T),
        "bias": np.asarray(model.projector.bias[...]),
    }
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    write_tensors(out / PROJECTOR, shapes, tensors.__getitem__)
