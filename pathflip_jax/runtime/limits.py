"""Memory and CPU limits of this process, from its control groups, its affinity and `ulimit -v`.

Slurm, systemd and containers limit a job in a control group somewhere above the process, rarely at the root: so every
group from the process's own up to the root counts, in both cgroup versions. On systems other than Linux the machine
itself is the limit.
"""

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from pathflip_jax.runtime.ulimits import address_space

_SYSTEM = Path("/")
_HIERARCHY = "sys/fs/cgroup"  # the usual mount point, for containers that hide their mounts


def memory_limit() -> int | None:
    """Memory limit of this process in bytes; None if unknown."""
    limits = [limit for limit, _ in _memory_groups()]
    limits += [limit for limit in (_meminfo("MemTotal"), address_space()) if limit is not None]
    return min(limits, default=None)


def available_memory() -> int | None:
    """Bytes that this process may still allocate; None if unknown."""
    left = [max(limit - used, 0) for limit, used in _memory_groups()]
    if (available := _meminfo("MemAvailable")) is not None:
        left.append(available)
    mapped = _lines(_SYSTEM / "proc/self/statm")
    if mapped and (space := address_space()) is not None:
        left.append(max(space - int(mapped[0].split()[0]) * os.sysconf("SC_PAGE_SIZE"), 0))
    return min(left, default=None)


def processors() -> int:
    """Number of processors that this process may use, at least 1; a fraction left by a quota counts as one."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(quota) for quota in _quotas())]))


def _memory_groups() -> Iterator[tuple[int, int]]:
    """(limit, non-reclaimable bytes in use) of every control group above this process that has a limit."""
    for folder in _groups("memory"):
        limits = [_number(folder / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")]
        used = [_number(folder / name) for name in ("memory.current", "memory.usage_in_bytes")]
        found, counted = [x for x in limits if x is not None], [x for x in used if x is not None]
        if found and counted:
            yield min(found), counted[0] - _files_in_memory(folder)


def _files_in_memory(folder: Path) -> int:
    """Bytes of a group's page cache that the kernel can reclaim immediately."""
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat") if " " in line)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))


def _quotas() -> Iterator[float]:
    """CPU quota, in processors, of each control group above this process."""
    for folder in _groups("cpu"):
        if lines := _lines(folder / "cpu.max"):  # "200000 100000": microseconds of each period, or "max 100000"
            quota, period = lines[0].split()
            if quota != "max":
                yield int(quota) / int(period)
        quota, period = (_number(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and quota > 0 and period:
            yield quota / period


def _groups(controller: str) -> list[Path]:
    """Folders of this process's group and its ancestors, in every hierarchy that may limit `controller`."""
    folders: dict[Path, None] = {}
    for line in _lines(_SYSTEM / "proc/self/cgroup"):  # "4:memory:/path", or "0::/path" in version 2
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        for root, place in _mounts(controller, controllers):
            inside = PurePosixPath(path)
            # A container often sees only a part of the hierarchy, under a path given relative to the root of the whole.
            inside = inside.relative_to(root if inside.is_relative_to(root) else "/")
            own = place if ".." in inside.parts else place / inside
            above = [folder for folder in (own, *own.parents) if folder.is_relative_to(place)]
            folders |= dict.fromkeys(folder for folder in above if folder.is_dir())
    return list(folders)


def _mounts(controller: str, controllers: str) -> Iterator[tuple[str, Path]]:
    """(root within the hierarchy, folder) of each mount, with `controllers` in version 1 and without in version 2."""
    for line in _lines(_SYSTEM / "proc/self/mountinfo"):
        mount, _, system = line.partition(" - ")
        root, place = mount.split()[3:5]
        kind, _, options = system.split(" ", 2)
        if kind == ("cgroup" if controllers else "cgroup2") and (not controllers or controller in options.split(",")):
            yield root, _SYSTEM / place.lstrip("/")
    names = (controller, controllers) if controllers else ("", "unified")
    yield from (("/", _SYSTEM / _HIERARCHY / name) for name in names)


def _meminfo(name: str) -> int | None:
    lines = _lines(_SYSTEM / "proc/meminfo")
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


def _number(path: Path) -> int | None:
    """Number in a kernel file; None for "max", and for a file that is missing or holds anything else."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
