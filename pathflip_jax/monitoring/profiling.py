"""Profiling on demand: `--profile STEPS` at the start, or SIGUSR1 to a running process.

JAX's profiler writes traces of all devices and threads to <workdir>/profile, with several processes to one folder each,
for xprof (`pip install pathflip-jax[profile]`) or TensorBoard with its plugin. Profiling slows down the steps that it
covers, and waits for their end; it costs other steps nothing.
"""

import re
import signal
import sys
import threading
from pathlib import Path

import jax

from pathflip_jax.monitoring import goodput

PROFILE = "profile"
SETTLED = 2  # warm-up steps that `--profile COUNT` skips, as they allocate memory and open connections
STEPS_ON_SIGNAL = 3


def profiled_steps(text: str, start: int) -> range:
    """Steps selected by `--profile`, for a run that resumes after step `start`; "" selects none.

    "10:13" is steps 10 to 13, "3" the three steps after the first two of this start. Raises ValueError for other forms.
    """
    if not text:
        return range(0)
    found = re.fullmatch(r"(?:(\d+):)?(\d+)", text)
    if found is None:
        raise ValueError(f"--profile={text}: expected a count of steps such as 3, or steps such as 10:13")
    first, last = found[1], int(found[2])
    steps = range(int(first), last + 1) if first else range(start + SETTLED + 1, start + SETTLED + 1 + last)
    if not steps or steps[0] < 1:
        raise ValueError(f"--profile={text}: selects no step; steps are counted from 1, such as 10:13")
    return steps


class Profiler:
    """Profiler of selected steps; a context manager around the loop, which marks the start and end of each step.

    Every process traces itself; on SIGUSR1 it traces the next three steps, from the first step on if the signal comes
    earlier. `ledger` accounts for the time of starting and writing a trace.
    """

    def __init__(self, workdir: Path, wanted: str, ledger: goodput.Ledger):
        self._wanted, self._ledger = wanted, ledger
        self.folder = workdir / PROFILE
        # A trace is named after its host, which several processes may share.
        self._own = self.folder / f"process{jax.process_index()}" if jax.process_count() > 1 else self.folder
        self._steps: range | None = None  # known from the first step on
        self._tracing = self._asked = False
        self._before = None

    def _ask(self, *_) -> None:
        self._asked = True

    def begin(self, step: int) -> None:
        """Start tracing if this is the first selected step; called before it is dispatched."""
        if self._steps is None:
            self._steps = profiled_steps(self._wanted, step - 1)
            if self._steps and self._steps[0] < step:
                print(
                    f"--profile={self._wanted}: not profiled, as the run resumes with step {step}, "
                    "after the first of these steps",
                    file=sys.stderr,
                )
        if self._asked and not self._tracing:
            self._asked, self._steps = False, range(step, step + STEPS_ON_SIGNAL)
        if self._steps and step == self._steps[0]:
            with self._ledger.during(goodput.PROFILE):
                jax.profiler.start_trace(self._own)
            self._tracing = True

    def end(self, step: int, results: object) -> None:
        """Stop tracing after the last selected step, once its results are ready."""
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
        if self._tracing:  # the run ended earlier
            self._stop()
