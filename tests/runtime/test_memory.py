"""Memory check before a program runs: XLA's plan against the device's free memory."""

import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from pathflip_jax.runtime import limits, memory
from pathflip_jax.training import loop
from pathflip_jax.training.loop import read_metrics


def test_the_need_is_what_a_program_keeps_beside_its_arguments():
    n = 512
    square = jax.ShapeDtypeStruct((n, n), jnp.float32)
    one = jax.jit(lambda x: x * 2).lower(square).compile()
    assert memory.needed_bytes(one) == 4 * n * n  # its output
    given_back = jax.jit(lambda x: x * 2, donate_argnums=0).lower(square).compile()
    assert memory.needed_bytes(given_back) == 0
    gradient = jax.jit(jax.grad(lambda x: (jnp.tanh(x @ x) @ x.T).sum())).lower(square).compile()
    assert 2 * 4 * n * n <= memory.needed_bytes(gradient) <= 8 * 4 * n * n


def test_free_memory_of_a_cpu_is_shared_by_its_devices(monkeypatch):
    monkeypatch.setattr(limits, "available_memory", lambda: 400)
    monkeypatch.setattr(jax, "local_device_count", lambda: 4)
    assert memory.free_bytes(jax.local_devices()[0]) == 100
    monkeypatch.setattr(limits, "available_memory", lambda: None)
    assert memory.free_bytes(jax.local_devices()[0]) is None


def test_this_machine_says_what_it_has_left():
    assert 2**20 < memory.free_bytes(jax.local_devices()[0]) < 2**50


def test_a_step_that_does_not_fit_names_settings_that_do(tiny_cohort, tmp_path, monkeypatch, capsys):
    options = ["--config", "demo:smoke", *tiny_cohort.settings(), "--workdir", str(tmp_path / "run")]
    options += ["--config.train.steps=1", "--config.model.hidden=8", "--config.model.intermediate=16"]
    options += ["--config.model.layers=1", "--config.data.val_split=none"]
    options += ["--config.data.caption_share=1.0"]  # whole texts, which are divided: most of the memory
    needs = []
    planned = memory.needed_bytes
    monkeypatch.setattr(memory, "needed_bytes", lambda compiled: needs.append(planned(compiled)) or needs[-1])
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    with pytest.raises(MemoryError, match="fewer --config.data.regions"):
        loop.main(options)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(0.7 * needs[0]))
    with pytest.raises(
        MemoryError, match=r"GiB are free; set --config.model.remat=True .* or --config.train.acc"
    ) as fault:
        loop.main(options)
    advised = re.search(r"--config.train.accumulate=\d+", str(fault.value)).group()
    assert loop.main([*options, advised]) == 0  # the same folder: nothing had begun there
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 1


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (9.0, "accumulate=2 "),  # 6 + 4 / 2 GiB, in 0.9 of what is free
        (8.0, "accumulate=4 "),  # all divided by 2 would be 5 GiB: an advice that does not fit
        (7.0, "accumulate=16 "),
        (
            6.5,
            "No --config.train.accumulate is enough: even in 16 parts, the step would need about 6.2 GiB, .* 6.0 GiB",
        ),
    ],
)
def test_accumulation_divides_activations_but_no_gradients(monkeypatch, free, advice):
    sizes = {"temp_size_in_bytes": 10, "output_size_in_bytes": 6, "alias_size_in_bytes": 6}
    plan = SimpleNamespace(**{name: size * memory.GIB for name, size in sizes.items()})
    compiled = SimpleNamespace(memory_analysis=lambda: plan)
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(free * memory.GIB))
    with pytest.raises(MemoryError, match=f"only {free} GiB are free; set .*{advice}"):
        memory.check_step(compiled, 16, 1, True, 1, 0)
    with pytest.raises(MemoryError, match="No --config.train.accumulate above 1 divides 16 slides over 16 devices"):
        memory.check_step(compiled, 16, 1, True, 16, 0)


def test_a_step_whose_pairs_take_the_memory_says_so(monkeypatch):
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2**20,), jnp.float32)).compile()
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    for pairs, named in ((2**20, True), (2**10, False)):
        with pytest.raises(MemoryError) as fault:
            memory.check_step(program, 8, 1, False, 1, pairs)
        assert ("--config.loss.negatives_at_once" in str(fault.value)) == named


def test_a_slide_that_does_not_fit_is_refused(monkeypatch):
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((100,), jnp.float32)).compile()
    memory.check_slide(program, "slide S")
    monkeypatch.setattr(memory, "free_bytes", lambda device: 399)
    with pytest.raises(MemoryError, match=r"1 slides of up to 5 patches needs 0.0 GiB .*batch_size=1"):
        memory.check_slide(program, "1 slides of up to 5 patches")


def test_features_that_do_not_fit_on_a_device_are_refused(monkeypatch):
    memory.check_features(2**20)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 2**30)
    with pytest.raises(MemoryError, match=r"the features take 2.0 GiB on each .* 1.0 GiB are free; set .*=host"):
        memory.check_features(2**31)
