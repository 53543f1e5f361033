"""The vision transformer against small networks of transformers, and the effect of each option."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pathflip_jax.convert.vision import abstract_parameters, load_vision
from pathflip_jax.model.parameters import flatten, unflatten
from pathflip_jax.ops.activations import gelu
from pathflip_jax.vision.config import VisionConfig
from pathflip_jax.vision.recipes import RECIPES
from pathflip_jax.vision.transformer import VisionTransformer, attend

TINY = VisionConfig(width=32, depth=2, heads=4, hidden=48, patch=8, image=32)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "patch_size": 8, "image_size": 32}


def pixels(config: VisionConfig, batch: int = 2) -> np.ndarray:
    random = np.random.default_rng(0)
    return random.normal(size=(batch, config.image, config.image, 3)).astype(np.float32)


def network_of(config: VisionConfig, seed: int = 0) -> VisionTransformer:
    """Network with random parameters, equal where two configs have the same."""
    template = jax.eval_shape(lambda: VisionTransformer(config))
    flat = {}
    for name, shape in abstract_parameters(config).items():
        random = np.random.default_rng([seed, *name.encode()])
        spread = shape.shape[-2] ** -0.5 if name.endswith("kernel") else 0.5
        flat[name] = jnp.asarray(random.normal(float(name.endswith("scale")), spread, shape.shape), jnp.float32)
    return unflatten(template, flat)


@jax.jit
def run(network: VisionTransformer, images: jax.Array) -> jax.Array:
    return network(images)


def features(network: VisionTransformer, images=None) -> np.ndarray:
    return np.asarray(run(network, pixels(network.config) if images is None else images))


def apart(one: VisionConfig, other: VisionConfig) -> float:
    """Largest difference between the features of two configs with the same parameters, relative to the largest."""
    images = pixels(one)
    ours, theirs = (features(network_of(config), images) for config in (one, other))
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


# Against transformers: a model is saved as a published folder and loaded from it.


@pytest.fixture(scope="module")
def transformers():
    pytest.importorskip("torch", reason="PyTorch is not installed")
    return pytest.importorskip("transformers", reason="transformers is not installed")


def compared(model, name: str, config: VisionConfig, folder: Path, output=None, **options) -> None:
    """Features of a model, all of whose parameters are drawn, and ours from the folder that it saves agree."""
    import torch

    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.eval().save_pretrained(folder)
    network = load_vision(replace(RECIPES[name], network=config), folder).network
    images = pixels(config)
    with torch.no_grad():
        theirs = model(pixel_values=torch.from_numpy(images).permute(0, 3, 1, 2), **options)
        theirs = (output or (lambda found: found.last_hidden_state[:, 0]))(theirs).numpy()
    ours = features(network, images)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())
    assert np.abs(ours[0] - ours[1]).max() > 0.01 * np.abs(ours).max()


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_vit_is_that_of_transformers(transformers, tmp_path, eps):
    config = transformers.ViTConfig(intermediate_size=48, layer_norm_eps=eps, **SIZES)
    compared(transformers.ViTModel(config), "phikon", replace(TINY, layer_scale=False, eps=eps), tmp_path)


@pytest.mark.parametrize("image", [32, 40])
def test_vit_resamples_its_table_as_transformers_do(transformers, tmp_path, image):
    config = transformers.ViTConfig(intermediate_size=48, layer_norm_eps=1e-6, **SIZES)
    ours = replace(TINY, layer_scale=False, image=image, grid=4, resize="bicubic")
    compared(transformers.ViTModel(config), "phikon", ours, tmp_path, interpolate_pos_encoding=True)


@pytest.mark.parametrize(("swiglu", "hidden"), [(False, 128), (True, 88)])
@pytest.mark.parametrize("image", [32, 48])
def test_dinov2_is_that_of_transformers(transformers, tmp_path, swiglu, hidden, image):
    config = transformers.Dinov2Config(use_swiglu_ffn=swiglu, layer_norm_eps=1e-6, **SIZES)
    kind = "swiglu" if swiglu else "gelu"
    ours = replace(TINY, feed_forward=kind, hidden=hidden, image=image, grid=4, resize="bicubic")
    compared(transformers.Dinov2Model(config), "dinov2_vits14", ours, tmp_path)


@pytest.mark.parametrize("image", [32, 24])
def test_dinov2_with_registers_is_that_of_transformers(transformers, tmp_path, image):
    """It resamples with antialias, unlike DINOv2 without registers; the mean is of patches alone."""
    config = transformers.Dinov2WithRegistersConfig(
        use_swiglu_ffn=True, num_register_tokens=3, layer_norm_eps=1e-6, **SIZES
    )
    ours = replace(TINY, feed_forward="swiglu", hidden=88, registers=3, image=image, grid=4, pooling="class_and_mean")

    def output(found):
        tokens = found.last_hidden_state
        return tokens[:, 0].new_tensor(np.concatenate([tokens[:, 0], tokens[:, 4:].mean(1)], -1))

    compared(transformers.Dinov2WithRegistersModel(config), "hibou_b", ours, tmp_path, output)


def test_clip_is_that_of_transformers(transformers, tmp_path):
    config = transformers.CLIPVisionConfig(intermediate_size=48, projection_dim=24, **SIZES)
    ours = replace(
        TINY, feed_forward="quick_gelu", layer_scale=False, pre_norm=True, eps=1e-5, head="linear", head_width=24
    )
    model = transformers.CLIPVisionModelWithProjection(config)
    compared(model, "plip", ours, tmp_path, lambda found: found.image_embeds)


# Choices that load without a fault and change the features.

GATED = replace(TINY, feed_forward="swiglu", registers=4)


@pytest.mark.parametrize(
    ("config", "changes", "least"),
    [
        (TINY, {"feed_forward": "quick_gelu"}, 1e-3),
        (TINY, {"eps": 1e-2}, 1e-3),
        (TINY, {"heads": 8}, 0.05),
        (replace(TINY, grid=6), {"resize": "bicubic"}, 1e-3),
        (replace(TINY, grid=6), {"resize": "offset"}, 1e-3),
        (replace(TINY, grid=6, resize="bicubic"), {"resize": "offset"}, 1e-4),
        (replace(TINY, head="mlp", head_width=16), {"unit_length": True}, 0.05),
    ],
)
def test_an_option_without_parameters_changes_the_features(config, changes, least):
    assert apart(config, replace(config, **changes)) > least


def test_the_gate_is_silu_of_the_first_half():
    """timm's packed layer with GELU in the gate has the same shapes, and other features."""
    network = network_of(replace(TINY, depth=1, feed_forward="swiglu"))
    layer = jax.tree.map(lambda leaf: leaf[0], network.layers).feed_forward
    (first, one), (second, other) = (
        (np.asarray(part.kernel[...], np.float64), np.asarray(part.bias[...], np.float64))
        for part in (layer.inner, layer.outer)
    )
    x = np.random.default_rng(0).normal(size=(1, 3, 32)).astype(np.float32)
    gate, value = np.split(x @ first + one, 2, axis=-1)
    wanted = gate / (1 + np.exp(-gate)) * value @ second + other
    np.testing.assert_allclose(layer(jnp.asarray(x)), wanted, atol=1e-5)
    assert np.abs(np.asarray(gelu(jnp.asarray(gate))) * value @ second + other - wanted).max() > 0.05


def test_registers_stay_out_of_the_mean():
    network = network_of(replace(GATED, pooling="class_and_mean"))
    images = pixels(network.config)
    tokens = np.asarray(jax.jit(lambda network, images: network.tokens(images, jnp.float32))(network, images))
    assert tokens.shape == (2, 1 + 4 + 16, 32)
    ours = features(network, images)
    np.testing.assert_allclose(ours, np.concatenate([tokens[:, 0], tokens[:, 5:].mean(1)], -1), atol=1e-5)
    assert np.abs(ours[:, 32:] - tokens[:, 1:].mean(1)).max() > 0.05


@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_the_first_rows_of_the_table_belong_to_the_prefix(prefix):
    """None, the class token, or that and the registers have positions."""
    config = replace(GATED, prefix_positions=prefix)
    bare = network_of(config)
    table = np.asarray(bare.positions[...])
    moved = flatten(bare) | {"positions": jnp.asarray(np.concatenate([0 * table[:prefix], table[prefix:]]))}
    tokens = np.concatenate([np.asarray(bare.class_token[...])[None], np.asarray(bare.registers[...])])
    tokens[:prefix] += table[:prefix]
    moved |= {"class_token": jnp.asarray(tokens[0]), "registers": jnp.asarray(tokens[1:])}
    np.testing.assert_allclose(features(unflatten(bare, moved)), features(bare), atol=1e-5)


def test_patches_are_read_row_by_row():
    """A patch moves with its position: swapped patches and swapped rows of the table give the same features."""
    network = network_of(TINY)
    images = pixels(TINY)
    swapped = images.copy()
    swapped[:, 8:16, 16:24], swapped[:, 24:32, 0:8] = images[:, 24:32, 0:8], images[:, 8:16, 16:24]
    order = np.arange(17)
    order[[1 + 4 * 1 + 2, 1 + 4 * 3 + 0]] = order[[1 + 4 * 3 + 0, 1 + 4 * 1 + 2]]
    moved = unflatten(network, flatten(network) | {"positions": network.positions[...][order]})
    np.testing.assert_allclose(features(moved, swapped), features(network, images), atol=1e-5)
    assert np.abs(features(network, swapped) - features(network, images)).max() > 0.01


def test_vectors_are_of_length_1_where_the_original_makes_them_so():
    config = replace(TINY, head="mlp", head_width=16)
    raw, unit = (features(network_of(replace(config, unit_length=unit))) for unit in (False, True))
    np.testing.assert_allclose(unit, raw / np.linalg.norm(raw, axis=-1, keepdims=True), atol=1e-6)


def test_the_pooler_is_that_of_pytorch():
    """One query over all tokens, eight heads, eps 1e-5, as torch.nn.MultiheadAttention computes it."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    config = replace(TINY, pooling="attention", head_width=16)
    pooler = network_of(config).pooler
    flat = {name: torch.from_numpy(np.array(value)) for name, value in flatten(pooler).items()}
    tokens = torch.from_numpy(np.random.default_rng(0).normal(size=(2, 17, 32)).astype(np.float32))

    def norm(x, name):
        scale, bias = flat[f"{name}/scale"], flat[f"{name}/bias"]
        return torch.nn.functional.layer_norm(x, x.shape[-1:], scale, bias, 1e-5)

    parts = ("query_projection", "key", "value")
    theirs = torch.nn.MultiheadAttention(16, 8, kdim=32, vdim=32, batch_first=True)
    with torch.no_grad():
        for part, weight in zip(parts, (theirs.q_proj_weight, theirs.k_proj_weight, theirs.v_proj_weight), strict=True):
            weight.copy_(flat[f"{part}/kernel"].T)
        theirs.in_proj_bias.copy_(torch.cat([flat[f"{part}/bias"] for part in parts]))
        theirs.out_proj.weight.copy_(flat["output/kernel"].T)
        theirs.out_proj.bias.copy_(flat["output/bias"])
        query, keys = norm(flat["query"], "query_norm").expand(2, 1, 16), norm(tokens, "token_norm")
        wanted = norm(theirs(query, keys, keys)[0][:, 0], "norm").numpy()
    ours = pooler(jnp.asarray(tokens.numpy()), jnp.float32)
    np.testing.assert_allclose(ours, wanted, atol=1e-5)


def test_attention_is_softmax_of_scaled_products():
    random = np.random.default_rng(0)
    query, key, value = (random.normal(size=(2, 5, 3, 8)).astype(np.float32) for _ in range(3))
    weights = np.exp(np.einsum("bihd,bjhd->bhij", query, key) / 8**0.5)
    wanted = np.einsum("bhij,bjhd->bihd", weights / weights.sum(-1, keepdims=True), value)
    np.testing.assert_allclose(attend(*map(jnp.asarray, (query, key, value))), wanted, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, replace(GATED, pooling="class_and_mean")])
def test_bfloat16_is_close_and_features_are_float32(config):
    network, images = network_of(config), pixels(config)
    whole = features(network, images)
    halved = np.asarray(jax.jit(lambda network, images: network(images, jnp.bfloat16))(network, images))
    assert halved.dtype == np.float32 and 1e-6 < np.abs(halved - whole).max() < 0.1 * np.abs(whole).max()
    cosine = (halved * whole).sum(-1) / np.linalg.norm(halved, axis=-1) / np.linalg.norm(whole, axis=-1)
    assert cosine.min() > 0.999


@pytest.mark.parametrize(
    "config",
    [
        VisionConfig(width=96, depth=1, heads=3, hidden=384, patch=16),
        VisionConfig(width=96, depth=1, heads=3, hidden=256, patch=16, feed_forward="swiglu", registers=4),
        VisionConfig(width=96, depth=1, heads=3, hidden=256, patch=16, feed_forward="swiglu", rope=True),
    ],
)
def test_operations_are_those_that_xla_counts(config):
    """With one layer, since XLA counts the body of a loop once; the rest of its count is softmax, norms and gates."""
    network = jax.eval_shape(lambda: VisionTransformer(config))
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    counted = jax.jit(lambda network, images: network(images)).lower(network, images).cost_analysis()["flops"]
    assert 0.9 < config.operations() / counted <= 1.0
    deeper = replace(config, depth=3).operations() - replace(config, depth=2).operations()
    assert deeper == replace(config, depth=2).operations() - config.operations() > 0


def test_published_operations():
    """ViT-L/16 at 224 pixels: 61.6 billion multiply-adds (arXiv 2010.11929 in timm's count)."""
    assert abs(RECIPES["uni_v1"].network.operations() / 2 / 61.6e9 - 1) < 0.01
