"""Phases of the loop: each updates watchdog, goodput ledger and profiler together."""

import ast
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest

import pathflip_jax.training
from pathflip_jax.monitoring import goodput
from pathflip_jax.training import monitors
from pathflip_jax.training.monitors import PHASES, Monitors


@pytest.fixture
def told():
    """Calls that the monitors of a run receive, in order, and the monitors."""
    heard = []
    note = lambda name: lambda *given, **more: heard.append((name, *given, *more.values()))  # noqa: E731
    return heard, note


@pytest.fixture
def watched(told, tmp_path, monkeypatch):
    heard, note = told
    profiler = SimpleNamespace(begin=note("begin"), end=note("end"))
    monkeypatch.setattr(monitors, "Profiler", lambda *_: profiler)
    ledger, watchdog = SimpleNamespace(switch=note("count")), SimpleNamespace(at=note("at"))
    lock = SimpleNamespace(require=note("require"), ending=note("ending"))
    stop = SimpleNamespace(requested=lambda step: step == 2)
    return Monitors(tmp_path, ledger, stop, watchdog, lock)


def test_a_phase_tells_all_monitors(told, watched):
    heard, _ = told
    watched.phase("computing the step", 3)
    assert heard == [("at", 3, "computing the step", True, False), ("count", "step", None), ("begin", 3)]
    heard.clear()
    watched.phase("ending the step", 3, "metrics")
    assert heard == [("at", 3, "ending the step", True, True), ("count", "step", None), ("end", 3, "metrics")]
    heard.clear()
    watched.phase("saving", 4)
    watched.phase("compiling", 4)
    assert heard == [
        ("at", 4, "saving", True, True), ("count", "checkpoint_save", 4),
        ("at", 4, "compiling", False, False), ("count", "compilation", None),
    ]  # fmt: skip
    with pytest.raises(KeyError):
        watched.phase("idling", 4)


def test_steps_without_a_save_between_them_are_one_stretch(watched):
    """Else no step would be seen to wait for its input: its time would begin when it is given to the devices."""
    watched.ledger = ledger = goodput.Ledger()
    watched.phase("computing the step", 1)
    began = ledger.resumed
    for doing in ("reading the next batch", "waiting for the devices", "ending the step", "computing the step"):
        watched.phase(doing, 1)
    assert ledger.resumed == began
    watched.phase("saving", 1)
    watched.phase("computing the step", 2)
    assert ledger.resumed > began


def test_a_run_that_is_told_to_stop_says_so_to_starts_that_come_now(told, watched):
    heard, _ = told
    assert not watched.stopping(1) and heard == [("require",)]
    assert watched.stopping(2) and heard == [("require",), ("require",), ("ending",)]


def test_every_phase_that_training_enters_is_known_and_every_known_one_is_entered():
    entered = set()
    for path in Path(inspect.getfile(pathflip_jax.training)).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and (getattr(node.func, "attr", "") or getattr(node.func, "id", "")) in (
                "phase",
                "mark",
            ):
                said = [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
                entered.update(name for name in said if isinstance(name, str))
    assert entered == PHASES.keys()
    assert {phase.cause for phase in PHASES.values()} == set(goodput.CAUSES) - {goodput.PROFILE}
