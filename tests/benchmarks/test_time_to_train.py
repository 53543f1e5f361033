"""Time to train: the cohort's sizes, and a tiny epoch, predicted and measured."""

import json
import sys

import numpy as np
import pytest

TINY = ["--slides=6", "--batch=2", "--width=8", "--config=align_base:smoke"]


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("time_to_train")


def test_slides_are_as_large_as_real_ones(bench):
    sizes = [len(slide.features) for slide in bench.make_slides(400, 2, np.random.default_rng(0))]
    assert abs(np.mean(sizes) - 10_000) < 1000 and min(sizes) >= 300 and max(sizes) > 30_000


def test_a_cohort_that_the_disk_cannot_hold_is_refused(bench, tmp_path):
    with pytest.raises(OSError, match=r"take about \d+ GB.*--folder"):
        bench.write_cohort(tmp_path, 10**9, 512)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("epoch", [6, 600])
def test_an_epoch_is_run_or_predicted(bench, tmp_path, monkeypatch, capsys, epoch):
    out = tmp_path / "time.json"
    monkeypatch.setattr(bench, "PATCHES", (600, 0.3))
    monkeypatch.setattr(sys, "argv", ["time_to_train.py", *TINY, f"--epoch-slides={epoch}", "--json", str(out)])
    assert bench.main() == 0
    found = json.loads(out.read_text())["result"]
    assert found["run_for_real"] == (epoch == 6)
    assert ("measured" if epoch == 6 else "predicted from 5 steps") in capsys.readouterr().out
    assert found["epoch_seconds"] > 0 and 0 < found["utilisation"] < 1
