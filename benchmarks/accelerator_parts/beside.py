"""Comparison with PyTorch on the same device, from the same weights, by `step.py` and `generation.py`."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

from accelerator_parts import CURE, Context, Row, Rows

BENCHMARKS = Path(__file__).resolve().parents[1]
TORCH_DEVICE = {"cpu": "cpu", "gpu": "cuda"}
SLIDES, ROUNDS = 8, 2
DECODER = ["--width=2048", "--layers=28", "--batches", "1", "8", "--dtypes", "bfloat16"]


def why_not_compared(context: Context) -> dict | None:
    """Note, with the cure, that PyTorch is missing or does not see the device; None if it can be compared with."""
    torch = context.device.get("torch", "not installed")
    if context.platform == "tpu":
        return {"note": f"not compared with PyTorch: torch ({torch}) does not see a TPU", CURE: "compare on a GPU"}
    if context.platform == "gpu" and torch.endswith("cpu"):
        cure = "pip install torch==2.13.0 in its build for this CUDA, or bring that wheel along (accelerator.sh)"
        note = f"not compared with PyTorch: torch ({torch}) does not see {context.device.get('kind')}"
        return {"note": note, CURE: cure}
    if torch == "not installed":
        return {"note": "not compared with PyTorch: torch is not installed", CURE: "pip install 'pathflip-jax[torch]'"}
    return None


def run(context: Context, family: str, jobs: list[str]) -> Rows:
    """Ratios of jobs of `step.py` (above 1, ours is better) and the agreement of the sides."""
    if missing := why_not_compared(context):
        yield Row("not compared", missing)
        return
    command = [f"--family={family}", "--jobs", *(jobs[:1] if context.small else jobs), f"--dtype={context.dtype}"]
    if context.small:
        command += ["--small", "--batch=2", "--regions=2", "--rounds=1"]
        if "train_base" not in jobs:  # the training jobs run all sides
            command += ["--sides", "ours", "released"]
    else:
        command += [f"--batch={SLIDES}", f"--rounds={ROUNDS}"]
    found = call("step.py", command, context)
    settings = found["settings"]
    yield Row("agreement", {"sides": ", ".join(settings["sides"]), "largest difference": settings["agreement"]})
    for job, by_side in found["times"].items():
        for side, seconds in by_side.items():
            suffix = "" if side in ("ours", settings["sides"][1]) else f"_{side}"
            row = {"job": job, "side": side, "ms": 1e3 * statistics.median(seconds)}
            row["memory_gb"] = statistics.median(found["peak_bytes"][job][side]) / 1e9
            if side != "ours":
                row["ours_times_as_fast"] = found["ratios"][job + suffix]
                row["times_less_memory"] = found["ratios"].get(f"memory_{job}{suffix}")
            yield Row(f"beside PyTorch, {context.dtype}", row)


def run_generation(context: Context) -> Rows:
    """Decoder prefill and decoding compared with transformers."""
    if missing := why_not_compared(context):
        yield Row("not compared", missing)
        return
    small = ["--small", "--rounds=1", "--batches", "1", "--dtypes", "float32"]
    command = small if context.small else [*DECODER, "--rounds=1"]
    found = call("generation.py", command, context)
    for case, sides in found["times"].items():
        for side, rows in sides.items():
            row = {"case": case, "side": side, "prefill_ms": 1e3 * min(row["prefill"] for row in rows)}
            row["token_ms"] = 1e3 * min(row["token"] for row in rows)
            if side != "ours":
                row |= {
                    f"ours_{part}_times_as_fast": found["ratios"][f"{part}_{case}"] for part in ("prefill", "token")
                }
            yield Row("beside transformers", row)


def call(script: str, arguments: list[str], context: Context) -> dict:
    """JSON result of a benchmark run on this device. Raises RuntimeError with its last output if it fails."""
    out = context.work / f"{Path(script).stem}.json"
    command = [sys.executable, str(BENCHMARKS / script), *arguments, f"--device={TORCH_DEVICE[context.platform]}"]
    done = subprocess.run([*command, "--json", str(out)], stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{script} failed:\n{done.stderr[-3000:]}")
    return json.loads(out.read_text())
