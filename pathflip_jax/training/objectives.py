"""Alignment stages: embeddings of a batch, and the losses between them (DESIGN section 4)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from pathflip_jax.losses.pathflip import (
    CosinePooling,
    Embeddings,
    LossConfig,
    ShardMap,
    alignment_loss,
    draw_negatives,
    region_loss,
    slide_loss,
    unsharded,
)
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig, pair_loss, sigmoid_slide_loss
from pathflip_jax.model.parameters import AlignmentModel, Key
from pathflip_jax.model.pathflip import PathFLIP, SlideEncoding
from pathflip_jax.model.pathflip2 import PathFLIP2
from pathflip_jax.training.augment import NO_AUGMENTATION, Augmentation
from pathflip_jax.training.stage import Stage


def _encode(
    model: AlignmentModel, batch, key: Key | None, augment: Augmentation
) -> tuple[SlideEncoding, jax.Array, jax.Array]:
    """Encoded slides of a batch, their captions [B, D] and their subcaptions [B, K, D]."""
    slide_key, text_key = (None, None) if key is None else jax.random.split(key)
    patches = augment(batch.patches, batch.patch_mask, None if key is None else jax.random.fold_in(key, 2))
    slides = model.encode_slides(patches, batch.patch_mask, key=slide_key)
    B, C = batch.text_index.shape  # C = 1 + K: the caption, then its subcaptions
    index = batch.text_index.reshape(len(batch.text_rows[0].tokens), -1)  # [G, B/G * C]
    states = model.read_texts(batch.text_rows, index, key=text_key).reshape(B, C, -1)
    keys = (None, None) if key is None else jax.random.split(jax.random.fold_in(text_key, 1))
    captions = model.project_texts(states[:, 0], "slide", key=keys[0])
    return slides, captions, model.project_texts(states[:, 1:], "region", key=keys[1])


def alignment(config: LossConfig, shard_map: ShardMap = unsharded, augment: Augmentation = NO_AUGMENTATION) -> Stage:
    """PathFLIP stage: slide-caption and region-subcaption losses (DESIGN section 4), with all parameters trained.

    `shard_map` distributes the slides of a batch over devices: `runtime.sharding.shard_by_slide` on a mesh.
    """

    def encode(model: PathFLIP, batch, key: Key | None) -> dict[str, jax.Array]:
        slides, captions, subcaptions = _encode(model, batch, key, augment)
        embeddings = {"slide": slides.slide, "regions": slides.regions}
        return embeddings | {"captions": captions, "subcaptions": subcaptions}

    def objective(model: PathFLIP, embeddings: dict[str, jax.Array], batch, key: Key):
        B, K, _ = embeddings["subcaptions"].shape
        return alignment_loss(
            Embeddings(region_mask=jnp.any(batch.patch_mask, axis=-1), wording=batch.wording, **embeddings),
            model.text_region
            if config.region_pooling == "attention"
            else CosinePooling(jnp.asarray(config.pooling_temperature)),
            draw_negatives(key, B, K),
            batch.related,
            model.logit_scale[...],
            None if model.logit_bias is None else model.logit_bias[...],
            config,
            shard_map,
        )

    return Stage(encode, objective, lambda name: True)


def sigmoid_alignment(
    config: SigmoidLossConfig,
    shard_map: ShardMap = unsharded,
    frozen: Callable[[str], bool] = lambda name: False,
    augment: Augmentation = NO_AUGMENTATION,
) -> Stage:
    """PathFLIP2 stage: slide-caption and patch-subcaption losses, with all but the `frozen` parameters trained.

    With the pair loss a text pools its own slide only, so patches need not leave their microbatch.
    """
    flair = LossConfig(normaliser="per_positive", negatives_at_once=config.slides_at_once or None)

    def encode(model: PathFLIP2, batch, key: Key | None) -> dict[str, jax.Array]:
        slides, captions, subcaptions = _encode(model, batch, key, augment)
        embeddings = {"slide": slides.slide, "captions": captions, "subcaptions": subcaptions}
        if not config.region_weight:
            return embeddings
        if config.region == "flair":
            return embeddings | {"regions": slides.regions}
        pooled, _ = model.text_region(subcaptions, slides.regions, slides.region_mask)
        return embeddings | {"pooled": pooled}

    def objective(model: PathFLIP2, embeddings: dict[str, jax.Array], batch, key: Key):
        slides, captions, subcaptions = (embeddings[name] for name in ("slide", "captions", "subcaptions"))
        metrics, loss = {}, jnp.zeros(())
        if config.slide_weight:
            if config.slide == "infonce":
                options = {"temperature": config.temperature, "label_smoothing": config.label_smoothing}
                metrics["loss_slide"] = slide_loss(slides, captions, batch.related, **options)
            else:
                known = model.slide_scale[...], model.slide_bias[...]
                metrics["loss_slide"] = sigmoid_slide_loss(slides, captions, batch.related, *known)
            loss += config.slide_weight * metrics["loss_slide"]
        if config.region_weight:
            known = model.region_scale[...], model.region_bias[...]
            if config.region == "flair":
                B, K, _ = subcaptions.shape
                mask = batch.patch_mask.reshape(B, -1)
                given = Embeddings(slides, embeddings["regions"], mask, captions, subcaptions, batch.wording)
                negatives = draw_negatives(key, B, K)
                found, cosines = region_loss(
                    given, model.text_region, negatives, batch.related, *known, flair, shard_map
                )
            else:
                found, cosines = pair_loss(
                    embeddings["pooled"], subcaptions, batch.related, *known, config, shard_map, batch.wording
                )
            metrics |= {"loss_region": found} | cosines
            loss += config.region_weight * found
        return loss, metrics | {"loss": loss}

    return Stage(encode, objective, lambda name: not frozen(name))
