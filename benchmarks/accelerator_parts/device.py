"""Device report: JAX's kind, memory, driver and versions, and whether PyTorch sees the same device."""

import glob
import importlib.metadata
import shutil
import subprocess
import sys

from accelerator_parts import CURE, FAULT, Context, Row, Rows
from accelerator_parts.explain import explain
from pathflip_jax.monitoring.telemetry import PEAK_BFLOAT16

# Bytes per second of a whole device's memory, by `device_kind`; sources as of telemetry.PEAK_BFLOAT16.
BANDWIDTH = {
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.819e12,
    "TPU v5e": 0.819e12,
    "TPU v5": 2.765e12,
    "TPU v5p": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU v6e": 1.64e12,
    "NVIDIA A100-SXM4-40GB": 1.555e12,
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA A100-PCIE-40GB": 1.555e12,
    "NVIDIA A100 80GB PCIe": 1.935e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H100 PCIe": 2.0e12,
    "NVIDIA H200": 4.8e12,
    "NVIDIA L40S": 0.864e12,
    "NVIDIA GeForce RTX 4090": 1.008e12,
}
QUERY = "name,driver_version,memory.total,memory.used"
TABLE = "device"


def run(context: Context) -> Rows:
    """One row of facts, with a fault where an accelerator is present but JAX does not use it."""
    import jax
    from jax.extend import backend

    card = _card()
    facts = {"platform": "cpu", "kind": "none", "count": 0, "driver": _driver(card), "card": card}
    facts["torch"] = _torch()
    try:
        devices = jax.devices()
    except RuntimeError as error:
        fault = explain(1, str(error), facts, "the log of this part")
        yield Row(TABLE, facts | {FAULT: f"JAX cannot open a device: {fault.what}", CURE: fault.cure})
        return
    device = devices[0]
    if device.platform == "tpu":
        facts["driver"] = f"libtpu {importlib.metadata.version('libtpu')}"
    stats = device.memory_stats() or {}
    facts |= {
        "platform": device.platform,
        "kind": device.device_kind,
        "count": len(devices),
        "memory_bytes": stats.get("bytes_limit"),
        "runtime": " ".join(backend.get_backend().platform_version.split()),
        "peak_bfloat16": PEAK_BFLOAT16.get(device.device_kind),
        "bandwidth": BANDWIDTH.get(device.device_kind),
    }
    yield Row(TABLE, facts | _unused(device.platform, card))


def _card() -> str | None:
    """GPUs as reported by the NVIDIA driver; None without one."""
    if not shutil.which("nvidia-smi"):
        return None
    asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True)
    return (done.stdout.strip() or done.stderr.strip() or f"nvidia-smi ended with {done.returncode}").replace(
        "\n", "; "
    )


def _driver(card: str | None) -> str | None:
    return card.split(",")[1].strip() if card and card.count(",") >= 3 else None


def _unused(platform: str, card: str | None) -> dict[str, str]:
    """Fault of an accelerator that is present while JAX runs on the CPU."""
    if platform != "cpu":
        return {}
    if card:
        return {
            FAULT: f"a GPU is present ({card}), but JAX uses the CPU",
            CURE: "pip install 'pathflip-jax[gpu]' (CUDA 12, driver 525 or newer); JAX_PLATFORMS must not be cpu",
        }
    if chips := glob.glob("/dev/accel*"):
        return {
            FAULT: f"a TPU is present ({len(chips)} chips), but JAX uses the CPU",
            CURE: "pip install 'pathflip-jax[tpu]'; JAX_PLATFORMS must not be cpu",
        }
    return {}


def _torch() -> str:
    """PyTorch's version and device, queried in another process, so that no memory stays allocated."""
    seen = "torch.cuda.get_device_name() if torch.cuda.is_available() else 'cpu'"
    ask = f"import torch; print(torch.__version__, 'on', {seen})"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", ask], capture_output=True, text=True)
    return done.stdout.strip() or "not installed"
