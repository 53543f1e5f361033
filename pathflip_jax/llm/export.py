"""A run of the language stage for others: its adapter for PEFT, or the whole decoder for transformers.

The projector comes along as `projector.safetensors`, with the names of a torch.nn.Linear.
"""

from pathlib import Path

import jax
import numpy as np

from pathflip_jax.llm.folders import write_tensors
from pathflip_jax.llm.hf_io import save_decoder
from pathflip_jax.llm.lora import save_peft
from pathflip_jax.llm.training import assemble
from pathflip_jax.model.parameters import flatten

PROJECTOR = "projector.safetensors"


def export_peft(run: str | Path, out: str | Path, which: str = "best") -> None:
    """Write the adapter of a run as a PEFT folder. Raises ValueError for a run that trained none."""
    model, config, _ = assemble(run, which)
    if model.decoder.lora is None:
        raise ValueError(
            f"{run}: trained {config['lm']['trains']} and no adapter; write its decoder with --to huggingface"
        )
    save_peft(flatten(model.decoder), model.decoder.lora, out, str(config["lm"]["decoder"]))
    _save_projector(model, Path(out))


def export_decoder(run: str | Path, out: str | Path, which: str = "best") -> None:
    """Write the decoder of a run, its adapter merged in, as a folder that transformers loads."""
    model, config, _ = assemble(run, which)
    save_decoder(model.decoder, out, source=config["lm"]["decoder"])
    _save_projector(model, Path(out))


def _save_projector(model, out: Path) -> None:
    tensors = {
        "weight": np.ascontiguousarray(np.asarray(model.projector.kernel[...]).T),
        "bias": np.asarray(model.projector.bias[...]),
    }
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in tensors.items()}
    write_tensors(out / PROJECTOR, shapes, tensors.__getitem__)
