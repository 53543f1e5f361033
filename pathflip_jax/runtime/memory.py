"""Memory checks of compiled programs, before they run.

XLA plans all memory of a program at compilation, so the memory of a step is known, not estimated. A run that cannot fit
fails in a second and names settings that would; an allocator fails after an hour, and on a CPU the kernel kills the
process without a message.
"""

import jax

from pathflip_jax.runtime import limits

GIB = 2**30


def needed_bytes(compiled) -> int:
    """Bytes per device that a compiled program needs besides its arguments: temporaries and non-aliased outputs."""
    plan = compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def free_bytes(device: jax.Device) -> int | None:
    """Free memory of a device in bytes; on a CPU its share of what this process may allocate. None if unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu":
        return None
    left = limits.available_memory()
    return None if left is None else left // jax.local_device_count()


def check_step(
    compiled, batch_size: int, accumulate: int, remat: bool, pieces: int, pairs: int, section: str = "model"
) -> None:
    """Raise MemoryError if a compiled training step does not fit, with settings that would.

    `pieces` = devices that share the batch, `pairs` = bytes of the region loss's largest array
    (`losses.pathflip.pair_bytes`), several of which are in memory simultaneously, `section` = the config section of the
    setting `remat`. Accumulation divides the memory of a microbatch, but not that of gradients and embeddings; the
    advice treats all of it as divided, with a margin of a tenth.
    """
    device = jax.local_devices()[0]
    needed, free = needed_bytes(compiled), free_bytes(device)
    if free is None or needed <= free:
        return
    cures = []
    if pairs > needed / 20:
        cures.append(f"a smaller --config.loss.negatives_at_once (the region loss has arrays of {pairs / GIB:.1f} GiB)")
    if not remat:
        cures.append(f"--config.{section}.remat=True (recomputes instead of keeping activations)")
    more = [n for n in range(accumulate + 1, batch_size + 1) if batch_size % (n * pieces) == 0]
    enough = next((n for n in more if needed * accumulate / n <= 0.9 * free), None)
    if enough:
        cures.append(f"--config.train.accumulate={enough} (the same loss over the whole batch, in {enough} parts)")
    elif more:
        cures.append(f"--config.train.accumulate={more[-1]}, fewer --config.data.regions, more devices")
    else:
        cures.append("a smaller --config.train.batch_size, fewer --config.data.regions, more devices")
    raise MemoryError(
        f"a step of {batch_size} slides needs {needed / GIB:.1f} GiB on {device.device_kind} besides weights and "
        f"batch, {free / GIB:.1f} GiB are free; set {' or '.join(cures)}"
    )


def check_features(needed: int) -> None:
    """Raise MemoryError if a device's share of a cohort's features does not fit."""
    device = jax.local_devices()[0]
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the features take {needed / GIB:.1f} GiB on each {device.device_kind}, {free / GIB:.1f} GiB are free; "
            "set --config.data.resident=host, or '' to read them from disk for every batch"
        )


def check_slide(compiled, what: str) -> None:
    """Raise MemoryError if encoding does not fit."""
    device = jax.local_devices()[0]
    needed, free = needed_bytes(compiled), free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs {needed / GIB:.1f} GiB on {device.device_kind} to be encoded, {free / GIB:.1f} GiB are "
            "free; encode fewer slides at a time (batch_size=1), or cut a slide this large into its pieces of tissue"
        )
