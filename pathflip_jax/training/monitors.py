"""Monitors of a run: the phase of the loop, for hang detection, time accounting and profiling.

The phases of the loop are data, `PHASES`: entering one notifies all monitors.
"""

import os
import signal
import threading
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pathflip_jax.monitoring.goodput import (
    COMPILATION,
    DATA,
    EVALUATION,
    INITIALISATION,
    RESTORE,
    SAVE,
    STEP,
    Ledger,
)
from pathflip_jax.monitoring.profiling import Profiler
from pathflip_jax.runs.lock import RunLock
from pathflip_jax.runtime.distributed import Watchdog


class Phase(NamedTuple):
    """Cause to which a phase's time is attributed, and its limit for the watchdog.

    Phases that are not `timed`, such as compilation, have no limit; `slow` ones, such as a save, have six times the
    usual limit.
    """

    cause: str
    timed: bool = True
    slow: bool = False


COMPUTING, ENDING, SAVING = "computing the step", "ending the step", "saving"
PHASES = {
    "opening the data": Phase(INITIALISATION, timed=False),
    "reading the checkpoint": Phase(RESTORE, slow=True),
    "initialising the parameters": Phase(INITIALISATION, timed=False),
    "reading the first batch": Phase(DATA),
    "placing the features on the devices": Phase(INITIALISATION, slow=True),
    "compiling": Phase(COMPILATION, timed=False),
    "opening the logs": Phase(INITIALISATION, timed=False),
    COMPUTING: Phase(STEP),
    "reading the next batch": Phase(STEP),
    "waiting for the devices": Phase(STEP),
    ENDING: Phase(STEP, slow=True),  # sometimes including writing a profile
    "reading a validation batch": Phase(EVALUATION),
    "compiling the validation": Phase(EVALUATION, timed=False),
    "validating": Phase(EVALUATION),
    "ranking the validation slides": Phase(EVALUATION, timed=False),
    "writing the metrics": Phase(STEP),
    "checking the lock": Phase(STEP, slow=True),
    SAVING: Phase(SAVE, slow=True),  # including the wait for the previous background save
    "saving locally": Phase(SAVE, slow=True),
    "saving the best": Phase(SAVE, slow=True),
    "waiting for the save": Phase(SAVE, slow=True),
    "closing the logs": Phase(INITIALISATION, slow=True),
    "drawing the plots": Phase(INITIALISATION, slow=True),
}


class Monitors:
    """Monitors of a run; a context manager around its loop, for time accounting and profiles.

    Hangs, stop requests and the lock on the run's folders are monitored from before the loop until after it.
    """

    def __init__(
        self, workdir: Path, ledger: Ledger, stop: "StopSignal", watchdog: Watchdog, lock: RunLock, profile: str = ""
    ):
        self.workdir, self.ledger, self.stop, self.lock = workdir, ledger, stop, lock
        self._watchdog, self._profiler = watchdog, Profiler(workdir, profile, ledger)

    def phase(self, doing: str, step: int, results: Any = None) -> None:
        """Enter a phase of a step, which lasts until the next; a profile that ends here waits for `results`."""
        phase = PHASES[doing]
        self._watchdog.at(step, doing, timed=phase.timed, slow=phase.slow)
        self.ledger.switch(phase.cause, saving=step if doing == SAVING else None)
        if doing == COMPUTING:
            self._profiler.begin(step)
        elif doing == ENDING:
            self._profiler.end(step, results)

    def stopping(self, step: int) -> bool:
        """Whether to save and stop after this step; if so, the lock tells new starts to wait for it.

        Raises InUseError if another run has taken over the folder.
        """
        self.lock.require()
        stopping = self.stop.requested(step)
        if stopping:
            self.lock.ending()
        return stopping

    def check_lock(self, step: int) -> None:
        """Raise InUseError if another run has taken over the folder; called before a checkpoint is written."""
        self.phase("checking the lock", step)
        self.lock.require(look=True)

    def __enter__(self):
        self._profiler.__enter__()
        return self

    def __exit__(self, *raised) -> None:
        self._profiler.__exit__(*raised)
        self.ledger.__exit__(*raised)


class StopSignal:
    """Stop request by SIGTERM, polled by the loop after each step; several processes agree on the step.

    With several, JAX handles the signal once they have joined, whichever of them receives it. SIGHUP, sent when the
    terminal is closed, is forwarded as SIGTERM, except in a process started to survive it (nohup).
    """

    def __enter__(self):
        self._asked = False
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            if jax.process_count() == 1:
                self._before[signal.SIGTERM] = signal.signal(signal.SIGTERM, self._request)
            if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
                self._before[signal.SIGHUP] = signal.signal(signal.SIGHUP, self._forward_as_sigterm)
        return self

    def _forward_as_sigterm(self, *_) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def _request(self, *_) -> None:
        self._asked = True

    def asked(self) -> bool:
        """Whether a single process has been told to stop."""
        return self._asked

    def requested(self, step: int) -> bool:
        """Whether to save and stop after this step."""
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(step)
        return self._asked

    def __exit__(self, *_) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
