"""Will it fit? Asked of the compiled program, before it runs.

XLA plans all memory of a program when it compiles it, so what a step will take is known, not guessed. A run that
cannot fit says so in a second and names settings that would; an allocator says so after an hour, or on a CPU the
kernel ends the process without a word.
"""

import jax

from pathflip_jax.runtime import limits

GIB = 2**30


def needed_bytes(compiled) -> int:
    """Bytes that one device needs for a compiled program besides its arguments: temporaries, and outputs of its own."""
    plan = compiled.memory_analysis()
    return plan.temp_size_in_bytes + plan.output_size_in_bytes - plan.alias_size_in_bytes


def free_bytes(device: jax.Device) -> int | None:
    """Free memory of a device; on a CPU its share of what this process may still take. None if unknown."""
    stats = device.memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if device.platform != "cpu":
        return None
    left = limits.memory_left()
    return None if left is None else left // jax.local_device_count()


def check_step(
    compiled, batch_size: int, accumulate: int, remat: bool, pieces: int, pairs: int, section: str = "model"
) -> None:
    """Raise MemoryError where a compiled training step does not fit, with the settings that would.

    `pieces` = devices that share the batch, `pairs` = bytes of the region loss's largest array
    (`losses.pathflip.pair_bytes`), several of which stand in memory at once, `section` of the config has the setting
    `remat`. Accumulation divides what a microbatch takes and leaves gradients and embeddings; the advice counts all of
    it as dividing, but demands a tenth to spare.
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
    """Raise MemoryError where a device's share of a cohort's features does not fit."""
    device = jax.local_devices()[0]
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the features take {needed / GIB:.1f} GiB on each {device.device_kind}, {free / GIB:.1f} GiB are free; "
            "set --config.data.resident=host, or '' to read them from disk for every batch"
        )


def check_slide(compiled, what: str) -> None:
    """Raise MemoryError where encoding does not fit."""
    device = jax.local_devices()[0]
    needed, free = needed_bytes(compiled), free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"{what} needs {needed / GIB:.1f} GiB on {device.device_kind} to be encoded, {free / GIB:.1f} GiB are "
            "free; encode fewer slides at a time (batch_size=1), or cut a slide this large into its pieces of tissue"
        )
