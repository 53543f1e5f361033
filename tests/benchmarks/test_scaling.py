"""The scaling benchmark: its points, its exponents, its tables and plot, and one real step."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "scaling.py"


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("scaling")


def curve(bench, law, regions=(1, 8, 24, 64, 128, 256)):
    """Points of a step whose time follows a power law of the patches, and whose memory is linear."""
    return [
        {
            "regions": r,
            "patches": 256 * r,
            "seconds": law(256 * r),
            "peak_bytes": 5e8 + 100 * r,
            "temporary_bytes": None,
        }
        for r in regions
    ]


def test_the_exponent_is_the_slope_in_log_log(bench):
    x = [1.0, 3.0, 10.0, 50.0]
    assert bench.exponent(x, [2 * n**1.3 for n in x]) == pytest.approx(1.3)
    crooked = [2.0, 5.0, 30.0, 60.0]
    u, v = np.log(x), np.log(crooked)
    slope = ((u - u.mean()) * (v - v.mean())).sum() / ((u - u.mean()) ** 2).sum()
    assert bench.exponent(x, crooked) == pytest.approx(slope)


@pytest.mark.parametrize(("x", "y"), [([1.0], [1.0]), ([1.0, 2.0], [-1.0, 2.0]), ([1.0, 2.0], [0.0, 2.0])])
def test_no_exponent_where_there_is_no_line(bench, x, y):
    with pytest.raises(ValueError, match="no exponent of"):
        bench.exponent(x, y)


def test_the_fixed_part_does_not_bend_a_line(bench):
    found = bench.fit(curve(bench, lambda n: 5.0 + 1e-4 * n))
    assert set(found) == {"seconds", "peak_bytes"}  # no temporary bytes were measured
    for fit in found.values():
        assert fit["exponent"] == pytest.approx(1)
        assert fit["exponent_larger"] == pytest.approx(1)
    assert found["seconds"]["over_regions"] == [8, 24, 64, 128, 256]
    assert found["seconds"]["over_regions_larger"] == [64, 128, 256]


def test_growth_faster_than_linear_shows_most_in_the_larger_half(bench):
    fit = bench.fit(curve(bench, lambda n: 5.0 + 1e-4 * n + 1e-8 * n**2))["seconds"]
    assert bench.WANTED < fit["exponent"] < fit["exponent_larger"] < 2


def test_one_axis_varies_at_a_time(bench):
    options = bench.make_parser().parse_args("--regions 24 8 --batch 2 1 --subcaptions 4 --at-batch 2".split())
    points = bench.make_points(options)
    assert points["regions"] == [(1, 2, 8), (8, 2, 8), (24, 2, 8)]
    assert points["batch"] == [(24, 1, 8), (24, 2, 8)]
    assert points["subcaptions"] == [(24, 2, 4)]


def test_batches_have_the_shapes_of_the_pipeline(bench):
    batch = bench.make_batch(bench.Point(3, 2, 4), slots=5, width=6, vocabulary=50)
    assert batch.patches.shape == (2, 3, 5, 6) and batch.patches.dtype == np.float16
    assert batch.patch_mask.all()
    tokens, segments, positions = (
        np.concatenate([x.ravel() for x in field]) for field in zip(*batch.text_rows, strict=True)
    )
    assert np.count_nonzero(segments) == 2 * (222 + 4 * 58)
    assert batch.text_index.shape == (2, 5)
    assert (positions[batch.text_index] == 0).all()
    assert 5 <= tokens[segments > 0].min() and tokens.max() < 49


def test_tables_plot_and_json_of_points_that_were_measured(bench, tmp_path, monkeypatch, capsys):
    def measured(point, arguments):
        assert arguments == ["--slots=256", "--steps=5", "--small"]
        patches = point.batch * point.regions * 256
        figures = {"seconds": 1 + patches * 1e-4, "peak_bytes": 10**9 + patches, "temporary_bytes": patches}
        return point._asdict() | figures | {"patches": patches, "device": "cpu: cpu", "dtype": "float32"}

    monkeypatch.setattr(bench, "run_apart", measured)
    out = ["--json", str(tmp_path / "a" / "out.json"), "--plot", str(tmp_path / "b" / "out.png")]
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--small", *out])
    assert bench.main() == 0
    assert "seconds: exponent 1.000 over R 8, 24, 64, 128, 256; 1.000 over R 64, 128, 256" in capsys.readouterr().out
    content = json.loads((tmp_path / "a" / "out.json").read_text())
    assert [point["batch"] for point in content["results"]["batch"]] == [1, 2, 4]
    assert content["fits"]["peak_bytes"]["exponent"] == pytest.approx(1)
    assert (tmp_path / "b" / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_that_cannot_run_ends_it_without_an_exponent(bench, tmp_path, monkeypatch, capsys):
    def killed(point, arguments):
        raise RuntimeError(f"{point} ended with code -9")

    monkeypatch.setattr(bench, "run_apart", killed)
    monkeypatch.setattr(sys, "argv", ["scaling.py", "--json", str(tmp_path / "out.json")])
    assert bench.main() == 1
    captured = capsys.readouterr()
    assert "ended with code -9" in captured.err and "exponent" not in captured.out
    assert not (tmp_path / "out.json").exists()


def test_a_process_that_fails_is_named(bench):
    with pytest.raises(RuntimeError, match=r"Point\(regions=2, batch=2, subcaptions=1\) ended with code 2"):
        bench.run_apart(bench.Point(2, 2, 1), ["--no-such-option"])


def test_the_peak_starts_again(bench):
    block = np.ones(25_000_000)
    assert bench.resident_peak() > block.nbytes
    before = bench.resident_peak()
    del block
    bench.reset_peak()
    assert bench.resident_peak() < before - 150_000_000


@pytest.mark.slow
def test_a_real_step():
    command = [sys.executable, SCRIPT, "--small", "--slots=4", "--steps=1", "--point", "2", "2", "1"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["patches"] == 2 * 2 * 4
    assert 0 < found["seconds"] < 60
    assert 16 * found["parameters"] < found["peak_bytes"] < 2**33
