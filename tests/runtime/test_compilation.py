"""Effect of the XLA options: on a CPU, barriers persist and recomputed values are not stored."""

import os
import pwd
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from pathflip_jax.model.layers import LayerNorm
from pathflip_jax.ops.attention import pool
from pathflip_jax.runtime import compilation
from pathflip_jax.runtime.compilation import DETERMINISTIC, CompileCounter, compiler_options, enable_compilation_cache

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
    enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == "/somewhere"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    enable_compilation_cache()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(tmp_path / "pathflip_jax")


def test_without_a_home_programs_are_compiled_at_each_start(monkeypatch, capsys):
    for name in ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: pwd.getpwnam(f"nobody knows {uid}"))
    monkeypatch.setattr(compilation, "_reported", [])
    enable_compilation_cache()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert "cannot be cached for the next start (HOME is not set" in capsys.readouterr().err


def test_a_folder_of_programs_that_cannot_be_written_is_said_once(monkeypatch, capsys):
    shown = []
    monkeypatch.setattr(warnings, "showwarning", lambda message, *_: shown.append(str(message)))
    monkeypatch.setattr(compilation, "_reported", [])
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/full")
    enable_compilation_cache()
    enable_compilation_cache()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for name in ("jit_step", "jit_validate"):
            for what in ("reading", "writing"):  # in the words of jax/_src/compiler.py
                warnings.warn(
                    f"Error {what} persistent compilation cache entry for '{name}': OSError: full", stacklevel=1
                )
        warnings.warn("another", stacklevel=1)
    assert shown == ["another"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "(/full: OSError: full); set JAX_COMPILATION_CACHE_DIR" in said


@pytest.fixture
def cache_folder():
    """Gives the compiled programs another folder until the test ends."""
    before = jax.config.jax_compilation_cache_dir

    def move(folder) -> None:
        reset_cache()
        jax.config.update("jax_compilation_cache_dir", folder)

    yield move
    move(before)


def test_jax_goes_on_without_a_folder_for_programs(cache_folder, tmp_path):
    """And warns in the words that are looked for."""
    (tmp_path / "file").touch()
    cache_folder(str(tmp_path / "file/below"))
    with pytest.warns(UserWarning) as warned:
        assert jax.jit(lambda x: x * 3 + 1)(2.0) == 7
    assert all(compilation._CACHE_FAULT.match(str(warning.message)) for warning in warned)


def test_programs_compiled_are_counted():
    function = jax.jit(lambda x: jnp.cos(x) - 3)
    with CompileCounter() as counter:
        for size in (3, 4, 3, 4):
            function(np.ones(size))
    function(np.ones(5))
    assert counter.count == 2


def test_determinism_is_asked_of_the_backend_in_use(monkeypatch):
    for backend, more in DETERMINISTIC.items():
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert compiler_options(deterministic=True) == compiler_options() | more
    assert compiler_options(deterministic=True) and DETERMINISTIC["gpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "abacus")
    with pytest.raises(
        ValueError, match="train.deterministic=True is supported on cpu, tpu, gpu, but this backend is 'abacus'"
    ):
        compiler_options(deterministic=True)


def test_the_compiler_knows_the_options_of_every_backend():
    """It reads all options whatever it compiles for, and refuses names that it does not know."""
    lowered = jax.jit(jnp.sin).lower(1.0)
    for options in DETERMINISTIC.values():
        lowered.compile(options)
    with pytest.raises(Exception, match="No such compile option"):
        lowered.compile({"xla_gpu_deterministic_opts": True})
