"""A profile on demand: `--profile STEPS` at the start, or SIGUSR1 to a run under way.

JAX's own profiler writes what each device and thread did to <workdir>/profile, with several processes to a folder for
each, and xprof (`pip install pathflip-jax[profile]`) or TensorBoard with its plugin shows it. A profile costs the steps
that it covers some time and waits for their end; other steps nothing.
"""

import re
import signal
import sys
import threading
from pathlib import Path

import jax

from pathflip_jax.monitoring import goodput

PROFILE = "profile"
SETTLED = 2  # steps of a start that a count leaves out: first use of memory and of the network
STEPS_ON_SIGNAL = 3


def profiled_steps(text: str, start: int) -> range:
    """The steps that `--profile` names, of a run that resumes after step `start`; "" names none.

    "10:13" are steps 10 to 13, "3" the three steps after the first two of this start. Raises ValueError for others.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if found is None:
        raise ValueError(f"--profile={text}: expected a count of steps such as 3, or steps such as 10:13")
    first, last = found[1], int(found[2])
    steps = range(int(first), last + 1) if first else range(start + SETTLED + 1, start + SETTLED + 1 + last)
    if not steps or steps[0] < 1:
        raise ValueError(f"--profile={text}: no step in it; steps count from 1, such as 10:13")
    return steps


class Profiler:
    """Traces the steps asked for; a context manager around the loop, which says where each step begins and ends.

    Every process traces itself; on SIGUSR1 it traces the next three steps, and a signal before the first is for that
    one. `ledger` counts what starting and writing a trace take.
    """

    def __init__(self, workdir: Path, wanted: str, ledger: goodput.Ledger):
        self._wanted, self._ledger = wanted, ledger
        self.folder = workdir / PROFILE
        # A trace is named by its host, and several processes may share one.
        self._own = self.folder / f"process{jax.process_index()}" if jax.process_count() > 1 else self.folder
        self._steps: range | None = None  # known with the first step
        self._tracing = self._asked = False
        self._before = None

    def _ask(self, *_) -> None:
        self._asked = True

    def begin(self, step: int) -> None:
        """Start tracing where this step is the first that was asked for; before it is given to the devices."""
        if self._steps is None:
            self._steps = profiled_steps(self._wanted, step - 1)
            if self._steps and self._steps[0] < step:
                print(f"--profile={self._wanted}: the run resumes with step {step}, these are over", file=sys.stderr)
        if self._asked and not self._tracing:
            self._asked, self._steps = False, range(step, step + STEPS_ON_SIGNAL)
        if self._steps and step == self._steps[0]:
            with self._ledger.during(goodput.PROFILE):
                jax.profiler.start_trace(self._own)
            self._tracing = True

    def end(self, step: int, results: object) -> None:
        """Stop tracing after the last step that was asked for, once its results are there."""
        if self._tracing and step == self._steps[-1]:
            jax.block_until_ready(results)
            self._stop()

    def _stop(self) -> None:
        with self._ledger.during(goodput.PROFILE):
            jax.profiler.stop_trace()
        self._tracing = False
        if jax.process_index() == 0:
            print(
                f"profile of steps {self._steps[0]} to {self._steps[-1]}: {self.folder}\n"
                f"  to view it: pip install pathflip-jax[profile], then `xprof server --logdir={self.folder}`",
                file=sys.stderr,
            )

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGUSR1, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self._before is not None:
            signal.signal(signal.SIGUSR1, self._before)
        if self._tracing:  # the run ended sooner
            self._stop()
