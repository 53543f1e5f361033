"""Settings by which a run's own patch features are made, so that a slide can be encoded the run's way."""

import logging
from pathlib import Path
from typing import Any, Protocol

from data_prep.encoders import StainTexture, runs_on_device
from data_prep.settings import PrepareSettings
from pathflip_jax.data.readers.feature_recipe import SRGB, FeatureRecipe, is_same_size
from pathflip_jax.vision.recipes import Recipe, find_recipe, registry_name

log = logging.getLogger(__name__)
_HALF = ("bfloat16", "float16")


class EncodedRun(Protocol):
    """What is needed of a run to encode slides for it: its name, its encoder, and the recipe of its features."""

    name: str
    encoder: str
    recipe: FeatureRecipe | None

    def check_records(self, records: Any) -> None:
        """Raise ValueError for records of another encoder or recipe."""


def settings_of_run(
    run: EncodedRun,
    *,
    weights: Path | None = None,
    patch_size: int | None = None,
    mpp: float | None = None,
    workers: int | None = None,
) -> PrepareSettings:
    """Settings of `prepare` for slides whose features a run is to understand: its encoder, patches and precision.

    `weights` are those of the encoder (None: from the hub or its cache). `patch_size` (level-0 pixels) with `mpp`
    gives the patches of a run that does not state them; `mpp` is also the level-0 resolution of slides that lack it.
    Raises ValueError for a run whose encoder is unknown or cannot be run here, with the way out.
    """
    name, recipe = run.name or "the model", run.recipe or FeatureRecipe()
    encoder = registry_name(run.encoder)
    if not encoder:
        raise ValueError(
            f"{name} does not state the patch encoder that it was trained on, so slides cannot be encoded for it; pass "
            "the feature file of the slide, made as its training features were, or `pathflip prepare` it with the "
            "right --encoder and pass the records"
        )
    if not (encoder == StainTexture.name or runs_on_device(encoder) or encoder.startswith(("timm:", "hf:"))):
        raise ValueError(
            f"{name} was trained on features of {encoder!r}, which is not among the encoders of `pathflip encoders`; "
            "extract the slide's features with the program that made the training features, and pass that file"
        )
    size, resolution = _patches(name, recipe, find_recipe(encoder), patch_size, mpp)
    return PrepareSettings(
        encoder=encoder,
        patch_size=size,
        mpp=resolution,
        assume_mpp=mpp,
        half=recipe.precision in _HALF and encoder != StainTexture.name,
        icc=recipe.colours == SRGB,
        weights=weights,
        workers=workers,
    )


def _patches(
    name: str, recipe: FeatureRecipe, published: Recipe | None, patch_size: int | None, mpp: float | None
) -> tuple[int, float]:
    """Edge of a patch in pixels and its resolution, as the encoder saw them in the run's training."""
    if recipe.patch_size and recipe.mpp:
        return recipe.patch_size, recipe.mpp
    edge = recipe.patch_um or (patch_size or 0) * (mpp or 0.0)
    if published is not None:
        own = published.patch_size * published.mpp
        if not edge:
            log.warning(
                "%s does not state its patches: those of %s are assumed, %d px at %g um per px", name, published.name,
                published.patch_size, published.mpp,
            )  # fmt: skip
        return published.patch_size, published.mpp if is_same_size(edge, own) else edge / published.patch_size
    if not edge:
        raise ValueError(
            f"{name} does not state the size of its patches; pass --patch-size and --mpp, the edge of a patch in "
            "level-0 pixels and the micrometres per pixel there, as in its training records"
        )
    return (recipe.patch_size or 256), edge / (recipe.patch_size or 256)
