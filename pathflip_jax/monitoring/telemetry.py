"""Hardware telemetry per step: utilisation, input waits, memory, compilations, stragglers.

Nothing here makes the loop wait for the devices. A separate thread waits for each step and records its completion, so
times are those of the devices although the loop runs a step ahead; the operation count of a step comes with its
metrics; values are exchanged between hosts by one small program dispatched after a step. Metric names begin with
`perf/`.
"""

import queue
import re
import resource
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pathflip_jax.monitoring.goodput import DATA, STEP, Ledger
from pathflip_jax.monitoring.metrics import PERFORMANCE
from pathflip_jax.runtime.compilation import CompileCounter

USEFUL = f"{PERFORMANCE}useful_flops"
WINDOW = 20  # steps over which shares are averaged
# Dense bfloat16 operations per second of a whole device, by `device_kind`. TPUs: the system architecture pages of the
# Cloud TPU documentation, per chip. GPUs: NVIDIA's data sheets, half of what they state "with sparsity"; RTX 4090: the
# Ada architecture white paper, accumulation in float32. Other variants of a name (H100 NVL, MIG slices) differ.
PEAK_BFLOAT16 = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA GeForce RTX 4090": 165e12,
}
TWO_CORES = ("TPU v4", "TPU v5", "TPU v5p")  # chips whose two cores are one device, or two devices of half the rate
MEASURE_SECONDS, MEASURE_SIZE = 0.2, 1024
EXIT_SECONDS = 60  # to wait for the step in progress at exit; a hanging one is abandoned
STRAGGLER_STEPS = 20
STRAGGLER = 1.5  # multiple of the median of the other hosts


class Peak(NamedTuple):
    """Peak operations per second over all devices, the reference of utilisation, and the source of the figure."""

    rate: float
    source: str


def peak(mesh: Mesh, dtype: str) -> Peak | None:
    """Peak rate of the devices of a mesh; None if no peak is on record, in which case no utilisation is reported.

    On a CPU it is measured as the fastest of several matrix products, which takes 0.2 s; not with several processes,
    which may share the cores.
    """
    device, count = jax.local_devices()[0], mesh.size
    if device.platform == "cpu":
        return Peak(_measured_rate(dtype), f"matrix products of {dtype}, measured at start") if _alone() else None
    rate = PEAK_BFLOAT16.get(device.device_kind)
    if rate is None:
        return None
    if device.device_kind in TWO_CORES and getattr(device, "num_cores", 2) == 1:
        rate /= 2
    return Peak(rate * count, f"{count} x {device.device_kind}, {rate / 1e12:g} TFLOP/s of bfloat16 each by data sheet")


def _alone() -> bool:
    return jax.process_count() == 1


def _measured_rate(dtype: str) -> float:
    """Operations per second of the fastest of several matrix products, as other load can only slow them down."""
    n = MEASURE_SIZE
    x = jnp.ones((n, n), dtype)
    product = jax.jit(jnp.matmul)
    product(x, x).block_until_ready()
    fastest, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < MEASURE_SECONDS:
        start = time.perf_counter()
        product(x, x).block_until_ready()
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * n**3 / fastest


def memory_in_use() -> dict[str, int]:
    """Current and peak bytes of the fullest local device; on a CPU the resident memory of this process."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    if all(found and "bytes_in_use" in found for found in stats):
        most = {"device_memory_bytes": max(found["bytes_in_use"] for found in stats)}
        if all("peak_bytes_in_use" in found for found in stats):
            most["device_memory_peak_bytes"] = max(found["peak_bytes_in_use"] for found in stats)
        return most
    if jax.default_backend() != "cpu":
        return {}
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:  # not Linux: only the peak is known
        peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return {"process_memory_peak_bytes": peak_bytes}
    # Not getrusage, whose peak on Linux starts at the size of the parent process.
    names = {"VmRSS": "process_memory_bytes", "VmHWM": "process_memory_peak_bytes"}  # sandboxes omit some
    found = {ours: re.search(rf"{name}:\s+(\d+) kB", status) for name, ours in names.items()}
    return {name: int(kilobytes[1]) * 1024 for name, kilobytes in found.items() if kilobytes}


class StepTimestamps(NamedTuple):
    """Timestamps of a dispatched step, in seconds of one clock: its dispatch, the begin and end of the wait for its
    batch, and the loop's last return to steps from other work (a validation, a save)."""

    given: float
    waited: tuple[float, float]
    resumed: float


class StepTime(NamedTuple):
    """Seconds of a step, of which the devices were idle, and of which they were idle waiting for its batch."""

    seconds: float
    idle: float
    waited: float


def step_time(started: StepTimestamps, finished_before: float, finished: float) -> StepTime:
    """Time of a step that ended at `finished`, after one that ended at `finished_before`.

    It begins when the devices became free for it. Waiting for a batch while they were busy costs nothing.
    """
    ready = max(finished_before, started.resumed)
    seconds = max(finished - ready, 1e-9)
    idle = min(max(started.given - ready, 0.0), seconds)
    waited = min(max(started.waited[1] - max(started.waited[0], ready), 0.0), idle)
    return StepTime(seconds, idle, waited)


class Telemetry:
    """Measurements of the training loop; a context manager around it.

    The loop takes its batches from `timed_batches`, its step from `timed_step`, and asks `row` once for every step, in
    order, after it has read that step's metrics.
    """

    def __init__(self, ledger: Ledger, mesh: Mesh, dtype: str):
        self.peak = peak(mesh, dtype)
        self._ledger = ledger
        self.hosts = None if _alone() else Hosts(mesh)
        self._compilations = CompileCounter()
        self._waited = (0.0, 0.0)
        self._started: deque[StepTimestamps] = deque()
        self._finished_before = 0.0
        self._recent: deque[tuple[float, float, float]] = deque(maxlen=WINDOW)  # operations, seconds, waits
        self._under_way: queue.SimpleQueue = queue.SimpleQueue()
        self._finished: queue.SimpleQueue = queue.SimpleQueue()
        self._watcher = threading.Thread(target=self._watch, name="step-timer", daemon=True)

    def _watch(self) -> None:
        """Record the completion time of each step."""
        while (metrics := self._under_way.get()) is not None:
            try:
                jax.block_until_ready(metrics)
            except Exception:  # the loop raises it too, when it reads these metrics
                pass
            self._finished.put(time.perf_counter())

    def timed_batches(self, batches: Iterator) -> Iterator:
        """The same batches, with the wait for each recorded."""
        while True:
            start = time.perf_counter()
            batch = next(batches)
            self._waited = (start, time.perf_counter())
            yield batch

    def timed_step(self, step: Callable) -> Callable:
        """The same step function, whose last result is its metrics, with start and end recorded."""

        def run(*arguments):
            self._started.append(StepTimestamps(time.perf_counter(), self._waited, self._ledger.resumed))
            results = step(*arguments)
            self._under_way.put(results[-1])
            return results

        return run

    def row(self, step: int, useful_flops: float) -> dict[str, float]:
        """Measurements of the oldest step not yet returned, whose metrics have been read.

        `step_seconds`: from the end of the previous step (or of a validation or save in between) to the end of this
        one. `input_wait`: the share of the last steps' time in which the devices were idle because the batch was not
        ready; waits hidden by a running step cost nothing and are not counted. `utilisation`: model FLOPs
        (`model/flops.py`) of the last steps over the peak of all devices, if known. `compilations`: programs compiled
        since the loop began; the step is compiled before it.
        """
        finished = self._finished.get()
        seconds, idle, waited = step_time(self._started.popleft(), self._finished_before, finished)
        self._finished_before = finished
        self._ledger.move(waited, STEP, DATA)
        self._recent.append((useful_flops, seconds, waited))
        operations, total, waits = (sum(values) for values in zip(*self._recent, strict=True))
        found = {"step_seconds": seconds, "input_wait": waits / total, "compilations": self._compilations.count}
        if self.peak and useful_flops:
            found["utilisation"] = operations / total / self.peak.rate
        found |= memory_in_use()
        if self.hosts:
            found |= self.hosts.exchange(step, idle, seconds - idle)
        return {PERFORMANCE + name: value for name, value in found.items()}

    def describe(self) -> str:
        """The peak that utilisation is relative to, or the reason why there is none."""
        if self.peak:
            return f"utilisation is relative to {self.peak.rate / 1e12:.3g} TFLOP/s: {self.peak.source}"
        return f"utilisation not reported: no peak FLOP/s on record for {jax.local_devices()[0].device_kind}"

    def __enter__(self):
        self._compilations.__enter__()
        self._watcher.start()
        return self

    def __exit__(self, *_) -> None:
        self._compilations.__exit__()
        self._under_way.put(None)
        self._watcher.join(EXIT_SECONDS)


class Hosts:
    """Straggler detection: step times of all hosts, exchanged every 20 steps.

    In a synchronous run all hosts' steps take equally long, so each host measures how long its own devices were idle
    because it dispatched the step late (slow input, a busy processor). That, and the busy time of its devices, are
    exchanged; the minimum of the latter is the time of a step without stragglers. A device that computes slowly, on a
    host that dispatches in time, makes all devices wait inside the step and is not detected here.
    """

    def __init__(self, mesh: Mesh):
        from jax.experimental import multihost_utils

        self._sums = np.zeros(2)
        self._steps = 0
        self._pending: jax.Array | None = None
        self._place = NamedSharding(mesh, P(mesh.axis_names))
        self._gather = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))
        self._process = np.array([device.process_index for device in mesh.devices.flat])
        name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
        names = np.asarray(multihost_utils.process_allgather(name))
        self.names = [bytes(row).decode(errors="replace").strip() for row in names]
        self._named: int | None = None

    def exchange(self, step: int, idle: float, busy: float) -> dict[str, float]:
        """Add a step's seconds; returns all hosts' figures of the last twenty steps once they have arrived."""
        found = {}
        if self._pending is not None:  # dispatched after a step whose metrics have been read
            seconds, self._pending = np.asarray(self._pending), None
            found = self._compare(step, np.array([seconds[self._process == p][0] for p in np.unique(self._process)]))
        self._sums += idle, busy
        self._steps += 1
        if self._steps == STRAGGLER_STEPS:
            mean = (self._sums / self._steps).astype(np.float32)
            local = np.tile(mean, (jax.local_device_count(), 1))
            self._pending = self._gather(jax.make_array_from_process_local_data(self._place, local))
            self._sums, self._steps = np.zeros(2), 0
        return found

    def _compare(self, step: int, seconds: np.ndarray) -> dict[str, float]:
        slowest, alone, others = find_straggler(seconds)
        straggles = alone > STRAGGLER * others
        if straggles and self._named != slowest and jax.process_index() == 0:
            print(
                f"step {step}: host {slowest} ({self.names[slowest]}) takes {alone:.2f} s per step, the others "
                f"{others:.2f} s, and all wait for it; check its input, its processors and what else is running there",
                file=sys.stderr,
            )
        self._named = slowest if straggles else None
        return {"slowest_host": slowest, "slowest_host_seconds": alone, "other_hosts_seconds": others}


def find_straggler(seconds: np.ndarray) -> tuple[int, float, float]:
    """(slowest host, its seconds per step, the median of the others) from [hosts, 2] seconds idle and busy."""
    alone = seconds[:, 0] + seconds[:, 1].min()
    slowest = int(alone.argmax())
    return slowest, float(alone[slowest]), float(np.median(np.delete(alone, slowest)))
