"""Parity with the released models' outputs and gradients on the device, in every precision that it offers."""

import importlib
import sys
from pathlib import Path

from accelerator_parts import CURE, FAULT, Context, Row, Rows

TESTS = Path(__file__).resolve().parents[2] / "tests"
CASES = ("base", "pathflip2")


def run(context: Context) -> Rows:
    """One row per output, and one for the worst gradient, of each released model in each precision."""
    import jax

    sys.path.insert(0, str(TESTS))
    released = importlib.import_module("parity")
    # float32 products run as TF32 on a GPU and as bfloat16 on a TPU, unless the highest precision is requested.
    precisions = [
        ("float32", "float32", "highest", released.FLOAT32),
        ("float32 as it comes", "float32", "default", released.FLOAT32 if _exact(jax) else released.BFLOAT16),
        ("bfloat16", "bfloat16", "default", released.BFLOAT16),
    ]
    for case in CASES:
        for name, dtype, precision, tolerances in precisions:
            if name == "float32 as it comes" and _exact(jax):
                continue  # a CPU has only the highest precision
            with jax.default_matmul_precision(precision):
                rows = released.compare(TESTS / "golden" / case, dtype, tolerances)
            yield from _summarise(f"{case} in {name}", rows)


def _exact(jax) -> bool:
    return jax.default_backend() == "cpu"


def _summarise(case: str, rows: list) -> Rows:
    gradients = [row for row in rows if row.name.startswith(("d loss", "gradient"))]
    for row in rows:
        if row not in gradients:
            yield Row("outputs", {"case": case, "output": row.name} | _figures(row, ""))
    if gradients:
        worst = max(gradients, key=lambda row: row.error / row.tolerance)
        bad = sum(not row.ok for row in gradients)
        name = f"{len(gradients)} gradients; the worst: {worst.name}"
        yield Row(
            "outputs",
            {"case": case, "output": name} | _figures(worst, f" ({bad} of {len(gradients)} gradients exceed theirs)"),
        )


def _figures(row, more: str) -> dict:
    found = {"error": row.error, "tolerance": row.tolerance, "largest": row.largest}
    if not row.ok:
        found |= {
            FAULT: f"{row.name} differs by {row.error:.1e}, at most {row.tolerance:.1e} is allowed{more}",
            CURE: "unset XLA_FLAGS that change arithmetic; otherwise report the device's kind and this file",
        }
    return found
