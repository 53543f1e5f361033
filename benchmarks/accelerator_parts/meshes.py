"""Losses and gradients on all devices compared with one device, on the meshes of the eight-device test."""

import os
import subprocess
import sys
from pathlib import Path

from accelerator_parts import CURE, FAULT, Context, Row, Rows

EIGHT_DEVICES = Path(__file__).resolve().parents[2] / "tests/runtime/eight_devices.py"
LOSSES = ("released", "pairs")
MOST = 8  # devices that the test's batch of slides is made for
HOST_DEVICES = "--xla_force_host_platform_device_count"


def meshes(devices: int) -> list[str]:
    """Data, fsdp and region axes over that many devices: one axis at a time, then two."""
    half = devices // 2
    found = [f"{devices}x1x1", f"1x{devices}x1", f"{half}x2x1", f"{half}x1x2"]
    return list(dict.fromkeys(found + ([f"{devices // 4}x2x2"] if devices % 4 == 0 else [])))


def run(context: Context) -> Rows:
    """One row per loss; on a CPU, with eight virtual devices."""
    devices = MOST if context.platform == "cpu" else context.device.get("count", 1)
    if devices < 2 or MOST % devices:
        found = f"{devices} x {context.device.get('kind')}"
        yield Row("meshes", {"note": f"not run: found {found}, expected 2, 4 or {MOST} devices"})
        return
    environment = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
    if context.platform == "cpu":
        environment["XLA_FLAGS"] = f"{environment.get('XLA_FLAGS', '')} {HOST_DEVICES}={devices}".strip()
    chosen = meshes(devices)[2:4] if context.small else meshes(devices)
    for loss in LOSSES[:1] if context.small else LOSSES:
        folder = context.work / loss
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(EIGHT_DEVICES), str(folder), "1", loss, *chosen]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        row = {"loss": loss, "devices": devices, "meshes": ", ".join(chosen), "same as on one": done.returncode == 0}
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no output"]
            row |= {FAULT: f"{loss} on {devices} devices: {lines[-1]}", CURE: f"run {' '.join(command[1:])}"}
        yield Row("meshes", row)
