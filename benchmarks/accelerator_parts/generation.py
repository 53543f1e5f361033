"""Decoder prefill and decoding rates, and the fraction of memory bandwidth that decoding uses."""

import argparse
from functools import partial

import generation as benchmark
import numpy as np

from accelerator_parts import Context, Row, Rows
from accelerator_parts.encode import median_seconds

WIDTH, LAYERS, PROMPT, NEW = 2048, 28, 128, 65  # of Qwen3 1.7B, its vocabulary shorter
BATCHES, SMALL_BATCHES = (1, 8, 32), (1, 2)


def run(context: Context) -> Rows:
    """Rates by batch. A token reads every weight once, so its bandwidth is the bytes of the weights over its time."""
    import jax.numpy as jnp

    from pathflip_jax.llm.generate import generate
    from pathflip_jax.llm.sampling import Sampling

    small = benchmark.SMALL
    width, layers = (small["width"], small["layers"]) if context.small else (WIDTH, LAYERS)
    prompt, new = (small["prompt"], small["new"]) if context.small else (PROMPT, NEW)
    model = make_decoder(width, layers, context.dtype)
    read = benchmark.multiplied(width, layers) * benchmark.SIZE[context.dtype]
    device = "cuda" if context.platform != "cpu" else "cpu"  # determines only the dtype of the products
    options = argparse.Namespace(small=context.small, dtype=context.dtype, device=device, repeats=5, one_core=False)
    measured, sheet = benchmark.measure_bandwidth(options)["bandwidth"], context.device.get("bandwidth")
    yield Row("bandwidth", {"matrix-vector products, GB/s": measured / 1e9, "data sheet, GB/s": sheet and sheet / 1e9})
    rng = np.random.default_rng(0)
    for batch in SMALL_BATCHES if context.small else BATCHES:
        embeds = jnp.asarray(rng.standard_normal((batch, prompt, width)).astype(np.float32) * 0.02)
        mask = np.ones((batch, prompt), bool)
        first, whole = (
            median_seconds(partial(generate, model, embeds, mask, Sampling(max_new_tokens=count)), 3)
            for count in (1, new)
        )
        token = (whole - first) / (new - 1)
        row = {
            "batch": batch,
            "prefill_ms": 1e3 * first,
            "prefill_tokens_per_second": batch * prompt / first,
            "token_ms": 1e3 * token,
            "tokens_per_second": batch / token,
            "share_of_measured_bandwidth": read / token / measured,
            "share_of_data_sheet": read / token / sheet if sheet else None,
        }
        yield Row(f"a decoder of {read / 1e9:.2f} GB in {context.dtype}", row)


def make_decoder(width: int, layers: int, dtype: str):
    """Random decoder of the benchmark's shape, fused for decoding."""
    import jax
    from flax import nnx

    from pathflip_jax.llm.config import DecoderConfig
    from pathflip_jax.llm.decoder import Decoder
    from pathflip_jax.llm.serving import fuse_for_decoding

    values = benchmark.settings(width, layers) | {"model_type": "qwen3"}
    config = DecoderConfig.from_hf(values, compute_dtype=dtype)
    cast = partial(jax.tree.map, lambda x: x.astype(dtype))
    return fuse_for_decoding(jax.jit(lambda: cast(Decoder(config, nnx.Rngs(0))))())
