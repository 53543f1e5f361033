"""Processes that find each other by what their launcher left them, and end together."""

import os
import socket
import subprocess
import sys

import pytest
from jax._src.clusters import cloud_tpu_cluster

from pathflip_jax import distributed
from pathflip_jax.distributed import Launch, find_launch

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07,09]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}  # fmt: skip
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "first", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "2"}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; what the machine of the tests has of them does not count."""
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "JAX_COORD", "JAX_NUM", "JAX_PROCESS", "JOB_", "TPU_", "PATHFLIP_")):
            monkeypatch.delenv(name)

    def set_all(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_all


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, Launch("Slurm", 2, 1, method="slurm")),
        (SLURM | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        ({name: x for name, x in SLURM.items() if name != "SLURM_STEP_NODELIST"}, None),  # a job, no step of srun
        (SLURM | {"PATHFLIP_DISTRIBUTED": "0"}, None),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
         Launch("Open MPI", 4, 3, method="ompi")),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "first:77"}, Launch("Open MPI", 4, 3, "first:77")),
        (VARIABLES, Launch("JAX_COORDINATOR_ADDRESS", 3, 2, "first:8476")),
        (VARIABLES | {"JAX_PROCESS_ID": "0", "JAX_COORDINATOR_ADDRESS": "first:9"},
         Launch("JAX_COORDINATOR_ADDRESS", 3, 0, "first:9")),
    ],
)  # fmt: skip
def test_the_launcher_is_found_by_its_variables(environment, variables, expected):
    environment(variables)
    assert find_launch() == expected


def test_a_tpu_pod_is_found_by_its_variables(environment, monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    environment({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"})
    environment({"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert find_launch() == Launch("TPU variables", 4, 2, method="gketpu")


def test_options_win_over_the_launcher(environment):
    environment(SLURM)
    assert find_launch("host:1", 2, 0) == Launch("--coordinator", 2, 0, "host:1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATHFLIP_DISTRIBUTED": "1"}, "PATHFLIP_DISTRIBUTED=1: neither a TPU pod .* give --coordinator"),
        ({"PATHFLIP_DISTRIBUTED": "yes"}, "PATHFLIP_DISTRIBUTED=yes: expected 1 .*, 0 .* or nothing"),
        (OPEN_MPI, "add `-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun"),
        ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not: set it"),
    ],
)
def test_what_is_missing_is_named(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message):
        find_launch()


def test_a_part_of_the_options_is_refused():
    with pytest.raises(ValueError, match="give all three or none"):
        find_launch("host:1", 2, None)


def test_a_lone_process_agrees_with_itself():
    assert distributed.gather([1, "a"]) == [[1, "a"]] and distributed.agree({"x": 1}) == {"x": 1}
    distributed.require_same(workdir="here")
    distributed.end_together(ValueError("alone"), 60)  # returns: the caller raises


HANG = """
import time
from pathflip_jax import distributed
distributed.POLL_SECONDS = 0.05
with distributed.Watchdog(3) as watchdog:
    watchdog.at(6, "compiling", timed=False)
    time.sleep(4)
    for _ in range(3):
        watchdog.at(7, "reading the next batch")
        time.sleep(1.2)
    print("alive", flush=True)
    time.sleep(60)
"""


def test_the_watchdog_names_host_and_step_of_a_hang_and_exits_with_75():
    done = subprocess.run([sys.executable, "-c", HANG], capture_output=True, text=True, timeout=100)
    assert done.stdout == "alive\n" and done.returncode == distributed.TRY_AGAIN == 75
    place = f"no progress for 3 s: process 0 ({socket.gethostname()}) at step 7, reading the next batch"
    assert place in done.stderr and 'File "<string>", line 12 in <module>' in done.stderr


def test_the_host_that_came_least_far_is_named(monkeypatch, capsys):
    ended = []
    monkeypatch.setattr(distributed, "_leave", lambda message, code: ended.append((message, code)))
    places = {
        process: {"count": count, "step": 9, "doing": doing, "host": f"node{process}"}
        for process, (count, doing) in enumerate([(31, "waiting for the devices"), (30, "reading the next batch")] * 2)
    }
    distributed.Watchdog(60)._end(places)
    message = (
        "no progress for 60 s: process 1 (node1) at step 9, reading the next batch, "
        "process 3 (node3) at step 9, reading the next batch; the other 2 wait for it"
    )
    assert ended == [(message, 75)] and message in capsys.readouterr().err


FAILURE = """
import sys, time
from pathflip_jax import distributed
port, process = sys.argv[1:]
distributed.initialize(distributed.Launch("the test", 3, int(process), "localhost:" + port))
with distributed.Watchdog(0) as watchdog:
    distributed.gather("here")
    if process == "1":
        distributed.end_together(ValueError("S1.h5: no features"), 10)
    time.sleep(60)
"""


def test_all_processes_end_as_the_one_that_failed(run_together, free_port):
    """Process 0 keeps what is told, and must not go before the others have read it."""
    command = [sys.executable, "-c", FAILURE, str(free_port())]
    codes, outputs = run_together([[*command, str(number)] for number in range(3)], [{"JAX_PLATFORMS": "cpu"}] * 3)
    said = [stderr for _, stderr in outputs]
    assert codes == [distributed.WRONG_INPUT] * 3, said
    host = socket.gethostname()
    for number in (0, 2):
        assert f"process {number} ({host}) ends with process 1 ({host}): S1.h5: no features" in said[number]
    assert f"pathflip: process 1 ({host}): S1.h5: no features" in said[1]
    assert not any("another process of this run is lost" in text for text in said)
