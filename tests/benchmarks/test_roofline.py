"""Roofline bounds: operations by formula compared with those that XLA counts in the compiled forward pass."""

import re
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.flops import Part, parameters
from pathflip_jax.model.pathflip import PathFLIP

CONFIG = PathFLIPConfig(
    feature_dim=128, embed_dim=64, hidden=96, layers=4, heads=4, intermediate=384, num_queries=8, vocab_size=50,
    max_positions=64, region_layers=1,
)  # fmt: skip
B, R, S, LENGTH, TEXTS = 2, 6, 64, 48, 3


@pytest.fixture(scope="module")
def roofline(benchmark_modules):
    return benchmark_modules("roofline")


def counted(method, *shapes) -> float:
    model = jax.eval_shape(lambda: PathFLIP(CONFIG, nnx.Rngs(0)))
    return jax.jit(method).lower(model, *shapes).compile().cost_analysis()["flops"]


def test_operations_are_those_that_xla_counts(roofline):
    shapes = roofline.Shapes(B, R, R * S, (LENGTH,) * TEXTS)
    formula = roofline.parts(CONFIG, shapes, 4, training=False)
    text = sum(part.operations for part in formula if part.name.startswith("text"))
    slide = sum(part.operations for part in formula) - text
    patches = jax.ShapeDtypeStruct((B, R, S, CONFIG.feature_dim), jnp.float32)
    mask = jax.ShapeDtypeStruct((B, R, S), bool)
    found = counted(lambda m, p, k: m.encode_slides(p, k).regions, patches, mask)
    assert found == pytest.approx(slide, rel=0.15)  # XLA counts softmax, norms and the region transformer too
    tokens = jax.ShapeDtypeStruct((1, B * TEXTS, LENGTH), jnp.int32)
    index = jax.ShapeDtypeStruct((1, B * TEXTS), jnp.int32)
    found = counted(lambda m, t, i: m.encode_texts([(t, t, t)], i), tokens, index)
    assert found == pytest.approx(text, rel=0.15)


def test_training_takes_three_times_the_forward_pass_and_the_optimizer(roofline):
    shapes = roofline.Shapes(B, R, R * S, (LENGTH,))
    forward, training = (roofline.parts(CONFIG, shapes, 4, training) for training in (False, True))
    for one, three in zip(forward, training, strict=False):
        assert three.operations == 3 * one.operations and three.name == one.name
    assert [part.name for part in training[len(forward) :]] == ["optimizer"]
    assert parameters(CONFIG) * 28 == training[-1].bytes


def test_the_larger_of_arithmetic_and_memory_is_the_floor(roofline):
    part = Part("x", operations=100.0, bytes=10.0)
    assert part.floor(rate=10.0, bandwidth=10.0) == 10.0 and part.floor(rate=1e9, bandwidth=2.0) == 5.0
    assert "| x | 0.0 | 0 | memory |" in roofline.table([part], 1e9, 2.0, 1)


def test_the_events_of_a_trace_belong_to_the_parts_of_the_model(roofline):
    program = """
  %dot.3 = f32[8]{0} dot(%a, %b), metadata={op_name="jit(f)/jvp(text_attention)/dot_general" stack_frame_id=3}
  ROOT %add.7 = f32[8]{0} add(%a, %b), metadata={op_name="jit(f)/transpose(jvp(cross_attention))/mul"}
  %copy.1 = f32[8]{0} copy(%a)
"""
    events = [{"args": {"hlo_op": name}, "dur": 1e6 * s} for name, s in (("dot.3", 2), ("add.7", 3), ("copy.1", 4))]
    found, operations = roofline.shares([*events, {"name": "a thread's name"}, *events[:1]], program)
    assert {part: s for part, s in found.items() if s} == {"text_attention": 4, "cross_attention": 3, "other": 4}
    expected = {"text_attention: dot_general": 4, "cross_attention: mul, gradient": 3, "copy": 4}
    assert operations == expected


@pytest.mark.slow
def test_a_step_is_measured_beside_its_floor(roofline, monkeypatch, capsys):
    kept, measure = [], roofline.measure
    monkeypatch.setattr(roofline, "measure", lambda *given: kept.append(measure(*given)) or kept[0])
    monkeypatch.setattr(sys, "argv", ["roofline.py", "--measure", "--small", "--regions=2", "--batch=1"])
    assert roofline.main() == 0
    printed = capsys.readouterr().out
    peak = re.search(r"^1 slides of 2 regions per step; peak memory (\d+\.\d+) GB$", printed, re.MULTILINE)
    assert peak and float(peak[1]) > 0  # of the whole process, including what ran before the test
    for part in roofline.SCOPES:
        assert f"| {part.replace('_', ' ')} |" in printed
    operations = kept[0].operations  # at this size, it is chance which operations are the twelve longest
    assert operations["text_attention: dot_general"] > 0 and operations["text_attention: dot_general, gradient"] > 0
    longest = sorted(operations, key=lambda name: -operations[name])[:12]
    assert [line.split(" | ")[0].removeprefix("| ") for line in printed.splitlines()[-12:]] == longest
