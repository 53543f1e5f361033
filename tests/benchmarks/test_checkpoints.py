"""The checkpoint benchmark: a complete run on small models, and sizes that match what is saved."""

import json
import sys

import pytest


@pytest.fixture(scope="module")
def bench(benchmark_modules):
    return benchmark_modules("checkpoints")


def test_both_families_are_saved_read_and_timed(bench, tmp_path, monkeypatch, capsys):
    out = tmp_path / "checkpoints.json"
    sizes = ["--small", "--repeats=2", f"--folder={tmp_path}", f"--json={out}"]
    monkeypatch.setattr(sys, "argv", ["checkpoints.py", *sizes])
    assert bench.main() == 0
    found = json.loads(out.read_text())["results"]
    assert set(found) == {"pathflip", "pathflip2"}
    for row in found.values():
        assert set(row["measured"]) == set(bench.MEASURED)
        assert 0 < row["held_share"] <= 1
        assert all(low <= m["seconds"] <= high for m in row["measured"].values() for low, high in [m["quartiles"]])
    assert "a save blocks the loop for" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_a_state_is_the_parameters_and_both_moments(bench):
    params, _ = state = bench.make_state("pathflip", small=True)
    assert bench.size_of(state) == pytest.approx(3 * bench.size_of(params), abs=16)  # beside them two counts of steps


def test_other_numbers_than_were_saved_end_it(bench, tmp_path, monkeypatch):
    restore = bench.Checkpoints.restore

    def changed(*given):
        step, params, opt_state, facts = restore(*given)
        return step, {name: x + 1 for name, x in params.items()}, opt_state, facts

    monkeypatch.setattr(bench.Checkpoints, "restore", changed)
    with pytest.raises(RuntimeError, match="other numbers"):
        bench.measure(tmp_path, bench.make_state("pathflip", small=True), 1)
