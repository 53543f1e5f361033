"""Processes that find each other by what their launcher left them, and end together."""

import itertools
import os
import socket
import subprocess
import sys
import threading
import time

import jax
import pytest

from pathflip_jax.runtime import distributed, launchers
from pathflip_jax.runtime.distributed import find_launch
from pathflip_jax.runtime.launchers import Launch
from pathflip_jax.runtime.private_interfaces import cluster_environments

SLURM = {
    "SLURM_JOB_ID": "4097", "SLURM_STEP_NODELIST": "gpu[07,09]", "SLURM_NTASKS": "2", "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "2",
}  # fmt: skip
SCRIPT = {"SLURM_JOB_ID": "4097", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}  # no step of srun
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}
VARIABLES = {"JAX_COORDINATOR_ADDRESS": "first", "JAX_NUM_PROCESSES": "3", "JOB_COMPLETION_INDEX": "2"}
THREE = {"JAX_COORDINATOR_ADDRESS": "first:9", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "0"}
LAUNCHERS = (
    "SLURM_",
    "OMPI_",
    "MV2_",
    "PMI",
    "FLUX_",
    "MPI_",
    "JAX_COORD",
    "JAX_NUM",
    "JAX_PROCESS",
    "JAX_LOCAL",
    "JOB_",
)
OTHERS = ("TPU_", "MEGASCALE_", "PATHFLIP_", "WORLD_SIZE", "RANK", "LOCAL_RANK")


def without(variables, *names):
    return {name: value for name, value in variables.items() if name not in names}


@pytest.fixture
def environment(monkeypatch):
    """Sets variables; what the machine of the tests has of them does not count."""
    for name in list(os.environ):
        if name.startswith(LAUNCHERS + OTHERS):
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
        (without(SLURM, "SLURM_STEP_NUM_TASKS"), Launch("Slurm", 2, 1, method="slurm")),
        (SLURM | {"SLURM_NTASKS": "8"}, Launch("Slurm", 2, 1, method="slurm")),  # those of the job
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "gpu07:9"}, Launch("Slurm", 2, 1, "gpu07:9", "slurm")),
        (SLURM | {"PMI_SIZE": "2", "PMI_RANK": "1"}, Launch("Slurm", 2, 1, method="slurm")),  # srun --mpi=pmi2
        (without(SLURM, "SLURM_STEP_NUM_TASKS") | {"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, None),
        (SCRIPT, None),
        # The shell of an interactive job keeps the job's number of tasks.
        (SCRIPT | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_NODELIST": "gpu07", "SLURM_STEP_ID": "4294967290"}, None),
        (SLURM | {"PATHFLIP_DISTRIBUTED": "0"}, None),
        (OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911"},
         Launch("Open MPI", 4, 3, method="ompi")),
        (OPEN_MPI | {"JAX_COORDINATOR_ADDRESS": "first:77"}, Launch("Open MPI", 4, 3, "first:77")),
        (SLURM | {"PMI_SIZE": "16", "PMI_RANK": "9", "JAX_COORDINATOR_ADDRESS": "first:77"},  # mpiexec in a Slurm job
         Launch("MPICH or Intel MPI", 16, 9, "first:77")),
        ({"WORLD_SIZE": "2", "RANK": "1", "JAX_COORDINATOR_ADDRESS": "first:77"}, Launch("torchrun", 2, 1, "first:77")),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None),
        (VARIABLES, Launch("JAX_COORDINATOR_ADDRESS", 3, 2, "first:8476")),
        (THREE, Launch("JAX_COORDINATOR_ADDRESS", 3, 0, "first:9")),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "[fe80::1]", "JAX_COORDINATOR_PORT": "77"},
         Launch("JAX_COORDINATOR_ADDRESS", 3, 0, "[fe80::1]:77")),
        ({"JAX_COORDINATOR_ADDRESS": "", "JAX_NUM_PROCESSES": "", "JAX_PROCESS_ID": ""}, None),
        ({"JAX_NUM_PROCESSES": "1"}, None),
        ({"JOB_COMPLETION_INDEX": "2"}, None),  # of many indexed jobs that are none of ours
    ],
)  # fmt: skip
def test_the_launcher_is_found_by_its_variables(environment, variables, expected):
    environment(variables)
    assert find_launch() == expected


def test_a_tpu_pod_is_found_by_its_variables(environment, monkeypatch):
    (pod,) = (cluster for cluster in cluster_environments() if cluster.name == "gketpu")
    monkeypatch.setattr(pod, "is_env_present", lambda: "TPU_WORKER_HOSTNAMES" in os.environ)  # but for the chips
    environment({"TPU_WORKER_HOSTNAMES": "t0,t1,t2,t3", "TPU_WORKER_ID": "2", "TPU_SKIP_MDS_QUERY": "1"})
    environment({"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"})
    assert find_launch() == Launch("TPU variables", 4, 2, method="gketpu")
    environment({"TPU_WORKER_ID": "second"})
    with pytest.raises(ValueError, match=r"TPU variables: .*'second'.* in .*TPU_WORKER_ID=second"):
        find_launch()


def test_options_win_over_the_launcher(environment):
    environment(SLURM)
    assert find_launch("host:1", 2, 0) == Launch("--coordinator", 2, 0, "host:1")


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PATHFLIP_DISTRIBUTED": "1"}, "PATHFLIP_DISTRIBUTED=1: neither a TPU pod .* give --coordinator"),
        ({"PATHFLIP_DISTRIBUTED": "yes"}, "PATHFLIP_DISTRIBUTED=yes: expected 1 .*, 0 .* or nothing"),
        (OPEN_MPI, "add `-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun"),
        (without(OPEN_MPI, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_SIZE=4 without OMPI_COMM_WORLD_RANK"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, r"one of 2 \(PMI_SIZE\) .* set JAX_COORDINATOR_ADDRESS=HOST:PORT"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, r"torchrun started this process as one of 2 \(WORLD_SIZE\)"),
        (without(THREE, "JAX_PROCESS_ID"), "without JAX_PROCESS_ID: .* JOB_COMPLETION_INDEX"),
        (without(THREE, "JAX_NUM_PROCESSES"), "and JAX_PROCESS_ID=0 without JAX_NUM_PROCESSES: set all three"),
        (without(THREE, "JAX_COORDINATOR_ADDRESS"), "without JAX_COORDINATOR_ADDRESS: set all three"),
        (without(VARIABLES, "JAX_COORDINATOR_ADDRESS"), "JOB_COMPLETION_INDEX=2 without JAX_COORDINATOR_ADDRESS"),
        (without(VARIABLES, "JAX_NUM_PROCESSES"), "JAX_COORDINATOR_ADDRESS=first without JAX_NUM_PROCESSES and"),
        ({"JAX_PROCESS_ID": "1"}, "JAX_PROCESS_ID=1 without JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES"),
        (THREE | {"JAX_PROCESS_ID": ""}, "without JAX_PROCESS_ID"),
        (THREE | {"JAX_NUM_PROCESSES": "three"}, "JAX_NUM_PROCESSES=three: expected a whole number, 1 or more"),
        (THREE | {"JAX_PROCESS_ID": "3"}, "JAX_PROCESS_ID=3: expected a whole number, 0 to 2, as there are 3"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "fe80::1"}, r"JAX_COORDINATOR_ADDRESS=fe80::1: .* or \[fe80::1\]:8476"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "http://h"}, "JAX_COORDINATOR_ADDRESS=http://h: expected HOST:PORT"),
        (THREE | {"JAX_COORDINATOR_ADDRESS": "h:80800"}, "JAX_COORDINATOR_ADDRESS=h:80800: expected HOST:PORT"),
        (VARIABLES | {"JAX_COORDINATOR_PORT": "any"}, "JAX_COORDINATOR_PORT=any: expected a port"),
        (SLURM | {"SLURM_PROCID": "one"}, "SLURM_PROCID=one: expected a whole number"),
        (without(SLURM, "SLURM_STEP_NODELIST"), "SLURM_STEP_NUM_TASKS=2 without SLURM_STEP_NODELIST"),
        (SCRIPT | {"SLURM_PROCID": "3"}, "SLURM_NTASKS=8 without SLURM_STEP_NODELIST"),
    ],
)  # fmt: skip
def test_what_is_missing_or_no_number_is_named(environment, variables, message):
    environment(variables)
    with pytest.raises(ValueError, match=message):
        find_launch()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("host:1", 2, None), "give all three or none"),
        (("host", 2, 0), "--coordinator=host: expected HOST:PORT"),
        (("host:1", 0, 0), "--num_processes=0: expected a whole number, 1 or more"),
        (("host:1", 2, 2), "--process_id=2: expected a whole number, 0 to 1"),
        (("host:1", 2, -1), "--process_id=-1: expected"),
    ],
)
def test_options_that_are_no_launch_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        find_launch(*options)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        (SLURM, [0]),
        (SCRIPT | {"SLURM_STEP_NUM_TASKS": "1"}, None),  # a shell: several processes of it have one number
        (OPEN_MPI, [1]),
        (OPEN_MPI | {"JAX_LOCAL_DEVICE_IDS": "2, 3"}, [2, 3]),
    ],
)
def test_the_launcher_says_which_device_of_a_host_is_whose(environment, variables, expected):
    environment(variables)
    assert launchers.local_devices() == expected
    environment({"JAX_LOCAL_DEVICE_IDS": "0,one"})
    with pytest.raises(ValueError, match="JAX_LOCAL_DEVICE_IDS=one: expected a whole number"):
        launchers.local_devices()


def test_a_process_outside_of_the_tasks_of_its_job_says_so(environment, capsys):
    distributed.initialize(None)
    assert capsys.readouterr().err == ""
    environment(SCRIPT)
    distributed.initialize(find_launch())
    assert "the Slurm job has 8 tasks, but srun did not start this process" in capsys.readouterr().err


JOIN = """
import sys
from pathflip_jax.runtime import distributed, launchers
distributed.NOTICE_SECONDS, distributed.JOIN_SECONDS = 0.2, 1
distributed.initialize(launchers.Launch("Slurm", 3, int(sys.argv[2]), "localhost:" + sys.argv[1]))
"""


def test_processes_that_do_not_come_are_named_and_not_waited_for_without_end(run_together, free_port):
    commands = [[sys.executable, "-c", JOIN, str(free_port()), number] for number in "01"]
    codes, outputs = run_together(commands, [{"JAX_PLATFORMS": "cpu"}] * 2)
    assert codes == [distributed.TRY_AGAIN] * 2
    for (_, said), awaited in zip(outputs, ("2 other processes", "process 0"), strict=True):
        assert f"by Slurm) is waiting for {awaited} at localhost:" in said
        assert f"{awaited} did not join at localhost:" in said and "set PATHFLIP_DISTRIBUTED=0" in said


def test_a_port_that_another_program_has_is_refused(environment):
    """JAX ends in a segmentation fault there, or, where the other program is JAX too, shares the port with it."""
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(
            OSError, match=rf"port {port} of .*: Address already in use; choose another with --coordinator"
        ):
            distributed.initialize(find_launch(f"localhost:{port}", 2, 0))
        environment(SLURM | {"SLURM_PROCID": "0", "JAX_COORDINATOR_PORT": str(port)})
        with pytest.raises(OSError, match=rf"port {port} of .*: .* with JAX_COORDINATOR_PORT"):
            distributed.initialize(find_launch())


def test_a_lone_process_agrees_with_itself():
    assert distributed.gather([1, "a"]) == [[1, "a"]] and distributed.agree({"x": 1}) == {"x": 1}
    distributed.require_same(workdir="here")
    distributed.end_all_processes(ValueError("alone"), 60)  # returns: the caller raises


HANG = """
import time
from pathflip_jax.runtime import distributed
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
        process: {"count": count, "step": 9, "doing": doing, "host": f"node{process}", "allowed": 60}
        for process, (count, doing) in enumerate([(31, "waiting for the devices"), (30, "reading the next batch")] * 2)
    }
    distributed.Watchdog(60)._end(places)
    message = (
        "no progress for 60 s: process 1 (node1) at step 9, reading the next batch, "
        "process 3 (node3) at step 9, reading the next batch; the other 2 are waiting"
    )
    assert ended == [(message, 75)] and message in capsys.readouterr().err


@pytest.fixture
def watched(monkeypatch):
    """Watches as process 0 of two, for a while: what process 1 does -> the places that ended the run, or None."""
    told, ended = {}, threading.Event()
    monkeypatch.setattr(distributed, "POLL_SECONDS", 0.005)
    monkeypatch.setattr(distributed, "SLOW_LEAST", 0)
    monkeypatch.setattr(distributed, "key_value_client", lambda: "the store")
    monkeypatch.setattr(distributed, "_put", lambda client, key, place: None)
    monkeypatch.setattr(distributed, "_follow", lambda client: None)
    monkeypatch.setattr(distributed, "_read", lambda client, prefix: dict(told))

    def watch(other, seconds=0.3, **place):
        watchdog = distributed.Watchdog(0.05)
        places = []

        def end(found):
            places.append(found)
            ended.set()
            watchdog._stop.set()

        monkeypatch.setattr(watchdog, "_end", end)
        ended.clear()
        with watchdog:
            watchdog.at(3, "saving", **place)
            deadline = time.monotonic() + seconds
            for number in itertools.count():
                told[1] = {"host": "node1", "step": 3, "doing": "here", "count": 0, "allowed": 0.05} | other(number)
                if ended.wait(0.01) or time.monotonic() > deadline:
                    break
        return places[0] if places else None

    return watch


def test_only_what_stands_still_is_a_hang(watched):
    with_it = {"count": 1}
    assert watched(lambda number: with_it)[0]["doing"] == "saving"  # both stand at one place
    assert watched(lambda number: with_it, slow=True, seconds=0.2) is None  # six times as long
    assert watched(lambda number: with_it, slow=True, seconds=5)[0]["allowed"] == pytest.approx(0.3)
    assert watched(lambda number: with_it, timed=False) is None


def test_a_process_that_is_waited_for_may_take_what_it_may_take(watched):
    assert watched(lambda number: {"allowed": None}) is None  # it compiles
    assert watched(lambda number: {"count": number - 1000}) is None  # it comes nearer
    assert watched(lambda number: {"allowed": 60.0}) is None  # it saves
    assert watched(lambda number: {}, seconds=5)[1]["count"] == 0  # it stands, and cannot say so itself


def test_a_closed_terminal_keeps_no_hang_alive(monkeypatch):
    ended = []
    monkeypatch.setattr(distributed, "_leave", lambda message, code: ended.append(code))
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.setattr(sys, "__stderr__", None)
    distributed.Watchdog(60)._end({0: {"count": 1, "step": 2, "doing": "saving", "host": "h", "allowed": 60}})
    assert ended == [75]


def test_a_process_that_does_not_come_in_time_is_a_reason_to_start_again(monkeypatch):
    """It may still read its data, on a sick host: other faults of files are wrong input."""
    codes = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(distributed, "_leave", lambda message, code: codes.append(code))
    for error in (distributed.UnresponsiveProcessError("process 1 did not answer"), TimeoutError("S1.h5")):
        distributed.end_all_processes(error, 1)
    assert codes == [distributed.TRY_AGAIN, distributed.WRONG_INPUT]


FAILURE = """
import sys, time
from pathflip_jax.runtime import distributed, launchers
port, process = sys.argv[1:]
distributed.initialize(launchers.Launch("the test", 3, int(process), "localhost:" + port))
with distributed.Watchdog(0) as watchdog:
    distributed.gather("here")
    if process == "1":
        distributed.end_all_processes(ValueError("S1.h5: no features"), 10)
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
        assert f"process {number} ({host}) ends, as process 1 ({host}) has ended: S1.h5: no features" in said[number]
    assert f"pathflip: process 1 ({host}): S1.h5: no features" in said[1]
    assert not any("another process of this run is lost" in text for text in said)
