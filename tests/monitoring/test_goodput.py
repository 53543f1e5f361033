"""Goodput: every second of a run has one cause, over kills and restarts, and the advice on saving is the best one."""

import json
import math
import os
import resource
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from scipy.optimize import minimize_scalar

from pathflip_jax import cli
from pathflip_jax.monitoring import goodput

FACTS = {"save_every": 100, "preemptions_per_day": 0.0}


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on only when told: `clock.wait(seconds)`."""
    now = SimpleNamespace(seconds=1e6)

    def wait(seconds):
        now.seconds += seconds

    fake = SimpleNamespace(time=lambda: now.seconds, perf_counter=lambda: now.seconds - 5e5)
    monkeypatch.setattr(goodput, "time", fake)
    return SimpleNamespace(wait=wait)


def run(clock, workdir, first, last, *, saves, ends=True):
    """A process that starts (7 s), restores (3 s), compiles (20 s) and does steps of 2 s; a save blocks for 1 s."""
    ledger = goodput.Ledger()
    clock.wait(7)
    with ledger.during(goodput.RESTORE):
        clock.wait(3)
    ledger.open(workdir, first, **FACTS)
    with ledger.during(goodput.COMPILATION):
        clock.wait(20)
    with ledger.during(goodput.STEP):
        for step in range(first + 1, last + 1):
            clock.wait(2)
            ledger.progress(step)
            if step in saves:
                ledger.switch(goodput.SAVE, saving=step)
                clock.wait(1)
                ledger.switch(goodput.STEP)
    if ends:
        ledger.__exit__()


def test_an_undisturbed_run_adds_up(clock, tmp_path):
    run(clock, tmp_path, 0, 50, saves={25, 50})
    found = goodput.summarise(tmp_path)
    assert found.productive == 100 and found.step == 2 and found.steps == 50 and found.starts == 1
    causes = {"initialisation": 7, "checkpoint_restore": 3, "compilation": 20, "checkpoint_save": 2}
    assert {cause: seconds for cause, seconds in found.badput.items() if seconds} == causes
    assert found.total == 132 and found.goodput == found.goodput_while_running == 100 / 132
    assert (found.saves, found.save) == (2, 1.0)


def test_steps_resume_after_something_else_and_not_after_a_row(clock, tmp_path):
    ledger = goodput.Ledger(record_seconds=0.0)
    ledger.open(tmp_path, 0, **FACTS)
    ledger.switch(goodput.STEP)
    began = ledger.resumed
    clock.wait(5)
    ledger.progress(1)
    assert ledger.resumed == began
    with ledger.during(goodput.EVALUATION):
        clock.wait(5)
    assert ledger.resumed == began + 10


def test_steps_that_a_kill_cost_are_lost_work_and_the_time_until_the_next_start_is_down(clock, tmp_path):
    run(clock, tmp_path, 0, 40, saves={25}, ends=False)  # killed; its last row is at most ten seconds old
    clock.wait(600)
    run(clock, tmp_path, 25, 50, saves={50})
    found = goodput.summarise(tmp_path)
    assert found.productive == 100 and found.steps == 50 and found.starts == 2 and found.step == 2
    unknown = 30 - found.badput["lost_work"]  # steps after the last row before the kill
    assert 0 <= unknown <= goodput.RECORD_SECONDS and found.badput["down"] == 600 + unknown
    assert found.total == pytest.approx(found.productive + sum(found.badput.values())) == 30 + 80 + 1 + 600 + 30 + 51
    assert found.goodput_while_running > found.goodput


def test_going_back_past_an_earlier_start_loses_the_work_of_both(clock, tmp_path):
    """Step 30 was saved, then 40; both were damaged, and the third start goes on from 20."""
    run(clock, tmp_path, 0, 30, saves={20, 30})
    run(clock, tmp_path, 30, 40, saves={40})
    run(clock, tmp_path, 20, 50, saves={50})
    found = goodput.summarise(tmp_path)
    assert (found.productive, found.badput["lost_work"]) == (100, 40)


def test_a_row_cut_off_by_a_crash_is_dropped(clock, tmp_path):
    run(clock, tmp_path, 0, 10, saves={10})
    path = tmp_path / goodput.GOODPUT
    path.write_bytes(path.read_bytes() + b'{"time": 12')
    assert goodput.summarise(tmp_path).steps == 10
    run(clock, tmp_path, 10, 20, saves=set())
    assert goodput.summarise(tmp_path).productive == 40 and b'{"time": 12\n' not in path.read_bytes()


def test_other_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="goodput.jsonl: no such file; name the --workdir"):
        goodput.summarise(tmp_path)
    (tmp_path / goodput.GOODPUT).write_text('{"time": 1, "event": "saved", "step": 1, "seconds": {}}\n')
    with pytest.raises(ValueError, match="its first row is 'saved', expected 'start'"):
        goodput.summarise(tmp_path)


def test_a_killed_process_leaves_what_it_did(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from pathflip_jax.monitoring.goodput import Ledger, STEP\n"
        "ledger = Ledger(record_seconds=0.0)\n"
        "ledger.open(Path(sys.argv[1]), 0, save_every=1, preemptions_per_day=0.0)\n"
        "ledger.switch(STEP)\n"
        "for step in range(1, 4): time.sleep(0.01); ledger.progress(step)\n"
        "print('ready', flush=True); time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    ledger = goodput.Ledger(record_seconds=0.0)
    ledger.open(tmp_path, 0, **FACTS)  # nothing was saved: it starts anew
    with ledger:
        ledger.switch(goodput.STEP)
        time.sleep(0.01)
        ledger.progress(1)
    found = goodput.summarise(tmp_path)
    assert found.starts == 2 and found.steps == 1
    assert found.badput["lost_work"] >= 0.03 and found.productive >= 0.01 and found.badput["down"] > 0


@pytest.mark.parametrize(("cost", "rate"), [(0.5, 1.0), (4.0, 12.0), (30.0, 0.2)])
def test_the_recommended_interval_costs_least(cost, rate):
    best = minimize_scalar(lambda t: goodput.overhead(t, cost, rate), bounds=(1, 1e6), method="bounded")
    assert goodput.save_interval(cost, rate) == pytest.approx(best.x, rel=1e-3)
    assert goodput.save_interval(2.0, 24.0) == 120.0  # 2 s an hour: sqrt(2 * 2 * 3600)


def test_the_command_says_it_to_people_and_programs(clock, tmp_path, capsys):
    run(clock, tmp_path, 0, 50, saves={25, 50})
    assert cli.main(["goodput", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "goodput 75.8% of 2.2 min (75.8% while running): 50 steps, 1 start\n" in printed
    assert "set --config.train.preemptions_per_day" in printed and "initialisation" in printed
    assert cli.main(["goodput", str(tmp_path), "--preemptions-per-day=24", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["recommended"]["save_every"] == round(math.sqrt(2 * 3600) / 2) == 42
    assert found["recommended"]["overhead"] < found["recommended"]["overhead_now"]
    assert cli.main(["goodput", str(tmp_path), "--preemptions-per-day=24"]) == 0
    assert "--config.train.save_every=42 (every 84.0 s) costs" in capsys.readouterr().out
    assert cli.main(["goodput", str(tmp_path / "none")]) == cli.WRONG_INPUT


def test_a_run_that_did_nothing_yet_is_no_division_by_zero(clock, tmp_path):
    ledger = goodput.Ledger()
    ledger.open(tmp_path, 0, **FACTS)
    found = goodput.summarise(tmp_path)
    values = goodput.as_dict(found)
    assert (values["goodput"], values["step"], values["save"], values["recommended"]) == (0.0, None, None, None)
    assert goodput.describe(found).startswith("goodput 0.0% of")


def test_a_file_that_cannot_be_written_is_told_once_and_ends_no_run(clock, tmp_path, capsys):
    (tmp_path / "goodput.jsonl").mkdir()
    run(clock, tmp_path, 0, 300, saves=[100, 200, 300])
    assert capsys.readouterr().err.count("goodput.jsonl: not written") == 1
    assert goodput.try_to_describe(tmp_path).startswith("goodput not reported: ")


def test_a_disk_that_was_full_for_a_while_leaves_whole_rows_and_the_whole_time(clock, tmp_path, capsys):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ledger = goodput.Ledger(record_seconds=0.0)
    with ledger, ledger.during(goodput.STEP):
        ledger.open(tmp_path, 0, **FACTS)
        size = (tmp_path / "goodput.jsonl").stat().st_size
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, limit[1]))
            for step in (1, 2):
                clock.wait(5)
                ledger.progress(step)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        assert (tmp_path / "goodput.jsonl").stat().st_size == size + 20
        clock.wait(5)
        ledger.progress(3)
    assert capsys.readouterr().err.count("not written") == 1
    found = goodput.summarise(tmp_path)
    assert (found.steps, found.productive) == (3, 15)


@pytest.mark.parametrize("content", ["[]", '{"step": 1}\n{"step": 2}\n', '{"step": 1, "event": "start"}\n', "\xff\n"])
def test_a_damaged_file_is_told_and_ends_no_run(tmp_path, content):
    (tmp_path / "goodput.jsonl").write_bytes(content.encode("latin-1"))
    assert goodput.try_to_describe(tmp_path).startswith(f"goodput not reported: {tmp_path / 'goodput.jsonl'}")
