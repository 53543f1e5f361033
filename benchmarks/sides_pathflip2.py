"""One side of a comparison of PathFLIP2, like `sides.py` for PathFLIP: ours in JAX, or `eager` in PyTorch.

`step.py --family pathflip2` starts it; to run it by hand: `python benchmarks/sides_pathflip2.py --side ours --job
train_base`. The eager side is the module that exports contain (`convert/torch_pathflip2.py`: fused attention, texts
padded to the longest of their batch), without compilation.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import sides
from sides import CLIP, LEARNING_RATE, WEIGHT_DECAY, Inputs, Job, K, our_batch, our_parameters, our_steps, pad

BASE = {
    "feature_dim": 512, "embed_dim": 512, "hidden": 768, "layers": 12, "heads": 12, "intermediate": 3072,
    "vocab_size": 28996, "tokens": 128, "token_heads": 8, "top_k": 128,
}  # fmt: skip
SMALL = BASE | {
    "embed_dim": 32, "hidden": 64, "layers": 2, "heads": 4, "intermediate": 128, "vocab_size": 500, "tokens": 8,
    "token_heads": 4,
}  # fmt: skip
# 256 patches per region: slides of 4,096 patches, as the published code samples them, and of 65,536.
JOBS = {
    "train_base": Job("train", 2, 16),
    "train_whole_slide": Job("train", 1, 256),
    "encode_slide_base": Job("encode_slide", 1, 16),
    "encode_whole_slide": Job("encode_slide", 1, 256),
}


def ours(job: Job, sizes: dict, inputs: Inputs, dtype: str, weights: Path | None, training: bool) -> Callable:
    """The JAX side: the library's own step, as `pathflip train` builds it, and its encoder as inference calls it."""
    import jax
    import jax.numpy as jnp

    from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
    from pathflip_jax.model.config import PathFLIP2Config
    from pathflip_jax.model.parameters import unflatten
    from pathflip_jax.training.objectives import sigmoid_alignment

    config, batch = PathFLIP2Config(**sizes, compute_dtype=dtype), our_batch(job, inputs)
    stage = sigmoid_alignment(SigmoidLossConfig())
    if training:
        return our_steps(config, weights, batch, stage)
    params = our_parameters(config, weights)

    @jax.jit
    def slides(params, batch):
        encoded = unflatten(config, params).encode_slides(batch.patches, batch.patch_mask)
        return encoded.slide, encoded.regions

    @jax.jit
    def losses(params, batch):
        model = unflatten(config, params)
        embeddings = stage.encode(model, batch, None)
        _, metrics = stage.objective(model, embeddings, batch, jax.random.key(0))
        found = [embeddings[name] for name in ("slide", "captions", "subcaptions", "pooled")]
        return *found, jnp.stack([metrics["loss_slide"], metrics["loss_region"]])

    call = {"encode_slide": slides, "train": losses}[job.kind]
    return lambda number: jax.tree.map(np.asarray, call(params, batch))


def in_torch(
    side: str, job: Job, sizes: dict, inputs: Inputs, dtype: str, weights: Path | None, training: bool, device: str
) -> Callable:
    """The eager side; mixed precision is autocast, the optimizer PyTorch's own AdamW."""
    import torch
    from torch.nn import functional

    from pathflip_jax.convert.torch_pathflip2 import PathFLIP2
    from pathflip_jax.model.config import PathFLIP2Config

    torch.manual_seed(0)
    model = PathFLIP2(PathFLIP2Config(**sizes).to_dict())
    if weights is not None:
        from safetensors.torch import load_file

        model.load_state_dict(load_file(weights / "model.safetensors"))
    model.to(device).train(training)
    patches = torch.from_numpy(inputs.patches).to(device).float().flatten(1, 2)
    captions, subcaptions = (
        [torch.from_numpy(x).to(device) for x in pad(texts, max(map(len, texts)))]
        for texts in (inputs.captions, [ids for own in inputs.subcaptions for ids in own])
    )

    def pairs(x, y, scale, bias):
        x, y = (functional.normalize(part.flatten(0, -2), dim=-1) for part in (x, y))
        labels = 2 * torch.eye(len(x), device=x.device) - 1
        return -functional.logsigmoid(labels * (scale * x @ y.T + bias))

    def losses():
        encoded = model.encode_slides(patches)
        caption = model.encode_texts(*captions)
        subcaption = model.encode_texts(*subcaptions, level="region").unflatten(0, (job.slides, K))
        pooled, _ = model.text_region(subcaption, encoded.patches)
        slide = pairs(encoded.slide, caption, model.global_logit_scale, model.global_logit_bias).sum() / job.slides
        region = pairs(pooled, subcaption, model.local_logit_scale, model.local_logit_bias).mean()
        return encoded.slide, caption, subcaption, pooled, torch.stack([slide, region])

    mixed = torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16")
    if training:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)

        def run(number: int) -> float:
            with mixed:
                loss = losses()[-1].sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss.item()

        return run

    def run(number: int):
        with mixed, torch.no_grad():
            encoded = None if job.kind == "train" else model.encode_slides(patches)
            found = losses() if encoded is None else (encoded.slide, encoded.patches)
            return tuple(x.float().cpu().numpy() for x in found)

    return run


FAMILY = sides.Family(("ours", "eager"), JOBS, BASE, SMALL, ours, in_torch)

if __name__ == "__main__":
    sys.exit(sides.main(FAMILY, __doc__))
