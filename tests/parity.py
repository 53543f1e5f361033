"""Compare this implementation with the released PyTorch model's own outputs, losses and gradients.

    python tests/parity.py DIR [--json]

DIR holds meta.json, bert/config.json, state_dict.safetensors, io.npz and grads.safetensors as the released model
wrote them (tests/golden/base is one). Prints every figure beside its tolerance; exits non-zero beyond one.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from pathflip_jax.convert.names import names
from pathflip_jax.losses import Embeddings, LossConfig, alignment_loss
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP, flatten, unflatten

OUTPUT_ATOL, LOSS_RTOL = 1e-4, 1e-5
GRADIENT_RTOL, GRADIENT_ATOL = 1e-3, 1e-7  # of the tensor's largest entry; or absolute


class Row(NamedTuple):
    """One compared array: its largest error, as the tolerance measures it."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Not a number is never ok."""
        return bool(self.error <= self.tolerance)


def read_config(folder: Path) -> PathFLIPConfig:
    """The model's sizes, from the case's meta.json and its BERT's config.json."""
    meta = json.loads((folder / "meta.json").read_text())["config"]
    bert = json.loads((folder / "bert" / "config.json").read_text())
    projections = {"Linear": "linear", "MLP": "mlp"}
    return PathFLIPConfig(
        feature_dim=meta["patch_dim"],
        embed_dim=meta["embed_dim"],
        hidden=meta["bert_hidden"],
        layers=meta["layers"],
        heads=meta["heads"],
        intermediate=meta["intermediate"],
        num_queries=meta["num_query_tokens"],
        cross_attention_freq=meta["cross_attention_freq"],
        vocab_size=bert["vocab_size"] + 1,
        max_positions=bert["max_position_embeddings"],
        patch_projection=projections[meta["path_encoder"]],
    )


def read_model(folder: Path, config: PathFLIPConfig) -> PathFLIP:
    """The model with the case's weights."""
    tensors = load_file(folder / "state_dict.safetensors")
    return unflatten(config, {name.path: jnp.asarray(name.to_jax(tensors[name.torch])) for name in names(config)})


def forward(model: PathFLIP, case: dict, config: LossConfig, *, attention: bool) -> tuple[jax.Array, dict]:
    """The total loss, and every named output of the case."""
    patches = jnp.asarray(case["patches"])
    B, R, S, _ = patches.shape
    slides = model.encode_slides(patches, jnp.ones((B, R, S), bool), attention=attention)

    def texts(ids, mask):
        """Padded rows, one text each: [CLS] stands at the start of its row."""
        rows, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        first = jnp.arange(rows) * length
        return model.encode_texts(ids[None], mask[None].astype(jnp.int32), positions[None], first[None])[0]

    K = case["subcaption_ids"].shape[1]
    captions = texts(case["caption_ids"], case["caption_mask"])
    flat = [case[name].reshape(B * K, -1) for name in ("subcaption_ids", "subcaption_mask")]
    subcaptions = texts(*flat).reshape(B, K, -1)
    embeddings = Embeddings(slides.slide, slides.regions, slides.region_mask, captions, subcaptions)
    loss, metrics = alignment_loss(
        embeddings,
        model.text_region_attention,
        jnp.asarray(case["negatives"]),
        jnp.arange(B),
        model.logit_scale[...],
        None,
        config,
    )
    outputs = {
        "slide_features": slides.slide,
        "caption_features": captions,
        "region_features": slides.regions,
        "text_region_attention": model.text_region_attention(subcaptions, slides.regions, slides.region_mask)[1],
        "loss_slide": metrics["loss_slide"],
        "loss_region": metrics["loss_region"],
        "loss": loss,
    }
    if attention:
        heads, Q = slides.slide_attention.shape[1:3]
        outputs["slide_attention"] = slides.slide_attention.reshape(B, heads, Q, R * S)
        outputs["region_attention"] = slides.region_attention
    return loss, outputs


def compare(folder: Path) -> list[Row]:
    """Every output, loss and gradient of the case beside its tolerance."""
    config = read_config(folder)
    meta = json.loads((folder / "meta.json").read_text())["config"]
    loss_config = LossConfig(temperature=meta["temperature"], label_smoothing=meta["label_smoothing"])
    model = read_model(folder, config)
    with np.load(folder / "io.npz") as archive:
        case = {name: archive[name] for name in archive.files}
    _, outputs = jax.jit(lambda m: forward(m, case, loss_config, attention=True))(model)
    rows = []
    for name, ours in outputs.items():
        theirs, ours = case[name], np.asarray(ours)
        error = np.abs(ours - theirs).max() if ours.shape == theirs.shape else np.inf
        if name.startswith("loss"):
            rows.append(Row(name, float(error / np.abs(theirs)), LOSS_RTOL))
        else:
            rows.append(Row(name, float(error), OUTPUT_ATOL))
    if (folder / "grads.safetensors").exists():
        gradient = jax.jit(jax.grad(lambda m: forward(m, case, loss_config, attention=False)[0]))(model)
        rows += compare_gradients(flatten(gradient), load_file(folder / "grads.safetensors"), config)
    return rows


def compare_gradients(ours: dict, theirs: dict, config: PathFLIPConfig) -> list[Row]:
    """Each parameter's gradient; one that the reference lacks is not reached by its loss and must be zero here."""
    rows = []
    for name in names(config):
        gradient = np.asarray(ours[name.path])
        reference = name.to_jax(theirs[name.torch]) if name.torch in theirs else np.zeros_like(gradient)
        error = np.abs(gradient - reference)
        # Beyond the absolute floor, errors count relative to the tensor's largest entry.
        largest = max(np.abs(reference).max(), np.finfo(np.float32).tiny)
        relative = 0.0 if error.max() <= GRADIENT_ATOL else error.max() / largest
        rows.append(Row(f"d loss / d {name.path}", float(relative), GRADIENT_RTOL))
    unknown = sorted(set(theirs) - {name.torch for name in names(config)})
    return rows + [Row(f"gradient of {name}: not a parameter here", float("inf"), GRADIENT_RTOL) for name in unknown]


def main(argv: list[str] | None = None) -> int:
    """Print the table; 0 when every row holds, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args(argv)
    rows = compare(options.folder)
    if options.json:
        print(json.dumps([row._asdict() | {"ok": row.ok} for row in rows]))
    else:
        width = max(len(row.name) for row in rows)
        for row in rows:
            print(
                f"{'ok  ' if row.ok else 'FAIL'}  {row.name:{width}}  {row.error:9.2e}  (at most {row.tolerance:.0e})"
            )
        if not (options.folder / "grads.safetensors").exists():
            print("This case has no grads.safetensors: gradients were not compared.")
        print(f"{sum(row.ok for row in rows)} of {len(rows)} agree with the released model.")
    return 0 if all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
