"""Utilisation, waits and slow hosts: the figures are right, or they are not there."""

import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pallas_tpu

from pathflip_jax.monitoring import telemetry
from pathflip_jax.monitoring.goodput import DATA, STEP, Ledger
from pathflip_jax.monitoring.telemetry import StepTime, StepTimestamps, Telemetry, find_straggler, step_time
from pathflip_jax.runtime import sharding


@pytest.fixture
def device(monkeypatch):
    """Let this process believe that it has one device of a kind: device(kind, **attributes) gives a mesh of four."""

    def pretend(kind, **attributes):
        found = SimpleNamespace(platform="other", device_kind=kind, **attributes)
        monkeypatch.setattr(jax, "local_devices", lambda: [found])
        return SimpleNamespace(size=4)

    return pretend


@pytest.mark.parametrize(
    ("kinds", "chip"),
    [
        (["TPU v4"], "TPU_V4"),
        (["TPU v5 lite", "TPU v5e"], "TPU_V5E"),
        (["TPU v5", "TPU v5p"], "TPU_V5P"),
        (["TPU v6 lite", "TPU v6e"], "TPU_V6E"),
    ],
)
def test_peaks_of_tpus_are_those_that_jax_knows(kinds, chip, device):
    version = pallas_tpu.ChipVersion[chip]
    for cores in {1, version.num_physical_tensor_cores_per_chip}:
        theirs = pallas_tpu.get_tpu_info_for_chip(version, cores)
        expected = pytest.approx(4 * theirs.bf16_ops_per_second * cores, rel=0.01)
        for kind in kinds:
            assert telemetry.peak(device(kind, num_cores=cores), "bfloat16").rate == expected


def test_a_device_that_nobody_knows_has_no_peak(device):
    for kind in ("NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "TPU v99"):
        assert telemetry.peak(device(kind), "bfloat16") is None
    assert telemetry.peak(device("NVIDIA H200"), "bfloat16").rate == 4 * 989e12


def test_a_cpu_is_measured():
    found = telemetry.peak(sharding.make_mesh(), "float32")
    assert 1e8 < found.rate < 1e14 and "measured" in found.source


@pytest.mark.parametrize(
    ("started", "before", "finished", "expected"),
    [
        # The batch came while the step before still ran: waiting for it cost nothing.
        (StepTimestamps(given=5, waited=(1, 5), resumed=0), 7, 10, StepTime(3, 0, 0)),
        # The devices had nothing to do from 3 to 5, when the batch came, and until 6 for another reason.
        (StepTimestamps(given=6, waited=(1, 5), resumed=0), 3, 10, StepTime(7, 3, 2)),
        # A validation from 3 to 8 is no part of the step.
        (StepTimestamps(given=9, waited=(1, 2), resumed=8), 3, 10, StepTime(2, 1, 0)),
        # The first step: its batch was read before the loop began.
        (StepTimestamps(given=6, waited=(1, 5), resumed=6), 0, 10, StepTime(4, 0, 0)),
    ],
)
def test_the_time_of_a_step_is_that_of_the_devices(started, before, finished, expected):
    assert step_time(started, before, finished) == expected


def test_a_row_says_how_the_last_steps_used_the_machine(monkeypatch):
    ledger = Ledger()
    watch = Telemetry(ledger, sharding.make_mesh(), "float32")
    watch.peak = telemetry.Peak(100.0, "a test")
    # Two steps of 4 s, the second of which waited 1 s for its batch.
    for started, finished in ((StepTimestamps(10, (0, 1), 10), 14), (StepTimestamps(15, (13, 15), 10), 18)):
        watch._started.append(started)
        watch._finished.put(finished)
    first, second = watch.row(1, 200.0), watch.row(2, 300.0)
    assert (first["perf/step_seconds"], first["perf/utilisation"], first["perf/input_wait"]) == (4, 0.5, 0)
    assert second["perf/utilisation"] == pytest.approx(500 / 8 / 100) and second["perf/input_wait"] == 1 / 8
    assert ledger._spent[DATA] == 1.0
    assert second["perf/process_memory_peak_bytes"] >= second["perf/process_memory_bytes"] > 1e7
    watch.peak = None
    watch._started.append(StepTimestamps(18, (0, 1), 10))
    watch._finished.put(20)
    assert "perf/utilisation" not in watch.row(3, 1.0)


def test_a_loop_is_timed_without_waiting_for_its_steps():
    ledger = Ledger()
    watch = Telemetry(ledger, sharding.make_mesh(), "float32")
    step = watch.timed_step(jax.jit(lambda x: (x, {"loss": jnp.sum(x)})))
    batches = watch.timed_batches(iter(np.ones((3, 4))))
    with watch:
        ledger.switch(STEP)
        results = [step(next(batches)) for _ in range(3)]
        rows = [watch.row(number, float(metrics["loss"])) for number, (_, metrics) in enumerate(results, 1)]
    assert all(row["perf/step_seconds"] > 0 and 0 <= row["perf/input_wait"] <= 1 for row in rows)
    assert rows[0]["perf/utilisation"] > 0 and rows[0]["perf/compilations"] >= 1
    assert not watch._watcher.is_alive()


def test_the_memory_of_a_process_does_not_begin_at_that_of_its_parent():
    """Peak memory by getrusage is inherited: a small run started from a large notebook would seem as large."""
    ballast = np.ones(2**30, np.uint8)
    code = (
        "from pathflip_jax.monitoring.telemetry import memory_in_use; "
        "found = memory_in_use(); print(found['process_memory_peak_bytes'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 1e7 < int(done.stdout) < ballast.nbytes


def test_memory_of_devices_is_that_of_the_fullest(monkeypatch):
    stats = [{"bytes_in_use": 5, "peak_bytes_in_use": 9}, {"bytes_in_use": 7, "peak_bytes_in_use": 8}]
    devices = [SimpleNamespace(memory_stats=lambda found=found: found) for found in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert telemetry.memory_in_use() == {"device_memory_bytes": 7, "device_memory_peak_bytes": 9}


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([[0.0, 3.0], [2.0, 1.0]], (1, 3.0, 1.0)),  # host 1 gave its step 2 s late, and it takes 1 s
        ([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]], (0, 1.0, 1.0)),
        ([[0.0, 9.0], [0.1, 8.9], [8.0, 1.0], [0.2, 8.8]], (2, 9.0, pytest.approx(1.1))),
    ],
)
def test_the_host_that_is_late_is_found(seconds, expected):
    assert find_straggler(np.array(seconds)) == expected


def test_two_processes_name_the_slow_one(run_together, free_port):
    command = [sys.executable, str(Path(__file__).with_name("two_hosts.py")), str(free_port())]
    _, outputs = run_together([[*command, str(number)] for number in (0, 1)], [{"JAX_PLATFORMS": "cpu"}] * 2)
    for out, err in outputs:
        assert "done" in out, err
    warned = f"step 6: host 1 ({socket.gethostname()}) takes"
    assert outputs[0][1].count(warned) == 1 and "all wait for it" in outputs[0][1]
    assert warned not in outputs[1][1]
