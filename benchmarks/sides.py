"""One side of a comparison in a separate process: builds its model, runs one job, prints time and memory as JSON.

`step.py` starts it; to run it by hand: `python benchmarks/sides.py --side ours --job train_base --steps 3`. A side is
`ours` (JAX), `released` (`released_style.py`) or `competent` (`competent_torch.py`). All sides get the same slides and
texts and, with `--weights FOLDER`, the same weights.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from machine import keep_freed, reset_peak, resident_peak

HERE = Path(__file__).parent
BASE = {
    "feature_dim": 512, "embed_dim": 256, "hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072,
    "num_queries": 8, "vocab_size": 30523,
}  # fmt: skip
SMALL = BASE | {"embed_dim": 32, "hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "vocab_size": 500}
K, S = 8, 256
ROW_STEP = 96  # step of the lengths of rows that our side packs texts into
CAPTION_LENGTH, SUBCAPTION_LENGTH = 384, 192
LEARNING_RATE, WEIGHT_DECAY, CLIP = 1e-4, 0.05, 1.0


class Job(NamedTuple):
    """Measured job: a train step, or the encoding of slides or of texts without dropout and gradients."""

    kind: str
    slides: int
    regions: int


JOBS = {
    "train_base": Job("train", 2, 24),
    "train_whole_slide": Job("train", 1, 256),
    "encode_slide_base": Job("encode_slide", 1, 24),
    "encode_text": Job("encode_text", 2, 0),
}


class Inputs(NamedTuple):
    """Slides and texts, the same for all sides: patches [B, R, S, F] float16, texts as lists of token ids."""

    patches: np.ndarray
    captions: list[np.ndarray]
    subcaptions: list[list[np.ndarray]]
    negatives: np.ndarray  # [B, B]: index of slide j's subcaption that is a negative of slide i; -1 on the diagonal

    @property
    def texts(self) -> list[np.ndarray]:
        """Each slide's caption, then its subcaptions."""
        return [ids for caption, own in zip(self.captions, self.subcaptions, strict=True) for ids in (caption, *own)]


def make_inputs(job: Job, sizes: dict, seed: int = 0) -> Inputs:
    """Random features, and random words of real lengths (token_lengths.json)."""
    rng = np.random.default_rng(seed)
    B, lengths = job.slides, json.loads((HERE / "token_lengths.json").read_text())["slides"]
    patches = rng.standard_normal((B, job.regions, S, sizes["feature_dim"]), np.float32).astype(np.float16)

    def words(length: int) -> np.ndarray:
        return rng.integers(5, sizes["vocab_size"] - 1, length).astype(np.int32)

    chosen = [lengths[b % len(lengths)] for b in range(B)]
    captions = [words(row[0]) for row in chosen]
    subcaptions = [[words(length) for length in row[1:]] for row in chosen]
    negatives = np.where(np.eye(B, dtype=bool), -1, rng.integers(0, K, (B, B)))
    return Inputs(patches, captions, subcaptions, negatives.astype(np.int32))


def pad(texts: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and mask [n, length]."""
    ids, mask = np.zeros((2, len(texts), length), np.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = text, 1
    return ids, mask


def our_batch(job: Job, inputs: Inputs) -> "Batch":
    """The inputs in the form in which the pipeline passes them to a step."""
    import jax
    import jax.numpy as jnp

    from pathflip_jax.data.batches.packing import pack, row_lengths

    packed = pack(inputs.texts, row_lengths(ROW_STEP, CAPTION_LENGTH))
    rows = jax.tree.map(lambda x: x[None], packed.rows)
    mask, index = np.ones(inputs.patches.shape[:3], bool), packed.cls_index.reshape(job.slides, -1)
    return jax.tree.map(jnp.asarray, Batch(inputs.patches, mask, rows, index, np.arange(job.slides, dtype=np.int32)))


def our_training(config, stage=None) -> tuple[Callable, Any]:
    """The library's own train step, compiled as in `pathflip train`, and its optimizer.

    step(params, {}, opt_state, batch, number) -> (params, opt_state, metrics); `stage` None is that of a PathFLIP.
    """
    import jax

    from pathflip_jax.losses.pathflip import LossConfig
    from pathflip_jax.model.parameters import unflatten
    from pathflip_jax.runtime.compilation import compiler_options
    from pathflip_jax.training.objectives import alignment
    from pathflip_jax.training.optim import OptimConfig, learning_rate, make_optimizer
    from pathflip_jax.training.step import make_step

    optim = OptimConfig(learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, clip=CLIP, preset="released")
    schedule = learning_rate(optim, 1000, 1000)
    optimizer = make_optimizer(optim, schedule)
    stage = stage or alignment(LossConfig())
    step = make_step(stage, lambda p, _: unflatten(config, p), optimizer, schedule, 1, 0)
    return jax.jit(step, donate_argnums=(0, 2), compiler_options=compiler_options()), optimizer


def our_parameters(config, weights: Path | None) -> dict:
    """The parameters of a model: those in a folder of weights, or fresh ones."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from pathflip_jax.convert.checkpoint_files import read_checkpoint
    from pathflip_jax.convert.pytorch import to_jax
    from pathflip_jax.model.parameters import flatten, make_model

    if weights is None:
        return jax.jit(lambda: flatten(make_model(config, nnx.Rngs(0))))()
    return jax.tree.map(jnp.asarray, to_jax(read_checkpoint(weights / "model.safetensors"), config))


def our_steps(config, weights: Path | None, batch: "Batch", stage=None) -> Callable[[int], float]:
    """Function that takes a training step on a batch when called with the step's number, and returns the loss."""
    import jax

    step, optimizer = our_training(config, stage)
    params = our_parameters(config, weights)
    state = [params, jax.jit(optimizer.init)(params)]
    del params

    def run(number: int) -> float:
        state[0], state[1], metrics = step(state[0], {}, state[1], batch, np.int32(number))
        return float(metrics["loss"])

    return run


def ours(job: Job, sizes: dict, inputs: Inputs, dtype: str, weights: Path | None, training: bool) -> Callable:
    """The JAX side: the library's own step, as `pathflip train` builds it, and its encoders as inference calls them."""
    import jax
    import jax.numpy as jnp

    from pathflip_jax.losses.pathflip import Embeddings, LossConfig, alignment_loss
    from pathflip_jax.model.config import PathFLIPConfig
    from pathflip_jax.model.parameters import unflatten

    config, batch = PathFLIPConfig(**sizes, compute_dtype=dtype), our_batch(job, inputs)
    if training:
        return our_steps(config, weights, batch)
    params = our_parameters(config, weights)

    @jax.jit
    def slides(params, batch):
        encoded = unflatten(config, params).encode_slides(batch.patches, batch.patch_mask)
        return encoded.slide, encoded.regions

    @jax.jit
    def texts(params, batch):
        model = unflatten(config, params)
        return model.encode_texts(batch.text_rows, batch.text_index.reshape(1, -1))[0]

    @jax.jit
    def losses(params, batch):
        (slide, regions), text = slides(params, batch), texts(params, batch).reshape(job.slides, 1 + K, -1)
        model, mask = unflatten(config, params), batch.patch_mask.any(-1)
        _, metrics = alignment_loss(
            Embeddings(slide, regions, mask, text[:, 0], text[:, 1:]),
            model.text_region, inputs.negatives, batch.related, model.logit_scale[...], None, LossConfig(),
        )  # fmt: skip
        return slide, regions, text, jnp.stack([metrics["loss_slide"], metrics["loss_region"]])

    call = {"encode_slide": slides, "encode_text": texts, "train": losses}[job.kind]
    return lambda number: jax.tree.map(np.asarray, call(params, batch))


class Batch(NamedTuple):
    """The fields of `pathflip_jax.data.batches.pipeline.Batch` that a step reads, without its dependencies."""

    patches: np.ndarray
    patch_mask: np.ndarray
    text_rows: tuple
    text_index: np.ndarray
    related: np.ndarray
    wording: None = None  # random texts: no two are equal


def in_torch(
    side: str, job: Job, sizes: dict, inputs: Inputs, dtype: str, weights: Path | None, training: bool, device: str
) -> Callable:
    """The two PyTorch sides; mixed precision is autocast, the optimizer PyTorch's own AdamW."""
    import torch
    from competent_torch import CompetentTorch, trim
    from released_style import ReleasedStyle

    from pathflip_jax.model.config import PathFLIPConfig

    torch.manual_seed(0)
    released = side == "released"
    model = (ReleasedStyle if released else CompetentTorch)(PathFLIPConfig(**sizes).to_dict())
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights / "model.safetensors"))
    model.to(device).train(training)
    if not training:
        model.requires_grad_(False)

    def tensors(texts: list[np.ndarray], length: int) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask = (torch.from_numpy(x).to(device) for x in pad(texts, length))
        return (ids, mask) if released else trim(ids, mask)

    B = job.slides
    captions = tensors(inputs.captions, CAPTION_LENGTH)
    flat = tensors([ids for own in inputs.subcaptions for ids in own], SUBCAPTION_LENGTH)
    batch = {
        "patches": torch.from_numpy(inputs.patches).to(device).float(),
        "caption_ids": captions[0],
        "caption_mask": captions[1],
        "subcaption_ids": flat[0].reshape(B, K, -1),
        "subcaption_mask": flat[1].reshape(B, K, -1),
        "negatives": torch.from_numpy(inputs.negatives).long().to(device),
    }

    def slides():
        if released:
            return model.encode_slide_batch(batch["patches"])
        encoded = model.encode_slides(batch["patches"])
        return encoded.slide, encoded.regions

    def texts():
        encode = model.encode_padded_texts if released else model.encode_texts
        parts = encode(*captions)[:, None], encode(*flat).reshape(B, K, -1)
        return torch.cat(parts, dim=1).flatten(0, 1)

    def losses():
        return model.losses(batch)

    compiled = (lambda f: f) if released else torch.compile
    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    if training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        losses = compiled(losses)

        def run(number: int) -> float:
            with mixed:
                loss = sum(losses())
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run
    call = {"encode_slide": slides, "encode_text": texts}.get(job.kind)
    if call is None:

        def call():
            slide, regions = slides()
            text = texts().unflatten(0, (B, 1 + K))
            return slide, regions, text, torch.stack(losses())

    call = compiled(call)

    def run(number: int):
        with mixed, torch.no_grad():
            found = call()
            found = found if isinstance(found, tuple) else (found,)
            return tuple(x.float().cpu().numpy() for x in found)

    return run


class Peak:
    """Peak memory since its creation: of the device, or on a CPU the resident size of the process."""

    def __init__(self, side: str, device: str) -> None:
        self.side, self.device = side, device
        if device == "cpu":
            reset_peak()
        elif side != "ours":
            import torch

            torch.cuda.reset_peak_memory_stats()

    def bytes(self) -> int:
        """Peak in bytes. JAX counts from the start of the process, but a device holds no more before the steps."""
        if self.device == "cpu":
            return resident_peak()
        if self.side == "ours":
            import jax

            return jax.local_devices()[0].memory_stats()["peak_bytes_in_use"]
        import torch

        return torch.cuda.max_memory_allocated()


class Family(NamedTuple):
    """Comparison of one model family: its sides, jobs and sizes, and the builders of both kinds of side."""

    sides: tuple[str, ...]
    jobs: dict[str, Job]
    base: dict
    small: dict
    ours: Callable
    in_torch: Callable


def set_precision(side: str, exact: bool) -> None:
    """Set the precision of float32 products on a GPU: TF32, or with `exact`, to compare sides, full float32."""
    if side == "ours":
        import jax

        jax.config.update("jax_default_matmul_precision", "highest" if exact else "default")
        return
    import torch

    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not exact


def main(family: Family, about: str) -> int:
    """Run one job of one side; the last line of output is JSON."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", choices=family.sides, required=True)
    parser.add_argument("--job", choices=list(family.jobs), required=True)
    parser.add_argument("--steps", type=int, default=3, help="measured steps")
    parser.add_argument("--warmup", type=int, default=1, help="untimed steps before them")
    parser.add_argument("--batch", type=int, help="slides per step, instead of the job's")
    parser.add_argument("--regions", type=int, help="regions per slide, instead of the job's")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--small", action="store_true", help="a tiny model, to check that everything works")
    parser.add_argument("--weights", type=Path, help="folder with a model.safetensors under the released names")
    parser.add_argument(
        "--outputs", type=Path, help="file to save the losses and embeddings of the job to, without training"
    )
    options = parser.parse_args()
    if options.device == "cpu":
        keep_freed()
    else:
        set_precision(options.side, exact=options.outputs is not None)
    sizes, job = family.small if options.small else family.base, family.jobs[options.job]
    job = job._replace(slides=options.batch or job.slides, regions=options.regions or job.regions)
    inputs = make_inputs(job, sizes)
    training = job.kind == "train" and options.outputs is None
    given = (job, sizes, inputs, options.dtype, options.weights, training)
    if options.side == "ours":
        run = family.ours(*given)
    else:
        run = family.in_torch(options.side, *given, options.device)
    for number in range(options.warmup):
        found = run(number)
    if options.outputs:
        found = run(0)
        np.savez(options.outputs, **{f"arr{i}": x for i, x in enumerate(found)})
    peak, times = Peak(options.side, options.device), []
    if options.steps:
        run(options.warmup)  # allocates again the memory that resetting the peak returned to the system
    for number in range(options.steps):
        start = time.perf_counter()
        found = run(options.warmup + 1 + number)
        times.append(time.perf_counter() - start)
    loss = found if training else None
    print(json.dumps({"seconds": times, "peak_bytes": peak.bytes(), "loss": loss}))
    return 0


FAMILY = Family(("ours", "released", "competent"), JOBS, BASE, SMALL, ours, in_torch)

if __name__ == "__main__":
    sys.exit(main(FAMILY, __doc__))
