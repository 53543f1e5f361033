"""Compare this implementation with the released PyTorch models' own outputs, losses and gradients.

    python tests/parity.py DIR [--json]

DIR holds meta.json, state_dict.safetensors, io.npz and perhaps grads.safetensors as a released model wrote them
(tests/golden/base is one of PathFLIP, tests/golden/pathflip2 of the follow-up network; the tensors tell which). Prints
every figure beside its tolerance; exits non-zero beyond one. Sizes are read from the tensors' shapes, heads and pooling
from meta.json.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from pathflip_jax.convert.checkpoint_files import read_checkpoint
from pathflip_jax.convert.families import names
from pathflip_jax.convert.names import is_unused
from pathflip_jax.convert.pathflip2 import TOKENS
from pathflip_jax.convert.pytorch import infer_config, to_jax
from pathflip_jax.losses.pathflip import Embeddings, LossConfig, alignment_loss
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig, pair_loss
from pathflip_jax.model.config import ModelConfig, PathFLIP2Config
from pathflip_jax.model.parameters import AlignmentModel, flatten, unflatten
from pathflip_jax.model.pathflip import PathFLIP
from pathflip_jax.model.pathflip2 import PathFLIP2

INPUTS = ("patches", "caption_ids", "caption_mask", "subcaption_ids", "subcaption_mask", "negatives")
OUTPUTS = (
    "slide_features",
    "caption_features",
    "region_features",
    "slide_attention",
    "region_attention",
    "text_region_attention",
    "loss_slide",
    "loss_region",
    "loss",
)


# Of the follow-up network, whose global loss does not run as published.
INPUTS2 = ("patches", "caption_ids", "caption_mask", "subcaption_ids", "subcaption_mask")
OUTPUTS2 = (
    "slide_features",
    "caption_features",
    "tokens",
    "patch_features",
    "patch_features_local",
    "slide_attention",
    "subcaption_features",
    "text_conditioned_features",
    "patch_weights",
    "loss_region",
)


class Tolerances(NamedTuple):
    """The largest errors allowed: of outputs and gradients absolute or relative to their largest entry, of losses
    relative."""

    output_atol: float
    output_rtol: float
    loss_rtol: float
    gradient_rtol: float
    gradient_atol: float


FLOAT32 = Tolerances(1e-4, 0, 1e-5, 1e-3, 1e-7)
# Products of eight bits, whose errors add up over layers: on a CPU outputs differ by 1% of their largest entry, losses
# by 0.1%, gradients by at most 14% to 20%, where they nearly cancel (those of keys).
BFLOAT16 = Tolerances(1e-3, 0.05, 0.02, 0.35, 1e-5)


class Row(NamedTuple):
    """One compared array: the largest error, the largest one allowed, and the reference's largest entry."""

    name: str
    error: float
    tolerance: float
    largest: float

    @property
    def ok(self) -> bool:
        """Not a number is never ok."""
        return bool(self.error <= self.tolerance)


def compare_array(name: str, ours: np.ndarray, theirs: np.ndarray, rtol: float, atol: float) -> Row:
    """The largest error may be `atol`, or `rtol` of the reference's largest entry; another shape is an infinite one."""
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    largest = float(np.abs(theirs).max())
    error = float(np.abs(ours - theirs).max()) if ours.shape == theirs.shape else float("inf")
    return Row(name, error, max(atol, rtol * largest), largest)


def read_meta(folder: Path) -> dict:
    """The settings of the case."""
    return json.loads((folder / "meta.json").read_text(encoding="utf-8"))["config"]


def read_config(folder: Path) -> ModelConfig:
    """The model's sizes."""
    meta, state = read_meta(folder), read_checkpoint(folder / "state_dict.safetensors")
    if TOKENS not in state:
        return infer_config(state, heads=meta["heads"])
    arguments = {
        "num_heads": meta["num_heads"],
        "num_flair_heads": meta.get("region_heads", meta["num_heads"]),
        "text_pooling_type": {"cls": "cls_token"}.get(meta["text_pooling"], meta["text_pooling"]),
        "use_soft_topk": meta["region_head"] == "soft_topk",
    }
    arguments |= {name: meta[name] for name in ("top_k", "topk_temperature") if meta.get(name)}
    if meta.get("text_lora"):
        arguments |= {"lora_rank": meta["text_lora"]["r"], "lora_alpha": meta["text_lora"]["alpha"]}
    return infer_config(state, meta["bert_heads"], arguments)


def read_model(folder: Path, config: ModelConfig) -> AlignmentModel:
    """The model with the case's weights; a tensor that is missing or left over raises ValueError."""
    flat = to_jax(read_checkpoint(folder / "state_dict.safetensors"), config)
    return unflatten(config, jax.tree.map(jnp.asarray, flat))


def encode_texts(model: AlignmentModel, ids, mask, level: str = "slide") -> jax.Array:
    """Padded rows, one text each: [CLS] stands at the start of its row."""
    rows, length = ids.shape
    positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
    first = jnp.arange(rows) * length
    packed = [(ids[None], mask[None].astype(jnp.int32), positions[None])]
    return model.encode_texts(packed, first[None], level=level)[0]


def forward(model: PathFLIP, case: dict, config: LossConfig) -> tuple[jax.Array, dict]:
    """The total loss, and every named output of the case."""
    B, R, S, _ = case["patches"].shape
    slides = model.encode_slides(case["patches"], jnp.ones((B, R, S), bool), attention=True)

    K = case["subcaption_ids"].shape[1]
    captions = encode_texts(model, case["caption_ids"], case["caption_mask"])
    flat = [case[name].reshape(B * K, -1) for name in ("subcaption_ids", "subcaption_mask")]
    subcaptions = encode_texts(model, *flat).reshape(B, K, -1)
    loss, metrics = alignment_loss(
        Embeddings(slides.slide, slides.regions, slides.region_mask, captions, subcaptions),
        model.text_region,
        case["negatives"],
        jnp.arange(B),
        model.logit_scale[...],
        None,
        config,
    )
    outputs = {
        "slide_features": slides.slide,
        "caption_features": captions,
        "region_features": slides.regions,
        "slide_attention": slides.slide_attention.reshape(*slides.slide_attention.shape[:3], R * S),
        "region_attention": slides.region_attention,
        "text_region_attention": model.text_region(subcaptions, slides.regions, slides.region_mask)[1],
        "loss_slide": metrics["loss_slide"],
        "loss_region": metrics["loss_region"],
        "loss": loss,
    }
    return loss, outputs


STEP = jax.jit(jax.value_and_grad(forward, has_aux=True), static_argnums=2)


def forward2(model: PathFLIP2, case: dict) -> tuple[jax.Array, dict]:
    """The region loss of the follow-up network, and every named output of the case."""
    B, N, _ = case["patches"].shape
    K = case["subcaption_ids"].shape[1]
    mask = jnp.ones((B, N), bool)
    states = model.read_patches(case["patches"], mask)
    slides = model.encode_slides(case["patches"][:, None], mask[:, None], attention=True)
    captions = encode_texts(model, case["caption_ids"], case["caption_mask"])
    flat = [case[name].reshape(B * K, -1) for name in ("subcaption_ids", "subcaption_mask")]
    subcaptions = encode_texts(model, *flat, "region").reshape(B, K, -1)
    pooled, weights = model.text_region(subcaptions, slides.regions, slides.region_mask)
    known = model.region_scale[...], model.region_bias[...]
    loss, _ = pair_loss(pooled, subcaptions, jnp.arange(B), *known, SigmoidLossConfig())
    outputs = {
        "slide_features": slides.slide,
        "caption_features": captions,
        "tokens": states.tokens,
        "patch_features": states.patches,
        "patch_features_local": slides.regions,
        "slide_attention": slides.slide_attention.mean(1).reshape(B, -1, N),
        "subcaption_features": subcaptions,
        "text_conditioned_features": pooled,
        "patch_weights": weights,
        "loss_region": loss,
    }
    return loss, outputs


STEP2 = jax.jit(jax.value_and_grad(forward2, has_aux=True))


def compare(folder: Path, dtype: str = "float32", allowed: Tolerances = FLOAT32) -> list[Row]:
    """Every output, loss and (where the case holds them) gradient, computed in `dtype`, beside its tolerance."""
    config, meta = dataclasses.replace(read_config(folder), compute_dtype=dtype), read_meta(folder)
    second = isinstance(config, PathFLIP2Config)
    inputs, outputs = (INPUTS2, OUTPUTS2) if second else (INPUTS, OUTPUTS)
    with np.load(folder / "io.npz") as archive:
        if absent := [name for name in inputs + outputs if name not in archive.files]:
            raise ValueError(f"{folder / 'io.npz'}: lacks {', '.join(absent)}; it has {', '.join(archive.files)}")
        case, theirs = ({name: archive[name] for name in part} for part in (inputs, outputs))
    model = read_model(folder, config)
    if second:
        (_, ours), gradients = STEP2(model, case)
    else:
        loss = LossConfig(temperature=meta["temperature"], label_smoothing=meta["label_smoothing"])
        (_, ours), gradients = STEP(model, case, loss)
    rows, pooled = [], "text_conditioned_features"
    if dtype != "float32" and second and config.region_head == "soft_topk":
        clear = clear_choices(theirs["patch_weights"], config.top_k)
        ours, theirs = ({**tree, pooled: np.asarray(tree[pooled])[clear]} for tree in (ours, theirs))
    for name in outputs:
        is_loss = name.startswith("loss")
        rtol, atol = (allowed.loss_rtol, 0) if is_loss else (allowed.output_rtol, allowed.output_atol)
        rows.append(compare_array(name, ours[name], theirs[name], rtol, atol))
    if (folder / "grads.safetensors").exists():
        rows += compare_gradients(flatten(gradients), load_file(folder / "grads.safetensors"), config, allowed)
    return rows


def clear_choices(weights: np.ndarray, k: int, margin: float = 0.01) -> np.ndarray:
    """Texts [B, C] whose k-th patch leads the next by more than `margin` of its weight [B, C, N].

    Which patches a text pools is a step function of their cosines: rounding them may exchange two that are alike.
    """
    ordered = -np.sort(-weights, axis=-1)
    return ordered[..., k - 1] - ordered[..., k] > margin * ordered[..., k - 1]


def compare_gradients(ours: dict, theirs: dict, config: ModelConfig, allowed: Tolerances = FLOAT32) -> list[Row]:
    """Each parameter's gradient; one that the reference lacks is not reached by its loss and must be zero here."""
    rows, known = [], set()
    for name in names(config):
        known.add(name.torch)
        gradient = np.asarray(ours[name.path])
        reference = name.to_jax(theirs[name.torch]) if name.torch in theirs else np.zeros_like(gradient)
        rows.append(compare_array(f"d loss / d {name.path}", gradient, reference, *allowed[3:]))
    unknown = [name for name in sorted(set(theirs) - known) if not is_unused(name)]
    return rows + [Row(f"gradient of {name}: not a parameter here", np.inf, 0.0, np.inf) for name in unknown]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when every row holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    try:
        rows = compare(options.folder)
    except (OSError, ValueError, KeyError) as error:
        parser.exit(2, f"{options.folder}: not a parity case that can be read: {error!r}\n")
    if options.json:
        print(json.dumps([row._asdict() | {"ok": row.ok} for row in rows]))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            relative = row.error / row.largest if row.largest else 0.0
            verdict = "ok  " if row.ok else "FAIL"
            print(
                f"{verdict}  {row.name:{width}}  error {row.error:8.1e}  at most {row.tolerance:8.1e}"
                f"  ({relative:.1e} of the largest entry, {row.largest:.1e})"
            )
        if not (options.folder / "grads.safetensors").exists():
            print("This case has no grads.safetensors: gradients were not compared.")
        print(f"{sum(row.ok for row in rows)} of {len(rows)} agree with the released model.")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
