"""Compare this implementation with the released PyTorch model's own outputs, losses and gradients.

    python tests/parity.py DIR [--json]

DIR holds meta.json, state_dict.safetensors, io.npz and grads.safetensors as the released model wrote them
(tests/golden/base is one). Prints every figure beside its tolerance; exits non-zero beyond one. Sizes are read from
the tensors' shapes, the heads of BERT from meta.json.
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

from pathflip_jax.convert.names import is_unused, names
from pathflip_jax.convert.pytorch import infer_config, read_checkpoint, to_jax
from pathflip_jax.losses import Embeddings, LossConfig, alignment_loss
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.pathflip import PathFLIP, flatten, unflatten

OUTPUT_ATOL, LOSS_RTOL = 1e-4, 1e-5
GRADIENT_RTOL, GRADIENT_ATOL = 1e-3, 1e-7  # of the tensor's largest entry; or absolute
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


def read_config(folder: Path) -> PathFLIPConfig:
    """The model's sizes."""
    return infer_config(read_checkpoint(folder / "state_dict.safetensors"), heads=read_meta(folder)["heads"])


def read_model(folder: Path, config: PathFLIPConfig) -> PathFLIP:
    """The model with the case's weights; a tensor that is missing or left over raises ValueError."""
    flat = to_jax(read_checkpoint(folder / "state_dict.safetensors"), config)
    return unflatten(config, jax.tree.map(jnp.asarray, flat))


def forward(model: PathFLIP, case: dict, config: LossConfig) -> tuple[jax.Array, dict]:
    """The total loss, and every named output of the case."""
    B, R, S, _ = case["patches"].shape
    slides = model.encode_slides(case["patches"], jnp.ones((B, R, S), bool), attention=True)

    def texts(ids, mask):
        """Padded rows, one text each: [CLS] stands at the start of its row."""
        rows, length = ids.shape
        positions = jnp.broadcast_to(jnp.arange(length), ids.shape)
        first = jnp.arange(rows) * length
        return model.encode_texts([(ids[None], mask[None].astype(jnp.int32), positions[None])], first[None])[0]

    K = case["subcaption_ids"].shape[1]
    captions = texts(case["caption_ids"], case["caption_mask"])
    flat = [case[name].reshape(B * K, -1) for name in ("subcaption_ids", "subcaption_mask")]
    subcaptions = texts(*flat).reshape(B, K, -1)
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


def compare(folder: Path) -> list[Row]:
    """Every output, loss and (where the case holds them) gradient beside its tolerance."""
    config, meta = read_config(folder), read_meta(folder)
    loss_config = LossConfig(temperature=meta["temperature"], label_smoothing=meta["label_smoothing"])
    with np.load(folder / "io.npz") as archive:
        if absent := [name for name in INPUTS + OUTPUTS if name not in archive.files]:
            raise ValueError(f"{folder / 'io.npz'}: lacks {', '.join(absent)}; it has {', '.join(archive.files)}")
        case, theirs = ({name: archive[name] for name in part} for part in (INPUTS, OUTPUTS))
    (_, ours), gradients = STEP(read_model(folder, config), case, loss_config)
    rows = []
    for name in OUTPUTS:
        rtol, atol = (LOSS_RTOL, 0) if name.startswith("loss") else (0, OUTPUT_ATOL)
        rows.append(compare_array(name, ours[name], theirs[name], rtol, atol))
    if (folder / "grads.safetensors").exists():
        rows += compare_gradients(flatten(gradients), load_file(folder / "grads.safetensors"), config)
    return rows


def compare_gradients(ours: dict, theirs: dict, config: PathFLIPConfig) -> list[Row]:
    """Each parameter's gradient; one that the reference lacks is not reached by its loss and must be zero here."""
    rows, known = [], set()
    for name in names(config):
        known.add(name.torch)
        gradient = np.asarray(ours[name.path])
        reference = name.to_jax(theirs[name.torch]) if name.torch in theirs else np.zeros_like(gradient)
        rows.append(compare_array(f"d loss / d {name.path}", gradient, reference, GRADIENT_RTOL, GRADIENT_ATOL))
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
