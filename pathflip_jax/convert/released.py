"""Released PyTorch weights as a run: a released model's checkpoint with its BERT folder, or an export of this library.

An export describes itself completely (`exported.py`). A released checkpoint does not: what is assumed about it is
listed.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pathflip_jax.convert.checkpoint_files import open_checkpoint
from pathflip_jax.convert.exported import Exported, read_exported
from pathflip_jax.convert.families import conversion_of
from pathflip_jax.convert.names import why_unused
from pathflip_jax.convert.pytorch import bert_setting, infer_config, read_bert_heads, to_jax, torch_shapes
from pathflip_jax.convert.recognise import FINETUNE, Tensor, account, recognise
from pathflip_jax.model.config import ModelConfig

UNKNOWN_ENCODER = "the patch encoder is not known: features of any encoder with this width are accepted"


class Released(NamedTuple):
    """PyTorch weights as a run: model, settings and tokenizer, and an account of every tensor.

    `assumed` lists what neither the weights nor the files with them state, `notes` what an option changed.
    """

    model: Any
    settings: dict
    tokenizer: Any
    tensors: list[Tensor]
    assumed: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def load_released(
    source: str | Path,
    bert_folder: str | Path | None = None,
    heads: int | None = None,
    config: ModelConfig | None = None,
    *,
    arguments: Mapping[str, Any] | None = None,
    keep_lora: bool = False,
    weights: str = "",
) -> Released:
    """Load PyTorch weights of either family: an export of this library, or a released checkpoint with its BERT folder.

    An export brings its config.json and tokenizer; `heads` and `bert_folder` override them, as `notes` records. The
    config of a released checkpoint is inferred where none is given; BERT's heads are `heads`, else those of the
    folder's config.json, else one per 64 of the hidden width. `arguments` are added to those stored with the checkpoint
    (`open_checkpoint`), and override them. The LoRA of a PathFLIP2 is merged into its BERT unless `keep_lora`. Regions
    are cut by `scan`, as the released code cuts them. `weights` names one of several sets of weights. Raises ValueError
    when the checkpoint is neither model or the vocabulary is not the checkpoint's.
    """
    exported = None if config is not None else read_exported(source)
    if exported is not None:
        if arguments or keep_lora:
            raise ValueError(
                f"{source}: an export, described completely by {exported.path}; leave out --hparams, --lora-alpha and "
                "--keep-lora, which are for checkpoints of the published code"
            )
        return _load_export(Path(source), exported, bert_folder, heads, weights)
    if bert_folder is None:
        raise ValueError(
            f"{source}: PyTorch weights contain no tokenizer, and no config.json of an export is next to them; pass "
            "the BERT folder of this model (--bert, in Python bert=)"
        )
    return _load_foreign(source, bert_folder, heads, config, dict(arguments or {}), keep_lora, weights)


def _load_export(
    source: Path, exported: Exported, bert_folder: str | Path | None, heads: int | None, weights: str
) -> Released:
    from pathflip_jax.data.texts.tokenizer import TextTokenizer
    from pathflip_jax.model.parameters import unflatten

    config, notes = exported.config, list(exported.notes)
    folder = Path(bert_folder) if bert_folder is not None else exported.tokenizer
    if folder is None:
        raise ValueError(f"{exported.path.parent}: no tokenizer in it; copy the whole export, or give its BERT folder")
    if exported.tokenizer is not None and folder.resolve() != exported.tokenizer.resolve():
        notes.append(f"the tokenizer of {folder}, as requested, not the export's own in {exported.tokenizer}")
    try:
        if heads is not None and heads != config.heads:
            notes.append(f"heads {heads}, as requested; {exported.path} says {config.heads}")
            config = dataclasses.replace(config, heads=heads)
        file = exported.weights if source.is_dir() else source
        state = open_checkpoint(file, weights).tensors
        rows = account(state, torch_shapes(config), why_unused)
        model = unflatten(config, to_jax(state, config))
    except ValueError as error:
        message = str(error).removeprefix(f"{source}: ")
        raise ValueError(f"{source}, as {exported.path} describes it: {message}") from error
    tokenizer = TextTokenizer(folder)
    require_own_bert(source, config, folder, tokenizer)
    settings = dict(exported.settings)
    if exported.assumed:
        settings["assumed"] = list(exported.assumed)
    if not settings.get("train"):  # not trained here: keep its origin on record
        settings.setdefault("converted_from", source.name)
    return Released(model, settings, tokenizer, rows, exported.assumed, tuple(notes))


def _load_foreign(
    source: str | Path,
    bert_folder: str | Path,
    heads: int | None,
    config: ModelConfig | None,
    arguments: dict[str, Any],
    keep_lora: bool,
    weights: str,
) -> Released:
    from pathflip_jax.data.texts.tokenizer import TextTokenizer
    from pathflip_jax.model.parameters import unflatten

    tokenizer = TextTokenizer(bert_folder)
    assumed: list[str] = []
    try:
        state, known = open_checkpoint(source, weights)
        if recognise(state) == FINETUNE:
            raise ValueError(
                "a checkpoint of the finetune stage; pass its language model too (`pathflip convert --decoder FOLDER`)"
            )
        if config is None:
            arguments = known | arguments
            config = infer_config(state, heads or read_bert_heads(Path(bert_folder)), arguments)
            assumed = assumed_sizes(config, heads, Path(bert_folder), arguments)
        rows = account(state, torch_shapes(config), why_unused)
        if not keep_lora:
            state, config, _ = conversion_of(config).merge(state, config)
        model = unflatten(config, to_jax(state, config))
    except ValueError as error:
        raise ValueError(f"{source}: {str(error).removeprefix(f'{source}: ')}") from error
    require_own_bert(source, config, bert_folder, tokenizer)
    lengths = conversion_of(config).text_lengths
    data = {"cut": "scan", "caption_length": lengths[0], "subcaption_length": lengths[1]}
    assumed += [
        f"captions of at most {lengths[0]} tokens, and regions cut by scan, as in the released code",
        UNKNOWN_ENCODER,
    ]
    settings = {"data": data, "converted_from": Path(source).name, "assumed": assumed}
    return Released(model, settings, tokenizer, rows, tuple(assumed))


def assumed_sizes(config: ModelConfig, heads: int | None, folder: Path, arguments: Mapping[str, Any]) -> list[str]:
    """Settings of a released model that no tensor determines, each with its origin."""
    own = read_bert_heads(folder)
    origin = "as requested" if heads else f"from the config.json of {folder}" if own else "one per 64 of the width"
    lines = [f"heads {config.heads} ({origin})"]
    return lines + conversion_of(config).assumed(config, arguments)


def require_own_bert(source: str | Path, config: ModelConfig, folder: str | Path, tokenizer) -> None:
    """Raise ValueError where the BERT folder is not the checkpoint's: every token would map to the wrong word."""
    whole = conversion_of(config).bert.whole
    words, cure = tokenizer.vocab_size - whole, "give the BERT folder that this checkpoint was trained with"
    if config.vocab_size != words and not (whole and bert_setting(folder, "vocab_size") == config.vocab_size):
        ours = f"{folder} has {words} words{'' if whole else ' with [DEC]'}"
        raise ValueError(f"{source}: its word table has {config.vocab_size} rows, {ours}; {cure}")
    width = bert_setting(folder, "hidden_size")
    if whole and width not in (None, config.hidden):
        raise ValueError(f"{source}: its text encoder is {config.hidden} wide, the BERT in {folder} {width}; {cure}")
