"""Encoding throughput as in inference: slides of both families at growing batches, and texts."""

import statistics
import time
from functools import partial

import sides
import sides_pathflip2
from sides import Job, make_inputs

from accelerator_parts import Context, Row, Rows

BATCHES, SMALL_BATCHES = (1, 4, 16, 64), (1, 2)


def run(context: Context) -> Rows:
    """Slides or texts per second by batch, with results copied to the host."""
    for name, module, kind, regions in (
        ("slides of PathFLIP", sides, "encode_slide", 24),
        ("slides of PathFLIP2", sides_pathflip2, "encode_slide", 16),
        ("texts", sides, "encode_text", 1),
    ):
        sizes = module.SMALL if context.small else module.BASE
        for slides in SMALL_BATCHES if context.small else BATCHES:
            job = Job(kind, slides, min(regions, 2) if context.small else regions)
            encode = module.ours(job, sizes, make_inputs(job, sizes), context.dtype, None, False)
            seconds = median_seconds(partial(encode, 0), 3 if context.small else 10)
            count = slides * (1 + sides.K) if kind == "encode_text" else slides
            row = {"what": name, "batch": count, "ms": 1e3 * seconds, "per_second": count / seconds}
            yield Row(f"encoding in {context.dtype}", row)


def median_seconds(call, repeats: int) -> float:
    """Median time of a call, including its results, after a first call that compiles."""
    call()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
