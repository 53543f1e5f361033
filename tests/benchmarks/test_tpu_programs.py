"""Analysis of TPU programs: kinds of work, parts of the model, FLOPs of products and tile padding."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "tpu_programs.py"

# A product of [2, 3, 4] and [2, 4, 5] in the notation of TPUs, with the batch as an axis of a window; a copy in a loop
# of five iterations; a gather; a sum whose rows of 70 are padded to tiles of 128.
PROGRAM = """HloModule step, is_scheduled=true

%product (p: bf16[2,3,4], q: bf16[2,4,5]) -> bf16[2,3,5] {
  %p = bf16[2,3,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %q = bf16[2,4,5]{2,1,0:T(8,128)(2,1)} parameter(1)
  %turned = bf16[2,3,4]{2,1,0} copy(%p)
  ROOT %c = bf16[2,3,5]{2,1,0} convolution(%turned, %q), window={size=2 stride=1 lhs_dilate=2}, dim_labels=0bf_0io->0bf
}

%pick (t: f32[9,70], i: s32[3]) -> f32[3,70] {
  %t = f32[9,70]{1,0} parameter(0)
  %i = s32[3]{0} parameter(1)
  ROOT %g = f32[3,70]{1,0} gather(%t, %i), offset_dims={1}
}

%body (s: (s32[], f32[9,70])) -> (s32[], f32[9,70]) {
  %s = (s32[], f32[9,70]{1,0}) parameter(0)
  %part = f32[9,70]{1,0:T(8,128)} get-tuple-element(%s), index=1
  %moved = f32[9,70]{0,1:T(8,128)} copy(%part), metadata={op_name="jit(step)/text_attention/copy"}, \
backend_config={"window_config":{"estimated_cycles":"10"}}
  ROOT %next = (s32[], f32[9,70]{1,0}) tuple(%s, %moved)
}

ENTRY %main (x: bf16[2,3,4], y: bf16[2,4,5], z: f32[9,70], i: s32[3]) -> f32[9] {
  %x = bf16[2,3,4]{2,1,0:T(8,128)(2,1)} parameter(0)
  %y = bf16[2,4,5]{2,1,0:T(8,128)(2,1)} parameter(1)
  %z = f32[9,70]{1,0:T(8,128)} parameter(2)
  %i = s32[3]{0:T(128)} parameter(3)
  %fused = bf16[2,3,5]{2,1,0:T(8,128)(2,1)} fusion(%x, %y), kind=kOutput, calls=%product, \
metadata={op_name="jit(step)/transpose(jvp(cross_attention))/patch_projection/dot_general"}, \
backend_config={"window_config":{"estimated_cycles":"600"}}
  %found = f32[3,70]{1,0:T(8,128)} fusion(%z, %i), kind=kCustom, calls=%pick, \
metadata={op_name="jit(step)/text_embedding/gather"}, backend_config={"window_config":{"estimated_cycles":"70"}}
  %loop = (s32[], f32[9,70]{1,0}) while(%z), condition=%pick, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  ROOT %sum = f32[9]{0:T(128)} reduce(%z, %i), dimensions={1}, to_apply=%pick, \
metadata={op_name="jit(step)/reduce_sum"}, backend_config={"window_config":{"estimated_cycles":"30"}}
}
"""


@pytest.fixture(scope="module")
def parts(benchmark_modules):
    return benchmark_modules("hlo_parts")


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("tpu_programs")


def test_operations_are_read_by_kind_part_and_cost(parts):
    found = {x.name: x for x in parts.read_operations(PROGRAM)}
    assert {(x.name, x.kind, x.part, x.backward, x.cycles) for x in found.values()} == {
        ("fused", "product", "patch_projection", True, 600),
        ("found", "gather, scatter", "text_embedding", False, 70),
        ("moved", "transpose, copy", "text_attention", False, 50),
        ("sum", "sum, maximum", "other", False, 30),
    }
    assert found["fused"].flops == 2 * 2 * 3 * 4 * 5
    assert found["fused"].bytes == 2 * (2 * 3 * 4 + 2 * 4 * 5 + 2 * 3 * 5)
    # Each of the three arrays: two tiles of 8 x 128 bfloat16.
    assert found["fused"].laid_out == 3 * 2 * 2 * 8 * 128


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("f32[9,70]{1,0:T(8,128)}", 4 * 16 * 128),
        ("f32[9,70]{0,1:T(8,128)}", 4 * 72 * 128),
        ("f32[9]{0:T(128)S(1)}", 4 * 128),
        ("(f32[2,3]{1,0}, pred[], token[])", 4 * 6 + 1),
        ("bf16[]{:T(256)}", 2 * 256),
    ],
)
def test_tiles_are_filled_up(parts, text, size):
    assert parts.laid_out_bytes(text) == size


def test_parts_and_the_work_off_the_matrix_unit_are_summed(parts):
    operations = parts.read_operations(PROGRAM)
    found = parts.by_part(operations)
    assert list(found) == ["patch_projection", "text_embedding", "text_attention", "other"]
    assert found["patch_projection"]["backward_cycles"] == 600
    assert found["text_attention"]["cycles_by_kind"] == {"transpose, copy": 50}
    rows = parts.off_matrix(operations, most=2)
    assert [(row["operation"], row["count"], row["cycles"]) for row in rows] == [("gather", 1, 70), ("copy", 1, 50)]


def test_the_table_sets_forms_against_the_shipped_one(bench):
    row = {"cycles": 2e6, "product_cycles": 1e6, "compilers_bytes": 3e9, "peak_bytes": 4e9}
    text = bench.table({"v5e:2x4 attention": {bench.SHIPPED: row, bench.CPU: row | {"cycles": 3e6}}})
    assert "| v5e:2x4 attention | forms of a CPU | 3.00 | 33% | 3.00 | 4.00 | 1.50x |" in text
    text = bench.table({"v5e:2x4 attention": {bench.SHIPPED: row, bench.CPU: row | {"without_estimate": 1}}})
    assert "| forms of a CPU | > 2.00 | 50% | 3.00 | 4.00 | > 1.00x |" in text


def test_an_operation_without_an_estimate_counts_no_cycles(parts):
    program = PROGRAM.replace('"estimated_cycles":"600"', f'"estimated_cycles":"{2**63 - 1}"')
    found = {x.name: x.cycles for x in parts.read_operations(program)}
    assert found == {"fused": 0, "found": 70, "moved": 50, "sum": 30}


def test_the_table_of_parts_says_what_is_off_the_matrix_unit(bench, parts):
    found = parts.by_part(parts.read_operations(PROGRAM))
    text = bench.part_table(
        {bench.SHIPPED: {"parts": found}, bench.CPU: {"parts": {"text_attention": {"cycles": 9e6}}}}
    )
    assert "| patch_projection | 0.00 | 100% |  | 0.0 | 0.00 | 6436% | |" in text
    assert "| text_attention | 0.00 | 0% | transpose, copy 100% |" in text and text.count("| 9.00 |") == 1


def test_a_form_is_traced_and_then_forgotten(bench):
    import jax.numpy as jnp

    from pathflip_jax.ops import matmul, platform

    held = platform.target_platform, matmul.row_sums
    with bench.traced_in(bench.CPU):
        assert platform.target_platform() == "cpu"
    with bench.traced_in("sums as products"):
        assert matmul.row_sums is matmul.row_products
    with bench.traced_in("gradients by JAX"):
        from pathflip_jax.model import layers

        assert layers.layer_norm(jnp.ones(3), jnp.ones(3), jnp.ones(3), 1e-5).shape == (3,)
        assert layers.layer_norm.__name__ == "layer_norm_reference"
    assert (platform.target_platform, matmul.row_sums) == held


def test_what_is_no_form_or_topology_is_said(bench, monkeypatch, capsys):
    monkeypatch.setattr(bench, "ENVIRONMENT", {})
    monkeypatch.setattr(sys, "argv", ["tpu_programs.py", "--form", "another"])
    assert bench.main() == 1 and "expected one of as shipped, forms of a CPU" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: the extra [aot]")
def test_attention_is_compiled_for_a_v5e(tmp_path):
    out = tmp_path / "out.json"
    command = [sys.executable, SCRIPT, "--program=attention", "--form=as shipped", f"--json={out}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())["results"]["v5e:2x4 attention"]["as shipped"]
    # Seven products of 16 * 12 heads, 384 x 384 tokens, 64 wide: two forward, and five for the gradient.
    assert found["flops"] == 7 * 2 * 16 * 12 * 384 * 384 * 64
    assert found["flops"] < found["compilers_flops"] < 1.2 * found["flops"]
    assert 0 < found["product_cycles"] < found["cycles"]
