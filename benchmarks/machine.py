"""Description of the machine, and memory use of the benchmark process."""

import ctypes
import os
import platform
import resource
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pathflip_jax.runtime import limits

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8  # parameters of mallopt (malloc.h)


def describe(*packages: str, folder: Path | None = None) -> dict:
    """Processor, memory and cores available to this process, load, versions; with `folder`, its file system."""
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if "model name" in line]
    memory = limits.memory_limit() or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    versions = {}
    for name in packages:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    found = {
        "cpu": cpu[0] if cpu else platform.processor(),
        "cores": limits.processors(),
        "memory_gb": round(memory / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
    if folder is not None:
        mounts = [line.split()[1:3] for line in _lines("/proc/mounts")]
        inside = [m for m in mounts if folder.resolve().is_relative_to(m[0])]
        found["filesystem"] = max(inside, key=lambda m: len(m[0]))[1] if inside else ""
    return found


def keep_freed() -> None:
    """Let this process retain freed memory, if the C library allows it (glibc); call before any thread starts.

    Eager PyTorch allocates and frees gigabytes per step, and the system would map and clear new pages each time, which
    takes a quarter of the step of the released side. Our side hardly gains from this.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def reset_peak() -> None:
    """Reset VmHWM to the current resident size. Raises OSError if the kernel does not allow it.

    Memory freed by the compiler is first returned to the system: otherwise the step would reuse it without raising the
    peak, to an extent that depends on the size of the step.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """Peak resident size since `reset_peak`, in bytes; without /proc, since the start of the process."""
    if not Path("/proc/self/status").exists():
        return _getrusage_peak(resource.RUSAGE_SELF)
    # Not getrusage on Linux: its peak starts at the size of the process that started this one.
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmHWM:"))


def largest_child() -> int:
    """Largest peak memory of the ended child processes, in bytes."""
    return _getrusage_peak(resource.RUSAGE_CHILDREN)


def _getrusage_peak(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
