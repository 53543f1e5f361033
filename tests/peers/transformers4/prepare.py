"""Exports of the golden cases and of a decoder with an adapter, and its logits: `python prepare.py FOLDER`."""

import os
import sys
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax.numpy as jnp
import numpy as np

from pathflip_jax.convert.decoder import load_decoder, save_decoder
from pathflip_jax.convert.lora import save_peft
from pathflip_jax.export import from_released
from pathflip_jax.export.huggingface import export_huggingface
from pathflip_jax.llm.config import LoRAConfig
from pathflip_jax.model.parameters import flatten, unflatten

GOLDEN = Path(__file__).parents[2] / "golden"
ARGUMENTS = {"num_heads": 4, "text_pooling_type": "mean", "lora_alpha": 12, "top_k": 6, "use_soft_topk": True}
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 17), dtype=np.int32)


def main() -> None:
    """Write a folder for transformers of each family, a decoder, its adapter for PEFT, and decoder.npz."""
    out = Path(sys.argv[1])
    for family in ("base", "pathflip2"):
        two = {"arguments": ARGUMENTS, "keep_lora": True} if family == "pathflip2" else {}
        golden, run = GOLDEN / family, out / f"{family}-run"
        from_released.convert(golden / "state_dict.safetensors", run, bert_folder=golden / "bert", **two)
        export_huggingface(run, out / family)
    source, rng = GOLDEN / "runs" / "0.1.0" / "decoder", np.random.default_rng(1)
    lora = LoRAConfig(rank=4, alpha=6.0, targets=("q_proj", "down_proj"))
    adapted = load_decoder(source, lora=lora)
    flat = flatten(adapted)
    flat |= {name: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype) for name, x in flat.items() if name[-2:] == "/b"}
    adapted, plain = unflatten(adapted, flat), load_decoder(source)
    save_decoder(plain, out / "decoder", source=source)
    save_peft(flat, lora, out / "adapter", "decoder")
    logits = {name: np.asarray(model(TOKENS)[0]) for name, model in (("plain", plain), ("adapted", adapted))}
    np.savez(out / "decoder.npz", tokens=TOKENS, **logits)


if __name__ == "__main__":
    main()
