"""Lock of a run folder and of the folder of `train.checkpoints`, which hosts may share, for one run at a time.

The lock is a file, run.lock, that names its holder, who rewrites it every ten seconds. On the holder's host a new start
checks whether that process is alive; on another host, whether the file still changes, independent of the clocks of the
two. A kernel lock (fcntl, flock, and the libraries around them) would end with its process, but many cluster file
systems silently keep such a lock local to one host (NFS mounted with `nolock`, Lustre with `localflock`, BeeGFS by
default), and buckets have none. A file is visible to all hosts, and in buckets too.
"""

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax

from pathflip_jax.data.storage.atomic_files import atomic_file
from pathflip_jax.data.storage.files import Place, as_path, make_folder, read_bytes, remove
from pathflip_jax.data.storage.urls import is_url
from pathflip_jax.runtime import distributed

LOCK = "run.lock"
HEARTBEAT_SECONDS = 10  # between two heartbeats
STALE_SECONDS = 120  # without a heartbeat, after which a holder on another host counts as lost
ENDING_SECONDS = 600  # for which a start waits for a run that is saving and stopping
SETTLE_SECONDS = 1  # after which the last of two concurrent writers holds the lock
POLL_SECONDS = 1.0


class InUseError(BlockingIOError):
    """Another run is active in the folder."""


class StillEndingError(Exception):
    """The previous run in the folder is still saving its state; start again later."""


class RunLock:
    """A run's lock on its folders, held by process 0; a no-op on all other processes."""

    def __init__(self, locks: Sequence["_Lock"]):
        self._locks = locks

    def ending(self) -> None:
        """Mark the run as saving and stopping, so that a new start waits for it."""
        for lock in self._locks:
            lock.tell(ending=True)

    def require(self, look: bool = False) -> None:
        """Raise InUseError if another run took over, as it may while a host is suspended; `look` rereads the file."""
        for lock in self._locks:
            if look:
                lock.tell()
            if lock.lost:
                raise InUseError(
                    _in_use(lock.path, lock.lost, "has taken it over, as this run sent no heartbeat for too long")
                )


@contextlib.contextmanager
def hold(folders: Sequence[str | Path], stopped: Callable[[], bool]) -> Iterator[RunLock]:
    """Lock these folders for one run of all processes, for the duration of the block.

    Raises on all processes InUseError if another run is active in one of them, StillEndingError if that run was told to
    stop and is still saving after ten minutes or when this start is `stopped` too. Locks left behind by a dead run are
    taken over.
    """
    with contextlib.ExitStack() as stack:
        locks, kind, fault = [], None, ""
        if jax.process_index() == 0:
            try:
                for folder in dict.fromkeys(str(folder) for folder in folders):
                    lock = _Lock(as_path(folder), stopped)
                    stack.enter_context(lock)
                    locks.append(lock)
            except (OSError, StillEndingError) as error:
                kind, fault = type(error).__name__, str(error)
        kind, fault = distributed.agree([kind, fault])
        if kind:
            raise {"InUseError": InUseError, "StillEndingError": StillEndingError}.get(kind, OSError)(fault)
        yield RunLock(locks)


class _Lock:
    """Lock of one folder; a context manager that waits for it, refreshes it and removes it at the end."""

    def __init__(self, folder: Place, stopped: Callable[[], bool]):
        self.path = folder / LOCK
        self.lost: dict | None = None  # the facts of its new holder
        self._folder, self._stopped, self._made = folder, stopped, False
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._facts = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "ending": False, "beat": 0}
        self._facts |= {"started": _start_of(os.getpid()), "kernel": _kernel(), "token": secrets.token_hex(8)}
        self._mutex = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="run-lock", daemon=True)

    def __enter__(self):
        try:
            self._made = isinstance(self._folder, Path) and not self._folder.exists()
            make_folder(self._folder)
            # A copied folder contains a copy of the lock, but is a different folder.
            self._facts["folder"] = self._folder.stat().st_ino if isinstance(self._folder, Path) else str(self._folder)
            self._take()
        except InUseError:
            raise
        except OSError as error:
            why = error.strerror or error
            raise OSError(
                f"{self.path}: cannot lock the folder for this run ({why}); free disk space or fix permissions"
            ) from error
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join(5 * POLL_SECONDS)  # unresponsive storage must not keep the process alive
        with contextlib.suppress(OSError):
            if (_read(self.path) or {}).get("token") == self._facts["token"]:
                remove(self.path)
            if self._made:
                self._folder.rmdir()  # if the run wrote nothing

    def tell(self, **facts: bool) -> None:
        """Rewrite the lock with these facts, unless another run holds it now."""
        with self._mutex, contextlib.suppress(OSError):  # transient storage errors; the next heartbeat may be in time
            found = _read(self.path)
            if found and found.get("token") != self._facts["token"]:
                self.lost = found
            else:
                self._facts |= facts | {"beat": self._facts["beat"] + 1}
                _write(self.path, self._facts)

    def _send_heartbeats(self) -> None:
        beaten = time.monotonic()
        while not self._end.wait(POLL_SECONDS) and not self.lost:
            ending = self._stopped() and not self._facts["ending"]
            if ending or time.monotonic() - beaten >= HEARTBEAT_SECONDS:
                self.tell(**({"ending": True} if ending else {}))
                beaten = time.monotonic()

    def _take(self) -> None:
        """Acquire the lock if there is none, or that of a dead run; raises as `hold`."""
        begin, seen, changes, told = time.monotonic(), None, -1, False
        while not _create(self.path, self._facts):
            if (found := _read(self.path)) is None:
                continue
            if found != seen:
                seen, changes, changed = found, changes + 1, time.monotonic()
            alive = self._is_alive(found)
            if alive is False or alive is None and time.monotonic() - changed > STALE_SECONDS:
                print(
                    f"{self.path}: the lock of {_holder(found)}, which is no longer running; this run takes it over",
                    file=sys.stderr,
                )
                if _replace(self.path, found, self._facts):
                    return
                continue
            if (alive or changes > 0) and not found.get("ending"):
                raise InUseError(_in_use(self.path, found, "is running there"))
            if self._stopped() or time.monotonic() - begin > ENDING_SECONDS:
                raise StillEndingError(
                    f"{self.path.parent}: {_holder(found)} is still saving; start again when it has finished"
                )
            if not told:
                does = (
                    "is saving before it stops"
                    if found.get("ending")
                    else f"counts as lost after {STALE_SECONDS} s without a heartbeat"
                )
                print(f"{self.path}: waiting for {_holder(found)}, which {does}", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _is_alive(self, found: dict) -> bool | None:
        """Whether the holder of a lock is alive; None if it runs under another kernel, where this cannot be checked."""
        if not found or found.get("kernel") != self._facts["kernel"]:
            return None
        start = _start_of(found.get("process", 0))
        return start is not None and (start, self._facts["folder"]) == (found.get("started"), found.get("folder"))


def _in_use(path: Place, found: dict, does: str) -> str:
    return (
        f"{path.parent}: {_holder(found)} {does}; two runs cannot write to one folder. Wait for it or stop it, or name "
        f"another folder; if it is not a pathflip run, delete {path}"
    )


def _holder(found: dict) -> str:
    if not found:
        return "a process that did not write its name"
    return f"process {found.get('process')} on {found.get('host')} (since {found.get('since')})"


def _kernel() -> list[str]:
    """Identity of the running kernel and of its PID namespace.

    A host name alone is not sufficient: containers are restarted under the same name, on other hosts too.
    """
    with contextlib.suppress(OSError):
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return [socket.gethostname()]


def _start_of(process: int) -> str | None:
    """Start time of a process in kernel ticks, as PIDs are reused; None for one that has ended."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:  # not Linux
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""


def _read(path: Place) -> dict | None:
    """Content of a lock; None if there is none, {} for one that is empty, perhaps still being written."""
    try:
        found = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Place, facts: dict) -> None:
    with atomic_file(path) as file:
        file.write(json.dumps(facts).encode())


def _create(path: Place, facts: dict) -> bool:
    """Create a lock if there is none, and return whether it was created; of concurrent attempts, one succeeds."""
    if is_url(path):
        return _read(path) is None and _replace(path, None, facts)
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(json.dumps(facts))
    except FileExistsError:
        return False
    except OSError:
        if _read(path) == {}:
            path.unlink(missing_ok=True)
        raise
    return True


def _replace(path: Place, found: dict | None, facts: dict) -> bool:
    """Overwrite the lock that was found, and return whether ours persists: of concurrent writers, the last one wins.

    A writer too late to be noticed here is noticed at the next heartbeat, by `tell`.
    """
    if _read(path) != found:
        return False
    _write(path, facts)
    time.sleep(SETTLE_SECONDS)
    return (_read(path) or {}).get("token") == facts["token"]
