"""Parts of `accelerator.py`, in order of their importance for a session on an accelerator."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

FAULT, CURE = "fault", "cure"  # keys of a row


class Row(NamedTuple):
    """Row of one of a part's tables; with the key `FAULT` it fails the part, which still continues."""

    table: str
    values: dict[str, Any]


Rows = Iterator[Row]


class Part(NamedTuple):
    """Measurement in a separate process: `target` is the "module:function" that yields its rows."""

    title: str
    target: str
    arguments: dict[str, Any] = {}
    limit: float | None = None  # seconds; None: the common limit


@dataclass(frozen=True)
class Context:
    """Input of a part: sizes, a working folder, and the device as found by the first part."""

    small: bool
    work: Path
    limit: float
    device: dict[str, Any] = field(default_factory=dict)

    @property
    def platform(self) -> str:
        """JAX platform name: cpu, gpu or tpu."""
        return self.device.get("platform", "cpu")

    @property
    def dtype(self) -> str:
        """Fastest dtype of the device; a CPU gains nothing from bfloat16."""
        return "float32" if self.platform == "cpu" else "bfloat16"


def _part(title: str, target: str, limit: float | None = None, **arguments) -> Part:
    return Part(title, f"accelerator_parts.{target}", arguments, limit)


DEVICE = "device"
PARTS = {
    DEVICE: _part("The device, its driver and versions", "device:run"),
    "parity": _part("Parity with the released models", "parity:run"),
    "step-pathflip": _part("Train step of PathFLIP", "steps:run", family="pathflip"),
    "step-pathflip2": _part("Train step of PathFLIP2", "steps:run", family="pathflip2"),
    "beside-pathflip": _part("PathFLIP compared with PyTorch", "beside:run", family="pathflip", jobs=["train_base"]),
    "beside-pathflip2": _part("PathFLIP2 compared with PyTorch", "beside:run", family="pathflip2", jobs=["train_base"]),
    "beside-encode": _part(
        "Encoding compared with PyTorch", "beside:run", family="pathflip", jobs=["encode_slide_base", "encode_text"]
    ),
    "encode": _part("Encoding slides and texts", "encode:run"),
    "extract-vit-l": _part("Slides to features by a ViT-L/16", "extract:run", 900.0, encoder="uni_v1"),
    "extract-vit-g": _part("Slides to features by a ViT-g/14", "extract:run", 900.0, encoder="hoptimus0"),
    "generation": _part("Generation", "generation:run"),
    "beside-generation": _part("Generation compared with transformers", "beside:run_generation"),
    "time-to-train": _part("Time to train", "runs:time_to_train"),
    "deterministic": _part("Deterministic mode", "runs:deterministic"),
    "resume": _part("Save, kill and resume", "runs:resume"),
    "memory": _part("Memory check of a step", "memory:run"),
    "input": _part("Waiting for input", "runs:wait_for_input"),
    "embed": _part("Embedding an archive", "runs:embed"),
    "meshes": _part("Meshes of several devices", "meshes:run"),
    "workarounds-pathflip": _part("CPU workarounds in PathFLIP's step", "workarounds:run", family="pathflip"),
    "workarounds-pathflip2": _part("CPU workarounds in PathFLIP2's step", "workarounds:run", family="pathflip2"),
}
