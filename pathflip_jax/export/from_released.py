"""Conversion of released PyTorch checkpoints, or of exports, to run folders."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pathflip_jax.convert.recognise import write_rows
from pathflip_jax.convert.released import Released, load_released
from pathflip_jax.model.config import ModelConfig
from pathflip_jax.runs.folder import save_run


def convert(
    source: str | Path,
    out: str | Path,
    *,
    bert_folder: str | Path | None = None,
    heads: int | None = None,
    config: ModelConfig | None = None,
    arguments: Mapping[str, Any] | None = None,
    keep_lora: bool = False,
    weights: str = "",
) -> Released:
    """Write a run folder from what `load_released` reads, with an account of every tensor in tensors.csv."""
    found = load_released(source, bert_folder, heads, config, arguments=arguments, keep_lora=keep_lora, weights=weights)
    save_run(out, found.model, found.settings, found.tokenizer)
    write_rows(Path(out) / "tensors.csv", found.tensors)
    return found
