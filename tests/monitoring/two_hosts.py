"""Run twice by test_telemetry.py as the two processes of one run: PORT PROCESS. Process 1 is slow with its batches."""

import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pathflip_jax.monitoring import telemetry
from pathflip_jax.monitoring.goodput import STEP, Ledger
from pathflip_jax.runtime import sharding

STEPS, SECONDS = 12, 0.25


def batches(process):
    while True:
        time.sleep(SECONDS * process)
        yield np.ones((2, 4), np.float32)


if __name__ == "__main__":
    process = int(sys.argv[2])
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, process)
    mesh = sharding.make_mesh()
    place = NamedSharding(mesh, P(mesh.axis_names))
    telemetry.STRAGGLER_STEPS = 5
    step = jax.jit(lambda x: (x + 1, {"sum": jnp.sum(x)}), out_shardings=(place, NamedSharding(mesh, P())))
    ledger = Ledger()
    watch = telemetry.Telemetry(ledger, mesh, "float32")
    assert watch.peak is None and len(watch.hosts.names) == 2, watch.peak
    feed, step = watch.timed_batches(batches(process)), watch.timed_step(step)
    rows, pending = [], None
    with watch:
        ledger.switch(STEP)
        for number in range(1, STEPS + 1):
            batch = sharding.place_batch(mesh, next(feed))
            _, metrics = step(batch)
            if pending is not None:
                assert float(jax.device_get(pending)["sum"]) == 16
                rows.append(watch.row(number - 1, 1.0))
            pending = metrics
        jax.device_get(pending)
        rows.append(watch.row(STEPS, 1.0))
    told = [row for row in rows if "perf/slowest_host" in row]
    assert [rows.index(row) + 1 for row in told] == [6, 11], rows
    for row in told:
        assert row["perf/slowest_host"] == 1
        assert row["perf/slowest_host_seconds"] > telemetry.STRAGGLER * row["perf/other_hosts_seconds"]
    assert rows[-1]["perf/input_wait"] > 0.5 if process else True
    print("done", flush=True)
