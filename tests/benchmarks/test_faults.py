"""Every fault of the campaign once: the restarted run ends like the undisturbed one, and every fault is reported."""

import pytest

FAULTS = [
    "sigterm", "kill-one", "kill-all", "kill-in-save", "kill-in-records", "full-disk", "flipped-byte",
    "vanished-shard", "hang",
]  # fmt: skip


@pytest.fixture(scope="module")
def faults(benchmark_modules):
    return benchmark_modules("faults")


@pytest.fixture(scope="module")
def bench(faults, tmp_path_factory):
    faults.HANG_SECONDS = 20  # shorter than in a campaign, which must work on busier machines
    return faults.Bench(tmp_path_factory.mktemp("faults"))


def test_all_faults_are_here(faults):
    assert list(faults.FAULTS) == FAULTS


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_after_a_fault_a_run_ends_as_the_undisturbed_one(faults, bench, fault):
    outcome = bench.inject(fault, 0)
    assert outcome.wrong == [] and outcome.same and outcome.told
    if fault not in ("flipped-byte", "kill-in-records"):  # the metrics may be ahead of the last checkpoint
        assert outcome.lost <= 2 * faults.SAVE_EVERY, "nothing older than the last complete save"


def test_a_run_that_ended_otherwise_is_not_the_same(faults, tmp_path):
    """The comparison detects a missing checkpoint, so that a table without faults is meaningful."""
    assert faults.differences(tmp_path, tmp_path) == ["ended with checkpoints []"]


def test_the_table_counts_what_was_lost(faults):
    outcomes = [
        faults.Outcome("hang", seed, [75, 75], 9, 5, lost, lost < 5, True, [], 1.0) for seed, lost in enumerate([4, 6])
    ]
    row = {"fault": "hang", "times": 2, "same_state": 1, "told": 2, "lost_most": 6, "lost_mean": 5.0}
    assert faults.summary("hang", outcomes) == row


def test_a_campaign_goes_on_from_what_is_written(faults, tmp_path, monkeypatch, capsys):
    path, injected = tmp_path / "new" / "faults.json", []

    class Bench:
        def __init__(self, folder):
            pass

        def inject(self, fault, seed):
            injected.append(seed)
            if len(injected) == 3:
                raise KeyboardInterrupt
            return faults.Outcome(fault, seed, [75, 75], 9, 5, 4, True, True, [], 1.0)

    monkeypatch.setattr(faults, "Bench", Bench)
    monkeypatch.setattr(faults.sys, "argv", ["faults.py", "--faults=hang", "--times=4", f"--json={path}"])
    with pytest.raises(KeyboardInterrupt):
        faults.main()
    assert faults.main() == 0
    assert injected == [0, 1, 2, 2, 3]
    assert "4/4" in capsys.readouterr().out and len(faults.read_outcomes(path)) == 4
    monkeypatch.setattr(faults, "RUNS", {"steps": 1})
    with pytest.raises(ValueError, match="name another file"):
        faults.read_outcomes(path)
