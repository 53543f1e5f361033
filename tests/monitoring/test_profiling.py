"""Profiles: exactly the steps requested by option or by signal."""

import os
import signal

import jax
import jax.numpy as jnp
import pytest

from pathflip_jax.monitoring.goodput import Ledger
from pathflip_jax.monitoring.profiling import Profiler, profiled_steps


@pytest.mark.parametrize(
    ("text", "start", "expected"),
    [("", 0, []), ("10:13", 0, [10, 11, 12, 13]), ("3", 0, [3, 4, 5]), ("2", 100, [103, 104]), ("7:7", 2, [7])],
)
def test_steps_are_named_or_counted(text, start, expected):
    assert list(profiled_steps(text, start)) == expected


@pytest.mark.parametrize("text", ["ten", "5:3", "0", "0:2", ":4", "1:2:3", "-1"])
def test_other_steps_are_refused(text):
    with pytest.raises(ValueError, match=f"--profile={text}: .*such as.* 10:13"):
        profiled_steps(text, 0)


def loop(profiler, first, last, at=None, do=None):
    """Steps first to last; `do` is called in step `at`."""
    step = jax.jit(lambda x: jnp.sin(x) @ x)
    with profiler:
        for number in range(first, last + 1):
            profiler.begin(number)
            results = step(jnp.ones((8, 8)))
            if number == at:
                do()
            profiler.end(number, results)


def traces(profiler):
    return sorted(profiler.folder.rglob("*.xplane.pb"))


def test_a_trace_of_the_steps_asked_for_is_written(tmp_path, capsys):
    profiler = Profiler(tmp_path, "2:3", Ledger())
    loop(profiler, 1, 4)
    (trace,) = traces(profiler)
    assert trace.stat().st_size > 1000
    printed = capsys.readouterr().err
    assert f"profile of steps 2 to 3: {tmp_path / 'profile'}" in printed and "xprof server --logdir=" in printed


def test_a_run_that_ends_within_the_steps_writes_what_there_was(tmp_path):
    profiler = Profiler(tmp_path, "2:9", Ledger())
    with pytest.raises(KeyError):
        loop(profiler, 1, 4, at=3, do=lambda: {}["gone"])
    assert len(traces(profiler)) == 1


def test_a_signal_asks_for_the_next_steps(tmp_path, capsys):
    before = signal.getsignal(signal.SIGUSR1)
    profiler = Profiler(tmp_path, "", Ledger())
    loop(profiler, 1, 6, at=2, do=lambda: os.kill(os.getpid(), signal.SIGUSR1))
    assert len(traces(profiler)) == 1 and "profile of steps 3 to 5" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGUSR1) == before


def test_steps_that_are_over_are_said_to_be(tmp_path, capsys):
    """The command that starts a run again is the one that began it, --profile included."""
    profiler = Profiler(tmp_path, "2:3", Ledger())
    loop(profiler, 11, 12)
    assert not profiler.folder.exists()
    assert "not profiled, as the run resumes with step 11" in capsys.readouterr().err
