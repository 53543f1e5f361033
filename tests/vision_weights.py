"""Random weights of vision transformers under timm's names, as published files hold them."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from pathflip_jax.vision import recipes
from pathflip_jax.vision.config import VisionConfig


def timm_weights(config: VisionConfig, seed: int = 0, dtype: type = np.float32) -> dict[str, np.ndarray]:
    """Weights of a transformer without registers, with GELU."""
    d, h, rng = config.width, config.hidden, np.random.default_rng(seed)
    layer = {
        "norm1.weight": (d,), "norm1.bias": (d,), "attn.qkv.weight": (3 * d, d), "attn.qkv.bias": (3 * d,),
        "attn.proj.weight": (d, d), "attn.proj.bias": (d,), "norm2.weight": (d,), "norm2.bias": (d,),
        "mlp.fc1.weight": (h, d), "mlp.fc1.bias": (h,), "mlp.fc2.weight": (d, h), "mlp.fc2.bias": (d,),
    }  # fmt: skip
    if config.layer_scale:
        layer |= {"ls1.gamma": (d,), "ls2.gamma": (d,)}
    shapes = {f"blocks.{i}.{name}": shape for i in range(config.depth) for name, shape in layer.items()}
    shapes |= {"cls_token": (1, 1, d), "pos_embed": (1, 1 + config.table_side**2, d)}
    shapes |= {"norm.weight": (d,), "norm.bias": (d,), "patch_embed.proj.bias": (d,)}
    shapes |= {"patch_embed.proj.weight": (d, 3, config.patch, config.patch)}
    return {name: (0.2 * rng.standard_normal(shape, np.float32)).astype(dtype) for name, shape in shapes.items()}


@pytest.fixture
def small_encoder(tmp_path, monkeypatch):
    """A registered encoder of two small layers for patches of 48 px, and the folder of its weights."""
    network = replace(recipes.RECIPES["uni_v1"].network, width=32, depth=2, heads=2, hidden=64, patch=8, image=32)
    transform = replace(recipes.RECIPES["uni_v1"].transform, resize=40, crop=32)
    recipe = replace(
        recipes.RECIPES["uni_v1"], name="small", repository="nobody/small", files=("model.safetensors",),
        network=network, transform=transform, patch_size=48,
    )  # fmt: skip
    (tmp_path / "small").mkdir()
    save_file(timm_weights(network), tmp_path / "small" / "model.safetensors")
    monkeypatch.setitem(recipes.RECIPES, "small", recipe)
    monkeypatch.setitem(recipes._BY_SPELLING, "small", recipe)
    return recipe, tmp_path / "small"
