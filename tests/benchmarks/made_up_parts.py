"""Parts for test_accelerator.py, which the benchmark runs in separate processes."""

import os
import sys
import time

from accelerator_parts import CURE, FAULT, Row


def device(context, kind="made up"):
    yield Row("device", {"platform": "gpu", "kind": kind, "count": 1, "driver": "510.1", "memory_bytes": 2**30})


def counts(context, upto=3):
    for number in range(upto):
        yield Row("growing batches", {"slides": 2**number, "slides_per_second": 1.0, "utilisation": 0.4,
                                      "peak_gb": 1.0, "planned_gb": 1.1, "step_ms": context.limit})  # fmt: skip


def finds_a_fault(context):
    yield Row("outputs", {"error": 0.5, FAULT: "slide_features is off by 5e-01", CURE: "mend it"})
    yield Row("outputs", {"error": 0.0})


def raises(context, message):
    yield Row("before", {"n": 1})
    raise RuntimeError(message)


def crashes(context):
    yield Row("before", {"n": 1})
    sys.stdout.flush()
    os.abort()


def hangs(context):
    yield Row("before", {"n": 1})
    if os.fork() == 0:
        (context.work.parent.parent / "child").write_text(str(os.getpid()))
    time.sleep(600)
