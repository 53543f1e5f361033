"""PathFLIP: padding, packing, tied weights, precision, rematerialisation, parameter names."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.losses.pathflip import Embeddings, LossConfig, alignment_loss
from pathflip_jax.model.config import PathFLIPConfig
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.model.pathflip import PathFLIP

CONFIG = PathFLIPConfig(
    feature_dim=10,
    embed_dim=16,
    hidden=24,
    layers=2,
    heads=3,
    intermediate=32,
    num_queries=4,
    vocab_size=40,
    max_positions=16,
    region_layers=1,
)
B, R, S, K = 3, 2, 4, 2


@functools.cache
def model(**changes) -> PathFLIP:
    """Model with the same weights for every precision, none of them zero or one."""
    config, rng = dataclasses.replace(CONFIG, **changes), np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: flatten(PathFLIP(config, nnx.Rngs(0))))
    flat = {name: name.endswith("scale") + rng.normal(0, 0.2, x.shape) for name, x in shapes.items()}
    return unflatten(config, {name: jnp.asarray(x, jnp.float32) for name, x in flat.items()})


def slides() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    mask = rng.random((B, R, S)) < 0.7
    mask[:, :, 1] = True
    return rng.normal(size=(B, R, S, CONFIG.feature_dim)).astype(np.float32), mask


def texts() -> list[list[np.ndarray]]:
    """A caption and K subcaptions of 2 to 6 tokens for every slide."""
    rng = np.random.default_rng(2)
    return [[rng.integers(1, 40, rng.integers(2, 7)) for _ in range(1 + K)] for _ in range(B)]


def pack(groups: list[list[np.ndarray]], rows: int, length: int) -> tuple[list[tuple[np.ndarray, ...]], np.ndarray]:
    """Arrays of `encode_texts`: the texts of each group packed into rows, one after the other."""
    shape = (len(groups), rows, length)
    tokens, segments, positions = (np.zeros(shape, np.int32) for _ in range(3))
    index = np.zeros((len(groups), max(map(len, groups))), np.int32)
    for g, group in enumerate(groups):
        row = start = segment = 0
        for i, text in enumerate(group):
            if start + len(text) > length:
                row, start, segment = row + 1, 0, 0
            segment += 1
            place = (g, row, slice(start, start + len(text)))
            tokens[place], segments[place], positions[place] = text, segment, np.arange(len(text))
            index[g, i] = row * length + start
            start += len(text)
    return [(tokens, segments, positions)], index


def loss(model, patches, mask, packed, key=None):
    """Total loss and all outputs of a batch; the loss depends on every parameter that is used."""
    keys = (None, None) if key is None else jax.random.split(key)
    encoding = model.encode_slides(patches, mask, key=keys[0])
    embedded = model.encode_texts(*packed, key=keys[1]).reshape(B, 1 + K, -1)
    embeddings = Embeddings(encoding.slide, encoding.regions, encoding.region_mask, embedded[:, 0], embedded[:, 1:])
    negatives = jnp.asarray([[-1, 0, 1], [1, -1, 0], [0, 1, -1]])
    total, _ = alignment_loss(
        embeddings, model.text_region, negatives, jnp.arange(B), model.logit_scale[...], None, LossConfig()
    )
    return total, embeddings


FAST = {"xla_backend_optimization_level": 0}  # half the time to compile; these arrays are tiny
step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=FAST)


@functools.cache
def reference():
    """Reference outputs and gradients, without padding other than the mask of `slides`."""
    return step(model(), *slides(), pack(texts(), 3, 8))


def check_same(result, *, atol=2e-6):
    """Outputs of the real slides, regions and texts, and the gradient of every parameter, as in the reference."""
    ((total, ours), gradients), ((expected, theirs), wanted) = result, reference()
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    ours = ours._replace(regions=ours.regions[:, :R], region_mask=ours.region_mask[:, :R])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), ours, theirs)
    for (name, a), b in zip(flatten(gradients).items(), flatten(wanted).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-7 + 1e-5 * np.abs(b).max(), err_msg=name)


def test_every_parameter_but_the_key_bias_learns():
    _, gradients = reference()
    still = [name for name, x in flatten(gradients).items() if not np.abs(x).max() > 1e-6]
    cross = [f"qformer/layers/{i}/cross_attention/key/bias" for i in CONFIG.cross_layers]
    # Biases of keys cancel in every softmax; w_k's too, since it only shifts all keys.
    allowed = {name for name in flatten(model()) if name.endswith("key/bias")}
    assert set(cross) <= set(still) <= allowed


@pytest.mark.parametrize("filler", [0.0, 7.0, np.nan])
def test_padding_of_patches_and_regions_changes_nothing(filler):
    patches, mask = slides()
    patches = np.where(mask[..., None], patches, filler)
    patches = np.pad(patches, ((0, 0), (0, 2), (0, 3), (0, 0)), constant_values=filler)
    mask = np.pad(mask, ((0, 0), (0, 2), (0, 3)))
    result = step(model(), patches.astype(np.float32), mask, pack(texts(), 3, 8))
    check_same(result)
    assert not result[0][1].region_mask[:, R:].any()
    np.testing.assert_array_equal(result[0][1].regions[:, R:], 0)


def test_padding_and_packing_of_texts_changes_nothing():
    """All texts in one group, in wider rows and with empty rows, equal the reference with three groups."""
    together = [[text for group in texts() for text in group]]
    ((tokens, segments, positions),), index = pack(together, 6, 11)
    assert not segments[0, -1].any() and (segments == 0).any() and segments.max() > 1
    tokens = np.where(segments == 0, 5, tokens)  # padding may hold any token
    check_same(step(model(), *slides(), ([(tokens, segments, positions)], index)))


def test_texts_in_rows_of_different_lengths_are_the_same():
    """With the last slide's texts in short rows and the others in long rows after them, only positions change."""
    first, last = pack([texts()[-1]], 3, 8), pack([[text for group in texts()[:-1] for text in group]], 4, 11)
    index = np.concatenate([last[1] + 3 * 8, first[1]], axis=1)
    check_same(step(model(), *slides(), (first[0] + last[0], index)))


def test_each_text_alone_gives_the_same_embedding():
    encode = jax.jit(lambda m, *packed: m.encode_texts(*packed))
    packed = encode(model(), *pack(texts(), 3, 8))
    for g, group in enumerate(texts()):
        for i, text in enumerate(group):
            alone = encode(model(), *pack([[text]], 1, 8))
            np.testing.assert_allclose(packed[g, i], alone[0, 0], atol=2e-6)


def test_a_slide_without_patches_harms_no_other():
    patches, mask = slides()
    mask[1] = False

    def read(model):
        encoding = model.encode_slides(patches, mask, attention=True)
        return jnp.square(encoding.regions).sum() + encoding.slide.sum(), encoding

    (value, encoding), gradients = jax.jit(jax.value_and_grad(read, has_aux=True), compiler_options=FAST)(model())
    assert np.isfinite(value) and all(np.isfinite(x).all() for x in flatten(gradients).values())
    np.testing.assert_array_equal(encoding.regions[1], 0)
    np.testing.assert_array_equal(encoding.slide_attention[1], 0)
    others = np.array([0, 2])
    np.testing.assert_allclose(encoding.slide[others], reference()[0][1].slide[others], atol=2e-6)


def test_a_fully_masked_region_pools_zero():
    """Its queries receive only the residual: the value bias must not be added where there is no patch."""
    patches, mask = slides()
    mask[0, 1] = False
    read = jax.jit(lambda m, x: m.qformer.read_patches(m.patch_projection(x), mask).regions)
    other = model()
    flat = flatten(other)
    for i in CONFIG.cross_layers:
        for part in ("kernel", "bias"):
            flat[f"qformer/layers/{i}/cross_attention/value/{part}"] += 1.0
    states, changed = read(other, patches), read(unflatten(CONFIG, flat), patches)
    np.testing.assert_array_equal(states[0, 1], changed[0, 1])
    assert np.abs(states[0, 0] - changed[0, 0]).max() > 0.01


@pytest.mark.parametrize("normaliser", ["released", "per_slide"])
def test_a_batch_of_one_slide_learns_without_negatives(normaliser):
    rng = np.random.default_rng(3)
    shapes = [(1, 16), (1, R, 16), (1, 16), (1, K, 16)]
    slide, regions, captions, subcaptions = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    batch = Embeddings(slide, regions, jnp.ones((1, R), bool), captions, subcaptions)
    none, case, scale = -jnp.ones((1, 1), int), jnp.zeros(1, int), jnp.asarray(2.0)

    def total(model):
        config = LossConfig(normaliser=normaliser)
        return alignment_loss(batch, model.text_region, none, case, scale, None, config)[0]

    found, gradient = jax.value_and_grad(total)(model())
    pooled, _ = model().text_region(subcaptions, regions, batch.region_mask)
    cosine = (pooled * subcaptions).sum(-1) / jnp.linalg.norm(pooled, axis=-1) / jnp.linalg.norm(subcaptions, axis=-1)
    positives = -jax.nn.log_sigmoid(scale * cosine).mean()
    assert found == pytest.approx(float(positives) / (2 if normaliser == "per_slide" else 1), rel=1e-5)
    assert np.abs(flatten(gradient)["text_region/query/kernel"]).max() > 0


def test_attention_maps_are_shown_only_when_asked():
    patches, mask = slides()
    encode = jax.jit(lambda m, attention: m.encode_slides(patches, mask, attention=attention), static_argnums=1)
    without, encoding = encode(model(), False), encode(model(), True)
    assert without.slide_attention is None and without.region_attention is None
    np.testing.assert_allclose(without.slide, encoding.slide, atol=1e-6)
    assert encoding.slide_attention.shape == encoding.region_attention.shape == (B, 3, 4, R, S)
    np.testing.assert_allclose(encoding.slide_attention.sum((-1, -2)), 1, atol=1e-5)
    np.testing.assert_allclose(encoding.region_attention.sum(-1), 1, atol=1e-5)
    hidden = np.broadcast_to(~mask[:, None, None], encoding.slide_attention.shape)
    for shown in (encoding.slide_attention, encoding.region_attention):
        np.testing.assert_array_equal(np.asarray(shown)[hidden], 0)


def test_slide_and_text_share_one_qformer():
    """The gradient of a shared weight is the sum over its uses, and one step moves all of them together."""
    names = [name for name in flatten(model()) if name.endswith("word_embeddings/embedding")]
    assert names == ["qformer/word_embeddings/embedding"]
    patches, mask = slides()
    packed = pack(texts(), 3, 8)

    def read(model, slide: float, text: float):
        return (
            slide * jnp.square(model.encode_slides(patches, mask).slide[:, 0]).sum()
            + text * jnp.square(model.encode_texts(*packed)).sum()
        )

    small = model(layers=1)
    gradient = jax.jit(jax.grad(read), compiler_options=FAST)
    both, slide, text = (flatten(gradient(small, *weights)) for weights in ((1.0, 1.0), (1.0, 0.0), (0.0, 1.0)))
    name = "qformer/layers/0/self_attention/output/kernel"
    assert np.abs(slide[name]).max() > 1e-4 and np.abs(text[name]).max() > 1e-4
    np.testing.assert_allclose(both[name], slide[name] + text[name], rtol=1e-4, atol=1e-4)

    moved = jax.tree.map(lambda p, g: p - 0.1 * g, small, gradient(small, 1.0, 0.0))
    encode = jax.jit(lambda m: m.encode_texts(*packed))
    assert np.abs(encode(small) - encode(moved)).max() > 1e-4  # a step on slides alone moved the text encoder too


def test_remat_gives_the_same_gradients_with_dropout():
    arguments = (*slides(), pack(texts(), 3, 8), jax.random.key(3))
    (kept_loss, kept_out), kept = step(model(layers=1), *arguments)
    (remat_loss, _), remat = step(model(layers=1, remat=True), *arguments)
    np.testing.assert_allclose(kept_loss, remat_loss, rtol=1e-6)
    for (name, a), b in zip(flatten(kept).items(), flatten(remat).values(), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-7 + 1e-5 * np.abs(a).max(), err_msg=name)
    # Dropout is on, in slides, regions, captions and subcaptions, and a function of the key alone.
    (_, again), (_, other) = (step(model(layers=1), *arguments[:3], jax.random.key(k))[0] for k in (3, 4))
    for a, b, c in zip(*map(jax.tree.leaves, (kept_out, again, other)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.dtype == bool or np.abs(a - c).max() > 0.05


def test_bfloat16_is_close_and_keeps_float32_outside():
    half = jax.jit(loss)(model(compute_dtype="bfloat16"), *slides(), pack(texts(), 3, 8))
    (expected, wanted), _ = reference()
    assert half[0].dtype == jnp.float32 and abs(half[0] - expected) < 0.05 * expected
    for a, b in zip(*map(jax.tree.leaves, (half[1], wanted)), strict=True):
        if a.dtype != bool:
            assert a.dtype == jnp.float32
            np.testing.assert_allclose(a, b, atol=0.15)
            assert np.abs(a - b).max() > 1e-4  # it did compute in bfloat16
    read = jax.eval_shape(lambda m, *a: m.qformer.read_text(*a), model(compute_dtype="bfloat16"), *pack(texts(), 3, 8))
    assert read.dtype == jnp.bfloat16


def test_flatten_and_unflatten_are_inverse_and_share_a_compilation():
    flat = flatten(model())
    assert flat["qformer/layers/0/self_attention/query/kernel"].shape == (24, 24)
    assert "qformer/layers/1/cross_attention/query/kernel" not in flat
    assert "logit_bias" not in flat and "logit_bias" in flatten(model(logit_bias_init=-10.0))
    encode = jax.jit(lambda m: m.text_projection(jnp.ones(24)))
    for template in (CONFIG, model(), jax.eval_shape(lambda: PathFLIP(CONFIG, nnx.Rngs(0)))):
        again = unflatten(template, flat)
        jax.tree.map(np.testing.assert_array_equal, flatten(again), flat)
        encode(again)
    assert encode._cache_size() == 1


def test_unflatten_lists_every_fault():
    flat = flatten(model())
    flat["logit_bias"] = jnp.zeros(())
    del flat["logit_scale"]
    flat["text_projection/kernel"] = flat["text_projection/kernel"].T
    with pytest.raises(ValueError) as error:
        unflatten(CONFIG, flat)
    assert all(part in str(error.value) for part in ("logit_bias", "logit_scale", "(16, 24)", "(24, 16)"))


@pytest.mark.parametrize("init", ["bert", "fan_in"])
def test_query_networks_start_as_copies_and_vectors_plainly(init):
    fresh = PathFLIP(dataclasses.replace(CONFIG, init=init, logit_bias_init=-10.0), nnx.Rngs(1))
    flat = flatten(fresh)
    for name, x in flat.items():
        if "/ffn/" in name:
            copy = flat[name.replace("/ffn/", "/query_ffn/")]
            np.testing.assert_array_equal(x, copy)
            # Two buffers, or donating the parameters of a training step would fail.
            assert x.unsafe_buffer_pointer() != copy.unsafe_buffer_pointer()
        if name.startswith("qformer/") and name.endswith("bias"):
            np.testing.assert_array_equal(x, 0)
        if name.endswith("scale") and name != "logit_scale":
            np.testing.assert_array_equal(x, 1)
    assert flat["logit_scale"] == pytest.approx(np.log(1 / 0.07)) and flat["logit_bias"] == -10
    expected = 0.02 if init == "bert" else 32**-0.5
    assert flat["qformer/layers/0/ffn/output/kernel"].std() == pytest.approx(expected, rel=0.1)
