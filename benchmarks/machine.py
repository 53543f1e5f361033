"""Description of the machine, and memory use of the benchmark's process."""

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
    """Processor, memory and cores that this process may use, load and versions; with `folder`, its file system."""
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
    """Let this process retain freed memory, where the C library allows it (glibc); call before any thread starts.

    Eager PyTorch takes and frees gigabytes a step, and the system would map new pages and clear them each time: a
    quarter of the yardstick's step. Ours hardly gains by it.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        for parameter, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1)):
            libc.mallopt(parameter, value)


def reset_peak() -> None:
    """Reset VmHWM to the present resident size. Raises OSError where the kernel does not allow it.

    What the compiler has freed goes back first: the step would fill it again, and less the larger the step.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def resident_peak() -> int:
    """The highest resident size since `reset_peak`, in bytes; of the process's whole life where there is no /proc."""
    if not Path("/proc/self/status").exists():
        return _getrusage_peak(resource.RUSAGE_SELF)
    # Not what getrusage tells on Linux: that begins at the size of the process that started this one.
    return next(int(line.split()[1]) * 1024 for line in _lines("/proc/self/status") if line.startswith("VmHWM:"))


def largest_child() -> int:
    """Peak memory of any ended child of this process, in bytes."""
    return _getrusage_peak(resource.RUSAGE_CHILDREN)


def _getrusage_peak(whose: int) -> int:
    return resource.getrusage(whose).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
