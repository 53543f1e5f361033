"""Memory checks of compiled programs, before they run.

XLA plans all memory of a program at compilation, so the memory of a step is known, not estimated. A run that cannot fit
fails in a second and names settings that would; an allocator fails after an hour, and on a CPU the kernel kills the
process without a message.
"""

import jax

from pathflip_jax.runtime import limits

GIB = 2**30
PAIR_ARRAYS = 4  # arrays of the size of the region loss's largest one, assumed to be in memory simultaneously
USABLE = 0.9  # share of the free memory that recommended settings may fill


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


def undivided_bytes(compiled, pairs: int) -> int:
    """Upper estimate of the bytes per device of a training step that gradient accumulation does not divide.

    These are the gradients (their sum, those of a microbatch, and the optimizer's updates), assumed to be as large as
    the donated arguments, which are the trained parameters and the two moments of AdamW; and the arrays of the region
    loss, which compares all slides of the batch.
    """
    return compiled.memory_analysis().alias_size_in_bytes + PAIR_ARRAYS * pairs


def check_step(
    compiled, batch_size: int, accumulate: int, remat: bool, pieces: int, pairs: int, section: str = "model"
) -> None:
    """Raise MemoryError if a compiled training step does not fit, with settings that would.

    `pieces` = devices that share the batch, `pairs` = bytes of the region loss's largest array
    (`losses.pathflip.pair_bytes`), `section` = the config section of the setting `remat`. Of the memory of a step,
    accumulation divides only what scales with the microbatch; the rest is `undivided_bytes`. A tenth of the free memory
    is left as a margin, for the embeddings of the batch and its copy in parts. The message says so if no factor would
    be enough.
    """
    device = jax.local_devices()[0]
    needed, free = needed_bytes(compiled), free_bytes(device)
    if free is None or needed <= free:
        return
    undivided = min(undivided_bytes(compiled, pairs), needed)
    factors = [n for n in range(accumulate + 1, batch_size + 1) if batch_size % (n * pieces) == 0]
    estimates = {n: undivided + (needed - undivided) * accumulate / n for n in factors}
    enough = next((n for n in factors if estimates[n] <= USABLE * free), None)
    cures, no_factor = [], ""
    if pairs > needed / 20:
        cures.append(f"a smaller --config.loss.negatives_at_once (the region loss has arrays of {pairs / GIB:.1f} GiB)")
    if not remat:
        cures.append(f"--config.{section}.remat=True (recomputes activations instead of keeping them)")
    if enough:
        cures.append(f"--config.train.accumulate={enough} (the same loss over the whole batch, in {enough} parts)")
    else:
        cures.append("fewer --config.data.regions or a smaller --config.train.batch_size, or use more devices")
        no_factor = (
            f". No --config.train.accumulate is enough: even in {factors[-1]} parts, the step would need about "
            f"{estimates[factors[-1]] / GIB:.1f} GiB, of which gradients and the loss over the whole batch, "
            f"{undivided / GIB:.1f} GiB, are not divided"
            if factors
            else f". No --config.train.accumulate above {accumulate} divides {batch_size} slides over {pieces} devices"
        )
    raise MemoryError(
        f"a step of {batch_size} slides needs {needed / GIB:.1f} GiB on {device.device_kind} besides weights, "
        f"optimizer state and batch, but only {free / GIB:.1f} GiB are free; set {' or '.join(cures)}{no_factor}"
    )


def check_features(needed: int) -> None:
    """Raise MemoryError if a device's share of a cohort's features does not fit."""
    device = jax.local_devices()[0]
    free = free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"the features take {needed / GIB:.1f} GiB on each {device.device_kind}, but only {free / GIB:.1f} GiB are "
            "free; set --config.data.resident=host, or '' to read them from disk for every batch"
        )


def check_slide(compiled, what: str) -> None:
    """Raise MemoryError if encoding the slides that `what` describes does not fit."""
    device = jax.local_devices()[0]
    needed, free = needed_bytes(compiled), free_bytes(device)
    if free is not None and needed > free:
        raise MemoryError(
            f"encoding {what} needs {needed / GIB:.1f} GiB on {device.device_kind}, but only {free / GIB:.1f} GiB are "
            "free; encode fewer slides at a time (batch_size=1), or cut a slide this large into its pieces of tissue"
        )
