"""The benchmark of large cohorts: its generated cohort opens completely, and it writes its table, plot and JSON."""

import json
import sys

from pathflip_jax.data.records.records import Records


def test_a_cohort_is_made_and_opened(benchmark_modules, tmp_path, capsys):
    bench = benchmark_modules("cohort_size")
    bench.make_cohort(tmp_path / "records", 70, 3, 0)
    records = Records(tmp_path / "records")
    assert len(records) == 70 and len(records.shards) == 3
    sizes = [info.num_regions for info in records.slides]
    assert min(sizes) >= 1 and max(sizes) <= 4
    found = bench.open_cohort(tmp_path / "records")
    assert found["slides"] == 70 and found["seconds"] > 0 and found["peak_bytes"] > 1e6


def test_the_table_has_a_row_for_each_size(benchmark_modules, tmp_path, monkeypatch, capsys):
    bench = benchmark_modules("cohort_size")

    def run_apart(*arguments):
        if arguments[0] == "--make":
            return ""
        row = {"slides": 0, "seconds": 2.0, "import_seconds": 1.0, "cpu_seconds": 1.5, "ids_seconds": 0.1}
        return json.dumps(row | {"slides": int(next(sizes)), "peak_bytes": 5_000_000})

    sizes = iter([10, 100_000])
    monkeypatch.setattr(bench, "run_apart", run_apart)
    paths = [f"--json={tmp_path}/a.json", f"--plot={tmp_path}/a.png"]
    monkeypatch.setattr(sys, "argv", ["cohort_size.py", "--slides", "10", "100000", "--repeats=1", *paths])
    assert bench.main() == 0
    assert [row["slides"] for row in json.loads((tmp_path / "a.json").read_text())["results"]] == [10, 100_000]
    assert (tmp_path / "a.png").stat().st_size > 1000 and "target: 4 s, 300 MB" in capsys.readouterr().out
