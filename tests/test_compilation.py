"""What XLA is told does what it is told for: on a CPU, barriers stay and what is recomputed is not kept."""

import os

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from pathflip_jax.compilation import compiler_options, keep_compiled
from pathflip_jax.model.attention import LayerNorm, pool

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="other backends keep barriers by themselves")


@on_cpu
def test_barriers_outlive_compilation():
    lowered = jax.jit(lambda x: jnp.cos(lax.optimization_barrier(jnp.sin(x) * 2)) + 1).lower(jnp.ones((100, 100)))
    assert "opt-barrier" in lowered.compile(compiler_options()).as_text()
    assert "opt-barrier" not in lowered.compile().as_text()  # the day it stays by itself, the option can go


@on_cpu
def test_attention_weights_of_all_layers_are_not_kept():
    """Eight layers take little more memory than one: were the weights kept, each would add 4 * n * n bytes."""
    n = 512
    norm = LayerNorm(16, 1e-12)

    def plan(layers: int):
        def loss(x):
            for _ in range(layers):
                x = norm(x + pool(x, x, x, None)[0])
            return x.sum()

        return jax.jit(jax.grad(loss)).lower(jnp.ones((n, 16))).compile(compiler_options()).memory_analysis()

    one, eight = (plan(layers).temp_size_in_bytes for layers in (1, 8))
    assert eight - one < 4 * n * n


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/somewhere")
    keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/somewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    keep_compiled()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "pathflip_jax")
