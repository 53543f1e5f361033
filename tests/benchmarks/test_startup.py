"""The benchmark of starting commands, at a small size."""

import pytest

from pathflip_jax.data.storage.json_files import read_json


@pytest.mark.slow
def test_each_command_is_measured(benchmark_modules, tmp_path, monkeypatch, capsys):
    bench = benchmark_modules("startup")
    monkeypatch.setattr("sys.argv", ["startup", "--runs", "1", "--size", "512", "--json", str(tmp_path / "s.json")])
    bench.main()
    found = read_json(tmp_path / "s.json")
    assert found["seconds"].keys() == bench.WANTED.keys() and "first text" in capsys.readouterr().out
    assert all(len(runs) == 1 for runs in found["runs"].values())
    assert 0 < found["runs"]["help"][0] < found["runs"]["first text"][0]
