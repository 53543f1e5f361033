"""PathFLIP2 against PyTorch's own layers and transformers' BERT; padding and chunks change nothing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from pathflip_jax.convert.pytorch import to_jax
from pathflip_jax.data.batches.packing import pack
from pathflip_jax.data.batches.pipeline import Batch
from pathflip_jax.losses.pathflip2 import SigmoidLossConfig
from pathflip_jax.model import pathflip2
from pathflip_jax.model.config import PathFLIP2Config
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.model.pathflip2 import PathFLIP2
from pathflip_jax.training.objectives import sigmoid_alignment
from pathflip_jax.training.step import loss_and_gradients

CONFIG = PathFLIP2Config(
    feature_dim=12, embed_dim=16, hidden=24, layers=2, heads=2, intermediate=32, vocab_size=50, max_positions=32,
    tokens=5, token_heads=4, text_region_heads=2, top_k=3, bias_init=-2.0,
)  # fmt: skip
B, N, K = 2, 7, 2

# Compiled as one program instead of hundreds, one per operation.
encode_slides = jax.jit(PathFLIP2.encode_slides, static_argnames="attention")
encode_texts = jax.jit(PathFLIP2.encode_texts)


@pytest.fixture(scope="module")
def model() -> PathFLIP2:
    return moved(CONFIG)


def moved(config: PathFLIP2Config) -> PathFLIP2:
    """Model whose norms and biases differ from their initial values, so that each has an effect."""
    model = PathFLIP2(config, nnx.Rngs(0))
    rng = np.random.default_rng(1)
    flat = {name: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32) for name, x in flatten(model).items()}
    return unflatten(config, jax.tree.map(jnp.asarray, flat))


@pytest.fixture(scope="module")
def slides() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(2)
    mask = np.ones((B, N), bool)
    mask[1, 5:] = False
    return rng.standard_normal((B, N, CONFIG.feature_dim)).astype(np.float32), mask


def test_padding_and_order_of_patches_change_nothing(model, slides):
    patches, mask = slides
    whole = encode_slides(model, patches[:, None], mask[:, None], attention=True)
    filled = np.where(mask[..., None], patches, np.nan)
    wider = np.pad(filled, ((0, 0), (0, 4), (0, 0)), constant_values=np.nan)
    padded = encode_slides(model, wider[:, :, None], np.pad(mask, ((0, 0), (0, 4)))[:, :, None], attention=True)
    np.testing.assert_allclose(padded.slide, whole.slide, atol=1e-5)
    np.testing.assert_allclose(padded.regions[:, :N], whole.regions, atol=1e-5)
    assert not np.asarray(padded.regions[:, N:]).any() and not np.asarray(whole.regions[1, 5:]).any()
    np.testing.assert_allclose(padded.slide_attention[..., 0][..., :N], whole.slide_attention[..., 0, :], atol=1e-6)
    order = np.random.default_rng(3).permutation(N)
    shuffled = encode_slides(model, patches[:, order, None], mask[:, order, None])
    np.testing.assert_allclose(shuffled.slide, whole.slide, atol=1e-5)
    np.testing.assert_allclose(shuffled.regions, whole.regions[:, order], atol=1e-5)


def test_a_slide_in_parts_is_the_whole_slide(model, slides, monkeypatch):
    patches, mask = slides

    def run(model):
        found = model.encode_slides(patches[:, None], mask[:, None])
        return jnp.sum(found.regions**2) + jnp.sum(found.slide**3), found

    def compiled():  # traced anew on each call, to pick up the changed PATCHES_AT_ONCE
        return jax.jit(jax.value_and_grad(run, has_aux=True)).lower(model).compile()

    one = compiled()
    monkeypatch.setattr(pathflip2, "PATCHES_AT_ONCE", 3)
    (_, whole), gradient = one(model)
    several = compiled()
    assert "while" in several.as_text() and "while" not in one.as_text()
    (_, parts), again = several(model)
    np.testing.assert_allclose(parts.regions, whole.regions, atol=1e-6)
    for name, x in flatten(gradient).items():
        np.testing.assert_allclose(flatten(again)[name], x, atol=1e-4, err_msg=name)


def test_soft_top_k_pools_the_k_most_similar(model, slides):
    patches, mask = slides
    found = encode_slides(model, patches[:, None], mask[:, None])
    texts = np.random.default_rng(4).standard_normal((B, 3, CONFIG.embed_dim)).astype(np.float32)
    pooled, weights = jax.jit(model.text_region)(texts, found.regions, found.region_mask)
    np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-6)
    assert not np.asarray(weights[1, :, 5:]).any()
    few = dataclasses.replace(CONFIG, top_k=100)
    everything, _ = pathflip2.SoftTopK(few)(texts, found.regions, found.region_mask)
    by_hand = jnp.einsum("bcn,bnd->bcd", weights, found.regions)
    np.testing.assert_allclose(everything, by_hand, atol=1e-5)
    for b in range(B):
        for c in range(3):
            best = np.argsort(-np.asarray(weights[b, c]))[:3]
            share = np.asarray(weights[b, c])[best]
            expected = (share / share.sum()) @ np.asarray(found.regions[b])[best]
            np.testing.assert_allclose(pooled[b, c], expected, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("head", ["soft_topk", "attention"])
def test_losses_and_gradients_are_those_of_pytorch(slides, head, pooling):
    """Against the exported PyTorch module: nn.MultiheadAttention, nn.RMSNorm, transformers' BERT, without packing."""
    torch = pytest.importorskip("torch")
    from torch.nn import functional

    from pathflip_jax.convert.families import names
    from pathflip_jax.convert.torch_pathflip2 import PathFLIP2 as Theirs

    config = dataclasses.replace(CONFIG, region_head=head, text_pooling=pooling, dropout=0.0, token_dropout=0.0)
    torch.manual_seed(0)
    theirs = Theirs(config.to_dict())
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    state = {name: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    params = jax.tree.map(jnp.asarray, to_jax(state, config))
    patches, mask = slides
    rng = np.random.default_rng(5)
    texts = [rng.integers(1, 50, rng.integers(3, 12)) for _ in range(B * (1 + K))]
    packed = pack(texts, [16, 32])
    rows = jax.tree.map(lambda x: jnp.asarray(x)[None], packed.rows)
    index = packed.cls_index.reshape(B, 1 + K)
    batch = Batch(patches[:, None], mask[:, None], rows, index, np.arange(B, dtype=np.int32), np.arange(B))
    stage = sigmoid_alignment(SigmoidLossConfig())
    step = jax.jit(lambda p: loss_and_gradients(stage, lambda p: unflatten(config, p), p, batch, jax.random.key(0)))
    (loss, metrics), gradients = step(params)

    found = theirs.encode_slides(torch.tensor(patches), torch.tensor(mask))

    def encode(chosen, level):
        ids = torch.zeros(len(chosen), max(map(len, chosen)), dtype=torch.long)
        for row, text in zip(ids, chosen, strict=True):
            row[: len(text)] = torch.tensor(text)
        there = torch.arange(ids.shape[1]) < torch.tensor([len(text) for text in chosen])[:, None]
        return theirs.encode_texts(ids, there.long(), level)

    captions = encode(texts[:: 1 + K], "slide")
    subcaptions = encode([text for i, text in enumerate(texts) if i % (1 + K)], "region").reshape(B, K, -1)
    pooled, _ = theirs.text_region(subcaptions, found.patches, torch.tensor(mask))

    def sigmoid(x, y, scale, bias):
        x, y = (functional.normalize(part.reshape(-1, part.shape[-1]), dim=-1) for part in (x, y))
        return -functional.logsigmoid((2 * torch.eye(len(x)) - 1) * (scale * x @ y.T + bias))

    slide_loss = sigmoid(found.slide, captions, theirs.global_logit_scale, theirs.global_logit_bias).sum() / B
    region_loss = sigmoid(pooled, subcaptions, theirs.local_logit_scale, theirs.local_logit_bias).mean()
    (slide_loss + region_loss).backward()
    assert float(metrics["loss_slide"]) == pytest.approx(slide_loss.item(), rel=1e-5)
    assert float(metrics["loss_region"]) == pytest.approx(region_loss.item(), rel=1e-5)
    known = dict(theirs.named_parameters())
    for name in names(config):
        if name.torch.endswith("key.bias"):
            continue  # zero in exact arithmetic: a constant added to all scores
        expected = name.to_jax(known[name.torch].grad.numpy())
        largest = np.abs(known[name.torch].grad.numpy()).max()
        np.testing.assert_allclose(gradients[name.path], expected, atol=1e-4 * largest + 1e-7, err_msg=name.path)


def test_a_padded_mean_counts_the_padding(slides):
    """As in the released code: a text alone is embedded as with `mean`, next to a longer one it is not."""
    model = moved(dataclasses.replace(CONFIG, text_pooling="mean_padded"))
    plain = unflatten(CONFIG, flatten(model))

    def encode(model, length):
        ids = np.zeros((1, 1, length), np.int32)
        ids[0, 0, :4] = (2, 9, 8, 3)
        segments = (np.arange(length) < 4).astype(np.int32)[None, None]
        rows = [(ids, segments, np.arange(length, dtype=np.int32)[None, None])]
        return encode_texts(model, rows, np.zeros((1, 1), np.int32))

    np.testing.assert_allclose(encode(model, 4), encode(plain, 4), atol=1e-6)
    assert np.abs(encode(model, 9) - encode(plain, 9)).max() > 1e-3
    np.testing.assert_allclose(encode(plain, 9), encode(plain, 4), atol=1e-6)


def test_dropout_is_drawn_from_the_key_and_remat_changes_nothing(model, slides):
    patches, mask = slides
    again = unflatten(dataclasses.replace(CONFIG, remat=True), flatten(model))
    found = [
        encode_slides(one, patches[:, None], mask[:, None], key=key).regions
        for one, key in (
            (model, None),
            (model, jax.random.key(0)),
            (again, jax.random.key(0)),
            (model, jax.random.key(1)),
        )
    ]
    np.testing.assert_allclose(found[1], found[2], atol=1e-6)
    assert np.abs(found[0] - found[1]).max() > 0.01 and np.abs(found[1] - found[3]).max() > 0.01


@pytest.mark.parametrize(
    ("change", "words"),
    [({"top_k": 0}, "top_k=0"), ({"topk_temperature": 0.0}, "topk_temperature"), ({"token_heads": 5}, "token_heads=5"),
     ({"text_pooling": "max"}, "text_pooling='max'"), ({"region_head": "mean"}, "region_head='mean'")],
)  # fmt: skip
def test_sizes_that_make_no_model_are_refused(change, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(CONFIG, **change)
