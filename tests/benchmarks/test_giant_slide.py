"""The benchmark of one giant slide: a complete run that reports the cost of each stage."""

import json
import sys

import pytest


@pytest.mark.slow  # compiles a program for every part of a model
def test_a_slide_is_written_sampled_and_embedded_in_blocks(benchmark_modules, tmp_path, monkeypatch):
    from pathflip_jax.data.storage import blocks
    from pathflip_jax.inference import large_slides

    monkeypatch.setattr(blocks, "LARGE", 10_000)
    monkeypatch.setattr(blocks, "BLOCK", 2_000)
    monkeypatch.setattr(large_slides, "MOST_PATCHES", 1024)
    bench, out = benchmark_modules("giant_slide"), tmp_path / "giant_slide.json"
    sizes = ["--patches=2000", "--width=8", "--layers=1", "--hidden=12"]
    monkeypatch.setattr(sys, "argv", ["giant_slide.py", *sizes, "--json", str(out)])
    bench.main()
    stages = json.loads(out.read_text())["stages"]
    assert list(stages)[:3] == ["started", "write", "finish"] and list(stages)[-1] == "embed"
    assert all(stage["peak_gb"] > 0 for stage in stages.values())
