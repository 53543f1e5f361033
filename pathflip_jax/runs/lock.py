"""One run in a folder at a time: a lock in the run folder, and in that of `train.checkpoints`, which hosts may share.

The lock is a file, run.lock, that says who holds it and that its holder writes anew every ten seconds. On the host of
the holder a start sees whether that process lives; on another one, whether the file still changes, whatever the clocks
of the two say. A lock of the kernel (fcntl, flock, and the libraries around them) would end with its process, but many
file systems of clusters keep such a lock on one host without a word (NFS mounted with `nolock`, Lustre with
`localflock`, BeeGFS as it comes), and buckets have none. A file is seen by all hosts and in buckets too.
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

from pathflip_jax.data.storage.files import Place, as_path, is_url, make_folder, read_bytes, remove
from pathflip_jax.data.storage.whole_files import whole_file
from pathflip_jax.runtime import distributed

LOCK = "run.lock"
BEAT_SECONDS = 10  # between two signs of life
STALE_SECONDS = 120  # without one: the holder, on another host, is gone
ENDING_SECONDS = 600  # that a start waits for a run that saves and stops
SETTLE_SECONDS = 1  # after which the last of two who wrote at once is the one that stands there
POLL_SECONDS = 1.0


class InUseError(BlockingIOError):
    """Another run is at work in the folder."""


class StillEndingError(Exception):
    """The run before this one in the folder still saves its state; start again later."""


class RunLock:
    """The hold of a run on its folders, which process 0 has; what the other processes have does nothing."""

    def __init__(self, locks: Sequence["_Lock"]):
        self._locks = locks

    def ending(self) -> None:
        """Tell starts that come now that this run saves and stops, and is worth waiting for."""
        for lock in self._locks:
            lock.tell(ending=True)

    def require(self, look: bool = False) -> None:
        """Raise InUseError where another run has taken over, as of a host that was suspended; `look` reads the file."""
        for lock in self._locks:
            if look:
                lock.tell()
            if lock.lost:
                raise InUseError(_in_use(lock.path, lock.lost, "took it over, as this run was not heard of for long"))


@contextlib.contextmanager
def hold(folders: Sequence[str | Path], stopped: Callable[[], bool]) -> Iterator[RunLock]:
    """Hold these folders for one run of all processes, while the block lasts.

    Raises on all processes InUseError where another run is at work in one of them, StillEndingError where that one was
    told to stop and still saves after ten minutes or when this start is `stopped` too. What a run that is gone left is
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
    """The lock of one folder; a context manager, which waits for it, keeps it alive and takes it away again."""

    def __init__(self, folder: Place, stopped: Callable[[], bool]):
        self.path = folder / LOCK
        self.lost: dict | None = None  # who has it now
        self._folder, self._stopped, self._made = folder, stopped, False
        since = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        self._facts = {"host": socket.gethostname(), "process": os.getpid(), "since": since, "ending": False, "beat": 0}
        self._facts |= {"started": _start_of(os.getpid()), "kernel": _kernel(), "token": secrets.token_hex(8)}
        self._mutex = threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._stay_alive, name="run-lock", daemon=True)

    def __enter__(self):
        try:
            self._made = isinstance(self._folder, Path) and not self._folder.exists()
            make_folder(self._folder)
            # A copy of the folder has a copy of its lock, and is another folder.
            self._facts["folder"] = self._folder.stat().st_ino if isinstance(self._folder, Path) else str(self._folder)
            self._take()
        except InUseError:
            raise
        except OSError as error:
            why = error.strerror or error
            raise OSError(f"{self.path}: the run cannot be locked ({why}); free space or mend permissions") from error
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        self._thread.join(5 * POLL_SECONDS)  # storage that does not answer keeps no process alive
        with contextlib.suppress(OSError):
            if (_read(self.path) or {}).get("token") == self._facts["token"]:
                remove(self.path)
            if self._made:
                self._folder.rmdir()  # where the run came to write nothing

    def tell(self, **facts: bool) -> None:
        """Write the lock anew, with these facts, unless somebody else has it now."""
        with self._mutex, contextlib.suppress(OSError):  # storage may fail in passing; the next time may be in time
            found = _read(self.path)
            if found and found.get("token") != self._facts["token"]:
                self.lost = found
            else:
                self._facts |= facts | {"beat": self._facts["beat"] + 1}
                _write(self.path, self._facts)

    def _stay_alive(self) -> None:
        beaten = time.monotonic()
        while not self._end.wait(POLL_SECONDS) and not self.lost:
            ending = self._stopped() and not self._facts["ending"]
            if ending or time.monotonic() - beaten >= BEAT_SECONDS:
                self.tell(**({"ending": True} if ending else {}))
                beaten = time.monotonic()

    def _take(self) -> None:
        """Write the lock where there is none or that of a run that is gone; raises as `hold`."""
        begin, seen, changes, told = time.monotonic(), None, -1, False
        while not _create(self.path, self._facts):
            if (found := _read(self.path)) is None:
                continue
            if found != seen:
                seen, changes, changed = found, changes + 1, time.monotonic()
            lives = self._lives(found)
            if lives is False or lives is None and time.monotonic() - changed > STALE_SECONDS:
                print(f"{self.path}: of {_holder(found)}, which is gone; this run goes on", file=sys.stderr)
                if _replace(self.path, found, self._facts):
                    return
                continue
            if (lives or changes > 0) and not found.get("ending"):
                raise InUseError(_in_use(self.path, found, "is at work there"))
            if self._stopped() or time.monotonic() - begin > ENDING_SECONDS:
                raise StillEndingError(f"{self.path.parent}: {_holder(found)} still saves; start again when it has")
            if not told:
                does = (
                    "saves and stops" if found.get("ending") else f"counts as gone after {STALE_SECONDS} s of silence"
                )
                print(f"{self.path}: waiting for {_holder(found)}, which {does}", file=sys.stderr, flush=True)
                told = True
            time.sleep(POLL_SECONDS)

    def _lives(self, found: dict) -> bool | None:
        """Whether the holder of a lock lives; None where it is of another kernel, and nobody can tell from here."""
        if not found or found.get("kernel") != self._facts["kernel"]:
            return None
        start = _start_of(found.get("process", 0))
        return start is not None and (start, self._facts["folder"]) == (found.get("started"), found.get("folder"))


def _in_use(path: Place, found: dict, does: str) -> str:
    return (
        f"{path.parent}: {_holder(found)} {does}; two runs cannot write to one folder. Wait for it or stop it, or name "
        f"another folder; if it is no run of pathflip, delete {path}"
    )


def _holder(found: dict) -> str:
    if not found:
        return "a run that did not write who it is"
    return f"process {found.get('process')} on {found.get('host')} (since {found.get('since')})"


def _kernel() -> list[str]:
    """The running kernel and the namespace that its processes are numbered in.

    A host name alone will not do: containers are started again under their name, on other hosts too.
    """
    with contextlib.suppress(OSError):
        return [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return [socket.gethostname()]


def _start_of(process: int) -> str | None:
    """When a process started, as its kernel counts; None for one that is gone. Numbers of processes come again."""
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
    """What a lock says; None where there is none, {} for one that says nothing, perhaps not yet."""
    try:
        found = json.loads(read_bytes(path))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Place, facts: dict) -> None:
    with whole_file(path) as file:
        file.write(json.dumps(facts).encode())


def _create(path: Place, facts: dict) -> bool:
    """Write a lock where there is none, and say whether this was so; of several that try at once, one does."""
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
    """Write a lock over the one that was found, and say whether it stands: of several who do, the last one has it.

    One who comes too late to be seen here is seen at the next sign of life, by `tell`.
    """
    if _read(path) != found:
        return False
    _write(path, facts)
    time.sleep(SETTLE_SECONDS)
    return (_read(path) or {}).get("token") == facts["token"]
