"""The generation benchmark: its counts, ratios and refusals, and a complete run at a tiny size."""

import json
import sys

import pytest

pytest.importorskip("torch", reason="PyTorch is not installed")
pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module")
def generation(benchmark_modules):
    return benchmark_modules("generation")


@pytest.mark.parametrize(("width", "layers"), [(192, 2), (128, 1)])
def test_the_weights_counted_are_those_of_the_kernels(generation, width, layers):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    model = Qwen3ForCausalLM(Qwen3Config(**generation.settings(width, layers)))
    kernels = sum(p.numel() for name, p in model.named_parameters() if "norm" not in name)
    assert generation.multiplied(width, layers) == kernels
    assert round(generation.multiplied(768, 12) / 1e6) == 107


def test_ratios_are_medians_within_rounds(generation):
    def rows(*seconds):
        return [{"prefill": 2 * s, "token": s} for s in seconds]

    times = {
        "float32_batch1": {"ours": rows(1.0, 2.0, 4.0), "transformers": rows(2.0, 2.0, 12.0)},
        "bfloat16_batch1": {"ours": rows(0.5, 1.0, 1.0), "transformers": rows(5.0, 5.0, 5.0)},
    }
    found = generation.ratios(times)
    assert found["token_float32_batch1"] == found["prefill_float32_batch1"] == 2.0
    assert found["token_bfloat16_batch1"] == 5.0 and found["token_bfloat16_batch1_over_float32"] == 4.0
    assert len(found) == 6


def test_sides_that_write_different_tokens_are_not_compared(generation):
    generation.check_tokens([[1, 2]], [[1, 2]])
    for other in ([[1, 3]], [[1]]):
        with pytest.raises(generation.SideError, match="generate different tokens"):
            generation.check_tokens([[1, 2]], other)


def test_the_whole_benchmark_at_a_tiny_size(generation, tmp_path, monkeypatch, capsys):
    out = tmp_path / "generation.json"
    argv = ["generation.py", "--small", "--one-core", "--rounds=1", "--repeats=1", "--batches=2", "--dtypes=float32"]
    monkeypatch.setattr(sys, "argv", [*argv, "--json", str(out)])
    assert generation.main() == 0
    found = json.loads(out.read_text())
    assert set(found["ratios"]) == {"prefill_float32_batch2", "token_float32_batch2"}
    assert found["settings"]["one_core"] and found["machine"]["versions"]["transformers"]
    assert found["floor_seconds"]["float32"] > 0 and len(found["bandwidths"]) == 1
    monkeypatch.setattr(generation, "write_folder", lambda *_: None)
    assert generation.main() == 1 and "could not run" in capsys.readouterr().err
