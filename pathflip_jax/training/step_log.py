"""Metrics of each step, written while the next step is running, so that the devices never wait."""

import math
import sys
from pathlib import Path

import jax
from tqdm import tqdm

from pathflip_jax.monitoring.goodput import Ledger
from pathflip_jax.monitoring.metrics import MetricsWriter
from pathflip_jax.monitoring.telemetry import USEFUL, Telemetry
from pathflip_jax.runs import files
from pathflip_jax.training.findings import Findings


class StepLog:
    """Log of a run: one row per step, of its metrics, the hardware telemetry, and the validation after it, if any."""

    def __init__(self, writer: MetricsWriter, telemetry: Telemetry, ledger: Ledger, workdir: Path, findings: Findings):
        self.findings = findings
        self._writer, self._telemetry, self._ledger, self._workdir = writer, telemetry, ledger, workdir
        self._pending: tuple[int, dict] | None = None  # a running step, whose metrics have not been waited for

    def follow(self, step: int, metrics: dict) -> None:
        """Take the metrics of the step just dispatched, and write those of the previous step."""
        self.write()
        self._pending = step, metrics

    def write(self, scores: dict[str, float] | None = None) -> None:
        """Write the row of the latest followed step, unless already written; waits for its end.

        Raises FloatingPointError if its loss is not finite.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        row = {name: float(x) for name, x in jax.device_get(metrics).items()} | (scores or {})
        if not math.isfinite(row["loss"]):
            raise FloatingPointError(
                f"step {step}: the loss is {row['loss']}; checkpoints in {self._workdir / files.CHECKPOINTS} were "
                "saved before this step. Start again in another --workdir with a lower --config.optim.learning_rate or "
                "with --config.optim.clip=1.0"
            )
        self._writer.write(step, row | self._telemetry.row(step, row[USEFUL]))
        self._ledger.progress(step)
        for finding in self.findings.add({"step": step} | row):
            if jax.process_index() == 0:
                tqdm.write(f"step {step}: {finding}", file=sys.stderr)

    def flush(self) -> None:
        """Write the last step's row and flush all rows to disk, as a checkpoint must not be ahead of its metrics."""
        self.write()
        self._writer.flush()
