"""Several processes as one run: how they find each other, agree on a fact, and end together (DESIGN section 6).

Who started the processes tells each how many there are, which one it is and where the first one is: options, variables
or JAX's own detection of TPU pods, Slurm and Open MPI. From then on what ends one process ends all of them, soon and
with one exit code: 75 where the same command may be started again (a host was lost, or hangs), else that of the
process that failed. `Watchdog` sees to hangs, `end_together` to failures, `_exit_where_jax_aborts` to lost hosts.
"""

import contextlib
import ctypes
import errno
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
from typing import Any

import jax

from pathflip_jax.runtime import launchers, ulimits
from pathflip_jax.runtime.launchers import SWITCH, Launch
from pathflip_jax.runtime.private_interfaces import key_value_client, running_on_cloud_tpu

TRY_AGAIN = 75  # EX_TEMPFAIL: schedulers take 0 for done
FAILED, WRONG_INPUT = 1, 2  # as `pathflip` exits for a fault of ours and for one of its input
JOIN_SECONDS = 300  # for all processes to be there, from the start of each
AGREE_SECONDS = 1800  # for the slowest process to come to where all must agree, such as after reading a checkpoint
NOTICE_SECONDS = 10  # of waiting in silence
POLL_SECONDS = 1.0
# What waits for large files on slow storage may take so many times `hang_seconds`, and so many seconds at least.
SLOW, SLOW_LEAST = 6, 60
_ENDED, _PLACE, _AGREED = "pathflip/ended/", "pathflip/place/", "pathflip/agreed/"
# What XLA and its network libraries say when another process is gone, and of nothing that a process did itself.
_LOST_PEER = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")
_agreements = 0
_leaving = None  # the exit code of this process, from when it is settled
_held = []  # what C calls and keeps no reference to


def find_launch(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Launch | None:
    """The launch that this process is part of; None where it is alone.

    Explicit values win. Then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or JOB_COMPLETION_INDEX,
    which indexed jobs of Kubernetes set) count, then MPI and its like, Slurm and TPU pods where they started several
    processes. PATHFLIP_DISTRIBUTED=0 leaves the process alone whatever it finds, 1 insists on finding others. Raises
    ValueError for what is missing or no number, by the name of the option or variable.
    """
    if (launch := launchers.from_options(coordinator, processes, process)) is not None:
        return launch
    switch = os.environ.get(SWITCH, "")
    if switch not in ("", "0", "1"):
        raise ValueError(f"{SWITCH}={switch}: expected 1 (join the other processes), 0 (stay alone) or nothing")
    if switch == "0":
        return None
    launch = (
        launchers.from_variables()
        or launchers.from_counting()
        or launchers.from_slurm()
        or launchers.from_jax(on_demand=switch == "1")
    )
    if launch is None:
        launchers.refuse_address_alone()
    if switch == "1" and launch is None:
        raise ValueError(
            f"{SWITCH}=1: neither a TPU pod nor Slurm, Open MPI or Kubernetes started this process; give "
            "--coordinator, --num_processes and --process_id, or JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and "
            "JAX_PROCESS_ID"
        )
    return launch if launch and (launch.processes > 1 or switch == "1") else None


def initialize(launch: Launch | None, heartbeat_seconds: int = 60) -> None:
    """Join the processes of a launch, before the first use of a device; None leaves this one alone.

    A process not heard of for `heartbeat_seconds` is lost, and ends the others with exit code 75. Process 0 says how
    many they are and who found them, and from then on it alone writes to stdout and warns.
    """
    if launch is None:
        if alone := launchers.why_alone():
            print(f"pathflip: {alone}", file=sys.stderr)
        return
    _join(launch, heartbeat_seconds)
    if jax.process_count() != launch.processes:
        raise RuntimeError(
            f"{launch.found_by} names {launch.processes} processes, but the devices belong to one: the backend "
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


def _join(launch: Launch, heartbeat_seconds: int) -> None:
    """Connect to the other processes. Those that do not come are named, and not waited for without end."""
    address, devices = launchers.own_address(launch), launchers.local_devices()
    if address and launch.process == 0:
        _require_free(launchers.listening_port(address), launchers.port_setting(launch))
    known = {"coordinator_address": address, "num_processes": launch.processes, "process_id": launch.process}
    known["cluster_detection_method"] = "deactivate" if launch.method is None else launch.method or None
    if launch.method is None and not running_on_cloud_tpu():
        known["local_device_ids"] = devices
    joined = threading.Event()
    threading.Thread(target=_wait_for_others, args=(launch, address, joined), name="join", daemon=True).start()
    try:
        # JAX would end a process that waits for too long by a core dump, so this one goes before.
        timeouts = {"initialization_timeout": JOIN_SECONDS + 60, "heartbeat_timeout_seconds": heartbeat_seconds}
        jax.distributed.initialize(**known, **timeouts)
    finally:
        joined.set()


def _require_free(port: int, setting: str) -> None:
    """Raise OSError where another program has the port: JAX would crash, or share it with another run."""
    for family, every in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                listener.bind((every, port))
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):  # such as a system without IPv6
                continue
            raise OSError(
                f"port {port} of {socket.gethostname()}, where process 0 is to meet the others: {error.strerror}; "
                f"name another by {setting} (PORT of a launch script)"
            ) from None


def _wait_for_others(launch: Launch, address: str | None, joined: threading.Event) -> None:
    if joined.wait(NOTICE_SECONDS):
        return
    others = f"{launch.processes - 1} other process{'es' if launch.processes > 2 else ''}"
    awaited = others if launch.process == 0 else "process 0"
    here = f"pathflip: process {launch.process} of {launch.processes} ({socket.gethostname()}, by {launch.found_by})"
    place = f" at {address}" if address else ""
    print(f"{here} waits for {awaited}{place}, {JOIN_SECONDS} s at most", file=sys.stderr, flush=True)
    if joined.wait(JOIN_SECONDS - NOTICE_SECONDS):
        return
    cure = f"start all of them, or set {SWITCH}=0 to train alone"
    print(f"{here}: {awaited} did not come{place.replace(' at ', ' to ')} in {JOIN_SECONDS} s; {cure}", file=sys.stderr)
    _exit(TRY_AGAIN)


def this_process() -> str:
    """The name of this process for messages, such as "process 1 (node7)"."""
    return f"process {jax.process_index()} ({socket.gethostname()})"


def gather(value: Any) -> list:
    """The values of all processes, in order, on each of them; what JSON can hold. All must call it at the same point.

    Raises Unanswered naming the process that does not come.
    """
    global _agreements
    if jax.process_count() == 1:
        return [value]
    client, _agreements = key_value_client(), _agreements + 1
    prefix = f"{_AGREED}{_agreements}/"
    client.key_value_set(f"{prefix}{jax.process_index()}", json.dumps(value))
    values = []
    for process in range(jax.process_count()):
        values.append(json.loads(_answer(client, f"{prefix}{process}", process)))
    return values


class Unanswered(TimeoutError):
    """A process that the others waited for did not come: most often a sick host, so a restart may mend it."""


def _answer(client, key: str, process: int) -> str:
    """The answer of a process; one that keeps the others waiting is named."""
    try:
        return client.blocking_key_value_get(key, NOTICE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise Unanswered(f"process {process} did not answer {this_process()}: {error}") from None
    if jax.process_index() == (process == 0):  # one of those that wait says it
        print(f"pathflip: waiting for process {process}, {AGREE_SECONDS} s at most", file=sys.stderr, flush=True)
    try:
        return client.blocking_key_value_get(key, (AGREE_SECONDS - NOTICE_SECONDS) * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise Unanswered(f"process {process} did not answer {this_process()}: {error}") from None


def agree(value: Any) -> Any:
    """The value of process 0, on every process; all wait for each other."""
    return gather(value)[0]


def require_same(**values: str) -> None:
    """Raise ValueError where processes were started as different runs: those of one run have one command line."""
    for process, others in enumerate(gather(values)):
        for name, value in values.items():
            if others[name] != value:
                raise ValueError(
                    f"{this_process()} has {name} {value}, process {process} has {others[name]}: all processes of a "
                    f"run must agree; to train a run in each process, set {SWITCH}=0"
                )


class Watchdog:
    """Ends a process that hangs, or whose peer has failed; a context manager around the loop of a run.

    `at` says where the loop is. When that stays the same for `hang_seconds` (0: for ever), stderr gets the host and
    step that the run hangs at and the Python stacks, and the process exits with 75: most hangs are a sick host or
    network, which a restart from the last checkpoint leaves behind; a launcher bounds how often it starts again. With
    several processes all wait when one hangs, so the one that is named is the one that came least far. A process that
    waits for another leaves it to that one to know what it may take, and ends the run only where the other has stood
    still before its eyes for as long.
    """

    def __init__(self, hang_seconds: float):
        self.hang_seconds = hang_seconds
        start = {"count": 0, "step": 0, "doing": "starting", "host": socket.gethostname(), "allowed": None}
        self._now = start, time.monotonic()  # one value, for two threads: the place, and since when
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str, *, timed: bool = True, slow: bool = False) -> None:
        """The run is at this step, doing this; every process passes the same places in the same order.

        What is not `timed`, such as compilation, takes as long as it takes; what is `slow`, such as a save, may take
        six times `hang_seconds`, and a minute at least.
        """
        allowed = max(SLOW * self.hang_seconds, SLOW_LEAST) if slow else self.hang_seconds
        place = {"step": step, "doing": doing, "allowed": allowed if timed and self.hang_seconds else None}
        before, _ = self._now
        self._now = before | place | {"count": before["count"] + 1}, time.monotonic()

    def _watch(self) -> None:
        client, told = key_value_client(), None
        awaited, awaited_since = None, 0.0  # the process that this one waits for and the place where it is
        while not self._stop.wait(POLL_SECONDS):
            place, since = self._now
            if client is not None:
                if place != told:
                    _put(client, f"{_PLACE}{jax.process_index()}", place)
                    told = place
                _follow(client)
            if place["allowed"] is None or time.monotonic() - since <= place["allowed"]:
                awaited = None
                continue
            places = (_read(client, _PLACE) if client else {}) | {jax.process_index(): place}
            process, behind = min(places.items(), key=lambda item: item[1]["count"])
            if behind["count"] < place["count"]:
                if awaited != (process, behind["count"]):
                    awaited, awaited_since = (process, behind["count"]), time.monotonic()
                if behind["allowed"] is None or time.monotonic() - awaited_since <= behind["allowed"]:
                    continue
            self._end(places)

    def _end(self, places: dict[int, dict]) -> None:
        behind = min(place["count"] for place in places.values())
        late = [(process, place) for process, place in sorted(places.items()) if place["count"] == behind]
        names = [f"process {n} ({place['host']}) at step {place['step']}, {place['doing']}" for n, place in late]
        others = f"; the other {len(places) - len(names)} wait for it" if len(names) < len(places) else ""
        message = f"no progress for {late[0][1]['allowed']:g} s: {', '.join(names)}{others}"
        with contextlib.suppress(Exception):  # a closed terminal keeps no hang alive
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
    """End all processes for the failure of this one, with one exit code; a lone process continues.

    Without this, the others would wait for it in a collective, and it for them at exit. Where the error may come of a
    lost peer, that is given the time to show, and decides.
    """
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + heartbeat_seconds + 5 * POLL_SECONDS
    while _may_be_a_lost_peer(error) and time.monotonic() < deadline:
        _follow(key_value_client())
        time.sleep(POLL_SECONDS)  # JAX aborts in the meantime where a peer is lost: _exit_where_jax_aborts
    limit = ulimits.explain(error)
    ours = limit or isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, MemoryError))
    if not ours or os.environ.get("PATHFLIP_DEBUG"):
        traceback.print_exception(error)
    print(f"pathflip: {this_process()}: {limit or error}", file=sys.stderr)
    unreached = _may_be_a_lost_peer(error) and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", str(error))  # all live
    unreached = unreached or isinstance(error, Unanswered)
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
    client, _leaving = key_value_client(), code
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
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed, or none
            stream.flush()
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
