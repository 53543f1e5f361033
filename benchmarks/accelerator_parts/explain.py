"""Explanation of a part's failure, in one line with the cure, from its process's exit code and log."""

import re
import signal
from typing import NamedTuple

GIB = 2**30
DRIVERS = "CUDA 12 needs driver 525 or newer, CUDA 13 driver 580 or newer"  # JAX's installation page


class Fault(NamedTuple):
    """Fault, with what was found, what was expected, and the cure."""

    what: str
    cure: str


def explain(code: int, said: str, device: dict, log: str) -> Fault:
    """Fault of a process that ended with an exit code (-N for signal N); `said` is the end of its output.

    `device` is the result of the first part, {} if there is none; `log` is the path of the complete log.
    """
    for known in (_busy, _driver, _memory, _module):
        if fault := known(said, device):
            return fault
    if code == -signal.SIGKILL:
        what = "ended by SIGKILL, probably by the kernel because the process used too much of the host's memory"
        return Fault(what, "run this part alone (--part), on a host with more memory or with --small")
    if code < 0:
        return Fault(
            f"crashed: {signal.Signals(-code).name}", f"read its last output in {log}; run it again with --part"
        )
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(" ")]
    return Fault(_shorten(lines[-1] if lines else f"exit code {code}"), f"read the complete output in {log}")


def _shorten(line: str, most: int = 400) -> str:
    line = " ".join(line.split())
    return line if len(line) <= most else line[: most - 1] + "…"


def _line_of(said: str, match: re.Match) -> str:
    start, end = said.rfind("\n", 0, match.start()) + 1, said.find("\n", match.end())
    return _shorten(said[start : end if end >= 0 else None])


def _busy(said: str, device: dict) -> Fault | None:
    found = re.search(r"The TPU is already in use by (?:process with pid (\d+)|[^\n]*)|libtpu_lockfile", said)
    if not found:
        return None
    holder = f"process {found[1]} holds" if found[1] else "another process holds"
    return Fault(
        f"{holder} the TPU, which only one process can use at a time",
        f"end {f'process {found[1]}' if found[1] else 'that process'} or wait for it, then run this command again",
    )


def _driver(said: str, device: dict) -> Fault | None:
    found = re.search(
        r"driver version is (?:insufficient|older)|CUDA_ERROR_(?:SYSTEM_DRIVER_MISMATCH|COMPAT_NOT_SUPPORTED|"
        r"INVALID_PTX_VERSION|UNSUPPORTED_PTX_VERSION)|forward compatibility was attempted|"
        r"driver/library version mismatch|driver does not support",
        said,
        re.IGNORECASE,
    )
    if not found:
        return None
    there = f"driver {device['driver']}" if device.get("driver") else "the installed driver"
    return Fault(
        f"{there} does not fit JAX's CUDA ({_line_of(said, found)}); {DRIVERS}",
        "update the driver, or install the wheels of an older CUDA: pip install 'pathflip-jax[gpu]' (jax[cuda12])",
    )


def _memory(said: str, device: dict) -> Fault | None:
    found = re.search(r"RESOURCE_EXHAUSTED|CUDA_ERROR_OUT_OF_MEMORY|OutOfMemoryError|MemoryError|out of memory", said)
    if not found:
        return None
    bytes_here = device.get("memory_bytes")
    there = f"the device has {bytes_here / GIB:.1f} GiB for this process" if bytes_here else "the device is too small"
    asked = re.search(r"(?:allocate|allocating)[^\n]*?([\d.]+ ?[KMGT]?i?B|\d+ bytes)", said, re.IGNORECASE)
    needed = f", {asked[1]} more were requested" if asked else ""
    return Fault(
        f"out of memory: {there}{needed} ({_line_of(said, found)})",
        "use a device with more memory, end other programs on it, or pass --small",
    )


def _module(said: str, device: dict) -> Fault | None:
    found = re.search(r"(?:ModuleNotFoundError: No module named '([\w.]+)'|^([\w.]+) is missing, )", said, re.MULTILINE)
    if not found:
        return None
    name = found[1] or found[2]
    return Fault(
        f"the package {name} is not installed here", f"pip install {name}, or bring its wheel along (accelerator.sh)"
    )
