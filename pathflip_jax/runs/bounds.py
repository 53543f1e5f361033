"""Bounds of command-line options: values that are out of bounds or not numbers are refused before anything is read.

The bounds of a run's settings are defined with each setting, in `settings/`.
"""

from pathflip_jax.settings.fields import LARGEST_SIZE, SEED, Range, above_zero, share, whole

OPTIONS = {
    "seed": SEED,
    "slides": whole(1, 10**6),
    "workers": whole(1, 10**4),
    "cache-size": above_zero(),
    "slides-per-shard": whole(1),
    "edge-um": above_zero(),
    "override-mpp": above_zero(),
    "assume-mpp": above_zero(),
    "mpp": above_zero(),
    "patch-size": whole(1),
    "min-tissue": share(most_itself=True),
    "holes": Range(0, 1e12),
    "smallest": Range(0, 1e12),
    "batch-size": whole(1),
    "draws": whole(1),
    "clear": Range(0, 0.5, open_most=True),
    "window": whole(1),
    "smooth": Range(0),
    "threshold": Range(-1e6, 1e6),
    "min-patches": Range(0),
    "top": whole(1),
    "max-tokens": whole(1),
    "min-tokens": whole(0),
    "beams": whole(1),
    "length-penalty": Range(-1e3, 1e3),
    "repetition-penalty": above_zero(),
    "temperature": Range(0),
    "top-k": whole(1),
    "top-p": share(most_itself=True, zero=False),
    "heads": whole(1),
    "lora-alpha": above_zero(),
    "preemptions-per-day": Range(0, 86400),
    "most-slides": whole(1),
    "max-pixels": whole(0),
    "quality": whole(1, 95),
    "port": whole(0, 2**16 - 1),
    "shares": above_zero(),
    "folds": whole(2),
    "size": whole(1, LARGEST_SIZE),
    "decoder": whole(1, LARGEST_SIZE),
}
