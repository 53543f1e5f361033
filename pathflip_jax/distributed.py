"""Several processes as one run: how they find each other, agree on a fact, and end together (DESIGN section 6).

Who started the processes tells each how many there are, which one it is and where the first one is: options, variables
or JAX's own detection of TPU pods, Slurm and Open MPI. From then on what ends one process ends all of them, soon and
with one exit code: 75 where the same command may be started again (a host was lost, or hangs), else that of the
process that failed. `Watchdog` sees to hangs, `end_together` to failures, `_exit_where_jax_aborts` to lost hosts.
"""

import ctypes
import faulthandler
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from typing import Any, NamedTuple

import jax

TRY_AGAIN = 75  # EX_TEMPFAIL: schedulers take 0 for done
FAILED, WRONG_INPUT = 1, 2  # as `pathflip` exits for a fault of ours and for one of its input
SWITCH = "PATHFLIP_DISTRIBUTED"
AGREE_SECONDS = 1800  # for the slowest process to come to where all must agree, such as after reading a checkpoint
POLL_SECONDS = 1.0
_ENDED, _PLACE, _AGREED = "pathflip/ended/", "pathflip/place/", "pathflip/agreed/"
# JAX's own ways to find the other processes, by its names for them; that of Kubernetes asks the cluster, which a lone
# process in a pod may not, so it is tried on demand alone.
_CLUSTERS = {"slurm": "Slurm", "ompi": "Open MPI", "gcetpu": "TPU metadata", "gketpu": "TPU variables"}
_ON_DEMAND = {"": "Kubernetes"}
# What XLA and its network libraries say when another process is gone, and of nothing that a process did itself.
_LOST_PEER = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")
_agreements = 0
_leaving = None  # the exit code of this process, from when it is settled
_held = []  # what C calls and keeps no reference to


class Launch(NamedTuple):
    """The processes of a run and who says so; `coordinator` is the address of the first one, None where JAX finds it.

    `method` is what JAX calls the launcher, None where no detection is needed.
    """

    found_by: str
    processes: int
    process: int
    coordinator: str | None = None
    method: str | None = None


def find_launch(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Launch | None:
    """The launch that this process is part of; None where it is alone.

    Explicit values win. Then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX,
    which indexed jobs of Kubernetes set) count, then Slurm, Open MPI and TPU pods where they started several processes.
    PATHFLIP_DISTRIBUTED=0 leaves the process alone whatever it finds, 1 insists on finding others. Raises ValueError
    for values of which a part is missing, with what to add.
    """
    given = (coordinator, processes, process)
    if all(value is not None for value in given):
        return Launch("--coordinator", processes, process, coordinator)
    if any(value is not None for value in given):
        raise ValueError(
            f"--coordinator={coordinator} --num_processes={processes} --process_id={process}: give all three or none"
        )
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}={switch}: expected 1 (join the other processes), 0 (stay alone) or nothing")
    if switch == "0":
        return None
    launch = _from_variables() or _from_open_mpi() or _from_jax(_CLUSTERS | (_ON_DEMAND if switch == "1" else {}))
    if switch == "1" and launch is None:
        raise ValueError(
            f"{SWITCH}=1: neither a TPU pod nor Slurm, Open MPI or Kubernetes started this process; give "
            "--coordinator, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID"
        )
    return launch if launch and (launch.processes > 1 or switch == "1") else None


def _from_variables() -> Launch | None:
    address, count = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_NUM_PROCESSES")
    if not address or not count:
        return None
    process = os.environ.get("JAX_PROCESS_ID", os.environ.get("JOB_COMPLETION_INDEX"))
    if process is None:
        raise ValueError(
            "JAX_COORDINATOR_ADDRESS and JAX_NUM_PROCESSES are set, JAX_PROCESS_ID is not: set it, or start the pods "
            "as an indexed job, which sets JOB_COMPLETION_INDEX"
        )
    if ":" not in address:
        address += ":" + os.environ.get("JAX_COORDINATOR_PORT", "8476")
    return Launch("JAX_COORDINATOR_ADDRESS", int(count), int(process), address)


def _from_open_mpi() -> Launch | None:
    """Open MPI 5, which does not say where its first process is, as older ones do to JAX."""
    count = int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))
    if count == 1 or "OMPI_MCA_orte_hnp_uri" in os.environ:
        return None
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
        raise ValueError(
            "Open MPI started this process and does not say where the first one is: add "
            f"`-x JAX_COORDINATOR_ADDRESS=HOST:PORT` to mpirun, or `-x {SWITCH}=0` for {count} separate runs"
        )
    return Launch("Open MPI", count, int(os.environ["OMPI_COMM_WORLD_RANK"]), address)


def _from_jax(names: dict[str, str]) -> Launch | None:
    from jax._src.clusters import ClusterEnv  # what jax.distributed.initialize itself asks

    for cluster in ClusterEnv._cluster_types:
        try:
            if cluster.name in names and cluster.is_env_present():
                processes, process = cluster.get_process_count(), cluster.get_process_id()
                return Launch(names[cluster.name], processes, process, method=cluster.name)
        except OSError:  # no metadata server: not a TPU of Google's cloud
            continue
    return None


def initialize(launch: Launch | None, heartbeat_seconds: int = 60) -> None:
    """Join the processes of a launch, before the first use of a device; None leaves this one alone.

    A process not heard of for `heartbeat_seconds` is lost, and ends the others with exit code 75. Process 0 says how
    many they are and who found them, and from then on it alone writes to stdout and warns.
    """
    if launch is None:
        return
    if launch.coordinator is None:
        known = {"cluster_detection_method": launch.method or None}
    else:  # Slurm and Open MPI may still say which GPU of a host is whose
        gpu = {"SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK"} & os.environ.keys()
        known = {"coordinator_address": launch.coordinator, "num_processes": launch.processes}
        known |= {"process_id": launch.process, "cluster_detection_method": None if gpu else "deactivate"}
    jax.distributed.initialize(heartbeat_timeout_seconds=heartbeat_seconds, **known)
    if jax.process_count() != launch.processes:
        raise RuntimeError(
            f"{launch.found_by} names {launch.processes} processes, their devices are one process's: the backend "
            f"{jax.default_backend()!r} knows of no others"
        )
    _exit_where_jax_aborts()
    if jax.process_index() == 0:
        devices = f"{jax.device_count()} devices ({jax.devices()[0].device_kind})"
        print(f"pathflip: {launch.processes} processes, {devices}; found by {launch.found_by}", file=sys.stderr)
    else:
        logging.getLogger().setLevel(logging.ERROR)
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)  # network libraries print there from C++


def this_process() -> str:
    """The name of this process for messages, such as "process 1 (node7)"."""
    return f"process {jax.process_index()} ({socket.gethostname()})"


def gather(value: Any) -> list:
    """The values of all processes, in order, on each of them; what JSON can hold. All must call it at the same point.

    Raises TimeoutError naming the process that does not come.
    """
    global _agreements
    if jax.process_count() == 1:
        return [value]
    client, _agreements = _client(), _agreements + 1
    prefix = f"{_AGREED}{_agreements}/"
    client.key_value_set(f"{prefix}{jax.process_index()}", json.dumps(value))
    values = []
    for process in range(jax.process_count()):
        try:
            values.append(json.loads(client.blocking_key_value_get(f"{prefix}{process}", AGREE_SECONDS * 1000)))
        except jax.errors.JaxRuntimeError as error:
            raise TimeoutError(f"process {process} did not answer {this_process()}: {error}") from None
    return values


def agree(value: Any) -> Any:
    """The value of process 0, on every process; all wait for each other."""
    return gather(value)[0]


def require_same(**values: str) -> None:
    """Raise ValueError where processes were started as different runs: those of one run have one command line."""
    for process, others in enumerate(gather(values)):
        for name, value in values.items():
            if others[name] != value:
                raise ValueError(
                    f"{this_process()} has {name} {value}, process {process} has {others[name]}: one run has one; to "
                    f"train a run in each process, set {SWITCH}=0"
                )


class Watchdog:
    """Ends a process that hangs, or whose peer has failed; a context manager around the loop of a run.

    `at` says where the loop is. When that stays the same for `hang_seconds` (0: for ever), stderr gets the host and
    step that the run hangs at and the Python stacks, and the process exits with 75: most hangs are a sick host or
    network, which a restart from the last checkpoint leaves behind; a launcher bounds how often it starts again. With
    several processes all wait when one hangs, so the one that is named is the one that came least far.
    """

    def __init__(self, hang_seconds: float):
        self.hang_seconds = hang_seconds
        self._place = {"count": 0, "step": 0, "doing": "starting", "host": socket.gethostname()}
        self._since = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str, *, timed: bool = True) -> None:
        """The run is at this step, doing this; every process passes the same places in the same order.

        What is not `timed`, such as compilation, takes as long as it takes.
        """
        self._place = self._place | {"count": self._place["count"] + 1, "step": step, "doing": doing}
        self._since = time.monotonic() if timed else None

    def _watch(self) -> None:
        client, told = _client(), None
        while not self._stop.wait(POLL_SECONDS):
            place, since = self._place, self._since
            late = self.hang_seconds and since is not None and time.monotonic() - since > self.hang_seconds
            if client is not None:
                if place != told:
                    _put(client, f"{_PLACE}{jax.process_index()}", place)
                    told = place
                _follow(client)
            if late:
                places = _read(client, _PLACE) if client else {}
                self._end(places | {jax.process_index(): place})

    def _end(self, places: dict[int, dict]) -> None:
        behind = min(place["count"] for place in places.values())
        names = [
            f"process {process} ({place['host']}) at step {place['step']}, {place['doing']}"
            for process, place in sorted(places.items())
            if place["count"] == behind
        ]
        others = f"; the other {len(places) - len(names)} wait for it" if len(names) < len(places) else ""
        message = f"no progress for {self.hang_seconds:g} s: {', '.join(names)}{others}"
        print(f"\npathflip: {this_process()}: {message}. The stacks of this process:", file=sys.stderr, flush=True)
        faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        _leave(message, TRY_AGAIN)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def end_together(error: Exception, heartbeat_seconds: int) -> None:
    """End all processes for the failure of this one, with one exit code; a lone process goes on.

    Without this, the others would wait for it in a collective, and it for them at exit. Where the error may come of a
    lost peer, that is given the time to show, and decides.
    """
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + heartbeat_seconds + 5 * POLL_SECONDS
    while _may_be_a_lost_peer(error) and time.monotonic() < deadline:
        _follow(_client())
        time.sleep(POLL_SECONDS)  # JAX aborts in the meantime where a peer is lost: _exit_where_jax_aborts
    ours = isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, MemoryError))
    if not ours or os.environ.get("PATHFLIP_DEBUG"):
        traceback.print_exception(error)
    print(f"pathflip: {this_process()}: {error}", file=sys.stderr)
    unreached = _may_be_a_lost_peer(error) and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", str(error))  # all live
    _leave(str(error), TRY_AGAIN if unreached else WRONG_INPUT if ours else FAILED)


def _may_be_a_lost_peer(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__
    return False


def _leave(message: str, code: int) -> None:
    """Tell the others why and with which code to exit, give them the time to read it, and exit."""
    global _leaving
    client, _leaving = _client(), code
    if client is not None:
        _put(client, f"{_ENDED}{jax.process_index()}", {"message": message, "code": code, "by": this_process()})
        time.sleep(4 * POLL_SECONDS)  # process 0 holds what is told
    _exit(code)


def _follow(client) -> None:
    """Exit as another process did that has told so."""
    global _leaving
    for process, ended in _read(client, _ENDED).items():
        if process != jax.process_index():
            print(f"pathflip: {this_process()} ends with {ended['by']}: {ended['message']}", file=sys.stderr)
            _leaving = ended["code"]
            if jax.process_index() == 0:
                time.sleep(2 * POLL_SECONDS)  # the others read it here
            _exit(ended["code"])


def _exit(code: int) -> None:
    """Exit from any thread, without the farewell at which JAX waits for every process."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit_where_jax_aborts() -> None:
    """Exit with 75 where JAX would dump core because another process is lost; with its own code where that is settled.

    Its coordination service ends the survivors by abort(3), from a thread of its own, and takes no other wish (jaxlib
    0.10: a callback in Python ends in std::bad_cast). Launchers restart on 75, and take a core dump for a defect.
    """

    message = f"pathflip: {this_process()}: another process of this run is lost; exit {TRY_AGAIN}, start again\n"

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        if _leaving is not None:  # the others went first
            os._exit(_leaving)
        os.write(2, message.encode())
        os._exit(TRY_AGAIN)

    _held.append(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), on_abort)


def _client():
    """The key-value store of the processes; None in a lone one."""
    from jax._src import distributed

    return distributed.global_state.client


def _put(client, key: str, value: dict) -> None:
    try:
        client.key_value_set(key, json.dumps(value), allow_overwrite=True)
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone: JAX is about to end this one


def _read(client, prefix: str) -> dict[int, dict]:
    try:
        found = client.key_value_dir_get(prefix)
    except jax.errors.JaxRuntimeError:
        return {}
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
