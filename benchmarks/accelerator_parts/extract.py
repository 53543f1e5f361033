"""Slides to features by a published patch encoder, compared with torch loops over timm, by `extract.py`."""

import json
import os
import statistics
import subprocess
import sys
from importlib.util import find_spec

import extract as benchmark

from accelerator_parts import CURE, Context, Row, Rows
from accelerator_parts.beside import TORCH_DEVICE, why_not_compared

EDGE, SMALL_EDGE = 10240, 640  # mean edge of the slides in pixels


def run(context: Context, encoder: str) -> Rows:
    """Speed of each side, end to end and of the network alone, and the agreement of the features."""
    if missing := why_not_compared(context) or _missing():
        yield Row("not compared", missing)
        return
    out, half = context.work / "extract.json", context.dtype == "bfloat16"
    command = [sys.executable, benchmark.__file__, f"--encoder={encoder}", f"--device={TORCH_DEVICE[context.platform]}"]
    command += [f"--work={context.work.parent / 'extract'}", f"--json={out}", "--repeats=1"] + ["--half"] * half
    command += ["--small", "--count=2", "--batch=8", "--workers=1"] if context.small else []
    command.append(f"--edge={SMALL_EDGE if context.small else EDGE}")
    environment = os.environ.copy()
    if context.small:  # a network of full width takes longer to run without optimisations than to compile
        environment.pop("XLA_FLAGS", None)
    done = subprocess.run(command, env=environment, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"extract.py failed:\n{done.stderr[-3000:]}")
    yield from rows(encoder, *json.loads(out.read_text())["measured"].values())


def rows(encoder: str, found: dict) -> Rows:
    """Rows of a result of `extract.py`."""
    for side, runs in found["runs"].items():
        stage, agreement = found["stages"][side], found["agreement"].get(side, {})
        row = {"side": side, "patches": found["patches"]}
        row["per_second"] = statistics.median(found["patches"] / run["seconds"] for run in runs)
        row["busy_share"] = runs[0].get("busy_share")
        row |= {"ours_times_as_fast": found["ratios"].get(side), "network_per_second": stage["network"]}
        row |= {"network_utilisation": stage["share_of_peak"], "transform_per_second": stage["transform"]}
        yield Row(f"slides to features, {encoder}", row | {"least_cosine": agreement.get("min")})
    yield Row("decoding, patches per core second", found["stages"]["decode"])


def _missing() -> dict | None:
    if benchmark.PACKAGES_FOLDER or (find_spec("timm") and find_spec("torchvision")):
        return None
    return {"note": "not compared with timm: it is not installed", CURE: "pip install timm torchvision"}
