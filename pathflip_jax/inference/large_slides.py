"""Blockwise encoding of slides too large for one call, one block of regions at a time (DESIGN section 3).

A region's queries attend only to its own patches, so regions are encoded block by block. The slide's queries attend to
all patches in every cross-attention layer, with states updated since the layer before: each such layer takes one pass
over the patches, and the pooled blocks are combined by their share of the softmax. Memory holds one block of patches,
and the slide's regions.
"""

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pathflip_jax.model.cross_attention import Part
from pathflip_jax.model.pathflip import PathFLIP, SlideEncoding
from pathflip_jax.runtime.buckets import bucket

MOST_PATCHES = 2**17  # most slots of a slide, padding included, that are encoded in one call
BLOCK_PATCHES = 2**12
ROWS_AT_ONCE = 128  # rows of the region transformer, each of which attends to all

Block = tuple[Float[np.ndarray, "r S F"], Bool[np.ndarray, "r S"]]


def encode(model: PathFLIP, features: Sequence[np.ndarray], slots: Sequence[np.ndarray]) -> SlideEncoding:
    """Encode slides, given as features and patch slots [R, S], one after the other; padded to one size."""
    found = []
    for x, index in zip(features, slots, strict=True):
        columns = bucket(index.shape[1])
        rows = max(1, BLOCK_PATCHES // columns)

        def blocks(x=x, index=index, size=(1, rows, columns)) -> Iterator[Block]:
            for first in range(0, len(index), size[1]):
                patches, mask = padded([x], [index[first : first + size[1]]], size)
                yield patches[0], mask[0]

        slide, regions = encode_in_blocks(model, blocks)
        found.append((slide, regions[: len(index)]))
    most = max(len(regions) for _, regions in found)
    regions = [np.pad(regions, ((0, most - len(regions)), (0, 0))) for _, regions in found]
    mask = np.stack([np.arange(most) < len(index) for index in slots])
    return SlideEncoding(np.stack([slide for slide, _ in found]), np.stack(regions), mask, None, None)


def padded(
    features: Sequence[np.ndarray], slots: Sequence[np.ndarray], size: tuple[int, int, int]
) -> tuple[Float[np.ndarray, "B R S F"], Bool[np.ndarray, "B R S"]]:
    """Patches of bags in the slots of an array of this size, and the mask of filled slots."""
    patches = np.zeros((*size, features[0].shape[1]), features[0].dtype)
    mask = np.zeros(size, bool)
    wanted = [index[index >= 0] for index in slots]
    if not isinstance(features[0], np.ndarray) and all(x is features[0] for x in features):  # on disk: read only once
        read = np.split(features[0][np.concatenate(wanted)], np.cumsum([len(rows) for rows in wanted])[:-1])
    else:
        read = (x[rows] for x, rows in zip(features, wanted, strict=True))
    for i, (found, index) in enumerate(zip(read, slots, strict=True)):
        valid = index >= 0
        mask[i, : index.shape[0], : index.shape[1]] = valid
        patches[i, : index.shape[0], : index.shape[1]][valid] = found
    return patches, mask


def encode_in_blocks(
    model: PathFLIP, blocks: Callable[[], Iterator[Block]]
) -> tuple[Float[np.ndarray, "D"], Float[np.ndarray, "R D"]]:
    """Encode a slide and its regions, padding included, as `PathFLIP.encode_slides` does.

    Each call of `blocks` restarts the iteration, which yields the patches of the same number of regions each time.
    """
    qformer = model.qformer
    x = _first_queries(model)  # [1, 1, Q, H]
    regions, masks = [], []
    for index, layer in enumerate(qformer.layers):
        x, part = _before_patches(layer, x), None
        if layer.cross_attention is not None:
            part = layer.cross_attention.no_part(1, x.shape[-2], model.config.embed_dim)
            for patches, mask in blocks():
                projected = _project(model, patches[None], mask[None])
                part = _pool(layer, x, projected, mask[None], part)
                if index == qformer.config.cross_layers[0]:
                    regions.append(np.asarray(_read_regions(model, projected, mask[None])))
                    masks.append(mask.any(-1))
        x = _after_patches(layer, x, part)
    rows = jnp.concatenate([_mean_query(model, x), *regions])[None]  # [1, 1+R, D]
    mask = np.concatenate([[True], *masks])[None]
    for layer in model.region_layers:
        rows = _among_regions(layer, rows, mask)
    rows = np.where(mask[0, :, None], np.asarray(rows[0], np.float32), 0)
    return rows[0], rows[1:]


@jax.jit
def _first_queries(model: PathFLIP) -> Float[Array, "1 1 Q H"]:
    qformer = model.qformer
    return qformer.norm(qformer.query_tokens[...])[None, None].astype(model.config.compute_dtype)


@jax.jit
def _project(model: PathFLIP, patches: Array, mask: Array) -> Float[Array, "1 r S D"]:
    return model.project_patches(patches, mask)


@jax.jit
def _read_regions(model: PathFLIP, patches: Array, mask: Array) -> Float[Array, "r D"]:
    """Regions of a block before they attend to each other."""
    return model.slide_projection(model.qformer.read_patches(patches, mask).regions.mean(2))[0]


@jax.jit
def _mean_query(model: PathFLIP, x: Array) -> Float[Array, "1 D"]:
    return model.slide_projection(x.mean(2))[0]


@jax.jit
def _before_patches(layer, x: Array) -> Array:
    return layer.self_attention.among_queries(x, None)


@jax.jit
def _pool(layer, x: Array, patches: Array, mask: Array, so_far: Part) -> Part:
    return layer.cross_attention.pool_part(x, patches, mask, so_far)


@jax.jit
def _after_patches(layer, x: Array, part: Part | None) -> Array:
    if part is not None:
        x = layer.cross_attention.finish(x, *part.whole(x.dtype))
    return layer.query_ffn(x, None)


@jax.jit
def _among_regions(layer, rows: Float[Array, "1 1+R D"], mask: Array) -> Float[Array, "1 1+R D"]:
    """Rows after a layer of the region transformer: every row attends to all, in blocks of rows."""
    count = rows.shape[1]
    parts = -(-count // ROWS_AT_ONCE)
    padded = jnp.pad(rows, ((0, 0), (0, parts * ROWS_AT_ONCE - count), (0, 0)))
    cut = padded.reshape(1, parts, ROWS_AT_ONCE, -1).swapaxes(0, 1)
    found = jax.lax.map(lambda part: layer(part, mask, None, rows), cut)
    return found.swapaxes(0, 1).reshape(padded.shape)[:, :count]
