"""What a worker process does with one slide: read it, and write it as a record of its own.

A worker never raises for what is wrong with a slide; it says so in a line that names the file.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data_prep.encoders import PatchEncoder, load_encoder
from data_prep.tiling import open_slide, read_patches, tile_slide
from pathflip_jax.data.features import SlideFeatures, read_features
from pathflip_jax.data.records import write_shard
from pathflip_jax.data.storage import Place


@dataclass(frozen=True)
class Job:
    """One slide on its way to a record: read from `file`, written to `part`, meant for `shard`."""

    slide_id: str
    case_id: str
    file: Path
    shard: Place
    part: Place
    settings: dict[str, Any]
    workers: int


class Outcome(NamedTuple):
    """What a worker says of a slide: nothing went wrong, or this did; `fatal` when every slide will meet it."""

    error: str = ""
    fatal: bool = False


def prepare_slide(job: Job) -> Outcome:
    """From a slide file to its part."""
    return _guarded(job, _slide_features)


def import_slide(job: Job) -> Outcome:
    """From a feature file to its part."""
    return _guarded(job, _imported_features)


def _guarded(job: Job, read: Callable[[Job], SlideFeatures]) -> Outcome:
    """Read and write one slide; whatever goes wrong with it becomes a line of text."""
    try:
        slide = read(job)
    except (ValueError, OSError) as error:
        return Outcome(str(error))
    except Exception as error:  # a reader's own bug, met by one file, must not end the night's run
        return Outcome(f"{job.file}: {type(error).__name__}: {error}")
    try:
        write_shard(job.part, [slide], **region_cut(job.settings))
    except OSError as error:
        return Outcome(str(error), fatal=True)
    except ValueError as error:
        return Outcome(f"{job.file}: {error}")
    return Outcome()


def _slide_features(job: Job) -> SlideFeatures:
    settings = job.settings
    encode = _encoder(settings["encoder"], settings["half"], max(1, (os.cpu_count() or 1) // job.workers))
    with open_slide(job.file, settings["assume_mpp"]) as slide:
        tiles = tile_slide(slide, settings["patch_size"], settings["mpp"], settings["min_tissue"])
        features = np.concatenate([encode(patches) for patches in read_patches(slide, tiles)])
        return SlideFeatures(
            job.slide_id,
            job.case_id,
            features,
            tiles.coords,
            tiles.patch_size_level0,
            slide.mpp,
            slide.width,
            slide.height,
            encode.name,
        )


def _imported_features(job: Job) -> SlideFeatures:
    given = {name: job.settings[name] for name in ("patch_size", "mpp", "encoder")}
    return read_features(job.file, slide_id=job.slide_id, case_id=job.case_id, **given)


@lru_cache(maxsize=1)
def _encoder(name: str, half: bool, threads: int) -> PatchEncoder:
    encoder = load_encoder(name, half)
    if "torch" in sys.modules:  # as many threads in all as there are cores, not as many in each worker
        sys.modules["torch"].set_num_threads(threads)
    return encoder


def try_encoder(settings: dict[str, Any]) -> Outcome:
    """Load the encoder and give it one patch, so that what is wrong with it is said once, not once a slide."""
    size = settings["patch_size"]
    try:
        load_encoder(settings["encoder"], settings["half"])(np.zeros((1, size, size, 3), np.uint8))
    except (ValueError, OSError, ImportError) as error:
        return Outcome(str(error))
    return Outcome()


def region_cut(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that say how regions are cut, as `write_shard` takes them."""
    return {"cut": settings["cut"], "edge_um": settings["edge_um"]}
