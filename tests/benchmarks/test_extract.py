"""The benchmark of slides to features: ratios, table, prediction for a TPU, slides of all sizes, and a whole run."""

import argparse
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("extract")


def test_a_ratio_is_the_median_of_ratios_within_a_repeat(bench):
    runs = {"ours": [{"s": 1.0}, {"s": 4.0}, {"s": 2.0}], "plain": [{"s": 2.0}, {"s": 4.0}, {"s": 6.0}]}
    assert bench.ratios(runs, "s") == {"plain": 2.0}


def test_agreement_is_over_all_slides(bench, tmp_path):
    np.savez(tmp_path / "a.npz", S0=np.array([[1.0, 0.0], [0.0, 2.0]]), S1=np.array([[3.0, 0.0]]))
    np.savez(tmp_path / "b.npz", S0=np.array([[2.0, 0.0], [0.0, 1.0]]), S1=np.array([[0.0, 1.0]]))
    assert bench.agreement(tmp_path / "a.npz", tmp_path / "b.npz") == {"min": 0, "mean": pytest.approx(2 / 3)}


@pytest.fixture
def result(bench):
    stage = {"network": 20.0, "share_of_peak": 0.5, "transform": 100.0}
    return {
        "patches": 100,
        "runs": {side: [{"seconds": seconds}] for side, seconds in (("ours", 5), ("plain", 10), ("tuned", 4))},
        "ratios": {"plain": 2.0, "tuned": 0.8},
        "agreement": dict.fromkeys(("plain", "tuned"), {"min": 0.999999, "mean": 1.0}),
        "stages": dict.fromkeys(bench.SIDES, stage) | {"decode": {"OpenSlide": 500.0, "ours": 490.0}},
    }


def test_the_table_has_a_row_for_each_side(bench, result):
    rows = bench.table({"uni_v1": result}).splitlines()
    assert rows[2:] == [
        "| uni_v1, 100 | ours | 20.0 |  | 20.0, 50% |  |",
        "| uni_v1, 100 | plain | 10.0 | 2.00 | 20.0, 50% | 0.999999 |",
        "| uni_v1, 100 | tuned | 25.0 | 0.80 | 20.0, 50% | 0.999999 |",
    ]
    assert "OpenSlide 500, ours 490" in bench.stage_lines(result["stages"])
    assert bench.table({"uni_v1": result | {"stages": {}}}).splitlines()[2] == "| uni_v1, 100 | ours | 20.0 |  |  |  |"


def test_an_accelerator_session_has_a_row_for_each_side(benchmark_modules, result):
    *sides, decode = benchmark_modules("accelerator_parts.extract").rows("uni_v1", result)
    assert [row.values["side"] for row in sides] == ["ours", "plain", "tuned"]
    assert [row.values["ours_times_as_fast"] for row in sides] == [None, 2.0, 0.8]
    assert [row.values["per_second"] for row in sides] == [20, 10, 25] and decode.values["ours"] == 490


def test_the_prediction_is_bounded_by_compute_and_by_memory(benchmark_modules):
    aot = benchmark_modules("extract_aot")
    # 256 patches of 100 GFLOP at half of 200 TFLOP/s: 1,000 a second; 64 GB at 0.8 TB/s: 3,200 a second.
    found = aot.predict(100e9, 64e9, 256, 200e12, 0.8e12)
    assert (found.compute, found.memory, found.both, found.share) == pytest.approx((1000, 3200, 1000, 0.5))
    found = aot.predict(100e9, 640e9, 256, 200e12, 0.8e12)
    assert (found.memory, found.both, found.share) == pytest.approx((320, 320, 0.16))


def test_every_layer_is_counted(benchmark_modules):
    aot = benchmark_modules("extract_aot")
    none, loop = aot.Compiled(10, 2.0, 20, 0, 1.0), aot.Compiled(50, 5.0, 50, 1, 30.0)
    assert loop.with_layers(none, 24) == aot.Compiled(50, 74, 740, 24, 31)


def test_slides_differ_in_size_and_are_drawn_once(bench, benchmark_modules, tmp_path):
    assert bench.edges(1, 700) == [700] and bench.edges(3, 1000) == [600, 1000, 1400]
    folder = bench.make_slides(tmp_path, 2, 640)
    before = [path.stat().st_mtime_ns for path in sorted(folder.iterdir())]
    assert bench.make_slides(tmp_path, 2, 640) == folder
    assert [path.stat().st_mtime_ns for path in sorted(folder.iterdir())] == before
    count = bench.tile(folder, bench.RECIPES["kaiko_vits16"], tmp_path / "tiles.npz")
    small, large = benchmark_modules("extract_sides").read_tiles(folder, tmp_path / "tiles.npz")
    assert len(small.coords) < len(large.coords) == count - len(small.coords) and large[2:] == (0, 256, 256)


def test_results_of_other_encoders_stay_in_the_file(bench, tmp_path):
    options = bench.make_parser().parse_args(["--half"])
    for kind, found in (
        ("measured", {"uni_v1": {"patches": 1}}),
        ("aot", {"uni_v1": {"v5e:2x4": {"batch": 256}}}),
        ("aot", {"uni_v1": {"v6e:2x4": {"batch": 256}}}),
    ):
        bench.save(tmp_path / "out.json", kind, found, options)
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["measured"]["uni_v1, half"]["settings"]["half"] and content["measured"]["uni_v1, half"]["machine"]
    assert set(content["aot"]["uni_v1"]) == {"v5e:2x4", "v6e:2x4"}


def test_a_side_that_fails_is_named(bench, tmp_path):
    options = argparse.Namespace(device="cpu", workers=1, batch=1, half=False, small=True, packages=None)
    with pytest.raises(bench.SideError, match="extract_sides.py --side ours --encoder uni_v1 failed"):
        bench.call("extract_sides.py", "ours", bench.RECIPES["uni_v1"], tmp_path, options)


@pytest.mark.slow
def test_a_tiny_run(bench, tmp_path):
    if not (bench.PACKAGES_FOLDER or find_spec("timm")):
        pytest.skip("timm and torchvision are not installed")
    command = [sys.executable, ROOT / "benchmarks/extract.py", "--small", "--count=2", "--edge=640", "--repeats=1"]
    command += ["--batch=8", "--workers=1", f"--work={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    quick = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # compiling takes longer than everything else
    done = subprocess.run(command, capture_output=True, text=True, env=quick, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())["measured"]["kaiko_vits16"]
    assert set(found["runs"]) == {"ours", "plain", "tuned"} and found["patches"] > 8
    assert min(one["min"] for one in found["agreement"].values()) > 0.9999
    assert set(found["ratios"]) == set(found["process_ratios"]) == {"plain", "tuned"}
    assert min(found["stages"]["decode"].values()) > 0 and found["stages"]["ours"]["network"] > 0
    assert "| kaiko_vits16" in done.stdout and "decoding, patches per core second" in done.stdout
