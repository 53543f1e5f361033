"""Rows of metrics: a step's is written during the next one, exactly once, and never for a non-finite loss."""

from types import SimpleNamespace

import numpy as np
import pytest

from pathflip_jax.monitoring.telemetry import USEFUL
from pathflip_jax.training.findings import Findings
from pathflip_jax.training.step_log import StepLog


@pytest.fixture
def log(tmp_path):
    """A log, and what it did in order."""
    did = []
    writer = SimpleNamespace(write=lambda step, row: did.append((step, row)), flush=lambda: did.append("flush"))
    telemetry = SimpleNamespace(row=lambda step, useful: {"perf/x": useful / 2})
    ledger = SimpleNamespace(progress=lambda step: did.append(step))
    return StepLog(writer, telemetry, ledger, tmp_path, Findings("val/loss")), did


def metrics(loss: float) -> dict:
    return {"loss": np.float32(loss), USEFUL: np.float32(8)}


def test_a_step_is_written_with_the_next_or_with_its_validation_and_once(log):
    log, did = log
    log.follow(1, metrics(3))
    assert did == []
    log.follow(2, metrics(2))
    first = {"loss": 3.0, USEFUL: 8.0, "perf/x": 4.0}
    assert did == [(1, first), 1]
    log.write({"val/loss": 1.0})
    log.write()
    assert did[2:] == [(2, first | {"loss": 2.0, "val/loss": 1.0}), 2]
    log.follow(3, metrics(1))
    log.flush()
    assert [x for x in did[4:] if not isinstance(x, tuple)] == [3, "flush"]


def test_a_loss_that_is_no_number_ends_the_run_unwritten(log, tmp_path):
    log, did = log
    log.follow(7, metrics(np.inf))
    with pytest.raises(FloatingPointError, match=f"step 7: the loss is inf; checkpoints in {tmp_path}"):
        log.flush()
    assert did == []
