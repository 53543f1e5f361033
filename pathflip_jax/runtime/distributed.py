"""Multi-process runs: discovery of the processes, agreement on values, and joint exit (DESIGN section 6).

The launcher tells each process the number of processes, its own index and the address of the first one: by options,
variables or JAX's detection of TPU pods, Slurm and Open MPI. From then on, whatever ends one process ends all of them
soon, with one exit code: 75 if the same command may be restarted (a host was lost, or hangs), else that of the process
that failed. `Watchdog` handles hangs, `end_all_processes` failures, `_exit_where_jax_aborts` lost hosts.
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

TRY_AGAIN = 75  # EX_TEMPFAIL, as schedulers treat 0 as done
FAILED, WRONG_INPUT = 1, 2  # exit codes of `pathflip` for internal errors and for invalid input
JOIN_SECONDS = 300  # time limit for all processes to join, from the start of each
AGREE_SECONDS = 1800  # time limit for the slowest process to reach an agreement, as after reading a checkpoint
NOTICE_SECONDS = 10  # of waiting before it is reported
POLL_SECONDS = 1.0
# Phases that wait for large files on slow storage may take SLOW times `hang_seconds`, and at least SLOW_LEAST seconds.
SLOW, SLOW_LEAST = 6, 60
_ENDED, _PLACE, _AGREED = "pathflip/ended/", "pathflip/place/", "pathflip/agreed/"
# Messages of XLA and its network libraries that mean a lost peer and never a local error.
_LOST_PEER = re.compile(r"\b(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION):")
_agreements = 0
_exit_code = None  # of this process, once decided
_callbacks = []  # references to callbacks that C code calls without keeping any


def find_launch(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> Launch | None:
    """The launch that this process is part of; None for a single process.

    Explicit values take precedence, then JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID (or
    JOB_COMPLETION_INDEX, which indexed jobs of Kubernetes set), then MPI and similar launchers, Slurm and TPU pods if
    they started several processes. PATHFLIP_DISTRIBUTED=0 forces a single process, 1 requires several. Raises
    ValueError for missing or non-numeric values, with the name of the option or variable.
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
    """Join the processes of a launch, before the first use of a device; None means a single process.

    A process without a heartbeat for `heartbeat_seconds` is lost, and ends the others with exit code 75. Process 0
    reports their number and the launcher, and from then on it alone writes to stdout and warns.
    """
    if launch is None:
        if alone := launchers.explain_single_process():
            print(f"pathflip: {alone}", file=sys.stderr)
        return
    _join(launch, heartbeat_seconds)
    if jax.process_count() != launch.processes:
        raise RuntimeError(
            f"{launch.found_by} gives {launch.processes} processes, but the backend {jax.default_backend()!r} sees "
            "only this one"
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
    """Connect to the other processes; those missing after a time limit are named in the error."""
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
        # JAX would abort a process with a core dump after too long a wait, so this timeout comes first.
        timeouts = {"initialization_timeout": JOIN_SECONDS + 60, "heartbeat_timeout_seconds": heartbeat_seconds}
        jax.distributed.initialize(**known, **timeouts)
    finally:
        joined.set()


def _require_free(port: int, setting: str) -> None:
    """Raise OSError if another program uses the port: JAX would crash, or share it with another run."""
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
                f"port {port} of {socket.gethostname()}, where process 0 listens for the others: {error.strerror}; "
                f"choose another with {setting} (PORT of a launch script)"
            ) from None


def _wait_for_others(launch: Launch, address: str | None, joined: threading.Event) -> None:
    if joined.wait(NOTICE_SECONDS):
        return
    others = f"{launch.processes - 1} other process{'es' if launch.processes > 2 else ''}"
    awaited = others if launch.process == 0 else "process 0"
    here = f"pathflip: process {launch.process} of {launch.processes} ({socket.gethostname()}, by {launch.found_by})"
    place = f" at {address}" if address else ""
    print(f"{here} is waiting for {awaited}{place}, {JOIN_SECONDS} s at most", file=sys.stderr, flush=True)
    if joined.wait(JOIN_SECONDS - NOTICE_SECONDS):
        return
    cure = f"start all of them, or set {SWITCH}=0 to train alone"
    print(f"{here}: {awaited} did not join{place} within {JOIN_SECONDS} s; {cure}", file=sys.stderr)
    _exit(TRY_AGAIN)


def this_process() -> str:
    """Name of this process for messages, such as "process 1 (node7)"."""
    return f"process {jax.process_index()} ({socket.gethostname()})"


def gather(value: Any) -> list:
    """All-gather of JSON values, in order of the processes. All must call it at the same point.

    Raises UnresponsiveProcessError naming the process that does not respond.
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


class UnresponsiveProcessError(TimeoutError):
    """A process did not respond while others waited for it: usually a faulty host, so a restart may help."""


def _answer(client, key: str, process: int) -> str:
    """Value that a process has set; a process that keeps the others waiting is reported."""
    try:
        return client.blocking_key_value_get(key, NOTICE_SECONDS * 1000)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise UnresponsiveProcessError(f"process {process} did not answer {this_process()}: {error}") from None
    if jax.process_index() == (process == 0):  # one of the waiting processes reports it
        print(f"pathflip: waiting for process {process}, {AGREE_SECONDS} s at most", file=sys.stderr, flush=True)
    try:
        return client.blocking_key_value_get(key, (AGREE_SECONDS - NOTICE_SECONDS) * 1000)
    except jax.errors.JaxRuntimeError as error:
        raise UnresponsiveProcessError(f"process {process} did not answer {this_process()}: {error}") from None


def agree(value: Any) -> Any:
    """Broadcast of the value of process 0; all processes wait for each other."""
    return gather(value)[0]


def require_same(**values: str) -> None:
    """Raise ValueError if the processes were started as different runs: those of one run share a command line."""
    for process, others in enumerate(gather(values)):
        for name, value in values.items():
            if others[name] != value:
                raise ValueError(
                    f"{this_process()} has {name} {value}, but process {process} has {others[name]}: start all "
                    f"processes of a run with the same command; to train a separate run in each, set {SWITCH}=0"
                )


class Watchdog:
    """Watchdog that ends a process that hangs, or whose peer has failed; a context manager around the training loop.

    `at` records the position of the loop. If it does not change for `hang_seconds` (0: no limit), the host and step of
    the hang and the Python stacks are written to stderr, and the process exits with 75: most hangs are due to a faulty
    host or network, and a restart from the last checkpoint resolves them; the launcher bounds the number of restarts.
    With several processes all wait when one hangs, so the one with the least progress is named. A process that waits
    for another relies on the other's time limits, and ends the run only if it has observed no progress of the other for
    as long.
    """

    def __init__(self, hang_seconds: float):
        self.hang_seconds = hang_seconds
        start = {"count": 0, "step": 0, "doing": "starting", "host": socket.gethostname(), "allowed": None}
        self._now = start, time.monotonic()  # one tuple, as two threads use it: the position, and since when
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def at(self, step: int, doing: str, *, timed: bool = True, slow: bool = False) -> None:
        """Record the step and activity of the run; every process passes the same positions in the same order.

        Activities that are not `timed`, such as compilation, have no time limit; `slow` ones, such as a save, may take
        six times `hang_seconds`, and at least a minute.
        """
        allowed = max(SLOW * self.hang_seconds, SLOW_LEAST) if slow else self.hang_seconds
        place = {"step": step, "doing": doing, "allowed": allowed if timed and self.hang_seconds else None}
        before, _ = self._now
        self._now = before | place | {"count": before["count"] + 1}, time.monotonic()

    def _watch(self) -> None:
        client, told = key_value_client(), None
        awaited, awaited_since = None, 0.0  # the process that this one waits for, and its position
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
        others = f"; the other {len(places) - len(names)} are waiting" if len(names) < len(places) else ""
        message = f"no progress for {late[0][1]['allowed']:g} s: {', '.join(names)}{others}"
        with contextlib.suppress(Exception):  # a closed terminal must not keep a hang alive
            print(f"\npathflip: {this_process()}: {message}. The stacks of this process:", file=sys.stderr, flush=True)
            faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
        _leave(message, TRY_AGAIN)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def end_all_processes(error: Exception, heartbeat_seconds: int) -> None:
    """End all processes after a failure of this one, with one exit code; returns in a single process.

    Without this, the others would wait for it in a collective, and it for them at exit. If a lost peer may have caused
    the error, its loss is given time to be detected, and determines the exit code.
    """
    if jax.process_count() == 1:
        return
    deadline = time.monotonic() + heartbeat_seconds + 5 * POLL_SECONDS
    while _may_be_a_lost_peer(error) and time.monotonic() < deadline:
        _follow(key_value_client())
        time.sleep(POLL_SECONDS)  # JAX aborts in the meantime if a peer is lost: _exit_where_jax_aborts
    limit = ulimits.explain(error)
    ours = limit or isinstance(error, (ValueError, OSError, ImportError, FloatingPointError, MemoryError))
    if not ours or os.environ.get("PATHFLIP_DEBUG"):
        traceback.print_exception(error)
    print(f"pathflip: {this_process()}: {limit or error}", file=sys.stderr)
    unreached = _may_be_a_lost_peer(error) and re.search("DEADLINE_EXCEEDED|UNAVAILABLE", str(error))  # all are alive
    unreached = unreached or isinstance(error, UnresponsiveProcessError)
    _leave(str(error), TRY_AGAIN if unreached else WRONG_INPUT if ours else FAILED)


def _may_be_a_lost_peer(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _LOST_PEER.search(str(error)):
            return True
        error = error.__cause__
    return False


def _leave(message: str, code: int) -> None:
    """Publish the reason and the exit code to the other processes, give them time to read both, and exit."""
    global _exit_code
    client, _exit_code = key_value_client(), code
    if client is not None:
        _put(client, f"{_ENDED}{jax.process_index()}", {"message": message, "code": code, "by": this_process()})
        time.sleep(4 * POLL_SECONDS)  # process 0 serves the published message
    _exit(code)


def _follow(client) -> None:
    """Exit with the code that another process has published."""
    global _exit_code
    for process, ended in _read(client, _ENDED).items():
        if process != jax.process_index():
            print(f"pathflip: {this_process()} ends, as {ended['by']} has ended: {ended['message']}", file=sys.stderr)
            _exit_code = ended["code"]
            if jax.process_index() == 0:
                time.sleep(2 * POLL_SECONDS)  # process 0 serves it to the others meanwhile
            _exit(ended["code"])


def _exit(code: int) -> None:
    """Exit from any thread, without JAX's shutdown barrier, which waits for every process."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):  # closed or missing streams
            stream.flush()
    os._exit(code)


def _exit_where_jax_aborts() -> None:
    """Exit with 75 where JAX would dump core for a lost peer, or with the exit code already decided.

    JAX's coordination service ends the survivors by abort(3), from a separate thread, and cannot be configured
    otherwise (jaxlib 0.10: a Python callback ends in std::bad_cast). Launchers restart on 75, and treat a core dump as
    a defect.
    """

    message = f"pathflip: {this_process()}: another process of this run is lost; exit {TRY_AGAIN}, start it again\n"

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(_: int) -> None:
        if _exit_code is not None:  # this process was ending already, and the others exited first
            os._exit(_exit_code)
        os.write(2, message.encode())
        os._exit(TRY_AGAIN)

    _callbacks.append(on_abort)
    libc = ctypes.CDLL(None)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(int(signal.SIGABRT), on_abort)


def _put(client, key: str, value: dict) -> None:
    try:
        client.key_value_set(key, json.dumps(value), allow_overwrite=True)
    except jax.errors.JaxRuntimeError:
        pass  # process 0 is gone: JAX is about to abort this one


def _read(client, prefix: str) -> dict[int, dict]:
    try:
        found = client.key_value_dir_get(prefix)
    except jax.errors.JaxRuntimeError:
        return {}
    return {int(key.rpartition("/")[2]): json.loads(value) for key, value in found}
